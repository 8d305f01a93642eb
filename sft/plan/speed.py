"""Predicts how long a run takes: from the speed of earlier runs on the device, else as a range.

A run that ends adds its speed to a file beside the memory history, in FLOP/s of one process. It is
the speed of the whole training, evaluations and checkpoints included. A later plan uses it for the
same device, tuning and precision, and models of a like size.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft.plan import gpus
from sft.plan.records import KEPT_RUNS
from sft.runtime import plain

HISTORY = "speed.jsonl"  # in the folder that outlives a run: `TaskInfo.cache`
# Shares of a GPU's peak that training reaches: at least, usually, at most. An assumption; others
# report up to 50 % for full fine-tuning, and short rows without packing stay below 20 %.
ASSUMED = (0.15, 0.35, 0.5)
ALIKE = 4  # a model counts as of like size if it is at most so many times larger or smaller
FEW_STEPS = 10  # with fewer, the first steps decide, which are slow


@dataclass(frozen=True)
class Kind:
    """What the speed of runs depends on, besides their device."""

    tuning: str  # as in `tuning.mode`
    precision: str
    parameters: int  # that a token is multiplied by


@dataclass(frozen=True)
class Time:
    """The seconds that a run takes."""

    seconds: float
    least: float
    most: float
    runs: int = 0  # earlier runs that it is known from; 0: assumed
    shares: tuple[float, float] | None = None  # of the GPU's peak, least and most, where known


def predict_time(
    flops: float, folder: Path, device: str, gpu: str | None, world_size: int, kind: Kind
) -> Time | None:
    """Returns the time of so many operations on all processes; None if no speed is known.

    `device` is the name under which speeds are kept, `gpu` that of one GPU.
    """
    known = gpus.find_gpu(gpu) if gpu else None
    peak = known.teraflops * 1e12 if known and kind.precision != "fp32" else None
    speeds = read_speeds(folder, device, kind)
    if speeds:
        slow, usual, fast = min(speeds), statistics.median(speeds), max(speeds)
    elif peak:
        slow, usual, fast = (share * peak for share in ASSUMED)
    else:
        return None
    seconds, least, most = (flops / (speed * world_size) for speed in (usual, fast, slow))
    shares = (slow / peak, fast / peak) if peak else None
    return Time(seconds, least, most, len(speeds), shares)


def attention_flops(sizes: Any, lengths: Sequence[int]) -> float:
    """Returns the operations of attention for a token in a forward pass, on average.

    `sizes`: named as in transformers' configurations. A token is compared with those before it, or
    with a window of them. Recurrent layers and convolutions have none.
    """
    heads = getattr(sizes, "num_attention_heads", None)
    if not heads:
        return 0.0
    features = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
    window = getattr(sizes, "sliding_window", None)
    usual = "sliding_attention" if window else "full_attention"
    named = getattr(sizes, "layer_types", None) or getattr(sizes, "layers_block_type", None)
    kinds = named or [usual] * sizes.num_hidden_layers
    spans = {
        "attention": None,
        "full_attention": None,
        "sliding_attention": window,
        "chunked_attention": getattr(sizes, "attention_chunk_size", None),
    }
    tokens = np.asarray(lengths, np.float64)

    def seen(span: int | None) -> float:
        """Returns how many tokens are compared with each, summed over all rows."""
        most = tokens if span is None else np.minimum(tokens, span)
        return float((most * tokens - most**2 / 2).sum())

    pairs = sum(seen(spans[kind]) for kind in kinds if kind in spans)
    return 4 * heads * features * pairs / float(tokens.sum())


def read_speeds(folder: Path, device: str, kind: Kind) -> list[float]:
    """Returns the FLOP/s of a process in the last runs of this kind on the device."""

    def rows() -> Iterator[float]:
        for line in plain.read_bytes(folder / HISTORY).decode("utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError, ZeroDivisionError):
                row: Any = json.loads(line)
                ratio = float(row["parameters"]) / kind.parameters
                same = (row["device"], row["tuning"], row["precision"])
                if same != (device, kind.tuning, kind.precision):
                    continue
                if 1 / ALIKE <= ratio <= ALIKE and (speed := float(row["flops_per_second"])) > 0:
                    yield speed

    found: list[float] = []
    with suppress(OSError, ValueError):
        found = list(rows())
    return found[-KEPT_RUNS:]


def append_speed(folder: Path, device: str, kind: Kind, flops_per_second: float) -> None:
    """Adds a run to the history; does nothing if the folder cannot be written."""
    line = {"device": device, **vars(kind), "flops_per_second": flops_per_second}
    with suppress(OSError), plain.open_file(folder / HISTORY, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
