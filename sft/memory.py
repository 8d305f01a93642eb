"""The memory that an optimizer step takes, told before weights are loaded.

The run's own step is traced on fake tensors (`rehearsal`). Layers repeat, so a deep model is traced
with few of them, phase by phase, and the phases are extended to its depth. What no trace sees
(workspaces of a GPU's libraries) is added by formula. A model that cannot be traced gets a closed
form, good to a factor of two. Which one it was is said in `Memory.method`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import nn

from sft import rehearsal
from sft.config import SCHEMAS, AnyConfig, Config, UserError
from sft.model import DTYPES
from sft.parallel import repeated_layers
from sft.rehearsal import Window
from sft.storage import ADAM_BYTES
from sft.tasks import skeleton, traits
from sft.trace import LARGE_SEGMENT, MIB, SMALL_SEGMENT, Trace

NF4_BYTES = 0.516  # per weight: 4 bits and the double-quantised scale of each block of 64
# Closed form: activations of a layer, bytes per token and hidden unit. Traces of Llama and Qwen2
# shapes gave 94 to 126 in fp32 and 61 to 77 in bf16 (autocast); of GPT-2, twice that.
ACTIVATION_BYTES = {"fp32": 110, "bf16": 70}
CONTEXT_BYTES = 600 * MIB  # of CUDA and its kernels in a process; an assumption, cards differ
CUBLAS_BYTES = 2 * 32 * MIB  # workspaces of forward and backward threads; of Hopper, others less


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at the peak of a step."""

    breakdown: dict[str, int]  # what they are for, largest first
    reserved: int  # what the caching allocator of a GPU takes for them; on a CPU the same
    method: str  # how it was predicted

    @property
    def allocated(self) -> int:
        return sum(self.breakdown.values())


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


# --- what memory is taken ----------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The processes that share the work of a step."""

    world_size: int = 1
    engine: str = "ddp"
    accumulates: bool = False  # several micro-batches on each
    zero: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's zero_optimization


ALONE = Group()


def predict(
    config: AnyConfig,
    precision: str,
    window: Window,
    *,
    on_gpu: bool,
    evaluation: bool = False,
    group: Group = ALONE,
) -> Memory:
    """The peak of a step of one of the processes, or of the held-out loss; closed form if it cannot
    be traced."""
    try:
        # With PyTorch's optimizer: those of bitsandbytes have no shape rules.
        casts = group.engine == "deepspeed" or (group.engine == "fsdp" and group.world_size > 1)
        engine = "fsdp" if casts else "ddp"  # what autocast keeps depends on it
        checkpointing = config.train.gradient_checkpointing
        key = _key(config, gradient_checkpointing=checkpointing, engine=engine)
        seen = replace(window, waiting=0)
        phases, reserved, method = _traced(key, precision, seen, on_gpu, evaluation)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a model does that no trace suits
        why = str(error).strip().split("\n")[0] or type(error).__name__
        parts = _closed_form(config, precision, window, evaluation)
        parts = _of_rank("backward", parts, config, precision, group, on_gpu)
        method = f"closed form, since the step could not be traced: {why}"
        return Memory(parts, round(1.05 * sum(parts.values())), method)
    share = ADAM_BYTES[config.train.optimizer] / ADAM_BYTES["adamw"]
    own = traits(config)
    besides = {"waiting batches": window.waiting * own.waiting_bytes}
    besides |= {} if on_gpu else {"examples": own.examples_bytes}

    def completed(name: str, parts: dict[str, int]) -> dict[str, int]:
        more = besides | {"optimizer": round(parts["optimizer"] * share)}
        more |= {"libraries": CUBLAS_BYTES} if on_gpu else {}
        if on_gpu and name.startswith("backward"):
            more |= _attention(config, precision, window)
        return _of_rank(name, parts | more, config, precision, group, on_gpu)

    totals = {name: completed(name, parts) for name, parts in phases.items()}
    heaviest = max(totals.values(), key=lambda parts: sum(parts.values()))
    traced = max(sum(parts.values()) for parts in phases.values())
    more = sum(heaviest.values()) - traced
    breakdown = dict(sorted(heaviest.items(), key=lambda item: -item[1]))
    return Memory(breakdown, reserved + more if on_gpu else sum(breakdown.values()), method)


