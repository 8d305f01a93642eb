"""Recovery from an out-of-memory error within a step.

All ranks must react in the same way. So before each pass in which ranks wait for each other, they
agree on whether any of them ran out of memory. `Waits` says which passes these are:

    never          one process: every pass can be repeated
    last backward  DDP exchanges gradients only in the last backward pass of a step: every pass
                   before it can be repeated; so it is where that pass updates the weights
    backward       ZeRO-1 and 2 reduce gradients in every backward pass: only the forward passes
                   between them can be repeated
    forward        FSDP2 and ZeRO-3 also gather weights in forward passes: only the loss after a
                   forward pass can be repeated

If memory runs out in a pass in which other ranks wait, or in the update, the rank raises
OutOfMemory at once. So no half-exchanged gradient is used, and no rank waits for one that ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from sft.data import batches
from sft.data.batches import Budget, MicroBatch
from sft.errors import oom_message

Waits = Literal["never", "last backward", "backward", "forward"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Oom:
    """An out-of-memory error, and the examples that were being processed."""

    reason: str  # the first line of the allocator's message
    ids: list[int]


@dataclass(frozen=True)
class AccumulatedStep:
    """A global batch after its backward passes and before the update."""

    ids: list[int]
    supervised: float  # number of items over all ranks
    totals: dict[str, float]  # sums over these items: the loss, and what the task reports
    not_finite: list[int]  # examples of micro-batches whose loss is not finite


class OomGuard:
    """Runs the passes of a step, and none after an out-of-memory error."""

    def __init__(self) -> None:
        self.oom: Oom | None = None

    def call(self, ids: list[int], action: Callable[..., Result], *args: Any) -> Result | None:
        """Returns the result of `action`, or None if memory runs out in it or did before."""
        if self.oom is None:
            try:
                return action(*args)
            except Exception as error:
                if (reason := oom_message(error)) is None:
                    raise
                self.oom = Oom(reason, ids)  # without the error, whose frames hold tensors
        return None


def halve_budget(budget: Budget, least: int) -> Budget:
    """Returns the budget with half the tokens, but at least `least`, and half the rows."""
    rows = budget.max_rows and max(1, budget.max_rows // 2)
    return replace(budget, max_tokens=max(least, budget.max_tokens // 2), max_rows=rows)


def smaller_budget(
    budget: Budget, cuts: Sequence[list[MicroBatch]], lengths: Sequence[int]
) -> Budget | None:
    """Returns half of what the largest micro-batch of `cuts` holds; None if each is one example."""
    several = [m for rank in cuts for m in rank if len(m) > 1]
    if not several:
        return None
    largest = max(batches.num_tokens(lengths, m, budget.layout) for m in several)
    largest = math.ceil(largest / budget.shared_by)
    return halve_budget(replace(budget, max_tokens=min(largest, budget.max_tokens)), 1)
