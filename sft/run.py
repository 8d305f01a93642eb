"""Runs one training of any task, from configuration to results, or an evaluation of its result.

It owns the run folder (docs/RUNS.md). However the run ends, `watchdog` records it in `status.json`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from rich.table import Table

from sft.config.load import public_values, with_values
from sft.config.schema import RunConfig, Train
from sft.errors import CheckpointError, UserError
from sft.models.dtypes import dtype_table
from sft.plan import calibration, coverage, plan, report
from sft.runtime import checkpoint, hardware, run_folder
from sft.runtime.attempt import RANKS, TRACEBACK, Lock, Status
from sft.runtime.console import as_markdown, duration, facts, metrics_line
from sft.runtime.disk import refuse_if_full
from sft.runtime.hardware import resolve_precision
from sft.runtime.launcher import check_launch
from sft.runtime.log import Log
from sft.runtime.output import show
from sft.runtime.processes import (
    Context,
    collect_facts,
    describe_world,
    drop_launch_requirements,
    end_processes,
    refuse_differences,
    software,
    start_processes,
)
from sft.runtime.trackers import refuse_missing, start_tracker
from sft.runtime.watchdog import Guard
from sft.serve import runs
from sft.tasks.base import Results, Task
from sft.tasks.registry import task_of
from sft.train.checkpoints import identity, read_state
from sft.train.compiled import compiled, refuse_missing_compiler
from sft.train.engine import Engine
from sft.train.profile import memory_bytes

if TYPE_CHECKING:
    from sft.serve.vllm_engine import Kind


def train(config: RunConfig) -> dict[str, float]:
    """Runs `config` in this process group, and returns the held-out metrics."""
    check_launch(config.train)
    refuse_missing(config.train.trackers)
    task = task_of(config)
    task.refuse_untrainable(config)
    refuse_missing_compiler(config.train)
    with Guard(Path(config.train.output_dir), config.train.stall_timeout) as guard:
        to_resume = _open_folder(config.train, guard, _inputs(config)) if guard.is_first else None
        prepared = task.prepare(config, guard.tick)  # first: a process group could time out
        accelerator = start_processes(config.train)
        resumed_from = guard.join(accelerator, to_resume)
        refuse_differences(collect_facts(config, task.digests(prepared)))
        with closing(_open_log(config, accelerator, guard, resumed_from)) as log:
            context = Context(accelerator, log, guard)
            metrics = _run(task, config, prepared, context, resumed_from)
        accelerator.wait_for_everyone()  # a run has finished when all ranks have
    end_processes(accelerator)
    return metrics


def _run(
    kind: type[Task],
    config: RunConfig,
    prepared: Any,
    context: Context,
    resumed_from: Path | None,
) -> dict[str, float]:
    """Plans the run, builds the model, measures it before and after training, and reports."""
    started = time.perf_counter()
    accelerator, log, guard = context.accelerator, context.log, context.guard
    folder = Path(config.train.output_dir)
    own, step = identity(config.train, kind.identity_of(config, prepared)), math.inf
    if resumed_from:
        step = read_state(resumed_from, own)["step"]
    kind.refuse_unusable(config, prepared)
    machine = _machine(folder, accelerator.num_processes * kind.resident_bytes(prepared))
    workload = kind.workload(config, prepared)
    planned = calibration.make_common_plan(config, workload, machine, accelerator)
    if warning := refuse_if_full(planned.disk, config.train, step):
        log.say(f"warning: {warning}")
    resolved = with_values(config, plan.resolved_values(planned))
    world = describe_world(accelerator)
    log.record(_attempt(config.train, own, planned, world["devices"], step if resumed_from else 0))
    log.say(_banner(config, kind.describe(config), planned, world))
    for shown in (
        hardware.machine_table(machine),
        report.plan_table(planned),
        *kind.preview(prepared),
    ):
        log.say(shown)
    if log.folder:
        kind.write_data_report(prepared, folder)
        report.write_resolved(resolved, planned, folder)

    _report_coverage(resolved, log)
    guard.stop_if_asked()
    task = kind.build(resolved, prepared, planned.precision, planned.budget, context)
    log.say(dtype_table(task.model))
    engine = Engine(task, resolved.train, context)  # before its weights are used: it gathers them
    task.check_model(planned.precision, config.train.layout)
    planned, measured = calibration.calibrate(engine, planned, resolved, workload, machine)
    base = task.measure_base(engine, planned.precision, resumed_from is not None)
    if base:
        log.say(f"before: {metrics_line(base.metrics)}")
    planned = _train(engine, config, resolved, planned, resumed_from, measured)
    if accelerator.is_main_process:
        at = plan.planner_of(resolved, workload, machine, planned)
        steps = engine.step - (step if resumed_from else 0)
        calibration.keep_speed(planned, at, steps, measured["training_seconds"])
    tuned = _finish(task, engine, planned, folder)
    log.log(engine.step, {f"eval/{name}": value for name, value in tuned.metrics.items()})
    log.say(f"after: {metrics_line(tuned.metrics)}")
    engine.add_card(task.model_card(base, tuned))

    measured |= {"total_seconds": time.perf_counter() - started, "memory_bytes": memory_bytes()}
    if log.folder:
        with log.optional("plan.json"):
            report.write_plan(planned, folder / "plan.json", measured)
        with log.optional("evaluation"):
            (folder / "evaluation").mkdir(exist_ok=True)
            for shown in task.report(base, tuned, folder / "evaluation"):
                log.say(shown)
        rows, commands = task.closing_rows(base, tuned)
        log.say(_closing(config, rows, commands, measured))
    return tuned.metrics


def _machine(folder: Path, resident: int) -> hardware.Hardware:
    """Returns this machine. The `resident` bytes of the data count as available: the plan counts
    them, too."""
    machine = hardware.detect(folder)
    return replace(machine, ram_available_bytes=machine.ram_available_bytes + resident)


def _train(
    engine: Engine,
    config: RunConfig,
    resolved: RunConfig,
    planned: plan.Plan,
    resumed_from: Path | None,
    measured: dict[str, Any],
) -> plan.Plan:
    """Trains to the last step, with compiled layers if the plan says so; adds to `measured`.

    Returns the plan, which is another one if the layers cannot be compiled.
    """
    engine.log.text("plan", as_markdown(report.plan_table(planned)), engine.step)
    with compiled(engine, required=config.train.compile is True) as of_compiler:
        if problem := of_compiler.get("compile_problem"):
            reasons = planned.reasons | {"train.compile": problem}
            planned = replace(planned, compile=False, reasons=reasons)
            if engine.log.folder:
                now = resolved.model_copy(update={"train": engine.train})
                report.write_resolved(now, planned, engine.log.folder)
        measured |= engine.train_to_end(resumed_from)
    measured |= of_compiler
    return planned


def _finish(task: Task, engine: Engine, planned: plan.Plan, folder: Path) -> Results:
    """Saves the final checkpoint, and returns the results of the trained model. Collective."""
    with engine.preemptible():
        with engine.parallel.averaged():
            task.finish(engine.model)
        engine.save_final(planned.disk.final)  # first: no fault of what follows loses it
        state = f"{engine.digest()} {planned.precision}"
        with engine.parallel.averaged():
            return task.measure(engine.model, folder / "evaluation", state)


def _report_coverage(config: RunConfig, log: Log) -> None:
    """Reports what will be trained and adapted. Raises ConfigError for a contradiction."""
    found = coverage.cover(config)
    if found is None:
        return
    log.say(coverage.coverage_table(found))
    if log.folder:
        coverage.write_coverage(found, log.folder / "coverage.json")
    found.refuse_contradictions()


def evaluate_run(
    folder: Path, name: str, overrides: list[str], engine: Kind = "own", vllm_args: str = ""
) -> dict[str, float]:
    """Evaluates a finished run into `evaluation/<name>/`. Collective.

    `overrides` change its configuration, such as the held-out file or the number of examples.
    `engine`: what writes the answers (docs/INFER.md); `vllm_args`: options of `vllm serve`.
    """
    from sft.serve.vllm_engine import AnswerEngine  # training does not need its libraries

    writer = AnswerEngine(engine, str(folder), vllm_args)
    config = drop_launch_requirements(runs.load_any_run_config(folder, overrides))
    task = task_of(config)
    out = folder / "evaluation" / name
    run_folder.refuse_foreign(folder)
    with Guard(out, config.train.stall_timeout, trains=False) as guard:
        if guard.is_first:
            guard.status.begin()
        prepared = task.prepare_evaluation(config, guard.tick)
        task.refuse_unusable(config, prepared)
        accelerator = start_processes(config.train)
        guard.join(accelerator, None)
        with closing(Log(out if accelerator.is_main_process else None)) as log, closing(writer):
            context = Context(accelerator, log, guard)
            machine, workload = hardware.detect(folder), task.workload(config, prepared)
            planned = calibration.make_common_plan(config, workload, machine, accelerator)
            precision = planned.precision
            opened = task.open(folder, config, prepared, precision, planned.budget, context)
            opened.check_model(precision, "auto")
            if engine != "own":
                opened.answer_by(
                    lambda own: writer.answering(own, precision, context, guard.stop_if_asked)
                )
            manifest = checkpoint.sha256(folder / "final_checkpoint" / checkpoint.MANIFEST)
            results = opened.measure_saved(opened.model, out, f"{manifest} {precision}")
            if log.folder:
                try:
                    for shown in opened.report(None, results, out):
                        log.say(shown)
                except OSError as error:
                    raise CheckpointError(f"cannot write {out}: {error.strerror}") from None
        accelerator.wait_for_everyone()
    end_processes(accelerator)
    return results.metrics


def _inputs(config: RunConfig) -> list[Path]:
    """Returns the files and folders that a run reads, as far as they are on this machine."""
    values = config.model_dump()
    given = [values.get("model", {}).get("name")]
    data = values.get("data", {})
    for path in (data.get("train_path"), data.get("eval_path"), data.get("replay", {}).get("path")):
        given += path if isinstance(path, list) else [path]
    return [Path(path) for path in given if path and os.path.exists(path)]  # an address is long


def _open_folder(train: Train, guard: Guard, inputs: Sequence[Path] = ()) -> Path | None:
    """Returns the checkpoint to resume from. A new run moves the folder of an earlier run.

    Raises CheckpointError if one of its `inputs` would be moved along.
    """
    folder, resume = Path(train.output_dir), train.resume_from_checkpoint
    try:
        for moved in run_folder.complete_moves(folder):
            show(moved)
        run_folder.remove_unfinished(folder)
        found = run_folder.find(folder, resume, show) if resume else None
    except UserError:
        guard.status.begin()  # so that the failure is recorded
        raise
    # All that a run writes before it begins:
    own = {Status.NAME, Lock.NAME, RANKS, TRACEBACK, run_folder.ORIGIN}
    earlier = guard.status.read().get("state")
    results = [*run_folder.newest_first(folder), folder / run_folder.FINAL]
    holds_run = any(path.exists() for path in (*results, folder / run_folder.METRICS)) or (
        earlier and any(path.name not in own for path in folder.iterdir())
    )
    if not (holds_run or earlier):
        run_folder.refuse_to_overwrite(folder)
    is_own = found and found.parent.resolve() == folder.resolve()
    if found and not is_own and found.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{found} is not in the lineage of the run in {folder}; to continue from it, give this "
            "run another train.output_dir"
        )
    is_finished = earlier == "finished" or results[-1].exists()
    if holds_run and not is_own and (resume != "auto" or is_finished):
        assert guard.lock
        for path in inputs:
            if path.resolve().is_relative_to(folder.resolve()):
                raise CheckpointError(
                    f"{path} lies in {folder}, which holds an earlier run and would be moved "
                    "aside; give this run another train.output_dir"
                )
        show(f"{folder} holds an earlier run: moved to {guard.lock.move_folder()}")
    if not is_own:
        run_folder.record_origin(folder, found)
    if resume == "auto" and not found:
        show(f"{folder} has no checkpoint: training starts at step 0")
    guard.status.begin()
    return found


def _open_log(
    config: RunConfig, accelerator: Accelerator, guard: Guard, resumed_from: Path | None
) -> Log:
    """Returns the log, with trackers that have started.

    One that cannot start ends a new run, but not one that a scheduler may have resumed.
    """
    if not accelerator.is_main_process:
        return Log(None)
    folder, trackers = Path(config.train.output_dir), dict[str, Any]()
    for name in config.train.trackers:
        guard.tick()
        try:
            trackers[name] = start_tracker(name, folder.name, public_values(config))
        except UserError as error:
            if resumed_from is None:
                raise
            show(f"warning: {error}; the run goes on without it")
    return Log(folder, tensorboard=config.train.tensorboard, trackers=trackers)


def _attempt(
    train: Train, own: dict[str, str], planned: plan.Plan, devices: str, step: float
) -> dict[str, Any]:
    """Returns what history.jsonl says about this start, or resume after `step`."""
    settings = train.deepspeed_config and checkpoint.sha256(Path(train.deepspeed_config))
    place = {  # what the bits of a result depend on, besides its configuration
        "devices": devices,
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processes": str(planned.world_size),
        "engine": train.engine,
        "settings of DeepSpeed": settings or "none",
        "tokens of a micro-batch": str(planned.budget),
        "precision": planned.precision,
        **software(),
    }
    return {"event": "attempt", "after_step": step, "identity": own, "place": place}


def _banner(
    config: RunConfig, described: list[tuple[str, str]], planned: plan.Plan, world: dict[str, str]
) -> Table:
    """Returns the table at the beginning of a run. `described`: the rows of its task."""
    train, size = config.train, planned.world_size
    engine = train.engine if size > 1 or train.engine != "ddp" else "one process"
    settings = f" with {train.deepspeed_config}" if train.deepspeed_config else ""
    micro_batches = f"{planned.micro_batches} micro-batch(es)"
    examples = planned.labels.examples
    rows = [
        *described,
        ("processes", f"{size} ({engine}){settings}{world['spread']}"),
        ("devices", world["devices"]),
        ("precision", f"{planned.precision}: {resolve_precision(train)[1]}"),
        ("batch", f"{train.global_batch} {examples} in {size} process(es) x {micro_batches}"),
        ("results", train.output_dir),
    ]
    return facts("Run", rows)


def _closing(
    config: RunConfig,
    rows: list[tuple[str, str]],
    commands: dict[str, str],
    measured: dict[str, Any],
) -> Table:
    """Returns the table at the end of a run. `rows`, `commands`: those of its task."""
    rows = [
        *rows,
        ("training", duration(measured["training_seconds"])),
        ("total", duration(measured["total_seconds"])),
        ("results", f"{config.train.output_dir}/ (evaluation/metrics.json, final_checkpoint/)"),
    ]
    width = max(map(len, commands), default=0) + 2
    rows += [("next", f"{command:<{width}}{why}") for command, why in commands.items()]
    return facts("Done", rows)
