"""Preflight: a list of checks, each a `Finding(ok, what, do)`; all run, all are printed.

A check that raises a UserError is a finding; what depends on it is left out and said so. Nothing is
kept: the steps happen in this process, on few examples, and their checkpoint in a folder that is
removed.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table
from rich.text import Text
from torch import nn

from sft.config.load import load_run, refuse_one_agent, with_values
from sft.config.schema import EPISODE, AnyConfig, Config, Configured, DistillConfig, Train
from sft.data import cache, template
from sft.errors import UserError
from sft.evaluate import predictions
from sft.models import load
from sft.plan import plan
from sft.runtime import hardware, processes
from sft.runtime.console import duration, make_console, size
from sft.runtime.disk import folder_bytes, free_bytes, refuse_if_full, refuse_if_unwritable
from sft.runtime.log import Log
from sft.runtime.precision import resolve_precision
from sft.tasks import base
from sft.tasks.distill import histories
from sft.tasks.distill.source import SOURCES
from sft.tasks.distill.task import Distillation, blank_histories, build, try_unseen
from sft.tasks.registry import make_task
from sft.tasks.sft.task import FineTune, usable_budget
from sft.train import engine
from sft.train.task import Task

ROWS = 8  # examples of the training step
NEW_TOKENS = 16  # of the answer, at most


@dataclass(frozen=True)
class Finding:
    ok: bool
    what: str
    do: str = ""


def run(config_file: str, overrides: list[str], requirements: Path) -> bool:
    """Prints every finding; True if all are ok."""
    findings = list(_all(config_file, overrides, requirements))
    table = Table(title=f"Check of {config_file}", title_justify="left", box=None, pad_edge=False)
    for column in ("", "what", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = Text("ok", style="green") if finding.ok else Text("NOT OK", style="bold red")
        table.add_row(mark, Text(finding.what), Text(finding.do))
    make_console().print(table)
    return all(finding.ok for finding in findings)


def _all(config_file: str, overrides: list[str], requirements: Path) -> Iterator[Finding]:
    yield python()
    yield packages(requirements)
    machine = hardware.detect()
    yield devices(machine)
    try:
        config = load_run(config_file, overrides)
    except UserError as error:
        yield Finding(
            False, str(error), "correct the configuration; the checks that need it are left out"
        )
        return
    yield Finding(True, f"configuration: {config_file}, every key known and of the right type")
    yield precision(config, machine)
    yield writable(Path(config.train.output_dir))
    try:
        for check in (*OF_TASK[config.task].data, disk):
            yield check(config)
        yield from trial(config)
    except UserError as error:
        yield Finding(False, str(error), "mend this first; later checks that need it are left out")


def python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(sys.version_info >= (3, 11), f"Python {found}", "" if found else "install 3.11")


def packages(requirements: Path) -> Finding:
    """Installed versions against the pins."""
    wrong = []
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", requirements.read_text("utf-8"), re.MULTILINE)
    for name, pinned in pins:
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "nothing"
        if found != pinned:
            wrong.append(f"{name}: expected {pinned}, found {found}")
    if wrong:
        return Finding(False, "; ".join(wrong), f"pip install -r {requirements}, or `make setup`")
    return Finding(True, f"packages: {len(pins)} as pinned in {requirements.name}")


def devices(machine: hardware.Hardware) -> Finding:
    gpus = ", ".join(hardware.describe(device) for device in machine.devices)
    ram = hardware.gib(machine.ram_available_bytes)
    return Finding(True, f"device: {gpus or f'CPU, {machine.cores} cores'}; {ram} of RAM available")


def precision(config: AnyConfig, machine: hardware.Hardware) -> Finding:
    wanted, reason = resolve_precision(config.train)
    capable = all(d.bf16 for d in machine.devices) if machine.devices else machine.cpu_bf16
    what = f"precision: {wanted} ({reason}); bf16 {'in hardware' if capable else 'not in hardware'}"
    slow = wanted == "bf16" and not capable
    return Finding(
        not slow, what, "set train.precision: fp32, emulated bf16 is slower" if slow else ""
    )


def writable(folder: Path) -> Finding:
    """Creates and removes a temporary file where the run folder will be."""
    try:
        refuse_if_unwritable(folder)
    except UserError as error:
        return Finding(False, str(error), "set train.output_dir")
    return Finding(True, f"write access: {folder}")


def tokenizer(config: Config) -> Finding:
    """Renders a conversation and compares its start with the prompt that inference makes."""
    loaded = load.load_tokenizer(config.model)
    template.prepare_tokenizer(loaded)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    example = template.render(loaded, turns)
    if mismatch := template.prompt_mismatch(loaded, turns, example):
        return Finding(False, f"chat template: {mismatch}", "training and serving would differ")
    return Finding(True, f"tokenizer and template: {len(loaded):,} tokens, prompts as when served")


def rows(config: Config) -> Finding:
    prepared = cache.prepare(config)
    longest = max(prepared.train.lengths)
    return Finding(
        True,
        f"data: {len(prepared.train):,} rows to train on, {len(prepared.held_out):,} held out, "
        f"longest {longest:,} tokens",
    )


def sources(config: DistillConfig) -> Finding:
    """Histories that are there can be read; of others how long it takes to collect them, by the
    time of one episode."""
    settings = config.distill
    folder = histories.folder_of(settings)
    missing = histories.missing(settings)
    told = f"{settings.num_streams} streams x {settings.num_steps} steps"
    if not missing:
        number = len(histories.load(settings).cells)
        return Finding(True, f"histories: {number} goals x {told} in {folder}")
    refuse_if_unwritable(folder, "distill.data_dir")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those that collect
    started = time.process_time()  # others may use this core as well
    seed, learnt = missing[0]
    SOURCES[settings.source](learnt, settings.num_streams, EPISODE, seed)
    seconds = (time.process_time() - started) * settings.num_steps / EPISODE
    torch.set_num_threads(threads)
    rounds = math.ceil(len(missing) / min(len(missing), hardware.usable_cores()))
    number = sum(len(learnt) for _, learnt in missing)
    return Finding(
        True,
        f"histories: {number} goals x {told} are collected into {folder} first, which takes about "
        f"{duration(rounds * seconds)} (probed)",
    )


def disk(config: AnyConfig) -> Finding:
    needed = plan.disk(config, OF_TASK[config.task].num_examples(config))
    try:
        refuse_if_full(needed, config.train)
    except UserError as error:
        return Finding(False, "disk", str(error))
    free = size(free_bytes(Path(config.train.output_dir)))
    return Finding(True, f"disk: {needed}; {free} free")


# --- trying it out -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A task that is ready for its first step."""

    task: Task
    train: Train
    planned: plan.Plan
    model: str  # in words
    saves: bool  # its checkpoint is small enough to be tried
    answers: Callable[[nn.Module], Iterator[Finding]]  # what the trained model is for


