"""Leaves out what PEFT's LoRA layers do in vain under autocast; every bit stays the same.

PEFT casts a layer's input to the dtype of its adapter, fp32, and autocast casts it back to bf16 or
fp16. Both are passes over all activations, and the second copy, equal to the input, is kept for the
backward pass, once for each adapted layer. On a base in 4 bits PEFT also copies the output before
it adds to it, which it does not do in place.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn


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

    kind = Linear if torch.is_autocast_enabled(x.device.type) else type(layer)
    return kind.forward(layer, x, *arguments, **options)


def _cast_input_dtype(layer: Any, x: Any, dtype: torch.dtype) -> Any:
    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)
