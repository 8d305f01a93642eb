"""`make memory-check`: where memory and disk have gone, and to which of *your* processes.

Other users' processes are left out (their memory shows in "used"): nothing can be done about them
here. In a container nvidia-smi may list process ids of the host, which are left out as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from sft import cli
from sft.runtime import hardware
from sft.runtime.hardware import gib

TOP = 5  # the largest processes and folders
SMALL_BYTES = 50 * 1024**2  # not worth a line
Holding = tuple[int, str]  # bytes, who


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--outputs", default="outputs", type=Path, help="folder of the runs")
    outputs = parser.parse_args().outputs
    result = Table("", "total", "used", "free", "held by (the largest that are yours)", box=None)
    for column in result.columns[1:4]:
        column.justify, column.no_wrap = "right", True
    result.columns[4].overflow = "fold"
    hw = hardware.detect(outputs)
    holders = gpu_holders()
    for device in hw.devices:
        held = holders.get(device.index, []) if device.free_bytes is not None else []
        add(result, f"GPU {device.index}", device.total_bytes, device.free_bytes, held)
    add(result, "RAM", hw.ram_total_bytes, hw.ram_available_bytes, ram_holders())
    disk = shutil.disk_usage(hardware.nearest_existing(outputs))
    add(result, "disk", disk.total, disk.free, folders(outputs))
    Console(highlight=False, width=100).print(result)


def add(result: Table, name: str, total: int, free: int | None, held: Iterable[Holding]) -> None:
    """One row; "used" is all that is not free, so that the three numbers add up."""
    used = None if free is None else total - free
    largest = sorted((each for each in held if each[0] >= SMALL_BYTES), reverse=True)[:TOP]
    lines = "\n".join(f"{gib(size)}  {who}" for size, who in largest)
    result.add_row(name, gib(total), gib(used), gib(free), lines or "-")


def ram_holders() -> list[Holding]:
    found = []
    for process in psutil.process_iter():
        who = mine(process) if process.pid != os.getpid() else ""
        if who:
            try:
                found.append((process.memory_info().rss, who))
            except psutil.Error:  # it ended meanwhile
                continue
    return found


def gpu_holders() -> dict[int, list[Holding]]:
    """torch's device index -> who holds its memory."""
    import torch

    index_of = {
        f"GPU-{torch.cuda.get_device_properties(index).uuid}": index
        for index in range(torch.cuda.device_count())
    }
    found: dict[int, list[Holding]] = {}
    for uuid, pid, mib in hardware.nvidia_smi_rows(
        "compute-apps", "gpu_uuid", "pid", "used_memory"
    ):
        if uuid in index_of and mib.isdigit() and psutil.pid_exists(int(pid)):
            who = mine(psutil.Process(int(pid)))
            if who:
                found.setdefault(index_of[uuid], []).append((int(mib) * 1024**2, who))
    return found


def mine(process: psutil.Process) -> str:
    """'1234 python scripts/train.py', or '' when it is not this user's (or has ended)."""
    try:
        if process.uids().real != os.getuid():
            return ""
        words = process.cmdline()
    except psutil.Error:
        return ""
    command = " ".join([Path(words[0]).name, *words[1:]]) if words else "?"
    return f"{process.pid} {command[:46]}"


def folders(outputs: Path) -> list[Holding]:
    """The folders in `outputs` (runs) with their size on disk."""
    if not outputs.is_dir():
        return []
    runs = [each for each in outputs.iterdir() if each.is_dir() and not each.is_symlink()]
    return [(folder_bytes(run), f"{outputs.name}/{run.name}") for run in runs]


def folder_bytes(folder: Path) -> int:
    """Allocated blocks, as du counts; a file that vanishes meanwhile counts nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


if __name__ == "__main__":
    cli.run(main)
