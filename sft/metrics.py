"""Scores of answers by name, with 95 % intervals by bootstrap over the examples.

An example gives a few numbers, its statistics, and a metric is a function of their sums over all
examples. Statistics are whole numbers or multiples of `GRID`, whose sums in float64 are exact in
every order (up to eight million examples), so any cut over processes gives the same bits.

Intervals are percentiles of `scipy.stats.bootstrap`. BCa would correct them for bias and skew, but
scipy computes it in a time that grows with the square of the number of examples, and it has no
interval where all examples score the same. Two runs are compared on the same resamples (paired).

More is better for every metric. `bleu` and `chrf` are of 100, as sacrebleu reports them, all others
of 1. An answer of None is a failed one: it scores 0 and is counted.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from typing import Any, Literal, NoReturn, Protocol, get_args

import numpy as np

from sft.config import MetricName, UserError, did_you_mean, excerpt

NAMES: tuple[str, ...] = get_args(MetricName)
GRID = 2.0**-30  # of scores that are no whole numbers: 1e-9, and sums below 2**23 stay exact
RESAMPLES = 1000
AT_ONCE = 2**20  # examples in the resamples that are drawn together: about 40 MB
FEWEST = 6  # examples that must differ: five that all improve do so by chance in 6 % (sign test)
REPORTED = ("num_examples", "metrics", "intervals")  # also where they are empty
FAILURE = "(none of them)"  # what an answer is that is no label
Measured = tuple[float, Sequence[float]]  # score of an example by itself, its statistics
Values = dict[str, np.ndarray]


class Measure(Protocol):
    """What one name stands for."""

    @property
    def size(self) -> int:
        """Returns how many statistics an example has."""

    def measure(self, answer: str | None, reference: str, prompt: str) -> Measured:
        """Raises UserError for a reference that this metric cannot use."""

    def values(self, rows: np.ndarray, counts: np.ndarray) -> Values:
        """Returns values [resamples] by name. `rows` [examples, size] are statistics; `counts`
        [resamples, examples] says how often each example is in a resample."""


class Tally:
    """Keeps the statistics of examples, and scores all examples together.

    An example takes 8 bytes for its number and 8 for each statistic (`chrf` has 18, `bleu` 10, any
    other metric 1), and as much again if it has a group. Scoring takes up to three copies of that.
    `groups` has a tally for each group. `labels` are those of `classification`. Raises UserError
    for an unknown name.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[str] = ()) -> None:
        self.groups: dict[str, Tally] = {}
        self._another = partial(Tally, names, labels)
        self._measures = {name: _measure(name, labels) for name in names}
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
            self.of_group(group)._rows += row
        return scores

    def of_group(self, name: str) -> Tally:
        """Returns the tally of this group, empty if it is new."""
        if name not in self.groups:
            self.groups[name] = self._another()
        return self.groups[name]

    @property
    def rows(self) -> np.ndarray:
        """Returns float64 [examples, 1 + statistics], sorted by the first column, the examples'
        numbers. Ranks concatenate theirs and set the result."""
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
        """Returns values by name; of `classification`: accuracy, macro_precision, macro_recall,
        macro_f1 and for each label precision/<label>, recall/<label> and f1/<label>. It is empty
        without examples."""
        found = self._values(self.rows, np.ones((1, self.num_examples)))
        return {name: float(values[0]) for _, name, values in found}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % intervals by name. An interval has no width where all examples score the
        same, as a single one does."""
        rows = self.rows
        found = _intervals(lambda counts: self._stacked(rows, counts), len(rows)).tolist()
        return {name: (low, high) for name, (low, high) in zip(self.values(), found, strict=True)}

    def confusion(self) -> dict[str, dict[str, int]]:
        """Returns the number of examples by label of the reference and of the answer, FAILURE
        among these; it is empty without `classification`."""
        for _, measure, part in self._parts(self.rows):
            if isinstance(measure, Classification):
                return measure.confusion(part)
        return {}

    def report(self) -> dict[str, Any]:
        """Returns what JSON can hold: num_examples, metrics, intervals, confusion if there is one,
        and the same for each of the groups, by name."""
        found = {
            "num_examples": self.num_examples,
            "metrics": self.values(),
            "intervals": self.intervals(),
            "confusion": self.confusion(),
            "groups": {name: own.report() for name, own in sorted(self.groups.items())},
        }
        return {name: value for name, value in found.items() if value or name in REPORTED}

    def _parts(self, rows: np.ndarray) -> Iterator[tuple[str, Measure, np.ndarray]]:
        """Yields (metric, measure, its columns)."""
        start = 1
        for metric, measure in self._measures.items():
            yield metric, measure, rows[:, start : start + measure.size]
            start += measure.size

    def _values(
        self, rows: np.ndarray, counts: np.ndarray
    ) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yields (metric, name, values [resamples]); nothing without examples."""
        for metric, measure, part in self._parts(rows) if len(rows) else ():
            for name, values in measure.values(part, counts).items():
                yield metric, name, values

    def _stacked(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns values [names, resamples]."""
        found = [values for *_, values in self._values(rows, counts)]
        return np.array(found).reshape(-1, len(counts))


def _intervals(values: Callable[[np.ndarray], np.ndarray], num_examples: int) -> np.ndarray:
    """Returns 95 % intervals [names, 2]. `values` maps counts [resamples, examples], how often each
    example is in a resample, to values [names, resamples]."""
    if num_examples < 2:  # every resample is the sample
        return values(np.ones((1, num_examples))).repeat(2, axis=1)
    from scipy.stats import bootstrap

    def statistic(places: np.ndarray, axis: int) -> np.ndarray:
        own = places + np.arange(len(places))[:, None] * num_examples  # counted in one call
        counts = np.bincount(own.ravel(), minlength=own.size).reshape(own.shape)
        return values(counts.astype(float))

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


Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True)
class Difference:
    """Compares `b` with `a` in one metric; it is better if the interval of b - a is above 0."""

    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    verdict: Verdict


def difference(
    a: Tally, b: Tally, num_unlike: Mapping[str, int] | None = None
) -> dict[str, Difference]:
    """Compares two tallies of the same examples by paired bootstrap; the result is by name.

    `num_unlike` (metric -> examples on which the two score differently; None: all) withholds a
    verdict from fewer than FEWEST, of which resampling is too sure.
    """
    rows_a, rows_b, num = a.rows, b.rows, a.num_examples
    assert np.array_equal(rows_a[:, 0], rows_b[:, 0]), "not the same examples"
    bounds = _intervals(lambda counts: b._stacked(rows_b, counts) - a._stacked(rows_a, counts), num)
    once, found = np.ones((1, num)), {}
    for (metric, name, of_a), (_, _, of_b), (low, high) in zip(
        a._values(rows_a, once), b._values(rows_b, once), bounds.tolist(), strict=True
    ):
        unlike = num if num_unlike is None else num_unlike[metric]
        verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
        if unlike < FEWEST:
            verdict = "not distinguishable"
        value_a, value_b = float(of_a[0]), float(of_b[0])
        found[name] = Difference(value_a, value_b, value_b - value_a, low, high, verdict)
    return found


# --- means of a score of each example ------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """The mean of `score(answer, reference, prompt)`, 0 to 1."""

    name: str
    score: Callable[[str, str, str], float]
    size: int = 1

    def measure(self, answer: str | None, reference: str, prompt: str) -> Measured:
        score = self.score(answer or "", reference, prompt)  # looks at the reference, too
        score = 0.0 if answer is None else score
        return score, [round(score / GRID) * GRID]

    def values(self, rows: np.ndarray, counts: np.ndarray) -> Values:
        return {self.name: counts @ rows[:, 0] / len(rows)}


def exact_match(answer: str, reference: str, *_: str) -> float:
    """Equal but for surrounding white space."""
    return float(answer.strip() == reference.strip())


def normalised_match(answer: str, reference: str, *_: str) -> float:
    """Equal but for case, punctuation, articles and white space, as SQuAD's evaluation does.

    Unlike there, an answer of nothing but these keeps them: "A" is not "The", "?" not "!".
    """
    return float(_normalised(answer) == _normalised(reference))


def _normalised(text: str) -> str:
    plain = "".join(c for c in text.lower() if not _is_punctuation(c))
    words = plain.split()
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
    """The number after the last `####`, or without one the last number, is that of the reference.

    As GSM8K is scored: commas, a dollar or percent sign and trailing zeros do not matter.
    """
    expected = _number(reference)
    if expected is None:
        raise UserError(f"needs a number in the reference, found {excerpt(reference)}")
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
    """The answer, as it is, is JSON (RFC 8259): no fence around it, no NaN."""
    try:
        _json(answer)
    except ValueError:
        return 0.0
    return 1.0


def json_fields(answer: str, reference: str, *_: str) -> float:
    """Leaves that answer and reference have alike, of all that either has; 0 if it is no JSON.

    A leaf is a path (keys, places in lists) with what is there: a scalar, or an empty list or
    object. So a missing, a wrong and an additional leaf each cost the same.
    """
    try:
        expected = _leaves(_json(reference))
    except ValueError:
        raise UserError(f"needs JSON as the reference, found {excerpt(reference)}") from None
    try:
        found = _leaves(_json(answer))
    except ValueError:
        return 0.0
    right = [_alike(leaf, found[path]) for path, leaf in expected.items() if path in found]
    return sum(right) / len(expected.keys() | found.keys())


def _json(text: str) -> Any:
    """Raises ValueError for what is no JSON, or nested deeper than Python reads."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _leaves(value: Any) -> dict[tuple[str | int, ...], Any]:
    """Path -> leaf. Without recursion: depth is the model's choice."""
    leaves: dict[tuple[str | int, ...], Any] = {}
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:
        path, value = waiting.pop()
        inner = [((*path, key), child) for key, child in _items(value)]
        waiting += inner
        if not inner:
            leaves[path] = value
    return leaves


def _items(value: Any) -> list[tuple[str | int, Any]]:
    if isinstance(value, list):
        return list(enumerate(value))
    return list(value.items()) if isinstance(value, dict) else []


def _alike(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)  # True == 1 in Python


def rouge_l(answer: str, reference: str, *_: str) -> float:
    """F1 of the longest common subsequence of words (rouge-score, no stemmer). Words are of a-z and
    0-9 only: other scripts score 0."""
    return _rouge().score(reference, answer)["rougeL"].fmeasure


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def sari_of_prompt(answer: str, reference: str, prompt: str) -> float:
    return sari(prompt, answer, [reference])


def sari(source: str, answer: str, references: Sequence[str]) -> float:
    """SARI of a simplification, 0 to 1 (Xu et al. 2016, "Optimizing Statistical Machine Translation
    for Text Simplification"): mean over n-grams of 1 to 4 words of what was rightly kept (F1),
    deleted (precision) and added (F1).

    As in its authors' SARI.py, words are lower-cased and cut at white space, nowhere else.
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
    """(keep, delete, add) for n-grams of one length. `references`: counts of all together, so those
    of source and answer are taken as often."""
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
    """Mean over the n-grams of `whole` of the share of each that is in `part`."""
    return sum(count / whole[gram] for gram, count in part.items()) / max(1, len(whole))


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


# --- functions of counts over all examples -------------------------------------------------------


class Bleu:
    """Corpus BLEU of sacrebleu as it is by default (13a tokens, exponential smoothing), 0 to 100.
    The score of one example has the effective order, as sacrebleu advises."""

    size = 10  # lengths of answer and reference; matches and n-grams, n = 1 to 4

    def __init__(self) -> None:
        from sacrebleu.metrics import BLEU
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a, TokenizerRegexp

        self._bleu = BLEU(effective_order=True)
        self._caches = [Tokenizer13a.__call__, TokenizerRegexp.__call__]

    def measure(self, answer: str | None, reference: str, prompt: str) -> Measured:
        for each in self._caches:  # sacrebleu keeps the last 65,536 texts
            each.cache_clear()
        found = self._bleu.sentence_score(answer or "", [reference])
        return found.score, [found.sys_len, found.ref_len, *found.counts, *found.totals]

    def values(self, rows: np.ndarray, counts: np.ndarray) -> Values:
        sums = (counts @ rows).astype(int).tolist()
        return {"bleu": np.array([self._corpus(each) for each in sums])}

    def _corpus(self, row: list[int]) -> float:
        length, reference_length, counts, totals = row[0], row[1], row[2:6], row[6:]
        return self._bleu.compute_bleu(
            counts, totals, length, reference_length, smooth_method="exp"
        ).score


class Chrf:
    """Corpus chrF of sacrebleu as it is by default (chrF2, up to 6 characters), 0 to 100.

    sacrebleu does not publish chrF's statistics; these two private methods are what its own corpus
    score and significance tests are made of.
    """

    size = 18  # n-grams of answer, of reference, matches; n = 1 to 6

    def __init__(self) -> None:
        from sacrebleu.metrics import CHRF

        self._chrf = CHRF()

    def measure(self, answer: str | None, reference: str, prompt: str) -> Measured:
        (row,) = self._chrf._extract_corpus_statistics([answer or ""], [[reference]])
        return self._chrf._compute_f_score(row), row

    def values(self, rows: np.ndarray, counts: np.ndarray) -> Values:
        sums = (counts @ rows).astype(int).tolist()
        return {"chrf": np.array([self._chrf._compute_f_score(each) for each in sums])}


class Classification:
    """Scores from the confusion counts [label of the reference, label of the answer or FAILURE].

    `label_of` reads both. What gives no label is a failure, which counts as wrong; a reference has
    to give one. An example's score: right or not. Its statistic: the number of its cell.
    """

    size = 1

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
            hint = did_you_mean(reference.strip(), self.labels)
            raise UserError(
                f"needs one of evaluation.labels as the reference, found {excerpt(reference)}; "
                f"{hint}"
            )
        num = len(self.labels)
        column = num if given is None else self.labels.index(given)
        return float(given == truth), [self.labels.index(truth) * (num + 1) + column]

    def values(self, rows: np.ndarray, counts: np.ndarray) -> Values:
        tables = (self._table(rows, each) for each in counts)
        sums = [[t.diagonal(), t.sum(axis=1), t[:, :-1].sum(axis=0)] for t in tables]
        right, truth, given = np.array(sums).transpose(1, 0, 2)  # [resamples, labels] each
        kinds = {
            "precision": _ratio(right, given),
            "recall": _ratio(right, truth),
            "f1": _ratio(2 * right, given + truth),
        }
        found = {"accuracy": right.sum(axis=1) / len(rows)}
        found |= {f"macro_{kind}": each.mean(axis=1) for kind, each in kinds.items()}
        for place, label in enumerate(self.labels):
            found |= {f"{kind}/{label}": each[:, place] for kind, each in kinds.items()}
        return found

    def _table(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns confusion counts [label of the reference, label of the answer or FAILURE]."""
        num = len(self.labels)
        cells = np.bincount(rows[:, 0].astype(int), counts, num * (num + 1))
        return cells.reshape(num, num + 1)

    def confusion(self, rows: np.ndarray) -> dict[str, dict[str, int]]:
        columns = [*self.labels, FAILURE]
        table = self._table(rows, np.ones(len(rows))).astype(int).tolist()
        return {
            label: dict(zip(columns, line, strict=True))
            for label, line in zip(self.labels, table, strict=True)
        }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole; 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


# --- labels in answers ---------------------------------------------------------------------------


def label_of(answer: str | None, labels: Sequence[str]) -> str | None:
    """The label that an answer gives; None, a failure, if it gives none, or more than one.

    An answer that is a label gives it. Else JSON in it decides: `{"label": ...}` has to be a label.
    Else a label is found as whole words, in any case, whatever joins them ("non hateful" is
    `non-hateful`), the longest first; one that is negated makes a failure: what it means instead is
    not for us to say. Negated is all of a sentence after a "not", "never" and the like.
    """
    text = (answer or "").strip()
    if text in labels:
        return text
    by_letters, pattern = _spellings(tuple(labels))
    if "{" in text:
        said = [text_of(each[key]) for each in _objects(text) for key in each if _is_label(key)]
        given = {each if each in labels else by_letters.get(letters(each)) for each in said}
    else:
        text = text.casefold()
        given = {by_letters.get(letters(match[0])) for match in pattern.finditer(text)}
        if _is_negated(pattern.sub(LABEL, text)):
            return None
    return given.pop() if len(given) == 1 else None


LABEL = "\0"  # in place of a label, which may have a "not" in itself
SENTENCE = re.compile(r"[.!?][\"'\u2019\u201d)\]*_]*\s|\n\s*\n")  # its end, but not that of "e.g.,"
NEGATION = re.compile(r"\b(?:not|cannot|never|neither|nor)\b|n['\u2019]t\b")
NONE = re.compile(rf"\b(?:no|non|nothing|without)\s+(?:\w+\s+)?{LABEL}")  # "no really hateful"


def _is_negated(text: str) -> bool:
    """Whether a sentence of a casefolded text negates a `LABEL`."""
    for sentence in SENTENCE.split(text):
        before, label, _ = sentence.rpartition(LABEL)
        if label and NEGATION.search(before):
            return True
    return NONE.search(text) is not None


WORD = re.compile(r"[^\W_]+")


def letters(text: str) -> str:
    """What two spellings of a label have in common."""
    return "".join(WORD.findall(text.casefold()))


@cache
def _spellings(labels: tuple[str, ...]) -> tuple[dict[str, str], re.Pattern[str]]:
    """Labels by their letters, where no other has the same, and what finds them in a text."""
    shared = Counter(map(letters, labels))
    by_letters = {letters(label): label for label in labels if shared[letters(label)] == 1}
    by_letters.pop("", None)  # of a label of marks only, as "+"
    longest = sorted(filter(letters, labels), key=lambda label: len(letters(label)), reverse=True)
    forms = [r"[\s_-]*".join(WORD.findall(label.casefold())) for label in longest] or ["(?!)"]
    found = rf"(?<!\w)(?<!\w-)(?<!\d\.)({'|'.join(forms)})(?!-?\w|\.\d)"
    return by_letters, re.compile(found)


def text_of(value: Any) -> str:
    """Text of a scalar. A whole number in a column with gaps is a float in Parquet: 7.0 is 7."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value) if isinstance(value, int | float) else ""


def _is_label(key: str) -> bool:
    return key.casefold() == "label"


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, up to one that is broken."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        yield value
        at = text.find("{", end)


# --- by name -------------------------------------------------------------------------------------

MEANS: dict[str, Callable[[str, str, str], float]] = {
    "exact_match": exact_match,
    "normalised_match": normalised_match,
    "numeric_match": numeric_match,
    "json_valid": json_valid,
    "json_fields": json_fields,
    "rouge_l": rouge_l,
    "sari": sari_of_prompt,
}


def _measure(name: str, labels: Sequence[str]) -> Measure:
    if name in MEANS:
        return Mean(name, MEANS[name])
    if name == "classification":
        return Classification(labels)
    if name == "bleu":
        return Bleu()
    if name == "chrf":
        return Chrf()
    raise UserError(f"unknown metric {name!r}; {did_you_mean(name, NAMES)}")
