"""Examples as flat arrays: appended to files, mapped from them, laid out as micro-batches.

A store is a folder of raw arrays. `ids.bin` and `labels.bin` hold one example after the other, and
`weights.bin` the weights of those whose tokens do not all weigh 1. `rows.jsonl` holds the rows that
they were made of, and `index.bin` says where each begins. Mapped pages belong to the system, which
may drop them at any time, so no store is held in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import DTypeLike

from sft.data.batches import Layout
from sft.data.files import Row
from sft.data.template import IGNORED, Example
from sft.runtime.hardware import to_device

ENCODER = json.JSONEncoder(ensure_ascii=False)  # `json.dumps` makes one each time
INDEX = np.dtype(
    [
        ("row", np.int64),  # number of the row it was made of
        ("start", np.int64),  # of its tokens
        ("length", np.int32),  # tokens
        ("supervised", np.int32),  # tokens in the loss
        ("weights", np.int64),  # where its weights start; -1: 1 everywhere
        ("text", np.int64),  # where its row starts in rows.jsonl
        ("text_bytes", np.int64),
        ("findings", np.uint32),  # of the audit: a bit for each kind
    ]
)


def append_array(file: Path, array: np.ndarray) -> int:
    """Appends an array to a file, and returns at which item of the file it begins."""
    with file.open("ab") as stream:
        start = stream.seek(0, os.SEEK_END) // array.itemsize
        array.tofile(stream)
    return start


def map_array(file: Path, dtype: DTypeLike, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    """Maps a file as an array (n,), which the system reads on use; `r+`: changes go to the file."""
    if not file.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode).view(np.ndarray)  # as quick to slice as any array


@dataclass(frozen=True)
class ExampleArrays:
    """Examples of any number of rows: those of a store, or those that one worker made."""

    index: np.ndarray  # (examples,) of INDEX
    ids: np.ndarray  # (tokens,) int32
    labels: np.ndarray  # (tokens,) int32
    weights: np.ndarray  # (tokens of weighted examples,) float64
    rows: np.ndarray  # (bytes,) uint8: JSON lines

    @classmethod
    def pack(cls, samples: Iterable[tuple[int, Row, Example]]) -> ExampleArrays:
        """Makes the arrays of (number of the row, the row, an example of it)."""
        index: list[tuple[int, ...]] = []
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        text, last, text_start, line = bytearray(), None, 0, b""
        for number, row, example in samples:
            if row is not last:  # a document may become many examples
                last, text_start, line = row, len(text), _to_json(row)
                text += line
            weights_start = len(weights) if example.weights else -1
            size = (len(ids), len(example.ids), example.num_supervised)
            index.append((number, *size, weights_start, text_start, len(line), 0))
            ids += example.ids
            labels += example.labels
            weights += example.weights or []
        return cls(
            np.array(index, INDEX),
            np.array(ids, np.int32),
            np.array(labels, np.int32),
            np.array(weights, np.float64),
            np.frombuffer(bytes(text), np.uint8),
        )

    @classmethod
    def open(cls, folder: Path) -> ExampleArrays:
        """Maps the store in `folder`."""
        return cls(
            map_array(folder / "index.bin", INDEX),
            map_array(folder / "ids.bin", np.int32),
            map_array(folder / "labels.bin", np.int32),
            map_array(folder / "weights.bin", np.float64),
            map_array(folder / "rows.jsonl", np.uint8),
        )

    def append_to(self, folder: Path) -> None:
        """Appends the examples to the store in `folder`."""
        index = self.index.copy()
        index["start"] += append_array(folder / "ids.bin", self.ids)
        append_array(folder / "labels.bin", self.labels)
        is_weighted = index["weights"] >= 0
        index["weights"][is_weighted] += append_array(folder / "weights.bin", self.weights)
        index["text"] += append_array(folder / "rows.jsonl", self.rows)
        append_array(folder / "index.bin", index)


def _to_json(row: Row) -> bytes:
    values = {"file": row.file, "line": row.line, "messages": row.messages}
    optional = {"tools": row.tools, "group": row.group, "template_kwargs": row.template_kwargs}
    values |= {key: value for key, value in optional.items() if value is not None}
    return (ENCODER.encode(values) + "\n").encode()


def open_findings(folder: Path) -> np.ndarray:
    """Maps the findings (examples,) of a store; changes go to the file."""
    return map_array(folder / "index.bin", INDEX, "r+")["findings"]


class Examples(Sequence[Example]):
    """Examples of a store in an order of their own; one may come more than once."""

    def __init__(
        self,
        arrays: ExampleArrays,
        order: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
    ):
        self.arrays = arrays
        self.order = np.arange(len(arrays.index)) if order is None else order
        lengths = arrays.index["length"][self.order] if lengths is None else lengths
        self.lengths: Sequence[int] = memoryview(lengths)  # type: ignore[arg-type]  # whose items are quick to get
        self._last: tuple[int, Row] | None = None  # the row asked for last, and where it starts
        self._starts, self._weights = arrays.index["start"], arrays.index["weights"]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        ids, labels, weights = self.tokens(index)
        return Example(ids.tolist(), labels.tolist(), None if weights is None else weights.tolist())

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns (ids, labels, weights or None) of an example, each (tokens,)."""
        entry, length = self.order[index], self.lengths[index]
        start, weights = self._starts[entry], self._weights[entry]
        part = slice(start, start + length)
        own = self.arrays.weights[weights : weights + length] if weights >= 0 else None
        return self.arrays.ids[part], self.arrays.labels[part], own

    def select(self, chosen: np.ndarray) -> Examples:
        """Returns the examples that a mask (examples,) chooses."""
        return Examples(self.arrays, self.order[chosen], np.asarray(self.lengths)[chosen])

    def row(self, index: int) -> Row:
        """Returns the row that an example was made of."""
        entry = self.arrays.index[self.order[index]]
        start = int(entry["text"])
        if self._last is None or self._last[0] != start:  # a document has many examples
            line = self.arrays.rows[start : start + int(entry["text_bytes"])].tobytes()
            values = json.loads(line)
            self._last = (start, Row(**{"tools": None} | values))
        return self._last[1]

    def rows(self) -> Iterator[Row]:
        """Yields the row of each example."""
        return (self.row(index) for index in range(len(self)))


