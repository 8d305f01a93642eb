"""Checks and counts the data types of a model's parameters."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from sft.config.schema import Train
from sft.errors import ModelError
from sft.runtime.console import table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def store_trained(model: nn.Module, train: Train) -> nn.Module:
    """Returns the model, with its trained weights in the dtype in which they are kept."""
    for parameter in model.parameters():
        if train.is_bf16_pure and parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().contiguous()
    return model


def check_dtypes(
    model: nn.Module, mode: str, precision: str, stored: torch.dtype = torch.float32
) -> None:
    """Asserts that trained weights are `stored`, and frozen ones in the compute dtype or 4 bits."""
    frozen = {torch.float32, DTYPES[precision]} | ({torch.uint8} if mode == "qlora" else set())
    for name, parameter in model.named_parameters():
        allowed = {stored} if parameter.requires_grad else frozen
        assert parameter.dtype in allowed, f"{name} is {parameter.dtype}, expected one of {allowed}"
    if mode == "qlora":
        quantised = sum(p.dtype == torch.uint8 for p in model.parameters())
        if not quantised:
            raise ModelError(
                "tuning.mode: qlora expects linear layers that bitsandbytes can quantise, found "
                "none in this model; use tuning.mode: lora"
            )


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters of one part of a model that have one dtype and are all trained or frozen."""

    part: str
    dtype: str
    trained: bool
    num_parameters: int
    num_bytes: int


def part_of(name: str, on_base: bool) -> str:
    """Returns what a parameter is, by its name. `on_base`: it is trained, on a frozen base."""
    parts = {
        "lora_": "adapters",
        "modules_to_save": "modules to save",
        "trainable_tokens": "rows of tokens",
    }
    if found := next((part for key, part in parts.items() if key in name), None):
        return found
    return "biases" if on_base else "embeddings" if "embed" in name else "layers"


def parameter_groups(model: nn.Module) -> list[ParameterGroup]:
    """Counts parameters by part, dtype and whether they are trained; 4 bits: two in a byte."""
    counts: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        quantised = parameter.dtype == torch.uint8
        part = part_of(name, parameter.requires_grad and hasattr(model, "peft_config"))
        state = getattr(parameter, "quant_state", None)
        bits = getattr(state, "quant_type", "nf4").upper()
        dtype = bits if quantised else str(parameter.dtype).removeprefix("torch.")
        count = counts[part, dtype, parameter.requires_grad]
        count[0] += parameter.numel() * (2 if quantised else 1)
        count[1] += parameter.numel() * parameter.element_size()
    return [ParameterGroup(*key, *count) for key, count in counts.items()]


def dtype_table(model: nn.Module) -> Table:
    """Returns the table "Model" that a run prints: the size of each group of parameters."""
    rows = [
        (
            group.part,
            group.dtype,
            "yes" if group.trained else "frozen",
            f"{group.num_parameters:,}",
            f"{group.num_bytes / 2**20:,.1f}",
        )
        for group in parameter_groups(model)
    ]
    return table("Model", ("part", "dtype", "trained", "parameters", "MiB"), rows, left=3)
