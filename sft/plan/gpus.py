"""Lists GPUs by name, so that a run can be planned on a machine without them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sft.runtime.hardware import GIB, Device


@dataclass(frozen=True)
class Gpu:
    gib: float
    """Total memory as torch reports it; the numbers in data sheets are larger."""
    teraflops: float
    """Peak without sparsity in bf16 (or fp16, if the GPU has no bf16), from the data sheet."""
    bf16: bool = True


GPUS = {
    "T4": Gpu(14.6, 65, False),
    "V100-16GB": Gpu(15.8, 125, False),
    "V100-32GB": Gpu(31.7, 125, False),
    "A10": Gpu(22.0, 125),
    "A10G": Gpu(22.0, 70),
    "L4": Gpu(22.0, 121),
    "3090": Gpu(23.6, 71),
    "4090": Gpu(23.6, 165),
    "5090": Gpu(31.3, 210),
    "A100-40GB": Gpu(39.4, 312),
    "L40": Gpu(44.4, 181),
    "L40S": Gpu(44.4, 362),
    "A6000": Gpu(47.4, 155),
    "A100-80GB": Gpu(79.2, 312),
    "H100-80GB": Gpu(79.1, 989),
    "H200": Gpu(139.8, 989),
    "B200": Gpu(178.3, 2250),
}


def named_gpus(text: str, gib: float | None = None) -> list[Device]:
    """Returns the devices that "NAME" or "NAME x n" describes; `gib`: the memory of each.

    Raises ValueError for a name that is not in the table, unless `gib` is given.
    """
    ((name, number),) = re.findall(r"^(.*?)(?:\s+[xX*]\s*(\d+))?$", text.strip())
    gpu = find_gpu(name)
    if gpu is None and gib is None:
        raise ValueError(
            f"expected one of {', '.join(GPUS)}, as in 'H100-80GB x 8', found {text!r}; "
            "for any other give its memory: GIB=48"
        )
    if int(number or 1) < 1 or (gib is not None and gib <= 0):
        raise ValueError(f"expected at least one GPU and a memory above 0, found {text!r}, {gib}")
    total = round((gib or (gpu.gib if gpu else 0)) * GIB)
    bf16 = gpu.bf16 if gpu else True
    return [Device(i, name, total, None, bf16, None) for i in range(int(number or 1))]


def find_gpu(name: str) -> Gpu | None:
    """Returns the GPU that people or drivers call `name`; None unless exactly one fits."""

    def plain(text: str) -> str:
        return re.sub(
            r"[^A-Z0-9]|GB(?!\d)|NVIDIA|GEFORCE|RTX|TESLA|SXM\d?|PCIE|HBM\d?E?", "", text.upper()
        )

    exact = [gpu for known, gpu in GPUS.items() if plain(known) == plain(name)]
    found = exact or [gpu for known, gpu in GPUS.items() if known.split("-")[0] == plain(name)]
    return found[0] if len(found) == 1 else None
