"""Trains a whole copy of the model on every rank (one process or DDP). Base of the other engines.

With each engine the gradient is the sum over ranks, and the norm is that of the whole gradient.
The optimizer's state is saved as slices of flat parameters, so a checkpoint loads on another
number of processes and on another engine.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sft.config.schema import Train
from sft.errors import ConfigError
from sft.models.dtypes import DTYPES
from sft.models.layers import persistent_buffers, weights_to_save
from sft.models.reach import may_leave_out
from sft.models.weights import Weights
from sft.runtime.checkpoint import OptimizerShard, SavedState
from sft.runtime.hardware import resolve_precision
from sft.train.optimizer import averages, build_optimizer
from sft.train.parallel.state import changes_of, decode, settings_of, split_state, take_blocks
from sft.train.recovery import Waits
from sft.train.updates import BackwardUpdates, make_updates

# read(parameter, start, number) -> the parameter's saved state. Of each flattened tensor it returns
# `number` elements from `start` on. If `number` is None, it returns the tensors as they were saved.
ReadState = Callable[[str, int, int | None], SavedState]
TRAINED = "trained"  # the key of trained weights where the model's file has averaged ones


class Place(NamedTuple):
    """The place of this rank's elements of a parameter, in a tensor that the optimizer updates."""

    tensor: torch.Tensor
    start: int
    """The first of the elements in the flat parameter."""
    first: int
    """The first of the elements in this rank's part of `tensor`, flat."""
    number: int | None
    """The number of elements; None: the tensor is the parameter."""


