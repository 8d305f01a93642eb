"""Makes the tables at the beginning and at the end of a run."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from sft.config.schema import RunConfig
from sft.plan.plan import Plan
from sft.runtime.console import duration, facts
from sft.runtime.hardware import resolve_precision


def banner(
    config: RunConfig, described: list[tuple[str, str]], planned: Plan, world: dict[str, str]
) -> Table:
    """Returns the table at the beginning of a run. `described`: the rows of its task."""
    train, size = config.train, planned.world_size
    engine = train.engine if size > 1 or train.engine != "ddp" else "one process"
    settings = f" with {train.deepspeed_config}" if train.deepspeed_config else ""
    micro_batches = f"{planned.micro_batches} micro-batch(es)"
    examples = planned.labels.examples
    rows = [
        *described,
        ("processes", f"{size} ({engine}){settings}{world['spread']}"),
        ("devices", world["devices"]),
        ("precision", f"{planned.precision}: {resolve_precision(train)[1]}"),
        ("batch", f"{train.global_batch} {examples} in {size} process(es) x {micro_batches}"),
        ("results", train.output_dir),
    ]
    return facts("Run", rows)


def closing(
    config: RunConfig,
    rows: list[tuple[str, str]],
    commands: dict[str, str],
    measured: dict[str, Any],
) -> Table:
    """Returns the table at the end of a run. `rows`, `commands`: those of its task."""
    rows = [
        *rows,
        ("training", duration(measured["training_seconds"])),
        ("total", duration(measured["total_seconds"])),
        ("results", f"{config.train.output_dir}/ (evaluation/metrics.json, final_checkpoint/)"),
    ]
    width = max(map(len, commands), default=0) + 2
    rows += [("next", f"{command:<{width}}{why}") for command, why in commands.items()]
    return facts("Done", rows)
