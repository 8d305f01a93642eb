"""Chooses what gets an adapter, and adapts weights that no linear layer holds, such as experts.

The experts of a mixture are one parameter of shape (experts, in, out) or (experts, out, in). PEFT's
`target_parameters` adapts it, and adapters are saved in PEFT's files. Only the way in which an
adapter changes the weight in a forward pass is this project's own: see `prepared`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,
    check_target_module_exists,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from sft.errors import ModelError
from sft.models.prepared import PreparedWeights, prepare
from sft.models.reach import NOTHING, Reach, without_modes


class ExpertAdapter(ParamWrapper):
    """PEFT's LoRA of a parameter, which may be quantised, or split over ranks."""

    def get_param(self) -> torch.Tensor:
        """Returns the parameter; for a quantised one zeros of its shape and dtype (no memory)."""
        module: Any = self.get_base_layer()
        stored = module._parameters[self.parameter_name]
        state = module.quant_states.get(self.parameter_name)
        if state is None:
            return stored
        return torch.zeros((), dtype=state.dtype, device=stored.device).expand(state.shape)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        module: Any = self.get_base_layer()
        changes = module.changes
        if any(name in self.lora_A for name in active_adapters):
            changes[self.parameter_name] = self._add
        try:
            yield
        finally:
            changes.pop(self.parameter_name, None)

    def _add(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns W + lora_alpha / r * B @ A of each expert, in the dtype of W, as PEFT does."""
        for name in self.active_adapters:
            if weight.ndim == 3:
                left, right, scale = self.get_delta_factors(name)
                with torch.autocast(weight.device.type, enabled=False):
                    weight = torch.baddbmm(weight, left, right, alpha=scale)
            else:
                with torch.autocast(weight.device.type, enabled=False):
                    weight = weight + self.get_delta_weight(name)
        return weight


ExpertAdapter.__name__ = "ParamWrapper"  # PEFT finds its own class by this name


def _wrap(target: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> Any:
    """Returns the adapter of a parameter; None for a module, which PEFT's own classes adapt."""
    name = options.pop("parameter_name", None)
    if name is None:
        return None
    if is_plain(target):  # an adapter of its weight is the adapter of the module
        return LoraModel._create_new_module(config, adapter_name, target, **options)
    return ExpertAdapter(target, adapter_name, parameter_name=name, config=config, **options)


def complete_targets(base: Any, config: LoraConfig, *, auto: bool, init: bool | str) -> None:
    """Changes `config` so that PEFT adapts all that it names; prepares the modules with experts.

    For some mixtures PEFT takes certain names of modules for the experts of transformers 4. Linear
    layers with these names would get no adapter, so their weights are named as parameters. PEFT
    reads such a file in the same way. `auto`: the names are those of `auto_targets`. `init`:
    `init_lora_weights`, which `config` lacks if weights have no values. Raises ModelError for what
    PEFT cannot do with parameters.
    """
    every = [name for name, _ in base.named_parameters()]
    if config.target_modules != "all-linear":
        named, converted = _linear_layers(base, config), copy.deepcopy(config)
        convert_peft_config_for_transformers(converted, base, None)
        kept = _linear_layers(base, converted)
        if auto:
            config.target_modules = short_names(kept)
        else:
            vars(config).update(vars(converted))
        lost = shortest({f"{name}.weight" for name in named - kept}, every)
        config.target_parameters = sorted({*(config.target_parameters or ()), *lost}) or None
        _follow_patterns(config, named - kept)
    owners = {n: base.get_submodule(_owner(n)) for n in every if is_adapted(n, config)}
    _refuse_parameters(config, owners, init)
    for owner in owners.values():
        if not is_plain(owner):
            prepare(owner)
    if owners:
        own: Any = {PreparedWeights: _wrap, nn.Linear: _wrap}
        config._register_custom_module(own)


def _follow_patterns(config: LoraConfig, layers: Iterable[str]) -> None:
    """Adds patterns of ranks and alphas for `layers` that are now named by their parameter."""
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for pattern, value in list((patterns or {}).items()):
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in layers):
                patterns.setdefault(rf"({pattern})\.weight", value)  # type: ignore[union-attr]


def _refuse_parameters(
    config: LoraConfig, owners: Mapping[str, nn.Module], init: bool | str
) -> None:
    """Raises ModelError for what PEFT cannot do with parameters. `owners`: their modules."""
    name = next(iter(owners), "")
    if name and config.lora_dropout:
        raise ModelError(
            f"tuning.lora_dropout: PEFT has no dropout for adapters of parameters, such as "
            f"{short_names([name])[0]}, found {config.lora_dropout:g}: set 0"
        )
    name = next((each for each, owner in owners.items() if not is_plain(owner)), "")
    of_layers = {"use_dora": config.use_dora, "lora_bias": config.lora_bias}
    of_layers[f"init_lora_weights: {init}"] = init not in (True, False, "gaussian")
    if name and (wrong := next((key for key, given in of_layers.items() if given), None)):
        raise ModelError(
            f"tuning.lora.{wrong}: PEFT has it for linear layers only, and {short_names([name])[0]}"
            " is a parameter of experts: name the linear layers in tuning.target_modules"
        )


def _linear_layers(base: nn.Module, config: LoraConfig) -> set[str]:
    """Returns the names of the linear layers that `config` names as modules."""
    return {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name)
    }


@dataclass(frozen=True)
class Targets:
    """The names that PEFT gets of what it adapts."""

    modules: str | list[str]
    parameters: list[str] | None = None
    excluded: str = ""  # a pattern of modules that have these names, but get no adapter


def auto_targets(base: Any, reach: Reach, *, routers: bool = False) -> Targets:
    """Returns targets for all matrices that a step on text reaches, except the head.

    `routers`: whether to include those that choose experts. If the targets are exactly the linear
    layers, the result is PEFT's `all-linear`.
    """
    head = base.get_output_embeddings()
    # An adapter has no effect on a weight that is read by another module than its owner.
    left = reach.borrowed | (NOTHING if routers else reach.routers)
    linear, held = dict[str, bool](), dict[str, bool]()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            fits = reach.multiplies(weight := f"{name}.weight") and weight not in left
            fits = fits and not is_refused(base, name)
            linear[name] = fits and acts_as_linear(module)
            if fits and not linear[name]:
                held[weight] = True
    for name in [*expert_parameters(base), *(n for n in reach.matrices if is_raw(base, n))]:
        is_other = name in left | reach.looked_up or base.get_submodule(_owner(name)) is head
        held[name] = reach.multiplies(name) and not is_other
    if all(linear.values()) and not any(held.values()):
        return Targets("all-linear")
    modules = short_names(name for name, wanted in linear.items() if wanted)
    named = (name for name, _ in base.named_modules() if is_named(name, modules))
    others = [name for name in named if not linear.get(name)]
    every = [name for name, _ in base.named_parameters()]
    parameters = shortest([name for name, wanted in held.items() if wanted], every)
    return Targets(modules, parameters or None, _excluding(others, reach))


def _excluding(names: list[str], reach: Reach) -> str:
    """Returns a pattern of the modules `names`, which get no adapters.

    For an unreached tower it has one entry, which covers all modules in it.
    """
    towers = {_outermost(name, reach) for name in names} - {*names}
    parts = [rf"{re.escape(name)}(\..*)?" for name in sorted(towers)]
    parts += [re.escape(n) for n in names if not any(n.startswith(f"{t}.") for t in towers)]
    return f"({'|'.join(parts)})" if parts else ""


