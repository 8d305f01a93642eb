"""Where the time of a step goes: a trace of a few steps, on request (`train.profile_steps`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sft.config.schema import Train
from sft.runtime.log import Log

TRACE = "profile.json"  # for chrome://tracing or ui.perfetto.dev
WARM_UP = 2  # steps: the first ones allocate


@contextmanager
def profiled(train: Train, log: Log) -> Iterator[Callable[[], None]]:
    """Yields a function to be called after each step; the main process then writes a trace.

    A run that has fewer steps than asked for leaves a trace of those that there were.
    """
    number = train.profile_steps
    if number is None or log.folder is None:
        yield lambda: None
        return
    path = Path(train.output_dir, TRACE)
    once = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=number, repeat=1)

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(path))
        log.say(f"trace of {number} step(s): {path} (ui.perfetto.dev shows it)")

    with torch.profiler.profile(schedule=once, on_trace_ready=write) as profiler:
        yield profiler.step
