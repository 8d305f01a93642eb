"""95 % intervals of scores, one function for each kind, and verdicts that hold in a table of many.

docs/INFER.md says which score has which.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

LEVEL = 0.95
ALPHA = 0.05  # a verdict needs a smaller adjusted p-value
EXCHANGES = 9999  # p-values from 0.0001, so Holm's method has room for 500
AT_ONCE = 2**22  # signs that are drawn at once: about 60 MB
Z = 1.959964  # quantile of the normal distribution that leaves 5 % outside
AT_BOUND = 0.15  # of an example, counted at each bound of a score (benchmarks/intervals.py)
Interval = tuple[float, float]
Key = TypeVar("Key", bound=Hashable)


def wilson(share: float, num: float, quantile: float = Z) -> Interval:
    """Returns the interval of a share of `num` examples; 0 to 1 without examples.

    It is Wilson's score interval (1927, JASA 22:209). Unlike a bootstrap or the normal
    approximation it has a width where all examples score the same, and stays within 0 and 1.
    """
    if num <= 0:
        return 0.0, 1.0
    square = quantile**2 / num
    center = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


def wilson_f1(right: float, others: float) -> Interval:
    """Returns the interval of the F1 of one label, 2 right / (2 right + others).

    `others`: false positives and false negatives. F1 grows with right / (right + others), which is
    a share, so its bounds are those of that share.
    """
    num = right + others
    low, high = wilson(right / num if num else 0.0, num)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def bounded(value: float, error: float, num: int, least: float = 0, most: float = 1) -> Interval:
    """Returns the interval of any score between `least` and `most` with this standard error.

    It is Wilson's for the number of 0/1 scores that would have the same error, as samples with
    weights have it (Korn and Graubard 1998), with the quantile of Student's t. `num` examples may
    not show how widely scores vary, so a part of an example more is counted at each bound.
    """
    if num < 2:
        return least, most
    share, error = (value - least) / (most - least), error / (most - least)
    mean = (num * share + AT_BOUND) / (num + 2 * AT_BOUND)
    squares = (num * (num * error**2 + share**2) + AT_BOUND) / (num + 2 * AT_BOUND)
    effective = num * mean * (1 - mean) / (squares - mean**2)
    low, high = wilson(share, effective, _student(num))
    return least + low * (most - least), least + high * (most - least)


def of_influences(
    value: float, influences: np.ndarray, extra: float = 0, num: int | None = None
) -> Interval:
    """Returns the interval of a value without bounds, such as a loss or a difference of scores.

    `influences` [examples] say how far each example moves the value, times the number of examples;
    of a mean, they are the deviations from it. On each side, the interval is the wider one of
    Student's t and its correction for skewness, the cubic of Hall (1992, J. R. Statist. Soc. B
    54:221): a few large values make the upper side longer, and too few of them show no skewness.
    `extra` counts one example more, half of it with this value and half with its negative. `num` is
    the number of examples that matter, if it is not all.
    """
    size, num = len(influences), num or len(influences)
    if size < 2 or num < 2:
        return -math.inf, math.inf
    values = np.append(value + influences, [extra, -extra])
    weights = np.append(np.ones(size), [0.5, 0.5] if extra else [0, 0])
    mean = np.average(values, weights=weights)
    deviation = math.sqrt(np.average((values - mean) ** 2, weights=weights))
    if deviation == 0:
        return value, value
    skewness = float(np.average((values - mean) ** 3, weights=weights)) / deviation**3
    quantile = _student(num)

    def corrected(t: float) -> float:
        if abs(skewness) < 1e-6:
            return t
        cube = 1 + skewness * (t - skewness / (6 * size))
        return 3 / skewness * (math.copysign(abs(cube) ** (1 / 3), cube) - 1)

    normal = quantile / math.sqrt(size)
    plain = normal * math.sqrt(num / (num - 1))
    low = value - deviation * max(plain, corrected(normal))
    return low, value + deviation * max(plain, -corrected(-normal))


def of_difference(
    value: float,
    influences: np.ndarray,
    differs: np.ndarray,
    num: int | None = None,
    most: float = math.inf,
) -> Interval:
    """Returns the interval of the difference of two runs' scores of the same examples.

    `differs` [examples]: whether the runs do. Examples may not show how widely runs differ. So one
    more is counted, which differs as much as those that do (the mean square), half to each side; as
    much as possible, `most`, if none does. `num` as for `of_influences`.
    """
    moved = value + influences[differs & (influences != 0)]
    extra = most * len(influences) / max(1, num or len(influences))
    if len(moved) or math.isinf(most):
        extra = math.sqrt(np.mean(moved**2)) if len(moved) else 0.0
    low, high = of_influences(value, influences, extra, num)
    return max(-most, low), min(most, high)


def difference_of_ratios(before: np.ndarray, now: np.ndarray, weights: np.ndarray) -> Interval:
    """Returns the interval of sum(now) / sum(weights) - sum(before) / sum(weights).

    All three are [examples]. It is that of a ratio estimator over examples (Cochran 1977, 6.3); it
    is unbounded with fewer than two examples.
    """
    kept = weights > 0
    gained, weight = (now - before)[kept], weights[kept]
    if not len(weight):
        return -math.inf, math.inf
    ratio = float(gained.sum() / weight.sum())
    return of_influences(ratio, (gained - ratio * weight) / weight.mean())


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Returns p-values adjusted for their number (Holm 1979, Scand. J. Statistics 6:65).

    With a verdict wherever one is below 5 %, any false verdict among all is as rare as that.
    """
    adjusted: dict[Key, float] = {}
    largest = 0.0
    for place, key in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[key]))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


def unbounded(values: Sequence[float]) -> Interval | None:
    """Returns the interval of the mean of values without bounds, such as losses; None for one."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return of_influences(mean, np.asarray(values, float) - mean)


def sign_test(differences: Sequence[float], exchanges: int = EXCHANGES) -> float:
    """Returns the p-value of a mean difference of pairs, by approximate randomisation.

    If both of a pair are equally good, their difference could as well have the other sign. The
    p-value is the share of drawn signs that give at least this mean (`scores.compare_tallies`).
    """
    values = np.asarray(differences, float)
    values = values[values != 0]
    found = abs(values.sum()) * (1 - 1e-9)  # equal but for rounding
    rng, at_least = np.random.default_rng(0), 1  # the exchange of nothing
    for start in range(0, exchanges, batch := max(1, AT_ONCE // max(1, len(values)))):
        signs = rng.integers(0, 2, (min(batch, exchanges - start), len(values))) * 2.0 - 1
        at_least += int((np.abs(signs @ values) >= found).sum())
    return at_least / (1 + exchanges)


def _student(num: int) -> float:
    """Returns the quantile of Student's t for the mean of `num` values."""
    from scipy.special import stdtrit  # `scipy.stats.t` is slow

    return float(stdtrit(num - 1, (1 + LEVEL) / 2))
