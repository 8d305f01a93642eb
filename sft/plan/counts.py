"""Counts a model's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sft.config.schema import RunConfig
from sft.models.layers import embedding_layers, repeated_layers
from sft.tasks.registry import task_of

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


def counts(config: RunConfig) -> Counts:
    return _counted(_key(config), None)


@lru_cache(maxsize=64)
def _counted(key: Key, depth: int | None) -> Counts:
    config = _config(key)
    built = task_of(config).skeleton(config, depth)
    first, last = (getattr(layer, "weight", None) for layer in embedding_layers(built))
    parameters = list(built.parameters())
    total = sum(p.numel() for p in parameters)
    looked_up = 0 if first is None or first is last else first.numel()
    trained = [p.numel() for p in parameters if p.requires_grad]
    layers = repeated_layers(built)
    outside = total - sum(p.numel() for layer in layers for p in layer.parameters())
    sizes = tuple(p.numel() for p in parameters)
    return Counts(total, sum(trained), total - looked_up, max(trained), len(layers), outside, sizes)


Key = tuple[type[RunConfig], str]  # a schema, and a configuration of it in JSON


def _key(config: RunConfig, **train: Any) -> Key:
    """The sections that say what the model is, and these keys of `train`."""
    task = task_of(config)
    values: dict[str, Any] = {name: getattr(config, name) for name in task.modelled}
    values |= {"train": {"output_dir": "none", **train}, **task.placeholders}
    return type(config), type(config).model_validate(values).model_dump_json()


def _config(key: Key) -> RunConfig:
    schema, text = key
    return schema.model_validate_json(text)
