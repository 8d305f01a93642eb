"""One training run from configuration to results: plan, answer, train, answer again, report.

It owns the run folder (docs/RUNS.md); however the run ends, `guard` writes it to `status.json`.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from sft.config.load import refuse_one_agent, with_values
from sft.config.schema import AnyConfig, Config, DistillConfig, Train
from sft.data import cache
from sft.errors import UserError
from sft.models.dtypes import dtype_table
from sft.models.load import build
from sft.plan import calibration, plan, report
from sft.report import (
    _answers_table,
    _banner,
    _first_row,
    _groups_table,
    _scores_table,
    _tell_results,
    _told,
)
from sft.runtime import agreement, checkpoint, disk, hardware
from sft.runtime.agreement import agree
from sft.runtime.console import write_json
from sft.runtime.lock import Lock
from sft.runtime.log import Log
from sft.runtime.processes import (
    any_launch,
    check_launch,
    described,
    end_processes,
    start_processes,
)
from sft.runtime.status import RANKS, TRACEBACK, Status
from sft.runtime.watchdog import Guard
from sft.serve import runs
from sft.tasks.distill import histories
from sft.tasks.distill import report as distill_report
from sft.tasks.registry import make_task
from sft.tasks.sft import task as sft_task
from sft.train import profile
from sft.train.engine import Engine, memory_bytes
from sft.train.state import identity, read_state


def train(config: AnyConfig) -> None:
    """Runs `config` in this process group."""
    check_launch(config.train)
    _check_wandb(config)
    train = config.train
    task = task_of(config)
    with Guard(Path(train.output_dir), train.stall_timeout) as guard:
        found = _open_folder(train, guard) if guard.is_first else None
        prepared = task.prepare(config, guard.tick)  # before a process group that could time out
        accelerator = start_processes(train)
        agree(accelerator, agreement.facts(config, task.digests(prepared)))
        resumed_from = guard.join(accelerator, found)
        with closing(_open_log(config, accelerator)) as log:
            task.run(config, prepared, accelerator, log, resumed_from, guard)
        accelerator.wait_for_everyone()  # a run has finished when all ranks have
    end_processes(accelerator)


def _run(
    config: Config,
    prepared: cache.Prepared,
    accelerator: Accelerator,
    log: Log,
    resumed_from: Path | None,
    guard: Guard,
) -> None:
    started = time.perf_counter()
    folder = Path(config.train.output_dir)
    machine = hardware.detect(folder)
    if resumed_from:
        read_state(resumed_from, identity(config.train, sft_task.identity(config, prepared)))
    sft_task.check_references(config, prepared)
    planned = calibration.make_together(config, prepared, machine, accelerator)
    if warning := disk.refuse_if_full(planned.disk, config.train):
        log.say(f"warning: {warning}")
    resolved = with_values(config, plan.resolved_values(planned))
    log.say(_banner(config, planned, described(accelerator)))
    for told in (hardware.table(machine), report.table(planned), *_first_row(prepared)):
        log.say(told)
    if log.folder:
        cache.write(prepared, folder)
        report.keep(resolved, planned, folder)

    guard.stop_if_asked()
    model = build(resolved, planned.precision, accelerator.device)
    log.say(dtype_table(model))
    budget = sft_task.usable_budget(
        planned.budget, config.train.layout, model, planned.precision, accelerator.device, log
    )
    if budget != planned.budget:
        planned = plan.replanned(planned, resolved, prepared, machine, budget)
        resolved = calibration.with_budget(resolved, planned, log)
    task = make_task(resolved, prepared, model, accelerator, log, budget, guard)
    engine = Engine(task, resolved.train, accelerator, log, budget)
    engine.guard = guard
    planned, measured = calibration.confirm_on(engine, planned, resolved, prepared, machine)
    base = _base_results(folder, task, engine, planned.precision, resumed_from is not None)
    log.say(f"before: {_told(base['metrics'])}")
    measured |= profile.timed(engine, resumed_from)
    with engine.preemptible():
        task.finish(engine.model)
        path = folder / "evaluation" / "predictions.jsonl"
        tuned = _results(task, engine.model, path, f"{engine.digest()} {planned.precision}")
    log.log(engine.step, {f"eval/{name}": value for name, value in tuned["metrics"].items()})
    log.say(f"after: {_told(tuned['metrics'])}")
    checkpoint.commit(
        folder / "final_checkpoint", engine.write_final, accelerator, planned.disk.final
    )

    measured |= {
        "total_seconds": time.perf_counter() - started,
        "memory_bytes": memory_bytes(),
    }
    if log.folder:
        report.write(planned, folder / "plan.json", measured)
        _tell_results(config, base, tuned, measured, log)


def evaluate_run(folder: Path, name: str, overrides: list[str]) -> None:
    """Evaluates a finished run into `evaluation/<name>/`, with overrides (another file, more
    examples). Collective."""
    config = any_launch(runs.any_run_config(folder, overrides))
    task = task_of(config)
    out = folder / "evaluation" / name
    with Guard(out, config.train.stall_timeout) as guard:
        if guard.is_first:
            guard.begin()
        prepared = task.prepare_evaluation(config, guard.tick)
        accelerator = start_processes(config.train)
        guard.join(accelerator, None)
        log = Log(out) if accelerator.is_main_process else Log(None)
        with closing(log):
            task.evaluate(folder, out, config, prepared, accelerator, log, guard)
        accelerator.wait_for_everyone()
    end_processes(accelerator)


def _prepare(config: Config, moved: Callable[[], None]) -> cache.Prepared:
    refuse_one_agent(config)
    return cache.prepare(config, moved)


def _prepare_evaluation(config: Config, moved: Callable[[], None]) -> cache.Prepared:
    prepared = cache.prepare(config, moved)
    sft_task.check_references(config, prepared)
    return prepared


def _evaluate(
    folder: Path,
    out: Path,
    config: Config,
    prepared: cache.Prepared,
    accelerator: Accelerator,
    log: Log,
    guard: Guard,
) -> None:
    used = config if config.crowd.agent is None else runs.alone(config)
    planned = calibration.make_together(used, prepared, hardware.detect(folder), accelerator)
    model, _ = runs.load_tuned(folder, config, planned.precision, accelerator.device)
    budget = sft_task.usable_budget(
        planned.budget, "auto", model, planned.precision, accelerator.device, log
    )
    task = make_task(config, prepared, model, accelerator, log, budget, guard)
    path = out / "predictions.jsonl"
    manifest = checkpoint.sha256(folder / "final_checkpoint" / checkpoint.MANIFEST)
    results = _results(task, model, path, f"{manifest} {planned.precision}")
    if log.folder:
        write_json(out / "metrics.json", results)
        log.say(_scores_table(f"{folder}: {results['num_examples']:,} examples", results))
        for told in _groups_table(config, results):
            log.say(told)
        log.say(_answers_table(path, config.evaluation.num_shown))


# --- tasks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stages:
    """What a task does in a run and in its evaluation; Any is the task's own configuration, and
    what it has prepared."""

    prepare: Callable[[Any, Callable[[], None]], Any]
    """Before there is a process group, on every rank; calls its argument at signs of progress."""
    digests: Callable[[Any], dict[str, str]]
    """Of what was prepared: all ranks must have the same."""
    run: Callable[[Any, Any, Accelerator, Log, Path | None, Guard], None]
    prepare_evaluation: Callable[[Any, Callable[[], None]], Any]
    evaluate: Callable[[Path, Path, Any, Any, Accelerator, Log, Guard], None]


def _digests(prepared: cache.Prepared) -> dict[str, str]:
    train = prepared.audit["train"]
    return {
        "data": prepared.audit["data_sha256"],
        "tokenizer": train["tokenizer_sha256"],
        "chat template": train["template_sha256"],
    }


TASKS = {
    Config.task: Stages(_prepare, _digests, _run, _prepare_evaluation, _evaluate),
    DistillConfig.task: Stages(
        distill_report.prepare,
        lambda found: {"data": histories.digest(found)},
        distill_report.run,
        lambda config, moved: None,
        distill_report.evaluate,
    ),
}


def task_of(config: AnyConfig) -> Stages:
    return TASKS[config.task]


# --- parts of the run --------------------------------------------------------------------------


def _open_folder(train: Train, guard: Guard) -> Path | None:
    """The checkpoint to resume from. A fresh run moves an earlier one in its folder aside."""
    folder, resume = Path(train.output_dir), train.resume_from_checkpoint
    try:
        found = checkpoint.find(folder, resume, print) if resume else None
    except UserError:
        guard.begin()  # the attempt that failed
        raise
    own = {Status.NAME, Lock.NAME, RANKS, TRACEBACK}  # all that a run leaves which never began
    earlier = guard.status.read().get("state")
    holds_run = earlier and any(path.name not in own for path in folder.iterdir())
    is_own = found and found.parent.resolve() == folder.resolve()
    if holds_run and not is_own and (resume != "auto" or earlier == "finished"):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        guard.move_folder(aside)
        print(f"{folder} holds an earlier run: moved to {aside}")
    guard.begin()
    return found


def _base_results(
    folder: Path, task: sft_task.FineTune, engine: Engine, precision: str, resumed: bool
) -> dict[str, Any]:
    """Results of the untrained model; a resumed run that asks the same has them on disk."""
    path = folder / "evaluation" / "base.json"
    asked = task.config.evaluation.model_dump(exclude={"num_shown", "batch_size"})
    if resumed and path.exists() and path.with_suffix(".jsonl").exists():
        found = json.loads(path.read_text("utf-8"))
        if found.get("settings") == asked:
            return found
    state = f"{engine.digest()} {precision}"
    results = _results(task, engine.model, path.with_suffix(".jsonl"), state)
    if task.log.folder:
        write_json(path, results | {"settings": asked})
    return results


def _results(task: sft_task.FineTune, model: nn.Module, path: Path, state: str) -> dict[str, Any]:
    """Held-out metrics with the scores of the answers, which are written to `path`. Collective."""
    metrics = task.evaluate(model)
    found = task.answers(model, path, state)
    results = found.tally.report()
    results["metrics"] = metrics | results["metrics"]
    return results | {"num_examples": found.num_examples, "num_failed": found.num_failed}


def _open_log(config: AnyConfig, accelerator: Accelerator) -> Log:
    if not accelerator.is_main_process:
        return Log(None)
    train = config.train
    return Log(Path(train.output_dir), tensorboard=train.tensorboard, wandb=_wandb(config))


def _wandb(config: AnyConfig) -> Any:
    if not config.train.wandb:
        return None
    wandb = importlib.import_module("wandb")
    return wandb.init(
        project="sft", name=Path(config.train.output_dir).name, config=config.model_dump()
    )


def _check_wandb(config: AnyConfig) -> None:
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("train.wandb: wandb is not installed; pip install wandb, or set it false")
