"""Finished examples in one JSONL file, from any number of processes, kept when a run is killed.

Every process appends whole lines under a lock and syncs them. A line has the `index` of its example
and a `key`: what the answer is a function of. A run that continues reads them all first and asks
again only for what is missing or has another key; at the end one process writes the lines anew, in
the order of the examples.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft.config import UserError, redacted

Record = dict[str, Any]


class PredictionsError(UserError):
    """The file of predictions is not what it should be."""


def key_of(*parts: Any) -> str:
    """16 hexadecimal digits of a digest of these values, as JSON."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Predictions:
    """The file at `path`. Examples are announced in their order by `expect`, each by its key."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._places: dict[int, tuple[int, int]] = {}  # index: (key, offset) of the newest line
        self._expected = array("Q")
        self._read()

    def _read(self) -> None:
        self._places.clear()
        if not self.path.exists():
            return
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                if record := _parsed(line):
                    self._places[record["index"]] = (int(record["key"], 16), offset)
                offset += len(line)

    def expect(self, key: str) -> bool:
        """Announces the next example; whether it is still to be done."""
        index = len(self._expected)
        self._expected.append(int(key, 16))
        return index not in self._places or self._places[index][0] != int(key, 16)

    @property
    def num_expected(self) -> int:
        return len(self._expected)

    def append(self, records: list[Record]) -> None:
        """Lines that a kill at any later instant does not lose."""
        lines = "".join(redacted(json.dumps(each, ensure_ascii=False)) + "\n" for each in records)
        data = lines.encode("utf-8", "backslashreplace")
        with self.path.open("ab+", buffering=0) as file:
            with suppress(OSError):  # a file system without locks: single appends stay whole
                fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                data = b"\n" + data  # behind a line that a kill has torn
            if file.write(data) != len(data):
                os.ftruncate(file.fileno(), end)
                raise PredictionsError(f"{self.path}: the disk is full; make room and run again")
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Writes the lines in the order of the examples, without those of others. One process."""
        self.path.touch()  # without examples nobody has made it
        self._read()
        wrong = [i for i, key in enumerate(self._expected) if self._places.get(i, (-1,))[0] != key]
        if wrong:
            raise PredictionsError(
                f"{self.path}: {len(wrong):,} of {len(self._expected):,} examples are missing, as "
                f"number {wrong[0] + 1}: all processes must write to one file system; run again"
            )
        staged = self.path.with_name(self.path.name + ".tmp")
        with self.path.open("rb") as old, staged.open("wb") as new:
            for index in range(len(self._expected)):
                old.seek(self._places[index][1])
                new.write(old.readline())
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


def _parsed(line: bytes) -> Record | None:
    """The record of a line; None if it was torn, or is not one of ours."""
    try:
        record = json.loads(line)
        return record if record["index"] >= 0 and int(record["key"], 16) < 2**64 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
