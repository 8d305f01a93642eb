"""Finds the weights that a model reads only as casts to 16 bits, so that ranks may exchange these.

Under autocast a linear layer rounds its weight before it multiplies. If every read of a weight is
such a cast, the rounded weight gives the same bits. A list of layers would not show this: another
module, a hook or a library may read the weight, too. So the model's own code runs twice on fake
tensors, forward, backward and in an evaluation. The first run finds the weights of which each read
is a cast. In the second run these have 16 bits. If its operations, with their shapes, dtypes and
numbers, are those of the first run but for the casts, no code noticed the difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sft.models.fake import FastMode, fake_tensors
from sft.models.tracer import TOKENS, without_modes

aten = torch.ops.aten
NONE: frozenset[str] = frozenset()


class Casts(NamedTuple):
    """The names of fp32 weights that autocast casts; a tied one has its first name."""

    rounded: frozenset[str] = NONE  # those of which nothing else is read
    others: frozenset[str] = NONE  # those that are also read in fp32
    problem: str = ""  # why this could not be found


def find_casts(model: nn.Module, dtype: torch.dtype, device: str) -> Casts:
    """Returns the fp32 weights of `model` that autocast casts to `dtype`.

    `device`: the type of the device on which it runs; `model` may have no storage. Finds none if it
    is in 4 bits: then only small adapters have fp32. If it does not run on fake tensors, or its
    code reads the dtype of weights, the result has a `problem`.
    """
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    if not wide or not all(p.is_floating_point() for p in model.parameters()):
        return Casts()
    try:
        whole = _run(model, NONE, dtype, device)
        found = frozenset(wide & whole.cast - whole.read)
        rounded = _run(model, found, dtype, device) if found else whole
    except Exception as error:  # noqa: BLE001  # a model may fail in any way
        text = " ".join(str(error).split())[:120]
        return Casts(problem=f"it cannot be traced ({type(error).__name__}: {text})")
    problem = ""
    if rounded.operations(found) != whole.operations(found):
        found, problem = NONE, "its code depends on the dtype of weights"
    return Casts(found, frozenset(wide & whole.cast - found), problem)


def _run(model: nn.Module, rounded: frozenset[str], dtype: torch.dtype, device: str) -> _Reads:
    """Returns what a model's passes read. The weights `rounded` have `dtype`."""
    was_training = model.training
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    with without_modes(), fake_tensors(), _fake_weights(model, rounded, dtype, device) as weights:
        try:
            with _Reads(weights, dtype) as reads:
                cast = torch.autocast(device, dtype, cache_enabled=False)
                with cast:
                    output = model.train()(input_ids=ids, use_cache=False).logits
                output.float().sum().backward()
                with cast, torch.no_grad():
                    model.eval()(input_ids=ids, use_cache=False)
        finally:
            model.train(was_training)
    return reads


@contextmanager
def _fake_weights(
    model: nn.Module, rounded: frozenset[str], dtype: torch.dtype, device: str
) -> Iterator[dict[str, nn.Parameter]]:
    """Gives a model fake weights and buffers within this context; yields the weights by name."""
    fakes: dict[Any, Any] = {}
    for name, p in model.named_parameters():
        empty = torch.empty(p.shape, dtype=dtype if name in rounded else p.dtype, device=device)
        fakes[p] = nn.Parameter(empty, p.requires_grad)
        if name in rounded:
            fakes[p].grad_dtype = p.dtype
    weights = {name: fakes[p] for name, p in model.named_parameters()}
    for b in model.buffers():
        fakes[b] = torch.empty(b.shape, dtype=b.dtype, device=device)
    places: list[Any] = [own for m in model.modules() for own in (m._parameters, m._buffers)]
    before = [(own, dict(own)) for own in places]
    try:
        for own, real in before:
            own.update({name: fakes[t] for name, t in real.items() if t is not None})
        yield weights
    finally:
        for own, real in before:
            own.update(real)


class _Reads(FastMode):
    """Records operations, and how they read weights."""

    def __init__(self, weights: dict[str, nn.Parameter], dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.cast: set[str] = set()  # weights of which an operation is a cast to `dtype`
        self.read: set[str] = set()  # weights that another operation reads
        self._log: list[tuple[str, Any]] = []  # the weight that an operation casts, and the rest
        self._names = {w.untyped_storage()._cdata: name for name, w in weights.items()}

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        own = {self._names.get(each.untyped_storage()._cdata, "") for each in tensors} - {""}
        name = ""
        if func is aten._to_copy.default:
            if own and result.dtype == self.dtype:
                (name,) = own
                self.cast.add(name)
            given = tensors  # autograd and `to` ask for the same cast in several ways
        elif own and not _is_view(func):
            self.read |= own
        self._log.append((name, (func, *map(_form, [*given, *tree_leaves(result)]))))
        return result

    def operations(self, cast: frozenset[str]) -> Counter[Any]:
        """Returns how often each operation ran, without the casts of the weights `cast`."""
        return Counter(operation for name, operation in self._log if name not in cast)


def _form(value: Any) -> Any:
    """Returns what an operation can see of a fake tensor, or a constant as text."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape)
    return repr(value)


def _is_view(func: Any) -> bool:
    """Returns whether an operation returns views of its inputs and reads no element."""
    schema = func._schema
    return not schema.is_mutable and all(r.alias_info is not None for r in schema.returns)
