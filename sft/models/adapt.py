"""Adds the LoRA adapters (PEFT) that are trained on a frozen base, and names their weights.

PEFT creates adapters. This module adds what PEFT does not do. It refuses names in `tuning.lora`
that match nothing in the base. It also converts an adapter that was initialised with a part of the
base (PiSSA, OLoRA) to one that fits the original base.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sft.config.adapters import adapter_tuning
from sft.config.lora import ONLY_BEGINS
from sft.config.schema import Tuning
from sft.errors import ModelError, oom_message, suggest
from sft.models import experts, peft_quantised
from sft.models.fake import is_fake
from sft.models.layers import embedding_layers
from sft.models.peft_forward import forward_once
from sft.models.reach import reach
from sft.models.vocabulary import unknown_id

NAME = "default"  # of the adapter, in PEFT


def add_adapters(base: nn.Module, tuning: Tuning) -> Any:
    """Returns `base` with a LoRA adapter (PEFT) in fp32.

    Raises ModelError if a name in `tuning` matches nothing in the base, or if PEFT refuses a
    combination.
    """
    from peft import get_peft_model

    if problem := unknown_id(sorted(tuning.lora.trained_ids), base):
        raise ModelError(f"tuning.lora.trainable_token_indices: {problem}")
    targets = _targets(base, tuning)
    config = lora_config(tuning, targets, has_values=not is_fake(base))
    init = tuning.lora.init_lora_weights
    try:
        experts.complete_targets(base, config, auto=tuning.target_modules == "auto", init=init)
        with peft_quantised.dora(fake=is_fake(base)), peft_quantised.orthogonal(), _quiet():
            model: Any = get_peft_model(base, config)
    except Exception as error:
        if isinstance(error, MemoryError | ModelError) or oom_message(error):
            raise
        raise ModelError(f"tuning{_explain(error, base, config, targets)}") from error
    _refuse_unable(model, tuning)
    if init == "loftq" and not is_fake(base):
        peft_quantised.fit_loftq(model, base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if tuning.lora.changes_base and not is_fake(base):
        _keep_first(model, tuning)
    forward_once(model)
    if init in ONLY_BEGINS:  # PEFT would initialise them again when it reads the adapter
        config.init_lora_weights = True
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings of PEFT that are wrong for parameters; `refuse_unused` reports the rest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", "You have passed exclude_modules")
        yield


def _explain(error: Exception, base: nn.Module, config: Any, targets: experts.Targets) -> str:
    """Returns why PEFT could not add adapters, with the key that caused it."""
    if config.target_modules and not _matching(base, config):
        linear = (n for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D))
        return (
            f".target_modules: {targets.modules} names no layer of this model; "
            f"its linear layers are: {', '.join(sorted(_last_names(linear)))}"
        )
    for name, parameter in base.named_parameters():
        owners = [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
        copied = [o for o in owners for e in config.modules_to_save or () if o.endswith(e)]
        if copied and not parameter.is_floating_point():
            return (
                f".lora.modules_to_save: {copied[0]} is stored in 4 bits, of which no copy can be "
                "trained: give it an adapter, or set tuning.mode: lora"
            )
    reason = " ".join(str(error).split()) or type(error).__name__
    return f": PEFT cannot add these adapters: {reason[:400]}"


def _refuse_unable(model: Any, tuning: Tuning) -> None:
    """Raises ModelError for adapters that PEFT makes, but that could not be right.

    It reads no values of weights, so a plan refuses the same adapters as a run.
    """
    init, kept = tuning.lora.init_lora_weights, "tuning.lora.init_lora_weights"
    plain = model.get_base_model()
    for name, layer in adapted_layers(plain):
        if hasattr(layer.base_layer, "token_adapter"):
            raise ModelError(
                f"tuning: {name} would have an adapter and trained rows (trainable_token_indices, "
                "model.new_tokens), of which PEFT merges one only: leave one of them out"
            )
        if NAME not in layer.lora_A:  # of embeddings, which PEFT always initialises in one way
            if init == "eva":
                raise ModelError(f"{kept}: eva begins linear layers only, found {name}: use true")
            continue
        rank, most = layer.r[NAME], min(layer.in_features, layer.out_features)
        if tuning.lora.changes_base and rank > most:
            raise ModelError(
                f"tuning.r: init_lora_weights: {init} gives {name} a rank of {most} at most, "
                f"found {rank}"
            )
        if init == "orthogonal" and rank % 2:
            raise ModelError(f"{kept}: orthogonal needs even ranks, found {rank} for {name}")
        if init == "olora" and isinstance(layer.get_base_layer(), Conv1D):
            raise ModelError(
                f"{kept}: PEFT's olora takes {name}, whose weight is stored as (in, out), for its "
                "transpose: use pissa"
            )
    names = {n for name, _ in adapted_layers(plain) for n in (name, f"{name}.weight")}
    asked = tuning.router == "trained" and tuning.target_modules == "auto"
    if asked and not names & reach(plain).routers:
        raise ModelError(
            "tuning.router: no adapter can change what chooses the experts of this model, since "
            "other code reads it; set frozen, or tuning.mode: full"
        )
    _refuse_half_tied(model, tuning)


def _refuse_half_tied(model: Any, tuning: Tuning) -> None:
    """Raises ModelError if PEFT would not tie the weights as `ensure_weight_tying` asks."""
    trained = (p for p in model.parameters() if p.requires_grad)
    if max(Counter(p.untyped_storage()._cdata for p in trained).values(), default=1) > 1:
        raise ModelError(
            "tuning.lora.ensure_weight_tying: PEFT ties adapters of embeddings and head as two "
            "views of the same memory, which the optimizer would update twice: adapt one of "
            "both without this key, or train rows with trainable_token_indices"
        )
    both = embedding_layers(model.get_base_model())
    ends = [hasattr(m, "base_layer") or hasattr(m, "original_module") for m in both]
    tied = model.base_model._get_module_names_tied_with_embedding()
    if tuning.lora.ensure_weight_tying and tied and ends[0] != ends[1]:
        raise ModelError(
            "tuning.lora.ensure_weight_tying: PEFT finds tied weights only where they are named "
            f"embed_tokens and lm_head, not {', '.join(tied)} here: remove this key"
        )


def adapted_layers(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields (name in the base, adapter). The adapter of a parameter has the parameter's name."""
    from peft.tuners.lora import LoraLayer

    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            own = [part for part in name.split(".") if part != "base_layer"]
            parameter = getattr(module, "parameter_name", None)
            yield ".".join([*own, *([parameter] if parameter else [])]), module


