"""How often 95 % intervals hold the true value, and how many tables have a false verdict.

    PYTHONPATH=. python benchmarks/intervals.py [--tries 4000]
        [--json benchmarks/results/intervals.json]

coverage  Samples of 20 to 300 examples are drawn from populations whose scores are known, and
          scored as `make evaluate` and `make compare` do. Coverage of shares is computed from the
          binomial distribution, beside that of percentiles of a bootstrap; all other coverage is
          simulated. "labels" are precision, recall and F1 of single labels. Differences are those
          of two runs that are equally good, and of two of which one has other answers to a fifth
          of the examples; "few" are those where less than ten examples differ on average.
tables    Two runs that are equally good are compared. Reported is the share of tables with at least
          one verdict, by p-values adjusted for their number (Holm) and by p-values as they are.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from sft.evaluate import scores
from sft.evaluate.intervals import unbounded, wilson
from sft.evaluate.scores import Tally, compare_tallies, paired_intervals
from sft.runtime.console import make_console, table, write_json

SIZES = (20, 30, 100, 300)
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
EXCHANGES = 999  # of each table
FEW = 10  # examples that differ
Draw = Callable[[np.random.Generator, int], np.ndarray]  # -> rows of the metric [runs, num, size]

# Scores of single examples, as ROUGE-L and equal JSON fields have them.
MEANS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "middling": lambda rng, num: rng.beta(2, 2, num),
    "high, skewed": lambda rng, num: rng.beta(5, 1, num),
    "low, skewed": lambda rng, num: rng.beta(1, 8, num),
    "half right, others spread": lambda rng, num: mixed(rng, num, 0.5, 1, rng.beta(2, 2, num)),
    "4 of 5 right": lambda rng, num: mixed(rng, num, 0.8, 1, rng.beta(4, 2, num)),
    "9 of 10 right": lambda rng, num: mixed(rng, num, 0.9, 1, rng.random(num)),
    "1 of 20 fails": lambda rng, num: mixed(rng, num, 0.05, 0, rng.beta(9, 3, num)),
}
# Divergences of answers, differences of losses; and their true means.
UNBOUNDED: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "exponential": (lambda rng, num: rng.exponential(1, num), 1.0),
    "lognormal": (lambda rng, num: np.exp(rng.normal(0, 1, num)), float(np.exp(0.5))),
    "gamma of 1/2": (lambda rng, num: rng.gamma(0.5, 1, num), 0.5),
    "1 of 5 drifts": (lambda rng, num: mixed(rng, num, 0.8, 0.02, rng.gamma(1, 1, num)), 0.216),
    "symmetric, heavy tails": (lambda rng, num: rng.standard_t(5, num), 0.0),
}
# Share of each label, how often each is found; the rest are other labels and failures.
LABELS = {
    "2 labels": ([0.5, 0.5], [0.8, 0.85]),
    "2 labels, 1 in 10": ([0.9, 0.1], [0.95, 0.7]),
    "4 labels": ([0.25] * 4, [0.75, 0.9, 0.6, 0.75]),
    "5 labels, 1 in 20": ([0.5, 0.2, 0.15, 0.1, 0.05], [0.9, 0.8, 0.7, 0.6, 0.6]),
}
# Shares of right answers of two runs, and their correlation.
PAIRS = {
    "60 % and 60 %": (0.6, 0.6, 0.5),
    "50 % and 60 %": (0.5, 0.6, 0.3),
    "80 % and 90 %": (0.8, 0.9, 0.5),
    "95 % and 95 %": (0.95, 0.95, 0.3),
}
# Where both runs are equally good.
TABLES = ("60 % and 60 %", "95 % and 95 %", "4 of 5 right", *LABELS, "changed words")


def mixed(
    rng: np.random.Generator, num: int, share: float, score: float, others: np.ndarray
) -> np.ndarray:
    return np.where(rng.random(num) < share, score, others)


def pairs_of(draw: Callable[[np.random.Generator, int], np.ndarray]) -> Draw:
    """Returns a draw of two equally good runs, which score half of the examples alike."""

    def rows(rng: np.random.Generator, num: int) -> np.ndarray:
        a, b = draw(rng, num), draw(rng, num)
        return np.stack([a, np.where(rng.random(num) < 0.5, a, b)])[..., None]

    return rows


def changed(draw: Callable[[np.random.Generator, int], np.ndarray]) -> Draw:
    """Returns a draw of two runs; the second one has a fifth of the first one's answers worsened,
    or improved if most are bad."""
    score = float(draw(np.random.default_rng(2), 10_000).mean() < 0.7)

    def rows(rng: np.random.Generator, num: int) -> np.ndarray:
        both = pairs_of(draw)(rng, num)
        both[1, rng.random(num) < 0.2] = score
        return both

    return rows


def right_and_wrong(share_a: float, share_b: float, correlation: float) -> Draw:
    spread = np.sqrt(share_a * (1 - share_a) * share_b * (1 - share_b))
    both = share_a * share_b + correlation * spread
    cells = [both, share_a - both, share_b - both, 1 - share_a - share_b + both]

    def rows(rng: np.random.Generator, num: int) -> np.ndarray:
        cell = rng.choice(4, num, p=cells)
        return np.stack([cell < 2, cell % 2 == 0]).astype(float)[..., None]

    return rows


def labelled(shares: list[float], found: list[float]) -> Draw:
    """Returns a draw of confusion cells of two equally good runs, which agree on half of them."""

    def rows(rng: np.random.Generator, num: int) -> np.ndarray:
        count = len(shares)
        truth = rng.choice(count, num, p=shares)

        def answer() -> np.ndarray:
            other = (truth + rng.integers(1, count + 1, num)) % (count + 1)  # the last: a failure
            return np.where(rng.random(num) < np.array(found)[truth], truth, other)

        a = answer()
        b = np.where(rng.random(num) < 0.5, a, answer())
        return (truth * (count + 1) + np.stack([a, b]))[..., None].astype(float)

    return rows


def translated(metric: str) -> np.ndarray:
    """Returns statistics [runs, 2000, size] of two runs that change other words of sentences."""
    rng, tallies = np.random.default_rng(0), [Tally([metric]) for _ in range(2)]
    for number in range(2000):
        words = [f"w{word}" for word in rng.zipf(1.4, rng.integers(5, 25)) % 500]
        rate = rng.beta(1, 3)
        for tally in tallies:
            kept = np.where(rng.random(len(words)) < rate, "x", words)
            tally.add(number, " ".join(kept), " ".join(words))
    return np.stack([tally.rows[:, 1:] for tally in tallies])


def tally_of(metric: str, labels: list[str], rows: np.ndarray) -> Tally:
    tally = Tally([metric], labels)
    tally.rows = np.column_stack([np.arange(len(rows)), rows])
    return tally


def share_rows() -> Iterator[dict[str, Any]]:
    """Yields the coverage of Wilson's interval and of percentiles of a bootstrap."""
    for num in SIZES:
        right = np.arange(num + 1)
        wilsons = np.array([wilson(k / num, num) for k in right])
        percentiles = np.array([binom(num, k / num).ppf([0.025, 0.975]) / num for k in right])

        def coverage(bounds: np.ndarray, share: float, right: np.ndarray = right) -> float:
            holds = (bounds[:, 0] <= share + 1e-12) & (share <= bounds[:, 1] + 1e-12)
            return float(binom(right[-1], share).pmf(right) @ holds)

        grid = np.linspace(0.5, 0.99, 981)
        named = {f"{share:.0%}": [share] for share in SHARES} | {"50 % to 99 %, mean": grid}
        for shape, truths in named.items():
            yield {
                "kind": "share",
                "shape": shape,
                "num": num,
                "coverage": float(np.mean([coverage(wilsons, each) for each in truths])),
                "percentiles": float(np.mean([coverage(percentiles, each) for each in truths])),
            }


