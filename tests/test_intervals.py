"""Intervals of single scores, and verdicts among many, against published values and scipy."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, t

from sft.evaluate.intervals import bounded, holm, of_difference, wilson, wilson_f1

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("right", "num", "bounds"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_a_share_has_the_published_interval_of_wilson(right, num, bounds):
    assert wilson(right / num, num) == pytest.approx(bounds, abs=5e-5)
    low, high = wilson(1 - right / num, num)
    assert (1 - high, 1 - low) == pytest.approx(bounds, abs=5e-5)


@given(st.integers(0, 60), st.integers(1, 60))
@settings(deadline=None)
def test_a_share_has_the_interval_of_scipy_which_narrows_with_examples(right, num):
    right = min(right, num)
    low, high = wilson(right / num, num)
    expected = binomtest(right, num).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-6)
    assert 0 <= low <= right / num <= high <= 1
    lower, higher = wilson(right / num, 2 * num)
    assert higher - lower < high - low


def test_without_examples_everything_is_possible():
    assert wilson(0, 0) == wilson_f1(0, 0) == (0, 1)
    assert bounded(40, 0, 1, 0, 100) == (0, 100)


def test_an_f1_has_the_bounds_of_the_share_that_it_grows_with():
    low, high = wilson_f1(right=8, others=4)  # F1 0.8, the share 8 of 12
    bounds = binomtest(8, 12).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx([2 * each / (1 + each) for each in bounds], abs=1e-6)
    assert low < 0.8 < high


VALUES = st.sampled_from([0.0, 1.0]) | st.floats(0.001, 0.999)


@given(VALUES, st.floats(0, 0.5), st.integers(2, 500))
@settings(deadline=None)
def test_a_bounded_interval_contains_the_value_and_keeps_the_bounds(value, error, num):
    low, high = bounded(value, error, num)
    assert 0 <= low <= value <= high <= 1
    scaled = bounded(200 * value - 100, 200 * error, num, -100, 100)
    assert scaled == pytest.approx((200 * low - 100, 200 * high - 100), abs=1e-6)
    wider = bounded(value, error + 0.1, num)
    assert wider[1] - wider[0] >= high - low - 1e-12


def test_with_many_examples_it_is_the_interval_of_student():
    low, high = bounded(0.6, 0.002, 10_000)
    assert (low, high) == pytest.approx(t(9999, 0.6, 0.002).interval(0.95), abs=1e-4)


def test_a_difference_reaches_as_far_as_an_example_more_and_skewness_ask_for():
    equal = of_difference(0.0, np.zeros(30), np.zeros(30, bool), most=1)
    assert equal[1] == -equal[0] > 0  # no example differs, but another may
    assert of_difference(0.0, np.zeros(30), np.zeros(30, bool)) == (0, 0)  # how much is not known
    gained = np.repeat([0.0, 1.0], [24, 6])
    low, high = of_difference(0.2, gained - 0.2, gained != 0, most=1)
    more = np.append(gained, [1, -1])  # half an example each
    weights = np.append(np.ones(30), [0.5, 0.5])
    deviation = np.sqrt(
        np.average((more - np.average(more, weights=weights)) ** 2, weights=weights)
    )
    half = t(29).ppf(0.975) * deviation / 29**0.5
    assert low == pytest.approx(
        0.2 - half
    )  # Student's, as skewness makes only the other side longer
    assert high > 0.2 + half
    again = of_difference(-0.2, 0.2 - gained, gained != 0, most=1)
    assert again == pytest.approx((-high, -low))
    assert of_difference(0.9, np.tile([-3.0, 3.0], 2), np.ones(4, bool), most=1) == (-1, 1)


def test_holm_adjusts_as_in_its_definition():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_intervals_hold_the_true_value_about_95_times_of_100():
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        scores = np.where(rng.random(40) < 0.6, 1, rng.beta(4, 2, 40))  # mean 13/15
        low, high = bounded(scores.mean(), scores.std(ddof=1) / 40**0.5, 40)
        held += low <= 13 / 15 <= high
    assert 0.93 <= held / 1000 <= 0.975


def test_the_guide_shows_the_coverage_that_was_measured():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks/intervals.py")
    bench = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = bench  # dataclasses look it up
    spec.loader.exec_module(bench)
    found = json.loads((ROOT / "benchmarks/results/intervals.json").read_text("utf-8"))
    guide = (ROOT / "docs/INFER.md").read_text("utf-8")
    assert "\n".join(bench.summary(found["coverage"])) in guide
