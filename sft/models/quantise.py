"""Stores frozen weights in 4 bits (NF4), and keeps them right while adapters train on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns the settings of QLoRA (Dettmers et al. 2023, section 3): NF4, double quantisation."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantise(model: Any, compute_dtype: torch.dtype) -> None:
    """Quantises a model that was made without files, as loading with `nf4` quantises."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    weights = dict(model.named_parameters())
    settings = nf4(compute_dtype)
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    with unset_fake_temporarily():  # parameters of bitsandbytes' own class cannot be fake
        replace_with_bnb_linear(model, kept, settings)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = weights[f"{name}.weight"].detach()
            weight = weight if weight.shape[0] == module.out_features else weight.T  # Conv1D
            packed, state = quantize_4bit(
                weight, compress_statistics=settings.bnb_4bit_use_double_quant, quant_type="nf4"
            )
            module.weight = nn.Parameter(packed, requires_grad=False)
            vars(module.weight).update(
                quant_state=state, quant_type="nf4", compress_statistics=True, bnb_quantized=True
            )
            if module.bias is not None:
                module.bias = nn.Parameter(weights[f"{name}.bias"].detach(), requires_grad=False)
    model.is_loaded_in_4bit = True  # PEFT reads it
    keep_nf4_trainable(model)


def keep_nf4_trainable(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking NF4 weights for inference on CPUs with AVX512-BF16.

    It would repack every weight in place in the first forward pass of eval mode. Later backward
    passes would read the old layout: wrong gradients, no error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
