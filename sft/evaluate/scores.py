"""Scores all answers together, with 95 % intervals, and compares the scores of two runs.

Intervals are percentiles of `scipy.stats.bootstrap` over the examples. SciPy's BCa method would
correct bias and skew. But its time grows with the square of the number of examples, and it gives no
interval if all examples score the same. Two runs are compared on the same resamples (paired).
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sft.errors import UserError
from sft.evaluate.metrics import Classification, Measure, Verdict, make_measure

RESAMPLES = 1000
AT_ONCE = 2**20  # examples that are drawn at once, over several resamples: about 40 MB
# Examples that must score differently for a verdict. If two runs are equally good and only five
# examples differ, all five favour the same run with a probability of 6 %.
FEWEST_DIFFERING = 6
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

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % intervals by name; of zero width if all examples score the same."""
        rows = self.rows
        found = _intervals(lambda counts: self._stack_values(rows, counts), len(rows)).tolist()
        return {name: (low, high) for name, (low, high) in zip(self.values(), found, strict=True)}

    def confusion(self) -> dict[str, dict[str, int]]:
        """Returns numbers of examples: {label of the reference: {label of the answer: number}}.

        It is empty without `classification`.
        """
        for _, measure, part in self._parts(self.rows):
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

    def _parts(self, rows: np.ndarray) -> Iterator[tuple[str, Measure, np.ndarray]]:
        """Yields (metric, measure, the measure's columns of `rows`)."""
        start = 1
        for metric, measure in self._measures.items():
            yield metric, measure, rows[:, start : start + measure.size]
            start += measure.size

    def _values(
        self, rows: np.ndarray, counts: np.ndarray
    ) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yields (metric, name, values [resamples]); nothing if there are no examples."""
        for metric, measure, part in self._parts(rows) if len(rows) else ():
            for name, values in measure.values(part, counts).items():
                yield metric, name, values

    def _stack_values(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns values [names, resamples]."""
        found = [values for *_, values in self._values(rows, counts)]
        return np.array(found).reshape(-1, len(counts))


def _intervals(evaluate: Callable[[np.ndarray], np.ndarray], num_examples: int) -> np.ndarray:
    """Returns 95 % intervals [names, 2].

    `evaluate` maps counts [resamples, examples] to values [names, resamples]. A count says how
    often a resample has an example.
    """
    if num_examples < 2:  # every resample is the sample
        return evaluate(np.ones((1, num_examples))).repeat(2, axis=1)
    from scipy.stats import bootstrap

    def statistic(places: np.ndarray, axis: int) -> np.ndarray:
        # Each resample gets bins of its own, so one call counts all of them.
        bins = places + np.arange(len(places))[:, None] * num_examples
        counts = np.bincount(bins.ravel(), minlength=bins.size).reshape(bins.shape)
        return evaluate(counts.astype(float))

    low, high = bootstrap(
        (np.arange(num_examples),),
        statistic,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // num_examples),
        method="percentile",
        rng=0,
    ).confidence_interval
    return np.stack([low, high], axis=1)


@dataclass(frozen=True)
class Difference:
    """The difference of `b` from `a` in one metric; `verdict` is about `b`."""

    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    verdict: Verdict


def compare_tallies(
    a: Tally, b: Tally, num_differing: Mapping[str, int] | None = None
) -> dict[str, Difference]:
    """Compares two tallies of the same examples by paired bootstrap; returns differences by name.

    `num_differing` says by metric how many examples score differently; None: all. If fewer than
    FEWEST_DIFFERING do, the verdict is "not distinguishable", since the bootstrap's interval would
    be too narrow.
    """
    rows_a, rows_b, num = a.rows, b.rows, a.num_examples
    assert np.array_equal(rows_a[:, 0], rows_b[:, 0]), "not the same examples"
    bounds = _intervals(
        lambda counts: b._stack_values(rows_b, counts) - a._stack_values(rows_a, counts), num
    )
    once, found = np.ones((1, num)), {}
    for (metric, name, of_a), (_, _, of_b), (low, high) in zip(
        a._values(rows_a, once), b._values(rows_b, once), bounds.tolist(), strict=True
    ):
        verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
        if (num if num_differing is None else num_differing[metric]) < FEWEST_DIFFERING:
            verdict = "not distinguishable"
        value_a, value_b = float(of_a[0]), float(of_b[0])
        found[name] = Difference(value_a, value_b, value_b - value_a, low, high, verdict)
    return found
