"""FSDP2: shards of weights, gradients and optimizer state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sft.config.schema import Train
from sft.models.dtypes import DTYPES
from sft.models.layers import repeated_layers
from sft.models.rounded import Casts, find_casts
from sft.runtime.checkpoint import OptimizerShard
from sft.runtime.console import size
from sft.runtime.hardware import resolve_precision
from sft.runtime.processes import processes_here, shards_within
from sft.train.optimizer import build_optimizer
from sft.train.parallel.ddp import Place, ReadState, Split, autocast


class Sharded(Split):
    """A model trained by FSDP2: a rank keeps a slice of each parameter and gathers layers.

    With `train.shard_within`, groups of ranks have copies of the slices of each other (HSDP).
    Weights that autocast rounds are rounded before they are gathered, which gives the same bits.
    `train.keep_whole` says what stays whole on each rank until the last micro-batch of a step.
    """

    waits_in = "forward"
    is_split = True

    def _wrap(self, train: Train) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            FSDPModule,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        from sft.train.parallel.gathered import gather_rounded

        device, dtype = self.accelerator.device.type, DTYPES[resolve_precision(train)[0]]
        world = self.accelerator.num_processes
        within = shards_within(train, world, processes_here(world))
        sizes = {"copies": world // within, "shards": within} if within else {"shards": world}
        names = tuple(sizes)
        self.mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=names)
        for module in self.module.modules():  # bitsandbytes looks here if its weight is a DTensor
            if state := getattr(getattr(module, "weight", None), "quant_state", None):
                module.quant_state = state
        pieces = {n: p.piece for n, p in self.module.named_parameters() if hasattr(p, "piece")}
        found = find_casts(self.module, dtype, device) if dtype != torch.float32 else Casts()
        if found.problem:
            self.remark = _remark(self.module, found.problem)
        on_gpu = device != "cpu"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if train.offload else OffloadPolicy()
        exchange = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if self._rounds else None)
        layers = repeated_layers(self.module)
        self.keeps = train.keep_whole
        for module in [*layers, self.module]:
            # The backward pass begins with the last layer and with what is in no layer.
            stays = self.keeps == "all" or module is self.module or module is layers[-1]
            options: Any = {"mp_policy": exchange, "offload_policy": offload}
            fully_shard(module, mesh=self.mesh, reshard_after_forward=not stays, **options)
        self._split = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        for module in self._split:
            # Sums: 1 / world would round gradients, and our losses are shares of a sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # An expert without a token on this rank may have one on another; else slices mix up.
            module.set_reduce_scatter_unused_params(True)
        gather_rounded(self.module, found.rounded, dtype)
        _put_pieces(self.module, pieces, "cpu" if train.offload else device)
        autocast(self.module, device, train)
        self.model, self.optimizer = self.module, build_optimizer(train, self.module)

    def begin_step(self, step: int = 0) -> None:
        super().begin_step(step)
        self._reshard()

    def load_optimizer(self, num_updates: int, read: ReadState) -> None:
        super().load_optimizer(num_updates, read)
        self._reshard()

    def _reshard(self) -> None:
        """Frees weights that an evaluation has left whole, and that may have changed since."""
        for module in self._split:
            module.reshard()

    def prepare_backward(self, last: bool) -> None:
        super().prepare_backward(last)
        for module in self._split:
            module.set_requires_all_reduce(last, recurse=False)
            if self.keeps in ("gradients", "all"):
                module.set_requires_gradient_sync(last, recurse=False)
            if self.keeps == "all":
                module.set_reshard_after_backward(last, recurse=False)

    def optimizer_shards(self) -> Iterator[OptimizerShard]:
        if self.mesh.ndim == 1 or self.mesh.get_local_rank("copies") == 0:
            yield from super().optimizer_shards()

    def zero_grad(self) -> None:
        """Clears all gradients, including those that earlier micro-batches left whole."""
        from sft.train.parallel.gathered import drop_gradients

        super().zero_grad()
        drop_gradients(self.module)

    @staticmethod
    def _slice(tensor: Any) -> tuple[torch.Tensor, int]:
        return _local_slice(tensor)

    def _places(self, name: str) -> Iterator[Place]:
        parameter = self.trained[name]
        weight, start = _local_slice(parameter)
        yield Place(parameter, start, 0, weight.numel())

    def _cut(self, value: torch.Tensor, place: Place) -> torch.Tensor:
        return _local_slice(value)[0]


def _remark(model: nn.Module, problem: str) -> str:
    """Returns what it costs to gather all weights as they are stored."""
    wide = sum(p.nbytes for p in model.parameters() if p.dtype == torch.float32)
    return (
        f"FSDP2 gathers all fp32 weights ({size(wide)}) without rounding them, since {problem}. A "
        f"model whose weights are all rounded exchanges {size(wide / 2)} in each pass"
    )


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
