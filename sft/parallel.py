"""How the processes of a run share its model: copies (DDP), shards (FSDP2), or ZeRO of DeepSpeed.

Each way is a class with the same few methods, and whatever the way, the gradient is the sum over
ranks, the norm is that of the whole gradient, and the state of the optimizer is told and set as
slices of flat parameters, so that a checkpoint of one number of processes, or of one engine, loads
on another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn

from sft.config import ConfigError, Train
from sft.processes import resolve_precision
from sft.recovery import Waits

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """What this rank keeps of the optimizer's state of one parameter."""

    name: str
    """of the parameter"""
    start: int
    """first element of the flat parameter that is kept here"""
    state: Tensors
    """per key of the optimizer: the live tensor, flat where it is a slice"""


def build_optimizer(train: Train, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW of PyTorch or bitsandbytes; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    arguments: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, **arguments, fused=True)
    from bitsandbytes import optim

    classes = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return classes[train.optimizer](groups, **arguments)


def share(model: nn.Module, train: Train, accelerator: Accelerator) -> Replicated:
    """`model` and its optimizer, shared as `train.engine` says; one process shares nothing."""
    if train.engine == "deepspeed":
        return Zero(model, train, accelerator)
    if train.engine == "fsdp" and accelerator.num_processes > 1:
        return Sharded(model, train, accelerator)
    return Replicated(model, train, accelerator)


def is_split(model: nn.Module) -> bool:
    """Whether a rank holds only parts of the weights (FSDP2, ZeRO-3): forwards are collective."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


def whole(parameter: Any) -> torch.Tensor:
    """A parameter, of which a rank may have a part only, on every rank. Collective where it is
    split."""
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


class Replicated:
    """A whole copy on every rank: one process, or DDP."""

    waits: Waits
    """The passes in which ranks wait for each other, or which cannot be done again."""
    loss_scale = 1.0
    """By which a loss must be multiplied for gradients to be sums over ranks."""

    def __init__(self, model: nn.Module, train: Train, accelerator: Accelerator):
        self.plain, self.accelerator = model, accelerator
        self.max_grad_norm = train.max_grad_norm or math.inf
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer
        self._wrap(train)
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _wrap(self, train: Train) -> None:
        self.waits = "last backward" if self.accelerator.num_processes > 1 else "never"
        self.model, self.optimizer = self.accelerator.prepare(
            self.plain, build_optimizer(train, self.plain)
        )
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.register_comm_hook(None, _sum_gradients)
        elif self.accelerator.num_processes > 1:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes, but the model was not wrapped for "
                "them: they would train independent copies. Launch with "
                "configs/accelerate/ddp.yaml or torchrun."
            )

    # -- a step

    def begin(self) -> None:
        """Before the first pass of a step. Collective."""
        self.drop()
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.reducer._rebuild_buckets()  # not in a pass that may be given up

    def alone(self) -> AbstractContextManager[Any]:
        """Forward and backward passes in it exchange no gradients."""
        if self.accelerator.num_processes == 1:
            return nullcontext()
        return self.accelerator.no_sync(self.model)

    def exchange(self, last: bool) -> None:
        """Before a backward pass: gradients are exchanged between ranks in the last one of a step.

        DDP would arm itself for that in the forward pass, and an attempt that is given up behind it
        would exchange in some later pass; so every forward pass is one without, and DDP is armed
        here, once all ranks are sure to go on.
        """
        if last and isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.reducer.prepare_for_backward([])

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self) -> float:
        """Norm of the whole gradient, which is scaled down to `train.max_grad_norm`."""
        for parameter in self.names.values():
            if parameter.grad is None:  # no example reached it; where ranks reduce, it is 0, too
                parameter.grad = torch.zeros_like(parameter)
        norm: Any = nn.utils.clip_grad_norm_(list(self.names.values()), self.max_grad_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def update(self) -> None:
        self.optimizer.step()

    def drop(self) -> None:
        """Forgets all gradients."""
        self.optimizer.zero_grad()

    # -- state

    def weights(self) -> Tensors:
        """Trained parameters and saved buffers, whole, by name; on the main process. Collective."""
        found = dict(_saved_buffers(self.plain))
        for name, parameter in self.names.items():
            if (whole := self._whole(parameter)) is not None:
                found[name] = whole
        return found

    def _whole(self, parameter: Any) -> torch.Tensor | None:
        return parameter.detach()

    def held(self) -> Iterator[torch.Tensor]:
        """What this rank has of the trained weights."""
        yield from self.names.values()

    def put(self, name: str, value: torch.Tensor) -> None:
        """Sets a trained parameter."""
        self.names[name].data.copy_(value)

    @property
    def num_updates(self) -> int:
        """Updates that the optimizer has made, all parameters together."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return max((int(values["step"]) for values in inner.state.values()), default=0)

    def pieces(self) -> Iterator[Piece]:
        """The optimizer's state on this rank; on the main process alone where all have it."""
        if self.accelerator.is_main_process:
            for name, parameter in self.names.items():
                yield Piece(name, 0, _tensors(self._state(parameter)))

    def _state(self, parameter: torch.Tensor) -> dict[str, Any]:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner.state.get(parameter, {})

    def restore(self, num_updates: int, read: Any) -> None:
        """Sets the optimizer's state. `read(name, start, number)` gives a parameter's tensors by
        key: a flat slice, or (`number` None) as they were saved."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        inner.state.clear()
        if not num_updates:
            return
        is_torch = isinstance(inner, torch.optim.AdamW)
        known = {id(p): name for name, p in self.names.items()}
        order = [known[id(p)] for group in inner.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for index, name in enumerate(order):
            state[index] = dict(read(name, 0, None))
            if is_torch:
                shape = self.names[name].shape
                state[index] = {key: value.view(shape) for key, value in state[index].items()}
            state[index]["step"] = torch.tensor(float(num_updates)) if is_torch else num_updates
        groups = inner.state_dict()["param_groups"]
        inner.load_state_dict({"state": state, "param_groups": groups})


def _sum_gradients(_, bucket):
    """Gradients summed over ranks; DDP's own mean rounds its 1 / world to fp32 on the way."""
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".removeprefix("."), buffer


