"""Predicts memory, time and disk of a run before weights are loaded, and resolves `auto` values.

The order of the examples is known, and so is the heaviest window of the whole run, whose memory is
predicted. The token budget is the largest that fits with a margin, but no larger than one that
saturates the device. Activations are checkpointed only if the step does not fit otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from sft.config.schema import KeepWhole, RunConfig, Train
from sft.data import batches
from sft.errors import ConfigError
from sft.models.sequences import filled_heads
from sft.plan.choose import Planner, Rung, resolve_layout
from sft.plan.counts import count_parameters
from sft.plan.memory import COPIES, Memory
from sft.plan.network import Traffic
from sft.plan.records import PastRuns, read_past_runs
from sft.plan.speed import Time
from sft.runtime.console import size
from sft.runtime.disk import TOKENIZER_BYTES, Need, estimate_need
from sft.runtime.hardware import Hardware, resolve_precision
from sft.tasks.base import Labels, Workload
from sft.tasks.registry import task_of
from sft.train import schedule
from sft.train.parallel.trial import saved_state_bytes

ASSUMED_LINK = 25.0  # GB/s of a GPU, where LINK does not say it: 200 Gbit/s, or PCIe 4.0 x16
HOST_RATE = 20e9  # bytes/s of a process to and in host memory; an assumption
FEW_STEPS = 50  # with fewer updates, hardly anything is learnt at usual learning rates


@dataclass(frozen=True)
class Plan:
    """What a run will take, per process, and the values that `auto` becomes."""

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
    rung: Rung
    compile: bool
    keep_whole: KeepWhole
    micro_batch: int  # examples, at most, in the first step
    micro_batches: int  # per process in the first step
    num_parameters: int
    num_trained: int
    memory: Memory
    evaluation_bytes: int  # at the peak of the held-out loss; 0 without one
    generation_bytes: int  # while held-out prompts are answered; 0 without
    start_bytes: int  # of the model while weights are read
    context_bytes: int  # taken by the device for itself
    available_bytes: int
    usable_bytes: int  # available to a step: without the context and a margin
    host_usable_bytes: float  # RAM for what is kept there beside a GPU; infinite if unknown
    compute_seconds: float  # of the first step, on the busiest process
    moved_bytes: int  # of a process in a step, between its GPU and host memory
    host: dict[str, int]  # bytes that a process keeps in RAM beside a GPU, by use
    per_machine: int  # processes on a machine
    device: str
    past: PastRuns | None  # of earlier runs on the device
    time: Time | None  # of all steps, where the device's speed is known
    traffic: Traffic  # of the first step
    disk: Need
    labels: Labels
    reasons: dict[str, str]  # dotted configuration key -> why its `auto` has this value
    cost_per_hour: float | None = None  # of one process's device
    link: float | None = None  # GB/s that a process can send to others
    layout: dict[str, Any] = field(default_factory=dict)  # that `layouts` chose, by dotted key
    enough: int | None = None  # GPUs of this kind on which a step fits, if it does not on these
    is_question: bool = False  # about a model alone: there are no data, so no run to predict
    warnings: list[str] = field(default_factory=list)

    @property
    def missing_bytes(self) -> int:
        """Returns by how much the step exceeds the usable memory; 0 if it fits."""
        return max(0, self.memory.reserved - self.usable_bytes)

    @property
    def host_bytes(self) -> int:
        """Returns what a process keeps in host memory beside a GPU."""
        return sum(self.host.values())

    @property
    def cost(self) -> tuple[float, float] | None:
        """Returns the least and the most that the run costs; None without a price or a time."""
        if self.time is None or self.cost_per_hour is None:
            return None
        hourly = self.cost_per_hour * self.world_size
        return hourly * self.time.least / 3600, hourly * self.time.most / 3600

    @property
    def sent_bytes(self) -> int:
        """Returns what each process sends in a step."""
        return self.traffic.sent(self.world_size)

    @property
    def step_seconds(self) -> float:
        """Returns how long a step takes, to compare layouts: nothing runs beside anything else."""
        link = self.link or ASSUMED_LINK
        exchange = self.sent_bytes / 1e9 / link
        return self.compute_seconds + exchange + self.moved_bytes / HOST_RATE

    @property
    def fits(self) -> bool:
        return not self.missing_bytes and self.host_bytes <= self.host_usable_bytes

    @property
    def verdict(self) -> str:
        """Returns whether the step fits the memory of each process, and by how much."""
        if self.missing_bytes:
            return f"does not fit: {size(self.missing_bytes)} more than fits with a margin"
        if self.host_bytes > self.host_usable_bytes:
            return f"does not fit the host: {size(self.host_bytes)} are kept there"
        return f"fits: {size(self.usable_bytes - self.memory.reserved)} are left beside a margin"


def make_plan(
    config: RunConfig,
    workload: Workload,
    machine: Hardware,
    world_size: int,
    is_question: bool = False,
) -> Plan:
    """Plans the run, or one batch if `is_question`.

    Raises ConfigError for a global batch that so many processes cannot make.
    """
    refuse_sharing(config, workload, world_size)
    precision, why_precision = resolve_precision(config.train, machine.devices)
    layout, why_layout = resolve_layout(config, precision, bool(machine.devices))
    planner = Planner(config, workload, machine, world_size, precision, layout)
    choice, why_rung = planner.choose()
    choice, kept, why_kept = planner.choose_kept(choice)
    info, counts = planner.info, count_parameters(config)
    cuts, budget, global_batch = choice.cuts, choice.budget, len(planner.ids_of_step(0))
    hold = f"{budget.max_tokens:,} tokens"
    steps = schedule.total_steps(config.train, len(workload.lengths))
    per_epoch = sum(workload.lengths)
    tokens = round(per_epoch * steps * global_batch / len(workload.lengths))
    compiles, why_compile = planner.choose_compile(counts, tokens)
    reasons = {
        "precision": why_precision,
        "layout": why_layout,
        "gradient_checkpointing": why_rung,
        "activation_offload": why_rung if choice.rung.offload else "not needed",
        "compile": why_compile,
        "keep_whole": why_kept,
        "max_tokens": choice.why,
        "micro_batch": f"what {hold} hold",
        "gradient_accumulation_steps": f"{global_batch} {info.labels.examples} in {world_size} "
        f"process(es) of micro-batches of at most {hold}",
    }
    if is_question:
        del reasons["compile"]  # it depends on the length of a run
    if not machine.devices:
        reasons["activation_offload"] = "on a CPU it would save nothing"
    if config.train.engine != "fsdp":
        del reasons["keep_whole"]
    autos = {key: why for key, why in reasons.items() if getattr(config.train, key) == "auto"}
    evaluation = planner.predict_evaluation(budget, kept)
    recomputed = choice.memory.recomputed_share(choice.rung.checkpointing)
    traffic = planner.traffic(choice, kept)
    plan = Plan(
        num_examples=len(workload.lengths),
        num_held_out=len(workload.held_out.lengths) if workload.held_out else 0,
        tokens_per_epoch=per_epoch,
        supervised_share=int(workload.supervised.sum()) / per_epoch,
        steps=steps,
        tokens=tokens,
        global_batch=global_batch,
        world_size=world_size,
        budget=budget,
        precision=precision,
        rung=choice.rung,
        compile=compiles,
        keep_whole=kept,
        micro_batch=max(len(m) for rank in cuts for m in rank),
        micro_batches=len(cuts[0]),
        num_parameters=counts.parameters,
        num_trained=counts.trained,
        memory=choice.memory,
        evaluation_bytes=evaluation.allocated if evaluation else 0,
        generation_bytes=planner.answering_bytes(evaluation) if evaluation else 0,
        start_bytes=planner.start_bytes(choice.memory),
        context_bytes=planner.context_bytes,
        available_bytes=planner.available_bytes,
        usable_bytes=int(planner.usable_bytes),
        host_usable_bytes=planner.host_usable_bytes,
        compute_seconds=planner.compute_seconds(counts, recomputed, planner.busiest_tokens(choice)),
        moved_bytes=planner.moved_bytes(choice, traffic),
        host=planner.host_parts(choice.memory),
        per_machine=planner.per_machine,
        device=planner.device_name,
        past=read_past_runs(info.cache, planner.device_name),
        time=planner.time(counts, recomputed, tokens),
        traffic=traffic,
        disk=predict_disk(config, len(workload.lengths)),
        labels=info.labels,
        reasons={f"train.{key}": why for key, why in autos.items()},
        is_question=is_question,
    )
    heads = getattr(info.sizes, "num_attention_heads", None)
    return replace(plan, warnings=_warnings(plan, config.train, heads))


def refuse_processes(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError if so many processes cannot be divided into those that share sequences."""
    size = config.train.context_parallel
    if world_size % size:
        raise ConfigError(
            f"train.context_parallel: {size} processes share a sequence, so the number of "
            f"processes must be a multiple of {size}, found {world_size}: launch so many, or set 1"
        )


