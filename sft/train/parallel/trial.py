"""Tries the configured optimizer on a small model, and refuses one that a run cannot use.

What an optimizer can do is measured, so it holds for classes that nobody listed.
"""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sft.config.schema import Train
from sft.errors import ConfigError, UserError
from sft.models.layers import weights_to_save
from sft.runtime import disk
from sft.runtime.checkpoint import SavedState
from sft.train.optimizer import (
    averages,
    build_optimizer,
    class_arguments,
    gathers_matrices,
    outside_of_layers,
)
from sft.train.parallel.ddp import Replicated
from sft.train.parallel.state import settings_of

WIDTH = 64  # of a square matrix with 4,096 elements, from which bitsandbytes keeps 8-bit state
STEPS, RATE = 3, 1e-2
NOISE, MOST = 1e-4, 3e-4  # relative: of the gradients of another trial, and of its updates
OWN = {"aten", "prim", "prims", "profiler"}  # namespaces of PyTorch's operations
SPLITTING = {"fsdp": "FSDP2", "deepspeed": "ZeRO"}


@dataclass(frozen=True)
class Traits:
    """What the trial of an optimizer showed."""

    by_element: bool
    """Whether an element is updated from its own gradient and state alone."""
    by_row: bool
    """Whether a row of a matrix is updated from its own gradient and state alone."""
    gathers: bool
    """Whether it gathers matrices of which FSDP2 gives a rank slices."""
    averages: bool
    """Whether other weights are evaluated and saved than those that are trained."""
    counts_in_groups: bool
    """Whether every step changes values of the groups of parameters."""
    begins_with_state: bool
    """Whether it has a state before its first step."""
    library: str
    """The library whose own operations it calls; "": PyTorch."""
    resumes: bool
    """Whether it continues with the same bits after its state was saved and loaded."""
    smooth: bool
    """Whether gradients that differ a little give updates that differ about as little."""


def refuse_unusable(train: Train) -> None:
    """Raises ConfigError if the run's optimizer does not work with its engine and schedule."""
    class_arguments(train)  # raises what the trial's own settings would hide
    found = try_optimizer(_settings_of_trial(train))
    name, problem, one_at_a_time = train.optimizer, "", ""
    if train.is_bf16_pure or train.optimizer_in_backward:
        early = train.optimizer_in_backward
        one_at_a_time = "optimizer_in_backward" if early else "precision: bf16_pure"
    if not found.resumes:
        problem = (
            "a resumed run would not continue as it was: the optimizer draws random numbers, or "
            "keeps values outside of its state and its groups of parameters; use another one"
        )
    elif found.averages and train.schedule != "constant":
        problem = (
            f"it averages the weights, which replaces a schedule: set train.schedule: constant "
            f"(found {train.schedule}); a warm-up is allowed"
        )
    elif (splitting := SPLITTING.get(train.engine)) and found.library:
        problem = (
            f"it calls operations of {found.library}, which do not know the slices of {splitting}: "
            "set train.engine: ddp, or use adamw"
        )
    elif splitting and not (
        found.by_element or (train.engine == "fsdp" and (found.by_row or found.gathers))
    ):
        problem = (
            f"it updates a weight from others of its matrix, of which {splitting} gives a process "
            "only a slice: set train.engine: ddp, or use adamw"
        )
    elif train.engine == "deepspeed" and (found.averages or found.counts_in_groups):
        problem = (
            "it keeps values for all parameters together, but ZeRO steps them in parts: set "
            "train.engine: ddp or fsdp"
        )
    elif one_at_a_time and found.counts_in_groups:
        problem = (
            f"it keeps values for all parameters together, but train.{one_at_a_time} steps them "
            "one at a time: remove that key, or use adamw"
        )
    elif one_at_a_time and splitting and found.gathers:
        problem = (
            f"it gathers whole matrices, but train.{one_at_a_time} steps slices one at a time: "
            "remove that key, or use adamw"
        )
    elif train.engine == "deepspeed" and found.begins_with_state:
        problem = (
            "it keeps state before its first step, of parameters that ZeRO then replaces: set "
            "train.engine: ddp or fsdp"
        )
    if problem:
        raise ConfigError(f"train.optimizer: {name}: {problem}")


def is_smooth(train: Train) -> bool:
    """Returns whether the optimizer keeps differences of rounding as small as they are."""
    return try_optimizer(_settings_of_trial(train)).smooth


