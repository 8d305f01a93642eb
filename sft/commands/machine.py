"""Verbs for this machine: `gpu-info` says what it has, `memory-check` what is used, and by what."""

from __future__ import annotations

import os
import platform
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

import sft
from sft import cli
from sft.runtime import hardware
from sft.runtime.console import facts, make_console, table
from sft.runtime.hardware import gib, nvidia_smi_rows

NUM_USES = 5  # the largest processes and folders are listed
SMALL_BYTES = 50 * 1024**2  # smaller uses are not listed
Use = tuple[int, str]  # bytes, by what


def gpu_info(args: Namespace) -> None:
    """Prints a table of the machine, why torch sees no GPU, if so, and a table of versions."""
    import torch

    console, machine = make_console(), hardware.detect("outputs")
    console.print(hardware.machine_table(machine))
    if not machine.devices:
        console.print(f"\nWhy no GPU: {_why_no_gpu()}")
    drivers = {driver for (driver,) in nvidia_smi_rows("gpu", "driver_version")}
    rows = [
        ("NVIDIA driver", ", ".join(sorted(drivers)) or "none found"),
        ("CUDA of torch", torch.version.cuda or "none: a CPU build"),
        ("Python", platform.python_version()),
        ("sft", sft.__version__),
        *hardware.library_versions().items(),
    ]
    console.print()
    console.print(facts("Versions", rows))


def _why_no_gpu() -> str:
    """Returns the most likely reason why torch sees no GPU."""
    import torch

    present = [name for (name,) in nvidia_smi_rows("gpu", "name")]
    if not present:
        return "nvidia-smi is missing or lists none. Everything here also runs on the CPU."
    found, cuda = f"nvidia-smi lists {len(present)} ({present[0]})", torch.version.cuda
    if cuda is None:
        build = f"this torch ({torch.__version__}) is a build without CUDA"
        return f"{found}, but {build}: reinstall it."
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"{found}, but CUDA_VISIBLE_DEVICES={hidden!r} hides them: unset it."
    return f"{found}, but torch cannot use them: is the driver too old for CUDA {cuda}?"


def memory_check_options(parser: cli.Parser) -> None:
    parser.add_argument("--outputs", default="outputs", type=Path, help="folder of the runs")


def memory_check(args: Namespace) -> None:
    """Prints a row for each GPU, for memory and for the disk, with *your* processes and runs.

    Processes of other users are not listed, because you cannot end them; their memory counts as
    used. In a container nvidia-smi may list process ids of the host, which are not listed either.
    """
    machine, on_gpus = hardware.detect(args.outputs), _uses_of_gpus()
    rows = [
        _row(f"GPU {gpu.index}", gpu.total_bytes, gpu.free_bytes, on_gpus.get(gpu.index, []))
        for gpu in machine.devices
    ]
    rows.append(_row("RAM", machine.ram_total_bytes, machine.ram_available_bytes, _uses_of_ram()))
    disk = shutil.disk_usage(hardware.nearest_existing(args.outputs))
    rows.append(_row("disk", disk.total, disk.free, _uses_of_disk(args.outputs)))
    columns = ("", "total", "used", "free", "used by (your largest)")
    shown = table("", columns, rows)
    shown.columns[-1].justify = "left"
    make_console().print(shown)


def _row(name: str, total: int, free: int | None, uses: Iterable[Use]) -> tuple[str, ...]:
    """Returns a row of the table. "used" is total - free, so that the three numbers add up."""
    used = None if free is None else total - free
    largest = sorted((use for use in uses if use[0] >= SMALL_BYTES), reverse=True)[:NUM_USES]
    lines = "\n".join(f"{gib(size)}  {what}" for size, what in largest)
    return name, gib(total), gib(used), gib(free), lines or "-"


def _uses_of_ram() -> Iterator[Use]:
    for process in psutil.process_iter():
        if process.pid != os.getpid() and (command := _describe(process)):
            with suppress(psutil.Error):  # the process may have ended
                yield process.memory_info().rss, command


def _uses_of_gpus() -> dict[int, list[Use]]:
    """Returns the processes that use the memory of each GPU, by torch's index of the GPU."""
    import torch

    index_of = {
        f"GPU-{torch.cuda.get_device_properties(index).uuid}": index
        for index in range(torch.cuda.device_count())
    }
    found: dict[int, list[Use]] = {}
    for uuid, pid, mib in nvidia_smi_rows("compute-apps", "gpu_uuid", "pid", "used_memory"):
        is_here = uuid in index_of and mib.isdigit() and psutil.pid_exists(int(pid))
        if is_here and (command := _describe(psutil.Process(int(pid)))):
            found.setdefault(index_of[uuid], []).append((int(mib) * 1024**2, command))
    return found


def _describe(process: psutil.Process) -> str:
    """Returns '1234 python scripts/train.py', or '' if it is another user's or has ended."""
    try:
        if process.uids().real != os.getuid():
            return ""
        words = process.cmdline()
    except psutil.Error:
        return ""
    command = " ".join([Path(words[0]).name, *words[1:]]) if words else "?"
    return f"{process.pid} {command[:46]}"


def _uses_of_disk(outputs: Path) -> Iterator[Use]:
    """Yields the folders in `outputs`, which are runs, with their size."""
    from sft.runtime.disk import folder_bytes

    for run in outputs.iterdir() if outputs.is_dir() else ():
        if run.is_dir() and not run.is_symlink():
            yield folder_bytes(run), f"{outputs.name}/{run.name}"
