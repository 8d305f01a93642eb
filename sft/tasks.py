"""Which task a configuration means."""

from __future__ import annotations

from typing import Any

from torch import nn

from sft.config import Config
from sft.crowd.agents import Agents
from sft.crowd.task import CrowdTune
from sft.finetune import FineTune
from sft.prepare import Prepared


def make_task(config: Config, prepared: Prepared, built: nn.Module, *args: Any) -> FineTune:
    """The task that trains `built`; `args` as FineTune takes them."""
    kind = CrowdTune if isinstance(built, Agents) else FineTune
    return kind(config, prepared, built, *args)