def trial(config: AnyConfig) -> Iterator[Finding]:
    """Model, processes, two optimizer steps of the real task on few examples, a checkpoint of it
    saved and read back, and an answer; all of it thrown away."""
    refuse_if_unwritable(Path(config.train.output_dir))
    accelerator = processes.start_processes(processes.any_launch(config).train)
    yield Finding(True, f"Accelerate: {processes.described(accelerator)['devices']}")
    place = hardware.nearest_existing(Path(config.train.output_dir))
    with tempfile.TemporaryDirectory(prefix=".check_", dir=place) as folder:
        tried = OF_TASK[config.task].begin(_few(config, folder), accelerator)
        task, planned = tried.task, tried.planned
        trained = f"{planned.num_trained:,} of {planned.num_parameters:,} parameters are trained"
        yield Finding(True, f"model: {tried.model}, {trained}")
        made = engine.Engine(task, tried.train, accelerator, Log(None), task.budget)
        values = made.optimizer_step()
        yield Finding(
            True,
            f"one training step: {planned.global_batch} {planned.words.examples}, "
            f"loss {values['train/loss']:.4f}, gradient norm {values['train/grad_norm']:.4f}",
        )
        if task.surveys:
            yield diversity(made)
        if tried.saves:
            made.prove_saving()
            taken = size(folder_bytes(Path(folder)))
            yield Finding(True, f"checkpoint: saved, verified and read back, {taken}")
        yield from tried.answers(made.model)


