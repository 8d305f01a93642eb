"""Finds the parameters that a step on text reaches, and those that are operands of matrix products.

The base's own forward and backward pass run on fake tensors, with every parameter requiring a
gradient. So the answer holds for any architecture: no name of a model, module or parameter counts.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter

from sft.errors import UserError
from sft.models.fake import FastMode, fake_tensors
from sft.models.pretrained import narrow

aten = torch.ops.aten

TOKENS = 8  # of the traced row
MOST_VALUES = 300_000_000  # parameters of a copy that is run with values
State = Literal["reached", "conditional", "unreached"]
# Names of operations that multiply by a matrix, also those of libraries (bitsandbytes::gemv_4bit).
PRODUCT = re.compile(r"(^|_)(mm|addmm|b?addbmm|bmm|mv|addmv|matmul|linear|gemm|gemv)(_|$)|conv")
ATTENTION = re.compile("softmax|scaled_dot_product")
CHOICES = {"topk", "sort", "argsort", "argmax", "max", "kthvalue"}  # of experts, by their scores
INERT = {"_name_or_path", "dtype", "torch_dtype", "use_cache", "transformers_version"}
INERT |= {"quantization_config"}  # which applies to weights that are loaded
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Product:
    """A parameter that an operation of the forward pass multiplies the activations by."""

    kind: Literal["matrix", "convolution"]
    shape: tuple[int, ...]
    per_token: float = 0.0  # multiplications of a token; of experts only those it chose


@dataclass(frozen=True)
class Reach:
    """What a step on text does with the parameters of a base; a tied one has all its names.

    A parameter without a gradient is `unreached`, or `conditional` if values of tensors chose
    another element of the same kind, such as an expert that got no token.
    """

    parameters: Mapping[str, State]
    products: Mapping[str, Product]  # by parameter
    routers: frozenset[str] = NOTHING  # products whose results choose, such as of experts
    looked_up: frozenset[str] = NOTHING  # tables of embeddings
    attends: frozenset[str] = NOTHING  # modules that compute a softmax, such as attention
    borrowed: frozenset[str] = NOTHING  # products in the code of a module that does not own them
    written: frozenset[str] = NOTHING  # changed in place, such as clamped
    narrowed: str = ""  # why a narrow copy with values was run, in place of a trace
    problem: str = ""  # why neither was possible; then every parameter counts as reached

    def is_unreached(self, name: str) -> bool:
        """Returns whether a parameter never gets a gradient; no for an unknown one."""
        return self.parameters.get(name) == "unreached"

    def multiplies(self, name: str) -> bool:
        """Returns whether a weight multiplies activations; yes for all if that is not known.

        An element that values of tensors did not choose, such as an expert, would if chosen.
        """
        return bool(self.problem) or name in self.products or name in self.not_chosen

    def widened(self, shapes: Mapping[str, tuple[int, ...]], why: str) -> Reach:
        """Returns what was found of a narrow copy for the whole model with these shapes."""
        products = {
            name: replace(
                product,
                shape=shapes[name],
                per_token=product.per_token * math.prod(shapes[name]) / math.prod(product.shape),
            )
            for name, product in self.products.items()
        }
        return replace(self, products=products, narrowed=why)

    @cached_property
    def not_chosen(self) -> set[str]:
        """Returns the parameters that the traced step could have reached."""
        return {name for name, state in self.parameters.items() if state == "conditional"}


def reach(base: Any) -> Reach:
    """Returns the reach of a base model of transformers, whose weights are not read.

    A fresh model of its class and configuration is traced: the base itself may be quantised, or
    have no storage.
    """
    kind: Any = type(base)
    return _reach(kind, _Key(_sizes(base.config.to_dict()), base.config))


def freeze_untrained(base: nn.Module, *, routers: bool) -> None:
    """Freezes what a step on text never gives a gradient, such as towers for images.

    `routers`: whether also all parameters of the modules that choose experts.
    """
    found = reach(base)
    choosing = {name.rpartition(".")[0] for name in found.routers} if routers else set()
    for name, parameter in base.named_parameters():
        if found.is_unreached(name) or name.rpartition(".")[0] in choosing:
            parameter.requires_grad_(False)


def _sizes(values: Any) -> str:
    """Returns a configuration as text, without keys that change no computation."""
    if not isinstance(values, dict):
        return repr(values)
    kept = sorted((str(key), value) for key, value in values.items() if key not in INERT)
    return f"{{{', '.join(f'{key}: {_sizes(value)}' for key, value in kept)}}}"


@dataclass(frozen=True)
class _Key:
    text: str
    config: Any = field(compare=False)


@lru_cache(maxsize=32)
def _reach(kind: Callable[[Any], nn.Module], key: _Key) -> Reach:
    config = copy.deepcopy(key.config)
    # Those that every architecture has, for tensors of any device and dtype.
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
    return trace(lambda: kind(config), small=lambda: kind(narrow(config)))


def trace(
    build: Callable[[], nn.Module],
    mode: str = "full",
    as_built: bool = False,
    small: Callable[[], nn.Module] | None = None,
) -> Reach:
    """Returns the reach of the model that `build` makes, quantised or not as `mode` says.

    `as_built`: what is frozen stays so, and counts as unreached. `small` makes a narrow copy. It is
    run with values if the code of the model does not run without them.
    """
    problems = []

    def attempt(build: Callable[[], nn.Module], *, fake: bool = True) -> Reach | None:
        # Some models ask in training for inputs that a step on text does not have.
        for training in (True, False):
            try:
                return _trace(build, training, mode, as_built, fake)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001  # a model may fail in any way
                problems.append(f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}")
        return None

    if found := attempt(build):
        return found
    with _without_modes(), torch.device("cpu"), fake_tensors(mode):
        whole = {n: tuple(p.shape) for n, p in build().named_parameters(remove_duplicate=False)}
        if small and sum(p.numel() for p in small().parameters()) > MOST_VALUES:
            small = None
    if small and (found := attempt(small, fake=False)) and found.parameters.keys() == whole.keys():
        return found.widened(whole, problems[0])
    return Reach(dict.fromkeys(whole, "reached"), {}, problem=problems[0])


@contextmanager
def _without_modes() -> Iterator[None]:
    """Leaves the modes of a caller, such as a dry run's, which also makes its models."""
    before = torch.get_default_dtype()
    with _disable_current_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _trace(
    build: Callable[[], nn.Module], training: bool, mode: str, as_built: bool, fake: bool
) -> Reach:
    tensors = fake_tensors(mode) if fake else torch.random.fork_rng(devices=[])
    with _without_modes(), torch.device("cpu"), tensors:
        model = build().train(training)
        names: dict[int, list[str]] = {}
        parameters = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
            parameters[id(parameter)] = parameter
            if not as_built:
                parameter.requires_grad_(parameter.is_floating_point())
        tracer = _Tracer({own[0]: parameters[key] for key, own in names.items()}, fake)
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        positions = torch.arange(TOKENS)[None]
        tracer.add_inputs(ids, positions)
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                tracer.owners.setdefault(names[id(parameter)][0], set()).add(id(module))
        with _Running() as running, tracer:
            tracer.running = running
            output = model(input_ids=ids, position_ids=positions, use_cache=False)
            logits = output.logits
        given = _with_gradient(logits.sum(), parameters.values())
        reached = {own[0] for key, own in names.items() if key in given}
    first = {name: own[0] for own in names.values() for name in own}
    states = _states(model, first, reached, running)

    def all_names(found: Mapping[str, Any] | set[str]) -> set[str]:
        return {name for name, own in first.items() if own in found}

    return Reach(
        states,
        {name: tracer.products[first[name]] for name in sorted(all_names(tracer.products))},
        frozenset(all_names(tracer.routers)),
        frozenset(all_names(tracer.looked_up)),
        frozenset(n for n, m in model.named_modules() if id(m) in tracer.attends),
        frozenset(all_names(tracer.borrowed)),
        frozenset(all_names(tracer.written)),
    )


