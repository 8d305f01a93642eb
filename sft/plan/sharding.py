"""What of a step's memory a rank keeps when processes share the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sft.config.schema import RunConfig
from sft.models.dtypes import DTYPES
from sft.plan.counts import counts
from sft.tasks.registry import task_of

# --- what memory is taken ----------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The processes that share the work of a step."""

    world_size: int = 1
    engine: str = "ddp"
    accumulates: bool = False  # several micro-batches on each
    zero: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's zero_optimization


ALONE = Group()


# What a file of DeepSpeed's does not say (deepspeed/runtime/zero/config.py, 0.19.8), and what
# Accelerate makes of "auto" (accelerator.py: _prepare_deepspeed); in elements, of the hidden size.
ZERO_SIZES: dict[str, tuple[float, Callable[[int], float]]] = {
    "reduce_bucket_size": (5e8, lambda hidden: hidden**2),
    "stage3_prefetch_bucket_size": (5e7, lambda hidden: 0.9 * hidden**2),
    "stage3_param_persistence_threshold": (1e5, lambda hidden: 10 * hidden),
    "stage3_max_live_parameters": (1e9, lambda _: 1e9),
}


def _zero_size(config: RunConfig, group: Group, key: str) -> int:
    default, automatic = ZERO_SIZES[key]
    told = group.zero.get(key, default)
    if told == "auto":
        told = automatic(task_of(config).info(config).text.hidden_size)
    return int(told)


def _shared(
    name: str, parts: dict[str, int], config: RunConfig, precision: str, group: Group
) -> dict[str, int]:
    """The parts of a phase on one of the processes, those in host memory among them.

    DDP: gradients lie in its buckets; those of all but the last micro-batch are summed beside them.

    ZeRO-1 and 2 (deepspeed/runtime/zero/stage_1_and_2.py, 0.19.8): the rank's share of Adam's state
    and of a copy of the trained weights. Of earlier micro-batches ZeRO-1 keeps all gradients,
    ZeRO-2 the share. Buckets are made by the first gradient of a backward pass, whole, however
    little is trained; when the first is full it is copied, and from then on the share is kept.
    ZeRO-1 holds the buckets beside the logits, too, where it accumulates. An optimizer on the host
    has three more shares there, for gradients and weights on their way, and a gradient's room on
    either side. An upper bound.
    """
    if group.engine == "deepspeed" and group.zero["stage"] == 3:
        return _gathered_ahead(name, parts, config, group)
    if group.engine == "deepspeed":
        return _sliced(name, parts, config, group)
    if group.world_size == 1:
        return parts
    if group.engine == "fsdp":
        return _gathered_by_layer(name, parts, config, precision, group)
    trained = 4 * counts(config).trained
    return parts | ({"communication": trained} if group.accumulates else {})


def _of_rank(
    name: str, parts: dict[str, int], config: RunConfig, precision: str, group: Group, on_gpu: bool
) -> dict[str, int]:
    """The parts of a phase in the memory of one process's device: for a GPU without what lies in
    host memory between uses."""
    hosted = _hosted(config, group) if on_gpu else ()
    shared = _shared(name, parts, config, precision, group)
    return {label: size for label, size in shared.items() if size and label not in hosted}


def _hosted(config: RunConfig, group: Group) -> tuple[str, ...]:
    if config.train.offload:
        return ("weights", "adapters", "gradients", "optimizer")
    return ("gradients", "optimizer") if _offloads(group) else ()


def _offloads(group: Group) -> bool:
    return (group.zero.get("offload_optimizer") or {}).get("device") == "cpu"


def _sliced(name: str, parts: dict[str, int], config: RunConfig, group: Group) -> dict[str, int]:
    """ZeRO-1 and 2."""
    counted, offloads = counts(config), _offloads(group)
    trained, largest = 4 * counted.trained, 4 * counted.largest
    share = math.ceil(trained / group.world_size)
    bucket = 4 * _zero_size(config, group, "reduce_bucket_size")
    buckets = bucket * (2 if group.zero.get("overlap_comm") else 1)
    of_all = group.zero["stage"] == 1
    kept = (trained if of_all else share) if group.accumulates else 0
    kept, room = (3 * share + largest, largest) if offloads else (kept, 0)
    adam = math.ceil(parts["optimizer"] / group.world_size)
    parts = parts | {"gradients": kept, "optimizer": adam + share, "communication": room}
    if name.startswith("update"):
        return parts | {"gradients": kept + 2 * share if offloads else 2 * share}
    if not name.startswith("backward"):
        return parts | ({"communication": buckets} if of_all and group.accumulates else {})
    full = min(bucket, trained)
    left = round(parts.get("activations", 0) * (1 - full / trained))
    copied = full if offloads else max(full, share)
    first = parts | {"communication": room + buckets + largest}
    flushed = parts | {"activations": left, "communication": room + buckets + copied}
    return max(first, flushed, key=lambda each: sum(each.values()))


