"""What the plan needs to know of distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from sft.config.schema import DistillConfig
from sft.data import batches
from sft.runtime.log import Log
from sft.tasks.base import Row, Traits, Words
from sft.tasks.distill import darkroom, histories, rollout, task, transformer
from sft.tasks.registry import skeleton
from sft.train.task import Task

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
    budget: batches.Budget,
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
