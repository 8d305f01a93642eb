"""The protocol between the engine and a task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sft.data import batches

Batch = Any


class Task(Protocol):
    """What is trained. Ids are positions in `lengths`."""

    model: nn.Module
    budget: batches.Budget  # how evaluation is cut; the engine lowers it where memory runs out
    surveys: bool  # the loss is not a sum over examples: it has to know of the whole global batch

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each training example."""

    def collate(self, ids: list[int]) -> Batch:
        """A micro-batch on the device; `ids` may be empty (then nothing in it is supervised)."""

    def num_supervised(self, batch: Batch) -> float: ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """*Sum* of the loss over the supervised items, and further sums to be reported per item."""

    def survey(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """What `loss` must know of each example, (examples, ...), in their order; no gradients."""

    def surveyed(self, ids: list[int], found: torch.Tensor | None, supervised: float) -> None:
        """Before the passes of a global batch: `survey` of all its examples, on every rank alike,
        and its number of items. None: it is not cut, so that `loss` sees all of it."""

    def scored(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As `loss`, of what is held out: of the model as it will be used."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out metrics, computed by all processes together."""

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes what a user loads: model or adapter in its library's format. Main process only.

        `weights`: those of the model that are trained, and its buffers, whole, by name.
        """

    def read(self, folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
        """All trained weights that `save` wrote, by their name in `model`; or CheckpointError."""

    def identity(self) -> dict[str, str]:
        """What must not change between a checkpoint and the run that resumes it."""

    def name_examples(self, ids: list[int]) -> str:
        """Where these examples come from, for messages."""
