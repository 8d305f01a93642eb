"""Makes FSDP2 gather some parameters in 16 bits, and reduce every gradient from fp32.

FSDP2 has one dtype for all parameters that it gathers together (`MixedPrecisionPolicy`), rounds
norms with the others, and gradients with them. Here each parameter has its own. torch's pinned
version has no public setting for this, so the class of its record of a parameter is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam


class Gathered(FSDPParam):
    """A parameter that is gathered in `gathered_dtype`; None: in that of its shards."""

    gathered_dtype: torch.dtype | None = None

    def init_dtype_attrs(self, mp_policy: MixedPrecisionPolicy) -> None:
        super().init_dtype_attrs(mp_policy)
        self.param_dtype = self.gathered_dtype

    def init_unsharded_param(self) -> None:
        is_new = not hasattr(self, "_unsharded_param")
        super().init_unsharded_param()
        if is_new and self.gathered_dtype:  # autograd casts each gradient before it adds them
            self._unsharded_param.grad_dtype = self.orig_dtype

    def to_accumulated_grad_if_needed(self) -> None:
        """Keeps the sum over micro-batches in the gradient's dtype, not in that of the exchange."""


def gather_rounded(model: nn.Module, rounded: frozenset[str], dtype: torch.dtype | None) -> None:
    """Makes the parameters `rounded` of a split model be gathered in `dtype`."""
    wanted = {id(p) for name, p in model.named_parameters() if name in rounded}
    for each in parameters_of(model):
        each.__class__ = Gathered
        each.gathered_dtype = dtype if id(each.sharded_param) in wanted else None


def drop_gradients(model: nn.Module) -> None:
    """Drops gradients that are not yet reduced into shards, or not yet summed over copies."""
    for group in _groups(model):
        group._partial_reduce_output = None
        for each in group.fsdp_params:
            if hasattr(each, "_unsharded_param"):  # after the first pass
                each._unsharded_param.grad = None


def parameters_of(model: nn.Module) -> Iterator[Any]:
    """Yields FSDP2's records of the parameters of a split model."""
    for group in _groups(model):
        yield from group.fsdp_params


def _groups(model: nn.Module) -> Iterator[Any]:
    """Yields FSDP2's records of the parameters that are gathered together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups
