"""Reports what a run will train, freeze, quantise and adapt, before weights are loaded.

The run's model, with its adapters and 4 bits, is built on fake tensors and traced (`models.reach`).
What contradicts the configuration stops the run.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from sft.config.load import with_values
from sft.config.schema import Config, RunConfig
from sft.errors import ConfigError
from sft.models import load
from sft.models.adapt import add_adapters
from sft.models.experts import is_raw, is_refused, shape_of
from sft.models.pretrained import explain_load_errors
from sft.models.quantise import matrices_to_quantise
from sft.models.reach import Reach, reach, trace
from sft.models.vocabulary import trained_tokens
from sft.plan.counts import ModelKey, config_of_key, model_key
from sft.plan.records import load_or_trace
from sft.runtime.console import quantity, table, write_json
from sft.tasks.registry import task_of

STATES = ("trained", "conditional", "unreached", "frozen", "not_quantised")
PRODUCTS = ("adapted", "by_choice", "missed")
COLUMNS = {  # of the table
    "trained": "trained",
    "conditional": "trained if chosen",
    "unreached": "trained, no gradient",
    "frozen": "frozen",
    "not_quantised": "not quantised",
    "adapted": "products adapted",
    "by_choice": "not adapted, by choice",
    "missed": "not adapted, missed",
}
KINDS = (
    *("attention", "MLP", "experts", "router", "recurrent", "embeddings", "head", "norm"),
    *("vision", "audio", "no text", "other"),
)
SHOWN = 6  # names in a message
# What PEFT puts behind the name of a module: A and B, a trained copy of it, or of some rows.
ADAPTER = r"\.(?:lora_|modules_to_save\.|token_adapter\.(?!base_layer))"


@dataclass
class Group:
    """Counts for one kind of module: elements of parameters by state, matrix products by use."""

    parameters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))
    products: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PRODUCTS, 0))

    @property
    def values(self) -> dict[str, int]:
        return self.parameters | self.products


@dataclass
class Coverage:
    """What a step on text does with every parameter, and with every matrix product."""

    mode: str
    num_parameters: int  # without adapters
    num_trained: int
    groups: dict[str, Group]
    unreached: list[str]  # trained parameters without a gradient
    not_quantised: list[str]  # frozen matrices that should be in 4 bits and are not
    missed: list[str]  # products that should have an adapter and have none
    problem: str  # why it is not known what text reaches; "" if it is
    narrowed: str = ""  # why a narrow copy was run in place of a trace; "" if it was not

    @property
    def contradictions(self) -> list[str]:
        """Returns what contradicts the configuration, each with the remedy."""
        found = []
        if self.unreached:
            found.append(
                f"{len(self.unreached)} trained parameters get no gradient from text, such as "
                f"{_some(self.unreached)}: leave them out of tuning.target_modules or tuning.lora"
            )
        if self.not_quantised:
            found.append(
                f"tuning.mode: qlora asks for 4 bits, but {len(self.not_quantised)} matrices stay "
                f"as they are, such as {_some(self.not_quantised)}: set tuning.mode: lora"
            )
        return found

    def refuse_contradictions(self) -> None:
        """Raises ConfigError for what contradicts the configuration."""
        if self.contradictions:
            raise ConfigError("; ".join(self.contradictions))


def cover(config: RunConfig) -> Coverage | None:
    """Returns the coverage of a run; None for a task without a language model as its base."""
    if not isinstance(config, Config):
        return None
    return _cover(task_of(config).info(config).cache / "coverage", model_key(config))


@lru_cache(maxsize=16)
def _cover(folder: Path, key: ModelKey) -> Coverage:
    """Returns the coverage of the model `key`, which is cached in `folder`."""
    config = config_of_key(key)  # if it names a file of sizes, the content is an input, too
    inputs = (key, repr(task_of(config).info(config)))
    return load_or_trace(folder, inputs, lambda: _trace(key), Coverage)


def _trace(key: ModelKey) -> Coverage:
    given = config_of_key(key)
    # Eager attention exists for every architecture and device.
    config = with_values(given, {"model.attn_implementation": "eager"})
    assert isinstance(config, Config)
    built: list[Any] = []

    def build(narrowed: bool = False) -> nn.Module:
        cpu = torch.device("cpu")
        options: dict[str, Any] = {"weights": False, "adapt": _adapt, "narrowed": narrowed}
        model: Any = load.build(config, "fp32", cpu, **options)
        model.config._experts_implementation = "batched_mm"  # for tensors of any dtype
        built[narrowed:] = [model]
        return model

    small = partial(build, narrowed=True)
    with explain_load_errors(config.model.name):  # its code may raise anything
        found = trace(build, config.tuning.mode, as_built=True, small=small)
    return _count(built[0], found, config)


def _adapt(base: nn.Module, config: Config) -> nn.Module:
    """Returns the frozen `base` with adapters and the rows of new tokens, without their values."""
    return add_adapters(base, trained_tokens(base, config.tuning))


def _count(model: Any, found: Reach, config: Config) -> Coverage:
    """Counts the parameters of the traced model and its products."""
    mode, base = config.tuning.mode, reach(_base_of(model))
    kinds = _Kinds(model, found, base)
    result = Coverage(mode, 0, 0, {}, [], [], [], found.problem, found.narrowed)
    own = {parameter: name for name, parameter in reversed([*model.named_parameters()])}
    for parameter, name in own.items():
        shape = shape_of(model, name, parameter)
        state = getattr(parameter, "quant_state", None)
        number = (state.shape if state is not None else shape).numel()
        group = result.groups.setdefault(kinds.of(name), Group())
        if parameter.requires_grad:
            result.num_trained += number
            how = {"reached": "trained"}.get(found.parameters[name], found.parameters[name])
            if how == "unreached":
                result.unreached.append(name)
        else:
            how = "frozen"
            if mode == "qlora" and state is None and kinds.was_to_be_quantised(name):
                how = "not_quantised"
                result.not_quantised.append(name)
        group.parameters[how] += number
        result.num_parameters += 0 if kinds.is_adapter(name) else number
        if name in found.products and not kinds.is_adapter(name):
            use = kinds.use(name, parameter, config)
            group.products[use] += 1
            result.missed += [name] if use == "missed" else []
    order = {kind: number for number, kind in enumerate(KINDS)}
    result.groups = dict(sorted(result.groups.items(), key=lambda item: order[item[0]]))
    return result


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Kinds:
    """The kinds of a model's parameters, from what the trace saw of them and where they are."""

    def __init__(self, model: Any, found: Reach, base: Reach) -> None:
        self.found, self.base = found, base
        keys = " ".join(getattr(model.config, "sub_configs", None) or ())
        self.media = [medium for medium in ("vision", "audio") if medium in keys]
        self.modules, plain = dict(model.named_modules()), _base_of(model)
        # Other modules read these weights, so they cannot be in 4 bits. That must be reported.
        read = (base.matrices & base.borrowed) - base.looked_up - base.routers
        self.wanted = matrices_to_quantise(plain) | {n for n in read if is_raw(plain, n)}
        self.head_layer = model.get_output_embeddings()
        self.head = getattr(self.head_layer, "weight", None)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.routing = {self._block(name) for name in found.routers}
        owners = {name.rpartition(".")[0] for name, p in found.products.items()}
        self.multiply = owners
        self.recurrent = {
            name.rpartition(".")[0].rpartition(".")[0]
            for name, product in found.products.items()
            if product.kind == "convolution"
        }
        self.attends = found.attends - self.routing

    def _block(self, router: str) -> str:
        """Returns the name of the module that calls a router and its experts."""
        owner = router.rpartition(".")[0]
        return owner if owner in self.found.mixed else owner.rpartition(".")[0]

    def is_adapter(self, name: str) -> bool:
        """Returns whether a parameter is A or B, or a trained copy of a module or of rows."""
        return re.search(ADAPTER, name) is not None

    def plain(self, name: str) -> str:
        """Returns a parameter's name in the base without adapters."""
        inner = re.sub(r"(\.token_adapter)?\.base_layer|\.original_module", "", name)
        return inner.removeprefix("base_model.model.")

    def of(self, name: str) -> str:
        """Returns the kind of a parameter; for one of an adapter, that of what it adapts."""
        host = re.split(ADAPTER, name, maxsplit=1)[0] + "." if self.is_adapter(name) else name
        parameter, plain = self.parameters[name], self.plain(name)
        if host != name:
            if self.modules[host[:-1]] is self.head_layer:
                return "head"
            own = getattr(self.modules[host[:-1]], "parameter_name", "")
            inner = [n for n in self.parameters if n.startswith(host) and not self.is_adapter(n)]
            inner = [n for n in inner if not own or self.plain(n) == self.plain(host + own)]
            return self.of(inner[0]) if inner else "other"
        if not self.base.problem and self.base.is_unreached(plain) and parameter.ndim:
            return self._unreached(plain)
        if plain in self.base.looked_up:
            return "embeddings"
        if parameter is self.head:
            return "head"
        owner = name.rpartition(".")[0]
        if self.base.chooses(plain, parameter.numel()):
            return "router"
        if self._within(name, self.routing):
            return "norm" if self._is_norm(name) else "experts"
        if self._is_norm(name) and not self._is_mixer(name):
            return "norm"
        if self._within(name, self.recurrent - {""}):
            return "recurrent"
        if self._within(name, self.attends - {""}):
            return "attention"
        return "MLP" if owner in self.multiply else "other"

    def _is_mixer(self, name: str) -> bool:
        return bool(self._within(name, self.recurrent - {""}))

    def _is_norm(self, name: str) -> bool:
        owner = name.rpartition(".")[0]
        return self.parameters[name].ndim <= 1 and owner not in self.multiply

    def _within(self, name: str, modules: Any) -> bool:
        """Returns whether one of these modules contains `name`."""
        parts = name.split(".")
        return any(".".join(parts[:n]) in modules for n in range(1, len(parts)))

    def _unreached(self, plain: str) -> str:
        """Returns `vision` or `audio` for a part that reads such inputs, else `no text`."""
        twins = (n for n in self.base.parameters if _twin(n, plain))
        if any(not self.base.is_unreached(name) for name in twins) or not self.media:
            return "no text"
        label = next((medium for medium in self.media if medium in plain), None)
        return label or self.media[0]

    def was_to_be_quantised(self, name: str) -> bool:
        """Returns whether 4 bits were asked for a frozen parameter."""
        return self.plain(name) in self.wanted and self.parameters[name].ndim > 1

    def _has_adapter(self, name: str) -> bool:
        owner, _, own = name.rpartition(".")
        while not hasattr(self.modules[owner], "lora_A") and owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
        while getattr(self.modules[owner], "parameter_name", own) != own:
            if not owner.endswith(".base_layer"):
                return False
            owner = owner.removesuffix(".base_layer")
        return hasattr(self.modules[owner], "lora_A")

    def use(self, name: str, parameter: nn.Parameter, config: Config) -> str:
        """Returns whether a product has an adapter, has none by choice, or was missed."""
        if parameter.requires_grad or self._has_adapter(name):
            return "adapted"
        kind, product = self.of(name), self.found.products[name]
        if config.tuning.mode == "full" or config.tuning.target_modules != "auto":
            return "by_choice"
        if config.tuning.lora.exclude_modules or config.tuning.lora.layers_to_transform is not None:
            return "by_choice"
        chosen = kind in ("head", "router", "embeddings") or product.kind == "convolution"
        plain = self.plain(name)
        refused = is_refused(_base_of_root(self.modules), plain.rpartition(".")[0])
        refused |= plain in self.base.borrowed or self.base.is_unreached(plain)
        return "by_choice" if chosen or refused else "missed"


