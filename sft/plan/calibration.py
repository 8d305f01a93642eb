"""Calibrates the plan: tries the heaviest micro-batch of the run before step 1.

Where a GPU cannot hold it the token budget shrinks, which changes no result. What was measured is
kept beside what was predicted, and shows the next plan how far off such predictions were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, release_memory

from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.data.batches import Budget, MicroBatch
from sft.errors import OutOfMemory, oom_message
from sft.plan import dry_run, history
from sft.plan.choose import budget_values
from sft.plan.plan import Plan, make_plan, planner_of, replan
from sft.plan.report import write_resolved
from sft.plan.trace import Recorder
from sft.runtime.console import size
from sft.runtime.hardware import Hardware
from sft.tasks.base import Workload
from sft.train import recovery
from sft.train.engine import Engine


def make_common_plan(
    config: RunConfig, workload: Workload, machine: Hardware, accelerator: Accelerator
) -> Plan:
    """Returns the plan of the rank with the least memory, for all: a global batch that each rank
    cuts differently would not be whole. Collective."""
    plan = make_plan(config, workload, machine, accelerator.num_processes)
    if accelerator.num_processes == 1:
        return plan
    return min(gather_object([plan]), key=lambda each: each.available_bytes)


def calibrate(
    engine: Engine, plan: Plan, resolved: RunConfig, workload: Workload, machine: Hardware
) -> tuple[Plan, dict[str, Any]]:
    """Returns the plan with a budget that model and device can use, and the bytes measured.

    The task has that budget from then on, and the run folder is written again. Collective.
    """
    plan, resolved = _adopt_budget(engine, plan, resolved, workload, machine)
    train = resolved.train
    if train.engine != "ddp" or (plan.world_size > 1 and not machine.devices):
        return plan, {}  # what other engines and the buckets of DDP hold is not seen
    planner = planner_of(resolved, workload, machine, plan)

    def heaviest(budget: Budget) -> list[MicroBatch]:
        chosen, accumulates = planner.heaviest_micro_batch(budget, plan.gradient_checkpointing)
        return [chosen] * (2 if accumulates else 1)

    peak = fit_budget(engine, heaviest, plan.memory.breakdown["optimizer"])
    plan, _ = _adopt_budget(engine, plan, resolved, workload, machine)
    predicted = plan.memory.allocated
    compared = f"{size(peak)} measured, {size(predicted)} predicted"
    engine.log.say(f"memory of the heaviest micro-batch: {compared}")
    if engine.accelerator.is_main_process:
        history.append(planner.info.cache, plan.device, predicted, peak)
    return plan, {"heaviest_micro_batch_bytes": peak}


def _adopt_budget(
    engine: Engine, plan: Plan, resolved: RunConfig, workload: Workload, machine: Hardware
) -> tuple[Plan, RunConfig]:
    """Returns plan and configuration with the task's budget; writes both if they changed."""
    budget = engine.task.budget
    if budget != plan.budget:
        plan = replan(plan, resolved, workload, machine, budget)
        resolved = with_values(resolved, budget_values(budget))
        engine.train = resolved.train
        if engine.log.folder:
            write_resolved(resolved, plan, engine.log.folder)
    return plan, resolved


def fit_budget(
    engine: Engine, heaviest: Callable[[Budget], list[MicroBatch]], state_bytes: int
) -> int:
    """Halves the task's budget until every rank gets through `heaviest` of it; returns the bytes
    allocated at the peak. Collective.

    `state_bytes`: of the optimizer, which has no state before its first step. Raises OutOfMemory
    if not even the longest example fits.
    """
    task, longest = engine.task, max(engine.task.lengths)
    while True:
        peak, error = _try(engine, heaviest(task.budget), state_bytes)
        errors = [error] if engine.accelerator.num_processes == 1 else gather_object([error])
        reason = next(filter(None, errors), None)
        if reason is None:
            return peak
        tokens = task.budget.max_tokens
        if tokens <= longest:
            raise OutOfMemory(
                f"the longest example ({longest:,} tokens) does not fit the memory: {reason}; "
                "see what would take less with `make plan`"
            )
        task.budget = recovery.halve_budget(task.budget, longest)
        engine.log.say(
            f"a micro-batch of {tokens:,} tokens does not fit the memory: train.max_tokens is "
            f"{task.budget.max_tokens:,} from here on, with the same result"
        )


def _try(
    engine: Engine, micro_batches: list[MicroBatch], state_bytes: int
) -> tuple[int, str | None]:
    """Returns the bytes at the peak, and the device's message if it cannot hold that."""
    on_gpu = engine.accelerator.device.type == "cuda"
    try:
        return (_peak_on_gpu if on_gpu else _peak_on_cpu)(engine, micro_batches, state_bytes), None
    except Exception as error:
        if (reason := oom_message(error)) is None:
            raise
    release_memory()
    return 0, reason


def _peak_on_gpu(engine: Engine, micro_batches: list[MicroBatch], state_bytes: int) -> int:
    missing = 0 if engine.optimizer.state else state_bytes
    reserve = torch.empty(missing, dtype=torch.uint8, device=engine.accelerator.device)
    torch.cuda.reset_peak_memory_stats()
    engine.try_out(micro_batches)
    del reserve
    return torch.cuda.max_memory_allocated()


def _peak_on_cpu(engine: Engine, micro_batches: list[MicroBatch], state_bytes: int) -> int:
    recorder, states = Recorder(), engine.optimizer.state.values()
    for tensors in dry_run.tensors_by_use(engine.task.model).values():
        recorder.label_tensors(tensors, "kept")
    recorder.label_tensors((t for state in states for t in dry_run.tensors_in(state)), "kept")
    with recorder:
        engine.try_out(micro_batches)
    return recorder.trace.peak().num_bytes + (0 if states else state_bytes)