def _few(config: Configured, folder: str) -> Configured:
    """The configuration for two steps of few examples, in one process."""
    few = {"train.output_dir": folder, "train.global_batch": ROWS, "train.max_steps": 2}
    return with_values(processes.any_launch(config), few)


def _fine_tuning(config: Config, accelerator: Accelerator) -> Trial:
    """On the first rows."""
    refuse_one_agent(config)
    few = with_values(
        config,
        {
            "data.max_rows": min(ROWS, config.data.max_rows or ROWS),
            "evaluation.num_examples": min(1, config.evaluation.num_examples),
            "evaluation.max_new_tokens": min(NEW_TOKENS, config.evaluation.max_new_tokens),
        },
    )
    prepared = cache.prepare(few)
    planned = plan.make_plan(few, prepared, hardware.detect(), 1)
    few = with_values(few, plan.resolved_values(planned))
    built = load.build(few, planned.precision, accelerator.device)
    log, asked = Log(None), config.train.layout
    budget = usable_budget(planned.budget, asked, built, planned.precision, accelerator.device, log)
    task = make_task(few, prepared, built, accelerator, log, budget)
    folder = Path(few.train.output_dir)

    def answers(trained: nn.Module) -> Iterator[Finding]:
        if few.evaluation.num_examples:
            yield answer(task, trained, folder)

    told = f"{few.tuning.mode} of {few.model.name}"
    saves = few.tuning.mode != "full"  # whole weights can be large; a run tries it at its start
    return Trial(task, few.train, planned, told, saves, answers)


def _distillation(config: DistillConfig, accelerator: Accelerator) -> Trial:
    """On the histories, or on blank ones where they are not collected yet."""
    settings = config.distill.model_copy(update={"eval_seeds": 1})
    planned = plan.make_plan(config, base.Work.windows(settings), hardware.detect(), 1)
    few = with_values(config, plan.resolved_values(planned))
    there = not histories.missing(settings)
    found = histories.load(settings) if there else blank_histories(settings)
    built = build(settings, few.train.seed, accelerator.device)
    task = Distillation(settings, found, built, accelerator, Log(None), planned.budget)

    def answers(trained: nn.Module) -> Iterator[Finding]:
        tried = try_unseen(trained, settings, accelerator, 1, lambda: None)
        told = f"{len(tried.goals)} unseen goals, an episode each"
        yield Finding(True, f"in context: {told}, return {float(tried.returns.mean()):.2f}")

    on = "" if there else ", on blank histories"
    told = f"{settings.num_layers} layers, width {settings.width}{on}"
    return Trial(task, few.train, planned, told, True, answers)


def diversity(made: engine.Engine) -> Finding:
    """Of the second step: before the first, agents are the same function."""
    made.step += 1
    found = made.optimizer_step()["train/diversity"]
    made.step -= 1
    what = f"diversity: {found:.3g} after one step"
    return Finding(found > 0, what, "" if found > 0 else "agents do not part: train.learning_rate")


def answer(task: FineTune, built: nn.Module, folder: Path) -> Finding:
    """One held-out prompt, as after training."""
    path = folder / "predictions.jsonl"
    task.answers(built, path, "check")
    record = next(predictions.read(path), None)
    if record is None:
        return Finding(True, "generation: no held-out row asks for an answer")
    if "error" in record:
        return Finding(False, f"generation: {record['row']}: {record['error']}", "mend the row")
    agents = task.config.crowd.num_agents
    by = f", by {agents} agents ({task.config.crowd.aggregator})" if agents else ""
    return Finding(
        True,
        f"{'aggregated ' * bool(agents)}generation: {record['prompt_tokens']} tokens asked, "
        f"{record['completion_tokens']} answered{by}",
    )


@dataclass(frozen=True)
class Checks:
    """What is checked of a task; Any is its own configuration."""

    data: list[Callable[[Any], Finding]]
    num_examples: Callable[[Any], int]
    begin: Callable[[Any, Accelerator], Trial]


OF_TASK = {
    Config.task: Checks(
        [tokenizer, rows], lambda config: len(cache.prepare(config).train), _fine_tuning
    ),
    DistillConfig.task: Checks(
        [sources], lambda config: len(base.Work.windows(config.distill).lengths), _distillation
    ),
}
