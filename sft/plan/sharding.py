"""Computes a rank's part of a step's memory when processes share the model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sft.config.schema import RunConfig
from sft.models.dtypes import DTYPES
from sft.plan.allocator import CachingAllocator, Chunk
from sft.plan.counts import count_casts, count_parameters
from sft.plan.trace import WEIGHT_COPIES
from sft.tasks.registry import task_of
from sft.train.parallel.trial import saved_state_bytes, update_gather_bytes


@dataclass(frozen=True)
class Group:
    """The processes that share the work of a step."""

    world_size: int = 1
    engine: str = "ddp"
    accumulates: bool = False  # several micro-batches per step on each process
    zero: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's zero_optimization
    within: int | None = None  # processes that FSDP2 splits weights over; None: all

    @property
    def num_shards(self) -> int:
        return self.within or self.world_size

    @property
    def offloads(self) -> bool:
        """Returns whether DeepSpeed keeps the optimizer in host memory."""
        return (self.zero.get("offload_optimizer") or {}).get("device") == "cpu"


ONE_PROCESS = Group()


def copy_bytes(config: RunConfig, group: Group, here: int) -> int:
    """Returns what copies of a checkpoint take in a machine's RAM, for each of `here` processes.

    Every process copies its part of what is split, and the main process the rest. It is 0 without
    `train.checkpoint_async`.
    """
    train = config.train
    if not train.checkpoint_async:
        return 0
    counted, stage = count_parameters(config), group.zero.get("stage", 0)
    state, weights = saved_state_bytes(train, counted.shapes), train.trained_bytes * counted.trained
    splits = group.engine == "fsdp" or stage == 3
    splits_weights = splits and task_of(config).info(config).mode == "full"
    shards = group.num_shards if splits or stage else 1
    of_state = min(here, shards) / shards / here
    return math.ceil(state * of_state + weights / (group.world_size if splits_weights else here))


# Defaults of DeepSpeed (deepspeed/runtime/zero/config.py, 0.19.8), and what Accelerate
# computes for "auto" from the hidden size (accelerator.py: _prepare_deepspeed); both in elements.
ZERO_SIZES: dict[str, tuple[float, Callable[[int], float]]] = {
    "reduce_bucket_size": (5e8, lambda hidden: hidden**2),
    "stage3_prefetch_bucket_size": (5e7, lambda hidden: 0.9 * hidden**2),
    "stage3_param_persistence_threshold": (1e5, lambda hidden: 10 * hidden),
    "stage3_max_live_parameters": (1e9, lambda _: 1e9),
    "stage3_max_reuse_distance": (1e9, lambda _: 1e9),
}


def _zero_size(config: RunConfig, group: Group, key: str) -> int:
    default, automatic = ZERO_SIZES[key]
    value = group.zero.get(key, default)
    if value == "auto":
        value = automatic(task_of(config).info(config).sizes.hidden_size)
    return int(value)


def parts_on_rank(
    phase: str, parts: dict[str, int], config: RunConfig, precision: str, group: Group, on_gpu: bool
) -> dict[str, int]:
    """Returns the bytes that each part of a phase takes on the device of one process.

    `parts` has the bytes that they take if one process does all the work. On a GPU, state that is
    kept in host memory between uses does not count.
    """
    if group.engine == "deepspeed":
        apply_zero = _zero3 if group.zero["stage"] == 3 else _zero12
        parts = apply_zero(phase, parts, config, group)
    elif group.engine == "fsdp" and group.world_size > 1:
        parts = _fsdp2(phase, parts, config, precision, group)
    elif group.world_size > 1 and group.accumulates:
        # DDP keeps gradients in its buckets, and separately their sum over earlier micro-batches.
        width = config.train.trained_bytes
        parts = parts | {"communication": width * count_parameters(config).trained}
    hosted: tuple[str, ...] = ()
    if on_gpu and config.train.offload:
        hosted = ("weights", "adapters", "optimizer")
        share = config.train.trained_bytes * count_parameters(config).trained / group.num_shards
        if parts.get("gradients", 0) <= math.ceil(share):  # else they are whole, until summed
            hosted = (*hosted, "gradients")
    elif on_gpu and group.offloads:
        hosted = ("gradients", "optimizer")
    elif on_gpu and config.train.optimizer.startswith("paged"):  # moves there if memory is short
        hosted = ("optimizer",)
    return {label: size for label, size in parts.items() if size and label not in hosted}


def _zero12(phase: str, parts: dict[str, int], config: RunConfig, group: Group) -> dict[str, int]:
    """Returns the parts with ZeRO-1 or 2 (deepspeed/runtime/zero/stage_1_and_2.py, 0.19.8).

    The result is an upper bound. A rank has its share of Adam's state and of a copy of the trained
    weights. From earlier micro-batches ZeRO-1 keeps all gradients, and ZeRO-2 its share of them.
    The first gradient of a backward pass allocates the buckets in full size, even if little is
    trained. When the first bucket is full it is copied, and from then on the rank keeps its share
    of the gradients. With accumulation, ZeRO-1 has buckets and logits at the same time. If the
    optimizer is on the host, three more shares are there, for gradients and weights in transit.
    The largest gradient then has space on the host and on the device.
    """
    counted, offloads = count_parameters(config), group.offloads
    trained, largest = 4 * counted.trained, 4 * counted.largest
    share = math.ceil(trained / group.world_size)
    bucket = 4 * _zero_size(config, group, "reduce_bucket_size")
    buckets = bucket * (2 if group.zero.get("overlap_comm") else 1)
    is_zero1 = group.zero["stage"] == 1
    kept = (trained if is_zero1 else share) if group.accumulates else 0
    kept, transit = (3 * share + largest, largest) if offloads else (kept, 0)
    adam = math.ceil(parts.get("optimizer", 0) / group.world_size)
    parts = parts | {"gradients": kept, "optimizer": adam + share, "communication": transit}
    if phase.startswith("update"):
        return parts | {"gradients": kept + 2 * share if offloads else 2 * share}
    if not phase.startswith("backward"):
        return parts | ({"communication": buckets} if is_zero1 and group.accumulates else {})
    filled = min(bucket, trained)
    activations = round(parts.get("activations", 0) * (1 - filled / trained))
    copied = filled if offloads else max(filled, share)
    first = parts | {"communication": transit + buckets + largest}
    flushed = parts | {"activations": activations, "communication": transit + buckets + copied}
    return max(first, flushed, key=lambda each: sum(each.values()))


def _split(parts: dict[str, int], group: Group) -> dict[str, int]:
    """Returns the parts, with the rank's share of those that FSDP2 and ZeRO-3 split."""
    split = ("weights", "adapters", "optimizer")
    return parts | {k: math.ceil(parts[k] / group.num_shards) for k in split if k in parts}


