"""Finds changes of the configuration that save memory, and compares GPUs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from sft.config.load import with_values
from sft.config.schema import Config, RunConfig
from sft.errors import UserError
from sft.plan import gpus, memory
from sft.plan.choose import Planner
from sft.plan.dry_run import Window
from sft.plan.plan import Plan, planner_of
from sft.runtime import hardware
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


def advise(config: RunConfig, workload: Workload, machine: Hardware, plan: Plan) -> list[Advice]:
    """Returns changes that save memory with the same micro-batch, cheapest first."""
    config = with_values(config, {"train.gradient_checkpointing": plan.gradient_checkpointing})
    planner = planner_of(config, workload, machine, plan)
    window = planner.heaviest_window(plan.budget, plan.gradient_checkpointing)
    result = []

    def consider(price: str, changes: dict[str, Any], window: Window = window) -> None:
        try:
            changed = with_values(config, changes)
            reserved = planner.predict(window, changed, plan.micro_batches).reserved
        except UserError:  # for example adapters on random weights, or on a layer of no known kind
            return
        saved = plan.memory.reserved - reserved
        if saved > 0:
            change = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
            fits = reserved <= planner.usable_bytes
            result.append(Advice(change, price, reserved, saved, fits))

    if not plan.gradient_checkpointing:
        consider("about 25 % slower, the same result", {"train.gradient_checkpointing": True})
    if config.train.optimizer == "adamw":
        consider("moments in 8 bits", {"train.optimizer": "adamw_8bit"})
    if config.train.engine == "ddp" and plan.world_size > 1:
        consider("weights are gathered in every pass", {"train.engine": "fsdp"})
    for each in task_of(config).alternatives(config, workload):
        consider(each.price, each.values, _shorten(window, each.max_length or sys.maxsize))
    return result


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
            one, two = (memory.predict(changed, "bf16", w, on_gpu=True).reserved for w in windows)
            rows = {
                name: max(0, 1 + int((usable_bytes(name) - one) // max(1, two - one)))
                for name in COMPARED
            }
            row = {"mode": mode, "gradient_checkpointing": checkpointing}
            result.append(row | {"reserved_bytes": one, "per_row_bytes": two - one, "rows": rows})
    return result
