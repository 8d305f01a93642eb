"""Reports a fine-tuned model: its scores, and its answers before and after training."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sft.config.schema import Config, Evaluation
from sft.evaluate import answers, predictions
from sft.runtime.console import atomic_write, beginning, table, write_json
from sft.tasks.base import Results

SHOWN = ("prompt", "answer", "reference")


def show(
    config: Config, base: Results | None, tuned: Results, folder: Path
) -> Iterator[RenderableType]:
    """Writes the metrics, and yields scores and answers; `base`: those to compare with."""
    shown = config.evaluation.num_shown
    if base is None:
        write_json(folder / "metrics.json", tuned.details)
        title = f"{folder.parents[1]}: {tuned.details['num_examples']:,} examples"
        yield _scores_table(title, tuned.details)
        yield from _groups_table(config, tuned.details)
        if shown and tuned.details["num_examples"]:
            yield _answers_table(folder / "predictions.jsonl", shown)
        return
    both = {"base": base.details, "tuned": tuned.details}
    written = {name: results["metrics"] for name, results in both.items()}
    for key in ("intervals", *(["groups"] if config.evaluation.group else [])):
        written[key] = {name: results.get(key, {}) for name, results in both.items()}
    number = tuned.details["num_examples"]
    write_json(folder / "metrics.json", written | {"num_examples": number})
    if shown and number:
        yield _side_by_side(folder, shown)
    yield from _groups_table(config, tuned.details)


def _scores_table(title: str, results: dict[str, Any]) -> Table:
    rows = []
    for name, value in results["metrics"].items():
        low, high = results["intervals"].get(name, (None, None))
        interval = "" if low is None else f"{low:.4g} to {high:.4g}"
        rows.append((name.replace("_", " "), f"{value:.4g}", interval))
    if results["num_failed"]:
        rows.append(("not answered", f"{results['num_failed']:,}", ""))
    return table(title, ("metric", "value", "95 % interval"), rows)


def _groups_table(config: Config, results: dict[str, Any]) -> Iterator[Table]:
    """Yields the scores of each group, without those of single labels and without intervals."""
    groups = results.get("groups")
    if not groups:
        return
    names = [name for name in next(iter(groups.values()))["metrics"] if "/" not in name]

    def cell(metric: str, group: str) -> str:
        return f"{groups[group]['metrics'][metric]:.4g}"

    sizes = {name: each["num_examples"] for name, each in groups.items()}
    cells = {name.replace("_", " "): partial(cell, name) for name in names}
    column = str(config.evaluation.group)
    yield answers.groups_table(f"Scores by {column}", column, sizes, cells)


def _side_by_side(folder: Path, num_shown: int) -> Table:
    paths = (folder / "base.jsonl", folder / "predictions.jsonl")
    rows = []
    for before, after in islice(
        zip(*map(predictions.read_records, paths), strict=False), num_shown
    ):
        if before["index"] != after["index"]:  # a full disk has kept some out of a file
            break
        is_right = (after["answer"] or "").strip() == after["reference"].strip()
        answer = Text(_shorten(after["answer"]), style="green" if is_right else "red")
        rows.append((Text(beginning(after["prompt"])), Text(_shorten(before["answer"])), answer))
    columns = ("prompt", "base", "fine-tuned")
    return table("The same prompts, before and after", columns, rows, left=3, lines=True)


def _answers_table(path: Path, num_shown: int) -> Table:
    rows = [
        [Text(_shorten(row[key])) for key in SHOWN]
        for row in islice(predictions.read_records(path), num_shown)
    ]
    return table("", SHOWN, rows, left=3, lines=True)


def _shorten(text: str | None) -> str:
    return beginning("(not answered)" if text is None else text)


def write_during(records: list[predictions.Record], path: Path) -> None:
    """Writes the answers that were scored while it trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, follow=False) as file:
        file.writelines(predictions.to_line(record) for record in records)


def answers_text(records: list[predictions.Record], settings: Evaluation) -> str:
    """Returns the first answers as Markdown, each text quoted so that it is shown as it is."""
    shown = (
        "\n\n".join(f"**{key}**\n\n{_quote(record.get(key))}" for key in SHOWN)
        for record in records[: settings.num_shown]
    )
    return "\n\n---\n\n".join(shown)


def _quote(text: str | None) -> str:
    lines = "(not answered)" if text is None else text
    return "\n".join(f"    {line}" for line in lines.splitlines())


def closing(
    config: Config, base: Results | None, tuned: Results, merge_arguments: str
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Returns rows with what improved, and the commands to try next."""
    folder = shlex.quote(config.train.output_dir)
    before = base.metrics if base else {}
    rows = [
        (name.replace("_", " "), f"{before[name]:.4g} -> {value:.4g}")
        for name, value in tuned.metrics.items()
        if name in ("loss", "exact_match") and name in before
    ]
    commands = {f"make infer RUN={folder}": "talk to it"}
    if config.tuning.mode != "full":
        commands[f"make merge RUN={folder}{merge_arguments}"] = "one model without adapters"
    runs = Path(config.train.output_dir).parent
    place = (
        "" if runs.absolute() == Path("outputs").absolute() else f" LOGDIR={shlex.quote(str(runs))}"
    )
    commands[f"make tensorboard{place}"] = "look at the curves"
    if config.tuning.mode == "full":
        commands['make train ARGS="tuning.mode=qlora"'] = "the same with frozen 4-bit weights"
    return rows, commands
