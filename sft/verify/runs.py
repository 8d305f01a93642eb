"""Makes a configuration small, and trains whole runs of it in fresh processes."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.config.load import dump_config, with_values
from sft.config.schema import EarlyStopping, RunConfig
from sft.data import batches
from sft.errors import ConfigError, VerificationError
from sft.models import attention
from sft.runtime import children, hardware
from sft.runtime.console import Advance
from sft.runtime.plain import read_json
from sft.runtime.world import PLAIN
from sft.tasks.registry import task_of
from sft.train.parallel.trial import is_smooth

TRAIN = ["-m", "sft", "train"]
PATIENCE = 900  # seconds for one run
ROUGH = ", which makes differences of rounding larger, so that faults would hide among them"


@dataclass(frozen=True)
class SmallConfig:
    """A configuration that trains in seconds and writes into `folder` only."""

    config: RunConfig
    folder: Path
    lengths: list[int]  # tokens of the examples, longest first
    changes: list[tuple[str, str]]  # (name, difference) from the user's configuration

    @property
    def steps_per_epoch(self) -> int:
        return batches.steps_per_epoch(len(self.lengths), self.config.train.global_batch)

    @property
    def whole_batch_tokens(self) -> int:
        """Returns a token budget that holds any global batch in one micro-batch."""
        return self.lengths[0] * self.config.train.global_batch

    @property
    def quarter_batch_tokens(self) -> int:
        """Returns a token budget under which two processes have several micro-batches each."""
        return max(self.lengths[0], sum(self.lengths[: self.config.train.global_batch]) // 4)


def make_small(config: RunConfig, folder: Path, *, exact: bool = False) -> SmallConfig:
    """Returns `config` with a small model of random weights and few examples.

    An epoch has at least three steps; three steps of the next epoch follow. `exact`: without
    dropout, in fp32, and with AdamW in place of an optimizer that makes differences of rounding
    larger, so that runs with different cuts can be compared.
    """
    if not hardware.detect().devices:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it guesses
    task = task_of(config)
    shrunk = task.shrink(config, folder, exact)
    changes = [*shrunk.changes]
    values: dict[str, Any] = {
        "train.output_dir": str(folder / "run"),
        "train.micro_batch": "auto",
        "train.gradient_accumulation_steps": "auto",
        "train.eval_steps": 2,
        "train.save_steps": 1,
        "train.resume_from_checkpoint": None,
        "train.tensorboard": False,
        "train.early_stopping": EarlyStopping().model_dump(),
        "train.trackers": [],
        **shrunk.values,
    }
    if exact:
        wanted = {"train.precision": "fp32", **shrunk.exact}
        if not is_smooth(config.train) or "train.adam_epsilon" in wanted:
            wanted |= {"train.optimizer": "adamw", "train.optimizer_args": None}
        changes += _list_changes(config, wanted)
        values |= wanted
    config, batch = with_values(config, values), shrunk.batch
    lengths = sorted(task.workload(config).lengths, reverse=True)
    while batch > 1 and batches.steps_per_epoch(len(lengths), batch) < 3:
        batch -= 1
    per_epoch = batches.steps_per_epoch(len(lengths), batch)
    if per_epoch < 3:
        raise VerificationError(
            "expected at least 3 usable training rows, to interrupt an epoch in its middle and at "
            f"its end; found {len(lengths)} among {shrunk.chosen_from}"
        )
    steps = per_epoch + 3
    number = f"{len(lengths)} {task.info(config).labels.examples} to train on"
    changes.append(("data", f"{number}, {batch} a step, {per_epoch} an epoch"))
    changes.append(("steps", f"{steps}, each of them saved, every second evaluated"))
    config = with_values(config, {"train.global_batch": batch, "train.max_steps": steps})
    small = SmallConfig(config, folder, lengths, changes)
    return replace(
        small, config=with_values(config, {"train.max_tokens": small.quarter_batch_tokens})
    )


def _list_changes(config: RunConfig, wanted: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the values that differ from the configured ones, as people read them."""
    given = config.model_dump()
    given["train"]["precision"], _ = hardware.resolve_precision(config.train)
    for key, value in wanted.items():
        section, name = key.split(".")
        why = ROUGH if key == "train.optimizer" and not is_smooth(config.train) else ""
        if (before := given[section][name]) != value:
            yield key, f"{value} instead of {before}{why}"
    if task_of(config).info(config).attention == attention.NAME:
        yield "packed rows", f"SDPA with a mask: {attention.NAME} has no kernel in fp32"


