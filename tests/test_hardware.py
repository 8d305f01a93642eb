"""What the machine is: the real CPU; GPUs are played, torch and nvidia-smi from written tables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from sft.plan import gpus
from sft.runtime import hardware
from sft.runtime.hardware import GIB, CgroupLimits, Device, Hardware

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \t{a}\t{b}\t{b}\tPXB\t0-31\t0\t\tN/A
GPU1\t{a}\t X \t{b}\t{b}\tPXB\t0-31\t0\t\tN/A
GPU2\t{b}\t{b}\t X \t{a}\tSYS\t32-63\t1\t\tN/A
GPU3\t{b}\t{b}\t{a}\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPXB\tPXB\tSYS\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


def machine(num_gpus: int) -> Hardware:
    devices = [
        Device(i, "NVIDIA H200", 140 * GIB, 139 * GIB, True, (9, 0)) for i in range(num_gpus)
    ]
    return Hardware(devices, "AMD EPYC", 8, 64 * GIB, 60 * GIB, True, 500 * GIB, "NVLink (NV18)")


def test_this_machine_agrees_with_the_system(tmp_path: Path) -> None:
    hw = hardware.detect(tmp_path / "not" / "there" / "yet")
    assert 1 <= hw.cores <= len(os.sched_getaffinity(0))
    assert 0 < hw.ram_available_bytes <= hw.ram_total_bytes <= psutil.virtual_memory().total
    assert hw.disk_free_bytes == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.05)
    assert hw.cpu_name
    assert hw.interconnect is None or len(hw.devices) > 1


@pytest.mark.parametrize(("num_gpus", "expected"), [(0, 2), (1, 1), (8, 8)])
def test_default_number_of_processes(num_gpus: int, expected: int) -> None:
    assert hardware.default_num_processes(machine(num_gpus)) == expected


@pytest.mark.parametrize("num_gpus", [0, 1, 8])
def test_the_table_fits_100_columns_and_reports_all(num_gpus: int) -> None:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(hardware.machine_table(machine(num_gpus)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert len(re.findall(r"GPU \d", text)) == num_gpus
    assert ("none that torch can use" in text) == (num_gpus == 0)
    assert ("NVLink (NV18)" in text) == (num_gpus > 1)
    for part in ("AMD EPYC", "8 usable", "60.0 GiB available of 64.0 GiB", "500.0 GiB free"):
        assert part in text


# ---- cgroups


@pytest.fixture
def cgroup(tmp_path: Path) -> Callable[[str, dict[str, str]], CgroupLimits]:
    """Limits read from a written-out /proc/self/cgroup and /sys/fs/cgroup."""

    def read(membership: str, files: dict[str, str]) -> CgroupLimits:
        (tmp_path / "self").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return hardware.cgroup_limits(tmp_path / "self", tmp_path / "fs")

    return read


def test_cgroup_2_takes_the_tightest_ancestor(cgroup) -> None:
    limits = cgroup(
        "0::/job/step\n",
        {
            "job/cpu.max": "350000 100000\n",
            "job/memory.max": f"{8 * GIB}\n",
            "job/memory.current": f"{5 * GIB}\n",
            "job/memory.stat": f"anon 1\nactive_file 7\ninactive_file {2 * GIB}\n",
            "job/step/cpu.max": "max 100000\n",
            "job/step/memory.max": "max\n",
        },
    )
    assert limits == CgroupLimits(3.5, 8 * GIB, 3 * GIB)  # the page cache is not used up


def test_cgroup_1_and_a_path_that_exists_only_on_the_host(cgroup) -> None:
    limits = cgroup(
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n",
        {
            "memory/memory.limit_in_bytes": f"{4 * GIB}",
            "memory/memory.usage_in_bytes": f"{1 * GIB}",
            "cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    assert limits == CgroupLimits(2.0, 4 * GIB, 1 * GIB)


def test_no_cgroup_limit(cgroup) -> None:
    assert cgroup("", {}) == CgroupLimits()
    assert cgroup("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1"}).cores is None


def test_detect_honours_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cgroup_limits", lambda: CgroupLimits(0.5, GIB, GIB // 4))
    hw = hardware.detect()
    assert hw.cores == 1  # never none
    assert (hw.ram_total_bytes, hw.ram_available_bytes) == (GIB, GIB - GIB // 4)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 fsrm\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("", False),
    ],
)
def test_bf16_from_the_flags_of_the_cpu(cpuinfo: str, expected: bool) -> None:
    assert bool(hardware._cpu_flags(cpuinfo) & hardware.BF16_FLAGS) == expected


# ---- GPUs


@pytest.mark.parametrize(
    ("a", "b", "visible", "expected"),
    [
        ("NV18", "NV18", 4, "NVLink (NV18)"),
        ("NV4", "NV2", 4, "NVLink (NV2)"),
        ("NV12", "SYS", 4, "PCIe (SYS)"),  # the slowest link decides
        ("PIX", "PHB", 4, "PCIe (PHB)"),
        ("NV18", "NV18", 2, "NVLink (NV18)"),  # any two of the four
        ("NV12", "SYS", 2, None),  # which two?
        ("???", "SYS", 4, None),
    ],
)
def test_worst_link(a: str, b: str, visible: int, expected: str | None) -> None:
    assert hardware.worst_link(TOPOLOGY.format(a=a, b=b), visible) == expected


def test_worst_link_of_nothing() -> None:
    assert hardware.worst_link("", 2) is None


def test_gpus_as_torch_and_nvidia_smi_report_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def properties(index: int) -> SimpleNamespace:
        major = (9, 7)[index]
        return SimpleNamespace(
            name="G", total_memory=2 * GIB, uuid=f"u{index}", major=major, minor=0
        )

    def mem_get_info(index: int) -> tuple[int, int]:
        assert index == 1, "a context on a GPU that nvidia-smi knows"
        raise RuntimeError("held exclusively")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.version, "hip", None)
    fake_smi(
        monkeypatch, {"--query-gpu=uuid,memory.free": "GPU-u9, 7\nGPU-u0, 1024\nGPU-u1, [N/A]\n"}
    )
    hw = hardware.detect()
    assert hw.devices == [
        Device(0, "G", 2 * GIB, GIB, True, (9, 0)),
        Device(1, "G", 2 * GIB, None, False, (7, 0)),
    ]
    assert hw.interconnect is None
    assert "unknown free" in hardware.describe_device(hw.devices[1])


def fake_smi(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
    monkeypatch.setattr(hardware, "nvidia_smi", lambda *arguments: answers.get(arguments[0]))


def test_nvidia_smi_missing_or_failing_is_a_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.nvidia_smi("-L") is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho driver trouble; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert hardware.nvidia_smi("-L") is None
    assert hardware.nvidia_smi_rows("gpu", "uuid") == []


@pytest.mark.parametrize(
    ("text", "name", "gib", "number"),
    [
        ("H100-80GB x 8", "H100-80GB", 79.1, 8),
        ("h200", "h200", 139.8, 1),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", 39.4, 1),
        ("NVIDIA H100 80GB HBM3 x 2", "NVIDIA H100 80GB HBM3", 79.1, 2),
        ("RTX 4090 X 4", "RTX 4090", 23.6, 4),
        ("L4", "L4", 22.0, 1),
        ("2 x 4090", "4090", 23.6, 2),
        ("4090x2", "4090", 23.6, 2),
        ("8xH100-80GB", "H100-80GB", 79.1, 8),
        ("RTX 3090", "RTX 3090", 23.6, 1),  # not 3,090 of a GPU named RT
        ("3090ti", "3090ti", 23.6, 1),
        ("RTX 4090x2", "RTX 4090", 23.6, 2),
        ("A100", "A100", 39.4, 1),  # the smaller one
        ("A100 x4", "A100", 39.4, 4),
        ("A100 80GB PCIe", "A100 80GB PCIe", 79.2, 1),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe", 79.1, 1),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada Generation", 47.4, 1),
        ("AMD Instinct MI300X x 8", "AMD Instinct MI300X", 191.9, 8),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB", 94.5, 1),  # 480 GB of the host
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "NVIDIA GeForce RTX 4070 Ti SUPER", 15.6, 1),
        ("RTX A5000 x 2", "RTX A5000", 23.6, 2),
        ("H100 MIG 3g.40gb", "H100 MIG 3g.40gb", 0.97 * 40, 1),
        ("2 x A100-80GB 1g.10gb", "A100-80GB 1g.10gb", 0.97 * 10, 2),
    ],
)
def test_gpus_by_name(text, name, gib, number):
    devices = gpus.named_gpus(text)
    assert [device.index for device in devices] == list(range(number))
    assert {(device.name, device.bf16) for device in devices} == {(name, True)}
    assert devices[0].total_bytes == round(gib * hardware.GIB)


def test_gpus_without_a_known_name():
    for text in ("", "x 8", "8 x", "Voodoo", "Voodoo 2", "A10-80GB", "1g.10gb", "NVIDIA", "40GB"):
        with pytest.raises(ValueError, match=r"expected one of T4, .* GIB=48"):
            gpus.named_gpus(text)
    for text, gib in (("H100-80GB x 0", None), ("H100-80GB", 0), ("mine", -5)):
        with pytest.raises(ValueError, match="at least one GPU and a memory above 0"):
            gpus.named_gpus(text, gib)
    assert gpus.named_gpus("Voodoo x 2", 48)[1].total_bytes == 48 * hardware.GIB
    assert gpus.named_gpus("H100-80GB", 10)[0].total_bytes == 10 * hardware.GIB
    for name in (
        "T4",
        "V100",
        "P100",
        "Tesla P100-PCIE-16GB",
        "RTX 2080 Ti",
        "TITAN RTX",
        "GTX 1080 Ti",
    ):
        assert not gpus.named_gpus(name)[0].bf16


def test_every_gpu_is_found_by_its_own_name_and_a_slice_has_its_share():
    for name, gpu in gpus.GPUS.items():
        assert gpus.find_gpu(name) == gpu
        assert gpus.find_gpu(f"NVIDIA {name.replace('-', ' ')}") == gpu
        assert len(gpus.named_gpus(f"{name} x 3")) == len(gpus.named_gpus(f"3x{name}")) == 3
    part = gpus.find_gpu("H100 2g.20gb")
    assert part is not None
    assert part.teraflops == pytest.approx(989 * 2 / 7)
