"""Asks a model for labels, strategy by strategy, and scores what it answers.

An answer without a label is a failure: it counts as wrong, and failures are also counted. Each
strategy is compared with always giving the most common label, and a tuned model with the model
before, by the same strategy. Both comparisons are paired, on the same examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.table import Table
from rich.text import Text

from sft.config.schema import Classify, Config
from sft.errors import UserError, redact
from sft.evaluate import compare
from sft.evaluate.answers import Question, groups_table
from sft.evaluate.metrics import FAILURE
from sft.evaluate.predictions import Predictions, read_records
from sft.evaluate.scores import Difference, Tally, compare_tallies, judge
from sft.runtime.console import facts, table, write_json
from sft.runtime.log import Log
from sft.runtime.output import visible
from sft.serve.chat import guarded_model
from sft.serve.classify import rows
from sft.serve.classify.rows import LabelledText

METRIC = "classification"
SHOWN = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class LabelScores:
    """Scores of answers as labels."""

    tally: Tally
    num_errors: int  # examples that could not be asked; they count as failures, too

    def report(self) -> dict[str, Any]:
        """Returns what metrics.json says of a strategy."""
        num_failed = _count_failures(self.tally)
        found = self.tally.report()
        for name, own in found.get("groups", {}).items():
            own["num_failed"] = _count_failures(self.tally.groups[name])
        return {
            "num_failed": num_failed,
            "share_failed": num_failed / self.tally.num_examples,
            "num_errors": self.num_errors,
            **found,
        }


def score_labels(path: Path, labels: list[str], constant: str | None = None) -> LabelScores:
    """Returns the scores of a finished file of predictions, or of `constant` as every answer."""
    tally, num_errors = Tally([METRIC], labels), 0
    for record in read_records(path):
        answer, group = constant or record["answer"], None if constant else record.get("group")
        num_errors += answer is None
        tally.add(record["index"], answer, record["reference"], group=group)
    return LabelScores(tally, num_errors)


def compare_with_constant(
    constant: LabelScores, found: dict[str, LabelScores]
) -> dict[tuple[str, str], Difference]:
    """Returns differences of each strategy's scores by (strategy, score), judged together."""
    pairs = {name: compare_tallies(constant.tally, own.tally) for name, own in found.items()}
    return judge({(name, key): each[key] for name, each in pairs.items() for key in SHOWN})


def _count_failures(tally: Tally) -> int:
    return sum(row[FAILURE] for row in tally.confusion().values())


