"""Scores of answers by name. A score of all examples is a function of sums over them.

The numbers that an example adds to these sums are its statistics. They are whole numbers or
multiples of `GRID`, so that sums in float64 are exact in any order (up to eight million examples),
and any cut over processes gives the same bits.

A measure has a `size`, the number of statistics per example. `measure(answer, reference, prompt)`
returns an example's score and statistics, and raises UserError for a reference that it cannot use.
`values(sums)` returns values [samples] by name from sums [samples, terms] of a measure's terms:
`sums(rows, counts)` returns them for `rows` [examples, size] of statistics and `counts` [samples,
examples], how often each example is in a sample; `terms(rows)` [examples, terms] is what each adds.
`supports(rows)` returns by name how many examples a value is computed from; None if they are too
few for an interval. `shares(rows)` returns intervals of values that are shares of these examples.

A higher score is better for every metric. `bleu` and `chrf` go up to 100, as in sacrebleu, all
others to 1. The answer None means a failure: it scores 0 and is counted.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from sft.config.schema import MetricName
from sft.errors import UserError, shorten, suggest
from sft.evaluate.intervals import Interval, wilson, wilson_f1
from sft.evaluate.labels import label_of

NAMES: tuple[str, ...] = get_args(MetricName)
FEWEST_OF_A_LABEL = 10  # references of each label that an interval of a macro score needs
GRID = 2.0**-30  # step of fractional scores: 1e-9; sums below 2**23 stay exact
AT_ONCE = 2**20  # numbers that are computed at once: 8 MB
FAILURE = "(none of them)"  # stands for an answer without a label
Measured = tuple[float, Sequence[float]]  # score of an example by itself, its statistics
Values = dict[str, np.ndarray]
Supports = dict[str, int | None]
Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True)
class Mean:
    """The mean over examples of `score(answer, reference, prompt)`, 0 to 1."""

    name: str
    score: Callable[[str, str, str], float]
    size: int = 1
    most: int = 1

    def measure(self, answer: str | None, reference: str, prompt: str) -> Measured:
        score = self.score(answer or "", reference, prompt)  # checks the reference, too
        score = 0.0 if answer is None else score
        return score, [round(score / GRID) * GRID]

    def terms(self, rows: np.ndarray) -> np.ndarray:
        return np.column_stack([rows, np.ones(len(rows))])

    def sums(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return counts @ self.terms(rows)

    def values(self, sums: np.ndarray) -> Values:
        return {self.name: sums[:, 0] / sums[:, 1]}

    def supports(self, rows: np.ndarray) -> Supports:
        return {self.name: len(rows)}

    def shares(self, rows: np.ndarray) -> dict[str, Interval]:
        if self.name not in MATCHES:
            return {}
        return {self.name: wilson(rows[:, 0].sum() / max(1, len(rows)), len(rows))}


def exact_match(answer: str, reference: str, *_: str) -> float:
    """Returns 1 if both are equal except for white space around them."""
    return float(answer.strip() == reference.strip())


def normalised_match(answer: str, reference: str, *_: str) -> float:
    """Returns 1 if both are equal except for case, punctuation, articles and white space (SQuAD).

    Unlike in SQuAD, a text of nothing but these keeps them: "A" is not "The", "?" is not "!".
    """
    return float(_normalise(answer) == _normalise(reference))


def _normalise(text: str) -> str:
    words = "".join(c for c in text.lower() if not _is_punctuation(c)).split()
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words) or text.strip()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


# A minus after a word, digit or bracket subtracts or joins: 5-3, (4)-3, a range 5-10.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-−])?\$?"
    r"(?P<digits>\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?|\.\d+)"
)


def numeric_match(answer: str, reference: str, *_: str) -> float:
    """Returns 1 if both have the same number: the first after the last `####`, or else the last.

    As in GSM8K, commas, a dollar or percent sign and trailing zeros do not matter.
    """
    expected = _number(reference)
    if expected is None:
        raise UserError(f"needs a number in the reference, found {shorten(reference)}")
    return float(_number(answer) == expected)


def _number(text: str) -> Decimal | None:
    _, mark, tail = text.rpartition("####")
    found = list(NUMBER.finditer(tail))
    if not found:
        return None
    number = found[0 if mark else -1]
    value = Decimal(number["digits"].replace(",", ""))
    return -value if number["sign"] else value


def json_valid(answer: str, *_: str) -> float:
    """Returns 1 if the whole answer is JSON (RFC 8259), without a code fence or NaN."""
    try:
        _parse_json(answer)
    except ValueError:
        return 0.0
    return 1.0


def json_fields(answer: str, reference: str, *_: str) -> float:
    """Returns the share of leaves that are equal in both; 0 if the answer is not JSON.

    A leaf is a path (keys, indices of lists) to a scalar, an empty list or an empty object. So a
    missing, a wrong and an additional leaf cost the same.
    """
    try:
        expected = _leaves(_parse_json(reference))
    except ValueError:
        raise UserError(f"needs JSON as the reference, found {shorten(reference)}") from None
    try:
        found = _leaves(_parse_json(answer))
    except ValueError:
        return 0.0
    equal = [_is_equal(leaf, found[path]) for path, leaf in expected.items() if path in found]
    return sum(equal) / len(expected.keys() | found.keys())


def _parse_json(text: str) -> Any:
    """Returns the value. Raises ValueError if it is not JSON, or nested too deeply for Python."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _leaves(value: Any) -> dict[tuple[str | int, ...], Any]:
    """Returns leaves by path, without recursion, since the model chooses the depth."""
    leaves: dict[tuple[str | int, ...], Any] = {}
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:
        path, value = waiting.pop()
        if value and isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [((*path, key), child) for key, child in items]
        else:
            leaves[path] = value
    return leaves


