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
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn

from sft.config.schema import Train
from sft.errors import ConfigError
from sft.runtime.checkpoint import Piece, Tensors
from sft.runtime.precision import resolve_precision
from sft.train.optimizer import build_optimizer
from sft.train.recovery import Waits


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


def autocast(model: nn.Module, device: str, train: Train) -> None:
    """Computes in the precision of the run and gives fp32, as Accelerate's `prepare` makes it.

    Without autocast's cache of weights: it would keep a copy of each layer that was gathered.
    """
    if resolve_precision(train)[0] == "bf16":
        cast = torch.autocast(device, torch.bfloat16, cache_enabled=False)
        model.forward = convert_outputs_to_fp32(cast(model.forward))
