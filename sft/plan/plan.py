"""What the run will take, told before weights are loaded; and what the `auto` values become.

The heaviest window of the whole run is looked for (it is known, because the order is), and its
memory predicted (`memory`). The token budget is the largest that fits with a margin, and no larger
than what saturates the device; activations are checkpointed where nothing else makes room.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.data import batches
from sft.plan import counts as plan_counts
from sft.plan import history
from sft.plan.choose import Planner, of_budget, resolve_layout
from sft.plan.history import Past
from sft.plan.memory import Memory
from sft.runtime.console import size
from sft.runtime.disk import TOKENIZER_BYTES, Need, need
from sft.runtime.hardware import Hardware
from sft.runtime.precision import resolve_precision
from sft.tasks.base import Labels, Workload
from sft.tasks.registry import task_of
from sft.train import schedule


@dataclass(frozen=True)
class Plan:
    num_examples: int
    num_held_out: int
    tokens_per_epoch: int
    supervised_share: float
    steps: int
    tokens: int  # over all steps
    global_batch: int
    world_size: int
    budget: batches.Budget
    precision: str
    gradient_checkpointing: bool
    micro_batch: int  # examples, at most, in the first step
    micro_batches: int  # of each process in the first step
    num_parameters: int
    num_trained: int
    memory: Memory
    evaluation_bytes: int  # at the peak of the held-out loss; 0 without one
    generation_bytes: int  # while held-out prompts are answered; 0 without
    context_bytes: int  # taken by the device for itself
    available_bytes: int
    usable_bytes: int  # of them for a step: without the context and a margin
    device: str
    past: Past | None  # what earlier runs on it have shown
    seconds: float | None  # of all steps, where the device's speed is known
    disk: Need
    labels: Labels
    reasons: dict[str, str]  # dotted configuration key -> why its `auto` became what it is
    warnings: list[str] = field(default_factory=list)

    @property
    def missing_bytes(self) -> int:
        """By which the step exceeds what is available with the margin; 0 if it fits."""
        return max(0, self.memory.reserved - self.usable_bytes)


def make_plan(config: RunConfig, workload: Workload, machine: Hardware, world_size: int) -> Plan:
    """Raises ConfigError for an effective batch that so many processes cannot make."""
    train = config.train
    precision, why_precision = resolve_precision(train, machine.devices)
    layout, why_layout = resolve_layout(config, precision, bool(machine.devices))
    own = task_of(config).info(config)
    at = Planner(config, workload, machine, world_size, precision, layout)
    choice, why_checkpointing = at.choose()
    counts = plan_counts.counts(config)
    cuts, budget = choice.cuts, choice.budget
    reasons = {
        "train.precision": why_precision,
        "train.layout": why_layout,
        "train.gradient_checkpointing": why_checkpointing,
        "train.max_tokens": choice.why,
        "train.micro_batch": f"what {budget.max_tokens:,} tokens hold",
        "train.gradient_accumulation_steps": f"{len(at.first)} {own.labels.examples} in "
        f"{world_size} process(es) of micro-batches of at most {budget.max_tokens:,} tokens",
    }
    evaluation = at.evaluation(budget)
    steps = schedule.total_steps(train, len(workload.lengths))
    per_epoch = sum(workload.lengths)
    tokens = round(per_epoch * steps * len(at.first) / len(workload.lengths))
    made = Plan(
        num_examples=len(workload.lengths),
        num_held_out=len(workload.held_out.lengths) if workload.held_out else 0,
        tokens_per_epoch=per_epoch,
        supervised_share=int(workload.supervised.sum()) / per_epoch,
        steps=steps,
        tokens=tokens,
        global_batch=len(at.first),
        world_size=world_size,
        budget=budget,
        precision=precision,
        gradient_checkpointing=choice.checkpointing,
        micro_batch=max(len(m) for rank in cuts for m in rank),
        micro_batches=len(cuts[0]),
        num_parameters=counts.parameters,
        num_trained=counts.trained,
        memory=choice.memory,
        evaluation_bytes=evaluation.allocated if evaluation else 0,
        generation_bytes=at.answering(evaluation) if evaluation else 0,
        context_bytes=at.context_bytes,
        available_bytes=at.available_bytes,
        usable_bytes=int(at.usable_bytes),
        device=at.name,
        past=history.past(own.cache, at.name),
        seconds=at.seconds(counts, choice.checkpointing, tokens),
        disk=disk(config, len(workload.lengths)),
        labels=own.labels,
        reasons={k: why for k, why in reasons.items() if getattr(train, k.split(".")[1]) == "auto"},
    )
    return replace(made, warnings=_warnings(made))


def disk(config: RunConfig, num_examples: int) -> Need:
    """What a run on so many examples writes."""
    own = task_of(config).info(config)
    steps = schedule.total_steps(config.train, num_examples)
    counted = plan_counts.counts(config)
    needed = need(config.train, counted.trained, own.vocabulary, steps)
    if own.mode == "full":
        return needed
    base = counted.parameters - counted.trained
    return replace(needed, merged=2 * base + own.vocabulary * TOKENIZER_BYTES)


def _warnings(plan: Plan) -> list[str]:
    result = []
    if plan.missing_bytes:
        result.append(
            f"one micro-batch takes {size(plan.memory.reserved + plan.context_bytes)} of the "
            f"{size(plan.available_bytes)} per process of {plan.device}, "
            f"{size(plan.missing_bytes)} more than fits with a margin: expect to run out of memory"
        )
    if plan.evaluation_bytes > plan.usable_bytes:
        result.append(
            f"the held-out loss takes {size(plan.evaluation_bytes)}, which does not fit: a smaller "
            f"train.max_tokens or {plan.labels.eval_remedy} help"
        )
    if plan.generation_bytes > plan.usable_bytes:
        result.append(
            f"{plan.labels.answers} takes {size(plan.generation_bytes)}, which does not fit: "
            f"lower {plan.labels.answers_key}"
        )
    return result


def resolved_values(plan: Plan) -> dict[str, Any]:
    """Dotted configuration keys -> the values that `auto` became; those of the cut stay `auto`,
    since they follow from `max_tokens`."""
    cut = ("micro_batch", "gradient_accumulation_steps")
    values = {f"train.{key}": value for key, value in chosen(plan).items() if key not in cut}
    return {key: value for key, value in values.items() if key in plan.reasons}


def replanned(
    plan: Plan,
    config: RunConfig,
    workload: Workload,
    machine: Hardware,
    budget: batches.Budget,
) -> Plan:
    """The plan with another budget."""
    changes = {"train.gradient_checkpointing": plan.gradient_checkpointing, **of_budget(budget)}
    made = make_plan(with_values(config, changes), workload, machine, plan.world_size)
    return replace(made, budget=budget, reasons=plan.reasons)


def planner(config: RunConfig, workload: Workload, machine: Hardware, plan: Plan) -> Planner:
    """That which was planned."""
    return Planner(config, workload, machine, plan.world_size, plan.precision, plan.budget.layout)


def chosen(plan: Plan) -> dict[str, Any]:
    """The values of `train` that `auto` becomes, `auto` or not."""
    return {
        "precision": plan.precision,
        "layout": plan.budget.layout,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "max_tokens": plan.budget.max_tokens,
        "micro_batch": plan.micro_batch,
        "gradient_accumulation_steps": plan.micro_batches,
    }
