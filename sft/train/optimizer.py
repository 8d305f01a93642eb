"""Builds the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sft.config.schema import Train
from sft.models.groups import find_group


def build_optimizer(train: Train, model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW of PyTorch or bitsandbytes, in groups of parameters that are trained alike.

    The `peak` of a group is its learning rate after the warm-up. Only matrices get weight decay,
    unless `train.groups` gives one.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate, decay = _settings(train, name, parameter)
            groups.setdefault((parameter.ndim < 2, rate, decay), []).append(parameter)
    listed = [
        {"params": params, "lr": rate, "peak": rate, "weight_decay": decay}
        for (_, rate, decay), params in sorted(groups.items(), key=lambda each: each[0][0])
    ]
    arguments: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    if train.optimizer == "adamw":
        return torch.optim.AdamW(listed, **arguments, fused=True)
    from bitsandbytes import optim

    classes = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return classes[train.optimizer](listed, **arguments)


def _settings(train: Train, name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Returns the peak learning rate and the weight decay of a parameter.

    LoRA+ (Hayou et al. 2024) trains B, and as in PEFT vectors, faster than A.
    """
    rate = train.learning_rate
    if train.loraplus_lr_ratio and ("lora_B" in name or parameter.ndim < 2):
        rate *= train.loraplus_lr_ratio
    decay = train.weight_decay if parameter.ndim >= 2 else 0.0
    if group := find_group(train, name):
        rate = rate if group.learning_rate is None else group.learning_rate
        decay = decay if group.weight_decay is None else group.weight_decay
    return rate, decay