# -- runs in fresh processes

# (processes, run folder, arguments of Python that start the program) -> the program's output
Launch = Callable[[int, Path, list[str]], str]


def run_fresh(
    world: int,
    folder: Path,
    program: list[str],
    seconds: float | None = PATIENCE,
    threads: int | None = None,
) -> str:
    """Runs a program in `world` fresh processes; returns their output when all have ended.

    `seconds`: None waits for ever. `threads` of each process on a CPU: by default
    OMP_NUM_THREADS, or 1.
    """
    launcher = ["-m", "sft.runtime.launcher", str(folder)] if world > 1 else []
    environment = {
        "OMP_NUM_THREADS": "1",  # runs share the cores, and the model is small
        **os.environ,
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        "NUM_PROCESSES": str(world),
        "NUM_MACHINES": "1",
        "ACCELERATE_CONFIG": str(PLAIN),
    }
    return children.run_captured([sys.executable, *launcher, *program], seconds, environment)


@dataclass(frozen=True)
class Run:
    """A run folder, and how the run ended: `state` as in status.json."""

    folder: Path
    state: str
    reason: str

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"


@dataclass(frozen=True)
class Trials:
    """Trains a small configuration, each time in another folder."""

    small: SmallConfig
    launch: Launch = run_fresh
    advance: Advance = lambda *_: None  # called after every run

    def run(self, name: str, world: int, *overrides: str, kill: str | None = None) -> Run:
        """Trains with `world` processes, and kills them at the point `kill` of `die_at`."""
        folder, file = (self.small.folder / f"{name}{suffix}" for suffix in ("", ".yaml"))
        values: dict[str, Any] = {"train.output_dir": str(folder), "train.num_processes": world}
        if world % self.small.config.train.context_parallel:  # so many cannot share rows
            values["train.context_parallel"] = 1
        file.write_text(dump_config(with_values(self.small.config, values)), "utf-8")
        program = ["-m", "sft.verify.runs", kill, "train"] if kill else TRAIN
        printed = self.launch(world, folder, [*program, "--config", str(file), *overrides])
        file.with_suffix(".log").write_text(printed, "utf-8")
        self.advance(1, name.replace("_", " "))
        return read_outcome(folder, printed)


def read_outcome(folder: Path, printed: str) -> Run:
    """Returns how a run ended, by its status and output: exit codes of launchers differ."""
    status = read_json(folder / "status.json")
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    reason = status.get("reason") or (errors or lines[-1:] or ["it printed nothing"])[0]
    refused = errors and status.get("exit_code", ConfigError.exit_code) == ConfigError.exit_code
    return Run(folder, "refused" if refused else status.get("state", "failed"), reason)


def die_at(point: str) -> None:
    """Makes this run kill itself, its launcher and all ranks by SIGKILL when it saves a step.

    `saving:3`: when all files of step 3 are written, before the commit; `saved:3`: after it.
    """
    when, step = point.split(":")
    committed, dying = list[str](), list[bool]()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if dying:
            return
        if event == "os.rename" and Path(arguments[1]).name == f"checkpoint_step_{step}":
            committed.append(os.fspath(arguments[1]))  # as soon as this hook returns
            dying.extend([True] * (when == "saving"))
        elif committed:
            dying.extend([True] * os.path.isdir(committed[0]))
        if dying:
            has_launcher = int(os.environ.get("WORLD_SIZE", "1")) > 1
            children.kill_tree(os.getppid() if has_launcher else os.getpid())

    sys.addaudithook(watch)


if __name__ == "__main__":  # `sft train`, killed at the point in the first argument
    die_at(sys.argv.pop(1))
    runpy.run_module("sft", run_name="__main__")
