"""The sections of `task: distill` and the combinations of them that cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from sft.config.rules import overlap
from sft.config.schema import (
    Count,
    Folder,
    Fraction,
    NonNegative,
    OnlyWith,
    Rule,
    RunConfig,
    Section,
    Seed,
    Train,
)
from sft.tasks.distill.worlds import WORLDS, WorldName


class Distill(Section):
    """Source histories of a gridworld, the model that learns from them, and its evaluation."""

    world: WorldName = "darkroom"
    """World in which the histories are made (docs/research/DISTILL.md)."""
    data_dir: Folder = ".cache/darkroom"
    """Folder of the source histories, with a subfolder for each set of settings that make them."""
    source: Literal["ppo", "stable_baselines3"] = "ppo"
    """`ppo` trains on all goals at once. `stable_baselines3` is the PPO of Stable-Baselines3, one
    goal at a time: the same histories, slower."""
    source_seed: Seed = 0
    """Seed of the source histories."""
    split_seed: Seed = 0
    """Seed of the split into goals to train on and 8 unseen ones. 0: the published split."""
    num_streams: Count = 100
    """Number of copies of the room in which a source learns at once; each gives one history."""
    num_steps: Count = 1000
    """Steps per history, whole episodes."""
    held_out_streams: Count = 5
    """Number of streams whose histories are held out for the evaluation loss: the last ones."""
    context: Count = 120
    """Maximum number of transitions that the model sees."""
    search_episodes: Count = 3
    """Number of episodes at the start of a history that are for search. A window takes episodes
    from these until one has found the goal."""
    search_best_of: Count = 32
    """Number of streams drawn for each of these episodes. The window takes the episode from the
    stream that visits the most new cells."""
    jump_to: Count = 12
    """The rest of a window is taken from this episode on (counted from 0)."""
    width: Count = 64
    """Size of the model's embeddings."""
    num_layers: Count = 4
    """Number of transformer blocks."""
    num_heads: Count = 4
    """Attention heads per block."""
    dropout: Fraction = 0.0
    """Probability of zeroing an element of what a layer adds to its input."""
    compress: bool = False
    """Splits the context into two regions. The model decides when the older one is dropped."""
    type_weight: Annotated[NonNegative, OnlyWith("distill.compress", (True,))] = 0.1
    """Weight of the token-type loss."""
    slide: Annotated[Count | None, OnlyWith("distill.compress", (False,))] = None
    """Number of oldest episodes to drop at once when the context is full. null: half of them."""
    eval_episodes: Count = 500
    """Episodes per attempt at an unseen goal; no weight is updated."""
    eval_seeds: Count = 16
    """Attempts at each unseen goal, each with its own random numbers."""
    eval_quick: Count = 50
    """Episodes per attempt in the evaluations during training (`train.eval_steps`)."""

    @property
    def episode(self) -> int:
        """Returns the number of steps of an episode."""
        return WORLDS[self.world][1]


EPISODES = ", ".join(f"{name}: {steps}" for name, (_, steps) in WORLDS.items())
RULES = (
    Rule(
        ("distill.context", "distill.compress", "distill.world"),
        lambda context, compress, world: context % (WORLDS[world][1] * (1 + compress)) != 0,
        f"must be a multiple of the steps of an episode ({EPISODES}); with distill.compress, of "
        "twice as many",
    ),
    Rule(
        ("distill.num_steps", "distill.context", "distill.world"),
        lambda steps, context, world: steps % WORLDS[world][1] != 0 or steps < context,
        f"must be a multiple of the steps of an episode ({EPISODES}), and at least distill.context",
    ),
    Rule(
        ("distill.jump_to", "distill.search_episodes", "distill.num_steps", "distill.world"),
        lambda later, first, steps, world: not first <= later < steps // WORLDS[world][1],
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
        ("distill.slide", "distill.context", "distill.world"),
        lambda slide, context, world: slide is not None and slide * WORLDS[world][1] > context,
        "is more than the number of episodes in distill.context",
    ),
    Rule(
        ("train.layout",),
        lambda layout: layout == "packed",
        "windows of histories all have the same length, so none is packed: leave it at auto",
    ),
    Rule(
        ("train.gradient_checkpointing",),
        lambda checkpointing: checkpointing in (True, "selective"),
        "the model of histories is too small for it: leave it at auto",
    ),
    Rule(
        ("train.activation_offload",),
        lambda offload: offload is True,
        "the model of histories is too small for it: leave it at false",
    ),
    Rule(
        ("train.fp8",),
        bool,
        "the model of histories is too small for it: remove this key",
    ),
    Rule(
        ("train.save_best",),
        lambda metric: metric not in (None, "loss", "perplexity"),
        "histories have no tokens of text: use loss",
    ),
    *(
        Rule(
            (f"train.{key}",),
            lambda value, default=Train.model_fields[key].default: value != default,
            "histories have losses of their own, and no embeddings of words: remove this key",
        )
        for key in ("loss", "label_smoothing", "z_loss", "mean_per", "neftune_alpha")
    ),
    Rule(
        ("distill.data_dir", "train.output_dir"),
        overlap,
        "must not be, hold or lie in train.output_dir: a run is moved aside",
    ),
)


class DistillConfig(RunConfig):
    """A configuration of `task: distill`."""

    task: ClassVar[str] = "distill"
    rules: ClassVar[Sequence[Rule]] = RULES
    distill: Distill = Distill()
    train: Train
