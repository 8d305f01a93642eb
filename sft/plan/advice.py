"""Finds changes of the configuration that save memory, and compares GPUs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from sft.config.load import with_values
from sft.config.schema import Config, RunConfig
from sft.errors import ModelError, UserError
from sft.plan import gpus
from sft.plan.choose import LADDER, Planner, Rung
from sft.plan.dry_run import Window
from sft.plan.memory import Memory, predict
from sft.plan.plan import Plan, planner_of
from sft.runtime import hardware
from sft.runtime.console import bar, size
from sft.runtime.hardware import Hardware
from sft.tasks.base import Workload
from sft.tasks.registry import task_of
from sft.tasks.sft.task import FineTune


@dataclass(frozen=True)
class Advice:
    """A change of the configuration, and its effect on the planned step."""

    change: str  # in the form of overrides
    price: str  # its disadvantage, in words
    reserved_bytes: int
    saved_bytes: int
    fits: bool
    host_bytes: int = 0  # of what is in host memory then
    is_rung: bool = False  # it changes no result, so `auto` may choose it
    is_planned: bool = False


@dataclass(frozen=True)
class Setting:
    """A change to consider. A rung replaces `changes`, which then only name it."""

    changes: dict[str, Any]
    price: str
    window: Window
    rung: Rung | None = None


def advise(
    config: RunConfig,
    workload: Workload,
    machine: Hardware,
    plan: Plan,
    console: Console | None = None,
) -> list[Advice]:
    """Returns what the same micro-batch takes on each rung, and with changes that save memory.

    Rungs change no result. The changes after them do. Both are sorted from the cheapest on. Each
    takes seconds to trace, for which `console` shows the progress.
    """
    config = with_values(config, plan.rung.values)
    planner = planner_of(config, workload, machine, plan)
    result = []
    settings = _settings(config, workload, planner, plan)
    with bar(console, "other settings", len(settings)) as advance:
        for each in settings:
            if found := _consider(each, config, planner, plan):
                result.append(found)
            advance()
    return result


def _settings(config: RunConfig, workload: Workload, planner: Planner, plan: Plan) -> list[Setting]:
    window = planner.heaviest_window(plan.budget, plan.rung.checkpointing)
    result = []

    def add(changes: dict[str, Any], price: str, window: Window = window) -> None:
        result.append(Setting(changes, price, window))

    for rung in _rungs(planner, plan):
        shown = {key: value for key, value in rung.values.items() if value}
        result.append(Setting(shown or {GRADIENT_CHECKPOINTING: False}, "", window, rung))
    if config.train.optimizer == "adamw":
        for name, price in STATES.items():
            add({"train.optimizer": name}, price)
    early = {"train.optimizer_in_backward": True, "train.max_grad_norm": 0}
    add(early, "gradients are not clipped")
    if planner.precision == "bf16":
        pure = {"train.precision": "bf16_pure"}
        add(pure, "weights and moments in bf16, too")
        add(early | pure | {"train.optimizer": "torchao_adamw_8bit"}, "all of these")
    if config.train.engine == "ddp" and plan.world_size > 1:
        add({"train.engine": "fsdp"}, "weights are gathered in every pass")
    for each in task_of(config).alternatives(config, workload):
        add(each.values, each.price, _shorten(window, each.max_length or sys.maxsize))
    return result


def _consider(asked: Setting, config: RunConfig, planner: Planner, plan: Plan) -> Advice | None:
    """Returns the effect of a setting; None if it saves nothing or is not possible."""
    rung = asked.rung
    try:
        changed = with_values(config, rung.values if rung else asked.changes)
        memory = planner.predict(asked.window, changed, plan.micro_batches)
    except UserError:  # for example adapters on random weights, or on a layer of no known kind
        return None
    saved = plan.memory.reserved - memory.reserved
    if saved <= 0 and rung is None:
        return None
    change = " ".join(f"{key}={str(value).lower()}" for key, value in asked.changes.items())
    fits, price = planner.fits(memory), asked.price or _price_of(memory)
    sizes = (memory.reserved, saved, fits, sum(planner.host_parts(memory).values()))
    return Advice(change, price, *sizes, rung is not None, rung == plan.rung)


STATES = {  # optimizers with less state than AdamW's, which behave like it
    "adamw_8bit": "moments in 8 bits",
    "torchao_adamw_4bit": "moments in 4 bits",
}
GRADIENT_CHECKPOINTING = "train.gradient_checkpointing"


def _rungs(planner: Planner, plan: Plan) -> list[Rung]:
    """Returns the planned rung and all others that the task and the device have."""
    if planner.info.small:
        return []
    rungs = [rung for rung in LADDER if planner.device_type == "cuda" or not rung.offload]
    return rungs if plan.rung in rungs else [*rungs, plan.rung]


def _price_of(memory: Memory) -> str:
    """Returns what a rung costs: counted by the trace."""
    if memory.recomputed is None:
        return "unknown, as the step was not traced"
    prices = ["same result"]
    if memory.recomputed:
        prices.append(f"recomputes {memory.recomputed:.1%}")
    if memory.copied_bytes:
        prices.append(f"offloads {size(memory.copied_bytes)}")
    return ", ".join(prices)


def _shorten(window: Window, most: int) -> Window:
    """Returns the window with examples of at most `most` tokens."""
    shorter = tuple(
        tuple((min(n, most), min(s, most)) for n, s in rows) for rows in window.micro_batches
    )
    return replace(window, micro_batches=shorter)


COMPARED = ("4090", "L40S", "A100-40GB", "A100-80GB", "H100-80GB", "H200")


def compare_gpus(config: Config) -> list[dict[str, Any]]:
    """Compares ways of tuning, with and without gradient checkpointing, on the GPUs of COMPARED.

    Returns the bytes of one row of `data.max_seq_len` tokens, and how many rows each GPU holds.
    """
    workload, result = FineTune.uniform_workload(config), []
    length = workload.lengths[0]

    def usable_bytes(name: str) -> float:
        machine = replace(hardware.detect(), devices=gpus.named_gpus(name))
        return Planner(config, workload, machine, 1, "bf16", "padded").usable_bytes

    for mode in ("full", "lora", "qlora"):
        for checkpointing in (False, True):
            changes = {"tuning.mode": mode, "train.gradient_checkpointing": checkpointing}
            changed = with_values(config, changes | {"model.init": "pretrained"})
            windows = (Window((((length, length),) * n,), gradients=True) for n in (1, 2))
            try:
                one, two = (predict(changed, "bf16", w, on_gpu=True).reserved for w in windows)
            except ModelError:  # it cannot be checkpointed
                continue
            rows = {
                name: max(0, 1 + int((usable_bytes(name) - one) // max(1, two - one)))
                for name in COMPARED
            }
            row = {"mode": mode, "gradient_checkpointing": checkpointing}
            result.append(row | {"reserved_bytes": one, "per_row_bytes": two - one, "rows": rows})
    return result
