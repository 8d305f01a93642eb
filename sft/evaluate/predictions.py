"""Keeps finished examples in one JSONL file, from any number of processes, through any kill.

Every process appends whole lines under a lock and syncs them. A line has the `index` of its example
and a `key`, a digest of all that the answer depends on. A resumed run asks the model again only
for examples that have no line, or one with another key. At the end one process rewrites the lines
in the order of the examples. Memory holds each example's key and the place of its line.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sft.errors import UserError, redact_environment
from sft.runtime import plain
from sft.runtime.console import atomic_write

Record = dict[str, Any]
LINE = np.dtype([("index", np.int64), ("key", np.uint64), ("begin", np.int64)])


def key_of(*parts: Any) -> str:
    """Returns a digest of these values: 16 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _gather(values: list[Any]) -> list[Any]:
    """Returns the values of all processes, in their order."""
    from accelerate.utils import gather_object  # `compare`, which has no processes, needs no torch

    return gather_object(values)


def to_line(record: Record) -> str:
    """Returns the line of a record in a file, without secrets."""
    return redact_environment(json.dumps(record, ensure_ascii=False)) + "\n"


class Predictions:
    """The file at `path`. Callers announce all examples in their order, by `expect`."""

    def __init__(self, path: Path):
        self.path, self._expected = path, array("Q")  # keys
        with self._report_os_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._read()
        self._index, self._keys = np.array(lines["index"]), np.array(lines["key"])

    @property
    def num_expected(self) -> int:
        return len(self._expected)

    @contextmanager
    def _report_os_errors(self) -> Iterator[None]:
        """Raises UserError in place of an OSError of the body."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.path}: {reason}; make room, or give another file") from None

    def _read(self) -> np.ndarray:
        """Returns the newest line of each example, sorted by index: an array of LINE."""
        lines = np.fromiter(self._lines(), LINE)[::-1]
        return lines[np.unique(lines["index"], return_index=True)[1]]

    def _lines(self) -> Iterator[tuple[int, int, int]]:
        """Yields the fields of LINE for all lines of the file, in their order."""
        if not self.path.exists():
            return
        offset = 0
        with plain.open_file(self.path, "rb", follow=True) as file:
            for number, line in enumerate(file, 1):
                if record := _parse(line):
                    yield record["index"], int(record["key"], 16), offset
                elif not _is_torn(line):
                    raise _not_a_record(self.path, number, line)
                offset += len(line)

    def expect(self, key: str) -> bool:
        """Announces the next example; returns whether its record is missing."""
        index, number = len(self._expected), int(key, 16)
        self._expected.append(number)
        at = np.searchsorted(self._index, index)
        return bool(at == len(self._index) or self._index[at] != index or self._keys[at] != number)

    def append(self, records: list[Record]) -> None:
        """Writes lines; once it returns, no kill loses them."""
        data = "".join(map(to_line, records)).encode("utf-8", "backslashreplace")
        with self._report_os_errors(), plain.open_to_append(self.path) as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                data = b"\n" + data  # a kill has cut off the line before
            if file.write(data) != len(data):
                os.ftruncate(file.fileno(), end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Rewrites the file: the expected examples, in their order. One process calls it."""
        with self._report_os_errors():
            self.path.touch()  # without examples there is no file yet
            lines, expected = self._read(), np.array(self._expected, np.uint64)
            lines = lines[lines["index"] < len(expected)]
            is_there = np.zeros(len(expected), bool)
            is_there[lines["index"]] = lines["key"] == expected[lines["index"]]
            if len(missing := np.flatnonzero(~is_there)):
                raise UserError(
                    f"{self.path}: {len(missing):,} of {len(expected):,} examples are missing, the "
                    f"first is number {missing[0] + 1}: all processes must write to one file "
                    "system; run again"
                )
            path = self.path.resolve()  # a link is kept; its file is replaced
            with path.open("rb") as old, atomic_write(path, sync=True) as new:
                for begin in lines["begin"]:
                    old.seek(begin)
                    line = old.readline().decode("utf-8", "surrogatepass")
                    new.write(line.rstrip("\n") + "\n")  # the last line may lack its end


class ScoredPredictions(Predictions):
    """Predictions that are needed for their scores: what cannot be written stays in memory.

    Making one is collective. `reason` is None until something cannot be written on this rank.
    """

    def __init__(self, path: Path):
        self.reason: str | None = None
        self._unwritten: list[Record] = []
        with self._keep_reason():
            super().__init__(path)
        if any(_gather([self.reason])):  # then no rank uses what the file has
            self._index, self._keys = np.zeros(0, np.int64), np.zeros(0, np.uint64)
            self.reason = self.reason or f"{path}: another process cannot use it"

    @contextmanager
    def _keep_reason(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.reason = self.reason or str(error)

    def append(self, records: list[Record]) -> None:
        if self.reason is None:
            with self._keep_reason():
                super().append(records)
                return
        self._unwritten += records

    def finish(self) -> None:
        if self.reason is None:
            with self._keep_reason():
                super().finish()

    def collect(self) -> tuple[list[Record] | None, str | None]:
        """Returns all records in order if the file has not all of them, and why. Collective."""
        reason = next(filter(None, _gather([self.reason])), None)
        if reason is None:
            return None, None
        found = {record["index"]: record for record in _gather(self._unwritten)}
        if missing := set(range(self.num_expected)) - found.keys():
            with self.path.open("rb") as file:
                for index, key, begin in self._read():
                    if index in missing and key == self._expected[index]:
                        file.seek(begin)
                        found[index] = json.loads(file.readline())
        return [found[index] for index in sorted(found)], reason


class MemoryPredictions:
    """Records in memory, with the methods of `Predictions`, for callers that want no file."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.num_expected = 0

    def expect(self, _: str) -> bool:
        """Announces the next example, whose record is missing."""
        self.num_expected += 1
        return True

    def append(self, records: list[Record]) -> None:
        self.records += records

    def finish(self) -> None: ...


def read_records(path: Path) -> Iterator[Record]:
    """Yields the records of a finished file. Raises UserError for a bad line."""
    try:
        with plain.open_file(path, "rb", follow=True) as file:
            for number, line in enumerate(file, 1):
                if (record := _parse(line)) is None:
                    raise _not_a_record(path, number, line)
                yield record
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _not_a_record(path: Path, number: int, line: bytes) -> UserError:
    return UserError(
        f"{path}:{number}: expected predictions, JSON objects with index and key, found "
        f"{line[:60]!r}; make the file again, or give another one"
    )


def _is_torn(line: bytes) -> bool:
    """Returns whether a line looks like the beginning of a record that a kill cut off."""
    start = b'{"index": '
    return line.startswith(start) or start.startswith(line.rstrip(b"\n"))


def _parse(line: bytes) -> Record | None:
    """Returns the record of a line; None if it is torn or something else."""
    try:
        record = json.loads(line)
        is_known = 0 <= record["index"] < 2**32 and 0 <= int(record["key"], 16) < 2**64
        return record if is_known else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