def _fsdp2(
    phase: str, parts: dict[str, int], config: RunConfig, precision: str, group: Group
) -> dict[str, int]:
    """Returns the parts with FSDP2 (torch 2.13).

    Weights outside of layers stay gathered from the first layer to the end of the backward pass,
    and the last layer from its forward pass on. The layer that computes is gathered, and the next
    layer arrives in a buffer, which gloo copies in the backward pass. Gradients of the head stay
    whole from the loss to the end. Gradients of a layer stay in an exchange buffer until the
    backward pass has those of the layer below. By then the activations of the layer below are
    freed. Weights that are gathered in 16 bits need no copy.
    """
    train, counted = config.train, count_parameters(config)
    trains_all = task_of(config).info(config).mode == "full"
    width, layers = train.trained_bytes, max(1, counted.layers)
    outside, layer = gathered_bytes(model_bytes(parts), config, precision)
    outside_grads = width * counted.outside if trains_all else 0
    head_grads = max(0, outside_grads - width * (counted.parameters - counted.multiplied))
    layer_grads = (width * counted.trained - outside_grads) // layers
    share = math.ceil(width * counted.trained / group.num_shards)
    keeps, gathered, whole_layers = train.keep_whole, outside, 0
    if keeps == "all":
        whole_layers = layers * layer
    kept = 0
    if group.accumulates:
        kept = width * counted.trained if keeps in ("gradients", "all") else share
    late = 0 if train.optimizer_in_backward and not kept else share
    parts = _without_copies(parts, config, precision)
    if phase.startswith("forward"):
        gathered += max(2 * layer, whole_layers + layer)
    elif phase.startswith("loss"):
        gathered += max(layer, whole_layers)
    elif "embedding" in phase:
        gathered += 2 * outside_grads
        kept = late
    elif phase.startswith("backward"):
        freed = (parts.get("activations", 0) + parts.get(WEIGHT_COPIES, 0)) // layers
        exchanged = layer_grads // (1 if train.reduce_dtype == "fp32" else 2)
        gathered += head_grads + max(3 * layer, whole_layers) + max(0, exchanged - freed)
        kept = max(kept, late)
    elif phase.startswith("update"):
        gathered, kept = update_gather_bytes(train, counted.shapes), late
    return _split(parts, group) | {"gradients": kept, "communication": gathered}


