"""Examples as flat arrays: appended to files, mapped from them, laid out as micro-batches.

A store is a folder of raw arrays: `ids.bin`, `labels.bin` and, of examples where they are not all
1, `weights.bin` of the tokens, one example after the other; `rows.jsonl`, the rows they were made
of; and `index.bin`, which says where each begins. Readers map the files and hold none in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sft.data.arrays import Files, mapped
from sft.data.batches import Layout
from sft.data.files import Row
from sft.data.template import IGNORED, Example

INDEX = np.dtype(
    [
        ("row", np.int64),  # number of the row it was made of
        ("start", np.int64),  # of its tokens
        ("length", np.int32),  # tokens
        ("supervised", np.int32),  # tokens that the loss sees
        ("weights", np.int64),  # where its weights start; -1: 1 everywhere
        ("text", np.int64),  # where its row starts in rows.jsonl
        ("text_bytes", np.int64),
        ("findings", np.uint32),  # of the audit: a bit for each kind
    ]
)


@dataclass(frozen=True)
class Arrays:
    """Examples of any number of rows; all of a store, or what one worker made."""

    index: np.ndarray  # (examples,) of INDEX
    ids: np.ndarray  # (tokens,)
    labels: np.ndarray  # (tokens,)
    weights: np.ndarray
    rows: np.ndarray  # JSON lines, as bytes


def pack(samples: Iterable[tuple[int, Row, Example]]) -> Arrays:
    """Arrays of (number of its row, the row, its example)."""
    index, ids, labels, weights = [], [], [], []  # type: ignore[var-annotated]
    text, shown, starts, line = bytearray(), None, 0, b""
    for number, row, example in samples:
        if row is not shown:  # a document may become many examples
            shown, starts = row, len(text)
            told = {"file": row.file, "line": row.line, "messages": row.messages}
            told |= {"tools": row.tools} if row.tools else {}
            told |= {} if row.group is None else {"group": row.group}
            line = (json.dumps(told, ensure_ascii=False) + "\n").encode()
            text += line
        where = len(weights) if example.weights else -1
        size = (len(ids), len(example.ids), example.num_supervised, where, starts, len(line))
        index.append((number, *size, 0))
        ids += example.ids
        labels += example.labels
        weights += example.weights or []
    return Arrays(
        np.array(index, INDEX),
        np.array(ids, np.int32),
        np.array(labels, np.int32),
        np.array(weights, np.float64),
        np.frombuffer(bytes(text), np.uint8),
    )


def write(files: Files, arrays: Arrays) -> None:
    """Appends examples to a store."""
    index = arrays.index.copy()
    index["start"] += files.append("ids.bin", arrays.ids)
    files.append("labels.bin", arrays.labels)
    index["weights"][index["weights"] >= 0] += files.append("weights.bin", arrays.weights)
    index["text"] += files.append("rows.jsonl", arrays.rows)
    files.append("index.bin", index)


def open_folder(folder: Path) -> Arrays:
    return Arrays(
        mapped(folder / "index.bin", INDEX),
        mapped(folder / "ids.bin", np.int32),
        mapped(folder / "labels.bin", np.int32),
        mapped(folder / "weights.bin", np.float64),
        mapped(folder / "rows.jsonl", np.uint8),
    )


def open_findings(folder: Path) -> np.ndarray:
    """Those of all examples of a folder; what is added to them is in the file."""
    return mapped(folder / "index.bin", INDEX, "r+")["findings"]


class Examples(Sequence[Example]):
    """Examples of a store in an order of their own; one may come more than once."""

    def __init__(
        self, arrays: Arrays, order: np.ndarray | None = None, lengths: np.ndarray | None = None
    ):
        self.arrays = arrays
        self.order = np.arange(len(arrays.index)) if order is None else order
        lengths = arrays.index["length"][self.order] if lengths is None else lengths
        self.lengths: Sequence[int] = memoryview(lengths)  # type: ignore[arg-type]  # whose items are quick to get
        self._last: tuple[int, Row] | None = None  # where the row that was asked for last begins
        self._starts, self._weights = arrays.index["start"], arrays.index["weights"]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        ids, labels, weights = self.tokens(index)
        return Example(ids.tolist(), labels.tolist(), None if weights is None else weights.tolist())

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(ids, labels, weights or None) of an example."""
        entry, length = self.order[index], self.lengths[index]
        start, weights = self._starts[entry], self._weights[entry]
        part = slice(start, start + length)
        own = self.arrays.weights[weights : weights + length] if weights >= 0 else None
        return self.arrays.ids[part], self.arrays.labels[part], own

    def select(self, chosen: np.ndarray) -> Examples:
        """Those of a mask (examples,)."""
        return Examples(self.arrays, self.order[chosen], np.asarray(self.lengths)[chosen])

    def row(self, index: int) -> Row:
        entry = self.arrays.index[self.order[index]]
        start = int(entry["text"])
        if self._last is None or self._last[0] != start:  # a document has many examples
            line = self.arrays.rows[start : start + int(entry["text_bytes"])].tobytes()
            told = json.loads(line)
            place = told["file"], told["line"]
            row = Row(told["messages"], told.get("tools"), *place, group=told.get("group"))
            self._last = (start, row)
        return self._last[1]

    def rows(self) -> Iterator[Row]:
        return (self.row(index) for index in range(len(self)))


