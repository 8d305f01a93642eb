"""Adds the LoRA adapters (PEFT) that are trained on a frozen base."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from sft.config.schema import Tuning
from sft.errors import ModelError
from sft.models import experts


def add_adapters(base: nn.Module, tuning: Tuning) -> Any:
    """Returns `base` with a LoRA adapter (PEFT) in fp32. Raises ModelError if no layer matches."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets = "all-linear" if tuning.target_modules == "auto" else list(tuning.target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=tuning.r,
        lora_alpha=tuning.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=tuning.lora_dropout,
        target_modules=targets,
    )
    auto = tuning.target_modules == "auto"
    if auto:
        config.target_modules, config.target_parameters = experts.auto_targets(base)
    experts.complete_targets(base, config, auto=auto)
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        linear = {
            name.rpartition(".")[2]
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        raise ModelError(
            f"tuning.target_modules: {targets} names no layer of this model; "
            f"its linear layers are: {', '.join(sorted(linear))}"
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
