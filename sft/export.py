"""Save what a user loads, and load it back.

`save` writes a model or an adapter in the format of transformers or PEFT, with the tokenizer and
its chat template, so that what is served is what was trained (law 3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft import checkpoint, tensors
from sft.checkpoint import CheckpointError
from sft.config import AnyConfig, Config, Crowd, Model, Tuning, UserError, load_config, load_run
from sft.crowd.agents import WEIGHTS as ADAPTER
from sft.crowd.agents import Agents, in_peft
from sft.model import ModelError, add_adapters, load_base, load_tokenizer, weights_sha256

BASE = "base.json"  # beside an adapter: what it was trained on
META = "ci_llm_meta_config.json"  # beside the agents of a crowd
ADAPTED = ("adapter_config.json", META)  # either says that a folder needs a base


class ExportError(UserError):
    """A run folder or an adapter is not what it should be."""


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    base: Model | None = None,
) -> None:
    """Adapter or model, and tokenizer, in `folder` (safetensors).

    `weights`: those to be saved, by name, where the model itself does not have them whole.
    `base`: what an adapter belongs to; `load_tuned` refuses another.
    """
    model.save_pretrained(str(folder), state_dict=weights)  # type: ignore[operator]
    agents = sorted(folder.glob("agent*")) if isinstance(model, Agents) else []
    for place in [folder, *agents]:
        tokenizer.save_pretrained(str(place))
    if base is not None:
        told = {"name": base.name, "weights_sha256": weights_sha256(base)}
        for place in agents or [folder]:
            (place / BASE).write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        if isinstance(model, Agents):
            meta = json.dumps({**model.described(), "base": told}, indent=2)
            (folder / META).write_text(meta + "\n", "utf-8")
    config = folder / "config.json"
    if config.exists():  # training turns the cache off; whoever loads the model wants it
        values = json.loads(config.read_text("utf-8"))
        config.write_text(json.dumps(values | {"use_cache": True}, indent=2) + "\n", "utf-8")


def read_weights(model: nn.Module, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that `save` wrote for `model`, by their name in it, one at a time.

    Raises CheckpointError if one that is trained is missing or has another shape.
    """
    if isinstance(model, Agents):
        yield from _read_agents(model, folder)
        return
    known = dict(model.named_parameters())
    missing = {name for name, p in known.items() if p.requires_grad}
    names = {name: name for name in known}
    if (folder / ADAPTER).exists():  # PEFT leaves the adapter's name out
        names = {name.replace(".default", ""): name for name in known if "lora_" in name}
    for path in sorted(folder.glob("*model*.safetensors")):
        if reason := tensors.fault(path):
            raise CheckpointError(f"{path} cannot be loaded: {reason}")
        with safe_open(path, "pt") as file:
            for saved in names.keys() & set(file.keys()):
                name, value = names[saved], file.get_tensor(saved)
                shape = getattr(known[name], "ds_shape", known[name].shape)  # ZeRO-3's are split
                if value.shape != shape:
                    raise CheckpointError(
                        f"{path} does not fit the model: {saved} is {list(value.shape)}, expected "
                        f"{list(shape)}"
                    )
                missing.discard(name)
                yield name, value
    if missing:
        raise CheckpointError(f"{folder} does not fit the model: it lacks {min(missing)}")


