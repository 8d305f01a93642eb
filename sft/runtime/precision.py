"""Chooses the precision that a run computes in."""

from __future__ import annotations

import torch

from sft.config.schema import Train
from sft.runtime import hardware


def resolve_precision(
    train: Train, devices: list[hardware.Device] | None = None
) -> tuple[str, str]:
    """Returns (precision, reason) for these GPUs, or without `devices` for this process's own."""
    if train.precision != "auto":
        return train.precision, "configured"
    on_gpu = torch.cuda.is_available() if devices is None else bool(devices)
    if not on_gpu:
        return "fp32", "no GPU; fp32 is exact and on CPUs seldom slower"
    own = devices is None and torch.cuda.is_bf16_supported(including_emulation=False)
    if own or (devices and all(device.bf16 for device in devices)):
        return "bf16", "the GPU computes in bf16"
    return "fp32", "the GPU has no bf16"
