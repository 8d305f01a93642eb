"""What the engine needs of a task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sft.data import batches

Batch = Any


class Trainable(Protocol):
    """A model, its examples and a loss. Ids are positions in `lengths`."""

    model: nn.Module
    budget: batches.Budget
    """How micro-batches are cut: the only copy, which the engine lowers where memory runs out."""
    needs_global_batch: bool
    """Whether the loss depends on the whole global batch instead of being a sum over examples."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each training example."""

    def collate(self, ids: list[int]) -> Batch:
        """Returns a micro-batch on the device; of no ids, one without supervised items."""

    def num_supervised(self, batch: Batch) -> float:
        """Returns the number of items that the loss is a sum over, or the sum of their weights."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the *sum* of the loss over the supervised items, and sums to be reported."""

    def summarise(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """Returns what `loss` needs of each example, (examples, ...), without gradients."""

    def set_global_batch(
        self, ids: list[int], summaries: torch.Tensor | None, supervised: float
    ) -> None:
        """Receives the summaries of a global batch, on every rank alike, before its passes.

        `supervised`: its number of items. `summaries` is None if the batch is not cut, so that
        `loss` sees all of it.
        """

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns held-out metrics, computed by all processes together."""

    def eval_loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns what `loss` returns, for held-out data and the model as it will be used."""

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes what a user loads: model or adapter in its library's format. Main process only.

        `weights`: the trained weights of the model and its buffers, whole, by name.
        """

    def read(self, folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields all trained weights that `save` wrote, by their name in `model`.

        Raises CheckpointError if one is missing or has another shape.
        """

    def identity(self) -> dict[str, str]:
        """Returns what must not change between a checkpoint and the run that resumes it."""

    def name_examples(self, ids: list[int]) -> str:
        """Returns where these examples come from, for messages."""
