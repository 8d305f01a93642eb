"""What the run will take, told before weights are loaded; and what the `auto` values become.

Memory is that of the run's own step, traced on fake tensors (`rehearsal`) for a small and a large
micro-batch and interpolated between them; a model that cannot be traced gets a closed form, good to
a factor of two. Which one it was is told wherever it is shown. The token budget is the largest that
fits the memory with a margin, and no larger than what saturates the device.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from sft import batching, engine, processes, rehearsal
from sft.config import Config, with_values
from sft.hardware import Hardware
from sft.log import facts
from sft.model import DTYPES, add_adapters, architecture
from sft.prepare import Prepared
from sft.rehearsal import Shape
from sft.trace import Peak

MARGIN = 0.15  # of the available memory stays free: fragmentation, workspaces, other programs
SATURATING_TOKENS = {"cpu": 2048, "cuda": 16384}  # a larger micro-batch is no faster
# What one more micro-batch costs, in tokens (docs/LOG.md has the measurement). On a GPU it has not
# been measured: as few as the budget allows.
MICRO_BATCH_COST = {"cpu": 64, "cuda": None}
NF4_BYTES = 0.516  # per weight: 4 bits and the double-quantised scale of each block of 64
ADAM_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2.05, "paged_adamw_8bit": 2.05}
# Closed form: activations of a layer, bytes per token and hidden unit. Traces of Llama and Qwen2
# shapes gave 94 to 126 in fp32 and 61 to 77 in bf16 (autocast); of GPT-2, twice that.
ACTIVATION_BYTES = {"fp32": 110, "bf16": 70}
# What a model may raise that fake tensors do not suit: an operation without a shape rule, a value
# that decides what is computed, a kernel that is not installed. Mistakes of the user were refused.
UNTRACEABLE = (RuntimeError, NotImplementedError, TypeError, ValueError, ImportError, LookupError)


@dataclass(frozen=True)
class Memory:
    """Bytes per process at the peak of a step, and what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass
    logits: int  # those of supervised tokens, and what the loss makes of them
    backward: int  # gradients of activations, and what checkpointing computes again
    method: str  # how it was predicted

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {key: value for key, value in asdict(self).items() if key != "method"}


@dataclass(frozen=True)
class Line:
    """Memory of two micro-batches, and by it that of every other: memory is piecewise linear in
    tokens and convex, so between the two it is at most what the line says."""

    small: Memory
    large: Memory
    small_tokens: int
    large_tokens: int

    def at(self, tokens: int) -> Memory:
        share = (tokens - self.small_tokens) / (self.large_tokens - self.small_tokens)
        small, large = self.small.parts(), self.large.parts()
        parts = {key: small[key] + share * (large[key] - small[key]) for key in small}
        return Memory(
            **{k: max(0, math.ceil(v)) for k, v in parts.items()}, method=self.large.method
        )

    def fits(self, num_bytes: float) -> int:
        """Tokens of the largest micro-batch that `num_bytes` hold."""
        per_token = (self.large.total - self.small.total) / (self.large_tokens - self.small_tokens)
        return int(self.small_tokens + (num_bytes - self.small.total) / max(per_token, 1e-9))


@dataclass(frozen=True)
class Plan:
    num_examples: int
    num_held_out: int
    tokens_per_epoch: int
    supervised_share: float
    steps: int
    global_batch: int
    world_size: int
    budget: batching.Budget
    precision: str
    micro_batches: int  # of each process in the first step
    num_parameters: int
    num_trained: int
    memory: Memory
    available_bytes: int
    checkpoint_bytes: int
    reasons: dict[str, str]  # dotted configuration key -> why its `auto` became what it is

    @property
    def tokens(self) -> int:
        """Over all steps."""
        return round(self.tokens_per_epoch * self.steps * self.global_batch / self.num_examples)


def make_plan(config: Config, prepared: Prepared, hardware: Hardware, world_size: int) -> Plan:
    train = config.train
    lengths = prepared.train.lengths
    supervised = prepared.audit["train"]["supervised_tokens"] / sum(lengths)
    precision, why_precision = processes.resolve_precision(train)
    device = "cuda" if hardware.devices else "cpu"
    layout, why_layout = resolve_layout(config)
    reasons = {"train.precision": why_precision, "train.layout": why_layout}
    skeleton = _skeleton(config)
    available = _available_bytes(hardware, world_size)
    budget, cuts, line, reasons["train.max_tokens"] = _budget(
        config, prepared, skeleton, precision, layout, device, world_size, available
    )
    heaviest = max(batching.num_tokens(lengths, m, layout) for rank in cuts for m in rank)
    trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    return Plan(
        num_examples=len(lengths),
        num_held_out=len(prepared.held_out),
        tokens_per_epoch=sum(lengths),
        supervised_share=supervised,
        steps=engine.total_steps(train, len(lengths)),
        global_batch=min(train.global_batch, len(lengths)),
        world_size=world_size,
        budget=budget,
        precision=precision,
        micro_batches=len(cuts[0]),
        num_parameters=sum(p.numel() for p in skeleton.parameters()),
        num_trained=trained,
        memory=line.at(heaviest),
        available_bytes=available,
        checkpoint_bytes=trained * 4 + math.ceil(trained * ADAM_BYTES[train.optimizer]),
        reasons={
            key: why for key, why in reasons.items() if getattr(train, key.split(".")[1]) == "auto"
        },
    )


