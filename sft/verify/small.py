"""Makes a configuration small."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.data import batches
from sft.errors import VerificationError
from sft.models import attention
from sft.runtime import hardware, precision
from sft.tasks.registry import task_of

# --- the configuration, made small -------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A configuration that trains in seconds; all that its runs write is in `folder`."""

    config: RunConfig
    folder: Path
    lengths: list[int]  # tokens of the examples, falling
    changes: list[tuple[str, str]]  # what is not as the user configured it

    @property
    def steps_per_epoch(self) -> int:
        return batches.steps_per_epoch(len(self.lengths), self.config.train.global_batch)

    @property
    def whole(self) -> int:
        """Token budget under which any global batch is one micro-batch."""
        return self.lengths[0] * self.config.train.global_batch

    @property
    def quarter(self) -> int:
        """One under which two processes have several micro-batches each."""
        return max(self.lengths[0], sum(self.lengths[: self.config.train.global_batch]) // 4)


def make_small(config: RunConfig, folder: Path, *, exact: bool = False) -> Small:
    """`config` with a small model of random weights, and few examples, so that an epoch has three
    steps and a partial last batch; half of a second epoch follows.

    `exact`: without dropout and in fp32, so that runs that are cut differently can be compared.
    """
    if not hardware.detect().devices:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guesses so
    task = task_of(config)
    made = task.shrink(config, folder, exact)
    changes = [*made.changes]
    values: dict[str, Any] = {
        "train.output_dir": str(folder / "run"),
        "train.micro_batch": "auto",
        "train.gradient_accumulation_steps": "auto",
        "train.eval_steps": 2,
        "train.save_steps": 1,
        "train.resume_from_checkpoint": None,
        "train.tensorboard": False,
        "train.wandb": False,
        **made.values,
    }
    if exact:
        wanted = {"train.precision": "fp32", "train.optimizer": "adamw", **made.smooth}
        given = config.model_dump()
        given["train"]["precision"], _ = precision.resolve_precision(config.train)
        found = {path: given[path.split(".")[0]][path.split(".")[1]] for path in wanted}
        changes += [
            (p, f"{wanted[p]} instead of {found[p]}") for p in wanted if found[p] != wanted[p]
        ]
        values |= wanted
        if task.info(config).attention == attention.NAME:
            had_by = f"of SDPA with a mask: {attention.NAME} has no kernel in fp32"
            changes.append(("packed rows", had_by))
    shrunk, batch = with_values(config, values), made.batch
    lengths = sorted(task.workload(shrunk).lengths, reverse=True)
    while batch > 1 and batches.steps_per_epoch(len(lengths), batch) < 3:
        batch -= 1
    per_epoch = batches.steps_per_epoch(len(lengths), batch)
    if per_epoch < 3:
        raise VerificationError(
            "expected at least 3 usable training rows, to interrupt an epoch in its middle and at "
            f"its end; found {len(lengths)} among {made.among}"
        )
    steps = per_epoch + 3
    examples = task.info(shrunk).labels.examples
    number = f"{len(lengths)} {examples} to train on"
    changes.append(("data", f"{number}, {batch} a step, {per_epoch} an epoch"))
    changes.append(("steps", f"{steps}, each of them saved, every second evaluated"))
    shrunk = with_values(shrunk, {"train.global_batch": batch, "train.max_steps": steps})
    small = Small(shrunk, folder, lengths, changes)
    return replace(small, config=with_values(shrunk, {"train.max_tokens": small.quarter}))
