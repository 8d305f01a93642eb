"""Recovery from an out-of-memory error within a step.

All ranks must react in the same way. So before each pass in which ranks wait for each other, they
agree on whether any of them ran out of memory. `Waits` says which passes these are:

    never          one process: every pass can be repeated
    last backward  DDP: gradients are exchanged only in the last backward pass of a step; every pass
                   before it can be repeated
    backward       ZeRO-1 and 2: every backward pass reduces gradients and cannot be repeated; the
                   forward passes between them can
    forward        FSDP2 and ZeRO-3: forward passes gather weights, too. Only what follows a forward
                   pass (the loss) can be repeated

A rank that runs out of memory in a pass in which others wait for it, or in the update, raises
OutOfMemory at once. So no half-exchanged gradient is used, and no rank waits for an ended one.
"""

from __future__ import annotations

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
    """An out-of-memory error, and the examples that were processed."""

    reason: str  # the first line of the allocator's message
    ids: list[int]


@dataclass(frozen=True)
class AccumulatedStep:
    """A global batch after its backward passes and before the update."""

    ids: list[int]
    supervised: float  # number of items over all ranks
    totals: dict[str, float]  # sums over them: the loss, and what the task reports
    broken: list[int]  # ids of micro-batches whose loss is not finite


class OomGuard:
    """Runs the passes of one attempt at a step; after an out-of-memory error it runs no more."""

    def __init__(self) -> None:
        self.oom: Oom | None = None

    def call(self, ids: list[int], action: Callable[..., Result], *args: Any) -> Result | None:
        """Returns the result of `action`; None once memory has run out."""
        if self.oom is None:
            try:
                return action(*args)
            except Exception as error:
                if (reason := oom_message(error)) is None:
                    raise
                self.oom = Oom(reason, ids)  # not the error: its frames hold the tensors
        return None


def halve_budget(budget: Budget, least: int) -> Budget:
    """Returns half the budget in tokens, but at least `least`, and in rows."""
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
    return halve_budget(replace(budget, max_tokens=min(largest, budget.max_tokens)), 1)