def _settings_of_trial(train: Train) -> str:
    """Returns the settings of a trial, as JSON."""
    changed: dict[str, Any] = {"groups": None, "loraplus_lr_ratio": None, "precision": "fp32"}
    changed |= {"engine": "ddp", "optimizer_in_backward": False}
    changed |= {"learning_rate": RATE, "weight_decay": 0.0}  # only matrices decay, but no slices
    return train.model_copy(update=changed).model_dump_json()


@lru_cache(maxsize=32)
def try_optimizer(settings: str) -> Traits:
    """Returns what an optimizer can do; `settings` is the section `train` as JSON."""
    train, operations = Train.model_validate_json(settings), _Operations()
    try:
        with _undisturbed():
            return _try(train, operations)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ConfigError(
            f"train.optimizer: {train.optimizer} fails on a matrix of {WIDTH} x {WIDTH}, and a "
            f"vector: {reason}"
        ) from error


def _try(train: Train, operations: _Operations) -> Traits:
    whole, start = _make(train), _values(0)
    optimizer = whole._base_optimizer
    begins_with_state = bool(optimizer.state)
    with operations:
        _step(whole, range(STEPS - 1))
    before = [copy.deepcopy(settings_of(group)) for group in optimizer.param_groups]
    saved = json.loads(json.dumps({s.name: [s.plain, s.group] for s in whole.optimizer_shards()}))
    tensors: dict[str, Any] = {
        s.name: tuple({k: v.clone() for k, v in kind.items()} for kind in (s.state, s.whole))
        for s in whole.optimizer_shards()
    }
    resumed = _make(train, {name: p.detach() for name, p in whole.trained.items()})
    resumed.load_optimizer(STEPS - 1, lambda name, *_: SavedState(*tensors[name], *saved[name]))
    for each in (whole, resumed):
        _step(each, range(STEPS - 1, STEPS))
    torch.manual_seed(1)  # an optimizer that draws numbers draws others
    joined = []
    for halves in (start.flatten().chunk(2), start.chunk(2)):
        cut = _make(train, dict(zip(("a", "b"), halves, strict=True)))
        _step(cut, range(STEPS))
        joined.append(torch.cat([cut.trained[name].detach().flatten() for name in ("a", "b")]))
    near = _make(train)
    _step(near, range(STEPS), NOISE)
    moved = (whole.trained["matrix"].detach() - start).flatten()
    deviation = (near.trained["matrix"] - whole.trained["matrix"]).detach().norm()
    parts = [shard for shard in whole.optimizer_shards() if shard.name == "matrix"]
    is_whole = any(shard.whole for shard in parts)
    by_element, by_row = (
        not is_whole
        and bool((each - start.flatten() - moved).abs().max() <= 1e-3 * moved.abs().max())
        for each in joined
    )
    return Traits(
        by_element=by_element,
        by_row=by_row,
        gathers=gathers_matrices(optimizer),
        averages=averages(optimizer),
        counts_in_groups=before != [settings_of(group) for group in optimizer.param_groups],
        begins_with_state=begins_with_state,
        library=next(iter(sorted(operations.namespaces - OWN)), ""),
        resumes=whole.checksums() == resumed.checksums(),
        smooth=bool(deviation <= MOST * moved.norm()),
    )


def _make(train: Train, weights: dict[str, torch.Tensor] | None = None) -> Replicated:
    """Returns a model of one matrix and one vector, or of `weights`, with the optimizer.

    It also has a matrix whose gradient is 0, since Muon refuses a model without any.
    """
    weights = weights or {"matrix": _values(0), "vector": _values(1)[0]}
    weights = {"idle": torch.zeros(2, 2)} | weights
    model = nn.ParameterDict({name: nn.Parameter(each.clone()) for name, each in weights.items()})
    alone: Any = SimpleNamespace(num_processes=1, is_main_process=True, prepare=lambda *both: both)
    return Replicated(model, train, alone)


