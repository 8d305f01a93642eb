"""Stores frozen weights in 4 bits (NF4 or FP4), and keeps them valid while adapters train."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from sft.models.prepared import prepare
from sft.models.reach import reach


def four_bits(compute_dtype: torch.dtype, kind: str = "nf4") -> BitsAndBytesConfig:
    """Returns bitsandbytes' settings of QLoRA, with double quantisation (Dettmers et al. 2023, 3).

    `kind`: `nf4` or `fp4`, as in `tuning.quantization`.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def matrices_to_quantise(model: Any) -> set[str]:
    """Returns the names of the weights that `qlora` stores in 4 bits, in modules of any class.

    These are matrices, except the head, tables of embeddings, and weights that the model's class
    keeps in fp32, that another module than their owner reads, or that the step changes in place.
    Routers are left out, too, since with rounded weights they would choose other experts.
    """
    found, head = reach(model), model.get_output_embeddings()
    layers = {f"{name}.weight": module for name, module in model.named_modules()}
    left = {name for name, module in layers.items() if module is head}
    left |= found.looked_up | found.routers | found.borrowed | found.written
    exact = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    is_exact = re.compile(rf"(^|\.)({'|'.join(sorted(exact))})(\.|$)" if exact else r"(?!)")
    # For a model that cannot be traced, these are its linear layers, as in transformers.
    known = {name for name, module in layers.items() if _is_replaced(module)}
    matrices = known if found.problem else found.matrices
    sizes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    matrices = {name for name in matrices - left if sizes.get(name, 2) > 1}
    return {name for name in matrices if not is_exact.search(name)}


def matrices_elsewhere(model: nn.Module, wanted: set[str]) -> set[str]:
    """Returns the names in `wanted` that transformers does not quantise: not in linear layers."""
    modules = dict(model.named_modules())
    return {name for name in wanted if not _is_replaced(modules[name.rpartition(".")[0]])}


def _is_replaced(module: nn.Module) -> bool:
    """Returns whether transformers replaces a layer by one of bitsandbytes, or has replaced it."""
    own = type(module).__module__.startswith("bitsandbytes.")
    return type(module) is nn.Linear or isinstance(module, Conv1D) or own


class AllMatrices(Bnb4BitHfQuantizer):
    """transformers' quantiser of linear layers, extended to the matrices of all other modules."""

    elsewhere: set[str]
    """Matrices to quantise that no linear layer holds."""

    @staticmethod
    def get_modules_to_not_convert(model: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Returns patterns of the linear layers that stay: those of text that are not quantised.

        transformers itself would take the layer of the last parameter for the head.
        """
        found, wanted = reach(model), matrices_to_quantise(model)
        layers = {n for n, module in model.named_modules() if _is_replaced(module)}
        return [
            rf"{re.escape(name)}$"
            for name in layers
            if (weight := f"{name}.weight") not in wanted
            if weight in found.products or not found.is_unreached(weight)
        ]

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.elsewhere = matrices_elsewhere(model, matrices_to_quantise(model))
        super()._process_model_before_weight_loading(model, *args, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        linear = super().param_needs_quantization(model, param_name, **kwargs)
        return linear or param_name in self.elsewhere

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)


class _Quantise(Bnb4bitQuantize):
    """Quantises each parameter as it is read, so the full-size model is never in memory."""

    def convert(self, input_dict: Any, **options: Any) -> Any:  # type: ignore[override]
        model, settings = options["model"], self.hf_quantizer.quantization_config
        elsewhere = self.hf_quantizer.elsewhere & input_dict.keys()
        linear = {name: value for name, value in input_dict.items() if name not in elsewhere}
        found = super().convert(linear, **options)
        for name in elsewhere:
            value = input_dict[name]
            value = value[0] if isinstance(value, list) else value
            found[name] = _quantise_parameter(model, name, value, settings)
        return found


@contextmanager
def quantising_all() -> Iterator[None]:
    """Makes transformers quantise all of `matrices_to_quantise` while it loads a model."""
    quantise_in_slices()
    before = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = AllMatrices
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = before


@cache
def quantise_in_slices() -> None:
    """Makes bitsandbytes quantise matrices on a CPU slice by slice, with the same bits.

    Its own code for CPUs takes seven times the memory of a bf16 matrix, and would set the peak of a
    start. Blocks of 4-bit weights are independent, so slices of whole blocks give the same.
    """
    from bitsandbytes._ops import register_kernel

    whole = torch.library.get_kernel("bitsandbytes::quantize_4bit", "CPU")

    @register_kernel("bitsandbytes::quantize_4bit", "cpu")
    def sliced(
        weight: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch._C._dispatch_keys(weight)
        found = [
            whole.call_boxed(keys, each, blocksize, quant_type, torch.uint8)
            for each in weight.reshape(-1).split(blocksize * _BLOCKS)
        ]
        packed = torch.cat([each for each, _ in found])
        if quant_storage != torch.uint8:
            packed = packed.squeeze().view(quant_storage).unsqueeze(1)
        return packed, torch.cat([largest for _, largest in found])


_BLOCKS = 4096
"""Blocks in a slice: 1 MiB of fp32 values with bitsandbytes' blocks of 64."""


def _quantise_parameter(
    model: nn.Module, name: str, weight: torch.Tensor, settings: BitsAndBytesConfig
) -> nn.Parameter:
    """Returns a weight in 4 bits, and makes its module dequantise it in each forward pass."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.detach().contiguous(),
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
    )
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    parameter.quant_state = state
    owner, _, own = name.rpartition(".")
    prepare(model.get_submodule(owner)).quant_states[own] = state
    return parameter


def quantise(model: Any, compute_dtype: torch.dtype, kind: str = "nf4") -> None:
    """Quantises a model that was built without files, with the same result as loading one."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    quantise_in_slices()
    weights = dict(model.named_parameters())
    settings = four_bits(compute_dtype, kind)
    kept = AllMatrices.get_modules_to_not_convert(model)
    for name in matrices_elsewhere(model, matrices_to_quantise(model)):
        owner, _, own = name.rpartition(".")
        parameter = _quantise_parameter(model, name, weights[name], settings)
        model.get_submodule(owner).register_parameter(own, parameter)
    with unset_fake_temporarily():  # parameters of bitsandbytes' own class cannot be fake
        replace_with_bnb_linear(model, kept, settings)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = weights[f"{name}.weight"].detach()
            weight = weight.T if getattr(module, "source_cls", None) is Conv1D else weight
            packed, state = quantize_4bit(
                weight, compress_statistics=settings.bnb_4bit_use_double_quant, quant_type=kind
            )
            module.weight = nn.Parameter(packed, requires_grad=False)
            vars(module.weight).update(
                quant_state=state, quant_type=kind, compress_statistics=True, bnb_quantized=True
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
