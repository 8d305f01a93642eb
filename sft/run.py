"""One training run from configuration to results: plan, answer, train, answer again, report.

It owns the run folder (docs/RUNS.md); however the run ends, `guard` writes it to `status.json`.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.table import Table
from rich.text import Text
from torch import nn

from sft import (
    audit,
    chat,
    checkpoint,
    evaluate,
    export,
    finetune,
    hardware,
    plan,
    predictions,
    prepare,
    processes,
    profile,
    storage,
)
from sft.config import (
    AnyConfig,
    Config,
    DistillConfig,
    Train,
    UserError,
    refuse_one_agent,
    with_values,
)
from sft.distill import histories
from sft.distill import run as distilled
from sft.engine import Engine, identity, memory_bytes, read_state
from sft.guard import RANKS, TRACEBACK, Guard, Lock, Status
from sft.log import Log, beginning, duration, facts, write_json
from sft.model import build, dtype_table
from sft.processes import (
    agree,
    any_launch,
    check_launch,
    described,
    end_processes,
    resolve_precision,
    start_processes,
)
from sft.tasks import make_task


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
        agree(accelerator, processes.facts(config, task.digests(prepared)))
        resumed_from = guard.join(accelerator, found)
        with closing(_open_log(config, accelerator)) as log:
            task.run(config, prepared, accelerator, log, resumed_from, guard)
        accelerator.wait_for_everyone()  # a run has finished when all ranks have
    end_processes(accelerator)


def _run(
    config: Config,
    prepared: prepare.Prepared,
    accelerator: Accelerator,
    log: Log,
    resumed_from: Path | None,
    guard: Guard,
) -> None:
    started = time.perf_counter()
    folder = Path(config.train.output_dir)
    machine = hardware.detect(folder)
    if resumed_from:
        read_state(resumed_from, identity(config.train, finetune.identity(config, prepared)))
    finetune.check_references(config, prepared)
    planned = plan.make_together(config, prepared, machine, accelerator)
    if warning := storage.refuse_if_full(planned.disk, config.train):
        log.say(f"warning: {warning}")
    resolved = with_values(config, plan.resolved_values(planned))
    log.say(_banner(config, planned, described(accelerator)))
    for told in (hardware.table(machine), plan.table(planned), *_first_row(prepared)):
        log.say(told)
    if log.folder:
        prepare.write(prepared, folder)
        plan.keep(resolved, planned, folder)

    guard.stop_if_asked()
    model = build(resolved, planned.precision, accelerator.device)
    log.say(dtype_table(model))
    budget = finetune.usable_budget(
        planned.budget, config.train.layout, model, planned.precision, accelerator.device, log
    )
    if budget != planned.budget:
        planned = plan.replanned(planned, resolved, prepared, machine, budget)
        resolved = plan.with_budget(resolved, planned, log)
    task = make_task(resolved, prepared, model, accelerator, log, budget, guard)
    engine = Engine(task, resolved.train, accelerator, log, budget)
    engine.guard = guard
    planned, measured = plan.confirm_on(engine, planned, resolved, prepared, machine)
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
        plan.write(planned, folder / "plan.json", measured)
        _tell_results(config, base, tuned, measured, log)


def evaluate_run(folder: Path, name: str, overrides: list[str]) -> None:
    """Evaluates a finished run into `evaluation/<name>/`, with overrides (another file, more
    examples). Collective."""
    config = any_launch(export.any_run_config(folder, overrides))
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


def _prepare(config: Config, moved: Callable[[], None]) -> prepare.Prepared:
    refuse_one_agent(config)
    return prepare.prepare(config, moved)


def _prepare_evaluation(config: Config, moved: Callable[[], None]) -> prepare.Prepared:
    prepared = prepare.prepare(config, moved)
    finetune.check_references(config, prepared)
    return prepared


def _evaluate(
    folder: Path,
    out: Path,
    config: Config,
    prepared: prepare.Prepared,
    accelerator: Accelerator,
    log: Log,
    guard: Guard,
) -> None:
    used = config if config.crowd.agent is None else export.alone(config)
    planned = plan.make_together(used, prepared, hardware.detect(folder), accelerator)
    model, _ = export.load_tuned(folder, config, planned.precision, accelerator.device)
    budget = finetune.usable_budget(
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


def _digests(prepared: prepare.Prepared) -> dict[str, str]:
    train = prepared.audit["train"]
    return {
        "data": prepared.audit["data_sha256"],
        "tokenizer": train["tokenizer_sha256"],
        "chat template": train["template_sha256"],
    }


TASKS = {
    Config.task: Stages(_prepare, _digests, _run, _prepare_evaluation, _evaluate),
    DistillConfig.task: Stages(
        distilled.prepare,
        lambda found: {"data": histories.digest(found)},
        distilled.run,
        lambda config, moved: None,
        distilled.evaluate,
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
    folder: Path, task: finetune.FineTune, engine: Engine, precision: str, resumed: bool
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


def _results(task: finetune.FineTune, model: nn.Module, path: Path, state: str) -> dict[str, Any]:
    """Held-out metrics with the scores of the answers, which are written to `path`. Collective."""
    metrics = task.evaluate(model)
    found = task.answers(model, path, state)
    results = found.tally.report()
    results["metrics"] = metrics | results["metrics"]
    return results | {"num_examples": found.num_examples, "num_failed": found.num_failed}


def _tell_results(
    config: Config, base: dict[str, Any], tuned: dict[str, Any], measured: dict[str, Any], log: Log
) -> None:
    folder = Path(config.train.output_dir) / "evaluation"
    both = {"base": base, "tuned": tuned}
    written = {name: results["metrics"] for name, results in both.items()}
    for key in ("intervals", *(["groups"] if config.evaluation.group else [])):
        written[key] = {name: results.get(key, {}) for name, results in both.items()}
    write_json(folder / "metrics.json", written | {"num_examples": tuned["num_examples"]})
    log.say(_side_by_side(folder, config.evaluation.num_shown))
    for told in _groups_table(config, tuned):
        log.say(told)
    log.say(_closing(config, base, tuned, measured))


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


# --- what people see ---------------------------------------------------------------------------


def _banner(config: Config, planned: plan.Plan, world: dict[str, str]) -> Table:
    train, size = config.train, planned.world_size
    engine = train.engine if size > 1 or train.engine != "ddp" else "one process"
    settings = f" with {train.deepspeed_config}" if train.deepspeed_config else ""
    micro_batches = f"{planned.micro_batches} micro-batch(es)"
    rows = [
        ("model", f"{config.model.name}, {config.tuning.mode}"),
        ("data", _paths(config.data.train_path)),
        ("processes", f"{size} ({engine}){settings}{world['spread']}"),
        ("devices", world["devices"]),
        ("precision", f"{planned.precision}: {resolve_precision(train)[1]}"),
        ("batch", f"{train.global_batch} examples in {size} process(es) x {micro_batches}"),
        ("results", train.output_dir),
    ]
    return facts("Run", rows)


def _first_row(prepared: prepare.Prepared) -> tuple[str, Text, str]:
    return (
        "First row, as the model sees it (supervised: green; special: magenta; context: dim)",
        chat.coloured(prepared.tokenizer, prepared.train[0]),
        f"audit: {audit.summary(prepared.audit)}",
    )


def _paths(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _told(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())


def _scores_table(title: str, results: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("metric")
    for column in ("value", "95 % interval"):
        table.add_column(column, justify="right")
    for name, value in results["metrics"].items():
        low, high = results["intervals"].get(name, (None, None))
        interval = "" if low is None else f"{low:.4g} to {high:.4g}"
        table.add_row(name.replace("_", " "), f"{value:.4g}", interval)
    if results["num_failed"]:
        table.add_row("not answered", f"{results['num_failed']:,}", "")
    return table


def _groups_table(config: Config, results: dict[str, Any]) -> Iterator[Table]:
    """The scores of each group, but for those of single labels; their intervals are in the file."""
    groups = results.get("groups")
    if not groups:
        return
    names = [name for name in results["intervals"] if "/" not in name]

    def cell(metric: str, group: str) -> str:
        return f"{groups[group]['metrics'][metric]:.4g}"

    sizes = {name: each["num_examples"] for name, each in groups.items()}
    cells = {name.replace("_", " "): partial(cell, name) for name in names}
    column = str(config.evaluation.group)
    yield evaluate.groups_table(f"Scores by {column}", column, sizes, cells)


def _side_by_side(folder: Path, num_shown: int) -> Table:
    table = Table(title="The same prompts, before and after", title_justify="left", show_lines=True)
    for column in ("prompt", "base", "fine-tuned"):
        table.add_column(column, overflow="fold", ratio=1)
    paths = (folder / "base.jsonl", folder / "predictions.jsonl")
    for before, after in islice(zip(*map(predictions.read, paths), strict=False), num_shown):
        right = (after["answer"] or "").strip() == after["reference"].strip()
        table.add_row(
            Text(beginning(after["prompt"])),
            Text(_shown(before["answer"])),
            Text(_shown(after["answer"]), style="green" if right else "red"),
        )
    return table


def _answers_table(path: Path, num_shown: int) -> Table:
    table = Table(show_lines=True)
    for column in ("prompt", "answer", "reference"):
        table.add_column(column, overflow="fold", ratio=1)
    for row in islice(predictions.read(path), num_shown):
        table.add_row(*(Text(_shown(row[key])) for key in ("prompt", "answer", "reference")))
    return table


def _shown(text: str | None) -> str:
    return beginning("(not answered)" if text is None else text)


def _closing(
    config: Config, base: dict[str, Any], tuned: dict[str, Any], measured: dict[str, Any]
) -> Table:
    folder = config.train.output_dir
    rows = [
        (name.replace("_", " "), f"{base['metrics'][name]:.4g} -> {value:.4g}")
        for name, value in tuned["metrics"].items()
        if name in ("loss", "exact_match")
    ]
    rows += [
        ("training", duration(measured["training_seconds"])),
        ("in all", duration(measured["total_seconds"])),
        ("results", f"{folder}/ (evaluation/metrics.json, final_checkpoint/)"),
    ]
    alone = " AGENT=0" if config.crowd.num_agents else ""
    commands = {
        f"make infer RUN={folder}": "talk to it",
        f"make merge RUN={folder}{alone}": "one model without adapters",
        "make tensorboard": "look at the curves",
    }
    if config.tuning.mode == "full":
        commands = {k: v for k, v in commands.items() if "merge" not in k}
        commands['make train ARGS="tuning.mode=qlora"'] = "the same with frozen 4-bit weights"
    width = max(map(len, commands)) + 2
    rows += [("next", f"{command:<{width}}{why}") for command, why in commands.items()]
    return facts("Done", rows)
