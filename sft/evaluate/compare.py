"""Two runs on the same examples: better, worse or not distinguishable, and where they differ.

The files of predictions are joined by (row, prompt, reference). Of each example only the place in
its file is kept; texts are read again when they are shown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from sft.config.load import load_config
from sft.config.schema import Evaluation
from sft.errors import UserError, excerpt
from sft.evaluate.metrics import Verdict
from sft.evaluate.scores import Difference, Tally, difference
from sft.runtime.console import beginning, facts

KEYS = ("row", "prompt", "reference")  # what an example is known by
Scores = dict[str, float]


class Pair(NamedTuple):
    """An example of both runs: where its lines begin, bytes, and its scores by metric."""

    at_a: int
    at_b: int
    scores_a: Scores
    scores_b: Scores


class Wins(NamedTuple):
    """Examples by which run scores more."""

    a: int
    b: int
    tied: int


@dataclass(frozen=True)
class Comparison:
    a: Path
    b: Path
    num_examples: int
    differences: dict[str, Difference]  # of values: `classification` has several
    wins: dict[str, Wins]  # of metrics
    unlike: list[Pair]  # in the order of A


def compare(a: Path, b: Path, names: Sequence[str], labels: Sequence[str] = ()) -> Comparison:
    """`a` and `b`: run folders or files of predictions.

    Raises UserError where they have not the same examples, each once, with the keys of today.
    """
    a, b = predictions(a, "A"), predictions(b, "B")
    tally_a, tally_b = Tally(names, labels), Tally(names, labels)
    wins = {name: Counter[str]() for name in names}
    unlike = []
    with a.open("rb") as file_a, b.open("rb") as file_b:
        for at_a, at_b in _joined(a, b):
            one, other = _at(file_a, at_a), _at(file_b, at_b)
            scores_a, scores_b = _add(tally_a, one, one, a), _add(tally_b, one, other, b)
            for name in names:
                wins[name][_winner(scores_a[name], scores_b[name])] += 1
            if scores_a != scores_b:
                unlike.append(Pair(at_a, at_b, scores_a, scores_b))
    counted = {name: Wins(count["a"], count["b"], count["tied"]) for name, count in wins.items()}
    num_unlike = {name: count.a + count.b for name, count in counted.items()}
    found = difference(tally_a, tally_b, num_unlike)
    return Comparison(a, b, tally_a.num_examples, found, counted, unlike)


def _add(tally: Tally, example: dict[str, Any], answered: dict[str, Any], file: Path) -> Scores:
    try:
        return tally.add(
            example["index"], answered["answer"], example["reference"], example["prompt"]
        )
    except UserError as error:
        raise UserError(f"{file}: {error} (row {example['row']})") from None


def _winner(a: float, b: float) -> str:
    return "tied" if a == b else "a" if a > b else "b"


REMEDY = "make evaluate RUN=<folder> writes one into <folder>/evaluation/evaluate"

# --- by what is compared -------------------------------------------------------------------------


def predictions(path: Path, name: str) -> Path:
    """The file of a run folder, of a folder that holds one, or `path` itself where it is a file."""
    found = [path / "predictions.jsonl", path / "evaluation" / "predictions.jsonl", path]
    file = next((each for each in found if each.is_file()), None)
    if file is None:
        raise UserError(
            f"{name}={path}: expected a run, a folder of its evaluation/ or a predictions.jsonl; "
            f"found none; {REMEDY}"
        )
    return file


def configured(a: Path, b: Path) -> tuple[list[str], list[str]]:
    """(metrics, labels) of the configurations of both runs where they agree; else exact_match,
    and no labels."""
    metrics_a, labels_a = _configured(predictions(a, "A"))
    metrics_b, labels_b = _configured(predictions(b, "B"))
    agreed = metrics_a if metrics_a == metrics_b else ["exact_match"]
    return agreed, labels_a if labels_a == labels_b else []


def _configured(file: Path) -> tuple[list[str], list[str]]:
    near = (folder / "config.yaml" for folder in list(file.resolve().parents)[:3])
    config = next((each for each in near if each.is_file()), None)
    evaluation = load_config(config).evaluation if config else Evaluation()
    return [*evaluation.metrics], [*(evaluation.labels or [])]


# --- reading -------------------------------------------------------------------------------------


def _joined(a: Path, b: Path) -> Iterator[tuple[int, int]]:
    """(place in A, place in B) of every example, in the order of A."""
    places_a, places_b = _places(a), _places(b)
    if places_a.keys() != places_b.keys() or not places_a:
        raise UserError(_unlike(a, places_a, b, places_b))
    return ((at, places_b[key]) for key, at in places_a.items())


def _places(path: Path) -> dict[bytes, int]:
    """Digest of an example -> where its line begins, bytes."""
    places: dict[bytes, int] = {}
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            example = _parsed(path, number, line)
            key = blake2b(json.dumps([example[key] for key in KEYS]).encode(), digest_size=16)
            if key.digest() in places:
                raise UserError(
                    f"{path}:{number}: row {example['row']} is there twice, with the same prompt "
                    "and reference; expected each example once"
                )
            places[key.digest()] = at
            at += len(line)
    return places


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        example = json.loads(line)
    except (ValueError, RecursionError):
        example = None
    if not isinstance(example, dict):
        found = "no JSON object"
    elif missing := [key for key in (*KEYS, "index", "answer") if key not in example]:
        found = f"none of {', '.join(missing)} but {', '.join(example) or 'nothing'}"
    elif wrong := [key for key in example if not _is_right(key, example[key])]:
        found = ", ".join(f"{key} {excerpt(example[key])}" for key in wrong)
    else:
        return example
    raise UserError(
        f"{path}:{number}: expected an object with the texts row, prompt and reference, the number "
        f"index, and answer (a text, or null where it failed); found {found}; "
        f"{REMEDY}"
    )


def _is_right(key: str, value: Any) -> bool:
    if key == "index":
        return isinstance(value, int) and value >= 0
    return (
        isinstance(value, str) or key not in (*KEYS, "answer") or (key, value) == ("answer", None)
    )


def _unlike(a: Path, places_a: dict[bytes, int], b: Path, places_b: dict[bytes, int]) -> str:
    """What the two files do not have in common, with an example each."""
    lines = [
        f"expected the same examples (row, prompt, reference) in both, found "
        f"{len(places_a.keys() & places_b.keys()):,} in common"
    ]
    for path, own, other in ((a, places_a, places_b), (b, places_b, places_a)):
        only = [at for key, at in own.items() if key not in other]
        lines.append(f"{path}: {len(own):,} examples, {len(only):,} only there")
        if only:
            with path.open("rb") as file:
                found = _at(file, only[0])
            lines[-1] += f", as row {found['row']}: {excerpt(found['prompt'])}"
    return "\n  ".join([*lines, f"evaluate both on the same data: {REMEDY}"])


def _at(file: Any, place: int) -> dict[str, Any]:
    file.seek(place)
    return json.loads(file.readline())


def examples(found: Comparison, num: int | None = None) -> Iterator[dict[str, Any]]:
    """The first `num` examples (None: all) that score differently, with both answers."""
    with found.a.open("rb") as file_a, found.b.open("rb") as file_b:
        for pair in found.unlike[:num]:
            one, other = _at(file_a, pair.at_a), _at(file_b, pair.at_b)
            yield {
                **{key: one[key] for key in KEYS},
                "a": {"answer": one["answer"], "error": one.get("error"), **pair.scores_a},
                "b": {"answer": other["answer"], "error": other.get("error"), **pair.scores_b},
            }


# --- what people see -----------------------------------------------------------------------------


def table(found: Comparison) -> Table:
    title = f"B against A on {found.num_examples:,} examples"
    return difference_table(title, found.differences, "A", "B")


def difference_table(title: str, found: dict[str, Difference], a: str, b: str) -> Table:
    """Values of `a` and `b`, and the difference b - a with its 95 % interval."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("metric", overflow="fold", max_width=34)
    for column in (a, b, f"{b} - {a}", "95 % interval"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column(f"{b} is", no_wrap=True)
    for name, row in found.items():
        shown.add_row(
            Text(beginning(name)),
            f"{row.value_a:.4g}",
            f"{row.value_b:.4g}",
            f"{row.difference:+.4g}",
            f"{row.low:+.3g} to {row.high:+.3g}",
            coloured(row.verdict),
        )
    return shown


def coloured(verdict: Verdict) -> Text:
    return Text(verdict, style={"better": "green", "worse": "red"}.get(verdict, ""))


def wins_table(found: Comparison) -> Table:
    rows: list[tuple[str, str | Text]] = [("A", str(found.a)), ("B", str(found.b))]
    rows += [
        (name, f"A scores more on {wins.a:,} examples, B on {wins.b:,}, alike on {wins.tied:,}")
        for name, wins in found.wins.items()
    ]
    return facts("Examples", rows)


def examples_table(found: Comparison, num: int) -> Table:
    """The first `num` examples that score differently, answers side by side."""
    title = f"The first of {len(found.unlike):,} examples that score differently"
    shown = Table(title=title, title_justify="left", show_lines=True)
    for column in ("prompt", "reference", "A", "B"):
        shown.add_column(column, overflow="fold", ratio=1)
    for example in examples(found, num):
        shown.add_row(
            Text(beginning(example["prompt"])),
            Text(beginning(example["reference"])),
            *(_answer(example[run], found.wins) for run in ("a", "b")),
        )
    return shown


def _answer(scored: dict[str, Any], names: dict[str, Wins]) -> Text:
    """An answer with its scores below; why it failed in place of one that did."""
    failed = scored["answer"] is None
    text = f"failed: {scored['error']}" if failed else scored["answer"]
    scores = ", ".join(f"{name} {scored[name]:.3g}" for name in names)
    return Text.assemble((beginning(text), "red" if failed else ""), (f"\n{scores}", "dim"))


def report(found: Comparison) -> dict[str, Any]:
    """Everything as JSON: every example that scores differently, too."""
    return {
        "a": str(found.a),
        "b": str(found.b),
        "num_examples": found.num_examples,
        "differences": {name: asdict(row) for name, row in found.differences.items()},
        "wins": {name: wins._asdict() for name, wins in found.wins.items()},
        "examples": list(examples(found)),
    }
