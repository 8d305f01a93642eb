"""Save what a user loads, and load it back.

`save` writes a model or an adapter in the format of transformers or PEFT, with the tokenizer and
its chat template, so that what is served is what was trained (law 3).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.load import load_config, load_run
from sft.config.schema import AnyConfig, Config, Crowd, Model
from sft.errors import CheckpointError, ExportError, ModelError
from sft.models.adapters import add_adapters
from sft.models.digest import weights_sha256
from sft.models.export import BASE, load_weights, shape_of
from sft.models.load import load_base, load_tokenizer
from sft.runtime import checkpoint
from sft.tasks.crowd.agents import WEIGHTS as ADAPTER
from sft.tasks.crowd.agents import Agents
from sft.tasks.crowd.files import META, _take_concentration, _with_crowd, crowd_meta

ADAPTED = ("adapter_config.json", META)  # either says that a folder needs a base


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
