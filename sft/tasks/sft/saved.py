"""Fine-tuned models on disk: loads them and refuses adapters of another base or configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.adapters import (
    ADAPTER_CONFIG,
    adapter_tuning,
    check_files,
    describe_fault,
    shape_values,
)
from sft.config.schema import Config, Model, Tuning
from sft.errors import CheckpointError, ExportError, ModelError
from sft.models import load, pretrained, vocabulary
from sft.models.adapt import (
    add_adapters,
    served_tuning,
    store_like_base,
    tuning_of,
)
from sft.models.digests import weights_sha256
from sft.models.export import ADAPTER, BASE, load_weights, refuse_unknown
from sft.models.fake import is_fake
from sft.runtime import plain
from sft.tasks.base import Task


@dataclass(frozen=True)
class BaseRecord:
    """The base that an adapter was trained on, as its folder records it."""

    path: Path
    name: str
    weights_sha256: str


def read_base_record(path: Path, key: str | None = None) -> BaseRecord | None:
    """Returns the record in a file, or under its `key`; None if there is no file.

    Raises ExportError if the file is damaged.
    """
    if not path.exists():  # the adapter is not from a run, or the run is an old one
        return None
    try:
        found = plain.load_json(path, follow=True)
        found = found[key] if key else found
        return BaseRecord(path, str(found["name"]), str(found["weights_sha256"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    saved, given = shape_values(read_tuning(folder)), shape_values(tuning_of(adapted))
    differences = [
        f"tuning.{key}: trained with {trained}, found {given[key]}"
        for key, trained in saved.items()
        if trained != given[key]
    ]
    if differences:
        raise ExportError(
            f"{folder}: the configuration is not that of its adapter_config.json; remove the "
            "override, or what was changed in config.yaml\n  " + "\n  ".join(differences)
        )


def read_tuning(folder: Path) -> Tuning:
    """Returns the settings of the adapter in `folder`. Raises ExportError if it has none."""
    return _tuning_in(folder, read_adapter_config(folder))


def _tuning_in(folder: Path, found: dict[str, Any]) -> Tuning:
    try:
        return adapter_tuning(found)
    except (ValueError, KeyError, TypeError) as error:
        reason = describe_fault(error)
    raise ExportError(f"{folder / ADAPTER_CONFIG}: not a LoRA shape: {reason}")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json. Raises ExportError if it is not that of a LoRA adapter."""
    try:
        found = plain.load_json(folder / ADAPTER_CONFIG, follow=True)
        check_files(folder, found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None)
        reason = reason or (str(error) if type(error) is ValueError else repr(error))
        raise ExportError(
            f"{folder}: expected a LoRA adapter ({ADAPTER_CONFIG}, {ADAPTER}): {reason}"
        ) from None
    _tuning_in(folder, found)
    return found


def _refuse_another_name(folder: Path, name: str) -> None:
    """Raises ExportError if an adapter without a record of its base names another one."""
    named = str(read_adapter_config(folder)["base_model_name_or_path"])
    if not (folder / BASE).exists() and Path(named).resolve().name != Path(name).resolve().name:
        raise ExportError(
            f"{folder} is an adapter of {named!r}, not of {name!r}; if these are the same "
            "weights, say so: set base_model_name_or_path in its adapter_config.json"
        )