def refuse_sharing(config: RunConfig, workload: Workload, world_size: int) -> None:
    """Raises ConfigError if so many processes cannot share these sequences as `config` says."""
    size = config.train.context_parallel
    if size == 1:
        return
    refuse_processes(config, world_size)
    info = task_of(config).info(config)
    parts = (part.lengths for part in (workload, workload.held_out) if part)
    longest, most = max(max(each, default=0) for each in parts), info.most_shared_tokens
    if longest > most:
        raise ConfigError(
            "train.context_parallel: how this model places the tokens of a row of more than "
            f"{most:,} tokens depends on the whole row, of which a process has a part, and the "
            f"longest row has {longest:,}: set 1, or data.max_seq_len: {most}"
        )


def predict_disk(config: RunConfig, num_examples: int) -> Need:
    """Returns the bytes that a run on `num_examples` examples writes."""
    info = task_of(config).info(config)
    steps = schedule.total_steps(config.train, num_examples)
    counts = count_parameters(config)
    state = saved_state_bytes(config.train, counts.shapes)
    per_epoch = batches.steps_per_epoch(num_examples, config.train.global_batch)
    sizes = counts.trained, state, info.vocabulary
    written = estimate_need(config.train, *sizes, steps, per_epoch)
    if info.mode == "full":
        return written
    base = counts.parameters - counts.trained
    return replace(written, merged=2 * base + info.vocabulary * TOKENIZER_BYTES)


