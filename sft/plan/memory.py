"""The memory that an optimizer step takes, told before weights are loaded.

The run's own step is traced on fake tensors (`rehearsal`). Layers repeat, so a deep model is traced
with few of them, phase by phase, and the phases are extended to its depth. What no trace sees
(workspaces of a GPU's libraries) is added by formula. A model that cannot be traced gets a closed
form, good to a factor of two. Which one it was is said in `Memory.method`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import nn

from sft.config.schema import RunConfig
from sft.errors import UserError
from sft.models.dtypes import DTYPES
from sft.models.layers import embedding_layers
from sft.plan import dry_run
from sft.plan.allocator import LARGE_SEGMENT, MIB, SMALL_SEGMENT
from sft.plan.counts import Key, _config, _counted, _key
from sft.plan.dry_run import Window
from sft.plan.sharding import ALONE, Group, _of_rank
from sft.plan.trace import Trace
from sft.runtime.disk import ADAM_BYTES
from sft.tasks.registry import task_of

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


def predict(
    config: RunConfig,
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
    own = task_of(config).info(config)
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


Phases = dict[str, dict[str, int]]  # phase -> what -> bytes at its peak


@lru_cache(maxsize=256)
def _traced(
    key: Key, precision: str, window: Window, on_gpu: bool, evaluation: bool
) -> tuple[Phases, int, str]:
    """(phases, reserved bytes, how)."""
    config = _config(key)

    def traced(depth: int | None) -> Trace:
        return dry_run.rehearse(
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
    own = task_of(config).info(config)
    text = own.text
    whole, kinds = text.num_hidden_layers, getattr(text, "layer_types", None) or ["same"]
    period = next(
        n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
    few = 2 * period + whole % period
    more = few + period
    if own.small or few + more >= whole or own.deepest_layer >= whole:  # which the task refuses
        return None
    key = _key(config)
    numbers = [_counted(key, depth).parameters for depth in (few, more, whole)]
    repeats = numbers[2] - numbers[0] == (whole - few) // period * (numbers[1] - numbers[0])
    return (few, more, whole) if repeats else None


def _attention(config: RunConfig, precision: str, window: Window) -> dict[str, int]:
    """What flash attention takes in a backward pass, which no trace sees: the gradient of the
    queries in fp32 and two numbers a head and token; with grouped queries, gradients of keys and
    values for every head (PyTorch, flash_api.cpp: mha_bwd)."""
    own = task_of(config).info(config)
    if precision != "bf16" or own.attention == "eager":
        return {}
    text = own.text
    heads = getattr(text, "num_attention_heads", None)
    if not heads:  # a model without attention
        return {}
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    grouped = getattr(text, "num_key_value_heads", heads) != heads
    each = 4 * (math.ceil(size / 32) * 32 + 2) + (4 * size if grouped else 0)
    return {"attention workspace": window.tokens * heads * each * own.copies}


def _closed_form(
    config: RunConfig, precision: str, window: Window, evaluation: bool
) -> dict[str, int]:
    """What a model that cannot be traced takes, within about a factor of two."""
    task = task_of(config)
    built, own = task.skeleton(config), task.info(config)
    mode, arch = own.mode, own.text
    width = DTYPES[precision].itemsize
    weights = 0.0
    _, head = embedding_layers(built)
    linear = {id(m.weight) for m in built.modules() if isinstance(m, nn.Linear) and m is not head}
    for parameter in built.parameters():
        quantised = mode == "qlora" and not parameter.requires_grad and id(parameter) in linear
        each = 4.0 if parameter.requires_grad else NF4_BYTES if quantised else width
        weights += parameter.numel() * each
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    rows = window.micro_batches[-1]
    copies = own.copies  # a row each
    hidden, layers = copies * window.tokens * arch.hidden_size, arch.num_hidden_layers
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
        "logits and loss": sum(s for _, s in rows) * copies * arch.vocab_size * 12,
        "backward": round(again * hidden),
    }
