"""Finds the parameters that a step on text reaches, and those that are operands of matrix products.

The base's own forward pass runs on fake tensors, with every parameter requiring a gradient. The
graph that it leaves says which parameters a backward pass would reach. So this works for any
architecture, and no name of a model, module or parameter is looked at. If the model's code needs
values of tensors, a narrow copy of the model is run with values instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from transformers import PreTrainedModel

from sft.errors import UserError
from sft.models.fake import fake_tensors
from sft.models.pretrained import narrow
from sft.models.tracer import NOTHING, TOKENS, Product, Running, Tracer, without_modes

MOST_VALUES = 300_000_000  # a narrow copy with more parameters is not run with values
State = Literal["reached", "conditional", "unreached"]
INERT = {"_name_or_path", "dtype", "torch_dtype", "use_cache", "transformers_version"}
INERT |= {"quantization_config"}  # it applies only to weights that are loaded


@dataclass(frozen=True)
class Reach:
    """What a step on text does with the parameters of a base; a tied one is listed by each name.

    A parameter without a gradient is `unreached`. It is `conditional` if the step chose another
    element of the same kind by values of tensors: an expert to which no token was sent.
    """

    parameters: Mapping[str, State]
    products: Mapping[str, Product]  # by parameter
    routers: frozenset[str] = NOTHING  # weights whose products choose, such as experts
    looked_up: frozenset[str] = NOTHING  # tables of embeddings
    attends: frozenset[str] = NOTHING  # modules that compute a softmax, such as attention
    borrowed: frozenset[str] = NOTHING  # weights that another module than their owner reads
    written: frozenset[str] = NOTHING  # weights that the step changes in place, such as by clamping
    branches: bool = False  # whether values of activations may decide which modules run
    narrowed: str = ""  # why a narrow copy with values was run, in place of a trace
    problem: str = ""  # why neither was possible; then every parameter counts as reached

    def is_unreached(self, name: str) -> bool:
        """Returns whether a parameter never gets a gradient; False for an unknown name."""
        return self.parameters.get(name) == "unreached"

    def multiplies(self, name: str) -> bool:
        """Returns whether a weight multiplies activations; True for all if that is not known.

        It is also True for the weights of an expert that was not chosen, but could be.
        """
        return bool(self.problem) or name in self.matrices

    def widened(self, shapes: Mapping[str, tuple[int, ...]], why: str) -> Reach:
        """Returns this reach, found on a narrow copy, with the `shapes` of the whole model.

        `why`: the reason for which the whole model was not traced.
        """
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
    def matrices(self) -> set[str]:
        """Returns the weights of matrix products that get a gradient.

        Of an expert that was not chosen, these are all parameters, since no product was seen.
        """
        matrices = {name for name, each in self.products.items() if each.kind == "matrix"}
        states = self.parameters.items()
        chosen = {name for name, state in states if state == "conditional"}
        return chosen | {name for name in matrices if not self.is_unreached(name)}

    @cached_property
    def mixed(self) -> set[str]:
        """Returns the modules that own weights of products other than routers."""
        return {_owner(name) for name in self.products if name not in self.routers}

    def chooses(self, name: str, size: int) -> bool:
        """Returns whether a parameter of `size` elements only takes part in choosing experts.

        This is a router's weight, and all else in a module whose products are routers only. In a
        module that has a router's weight and others, it is a bias with the router's output size.
        """
        routers = [each for each in self.routers if _owner(each) == _owner(name)]
        if name in self.routers or name in self.products or not routers:
            return name in self.routers
        is_bias = any(size == min(self.products[each].shape) for each in routers)
        return is_bias or _owner(name) not in self.mixed


def reach(base: Any) -> Reach:
    """Returns the reach of a base model of transformers, whose weights are not read.

    A fresh model of its class and configuration is traced: the base itself may be quantised, or
    have no storage.
    """
    kind: Any = type(base)
    return _reach(kind, _Key(_sizes(base.config.to_dict()), base.config))


def may_leave_out(model: nn.Module, if_unknown: bool = True) -> bool:
    """Returns whether a step may leave out trained parameters, such as an expert without a token.

    `model`: a base of transformers, or a module that contains one; for any other, False.
    `if_unknown`: what to return for a model that cannot be traced.
    """
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if base is None:
        return False
    found = reach(base)
    return if_unknown if found.problem else found.branches


def freeze_untrained(base: nn.Module, *, routers: bool) -> None:
    """Freezes what a step on text never gives a gradient, such as towers for images.

    `routers`: whether to freeze the parameters that choose experts, too.
    """
    found = reach(base)
    for name, parameter in base.named_parameters():
        if found.is_unreached(name) or (routers and found.chooses(name, parameter.numel())):
            parameter.requires_grad_(False)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


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
    # These implementations exist for every architecture, device and dtype.
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
    run with values if the model's code does not run on fake tensors. If that fails, too, the
    result has a `problem`. Raises UserError if `build` does.
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
    with without_modes(), torch.device("cpu"), fake_tensors(mode):
        whole = {n: tuple(p.shape) for n, p in build().named_parameters(remove_duplicate=False)}
        if small and sum(p.numel() for p in small().parameters()) > MOST_VALUES:
            small = None
    if small and (found := attempt(small, fake=False)) and found.parameters.keys() == whole.keys():
        return found.widened(whole, problems[0])
    return Reach(dict.fromkeys(whole, "reached"), {}, branches=True, problem=problems[0])


def _trace(
    build: Callable[[], nn.Module], training: bool, mode: str, as_built: bool, fake: bool
) -> Reach:
    tensors = fake_tensors(mode) if fake else torch.random.fork_rng(devices=[])
    with without_modes(), torch.device("cpu"), tensors:
        model = build().train(training)
        names: dict[int, list[str]] = {}
        parameters = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
            parameters[id(parameter)] = parameter
            if not as_built:
                parameter.requires_grad_(parameter.is_floating_point())
        tracer = Tracer({own[0]: parameters[key] for key, own in names.items()}, fake)
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        positions = torch.arange(TOKENS)[None]
        tracer.add_inputs(ids, positions)
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                tracer.owners.setdefault(names[id(parameter)][0], set()).add(id(module))
        with Running() as running, tracer:
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
        tracer.branches,
    )


def _with_gradient(result: torch.Tensor, parameters: Iterable[nn.Parameter]) -> set[int]:
    """Returns the ids of the parameters that a backward pass from `result` gives a gradient.

    The graph of the forward pass shows them, and reading it is faster than a backward pass. Only a
    function that defines its own backward may pass on no gradient. If some parameters lie only
    behind such functions, the backward pass is run.
    """
    sure, possible = (_leaves(result.grad_fn, behind_own=own) for own in (False, True))
    if sure == possible:
        return sure
    result.backward()
    return {id(parameter) for parameter in parameters if parameter.grad is not None}


def _leaves(root: Any, *, behind_own: bool) -> set[int]:
    """Returns the ids of the leaf tensors of an autograd graph.

    `behind_own`: also of those behind functions that define their own backward.
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
    model: nn.Module, first: Mapping[str, str], reached: set[str], running: Running
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
    running: Running,
) -> bool:
    """Returns whether values chose a sibling of `element`, the module that holds `name`."""
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
    """Yields the names of the modules that contain a parameter, the outermost first."""
    parts = name.split(".")[:-1]
    return (".".join(parts[:n]) for n in range(len(parts) + 1))