def unbounded_rows(tries: int) -> Iterator[dict[str, Any]]:
    """Yields the coverage of means without bounds: divergences and losses of a verdict."""
    for shape, (draw, truth) in UNBOUNDED.items():
        for num in SIZES:
            rng, held = np.random.default_rng(num), 0
            for _ in range(tries):
                low, high = unbounded(draw(rng, num).tolist()) or (np.nan, np.nan)
                held += low <= truth <= high
            yield {"kind": "unbounded mean", "shape": shape, "num": num, "coverage": held / tries}


@dataclass(frozen=True)
class Population:
    """What samples are drawn from, and the values of all of it for both runs."""

    kind: str
    shape: str
    metric: str
    labels: list[str]
    draw: Draw
    truths: list[dict[str, float]]


def populations() -> Iterator[Population]:
    def make(
        kind: str, shape: str, draw: Draw, metric: str, labels: Sequence[str] = ()
    ) -> Population:
        whole = draw(np.random.default_rng(1), 200_000)
        truths = [tally_of(metric, [*labels], rows).values() for rows in whole]
        return Population(kind, shape, metric, [*labels], draw, truths)

    for shape, of_pairs in PAIRS.items():
        yield make("share", shape, right_and_wrong(*of_pairs), "exact_match")
    for shape, draw in MEANS.items():
        yield make("mean", shape, pairs_of(draw), "rouge_l")
        yield make("mean", f"{shape}; 1 of 5 changed", changed(draw), "rouge_l")
    for shape, (shares, found) in LABELS.items():
        names = [f"l{n}" for n in range(len(shares))]
        yield make("classification", shape, labelled(shares, found), "classification", names)
    for metric in ("bleu", "chrf"):
        rows = translated(metric)

        def sample(rng: np.random.Generator, num: int, rows: np.ndarray = rows) -> np.ndarray:
            drawn = rows[:, rng.integers(0, rows.shape[1], num)]
            return np.where(rng.random((num, 1)) < 0.5, drawn, drawn[::-1])  # equally good runs

        truth = tally_of(metric, [], np.concatenate(rows)).values()
        yield Population(metric, "changed words", metric, [], sample, [truth, truth])


