"""Runs all checks before a training, and prints a `Finding` for each.

A check that raises a UserError is a finding, too; checks that depend on it are skipped. A trial
step runs in this process on few examples, and its checkpoint is removed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from platform import python_version

from accelerate import Accelerator
from packaging.requirements import Requirement
from rich.text import Text

from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.errors import UserError
from sft.models.sequences import SequenceGroup
from sft.plan import coverage, plan
from sft.runtime import hardware, processes
from sft.runtime.console import make_console, size, table
from sft.runtime.disk import folder_bytes, free_bytes, refuse_if_full, refuse_if_unwritable
from sft.runtime.hardware import resolve_precision
from sft.runtime.processes import Context
from sft.tasks.base import Finding, Task
from sft.tasks.registry import load_run, task_of
from sft.train import engine
from sft.train.compiled import compiled, refuse_missing_compiler

TRIAL_EXAMPLES = 8  # global batch of the trial step


def run(config_file: str, overrides: list[str]) -> bool:
    """Prints every finding; returns whether all are ok."""
    findings = list(_findings(config_file, overrides))
    marks = {True: Text("ok", style="green"), False: Text("NOT OK", style="bold red")}
    rows = [(marks[finding.ok], Text(finding.what), Text(finding.do)) for finding in findings]
    columns = ("", "what", "what to do")
    make_console().print(table(f"Check of {config_file}", columns, rows, left=3))
    return all(finding.ok for finding in findings)


def _findings(config_file: str, overrides: list[str]) -> Iterator[Finding]:
    yield python()
    yield packages(needed_packages())
    machine = hardware.detect()
    yield devices(machine)
    try:
        config = load_run(config_file, overrides)
    except UserError as error:
        yield Finding(False, str(error), "correct it; checks of the configuration are left out")
        return
    yield Finding(True, f"configuration: {config_file}, every key known and of the right type")
    yield precision(config, machine)
    yield writable(Path(config.train.output_dir))
    try:
        task_of(config).refuse_untrainable(config)
        refuse_missing_compiler(config.train)
        yield from task_of(config).check_data(config)
        yield disk(config)
        yield from cover(config)
        yield from trial(config)
    except UserError as error:
        yield Finding(False, str(error), "fix this first; later checks that need it are left out")


def python() -> Finding:
    is_new = sys.version_info >= (3, 11)
    return Finding(is_new, f"Python {python_version()}", "" if is_new else "install 3.11 or later")


def packages(needed: Iterable[str]) -> Finding:
    """Compares the installed versions with those that are needed."""
    wrong, number = [], 0
    for requirement in map(Requirement, needed):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        number, expected, found = number + 1, requirement.specifier, "nothing"
        with suppress(metadata.PackageNotFoundError):
            found = metadata.version(requirement.name)
        if found == "nothing" or not expected.contains(found, prereleases=True):
            wrong.append(f"{requirement.name}: expected {expected}, found {found}")
    if wrong:
        return Finding(False, "; ".join(wrong), "run `make setup`, or pip install these versions")
    return Finding(True, f"packages: all {number} have the versions that are needed")


def needed_packages() -> list[str]:
    """Returns the pins of a checkout's requirements.txt, else those of the installed package."""
    pins = Path(__file__).parents[1] / "requirements.txt"
    if not pins.exists():
        return metadata.requires("sft") or []
    lines = (line.partition("#")[0].strip() for line in pins.read_text("utf-8").splitlines())
    return list(filter(None, lines))


def devices(machine: hardware.Hardware) -> Finding:
    gpus = ", ".join(hardware.describe_device(device) for device in machine.devices)
    ram = hardware.gib(machine.ram_available_bytes)
    return Finding(True, f"device: {gpus or f'CPU, {machine.cores} cores'}; {ram} of RAM available")


def precision(config: RunConfig, machine: hardware.Hardware) -> Finding:
    wanted, reason = resolve_precision(config.train)
    capable = all(d.bf16 for d in machine.devices) if machine.devices else machine.cpu_bf16
    what = f"precision: {wanted} ({reason}); bf16 {'in hardware' if capable else 'not in hardware'}"
    slow = (wanted == "bf16" and not capable) or (wanted == "fp16" and not machine.devices)
    remedy = f"set train.precision: fp32, which is faster than {wanted} here"
    return Finding(not slow, what, remedy if slow else "")


