"""Labels asked of a model, strategy by strategy, and what they are worth.

An answer that gives no label is a failure: it counts as wrong everywhere, and is counted by itself.
Next to each accuracy stands that of always giving the most common label, and next to a tuned model
the same strategy before: both differences are paired ones, on the same examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sft.config.schema import Classify, Config
from sft.evaluate import compare
from sft.evaluate.answers import Question, groups_table
from sft.evaluate.metrics import FAILURE
from sft.evaluate.predictions import read
from sft.evaluate.scores import Difference, Tally, difference
from sft.runtime.console import facts, visible, write_json
from sft.runtime.log import Log
from sft.serve.chat import guarded_model
from sft.serve.classify import rows as classify_rows
from sft.serve.classify.rows import Example

METRIC = "classification"
SHOWN = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class Scored:
    """Answers read as labels. `right`: 1 or 0 of each example, in their order."""

    tally: Tally
    right: list[float]
    num_failed: int
    num_errors: int  # among these: could not be asked

    @property
    def share_failed(self) -> float:
        return self.num_failed / len(self.right)


def classify(config: Config, run: Path | None = None) -> None:
    """Asks for the labels of one part with every strategy, and scores them. Collective.

    `run`: a tuned model, asked with `classify.tune` and compared with the model before. Results go
    to its folder, else to `classify.output_dir`: <strategy>/predictions.jsonl and metrics.json.
    """
    settings = config.classify
    examples = classify_rows.read(settings)
    parts = classify_rows.split(examples, settings)
    chosen = parts.get(settings.part, examples)
    folder = run / "classify" if run else Path(settings.output_dir)
    names = settings.use or [*settings.strategies]
    names = [settings.tune] if run and settings.tune else names
    model = {
        "model_name": str(run or config.model.name),
        "mixed_precision": config.train.precision,
    }
    with guarded_model(folder, model, folder) as (connector, _):
        if connector.is_main_process:
            connector.log.say(_told(config, model["model_name"], parts, len(chosen)))
            if settings.tune and not run:
                classify_rows.write_rows(parts, config)
        for name in names:
            connector.answer(
                _questions(settings, name, chosen),
                folder / name / "predictions.jsonl",
                len(chosen),
                **settings.strategies[name].generation.model_dump(),
            )
        if connector.is_main_process:
            usual = classify_rows.majority(parts["train"])
            _tell(settings, folder, names, usual, connector.log)
            if run and settings.tune:
                _compare(settings, folder, connector.log)


def _questions(settings: Classify, name: str, examples: list[Example]) -> Iterator[Question]:
    strategy = settings.strategies[name]
    for each in examples:
        fields = {"row": each.place, "prompt": each.text, "reference": each.label}
        fields |= {"group": each.group} if settings.group else {}
        yield Question(classify_rows.question(strategy, each.text), None, fields)


# --- scores --------------------------------------------------------------------------------------


def score(path: Path, known: list[str]) -> Scored:
    """Scores a finished file of predictions."""
    tally, right, num_errors = Tally([METRIC], known), [], 0
    for record in read(path):
        answer = record["answer"]
        num_errors += answer is None
        scores = tally.add(record["index"], answer, record["reference"], group=record.get("group"))
        right.append(scores[METRIC])
    return Scored(tally, right, _failures(tally), num_errors)


def always(label: str, path: Path, known: list[str]) -> tuple[Tally, list[float]]:
    """The scores of giving one label to every example of a file."""
    tally = Tally([METRIC], known)
    right = [tally.add(each["index"], label, each["reference"])[METRIC] for each in read(path)]
    return tally, right


def paired(a: tuple[Tally, list[float]], b: tuple[Tally, list[float]]) -> dict[str, Difference]:
    """`b` against `a` on the same examples."""
    unlike = sum(x != y for x, y in zip(a[1], b[1], strict=True))
    return difference(a[0], b[0], {METRIC: unlike})


def report(scored: Scored) -> dict[str, Any]:
    """What metrics.json says of a strategy."""
    found = scored.tally.report()
    for name, own in found.get("groups", {}).items():
        own["num_failed"] = _failures(scored.tally.groups[name])
    return {
        "num_failed": scored.num_failed,
        "share_failed": scored.share_failed,
        "num_errors": scored.num_errors,
        **found,
    }


def _failures(tally: Tally) -> int:
    return sum(row[FAILURE] for row in tally.confusion().values())


# --- what people see, and files ------------------------------------------------------------------


def _told(config: Config, model: str, parts: classify_rows.Parts, num: int) -> Table:
    settings = config.classify
    sizes = ", ".join(f"{len(rows):,} {part}" for part, rows in parts.items())
    kept = f", kept together by {', '.join(settings.split_by)}" if settings.split_by else ""
    rows: list[tuple[str, str | Text]] = [
        ("model", model),
        ("data", f"{settings.path}"),
        ("parts", f"{sizes} (seed {settings.seed}{kept})"),
        ("classified", f"{num:,} examples: {settings.part} (classify.part)"),
    ]
    return facts("Classify", rows)


def _tell(settings: Classify, folder: Path, names: list[str], usual: str, log: Log) -> None:
    """Writes metrics.json of each strategy and says what is in them."""
    found = {name: score(folder / name / "predictions.jsonl", settings.labels) for name in names}
    constant = always(usual, folder / names[0] / "predictions.jsonl", settings.labels)
    against = {name: paired(constant, (each.tally, each.right)) for name, each in found.items()}
    for name, each in found.items():
        majority = {"label": usual, **constant[0].report()}
        values = {"strategy": name, "part": settings.part, **report(each), "majority": majority}
        values["against_majority"] = {key: vars(each) for key, each in against[name].items()}
        write_json(folder / name / "metrics.json", values)
    log.say(_scores_table(found, constant[0], usual, against))
    if settings.group:
        log.say(_groups_table(settings.group, found))
    log.say(f"results: {folder}/<strategy>/ (metrics.json, predictions.jsonl)")


def _compare(settings: Classify, folder: Path, log: Log) -> None:
    """The tuned model against the model before, with the strategy that was tuned."""
    own, name = folder / str(settings.tune), str(settings.tune)
    before, after = (
        Path(settings.output_dir) / name / "predictions.jsonl",
        own / "predictions.jsonl",
    )
    if not before.exists() or _asked(before) != _asked(after):
        log.say(f"not compared: {before} has not these examples; make classify without RUN first")
        return
    a, b = score(before, settings.labels), score(after, settings.labels)
    found = paired((a.tally, a.right), (b.tally, b.right))
    write_json(own / "comparison.json", {key: vars(each) for key, each in found.items()})
    title = f"{name}: {folder.parent} against the model before"
    log.say(compare.difference_table(title, found, "before", "after"))


def _asked(path: Path) -> list[tuple[str, str, str]]:
    return [(each["row"], each["prompt"], each["reference"]) for each in read(path)]


def _scores_table(
    found: dict[str, Scored],
    constant: Tally,
    usual: str,
    against: dict[str, dict[str, Difference]],
) -> Table:
    table = Table(title="Scores (95 % intervals; failures count as wrong)", title_justify="left")
    table.add_column("strategy", overflow="fold")
    for column in ("accuracy", "macro F1", "failed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("than the majority")
    table.add_row(Text(f"always {visible(usual)}"), *_shown(constant), "", "")
    for name, each in found.items():
        table.add_row(
            name,
            *_shown(each.tally),
            f"{each.num_failed:,} ({each.share_failed:.1%})",
            compare.colour_verdict(against[name]["accuracy"].verdict),
        )
    return table


def _shown(tally: Tally) -> Iterator[str]:
    values, intervals = tally.values(), tally.intervals()
    for name in SHOWN:
        low, high = intervals[name]
        yield f"{values[name]:.3f} ({low:.2f} to {high:.2f})"


def _groups_table(column: str, found: dict[str, Scored]) -> Table:
    """Accuracy, and failures where there are any, of each group."""

    def cell(groups: dict[str, Tally], group: str) -> str:
        failures = _failures(groups[group])
        value = groups[group].values()["accuracy"]
        return f"{value:.2f}" + (f" ({failures:,})" if failures else "")

    first = next(iter(found.values())).tally.groups
    sizes = {name: tally.num_examples for name, tally in sorted(first.items())}
    cells = {name: partial(cell, each.tally.groups) for name, each in found.items()}
    return groups_table(f"Accuracy by {column} (failed)", column, sizes, cells)
