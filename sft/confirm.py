"""Predictions held against the machine: the heaviest micro-batch of the run is tried before step 1.

Where a GPU cannot hold it the token budget shrinks, which changes no result. What was measured is
kept beside what was predicted, and tells the next plan how far off such predictions were.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object

from sft import recovery, rehearsal
from sft.batching import Budget, MicroBatch
from sft.engine import Engine
from sft.trace import Recorder

HISTORY = "memory.jsonl"  # in what outlives a run: tasks.Traits.cache
KEPT = 50  # lines of it that count


def fitting(
    engine: Engine,
    budget: Budget,
    heaviest: Callable[[Budget], list[MicroBatch]],
    state_bytes: int,
) -> tuple[Budget, int]:
    """`budget`, or the largest of its halves with which every rank gets through `heaviest`; and the
    bytes allocated at the peak of that. Collective.

    `state_bytes`: of the optimizer, which has no state before its first step. Raises OutOfMemory
    if not even the longest example fits.
    """
    longest = max(engine.task.lengths)
    while True:
        peak, error = _tried(engine, heaviest(budget), state_bytes)
        errors = [error] if engine.accelerator.num_processes == 1 else gather_object([error])
        found = [each for each in errors if each]
        if not found:
            return budget, peak
        if budget.max_tokens <= longest:
            raise recovery.OutOfMemory(
                f"the longest example ({longest:,} tokens) does not fit the memory: {found[0]}; "
                "see what would take less with `make plan`"
            )
        smaller = recovery.halved(budget, longest)
        told = f"a micro-batch of {budget.max_tokens:,} tokens does not fit the memory"
        engine.log.say(
            f"{told}: train.max_tokens is {smaller.max_tokens:,} from here on, with the same result"
        )
        budget = smaller


def _tried(
    engine: Engine, micro_batches: list[MicroBatch], state_bytes: int
) -> tuple[int, str | None]:
    """(bytes at the peak, what the device says if it cannot hold that)."""
    on_gpu = engine.accelerator.device.type == "cuda"
    try:
        return (_on_gpu if on_gpu else _on_cpu)(engine, micro_batches, state_bytes), None
    except Exception as error:
        if (reason := recovery.shortage(error)) is None:
            raise
    recovery.release()
    return 0, reason


def _on_gpu(engine: Engine, micro_batches: list[MicroBatch], state_bytes: int) -> int:
    missing = 0 if engine.optimizer.state else state_bytes
    room = torch.empty(missing, dtype=torch.uint8, device=engine.accelerator.device)
    torch.cuda.reset_peak_memory_stats()
    engine.try_out(micro_batches)
    del room
    return torch.cuda.max_memory_allocated()


def _on_cpu(engine: Engine, micro_batches: list[MicroBatch], state_bytes: int) -> int:
    recorder, states = Recorder(), engine.optimizer.state.values()
    for tensors in rehearsal.held(engine.task.model).values():
        recorder.name(tensors, "held")
    recorder.name((t for state in states for t in rehearsal.tensors_of(state)), "held")
    with recorder:
        engine.try_out(micro_batches)
    return recorder.trace.peak().num_bytes + (0 if states else state_bytes)


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
