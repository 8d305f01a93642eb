"""Computes products of matrices in FP8 (torchao), on GPUs that have it.

Every row of a matrix has its own scale: a token's activations, its gradient, a row of a weight. The
gradient of a weight sums over tokens, where such scales would depend on which tokens are computed
together; that product stays in bf16. So the cut of a batch does not change the result (torchao's
recipe `rowwise_with_gw_hp`). Weights stay as they are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sft.errors import ConfigError, require_extra
from sft.models.layers import embedding_layers

RECIPE = "rowwise_with_gw_hp"
LEAST = (8, 9)  # compute capability of the first GPUs with FP8: Ada, Hopper
MULTIPLE = 16  # of both sides of a matrix, which FP8 kernels need


def compute_in_fp8(model: nn.Module, device: torch.device) -> None:
    """Replaces the linear layers that can compute in FP8. Raises ConfigError if the device cannot.

    Not the head, which is sensitive, nor the factors of an adapter, which are too thin to gain.
    """
    require_extra("torchao", "train.fp8", ["torchao"])
    refuse_device(device)
    convert(model)


def refuse_device(device: torch.device) -> None:
    """Raises ConfigError unless the device computes in FP8."""
    found = device.type
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability >= LEAST:
            return
        found = f"{torch.cuda.get_device_name(device)}, compute capability {capability}"
    raise ConfigError(
        f"train.fp8: expected an NVIDIA GPU of compute capability 8.9 or more, found {found}; "
        "remove this key"
    )


def convert(model: nn.Module, **options: Any) -> list[str]:
    """Replaces linear layers by torchao's, and returns their names. `options`: of torchao."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    _, head = embedding_layers(model)
    replaced: list[str] = []

    def takes(module: nn.Module, name: str) -> bool:
        if type(module) is not nn.Linear or module is head or "lora_" in name:
            return False
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            return False
        replaced.append(name)
        return True

    config = Float8LinearConfig.from_recipe_name(RECIPE)
    for key, value in options.items():
        object.__setattr__(config, key, value)
    convert_to_float8_training(model, module_filter_fn=takes, config=config)
    if not replaced:
        raise ConfigError(
            f"train.fp8: no linear layer of this model has sides that are multiples of {MULTIPLE}; "
            "remove this key"
        )
    return replaced
