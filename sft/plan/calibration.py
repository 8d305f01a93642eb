"""Tries the heaviest micro-batch of the run before step 1, and corrects the plan.

If a GPU cannot hold it, the token budget shrinks, which changes no result. The measured memory is
recorded beside the predicted one. It shows later plans how far off such predictions were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, release_memory

from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.data.batches import Budget, MicroBatch
from sft.errors import OutOfMemory
from sft.plan import dry_run, records, speed
from sft.plan.choose import Planner, budget_values
from sft.plan.counts import count_parameters
from sft.plan.plan import Plan, make_plan, planner_of
from sft.plan.report import write_resolved
from sft.plan.trace import Recorder
from sft.runtime.console import size
from sft.runtime.hardware import Hardware
from sft.tasks.base import Workload
from sft.train.engine import Engine
from sft.train.recovery import OomGuard, halve_budget


def make_common_plan(
    config: RunConfig, workload: Workload, machine: Hardware, accelerator: Accelerator
) -> Plan:
    """Returns the plan of the rank with the least memory, on all ranks. Collective.

    All ranks must cut a global batch in the same way, so they need one plan.
    """
    plan = make_plan(config, workload, machine, accelerator.num_processes)
    return min(gather_object([plan]), key=lambda each: each.available_bytes)


def calibrate(
    engine: Engine, plan: Plan, resolved: RunConfig, workload: Workload, machine: Hardware
) -> tuple[Plan, dict[str, Any]]:
    """Returns the plan with a budget that model and device can use, and the measured bytes.

    Gives the task that budget, and writes the plan of the run folder again. Collective.
    """
    plan, resolved = _adopt_budget(engine, plan, resolved, workload, machine)
    train = resolved.train
    others = train.engine != "ddp" or train.context_parallel > 1
    if others or (plan.world_size > 1 and not machine.devices):
        return plan, {}  # a trial would miss the memory of other engines and of DDP's buckets
    planner = planner_of(resolved, workload, machine, plan)

    def heaviest(budget: Budget) -> list[MicroBatch]:
        chosen, accumulates = planner.heaviest_micro_batch(budget, plan.rung.checkpointing)
        return [chosen] * (2 if accumulates else 1)

    peak = fit_budget(engine, heaviest, plan.memory.breakdown.get("optimizer", 0))
    plan, _ = _adopt_budget(engine, plan, resolved, workload, machine)
    predicted = plan.memory.allocated
    compared = f"{size(peak)} measured, {size(predicted)} predicted"
    engine.log.say(f"memory of the heaviest micro-batch: {compared}")
    if engine.accelerator.is_main_process:
        records.append_run(planner.info.cache, plan.device, predicted, peak)
    return plan, {"heaviest_micro_batch_bytes": peak}


def keep_speed(plan: Plan, planner: Planner, steps: float, seconds: float) -> None:
    """Adds the speed of a training of so many steps to those of the device."""
    if steps < speed.FEW_STEPS or not seconds:
        return
    counts = count_parameters(planner.config)
    recomputed = plan.memory.recomputed_share(plan.rung.checkpointing)
    flops = planner.flops(counts, recomputed, plan.tokens * steps / plan.steps)
    reached = flops / seconds / plan.world_size
    speed.append_speed(planner.info.cache, plan.device, planner.speed_kind(counts), reached)


def _adopt_budget(
    engine: Engine, plan: Plan, resolved: RunConfig, workload: Workload, machine: Hardware
) -> tuple[Plan, RunConfig]:
    """Returns plan and configuration with the task's budget; writes them if they changed."""
    budget = engine.task.budget
    if budget != plan.budget:
        resolved = with_values(resolved, budget_values(budget))
        engine.train = resolved.train
        changed = make_plan(resolved, workload, machine, plan.world_size)
        plan = replace(changed, budget=budget, reasons=plan.reasons)
        if engine.log.folder:
            write_resolved(resolved, plan, engine.log.folder)
    return plan, resolved


def fit_budget(
    engine: Engine, heaviest: Callable[[Budget], list[MicroBatch]], state_bytes: int
) -> int:
    """Halves the task's budget until `heaviest` of it runs on every rank.

    Returns the bytes allocated at the peak. `state_bytes`: size of the optimizer's state, which
    does not exist before the first step. Raises OutOfMemory if the longest example does not fit.
    Collective.
    """
    task, longest = engine.task, max(engine.task.lengths)
    while True:
        guard = OomGuard()
        peak = guard.call([], _measure_peak, engine, heaviest(task.budget), state_bytes)
        oom = next(filter(None, gather_object([guard.oom])), None)
        if oom is None:
            assert peak is not None
            return peak
        release_memory()
        tokens = task.budget.max_tokens
        if tokens <= longest:
            raise OutOfMemory(
                f"the longest example ({longest:,} tokens) does not fit the memory: {oom.reason}; "
                "`make plan` shows changes that save memory"
            )
        task.budget = halve_budget(task.budget, longest)
        engine.log.say(
            f"a micro-batch of {tokens:,} tokens does not fit the memory: train.max_tokens is "
            f"{task.budget.max_tokens:,} from here on; the result stays the same"
        )


def _measure_peak(engine: Engine, micro_batches: list[MicroBatch], state_bytes: int) -> int:
    """Returns the bytes allocated at the peak of these micro-batches."""
    device, states = engine.accelerator.device, engine.optimizer.state.values()
    missing = 0 if states else state_bytes
    if device.type == "cuda":
        placeholder = torch.empty(missing, dtype=torch.uint8, device=device)
        torch.cuda.reset_peak_memory_stats()
        engine.try_out(micro_batches)
        del placeholder
        return torch.cuda.max_memory_allocated()
    recorder = Recorder()
    for tensors in dry_run.tensors_by_use(engine.task.model).values():
        recorder.label_tensors(tensors, "kept")
    recorder.label_tensors((t for state in states for t in dry_run.tensors_in(state)), "kept")
    with recorder:
        engine.try_out(micro_batches)
    return recorder.trace.peak().num_bytes + missing