def _without_copies(parts: dict[str, int], config: RunConfig, precision: str) -> dict[str, int]:
    """Returns the parts without autocast's copies of weights that are gathered in 16 bits."""
    others = count_casts(config, precision).others
    if others is None or WEIGHT_COPIES not in parts:
        return parts
    most = others * DTYPES[precision].itemsize
    return parts | {WEIGHT_COPIES: min(parts[WEIGHT_COPIES], most)}


def model_bytes(parts: dict[str, int]) -> int:
    """Returns the bytes of weights and adapters."""
    return parts.get("weights", 0) + parts.get("adapters", 0)


def gathered_bytes(whole: int, config: RunConfig, precision: str) -> tuple[int, int]:
    """Returns the bytes that FSDP2 gathers for what is in no layer, and for a layer.

    `whole`: of the model on one process, adapters included.
    """
    counted, trains_all = count_parameters(config), task_of(config).info(config).mode == "full"
    width, casts = DTYPES[precision].itemsize, count_casts(config, precision)
    saved = config.train.trained_bytes - width  # of each element that is gathered in 16 bits
    outside = counted.outside * (config.train.trained_bytes if trains_all else width)
    in_layers = whole - outside - saved * casts.inside
    return outside - saved * casts.outside, in_layers // max(1, counted.layers)


def start_bytes(whole: int, config: RunConfig, splits: bool, group: Group) -> int:
    """Returns the bytes that a rank has of the model while it is read: its elements and a layer.

    `whole`: of the model as it is trained. `splits`: whether each weight is cut once it is read; if
    not, or if the engine keeps copies, a rank has the whole model.
    """
    shards = group.engine == "fsdp" or group.zero.get("stage") == 3
    if not splits or not shards or group.world_size == 1:
        return whole
    counted, is_full = count_parameters(config), task_of(config).info(config).mode == "full"
    width = config.train.trained_bytes if is_full else 2  # as it is read, before it is quantised
    in_layers = counted.parameters - counted.outside
    own, layer = math.ceil(whole / group.num_shards), width * in_layers // max(1, counted.layers)
    if group.engine == "deepspeed":  # makes fp32 copies and room for gradients of what is trained
        own += 2 * math.ceil(4 * counted.trained / group.num_shards)
    return own + layer


