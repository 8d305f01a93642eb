"""Detects what this machine has: devices, memory, bf16, interconnect, cores, disk. Copies to a GPU.

- Cores and memory are what *this process* may use: CPU affinity and cgroup limits (containers,
  SLURM) count, not what the mainboard has.
- Free GPU memory comes from nvidia-smi. CUDA is asked only if that fails, since every rank would
  open a context (about 0.5 GiB) on every GPU.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.table import Table

from sft.config.schema import Train
from sft.runtime.console import facts
from sft.runtime.output import show

if TYPE_CHECKING:
    import torch

GIB = 1024**3
CPU_PROCESSES = 2  # without a GPU: enough to exchange gradients, cheap enough for a laptop
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's
WORST_TO_BEST = ("SYS", "NODE", "PHB", "PXB", "PIX", "NV")  # of `nvidia-smi topo -m`
UNKNOWN = "unknown"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


@dataclass(frozen=True)
class Device:
    """One GPU that torch can use, in torch's numbering (CUDA_VISIBLE_DEVICES applies)."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int | None
    """None if neither nvidia-smi nor CUDA reports it."""
    bf16: bool
    """Whether the hardware has bf16; emulated bf16 trains slower than fp32."""
    compute_capability: tuple[int, int] | None


@dataclass(frozen=True)
class Hardware:
    devices: list[Device]
    """Empty on a machine where torch sees no GPU."""
    cpu_name: str
    cores: int
    """Cores that this process may use (`usable_cores`)."""
    ram_total_bytes: int
    ram_available_bytes: int
    cpu_bf16: bool
    disk_free_bytes: int
    """Free space where `path` of `detect` is or will be."""
    interconnect: str | None
    """The worst link between two of the GPUs; None if unknown or with fewer than two."""
    is_here: bool = True
    """Whether it is this machine. If not, only its devices are known."""


def detect(path: str | Path = ".") -> Hardware:
    """Detects this machine; `path` is where output will be written (it need not exist yet)."""
    devices = _devices()
    limits = cgroup_limits()
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    if limits.memory_bytes is not None and limits.memory_bytes < total:
        total = limits.memory_bytes
        available = max(0, min(available, total - (limits.memory_used_bytes or 0)))
    cpuinfo = _read(Path("/proc/cpuinfo"))
    return Hardware(
        devices=devices,
        cpu_name=_cpu_name(cpuinfo),
        cores=usable_cores(),
        ram_total_bytes=total,
        ram_available_bytes=available,
        cpu_bf16=bool(BF16_FLAGS & _cpu_flags(cpuinfo)),
        disk_free_bytes=shutil.disk_usage(nearest_existing(Path(path))).free,
        interconnect=_interconnect(devices),
    )


def default_num_processes(hw: Hardware) -> int:
    """Returns one process per GPU, or two (on gloo) without a GPU."""
    return len(hw.devices) or CPU_PROCESSES


def resolve_precision(train: Train, devices: list[Device] | None = None) -> tuple[str, str]:
    """Returns (precision, reason) for `devices`; by default, for the GPU of this process.

    It is the precision of computing: `bf16_pure` computes in bf16.
    """
    import torch

    if train.is_bf16_pure:
        return "bf16", "configured, as are bf16 weights, gradients and moments"

    if train.precision != "auto":
        return train.precision, "configured"
    on_gpu = torch.cuda.is_available() if devices is None else bool(devices)
    if not on_gpu:
        return "fp32", "no GPU; fp32 is exact and on CPUs seldom slower"
    own = devices is None and torch.cuda.is_bf16_supported(including_emulation=False)
    if own or (devices and all(device.bf16 for device in devices)):
        return "bf16", "the GPU computes in bf16"
    return "fp16", "the GPU has no bf16"


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor of the host on a device; the host does not wait until a GPU has it.

    A copy from memory that is not pinned would wait for all work that the GPU has to do before.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def machine_table(hw: Hardware) -> Table:
    """Returns the table "This machine"."""
    gpus = [(f"GPU {device.index}", describe_device(device)) for device in hw.devices]
    rows = gpus or [("GPU", "none that torch can use: training runs on the CPU")]
    if len(hw.devices) > 1:
        rows.append(("interconnect", hw.interconnect or UNKNOWN))
    rows += [
        ("CPU", hw.cpu_name),
        ("cores", f"{hw.cores} usable by this process"),
        ("bf16 on the CPU", "in hardware" if hw.cpu_bf16 else "no"),
        ("RAM", f"{gib(hw.ram_available_bytes)} available of {gib(hw.ram_total_bytes)}"),
        ("disk", f"{gib(hw.disk_free_bytes)} free"),
        ("processes", f"{default_num_processes(hw)} by default"),
    ]
    return facts("This machine", rows)


