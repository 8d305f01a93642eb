"""Compares two runs on the same examples: better, worse or not distinguishable, and on which.

The files of predictions are joined by (row, prompt, reference). Memory holds only each example's
place in its file; texts are read again when they are shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from sft.config.load import load_config
from sft.config.schema import Evaluation
from sft.errors import UserError, shorten
from sft.evaluate.metrics import Verdict
from sft.evaluate.predictions import Record
from sft.evaluate.scores import Difference, Tally, compare_tallies
from sft.runtime.console import beginning, facts, table

KEYS = ("row", "prompt", "reference")  # identify an example
TYPES: dict[str, Any] = dict.fromkeys(KEYS, str) | {"index": int, "answer": str | None}
REMEDY = "make evaluate RUN=<folder> writes one into <folder>/evaluation/evaluate"
ExampleScores = dict[str, float]


class Pair(NamedTuple):
    """An example in both runs: the byte where its line begins, and its scores by metric."""

    at_a: int
    at_b: int
    scores_a: ExampleScores
    scores_b: ExampleScores


class Wins(NamedTuple):
    """The number of examples on which each run scores higher."""

    a: int
    b: int
    tied: int


@dataclass(frozen=True)
class Comparison:
    """The result of comparing the files `a` and `b`. `differing` is in the order of `a`."""

    a: Path
    b: Path
    num_examples: int
    differences: dict[str, Difference]  # by name; `classification` has several
    wins: dict[str, Wins]  # by metric
    differing: list[Pair]


def compare(a: Path, b: Path, metrics: Sequence[str], labels: Sequence[str] = ()) -> Comparison:
    """Returns how `b` compares with `a`, each the folder of a run or a file of predictions.

    Raises UserError unless both have the same examples, each once, in the current format.
    """
    a, b = find_predictions(a, "A"), find_predictions(b, "B")
    places_a, places_b = _index(a), _index(b)
    if places_a.keys() != places_b.keys() or not places_a:
        raise UserError(_describe_mismatch(a, places_a, b, places_b))
    tally_a, tally_b = Tally(metrics, labels), Tally(metrics, labels)
    differing = []
    with a.open("rb") as file_a, b.open("rb") as file_b:
        for digest, at_a in places_a.items():
            at_b = places_b[digest]
            in_a, in_b = _read_at(file_a, at_a), _read_at(file_b, at_b)
            scores_a, scores_b = _add(tally_a, in_a, in_a, a), _add(tally_b, in_a, in_b, b)
            if scores_a != scores_b:
                differing.append(Pair(at_a, at_b, scores_a, scores_b))
    num = tally_a.num_examples
    wins = {metric: _count_wins(differing, metric, num) for metric in metrics}
    return Comparison(a, b, num, compare_tallies(tally_a, tally_b), wins, differing)


def _add(tally: Tally, example: Record, record: Record, file: Path) -> ExampleScores:
    """Adds the answer in `record`, which is in `file`, to the tally, and returns its scores."""
    index, reference, prompt = (example[key] for key in ("index", "reference", "prompt"))
    try:
        return tally.add(index, record["answer"], reference, prompt)
    except UserError as error:
        raise UserError(f"{file}: {error} (row {example['row']})") from None


def _count_wins(differing: list[Pair], metric: str, num_examples: int) -> Wins:
    a = sum(pair.scores_a[metric] > pair.scores_b[metric] for pair in differing)
    b = sum(pair.scores_a[metric] < pair.scores_b[metric] for pair in differing)
    return Wins(a, b, num_examples - a - b)


def find_predictions(path: Path, name: str) -> Path:
    """Returns the predictions of a run or of a folder in its evaluation/, or `path`, if a file.

    Raises UserError if there is none. `name` is the option that gave `path`: A or B.
    """
    for file in (path / "predictions.jsonl", path / "evaluation" / "predictions.jsonl", path):
        if file.is_file():
            return file
    raise UserError(
        f"{name}={path}: expected a run, a folder of its evaluation/ or a predictions.jsonl; "
        f"found none; {REMEDY}"
    )


def describe_engines(a: Path, b: Path) -> str | None:
    """Returns a note if the answers of two files were written by other engines; else None."""
    named = [sorted(_read_engines(find_predictions(*pair))) for pair in ((a, "A"), (b, "B"))]
    if named[0] == named[1]:
        return None
    first, second = map(" and ".join, named)
    return (
        f"note: answers in A by {first}, B by {second}: with bf16 or a temperature these differ, "
        "whatever the model has learnt"
    )


def _read_engines(file: Path) -> set[str]:
    with file.open("rb") as lines:
        return {json.loads(line).get("engine", "our own decoding") for line in lines}


def has_answers(path: Path) -> bool:
    """Returns whether a run, folder or file has predictions that are no scores of benchmarks."""
    try:
        with find_predictions(path, "").open("rb") as file:
            line = file.readline()
            return bool(line) and b'"scores": {' not in line
    except UserError:
        return False


def agreed_metrics(a: Path, b: Path) -> tuple[list[str], list[str]]:
    """Returns (metrics, labels) of the configurations of both runs.

    If their metrics differ, it is exact_match; if their labels differ, there are none.
    """
    metrics_a, labels_a = _read_metrics(find_predictions(a, "A"))
    metrics_b, labels_b = _read_metrics(find_predictions(b, "B"))
    metrics = metrics_a if metrics_a == metrics_b else ["exact_match"]
    return metrics, labels_a if labels_a == labels_b else []


def _read_metrics(file: Path) -> tuple[list[str], list[str]]:
    """Returns (metrics, labels) of the run's configuration, at most two folders above `file`."""
    near = (folder / "config.yaml" for folder in list(file.resolve().parents)[:3])
    config = next((each for each in near if each.is_file()), None)
    evaluation = load_config(config).evaluation if config else Evaluation()
    return [*evaluation.metrics], [*(evaluation.labels or [])]


