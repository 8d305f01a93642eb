"""Keeps records on disk for later plans: results of traced steps, and the memory that runs took."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sft.runtime import plain
from sft.runtime.console import atomic_write

Phases = dict[str, dict[str, int]]  # phase -> use -> bytes at its peak
KEPT_TRACES = 200  # results in a folder
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
PACKAGE = Path(__file__).parent.parent
HISTORY = "memory.jsonl"  # in the folder that outlives a run: `TaskInfo.cache`
KEPT_RUNS = 50  # the last lines that count


@dataclass(frozen=True)
class Traced:
    """The memory of a traced step."""

    phases: Phases
    reserved_bytes: int
    method: str  # how they were found
    recomputed: float  # floating-point operations of the forward pass done again, as a share
    host_bytes: int  # of the host memory that holds offloaded activations
    copied_bytes: int  # of what is copied to the host, and back


def load_or_trace(
    folder: Path, inputs: tuple[object, ...], trace: Callable[[], Any], kind: Any = Traced
) -> Any:
    """Returns the result of `trace`; from `folder` if this code traced these inputs before.

    Traces again if a file is damaged. Keeps nothing if the folder above `folder` is missing or
    cannot be written.
    """
    name = hashlib.sha256(repr((code_sha256(PACKAGE), inputs)).encode()).hexdigest()[:24]
    file = folder / f"{name}.json"
    with suppress(OSError, ValueError):
        found = TypeAdapter(kind).validate_json(file.read_bytes())
        file.touch()
        return found
    result = trace()
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        with atomic_write(file) as out:
            json.dump(TypeAdapter(kind).dump_python(result, mode="json"), out)
        own = (each for each in folder.glob("*.json") if re.fullmatch("[0-9a-f]{24}", each.stem))
        files = sorted(own, key=lambda each: -each.stat().st_mtime)
        for old in files[KEPT_TRACES:]:
            old.unlink(missing_ok=True)
    return result


@cache
def code_sha256(package: Path) -> str:
    """Returns the digest of all modules of a package and of the versions of LIBRARIES."""
    digest = hashlib.sha256(repr([(name, version(name)) for name in LIBRARIES]).encode())
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0{file.read_text('utf-8')}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class PastRuns:
    """How far earlier runs on a device exceeded their predicted memory, as shares of it."""

    runs: int
    least: float
    most: float


def read_past_runs(folder: Path, device: str) -> PastRuns | None:
    """Returns the last KEPT_RUNS runs on the device; skips lines that cannot be read."""
    errors = []
    with suppress(OSError, ValueError):
        for line in plain.read_bytes(folder / HISTORY).decode("utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError, ZeroDivisionError):
                row = json.loads(line)
                error = float(row["measured_bytes"]) / float(row["predicted_bytes"]) - 1
                errors += [error] if row["device"] == device else []
    errors = errors[-KEPT_RUNS:]
    return PastRuns(len(errors), min(errors), max(errors)) if errors else None


def append_run(folder: Path, device: str, predicted: int, measured: int) -> None:
    """Adds a run to the history; does nothing if the folder cannot be written."""
    line = {"device": device, "predicted_bytes": predicted, "measured_bytes": measured}
    with suppress(OSError), plain.open_file(folder / HISTORY, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
