"""Lets a module multiply by weights that differ from those it stores: 4 bits, adapters, dtypes.

Linear layers have classes for this (bitsandbytes, PEFT). All other modules that hold matrices, such
as the experts of a mixture in one parameter, read an attribute of their own in their own code. So
while such a module runs, its attribute is the weight to compute with. Its stored parameters keep
their names, for checkpoints, FSDP2 and ZeRO.

Parametrizations of PyTorch, on which bitsandbytes and PEFT build the same, are not used: PEFT 0.21
leaves its own on a weight that bitsandbytes has parametrised, so adapters would add up over steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

Change = Callable[[torch.Tensor], torch.Tensor]


class PreparedWeights(nn.Module):
    """Computes weights from stored parameters in each forward pass; `prepare` mixes it in."""

    quant_states: dict[str, Any]
    """How stored parameters are quantised (bitsandbytes), by name. Engines replace parameters, so
    a parameter cannot keep it."""
    changes: dict[str, Change]
    """What adapters do to weights, by name, while they are active."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shadows = vars(self)  # an attribute of the instance comes before its parameter
        names = [name for name, p in self._parameters.items() if p is not None]
        try:
            for name in names:
                stored: Any = self._parameters[name]
                weight = self._prepare(name, stored)
                if weight is not stored:
                    shadows[name] = weight
            return super().forward(*args, **kwargs)
        finally:
            for name in names:
                shadows.pop(name, None)

    def _prepare(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight to compute with, given the stored one."""
        if name in self.quant_states:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, self.quant_states[name])
        if name in self.changes:
            weight = self.changes[name](weight)
        kind = weight.device.type
        if weight.ndim == 3 and torch.is_autocast_enabled(kind):  # no product of experts casts
            weight = weight.to(torch.get_autocast_dtype(kind))
        return weight


def prepare(module: nn.Module) -> Any:
    """Makes a module compute with prepared weights, and returns it."""
    if not isinstance(module, PreparedWeights):
        kind: Any = type(module)
        module.__class__ = _prepared_class(kind)
        vars(module).update(quant_states={}, changes={})
    return module


@lru_cache
def _prepared_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (PreparedWeights, kind), {"__module__": kind.__module__})
