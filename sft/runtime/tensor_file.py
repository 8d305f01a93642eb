"""Writes a safetensors file one tensor at a time, so that they need not be in memory at once.

`safetensors` itself writes a file from all of its tensors. The bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import _TYPES

from sft.runtime import plain

Entry = dict[str, int | str]
NAMES = {dtype: name for name, dtype in _TYPES.items()}


class TensorFile:
    """A file whose tensors have shapes and dtypes from the beginning, and then get their values.

    `behind`: values are copied to host memory, and written by `finish`, in a thread for example.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        behind: bool = False,
    ):
        """Plans the file. `tensors` need no values, and may be on the meta device."""
        self.path, self.behind = path, behind
        self._kept: dict[str, torch.Tensor] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._places, at = {}, 0
        # The widest dtypes come first, so that each tensor is aligned to its own.
        for name, each in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
            end = at + each.numel() * each.itemsize
            header[name] = {
                "dtype": NAMES[each.dtype],
                "shape": list(each.shape),
                "data_offsets": [at, end],
            }
            self._places[name], at = (at, end), end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header, self._bytes = len(text).to_bytes(8, "little") + text, at

    def write(self, name: str, value: torch.Tensor) -> None:
        """Writes the value of a tensor, or keeps a copy of it."""
        if self.behind:
            self._kept[name] = value.detach().to("cpu", copy=True)
        else:
            self._put(name, value)

    def _put(self, name: str, value: torch.Tensor) -> None:
        start, end = self._places[name]
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        assert len(content) == end - start, name
        self._begin()
        with plain.open_file(self.path, "r+b") as file:
            file.seek(len(self._header) + start)
            file.write(content.numpy().data)

    def _begin(self) -> None:
        if not self.path.exists():
            with plain.open_file(self.path, "xb") as file:
                file.write(self._header)
                file.truncate(len(self._header) + self._bytes)

    def finish(self) -> Entry:
        """Writes what was kept, syncs the file, and returns its entry in a manifest."""
        for name in [*self._kept]:
            self._put(name, self._kept.pop(name))
        self._begin()  # a file without tensors
        sync(self.path)
        return entry(self.path)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], behind: bool
) -> TensorFile:
    """Writes a file of tensors that have their values; `behind`: see `TensorFile`."""
    file = TensorFile(path, tensors, metadata, behind)
    for name, value in tensors.items():
        file.write(name, value)
    return file


def entry(path: Path) -> Entry:
    """Returns the entry of a file in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
