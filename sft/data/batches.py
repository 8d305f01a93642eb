"""Chooses the examples of a global batch, and cuts it into micro-batches.

Pure functions of (lengths, seed, step, number of ranks, token budget): no loader, no state. An
epoch is a permutation of the example ids drawn from (seed, epoch); each step takes its next N ids.
The cut changes speed and memory only, so it may differ between runs that must give the same result.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np

Layout = Literal["padded", "packed"]
T = TypeVar("T")
MicroBatch = list[int]  # example ids; empty if a rank only has to join the collectives


@dataclass(frozen=True)
class Budget:
    """What one micro-batch may hold, and how it is laid out: speed and memory, never the result."""

    max_tokens: int  # of one process, padding included; a longer example gets its own micro-batch
    layout: Layout
    micro_batch_cost: int | None = None  # overhead of one micro-batch, in tokens; None: ignore
    max_rows: int | None = None  # maximum number of examples
    shared_by: int = 1  # processes that compute a micro-batch together, each a part of its tokens

    def __str__(self) -> str:
        return f"{self.max_tokens} {self.layout}"


def steps_per_epoch(num_examples: int, global_batch: int) -> int:
    """Returns the optimizer steps of one epoch; the last may have a smaller batch."""
    return math.ceil(num_examples / global_batch)


@lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int | None, epoch: int) -> np.ndarray:
    if seed is None:
        return np.arange(num_examples)
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def global_batch_ids(
    num_examples: int, seed: int | None, step: int, global_batch: int
) -> list[int]:
    """Returns the example ids of optimizer step `step` (from 0).

    `seed=None` keeps the order of the data: a curriculum.
    """
    epoch, position = divmod(step, steps_per_epoch(num_examples, global_batch))
    start = position * global_batch
    return _epoch_order(num_examples, seed, epoch)[start : start + global_batch].tolist()


def num_tokens(lengths: Sequence[int], micro_batch: MicroBatch, layout: Layout) -> int:
    """Returns the positions that the model computes for a micro-batch, padding included."""
    if not micro_batch:
        return 0
    sizes = [lengths[i] for i in micro_batch]
    return len(sizes) * max(sizes) if layout == "padded" else sum(sizes)


def cut(
    ids: Sequence[int], lengths: Sequence[int], num_ranks: int, budget: Budget
) -> list[list[MicroBatch]]:
    """Cuts a global batch: `result[rank]` is that rank's list of micro-batches.

    Every id appears once, every rank has the same number of micro-batches, and their tokens are
    balanced. There are as few as the budget allows. If they are padded, there are more if this
    saves more padding than their `micro_batch_cost`. No micro-batch exceeds the budget, except one
    that is a single longer example. Ranks that share micro-batches get the same ones.
    """
    if (shared_by := budget.shared_by) > 1:
        whole = replace(budget, max_tokens=budget.max_tokens * shared_by, shared_by=1)
        groups = cut(ids, lengths, num_ranks // shared_by, whole)
        return [group for group in groups for _ in range(shared_by)]
    ordered = sorted(ids, key=lambda i: (-lengths[i], i))
    if budget.layout == "padded":
        return _cut_padded(ordered, lengths, num_ranks, budget)
    rows, most = budget.max_rows, len(ordered)
    if rows:
        most = math.ceil(len(ordered) / num_ranks / rows) * rows
    ranks = _balance(ordered, lengths.__getitem__, num_ranks, most)
    return _fill_up([_fill(rank, lengths, budget) for rank in ranks])


def _balance(
    items: Sequence[T], size_of: Callable[[T], int], num_ranks: int, most: int
) -> list[list[T]]:
    """Gives each item, largest first, to the rank with the least load and fewer than `most`."""
    ranks: list[list[T]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for item in sorted(items, key=lambda item: -size_of(item)):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < most), key=loads.__getitem__)
        ranks[rank].append(item)
        loads[rank] += size_of(item)
    return ranks


def _fill_up(ranks: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
    """Appends empty micro-batches until every rank has the same number."""
    most = max(map(len, ranks))
    return [rank + [[] for _ in range(most - len(rank))] for rank in ranks]


def _cut_padded(
    ordered: Sequence[int], lengths: Sequence[int], num_ranks: int, budget: Budget
) -> list[list[MicroBatch]]:
    """Cuts the sorted examples of all ranks into as few runs as the budget allows.

    If a micro-batch has a cost, returns the cut with the least time on the slowest rank.
    """
    few = _cut_evenly(ordered, lengths, num_ranks, budget, len(_fill(ordered, lengths, budget)))
    cost = budget.micro_batch_cost
    if cost is None:
        return few
    cheapest = _find_cheapest(ordered, lengths, budget, cost)
    more = _cut_evenly(ordered, lengths, num_ranks, budget, len(cheapest))
    return min(
        (few, more, _assign_to_ranks(cheapest, lengths, num_ranks)),
        key=lambda ranks: max(_total_cost(lengths, rank, cost) for rank in ranks),
    )


def _cut_evenly(
    ordered: Sequence[int],
    lengths: Sequence[int],
    num_ranks: int,
    budget: Budget,
    num_micro_batches: int,
) -> list[list[MicroBatch]]:
    """Cuts with the smallest budget that needs no more micro-batches: less padding, equal sizes."""
    most = math.ceil(num_micro_batches / num_ranks) * num_ranks

    def runs(size: int) -> list[MicroBatch]:
        return _fill(ordered, lengths, replace(budget, max_tokens=size))

    sizes = range(budget.max_tokens)
    smallest = bisect_left(sizes, True, key=lambda size: len(runs(size)) <= most)
    return _assign_to_ranks(runs(smallest), lengths, num_ranks)


def _assign_to_ranks(
    runs: list[MicroBatch], lengths: Sequence[int], num_ranks: int
) -> list[list[MicroBatch]]:
    most = math.ceil(len(runs) / num_ranks)
    return _fill_up(_balance(runs, lambda run: num_tokens(lengths, run, "padded"), num_ranks, most))


def _find_cheapest(
    ordered: Sequence[int], lengths: Sequence[int], budget: Budget, cost: int
) -> list[MicroBatch]:
    """Tries the budget and smaller and smaller ones, and returns the runs with the least cost."""
    runs = best = _fill(ordered, lengths, budget)
    size, least = budget.max_tokens, _total_cost(lengths, best, cost)
    while len(runs) < len(ordered) and size > 1:
        size = size * 3 // 4
        runs = _fill(ordered, lengths, replace(budget, max_tokens=size))
        if (mine := _total_cost(lengths, runs, cost)) < least:
            best, least = runs, mine
    return best


def _total_cost(lengths: Sequence[int], runs: list[MicroBatch], micro_batch_cost: int) -> int:
    return sum(num_tokens(lengths, run, "padded") + micro_batch_cost for run in runs)


def _fill(ids: Sequence[int], lengths: Sequence[int], budget: Budget) -> list[MicroBatch]:
    """Returns micro-batches under the budget, from ids sorted from the longest example on."""
    result: list[MicroBatch] = []
    free = 0  # tokens that the last micro-batch can still take
    for i in ids:
        # Padded rows are as long as the first, which is the longest.
        size = lengths[result[-1][0]] if result and budget.layout == "padded" else lengths[i]
        if not result or size > free or len(result[-1]) == budget.max_rows:
            result.append([])
            size, free = lengths[i], budget.max_tokens
        result[-1].append(i)
        free -= size
    return result