class SavedTuning(Task):
    """The part of fine-tuning that reads finished runs, and adapters that have no run."""

    @classmethod
    def adapt(cls, base: nn.Module, config: Config) -> nn.Module:
        """Returns the frozen `base` with the adapters that are trained."""
        adapted = add_adapters(base, vocabulary.trained_tokens(base, config.tuning))
        if config.model.adapter and not is_fake(base):
            folder = Path(config.model.adapter)
            refuse_another_base(config.model, cls.recorded_base(folder))
            _refuse_another_name(folder, config.model.name)
            refuse_another_shape(folder, adapted)
            refuse_unknown(adapted, folder)
            load_weights(adapted, folder)
        return adapted

    @classmethod
    def load_model(
        cls, folder: Path, config: Config, precision: str, device: torch.device
    ) -> nn.Module:
        return cls.load_saved(folder, config, precision, device)[0]

    @classmethod
    def load_saved(
        cls,
        folder: Path,
        config: Config,
        precision: str,
        device: torch.device,
        *,
        quantised: bool = True,
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """Returns the trained model in a checkpoint `folder`, and its tokenizer.

        A QLoRA adapter gets its 4-bit base, or with `quantised=False` the original weights. Raises
        ExportError for another base or adapter.
        """
        own = {"name": str(folder), "revision": None, "init": "pretrained", "new_tokens": None}
        model_files = config.model.model_copy(update=own)
        tokenizer = pretrained.load_tokenizer(model_files)
        mode = config.tuning.mode
        if mode == "full":
            return load.load_base(model_files, mode, precision, device).eval(), tokenizer
        refuse_another_base(config.model, cls.recorded_base(folder))
        mode, kind = mode if quantised else "lora", config.tuning.four_bits
        base = load.load_base(config.model, mode, precision, device, quantization=kind)
        # PEFT would follow adapter_config.json, which can name modules to import.
        base_model = config.model.model_copy(update={"adapter": None})  # which is in `folder`
        changes = {"model": base_model, "tuning": served_tuning(config.tuning)}
        served = config.model_copy(update=changes)
        adapted = cls.adapt(base, served)
        cls.load_adapter(adapted, folder, config)
        return adapted.eval(), tokenizer

    @classmethod
    def load_adapter(cls, adapted: nn.Module, folder: Path, config: Config) -> None:
        """Loads the adapter in `folder` into the adapted model of `config`."""
        refuse_another_shape(folder, adapted)
        load_weights(adapted, folder)
        store_like_base(adapted)

    # -- an adapter without its run

    @classmethod
    def is_adapter(cls, folder: Path) -> bool:
        """Returns whether `folder` holds adapters that this task trains."""
        return (folder / ADAPTER_CONFIG).exists()

    @classmethod
    def adapter_files(cls, folder: Path) -> list[Path]:
        """Returns the files of an adapter that its answers depend on."""
        return sorted(folder / name for name in (ADAPTER, ADAPTER_CONFIG))

    @classmethod
    def recorded_base(cls, folder: Path) -> BaseRecord | None:
        """Returns the base that an adapter's folder records; None if there is no record."""
        return read_base_record(folder / BASE)

    @classmethod
    def base_name(cls, folder: Path) -> str:
        """Returns the base model that an adapter names."""
        return str(read_adapter_config(folder)["base_model_name_or_path"])

    @classmethod
    def with_adapter(cls, base: nn.Module, name: str, folder: Path) -> nn.Module:
        """Returns `base`, which was loaded from `name`, with the adapter in `folder`.

        Raises ExportError if the adapter belongs to another base. Only numbers are read:
        adapter_config.json could name modules to import.
        """
        found = read_adapter_config(folder)
        _refuse_another_name(folder, name)
        tuning = _tuning_in(folder, found)
        try:
            vocabulary.fit_vocabulary(base, max(tuning.lora.trained_ids, default=-1) + 1)
            adapted = add_adapters(base, tuning)
            vars(adapted).pop("first_adapter", None)  # PEFT has put it into this base, too
            refuse_unknown(adapted, folder)
            load_weights(adapted, folder)
            store_like_base(adapted)
        except (ModelError, CheckpointError) as error:
            raise ExportError(
                f"{folder} is not an adapter of this base (it names "
                f"{found['base_model_name_or_path']}): {error}"
            ) from None
        return adapted

    @classmethod
    def refuse_merge(cls, config: Config, run: Path) -> None:
        """Raises MergeError if `config` selects more than a single model."""

    @classmethod
    def selection(cls, config: Config) -> dict[str, Any]:
        """Returns what `config` selects of a run's model, to be recorded."""
        return {}

    @classmethod
    def recorded_overrides(cls, record: Mapping[str, Any]) -> list[str]:
        """Returns the overrides that repeat a `selection` that was recorded."""
        return []

    @classmethod
    def describe_selection(cls, config: Config) -> str:
        """Returns the `selection` as text, for a model card."""
        return ""

    @classmethod
    def overrides_for(cls, folder: Path) -> list[str] | None:
        """Returns overrides that select what is in `folder`; None if that is no part of a model."""
        return None
