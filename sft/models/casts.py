"""Casts under autocast that are made once where PyTorch makes them again and again.

Autocast casts the input of each linear layer by itself: of q, k and v three times, if a norm in
fp32 wrote it. Each copy is a pass over activations, and is kept for the backward pass. With `share`
these layers get one copy. Their gradients are still cast and summed in fp32, each by itself, so
every bit stays the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sft.models.layers import embedding_layers


@dataclass
class _Last:
    """The last cast. Layers that share an input follow each other."""

    input: weakref.ref | None = None
    version: int = 0
    copy: torch.Tensor | None = None


_last = _Last()


def share(model: nn.Module) -> None:
    """Makes linear layers that get the same input in training use the same cast of it.

    Not the head, which selects positions before it casts.
    """
    head = embedding_layers(model)[1]
    for module in model.modules():
        if type(module).forward is nn.Linear.forward and module is not head:
            module.register_forward_pre_hook(_cast_input)


def _cast_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.Tensor] | None:
    if len(inputs) != 1 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    (x,) = inputs
    kind = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    return (_SharedCast.apply(x, _copy_of(x, torch.get_autocast_dtype(kind))),)


def _copy_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    copy, known = _last.copy, _last.input is not None and _last.input() is x
    if copy is None or not known or (_last.version, copy.dtype) != (x._version, dtype):
        copy = x.detach().to(dtype)
        _last.input, _last.version, _last.copy = weakref.ref(x, _forget), x._version, copy
    return copy


def _forget(dead: weakref.ref) -> None:
    """Frees the copy of an input that no layer can get any more."""
    if _last.input is dead:
        _last.input = _last.copy = None


class _SharedCast(torch.autograd.Function):
    """Returns `copy`, which is `x` in another dtype; the gradient is that of a cast."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        ctx.dtype = x.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.to(ctx.dtype), None


def cast_together(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Returns tensors of one dtype in another; a GPU casts all of them with one kernel."""
    if all(each.dtype == dtype for each in tensors):
        return tensors
    results = [torch.empty_like(each, dtype=dtype) for each in tensors]
    torch._foreach_copy_(results, list(tensors))
    return results
