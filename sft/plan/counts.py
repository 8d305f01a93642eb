"""Counts a model's parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sft.config.schema import RunConfig
from sft.models import experts, offload
from sft.models.dtypes import DTYPES
from sft.models.fake import fake_tensors
from sft.models.layers import embedding_layers, repeated_layers
from sft.models.reach import reach
from sft.models.rounded import find_casts
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


@dataclass(frozen=True)
class CastCounts:
    """The elements of fp32 weights that autocast casts (`models/rounded`)."""

    outside: int = 0  # of those that FSDP2 gathers in 16 bits, in no layer
    inside: int = 0  # the same, in all layers
    others: int | None = None  # of those that are gathered in fp32; None: unknown


def count_casts(config: RunConfig, precision: str) -> CastCounts:
    """Counts what FSDP2 gathers in 16 bits, which are weights of a full fine-tuning only."""
    is_full = task_of(config).info(config).mode == "full"
    train = config.train
    if precision == "fp32" or train.is_bf16_pure or train.fp8 or not is_full:
        return CastCounts()
    return _count_casts(model_key(config), precision)


@lru_cache(maxsize=64)
def _count_casts(key: ModelKey, precision: str) -> CastCounts:
    """Counts in a model of few layers; each further one has as many as these on average."""
    config, cpu = config_of_key(key), torch.device("cpu")
    found = depths(key)
    depth = found and found[0]
    with fake_tensors():
        model = task_of(config).build_model(config, precision, cpu, weights=False, depth=depth)
    casts = find_casts(model, DTYPES[precision], cpu.type)
    if not casts.rounded:
        return CastCounts()
    inner = {id(p) for layer in repeated_layers(model) for p in layer.parameters()}
    sizes = {name: (p.numel(), id(p) in inner) for name, p in model.named_parameters()}

    def count(names: frozenset[str], inside: bool) -> int:
        """Counts elements in the layers or outside of them, in the model with all layers."""
        number = sum(sizes[name][0] for name in names if sizes[name][1] == inside)
        return number * found[2] // found[0] if found and inside else number

    others = sum(count(casts.others, inside) for inside in (False, True))
    return CastCounts(count(casts.rounded, False), count(casts.rounded, True), others)


def depths(key: ModelKey) -> tuple[int, int, int] | None:
    """Returns three depths (few, more, all), between which every layer adds the same memory.

    None if layers do not repeat, or if there are so few that shorter traces save no time.
    """
    config = config_of_key(key)
    info = task_of(config).info(config)
    sizes = info.sizes
    whole, kinds = sizes.num_hidden_layers, getattr(sizes, "layer_types", None) or ["same"]
    period = next(
        n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
    few = period * math.ceil(2 / period) + whole % period
    if config.train.activation_offload is True:  # as many storages as are on their way at once
        few += period * math.ceil(offload.AHEAD / period)
    more = few + period
    if info.deepest_layer >= whole:  # the task refuses it
        return None
    if info.small or not info.repeats or few + more >= whole:
        return None
    key = model_key(config)
    numbers = [count_at_depth(key, depth).parameters for depth in (few, more, whole)]
    repeats = numbers[2] - numbers[0] == (whole - few) // period * (numbers[1] - numbers[0])
    return (few, more, whole) if repeats else None


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
