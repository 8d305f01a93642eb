"""The weights that a checkpoint holds, gathered one at a time where ranks keep parts of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sft.models.layers import full_tensor


class Weights:
    """Weights and buffers by name. `world` is the number of ranks that keep parts of them."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        rank: int = 0,
        world: int = 1,
        behind: bool = False,
    ):
        """Keeps the tensors. `behind`: files are written later, from copies."""
        self.tensors, self.rank, self.world, self.behind = tensors, rank, world, behind

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def empty(self) -> dict[str, torch.Tensor]:
        """Returns tensors of the whole shapes, without values."""
        shapes = {
            name: getattr(each, "ds_shape", each.shape) for name, each in self.tensors.items()
        }
        return {
            name: torch.empty(shape, dtype=self.tensors[name].dtype, device="meta")
            for name, shape in shapes.items()
        }

    @property
    def num_parameters(self) -> int:
        """Returns the number of elements of the weights; those of tied ones count once."""
        pairs = ((id(each), name) for name, each in self.tensors.items())
        names = {key: name for key, name in pairs if isinstance(self.tensors[name], nn.Parameter)}
        empty = self.empty()
        return sum(empty[name].numel() for name in names.values())

    def whole(self, name: str) -> torch.Tensor:
        """Returns a whole tensor. Collective if ranks keep parts of it."""
        return full_tensor(self.tensors[name])

    def all(self) -> dict[str, torch.Tensor]:
        """Returns all whole tensors on the main process, and nothing on others. Collective."""
        found: dict[str, Any] = {}
        for name in self.tensors:
            whole = self.whole(name)
            if self.is_main:
                found[name] = whole.cpu() if self.world > 1 else whole
        return found
