"""Defines what all parts of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field

from accelerate import Accelerator

from sft.runtime.log import Log
from sft.runtime.watchdog import Guard


@dataclass(frozen=True)
class Context:
    """The processes of a run, its log and its watchdog. By default nothing is logged or watched."""

    accelerator: Accelerator
    log: Log = field(default_factory=lambda: Log(None))
    guard: Guard = field(default_factory=Guard)
