"""What people see of a fine-tuned model: scores, and answers before and after."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sft.config.schema import Config
from sft.evaluate import answers, predictions
from sft.runtime.console import beginning, write_json
from sft.tasks.base import Results


def of_run(config: Config, base: Results, tuned: Results, folder: Path) -> Iterator[RenderableType]:
    """Writes the metrics of base and tuned model, and yields the answers of both side by side."""
    both = {"base": base.details, "tuned": tuned.details}
    written = {name: results["metrics"] for name, results in both.items()}
    for key in ("intervals", *(["groups"] if config.evaluation.group else [])):
        written[key] = {name: results.get(key, {}) for name, results in both.items()}
    number = tuned.details["num_examples"]
    write_json(folder / "metrics.json", written | {"num_examples": number})
    yield _side_by_side(folder, config.evaluation.num_shown)
    yield from _groups_table(config, tuned.details)


def of_evaluation(config: Config, tuned: Results, folder: Path) -> Iterator[RenderableType]:
    """Writes the metrics of a finished run, and yields its scores and answers."""
    write_json(folder / "metrics.json", tuned.details)
    title = f"{folder.parents[1]}: {tuned.details['num_examples']:,} examples"
    yield _scores_table(title, tuned.details)
    yield from _groups_table(config, tuned.details)
    yield _answers_table(folder / "predictions.jsonl", config.evaluation.num_shown)


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
    for before, after in islice(
        zip(*map(predictions.read_records, paths), strict=False), num_shown
    ):
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
    for row in islice(predictions.read_records(path), num_shown):
        table.add_row(*(Text(_shown(row[key])) for key in ("prompt", "answer", "reference")))
    return table


def _shown(text: str | None) -> str:
    return beginning("(not answered)" if text is None else text)


def closing(
    config: Config, base: Results | None, tuned: Results, merge_arguments: str
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Returns rows with what improved, and the commands to try next."""
    folder = config.train.output_dir
    before = base.metrics if base else {}
    rows = [
        (name.replace("_", " "), f"{before[name]:.4g} -> {value:.4g}")
        for name, value in tuned.metrics.items()
        if name in ("loss", "exact_match") and name in before
    ]
    commands = {f"make infer RUN={folder}": "talk to it"}
    if config.tuning.mode != "full":
        commands[f"make merge RUN={folder}{merge_arguments}"] = "one model without adapters"
    commands["make tensorboard"] = "look at the curves"
    if config.tuning.mode == "full":
        commands['make train ARGS="tuning.mode=qlora"'] = "the same with frozen 4-bit weights"
    return rows, commands
