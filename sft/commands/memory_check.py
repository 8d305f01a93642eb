"""Prints how much memory and disk is used, and by which of *your* processes and runs.

Processes of other users are not listed, because you cannot end them; their memory counts in "used".
In a container nvidia-smi may list process ids of the host, which are not listed either.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from sft import cli

TOP = 5  # the largest processes and folders
SMALL_BYTES = 50 * 1024**2  # smaller uses are not listed
Use = tuple[int, str]  # bytes, by what


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--outputs", default="outputs", type=Path, help="folder of the runs")


def main(args: Namespace) -> None:
    """Prints one row for each GPU, one for memory and one for the disk."""
    from sft.runtime import hardware
    from sft.runtime.console import make_console, table

    machine, on_gpus = hardware.detect(args.outputs), _on_gpus()
    rows = [
        _row(f"GPU {gpu.index}", gpu.total_bytes, gpu.free_bytes, on_gpus.get(gpu.index, []))
        for gpu in machine.devices
    ]
    rows.append(_row("RAM", machine.ram_total_bytes, machine.ram_available_bytes, _in_ram()))
    disk = shutil.disk_usage(hardware.nearest_existing(args.outputs))
    rows.append(_row("disk", disk.total, disk.free, _on_disk(args.outputs)))
    columns = ("", "total", "used", "free", "used by (your largest)")
    shown = table("", columns, rows)
    shown.columns[-1].justify = "left"
    make_console().print(shown)


def _row(name: str, total: int, free: int | None, uses: Iterable[Use]) -> tuple[str, ...]:
    """Returns a row of the table. "used" is total - free, so that the three numbers add up."""
    from sft.runtime.hardware import gib

    used = None if free is None else total - free
    largest = sorted((use for use in uses if use[0] >= SMALL_BYTES), reverse=True)[:TOP]
    lines = "\n".join(f"{gib(size)}  {what}" for size, what in largest)
    return name, gib(total), gib(used), gib(free), lines or "-"


def _in_ram() -> Iterator[Use]:
    for process in psutil.process_iter():
        if process.pid != os.getpid() and (who := _described(process)):
            with suppress(psutil.Error):  # the process may have ended
                yield process.memory_info().rss, who


def _on_gpus() -> dict[int, list[Use]]:
    """Returns the processes that use the memory of each GPU, by torch's index of the GPU."""
    import torch

    from sft.runtime.hardware import nvidia_smi_rows

    index_of = {
        f"GPU-{torch.cuda.get_device_properties(index).uuid}": index
        for index in range(torch.cuda.device_count())
    }
    found: dict[int, list[Use]] = {}
    for uuid, pid, mib in nvidia_smi_rows("compute-apps", "gpu_uuid", "pid", "used_memory"):
        is_ours = uuid in index_of and mib.isdigit() and psutil.pid_exists(int(pid))
        if is_ours and (who := _described(psutil.Process(int(pid)))):
            found.setdefault(index_of[uuid], []).append((int(mib) * 1024**2, who))
    return found


def _described(process: psutil.Process) -> str:
    """Returns '1234 python scripts/train.py', or '' if it is another user's or has ended."""
    try:
        if process.uids().real != os.getuid():
            return ""
        words = process.cmdline()
    except psutil.Error:
        return ""
    command = " ".join([Path(words[0]).name, *words[1:]]) if words else "?"
    return f"{process.pid} {command[:46]}"


def _on_disk(outputs: Path) -> Iterator[Use]:
    """Yields the folders in `outputs`, which are runs, with their size."""
    from sft.runtime.disk import folder_bytes

    for run in outputs.iterdir() if outputs.is_dir() else ():
        if run.is_dir() and not run.is_symlink():
            yield folder_bytes(run), f"{outputs.name}/{run.name}"
