"""The sections of `task: distill` and the combinations of them that cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sft.config.rules import is_safe_path
from sft.config.schema import (
    Count,
    Fraction,
    NonNegative,
    Rule,
    RunConfig,
    Section,
    Text,
    Train,
)

EPISODE = 20  # steps of an episode


class Distill(Section):
    data_dir: Text = ".cache/darkroom"
    """Where source histories are kept, a folder for each of the settings that make them."""
    source: Literal["ppo", "stable_baselines3"] = "ppo"
    """PPO on all goals at once, or that of Stable-Baselines3, goal by goal: the same, slower."""
    source_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the source histories."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Which 73 goals are trained on and which 8 are unseen (0: as published)."""
    num_streams: Count = 100
    """Copies of the room that a source learns in at once; each is one history."""
    num_steps: Count = 1000
    """Steps of each history; an episode has 20."""
    held_out_streams: Count = 5
    """Of them, the last: histories for the held-out loss, which are not trained on."""
    context: Count = 120
    """Transitions that the model sees, at most."""
    search_episodes: Count = 3
    """First episodes of the histories, of which a window is made while it has found nothing."""
    search_best_of: Count = 32
    """Each of them is, of so many streams, the one that visits most cells that are new to it."""
    jump_to: Count = 12
    """Episode of the histories, counted from 0, from which on the rest of a window comes."""
    width: Count = 64
    """Size of the model's embeddings."""
    num_layers: Count = 4
    """Blocks of the model."""
    num_heads: Count = 4
    """Heads of each attention."""
    dropout: Fraction = 0.0
    """Probability of dropping what a block adds."""
    compress: bool = False
    """Two regions of half the context each; the model says when the older one is dropped."""
    type_weight: NonNegative = 0.1
    """Weight of the token-type loss (`compress: true`)."""
    slide: Count | None = None
    """Oldest episodes that are dropped at once when the context is full. None: half of them."""
    eval_episodes: Count = 500
    """Episodes that each unseen goal is tried for, without an update."""
    eval_seeds: Count = 16
    """Times that each unseen goal is tried, with random numbers of their own."""
    eval_quick: Count = 50
    """Episodes at `train.eval_steps`."""


RULES = (
    Rule(
        ("distill.context", "distill.compress"),
        lambda context, compress: context % (EPISODE * (1 + compress)) != 0,
        f"must be whole episodes of {EPISODE} steps, as must half of it with distill.compress",
    ),
    Rule(
        ("distill.num_steps", "distill.context"),
        lambda steps, context: steps % EPISODE != 0 or steps < context,
        f"must be whole episodes of {EPISODE} steps, and at least distill.context",
    ),
    Rule(
        ("distill.jump_to", "distill.search_episodes", "distill.num_steps"),
        lambda later, first, steps: not first <= later < steps // EPISODE,
        "must be at least distill.search_episodes, and less than the episodes in distill.num_steps",
    ),
    Rule(
        ("distill.held_out_streams", "distill.num_streams"),
        lambda held_out, streams: held_out >= streams,
        "leaves no history to train on: give less than distill.num_streams",
    ),
    Rule(
        ("distill.width", "distill.num_heads"),
        lambda width, heads: width % heads != 0,
        "must be a multiple of distill.num_heads",
    ),
    Rule(
        ("distill.slide", "distill.context"),
        lambda slide, context: slide is not None and slide * EPISODE > context,
        "there are not so many episodes in distill.context",
    ),
    Rule(
        ("distill.slide", "distill.compress"),
        lambda slide, compress: slide is not None and compress,
        "is not read with distill.compress, where the model says what is dropped: remove this key",
    ),
    Rule(
        ("distill.type_weight", "distill.compress"),
        lambda weight, compress: weight != Distill().type_weight and not compress,
        "is only read with distill.compress: true; set that, or remove this key",
    ),
    Rule(
        ("train.layout", "distill.context"),
        lambda layout, _: layout == "packed",
        "windows of histories are of one length, none is packed: leave it at auto",
    ),
    Rule(
        ("train.gradient_checkpointing", "distill.context"),
        lambda checkpointing, _: checkpointing is True,
        "the model of histories is too small for it: leave it at auto",
    ),
    Rule(
        ("train.save_best", "distill.context"),
        lambda metric, _: metric == "token_accuracy",
        "histories have no tokens of text: use loss",
    ),
    Rule(
        ("distill.data_dir",),
        lambda path: not is_safe_path(path),
        "must name a folder: printable characters, at most 200, without '..' and '~'",
    ),
)


class DistillConfig(RunConfig):
    """`task: distill`."""

    task: ClassVar[str] = "distill"
    rules: ClassVar[Sequence[Rule]] = RULES
    distill: Distill = Distill()
    train: Train
