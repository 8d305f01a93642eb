"""Windows of histories: which are trained on, which are held out, and how many there are."""

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
    """Windows that are trained on, and those of the streams that are held out."""
    first = settings.num_streams - settings.held_out_streams
    train, held_out = (0, first), (first, settings.num_streams)
    return Windows(found, settings, *train), Windows(found, settings, *held_out)


def num_held_out(windows: Windows) -> int:
    """Of them that the held-out loss is of."""
    return windows.num_goals * (windows.last - windows.first)


def blank_histories(settings: Distill) -> Histories:
    """Of noughts that share one place in memory: for what depends on their number alone."""
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
