"""Mixes files and replayed rows, and splits rows into training and held-out parts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

from sft.errors import DataError

HELD_OUT = re.compile(r"(?i)(^|[/._-])(test|dev|val|valid|validation|eval)([/._-]|$)")


def first_equal(digests: np.ndarray) -> np.ndarray:
    """Returns (n,): for each digest, the index of the first one that is equal."""
    _, first, number = np.unique(digests, return_index=True, return_inverse=True)
    return first[number]


def is_first(digests: np.ndarray) -> np.ndarray:
    """Returns (n,) bool: whether no earlier digest is equal."""
    return first_equal(digests) == np.arange(len(digests))


def mix(entries: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """Returns indices of rows, each as often as the weight of its entry says.

    `entries` (n,) has the number of the path that each row came from. A weight of 2 takes its rows
    twice. A weight of 0.5 takes half of them, chosen by (seed, entry, index in the entry) alone.
    """
    result = []
    for entry, weight in enumerate(weights):
        mine = np.flatnonzero(entries == entry)
        order = _draw_order(b"%d:%d:%d" % (seed, entry, n) for n in range(len(mine)))
        part = np.sort(order[: round(weight % 1 * len(mine))])
        result += [mine] * int(weight) + [mine[part]]
    return np.concatenate(result)


def add_share(rows: np.ndarray, added: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns `rows` with rows of `added` between them, which are `share` of the result.

    Each row of `added` is used equally often, but for one time; (seed, index) decide which.
    """
    wanted = max(1, round(share / (1 - share) * len(rows)))
    entries = np.zeros(len(added), int)
    chosen = added[mix(entries, [wanted / len(added)], seed)]
    # Evenly spread: with `train.shuffle: false` they stand in this order.
    places = (np.arange(len(chosen)) * len(rows)) // len(chosen)
    return np.insert(rows, places, chosen)


def split(digests: np.ndarray, eval_fraction: float, seed: int) -> np.ndarray:
    """Returns (n,) bool: which rows are held out, as a function of content and seed.

    Rows with identical content stay together, so that no held-out row is trained on. The held-out
    part can therefore be smaller than requested. Raises DataError if no two rows differ.
    """
    held = np.zeros(len(digests), bool)
    if not eval_fraction:
        return held
    group = first_equal(digests)
    sizes = np.bincount(group)
    first = np.flatnonzero(sizes)  # row of each content
    if len(first) < 2:
        raise DataError(
            f"holding out data.eval_fraction={eval_fraction:g} needs two different rows, found "
            f"{len(first)}; give data.eval_path, or more rows"
        )
    drawn = first[_draw_order(b"%d:" % seed + bytes(digest) for digest in digests[first])]
    wanted = min(round(eval_fraction * len(digests)), len(digests) - 1)
    num_held = 0
    for row in drawn:
        if num_held == wanted:
            break
        if num_held + sizes[row] <= wanted:
            held[row], num_held = True, num_held + sizes[row]
    if not num_held:
        held[drawn[np.argmin(sizes[drawn])]] = True
    return held[group]


def _draw_order(texts: Iterable[bytes]) -> np.ndarray:
    """Returns the indices of the texts in a random order that depends on them alone."""
    hashed = (int.from_bytes(hashlib.sha256(text).digest()[:8]) for text in texts)
    return np.argsort(np.fromiter(hashed, np.uint64), kind="stable")
