"""Finished examples in one JSONL file, from any number of processes, kept when a run is killed.

Every process appends whole lines under a lock and syncs them. A line has the `index` of its example
and a `key`: what the answer is a function of. A run that continues reads them all first and asks
again only for what is missing or has another key; at the end one process writes the lines anew, in
the order of the examples. What is known of each lies in nameless files beside it, not in memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from sft.arrays import BLOCK, Scratch, blocks, give_back, mapped
from sft.config import UserError, redacted

Record = dict[str, Any]
PLACE = [("key", np.uint64), ("begins", np.int64), ("num_bytes", np.int64)]  # of a line, or none: 0
LINE = np.dtype([("index", np.int64), *PLACE])
AT_ONCE = 4096  # lines that are read before they are written down


class PredictionsError(UserError):
    """The file of predictions is not what it should be."""


def key_of(*parts: Any) -> str:
    """16 hexadecimal digits of a digest of these values, as JSON."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Predictions:
    """The file at `path`. Examples are announced in their order by `expect`, each by its key."""

    def __init__(self, path: Path):
        self.path, self.num_expected = path, 0
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._scratch = Scratch(path.parent)
            self._expected = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # until the end
            self._places = self._read()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told = error.strerror or str(error)
            raise PredictionsError(
                f"{self.path}: {told}; make room, or give another file"
            ) from None

    def _read(self) -> np.ndarray:
        """(examples,) of PLACE: the newest line of each, of all that are expected or have one."""
        lines = self._scratch.keep(self._lines(), LINE)
        size = max((int(lines["index"][b].max()) + 1 for b in blocks(len(lines))), default=0)
        places = self._scratch.zeros(max(size, self.num_expected), np.dtype(PLACE))
        for block in blocks(len(lines)):
            for name, _ in PLACE:  # of two lines of an example the last one stays
                places[name][lines["index"][block]] = lines[name][block]
        return places

    def _lines(self) -> Iterator[np.ndarray]:
        """Parts of all lines of the file, in their order, of LINE."""
        if not self.path.exists():
            return
        found, offset = [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if record := _parsed(line):
                    found.append((record["index"], int(record["key"], 16), offset, len(line)))
                elif not _is_torn(line):
                    raise PredictionsError(
                        f"{self.path}:{number}: expected a line of predictions, found "
                        f"{line[:60]!r}; this file is something else: give another one"
                    )
                offset += len(line)
                if len(found) == AT_ONCE:
                    yield np.array(found, LINE)
                    found = []
        yield np.array(found, LINE)

    def expect(self, key: str) -> bool:
        """Announces the next example; whether it is still to be done."""
        index, number = self.num_expected, int(key, 16)
        with self._told():
            self._expected.write(number.to_bytes(8, sys.byteorder))
        self.num_expected += 1
        if self.num_expected % BLOCK == 0:
            give_back()
        if index >= len(self._places):
            return True
        place = self._places[index]
        return not place["num_bytes"] or place["key"] != number

    def append(self, records: list[Record]) -> None:
        """Lines that a kill at any later instant does not lose."""
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
        data = redacted(lines).encode("utf-8", "backslashreplace")
        with self._told(), self.path.open("ab+", buffering=0) as file:
            with suppress(OSError):  # a file system without locks: single appends stay whole
                fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                data = b"\n" + data  # behind a line that a kill has torn
            if file.write(data) != len(data):
                os.ftruncate(file.fileno(), end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Writes the lines in the order of the examples, without those of others. One process."""
        self.path.touch()  # without examples nobody has made it
        with self._told():
            self._finish()

    def _finish(self) -> None:
        places = self._read()
        self._expected.flush()
        expected = mapped(self._expected, np.uint64)
        wrong = self._scratch.where(
            len(expected),
            lambda b: (places["num_bytes"][b] == 0) | (places["key"][b] != expected[b]),
        )
        if len(wrong):
            raise PredictionsError(
                f"{self.path}: {len(wrong):,} of {len(expected):,} examples are missing, as "
                f"number {wrong[0] + 1}: all processes must write to one file system; run again"
            )
        staged = self.path.with_name(self.path.name + ".tmp")
        with self.path.open("rb") as old, staged.open("wb") as new:
            for block in blocks(len(expected)):
                for place in places[block]:
                    old.seek(place["begins"])
                    new.write(old.read(place["num_bytes"]))
            new.flush()
            os.fsync(new.fileno())
        staged.replace(self.path)


def read(path: Path) -> Iterator[Record]:
    """The records of a finished file, in its order. Raises PredictionsError for a bad line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                record = _parsed(line)
                if record is None:
                    raise PredictionsError(
                        f"{path}:{number}: expected a JSON object with index and key, found "
                        f"{line[:60]!r}; make the file again"
                    )
                yield record
    except OSError as error:
        raise PredictionsError(f"cannot read {path}: {error.strerror or error}") from None


def _is_torn(line: bytes) -> bool:
    """Whether a line is the beginning of one of ours that a kill cut off, as far as can be told."""
    start = b'{"index": '
    return line.startswith(start) or start.startswith(line.rstrip(b"\n"))


def _parsed(line: bytes) -> Record | None:
    """The record of a line; None if it was torn, or is not one of ours."""
    try:
        record = json.loads(line)
        known = 0 <= record["index"] < 2**32 and 0 <= int(record["key"], 16) < 2**64
        return record if known else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