def writable(folder: Path) -> Finding:
    """Tries to create a file where the run folder will be."""
    try:
        refuse_if_unwritable(folder)
    except UserError as error:
        return Finding(False, str(error), "set train.output_dir")
    return Finding(True, f"write access: {folder}")


def disk(config: RunConfig) -> Finding:
    needed = plan.predict_disk(config, len(task_of(config).workload(config).lengths))
    try:
        refuse_if_full(needed, config.train)
    except UserError as error:
        return Finding(False, "disk", str(error))
    free = size(free_bytes(Path(config.train.output_dir)))
    return Finding(True, f"disk: {needed}; {free} free")


def cover(config: RunConfig) -> Iterator[Finding]:
    """Compares what will be trained, quantised and adapted with the configuration."""
    found = coverage.cover(config)
    if found is None:
        return
    kinds = ", ".join(
        f"{kind} {group.parameters['trained']:,}"
        for kind, group in found.groups.items()
        if group.parameters["trained"]
    )
    what = f"coverage: trained parameters that text reaches: {kinds or 'none'}"
    if found.missed:
        what += f"; {len(found.missed)} matrix products have no adapter, such as {found.missed[0]}"
    yield Finding(not found.contradictions, what, "; ".join(found.contradictions))


def trial(config: RunConfig) -> Iterator[Finding]:
    """Tries the model, the processes, a training step on few examples, a checkpoint and an answer.

    The step is the task's own; the checkpoint is saved, read back and removed.
    """
    refuse_if_unwritable(Path(config.train.output_dir))
    one_process = processes.drop_launch_requirements(config)
    accelerator = processes.start_processes(one_process.train)
    yield Finding(True, f"Accelerate: {processes.describe_world(accelerator)['devices']}")
    place = hardware.nearest_existing(Path(config.train.output_dir))
    with tempfile.TemporaryDirectory(prefix=".check_", dir=place) as folder:
        few = {
            "train.output_dir": folder,
            "train.global_batch": TRIAL_EXAMPLES,
            "train.max_steps": 2,
        }
        task, planned = _start(with_values(one_process, few), accelerator)
        share = f"{planned.num_trained:,} of {planned.num_parameters:,} parameters are trained"
        described = dict(task.describe(config))
        yield Finding(True, f"model: {described.get('model', config.task)}, {share}")
        if (shared_by := config.train.context_parallel) > 1:
            plan.refuse_sharing(config, task_of(config).workload(config), shared_by)
            group = SequenceGroup.of(accelerator, shared_by)
            group.follow(task.model)
            task.prove_sharing(group, planned.precision)
            what = f"{shared_by} processes that share a row compute what one would"
            yield Finding(True, f"train.context_parallel: {what}")
        trainer = engine.Engine(task, task.config.train, task.context)
        with compiled(trainer, required=True) as of_compiler:  # `auto` does not: two steps
            values = trainer.optimizer_step()
        if of_compiler:
            graphs, seconds = of_compiler["compiled_graphs"], of_compiler["compile_seconds"]
            yield Finding(True, f"compiler: {graphs} graphs in {seconds:.0f} s")
        yield Finding(
            True,
            f"one training step: {planned.global_batch} {planned.labels.examples}, "
            f"loss {values['train/loss']:.4f}, gradient norm {values['train/grad_norm']:.4f}",
        )
        if task.trial_saves:
            trainer.prove_saving()
            taken = size(folder_bytes(Path(folder)))
            yield Finding(True, f"checkpoint: saved, verified and read back, {taken}")
        yield from task.check_result(trainer, Path(folder))


def _start(config: RunConfig, accelerator: Accelerator) -> tuple[Task, plan.Plan]:
    """Returns the task of a trial, ready for its first step, and its plan."""
    kind = task_of(config)
    config = kind.trial_config(config)
    prepared = kind.trial_data(config)
    planned = plan.make_plan(config, kind.workload(config, prepared), hardware.detect(), 1)
    resolved = with_values(config, plan.resolved_values(planned))
    context = Context(accelerator)
    task = kind.build(resolved, prepared, planned.precision, planned.budget, context)
    task.check_model(planned.precision, config.train.layout)
    return task, planned
