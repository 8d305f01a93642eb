"""Shows what a run did."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sft.config.schema import Config
from sft.data import audit, cache, template
from sft.evaluate import answers, predictions
from sft.plan import plan
from sft.runtime.console import beginning, duration, facts, write_json
from sft.runtime.log import Log
from sft.runtime.precision import resolve_precision


def _tell_results(
    config: Config, base: dict[str, Any], tuned: dict[str, Any], measured: dict[str, Any], log: Log
) -> None:
    folder = Path(config.train.output_dir) / "evaluation"
    both = {"base": base, "tuned": tuned}
    written = {name: results["metrics"] for name, results in both.items()}
    for key in ("intervals", *(["groups"] if config.evaluation.group else [])):
        written[key] = {name: results.get(key, {}) for name, results in both.items()}
    write_json(folder / "metrics.json", written | {"num_examples": tuned["num_examples"]})
    log.say(_side_by_side(folder, config.evaluation.num_shown))
    for told in _groups_table(config, tuned):
        log.say(told)
    log.say(_closing(config, base, tuned, measured))


# --- what people see ---------------------------------------------------------------------------


def _banner(config: Config, planned: plan.Plan, world: dict[str, str]) -> Table:
    train, size = config.train, planned.world_size
    engine = train.engine if size > 1 or train.engine != "ddp" else "one process"
    settings = f" with {train.deepspeed_config}" if train.deepspeed_config else ""
    micro_batches = f"{planned.micro_batches} micro-batch(es)"
    rows = [
        ("model", f"{config.model.name}, {config.tuning.mode}"),
        ("data", _paths(config.data.train_path)),
        ("processes", f"{size} ({engine}){settings}{world['spread']}"),
        ("devices", world["devices"]),
        ("precision", f"{planned.precision}: {resolve_precision(train)[1]}"),
        ("batch", f"{train.global_batch} examples in {size} process(es) x {micro_batches}"),
        ("results", train.output_dir),
    ]
    return facts("Run", rows)


def _first_row(prepared: cache.Prepared) -> tuple[str, Text, str]:
    return (
        "First row, as the model sees it (supervised: green; special: magenta; context: dim)",
        template.coloured(prepared.tokenizer, prepared.train[0]),
        f"audit: {audit.summary(prepared.audit)}",
    )


def _paths(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _told(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())


def _scores_table(title: str, results: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("metric")
    for column in ("value", "95 % interval"):
        table.add_column(column, justify="right")
    for name, value in results["metrics"].items():
        low, high = results["intervals"].get(name, (None, None))
        interval = "" if low is None else f"{low:.4g} to {high:.4g}"
        table.add_row(name.replace("_", " "), f"{value:.4g}", interval)
    if results["num_failed"]:
        table.add_row("not answered", f"{results['num_failed']:,}", "")
    return table


def _groups_table(config: Config, results: dict[str, Any]) -> Iterator[Table]:
    """The scores of each group, but for those of single labels; their intervals are in the file."""
    groups = results.get("groups")
    if not groups:
        return
    names = [name for name in results["intervals"] if "/" not in name]

    def cell(metric: str, group: str) -> str:
        return f"{groups[group]['metrics'][metric]:.4g}"

    sizes = {name: each["num_examples"] for name, each in groups.items()}
    cells = {name.replace("_", " "): partial(cell, name) for name in names}
    column = str(config.evaluation.group)
    yield answers.groups_table(f"Scores by {column}", column, sizes, cells)


def _side_by_side(folder: Path, num_shown: int) -> Table:
    table = Table(title="The same prompts, before and after", title_justify="left", show_lines=True)
    for column in ("prompt", "base", "fine-tuned"):
        table.add_column(column, overflow="fold", ratio=1)
    paths = (folder / "base.jsonl", folder / "predictions.jsonl")
    for before, after in islice(zip(*map(predictions.read, paths), strict=False), num_shown):
        right = (after["answer"] or "").strip() == after["reference"].strip()
        table.add_row(
            Text(beginning(after["prompt"])),
            Text(_shown(before["answer"])),
            Text(_shown(after["answer"]), style="green" if right else "red"),
        )
    return table


def _answers_table(path: Path, num_shown: int) -> Table:
    table = Table(show_lines=True)
    for column in ("prompt", "answer", "reference"):
        table.add_column(column, overflow="fold", ratio=1)
    for row in islice(predictions.read(path), num_shown):
        table.add_row(*(Text(_shown(row[key])) for key in ("prompt", "answer", "reference")))
    return table


def _shown(text: str | None) -> str:
    return beginning("(not answered)" if text is None else text)


def _closing(
    config: Config, base: dict[str, Any], tuned: dict[str, Any], measured: dict[str, Any]
) -> Table:
    folder = config.train.output_dir
    rows = [
        (name.replace("_", " "), f"{base['metrics'][name]:.4g} -> {value:.4g}")
        for name, value in tuned["metrics"].items()
        if name in ("loss", "exact_match")
    ]
    rows += [
        ("training", duration(measured["training_seconds"])),
        ("in all", duration(measured["total_seconds"])),
        ("results", f"{folder}/ (evaluation/metrics.json, final_checkpoint/)"),
    ]
    alone = " AGENT=0" if config.crowd.num_agents else ""
    commands = {
        f"make infer RUN={folder}": "talk to it",
        f"make merge RUN={folder}{alone}": "one model without adapters",
        "make tensorboard": "look at the curves",
    }
    if config.tuning.mode == "full":
        commands = {k: v for k, v in commands.items() if "merge" not in k}
        commands['make train ARGS="tuning.mode=qlora"'] = "the same with frozen 4-bit weights"
    width = max(map(len, commands)) + 2
    rows += [("next", f"{command:<{width}}{why}") for command, why in commands.items()]
    return facts("Done", rows)