# What a file of DeepSpeed's does not say (deepspeed/runtime/zero/config.py, 0.19.8), and what
# Accelerate makes of "auto" (accelerator.py: _prepare_deepspeed); in elements, of the hidden size.
ZERO_SIZES: dict[str, tuple[float, Callable[[int], float]]] = {
    "reduce_bucket_size": (5e8, lambda hidden: hidden**2),
    "stage3_prefetch_bucket_size": (5e7, lambda hidden: 0.9 * hidden**2),
    "stage3_param_persistence_threshold": (1e5, lambda hidden: 10 * hidden),
    "stage3_max_live_parameters": (1e9, lambda _: 1e9),
}


def _zero_size(config: AnyConfig, group: Group, key: str) -> int:
    default, automatic = ZERO_SIZES[key]
    told = group.zero.get(key, default)
    if told == "auto":
        told = automatic(traits(config).text.hidden_size)
    return int(told)


def _shared(
    name: str, parts: dict[str, int], config: AnyConfig, precision: str, group: Group
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
    name: str, parts: dict[str, int], config: AnyConfig, precision: str, group: Group, on_gpu: bool
) -> dict[str, int]:
    """The parts of a phase in the memory of one process's device: for a GPU without what lies in
    host memory between uses."""
    hosted = _hosted(config, group) if on_gpu else ()
    shared = _shared(name, parts, config, precision, group)
    return {label: size for label, size in shared.items() if size and label not in hosted}


def _hosted(config: AnyConfig, group: Group) -> tuple[str, ...]:
    if config.train.offload:
        return ("weights", "adapters", "gradients", "optimizer")
    return ("gradients", "optimizer") if _offloads(group) else ()


def _offloads(group: Group) -> bool:
    return (group.zero.get("offload_optimizer") or {}).get("device") == "cpu"


def _sliced(name: str, parts: dict[str, int], config: AnyConfig, group: Group) -> dict[str, int]:
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
    name: str, parts: dict[str, int], config: AnyConfig, precision: str, group: Group
) -> dict[str, int]:
    """FSDP2 (torch 2.13).

    Gathered are, from the first layer to the end of the backward pass, what is outside of layers;
    of the layers the one at work, and the buffer in which the next one arrives, in the backward
    pass with gloo's copy of it. Gradients of the head stay whole from the loss to the end; those of
    a layer lie in the buffer from which they are exchanged until the next one's are whole, by when
    that layer's activations are gone.
    """
    counted, full = counts(config), traits(config).mode == "full"
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
    name: str, parts: dict[str, int], config: AnyConfig, group: Group
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


Phases = dict[str, dict[str, int]]  # phase -> what -> bytes at its peak


@lru_cache(maxsize=256)
def _traced(
    key: Key, precision: str, window: Window, on_gpu: bool, evaluation: bool
) -> tuple[Phases, int, str]:
    """(phases, reserved bytes, how)."""
    config = _config(key)

    def traced(depth: int | None) -> Trace:
        return rehearsal.rehearse(
            config, precision, window, depth=depth, on_gpu=on_gpu, evaluation=evaluation
        )

    depths = _depths(key)
    if depths is None:
        trace = traced(None)
        phases = {name: peak.breakdown for name, peak in trace.peaks().items()}
        return phases, trace.reserved() if on_gpu else trace.peak().num_bytes, "traced"
    few, more, whole = depths
    small, large = traced(few), traced(more)
    times = (whole - few) // (more - few)

    def extended(of_few: int, of_more: int) -> int:
        return max(0, of_few + times * (of_more - of_few))

    first, second = small.peaks(), large.peaks()
    phases = {
        name: {
            label: extended(first[name].breakdown.get(label, 0), peak.breakdown.get(label, 0))
            for label in first[name].breakdown | peak.breakdown
        }
        for name, peak in second.items()
    }
    reserved = max(sum(parts.values()) for parts in phases.values())
    if on_gpu:  # extended without the pages of the allocator, which are rounding; then one of each
        sizes = extended(small.reserved(pages=False), large.reserved(pages=False))
        reserved = max(reserved, sizes) + SMALL_SEGMENT + LARGE_SEGMENT
    return phases, reserved, f"traced with {few} and {more} of {whole} layers"


