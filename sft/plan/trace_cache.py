"""Keeps results of traced steps on disk: a trace takes seconds, and most plans repeat one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter

from sft.runtime.console import atomic_write

Phases = dict[str, dict[str, int]]  # phase -> use -> bytes at its peak
Result = tuple[Phases, int, str]  # the phases, the reserved bytes, and how they were found
KEPT = 200  # results in a folder
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
PACKAGE = Path(__file__).parent.parent


def load_or_trace(folder: Path, inputs: tuple[object, ...], trace: Callable[[], Result]) -> Result:
    """Returns the result of `trace`; from `folder` if this code traced these inputs before.

    If a file is damaged, traces again and replaces it. Makes no folders above `folder`: if they are
    missing or cannot be written, nothing is kept.
    """
    name = hashlib.sha256(repr((code_sha256(PACKAGE), inputs)).encode()).hexdigest()[:24]
    file = folder / f"{name}.json"
    with suppress(OSError, ValueError):
        found = TypeAdapter(Result).validate_json(file.read_bytes())
        file.touch()
        return found
    result = trace()
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        with atomic_write(file) as out:
            json.dump(result, out)
        for old in sorted(folder.glob("*.json"), key=lambda each: -each.stat().st_mtime)[KEPT:]:
            old.unlink(missing_ok=True)
    return result


@cache
def code_sha256(package: Path) -> str:
    """Returns the digest of all modules of a package and of the versions of LIBRARIES."""
    digest = hashlib.sha256(repr([(name, version(name)) for name in LIBRARIES]).encode())
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0{file.read_text('utf-8')}\0".encode())
    return digest.hexdigest()
