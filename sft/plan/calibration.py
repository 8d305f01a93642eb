"""Predictions held against the machine: the heaviest micro-batch of the run is tried before step 1.

Where a GPU cannot hold it the token budget shrinks, which changes no result. What was measured is
kept beside what was predicted, and tells the next plan how far off such predictions were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sft.config.load import with_values
from sft.config.schema import Configured, RunConfig
from sft.data import batches
from sft.data.batches import Budget, MicroBatch
from sft.errors import OutOfMemory
from sft.plan import dry_run, history
from sft.plan.choose import of_budget
from sft.plan.plan import Plan, make_plan, planner, replanned
from sft.plan.report import keep
from sft.plan.trace import Recorder
from sft.runtime import oom
from sft.runtime.console import size
from sft.runtime.hardware import Hardware
from sft.runtime.log import Log
from sft.tasks.base import Workload
from sft.train import recovery
from sft.train.engine import Engine


def fitting(
    engine: Engine,
    budget: Budget,
    heaviest: Callable[[Budget], list[MicroBatch]],
    state_bytes: int,
) -> tuple[Budget, int]:
    """`budget`, or the largest of its halves with which every rank gets through `heaviest`; and the
    bytes allocated at the peak of that. Collective.

    `state_bytes`: of the optimizer, which has no state before its first step. Raises OutOfMemory
    if not even the longest example fits.
    """
    longest = max(engine.task.lengths)
    while True:
        peak, error = _tried(engine, heaviest(budget), state_bytes)
        errors = [error] if engine.accelerator.num_processes == 1 else gather_object([error])
        found = [each for each in errors if each]
        if not found:
            return budget, peak
        if budget.max_tokens <= longest:
            raise OutOfMemory(
                f"the longest example ({longest:,} tokens) does not fit the memory: {found[0]}; "
                "see what would take less with `make plan`"
            )
        smaller = recovery.halve_budget(budget, longest)
        told = f"a micro-batch of {budget.max_tokens:,} tokens does not fit the memory"
        engine.log.say(
            f"{told}: train.max_tokens is {smaller.max_tokens:,} from here on, with the same result"
        )
        budget = smaller


def _tried(
    engine: Engine, micro_batches: list[MicroBatch], state_bytes: int
) -> tuple[int, str | None]:
    """(bytes at the peak, what the device says if it cannot hold that)."""
    on_gpu = engine.accelerator.device.type == "cuda"
    try:
        return (_on_gpu if on_gpu else _on_cpu)(engine, micro_batches, state_bytes), None
    except Exception as error:
        if (reason := oom.oom_message(error)) is None:
            raise
    oom.release_memory()
    return 0, reason


def _on_gpu(engine: Engine, micro_batches: list[MicroBatch], state_bytes: int) -> int:
    missing = 0 if engine.optimizer.state else state_bytes
    room = torch.empty(missing, dtype=torch.uint8, device=engine.accelerator.device)
    torch.cuda.reset_peak_memory_stats()
    engine.try_out(micro_batches)
    del room
    return torch.cuda.max_memory_allocated()


def _on_cpu(engine: Engine, micro_batches: list[MicroBatch], state_bytes: int) -> int:
    recorder, states = Recorder(), engine.optimizer.state.values()
    for tensors in dry_run.held(engine.task.model).values():
        recorder.name(tensors, "held")
    recorder.name((t for state in states for t in dry_run.tensors_of(state)), "held")
    with recorder:
        engine.try_out(micro_batches)
    return recorder.trace.peak().num_bytes + (0 if states else state_bytes)


# --- in a run ----------------------------------------------------------------------------------


def make_together(
    config: RunConfig, workload: Workload, machine: Hardware, accelerator: Accelerator
) -> Plan:
    """One plan for all ranks, that of the one with the least memory: cut differently by each, the
    global batch would not be whole. Collective."""
    made = make_plan(config, workload, machine, accelerator.num_processes)
    if accelerator.num_processes == 1:
        return made
    return min(gather_object([made]), key=lambda each: each.available_bytes)


def confirm_on(
    engine: Engine, planned: Plan, resolved: RunConfig, workload: Workload, machine: Hardware
) -> tuple[Plan, dict[str, Any]]:
    """The plan with a budget that the device holds, which the engine has from then on, and what of
    it was measured. Collective."""
    train = resolved.train
    if train.engine != "ddp" or (planned.world_size > 1 and not machine.devices):
        return planned, {}  # what other engines and the buckets of DDP hold is not seen
    at = planner(resolved, workload, machine, planned)

    def heaviest(budget: batches.Budget) -> list[batches.MicroBatch]:
        chosen, accumulates = at.heaviest(budget, planned.gradient_checkpointing)
        return [chosen] * (2 if accumulates else 1)

    state = planned.memory.breakdown["optimizer"]
    budget, peak = fitting(engine, planned.budget, heaviest, state)
    if budget != planned.budget:
        planned = replanned(planned, resolved, workload, machine, budget)
        engine.budget = engine.task.budget = budget
        with_budget(resolved, planned, engine.log)
    predicted = planned.memory.allocated
    told = f"{size(peak)} measured, {size(predicted)} predicted"
    engine.log.say(f"memory of the heaviest micro-batch: {told}")
    if engine.accelerator.is_main_process:
        history.remember(at.info.cache, planned.device, predicted, peak)
    return planned, {"heaviest_micro_batch_bytes": peak}


def with_budget(resolved: Configured, planned: Plan, log: Log) -> Configured:
    """The resolved configuration with the plan's budget; both are written again."""
    resolved = with_values(resolved, of_budget(planned.budget))
    if log.folder:
        keep(resolved, planned, log.folder)
    return resolved