def _index(path: Path) -> dict[bytes, int]:
    """Returns the byte where each example's line begins, by the example's digest."""
    places: dict[bytes, int] = {}
    begin = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            example = _parse_example(path, number, line)
            identity = json.dumps([example[key] for key in KEYS])
            digest = blake2b(identity.encode(), digest_size=16).digest()
            if digest in places:
                raise UserError(
                    f"{path}:{number}: row {example['row']} is there twice, with the same prompt "
                    "and reference; expected each example once"
                )
            places[digest] = begin
            begin += len(line)
    return places


def _parse_example(path: Path, number: int, line: bytes) -> Record:
    """Returns the example of a line. Raises UserError if the line is not one."""
    try:
        example = json.loads(line)
    except (ValueError, RecursionError):
        example = None
    if not isinstance(example, dict):
        found = "no JSON object"
    elif missing := [key for key in TYPES if key not in example]:
        found = f"none of {', '.join(missing)} but {', '.join(example) or 'nothing'}"
    elif wrong := [
        key
        for key, kind in TYPES.items()
        if not isinstance(example[key], kind) or (key == "index" and example[key] < 0)
    ]:
        found = ", ".join(f"{key} {shorten(example[key])}" for key in wrong)
    else:
        return example
    raise UserError(
        f"{path}:{number}: expected an object with the texts row, prompt and reference, the number "
        f"index, and answer (a text, or null where it failed); found {found}; {REMEDY}"
    )


def _describe_mismatch(
    a: Path, places_a: dict[bytes, int], b: Path, places_b: dict[bytes, int]
) -> str:
    """Returns a message that counts the examples only one file has, and names one per file."""
    expected = "expected the same examples (row, prompt, reference) in both"
    lines = [f"{expected}, found {len(places_a.keys() & places_b.keys()):,} in common"]
    for path, own, other in ((a, places_a, places_b), (b, places_b, places_a)):
        only = [at for key, at in own.items() if key not in other]
        lines.append(f"{path}: {len(own):,} examples, {len(only):,} only there")
        if only:
            with path.open("rb") as file:
                found = _read_at(file, only[0])
            lines[-1] += f", as row {found['row']}: {shorten(found['prompt'])}"
    return "\n  ".join([*lines, f"evaluate both on the same data: {REMEDY}"])