def _tensors(state: dict[str, Any]) -> Tensors:
    """Without the step count, and the mapping into which bitsandbytes wraps its tensors."""
    found: Tensors = {}
    for key, value in state.items():
        found |= _tensors(value) if isinstance(value, dict) else {key: value}
    return {key: value for key, value in found.items() if key != "step"}


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
        yield from (_slice(parameter)[0] for parameter in self.names.values())

    def put(self, name: str, value: torch.Tensor) -> None:
        local, start = _slice(self.names[name])
        local.copy_(value.flatten()[start : start + local.numel()])

    def pieces(self) -> Iterator[Piece]:
        for name, parameter in self.names.items():
            _, start = _slice(parameter)
            state = _tensors(self._state(parameter))
            yield Piece(name, start, {key: _slice(value)[0] for key, value in state.items()})

    def restore(self, num_updates: int, read: Any) -> None:
        self.optimizer.state.clear()
        if not num_updates:
            return
        for parameter in self.names.values():
            step = torch.tensor(float(num_updates), device=parameter.device)
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": step, **moments}
        _fill(self.pieces(), read)


def autocast(model: nn.Module, device: str, train: Train) -> None:
    """Computes in the precision of the run and gives fp32, as Accelerate's `prepare` makes it.

    Without autocast's cache of weights: it would keep a copy of each layer that was gathered.
    """
    if resolve_precision(train)[0] == "bf16":
        cast = torch.autocast(device, torch.bfloat16, cache_enabled=False)
        model.forward = convert_outputs_to_fp32(cast(model.forward))


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the list of modules that holds the most parameters."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return list(max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=()))


def _slice(value: Any) -> tuple[torch.Tensor, int]:
    """This rank's elements of a DTensor, flat, and where they start in the flat whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    start = offset[0] * math.prod(value.shape[1:]) if math.prod(shape) else 0
    return value.detach().to_local().flatten(), start


def _fill(pieces: Iterator[Piece], read: Any) -> None:
    for piece in pieces:
        if number := max((tensor.numel() for tensor in piece.state.values()), default=0):
            found = read(piece.name, piece.start, number)
            for key, tensor in piece.state.items():
                tensor.copy_(found[key])


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
        _fill(self.pieces(), read)