def _is_equal(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)  # True == 1 in Python


def rouge_l(answer: str, reference: str, *_: str) -> float:
    """Returns the F1 of the longest common subsequence of words (rouge-score, no stemmer).

    Only a-z and 0-9 are read, so texts in other scripts score 0.
    """
    return _rouge().score(reference, answer)["rougeL"].fmeasure


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def sari(source: str, answer: str, references: Sequence[str]) -> float:
    """Returns the SARI of a simplification, 0 to 1 (Xu et al. 2016, TACL 4:401).

    It is the mean, over n-grams of 1 to 4 words, of what was rightly kept (F1), deleted (precision)
    and added (F1). As in its authors' SARI.py, words are lower-cased and cut at white space only.
    """
    scores: list[float] = []
    for n in range(1, 5):
        of_references = sum((_ngrams(text, n) for text in references), Counter())
        scores += _sari_of(_ngrams(source, n), _ngrams(answer, n), of_references, len(references))
    return sum(scores) / len(scores)


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.lower().split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _sari_of(
    source: Counter, answer: Counter, references: Counter, num_references: int
) -> tuple[float, float, float]:
    """Returns (keep, delete, add) for n-grams of one length.

    `references` counts the n-grams of all references together, so the counts of source and answer
    are multiplied by their number.
    """
    source = Counter({gram: count * num_references for gram, count in source.items()})
    answer = Counter({gram: count * num_references for gram, count in answer.items()})
    kept, to_keep = source & answer, source & references
    rightly = kept & references
    keep = _f1(_mean_share(rightly, kept), _mean_share(rightly, to_keep))
    deleted = source - answer
    delete = _mean_share(deleted - references, deleted)
    added, to_add = answer.keys() - source.keys(), references.keys() - source.keys()
    good = len(added & to_add)
    add = _f1(good / max(1, len(added)), good / max(1, len(to_add)))
    return keep, delete, add