def resolved_values(plan: Plan) -> dict[str, Any]:
    """Dotted configuration keys -> the values that `auto` became."""
    values = {
        "train.max_tokens": plan.budget.max_tokens,
        "train.layout": plan.budget.layout,
        "train.precision": plan.precision,
    }
    return {key: values[key] for key in plan.reasons}


def _budget(
    config: Config,
    prepared: Prepared,
    skeleton: nn.Module,
    precision: str,
    layout: batching.Layout,
    device: str,
    world_size: int,
    available_bytes: int,
) -> tuple[batching.Budget, list[list[batching.MicroBatch]], Line, str]:
    """(what a micro-batch may hold, the first step cut by it, the memory, the reason)."""
    train, lengths = config.train, prepared.train.lengths
    ids = batching.global_batch_ids(len(lengths), engine.order_seed(train), 0, train.global_batch)

    def cut_at(max_tokens: int) -> tuple[batching.Budget, list[list[batching.MicroBatch]]]:
        budget = batching.Budget(max_tokens, layout, MICRO_BATCH_COST[device])
        return budget, batching.cut(ids, lengths, world_size, budget)

    longest = max(lengths)
    wanted = max(longest, SATURATING_TOKENS[device])
    wanted = wanted if train.max_tokens == "auto" else train.max_tokens
    cuts = cut_at(wanted)[1]
    # Logits weigh more than all else where vocabularies are large: the densest micro-batch counts.
    asked = prepared.train.arrays.index["supervised"][prepared.train.order]
    micro_batches = [m for rank in cuts for m in rank if m]
    densest = max(asked[m].sum() / batching.num_tokens(lengths, m, layout) for m in micro_batches)
    # From the second micro-batch on, and in DDP's buckets, there are gradients from the start.
    for accumulates in (world_size > 1 or len(cuts[0]) > 1, True):
        shape = Shape(
            rows=max(2, min(math.ceil(wanted / longest), math.ceil(len(ids) / world_size))),
            length=longest,
            supervised=min(longest, max(1, math.ceil(longest * densest))),
            micro_batches=2 if accumulates else 1,
            layout=layout,
        )
        line = _memory(config, skeleton, precision, shape)
        fits = line.fits(available_bytes * (1 - MARGIN))
        max_tokens, reason = _max_tokens(
            config, longest, fits=fits, saturates=SATURATING_TOKENS[device]
        )
        budget, cuts = cut_at(max_tokens)
        if accumulates or len(cuts[0]) == 1:
            break
    return budget, cuts, line, reason


def _max_tokens(config: Config, longest: int, *, fits: int, saturates: int) -> tuple[int, str]:
    """(token budget of a micro-batch, reason); all arguments in tokens."""
    if config.train.max_tokens != "auto":
        return config.train.max_tokens, "configured"
    room = f"{max(0, fits):,} would fit the memory"
    if longest >= min(fits, saturates):
        return longest, f"the longest example; {room}"
    if saturates <= fits:
        return saturates, f"more is no faster on this device; {room}"
    return fits, "what fits the memory"


def resolve_layout(config: Config) -> tuple[batching.Layout, str]:
    if config.train.layout != "auto":
        return config.train.layout, "configured"
    if config.model.attn_implementation == "flash_attention_2":
        return "packed", "flash attention reads document borders without a mask"
    return "padded", "rows of like lengths; packing would need a dense mask here"


def _skeleton(config: Config) -> nn.Module:
    """The model with its adapters, without storage."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture(config.model))
    if config.tuning.mode == "full":
        return base
    return add_adapters(base.requires_grad_(False), config.tuning)


def _available_bytes(hardware: Hardware, world_size: int) -> int:
    """Per process: the smallest GPU's free memory, or an equal share of the RAM."""
    if hardware.devices:
        return min(device.free_bytes or device.total_bytes for device in hardware.devices)
    return hardware.ram_available_bytes // world_size