def examples_sha256(examples: Examples) -> str:
    """Returns the sha256 of tokens, labels and weights in their order: of all that is trained."""
    result = hashlib.sha256()
    for i in range(len(examples)):
        for part in examples.tokens(i):
            result.update(b"-" if part is None else part.tobytes())
    return result.hexdigest()


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `positions` index into batch * time; position t predicts token t + 1."""

    input_ids: torch.Tensor  # (rows, time)
    position_ids: torch.Tensor | None  # (1, time), restarting at each document; packed only
    positions: torch.Tensor  # (supervised,)
    targets: torch.Tensor  # (supervised,)
    weights: torch.Tensor | None = None  # (supervised,); None: 1 everywhere
    examples: list[int] = field(default_factory=list)  # their ids, in the order of `positions`
    counts: list[int] = field(default_factory=list)  # supervised positions of each
    lengths: list[int] = field(default_factory=list)  # tokens of each
    num_items: float | None = None  # what the loss is divided by; None: the sum of the weights
    tokens: torch.Tensor | None = None  # flat indices of those of `examples`; None: all of them
    whole_positions: torch.Tensor | None = None  # (1, time) before processes shared the sequences

    def token_positions(self) -> torch.Tensor:
        """Returns the flat indices of all tokens, in the order of `examples`, without padding."""
        device = self.input_ids.device
        if self.tokens is not None:
            return self.tokens
        if self.position_ids is not None:
            return torch.arange(self.input_ids.numel(), device=device)
        width = self.input_ids.shape[1]
        starts = (row * width + torch.arange(n) for row, n in enumerate(self.lengths))
        return to_device(torch.cat([torch.zeros(0, dtype=torch.long), *starts]), device)

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with its tensors on `device`."""
        values = vars(self).items()
        moved: dict[str, Any] = {k: to_device(v, device) for k, v in values if torch.is_tensor(v)}
        return replace(self, **moved)


