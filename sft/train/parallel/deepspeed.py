"""DeepSpeed's ZeRO stages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sft.config.schema import Train
from sft.models.layers import whole
from sft.runtime.checkpoint import Piece
from sft.train.optimizer import build_optimizer
from sft.train.parallel.ddp import Replicated, _tensors, autocast
from sft.train.parallel.slices import fill_slices


class Zero(Replicated):
    """DeepSpeed: ZeRO-1 and 2 keep slices of the optimizer's state, 3 of the weights, too."""

    def _wrap(self, train: Train) -> None:
        # Not DeepSpeed's own autocast, which rounds gradients and gathered weights to bf16.
        autocast(self.plain, self.accelerator.device.type, train)
        own = build_optimizer(train, self.plain)
        self.engine: Any
        self.engine, self.optimizer = self.accelerator.prepare(self.plain, own)
        self.model, self.zero = self.engine, self.engine.optimizer
        self.loss_scale = float(self.accelerator.num_processes)  # DeepSpeed averages
        self.split = self.engine.zero_optimization_stage() == 3
        self.waits = "forward" if self.split else "backward"

    def alone(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def exchange(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def clip(self) -> float:
        """Norm of the whole gradient; DeepSpeed clips in its own step."""
        norms = self.zero._get_norm_groups() if self.split else [self.zero.scaled_global_norm()]
        if any(float(norm) < 0 for norm in norms):  # how it tells what is not finite
            return math.inf
        return math.hypot(*map(float, norms))

    def update(self) -> None:
        self.engine.step()

    def drop(self) -> None:
        """Also what DeepSpeed has accumulated, which else only its step clears."""
        self.zero.zero_grad()
        for kept in ("averaged_gradients", "all_grad_tensors"):
            getattr(self.zero, kept, {}).clear()
        if not self.split:  # else zero_grad does it
            self.zero.micro_step_id = -1

    # -- state

    def _whole(self, parameter: Any) -> torch.Tensor | None:
        if not self.split:
            return parameter.detach()
        found = whole(parameter)
        return found.cpu() if self.accelerator.is_main_process else None

    def held(self) -> Iterator[torch.Tensor]:
        if not self.split:
            yield from self.names.values()
        for name, parameter in self.names.items():
            yield from (weight for _, weight in self._slices(name, parameter))

    def put(self, name: str, value: torch.Tensor) -> None:
        parameter: Any = self.names[name]
        if parameter.shape == value.shape:  # else it is split, and empty here
            parameter.data.copy_(value)
        for piece, weight in self._slices(name, parameter):
            part = value.flatten()[piece.start : piece.start + weight.numel()]
            weight.copy_(part)
            if self.split:  # what is gathered lies beside what is updated
                parameter.ds_tensor.data[: len(part)].copy_(part)

    def pieces(self) -> Iterator[Piece]:
        for name, parameter in self.names.items():
            for piece, _ in self._slices(name, parameter):
                yield piece

    def _slices(self, name: str, parameter: Any) -> Iterator[tuple[Piece, torch.Tensor]]:
        """This rank's piece of a parameter, if it has one, and that of its fp32 weights."""
        if self.split:
            group, first, number = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.accelerator.process_index * number
            number = min(number, parameter.ds_numel - start)  # the last partition is padded
        elif parameter._hp_mapping is not None:
            group = parameter._hp_mapping.param_group_index
            here, there = (
                parameter._hp_mapping.hp_fragment_address,
                parameter._hp_mapping.lp_fragment_address,
            )
            first, number, start = here.start, here.numel, there.start
        else:
            number = 0
        if number > 0:
            flat = self._partitions[group]
            state = _tensors(self._base.state.get(flat, {}))
            parts = {key: value.narrow(0, first, number) for key, value in state.items()}
            yield Piece(name, start, parts), flat.data.narrow(0, first, number)

    @property
    def _base(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    @property
    def _partitions(self) -> list[torch.Tensor]:
        """This rank's trained weights in fp32, a flat tensor for each group of parameters."""
        name = "fp32_partitioned_groups_flat" if self.split else "single_partition_of_fp32_groups"
        return getattr(self.zero, name)

    @property
    def num_updates(self) -> int:
        return max((int(values["step"]) for values in self._base.state.values()), default=0)

    def restore(self, num_updates: int, read: Any) -> None:
        self._base.state.clear()
        if not num_updates:
            return
        for partition in self._partitions:
            step = torch.tensor(float(num_updates), device=partition.device)
            moments = {key: torch.zeros_like(partition) for key in ("exp_avg", "exp_avg_sq")}
            self._base.state[partition] = {"step": step, **moments}
        fill_slices(self.pieces(), read)
