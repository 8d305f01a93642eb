"""Scores of standard benchmarks: intervals, the table, and the comparison of two runs.

`make benchmark` writes a folder with `metrics.json` and `predictions.jsonl`, of which each line has
the statistics of one example. A metric is a function of these, by its kind:

- `mean`: the mean of `[score]`;
- `perplexity` and `bits`: exp(-r) and -r / ln 2, where r is the sum of log likelihoods over the sum
  of weights (words or bytes) of `[log likelihood, weight]`; the weight 1 may be left out;
- `other`: computed by lm-eval of all examples together. It is shown, and not compared.

A group of tasks has a mean of the means of its tasks, each with a weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from sft.config.load import load_config
from sft.errors import UserError, shorten
from sft.evaluate.intervals import (
    Interval,
    bounded,
    difference_of_ratios,
    of_difference,
    sign_test,
    unbounded,
    wilson,
)
from sft.evaluate.scores import Difference, judge
from sft.runtime import plain
from sft.runtime.console import beginning, table

FOLDER = "benchmark"  # in evaluation/ of a run
METRICS, PREDICTIONS = "metrics.json", "predictions.jsonl"
REMEDY = "make benchmark RUN=<folder> TASKS=<tasks> writes one"
Statistics = list[float]
Rows = Mapping[str, Sequence[Statistics]]  # statistics of each example, by task
# What must be equal so that only the models differ, by the key of `metrics.json`.
ASKED = ("apply_chat_template", "fewshot_as_multiturn", "system_instruction", "gen_kwargs", "seed")


@dataclass(frozen=True)
class Score:
    """The value of a metric. `weights`: of each task, which all add up to 1 (groups have several).

    `metric`: the name among the statistics of an example.
    """

    value: float
    interval: Interval | None
    kind: str
    higher_is_better: bool
    num_examples: int
    metric: str
    weights: dict[str, float]


def as_value(kind: str, ratio: float) -> float:
    """Returns the value of a metric of this kind from its mean or ratio."""
    if kind == "perplexity":
        return math.exp(min(-ratio, 700.0))
    return 0 - ratio / math.log(2) if kind == "bits" else ratio  # 0 of 0, not -0


def make_interval(kind: str, rows: Rows, weights: Mapping[str, float]) -> Interval | None:
    """Returns the 95 % interval of a metric, or None where examples do not give one."""
    columns = [np.array(rows[task], dtype=float) for task in weights]
    if not all(len(each) and np.isfinite(each).all() for each in columns):
        return None
    if kind == "mean":
        scores = [each[:, 0] for each in columns]
        together = np.concatenate(scores)
        if len(scores) == 1 and set(together) <= {0, 1}:
            return wilson(float(together.mean()), len(together))
        return _interval_of_mean(scores, [*weights.values()])
    if kind in ("perplexity", "bits"):
        likelihoods, own = _with_weights(columns[0]).T
        if len(own) < 2:
            return None
        low, high = difference_of_ratios(np.zeros(len(own)), likelihoods, own)
        return as_value(kind, min(0.0, high)), as_value(kind, low)  # no likelihood is above 1
    return None


def _with_weights(statistics: np.ndarray) -> np.ndarray:
    """Returns log likelihoods and weights [examples, 2]; the weights are 1 if none are given."""
    return np.column_stack([statistics, np.ones(len(statistics))])[:, :2]


def _interval_of_mean(scores: Sequence[np.ndarray], weights: Sequence[float]) -> Interval | None:
    """Returns the interval of a weighted mean of means: Wilson's with an effective number if all
    scores are between 0 and 1, else Student's t for one task, and none for several."""
    together = np.concatenate(scores)
    if together.min() >= 0 and together.max() <= 1:
        pairs = list(zip(scores, weights, strict=True))
        value = sum(weight * float(own.mean()) for own, weight in pairs)
        error = math.sqrt(sum(weight**2 * float(own.var()) / len(own) for own, weight in pairs))
        return bounded(value, error, len(together))
    return unbounded(together.tolist()) if len(scores) == 1 else None


