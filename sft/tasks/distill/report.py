"""A run of algorithm distillation: histories, training, and what is learnt in context."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.table import Table
from torch import nn

from sft.config.load import with_values
from sft.config.schema import DistillConfig
from sft.plan import calibration, plan, report
from sft.runtime import checkpoint, disk, hardware, precision, processes
from sft.runtime.console import duration, facts, write_json
from sft.runtime.log import Log
from sft.runtime.watchdog import Guard
from sft.tasks import base
from sft.tasks.distill import darkroom, histories, task
from sft.tasks.distill.curve import draw
from sft.tasks.distill.source import Histories
from sft.train import engine, profile, state

LAST = 50  # episodes by which what was learnt in context is judged
CURVE = "in_context_return.png"


def prepare(config: DistillConfig, moved: Callable[[], None]) -> Histories:
    """The source histories; collects those that nobody has collected yet."""
    histories.collect(config.distill, moved)
    return histories.load(config.distill)


def run(
    config: DistillConfig,
    found: Histories,
    accelerator: Accelerator,
    log: Log,
    resumed_from: Path | None,
    guard: Guard,
) -> None:
    started = time.perf_counter()
    settings, train, folder = config.distill, config.train, Path(config.train.output_dir)
    machine, windows = hardware.detect(folder), base.Work.windows(settings)
    held = accelerator.num_processes * sum(each.nbytes for each in found.tensors())
    # The plan counts the histories, which are in memory already.
    machine = replace(machine, ram_available_bytes=machine.ram_available_bytes + held)
    if resumed_from:
        own = task.identity(settings, histories.digest(found))
        state.read_state(resumed_from, state.identity(train, own))
    planned = calibration.make_together(config, windows, machine, accelerator)
    disk.refuse_if_full(planned.disk, train)
    resolved = with_values(config, plan.resolved_values(planned))
    log.say(_banner(config, planned, processes.described(accelerator)))
    log.say(report.table(planned))
    if log.folder:
        report.keep(resolved, planned, folder)

    guard.stop_if_asked()
    model = task.build(settings, train.seed, accelerator.device)
    work = task.Distillation(settings, found, model, accelerator, log, planned.budget, guard)
    trainer = engine.Engine(work, resolved.train, accelerator, log, planned.budget)
    trainer.guard = guard
    planned, measured = calibration.confirm_on(trainer, planned, resolved, windows, machine)
    measured |= profile.timed(trainer, resumed_from)
    with trainer.preemptible():
        held_out = work.evaluate(trainer.model)
        tried = _try(config, trainer.model, accelerator, log, guard)
    log.log(trainer.step, {f"eval/{name}": value for name, value in held_out.items()})
    checkpoint.commit(
        folder / "final_checkpoint", trainer.write_final, accelerator, planned.disk.final
    )
    measured |= {
        "total_seconds": time.perf_counter() - started,
        "memory_bytes": engine.memory_bytes(),
    }
    if log.folder:
        report.write(planned, folder / "plan.json", measured)
        tell(config, tried, held_out, folder / "evaluation", log)
        log.say(_closing(folder, tried, measured))


def evaluate(
    folder: Path,
    out: Path,
    config: DistillConfig,
    _: None,
    accelerator: Accelerator,
    log: Log,
    guard: Guard,
) -> None:
    """Tries the unseen goals with the model of a finished run. Collective."""
    model = task.load(folder / "final_checkpoint", accelerator.device)
    trained = model.settings.model_dump()
    played = {key: value for key, value in config.distill.model_dump().items() if "eval_" in key}
    settings = config.distill.model_copy(update=trained | played)
    tried = _try(config.model_copy(update={"distill": settings}), model, accelerator, log, guard)
    if log.folder:
        tell(config, tried, {}, out, log)


def _try(
    config: DistillConfig, model: nn.Module, accelerator: Accelerator, log: Log, guard: Guard
) -> task.Tried:
    """The unseen goals for all episodes."""
    number = config.distill.eval_episodes
    with guard.section("evaluation"), log.progress("episodes", number) as advance:

        def between() -> None:
            guard.mark()
            advance()

        return task.try_unseen(model, config.distill, accelerator, number, between)


# --- what people see -----------------------------------------------------------------------------


def results(tried: task.Tried) -> dict[str, Any]:
    """In-context returns: of the last episodes, of the first, of all; per goal and seed."""
    number = tried.returns.shape[2]
    few = min(LAST, number)
    parts = {
        f"last_{few}": tried.returns[..., -few:],
        f"first_{few}": tried.returns[..., :few],
        f"all_{number}": tried.returns,
    }
    return {name: _summary(tried, part.mean(-1)) for name, part in parts.items()}


def _summary(tried: task.Tried, means: torch.Tensor) -> dict[str, Any]:
    """means: (goals, seeds)."""
    return {
        "mean": float(means.mean()),
        "per_goal": dict(zip(map(_named, tried.goals), means.mean(1).tolist(), strict=True)),
        "per_seed": means.mean(0).tolist(),
        "per_goal_and_seed": dict(zip(map(_named, tried.goals), means.tolist(), strict=True)),
    }


def _named(goal: int) -> str:
    return "{},{}".format(*darkroom.place_of(goal))


def tell(
    config: DistillConfig, tried: task.Tried, held_out: dict[str, float], out: Path, log: Log
) -> None:
    """metrics.json, the table and the curve."""
    out.mkdir(parents=True, exist_ok=True)
    returns = results(tried)
    floors = {_named(goal): darkroom.random_return(goal) for goal in tried.goals}
    tops = {_named(goal): darkroom.best_return(goal) for goal in tried.goals}
    curve = tried.returns.mean((0, 1)).tolist()
    written: dict[str, Any] = {"in_context_return": returns, "random": floors, "best": tops}
    if config.distill.compress:
        written["regions"] = _regions(tried)
    write_json(out / "metrics.json", {**written, "held_out": held_out, "curve": curve})
    log.say(_table(returns, floors, tops))
    if config.distill.compress:
        log.say(f"regions that the model has ended: {_regions(tried)}")
    lines = {"random": float(np.mean([*floors.values()])), "best": float(np.mean([*tops.values()]))}
    curves = {"in context, unseen goals": curve}
    if (source := histories.folder_of(config.distill)).exists():  # else of a run from elsewhere
        curves["source, its own goals"] = histories.curve(source)
    draw(out / CURVE, curves, lines)
    log.say(f"curve: {out / CURVE}")


def _regions(tried: task.Tried) -> dict[str, float]:
    steps = np.array(tried.regions)
    told = {"ended": len(steps), "forced": tried.num_forced}
    return told | ({"mean_steps": float(steps.mean())} if len(steps) else {})


def _table(returns: dict[str, Any], floors: dict[str, float], tops: dict[str, int]) -> Table:
    title = "Return in context on goals that were never seen"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("goal", "random", *(name.replace("_", " ") for name in returns), "best"):
        table.add_column(column, justify="right")
    for goal, floor in floors.items():
        found = (f"{each['per_goal'][goal]:.2f}" for each in returns.values())
        table.add_row(goal, f"{floor:.2f}", *found, f"{tops[goal]:.2f}")
    means = (f"{each['mean']:.2f}" for each in returns.values())
    lowest, top = np.mean([*floors.values()]), np.mean([*tops.values()])
    table.add_row("mean", f"{lowest:.2f}", *means, f"{top:.2f}")
    return table


def _banner(config: DistillConfig, planned: plan.Plan, world: dict[str, str]) -> Table:
    settings, train, size = config.distill, config.train, planned.world_size
    num_goals = len(darkroom.goals(settings.split_seed)[0])
    kind = "compressed context" if settings.compress else "plain context"
    heads = f"{settings.num_layers} layers, {settings.num_heads} heads, width {settings.width}"
    number = planned.num_parameters
    rows = [
        ("model", f"{heads}: {number:,} parameters; {kind} of {settings.context} transitions"),
        (
            "data",
            f"{histories.folder_of(settings)}: {num_goals} goals x "
            f"{settings.num_streams} streams x {settings.num_steps} steps, {settings.source}",
        ),
        ("processes", f"{size} ({train.engine}){world['spread']}"),
        ("devices", world["devices"]),
        ("precision", ": ".join(precision.resolve_precision(train))),
        (
            "batch",
            f"{train.global_batch} windows: {size} process(es) x {planned.micro_batches} "
            f"micro-batch(es) of {planned.micro_batch}",
        ),
        ("results", train.output_dir),
    ]
    return facts("Run", rows)


def _closing(folder: Path, tried: task.Tried, measured: dict[str, Any]) -> Table:
    returns = results(tried)
    rows = [(name.replace("_", " "), f"{each['mean']:.2f}") for name, each in returns.items()]
    rows += [
        ("training", duration(measured["training_seconds"])),
        ("in all", duration(measured["total_seconds"])),
        ("results", f"{folder}/ (evaluation/metrics.json, final_checkpoint/)"),
        ("next", f"make evaluate RUN={folder}   the same, with other seeds or more episodes"),
    ]
    return facts("Done", rows)
