"""FSDP2: shards of weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sft.config.schema import Train
from sft.models.layers import repeated_layers, whole
from sft.runtime.checkpoint import Piece
from sft.train.optimizer import build_optimizer
from sft.train.parallel.ddp import Replicated, _tensors, autocast
from sft.train.parallel.slices import fill_slices, local_slice


class Sharded(Replicated):
    """FSDP2: every rank keeps a slice of each parameter, and gathers a layer at a time.

    Gradients are exchanged after each micro-batch: to keep them whole would take what sharding
    saves.
    """

    waits = "forward"

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
        for module in self.plain.modules():  # bitsandbytes looks here once its weight is a DTensor
            if state := getattr(getattr(module, "weight", None), "quant_state", None):
                module.quant_state = state
        offload = CPUOffloadPolicy(pin_memory=device != "cpu") if train.offload else OffloadPolicy()
        for module in [*repeated_layers(self.plain), self.plain]:
            fully_shard(module, mesh=mesh, offload_policy=offload)
        for module in self.plain.modules():
            if isinstance(module, FSDPModule):
                # Sums: 1 / world would round gradients, and our losses are shares of a sum.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        autocast(self.plain, device, train)
        self.model, self.optimizer = self.plain, build_optimizer(train, self.plain)

    def alone(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _whole(self, parameter: Any) -> torch.Tensor | None:
        found = whole(parameter)
        return found.cpu() if self.accelerator.is_main_process else None

    def held(self) -> Iterator[torch.Tensor]:
        yield from (local_slice(parameter)[0] for parameter in self.names.values())

    def put(self, name: str, value: torch.Tensor) -> None:
        local, start = local_slice(self.names[name])
        local.copy_(value.flatten()[start : start + local.numel()])

    def pieces(self) -> Iterator[Piece]:
        for name, parameter in self.names.items():
            _, start = local_slice(parameter)
            state = _tensors(self._state(parameter))
            yield Piece(name, start, {key: local_slice(value)[0] for key, value in state.items()})

    def restore(self, num_updates: int, read: Any) -> None:
        self.optimizer.state.clear()
        if not num_updates:
            return
        for parameter in self.names.values():
            step = torch.tensor(float(num_updates), device=parameter.device)
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": step, **moments}
        fill_slices(self.pieces(), read)
