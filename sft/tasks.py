"""Which task a configuration means."""

from __future__ import annotations

from typing import Any

from sft.config import Config
from sft.crowd.task import CrowdTune
from sft.finetune import FineTune


def make_task(config: Config, *args: Any) -> FineTune:
    """`args` as FineTune takes them."""
    return (CrowdTune if config.crowd.num_agents else FineTune)(config, *args)
