"""Builds the optimizer: one that has a name, or any class of PyTorch's kind by its import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import _muon

from sft.config.optimizers import LIKE_ADAM, OPTIMIZERS, Named
from sft.config.schema import Train
from sft.errors import ConfigError, require_extra, suggest
from sft.models.fake import set_attributes
from sft.models.groups import find_group
from sft.models.layers import embedding_layers

ORTHOGONALISE = _muon._zeropower_via_newtonschulz
GIVEN = {"params": "the trained parameters", "lr": "train.learning_rate"}  # arguments of all


def build_optimizer(train: Train, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of `train`, in groups of parameters that are trained alike.

    The `peak` of a group is its learning rate after the warm-up. Only matrices get weight decay,
    unless `train.groups` gives one.
    """
    kind, arguments = optimizer_class(train), class_arguments(train)
    apart = outside_of_layers(model) if train.optimizer == "muon" else set()
    groups: dict[tuple[bool, bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate, decay = _settings(train, name, parameter)
            is_rest = train.optimizer == "muon" and (parameter.ndim != 2 or id(parameter) in apart)
            groups.setdefault((is_rest, parameter.ndim < 2, rate, decay), []).append(parameter)
    listed: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for (is_rest, _, rate, decay), params in sorted(groups.items(), key=lambda each: each[0][:2]):
        group = {"params": params, "lr": rate, "peak": rate}
        listed[is_rest].append(group | ({"weight_decay": decay} if _decays(kind) else {}))
    own, rest = listed
    if rest and not own:
        raise ConfigError(
            f"train.optimizer: {train.optimizer}: no trained parameter is a matrix in a layer, so "
            "AdamW would train all of them: use adamw"
        )
    parts = [kind(own, lr=train.learning_rate, **arguments)] if own else []
    if rest:
        parts.append(torch.optim.AdamW(rest, lr=train.learning_rate, **_adam(train), fused=True))
    built: Any = parts[0] if len(parts) == 1 else Combined(parts)
    if averages(built):
        built.train()
    return built


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which orthogonalises a whole matrix, also where FSDP2 has split it."""

    gathers_matrices = True

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Makes a step. Collective if the parameters are split."""
        with set_attributes(_muon, _zeropower_via_newtonschulz=_orthogonalise):
            return super().step(closure)


def _orthogonalise(update: Any, *settings: Any) -> torch.Tensor:
    """Returns the orthogonalised update; of a split one, this rank's part."""
    if not hasattr(update, "device_mesh"):
        return ORTHOGONALISE(update, *settings)
    from torch.distributed.tensor import distribute_tensor

    whole = ORTHOGONALISE(update.full_tensor(), *settings)
    return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)


class Combined(torch.optim.Optimizer):
    """Optimizers that share the parameters. Each steps the groups that have its number."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        numbered = enumerate(parts)
        super().__init__(
            [group | {"part": number} for number, part in numbered for group in part.param_groups],
            {},
        )

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Makes a step of each part."""
        for number, part in enumerate(self.parts):
            part.param_groups = [group for group in self.param_groups if group["part"] == number]
            part.state = self.state
            part.step()


def averages(optimizer: Any) -> bool:
    """Returns whether evaluation needs other weights than training: schedule-free optimizers."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


def gathers_matrices(optimizer: Any) -> bool:
    """Returns whether an optimizer gathers matrices of which FSDP2 gives a rank slices."""
    parts = getattr(optimizer, "parts", [optimizer])
    return any(getattr(part, "gathers_matrices", False) for part in parts)


def compiles_on_gpus(train: Train) -> bool:
    """Returns whether the optimizer compiles its update on a GPU."""
    return getattr(optimizer_class(train), "compiles_on_gpus", False)


def optimizer_class(train: Train) -> Any:
    """Returns the class that `train.optimizer` names. Raises UserError if there is none."""
    named = OPTIMIZERS.get(train.optimizer, Named(train.optimizer))
    module, _, name = named.path.rpartition(".")
    if named.extra:
        require_extra(
            named.extra,
            f"train.optimizer: {train.optimizer}",
            [named.needs or module.split(".")[0]],
        )
    try:
        missing = find_spec(module.split(".")[0]) is None
        found = None if missing else getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a module may fail in any way
        raise ConfigError(f"train.optimizer: cannot import {module}: {error}") from error
    if missing:
        raise ConfigError(f"train.optimizer: {module} is not installed, or misspelt")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        kinds = [key for key, value in vars(importlib.import_module(module)).items() if _is(value)]
        what = "has no such class" if found is None else "is no torch.optim.Optimizer"
        raise ConfigError(f"train.optimizer: {named.path} {what}; {suggest(name, kinds)}")
    return found


def _is(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


def _decays(kind: Any) -> bool:
    return "weight_decay" in _parameters(kind)


def _adam(train: Train) -> dict[str, Any]:
    return {"betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon}


def class_arguments(train: Train) -> dict[str, Any]:
    """Returns the arguments of the optimizer's class, besides parameters and learning rate.

    Raises ConfigError for `train.optimizer_args` that it does not take, or that a key gives.
    """
    kind = optimizer_class(train)
    named = OPTIMIZERS.get(train.optimizer, Named(train.optimizer))
    of_keys = dict[str, Any]()
    if train.optimizer in LIKE_ADAM and train.optimizer != "muon":
        of_keys = _adam(train)
    taken = _parameters(kind)
    problems = [*_contradictions(train, kind, of_keys)]
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values()):
        known = [name for name in taken if name not in GIVEN]
        unknown = [key for key in train.optimizer_args or {} if key not in taken]
        problems += [f"{key}: unknown to {named.path}; {suggest(key, known)}" for key in unknown]
    if problems:
        raise ConfigError("\n  ".join(["train.optimizer_args", *problems]))
    given = {key: _to_tuple(value) for key, value in (train.optimizer_args or {}).items()}
    return {**named.arguments, **of_keys, **given}


def _contradictions(train: Train, kind: Any, of_keys: dict[str, Any]) -> list[str]:
    """Returns what is wrong with arguments that keys of `train` give already."""
    problems, decays = [], [train.weight_decay, *(g.weight_decay for g in train.groups or ())]
    if any(decays) and not _decays(kind):
        problems.append(f"{kind.__name__} has no weight decay: set train.weight_decay: 0")
    keys = GIVEN | {key: f"train.{key}" for key in Train.model_fields}
    keys |= dict.fromkeys(of_keys, "train.adam_beta1, adam_beta2 and adam_epsilon")
    for key, value in (train.optimizer_args or {}).items():
        same = key in of_keys and of_keys[key] == _to_tuple(value)
        if key in keys and not same:
            problems.append(f"{key}: comes from {keys[key]}; remove it here")
    return problems


def _to_tuple(value: Any) -> Any:
    """Returns a list as a tuple, which is what optimizers expect; YAML has lists only."""
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value


def outside_of_layers(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters of embeddings and of the head, adapters included."""
    found = [each for each in embedding_layers(model) if each is not None]
    found += [each for each in model.modules() if isinstance(each, nn.Embedding)]
    return {id(parameter) for module in found for parameter in module.parameters()}


def _settings(train: Train, name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Returns the peak learning rate and the weight decay of a parameter.

    LoRA+ (Hayou et al. 2024) trains B, and as in PEFT vectors, faster than A.
    """
    rate = train.learning_rate
    if train.loraplus_lr_ratio and ("lora_B" in name or parameter.ndim < 2):
        rate *= train.loraplus_lr_ratio
    decay = train.weight_decay if parameter.ndim >= 2 else 0.0
    if group := find_group(train, name):
        rate = rate if group.learning_rate is None else group.learning_rate
        decay = decay if group.weight_decay is None else group.weight_decay
    return rate, decay
