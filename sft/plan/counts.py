"""Counts a model's parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sft.config.schema import RunConfig
from sft.models import experts
from sft.models.layers import embedding_layers, repeated_layers
from sft.models.reach import reach
from sft.tasks.registry import task_of
from sft.train.parallel.trial import Shapes, trained_shapes


@dataclass(frozen=True)
class Counts:
    """The sizes of a model."""

    parameters: int
    trained: int  # trained parameters
    multiplied: int  # parameters that a token is multiplied by: no embeddings, no other experts
    largest: int  # elements of the largest trained tensor
    layers: int  # repeated layers, which FSDP2 gathers one at a time
    outside: int  # parameters that belong to no layer
    sizes: tuple[int, ...]  # elements of each tensor
    shapes: Shapes = field(default_factory=dict, compare=False)  # of the trained tensors


def count_parameters(config: RunConfig) -> Counts:
    return count_at_depth(model_key(config), None)


@lru_cache(maxsize=64)
def count_at_depth(key: ModelKey, depth: int | None) -> Counts:
    """Counts the model with `depth` layers; None: with all layers."""
    config = config_of_key(key)
    built = task_of(config).skeleton(config, depth)
    first, last = (getattr(layer, "weight", None) for layer in embedding_layers(built))
    sizes = tuple(p.numel() for p in built.parameters())
    trained = [p.numel() for p in built.parameters() if p.requires_grad]
    looked_up = 0 if first is None or first is last else first.numel()
    layers = repeated_layers(built)
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    return Counts(
        parameters=sum(sizes),
        trained=sum(trained),
        multiplied=sum(sizes) - looked_up - _idle(built),
        largest=max(trained),
        layers=len(layers),
        outside=sum(sizes) - in_layers,
        sizes=sizes,
        shapes=trained_shapes(built),
    )


def _idle(model: nn.Module) -> int:
    """Returns how many parameters are of experts that a token does not choose, on average."""
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if base is None or not experts.expert_parameters(base):
        return 0
    idle = {  # of each parameter
        name: max(0.0, 1 - product.per_token / math.prod(product.shape))
        for name, product in reach(base).products.items()
        if len(product.shape) == 3 and all(product.shape)
    }
    number = 0.0
    for name, parameter in base.named_parameters():
        number += idle.get(name.replace("base_layer.", ""), 0.0) * parameter.numel()
    for name, module in base.named_modules():
        if isinstance(module, experts.ExpertAdapter):
            own = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            parts = (*module.lora_A.parameters(), *module.lora_B.parameters())
            number += idle.get(own, 0.0) * sum(part.numel() for part in parts)
    return round(number)


ModelKey = tuple[type[RunConfig], str]  # a schema, and a configuration of it in JSON


def model_key(config: RunConfig, **train: Any) -> ModelKey:
    """Returns a cache key: the sections that define the model, and these keys of `train`."""
    task = task_of(config)
    values: dict[str, Any] = {name: getattr(config, name) for name in task.model_sections}
    train |= {"output_dir": "none", "groups": config.train.groups}
    values |= {"train": train, **task.placeholders}
    return type(config), type(config).model_validate(values).model_dump_json()


def config_of_key(key: ModelKey) -> RunConfig:
    schema, text = key
    return schema.model_validate_json(text)
