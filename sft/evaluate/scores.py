"""Scores all answers together, with 95 % intervals, and compares the scores of two runs.

Shares have Wilson's interval. All other scores and all differences have one by how far each example
moves them, the jackknife over examples (`sft/evaluate/intervals.py`). Two runs are compared on the
same examples (paired), and a verdict takes into account how many verdicts are in its table.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sft.errors import UserError
from sft.evaluate.intervals import ALPHA, EXCHANGES, Interval, bounded, holm, of_difference
from sft.evaluate.metrics import AT_ONCE, Classification, Measure, Verdict, influences, make_measure

TIE = 1e-9  # differences that are this close are equal but for rounding
Key = TypeVar("Key", bound=Hashable)
ALWAYS_REPORTED = ("num_examples", "metrics", "intervals")  # even if they are empty


class Tally:
    """Statistics of each example, from which the scores of all examples together are computed.

    An example takes 8 bytes for its number and 8 for each statistic (`chrf` has 18, `bleu` 10, any
    other metric 1), and as much again if it has a group. Scoring takes up to three copies of that.
    `names` are those of metrics, `labels` those of the metric `classification`. `groups` has a
    tally for each group. Raises UserError for an unknown metric.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[str] = ()) -> None:
        self.groups: defaultdict[str, Tally] = defaultdict(partial(Tally, names, labels))
        self._measures = {name: make_measure(name, labels) for name in names}
        self._width = 1 + sum(measure.size for measure in self._measures.values())
        self._rows = array("d")

    def add(
        self,
        number: int,
        answer: str | None,
        reference: str,
        prompt: str = "",
        group: str | None = None,
    ) -> dict[str, float]:
        """Counts one example, in its group too; returns its own scores by metric.

        `number` is its place in the data set. `prompt` is the source text of SARI. Raises UserError
        for a reference that a metric cannot use.
        """
        row, scores = array("d", [number]), {}
        for name, measure in self._measures.items():
            try:
                scores[name], statistics = measure.measure(answer, reference, prompt)
            except UserError as error:
                raise UserError(f"example {number}: {name} {error}") from None
            row.extend(statistics)
        self._rows += row
        if group is not None:
            self.groups[group]._rows += row
        return scores

    @property
    def rows(self) -> np.ndarray:
        """Returns float64 [examples, 1 + statistics], sorted by the first column, the number.

        To merge the tallies of all ranks, concatenate their rows and set the result.
        """
        rows = np.asarray(self._rows).reshape(-1, self._width)
        ordered = rows[np.argsort(rows[:, 0], kind="stable")]
        return np.asfortranarray(ordered)  # sums of columns take half the time

    @rows.setter
    def rows(self, rows: np.ndarray) -> None:
        assert rows.shape[1] == self._width, (rows.shape, self._width)
        self._rows = array("d", rows.tobytes())

    def rows_of(self, name: str) -> np.ndarray:
        """Returns the rows of a tally of the metric `name` alone."""
        rows = self.rows
        parts = zip(self._measures, self._parts(rows), strict=True)
        (own,) = (part for each, (_, part) in parts if each == name)
        return np.hstack([rows[:, :1], own])

    @property
    def num_examples(self) -> int:
        return len(self._rows) // self._width

    def values(self) -> dict[str, float]:
        """Returns metric values by name; {} if there are no examples.

        `classification` has several: accuracy, macro_precision, macro_recall, macro_f1, and for
        each label precision/<label>, recall/<label> and f1/<label>.
        """
        found = self._values(self.rows, np.ones((1, self.num_examples)))
        return {name: float(values[0]) for _, name, values in found}

    def intervals(self) -> dict[str, Interval]:
        """Returns 95 % intervals by name, but for scores with too few examples for one."""
        found = {}
        for measure, part in self._parts(self.rows) if self.num_examples else ():
            pulls = influences(measure, part)
            supports, shares = measure.supports(part), measure.shares(part)
            for name, values in measure.values(measure.sums(part, np.ones((1, len(part))))).items():
                if name in shares:
                    found[name] = shares[name]
                elif (num := supports[name]) is not None:
                    error = float(np.std(pulls[name])) / max(1, len(part) - 1) ** 0.5
                    found[name] = bounded(float(values[0]), error, num, 0, measure.most)
        return found

    def confusion(self) -> dict[str, dict[str, int]]:
        """Returns numbers of examples: {label of the reference: {label of the answer: number}}.

        It is empty without `classification`.
        """
        for measure, part in self._parts(self.rows):
            if isinstance(measure, Classification):
                return measure.confusion(part)
        return {}

    def report(self) -> dict[str, Any]:
        """Returns num_examples, metrics, intervals, and confusion and groups, if there are any."""
        found = {
            "num_examples": self.num_examples,
            "metrics": self.values(),
            "intervals": self.intervals(),
            "confusion": self.confusion(),
            "groups": {name: own.report() for name, own in sorted(self.groups.items())},
        }
        return {name: value for name, value in found.items() if value or name in ALWAYS_REPORTED}

    def _parts(self, rows: np.ndarray) -> Iterator[tuple[Measure, np.ndarray]]:
        """Yields (measure, the measure's columns of `rows`)."""
        start = 1
        for measure in self._measures.values():
            yield measure, rows[:, start : start + measure.size]
            start += measure.size

    def _values(
        self, rows: np.ndarray, counts: np.ndarray
    ) -> Iterator[tuple[Measure, str, np.ndarray]]:
        """Yields (measure, name, values [samples]); nothing if there are no examples."""
        for measure, part in self._parts(rows) if len(rows) else ():
            for name, values in measure.values(measure.sums(part, counts)).items():
                yield measure, name, values

    def _stack_values(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns values [names, samples]."""
        found = [values for *_, values in self._values(rows, counts)]
        return np.array(found).reshape(-1, len(counts))


@dataclass(frozen=True)
class Difference:
    """The difference of `b` from `a` in one metric; `verdict` is about `b`.

    Without an interval (see `Measure.supports`) `low` and `high` are None. `p_value` is that of the
    metric alone, `adjusted_p` that of all metrics of the table (`intervals.holm`). Only the latter
    decides: with many metrics, one of them has an interval without 0 often enough by chance.
    """

    value_a: float
    value_b: float
    difference: float
    low: float | None
    high: float | None
    p_value: float
    adjusted_p: float
    verdict: Verdict


def compare_tallies(a: Tally, b: Tally) -> dict[str, Difference]:
    """Compares two tallies of the same examples; returns differences by name, judged together."""
    found = {}
    p_values = _p_values(a, a.rows, b.rows)
    for (name, pair), p_value in zip(paired_intervals(a, b).items(), p_values, strict=True):
        found[name] = Difference(*pair, p_value, p_value, "not distinguishable")
    return judge(found)


class PairedValues(NamedTuple):
    """Both values of a metric, and their difference with its interval; None if it has none."""

    value_a: float
    value_b: float
    difference: float
    low: float | None
    high: float | None


def paired_intervals(a: Tally, b: Tally) -> dict[str, PairedValues]:
    """Returns the differences of `b` from `a`, two tallies of the same examples, by name."""
    rows_a, rows_b = a.rows, b.rows
    assert np.array_equal(rows_a[:, 0], rows_b[:, 0]), "not the same examples"
    found: dict[str, PairedValues] = {}
    for (measure, of_a), (_, of_b) in zip(a._parts(rows_a), b._parts(rows_b), strict=True):
        if len(rows_a):
            found |= _paired(measure, of_a, of_b)
    return found


def _paired(measure: Measure, of_a: np.ndarray, of_b: np.ndarray) -> dict[str, PairedValues]:
    """Returns `paired_intervals` of one measure, from its statistics of both runs."""
    differs, once = (of_a != of_b).any(axis=1), np.ones((1, len(of_a)))
    values_a, values_b = (measure.values(measure.sums(each, once)) for each in (of_a, of_b))
    pulls_a, pulls_b = influences(measure, of_a), influences(measure, of_b)
    supports_a, supports_b = measure.supports(of_a), measure.supports(of_b)
    found = {}
    for name in values_a:
        value_a, value_b = float(values_a[name][0]), float(values_b[name][0])
        difference, pulls = value_b - value_a, pulls_b[name] - pulls_a[name]
        support_a, support_b = supports_a[name], supports_b[name]
        low = high = None
        if support_a is not None and support_b is not None:
            num = min(support_a, support_b)
            low, high = of_difference(difference, pulls, differs, num, measure.most)
        found[name] = PairedValues(value_a, value_b, difference, low, high)
    return found


def judge(
    found: Mapping[Key, Difference], lower_is_better: Container[Key] = ()
) -> dict[Key, Difference]:
    """Returns differences that stand in one table, with adjusted p-values and verdicts."""
    adjusted = holm({key: each.p_value for key, each in found.items()})
    judged = {}
    for key, each in found.items():
        is_better = (each.difference > 0) != (key in lower_is_better)
        verdict: Verdict = "better" if is_better else "worse"
        if adjusted[key] >= ALPHA:
            verdict = "not distinguishable"
        judged[key] = replace(each, adjusted_p=adjusted[key], verdict=verdict)
    return judged


def _p_values(tally: Tally, rows_a: np.ndarray, rows_b: np.ndarray) -> list[float]:
    """Returns p-values [names] of the differences, by approximate randomisation.

    If both runs are equally good, exchanging their answers to any example changes nothing. The
    p-value is the share of exchanges, each example's by a coin, that give at least this difference
    (Noreen 1989; Riezler and Maxwell 2005). For scores of 0 and 1 this is McNemar's exact test.
    """
    differs = (rows_a != rows_b).any(axis=1)
    rows = np.concatenate([rows_a[differs], rows_b[differs], rows_a[~differs]])
    num, num_same = int(differs.sum()), len(rows_a) - int(differs.sum())

    def evaluate(exchanged: np.ndarray) -> np.ndarray:
        same = np.ones((len(exchanged), num_same))
        of_a = tally._stack_values(rows, np.hstack([~exchanged, exchanged, same]))
        return tally._stack_values(rows, np.hstack([exchanged, ~exchanged, same])) - of_a

    found = np.abs(evaluate(np.zeros((1, num), dtype=bool)))
    at_least, rng = np.ones(len(found)), np.random.default_rng(0)  # the exchange of nothing
    for start in range(0, EXCHANGES, batch := max(1, AT_ONCE // max(1, len(rows)))):
        exchanged = rng.random((min(batch, EXCHANGES - start), num)) < 0.5
        at_least += (np.abs(evaluate(exchanged)) >= found - TIE).sum(axis=1)
    return (at_least / (1 + EXCHANGES)).tolist()
