"""Arrays that grow at the ends of their files, and are mapped from them.

What takes many bytes of each row goes through these: tokens, shingles, the rows themselves. Mapped
pages belong to the system, which may drop them at any time. Numbers of rows are plain numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import DTypeLike


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


def mapped(file: Path, dtype: DTypeLike, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    """Returns a file as an array that the system reads on use, and writes where it was changed."""
    if not file.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode).view(np.ndarray)  # as quick to slice as any array