def describe_device(device: Device) -> str:
    """Returns 'NVIDIA H200, 139.8 GiB (139.2 GiB free), compute capability 9.0, bf16'."""
    capability = device.compute_capability
    shown = ".".join(map(str, capability)) if capability else UNKNOWN
    return (
        f"{device.name}, {gib(device.total_bytes)} ({gib(device.free_bytes)} free), "
        f"compute capability {shown}, {'bf16' if device.bf16 else 'no bf16'}"
    )


def gib(num_bytes: int | None) -> str:
    return UNKNOWN if num_bytes is None else f"{num_bytes / GIB:.1f} GiB"


def missing_compiler(devices: list[Device]) -> str:
    """Returns what `torch.compile` lacks on this machine, with the remedy; "": nothing.

    It generates C++ for a CPU. For a GPU, Triton builds a launcher in C.
    """
    kind, variable, usual = "C++", "CXX", ["clang++" if platform.system() == "Darwin" else "g++"]
    if devices:
        kind, variable, usual = "C", "CC", ["gcc", "clang"]
    names = [os.environ[variable]] if variable in os.environ else usual
    if any(map(shutil.which, names)):
        return ""
    return (
        f"there is no {kind} compiler (looked for {' and '.join(names)}): install one, or set the "
        f"environment variable {variable} to its path"
    )


def nearest_existing(path: Path) -> Path:
    """Returns `path`, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def library_versions() -> dict[str, str]:
    """Returns versions from the packages' metadata: an import may take seconds or need a GPU."""
    found = dict.fromkeys(LIBRARIES, "not installed")
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def nvidia_smi(*arguments: str) -> str | None:
    """Returns what nvidia-smi prints; None if it is missing, fails or hangs (a broken driver)."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def nvidia_smi_rows(query: str, *fields: str) -> list[list[str]]:
    """Returns a row of cells for each GPU or process, as text; memory is in MiB.

    `query` and `fields` are those of nvidia-smi, such as "gpu" and "uuid", "memory.free".
    """
    text = nvidia_smi(f"--query-{query}={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in (text or "").splitlines()]
    return [row for row in rows if len(row) == len(fields)]


def _devices() -> list[Device]:
    import torch

    if not torch.cuda.is_available():
        return []
    free = {
        uuid.removeprefix("GPU-"): int(mib) * 1024**2
        for uuid, mib in nvidia_smi_rows("gpu", "uuid", "memory.free")
        if mib.isdigit()
    }
    amd = torch.version.hip is not None  # its major.minor is a gfx number, not a compute capability
    result = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes = free.get(str(getattr(properties, "uuid", "")))
        if free_bytes is None:
            with suppress(RuntimeError):  # a GPU in exclusive mode that another process holds
                free_bytes = torch.cuda.mem_get_info(index)[0]
        device = Device(
            index=index,
            name=properties.name,
            total_bytes=properties.total_memory,
            free_bytes=free_bytes,
            bf16=amd or properties.major >= 8,
            compute_capability=None if amd else (properties.major, properties.minor),
        )
        result.append(device)
    return result


def _interconnect(devices: list[Device]) -> str | None:
    return worst_link(nvidia_smi("topo", "-m") or "", len(devices)) if len(devices) > 1 else None


def worst_link(topology: str, num_devices: int) -> str | None:
    """Returns 'NVLink (NV18)' or 'PCIe (PHB)' from `nvidia-smi topo -m`, or None if unknown.

    The matrix lists every GPU of the machine. If torch sees only `num_devices` of them and links
    differ, it is unknown which links are used.
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()  # the header is underlined
    cells = [line.split()[1:] for line in lines if line.strip().startswith("GPU")]
    rows = [row for row in cells if "X" in row]  # the header, which starts with GPU0 too, has none
    links = {link for row in rows for link in row[: len(rows)] if link != "X"}
    known = all(_quality(link)[0] >= 0 for link in links)
    if not links or not known or (len(rows) != num_devices and len(links) > 1):
        return None
    worst = min(links, key=_quality)
    return f"NVLink ({worst})" if worst.startswith("NV") else f"PCIe ({worst})"