def _depths(key: Key) -> tuple[int, int, int] | None:
    """(few layers, more, all): depths between which every layer adds the same; None where layers
    do not repeat, or are too few for a shorter trace to be quicker."""
    config = _config(key)
    own = traits(config)
    text = own.text
    whole, kinds = text.num_hidden_layers, getattr(text, "layer_types", None) or ["same"]
    period = next(
        n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
    few = 2 * period + whole % period
    more = few + period
    if own.small or few + more >= whole or own.layer >= whole:  # which the task refuses
        return None
    key = _key(config)
    numbers = [_counted(key, depth).parameters for depth in (few, more, whole)]
    repeats = numbers[2] - numbers[0] == (whole - few) // period * (numbers[1] - numbers[0])
    return (few, more, whole) if repeats else None


def _attention(config: AnyConfig, precision: str, window: Window) -> dict[str, int]:
    """What flash attention takes in a backward pass, which no trace sees: the gradient of the
    queries in fp32 and two numbers a head and token; with grouped queries, gradients of keys and
    values for every head (PyTorch, flash_api.cpp: mha_bwd)."""
    own = traits(config)
    if precision != "bf16" or own.attention == "eager":
        return {}
    text = own.text
    heads = getattr(text, "num_attention_heads", None)
    if not heads:  # a model without attention
        return {}
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    grouped = getattr(text, "num_key_value_heads", heads) != heads
    each = 4 * (math.ceil(size / 32) * 32 + 2) + (4 * size if grouped else 0)
    return {"attention workspace": window.tokens * heads * each * own.agents}


def _closed_form(
    config: AnyConfig, precision: str, window: Window, evaluation: bool
) -> dict[str, int]:
    """What a model that cannot be traced takes, within about a factor of two."""
    built, own = skeleton(config), traits(config)
    mode, arch = own.mode, own.text
    width = DTYPES[precision].itemsize
    weights = 0.0
    head = built.get_output_embeddings()  # type: ignore[operator]
    linear = {id(m.weight) for m in built.modules() if isinstance(m, nn.Linear) and m is not head}
    for parameter in built.parameters():
        quantised = mode == "qlora" and not parameter.requires_grad and id(parameter) in linear
        each = 4.0 if parameter.requires_grad else NF4_BYTES if quantised else width
        weights += parameter.numel() * each
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    rows = window.micro_batches[-1]
    agents = own.agents  # a row each
    hidden, layers = agents * window.tokens * arch.hidden_size, arch.num_hidden_layers
    kept, again = layers * ACTIVATION_BYTES[precision], 0
    if evaluation:
        kept = ACTIVATION_BYTES[precision]
    elif config.train.gradient_checkpointing:  # inputs of layers, and one layer at a time
        kept, again = layers * (4 if mode == "full" else width), ACTIVATION_BYTES[precision]
    return {
        "weights": round(weights),
        "gradients": trained * 4,
        "optimizer": round(trained * ADAM_BYTES[config.train.optimizer]),
        "activations": round(kept * hidden),
        # fp32 logits, their softmax and gradient
        "logits and loss": sum(s for _, s in rows) * agents * arch.vocab_size * 12,
        "backward": round(again * hidden),
    }
