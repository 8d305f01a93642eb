"""Makes a configuration small enough for many whole runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.data import batches
from sft.errors import VerificationError
from sft.models import attention
from sft.runtime import hardware
from sft.tasks.registry import task_of


@dataclass(frozen=True)
class Small:
    """A configuration that trains in seconds and writes into `folder` only."""

    config: RunConfig
    folder: Path
    lengths: list[int]  # tokens of the examples, longest first
    changes: list[tuple[str, str]]  # (name, difference) from the user's configuration

    @property
    def steps_per_epoch(self) -> int:
        return batches.steps_per_epoch(len(self.lengths), self.config.train.global_batch)

    @property
    def whole(self) -> int:
        """Returns a token budget under which any global batch is one micro-batch."""
        return self.lengths[0] * self.config.train.global_batch

    @property
    def quarter(self) -> int:
        """Returns a budget under which two processes have several micro-batches each."""
        return max(self.lengths[0], sum(self.lengths[: self.config.train.global_batch]) // 4)


def make_small(config: RunConfig, folder: Path, *, exact: bool = False) -> Small:
    """Returns `config` with a small model of random weights and few examples.

    An epoch has at least three steps and a partial last batch; three steps of another follow.
    `exact`: without dropout and in fp32, so that runs that are cut differently can be compared.
    """
    if not hardware.detect().devices:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it guesses
    task = task_of(config)
    shrunk = task.shrink(config, folder, exact)
    changes = [*shrunk.changes]
    values: dict[str, Any] = {
        "train.output_dir": str(folder / "run"),
        "train.micro_batch": "auto",
        "train.gradient_accumulation_steps": "auto",
        "train.eval_steps": 2,
        "train.save_steps": 1,
        "train.resume_from_checkpoint": None,
        "train.tensorboard": False,
        "train.wandb": False,
        **shrunk.values,
    }
    if exact:
        wanted = {"train.precision": "fp32", "train.optimizer": "adamw", **shrunk.exact}
        changes += _list_changes(config, wanted)
        values |= wanted
    config, batch = with_values(config, values), shrunk.batch
    lengths = sorted(task.workload(config).lengths, reverse=True)
    while batch > 1 and batches.steps_per_epoch(len(lengths), batch) < 3:
        batch -= 1
    per_epoch = batches.steps_per_epoch(len(lengths), batch)
    if per_epoch < 3:
        raise VerificationError(
            "expected at least 3 usable training rows, to interrupt an epoch in its middle and at "
            f"its end; found {len(lengths)} among {shrunk.chosen_from}"
        )
    steps = per_epoch + 3
    number = f"{len(lengths)} {task.info(config).labels.examples} to train on"
    changes.append(("data", f"{number}, {batch} a step, {per_epoch} an epoch"))
    changes.append(("steps", f"{steps}, each of them saved, every second evaluated"))
    config = with_values(config, {"train.global_batch": batch, "train.max_steps": steps})
    small = Small(config, folder, lengths, changes)
    return replace(small, config=with_values(config, {"train.max_tokens": small.quarter}))


def _list_changes(config: RunConfig, wanted: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the values that are not as configured, for people."""
    given = config.model_dump()
    given["train"]["precision"], _ = hardware.resolve_precision(config.train)
    for key, value in wanted.items():
        section, name = key.split(".")
        if (before := given[section][name]) != value:
            yield key, f"{value} instead of {before}"
    if task_of(config).info(config).attention == attention.NAME:
        yield "packed rows", f"SDPA with a mask: {attention.NAME} has no kernel in fp32"
