"""Adds LoRA adapters to a frozen base."""

from __future__ import annotations

from typing import Any

from torch import nn

from sft.config.schema import Tuning
from sft.errors import ModelError


def add_adapters(base: nn.Module, tuning: Tuning) -> Any:
    """Returns `base` with a LoRA adapter of PEFT, in fp32."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets = "all-linear" if tuning.target_modules == "auto" else list(tuning.target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=tuning.r,
        lora_alpha=tuning.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=tuning.lora_dropout,
        target_modules=targets,
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if _is_linear(m)})
        raise ModelError(
            f"tuning.target_modules: {targets} names no layer of this model; "
            f"its linear layers are: {', '.join(linear)}"
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
