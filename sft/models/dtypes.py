"""Which data types a model's parameters have."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# --- dtype policy ------------------------------------------------------------------------------


def check_dtypes(model: nn.Module, mode: str, precision: str) -> None:
    """Asserts the policy: trained weights fp32; frozen ones in the compute dtype, or NF4."""
    frozen = {torch.float32, DTYPES[precision]} | ({torch.uint8} if mode == "qlora" else set())
    for name, parameter in model.named_parameters():
        allowed = {torch.float32} if parameter.requires_grad else frozen
        assert parameter.dtype in allowed, f"{name} is {parameter.dtype}, expected one of {allowed}"
    if mode == "qlora":
        quantised = sum(p.dtype == torch.uint8 for p in model.parameters())
        assert quantised, "tuning.mode is qlora, but no weight was quantised"


@dataclass(frozen=True)
class Share:
    """Parameters of one kind: (what, dtype, trained or frozen)."""

    what: str
    dtype: str
    trained: bool
    num_parameters: int
    num_bytes: int


def shares(model: nn.Module) -> list[Share]:
    """Parameters by part, dtype and whether they are trained; NF4 counts two weights a byte."""
    counts: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        quantised = parameter.dtype == torch.uint8
        what = "adapters" if "lora_" in name else "embeddings" if "embed" in name else "layers"
        dtype = "NF4" if quantised else str(parameter.dtype).removeprefix("torch.")
        count = counts[what, dtype, parameter.requires_grad]
        count[0] += parameter.numel() * (2 if quantised else 1)
        count[1] += parameter.numel() * parameter.element_size()
    return [Share(*key, *count) for key, count in counts.items()]


def dtype_table(model: nn.Module) -> Table:
    table = Table(title="Model", title_justify="left", box=None, pad_edge=False)
    for column in ("part", "dtype", "trained"):
        table.add_column(column)
    for column in ("parameters", "MiB"):
        table.add_column(column, justify="right")
    for share in shares(model):
        table.add_row(
            share.what,
            share.dtype,
            "yes" if share.trained else "frozen",
            f"{share.num_parameters:,}",
            f"{share.num_bytes / 2**20:,.1f}",
        )
    return table