def _base_of_root(modules: dict[str, nn.Module]) -> Any:
    return _base_of(modules[""])


def _twin(name: str, plain: str) -> bool:
    """Returns whether two parameters have the same place in elements of the same lists."""
    without = [part for part in name.split(".") if not part.isdigit()]
    return without == [part for part in plain.split(".") if not part.isdigit()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def coverage_table(found: Coverage) -> Table:
    """Returns the table "Coverage": a row for each kind of module, without columns of zeros."""
    values = {kind: group.values for kind, group in found.groups.items()}
    columns = {
        key: name
        for key, name in COLUMNS.items()
        if key in ("trained", "frozen") or any(own[key] for own in values.values())
    }
    values["total"] = {key: sum(own[key] for own in values.values()) for key in columns}
    rows = [
        [kind, *(quantity(own[key]) if own[key] else "-" for key in columns)]
        for kind, own in values.items()
    ]
    title = "Coverage: parameters, and matrix products by adapter"
    result = table(title, ("parameters of", *columns.values()), rows)
    if found.problem:
        result.caption = (
            f"not known what text reaches, so all counts as reached: {found.problem[:150]}"
        )
    elif found.narrowed:
        result.caption = (
            f"found by a run of a narrow copy, since tracing failed: {found.narrowed[:150]}"
        )
    return result


def write_coverage(found: Coverage, path: Path) -> None:
    """Writes coverage.json (docs/RUNS.md)."""
    write_json(path, coverage_values(found))


def coverage_values(found: Coverage) -> dict[str, Any]:
    """Returns the content of coverage.json."""
    return asdict(found) | {"contradictions": found.contradictions}