def _read_agents(crowd: Agents, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All agents' weights, joined."""
    _refuse_another_crowd(crowd, folder)
    paths = [folder / f"agent{agent}" / ADAPTER for agent in range(crowd.num_agents)]
    for path in paths:
        if reason := tensors.fault(path):
            raise CheckpointError(f"{path} cannot be loaded: {reason}")
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        for name, parameter in crowd.named_parameters():
            if not parameter.requires_grad:
                continue
            saved = in_peft(name)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's are split
            for path, file in zip(paths, files, strict=True):
                if saved not in file.keys():  # noqa: SIM118  # not a mapping
                    raise CheckpointError(f"{path} does not fit the model: it lacks {saved}")
                found = file.get_slice(saved).get_shape()
                if found != list(shape[1:]):
                    raise CheckpointError(
                        f"{path} does not fit the model: {saved} is {found}, expected "
                        f"{list(shape[1:])}"
                    )
            yield name, torch.stack([file.get_tensor(saved) for file in files])


def _refuse_another_crowd(crowd: Agents, folder: Path) -> None:
    """CheckpointError if `folder` holds no crowd, or one of other agents; the names that differ."""
    told = crowd_meta(folder)
    given = crowd.described()
    other = [
        f"{key}: saved with {told[key]}, found {given[key]}"
        for key in ("num_agents", "r", "lora_alpha", "target_modules")
        if told[key] != given[key]
    ]
    if other:
        raise CheckpointError(f"{folder} holds another crowd:\n  " + "\n  ".join(other))


def crowd_meta(folder: Path) -> dict[str, Any]:
    """What `save` told about the crowd in `folder`. CheckpointError if it holds none."""
    path = folder / META
    try:
        told = json.loads(path.read_text("utf-8"))
        shape_of(told)
        settings = Crowd(num_agents=told["num_agents"], aggregator=told["aggregator"])
        numbers = list(map(float, told["concentration"]))
        whole = len(numbers) == settings.num_agents and 0 < sum(numbers) < math.inf
        whole = whole and min(numbers) >= 0 and isinstance(told["base"]["name"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(repr(error).split())
        raise CheckpointError(f"{path}: expected a crowd's description: {reason}") from None
    if not whole:
        raise CheckpointError(f"{path} is not what a run writes")
    return told


def shape_of(told: dict[str, Any]) -> Tuning:
    """Of adapters, by what was saved beside them. ValueError or KeyError for what is none."""
    return Tuning(**{key: told[key] for key in ("r", "lora_alpha", "target_modules")})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts the weights that `save` wrote into `model`."""
    parameters = dict(model.named_parameters())
    for name, value in read_weights(model, folder):
        parameters[name].data.copy_(value)


def run_config(run: Path, overrides: list[str] | None = None) -> Config:
    """The configuration that a finished run of fine-tuning wrote, with overrides."""
    refuse_unfinished(run)
    # A folder that came from elsewhere must not grant itself the right to run code.
    untrusting = ["model.trust_remote_code=false", *(overrides or [])]
    return load_config(run / "config.yaml", untrusting)


def any_run_config(run: Path, overrides: list[str]) -> AnyConfig:
    """The same of a run of any task."""
    refuse_unfinished(run)
    if isinstance(load_run(run / "config.yaml"), Config):
        return run_config(run, overrides)
    return load_run(run / "config.yaml", overrides)


def refuse_unfinished(run: Path) -> None:
    """ExportError if `run` is not the folder of a finished run, whole."""
    if not (run / "config.yaml").exists() or not (run / "final_checkpoint").exists():
        raise ExportError(
            f"{run}: expected a finished run (config.yaml and final_checkpoint/), found "
            f"{'a folder without them' if run.is_dir() else 'nothing'}; run `make train` first, "
            "or give RUN=<folder>"
        )
    if reason := checkpoint.fault(run / "final_checkpoint"):
        raise ExportError(f"{run / 'final_checkpoint'} cannot be trusted: {reason}")


def load_tuned(
    run: Path,
    config: Config,
    precision: str,
    device: torch.device,
    *,
    quantised: bool = True,
    weights: Path | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The tuned model of a run, as it was trained: a QLoRA adapter on its NF4 base.

    `config` is what `run_config(run)` gave. `quantised=False` puts the adapter on the original
    weights instead. `weights`: another checkpoint than the final one.
    """
    folder = weights or run / "final_checkpoint"
    if config.crowd.agent is not None:
        folder, config = folder / f"agent{config.crowd.agent}", alone(config)
    own = {"name": str(folder), "revision": None, "init": "pretrained"}
    saved = config.model.model_copy(update=own)
    tokenizer = load_tokenizer(saved)
    mode = config.tuning.mode
    if mode == "full":
        return load_base(saved, mode, precision, device).eval(), tokenizer
    _refuse_another_base(folder, config.model)
    base = load_base(config.model, mode if quantised else "lora", precision, device)
    # By the configuration, as in training: adapter_config.json can name modules to be imported.
    adapted = add_adapters(base, config.tuning, config.crowd)
    if isinstance(adapted, Agents):
        _take_concentration(adapted, folder, config.crowd)
    else:
        _refuse_another_shape(folder, adapted)
    load_weights(adapted, folder)
    return adapted.eval(), tokenizer


def _take_concentration(crowd: Agents, folder: Path, settings: Crowd) -> None:
    """A fitted one, where the configuration has none of its own."""
    told = crowd_meta(folder)
    if told["aggregator"] == "learned" and settings.concentration == Crowd().concentration:
        crowd.concentration = tuple(map(float, told["concentration"]))
    elif settings.aggregator == "learned":
        raise ExportError(
            f"{folder}: crowd.aggregator: expected {told['aggregator']}, as it was trained, found "
            "learned, for which nothing was fitted; remove the override, or train with it"
        )


def alone(config: Config) -> Config:
    """That of one agent of a crowd by itself: an adapter like any other."""
    return config.model_copy(update={"crowd": Crowd()})


def _refuse_another_shape(folder: Path, adapted: Any) -> None:
    """No tensor tells lora_alpha, nor modules that are left out: `adapted`, of the configuration,
    is held against what was saved with the weights."""
    saved, given = _adapter_config(folder), adapted.peft_config["default"]
    shapes = {
        "r": (saved.get("r"), given.r),
        "lora_alpha": (saved.get("lora_alpha"), given.lora_alpha),
        "target_modules": (sorted(saved["target_modules"]), sorted(given.target_modules)),
    }
    other = [
        f"tuning.{key}: trained with {trained}, found {found}"
        for key, (trained, found) in shapes.items()
        if trained != found
    ]
    if other:
        raise ExportError(
            f"{folder}: the configuration is not that of its adapter_config.json; remove the "
            "override, or what was changed in config.yaml\n  " + "\n  ".join(other)
        )


def _refuse_another_base(folder: Path, base: Model) -> None:
    crowded = (folder / META).exists()
    path = folder / (META if crowded else BASE)
    if not path.exists():  # not of a run, or of one before this file was written
        return
    try:
        told = json.loads(path.read_text("utf-8"))
        told = told["base"] if crowded else told
        name, expected = str(told["name"]), str(told["weights_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is not what a run writes: {error!r}") from None
    found = weights_sha256(base)
    if found != expected:
        raise ExportError(
            f"{folder} belongs to {name!r}: expected its weights, of digest "
            f"{expected[:12]}, found those of {base.name!r}, {found[:12]}; give the "
            'base that it was trained on with ARGS="model.name=..."'
        )


# What a LoRA adapter may have that would be computed otherwise than by `model.add_adapters`.
BEYOND = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        kind, base = found["peft_type"], found["base_model_name_or_path"]
        sound = isinstance(base, str) and isinstance(found["target_modules"], list)
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = getattr(error, "strerror", None) or repr(error)
        raise ExportError(
            f"{folder}: expected a LoRA adapter (adapter_config.json, {ADAPTER}): {told}"
        ) from None
    more = [key for key in BEYOND if found.get(key)]
    if kind != "LORA" or not sound or more or found.get("bias", "none") != "none":
        raise ExportError(
            f"{folder}: expected a plain LoRA adapter with target_modules as a list, found "
            f"{kind} with {', '.join(more) or found.get('bias')}; merge it with PEFT first"
        )
    return found


def base_of(folder: Path) -> str:
    """The base model that an adapter, or a crowd, names."""
    if (folder / META).exists():
        return str(crowd_meta(folder)["base"]["name"])
    return str(_adapter_config(folder)["base_model_name_or_path"])


def with_adapter(base: nn.Module, of: Model, folder: Path) -> nn.Module:
    """`base`, loaded from `of`, with the adapter, or the crowd, in `folder`. Raises ExportError if
    it is none of this base. Only numbers are read: adapter_config.json could name modules to be
    imported."""
    _refuse_another_base(folder, of)
    if (folder / META).exists():
        return _with_crowd(base, folder)
    found = _adapter_config(folder)
    named = str(found["base_model_name_or_path"])
    if not (folder / BASE).exists() and Path(named).resolve().name != Path(of.name).resolve().name:
        raise ExportError(
            f"{folder} is an adapter of {named!r}, not of {of.name!r}; if these are the same "
            "weights, say so: set base_model_name_or_path in its adapter_config.json"
        )
    try:
        tuning = shape_of(found)
    except (ValueError, KeyError) as error:
        raise ExportError(f"{folder / 'adapter_config.json'}: not a LoRA shape: {error}") from None
    try:
        adapted = add_adapters(base, tuning)
        load_weights(adapted, folder)
    except (ModelError, CheckpointError) as error:
        raise ExportError(
            f"{folder} is not an adapter of this base (it names "
            f"{found['base_model_name_or_path']}): {error}"
        ) from None
    return adapted


def _with_crowd(base: nn.Module, folder: Path) -> nn.Module:
    told = crowd_meta(folder)
    settings = Crowd(num_agents=told["num_agents"], aggregator=told["aggregator"])
    try:
        crowd: Any = add_adapters(base, shape_of(told), settings)
        load_weights(crowd, folder)
    except ModelError as error:
        raise ExportError(f"{folder} is no crowd of this base: {error}") from None
    crowd.concentration = tuple(map(float, told["concentration"]))
    return crowd
