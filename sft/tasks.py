"""Which task a configuration means, and what rehearsals and plans have to know of it.

They ask here for what differs from task to task; the data that a plan is of, and the advice that
only fine-tuning can take, are told apart in `plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM

from sft import batching, chat, data, model, store
from sft.config import AnyConfig, Config, DistillConfig
from sft.crowd.agents import Agents
from sft.crowd.task import CrowdTune
from sft.distill import darkroom, histories, rollout, task, transformer
from sft.engine import Task
from sft.finetune import FineTune
from sft.generate import bytes_per_row
from sft.log import Log
from sft.prepare import Prepared

Row = tuple[int, int]  # tokens of an example, and those of them that the loss sees


def make_task(config: Config, prepared: Prepared, built: nn.Module, *args: Any) -> FineTune:
    """The task that trains `built`; `args` as FineTune takes them."""
    kind = CrowdTune if isinstance(built, Agents) else FineTune
    return kind(config, prepared, built, *args)


@dataclass(frozen=True)
class Words:
    """How a plan of the task is told."""

    examples: str = "examples"
    each: str = ""  # what one is
    items: str = "supervised"  # tokens that the loss is of
    answers: str = "answering held-out prompts"
    fewer: str = "evaluation.batch_size"  # the key that makes these take less
    shorter: str = "shorter held-out rows"  # what makes the held-out loss take less


@dataclass(frozen=True)
class Traits:
    """Of a configuration, beside `train`: what memory and time depend on."""

    text: Any  # sizes of the model, by their names in configurations of transformers
    cache: Path  # what outlives a run
    mode: str = "full"  # as `tuning.mode`
    agents: int = 1  # how often each token goes through the model
    layer: int = -1  # that the crowd looks at
    surveys: bool = False  # a pass more (engine.Task)
    attention: str = "auto"  # as `model.attn_implementation`
    vocabulary: int = 0  # of the tokenizer that is saved
    small: bool = False  # its layers: nothing is gained by tracing few of them or by checkpointing
    examples_bytes: int = 0  # of all that are trained on, where the RAM of each process has them
    waiting_bytes: int = 0  # of a token in a micro-batch that is collated and has to wait
    words: Words = Words()


def traits(config: AnyConfig) -> Traits:
    return PARTS[config.task].traits(config)


def skeleton(config: AnyConfig, depth: int | None = None) -> nn.Module:
    """The model as it is trained, adapters included, without storage; `depth`: layers of it."""
    with torch.device("meta"):
        return PARTS[config.task].skeleton(config, depth)


def blank(
    config: AnyConfig,
    precision: str,
    rows: Sequence[Row],
    group: Any,
    budget: batching.Budget,
    weights: bool,
) -> Task:
    """The task on examples that have nothing but lengths; without `weights` the model has random
    ones. `group`: an Accelerator, or what stands for one."""
    return PARTS[config.task].blank(config, precision, rows, group, budget, weights)


def answering_bytes(
    config: AnyConfig, precision: str, prompts: Sequence[int], world_size: int
) -> int:
    """Of one of the processes, beside what it holds, while what was learnt is tried.

    `prompts`: tokens of each that is held out.
    """
    return PARTS[config.task].answering(config, precision, prompts, world_size)


# --- fine-tuning -------------------------------------------------------------------------------


def _traits(config: Config) -> Traits:
    text = model.architecture(config.model).get_text_config()
    return Traits(
        text,
        Path(config.data.cache_dir),
        config.tuning.mode,
        max(1, config.crowd.num_agents),
        config.crowd.layer,
        config.crowd.num_agents > 1 and config.crowd.lambda_sw > 0,
        config.model.attn_implementation,
        text.vocab_size,
    )


def _skeleton(config: Config, depth: int | None) -> nn.Module:
    model.check_attention(config.model)  # a plan for a GPU loads nothing with it
    arch = model.architecture(config.model)
    base = AutoModelForCausalLM.from_config(
        arch if depth is None else model.shallow(arch, depth),
        trust_remote_code=config.model.trust_remote_code,
    )
    if config.tuning.mode == "full":
        return base
    return model.add_adapters(base.requires_grad_(False), config.tuning, config.crowd)


def _blank(
    config: Config,
    precision: str,
    rows: Sequence[Row],
    group: Any,
    budget: batching.Budget,
    weights: bool,
) -> Task:
    packed = store.pack(
        (i, data.Row([], None, "rehearsal", i), _example(*row)) for i, row in enumerate(rows)
    )
    examples = store.Examples(packed)
    prepared = Prepared(SimpleNamespace(pad_token_id=0), examples, examples, {})  # type: ignore[arg-type]
    built = model.build(config, precision, group.device, weights=weights)
    return make_task(config, prepared, built, group, Log(None), budget)


def _example(length: int, supervised: int) -> chat.Example:
    ids = [0] * length
    return chat.Example(ids, [chat.IGNORED] * (length - supervised) + ids[:supervised])


def _answering(config: Config, precision: str, prompts: Sequence[int], world_size: int) -> int:
    settings = config.evaluation
    asked = prompts[: settings.num_examples]
    if not len(asked):
        return 0
    rows = min(settings.batch_size, math.ceil(len(asked) / world_size))
    arch = model.architecture(config.model)
    each = bytes_per_row(arch, precision, int(max(asked)), settings.max_new_tokens)
    return rows * each * max(1, config.crowd.num_agents)


# --- distillation ------------------------------------------------------------------------------


def _distill_traits(config: DistillConfig) -> Traits:
    settings = config.distill
    sizes = {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "vocab_size": len(darkroom.MOVES),
    }
    return Traits(
        SimpleNamespace(**sizes),
        Path(settings.data_dir),
        small=True,
        examples_bytes=histories.num_bytes(settings),
        waiting_bytes=4 * transformer.NUM_FEATURES + 8,  # and its action
        words=Words(
            "windows",
            f" of {settings.context} transitions",
            "transitions",
            "trying the unseen goals",
            "distill.eval_seeds",
            "a smaller distill.context",
        ),
    )


def _distill_skeleton(config: DistillConfig, depth: int | None) -> nn.Module:
    assert depth is None  # it is traced whole
    return transformer.Transformer(config.distill)


def _distill_blank(
    config: DistillConfig,
    precision: str,
    rows: Sequence[Row],
    group: Any,
    budget: batching.Budget,
    weights: bool,
) -> Task:
    """Windows are of one length, so `rows` tell nothing new; nor has the model other weights."""
    built = task.build(config.distill, config.train.seed, group.device)
    with _disable_current_modes():  # a step gathers its windows outside of the rehearsal
        found = task.blank_histories(config.distill)
    return task.Distillation(config.distill, found, built, group, Log(None), budget)


def _distill_answering(
    config: DistillConfig, precision: str, prompts: Sequence[int], world_size: int
) -> int:
    """Played by a copy of the model in fp32, each rank its rows."""
    settings = config.distill
    _, unseen = darkroom.goals(settings.split_seed)
    rows = math.ceil(len(unseen) * settings.eval_seeds / world_size)
    copy = 4 * sum(p.numel() for p in skeleton(config).parameters())
    return copy + rows * rollout.bytes_per_row(settings)


# --- all of them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What the functions above do for a task; Any is the task's own configuration."""

    traits: Callable[[Any], Traits]
    skeleton: Callable[[Any, int | None], nn.Module]
    blank: Callable[..., Task]
    answering: Callable[[Any, str, Sequence[int], int], int]


PARTS = {
    Config.task: Parts(_traits, _skeleton, _blank, _answering),
    DistillConfig.task: Parts(
        _distill_traits, _distill_skeleton, _distill_blank, _distill_answering
    ),
}