def _step(parallel: Replicated, steps: Iterable[int], noise: float = 0.0) -> None:
    """Makes steps. The gradient of each half of the matrix is the same whether it is cut or not.

    That of the first half grows, so that an update that depends on a norm differs between them.
    `noise`: by how much gradients differ from those of other trials, as a share of each element.
    """
    for step in steps:
        gradient = _values(10 + step) * (1 + noise * _values(20 + step))
        gradient[: WIDTH // 2] *= 10**step
        halves = gradient.flatten().chunk(2)
        own = {"matrix": gradient, "vector": gradient[0], "a": halves[0], "b": halves[1]}
        for name, parameter in parallel.trained.items():
            known = own.get(name, torch.zeros_like(parameter))
            parameter.grad = known.clone().view(parameter.shape)
        parallel.update()


def _values(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Computes on the CPU; changes no random state, compiles nothing and shows no warnings."""
    with (
        _disable_current_modes(),  # a plan may be tracing tensors without data
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        torch.compiler.set_stance("force_eager"),
        redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


class _Operations(TorchDispatchMode):
    """Records the namespaces of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **kwargs or {})


# -- the size of its state

Shapes = Mapping[tuple[tuple[int, ...], bool], int]
"""How many trained parameters have a shape, and whether they are outside of layers."""


def trained_shapes(model: nn.Module) -> Shapes:
    """Returns the shapes of the trained parameters, which may have no storage."""
    apart = outside_of_layers(model)
    trained = (p for p in model.parameters() if p.requires_grad)
    return Counter((tuple(p.shape), id(p) in apart) for p in trained)


def state_bytes(train: Train, shapes: Shapes) -> int:
    """Returns the bytes of the optimizer's state of parameters of these shapes."""
    settings, pure = _settings_of_trial(train), train.is_bf16_pure
    return sum(number * _state_bytes(settings, pure, *key) for key, number in shapes.items())


def saved_state_bytes(train: Train, shapes: Shapes) -> int:
    """Returns the bytes that a checkpoint has besides the weights that a user loads."""
    trained = sum(number * math.prod(shape) for (shape, _), number in shapes.items())
    has_copy = try_optimizer(_settings_of_trial(train)).averages  # of the weights in training
    return state_bytes(train, shapes) + train.trained_bytes * trained * has_copy


def update_gather_bytes(train: Train, shapes: Shapes) -> int:
    """Returns the bytes of the largest matrix that an update gathers from slices, in two copies."""
    inside = [math.prod(shape) for shape, apart in shapes if len(shape) == 2 and not apart]
    if not inside or not try_optimizer(_settings_of_trial(train)).gathers:
        return 0
    return 2 * 4 * max(inside)


def checkpoint_bytes(train: Train, model: nn.Module) -> int:
    """Returns the bytes of a checkpoint of `model`, without a tokenizer."""
    number = sum(p.numel() for p in weights_to_save(model).values())
    state = saved_state_bytes(train, trained_shapes(model))
    return disk.checkpoint_bytes(train, number, state, 0)


def calls_library(train: Train) -> bool:
    """Returns whether the optimizer calls another library, which takes no tensors without data."""
    return bool(try_optimizer(_settings_of_trial(train)).library)


@lru_cache(maxsize=4096)
def _state_bytes(settings: str, pure: bool, shape: tuple[int, ...], is_outside: bool) -> int:
    """Returns the bytes that the optimizer keeps for one parameter after a step.

    The step is made on a tensor without data. An optimizer that calls a library of its own cannot
    do that: then it is one of a real tensor. If the parameter is large, that is a smaller matrix,
    and the bytes are those for as many elements. `pure`: moments are stored in bf16
    (`train/updates`), unless a library keeps them in a format of its own.
    """
    train = Train.model_validate_json(settings)
    with _undisturbed():
        try:
            with FakeTensorMode():
                return _measure(train, shape, is_outside, pure)
        except Exception:  # noqa: BLE001  # it may fail in any way
            size = shape if math.prod(shape) <= WIDTH**2 else (4 * WIDTH, WIDTH)
            return math.ceil(math.prod(shape) * _measure(train, size, False) / math.prod(size))


def _measure(train: Train, shape: tuple[int, ...], is_outside: bool, pure: bool = False) -> int:
    weight = nn.Parameter(torch.zeros(shape))
    holder = nn.Embedding(1, 1) if is_outside else nn.Module()
    holder.weight = weight
    model = nn.ModuleDict({"holder": holder})
    model.matrix = nn.Parameter(torch.zeros(2, 2))  # as in `_make`
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(train, model)
    optimizer.step()
    kept = optimizer.state.get(weight, {}).values()
    tensors = (value for value in kept if isinstance(value, torch.Tensor) and value.ndim)
    shared = {id(each) for each in getattr(optimizer, "name2qmap", {}).values()}  # bitsandbytes
    return sum(
        value.nbytes // (2 if pure and value.shape == shape else 1)
        for value in tensors
        if id(value) not in shared
    )
