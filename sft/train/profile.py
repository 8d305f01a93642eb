"""Measures the memory of a step, and traces its time (`train.profile_steps`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from sft.config.schema import Train
from sft.runtime.log import Log

TRACE = "profile.json"  # for chrome://tracing or ui.perfetto.dev
WARM_UP = 2  # steps before the trace: the first ones allocate


@contextmanager
def profiled(train: Train, log: Log) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each step; the main process writes a trace.

    If the run has fewer steps than `train.profile_steps`, the trace has all of them.
    """
    number = train.profile_steps
    if number is None or log.folder is None:
        yield lambda: None
        return
    path = Path(train.output_dir, TRACE)
    once = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=number, repeat=1)

    def write(profiler: torch.profiler.profile) -> None:
        with log.optional(TRACE):
            profiler.export_chrome_trace(str(path))
        log.say(f"trace of {number} step(s): {path} (ui.perfetto.dev shows it)")

    with torch.profiler.profile(schedule=once, on_trace_ready=write) as profiler:
        yield profiler.step


def memory_bytes() -> int:
    """Returns the peak allocation on the GPU, or this process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
