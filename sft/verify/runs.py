"""Trains whole runs in fresh processes, and reads the results from their folders."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.config.load import dump_config, with_values
from sft.errors import ConfigError
from sft.runtime import children
from sft.runtime.console import Advance
from sft.runtime.world import PLAIN
from sft.verify.small import Small

TRAIN = ["-m", "sft", "train"]
PATIENCE = 900  # seconds for one run

# (processes, run folder, program: a script or `-m` and a module, with arguments) -> its output
Launch = Callable[[int, Path, list[str]], str]


def run_fresh(world: int, folder: Path, program: list[str]) -> str:
    """Runs a program in `world` fresh processes, and returns their output when all have ended."""
    launcher = ["-m", "sft.runtime.launcher", str(folder)] if world > 1 else []
    environment = {
        "OMP_NUM_THREADS": "1",  # runs share the cores, and the model is small
        **os.environ,
        "NUM_PROCESSES": str(world),
        "NUM_MACHINES": "1",
        "ACCELERATE_CONFIG": str(PLAIN),
    }
    return children.run_captured([sys.executable, *launcher, *program], PATIENCE, environment)


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
    """Runs of a small configuration, each in its own folder."""

    small: Small
    launch: Launch = run_fresh
    advance: Advance = lambda *_: None  # called after every run

    def run(self, name: str, world: int, *overrides: str, kill: str | None = None) -> Run:
        """Trains with `world` processes; kills them at the point `kill` (`die_at`), if given."""
        folder, file = (self.small.folder / f"{name}{suffix}" for suffix in ("", ".yaml"))
        values = {"train.output_dir": str(folder), "train.num_processes": world}
        file.write_text(dump_config(with_values(self.small.config, values)), "utf-8")
        program = ["-m", "sft.verify.runs", kill, "train"] if kill else TRAIN
        printed = self.launch(world, folder, [*program, "--config", str(file), *overrides])
        file.with_suffix(".log").write_text(printed, "utf-8")
        self.advance(1, name.replace("_", " "))
        return read_outcome(folder, printed)


def read_outcome(folder: Path, printed: str) -> Run:
    """Returns how a run ended, from its status and output, since launchers' exit codes differ."""
    try:
        status = json.loads((folder / "status.json").read_text("utf-8"))
    except (OSError, ValueError):
        status = {}
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    reason = status.get("reason") or (errors or lines[-1:] or ["it printed nothing"])[0]
    refused = errors and status.get("exit_code", ConfigError.exit_code) == ConfigError.exit_code
    return Run(folder, "refused" if refused else status.get("state", "failed"), reason)


def die_at(point: str) -> None:
    """Kills this run, its launcher and all ranks, by SIGKILL while a step is saved.

    `saving:3`: when everything of step 3 is written but not committed; `saved:3`: after the commit.
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
