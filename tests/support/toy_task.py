"""A task as small as one can be: a network of two layers learns a function of random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from sft.config.schema import Count, RunConfig, Section, Train
from sft.tasks.base import Task, Workload

FEATURES, HELD_OUT = 4, 16


class Toy(Section):
    num_rows: Count = 64
    """Rows to train on."""
    width: Count = 8
    """Units of the hidden layer."""


class ToyConfig(RunConfig):
    task: ClassVar[str] = "toy"
    toy: Toy = Toy()
    train: Train


@dataclass
class Rows:
    inputs: torch.Tensor
    targets: torch.Tensor


class ToyTask(Task):
    model_sections = ("toy",)

    @classmethod
    def prepare(cls, config: ToyConfig, tick: Callable[[], None] = lambda: None) -> Rows:
        random = torch.Generator().manual_seed(0)
        inputs = torch.randn(config.toy.num_rows + HELD_OUT, FEATURES, generator=random)
        return Rows(inputs, inputs.sin().sum(-1))

    @classmethod
    def workload(cls, config: ToyConfig, prepared: Rows | None = None) -> Workload:
        rows = config.toy.num_rows
        held_out = Workload([1] * HELD_OUT, np.ones(HELD_OUT, int))
        return Workload([1] * rows, np.ones(rows, int), held_out)

    @classmethod
    def build_model(cls, config: ToyConfig, precision: str, device: Any, weights=True, depth=None):
        torch.manual_seed(config.train.seed)
        width = config.toy.width
        return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, 1)).to(device)

    def collate(self, ids: list[int]) -> Rows:
        data, device = self.prepared, self.accelerator.device
        return Rows(data.inputs[ids].to(device), data.targets[ids].to(device))

    def collate_held_out(self, ids: list[int]) -> Rows:
        return self.collate([self.config.toy.num_rows + i for i in ids])

    def num_supervised(self, batch: Rows) -> float:
        return len(batch.targets)

    def loss(self, model: nn.Module, batch: Rows) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        errors = model(batch.inputs)[:, 0] - batch.targets
        return errors.square().sum(), {"absolute_error": errors.detach().abs().sum()}