def _read_at(file: Any, place: int) -> Record:
    file.seek(place)
    return json.loads(file.readline())


def differing_examples(found: Comparison, num: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the first `num` examples (None: all) that score differently, with both answers."""
    with found.a.open("rb") as file_a, found.b.open("rb") as file_b:
        for pair in found.differing[:num]:
            in_a, in_b = _read_at(file_a, pair.at_a), _read_at(file_b, pair.at_b)
            yield {
                **{key: in_a[key] for key in KEYS},
                "a": {"answer": in_a["answer"], "error": in_a.get("error"), **pair.scores_a},
                "b": {"answer": in_b["answer"], "error": in_b.get("error"), **pair.scores_b},
            }


def difference_table(title: str, found: dict[str, Difference], a: str, b: str) -> Table:
    """Returns a table of the values of `a` and `b`, and b - a with its interval and verdict."""
    rows = (
        (
            Text(beginning(name)),
            f"{row.value_a:.4g}",
            f"{row.value_b:.4g}",
            f"{row.difference:+.4g}",
            "" if row.low is None else f"{row.low:+.3g} to {row.high:+.3g}",
            f"{row.adjusted_p:.2g}",
            colour_verdict(row.verdict),
        )
        for name, row in found.items()
    )
    columns = ("metric", a, b, f"{b} - {a}", "95 % interval", "p", f"{b} is")
    return table(title, columns, rows, note=describe_verdicts(len(found)))


def describe_verdicts(num: int) -> str:
    """Returns the note below a table of so many verdicts."""
    adjusted = f", adjusted for {num} comparisons (Holm)" if num > 1 else ""
    return f"a verdict needs p < 0.05{adjusted}"


def colour_verdict(verdict: Verdict) -> Text:
    return Text(verdict, style={"better": "green", "worse": "red"}.get(verdict, ""))


def wins_table(found: Comparison) -> Table:
    """Returns a table of both files, and of how often each scores higher."""
    rows: list[tuple[str, str | Text]] = [("A", str(found.a)), ("B", str(found.b))]
    rows += [
        (metric, f"A scores more on {wins.a:,} examples, B on {wins.b:,}, alike on {wins.tied:,}")
        for metric, wins in found.wins.items()
    ]
    return facts("Examples", rows)


def examples_table(found: Comparison, num: int) -> Table:
    """Returns a table of the first `num` examples that score differently, side by side."""
    title = f"The first of {len(found.differing):,} examples that score differently"
    rows = (
        (
            Text(beginning(example["prompt"])),
            Text(beginning(example["reference"])),
            *(_describe_answer(example[run], found.wins) for run in ("a", "b")),
        )
        for example in differing_examples(found, num)
    )
    return table(title, ("prompt", "reference", "A", "B"), rows, left=4, lines=True)


def _describe_answer(scored: dict[str, Any], metrics: dict[str, Wins]) -> Text:
    """Returns an answer, or why it failed, with its scores below."""
    failed = scored["answer"] is None
    text = f"failed: {scored['error']}" if failed else scored["answer"]
    scores = ", ".join(f"{metric} {scored[metric]:.3g}" for metric in metrics)
    return Text.assemble((beginning(text), "red" if failed else ""), (f"\n{scores}", "dim"))


def comparison_json(found: Comparison) -> dict[str, Any]:
    """Returns a comparison as JSON, with every example that scores differently."""
    return {
        "a": str(found.a),
        "b": str(found.b),
        "num_examples": found.num_examples,
        "differences": {name: asdict(row) for name, row in found.differences.items()},
        "wins": {metric: wins._asdict() for metric, wins in found.wins.items()},
        "examples": list(differing_examples(found)),
    }