def kind_of(kind: str, name: str) -> str:
    if kind == "classification":
        return "labels" if "/" in name else "macro" if "macro" in name else "share"
    return kind


def simulate(of: Population, num: int, tries: int) -> Iterator[dict[str, Any]]:
    """Yields the coverage of each kind of score of `num` examples, and of differences."""
    rng = np.random.default_rng(num)
    held, differing = defaultdict(list), 0
    for _ in range(tries):
        a, b = (tally_of(of.metric, of.labels, rows) for rows in of.draw(rng, num))
        bounds = {} if of.metric == "exact_match" else a.intervals()
        for name, truth in of.truths[0].items():
            kind = kind_of(of.kind, name)
            if name in bounds:
                low, high = bounds[name]
                held[kind].append(low - 1e-9 <= truth <= high + 1e-9)
        differing += int((a.rows != b.rows).any(axis=1).sum())
        for name, row in paired_intervals(a, b).items():
            truth = of.truths[1][name] - of.truths[0][name]
            if row.low is not None and row.high is not None:
                kind = "difference of " + kind_of(of.kind, name)
                held[kind].append(row.low - 1e-9 <= truth <= row.high + 1e-9)
    for kind, found in held.items():
        each = {"kind": kind, "shape": of.shape, "num": num, "coverage": float(np.mean(found))}
        each["intervals"] = len(found)
        if kind.startswith("difference"):
            each["differing"] = differing / tries
        yield each


def table_rows(tries: int) -> Iterator[dict[str, Any]]:
    """Yields the share of tables with a verdict, where both runs are equally good."""
    for of in populations():
        for num in (30, 100, 300) if of.shape in TABLES else ():
            rng, plain, adjusted, size = np.random.default_rng(num), 0, 0, 0
            for _ in range(tries):
                rows = of.draw(rng, num)
                found = compare_tallies(*(tally_of(of.metric, of.labels, each) for each in rows))
                size = len(found)
                plain += any(each.p_value < 0.05 for each in found.values())
                adjusted += any(each.verdict != "not distinguishable" for each in found.values())
            yield {
                "metric": of.metric,
                "shape": of.shape,
                "num": num,
                "comparisons": size,
                "tables": tries,
                "false": plain / tries,
                "false_holm": adjusted / tries,
            }


def summary(coverage: list[dict[str, Any]]) -> list[str]:
    """Returns lines of a table for docs/INFER.md: the mean over shapes, lowest, highest, in %."""
    cells: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in coverage:
        few = row.get("differing", FEW) < FEW
        kind = "differences where few differ" if few else row["kind"]
        cells[kind][row["num"]].append(100 * row["coverage"])
    lines = [f"| coverage in % | {' | '.join(map(str, SIZES))} |", "|---" * 5 + "|"]
    for kind, found in cells.items():
        lines.append(f"| {kind} | {' | '.join(_spread(found[num]) for num in SIZES)} |")
    return lines


def _spread(values: list[float]) -> str:
    """Returns the mean, and in brackets lowest and highest if there are several."""
    if not values:
        return "-"
    both = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{both}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=4000)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/intervals.json"))
    args = parser.parse_args()
    console = make_console()
    coverage = [*share_rows(), *unbounded_rows(args.tries)]
    for of in populations():
        coverage += [row for num in SIZES for row in simulate(of, num, args.tries)]
    scores.EXCHANGES = EXCHANGES
    tables = [*table_rows(args.tries // 8)]
    cells: defaultdict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for row in coverage:
        cells[row["kind"], row["shape"]][row["num"]] = f"{row['coverage']:.1%}"
    shown = [[*key, *(each.get(num, "-") for num in SIZES)] for key, each in cells.items()]
    console.print(table("Coverage", ("kind", "shape", *map(str, SIZES)), shown, left=2))
    keys = ("metric", "shape", "num", "comparisons", "false", "false_holm")
    shown = [[f"{row[k]:.3g}" if k in keys[2:] else row[k] for k in keys] for row in tables]
    console.print(table("Tables with a false verdict", keys, shown, left=2))
    write_json(args.json, {"tries": args.tries, "coverage": coverage, "tables": tables})


if __name__ == "__main__":
    main()
