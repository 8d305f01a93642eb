"""Finds and loads the tasks of `TASKS=`: lm-eval's own by name, others by the path of their YAML.

The code of a task runs: lm-eval's tasks have some, and a YAML file can name functions beside it
(`!function`). Code that comes with a data set does not run, and code that the model has written
only if `confirm_run_unsafe_code` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import simple_parse_args_string

from sft.config.benchmark import Benchmark
from sft.errors import DataError, UserError, redact, suggest
from sft.serve.benchmark.harness import read_gen_kwargs

REMEDY = 'TASKS="arc_easy my/task.yaml"; docs/BENCHMARK.md says how a task is written'


class Tasks(TaskManager):
    """lm-eval's manager, for the tasks that `given` names; `names` says what to load.

    `loaded` has the tasks by name, after `load`.
    """

    def __init__(self, given: str, settings: Benchmark) -> None:
        words = re.split(r"[,\s]+", given.strip(", \n\t"))
        if words == [""]:
            raise UserError(f"TASKS: required: {REMEDY}")
        local = {word: found for word in words if (found := _local(word)) is not None}
        folders = _folders(settings.include_path)
        folders += [found.folder for found in local.values() if found.groups]
        # The index of lm-eval's 14,000 tasks takes seconds, so it is read only if it is needed.
        needs_all = len(local) < len(words) or any(found.names_others for found in local.values())
        super().__init__(
            include_path=list(folders), include_defaults=needs_all, metadata=settings.metadata or {}
        )
        self.settings = settings
        names = [
            name
            for word in words
            for name in (local[word].names if word in local else self._matches(word))
        ]
        self.names = list(dict.fromkeys(names))
        self._loaded: Any = None

    def _matches(self, name: str) -> list[str]:
        if found := self.match_tasks([name]):
            return found
        beside = f"; for the folder give ./{name}" if Path(name).is_dir() else ""
        raise UserError(f"TASKS: no task {name!r}; {suggest(name, self.all_tasks)}{beside}")

    def load(self, task_list: Any) -> Any:
        """Loads the tasks with their data sets, once. Raises UserError for one that cannot run."""
        if self._loaded is None:
            with _explained(", ".join(task_list)):
                self._loaded = super().load(task_list)
            for name, task in self.loaded.items():
                _refuse(name, task, self.settings)
            if unknown := {*(self.settings.samples or {})} - {*self.loaded}:
                raise UserError(
                    f"benchmark.samples: {min(unknown)} is none of the tasks "
                    f"{', '.join(self.loaded)}"
                )
        return self._loaded

    @property
    def loaded(self) -> dict[str, Task]:
        return self._loaded["tasks"]

    @property
    def groups(self) -> dict[str, Any]:
        return self._loaded.get("groups") or {}


@dataclass(frozen=True)
class Local:
    """What a path in TASKS has: files of tasks that belong to none of its groups, and groups.

    lm-eval finds groups by name only, in `folder`. `names_others`: a group has tasks from
    elsewhere.
    """

    folder: Path
    tasks: list[Path]
    groups: list[str]
    names_others: bool

    @property
    def names(self) -> list[str]:
        return [*map(str, self.tasks), *self.groups]


def _local(word: str) -> Local | None:
    """Returns what is at a path to a task or to a folder of tasks; None for a name."""
    path = Path(word).expanduser()
    is_file = path.suffix in (".yaml", ".yml")
    if not is_file and "/" not in word and word not in (".", ".."):
        return None
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted(path.glob("*.yaml"))
    read = {file: own for file in files if (own := _read(file)).keys() & {"task", "group"}}
    if not read:
        kind = "a task's YAML file" if is_file else "a folder with YAML files of tasks"
        raise UserError(f"TASKS: {word}: expected {kind}, found none; {REMEDY}")
    groups = [own for own in read.values() if "group" in own]
    parts = [part for group in groups for part in _list(group.get("task"))]
    # A part is a name, or a mapping with a name and changes.
    named = {part.get("task") if isinstance(part, dict) else part for part in parts}
    beside = map(_read, folder.glob("*.yaml")) if groups else ()
    known = {own.get("group") or own.get("task") for own in beside}
    alone = [f for f, own in read.items() if "group" not in own and own["task"] not in named]
    return Local(folder, alone, [group["group"] for group in groups], not named <= known)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read(file: Path) -> dict[str, Any]:
    """Returns the keys of a file, without running what it names."""
    with _explained(str(file)):
        found = load_yaml(file, resolve_func=False)
    return found if isinstance(found, dict) else {}


def _folders(given: str | list[str] | None) -> list[Path]:
    folders = [Path(each) for each in ([given] if isinstance(given, str) else given or [])]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(f"benchmark.include_path: expected a folder, found none at {missing[0]}")
    return folders


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raises an error with a reason in one sentence for what a task or its data set lacks."""
    try:
        yield
    except UserError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"{what}: a data set is on the hub, and the hub cannot be reached: {_line(error)}; run "
            "it once where there is internet, or give a task with a local data set"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{what}: expected YAML: {_line(error)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        raise DataError(f"{what}: lm-eval cannot load it: {reason}") from error


def _line(error: BaseException) -> str:
    return redact(" ".join(str(error).split()))[:300]


def _refuse(name: str, task: Task, settings: Benchmark) -> None:
    """Raises UserError for a task that this model cannot be asked, or only with permission."""
    if getattr(task, "UNSAFE_CODE", False) and not settings.confirm_run_unsafe_code:
        raise UserError(
            f"{name}: this task runs code that the model has written, on this machine; to allow it "
            'give ARGS="benchmark.confirm_run_unsafe_code=true"'
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{name}: this task shows images or sounds; only text can be asked")
    if task.OUTPUT_TYPE == "generate_until":
        own = task.get_config("generation_kwargs") or {}
        try:
            read_gen_kwargs(own | (gen_kwargs_of(settings) or {}), 0)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def gen_kwargs_of(settings: Benchmark) -> dict[str, Any] | None:
    """Returns `benchmark.gen_kwargs` as a mapping, also if it was given as lm-eval's text."""
    given = settings.gen_kwargs
    return simple_parse_args_string(given) if isinstance(given, str) else given
