"""What the run will take, told before weights are loaded; and what the `auto` values become.

Parameters and their bytes are exact: the model is built on PyTorch's meta device, without storage.
Activations are a closed form, good to about a quarter, and labelled so wherever they are shown. The
token budget is the largest that fits the memory with a margin, and no larger than what saturates
the device.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from sft import batching, engine, processes
from sft.config import Config
from sft.hardware import Hardware, gib
from sft.log import facts
from sft.model import DTYPES, add_adapters, architecture
from sft.prepare import Prepared

MARGIN = 0.15  # of the available memory stays free: fragmentation, workspaces, other programs
SATURATING_TOKENS = {"cpu": 2048, "cuda": 16384}  # a larger micro-batch is no faster
# What one more micro-batch costs, in tokens (docs/LOG.md has the measurement). On a GPU it has not
# been measured: as few as the budget allows.
MICRO_BATCH_COST = {"cpu": 64, "cuda": None}
NF4_BYTES = 0.516  # per weight: 4 bits and the double-quantised scale of each block of 64
ADAM_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2.05, "paged_adamw_8bit": 2.05}
# Activations kept for the backward pass, bytes per token, layer and hidden unit in bf16.
ACTIVATION_BYTES = {"full": 65, "lora": 85, "qlora": 85, "checkpointing": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes per process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


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
    fixed, per_token = _memory(config, skeleton, precision, supervised)
    max_tokens, reasons["train.max_tokens"] = _max_tokens(
        config,
        max(lengths),
        fits=int((available * (1 - MARGIN) - fixed.total) / per_token),
        saturates=SATURATING_TOKENS[device],
    )
    budget = batching.Budget(max_tokens, layout, MICRO_BATCH_COST[device])
    ids = batching.global_batch_ids(len(lengths), engine.order_seed(train), 0, train.global_batch)
    cuts = batching.cut(ids, lengths, world_size, budget)
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
        memory=Memory(
            fixed.weights, fixed.gradients, fixed.optimizer, math.ceil(per_token * heaviest)
        ),
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


def _memory(
    config: Config, skeleton: nn.Module, precision: str, supervised: float
) -> tuple[Memory, float]:
    """(what does not depend on the budget, activation bytes per token of a micro-batch)."""
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
    kept = "checkpointing" if config.train.gradient_checkpointing else mode
    layers = arch.num_hidden_layers * arch.hidden_size * ACTIVATION_BYTES[kept] * width / 2
    if config.train.gradient_checkpointing:  # one layer is recomputed at a time
        layers += arch.hidden_size * ACTIVATION_BYTES[mode] * width / 2
    logits = supervised * arch.vocab_size * 12  # fp32 logits, their softmax and gradient
    optimizer = trained * ADAM_BYTES[config.train.optimizer]
    return Memory(round(weights), trained * 4, round(optimizer), 0), layers + logits


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
            f"about {gib(memory.total)} of {gib(plan.available_bytes)} per process: weights "
            f"{_mib(memory.weights)}, gradients {_mib(memory.gradients)}, optimizer "
            f"{_mib(memory.optimizer)}, activations {_mib(memory.activations)} (closed form)",
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
