"""Makes the tables of a plan, and writes plan.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sft.config.load import dump_config
from sft.config.schema import RunConfig
from sft.plan.advice import COMPARED, Advice
from sft.plan.allocator import MIB
from sft.plan.layouts import GAIN
from sft.plan.plan import ASSUMED_LINK, Plan, chosen_values
from sft.plan.speed import Time
from sft.runtime import plain
from sft.runtime.console import duration, facts, size, table, write_json

NUM_LAYOUTS = 8  # that are shown
LAUNCH_SECONDS = 0.05  # if a micro-batch takes less, a GPU mostly waits for kernel launches
WORK = (  # values of a plan in the section "work" of plan.json
    *("num_examples", "num_held_out", "tokens_per_epoch", "supervised_share", "steps", "tokens"),
    *("global_batch", "world_size", "num_parameters", "num_trained"),
)


def plan_table(plan: Plan) -> Table:
    """Returns the plan as a table for the terminal."""
    labels = plan.labels
    cut = f"{plan.world_size} process{'es' if plan.world_size > 1 else ''} x {plan.micro_batches}"
    examples = f"{plan.num_examples:,}{labels.each} to train on, {plan.num_held_out:,} held out"
    supervised = f"{plan.supervised_share:.0%} {labels.items}"
    most = f"at most {plan.budget.max_tokens:,} tokens, {plan.budget.layout}"
    if plan.budget.shared_by > 1:
        most += f", each row shared by {plan.budget.shared_by} processes"
    rows: list[tuple[str, str | Text]] = [
        (labels.examples, examples),
        (
            "tokens",
            f"{plan.tokens_per_epoch:,} per epoch ({supervised}), {plan.tokens:,} in total",
        ),
        ("steps", f"{plan.steps:,} of {plan.global_batch} {labels.examples}"),
    ]
    if plan.is_question:
        each = plan.tokens_per_epoch // plan.num_examples
        rows = [("question", f"one batch of {plan.num_examples:,} rows of {each:,} tokens")]
    rows.append(("verdict", Text(plan.verdict, "bold green" if plan.fits else "bold red")))
    if plan.layout and not plan.fits:
        rows.append(("missing", _missing(plan)))
    if plan.layout:
        rows.append(("layout", "\n".join(_overrides(plan))))
    rows += [
        ("batch", f"{cut} micro-batch(es) of {most}"),
        ("trained", f"{plan.num_trained:,} of {plan.num_parameters:,} parameters"),
        ("memory", _memory(plan)),
    ]
    if plan.host:
        rows.append(("host memory", _host(plan)))
    if plan.world_size > 1:
        start = f"{size(plan.start_bytes)} of the model per process, at most, while it is read"
        rows.append(("start", start))
    rows.append(("disk", str(plan.disk)))
    if plan.evaluation_bytes:
        loss, answers = size(plan.evaluation_bytes), size(plan.generation_bytes)
        rows.append(("evaluation", f"{loss} for the held-out loss, {answers} for {labels.answers}"))
    if plan.time is not None:
        rows.append(("time", _time(plan, plan.time)))
    if plan.world_size > 1:
        rows.append(("network", _network(plan)))
    if plan.cost_per_hour is not None:
        rows.append(("cost", _cost(plan, plan.cost_per_hour)))
    values = chosen_values(plan)
    rows += [
        ("auto", f"{key}={values[key.removeprefix('train.')]}: {why}")
        for key, why in plan.reasons.items()
    ]
    rows += [("warning", Text(text, "red")) for text in plan.warnings]
    return facts("Plan", rows)


def _overrides(plan: Plan) -> list[str]:
    """Returns the layout that was chosen, as overrides of a configuration."""
    return [f"{key}={str(value).lower()}" for key, value in plan.layout.items()]


def _missing(plan: Plan) -> str:
    """Returns what would have to be there for a step to fit."""
    lacks = f"{size(plan.missing_bytes)} on each GPU"
    if not plan.missing_bytes:
        lacks = f"{size(int(plan.host_bytes - plan.host_usable_bytes))} of RAM for each process"
    if plan.enough is None:
        return f"{lacks}; no number of such GPUs is known to be enough"
    return f"{lacks}; {plan.enough} such GPUs would be enough"


def _memory(plan: Plan) -> str:
    memory, past = plan.memory, plan.past
    parts = ", ".join(f"{k} {size(part)}" for k, part in memory.breakdown.items() if part >= MIB)
    reserved = f" ({size(memory.reserved)} reserved)" if plan.context_bytes else ""
    context = f", context {size(plan.context_bytes)} (assumed)" if plan.context_bytes else ""
    span = f"{100 * (1 + past.least):.1f} to {100 * (1 + past.most):.1f} %" if past else ""
    seen = f"; {past.runs} earlier runs took {span} of their prediction" if past else ""
    return (
        f"{size(memory.allocated)}{reserved} of {size(plan.available_bytes)} per process: "
        f"{parts}{context} ({memory.method}{seen})"
    )


def _host(plan: Plan) -> str:
    """Returns what is kept in RAM beside GPUs, and what a machine needs for it."""
    parts = ", ".join(f"{use} {size(each)}" for use, each in plan.host.items())
    known = plan.host_usable_bytes < math.inf
    has = f" of {size(int(plan.per_machine * plan.host_usable_bytes))}" if known else ""
    return (
        f"{size(plan.host_bytes)} per process: {parts}; a machine with {plan.per_machine} "
        f"process{'es' if plan.per_machine > 1 else ''} needs "
        f"{size(plan.per_machine * plan.host_bytes)}{has}"
    )


def _time(plan: Plan, time: Time) -> str:
    if not time.runs and time.seconds < LAUNCH_SECONDS * plan.steps * plan.micro_batches:
        return "mostly kernel launches, as the micro-batches are so small; measured before step 1"
    what, span = " for the batch" if plan.is_question else "", _span(time.least, time.most)
    share = ""
    if time.shares:
        low, high = (f"{100 * each:.0f}" for each in time.shares)
        share = low if low == high else f"{low} to {high}"
    if not time.runs:
        return f"{span}{what}, if {share} % of the GPU's peak is reached; not measured on this GPU"
    between = "" if time.runs == 1 else f" ({span})"
    runs = f"{time.runs} earlier run{'s' if time.runs > 1 else ''} on this device"
    reached = f" at {share} % of its peak" if share else ""
    return f"about {duration(time.seconds)}{what}{between}, from {runs}{reached}"


def _span(least: float, most: float) -> str:
    low, high = duration(least), duration(most)
    return low if low == high else f"{low} to {high}"


def _network(plan: Plan) -> str:
    sent = f"each process sends {size(plan.sent_bytes)} in a step"
    if plan.link is None and not plan.layout:
        return sent
    link = plan.link or ASSUMED_LINK
    at = f"at {link:g} GB/s" + (" (assumed: give LINK)" if plan.link is None else "")
    took = plan.sent_bytes / 1e9 / link
    return f"{sent}: {took:,.3g} s {at}, beside the computation or after it"


def _cost(plan: Plan, per_hour: float) -> str:
    if plan.cost is None:
        return "unknown, since the speed of this device is unknown"
    low, high = (f"{each:,.2f}" for each in plan.cost)
    processes = f" x {plan.world_size}" if plan.world_size > 1 else ""
    return f"{low if low == high else f'{low} to {high}'}, at {per_hour:,.2f} an hour{processes}"


def memory_table(plan: Plan) -> Table:
    """Returns a table of the parts of the peak, each with a bar."""
    parts = dict(plan.memory.breakdown)
    if plan.context_bytes:
        parts["reserved, not allocated"] = plan.memory.reserved - plan.memory.allocated
        parts["context (assumed)"] = plan.context_bytes
    total = sum(parts.values())

    def cell(part: int, note: str, style: str = "") -> Text:
        return Text(f"{size(part):>9}  {note}", style)

    rows: list[tuple[str, str | Text]] = [
        (name, cell(part, f"{'█' * round(40 * part / total)} {part / total:.0%}"))
        for name, part in parts.items()
    ]
    share = total / plan.available_bytes
    note = f"{share:.0%} of {size(plan.available_bytes)}"
    rows.append(("total", cell(total, note, "red" if share > 1 else "bold")))
    return facts(f"Peak memory: {plan.device}", rows)


def advice_table(found: list[Advice]) -> Table:
    """Returns a table of rungs and of changes that save memory; those that do not fit are dim."""
    rows = []
    for each in found:
        fits = "planned" if each.is_planned else "fits" if each.fits else "does not fit"
        style = "bold" if each.is_planned else "" if each.fits else "dim"
        cells = (each.change, size(each.reserved_bytes), fits, each.price)
        rows.append([Text(cell, style) for cell in cells])
    columns = ("setting", "memory", "result", "price")
    if not any(each.is_rung for each in found):
        return table("Changes that save memory", columns, rows, left=4)
    title = "Ladder: memory and price of the planned micro-batch with other settings"
    result = table(title, columns, rows, left=4)
    result.columns[0].min_width = len("train.gradient_checkpointing=selective")
    result.caption = "`auto` chooses among those with the same result; % of the forward pass"
    return result


def layouts_table(tried: Sequence[Plan]) -> Table:
    """Returns a table of the layouts that were tried: the fastest that fit, then the smallest."""
    ranked = sorted(tried, key=lambda each: (not each.fits, each.missing_bytes, each.step_seconds))
    rows = []
    for each in ranked[:NUM_LAYOUTS]:
        memory = size(each.memory.reserved + each.context_bytes)
        took = f"{each.step_seconds:,.3g} s" if each.fits else "does not fit"
        cells = (" ".join(_overrides(each)), memory, size(each.host_bytes), took)
        rows.append([Text(cell, "" if each.fits else "dim") for cell in cells])
    result = table(
        f"Layouts: the first of {len(tried)} that were tried",
        ("settings", "memory", "in RAM", "a step"),
        rows,
    )
    result.caption = f"one thing after another; others are not faster by {GAIN:.0%}, or do not fit"
    return result


def comparison_table(found: list[dict[str, Any]], length: int) -> Table:
    """Returns a table of how many rows each GPU holds, for each way of tuning."""
    rows = []
    for each in found:
        mode = each["mode"] + (" + ckpt" if each["gradient_checkpointing"] else "")
        sizes = (size(each[key]) for key in ("reserved_bytes", "per_row_bytes"))
        fits = (Text(f"{n:,}", "green") if n else Text("-", "red") for n in each["rows"].values())
        rows.append([mode, *sizes, *fits])
    title = f"Rows of {length:,} tokens, all supervised, that one micro-batch holds (-: none fits)"
    result = table(title, ("tuning", "one row", "one more", *COMPARED), rows)
    result.caption = "ckpt: train.gradient_checkpointing=true"
    return result


def plan_values(plan: Plan, found: Sequence[Advice] = ()) -> dict[str, Any]:
    """Returns the content of plan.json before the run (docs/RUNS.md)."""
    memory = plan.memory
    return {
        "predicted": {
            "allocated_bytes": memory.allocated,
            "reserved_bytes": memory.reserved,
            "context_bytes": plan.context_bytes,
            "host_bytes": plan.host_bytes,
            "host": plan.host,
            "start_bytes": plan.start_bytes,
            "breakdown": memory.breakdown,
            "method": memory.method,
            "past": plan.past and asdict(plan.past),
            "missing_bytes": plan.missing_bytes,
            "evaluation_bytes": plan.evaluation_bytes,
            "generation_bytes": plan.generation_bytes,
            "checkpoint_bytes": plan.disk.checkpoint,
            "disk_bytes": plan.disk.total,
            "step_seconds": plan.step_seconds,
            "seconds": plan.time and plan.time.seconds,
            "time": plan.time and asdict(plan.time),
            "cost": plan.cost,
            "traffic": asdict(plan.traffic) | {"sent_bytes": plan.sent_bytes, "link": plan.link},
        },
        "chosen": chosen_values(plan),
        "layout": plan.layout,
        "enough_gpus": plan.enough,
        "reasons": {key.removeprefix("train."): why for key, why in plan.reasons.items()},
        "device": {"name": plan.device, "available_bytes": plan.available_bytes},
        "work": {key: getattr(plan, key) for key in WORK},
        "advice": [asdict(each) for each in found if each.saved_bytes > 0],
        "ladder": [asdict(each) for each in found if each.is_rung],
        "warnings": plan.warnings,
    }


def write_plan(plan: Plan, path: Path, measured: dict[str, Any] | None = None) -> None:
    """Writes plan.json: the plan, and the measurements once the run is over."""
    write_json(path, plan_values(plan) | {"measured": measured})


def write_resolved(resolved: RunConfig, plan: Plan, folder: Path) -> None:
    """Writes config.yaml and plan.json into a run folder."""
    plain.write_text(folder / "config.yaml", dump_config(resolved, plan.reasons))
    write_plan(plan, folder / "plan.json")
