"""Lists GPUs by name, so that a run can be planned on a machine without them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from sft.runtime.hardware import GIB, Device


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know about a kind of GPU."""

    gib: float
    """Total memory as torch reports it; the numbers in data sheets are larger."""
    teraflops: float
    """Peak without sparsity in bf16 (or fp16, if the GPU has no bf16) with sums in fp32, from the
    data sheet."""
    bf16: bool = True


GPUS = {  # of a GPU with several sizes of memory the smallest first: a name without size means it
    "T4": Gpu(14.6, 65, False),
    "P100": Gpu(15.9, 19, False),
    "V100-16GB": Gpu(15.8, 125, False),
    "V100-32GB": Gpu(31.7, 125, False),
    "1080 Ti": Gpu(10.9, 11, False),
    "2080": Gpu(7.6, 40, False),
    "2080 Ti": Gpu(10.6, 54, False),
    "Titan RTX": Gpu(23.6, 65, False),
    "Quadro RTX 8000": Gpu(47.4, 65, False),
    "A10": Gpu(22.0, 125),
    "A10G": Gpu(22.0, 70),
    "A30": Gpu(23.5, 165),
    "A40": Gpu(44.4, 150),
    "L4": Gpu(22.0, 121),
    "3060": Gpu(11.6, 25),
    "3060 Ti": Gpu(7.6, 32),
    "3070": Gpu(7.6, 41),
    "3080": Gpu(9.6, 60),
    "3080 Ti": Gpu(11.6, 68),
    "3090": Gpu(23.6, 71),
    "3090 Ti": Gpu(23.6, 80),
    "4060": Gpu(7.6, 30),
    "4060 Ti": Gpu(15.6, 44),
    "4070": Gpu(11.6, 58),
    "4070 SUPER": Gpu(11.6, 71),
    "4070 Ti": Gpu(11.6, 80),
    "4070 Ti SUPER": Gpu(15.6, 88),
    "4080": Gpu(15.6, 97),
    "4080 SUPER": Gpu(15.6, 104),
    "4090": Gpu(23.6, 165),
    "5070": Gpu(11.5, 62),
    "5070 Ti": Gpu(15.5, 88),
    "5080": Gpu(15.5, 113),
    "5090": Gpu(31.3, 210),
    "A100-40GB": Gpu(39.4, 312),
    "A100-80GB": Gpu(79.2, 312),
    "L40": Gpu(44.4, 181),
    "L40S": Gpu(44.4, 362),
    "A4000": Gpu(15.6, 77),
    "A4500": Gpu(19.6, 95),
    "A5000": Gpu(23.6, 111),
    "A6000": Gpu(47.4, 155),
    "RTX 4000 Ada": Gpu(19.6, 107),
    "RTX 5000 Ada": Gpu(31.4, 261),
    "RTX 6000 Ada": Gpu(47.4, 364),
    "RTX PRO 6000 Blackwell": Gpu(94.9, 504),
    "H100-80GB": Gpu(79.1, 989),
    "H100 PCIe-80GB": Gpu(79.1, 756),
    "H100 NVL-94GB": Gpu(93.1, 835),
    "GH200-96GB": Gpu(94.5, 989),
    "A800-80GB": Gpu(79.2, 312),
    "H800-80GB": Gpu(79.1, 989),
    "H20": Gpu(95.1, 148),
    "H200": Gpu(139.8, 989),
    "B200": Gpu(178.3, 2250),
    "MI210": Gpu(64.0, 181),
    "MI250X": Gpu(64.0, 191),  # one of its two halves, which torch sees as a GPU each
    "MI300X": Gpu(191.9, 1307),
    "MI325X": Gpu(255.9, 1307),
}
# What drivers add to a name, as in "NVIDIA GeForce RTX 4090" or "NVIDIA RTX 6000 Ada Generation".
NOT_IN_A_NAME = (
    "NVIDIA|AMD|GEFORCE|GTX|INSTINCT|QUADRO|TESLA|RTX|MIG|GENERATION|WORKSTATION|SERVER|EDITION|"
    "480GB"
)
OF_A_VARIANT = r"PCIE|SXM\d?|HBM\d?E?"
SLICE = re.compile(r"\b(\d)g\.(\d+)gb", re.IGNORECASE)  # of a GPU that is cut into seven (MIG)


def named_gpus(text: str, gib: float | None = None) -> list[Device]:
    """Returns the devices that "NAME", "NAME x n" or "n x NAME" describes; `gib`: memory of each.

    Raises ValueError for a name that is not in the table, unless `gib` is given.
    """
    name, number = _split(text.strip())
    known = find_gpu(name)
    if known is None and gib is None:
        raise ValueError(
            f"expected one of {', '.join(GPUS)}, as in 'H100-80GB x 8', found {text!r}; "
            "for any other give its memory: GIB=48"
        )
    if number < 1 or (gib is not None and gib <= 0):
        raise ValueError(f"expected at least one GPU and a memory above 0, found {text!r}, {gib}")
    total = round((gib or (known.gib if known else 0)) * GIB)
    bf16 = known.bf16 if known else True
    return [Device(i, name, total, None, bf16, None) for i in range(number)]


def _split(text: str) -> tuple[str, int]:
    """Returns the name and the number of "NAME", "NAME x n" or "n x NAME", spaced or not."""
    behind = re.match(r"(?P<name>.*?)(?P<space>\s*)[x*\u00d7]\s*(?P<n>\d+)$", text, re.IGNORECASE)
    before = re.match(r"(?P<n>\d+)(?P<space>\s*)[x*\u00d7]\s*(?P<name>.+)$", text, re.IGNORECASE)
    found = [each for each in (behind, before) if each]
    known = [each for each in found if find_gpu(each["name"])]
    if find_gpu(text) is None:  # else the x belongs to the name, as in RTX 3090
        for each in known or [each for each in found if each["space"]]:
            return each["name"], int(each["n"])
    return text, 1


def find_gpu(name: str) -> Gpu | None:
    """Returns the GPU that people or drivers call `name`, or a slice of it; None if unknown.

    If the name says no memory, it means the smallest GPU of that name.
    """
    if part := SLICE.search(name):
        whole = find_gpu(SLICE.sub("", name))
        share = int(part[1]) / 7
        usable = 0.97 * int(part[2])  # a slice of "40gb" has 39 GiB
        return whole and replace(whole, gib=usable, teraflops=whole.teraflops * share)
    for noise in (NOT_IN_A_NAME, f"{NOT_IN_A_NAME}|{OF_A_VARIANT}"):
        wanted, gigabytes = _plain(name, noise)
        for known, gpu in GPUS.items():
            fits = not gigabytes or abs(gpu.gib * GIB / 1e9 / gigabytes - 1) < 0.1
            if wanted and fits and _plain(known, noise)[0] == wanted:
                return gpu
    return None


def _plain(name: str, noise: str) -> tuple[str, int]:
    """Returns a name without `noise` and memory, and its gigabytes (10^9 bytes); 0 if none."""
    words = re.sub(noise, " ", name.upper())
    gigabytes = re.search(r"(\d+)\s*GB", words)
    words = words.replace(gigabytes[0], " ") if gigabytes else words
    return re.sub(r"[^A-Z0-9]", "", words), int(gigabytes[1]) if gigabytes else 0