def _split(parts: dict[str, int], group: Group) -> dict[str, int]:
    """The rank's share of what FSDP2 and ZeRO-3 split, beside the rest."""
    split = ("weights", "adapters", "optimizer")
    return parts | {k: math.ceil(parts[k] / group.world_size) for k in split if k in parts}


def _gathered_by_layer(
    name: str, parts: dict[str, int], config: RunConfig, precision: str, group: Group
) -> dict[str, int]:
    """FSDP2 (torch 2.13).

    Gathered are, from the first layer to the end of the backward pass, what is outside of layers;
    of the layers the one at work, and the buffer in which the next one arrives, in the backward
    pass with gloo's copy of it. Gradients of the head stay whole from the loss to the end; those of
    a layer lie in the buffer from which they are exchanged until the next one's are whole, by when
    that layer's activations are gone.
    """
    counted, full = counts(config), task_of(config).info(config).mode == "full"
    whole = parts["weights"] + parts.get("adapters", 0)
    outside = counted.outside * (4 if full else DTYPES[precision].itemsize)
    layers = max(1, counted.layers)
    layer = (whole - outside) // layers
    of_outside = 4 * counted.outside if full else 0
    of_head = max(0, of_outside - 4 * (counted.parameters - counted.multiplied))
    of_layer = (4 * counted.trained - of_outside) // layers
    share = math.ceil(4 * counted.trained / group.world_size)
    gathered, kept = outside, share if group.accumulates else 0
    if name.startswith("forward"):
        gathered += 2 * layer
    elif "embedding" in name:
        gathered, kept = gathered + 2 * of_outside, share
    elif name.startswith("backward"):
        gathered += of_head + 3 * layer
        gathered, kept = gathered + max(0, of_layer - parts.get("activations", 0) // layers), share
    elif name.startswith("update"):
        gathered, kept = 0, share
    return _split(parts, group) | {"gradients": kept, "communication": gathered}


def _gathered_ahead(
    name: str, parts: dict[str, int], config: RunConfig, group: Group
) -> dict[str, int]:
    """ZeRO-3 (deepspeed/runtime/zero/stage3.py, 0.19.8).

    Small parameters stay whole. What is gathered stays, up to `stage3_max_live_parameters`, as long
    as it is used again within `stage3_max_reuse_distance`; in the forward pass beside the buffer in
    which it arrives. Gradients go through a bucket that is always there; a full one is copied, by
    gloo once more. Of its share of trained weights the rank has a copy. An optimizer on the host
    has the gradients there, too.
    """
    counted = counts(config)
    whole = parts["weights"] + parts.get("adapters", 0)
    threshold = _zero_size(config, group, "stage3_param_persistence_threshold")
    small = sum(size for size in counted.sizes if size <= threshold) / counted.parameters

    def of_others(key: str) -> int:
        return round(whole * min(1 - small, _zero_size(config, group, key) / counted.parameters))

    trained, largest = 4 * counted.trained, 4 * counted.largest
    bucket = 4 * _zero_size(config, group, "reduce_bucket_size")
    at_work = of_others("stage3_max_live_parameters")
    if name.startswith("forward"):
        at_work += of_others("stage3_prefetch_bucket_size")
    elif "embedding" in name:
        at_work = 2 * min(bucket, trained)
    elif name.startswith("backward"):
        at_work += largest + (2 * bucket if bucket < trained else 0)
    elif name.startswith("update"):
        at_work = 2 * largest
    result = _split(parts, group)
    share = math.ceil(trained / group.world_size)
    return result | {
        "optimizer": result["optimizer"] + share,
        "gradients": share * (2 if _offloads(group) else 1),
        "communication": round(whole * small) + bucket + at_work,
    }