def scores_table(title: str, scores: Mapping[str, Score], note: str | None = None) -> Table:
    """Returns a table of values with their intervals, at most 100 columns wide."""
    rows = (
        (
            Text(beginning(name)),
            f"{score.value:.4g}",
            "" if score.interval is None else "{:.4g} to {:.4g}".format(*score.interval),
            f"{score.num_examples:,}",
            "higher" if score.higher_is_better else "lower",
        )
        for name, score in scores.items()
    )
    columns = ("task/metric", "value", "95 % interval", "examples", "better is")
    return table(title, columns, rows, note=note)


def output_folder(model: str, given: Path | None) -> Path:
    """Returns where results go: `given`, or else evaluation/benchmark of the run `model`.

    Raises UserError for a run that did not fine-tune a language model.
    """
    config = Path(model) / "config.yaml"
    is_run = config.is_file() and not (Path(model) / "config.json").exists()
    if is_run:
        load_config(config, [])
    if given is not None:
        return given
    if not is_run:
        raise UserError(
            f"OUTPUT: required, since {model} is no run with a folder for results, as in "
            "OUTPUT=outputs/benchmark_of_base"
        )
    return Path(model) / "evaluation" / FOLDER


# --- the comparison of two runs ------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmarked:
    """What a folder of results has. `examples`: the key and statistics of each, by task and row."""

    folder: Path
    values: dict[str, Any]
    scores: dict[str, Score]
    examples: dict[str, dict[str, tuple[str, dict[str, Statistics]]]]


@dataclass(frozen=True)
class BenchmarkComparison:
    """How the run B compares with A. `notes`: what differs besides the models."""

    a: Path
    b: Path
    num_examples: int
    differences: dict[str, Difference]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        differences = {name: asdict(each) for name, each in self.differences.items()}
        return asdict(self) | {"a": str(self.a), "b": str(self.b), "differences": differences}


def find_folder(path: Path) -> Path | None:
    """Returns the folder of results at `path`, of a file in it, or in evaluation/ of a run."""
    beside = path.parent if path.name in (METRICS, PREDICTIONS) else path
    for folder in (beside, path / "evaluation" / FOLDER):
        if "lm_eval" in plain.read_json(folder / METRICS):
            return folder
    return None


def compare_benchmarks(a: Path, b: Path) -> BenchmarkComparison:
    """Returns how the results in folder `b` compare with those in `a`, on the same examples.

    Raises UserError for tasks of different versions or with different examples.
    """
    of_a, of_b = _read(a), _read(b)
    tasks_a, tasks_b = of_a.values["tasks"], of_b.values["tasks"]
    common = [task for task in tasks_a if task in tasks_b]
    if not common:
        raise UserError(
            f"expected results of the same tasks, found {', '.join(tasks_a)} in {a} and "
            f"{', '.join(tasks_b)} in {b}; {REMEDY}"
        )
    for task in common:
        _refuse_different(task, of_a, of_b)
    differences = {}
    for name, score in of_a.scores.items():
        other = of_b.scores.get(name)
        is_same = other is not None and score.weights == other.weights
        if (
            other is not None
            and is_same
            and {*score.weights} <= {*common}
            and score.kind != "other"
        ):
            differences[name] = _compare(score, other, of_a, of_b)
    lower = {name for name in differences if not of_a.scores[name].higher_is_better}
    return BenchmarkComparison(
        a,
        b,
        sum(len(of_a.examples[task]) for task in common),
        judge(differences, lower),
        [*_describe_differences(of_a, of_b, common)],
    )


