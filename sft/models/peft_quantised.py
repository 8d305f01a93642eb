"""Lets DoRA and LoftQ of PEFT work on bases in 4 bits that are fake, split, or on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from sft.errors import ModelError
from sft.models.fake import set_attributes


def _dequantise(module: Any) -> torch.Tensor:
    """Returns the weight of a layer, from 4 bits if it has them.

    PEFT decides by the class of the weight, but fake and split weights have other classes.
    """
    from peft.utils.integrations import dequantize_module_weight

    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None or weight.dtype != torch.uint8:
        return dequantize_module_weight(module)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


@contextmanager
def dora(*, fake: bool) -> Iterator[None]:
    """Makes DoRA dequantise with `_dequantise` from here on.

    If `fake`, nothing within this context copies a fake weight.
    """
    from peft.tuners.lora import dora as module

    changed: Any = module
    changed.dequantize_module_weight = _dequantise
    with ExitStack() as stack:
        if fake:
            from peft.utils import other

            stack.enter_context(set_attributes(module, deepcopy=lambda layer: layer))
            stack.enter_context(set_attributes(other, copy=_FakeCopy))
        yield


@contextmanager
def orthogonal() -> Iterator[None]:
    """Makes PEFT create orthogonal weights in fp32 where the base is stored in 4 bits.

    PEFT casts them to the dtype of the stored base, which would round them to whole numbers.
    """
    from peft.tuners.lora import LoraLayer

    made = LoraLayer.orthogonal_init

    def make(layer: Any, name: str) -> None:
        if layer.get_base_layer().weight.is_floating_point():
            return made(layer, name)
        unquantised = SimpleNamespace(weight=torch.empty(0))
        layer.get_base_layer = lambda: unquantised
        try:
            return made(layer, name)
        finally:
            del layer.get_base_layer

    with set_attributes(LoraLayer, orthogonal_init=make):
        yield


class _FakeCopy:
    """Replaces the module `copy` where PEFT copies modules of fake weights.

    A copy of a fake tensor damages memory (torch 2.13): the process dies later, anywhere.
    """

    copy = staticmethod(copy.copy)

    @staticmethod
    def deepcopy(module: Any) -> Any:
        """Returns a copy of a module, with new fake weights."""
        tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
        memo: dict[int, Any] = {}
        for tensor in tensors:
            fresh = torch.empty_like(tensor)
            is_weight = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_weight else fresh
        return copy.deepcopy(module, memo)


def fit_loftq(model: nn.Module, base: Any) -> None:
    """Fits A and B to the error of a base in 4 bits (LoftQ), from the files of the base."""
    from peft.utils import loftq_utils

    revision = getattr(base.config, "_commit_hash", None)
    config = cached_file(base.name_or_path, "config.json", revision=revision)
    try:
        with set_attributes(loftq_utils, _loftq_init_new=_fit):
            loftq_utils.replace_lora_weights_loftq(model, str(Path(str(config)).parent))
    except (KeyError, ValueError, OSError) as error:  # it looks for the names of the model
        raise ModelError(
            "tuning.lora.init_lora_weights: PEFT finds no weights for loftq in the files of "
            f"{base.name_or_path}: {error}; use true"
        ) from error


def _fit(
    quantised: Any, weight: torch.Tensor, num_bits: int, reduced_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and B as PEFT's own function does, which works on a GPU only."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.utils import loftq_utils

    assert num_bits == 4
    known = dequantize_4bit(quantised.data, quantised.quant_state).float()
    if getattr(quantised.module, "source_cls", None) is Conv1D:  # whose files have (in, out)
        weight = weight.T
    residual = weight.to(known.device, torch.float32) - known
    found = loftq_utils._low_rank_decomposition(residual, reduced_rank=reduced_rank)
    return found["R"], found["L"]
