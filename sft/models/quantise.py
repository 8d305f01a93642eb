"""Quantises frozen weights to NF4."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns settings of NF4 with double quantisation: QLoRA (Dettmers et al. 2023, section 3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantise(model: Any, compute_dtype: torch.dtype) -> None:
    """Quantises the layers of a model that was not loaded, as loading with `nf4` would."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    weights = dict(model.named_parameters())
    settings = nf4(compute_dtype)
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    with unset_fake_temporarily():  # bitsandbytes' class of parameters cannot be fake
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

    The first forward in eval mode without gradients would repack every weight in place, and the
    backward passes that follow would read them in the old layout: wrong gradients, no error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