def _quality(link: str) -> tuple[int, int]:
    """Orders links from worst to best; more lanes of NVLink are better. Unknown: -1."""
    kind = link.rstrip("0123456789")
    order = WORST_TO_BEST.index(kind) if kind in WORST_TO_BEST else -1
    return order, int(link.removeprefix(kind) or 0)


@dataclass(frozen=True)
class CgroupLimits:
    cores: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    """Without the page cache that the kernel gives back under pressure."""


def cgroup_limits(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> CgroupLimits:
    """Returns the tightest limits of our cgroup (version 1 or 2) and its ancestors: all bind.

    In a container the path may be the host's, so folders that do not exist are skipped.
    """
    cores: list[float] = []
    memory: list[tuple[int, int]] = []  # (limit, used)
    for controllers, folder in _cgroup_folders(membership, root):
        if controllers & {"", "cpu"}:
            cores += _cpu_quota(folder)
        if controllers & {"", "memory"}:
            memory += _memory_limit(folder)
    limit, used = min(memory, default=(None, None))
    return CgroupLimits(min(cores, default=None), limit, used)


def _cgroup_folders(membership: Path, root: Path) -> list[tuple[set[str], Path]]:
    """Returns (controllers, folder) of our cgroup and its ancestors; {''} in version 2."""
    result = []
    for line in _read(membership).splitlines():
        _, names, path = line.split(":", 2)
        base = root / names if names else root
        folder = base / path.lstrip("/")
        ancestors = [folder, *folder.parents]
        inside = [each for each in ancestors if each == base or base in each.parents]
        result += [(set(names.split(",")), each) for each in inside if each.is_dir()]
    return result


def _cpu_quota(folder: Path) -> list[float]:
    version2 = _read(folder / "cpu.max").split()  # "max 100000" or "150000 100000", microseconds
    version1 = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period = version2 if len(version2) == 2 else version1
    return [int(quota) / int(period)] if quota.isdigit() and period.isdigit() else []  # "-1": none


def _memory_limit(folder: Path) -> list[tuple[int, int]]:
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for limit_name, used_name in names:
        limit = _read(folder / limit_name).strip()
        if limit.isdigit():
            used = int(_read(folder / used_name).strip() or 0)
            statistics = _read(folder / "memory.stat")
            cache = re.search(r"^(?:total_)?inactive_file (\d+)", statistics, re.M)
            return [(int(limit), max(0, used - int(cache[1] if cache else 0)))]
    return []


def usable_cores() -> int:
    """Returns how many cores this process may use: the least of affinity and cgroup quota."""
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has none
    allowed = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(allowed, int(cgroup_limits().cores or allowed)))


def _cpu_name(cpuinfo: str) -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)  # Arm's cpuinfo has no name
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def _cpu_flags(cpuinfo: str) -> set[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.M)
    return set(found.group(1).split()) if found else set()


def _read(path: Path) -> str:
    """Returns the text of a file of the kernel, or '' if this kernel does not have it."""
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":  # `world` runs this to count GPUs
    show(str(default_num_processes(detect())))


def private_bytes() -> int:
    """Returns the memory of this process that no file backs, if the system counts it."""
    found = psutil.Process().memory_info()
    return int(found.rss - getattr(found, "shared", 0))


class PeakMemory:
    """The most private memory within a context, beyond that at its beginning."""

    SECONDS = 0.01  # between two looks

    def __init__(self) -> None:
        self.most = 0
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._before is None:
            self._before = private_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self.SECONDS):
            self._look()

    def _look(self) -> None:
        assert self._before is not None
        self.most = max(self.most, private_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
