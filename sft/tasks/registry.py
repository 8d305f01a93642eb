"""Which task a configuration means, and what rehearsals and plans have to know of it.

They ask here for what differs from task to task; the data that a plan is of, and the advice that
only fine-tuning can take, are told apart in `plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sft.config.schema import AnyConfig, Config, DistillConfig
from sft.data import batches
from sft.data.cache import Prepared
from sft.tasks.base import Parts, Row, Traits
from sft.tasks.crowd.agents import Agents
from sft.tasks.crowd.task import CrowdTune
from sft.tasks.distill.planning import (
    _distill_answering,
    _distill_blank,
    _distill_skeleton,
    _distill_traits,
)
from sft.tasks.sft.planning import _answering, _blank, _skeleton, _traits
from sft.tasks.sft.task import FineTune
from sft.train.task import Task


def make_task(config: Config, prepared: Prepared, built: nn.Module, *args: Any) -> FineTune:
    """The task that trains `built`; `args` as FineTune takes them."""
    kind = CrowdTune if isinstance(built, Agents) else FineTune
    return kind(config, prepared, built, *args)


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
    budget: batches.Budget,
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


PARTS = {
    Config.task: Parts(_traits, _skeleton, _blank, _answering),
    DistillConfig.task: Parts(
        _distill_traits, _distill_skeleton, _distill_blank, _distill_answering
    ),
}
