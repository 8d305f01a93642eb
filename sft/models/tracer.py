"""Follows parameters through a forward pass, operation by operation, to what multiplies by them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter

from sft.models.fake import FastMode

TOKENS = 8  # of the traced row
# Names of operations that multiply by a matrix, also those of libraries (bitsandbytes::gemv_4bit).
PRODUCT = re.compile(
    r"(^|_)(mm|addmm|b?addbmm|bmm|mv|addmv|matmul|linear|gemm|gemv)(_|$)|conv|trilinear"
)
ATTENTION = re.compile("softmax|scaled_dot_product")
CHOICES = {"topk", "sort", "argsort", "argmax", "max", "kthvalue"}  # of experts, by their scores
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Product:
    """A parameter by which an operation of the forward pass multiplies activations."""

    kind: Literal["matrix", "convolution"]
    shape: tuple[int, ...]
    per_token: float = 0.0  # multiply-adds per token; of experts, only of those it chose


@contextmanager
def without_modes() -> Iterator[None]:
    """Switches off the caller's dispatch modes and autocast, and sets fp32 as default dtype.

    A dry run builds and runs its models under such modes, and a trace may be made within it.
    """
    before = torch.get_default_dtype()
    with _disable_current_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


class Running:
    """Records which modules run, and within which of them code reads values of tensors."""

    def __init__(self) -> None:
        self.stack: list[int] = []  # ids of modules, the outermost first
        self.ran: set[int] = set()
        self.reads: set[tuple[int, ...]] = set()  # the stack at each read

    def __enter__(self) -> Running:
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.stack.append(id(module))
        self.ran.add(id(module))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self.stack.pop()

    def note_read(self) -> None:
        """Records that values of a tensor are read in the modules that run now."""
        self.reads.add(tuple(self.stack))

    def has_chosen(self, owner: int, elements: set[int]) -> bool:
        """Returns whether `owner` may have chosen among `elements` by values of tensors.

        It may if values were read while it ran, but outside of `elements`.
        """
        return any(owner in stack and not elements & {*stack} for stack in self.reads)


@dataclass(frozen=True)
class Origin:
    """What a tensor was computed from."""

    parameters: frozenset[str] = NOTHING  # of which it is a view, a cast, a selection ...
    from_inputs: bool = False
    has_content: bool = False  # it depends on the tokens or on parameters, not on positions alone
    source: frozenset[str] = NOTHING  # weights whose product it is, up to elementwise operations


class Tracer(FastMode):
    """Follows parameters through a forward pass to the operations that multiply by them.

    If tensors are `fake`, code that reads their values gets ones. Code that asks for the elements
    that are not zero gets all of them.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], fake: bool):
        super().__init__()
        self.fake = fake
        self.products: dict[str, Product] = {}
        self.routers: set[str] = set()
        self.looked_up: set[str] = set()
        self.attends: set[int] = set()  # ids of modules
        self.borrowed: set[str] = set()
        self.written: set[str] = set()
        self.branches = False
        self.owners: dict[str, set[int]] = {}  # ids of modules, by parameter
        self.running = Running()
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._origins: dict[int, Origin] = {}
        self._fixed: set[int] = set()  # storages of parameters
        self._alive: list[Any] = []  # so that no address of a storage is used again
        for name, parameter in parameters.items():
            self._fixed.add(self._set(parameter, Origin(frozenset([name]))))

    def add_inputs(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Marks the inputs of the model: token ids and position ids, each (1, TOKENS)."""
        self._set(ids, Origin(from_inputs=True, has_content=True))
        self._set(positions, Origin(from_inputs=True))

    def _set(self, tensor: torch.Tensor, origin: Origin) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self._origins[storage._cdata] = origin
        return storage._cdata

    def _get(self, tensor: torch.Tensor) -> Origin:
        return self._origins.get(tensor.untyped_storage()._cdata, Origin())

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"):
            self._note_read(args[0])
        if name == "nonzero" and self.fake:
            result = args[0].new_zeros(args[0].numel(), args[0].ndim, dtype=torch.long)
        else:
            if name == "index" and self.fake:
                args = args[0], [self._integers(each) for each in args[1]]
            result = func(*args, **kwargs)
        self._follow(name, args, kwargs, result)
        return result

    def _note_read(self, tensor: torch.Tensor) -> None:
        self.running.note_read()
        self.branches |= self._get(tensor).has_content

    def _integers(self, index: torch.Tensor | None) -> torch.Tensor | None:
        """Returns an integer index as long as a boolean one of one dimension, else `index`."""
        if index is None or index.dtype != torch.bool or index.ndim != 1:
            return index
        self._note_read(index)
        return index.new_zeros(index.numel(), dtype=torch.long)

    def _follow(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Records what the result of an operation was computed from."""
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        origins = [self._get(t) for t in tensors]
        if name in CHOICES:
            self.routers |= origins[0].source
        if name.endswith("_") and tensors and self._is_parameter(tensors[0]):
            self.written |= origins[0].parameters
        if self.running.stack:
            running = self.running.stack[-1]
            if ATTENTION.search(name):
                self.attends.add(running)
            if not name.endswith("_") and name != "detach":  # to clamp a weight is not to use it
                weights = (o.parameters for o in origins if not o.from_inputs)
                read = frozenset[str]().union(*weights)
                self.borrowed |= {each for each in read if running not in self.owners[each]}
        # A product of parameters only, such as B A of an adapter, still counts as these parameters.
        if PRODUCT.search(name) and any(origin.from_inputs for origin in origins):
            found = Origin(NOTHING, True, True, self._multiply(name, tensors, result))
        elif name in ("embedding", "_embedding_bag"):
            self.looked_up |= origins[0].parameters
            found = Origin(from_inputs=True, has_content=True)
        else:
            found = _combine(tensors, origins)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not self._is_parameter(tensor):
                self._set(tensor, found)

    def _is_parameter(self, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor is a parameter or a view of one."""
        return tensor.untyped_storage()._cdata in self._fixed

    def _multiply(self, name: str, tensors: list[torch.Tensor], result: Any) -> frozenset[str]:
        """Records the parameters among the operands of a product, and returns their names."""
        operands = [t for t in tensors[name.startswith(("add", "badd")) :] if t.ndim > 1]
        origins = [o for o in map(self._get, operands) if o.parameters]
        # A selected row of embeddings is an activation; a selected matrix of an expert is a weight.
        origins = [o for o in origins if not o.from_inputs] or origins
        found = frozenset().union(*(o.parameters for o in origins))
        kind: Any = "convolution" if "conv" in name else "matrix"
        number = result.numel() * operands[0].shape[-1] / TOKENS if operands else 0.0
        for each in found:
            before = self.products[each].per_token if each in self.products else 0.0
            self.products[each] = Product(kind, self._shapes[each], before + number)
        return found


def _combine(tensors: list[torch.Tensor], origins: list[Origin]) -> Origin:
    """Returns the origin of the result of an operation that is no product.

    A result that is computed from parameters only still counts as all of them. So does what
    integers from the inputs select from one parameter. Everything else is an activation.
    """
    sources = frozenset().union(*(o.source for o in origins))
    source = sources if len(sources) == 1 else NOTHING
    from_inputs = any(o.from_inputs for o in origins)
    mixes = any(
        o.from_inputs and not o.parameters and t.is_floating_point()
        for t, o in zip(tensors, origins, strict=True)
    )
    forms = [o.parameters for o in origins if o.parameters]
    has_content = bool(forms) or any(o.has_content for o in origins)
    if mixes or (from_inputs and len(forms) > 1):
        return Origin(NOTHING, True, has_content, source)
    return Origin(frozenset().union(*forms), from_inputs, has_content, source)
