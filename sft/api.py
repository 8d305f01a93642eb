"""The Python API: `sft.train`, `sft.plan` and `sft.evaluate` (docs/API.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from sft import cli
from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.errors import ConfigError
from sft.plan import gpus
from sft.runtime import hardware
from sft.tasks.registry import load_run, task_of

Overrides = Mapping[str, Any] | Sequence[str]
Result = TypeVar("Result")


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder (docs/RUNS.md), held-out metrics, and the trained model."""

    folder: Path
    metrics: dict[str, float]
    final_checkpoint: Path


def train(config: str | Path | RunConfig | None, overrides: Overrides = ()) -> RunResult:
    """Trains as `sft train` does, in this process or as one rank of a launcher; collective.

    `config` is a file, a configuration that was loaded, or None. `overrides` are words of the
    command line or a mapping: `{"train.epochs": 2}`. Raises UserError for what a user can fix.
    """
    loaded = configuration(config, overrides)
    cli.prepare_libraries()
    from sft import run
    from sft.verify import share

    metrics = _call(lambda: run.train(share.with_share(loaded)))
    folder = Path(loaded.train.output_dir)
    return RunResult(folder, metrics, folder / "final_checkpoint")


def evaluate(
    run: str | Path,
    overrides: Overrides = (),
    name: str = "evaluate",
    engine: Literal["own", "vllm", "auto"] = "own",
    vllm_args: str = "",
) -> dict[str, float]:
    """Measures a finished run as `sft evaluate` does, and returns its metrics; collective."""
    cli.prepare_libraries()
    from sft.run import evaluate_run

    return _call(lambda: evaluate_run(Path(run), name, _words(overrides), engine, vllm_args))


def plan(
    config: str | Path | RunConfig | None,
    overrides: Overrides = (),
    gpu: str | None = None,
    gib: float | None = None,
) -> dict[str, Any]:
    """Returns the numbers that `sft plan` writes, for this machine or for `gpu`."""
    loaded = configuration(config, overrides)
    cli.prepare_libraries()
    from sft.plan import advice, report
    from sft.plan.plan import make_plan

    machine, world_size = planned_machine(loaded, gpu, gib)
    workload = task_of(loaded).workload(loaded)
    made = make_plan(loaded, workload, machine, world_size)
    return report.plan_values(made, advice.advise(loaded, workload, machine, made))


def planned_machine(
    config: RunConfig, gpu: str | None, gib: float | None
) -> tuple[hardware.Hardware, int]:
    """Returns the machine to plan for and how many processes it runs."""
    machine = hardware.detect()
    if gpu is None and gib is None:
        return machine, config.train.num_processes or max(1, len(machine.devices))
    try:
        devices = gpus.named_gpus(gpu or "GPU", gib)
    except ValueError as error:
        raise ConfigError(f"GPU: {error}") from None
    return replace(machine, devices=devices, is_here=False), len(devices)


def configuration(config: str | Path | RunConfig | None, overrides: Overrides) -> RunConfig:
    """Returns the configuration of a file, or a loaded one, with overrides."""
    if not isinstance(config, RunConfig):
        return load_run(config, _words(overrides))
    if not overrides:
        return config
    if not isinstance(overrides, Mapping):
        raise ConfigError("overrides: expected a mapping, since the configuration is loaded")
    return with_values(config, dict(overrides))


def _words(overrides: Overrides) -> list[str]:
    """Returns overrides as words of the command line."""
    if isinstance(overrides, Mapping):
        return [f"--{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return list(overrides)


def _call(function: Callable[[], Result]) -> Result:
    """Returns the result of a function; if it ends the process after a bug, raises the bug."""
    try:
        return function()
    except SystemExit as ended:
        raise ended.__context__ or ended from None