def _compare(score: Score, other: Score, of_a: Benchmarked, of_b: Benchmarked) -> Difference:
    """Returns the difference in one metric, not yet judged."""
    rows_a, rows_b = ([*_columns(score, each)] for each in (of_a, of_b))
    difference = other.value - score.value
    if score.kind == "mean":
        # What each example adds to the difference, by task.
        shares = [
            (b[:, 0] - a[:, 0]) * (weight / len(a))
            for a, b, weight in zip(rows_a, rows_b, score.weights.values(), strict=True)
        ]
        together = np.concatenate(shares)
        interval, p_value = None, sign_test(together.tolist())
        if len(together) > 1:
            pulls = np.concatenate([len(together) * (own - own.mean()) for own in shares])
            scores = np.concatenate([*rows_a, *rows_b])[:, 0]
            most = 1.0 if np.abs(scores).max() <= 1 else math.inf
            interval = of_difference(difference, pulls, together != 0, most=most)
    else:
        (a,), (b,) = ([_with_weights(each) for each in rows] for rows in (rows_a, rows_b))
        interval, p_value = None, sign_test((b[:, 0] - a[:, 0]).tolist())
        if len(a) > 1:
            # The ratio of A is taken as it was measured, so the interval is that of the change.
            moved = difference_of_ratios(a[:, 0], b[:, 0], a[:, 1])
            ratio = float(a[:, 0].sum() / a[:, 1].sum())
            most, least = (as_value(score.kind, ratio + each) - score.value for each in moved)
            interval = least, most
    low, high = interval or (None, None)
    return Difference(
        score.value, other.value, difference, low, high, p_value, p_value, "not distinguishable"
    )


def _columns(score: Score, of: Benchmarked) -> Iterator[np.ndarray]:
    """Yields the statistics [examples, 1 or 2] of each task of a score, in the order of rows."""
    for task in score.weights:
        rows = of.examples[task]
        yield np.array([rows[row][1][score.metric] for row in sorted(rows)], dtype=float)


def _refuse_different(task: str, of_a: Benchmarked, of_b: Benchmarked) -> None:
    """Raises UserError unless both have asked the same examples of the same version of a task."""
    versions = [each.values["tasks"][task]["version"] for each in (of_a, of_b)]
    if versions[0] != versions[1]:
        raise UserError(
            f"{task}: A has version {versions[0]} of this task, B version {versions[1]}; "
            "benchmark both with the same version of lm-eval"
        )
    keys_a, keys_b = (
        {row: key for row, (key, _) in each.examples[task].items()} for each in (of_a, of_b)
    )
    if keys_a != keys_b:
        num = len(keys_a.items() & keys_b.items())
        raise UserError(
            f"{task}: expected the same examples in both, found {len(keys_a):,} in A, "
            f"{len(keys_b):,} in B and {num:,} in common; give both the same benchmark.limit, "
            "benchmark.samples and data"
        )


def _describe_differences(
    of_a: Benchmarked, of_b: Benchmarked, common: Sequence[str]
) -> Iterator[str]:
    """Yields what differs between both besides the model, and which tasks only one has."""
    for name in ASKED:
        a, b = of_a.values.get(name), of_b.values.get(name)
        if a != b:
            yield f"asked in another way: {name} is {shorten(a)} in A, {shorten(b)} in B"
    shots = {
        f"{a} in A, {b} in B": task
        for task in common
        if (a := of_a.values["tasks"][task]["num_fewshot"])
        != (b := of_b.values["tasks"][task]["num_fewshot"])
    }
    for found, task in shots.items():
        yield f"asked in another way: num_fewshot of {task} is {found}"
    for run, each in (("A", of_a), ("B", of_b)):
        if only := [task for task in each.values["tasks"] if task not in common]:
            yield f"only in {run}: {', '.join(only)}"


def _read(folder: Path) -> Benchmarked:
    values, examples = plain.read_json(folder / METRICS), dict[str, Any]()
    path = folder / PREDICTIONS
    try:
        scores = {
            name: Score(**(own | {"interval": own["interval"] and tuple(own["interval"])}))
            for name, own in values["scores"].items()
        }
        with plain.open_file(path, "r", encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                own = examples.setdefault(record["task"], {})
                own[record["row"]] = (record["key"], record["scores"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected scores of examples, found {error!r}; {REMEDY}") from None
    return Benchmarked(folder, values, scores, examples)