def is_refused(base: Any, name: str) -> bool:
    """Returns whether PEFT refuses a layer because fused kernels read its weight directly."""
    config: Any = SimpleNamespace(peft_type="LORA")
    try:
        _check_lora_target_modules_mamba(config, base, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _outermost(name: str, reach: Reach) -> str:
    """Returns the outermost module that contains a layer and in which nothing is reached."""
    parts = name.split(".")
    for number in range(1, len(parts)):
        module = ".".join(parts[:number])
        if all(reach.is_unreached(n) for n in reach.parameters if n.startswith(f"{module}.")):
            return module
    return name


LIBRARIES = ("torch.", "bitsandbytes.", "transformers.pytorch_u")


def is_plain(module: nn.Module) -> bool:
    """Returns whether PEFT's own classes adapt a module, whose result is one tensor."""
    own = type(module).__module__.startswith(LIBRARIES)
    return own and isinstance(module, nn.Linear | Conv1D)


def acts_as_linear(module: Any) -> bool:
    """Returns whether a linear layer of any class computes x W + b, so an adapter may add x B A.

    A class that scales, rounds or splits its weight does not. This is tried on a small copy.
    """
    if is_plain(module):
        return True
    with without_modes(), torch.device("cpu"), torch.no_grad():
        weight, bias, x = (torch.linspace(-1, 2, n).sin() for n in (24, 6, 36))
        weight, x = weight.view(6, 4), x.view(3, 3, 4)
        weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
        small = copy.copy(module)
        own = {"weight": weight, "bias": bias if module.bias is not None else None}
        sizes = {"in_features": 4, "out_features": 6, "nx": 4, "nf": 6}
        sizes = {name: size for name, size in sizes.items() if hasattr(module, name)}
        hooks = {name: type(v)() for name, v in vars(module).items() if name.endswith("_hooks")}
        vars(small).update(hooks | sizes | {"_parameters": own, "quant_states": {}, "changes": {}})
        try:
            expected = F.linear(x, weight if len(weight) == 6 else weight.T, own["bias"])
            return bool(torch.allclose(small(x), expected, atol=1e-5))
        except Exception:  # noqa: BLE001  # a class of a model may do anything
            return False


def is_raw(base: nn.Module, name: str) -> bool:
    """Returns whether a weight belongs to a class of the model's own that is no linear layer.

    Not PyTorch's classes: recurrent layers, for example, keep other references to their weights.
    """
    owner = base.get_submodule(_owner(name))
    own = type(owner).__module__.startswith("torch.") or isinstance(owner, nn.Linear | Conv1D)
    weight: Any = owner._parameters[name.rpartition(".")[2]]
    return not own and 2 <= len(shape_of(base, name, weight)) <= 3


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def is_named(name: str, targets: Iterable[str]) -> bool:
    """Returns whether PEFT takes a parameter's name for one of `target_parameters`."""
    return any(name == each or name.endswith(f".{each}") for each in targets)


def follow_autocast(base: nn.Module) -> None:
    """Makes experts compute in the dtype of autocast, as linear layers do by themselves."""
    for name in expert_parameters(base):
        prepare(base.get_submodule(_owner(name)))


def expert_parameters(base: nn.Module) -> list[str]:
    """Returns the names of the parameters that hold a matrix for each expert."""
    return [
        name
        for name, parameter in base.named_parameters()
        if len(shape_of(base, name, parameter)) == 3
        and not type(base.get_submodule(name.rpartition(".")[0])).__module__.startswith("torch.")
    ]


def shape_of(model: nn.Module, name: str, parameter: nn.Parameter) -> torch.Size:
    """Returns the shape of a parameter as the model computes with it."""
    owner, _, own = name.rpartition(".")
    states = getattr(model.get_submodule(owner), "quant_states", {})
    return states[own].shape if own in states else parameter.shape


def is_adapted(name: str, config: LoraConfig) -> bool:
    """Returns whether `target_parameters` names a parameter."""
    return is_named(name, config.target_parameters or ())


def shortest(wanted: Collection[str], every: Iterable[str]) -> list[str]:
    """Returns names that PEFT takes for exactly the `wanted` parameters of `every`."""
    short = short_names(wanted)
    return short if all(n in wanted for n in every if is_named(n, short)) else sorted(wanted)


def without_unchosen(base: Any, parameters: list[str], config: LoraConfig) -> list[str]:
    """Returns `parameters` without what `layers_to_transform` or `exclude_modules` leaves out.

    PEFT itself looks at both for modules only.
    """
    every = [name for name, _ in base.named_parameters()]
    named = [name for name in every if is_named(name, parameters)]
    kept = [name for name in named if all(_is_chosen(n, config) for n in (name, _owner(name)))]
    return parameters if kept == named else shortest(kept, every)


def _is_chosen(name: str, config: LoraConfig) -> bool:
    chosen = copy.copy(config)
    chosen.target_modules = [name.rpartition(".")[2]]
    return bool(check_target_module_exists(chosen, name))


def short_names(names: Iterable[str]) -> list[str]:
    """Returns the part of each name after the number of its layer, which all layers share.

    A part that is only a number is not used, since it would name every element of a list.
    """
    return sorted({re.sub(r"^.*\.\d+\.(?!\d+$)", "", name) for name in names})