def classify(
    config: Config, run: Path | None = None, engine: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Asks for the labels of one part with every strategy, and scores them. Collective.

    `run`: the folder of a tuned model, which is asked with `classify.tune` and compared with the
    model before. `engine`: arguments of AccelerateConnector that choose it. Results go to
    <run>/classify or else to `classify.output_dir`, in a folder for each strategy:
    predictions.jsonl and metrics.json.
    """
    settings = config.classify
    examples = rows.read_examples(settings)
    parts = rows.split_parts(examples, settings)
    chosen = parts.get(settings.part, examples)
    folder = run / "classify" if run else Path(settings.output_dir)
    names = settings.use or [*settings.strategies]
    names = [settings.tune] if run and settings.tune else names
    model = {"model_name": str(run or config.model.name), "mixed_precision": config.train.precision}
    model |= engine
    with guarded_model(folder, model, folder) as (connector, _):
        if connector.is_main_process:
            sizes = ", ".join(f"{len(own):,} {part}" for part, own in parts.items())
            kept = f", kept together by {', '.join(settings.split_by)}" if settings.split_by else ""
            lines = [
                ("model", model["model_name"]),
                ("data", redact(str(settings.path))),
                ("parts", f"{sizes} (seed {settings.seed}{kept})"),
                ("classified", f"{len(chosen):,} examples: {settings.part} (classify.part)"),
            ]
            connector.log.say(facts("Classify", lines))
            if settings.tune and not run:
                rows.write_conversations(parts, config)
        for name in names:
            connector.answer(
                _make_questions(settings, name, chosen),
                Predictions(folder / name / "predictions.jsonl"),
                len(chosen),
                **settings.strategies[name].generation.model_dump(),
            )
        if connector.is_main_process:
            common = rows.most_common_label(parts["train"])
            _report_scores(settings, folder, names, common, connector.log)
            if run and settings.tune:
                _compare_with_base(settings, folder, connector.log)


def _make_questions(
    settings: Classify, name: str, examples: list[LabelledText]
) -> Iterator[Question]:
    strategy = settings.strategies[name]
    for each in examples:
        fields = {"row": each.place, "prompt": each.text, "reference": each.label}
        fields |= {"group": each.group} if settings.group else {}
        yield Question(rows.make_messages(strategy, each.text), None, fields)


def _report_scores(
    settings: Classify, folder: Path, names: list[str], common: str, log: Log
) -> None:
    """Writes metrics.json of each strategy, and logs their scores."""
    files = {name: folder / name / "predictions.jsonl" for name in names}
    found = {name: score_labels(file, settings.labels) for name, file in files.items()}
    constant = score_labels(files[names[0]], settings.labels, common)
    majority = {"label": common, **constant.tally.report()}
    first: list[str | Text] = [f"always {visible(common)}", *_show_scores(majority), "", ""]
    shown = [first]
    against = compare_with_constant(constant, found)
    for name, own in found.items():
        report = own.report()
        values = {"strategy": name, "part": settings.part, **report, "majority": majority}
        values["against_majority"] = {key: vars(against[name, key]) for key in SHOWN}
        write_json(folder / name / "metrics.json", values)
        failed = f"{report['num_failed']:,} ({report['share_failed']:.1%})"
        verdict = compare.colour_verdict(against[name, SHOWN[0]].verdict)
        shown.append([name, *_show_scores(report), failed, verdict])
    title = "Scores (95 % intervals; failures count as wrong)"
    columns = ("strategy", "accuracy", "macro F1", "failed", "accuracy is")
    note = f"against always {visible(common)}; {compare.describe_verdicts(len(against))}"
    log.say(table(title, columns, shown, note=note))
    if settings.group:
        log.say(_groups_table(settings.group, found))
    log.say(f"results: {folder}/<strategy>/ (metrics.json, predictions.jsonl)")


def _show_scores(report: dict[str, Any]) -> Iterator[str]:
    for name in SHOWN:
        low, high = report["intervals"].get(name, (None, None))
        interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
        yield f"{report['metrics'][name]:.3f}{interval}"


def _groups_table(column: str, found: dict[str, LabelScores]) -> Table:
    """Returns a table of each group's accuracy, with failures where there are any."""

    def cell(groups: dict[str, Tally], group: str) -> str:
        failures = _count_failures(groups[group])
        value = groups[group].values()["accuracy"]
        return f"{value:.2f}" + (f" ({failures:,})" if failures else "")

    first = next(iter(found.values())).tally.groups
    sizes = {name: tally.num_examples for name, tally in sorted(first.items())}
    cells = {name: partial(cell, each.tally.groups) for name, each in found.items()}
    return groups_table(f"Accuracy by {column} (failed)", column, sizes, cells)


def _compare_with_base(settings: Classify, folder: Path, log: Log) -> None:
    """Compares the tuned model with the model before, by the strategy that was tuned."""
    name = str(settings.tune)
    before, after = Path(settings.output_dir) / name, folder / name
    try:
        found = compare.compare(before, after, [METRIC], settings.labels).differences
    except UserError as error:
        log.say(f"not compared; make classify without RUN first: {error}")
        return
    write_json(folder / name / "comparison.json", {key: vars(each) for key, each in found.items()})
    title = f"{name}: {folder.parent} against the model before"
    log.say(compare.difference_table(title, found, "before", "after"))
