"""Writes checkpoints that are complete or do not exist: staged, checksummed, renamed, verified.

Every rank writes into a staging folder; the main process then writes MANIFEST.json (size and sha256
of every file) as the last file, syncs, and renames the folder to its final name. A folder whose
manifest does not verify is never loaded. Tensors are safetensors and the rest JSON: nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sft.errors import CheckpointError
from sft.runtime.console import size

MANIFEST = "MANIFEST.json"
FORMAT = 1  # of a checkpoint; a version that reads it differently increases it
STAGING = ".staging"
NAME = re.compile(r"checkpoint_step_(\d+)")


def commit(
    final: Path, write: Callable[[Path], None], accelerator: Accelerator, need_bytes: int = 0
) -> None:
    """Calls `write(staging)` on every rank, then makes the result appear at `final` at once.

    Raises CheckpointError on all ranks if any of them failed; earlier checkpoints stay untouched.
    `need_bytes` is the expected size; the message for a full disk names it.
    """
    staging = final.with_name(final.name + STAGING)
    main = accelerator.is_main_process
    errors = gather_object([catch_error(_recreate, staging) if main else None])
    if not any(errors):
        errors = gather_object([catch_error(write, staging)])
    if not any(errors):
        errors = gather_object([catch_error(seal, staging, final) if main else None])
    if any(errors):
        reason = next(error for error in errors if error)
        (remedy,) = gather_object([_remedy(reason, staging, need_bytes)] if main else [])
        if main:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"cannot save {final}: {reason}{remedy}; earlier checkpoints are untouched"
        )


# What to do about a system error, by its text: libraries pass on the text, but no error number.
REMEDIES = {
    "File too large": "the limit on the size of a file is lower (`ulimit -f`)",
    "Read-only file system": "the file system must be writable",
    "Permission denied": "the folder must be writable",
    "Operation not permitted": "the folder must be writable",
}


def _remedy(reason: str, staging: Path, need_bytes: int) -> str:
    """Returns what to change, or how much space is missing, in parentheses; '' if it is unknown."""
    for text, remedy in REMEDIES.items():
        if text in reason:
            return f" ({remedy})"
    try:
        written = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        have = shutil.disk_usage(staging.parent).free + written
    except OSError:
        return ""
    is_full = any(text in reason for text in ("No space left", "quota"))
    if need_bytes > have:
        return f" (need {size(need_bytes)}, have {size(have)})"
    return f" (need more than {size(written)}, have {size(have)})" if is_full else ""


def catch_error(action: Callable[..., object], *arguments: Any) -> str | None:
    """Runs `action`; returns the error it failed with as text, or None."""
    try:
        action(*arguments)
    except Exception as error:  # noqa: BLE001  # the other ranks must learn of any error
        return f"{type(error).__name__}: {error}"
    return None


def _recreate(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def seal(staging: Path, final: Path) -> None:
    """Writes the manifest of `staging`, and renames the folder to `final`, replacing one there."""
    written = sorted(staging.rglob("*"))
    files = [path for path in written if path.is_file()]
    manifest = {
        str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }
    (staging / MANIFEST).write_text(
        json.dumps({"format": FORMAT, "files": manifest}, indent=1), "utf-8"
    )
    for path in [*written, staging / MANIFEST, staging]:
        _sync(path)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        staging.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(folder: Path, *, digests: bool = True) -> str | None:
    """Returns why the checkpoint in `folder` must not be loaded, or None.

    Without `digests` it compares sizes only.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} is of format {manifest['format']}, this version reads {FORMAT}"
        if not files:
            return f"{MANIFEST} names no file"
        for name, expected in files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{MANIFEST} names {name}, which is outside the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
            if digests and sha256(path) != expected["sha256"]:
                return f"{name} is damaged: its sha256 is not the one in {MANIFEST}"
        tensors = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
        if added := tensors - files.keys():
            return f"{min(added)} is not in {MANIFEST}"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def newest_first(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, newest first, whether valid or not."""
    folders = [path for path in run.glob("checkpoint_step_*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.rsplit("_", 1)[1])


def find(run: Path, wanted: str, warn: Callable[[str], None]) -> Path | None:
    """Returns the checkpoint to resume from: `wanted`, or the newest valid one if that is `auto`.

    Returns None only if `auto` finds no checkpoint at all. Raises CheckpointError if there are some
    and none is valid, so that training never restarts from zero silently.
    """
    candidates = [Path(wanted)]
    if wanted == "auto":
        candidates = newest_first(run)
        if all(fault(folder, digests=False) for folder in candidates):
            candidates = [*_restore_replaced(run), *candidates]
    rejected = []
    for folder in candidates:
        reason = fault(folder)
        if reason is None:
            return folder
        rejected.append(f"{folder}: {reason}")
        warn(f"checkpoint rejected: {rejected[-1]}")
    if not rejected:
        return None
    raise CheckpointError(
        "no valid checkpoint to resume from:\n  "
        + "\n  ".join(rejected)
        + "\nGive train.resume_from_checkpoint=<a good folder>, or remove these to start anew."
    )


def _restore_replaced(run: Path) -> list[Path]:
    """Restores valid checkpoints that a killed run was replacing. Returns them newest first."""
    result = []
    for old in run.glob("checkpoint_step_*.old"):
        folder = old.with_suffix("")
        if NAME.fullmatch(folder.name) and not folder.exists() and fault(old) is None:
            result.append(old.rename(folder))
    return sorted(result, key=_step_of, reverse=True)


def prune(run: Path, keep: int, spared: Sequence[str] = (), step: int | None = None) -> None:
    """Removes checkpoints older than the newest `keep` valid ones, and what killed saves left.

    The names in `spared` stay. Checkpoints newer than the run's own `step` belong to another run:
    they are not counted and not removed.
    """
    for leftover in [*run.glob("checkpoint_step_*.old"), *run.glob(f"checkpoint_step_*{STAGING}")]:
        shutil.rmtree(leftover, ignore_errors=True)
    num_valid = 0
    for folder in newest_first(run):
        if step is not None and _step_of(folder) > step:
            continue
        if num_valid < keep:
            num_valid += fault(folder, digests=False) is None
            continue
        if folder.name in spared:
            continue
        doomed = folder.with_name(folder.name + ".old")
        folder.rename(doomed)  # a half removed folder must not look like a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)


def tensor_fault(path: Path) -> str | None:
    """Returns why a file is not a valid safetensors file, or None. It reads only the header."""
    try:
        with safe_open(path, "pt"):  # it checks the length of the header
            pass
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        json.loads(header, object_pairs_hook=_refuse_repeated)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        return f"it is no valid safetensors file ({error})"
    return None


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)


def open_tensors(path: Path) -> safe_open:
    """Opens a safetensors file. Raises CheckpointError if it is not valid."""
    if reason := tensor_fault(path):
        raise CheckpointError(f"{path} cannot be loaded: {reason}")
    return safe_open(path, "pt")


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OptimizerShard:
    """This rank's part of the optimizer's state of one parameter."""

    name: str
    """The name of the parameter."""
    start: int
    """The first element of the flat parameter that the part covers."""
    state: Tensors
    """The live tensor for each key of the optimizer, flat if it is a slice."""


def save_optimizer(shards: Iterable[OptimizerShard], folder: Path, rank: int, world: int) -> None:
    """Writes this rank's part of the optimizer's state to a safetensors file, if it has any.

    Tensors are named `<key>:<parameter>`; the header says where each starts in the flat parameter.
    """
    tensors: dict[str, torch.Tensor] = {}
    starts: dict[str, int] = {}
    for shard in shards:
        for key, value in shard.state.items():
            tensors[f"{key}:{shard.name}"] = value.detach().cpu().contiguous().clone()
            starts[f"{key}:{shard.name}"] = shard.start
    if tensors:
        name = f"optimizer-{rank + 1:05}-of-{world:05}.safetensors"
        save_file(tensors, folder / name, metadata={"starts": json.dumps(starts)})


class OptimizerState(ExitStack):
    """A context that reads, as one state, the files that `save_optimizer` wrote on all ranks."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        # {parameter: {key: [(where a slice starts, its file)]}}
        self.found: dict[str, dict[str, list[tuple[int, Any]]]] = {}
        for path in sorted(folder.glob("optimizer-*.safetensors")):
            file = self.enter_context(open_tensors(path))
            for tensor, start in json.loads(file.metadata()["starts"]).items():
                key, name = tensor.split(":", 1)
                self.found.setdefault(name, {}).setdefault(key, []).append((start, file))

    def read(self, name: str, start: int, number: int | None) -> dict[str, torch.Tensor]:
        """Returns the state of a parameter by key: elements [start, start + number), flat.

        With `number` None it returns whole tensors, in the shape in which they were saved.
        """
        if name not in self.found:
            raise CheckpointError(f"{self.folder} has no optimizer state of {name}")
        return {
            key: self._join(f"{key}:{name}", parts, start, number)
            for key, parts in self.found[name].items()
        }

    def _join(
        self, tensor: str, parts: list[tuple[int, Any]], start: int, number: int | None
    ) -> torch.Tensor:
        if len(parts) == 1 and parts[0][0] == 0 and number is None:
            return parts[0][1].get_tensor(tensor)
        spans = [
            (first, first + math.prod(file.get_slice(tensor).get_shape()), file)
            for first, file in sorted(parts, key=lambda part: part[0])
        ]
        end = spans[-1][1] if number is None else start + number
        found, at = [], start
        for first, last, file in spans:
            if first <= at < min(last, end):
                found.append(file.get_tensor(tensor).flatten()[at - first : end - first])
                at = min(last, end)
        if at < end:
            raise CheckpointError(f"{self.folder}: {tensor} lacks elements from {at} on")
        return torch.cat(found)