def _memory(config: Config, skeleton: nn.Module, precision: str, large: Shape) -> Line:
    """Memory from micro-batches of one row to those of `large`."""
    small = replace(large, rows=1)
    try:
        ends = [_traced(config, precision, shape) for shape in (small, large)]
    except UNTRACEABLE as error:
        why = str(error).strip().split("\n")[0] or type(error).__name__
        ends = [_closed_form(config, skeleton, precision, s, why) for s in (small, large)]
    return Line(ends[0], ends[1], small.tokens, large.tokens)


def _traced(config: Config, precision: str, shape: Shape) -> Memory:
    # bitsandbytes' optimizers have no shape rules; their state is as large as it is.
    replaced = with_values(config, {"train.optimizer": "adamw"})
    parts = _peak(replaced.model_dump_json(), precision, shape).breakdown
    share = ADAM_BYTES[config.train.optimizer] / ADAM_BYTES["adamw"]
    return Memory(
        weights=parts["weights"],
        gradients=parts.get("gradients", 0),
        optimizer=round(parts["optimizer"] * share),
        activations=parts.get("activations", 0),
        logits=parts.get("logits and loss", 0),
        backward=parts.get("backward", 0),
        method="traced",
    )


@lru_cache(maxsize=16)
def _peak(config: str, precision: str, shape: Shape) -> Peak:
    """Of the configuration in JSON; a process that plans twice traces once."""
    return rehearsal.rehearse(Config.model_validate_json(config), precision, shape).peak()


def _closed_form(
    config: Config, skeleton: nn.Module, precision: str, shape: Shape, why: str
) -> Memory:
    """What a model that cannot be traced takes, within about a factor of two."""
    mode, arch = config.tuning.mode, architecture(config.model).get_text_config()
    width = DTYPES[precision].itemsize
    weights = 0.0
    head = skeleton.get_output_embeddings()  # type: ignore[operator]
    linear = {
        id(m.weight) for m in skeleton.modules() if isinstance(m, nn.Linear) and m is not head
    }
    for parameter in skeleton.parameters():
        quantised = mode == "qlora" and not parameter.requires_grad and id(parameter) in linear
        each = 4.0 if parameter.requires_grad else NF4_BYTES if quantised else width
        weights += parameter.numel() * each
    trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    hidden, layers = shape.tokens * arch.hidden_size, arch.num_hidden_layers
    kept, again = layers * ACTIVATION_BYTES[precision], 0
    if config.train.gradient_checkpointing:  # inputs of layers, and one layer at a time
        kept, again = layers * (4 if mode == "full" else width), ACTIVATION_BYTES[precision]
    # fp32 logits, their softmax and gradient
    logits = shape.rows * shape.supervised * arch.vocab_size * 12
    return Memory(
        weights=round(weights),
        gradients=trained * 4,
        optimizer=round(trained * ADAM_BYTES[config.train.optimizer]),
        activations=round(kept * hidden),
        logits=logits,
        backward=round(again * hidden),
        method=f"closed form, since the step could not be traced: {why}",
    )


def table(plan: Plan) -> Table:
    memory = plan.memory
    cut = f"{plan.world_size} process{'es' if plan.world_size > 1 else ''} x {plan.micro_batches}"
    rows = [
        ("examples", f"{plan.num_examples:,} to train on, {plan.num_held_out:,} held out"),
        (
            "tokens",
            f"{plan.tokens_per_epoch:,} per epoch ({plan.supervised_share:.0%} supervised), "
            f"{plan.tokens:,} in all",
        ),
        ("steps", f"{plan.steps:,} of {plan.global_batch} examples"),
        (
            "batch",
            f"{cut} micro-batch(es) of at most {plan.budget.max_tokens:,} tokens, "
            f"{plan.budget.layout}",
        ),
        ("trained", f"{plan.num_trained:,} of {plan.num_parameters:,} parameters"),
        (
            "memory",
            f"about {_mib(memory.total)} of {_mib(plan.available_bytes)} per process: "
            + ", ".join(f"{name} {_mib(size)}" for name, size in memory.parts().items() if size)
            + f" ({memory.method})",
        ),
        ("disk", f"{_mib(plan.checkpoint_bytes)} per checkpoint"),
    ]
    rows += [("auto", f"{key}: {why}") for key, why in plan.reasons.items()]
    return facts("Plan", rows)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def write(plan: Plan, path: Path, measured: dict[str, Any] | None = None) -> None:
    """plan.json: the plan, and what was measured once the run is over."""
    values = asdict(plan) | {"measured": measured}
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