def examples_sha256(examples: Examples) -> str:
    """sha256 of all that is trained on: tokens, labels and weights, in their order."""
    result = hashlib.sha256()
    for i in range(len(examples)):
        for part in examples.tokens(i):
            result.update(b"-" if part is None else part.tobytes())
    return result.hexdigest()


# --- micro-batches -----------------------------------------------------------------------------


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


def collate(
    examples: Examples, chosen: Sequence[int], pad: int, layout: Layout, device: torch.device
) -> Batch:
    """Padded: rows padded on the right. Packed: one row of documents with restarting position ids.

    Neither needs an attention mask: causal attention cannot see padding on the right, and
    transformers confines attention to documents by their position ids as long as no mask and no
    cache is passed.
    """
    if not chosen:
        none = torch.zeros(0, dtype=torch.long, device=device)
        return Batch(torch.tensor([[pad]], device=device), None, none, none)
    parts = [examples.tokens(i) for i in chosen]
    lengths = np.array([len(ids) for ids, _, _ in parts])
    ids = np.concatenate([ids for ids, _, _ in parts]).astype(np.int64)
    labels = np.concatenate([labels for _, labels, _ in parts])
    starts = np.cumsum(lengths) - lengths
    within = np.arange(len(ids)) - np.repeat(starts, lengths)  # place in its own example
    places = np.arange(len(ids))  # place in the batch
    position_ids = None
    if layout == "packed":
        input_ids, position_ids = ids[None], torch.from_numpy(within[None]).to(device)
    else:
        width = int(lengths.max())
        input_ids = np.full((len(parts), width), pad)
        places = within + np.repeat(np.arange(len(parts)) * width, lengths)
        input_ids.flat[places] = ids
    supervised = (labels != IGNORED) & (within > 0)  # the first token has no predecessor
    weights = None
    if any(own is not None for _, _, own in parts):
        ones = (np.ones(len(ids)) if own is None else own for ids, _, own in parts)
        weights = torch.from_numpy(np.concatenate(list(ones))[supervised]).to(device)
    return Batch(
        torch.from_numpy(input_ids).to(device),
        position_ids,
        torch.from_numpy(places[supervised] - 1).to(device),
        torch.from_numpy(labels[supervised].astype(np.int64)).to(device),
        weights,
        list(chosen),
        np.add.reduceat(supervised, starts, dtype=np.int64).tolist(),
    )
