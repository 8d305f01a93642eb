"""Shows devices, memory and versions and, if torch sees no GPU, the reason."""

from __future__ import annotations

import os
import platform
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version

import sft

PACKAGES = ("torch", "accelerate", "transformers", "peft", "bitsandbytes", "deepspeed")


def main(args: Namespace) -> None:
    """Prints a table of the machine and a table of versions."""
    import torch

    from sft.runtime import hardware
    from sft.runtime.console import facts, make_console

    console, machine = make_console(), hardware.detect("outputs")
    console.print(hardware.machine_table(machine))
    if not machine.devices:
        console.print(f"\nWhy no GPU: {why_no_gpu()}")
    drivers = {driver for (driver,) in hardware.nvidia_smi_rows("gpu", "driver_version")}
    rows = [
        ("NVIDIA driver", ", ".join(sorted(drivers)) or "none found"),
        ("CUDA of torch", torch.version.cuda or "none: a CPU build"),
        ("Python", platform.python_version()),
        ("sft", sft.__version__),
        *((name, _installed(name)) for name in PACKAGES),
    ]
    console.print()
    console.print(facts("Versions", rows))


def why_no_gpu() -> str:
    """Returns the most likely reason why torch sees no GPU."""
    import torch

    from sft.runtime import hardware

    present = [name for (name,) in hardware.nvidia_smi_rows("gpu", "name")]
    if not present:
        return "nvidia-smi is missing or lists none. Everything here also runs on the CPU."
    found = f"nvidia-smi lists {len(present)} ({present[0]})"
    if torch.version.cuda is None:
        return (
            f"{found}, but this torch ({torch.__version__}) is a build without CUDA: reinstall it."
        )
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"{found}, but CUDA_VISIBLE_DEVICES={hidden!r} hides them: unset it."
    cuda = torch.version.cuda
    return f"{found}, but torch cannot use them: is the driver too old for CUDA {cuda}?"


def _installed(name: str) -> str:
    """Returns a package's version from its metadata: an import may take seconds or need a GPU."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
