"""Which task a configuration means."""

from __future__ import annotations

from typing import Any

from sft.config import Config
from sft.crowd.task import CrowdTune
from sft.finetune import FineTune


def make_task(config: Config, *args: Any) -> FineTune:
    """`args` as FineTune takes them."""
    crowd = config.crowd
    whole = crowd.num_agents and crowd.agent is None
    return (CrowdTune if whole else FineTune)(config, *args)
