"""Lets a module multiply by weights that differ from those it stores: 4 bits, adapters, dtypes.

bitsandbytes and PEFT have classes of linear layers for this. Other modules that hold matrices, such
as the experts of a mixture, read them as attributes in their own code. So while such a module runs,
its attribute is the weight to compute with. Its stored parameters keep their names, for
checkpoints, FSDP2 and ZeRO.

bitsandbytes and PEFT can do the same with PyTorch's parametrizations. These are not used: PEFT 0.21
does not remove its own from a weight that bitsandbytes has parametrised, so what adapters add would
accumulate over steps.
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
    """How stored parameters are quantised (bitsandbytes), by name. It is not an attribute of the
    parameter, because engines replace parameters."""
    changes: dict[str, Change]
    """The functions by which active adapters change weights, by name of the parameter."""

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
        """Returns the weight to compute with: dequantised, adapted, and cast for autocast."""
        if name in self.quant_states:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, self.quant_states[name])
        if name in self.changes:
            weight = self.changes[name](weight)
        kind = weight.device.type
        if weight.ndim == 3 and torch.is_autocast_enabled(kind):  # autocast skips experts' products
            weight = weight.to(torch.get_autocast_dtype(kind))
        return weight


def prepare(module: nn.Module) -> Any:
    """Makes a module compute with prepared weights, and returns it.

    It changes the class of the module in place. A second call changes nothing.
    """
    if not isinstance(module, PreparedWeights):
        kind: Any = type(module)
        module.__class__ = _prepared_class(kind)
        vars(module).update(quant_states={}, changes={})
    return module


@lru_cache
def _prepared_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (PreparedWeights, kind), {"__module__": kind.__module__})