def _warnings(plan: Plan, train: Train, heads: int | None) -> list[str]:
    result = []
    if heads and (idle := filled_heads(train.context_parallel, heads, heads)[0] - heads):
        result.append(
            f"train.context_parallel: {heads} heads of attention for {train.context_parallel} "
            f"processes: {idle} of {heads + idle} are zeros, which take time and memory; a divisor "
            f"of {heads} needs none"
        )
    copies = plan.host.get(COPIES, 0)
    less = f"; train.checkpoint_async=false takes {size(copies)} less" if copies else ""
    if plan.missing_bytes:
        result.append(
            f"one micro-batch takes {size(plan.memory.reserved + plan.context_bytes)} of the "
            f"{size(plan.available_bytes)} per process of {plan.device}, "
            f"{size(plan.missing_bytes)} more than fits with a margin: expect to run out of memory"
            f"{less if not plan.context_bytes else ''}"
        )
    if plan.start_bytes > plan.usable_bytes and not plan.missing_bytes:
        result.append(
            f"the start takes {size(plan.start_bytes)} of each process, which does not fit: this "
            "run reads the whole model on every process before it is split (docs/LAUNCH.md)"
        )
    if plan.host_bytes > plan.host_usable_bytes:
        result.append(
            f"{size(plan.host_bytes)} per process are kept in host memory, of which each "
            f"has {size(int(plan.host_usable_bytes))}: expect to run out of it{less}"
        )
    if train.activation_offload is True and not plan.context_bytes:
        result.append("train.activation_offload saves nothing on a CPU: its copies are in RAM, too")
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
    if plan.steps < (warmup := schedule.warmup_steps(train, plan.steps)):
        result.append(
            f"the run has {plan.steps:,} step(s), fewer than the {warmup:,} of its warm-up: the "
            "learning rate never reaches its peak; lower train.warmup_steps"
        )
    if plan.steps < FEW_STEPS and not plan.is_question:
        result.append(_few_steps(plan, train.max_steps))
    return result


def _few_steps(plan: Plan, max_steps: int | None) -> str:
    """Returns the warning about a run that makes few updates, with the remedy."""
    steps, batch, examples = plan.steps, plan.global_batch, plan.labels.examples
    if steps == max_steps:
        remedy = "raise train.max_steps"
    else:
        epochs = math.ceil(FEW_STEPS * batch / plan.num_examples)
        smaller = max(1, batch * steps // FEW_STEPS)
        remedy = f"give more rows, train.epochs={epochs}, or train.global_batch={smaller}"
    return (
        f"{steps} step{'s' if steps > 1 else ''} of {batch} {examples}: a model hardly learns in "
        f"fewer than about {FEW_STEPS}; {remedy}"
    )


def resolved_values(plan: Plan) -> dict[str, Any]:
    """Returns the values that `auto` became, by dotted key.

    `micro_batch` and `gradient_accumulation_steps` stay `auto`: they follow from `max_tokens`.
    """
    cut = ("micro_batch", "gradient_accumulation_steps")
    values = {f"train.{key}": value for key, value in chosen_values(plan).items() if key not in cut}
    return {key: value for key, value in values.items() if key in plan.reasons}


def planner_of(config: RunConfig, workload: Workload, machine: Hardware, plan: Plan) -> Planner:
    """Returns the planner with the precision and the layout of a plan."""
    return Planner(config, workload, machine, plan.world_size, plan.precision, plan.budget.layout)


def chosen_values(plan: Plan) -> dict[str, Any]:
    """Returns the values of `train` that `auto` would become, configured ones included."""
    kept = {} if plan.keep_whole == "auto" else {"keep_whole": plan.keep_whole}  # FSDP2's only
    return {
        "precision": plan.precision,
        "layout": plan.budget.layout,
        **{key.removeprefix("train."): value for key, value in plan.rung.values.items()},
        "compile": plan.compile,
        **kept,
        "max_tokens": plan.budget.max_tokens,
        "micro_batch": plan.micro_batch,
        "gradient_accumulation_steps": plan.micro_batches,
    }