def _with_gradient(result: torch.Tensor, parameters: Iterable[nn.Parameter]) -> set[int]:
    """Returns the ids of the parameters that a backward pass from `result` gives a gradient.

    They are in the graph of the forward pass, which is faster than a backward pass. Only a function
    with a backward of its own may give none. If some lie behind such functions alone, the backward
    pass runs.
    """
    sure, possible = (_leaves(result.grad_fn, behind_own=own) for own in (False, True))
    if sure == possible:
        return sure
    result.backward()
    return {id(parameter) for parameter in parameters if parameter.grad is not None}


def _leaves(root: Any, *, behind_own: bool) -> set[int]:
    """Returns the ids of the tensors that a graph of autograd begins with.

    `behind_own`: also those behind functions with a backward of their own.
    """
    found, seen, waiting = set(), {root}, [root]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        if isinstance(node, BackwardCFunction) and not behind_own:
            continue
        fresh = {each for each, _ in node.next_functions} - seen - {None}
        seen |= fresh
        waiting += fresh
    return found


def _states(
    model: nn.Module, first: Mapping[str, str], reached: set[str], running: _Running
) -> dict[str, State]:
    """Returns the state of each parameter, given those that got a gradient."""
    result: dict[str, State] = {
        name: "reached" if own in reached else "unreached" for name, own in first.items()
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    live = {module for name in result if result[name] == "reached" for module in _owners(name)}
    for name in [name for name in result if result[name] == "unreached"]:
        unused = (module for module in _owners(name) if module and module not in live)
        if any(_is_conditional(name, element, result, modules, running) for element in unused):
            result[name] = "conditional"
    return result


def _is_conditional(
    name: str,
    element: str,
    states: Mapping[str, State],
    modules: Mapping[str, nn.Module],
    running: _Running,
) -> bool:
    """Returns whether values of tensors chose another module than `element`, which has `name`."""
    parent = element.rpartition(".")[0]
    alike = {
        f"{parent}.{child}".lstrip("."): id(module)
        for child, module in modules[parent].named_children()
        if type(module) is type(modules[element])
    }
    within = name.removeprefix(element)
    owner = parent
    while owner and id(modules[owner]) not in running.ran:
        owner = owner.rpartition(".")[0]
    return any(states.get(each + within) == "reached" for each in alike) and running.has_chosen(
        id(modules[owner]), {*alike.values()}
    )


def _owners(name: str) -> Iterator[str]:
    """Yields the names of the modules that a parameter lies in, the outermost first."""
    parts = name.split(".")[:-1]
    return (".".join(parts[:n]) for n in range(len(parts) + 1))


class _Running:
    """Keeps the modules that run, and within which of them a program read values of tensors."""

    def __init__(self) -> None:
        self.stack: list[int] = []  # ids of modules, the outermost first
        self.ran: set[int] = set()
        self.reads: set[tuple[int, ...]] = set()  # the stack at each read

    def __enter__(self) -> _Running:
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
        self.reads.add(tuple(self.stack))

    def has_chosen(self, owner: int, elements: set[int]) -> bool:
        """Returns whether `owner` may have chosen among `elements` by values of tensors.

        It may if it read some, or anything that it called outside of these elements did.
        """
        return any(owner in stack and not elements & {*stack} for stack in self.reads)


@dataclass(frozen=True)
class _Origin:
    """What a tensor is made of."""

    parameters: frozenset[str] = NOTHING  # of which it is a form: a view, a cast, a selection ...
    from_inputs: bool = False
    source: frozenset[str] = NOTHING  # the product of which it is the result, element by element


class _Tracer(FastMode):
    """Follows parameters through a forward pass to the operations that multiply by them.

    Where a program reads values of `fake` tensors, it gets ones; where it asks which elements are
    not zero, all are.
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
        self.owners: dict[str, set[int]] = {}  # ids of modules, by parameter
        self.running = _Running()
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._origins: dict[int, _Origin] = {}
        self._fixed: set[int] = set()  # storages of parameters
        self._alive: list[Any] = []  # so that no address of a storage is used again
        for name, parameter in parameters.items():
            self._fixed.add(self._set(parameter, _Origin(frozenset([name]))))

    def add_inputs(self, *inputs: torch.Tensor) -> None:
        for tensor in inputs:
            self._set(tensor, _Origin(from_inputs=True))

    def _set(self, tensor: torch.Tensor, origin: _Origin) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self._origins[storage._cdata] = origin
        return storage._cdata

    def _get(self, tensor: torch.Tensor) -> _Origin:
        return self._origins.get(tensor.untyped_storage()._cdata, _Origin())

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"):
            self.running.note_read()
        if name == "nonzero" and self.fake:
            result = args[0].new_zeros(args[0].numel(), args[0].ndim, dtype=torch.long)
        else:
            if name == "index" and self.fake:
                args = args[0], [self._integers(each) for each in args[1]]
            result = func(*args, **kwargs)
        self._follow(name, args, kwargs, result)
        return result

    def _integers(self, index: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the integer index of a boolean one of a single dimension."""
        if index is None or index.dtype != torch.bool or index.ndim != 1:
            return index
        self.running.note_read()
        return index.new_zeros(index.numel(), dtype=torch.long)

    def _follow(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Records what the result of an operation is made of."""
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        origins = [self._get(t) for t in tensors]
        if name in CHOICES:
            self.routers |= origins[0].source
        if name.endswith("_") and tensors and self._is_parameter(tensors[0]):
            self.written |= origins[0].parameters
        if ATTENTION.search(name) and self.running.stack:
            self.attends.add(self.running.stack[-1])
        # A product of parameters alone, such as of the parts of an adapter, is a form of them.
        if PRODUCT.search(name) and any(origin.from_inputs for origin in origins):
            found = _Origin(NOTHING, True, self._multiply(name, tensors, result))
        elif name in ("embedding", "_embedding_bag"):
            self.looked_up |= origins[0].parameters
            found = _Origin(from_inputs=True)
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
        # A row of embeddings that an index chose is no weight, a matrix of experts is.
        origins = [o for o in origins if not o.from_inputs] or origins
        found = frozenset().union(*(o.parameters for o in origins))
        kind: Any = "convolution" if "conv" in name else "matrix"
        number = result.numel() * operands[0].shape[-1] / TOKENS if operands else 0.0
        for each in found:
            before = self.products[each].per_token if each in self.products else 0.0
            self.products[each] = Product(kind, self._shapes[each], before + number)
            if self.running.stack and self.running.stack[-1] not in self.owners[each]:
                self.borrowed.add(each)
        return found


def _combine(tensors: list[torch.Tensor], origins: list[_Origin]) -> _Origin:
    """Returns what the result of an operation is made of that is no product.

    What is computed from parameters alone is a form of all of them; what integers from the inputs
    select of one is a form of it; everything else is an activation.
    """
    sources = frozenset().union(*(o.source for o in origins))
    source = sources if len(sources) == 1 else NOTHING
    from_inputs = any(o.from_inputs for o in origins)
    mixes = any(
        o.from_inputs and not o.parameters and t.is_floating_point()
        for t, o in zip(tensors, origins, strict=True)
    )
    forms = [o.parameters for o in origins if o.parameters]
    if mixes or (from_inputs and len(forms) > 1):
        return _Origin(NOTHING, True, source)
    return _Origin(frozenset().union(*forms), from_inputs, source)
