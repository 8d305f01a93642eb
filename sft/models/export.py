"""Saves the model or adapter that a user loads, and reads it back."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, KeysView
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import (
    FEATURE_EXTRACTOR_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

from sft.config.adapters import ADAPTER
from sft.config.schema import Model
from sft.errors import CheckpointError
from sft.models.adapt import NAME, aliases, extend_with_first, saved_names, without_first
from sft.models.converted import read_converted
from sft.models.digests import weights_sha256
from sft.models.fake import set_attributes
from sft.models.layers import persistent_buffers
from sft.models.pretrained import absolute_name, sub_configs
from sft.models.shards import MAX_SHARD_SIZE, save_whole
from sft.models.weights import Weights
from sft.runtime.checkpoint import open_tensors
from sft.runtime.tensor_file import TensorFile, write_tensors

BASE = "base.json"  # beside an adapter: the base that it was trained on
# How a vision-language or audio model reads its media; training on text leaves it as it is.
PROCESSORS = sorted(
    {FEATURE_EXTRACTOR_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME}
)


def base_record(base: Model) -> dict[str, str]:
    """Returns what identifies the base of an adapter: hub id or absolute folder, and weights."""
    return {"name": absolute_name(base.name), "weights_sha256": weights_sha256(base)}


def save(
    model: nn.Module,
    tokenizer: Tokenizer,
    folder: Path,
    weights: Weights | None = None,
    base: Model | None = None,
    origin: Model | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> list[TensorFile]:
    """Writes the model, or its adapter, and the tokenizer into `folder` (safetensors).

    Collective if `weights`, those to save, are split over ranks (FSDP2, ZeRO-3). Returns the files
    of tensors that this rank has written, but those of a quantised model, which are complete.
    `base`: the base of an adapter; it is recorded, and another base is refused at loading.
    `origin`: the base of a whole model; the files of its processor are copied.
    """
    files = _save_model(model, folder, weights or Weights(_own(model)), max_shard_size)
    if weights and not weights.is_main:
        return files
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, a form that nobody has filled in
    tokenizer.save_pretrained(str(folder))
    if base is not None:
        (folder / BASE).write_text(json.dumps(base_record(base), indent=2) + "\n", "utf-8")
    for name in PROCESSORS if origin else ():
        _copy_processor(origin, name, folder)  # type: ignore[arg-type]
    config = folder / "config.json"
    if config.exists():  # training turns the cache off; inference needs it
        values = json.loads(config.read_text("utf-8"))
        for part in sub_configs(values):
            if part is values or "use_cache" in part:
                part["use_cache"] = True
        config.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    return files


def _copy_processor(origin: Model, name: str, folder: Path) -> None:
    """Copies a file of the base's processor, if it has one, as it is."""
    given: Any = {"revision": origin.revision} if origin.revision else {}
    found = cached_file(
        origin.name,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **given,
    )
    if found and not (folder / name).exists():
        (folder / name).write_bytes(Path(found).read_bytes())


def _own(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights and persistent buffers of a model."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(persistent_buffers(model))


def _save_model(model: Any, folder: Path, source: Weights, max_shard_size: str) -> list[TensorFile]:
    """Writes the model, or its adapter as it fits the base that others have."""
    if not hasattr(model, "peft_config") or not hasattr(model, "base_model"):  # Agents have no base
        if getattr(model, "hf_quantizer", None) is None:
            return save_whole(model, folder, source, max_shard_size)
        model.save_pretrained(str(folder), state_dict=source.all())  # it knows its own format
        return []
    weights = source.all()
    if not source.is_main:
        return []
    weights |= {name: weights[first] for name, first in aliases(model).items() if first in weights}
    if hasattr(model, "first_adapter"):
        weights = extend_with_first(model, weights)
    with _tensor_files_of(peft.peft_model, source.behind) as files:
        # PEFT would look for the base on the hub to find out whether its vocabulary has grown.
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    if hasattr(model, "served_tuning"):
        config, served = copy.copy(model.peft_config[NAME]), model.served_tuning
        config.r, config.lora_alpha, config.inference_mode = served.r, served.lora_alpha, True
        for key in ("init_lora_weights", "rank_pattern", "alpha_pattern"):
            setattr(config, key, getattr(served.lora, key))
        config.save_pretrained(str(folder))
    return files


@contextmanager
def _tensor_files_of(library: Any, behind: bool) -> Iterator[list[TensorFile]]:
    """Makes a module of a library write each of its safetensors files as one of ours."""
    files: list[TensorFile] = []

    def save(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str]) -> None:
        files.append(write_tensors(Path(path), tensors, metadata, behind))

    with set_attributes(library, safe_save_file=save):
        yield files


def read_weights(model: nn.Module, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name in `model`, weight) for the weights that `save` wrote.

    Raises CheckpointError if a trained one is missing or any has another shape.
    """
    known = dict(model.named_parameters())
    missing = {name for name, p in known.items() if p.requires_grad}
    names = {name: name for name in known}
    if (folder / ADAPTER).exists():
        names = {saved: name for saved, name in saved_names(model).items() if name in known}
    for saved, tensor in _read_files(model, folder, names.keys()):
        name = names[saved]
        value = without_first(model, name, tensor)
        shape = getattr(known[name], "ds_shape", known[name].shape)  # ZeRO-3's are split
        if value.shape != shape:
            raise CheckpointError(
                f"{folder} does not fit the model: {saved} is {list(value.shape)}, expected "
                f"{list(shape)}"
            )
        missing.discard(name)
        yield name, value
    if missing:
        raise CheckpointError(f"{folder} does not fit the model: it lacks {min(missing)}")


def refuse_unknown(model: Any, folder: Path) -> None:
    """Raises CheckpointError if an adapter's file holds weights that `model` has no place for.

    PEFT also saves copies of embeddings, which have to be those of the base.
    """
    known, names = {*saved_names(model)}, dict(model.get_base_model().named_parameters())
    with open_tensors(folder / ADAPTER) as file:
        for saved in sorted(set(file.keys()) - known):
            plain = saved.removeprefix("base_model.model.")
            own = names.get(plain, names.get(plain.replace(".base_layer", "")))
            value = file.get_tensor(saved)
            if own is None or own.shape != value.shape or not torch.equal(own, value.to(own)):
                raise CheckpointError(
                    f"{folder} does not fit the model: it holds {saved}, "
                    + ("for which there is no place" if own is None else "unlike that of the base")
                )


def _read_files(
    model: nn.Module, folder: Path, names: KeysView[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of these names, also those that transformers has to convert."""
    files = sorted(folder.glob("*model*.safetensors"))
    for path in files:
        with open_tensors(path) as file:
            for name in names & set(file.keys()):
                yield name, file.get_tensor(name)
    if not (folder / ADAPTER).exists():
        yield from (item for item in read_converted(model, files, names) if item[0] in names)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts the weights that `save` wrote into `model`."""
    put_weights(model, read_weights(model, folder))


def put_weights(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies weights into the parameters of these names."""
    parameters = dict(model.named_parameters())
    for name, value in weights:
        parameters[name].data.copy_(value)
