"""What goes wrong in a step and can be mended: memory that runs out, numbers that are not finite.

All ranks must do the same about it. What one rank met is therefore agreed upon before the next pass
in which ranks wait for each other; `Waits` says which passes those are:

    never          one process: every pass can be done again
    last backward  DDP: gradients are exchanged in the last backward pass of a step only, all that
                   comes before it can be done again
    backward       ZeRO-1 and 2: gradients are reduced in every backward pass, which cannot be done
                   again; the forward passes between them can
    forward        FSDP2 and ZeRO-3: weights are gathered in forward passes, too. What a rank meets
                   behind its forward pass (the loss) can be done again, nothing else can

Where a rank runs out of memory in a pass in which others wait for it, or in the update, it ends
with OutOfMemory at once: no half-exchanged gradient is ever used, and nobody waits for a rank that
has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from sft.data import batches
from sft.data.batches import Budget, MicroBatch
from sft.runtime.oom import shortage

Waits = Literal["never", "last backward", "backward", "forward"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shortage:
    """Memory ran out in these examples."""

    reason: str  # what the allocator said, its first line
    ids: list[int]


class Watch:
    """Of one attempt at a step: from the first shortage on, this rank does nothing more."""

    def __init__(self) -> None:
        self.met: Shortage | None = None

    def call(self, ids: list[int], action: Callable[..., Result], *args: Any) -> Result | None:
        """What `action` returns; None once memory has run out."""
        if self.met is None:
            try:
                return action(*args)
            except Exception as error:
                if (said := shortage(error)) is None:
                    raise
                self.met = Shortage(said, ids)  # not the error: its frames hold the tensors
        return None


def halved(budget: Budget, least: int) -> Budget:
    """Half of it, in tokens (at least so many) and in rows."""
    rows = budget.max_rows and max(1, budget.max_rows // 2)
    return replace(budget, max_tokens=max(least, budget.max_tokens // 2), max_rows=rows)


def smaller(
    budget: Budget, cuts: Sequence[list[MicroBatch]], lengths: Sequence[int]
) -> Budget | None:
    """Half of what the largest micro-batch of these cuts holds; None if each is one example."""
    several = [m for rank in cuts for m in rank if len(m) > 1]
    if not several:
        return None
    held = max(batches.num_tokens(lengths, m, budget.layout) for m in several)
    return halved(replace(budget, max_tokens=min(held, budget.max_tokens)), 1)
