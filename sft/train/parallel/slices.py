"""Slices of flat parameters that a rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from sft.runtime.checkpoint import Piece


def local_slice(value: Any) -> tuple[torch.Tensor, int]:
    """This rank's elements of a DTensor, flat, and where they start in the flat whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    start = offset[0] * math.prod(value.shape[1:]) if math.prod(shape) else 0
    return value.detach().to_local().flatten(), start


def fill_slices(pieces: Iterator[Piece], read: Any) -> None:
    for piece in pieces:
        if number := max((tensor.numel() for tensor in piece.state.values()), default=0):
            found = read(piece.name, piece.start, number)
            for key, tensor in piece.state.items():
                tensor.copy_(found[key])
