"""Adapters on disk: whether they belong to a base and to a configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sft.config.schema import Model
from sft.errors import CheckpointError, ExportError, ModelError
from sft.models.adapters import add_adapters
from sft.models.digest import weights_sha256
from sft.models.export import ADAPTER, BASE, adapter_tuning, load_weights

ADAPTER_CONFIG = "adapter_config.json"
# What a LoRA adapter may have that `models.adapters.add_adapters` would compute otherwise.
BEYOND = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter's folder says about the base that it was trained on."""

    path: Path
    name: str
    weights_sha256: str


def read_base_record(path: Path, key: str | None = None) -> BaseRecord | None:
    """Reads a record, which `key` holds in its file, if given; None if there is no file.

    Raises ExportError for a damaged one.
    """
    if not path.exists():  # not of a run, or of one before this file was written
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        found = found[key] if key else found
        return BaseRecord(path, str(found["name"]), str(found["weights_sha256"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is not what a run writes: {error!r}") from None


def refuse_another_base(base: Model, record: BaseRecord | None) -> None:
    """Raises ExportError if the weights of `base` are not those that were recorded."""
    if record is None:
        return
    found = weights_sha256(base)
    if found != record.weights_sha256:
        raise ExportError(
            f"{record.path.parent} belongs to {record.name!r}: expected its weights, of digest "
            f"{record.weights_sha256[:12]}, found those of {base.name!r}, {found[:12]}; give the "
            'base that it was trained on with ARGS="model.name=..."'
        )


def refuse_another_shape(folder: Path, adapted: Any) -> None:
    """Raises ExportError if the shape of the configured adapter is not the saved one.

    The tensors alone show neither lora_alpha nor modules that are left out.
    """
    saved, given = read_adapter_config(folder), adapted.peft_config["default"]
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


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json. Raises ExportError if it is not that of a plain LoRA adapter."""
    path = folder / ADAPTER_CONFIG
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


def with_adapter(base: nn.Module, name: str, folder: Path) -> nn.Module:
    """Returns `base`, loaded from `name`, with the plain LoRA adapter in `folder`."""
    found = read_adapter_config(folder)
    named = str(found["base_model_name_or_path"])
    if not (folder / BASE).exists() and Path(named).resolve().name != Path(name).resolve().name:
        raise ExportError(
            f"{folder} is an adapter of {named!r}, not of {name!r}; if these are the same "
            "weights, say so: set base_model_name_or_path in its adapter_config.json"
        )
    try:
        tuning = adapter_tuning(found)
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