def _mean_share(part: Counter, whole: Counter) -> float:
    """Returns count in `part` / count in `whole`, averaged over the n-grams of `whole`."""
    return sum(count / whole[gram] for gram, count in part.items()) / max(1, len(whole))


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class Sacrebleu:
    """Corpus BLEU or chrF of sacrebleu with its defaults, 0 to 100.

    For BLEU these are 13a tokens and exponential smoothing; chrF is chrF2, up to 6 characters.
    sacrebleu does not publish an example's statistics; its own corpus scores and significance tests
    use these two private methods.
    """

    def __init__(self, name: str) -> None:
        from sacrebleu.metrics import BLEU, CHRF
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a, TokenizerRegexp

        self.name, self.most = name, 100
        self._corpus: Any
        self._single: Any
        self._caches = [Tokenizer13a.__call__, TokenizerRegexp.__call__]
        # A single example is scored with BLEU's effective order, as sacrebleu advises.
        self._corpus, self._single = BLEU(), BLEU(effective_order=True)
        self.size = 10  # lengths of answer and reference; matches and n-grams, n = 1 to 4
        if name == "chrf":
            self._corpus = self._single = CHRF()
            self.size = 18  # n-grams of answer, of reference, matches; n = 1 to 6

    def measure(self, answer: str | None, reference: str, prompt: str) -> Measured:
        for each in self._caches:  # sacrebleu keeps the last 65,536 texts
            each.cache_clear()
        (row,) = self._single._extract_corpus_statistics([answer or ""], [[reference]])
        return self._single._compute_score_from_stats(row).score, row

    def terms(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def sums(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return counts @ rows

    def values(self, sums: np.ndarray) -> Values:
        each = sums.astype(int).tolist()
        return {
            self.name: np.array([self._corpus._compute_score_from_stats(s).score for s in each])
        }

    def supports(self, rows: np.ndarray) -> Supports:
        return {self.name: len(rows)}

    def shares(self, rows: np.ndarray) -> dict[str, Interval]:
        return {}


class Classification:
    """Scores from the confusion counts [label of the reference, label of the answer or FAILURE].

    `label_of` finds both labels. An answer without one counts as wrong; a reference must have one.
    An example's score is 1 or 0; its statistic is the index of its cell.
    """

    size = most = 1

    def __init__(self, labels: Sequence[str]) -> None:
        names = [label.strip() for label in labels]
        if not names or len({*names, FAILURE, ""}) < len(names) + 2:
            raise UserError(
                "classification needs evaluation.labels: the labels of the references, each once "
                f"and neither empty nor {FAILURE!r}; found {names or 'none'}"
            )
        self.labels = names

    def measure(self, answer: str | None, reference: str, prompt: str) -> Measured:
        truth, given = label_of(reference, self.labels), label_of(answer, self.labels)
        if truth is None:
            raise UserError(
                f"needs one of evaluation.labels as the reference, found {shorten(reference)}; "
                f"{suggest(reference.strip(), self.labels)}"
            )
        num = len(self.labels)
        column = num if given is None else self.labels.index(given)
        return float(given == truth), [self.labels.index(truth) * (num + 1) + column]

    def terms(self, rows: np.ndarray) -> np.ndarray:
        return np.eye(self._num_cells)[rows[:, 0].astype(int)]

    def sums(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        cells = rows[:, 0].astype(int)
        return np.array([np.bincount(cells, each, self._num_cells) for each in counts])

    def values(self, sums: np.ndarray) -> Values:
        right, truth, given = self._count(sums)
        kinds = {
            "precision": _ratio(right, given),
            "recall": _ratio(right, truth),
            "f1": _ratio(2 * right, given + truth),
        }
        found = {"accuracy": right.sum(axis=1) / sums.sum(axis=1)}
        found |= {f"macro_{kind}": each.mean(axis=1) for kind, each in kinds.items()}
        for place, label in enumerate(self.labels):
            found |= {f"{kind}/{label}": each[:, place] for kind, each in kinds.items()}
        return found

    def supports(self, rows: np.ndarray) -> Supports:
        right, truth, given = self._count(self._all(rows)).astype(int)[:, 0].tolist()
        found: Supports = {"accuracy": len(rows)}
        enough = len(rows) if min(truth) >= FEWEST_OF_A_LABEL else None
        found |= {f"macro_{kind}": enough for kind in ("precision", "recall", "f1")}
        for label, own, of_truth, of_given in zip(self.labels, right, truth, given, strict=True):
            found |= {f"precision/{label}": of_given, f"recall/{label}": of_truth}
            found[f"f1/{label}"] = of_truth + of_given - own
        return found

    def shares(self, rows: np.ndarray) -> dict[str, Interval]:
        right, truth, given = self._count(self._all(rows))[:, 0].tolist()
        found = {"accuracy": wilson(sum(right) / max(1, len(rows)), len(rows))}
        for label, own, of_truth, of_given in zip(self.labels, right, truth, given, strict=True):
            found[f"precision/{label}"] = wilson(own / max(1, of_given), of_given)
            found[f"recall/{label}"] = wilson(own / max(1, of_truth), of_truth)
            found[f"f1/{label}"] = wilson_f1(own, of_truth + of_given - 2 * own)
        return found

    @property
    def _num_cells(self) -> int:
        return len(self.labels) * (len(self.labels) + 1)

    def _all(self, rows: np.ndarray) -> np.ndarray:
        return self.sums(rows, np.ones((1, len(rows))))

    def _tables(self, sums: np.ndarray) -> np.ndarray:
        """Returns confusion counts [samples, label of the reference, label of the answer]."""
        return sums.reshape(len(sums), len(self.labels), len(self.labels) + 1)

    def _count(self, sums: np.ndarray) -> np.ndarray:
        """Returns numbers [3, samples, labels] of right, of true and of given labels."""
        tables = self._tables(sums)
        right = tables.diagonal(axis1=1, axis2=2)
        return np.stack([right, tables.sum(axis=2), tables[:, :, :-1].sum(axis=1)])

    def confusion(self, rows: np.ndarray) -> dict[str, dict[str, int]]:
        """Returns the number of examples by the reference's label, then by the answer's label."""
        columns = [*self.labels, FAILURE]
        table = self._tables(self._all(rows))[0].astype(int).tolist()
        return {
            label: dict(zip(columns, line, strict=True))
            for label, line in zip(self.labels, table, strict=True)
        }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole; 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


MEANS: dict[str, Callable[[str, str, str], float]] = {
    "exact_match": exact_match,
    "normalised_match": normalised_match,
    "numeric_match": numeric_match,
    "json_valid": json_valid,
    "json_fields": json_fields,
    "rouge_l": rouge_l,
    "sari": lambda answer, reference, prompt: sari(prompt, answer, [reference]),
}
MATCHES = ("exact_match", "normalised_match", "numeric_match", "json_valid")  # each 0 or 1
Measure = Mean | Sacrebleu | Classification


def influences(measure: Measure, rows: np.ndarray) -> Values:
    """Returns by name how far each example moves a value, times their number [examples].

    It is the jackknife's (Efron 1982): each example is left out once. Equal ones are left out
    together, and sums change by one example's terms, so the cost is that of the different ones.
    """
    num = len(rows)
    whole = measure.sums(rows, np.ones((1, num)))
    values = measure.values(whole)
    if num < 2:
        return {name: np.zeros(num) for name in values}
    different, places = np.unique(rows, axis=0, return_inverse=True)
    batch = max(1, AT_ONCE // whole.shape[1])
    parts = [different[start : start + batch] for start in range(0, len(different), batch)]
    without = [measure.values(whole - measure.terms(part)) for part in parts]
    places = places.reshape(-1)
    return {
        name: ((num - 1) * (value - np.concatenate([each[name] for each in without])))[places]
        for name, value in values.items()
    }


def make_measure(name: str, labels: Sequence[str]) -> Measure:
    """Returns the measure of that name. Raises UserError for an unknown one."""
    if name in MEANS:
        return Mean(name, MEANS[name])
    if name in ("bleu", "chrf"):
        return Sacrebleu(name)
    if name == "classification":
        return Classification(labels)
    raise UserError(f"unknown metric {name!r}; {suggest(name, NAMES)}")