def lora_config(tuning: Tuning, targets: experts.Targets, has_values: bool) -> Any:
    """Returns PEFT's configuration.

    `has_values`: False for fake weights, which cannot be decomposed into the initial A and B.
    """
    from peft import LoraConfig, TaskType

    lora = tuning.lora.model_dump(exclude={"target_parameters"})
    lora["exclude_modules"] = _exclude_also(tuning.lora.exclude_modules, targets.excluded)
    init = lora.pop("init_lora_weights")
    plain = init in ("loftq", "eva") or (not has_values and not isinstance(init, bool))
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=tuning.r,
        lora_alpha=tuning.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=tuning.lora_dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters,
        init_lora_weights=True if plain else init,
        **lora,
    )


def _targets(base: Any, tuning: Tuning) -> experts.Targets:
    """Returns the names of what gets an adapter. Raises ModelError if `auto` finds nothing."""
    found, parameters = tuning.target_modules, tuning.lora.target_parameters
    if found != "auto":
        return experts.Targets(found if isinstance(found, str) else list(found), parameters)
    auto = experts.auto_targets(base, reach(base), routers=tuning.router == "trained")
    own = lora_config(tuning, experts.Targets([]), has_values=False)
    chosen = experts.without_unchosen(base, auto.parameters or [], own)
    auto = replace(auto, parameters=sorted({*chosen, *(parameters or ())}) or None)
    if not auto.modules and not auto.parameters:
        raise ModelError(
            "tuning.target_modules: auto finds no matrix in this model that an adapter could "
            "change; set tuning.mode: full"
        )
    if auto.modules != "all-linear" or tuning.lora.layers_to_transform is None:
        return auto
    # PEFT applies layers_to_transform only to names that are not whole names of modules.
    head, every = base.get_output_embeddings(), base.named_modules()
    linear = (n for n, m in every if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return experts.Targets(experts.short_names(linear), auto.parameters)


def _exclude_also(given: list[str] | str | None, pattern: str) -> list[str] | str | None:
    """Returns a value of PEFT's `exclude_modules` that excludes what `given` and `pattern` do."""
    if not pattern or not given:
        return given or pattern or None
    if not isinstance(given, str):  # names, or ends of names
        given = rf"(.*\.)?({'|'.join(map(re.escape, given))})"
    return f"({given})|({pattern})"


def _matching(base: nn.Module, config: Any) -> list[str]:
    from peft.tuners.tuners_utils import check_target_module_exists

    return [name for name, _ in base.named_modules() if check_target_module_exists(config, name)]


def _last_names(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


# -- names in `tuning` that match nothing


def refuse_unused(model: Any, tuning: Tuning) -> None:
    """Raises ModelError for a name or pattern in `tuning` that matches nothing in this model.

    It is not called for an existing adapter. One may name more than its base has, as PEFT allows.
    """
    plain = model.get_base_model()
    modules, parameters = (
        {re.sub(r"\.(base_layer|original_module|token_adapter)\b", "", name) for name, _ in named}
        for named in (plain.named_modules(), plain.named_parameters())
    )
    layers = {name for name, _ in adapted_layers(plain)}
    names = {name for name in modules | parameters if name}
    used = model.peft_config[NAME].target_modules or ()  # without transformers 4's expert names
    for key, entries, known in _named(tuning, names, parameters, layers):
        for entry in entries if key != "target_modules" else {*entries} & {*used}:
            if not any(_ends_with(name, entry) for name in known):
                is_whole = key == "lora.target_parameters"
                near = suggest(
                    entry, sorted(experts.short_names(known) if is_whole else _last_names(known))
                )
                raise ModelError(f"tuning.{key}: {entry} names nothing in this model; {near}")
    whole = {
        "target_modules": tuning.target_modules,
        "lora.exclude_modules": tuning.lora.exclude_modules,
    }
    for key, pattern in whole.items():
        if isinstance(pattern, str) and not any(re.fullmatch(pattern, n) for n in names | {"auto"}):
            raise ModelError(f"tuning.{key}: {pattern} matches the whole name of no module")
    _refuse_unused_layers(tuning, layers)


def _refuse_unused_layers(tuning: Tuning, layers: Iterable[str]) -> None:
    wanted = tuning.lora.layers_to_transform
    numbers = {int(n) for each in layers for n in re.findall(r"\.(\d+)\.", each)[:1]}
    for number in [wanted] if isinstance(wanted, int) else wanted or []:
        if number not in numbers:
            raise ModelError(
                f"tuning.lora.layers_to_transform: no layer {number} got an adapter; layers with "
                f"one: {', '.join(map(str, sorted(numbers)))}"
            )


def _named(
    tuning: Tuning, modules: set[str], parameters: set[str], adapted: set[str]
) -> Iterator[tuple[str, list[str], set[str]]]:
    """Yields (key, its names or patterns, the names in the model that they may match)."""
    lora, targets = tuning.lora, tuning.target_modules
    yield "target_modules", [] if isinstance(targets, str) else list(targets), modules
    yield "lora.target_parameters", lora.target_parameters or [], parameters
    yield "lora.rank_pattern", list(lora.rank_pattern), adapted
    yield "lora.alpha_pattern", list(lora.alpha_pattern), adapted
    yield "lora.modules_to_save", lora.modules_to_save or [], modules
    if isinstance(lora.exclude_modules, list):
        yield "lora.exclude_modules", lora.exclude_modules, modules
    if isinstance(lora.trainable_token_indices, dict):
        yield "lora.trainable_token_indices", list(lora.trainable_token_indices), modules


def _ends_with(name: str, pattern: str) -> bool:
    """Returns whether PEFT takes `pattern`, a regular expression, for the end of a name."""
    return name.endswith(f".{pattern}") or bool(re.match(rf"(.*\.)?({pattern})$", name))


# -- adapters in files


def store_like_base(adapted: Any) -> None:
    """Stores trained copies, rows and biases in the dtype of the base.

    In training, autocast casts them. Without autocast their dtype must be that of the base. For A
    and B, PEFT does this by itself.
    """
    dtype = adapted.get_base_model().dtype
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def tuning_of(adapted: Any) -> Tuning:
    """Returns the settings of an adapter in memory, as its adapter_config.json would have them."""
    values = adapted.peft_config[NAME].to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
    return adapter_tuning(plain)


# -- adapters that are initialised with a part of the base


def served_tuning(tuning: Tuning) -> Tuning:
    """Returns the settings of the adapter that is saved, which fits the original base.

    PiSSA and OLoRA train B A on a base from which the initial B0 A0 was subtracted. On the original
    base this is the adapter B A - B0 A0, of twice the rank and the same scale.
    """
    lora = tuning.lora
    if lora.init_lora_weights in ONLY_BEGINS:
        return tuning.model_copy(
            update={"lora": lora.model_copy(update={"init_lora_weights": True})}
        )
    if not lora.changes_base:
        return tuning
    changes: dict[str, Any] = {
        "init_lora_weights": True,
        "rank_pattern": {key: 2 * r for key, r in lora.rank_pattern.items()},
        "alpha_pattern": {key: 2 * alpha for key, alpha in lora.alpha_pattern.items()},
    }
    factor = 2**0.5 if lora.use_rslora else 2
    values = {"r": 2 * tuning.r, "lora_alpha": factor * tuning.lora_alpha}
    return tuning.model_copy(update=values | {"lora": lora.model_copy(update=changes)})


def _keep_first(model: Any, tuning: Tuning) -> None:
    """Keeps the initial A and B, which were subtracted from the base, in `model.first_adapter`."""
    model.first_adapter = {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if _part_of(name)
    }
    model.served_tuning = served_tuning(tuning)


def _part_of(name: str) -> str:
    """Returns "A" or "B" for a matrix of an adapter, also of embeddings; "" for other weights."""
    found = re.search(r"\.lora_(?:embedding_)?([AB])\.", name)
    return found[1] if found else ""


def extend_with_first(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the weights of the adapter B A - B0 A0, of twice the rank (`served_tuning`)."""
    result = dict(weights)
    for name, first in model.first_adapter.items():
        now = weights[name].detach().cpu()
        is_a = _part_of(name) == "A"
        result[name] = torch.cat([now, first] if is_a else [now, -first], dim=0 if is_a else 1)
    return result


def without_first(model: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    """Returns the trained half of a weight that `extend_with_first` wrote."""
    first = getattr(model, "first_adapter", {}).get(name)
    if first is None:
        return value
    is_a = _part_of(name) == "A"
    half = value.shape[0 if is_a else 1] // 2
    return value[:half] if is_a else value[:, :half].contiguous()


# -- names


def saved_names(model: Any) -> dict[str, str]:
    """Returns {name in PEFT's file: name in `model`} of all weights of an adapter, asking PEFT."""
    from peft import get_peft_model_state_dict

    tensors = {**aliases(model), **{name: name for name, _ in model.named_buffers()}}
    names = list(tensors.values())
    marks = {name: torch.tensor(number) for number, name in enumerate(tensors)}
    found = get_peft_model_state_dict(model, state_dict=marks, save_embedding_layers=False)
    return {saved: names[int(mark)] for saved, mark in found.items()}


def aliases(model: nn.Module) -> dict[str, str]:
    """Returns {name: first name of the same parameter}; tied parameters have several names."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    return {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)}
