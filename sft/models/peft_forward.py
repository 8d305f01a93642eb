"""Leaves out what PEFT's LoRA layers do in vain under autocast.

PEFT casts a layer's input to the dtype of its adapter, fp32, and autocast casts it back to bf16 or
fp16. Both are passes over all activations, and the second copy, equal to the input, is kept for the
backward pass, once for each adapted layer. It then scales and adds in two more passes over the
output, and on a base in 4 bits it copies the output before. Here the product with B scales and adds
as well, and A and B are cast together. So fewer intermediate results are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sft.models.casts import cast_together


def forward_once(adapted: nn.Module) -> None:
    """Gives the plain LoRA layers of a model a forward pass without these casts and copies.

    Layers with dropout or a variant (DoRA) use the input in fp32 otherwise, too, and stay as they
    are.
    """
    from peft.tuners.lora import Linear, LoraLayer

    for layer in adapted.modules():
        if not isinstance(layer, LoraLayer) or layer.lora_variant:
            continue
        is_plain = all(isinstance(each, nn.Identity) for each in layer.lora_dropout.values())
        if is_plain and (isinstance(layer, Linear) or type(layer).__name__ == "Linear4bit"):
            vars(layer)["forward"] = MethodType(_forward, layer)
            vars(layer)["_cast_input_dtype"] = MethodType(_cast_input_dtype, layer)


def _forward(layer: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    from peft.tuners.lora import Linear

    if not torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x, *arguments, **options)
    name = None if arguments or options else _fused_adapter(layer)
    if name is None:
        return Linear.forward(layer, x, *arguments, **options)
    result, dtype = layer.base_layer(x), torch.get_autocast_dtype(x.device.type)
    a, b, factor = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    if result.dtype != dtype:
        return result + b(a(x)) * factor
    return _AddLowRank.apply(result, x.to(dtype), a.weight, b.weight, factor)


def _fused_adapter(layer: Any) -> str | None:
    """Returns the layer's adapter if its A and B are only weights; None if PEFT has to call them.

    Hooks on them may do anything: those of ZeRO-3 gather the weights. The compiler fuses PEFT's
    code by itself.
    """
    if torch.compiler.is_compiling() or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return None
    pair = layer.lora_A[active[0]], layer.lora_B[active[0]]
    return active[0] if all(map(_is_bare, pair)) else None


def _is_bare(module: nn.Module) -> bool:
    """Returns whether a call of this module multiplies by its weight and does nothing else."""
    own = vars(module)
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    is_linear = type(module) is nn.Linear and module.bias is None and "forward" not in own
    return is_linear and not any(own[each] for each in hooks)


class _AddLowRank(torch.autograd.Function):
    """Returns `result + factor * x A^T B^T`; all but A and B are in the dtype of autocast."""

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,  # (..., out)
        x: torch.Tensor,  # (..., in)
        weight_a: torch.Tensor,  # (r, in)
        weight_b: torch.Tensor,  # (out, r)
        factor: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = cast_together([weight_a, weight_b], x.dtype)
        low = _scaled_product(rows, a.t(), factor)
        ctx.save_for_backward(rows, low, a if ctx.needs_input_grad[1] else None, b)
        ctx.factor, ctx.dtypes, ctx.shape = factor, (weight_a.dtype, weight_b.dtype), x.shape
        return torch.addmm(result.reshape(-1, result.shape[-1]), low, b.t()).view(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, low, a, b = ctx.saved_tensors
        given = gradient.reshape(-1, gradient.shape[-1])
        of_low = _scaled_product(given, b, ctx.factor)
        of_x = (of_low @ a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        of_weights: Sequence[torch.Tensor] = (of_low.t() @ rows, given.t() @ low)
        if ctx.dtypes[0] == ctx.dtypes[1]:
            of_weights = cast_together(of_weights, ctx.dtypes[0])
        return gradient, of_x, *of_weights, None


def _scaled_product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns `factor * (a @ b)`, rounded once."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)


def _cast_input_dtype(layer: Any, x: Any, dtype: torch.dtype) -> Any:
    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)
