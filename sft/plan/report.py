"""Shows a plan, and writes plan.json."""

from __future__ import annotations

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
from sft.plan.choose import UTILISATION
from sft.plan.history import Past
from sft.plan.plan import Plan, chosen
from sft.runtime.console import duration, facts, size, write_json

LAUNCHES = 0.05  # seconds of arithmetic below which a GPU waits for the launches of its kernels


# --- what people see ---------------------------------------------------------------------------


def table(plan: Plan) -> Table:
    labels = plan.labels
    cut = f"{plan.world_size} process{'es' if plan.world_size > 1 else ''} x {plan.micro_batches}"
    taken = plan.memory
    parts = ", ".join(
        f"{name} {size(part)}" for name, part in taken.breakdown.items() if part >= MIB
    )
    reserved = f" ({size(taken.reserved)} reserved)" if plan.context_bytes else ""
    past = f"; {plan.past.runs} earlier runs took {_span(plan.past)} of it" if plan.past else ""
    context = f", context {size(plan.context_bytes)} (assumed)" if plan.context_bytes else ""
    rows: list[tuple[str, str | Text]] = [
        (
            labels.examples,
            f"{plan.num_examples:,}{labels.each} to train on, {plan.num_held_out:,} held out",
        ),
        (
            "tokens",
            f"{plan.tokens_per_epoch:,} per epoch ({plan.supervised_share:.0%} {labels.items}), "
            f"{plan.tokens:,} in all",
        ),
        ("steps", f"{plan.steps:,} of {plan.global_batch} {labels.examples}"),
        (
            "batch",
            f"{cut} micro-batch(es) of at most {plan.budget.max_tokens:,} tokens, "
            f"{plan.budget.layout}",
        ),
        ("trained", f"{plan.num_trained:,} of {plan.num_parameters:,} parameters"),
        (
            "memory",
            f"{size(taken.allocated)}{reserved} of {size(plan.available_bytes)} per process: "
            f"{parts}{context} ({taken.method}{past})",
        ),
        ("disk", f"{plan.disk}"),
    ]
    if plan.evaluation_bytes:
        told = f"{size(plan.evaluation_bytes)} for the held-out loss"
        told += f", {size(plan.generation_bytes)} for {labels.answers}"
        rows.append(("evaluation", told))
    if plan.seconds is not None:
        rows.append(("time", _time(plan)))
    values = chosen(plan)
    rows += [
        ("auto", f"{key}={values[key.removeprefix('train.')]}: {why}")
        for key, why in plan.reasons.items()
    ]
    rows += [("warning", Text(text, "red")) for text in plan.warnings]
    return facts("Plan", rows)


def _time(plan: Plan) -> str:
    assert plan.seconds is not None
    if plan.seconds < LAUNCHES * plan.steps * plan.micro_batches:
        return "that of launching kernels, so small are the micro-batches: tried before step 1"
    return f"about {duration(plan.seconds)}, if {UTILISATION:.0%} of the GPU's peak is reached"


def _span(past: Past) -> str:
    return f"{100 * (1 + past.least):.1f} to {100 * (1 + past.most):.1f} %"


def memory_table(plan: Plan) -> Table:
    """What the peak is made of, with a bar for each part."""
    title = f"Peak memory: {plan.device}"
    result = Table(title=title, title_justify="left", box=None, show_header=False)
    result.add_column(no_wrap=True, style="cyan")
    result.add_column(justify="right", no_wrap=True)
    result.add_column(no_wrap=True)
    taken = plan.memory
    lines = dict(taken.breakdown)
    if plan.context_bytes:
        lines["reserved, not allocated"] = taken.reserved - taken.allocated
        lines["context (assumed)"] = plan.context_bytes
    in_all = sum(lines.values())
    for name, part in lines.items():
        share = part / in_all
        result.add_row(name, size(part), f"{'█' * round(40 * share)} {share:.0%}")
    share = in_all / plan.available_bytes
    told = Text(f"{share:.0%} of {size(plan.available_bytes)}", "red" if share > 1 else "bold")
    result.add_row("in all", size(in_all), told)
    return result


def advice_table(found: list[Advice]) -> Table:
    result = Table(title="What would take less", title_justify="left", box=None)
    for column in ("change", "saves", "then", "at the price of"):
        result.add_column(column, justify="right" if column == "saves" else "left", overflow="fold")
    for each in found:
        fits = "fits" if each.fits else "does not fit"
        row = (each.change, size(each.saved_bytes), fits, each.price)
        result.add_row(*row, style="" if each.fits else "dim")
    return result


def comparison_table(found: list[dict[str, Any]], length: int) -> Table:
    title = f"Rows of {length:,} tokens, all learnt, that one micro-batch can have (-: none fits)"
    result = Table(title=title, title_justify="left", box=None)
    for column in ("tuning", "one row", "one more", *COMPARED):
        justify: Any = "left" if column == "tuning" else "right"
        result.add_column(column, justify=justify, no_wrap=True)
    for each in found:
        sizes = (size(each[key]) for key in ("reserved_bytes", "per_row_bytes"))
        cells = (Text(f"{n:,}", "green") if n else Text("-", "red") for n in each["rows"].values())
        mode = each["mode"] + (" + ckpt" if each["gradient_checkpointing"] else "")
        result.add_row(mode, *sizes, *cells)
    result.caption = "ckpt: train.gradient_checkpointing=true"
    return result


def report(plan: Plan, found: Sequence[Advice] = ()) -> dict[str, Any]:
    """What plan.json holds before the run (docs/RUNS.md)."""
    taken = plan.memory
    return {
        "predicted": {
            "allocated_bytes": taken.allocated,
            "reserved_bytes": taken.reserved,
            "context_bytes": plan.context_bytes,
            "breakdown": taken.breakdown,
            "method": taken.method,
            "past": plan.past and asdict(plan.past),
            "missing_bytes": plan.missing_bytes,
            "evaluation_bytes": plan.evaluation_bytes,
            "generation_bytes": plan.generation_bytes,
            "checkpoint_bytes": plan.disk.checkpoint,
            "disk_bytes": plan.disk.total,
            "seconds": plan.seconds,
        },
        "chosen": chosen(plan),
        "reasons": {key.removeprefix("train."): why for key, why in plan.reasons.items()},
        "device": {"name": plan.device, "available_bytes": plan.available_bytes},
        "work": {
            "num_examples": plan.num_examples,
            "num_held_out": plan.num_held_out,
            "tokens_per_epoch": plan.tokens_per_epoch,
            "supervised_share": plan.supervised_share,
            "steps": plan.steps,
            "tokens": plan.tokens,
            "global_batch": plan.global_batch,
            "world_size": plan.world_size,
            "num_parameters": plan.num_parameters,
            "num_trained": plan.num_trained,
        },
        "advice": [asdict(each) for each in found],
        "warnings": plan.warnings,
    }


def write(plan: Plan, path: Path, measured: dict[str, Any] | None = None) -> None:
    """plan.json: the plan, and what was measured once the run is over."""
    write_json(path, report(plan) | {"measured": measured})


def keep(resolved: RunConfig, planned: Plan, folder: Path) -> None:
    """config.yaml and plan.json of a run folder."""
    (folder / "config.yaml").write_text(dump_config(resolved, planned.reasons), "utf-8")
    write(planned, folder / "plan.json")
