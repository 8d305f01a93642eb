"""Arrays in files: appended, mapped, gathered and sorted there, some items at a time.

What is made of all rows goes through these, so that the memory of the process does not grow with
their number: what is mapped belongs to the system, which may drop it at any time.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice, takewhile
from pathlib import Path
from typing import IO, Any, Literal
from weakref import WeakSet

import numpy as np
from numpy.typing import DTypeLike

BLOCK = 1 << 16  # items that are in memory at a time


class Files:
    """Raw arrays in the files of a folder, which grow at their ends; a context manager."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def append(self, name: str, array: np.ndarray) -> int:
        """Appends to the file `name`; returns at which item the array begins."""
        if name not in self._open:
            self._open[name] = (self._folder / name).open("wb")
        begins = self._open[name].tell() // array.itemsize
        array.tofile(self._open[name])
        return begins


def mapped(file: Path | IO[bytes], dtype: DTypeLike, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    """A file as an array that the system reads when it is used, and writes if it was changed."""
    size = file.stat().st_size if isinstance(file, Path) else file.tell()
    if not size:
        return np.zeros(0, dtype)
    array = np.memmap(file, dtype, mode)
    _maps.add(array._mmap)  # type: ignore[attr-defined]
    return array.view(np.ndarray)  # as quick to slice as any array


_maps: WeakSet[mmap.mmap] = WeakSet()


def blocks(size: int, step: int | None = None) -> Iterator[slice]:
    """Slices of `step` (BLOCK) items; after each, what all arrays have mapped is given back."""
    step = step or BLOCK
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
        give_back()


def give_back() -> None:
    """Takes what all arrays have mapped out of this process's memory, until it is used again."""
    for each in list(_maps):
        each.madvise(mmap.MADV_DONTNEED)


class Scratch:
    """Arrays in nameless files of a folder; the room is free again when nobody uses them."""

    def __init__(self, folder: Path):
        self._folder = folder

    def keep(self, parts: Iterable[np.ndarray], dtype: DTypeLike) -> np.ndarray:
        """The parts, one after the other."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            for part in parts:  # written, then mapped: a full disk is an error, no signal
                for block in blocks(len(part)):
                    part[block].astype(dtype, copy=False).tofile(file)
            return mapped(file, dtype, "r+")

    def zeros(self, size: int, dtype: DTypeLike) -> np.ndarray:
        return self.keep((np.zeros(b.stop - b.start, dtype) for b in blocks(size)), dtype)

    def collect(self, items: Iterable[Any], dtype: DTypeLike) -> np.ndarray:
        left = iter(items)
        parts = (np.fromiter(islice(left, BLOCK), dtype) for _ in count())
        return self.keep(takewhile(len, parts), dtype)

    def take(self, array: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """array[chosen]"""
        return self.keep((array[chosen[b]] for b in blocks(len(chosen))), array.dtype)

    def where(self, size: int, holds: Callable[[slice], np.ndarray]) -> np.ndarray:
        """(n,) int64: the indices below `size` for which `holds`, told of a slice of them."""
        return self.keep((b.start + np.flatnonzero(holds(b)) for b in blocks(size)), np.int64)

    def select(self, array: np.ndarray, holds: Callable[[slice], np.ndarray]) -> np.ndarray:
        """The items of the array for which `holds`."""
        return self.take(array, self.where(len(array), holds))

    def distinct(self, parts: Iterable[np.ndarray], dtype: DTypeLike) -> np.ndarray:
        """The numbers that stand in the parts, ascending."""
        numbers = self.keep(parts, dtype)
        numbers.sort()
        whole = blocks(len(numbers))
        return self.keep((numbers[b][_is_new(numbers, b)] for b in whole), dtype)

    def ranked(self, keys: np.ndarray) -> np.ndarray:
        """(n,) of (key, index): ascending by the bytes of the key, equal ones by their index."""
        keys = keys.view(f"V{keys.itemsize}")
        dtype = np.dtype([("key", keys.dtype), ("index", ">u4")])

        def pairs(block: slice) -> np.ndarray:
            part = np.empty(block.stop - block.start, dtype)
            part["key"], part["index"] = keys[block], np.arange(block.start, block.stop)
            return part

        result = self.keep((pairs(block) for block in blocks(len(keys))), dtype)
        result.view(f"S{dtype.itemsize}").sort()  # compared as bytes
        return result

    def groups(self, keys: np.ndarray) -> np.ndarray:
        """(n,) int64: the first index that has the key of each."""
        ranked, result = self.ranked(keys), self.zeros(len(keys), np.int64)
        carried = 0  # the group at the end of the block before
        for block in blocks(len(ranked)):
            index, is_new = ranked["index"][block].astype(np.int64), _is_new(ranked["key"], block)
            firsts = np.append(carried, index[is_new])
            result[index], carried = firsts[np.cumsum(is_new)], firsts[-1]
        return result

    def firsts(self, keys: np.ndarray) -> np.ndarray:
        """(n,) bool: whether nothing before it has the key."""
        group, whole = self.groups(keys), blocks(len(keys))
        return self.keep((group[b] == np.arange(b.start, b.stop) for b in whole), bool)

    def among(self, keys: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(n,) bool: whether each key is one of `others`."""
        first = self.groups(self.keep([others, keys], keys.dtype))[len(others) :]
        return self.keep((first[b] < len(others) for b in blocks(len(keys))), bool)


def _is_new(array: np.ndarray, block: slice) -> np.ndarray:
    """Which items of a block are not what stands before them."""
    part = array[block]
    differs = not block.start or array[block.start - 1] != part[0]
    return np.append(differs, part[1:] != part[:-1])
