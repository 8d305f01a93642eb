"""Computes the learning rate and the order of examples from the configuration and the step."""

from __future__ import annotations

import math

from sft.config.schema import Train
from sft.data import batches


def learning_rate(train: Train, step: int, total_steps: int, peak: float | None = None) -> float:
    """Returns the rate of a step, counted from 0. `peak`: that of a group; None: the run's.

    It rises linearly during the warm-up, and then follows `schedule` down to `min_lr_ratio`.
    """
    top = train.learning_rate if peak is None else peak
    warmup = math.ceil(train.warmup_ratio * total_steps)
    if step < warmup:
        return top * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - 1 - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    floor = 1.0 if train.schedule == "constant" else train.min_lr_ratio
    return top * (floor + (1 - floor) * shape[train.schedule])


def order_seed(train: Train) -> int | None:
    """Returns the seed of the order of examples, or None for the order of the file."""
    return train.seed if train.shuffle else None


def total_steps(train: Train, num_examples: int) -> int:
    """Returns the number of optimizer steps of the run."""
    per_epoch = batches.steps_per_epoch(num_examples, train.global_batch)
    return train.max_steps or max(1, math.ceil(train.epochs * per_epoch))
