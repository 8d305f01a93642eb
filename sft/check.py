"""Preflight: a list of checks, each a `Finding(ok, what, do)`; all run, all are printed.

A check that raises a UserError is a finding; what depends on it is left out and said so. Nothing is
kept: the steps happen in this process, on the first rows, and their checkpoint in a folder that is
removed.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.table import Table
from rich.text import Text
from torch import nn

from sft import (
    chat,
    engine,
    finetune,
    hardware,
    model,
    plan,
    predictions,
    prepare,
    processes,
    storage,
)
from sft.config import Config, UserError, load_config, refuse_one_agent, with_values
from sft.log import Log, make_console, size
from sft.tasks import make_task

ROWS = 8  # of the data, for the training step
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
        config = load_config(config_file, overrides)
    except UserError as error:
        yield Finding(
            False, str(error), "correct the configuration; the checks that need it are left out"
        )
        return
    yield Finding(True, f"configuration: {config_file}, every key known and of the right type")
    yield precision(config, machine)
    yield writable(Path(config.train.output_dir))
    steps: list[Callable[[], Iterator[Finding]]] = [
        lambda: iter([tokenizer(config)]),
        lambda: iter([rows(config)]),
        lambda: iter([disk(config)]),
        lambda: trial(config),
    ]
    for step in steps:
        try:
            yield from step()
        except UserError as error:
            yield Finding(
                False, str(error), "mend this first; later checks that need it are left out"
            )
            return


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


def precision(config: Config, machine: hardware.Hardware) -> Finding:
    wanted, reason = processes.resolve_precision(config.train)
    capable = all(d.bf16 for d in machine.devices) if machine.devices else machine.cpu_bf16
    what = f"precision: {wanted} ({reason}); bf16 {'in hardware' if capable else 'not in hardware'}"
    slow = wanted == "bf16" and not capable
    return Finding(
        not slow, what, "set train.precision: fp32, emulated bf16 is slower" if slow else ""
    )


def writable(folder: Path) -> Finding:
    """Creates and removes a temporary file where the run folder will be."""
    try:
        storage.refuse_if_unwritable(folder)
    except UserError as error:
        return Finding(False, str(error), "set train.output_dir")
    return Finding(True, f"write access: {folder}")


def tokenizer(config: Config) -> Finding:
    """Renders a conversation and compares its start with the prompt that inference makes."""
    loaded = model.load_tokenizer(config.model)
    chat.prepare_tokenizer(loaded)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    example = chat.render(loaded, turns)
    if mismatch := chat.prompt_mismatch(loaded, turns, example):
        return Finding(False, f"chat template: {mismatch}", "training and serving would differ")
    return Finding(True, f"tokenizer and template: {len(loaded):,} tokens, prompts as when served")


def rows(config: Config) -> Finding:
    prepared = prepare.prepare(config)
    longest = max(prepared.train.lengths)
    return Finding(
        True,
        f"data: {len(prepared.train):,} rows to train on, {len(prepared.held_out):,} held out, "
        f"longest {longest:,} tokens",
    )


def disk(config: Config) -> Finding:
    needed = plan.disk(config, len(prepare.prepare(config).train))
    try:
        storage.refuse_if_full(needed, config.train)
    except UserError as error:
        return Finding(False, "disk", str(error))
    free = size(storage.free_bytes(Path(config.train.output_dir)))
    return Finding(True, f"disk: {needed}; {free} free")


def trial(config: Config) -> Iterator[Finding]:
    """Model, processes, two optimizer steps of the real task on the first rows, a checkpoint of it
    saved and read back, and an answer; all of it thrown away."""
    storage.refuse_if_unwritable(Path(config.train.output_dir))
    refuse_one_agent(config)
    accelerator = processes.start_processes(processes.any_launch(config).train)
    yield Finding(True, f"Accelerate: {processes.described(accelerator)['devices']}")
    place = hardware.nearest_existing(Path(config.train.output_dir))
    with tempfile.TemporaryDirectory(prefix=".check_", dir=place) as folder:
        few = _few(config, folder)
        prepared = prepare.prepare(few)
        planned = plan.make_plan(few, prepared, hardware.detect(), 1)
        few = with_values(few, plan.resolved_values(planned))
        built = model.build(few, planned.precision, accelerator.device)
        trained = f"{planned.num_trained:,} of {planned.num_parameters:,} parameters are trained"
        yield Finding(True, f"model: {few.tuning.mode} of {few.model.name}, {trained}")
        log = Log(None)
        asked = config.train.layout
        budget = finetune.usable_budget(planned.budget, asked, built, accelerator.device, log)
        task = make_task(few, prepared, built, accelerator, log, budget)
        made = engine.Engine(task, few.train, accelerator, log, budget)
        values = made.optimizer_step()
        yield Finding(
            True,
            f"one training step: {len(prepared.train)} rows, loss {values['train/loss']:.4f}, "
            f"gradient norm {values['train/grad_norm']:.4f}",
        )
        if task.surveys:
            yield diversity(made)
        if few.tuning.mode != "full":  # whole weights can be large; a run tries it at its start
            made.prove_saving()
            taken = size(storage.folder_bytes(Path(folder)))
            yield Finding(True, f"checkpoint: saved, verified and read back, {taken}")
        if config.evaluation.num_examples:
            yield answer(task, made.model, Path(folder))


def diversity(made: engine.Engine) -> Finding:
    """Of the second step: before the first, agents are the same function."""
    made.step += 1
    found = made.optimizer_step()["train/diversity"]
    made.step -= 1
    what = f"diversity: {found:.3g} after one step"
    return Finding(found > 0, what, "" if found > 0 else "agents do not part: train.learning_rate")


def answer(task: finetune.FineTune, built: nn.Module, folder: Path) -> Finding:
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


def _few(config: Config, folder: str) -> Config:
    """The configuration for two steps of the first rows, in one process."""
    return with_values(
        processes.any_launch(config),
        {
            "data.max_rows": min(ROWS, config.data.max_rows or ROWS),
            "train.output_dir": folder,
            "train.global_batch": ROWS,
            "train.max_steps": 2,
            "evaluation.num_examples": 1,
            "evaluation.max_new_tokens": min(NEW_TOKENS, config.evaluation.max_new_tokens),
        },
    )
