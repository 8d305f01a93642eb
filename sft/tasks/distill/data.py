"""The training windows of histories, the held-out ones, and their numbers."""

from __future__ import annotations

import numpy as np
import torch

from sft.tasks.base import Workload
from sft.tasks.distill import darkroom
from sft.tasks.distill.config import Distill
from sft.tasks.distill.histories import Windows
from sft.tasks.distill.source import Histories
from sft.tasks.distill.transformer import num_positions


def split(found: Histories, settings: Distill) -> tuple[Windows, Windows]:
    """Returns the training windows, and those of the held-out streams."""
    first = settings.num_streams - settings.held_out_streams
    train, held_out = (0, first), (first, settings.num_streams)
    return Windows(found, settings, *train), Windows(found, settings, *held_out)


def num_held_out(windows: Windows) -> int:
    """Returns the number of `windows` that the held-out loss is measured on."""
    return windows.num_goals * (windows.last - windows.first)


def blank_histories(settings: Distill) -> Histories:
    """Returns histories of zeros, which share one place in memory, where only sizes matter."""
    number = len(darkroom.goals(settings.split_seed)[0])
    shape = (number, settings.num_streams, settings.num_steps)
    return Histories(*[torch.zeros(1, 1, 1, dtype=torch.uint8).expand(shape)] * 4)


def windows(settings: Distill) -> Workload:
    """Returns the sizes of all windows, which follow from the settings, collected or not."""
    train, held_out = split(blank_histories(settings), settings)

    def workload(number: int, rest: Workload | None = None) -> Workload:
        supervised = np.full(number, settings.context)
        return Workload([num_positions(settings)] * number, supervised, rest)

    return workload(len(train), workload(num_held_out(held_out)))