def stays_gathered(config: RunConfig, group: Group) -> bool:
    """Returns whether ZeRO-3 gathers each parameter once in a step: all may be whole at once.

    DeepSpeed frees a parameter after use if more are live, or if its next use is far away
    (deepspeed/runtime/zero/partitioned_param_coordinator.py, 0.19.8).
    """
    elements = count_parameters(config).parameters
    limits = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    return all(elements <= _zero_size(config, group, key) for key in limits)


def pools(
    phase: str,
    parts: dict[str, int],
    on_rank: dict[str, int],
    config: RunConfig,
    precision: str,
    group: Group,
) -> dict[str, int]:
    """Returns the bytes of a phase by the CUDA stream that allocates them.

    `parts`: as of one process; `on_rank`: as `parts_on_rank` gives them. The caching allocator has
    a pool for each stream, and what one stream has freed is lost to the others. FSDP2 (torch 2.13,
    `_fsdp_collectives`) gathers weights into a flat buffer on a stream of its own, from which the
    stream that computes copies them; these buffers are replayed through the allocator. Reduced
    gradients are born on a third stream, and stay there.
    """
    total = sum(on_rank.values())
    if group.engine != "fsdp" or group.world_size == 1:
        return {"computing": total}
    outside, layer = gathered_bytes(model_bytes(parts), config, precision)
    gradients = on_rank.get("gradients", 0)
    passes = phase.startswith(("forward", "backward")) and "embedding" not in phase
    computing = total - gradients - (layer if passes else 0)
    gathering = _gathering_pool(outside, layer, count_parameters(config).layers)
    return {"computing": computing, "gathering": gathering, "reducing": gradients}


def _gathering_pool(outside: int, layer: int, layers: int) -> int:
    """Returns what the allocator takes for FSDP2's buffers in a forward and a backward pass."""
    allocator, buffers = CachingAllocator(pages=False), deque[Chunk]()
    for size in (outside, *[layer] * 2 * layers):
        buffers.append(allocator.malloc(size))
        if len(buffers) > 1:  # a buffer is freed when the next one is full
            allocator.free(buffers.popleft())
    return allocator.reserved_bytes


def _zero3(phase: str, parts: dict[str, int], config: RunConfig, group: Group) -> dict[str, int]:
    """Returns the parts with ZeRO-3 (deepspeed/runtime/zero/stage3.py, 0.19.8).

    Small parameters stay whole. Gathered parameters stay, up to `stage3_max_live_parameters`, if
    they are used again within `stage3_max_reuse_distance`. In the forward pass parameters arrive in
    another buffer. Gradients go through a permanent bucket. A full bucket is copied, and gloo
    copies it once more. The rank has a copy of its share of the trained weights. If the optimizer
    is on the host, so are the gradients.
    """
    counted, whole = count_parameters(config), model_bytes(parts)
    threshold = _zero_size(config, group, "stage3_param_persistence_threshold")
    small_fraction = sum(size for size in counted.sizes if size <= threshold) / counted.parameters

    def large_bytes(key: str) -> int:
        """Returns the bytes of as many elements as `key` says, at most all that are not small."""
        return round(
            whole * min(1 - small_fraction, _zero_size(config, group, key) / counted.parameters)
        )

    trained, largest = 4 * counted.trained, 4 * counted.largest
    bucket = 4 * _zero_size(config, group, "reduce_bucket_size")
    transient = large_bytes("stage3_max_live_parameters")
    if phase.startswith("forward"):
        transient += large_bytes("stage3_prefetch_bucket_size")
    elif "embedding" in phase:
        transient = 2 * min(bucket, trained)
    elif phase.startswith("backward"):
        transient += largest + (2 * bucket if bucket < trained else 0)
    elif phase.startswith("update"):
        transient = 2 * largest
    result = _split(parts, group)
    share = math.ceil(trained / group.world_size)
    return result | {
        "optimizer": result.get("optimizer", 0) + share,
        "gradients": share * (2 if group.offloads else 1),
        "communication": round(whole * small_fraction) + bucket + transient,
    }
