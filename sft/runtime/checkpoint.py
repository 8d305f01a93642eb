"""Writes checkpoints that are complete or do not exist: staged, checksummed, renamed, verified.

Every rank writes into a staging folder; the main process then writes MANIFEST.json (size and sha256
of every file) as the last file, syncs, and renames the folder to its final name. A folder whose
manifest does not verify is never loaded. Tensors are safetensors and the rest JSON: nothing is
unpickled.

Folders are written in `.sft` beside their final place, and moved there before they are removed. So
nothing outside of a folder `.sft` is ever removed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from sft.errors import CheckpointError
from sft.runtime import plain
from sft.runtime.console import size
from sft.runtime.hardware import PeakMemory
from sft.runtime.tensor_file import Entry, TensorFile, entry, sha256, sync, write_tensors

MANIFEST = "MANIFEST.json"
FORMAT = 1  # of a checkpoint; a version that reads it differently increases it
SCRATCH = ".sft"  # the name of a folder of which everything may be removed
REPLACED = ".replaced"  # ends the name of a folder in it that a newer one replaces
Write = Callable[[Path], Iterable[TensorFile] | None]
"""Writes into a folder, and returns the files of tensors that it has written."""


class Cost(NamedTuple):
    """What a save took."""

    seconds: float  # on the slowest rank
    peak_bytes: int  # host memory in addition, on the rank that took most
    ranks: int
    waited: float | None = None  # seconds in which training stood still; None: all

    def __str__(self) -> str:
        each = f"the slowest of {self.ranks} ranks " if self.ranks > 1 else ""
        waited = "" if self.waited is None else f", of which training waited {self.waited:.1f} s"
        took = f"{each}took {self.seconds:.1f} s{waited}"
        return f"{took}, at most {size(self.peak_bytes)} more memory"


def commit(
    final: Path,
    write: Write,
    accelerator: Accelerator,
    need_bytes: int = 0,
    lineage: dict[str, Any] | None = None,
) -> Cost:
    """Calls `write(staging)` on every rank, then makes the result appear at `final` at once.

    Raises CheckpointError on all ranks if any of them failed; earlier checkpoints stay untouched.
    `need_bytes` is the expected size; the message for a full disk names it. `lineage` is written
    into the manifest.
    """
    saving = Saving(final, write, accelerator, need_bytes, lineage)
    with saving.memory:
        saving.flush()
    return saving.complete()


class Saving:
    """A checkpoint that is being written. Only its beginning and `complete` are collective."""

    def __init__(
        self,
        final: Path,
        write: Write,
        accelerator: Accelerator,
        need_bytes: int = 0,
        lineage: dict[str, Any] | None = None,
    ):
        """Calls `write(staging)` on every rank. Raises CheckpointError as `commit` does."""
        self.final, self.lineage, self.need_bytes = final, lineage, need_bytes
        self.is_main, self.started = accelerator.is_main_process, time.perf_counter()
        self.staging = scratch_folder(final.parent) / final.name
        self.files: list[TensorFile] = []
        self.entries: dict[str, Entry] = {}
        self.error: str | None = "its files were not flushed"
        self.seconds = 0.0
        self.memory = PeakMemory()
        self._thread: threading.Thread | None = None
        with self.memory:
            self._refuse(gather_object([self.is_main and catch_error(make_staging, final)]))
            error = catch_error(lambda: self.files.extend(write(self.staging) or ()))
            self._refuse(gather_object([error]))
        self.claimed = set(gather_object([self._name(file.path) for file in self.files]))
        self._waited = time.perf_counter() - self.started

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.staging))

    def flush(self) -> None:
        """Completes and syncs the files of this rank; those of no rank are the main process's."""
        self.error = catch_error(self._flush)
        self.seconds = time.perf_counter() - self.started

    def flush_behind(self) -> None:
        """Flushes in a thread, while this rank goes on. `complete` waits for it."""
        self._thread = threading.Thread(target=self.flush, name="save", daemon=True)
        self._thread.start()

    @property
    def is_flushing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _flush(self) -> None:
        for file in self.files:
            self.entries[self._name(file.path)] = file.finish()
        for path in sorted(self.staging.rglob("*")) if self.is_main else ():
            if path.is_file() and self._name(path) not in self.claimed:
                sync(path)
                self.entries[self._name(path)] = entry(path)

    def complete(self) -> Cost:
        """Makes what all ranks have flushed appear at `final`; returns what it took.

        Raises CheckpointError as `commit` does.
        """
        started = time.perf_counter()
        if self._thread:
            self._thread.join()
        mine = self.error, self.entries, self.seconds, self.memory.most
        errors, entries, seconds, peaks = zip(*gather_object([mine]), strict=True)
        self._refuse(errors)
        found = {name: each for part in entries for name, each in part.items()}
        seal_all = (seal, self.staging, self.final, self.lineage, found)
        self._refuse(gather_object([self.is_main and catch_error(*seal_all)]))
        waited = self._waited + time.perf_counter() - started if self._thread else None
        return Cost(max(seconds), max(peaks), len(peaks), waited)

    def _refuse(self, errors: Iterable[str | bool | None]) -> None:
        """Removes what is staged and raises CheckpointError if any rank has an error."""
        if not (reason := next(filter(None, errors), None)):
            return
        remedies = [_remedy(str(reason), self.staging, self.need_bytes)] if self.is_main else []
        (remedy,) = gather_object(remedies)
        if self.is_main:
            clear_scratch(self.final.parent, self.staging.name)
        raise CheckpointError(
            f"cannot save {self.final}: {reason}{remedy}; earlier checkpoints are untouched"
        )


