"""Predictions held against the machine: the heaviest micro-batch of the run is tried before step 1.

Where a GPU cannot hold it the token budget shrinks, which changes no result. What was measured is
kept beside what was predicted, and tells the next plan how far off such predictions were.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sft import rehearsal
from sft.batching import Budget, MicroBatch
from sft.config import UserError
from sft.engine import Engine
from sft.trace import Recorder

HISTORY = "memory.jsonl"  # in data.cache_dir
KEPT = 50  # lines of it that count


def fitting_budget(
    engine: Engine, budget: Budget, heaviest: Callable[[Budget], MicroBatch]
) -> Budget:
    """`budget`, or the largest of its halves with which every rank gets through `heaviest`.

    Raises UserError if not even the longest example fits. Collective.
    """
    longest = max(engine.task.lengths)
    while True:
        error = _tried(engine, heaviest(budget))
        failed = engine.accelerator.reduce(
            torch.tensor(float(error is not None), device=engine.accelerator.device), "sum"
        )
        if not failed:
            return budget
        if budget.max_tokens <= longest:
            raise UserError(
                f"the longest example ({longest:,} tokens) does not fit the memory: {error}; see "
                "what would take less with `make plan`"
            )
        smaller = max(longest, budget.max_tokens // 2)
        told = f"a micro-batch of {budget.max_tokens:,} tokens does not fit the memory"
        engine.log.say(
            f"{told}: train.max_tokens is {smaller:,} from here on, with the same result"
        )
        rows = budget.max_rows and max(1, budget.max_rows // 2)
        budget = replace(budget, max_tokens=smaller, max_rows=rows)


def _tried(engine: Engine, micro_batch: MicroBatch) -> str | None:
    """What the device says if it cannot hold the micro-batch."""
    try:
        engine.try_out([micro_batch])
    except torch.OutOfMemoryError as error:
        reason = str(error).split("\n")[0]
    else:
        return None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reason


def measured_bytes(engine: Engine, micro_batches: list[MicroBatch], state_bytes: int) -> int:
    """Bytes allocated at the peak of a real forward and backward pass.

    `state_bytes`: of the optimizer, which has none before its first step.
    """
    states = [s for state in engine.optimizer.state.values() for s in rehearsal.tensors_of(state)]
    missing = 0 if states else state_bytes
    if engine.accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        engine.try_out(micro_batches)
        return torch.cuda.max_memory_allocated() + missing
    recorder = Recorder()
    for tensors in (*rehearsal.held(engine.task.model).values(), states):
        recorder.name(tensors, "held")
    with recorder:
        engine.try_out(micro_batches)
    return recorder.trace.peak().num_bytes + missing


# --- what earlier runs have shown --------------------------------------------------------------


@dataclass(frozen=True)
class Past:
    """What earlier runs on a device took beyond what was predicted, as shares of that."""

    runs: int
    least: float
    most: float


def past(folder: Path, device: str) -> Past | None:
    """Of the last KEPT runs; lines that cannot be read count nothing."""
    try:
        lines = (folder / HISTORY).read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return None
    beyond = [share for line in lines if (share := _beyond(line, device)) is not None][-KEPT:]
    return Past(len(beyond), min(beyond), max(beyond)) if beyond else None


def _beyond(line: str, device: str) -> float | None:
    try:
        told = json.loads(line)
        if told["device"] != device:
            return None
        return float(told["measured_bytes"]) / float(told["predicted_bytes"]) - 1
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def remember(folder: Path, device: str, predicted: int, measured: int) -> None:
    """Adds a line to the history; a folder that cannot be written to is no reason to stop."""
    line = {"device": device, "predicted_bytes": predicted, "measured_bytes": measured}
    try:
        with (folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        return
