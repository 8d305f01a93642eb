"""Predicts the memory of an optimizer step before weights are loaded.

The run's own step is traced on fake tensors (`dry_run`). Layers repeat, so a deep model is traced
with only a few layers, and each phase is extended to the whole depth. A formula adds workspaces of
a GPU's libraries, which no trace sees. A closed form, right within a factor of two, is used for a
model that cannot be traced. `Memory.method` names the method.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from sft.config.schema import RunConfig
from sft.errors import UserError
from sft.models.dtypes import DTYPES
from sft.models.head import most_rows
from sft.models.layers import embedding_layers
from sft.plan import dry_run
from sft.plan.allocator import LARGE_PAGE, MIB, SMALL_PAGE, CachingAllocator
from sft.plan.counts import (
    ModelKey,
    config_of_key,
    count_at_depth,
    count_parameters,
    depths,
    model_key,
)
from sft.plan.dry_run import Window
from sft.plan.records import Traced, load_or_trace
from sft.plan.sharding import ONE_PROCESS, Group, model_bytes, parts_on_rank, pools
from sft.plan.trace import Trace
from sft.tasks.base import TaskInfo
from sft.tasks.registry import task_of
from sft.train.parallel.trial import calls_library, state_bytes, trained_shapes

RUNG_KEYS = ("gradient_checkpointing", "activation_offload")  # of `train`; see `choose.Rung`
NF4_BYTES = 0.516  # per weight, also in FP4: 4 bits, and a double-quantised scale per block of 64
# Closed form: activations of a layer, bytes per token and hidden unit. Traces of Llama and Qwen2
# shapes gave 94 to 126 in fp32 and 61 to 77 in bf16 (autocast); of GPT-2, twice that.
ACTIVATION_BYTES = {"fp32": 110, "bf16": 70, "fp16": 70}
PASSES = (  # keys of `train` that change a trace
    *("loss", "label_smoothing", "z_loss", "mean_per", "neftune_alpha", "context_parallel"),
)
# Uses of host memory.
STATE, ACTIVATIONS, COPIES = "offloaded state", "offloaded activations", "copies of a checkpoint"
CONTEXT_BYTES = 600 * MIB  # CUDA and its kernels in a process; an assumption: GPUs differ
CUBLAS_BYTES = 2 * 32 * MIB  # of two threads (forward, backward) on Hopper; less on other GPUs


@dataclass(frozen=True)
class Memory:
    """The bytes of one process at the peak of a step."""

    breakdown: dict[str, int]  # by use, largest first
    reserved: int  # what a GPU's caching allocator takes for them; on a CPU their sum
    method: str  # how it was predicted
    recomputed: float | None = None  # share of the forward pass done again; None: unknown
    hosted: dict[str, int] = field(default_factory=dict)  # in host memory beside a GPU, by use
    copied_bytes: int = 0  # of activations that go to the host, and come back
    model_bytes: int = 0  # of weights and adapters, before ranks split them

    def recomputed_share(self, checkpointing: bool | str) -> float:
        """Returns the share of the forward pass that the backward pass repeats."""
        # A step that could not be traced repeats it with `checkpointing`.
        return float(checkpointing is True) if self.recomputed is None else self.recomputed

    @property
    def allocated(self) -> int:
        return sum(self.breakdown.values())


def predict(
    config: RunConfig,
    precision: str,
    window: Window,
    *,
    on_gpu: bool,
    evaluation: bool = False,
    group: Group = ONE_PROCESS,
) -> Memory:
    """Returns the peak of one process in a step, or in the held-out loss (`evaluation`)."""
    try:
        # The key has AdamW for optimizers that call another library, whose operations have no
        # shape rules, and one of the two kinds of engine, which differ in what autocast keeps.
        casts = group.engine == "deepspeed" or (group.engine == "fsdp" and group.world_size > 1)
        engine = "fsdp" if casts else "ddp"
        passes = {name: getattr(config.train, name) for name in (*RUNG_KEYS, *PASSES)}
        own = _stored(config) | _traced_optimizer(config)
        key = model_key(config, engine=engine, **passes, **own)
        without = replace(window, waiting=0)
        folder = task_of(config).info(config).cache / "traces"
        traced = _trace(folder, key, precision, without, on_gpu, evaluation)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # a model may fail in any way
        why = str(error).strip().split("\n")[0] or type(error).__name__
        closed = _closed_form(config, precision, window, evaluation)
        step = ("backward", closed, config, precision, group)
        parts = parts_on_rank(*step, on_gpu)
        hosted = {STATE: sum(parts_on_rank(*step, False).values()) - sum(parts.values())}
        method = f"closed form, since the step could not be traced: {why}"
        reserved = round(1.05 * sum(parts.values()))
        return Memory(parts, reserved, method, hosted=hosted, model_bytes=model_bytes(closed))
    totals, hosted_state, streams = (
        [],
        [0],
        defaultdict[str, int](int),
    )  # the most bytes of each stream
    for name, parts in traced.phases.items():
        complete = parts | _untraced(name, parts, config, precision, window, on_gpu)
        totals.append(parts_on_rank(name, complete, config, precision, group, on_gpu))
        everywhere = parts_on_rank(name, complete, config, precision, group, False)
        hosted_state.append(sum(everywhere.values()) - sum(totals[-1].values()))
        for stream, size in pools(name, complete, totals[-1], config, precision, group).items():
            streams[stream] = max(streams[stream], size)
    heaviest = max(totals, key=lambda parts: sum(parts.values()))
    seen = max(sum(parts.values()) for parts in traced.phases.values())
    breakdown = dict(sorted(heaviest.items(), key=lambda item: -item[1]))
    reserved = sum(breakdown.values())
    if on_gpu:
        reserved = traced.reserved_bytes - seen + sum(streams.values())
    host = {ACTIVATIONS: traced.host_bytes, STATE: max(hosted_state)}, traced.copied_bytes
    whole = max(map(model_bytes, traced.phases.values()))
    return Memory(breakdown, reserved, traced.method, traced.recomputed, *host, whole)


def _stored(config: RunConfig) -> dict[str, Any]:
    """Returns the keys of `train` that decide how trained weights are kept and updated."""
    pure = {"precision": "bf16_pure"} if config.train.is_bf16_pure else {}
    early = {"optimizer_in_backward": True, "max_grad_norm": 0.0}  # which needs no clipping
    return pure | (early if config.train.optimizer_in_backward else {})


def _untraced(
    phase: str,
    parts: dict[str, int],
    config: RunConfig,
    precision: str,
    window: Window,
    on_gpu: bool,
) -> dict[str, int]:
    """Returns the parts of a phase that a formula adds or, for the optimizer, replaces."""
    info = task_of(config).info(config)
    result = {"waiting batches": window.waiting * info.waiting_bytes}
    if not _traced_optimizer(config):
        counted, updates = count_parameters(config), "update"
        result["optimizer"] = state_bytes(config.train, counted.shapes)
        if config.train.optimizer_in_backward:
            updates = "backward"
        if config.train.is_bf16_pure and phase.startswith(updates):
            # A parameter and its gradient in fp32; AdamW, which is traced, needs only parts of it.
            result["weight copies"] = parts.get("weight copies", 0) + 8 * counted.largest
    if not on_gpu:
        return result | {"examples": info.examples_bytes}
    if phase.startswith("backward"):
        result["attention workspace"] = _attention_workspace(info, precision, window)
    return result | {"libraries": CUBLAS_BYTES}


def _traced_optimizer(config: RunConfig) -> dict[str, Any]:
    """Returns the keys of the optimizer that a trace can step; none if AdamW replaces it."""
    if calls_library(config.train):
        return {}
    train = config.train
    return {"optimizer": train.optimizer, "optimizer_args": train.optimizer_args}


@lru_cache(maxsize=256)
def _trace(folder: Path, key: ModelKey, *step: Any) -> Traced:
    """Returns the traced peaks of a step of the model `key`; `folder` keeps them.

    `step`: its precision, its window, and whether it is on a GPU and an evaluation.
    """
    config = config_of_key(key)  # it may name a file of sizes, whose content is an input, too
    sizes = repr(task_of(config).info(config)), count_at_depth(model_key(config), None)
    return load_or_trace(folder, (key, sizes, step), lambda: _trace_anew(key, *step))


def _trace_anew(
    key: ModelKey, precision: str, window: Window, on_gpu: bool, evaluation: bool
) -> Traced:
    """Traces a step of the whole model, or extends two steps with few layers to all layers."""
    config = config_of_key(key)

    def trace_at(depth: int | None) -> tuple[Trace, int, int]:
        """Returns what is on the device, and the bytes in host memory and of copies to it."""
        trace = dry_run.trace_step(
            config, precision, window, depth=depth, on_gpu=on_gpu, evaluation=evaluation
        )
        label = dry_run.OFFLOADED
        if not on_gpu:
            return trace, 0, 0
        return trace.without(label), trace.pinned_bytes(label), trace.born_bytes(label)

    found = depths(key)
    if found is None:
        trace, *host = trace_at(None)
        phases = {name: peak.breakdown for name, peak in trace.peaks().items()}
        reserved = trace.reserved() if on_gpu else trace.peak().num_bytes
        return Traced(phases, reserved, "traced", _share(trace.flops), *host)
    few, more, whole = found
    (first, *host_at_first), (second, *host_at_second) = trace_at(few), trace_at(more)
    times = (whole - few) // (more - few)

    def extend(with_few: int, with_more: int) -> int:
        return max(0, with_few + times * (with_more - with_few))

    parts = {name: peak.breakdown for name, peak in first.peaks().items()}
    phases = {
        name: {
            label: extend(parts[name].get(label, 0), peak.breakdown.get(label, 0))
            for label in parts[name] | peak.breakdown
        }
        for name, peak in second.peaks().items()
    }
    reserved = max(sum(parts.values()) for parts in phases.values())
    if on_gpu:  # the allocator rounds to pages, at most one per pool: this must not be extended
        unrounded = [each.reserved(CachingAllocator(pages=False)) for each in (first, second)]
        reserved = max(reserved, extend(*unrounded)) + SMALL_PAGE + LARGE_PAGE
    flops = {kind: extend(first.flops[kind], number) for kind, number in second.flops.items()}
    method = f"traced with {few} and {more} of {whole} layers"
    extended = map(extend, host_at_first, host_at_second)
    return Traced(phases, reserved, method, _share(flops), *extended)


def _share(flops: Mapping[str, int]) -> float:
    """Returns the operations that are done again as a share of those of the forward pass."""
    return flops.get("recomputed", 0) / max(1, flops.get("forward", 0))


def _attention_workspace(info: TaskInfo, precision: str, window: Window) -> int:
    """Returns the bytes of flash attention in a backward pass, which no trace sees.

    They are the gradient of the queries in fp32, and two numbers per head and token. With grouped
    queries also gradients of keys and values for every head (PyTorch, flash_api.cpp: mha_bwd).
    """
    heads = getattr(info.sizes, "num_attention_heads", None)  # a model may have no attention
    if precision == "fp32" or info.attention == "eager" or not heads:
        return 0
    size = getattr(info.sizes, "head_dim", None) or info.sizes.hidden_size // heads
    grouped = getattr(info.sizes, "num_key_value_heads", heads) != heads
    each = 4 * (math.ceil(size / 32) * 32 + 2) + (4 * size if grouped else 0)
    return window.tokens * heads * each * info.copies


def rows_of_logits(info: TaskInfo) -> int:
    """Returns how many rows of logits exist at once, at most."""
    trained = 4 * info.sizes.vocab_size * info.sizes.hidden_size if info.mode == "full" else 0
    return most_rows(info.sizes.vocab_size, trained)


def _closed_form(
    config: RunConfig, precision: str, window: Window, evaluation: bool
) -> dict[str, int]:
    """Returns the bytes of a model that cannot be traced, within about a factor of two."""
    task = task_of(config)
    model, info = task.skeleton(config), task.info(config)
    mode, arch, copies = info.mode, info.sizes, info.copies  # each row goes through every copy
    width = DTYPES[precision].itemsize
    weights = 0.0
    _, head = embedding_layers(model)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    for parameter in model.parameters():
        is_matrix = id(parameter) in linear or parameter.ndim == 3  # of experts
        quantised = mode == "qlora" and not parameter.requires_grad and is_matrix
        own = float(config.train.trained_bytes)
        each = own if parameter.requires_grad else NF4_BYTES if quantised else width
        weights += parameter.numel() * each
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = window.micro_batches[-1]
    hidden, layers = copies * window.tokens * arch.hidden_size, arch.num_hidden_layers
    kept, again = layers * ACTIVATION_BYTES[precision], 0
    if evaluation:
        kept = ACTIVATION_BYTES[precision]
    elif config.train.gradient_checkpointing is True:  # inputs of layers, and one layer at a time
        kept, again = layers * (4 if mode == "full" else width), ACTIVATION_BYTES[precision]
    return {
        "weights": round(weights),
        "gradients": trained * config.train.trained_bytes,
        "optimizer": state_bytes(config.train, trained_shapes(model)),
        "activations": round(kept * hidden),
        # fp32 logits, their softmax and gradient
        "logits and loss": min(sum(s for _, s in rows) * copies, rows_of_logits(info))
        * arch.vocab_size
        * 12,
        "backward": round(again * hidden),
    }