def scratch_folder(beside: Path) -> Path:
    """Returns the folder in which this program writes, and removes, what is in `beside`.

    Raises CheckpointError if a link is in its place: what it points to is not ours.
    """
    folder = beside / SCRATCH
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link; remove it")
    return folder


def make_staging(final: Path) -> Path:
    """Makes an empty folder to write what will be `final`; removes one that a kill left."""
    staging = scratch_folder(final.parent) / final.name
    clear_scratch(final.parent, staging.name)
    _with_parent(staging, staging.mkdir)
    return staging


def _with_parent(path: Path, action: Callable[[], object]) -> None:
    """Makes the folder of `path`, which another process may remove again, and does `action`."""
    for _ in range(100):
        # It may be gone before mkdir has seen that it is a folder, or before the action.
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            action()
            return
    action()


def clear_scratch(beside: Path, name: str | None = None) -> None:
    """Removes the folder of this name, or all, from the scratch folder; then that one if empty."""
    scratch = scratch_folder(beside)
    for leftover in [scratch / name] if name else scratch.glob("*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with suppress(OSError):
        scratch.rmdir()


def remove(folder: Path) -> None:
    """Removes a folder; a kill leaves no part of it in its place."""
    doomed = scratch_folder(folder.parent) / f"{folder.name}.removed"
    shutil.rmtree(doomed, ignore_errors=True)
    _with_parent(doomed, lambda: folder.rename(doomed))
    clear_scratch(folder.parent, doomed.name)


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


def seal(
    staging: Path,
    final: Path,
    lineage: dict[str, Any] | None = None,
    known: Mapping[str, Entry] | None = None,
) -> None:
    """Writes the manifest of `staging`, and renames the folder to `final`, replacing one there.

    A folder there that holds anything that its manifest does not name is kept under another name.
    `known`: the entries of files that are synced.
    """
    known = known or {}
    written = {path: str(path.relative_to(staging)) for path in sorted(staging.rglob("*"))}
    names = {name: path for path, name in written.items() if path.is_file()}
    if lost := known.keys() - names.keys():
        raise FileNotFoundError(f"{min(lost)} was written, but is not in {staging}")
    manifest = {name: known[name] if name in known else entry(names[name]) for name in names}
    (staging / MANIFEST).write_text(
        json.dumps({"format": FORMAT, **(lineage or {}), "files": manifest}, indent=1), "utf-8"
    )
    share_files(staging, staging / MANIFEST)
    for path in [*(path for path in written if written[path] not in known), staging / MANIFEST]:
        sync(path)
    sync(staging)
    old = staging.with_name(final.name + REPLACED)
    if final.exists() or final.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
        old = old if is_ours(final) else unused_name(final)
        final.rename(old)
    try:
        staging.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    sync(final.parent)
    clear_scratch(final.parent, final.name + REPLACED)


def add_file(folder: Path, name: str, text: str) -> None:
    """Adds a file to a sealed folder, which is valid before, meanwhile and after."""
    staging = make_staging(folder)
    try:
        manifest, path = read_manifest(folder), staging / name
        path.write_text(text, "utf-8")
        manifest["files"][name] = entry(path)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        for each in (path, staging / MANIFEST):
            sync(each)
            each.rename(folder / each.name)
        sync(folder)
    finally:
        clear_scratch(folder.parent, staging.name)


def share_files(folder: Path, like: Path) -> None:
    """Gives all files in a folder the mode of `like`, a file that follows the user's umask.

    safetensors makes its files private, so a colleague could read all of a model but its weights.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(like.stat().st_mode & 0o777)


def unused_name(path: Path) -> Path:
    """Returns the first of `<path>.1`, `<path>.2` ... that does not exist."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists() and not name.is_symlink())


def is_ours(folder: Path) -> bool:
    """Returns whether a folder has a manifest and no file that it does not name."""
    try:
        named = {MANIFEST, *read_manifest(folder)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return not folder.is_symlink() and all(
        not path.is_symlink() and str(path.relative_to(folder)) in named for path in found
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder. Raises OSError or ValueError."""
    found = plain.load_json(folder / MANIFEST)
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def manifest_sha256(folder: Path) -> str:
    """Returns the digest of the values in a manifest, and so of everything in the folder."""
    values = json.dumps(read_manifest(folder), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()


def tensors_sha256(folder: Path) -> str:
    """Returns a digest of the files of tensors that a manifest names: weights and optimizer.

    Files that name the attempt, such as trainer.json, do not enter it, so a repeated run has the
    same. Raises OSError or ValueError.
    """
    files = read_manifest(folder)["files"]
    named = {name: files[name]["sha256"] for name in files if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def fault(folder: Path, *, digests: bool = True) -> str | None:
    """Returns why the checkpoint in `folder` must not be loaded, or None.

    Without `digests` it compares sizes only.
    """
    try:
        manifest = read_manifest(folder)
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
    """The live tensors that have a value for each element, by the optimizer's key: this part."""
    whole: Tensors = field(default_factory=dict)
    """The live tensors of other shapes, by key. They belong to the parameter as a whole."""
    plain: dict[str, Any] = field(default_factory=dict)
    """Values for JSON by key: numbers of the parameter, such as its count of updates."""
    group: dict[str, Any] = field(default_factory=dict)
    """Values for JSON that the optimizer has changed in the group of the parameter."""


@dataclass(frozen=True)
class SavedState:
    """The optimizer's state of one parameter, as it was saved."""

    state: Tensors
    whole: Tensors
    plain: dict[str, Any] | None  # None: the checkpoint is older than these values
    group: dict[str, Any]


def save_optimizer(
    shards: Iterable[OptimizerShard], folder: Path, rank: int, world: int, behind: bool = False
) -> list[TensorFile]:
    """Writes this rank's part of the optimizer's state to a safetensors file, if it has any.

    Tensors are named `<key>:<parameter>`; the header says where each starts in the flat parameter
    (null: it is whole), and has the values that are no tensors. `behind`: see `TensorFile`.
    """
    tensors: dict[str, torch.Tensor] = {}
    starts: dict[str, int | None] = {}
    values: dict[str, list[dict[str, Any]]] = {}
    for shard in shards:
        values[shard.name] = [shard.plain, shard.group]
        for kind, start in ((shard.state, shard.start), (shard.whole, None)):
            for key, value in kind.items():
                tensors[f"{key}:{shard.name}"] = value
                starts[f"{key}:{shard.name}"] = start
    if not values:
        return []
    header = {"state": json.dumps({"starts": starts, "values": values})}
    name = f"optimizer-{rank + 1:05}-of-{world:05}.safetensors"
    return [write_tensors(folder / name, tensors, header, behind)]


class OptimizerState(ExitStack):
    """A context that reads, as one state, the files that `save_optimizer` wrote on all ranks."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        # {parameter: {key: [(where a slice starts, its file)]}}; None: the tensor is whole
        self.found: dict[str, dict[str, list[tuple[int | None, Any]]]] = {}
        self.values: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("optimizer-*.safetensors")):
            file = self.enter_context(open_tensors(path))
            header = file.metadata()
            if "state" in header:
                found = json.loads(header["state"])
            else:  # of an older run
                found = {"starts": json.loads(header["starts"]), "values": {}}
            for name, values in found["values"].items():
                self.found.setdefault(name, {})
                self.values.setdefault(name, values)
            for tensor, start in found["starts"].items():
                key, name = tensor.split(":", 1)
                self.found.setdefault(name, {}).setdefault(key, []).append((start, file))

    def read(self, name: str, start: int, number: int | None) -> SavedState:
        """Returns the state of a parameter: elements [start, start + number), flat.

        With `number` None it returns whole tensors, in the shape in which they were saved.
        """
        if name not in self.found:
            raise CheckpointError(f"{self.folder} has no optimizer state of {name}")
        state, whole = Tensors(), Tensors()
        for key, parts in self.found[name].items():
            if parts[0][0] is None:
                whole[key] = parts[0][1].get_tensor(f"{key}:{name}")
            else:
                state[key] = self._join(f"{key}:{name}", parts, start, number)
        numbers, group = self.values.get(name, (None, {}))
        return SavedState(state, whole, numbers, group)

    def _join(
        self, tensor: str, parts: list[tuple[Any, Any]], start: int, number: int | None
    ) -> torch.Tensor:
        if len(parts) == 1 and parts[0][0] == 0 and number is None:
            return parts[0][1].get_tensor(tensor)
        spans = [
            (first, first + math.prod(file.get_slice(tensor).get_shape()), file)
            for first, file in sorted(parts, key=lambda part: part[0])
        ]
        last_end = max(last for _, last, _ in spans)  # slices may be empty, at any place
        end = last_end if number is None else start + number
        found, at = [], start
        for first, last, file in spans:
            if first <= at < min(last, end):
                found.append(file.get_tensor(tensor).flatten()[at - first : end - first])
                at = min(last, end)
        if at < end:
            raise CheckpointError(f"{self.folder}: {tensor} lacks elements from {at} on")
        return torch.cat(found) if found else spans[0][2].get_slice(tensor)[:0].flatten()
