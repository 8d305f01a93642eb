"""The list of tasks: where the schema and the class of each are. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from sft.config.load import load_any
from sft.config.schema import Config, RunConfig
from sft.errors import require_extra

if TYPE_CHECKING:
    from sft.tasks.base import Task
    from sft.tasks.sft.task import FineTune

TASKS = {  # name -> (schema of its configuration, class)
    "sft": ("sft.config.schema:Config", "sft.tasks.sft.task:FineTune"),
    "crowd": ("sft.config.schema:Config", "sft.tasks.crowd.task:CrowdTune"),
    "distill": ("sft.tasks.distill.config:DistillConfig", "sft.tasks.distill.task:Distillation"),
}

EXTRAS = {  # task -> packages of the extra in pyproject.toml that has the task's name
    "distill": ("gymnasium", "stable_baselines3", "matplotlib"),
}

# The verbs of single tasks, for `sft.commands`: help, function, configuration, preset arguments.
VERBS: dict[str, tuple[Any, ...]] = {
    "train-crowd": (
        "Train K agents on one frozen base (default: configs/crowd_nano.yaml)",
        "train.train_distributed",
        "configs/crowd_nano.yaml",
        ("--if-asked",),
    ),
    "collect-darkroom": (
        "Record what PPO does while it learns each goal of the Darkroom; continues where it was "
        "stopped",
        "sft.tasks.distill.collect.main",
        "configs/ad_darkroom.yaml",
    ),
    "train-darkroom": (
        "Distil an algorithm: collect, train, try the unseen goals (docs/research/DISTILL.md)",
        "train.train",
        "configs/ad_darkroom.yaml",
    ),
}


def load_run(file: str | Path | None, overrides: list[str] | None = None) -> Any:
    """Reads a configuration of any task. Raises ConfigError with every problem found."""
    return load_any(file, overrides, schemas())


def schemas() -> dict[str, type[RunConfig]]:
    """Returns the schema for each value that the key `task` may have."""
    found = (_load(schema) for schema, _ in TASKS.values())
    return {schema.task: schema for schema in found}


@overload
def task_of(config: Config) -> type[FineTune]: ...
@overload
def task_of(config: RunConfig) -> type[Task]: ...
def task_of(config: RunConfig) -> type[Task]:
    """Returns the class of the task of `config`. Raises UserError if its packages are missing."""
    require_extra(config.kind, f"task: {config.kind}", EXTRAS.get(config.kind, ()))
    return _load(TASKS[config.kind][1])


def fine_tuning_tasks() -> Iterator[type[FineTune]]:
    """Yields the classes of tasks that fine-tune a language model."""
    for schema, task in TASKS.values():
        if _load(schema) is Config:
            yield _load(task)


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
