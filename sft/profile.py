"""Where the time of a step goes: a trace of a few steps, on request (`train.profile_steps`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sft.engine import Engine

TRACE = "profile.json"  # for chrome://tracing or ui.perfetto.dev
WARM_UP = 2  # steps: the first ones allocate


@contextmanager
def profiled(engine: Engine) -> Iterator[None]:
    """Steps of the main process are traced as they are asked for; the engine knows nothing of it.

    A run that has fewer of them leaves a trace of those that there were.
    """
    number = engine.train.profile_steps
    if number is None or not engine.accelerator.is_main_process:
        yield
        return
    path = Path(engine.train.output_dir, TRACE)
    once = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=number, repeat=1)

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(path))
        engine.log.say(f"trace of {number} step(s): {path} (ui.perfetto.dev shows it)")

    step = engine.optimizer_step
    with torch.profiler.profile(schedule=once, on_trace_ready=write) as profiler:

        def traced() -> dict[str, float]:
            values = step()
            profiler.step()
            return values

        engine.optimizer_step = traced  # type: ignore[method-assign]
        try:
            yield
        finally:
            del engine.optimizer_step
