"""Counts a model's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sft.config.schema import SCHEMAS, AnyConfig, Config
from sft.models.layers import repeated_layers
from sft.tasks.registry import skeleton

# --- what is counted ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    parameters: int
    trained: int
    multiplied: int  # all but embeddings: each multiplies a token once
    largest: int  # of the trained ones, in one tensor
    layers: int  # repeated ones, which FSDP2 gathers one at a time
    outside: int  # of the parameters, those of no layer
    sizes: tuple[int, ...]  # of each parameter


def counts(config: AnyConfig) -> Counts:
    return _counted(_key(config), None)


@lru_cache(maxsize=64)
def _counted(key: Key, depth: int | None) -> Counts:
    built = skeleton(_config(key), depth)
    embedded = built.get_input_embeddings().weight  # type: ignore[operator]
    parameters = list(built.parameters())
    total = sum(p.numel() for p in parameters)
    head = built.get_output_embeddings().weight  # type: ignore[operator]
    looked_up = 0 if embedded is head else embedded.numel()
    trained = [p.numel() for p in parameters if p.requires_grad]
    layers = repeated_layers(built)
    outside = total - sum(p.numel() for layer in layers for p in layer.parameters())
    sizes = tuple(p.numel() for p in parameters)
    return Counts(total, sum(trained), total - looked_up, max(trained), len(layers), outside, sizes)


Key = tuple[str, str]  # a task, and a configuration of it in JSON
MODELLED = ("model", "tuning", "crowd", "distill")


def _key(config: AnyConfig, **train: Any) -> Key:
    """The sections that say what the model is, and these keys of `train`."""
    values: dict[str, Any] = {name: part for name, part in config if name in MODELLED}
    values |= {"train": {"output_dir": "none", **train}}
    if isinstance(config, Config):
        values |= {"data": {"train_path": "none"}}
    return config.task, type(config).model_validate(values).model_dump_json()


def _config(key: Key) -> AnyConfig:
    task, text = key
    return SCHEMAS[task].model_validate_json(text)