def share(batch: Batch, part: int, parts: int, pad: int) -> Batch:
    """Returns what one of `parts` processes computes of a batch: as many tokens of each row.

    Rows are padded until they can be divided. `lengths` and `counts` are those of this part, and
    the padding of a packed row is a document of its own.
    """
    time = batch.input_ids.shape[1]
    own = math.ceil(time / parts)
    first, padding = part * own, parts * own - time
    whole = torch.arange(time)[None] if batch.position_ids is None else batch.position_ids
    whole = torch.cat([whole, torch.arange(padding)[None]], 1)

    def find(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns which flat indices are in this part, and those in it."""
        at = places % time - first
        mine = (at >= 0) & (at < own)
        return mine, (places // time * own + at)[mine]

    def count(numbers: list[int], mine: torch.Tensor) -> list[int]:
        """Returns how many there are of each example in this part."""
        owners = torch.repeat_interleave(torch.tensor(numbers, dtype=torch.long))
        return torch.bincount(owners[mine], minlength=len(numbers)).tolist()

    is_mine, tokens = find(batch.token_positions())
    is_predicted, positions = find(batch.positions)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, padding), value=pad)[:, first : first + own],
        position_ids=whole[:, first : first + own].contiguous(),
        positions=positions,
        targets=batch.targets[is_predicted],
        weights=None if batch.weights is None else batch.weights[is_predicted],
        counts=count(batch.counts, is_predicted),
        lengths=count(batch.lengths, is_mine),
        num_items=batch.num_items if part == 0 or batch.num_items is None else 0.0,
        tokens=tokens,
        whole_positions=whole,
    )


def collate(
    examples: Examples,
    chosen: Sequence[int],
    pad: int,
    layout: Layout,
    device: torch.device,
    per_example: bool = False,
) -> Batch:
    """Lays the examples `chosen` out as rows padded on the right (`padded`), or as one row of
    documents with restarting position ids (`packed`).

    Neither needs an attention mask: causal attention cannot see padding on the right, and
    transformers confines attention to documents by their position ids as long as no mask and no
    cache is passed. `per_example`: the weights of each example are scaled to sum to 1.
    """
    if not chosen:
        none = torch.zeros(0, dtype=torch.long, device=device)
        return Batch(to_device(torch.tensor([[pad]]), device), None, none, none)
    parts = [examples.tokens(i) for i in chosen]
    lengths = np.array([len(ids) for ids, _, _ in parts])
    ids = np.concatenate([ids for ids, _, _ in parts]).astype(np.int64)
    labels = np.concatenate([labels for _, labels, _ in parts])
    starts = np.cumsum(lengths) - lengths
    within = np.arange(len(ids)) - np.repeat(starts, lengths)  # place in its own example
    places = np.arange(len(ids))  # place in the batch
    position_ids = None
    if layout == "packed":
        input_ids, position_ids = ids[None], to_device(torch.from_numpy(within[None]), device)
    else:
        width = int(lengths.max())
        input_ids = np.full((len(parts), width), pad)
        places = within + np.repeat(np.arange(len(parts)) * width, lengths)
        input_ids.flat[places] = ids
    supervised = (labels != IGNORED) & (within > 0)  # the first token has no predecessor
    weights, num_items = None, None
    if per_example or any(own is not None for _, _, own in parts):
        ones = (np.ones(len(ids)) if own is None else own for ids, _, own in parts)
        each = np.concatenate(list(ones)) * supervised
        if per_example:
            sums = np.add.reduceat(each, starts)
            each, num_items = (
                each / np.repeat(np.where(sums, sums, 1), lengths),
                float(np.count_nonzero(sums)),
            )
        weights = to_device(torch.from_numpy(each[supervised]), device)
    return Batch(
        to_device(torch.from_numpy(input_ids), device),
        position_ids,
        to_device(torch.from_numpy(places[supervised] - 1), device),
        to_device(torch.from_numpy(labels[supervised].astype(np.int64)), device),
        weights,
        list(chosen),
        np.add.reduceat(supervised, starts, dtype=np.int64).tolist(),
        lengths.tolist(),
        num_items,
    )
