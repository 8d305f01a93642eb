"""`make gpu-info`: what this machine is and which versions will drive it.

Also answers the usual question, why there is no GPU, as far as it can be seen from here.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from sft import cli
from sft.runtime import hardware

PACKAGES = ("torch", "accelerate", "transformers", "peft", "bitsandbytes", "deepspeed")


def main() -> None:
    hw = hardware.detect("outputs")
    console = Console(highlight=False, width=100)
    console.print(hardware.machine_table(hw))
    if not hw.devices:
        console.print(f"\nWhy no GPU: {why_no_gpu()}")
    console.print()
    console.print(versions())


def why_no_gpu() -> str:
    present = [name for (name,) in hardware.nvidia_smi_rows("gpu", "name")]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present:
        return "nvidia-smi is missing or lists none. Everything here also runs on the CPU."
    found = f"nvidia-smi lists {len(present)} ({present[0]})"
    if torch.version.cuda is None:
        return (
            f"{found}, but this torch ({torch.__version__}) is a build without CUDA: reinstall it."
        )
    if hidden is not None:
        return f"{found}, but CUDA_VISIBLE_DEVICES={hidden!r} hides them: unset it."
    return (
        f"{found}, but torch cannot use them: is the driver too old for CUDA {torch.version.cuda}?"
    )


def versions() -> Table:
    result = Table(title="Versions", title_justify="left", show_header=False, box=None)
    result.add_column(style="cyan", no_wrap=True)
    result.add_column(overflow="fold")
    drivers = {driver for (driver,) in hardware.nvidia_smi_rows("gpu", "driver_version")}
    result.add_row("NVIDIA driver", ", ".join(sorted(drivers)) or "none found")
    result.add_row("CUDA of torch", torch.version.cuda or "none: a CPU build")
    result.add_row("Python", platform.python_version())
    for name in PACKAGES:
        result.add_row(name, installed(name))
    return result


def installed(name: str) -> str:
    """From the package's metadata: importing some of these takes seconds, or needs a GPU."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    cli.run(main)
