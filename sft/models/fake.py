"""Makes tensors fake: they have shapes, but no data, so a model of any size fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from logging import getLogger
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import moe

aten = torch.ops.aten
DEVICE, META = torch.ops.prim.device.default, torch.device("meta")


@contextmanager
def set_attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of a library that has no option for them, and restores them afterwards."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def is_fake(model: nn.Module) -> bool:
    """Returns whether the weights have no values: in a plan, or a model without storage.

    Weights of which a rank keeps its elements have values (`models/cut`).
    """
    if any(isinstance(p, FakeTensor) for p in model.parameters()):
        return True
    modes = _get_current_dispatch_mode_stack()
    is_cutting = any(getattr(mode, "keeps_values", False) for mode in modes)
    return any(p.is_meta and not (is_cutting or hasattr(p, "piece")) for p in model.parameters())


def block_starts(tensor: torch.Tensor, size: int) -> range:
    """Returns where blocks of `size` elements of a flat tensor begin.

    Of a fake tensor only the first two: a plan would need minutes for thousands of blocks, which
    take the same memory one after the other.
    """
    starts = range(0, tensor.numel(), size)
    return starts[:2] if isinstance(tensor, FakeTensor) else starts


@contextmanager
def fake_tensors(mode: str = "full", masked: bool = False) -> Iterator[None]:
    """Makes every tensor fake within this context, and lets no library cache a fake one.

    `masked`: whether transformers makes a mask, as it does for packed documents. To decide
    it, transformers would read the values of a tensor, which a fake one lacks.
    """
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(torch.random.fork_rng(devices=[]))
        if mode == "qlora":
            from bitsandbytes import functional

            enter(set_attributes(functional, name2qmap={}))  # its cache of tables
        enter(set_attributes(masking_utils, is_tracing=lambda *_: masked))
        enter(set_attributes(nn.Module, _apply=_convert))
        # Without a device, PyTorch's own grouped product has rules for bf16 only.
        own = {"_can_use_grouped_mm": lambda _, weight, __: weight.dtype == torch.bfloat16}
        enter(set_attributes(moe, **own))
        # Fake weights have no values. A truncated normal would be drawn again and again: for ever.
        enter(set_attributes(PreTrainedModel, initialize_weights=lambda _: None))
        enter(set_attributes(nn.init, trunc_normal_=lambda tensor, *_, **__: tensor))
        enter(warnings.catch_warnings(action="ignore"))  # the real build gives the same warnings
        # torch would log a failure; the plan gives it as the reason for using a closed form.
        enter(set_attributes(getLogger("torch._subclasses.fake_tensor"), disabled=True))
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(AssumeOnes())
        yield


def _convert(module: nn.Module, function: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """Replaces `nn.Module._apply`, which changes parameters in place; fake ones forbid it."""
    for child in module.children() if recurse else ():
        _convert(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None and (value := function(parameter)) is not parameter:
            module._parameters[name] = nn.Parameter(value.detach(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


class FastMode(TorchDispatchMode):
    """A dispatch mode that costs less than torch's: `dispatch` is not called for the device of a
    fake tensor, which is four of five calls, and torch.compile's guards are skipped."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is DEVICE and isinstance(args[0], FakeTensor):
            is_inner = args[0].fake_mode.in_kernel_invocation
            return META if is_inner else args[0].fake_device
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the operation."""
        raise NotImplementedError


class AssumeOnes(FastMode):
    """Gives 1 (or True) where a program reads the value of a fake tensor."""

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is aten.split_with_sizes.default and isinstance(args[0], FakeTensor):
            args = args[0], _fitting(args[0], *args[1:]), *args[2:]
        return func(*args, **kwargs)


def _fitting(tensor: torch.Tensor, sizes: list[int], dim: int = 0) -> list[int]:
    """Returns sizes that add up to the length of `dim`; the last one absorbs the difference.

    Code that read its sizes from a fake tensor got ones.
    """
    missing = tensor.shape[dim] - sum(sizes)
    return [*sizes[:-1], sizes[-1] + missing]
