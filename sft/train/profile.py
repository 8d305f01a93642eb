"""How long a run takes, foretold and measured; and where the time of a step goes: a trace of a few
steps, on request (`train.profile_steps`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sft.runtime.console import duration
from sft.train.engine import Engine

TRACE = "profile.json"  # for chrome://tracing or ui.perfetto.dev
WARM_UP = 2  # steps: the first ones allocate


def timed(engine: Engine, resumed_from: Path | None) -> dict[str, float]:
    """The engine's steps to the end, behind a checkpoint if there is one: the seconds that they
    took, and those that a probe had foretold. Collective."""
    if resumed_from:
        engine.resume(resumed_from)
    seconds = engine.probe_seconds_per_step() * (engine.total_steps - engine.step)
    engine.log.say(f"training: {engine.total_steps:,} steps, about {duration(seconds)} (probed)")
    started = time.perf_counter()
    with profiled(engine):
        engine.run()
    measured = time.perf_counter() - started
    return {"training_seconds": measured, "predicted_training_seconds": seconds}


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
