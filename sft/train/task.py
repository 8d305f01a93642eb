"""The protocol of a task that the engine trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sft.data import batches
from sft.models.weights import Weights
from sft.runtime.tensor_file import TensorFile

Batch = Any
Paired = Callable[[str, np.ndarray, np.ndarray], tuple[float, float]]
"""Returns the 95 % interval of the improvement in a metric from one evaluation to another one."""


class Trainable(Protocol):
    """A model, its examples and a loss. Ids are positions in `lengths`."""

    model: nn.Module
    budget: batches.Budget
    """How micro-batches are cut. The engine lowers it if memory runs out; nobody else keeps it."""
    needs_global_batch: bool
    """Whether the loss depends on the whole global batch instead of being a sum over examples."""

    @property
    def held_out_sha256(self) -> str:
        """Returns the digest of the held-out examples; scores of others are not compared."""

    @property
    def lengths(self) -> Sequence[int]:
        """Returns the number of tokens of each training example."""

    def collate(self, ids: list[int]) -> Batch:
        """Returns a micro-batch on the device; without ids, one without supervised items."""

    def num_supervised(self, batch: Batch) -> float:
        """Returns the number of items that the loss sums over, or the sum of their weights."""

    def begin_step(self, step: int, factor: float) -> None:
        """Receives the number of the step and the factor that it multiplies losses by.

        Noise depends on the step. A loss that computes gradients in its forward pass multiplies
        them by the factor, so that they do not vanish in fp16.
        """

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the *sum* of the loss over the supervised items, and further sums to report."""

    def summarise(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """Returns the representations (examples, ...) that `loss` compares, without gradients."""

    def set_global_batch(
        self, ids: list[int], summaries: torch.Tensor | None, supervised: float
    ) -> None:
        """Receives the summaries of a global batch before its passes, the same on every rank.

        `supervised`: the number of its supervised items. `summaries` is None if the batch is not
        cut: then `loss` gets the whole batch at once.
        """

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns held-out metrics, computed by all processes together."""

    def score_answers(self, model: nn.Module, step: int) -> dict[str, float]:
        """Returns scores of held-out answers of the model after `step`. Collective."""

    def rows_of(self, metric: str) -> np.ndarray:
        """Returns (examples, statistics) of a metric in the last evaluation, equal on all ranks."""

    def improvement(self, metric: str, before: np.ndarray, now: np.ndarray) -> tuple[float, float]:
        """Returns the 95 % interval of the improvement from one evaluation's rows to another's."""

    def eval_loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the same values as `loss`, for the model as it is used and held-out examples."""

    def save(self, folder: Path, weights: Weights) -> list[TensorFile]:
        """Writes the model or adapter in the format of its library. Collective.

        `weights`: the trained weights and buffers of the model by name. Returns the files of
        tensors that this rank has written, or will have once they are finished.
        """

    def read(self, folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields all trained weights that `save` wrote, by their name in `model`.

        Raises CheckpointError if one is missing or has another shape.
        """

    def identity(self) -> dict[str, str]:
        """Returns the values that a checkpoint and the run that resumes it must share."""

    def name_examples(self, ids: list[int]) -> str:
        """Returns the origin of these examples for messages."""
