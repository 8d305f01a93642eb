"""FSDP2: shards of weights, gradients and optimizer state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sft.config.schema import Train
from sft.models.layers import repeated_layers
from sft.train.optimizer import build_optimizer
from sft.train.parallel.ddp import Place, Split, autocast


class Sharded(Split):
    """A model trained by FSDP2: a rank keeps a slice of each parameter and gathers layers.

    Gradients are exchanged after each micro-batch: to keep them whole would take the memory that
    sharding saves.
    """

    waits_in = "forward"
    is_split = True

    def _wrap(self, train: Train) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            FSDPModule,
            OffloadPolicy,
            fully_shard,
        )

        device = self.accelerator.device.type
        mesh = init_device_mesh(device, (self.accelerator.num_processes,))
        for module in self.module.modules():  # bitsandbytes looks here if its weight is a DTensor
            if state := getattr(getattr(module, "weight", None), "quant_state", None):
                module.quant_state = state
        pieces = {n: p.piece for n, p in self.module.named_parameters() if hasattr(p, "piece")}
        offload = CPUOffloadPolicy(pin_memory=device != "cpu") if train.offload else OffloadPolicy()
        for module in [*repeated_layers(self.module), self.module]:
            fully_shard(module, mesh=mesh, offload_policy=offload)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                # Sums: 1 / world would round gradients, and our losses are shares of a sum.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        _put_pieces(self.module, pieces, "cpu" if train.offload else device)
        autocast(self.module, device, train)
        self.model, self.optimizer = self.module, build_optimizer(train, self.module)

    @staticmethod
    def _slice(tensor: Any) -> tuple[torch.Tensor, int]:
        return _local_slice(tensor)

    def _places(self, name: str) -> Iterator[Place]:
        parameter = self.trained[name]
        weight, start = _local_slice(parameter)
        yield Place(parameter, start, 0, weight.numel())

    def _cut(self, value: torch.Tensor, place: Place) -> torch.Tensor:
        return _local_slice(value)[0]


def rows_of(shape: torch.Size, rank: int, world: int) -> tuple[int, int]:
    """Returns a rank's elements (first, end) of a flat parameter: FSDP2 gives it whole rows."""
    rows, size = math.ceil(shape[0] / world), math.prod(shape[1:])
    return min(rank * rows, shape[0]) * size, min((rank + 1) * rows, shape[0]) * size


def _put_pieces(model: nn.Module, pieces: Mapping[str, torch.Tensor], device: str) -> None:
    """Gives split parameters without storage the elements that this rank has (`models/cut`)."""
    if not pieces:
        return
    found = {id(p): pieces[name] for name, p in model.named_parameters() if name in pieces}

    def put(tensor: Any) -> Any:
        if id(tensor) not in found:
            return tensor
        local = found[id(tensor)].to(device).view(tensor.to_local().shape)
        return DTensor.from_local(
            local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    model._apply(put)


def _local_slice(value: Any) -> tuple[torch.Tensor, int]:
    """Returns this rank's elements of a DTensor, flat, and where they start in the flat whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    start = offset[0] * math.prod(value.shape[1:]) if math.prod(shape) else 0
    return value.detach().to_local().flatten(), start
