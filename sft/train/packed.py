"""AdamW whose moments have 8 or 4 bits (torchao), also for slices of FSDP2.

A block of elements shares a scale (Dettmers et al. 2022; Li et al. 2023). Blocks are parts of the
rows of a matrix, and FSDP2 slices rows. So no block is cut, the result does not depend on the
number of processes, and another number of them can resume. Vectors, and matrices whose rows make no
blocks, have moments in full precision. torchao's own optimizers cut a slice into blocks wherever it
begins. They also compile a step for each shape, which on a CPU takes longer than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from sft.models.fake import block_starts

PART = 2**22  # elements that are updated at once: bounds the memory of moments in fp32
LEAST = 32  # elements of a block: a smaller one would need too many scales
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have a sign


class PackedAdamW(torch.optim.Optimizer):
    """AdamW with moments of `bits` bits. Its state of a parameter has flat tensors only."""

    compiles_on_gpus = True  # its update (`_adam`)
    bits, largest = 8, 256  # of a moment; elements of a block at most

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._tables: dict[tuple[bool, torch.device], torch.Tensor] = {}

    def per_value(self, parameter: torch.Tensor) -> dict[str, int]:
        """Returns how many elements share a value of each tensor of a parameter's state."""
        rows = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
        block = math.gcd(rows, self.largest)
        if block < LEAST:
            return dict.fromkeys(MOMENTS, 1)
        codes = {f"{name}_codes": 8 // self.bits for name in MOMENTS}
        return codes | {f"{name}_scale": block for name in MOMENTS}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)

    def _update(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        weight, gradient = (_local(each).view(-1) for each in (parameter.detach(), parameter.grad))
        state, sizes = self.state[parameter], self.per_value(parameter)
        for key, each in sizes.items():
            if key not in state:
                kind = torch.uint8 if key.endswith("_codes") else torch.float32
                state[key] = weight.new_zeros(weight.numel() // each, dtype=kind)
        state["step"] = state.get("step", 0) + 1
        count, rate = torch.tensor(float(state["step"])), torch.tensor(group["lr"])
        for at in block_starts(weight, PART):
            part = slice(at, min(at + PART, weight.numel()))
            moments = [self._moment(state, sizes, name, part) for name in MOMENTS]
            _adam(weight.device.type)(
                weight[part], gradient[part], count, *moments, None,
                rate, *group["betas"],
                group["weight_decay"], group["eps"], True, False,
            )  # fmt: skip

    def _moment(
        self, state: dict[str, Any], sizes: dict[str, int], name: str, part: slice
    ) -> torch.Tensor:
        """Returns a view of a part of a moment, whose packed values torchao reads and writes."""
        if name in sizes:
            return state[name][part]
        codes, scale = (
            state[key][part.start // sizes[key] : part.stop // sizes[key]]
            for key in (f"{name}_codes", f"{name}_scale")
        )
        has_sign = MOMENTS[name]
        own = codes, scale, self._table(has_sign, codes.device), has_sign
        return _kind(self.bits)(*own, *([] if self.bits == 8 else [(part.stop - part.start,)]))

    def _table(self, has_sign: bool, device: torch.device) -> torch.Tensor:
        """Returns the numbers that codes stand for."""
        if (has_sign, device) not in self._tables:
            from torchao.optim import subclass_4bit, subclass_8bit

            owner: Any = subclass_8bit if self.bits == 8 else subclass_4bit
            values = owner.get_qmap_signed() if has_sign else owner.get_qmap_unsigned()
            self._tables[has_sign, device] = torch.tensor(
                values, dtype=torch.float32, device=device
            )
        return self._tables[has_sign, device]


class AdamW8bit(PackedAdamW):
    """AdamW with moments in 8 bits."""


class AdamW4bit(PackedAdamW):
    """AdamW with moments in 4 bits."""

    bits, largest = 4, 128


def _local(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def _kind(bits: int) -> Any:
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    kind: Any = OptimState8bit if bits == 8 else OptimState4bit
    return partial(kind, dtype=torch.float32)


@cache
def _adam(device: str) -> Callable[..., None]:
    """Returns torchao's update of a tensor, compiled for a GPU, where a few kernels do it all."""
    from torchao.optim.adam import single_param_adam

    return (
        torch.compile(single_param_adam, dynamic=False) if device == "cuda" else single_param_adam
    )