class Replicated:
    """A model trained by one process, or by DDP."""

    waits_in: Waits
    """The passes in which ranks wait for each other, or which cannot be repeated."""
    is_split = False
    """Whether each rank keeps only a part of the weights."""
    loss_factor = 1.0
    """The factor that losses are multiplied by, so that gradients are sums over ranks."""
    _sums_afterwards = False
    """Whether some parameters may get no gradient, so gradients are summed after the last pass.
    DDP itself would wait for each gradient."""
    _is_last = False
    num_updates = 0
    """The number of updates that the optimizer has made."""
    remark = ""
    """What the log should say about how the model is shared."""
    loss_scale = 1.0
    """The power of two that backward passes multiply gradients by (`train/loss_scale`)."""

    def __init__(self, model: nn.Module, train: Train, accelerator: Accelerator):
        self.module, self.accelerator = model, accelerator
        self.max_grad_norm = train.max_grad_norm or math.inf
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer
        self._rounds = train.reduce_dtype == "bf16"  # gradients, to exchange them
        self._wrap(train)
        groups = self._base_optimizer.param_groups
        self._begins_with_state = bool(self._base_optimizer.state)
        self._settings = [copy.deepcopy(settings_of(group)) for group in groups]
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.saved = weights_to_save(model)
        parts = self._base_optimizer, self.trained, self._slice
        self.updates = make_updates(train, accelerator, *parts)
        self.in_backward = self.updates if isinstance(self.updates, BackwardUpdates) else None
        if self.in_backward and self.waits_in == "never":
            self.waits_in = "last backward"  # which cannot be repeated

    def _wrap(self, train: Train) -> None:
        """Sets `model` and `optimizer`."""
        self.waits_in = "last backward" if self.accelerator.num_processes > 1 else "never"
        caches = keeps_weight_copies(train)
        if resolve_precision(train)[0] == "fp16":  # Accelerate refuses it on CPUs
            autocast(self.module, self.accelerator.device.type, train, cache=caches)
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=caches)
        self.model, self.optimizer = self.accelerator.prepare(
            self.module, build_optimizer(train, self.module)
        )
        if isinstance(self.model, DistributedDataParallel):
            self.model.register_comm_hook(self._rounds, _sum_gradients)
            self._sums_afterwards = may_leave_out(self.module)
        elif self.accelerator.num_processes > 1:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes, but the model was not wrapped for "
                "them: they would train independent copies. Launch with "
                "configs/accelerate/ddp.yaml or torchrun."
            )

    # -- a step

    def begin_step(self, step: int = 0) -> None:
        """Clears what an earlier step left, before the step after `step`. Collective."""
        self.zero_grad()
        if self.updates:
            self.updates.begin_step(step)
        if isinstance(self.model, DistributedDataParallel):
            # Rebuilding is collective. If a pass did it, ranks would wait for one that has
            # abandoned the pass.
            self.model.reducer._rebuild_buckets()

    def no_sync(self) -> AbstractContextManager[Any]:
        """Returns a context in which passes exchange no gradients."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def prepare_backward(self, last: bool) -> None:
        """Makes the backward pass that follows exchange gradients if it is the step's `last`.

        DDP itself decides this in the forward pass. If a step is abandoned after a forward pass,
        a later backward pass would then exchange gradients by mistake. So forward passes run in
        `no_sync`, and DDP is prepared here, when all ranks are sure to go on.
        """
        self._is_last = last
        if last and isinstance(self.model, DistributedDataParallel) and not self._sums_afterwards:
            self.model.reducer.prepare_for_backward([])

    def set_loss_scale(self, scale: float) -> None:
        """Sets the loss scale of the passes that follow; `clip` and `update` divide by it."""
        self.loss_scale = scale

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss; in the step's last pass, sums them over ranks."""
        if self.in_backward:
            self.in_backward.backward(loss, self._is_last)
            return
        (loss if self.loss_scale == 1 else loss * self.loss_scale).backward()
        if self._is_last and self._sums_afterwards:
            for parameter in self.trained.values():
                if parameter.grad is None:  # such as of an expert that got no token on this rank
                    parameter.grad = torch.zeros_like(parameter)
                sent = parameter.grad.bfloat16() if self._rounds else parameter.grad
                torch.distributed.all_reduce(sent)
                parameter.grad = sent.to(parameter.dtype)

    def clip(self) -> float:
        """Scales the gradient down to `train.max_grad_norm`, and returns its norm before that.

        The norm is that of the gradient that ranks have summed, so all of them return the same.
        """
        if self.in_backward:
            return self.in_backward.finish()
        for parameter in self.trained.values():
            if parameter.grad is None:  # no example used it; DDP sets 0, too
                parameter.grad = torch.zeros_like(parameter)
            elif self.loss_scale != 1:
                parameter.grad /= self.loss_scale
        if self.updates:
            return self.updates.clip(self.max_grad_norm)
        parameters = list(self.trained.values())
        norm: Any = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        found = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not found + 1e-6 < 0.999 * self.max_grad_norm:  # else it would multiply all by exactly 1
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return found

    def update(self) -> None:
        """Updates the weights from the gradient."""
        if self.updates:
            self.updates.apply_all()  # in the backward pass, it has used up the gradients
        else:
            self.optimizer.step()
        self.num_updates += 1

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives the model the weights that are evaluated and saved, if others are trained.

        Drops gradients, and restores the trained weights bit for bit.
        """
        if not averages(optimizer := self._base_optimizer):
            yield
            return
        self.zero_grad()
        kept = [weight.detach().clone() for weight in self._local_weights()]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            for weight, before in zip(self._local_weights(), kept, strict=True):
                weight.detach().copy_(before)

    # -- state

    @staticmethod
    def _slice(tensor: Any) -> tuple[torch.Tensor, int]:
        """Returns a view of this rank's elements, flat, and where they start in the flat whole."""
        return tensor.detach().view(-1), 0

    def weights(self, behind: bool = False) -> Weights:
        """Returns the parameters that are saved, and the persistent buffers.

        `behind`: files are written from copies, while training goes on.
        """
        tensors = {**dict(persistent_buffers(self.module)), **self.saved}
        world = self.accelerator.num_processes if self.is_split else 1
        return Weights(tensors, rank=self.accelerator.process_index, world=world, behind=behind)

    def checksums(self) -> list[int]:
        """Returns a checksum of this rank's part of each trained weight."""
        flat = (weight.detach().cpu().flatten() for weight in self._local_weights())
        return [zlib.crc32(each.view(torch.uint8).numpy().data) for each in flat]

    def _local_weights(self) -> Iterator[torch.Tensor]:
        """Yields this rank's part of the trained weights."""
        yield from self.trained.values()

    def set_weight(self, name: str, value: torch.Tensor) -> None:
        """Sets a trained parameter from its whole value."""
        self.trained[name].data.copy_(value)

    @property
    def _base_optimizer(self) -> Any:
        """Returns the optimizer without its wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def optimizer_shards(self) -> Iterator[OptimizerShard]:
        """Yields the optimizer's state that this rank saves: all of it on the main process."""
        if self.accelerator.is_main_process:
            yield from self._shards_of(self.trained)

    def _shards_of(self, names: Iterable[str]) -> Iterator[OptimizerShard]:
        """Yields this rank's part of the state of these parameters."""
        groups = self._groups()
        for name in names:
            for place in self._places(name):
                state = dict(self._base_optimizer.state.get(place.tensor, {}))
                blocks = take_blocks(state, self._per_value(place))
                by_element, whole, numbers = split_state(state, place.tensor)
                if averages(self._base_optimizer) and state:
                    by_element[TRAINED] = place.tensor.detach()  # the model's file has the averages
                cut = {key: self._cut(value, place) for key, value in by_element.items()}
                changed = changes_of(*groups.get(id(place.tensor), ({}, {})))
                yield OptimizerShard(name, place.start, cut, whole, numbers, changed)
                for each, values in blocks.items():
                    yield OptimizerShard(f"{name}@{each}", place.start // each, values)

    def _per_value(self, place: Place) -> dict[str, int]:
        """Returns how many elements share a value, of state that is kept in blocks (`packed`)."""
        optimizer = self._base_optimizer
        return optimizer.per_value(place.tensor) if hasattr(optimizer, "per_value") else {}

    def _groups(self) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
        """Returns the group of each tensor, by its id, with the settings that it was built with."""
        pairs = zip(self._base_optimizer.param_groups, self._settings, strict=True)
        return {id(tensor): pair for pair in pairs for tensor in pair[0]["params"]}

    def _places(self, name: str) -> Iterator[Place]:
        """Yields where this rank's elements of a parameter are."""
        yield Place(self.trained[name], 0, 0, None)

    def _cut(self, value: torch.Tensor, place: Place) -> torch.Tensor:
        """Returns the elements of a place, of a tensor of the shape of `place.tensor`."""
        return value

    def load_optimizer(self, num_updates: int, read: ReadState) -> None:
        """Sets the optimizer's state to the saved one that `read` returns."""
        optimizer = self._base_optimizer
        optimizer.state.clear()
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            for key in settings_of(group):
                del group[key]
            group.update(copy.deepcopy(settings))
        self.num_updates = num_updates
        groups = self._groups()
        for name in self.trained if num_updates or self._begins_with_state else ():
            for place in self._places(name):
                saved = read(name, place.start, place.number)
                group, _ = groups.get(id(place.tensor), (optimizer.defaults, {}))
                self._load_state(place, saved, group)
                for key, each in self._per_value(place).items() if place.number != 0 else ():
                    number = place.number and place.number // each
                    values = read(f"{name}@{each}", place.start // each, number).state[key]
                    optimizer.state[place.tensor][key] = values.to(place.tensor.device)
                for key, value in saved.group.items():
                    group[key] = decode(value, place.tensor.device)

    def _load_state(self, place: Place, saved: SavedState, group: dict[str, Any]) -> None:
        """Sets the state of a place; allocates it if another place of its tensor did not."""
        optimizer, device = self._base_optimizer, place.tensor.device
        state = optimizer.state[place.tensor]
        for key, value in saved.state.items():
            if key == TRAINED:
                weight = self._cut(place.tensor.detach(), place)
                weight.copy_(value.view(weight.shape))
                continue
            if place.number is None and value.numel() != place.tensor.numel():
                state[key] = value.to(device)  # of a checkpoint that does not say what is whole
                continue
            if key not in state:
                was_pure = value.dtype == torch.bfloat16 != place.tensor.dtype
                dtype = torch.float32 if was_pure else value.dtype
                state[key] = torch.zeros_like(place.tensor, dtype=dtype)
            part = self._cut(state[key], place)
            part.copy_(value.view(part.shape))
        for key, value in saved.whole.items():
            state[key] = value.to(device)
        numbers = saved.plain
        if numbers is None:  # as AdamW of torch and of bitsandbytes count
            is_torch = isinstance(optimizer, torch.optim.AdamW)
            numbers = {"step": ["float32", self.num_updates] if is_torch else self.num_updates}
        on_device = any(group.get(key) for key in ("fused", "capturable"))
        for key, value in numbers.items():
            state[key] = decode(value, device if on_device else "cpu")


class Split(Replicated):
    """Base of the engines whose ranks keep parts of weights or of the optimizer's state."""

    def _local_weights(self) -> Iterator[torch.Tensor]:
        for name in self.trained:
            yield from (self._cut(place.tensor, place) for place in self._places(name))

    def set_weight(self, name: str, value: torch.Tensor) -> None:
        for place in self._places(name):
            weight = self._cut(place.tensor, place)
            weight.copy_(value.flatten()[place.start : place.start + weight.numel()])

    def optimizer_shards(self) -> Iterator[OptimizerShard]:
        yield from self._shards_of(self.trained)


def _sum_gradients(rounds, bucket):
    """Sums gradients over ranks; DDP's own mean would round 1 / world to fp32.

    `rounds`: exchanges them in bf16.
    """
    gradients = bucket.buffer()
    sent = gradients.bfloat16() if rounds else gradients
    work = torch.distributed.all_reduce(sent, async_op=True)
    return work.get_future().then(lambda future: future.value()[0].to(gradients.dtype))


def keeps_weight_copies(train: Train) -> bool:
    """Returns whether autocast keeps its copies of weights until the forward pass ends.

    A layer uses a weight once in a pass, so this saves no work. Without checkpointing the backward
    pass needs the copies anyway. With checkpointing it makes them again, one layer at a time, and
    the copies of a whole model would only take memory. Offloaded copies are on the host.
    """
    return train.gradient_checkpointing in (False, "auto") and train.activation_offload is not True


def autocast(model: nn.Module, device: str, train: Train, cache: bool = False) -> None:
    """Makes `model` compute in the run's precision and return fp32, like Accelerate's `prepare`.

    `cache`: keep a copy of each weight until the pass ends. Engines that gather layers must not.
    """
    precision = resolve_precision(train)[0]
    if precision != "fp32":
        cast = torch.autocast(device, DTYPES[precision], cache_enabled=cache)
        model.forward = convert_outputs_to_fp32(cast(model.forward))
