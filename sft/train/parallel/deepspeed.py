"""DeepSpeed's ZeRO stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from sft.config.schema import Train
from sft.errors import ConfigError
from sft.models.fake import set_attributes
from sft.models.reach import may_leave_out
from sft.runtime.processes import deepspeed_settings
from sft.train.optimizer import build_optimizer
from sft.train.parallel.ddp import Place, Split, autocast


class Zero(Split):
    """A model trained by ZeRO: all stages split the optimizer's state, stage 3 also the weights."""

    def _wrap(self, train: Train) -> None:
        # DeepSpeed's own autocast is not used: it rounds gradients and gathered weights to bf16.
        autocast(self.module, self.accelerator.device.type, train)
        own = build_optimizer(train, self.module)
        is_alone = self.accelerator.num_processes == 1
        if not is_alone and deepspeed_settings(train)["zero_optimization"]["stage"] == 3:
            _refuse_branches(self.module)
        if any(hasattr(parameter, "piece") for parameter in self.module.parameters()):
            _split_pieces(self.module, self.accelerator)
        self.engine: Any
        self.engine, self.optimizer = self.accelerator.prepare(self.module, own)
        self.model, self.zero = self.engine, self.engine.optimizer
        self.loss_factor = float(self.accelerator.num_processes)  # DeepSpeed averages over them
        self.is_split = self.engine.zero_optimization_stage() == 3
        self.waits_in = "forward" if self.is_split else "backward"
        if not self.is_split and not is_alone and may_leave_out(self.module):
            _exchange_in_order(self.engine)

    def prepare_backward(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def set_loss_scale(self, scale: float) -> None:
        self.loss_scale = scale
        self.zero.override_loss_scale(scale)  # it multiplies losses, and divides in its step

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def clip(self) -> float:
        """Returns the norm of the whole gradient; DeepSpeed clips in its own step."""
        norms = self.zero._get_norm_groups() if self.is_split else [self.zero.scaled_global_norm()]
        if any(float(norm) < 0 for norm in norms):  # DeepSpeed returns -1 if not finite
            return math.inf
        return math.hypot(*map(float, norms)) / self.loss_scale

    def update(self) -> None:
        self.engine.step()
        self.num_updates += 1

    def zero_grad(self) -> None:
        """Clears all gradients, including those that only DeepSpeed's own step clears."""
        self.zero.zero_grad()
        for kept in ("averaged_gradients", "all_grad_tensors"):
            getattr(self.zero, kept, {}).clear()
        if not self.is_split:  # in stage 3, zero_grad resets it
            self.zero.micro_step_id = -1

    # -- state

    def _local_weights(self) -> Iterator[torch.Tensor]:
        if not self.is_split:
            yield from self.trained.values()
        yield from super()._local_weights()

    def set_weight(self, name: str, value: torch.Tensor) -> None:
        super().set_weight(name, value)
        parameter: Any = self.trained[name]
        if parameter.shape == value.shape:  # otherwise it is split, and empty here
            parameter.data.copy_(value)
        if self.is_split:  # stage 3 gathers from ds_tensor, a copy of the fp32 weights
            for weight in (self._cut(place.tensor, place) for place in self._places(name)):
                parameter.ds_tensor.data[: len(weight)].copy_(weight)

    def _places(self, name: str) -> Iterator[Place]:
        parameter: Any = self.trained[name]
        if self.is_split:
            group, first, number = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.accelerator.process_index * number
            number = min(number, parameter.ds_numel - start)  # the last partition is padded
        elif (mapping := parameter._hp_mapping) is not None:
            group = mapping.param_group_index
            first, number = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
        else:
            number = 0
        if number > 0:
            yield Place(self._optimized()[group], start, first, number)

    def _cut(self, value: torch.Tensor, place: Place) -> torch.Tensor:
        assert place.number is not None
        return value.detach().narrow(0, place.first, place.number)

    @property
    def _base_optimizer(self) -> Any:
        return self.zero.optimizer

    def _optimized(self) -> list[torch.Tensor]:
        """Returns this rank's trained weights in fp32, one flat tensor per group of parameters."""
        if self.is_split:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.single_partition_of_fp32_groups


def _refuse_branches(model: nn.Module) -> None:
    """Raises ConfigError if stage 3 cannot train a model whose modules do not all run."""
    if may_leave_out(model, if_unknown=False):
        raise ConfigError(
            "train.engine: deepspeed: values of activations decide which modules of this model "
            "run, such as experts. In ZeRO-3 all ranks have to run the same modules, since these "
            "gather their weights: set train.engine: fsdp, or a DeepSpeed file of stage 2"
        )


def _exchange_in_order(engine: Any) -> None:
    """Makes ZeRO-1 and 2 exchange all gradients after a backward pass, in one order on all ranks.

    They put gradients into buckets as they arrive, so an expert that gets no token on one rank
    would shift all that follow. Gradients of a whole pass take memory until then.
    """
    zero, exchange = engine.optimizer, engine.allreduce_gradients
    process = zero.process_gradients

    def exchange_all(*arguments: Any, **named: Any) -> None:
        for number, group in enumerate(zero.bit16_groups):
            for parameter in group:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                process(parameter, number)
        exchange(*arguments, **named)

    zero.process_gradients = lambda *_: None
    engine.allreduce_gradients = exchange_all


def elements_of(shape: torch.Size, rank: int, world: int) -> tuple[int, int]:
    """Returns a rank's elements (first, end) of a flat parameter, as stage 3 splits it."""
    number = math.prod(shape)
    each = math.ceil(number / world)
    return min(rank * each, number), min((rank + 1) * each, number)


def _split_pieces(model: nn.Module, accelerator: Accelerator) -> None:
    """Splits a model of which each rank has its own elements only (`models/cut`).

    DeepSpeed splits whole weights, and sends those of rank 0 to all before that. Here a weight is
    whole for a moment, with the elements of this rank only, which are all that it keeps.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    rank, world = accelerator.process_index, accelerator.num_processes

    def split(init: Any, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            if hasattr(parameter, "piece"):
                start, stop = elements_of(parameter.shape, rank, world)
                whole = torch.empty(
                    parameter.shape, dtype=parameter.dtype, device=accelerator.device
                )
                whole.view(-1)[start:stop] = parameter.piece
                own = {k: v for k, v in vars(parameter).items() if k != "piece"}
                filled = nn.Parameter(whole, parameter.requires_grad)
                vars(filled).update(own)
                torch.utils.swap_tensors(parameter, filled)  # optimizers know `parameter`
                del filled, whole
            init._convert_to_deepspeed_param(parameter)
            parameter.partition()

    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    with set_attributes(Init, _convert_to_zero_parameters=split):
        Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
