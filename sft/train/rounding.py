"""Rounds fp32 to bf16 stochastically: up or down, so that the expected value is exact.

An update of a weight is often smaller than half the distance of two bf16 numbers (Zamirai et al.
2020, Revisiting BFloat16 Training). Rounded to the nearest, it would be lost in every step. The
random bits are a hash of (seed, step, tensor, position), not of a generator's state: they are the
same however a tensor is cut over ranks, and in a resumed run.
"""

from __future__ import annotations

import hashlib

import torch

from sft.models.fake import block_starts
from sft.models.noise import FACTORS, mix

CHUNK = 2**22  # elements that are rounded at once: bounds the memory of their random bits


def noise_keys(*parts: object) -> tuple[int, int]:
    """Returns two numbers of 32 bits, with their sign, that are a function of `parts`."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))
    return first, second


def round_into(target: torch.Tensor, source: torch.Tensor, start: int, *parts: object) -> None:
    """Copies fp32 `source` to bf16 `target`, both contiguous, with stochastic rounding.

    `start`: where they begin in the flat whole tensor; `parts`: what else the noise depends on.
    """
    keys = noise_keys(*parts)
    flat_target, flat_source = target.view(-1), source.view(-1)
    for at in block_starts(flat_source, CHUNK):
        part = flat_source[at : at + CHUNK]
        bits = random_bits(part.numel(), start + at, keys, part.device).bitwise_and_(0xFFFF)
        # bf16 is the upper half of fp32. Adding noise to the lower half carries over into it with
        # the probability that is the share of the way to the next bf16 number.
        bits.add_(part.view(torch.int32)).bitwise_and_(-0x10000)
        flat_target[at : at + CHUNK].copy_(bits.view(torch.float32))


def random_bits(
    number: int, start: int, keys: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Returns 32 random bits for each of the positions from `start` on, as int32."""
    bits = torch.arange(start, start + number, device=device)  # int64: tensors may be larger
    bits = (bits ^ (bits >> 32) * FACTORS[0]).to(torch.int32)
    for key in keys:
        mix(bits.bitwise_xor_(key))
    return bits
