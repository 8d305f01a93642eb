"""Computes the learning rate and the order of examples from the configuration and the step."""

from __future__ import annotations

import math

from sft.config.schema import Train
from sft.config.section import interval_steps
from sft.data import batches

WITHOUT_WARMUP = 10_000  # the warm-up steps in the formula of `inverse_sqrt` if there are none


def learning_rate(train: Train, step: int, total_steps: int, peak: float | None = None) -> float:
    """Returns the rate of a step, counted from 0. `peak`: that of a group; None: the run's.

    It rises linearly to the peak during the warm-up, and then follows `schedule`. Except with
    `constant`, it falls towards `min_lr_ratio` times the peak.
    """
    top = train.learning_rate if peak is None else peak
    warmup = warmup_steps(train, total_steps)
    if step < warmup:
        return top * (step + 1) / warmup
    floor = 1.0 if train.schedule == "constant" else train.min_lr_ratio
    return top * (floor + (1 - floor) * _shape(train, step, warmup, total_steps))


def warmup_steps(train: Train, total_steps: int) -> int:
    """Returns the number of warm-up steps, in which the rate rises."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil(train.warmup_ratio * total_steps)


def _shape(train: Train, step: int, warmup: int, total_steps: int) -> float:
    """Returns the rate after the warm-up: 1 is the peak, 0 the floor (`min_lr_ratio`)."""
    last = max(1, total_steps - 1 - warmup)
    done = (step - warmup) / last
    if train.schedule == "inverse_sqrt":
        scale = warmup or WITHOUT_WARMUP
        return math.sqrt(scale / (step + 1 - warmup + scale))
    if train.schedule == "wsd":
        falling = max(1, min(round(train.decay_ratio * total_steps), total_steps - warmup))
        return 1 - math.sqrt(max(0.0, 1 - (total_steps - 1 - step) / falling))
    if train.schedule == "cosine_with_restarts":
        done = done * train.num_cycles % 1 if done < 1 else 1.0
    cosine = (1 + math.cos(math.pi * done)) / 2
    return {"constant": 1.0, "linear": 1 - done}.get(train.schedule, cosine)


def order_seed(train: Train) -> int | None:
    """Returns the seed of the order of examples, or None for the order of the file."""
    return train.seed if train.shuffle else None


def is_due(interval: int | str | None, step: int, steps_per_epoch: int) -> bool:
    """Returns whether `step`, counted from 1, is the first that completes one more interval."""
    if not interval:
        return False
    every = interval_steps(interval, steps_per_epoch)
    return step // every > (step - 1) // every


def total_steps(train: Train, num_examples: int) -> int:
    """Returns the number of optimizer steps of the run."""
    per_epoch = batches.steps_per_epoch(num_examples, train.global_batch)
    return train.max_steps or max(1, math.ceil(train.epochs * per_epoch))
