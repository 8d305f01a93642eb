"""Scores: those of the libraries on the whole corpus, the same for any cut over processes."""

from __future__ import annotations

import json
import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import binomtest, permutation_test
from sklearn.metrics import classification_report

from sft.errors import UserError
from sft.evaluate import metrics, scores
from sft.evaluate.labels import label_of
from sft.evaluate.metrics import FAILURE, GRID, NAMES, influences
from sft.evaluate.scores import Tally

LABELS = ["hateful", "non-hateful", "unclear"]
PLAIN = [name for name in NAMES if name not in ("numeric_match", "json_fields", "classification")]


def corpus(num: int = 60, seed: int = 0) -> list[tuple[str, str]]:
    """(answer, reference): requests of the nano task with words lost, doubled and moved, and those
    requests; an empty answer, one in another script, one without a fault."""
    rows = (ROOT / "nano/train.jsonl").read_text("utf-8").splitlines()[:num]
    drawn = random.Random(seed)
    pairs = [
        ("", "an empty answer"),
        ("两 个 词", "两 词"),
        ("all the same here", "all the same here"),
    ]
    for row in rows:
        reference = json.loads(row)["messages"][0]["content"] + ", please."
        words = reference.split() * drawn.choice([1, 1, 2])
        kept = [word for word in words if drawn.random() < 0.8]
        if drawn.random() < 0.3:
            drawn.shuffle(kept)
        pairs.append((" ".join(kept), reference))
    return pairs


def tallied(pairs, names, start=0, **options) -> Tally:
    tally = Tally(names, **options)
    for number, (answer, reference) in enumerate(pairs, start):
        tally.add(number, answer, reference, reference)
    return tally


# --- one example ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (" Yes.\n", "Yes.", 1),
        ("yes.", "Yes.", 0),
        ("a  b", "a b", 0),
        ("", " ", 1),
    ],
)
def test_exact_match(answer, reference, score):
    assert metrics.exact_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("The  Eiffel-Tower!", "eiffeltower", 1),  # SQuAD deletes punctuation
        ("“An apple”, a day", "apple day", 1),
        ("apples", "apple", 0),
        ("theatre", "atre", 0),  # an article is a word
        ("The", "A", 0),  # choices, of which SQuAD would leave nothing
        ("a.", "A", 1),
        ("?", "!", 0),
        ("Ünïcode", "ünïcode", 1),
    ],
)
def test_normalised_match(answer, reference, score):
    assert metrics.normalised_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("2 + 3 = 5\n#### 5", "so 1 and 4\n#### 5", 1),
        ("#### 7\nno: #### 5, not 6", "5", 1),  # the last mark, the first number after it
        ("It is 3, then 5.", "#### 5", 1),  # no mark: the last number
        ("5, that is it. ####", "5", 0),  # a mark and nothing behind it
        ("no number", "5", 0),
        ("", "5", 0),
        ("#### $1,234.50", "1234.5", 1),
        ("#### 1,234,567", "1234567", 1),
        ("#### 50%", "50", 1),
        ("#### -3", "3", 0),
        ("#### -$3.00", "-3", 1),
        ("#### $-3", "-3", 1),
        ("#### −3", "-3", 1),  # a minus sign of Unicode
        ("#### +3", "3", 1),
        ("10-3", "3", 1),  # subtracted, not negative
        ("between 5-10", "10", 1),
        ("about .5", "0.50", 1),
        ("0.1", "0.10000000000000001", 0),  # decimals, not floats
        ("1e3", "1000", 1),
        ("5 km", "5", 1),
    ],
)
def test_numeric_match(answer, reference, score):
    assert metrics.numeric_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"a": [1, null]}', 1),
        (" 5 \n", 1),
        ('"text"', 1),
        ("", 0),
        ("{'a': 1}", 0),
        ('{"a": 1} and more', 0),
        ('```json\n{"a": 1}\n```', 0),
        ("NaN", 0),
        ('{"a": -Infinity}', 0),
        ("[" * 100_000, 0),
        ("9" * 5000, 0),  # more digits than Python reads
    ],
)
def test_json_valid(answer, valid):
    assert metrics.json_valid(answer) == valid


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1),
        ('{"a": 1}', '{"a": 1, "b": 2}', 1 / 2),
        ('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 1 / 2),
        ('{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 2}', 2 / 3),
        ('{"a": {"x": 1, "y": [1, 2]}}', '{"a": {"x": 1, "y": [1, 3]}}', 2 / 3),
        ('{"a": {"x": 1}}', '{"a": 1}', 0),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": 1.0}', '{"a": 1}', 1),
        ('{"a": "1"}', '{"a": 1}', 0),
        ('{"a": [], "b": {}}', '{"a": [], "b": []}', 1 / 2),
        ("[2, 1]", "[1, 2]", 0),  # places count
        ("{}", '{"a": null}', 0),
        ("{}", "{}", 1),
        ("{", '{"a": 1}', 0),
        ("[" * 900 + "]" * 900, '{"a": 1}', 0),
    ],
)
def test_json_fields(answer, reference, score):
    assert metrics.json_fields(answer, reference) == score


SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


@pytest.mark.parametrize(
    ("answer", "score"),
    [  # published with the authors' SARI.py
        ("About 95 you now get in .", 0.2682782411698074),
        ("About 95 species are now agreed .", 0.5889995423074248),
        ("About 95 species are currently agreed .", 0.5071608864657479),
    ],
)
def test_sari_is_that_of_its_authors(answer, score):
    assert metrics.sari(SOURCE, answer, REFERENCES) == pytest.approx(score, abs=1e-15)


def test_sari_takes_the_prompt_as_its_source():
    keep = [0.8, 2 / 3, 0.5, 0]  # by hand, for n-grams of 1 to 4 words
    delete = [1 / 3, 1 / 2, 1 / 2, 1 / 2]
    add = [1, 1 / 2, 0, 0]
    tally = Tally(["sari"])
    answer = "95 species are known ."
    score = tally.add(0, answer, REFERENCES[0], prompt=SOURCE)["sari"]
    assert score == pytest.approx(sum(keep + delete + add) / 12)
    assert tally.values()["sari"] == pytest.approx(score, abs=GRID)


# --- all examples --------------------------------------------------------------------------------


def test_a_corpus_scores_as_the_libraries_score_it_whole():
    pairs = corpus()
    answers, references = map(list, zip(*pairs, strict=True))
    tally = tallied(pairs, ["bleu", "chrf", "rouge_l"])
    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    of_each = [rouge.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    assert tally.values() == {
        "bleu": pytest.approx(BLEU().corpus_score(answers, [references]).score, rel=1e-12),
        "chrf": pytest.approx(CHRF().corpus_score(answers, [references]).score, rel=1e-12),
        "rouge_l": pytest.approx(np.mean(of_each), abs=GRID),
    }


def test_one_example_scores_as_the_libraries_score_a_sentence():
    for answer, reference in corpus(10):
        tally = Tally(["bleu", "chrf"])
        assert tally.add(0, answer, reference) == {
            "bleu": BLEU(effective_order=True).sentence_score(answer, [reference]).score,
            "chrf": CHRF().sentence_score(answer, [reference]).score,
        }


def test_a_resample_scores_as_the_corpus_in_which_examples_stand_so_often():
    pairs, names = corpus(), ("bleu", "chrf", "rouge_l")
    tally = tallied(pairs, names)
    counts = np.random.default_rng(0).multinomial(len(pairs), [1 / len(pairs)] * len(pairs), 5)
    found = tally._stack_values(tally.rows, counts.astype(float))
    assert found.shape == (3, 5)
    for times, values in zip(counts, found.T, strict=True):
        whole = [pair for pair, n in zip(pairs, times, strict=True) for _ in range(n)]
        assert values == pytest.approx([*tallied(whole, names).values().values()], abs=GRID)
    assert len(np.unique(found)) == found.size


LABELS = ["hateful", "non-hateful", "unclear"]


def labelled(num: int = 200) -> list[tuple[str, str]]:
    drawn = random.Random(1)
    answers = [*LABELS, "Hateful.", "I cannot say", ""]
    return [(drawn.choice(answers), drawn.choice(LABELS[:2])) for _ in range(num)]


def test_labels_score_as_scikit_learn_scores_them_raw():
    pairs = [*labelled(), (None, "hateful")]
    tally = tallied(pairs, ["classification"], labels=LABELS)
    read = {**{label: label for label in LABELS}, "Hateful.": "hateful"}
    given, truth = zip(*((read.get(a, FAILURE), b) for a, b in pairs), strict=True)
    expected = classification_report(truth, given, labels=LABELS, output_dict=True, zero_division=0)
    values = tally.values()
    assert values.pop("accuracy") == np.mean([a == b for a, b in zip(given, truth, strict=True)])
    for kind, name in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        for label in LABELS:
            assert values.pop(f"{kind}/{label}") == pytest.approx(expected[label][name])
        assert values.pop(f"macro_{kind}") == pytest.approx(expected["macro avg"][name])
    assert not values
    assert tally.confusion() == {
        label: {
            column: sum((t, g) == (label, column) for t, g in zip(truth, given, strict=True))
            for column in [*LABELS, FAILURE]
        }
        for label in LABELS
    }


ANSWERS = [  # what a model says, and the label in it
    ("hateful", "hateful"),
    ("  Non-Hateful.\n", "non-hateful"),
    ("The text is **hateful**!", "hateful"),
    ("HATEFUL, since it is hateful", "hateful"),
    ("non hateful", "non-hateful"),
    ("nonhateful", "non-hateful"),
    ("non_hateful", "non-hateful"),
    ("label: non-hateful (not a threat)", "non-hateful"),
    ('{"label": "hateful"}', "hateful"),
    ('```json\n{"label": "Non-hateful", "why": "hateful words are quoted"}\n```', "non-hateful"),
    ('Sure: {"label": "hateful"} {"label"', "hateful"),
    ('{"label": "hateful"} or {"label": "non-hateful"}', None),
    ('{"label": "unclear"}', None),
    ('{"label": ["hateful"]}', None),
    ('{"call": "send_message", "text": "hateful"}', None),
    ('{"label": "hateful', None),
    ('{"result": {"label": "hateful"}}', None),
    ("[" * 5000 + "{" * 5000, None),
    ("hateful or non-hateful", None),
    ("It is not hateful", None),
    ("It isn't really hateful", None),
    ("The text is not at all hateful.", None),
    ("This cannot be considered hateful", None),
    ("It is neither hateful nor kind", None),
    ("It isn't really all that hateful", None),
    ("It doesn\u2019t seem hateful", None),
    ("Never would I call this hateful", None),
    ("It is not, e.g., hateful", None),
    ("It is **not**\n**hateful**", None),
    ("hateful? I do not think that it is hateful", None),
    ("There is nothing hateful in it", None),
    ("I see no hateful words", None),
    ("It is no longer hateful", None),
    ("It is not a joke. It is hateful.", "hateful"),
    ("Not a joke!\n\nhateful", "hateful"),
    ("It is hateful, is it not?", "hateful"),
    ("No, it is hateful", "hateful"),
    ("A knot of hateful words", "hateful"),
    ("semi-hateful", None),
    ("hatefully", None),
    ("unhateful", None),
    ("", None),
    (None, None),
]


@pytest.mark.parametrize(("answer", "label"), ANSWERS)
def test_a_label_is_read_from_an_answer_or_it_is_a_failure(answer, label):
    assert label_of(answer, LABELS[:2]) == label
    assert label_of(answer, LABELS[:2][::-1]) == label


def test_references_are_read_as_answers_are():
    """Rows that `make classify` writes to be trained on have JSON in them."""
    tally = Tally(["classification"], LABELS[:2])
    read = [(answer, label) for answer, label in ANSWERS if label]
    for number, (answer, _) in enumerate(read):
        assert tally.add(number, answer, answer) == {"classification": 1}
    assert tally.confusion() == {
        label: {
            column: sum(given == label for _, given in read) * (column == label)
            for column in [*LABELS[:2], FAILURE]
        }
        for label in LABELS[:2]
    }


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("non-hateful", None),
        ("neutral", "neutral"),
        ("2", "2"),
        ('{"label": 2}', "2"),
        ("2.5", None),
    ],
)
def test_only_labels_that_are_listed_are_read(answer, label):
    assert label_of(answer, ["hateful", "neutral", "2"]) == label


@pytest.mark.parametrize(
    ("labels", "answer", "found"),
    [
        (["yes", "no"], " YES.\n", "yes"),
        (["yes", "no"], '"no"', "no"),
        (["yes", "no"], "yes, or no", FAILURE),
        (["A", "B"], "(a)", "A"),
        (["a", "A"], "A", "A"),
        (["a", "A"], "A.", FAILURE),  # either, if it is read loosely
        (["+", "-"], "-", "-"),
        (["+", "-"], "?", FAILURE),
        (["+", "-"], '{"label": "+"}', "+"),
        (["-1", "1"], '{"label": -1}', "-1"),
        (["-1", "1"], "It is 1", FAILURE),  # or -1: signs are no letters
        (["yes", "no"], "The answer is yes, I think.", "yes"),
        (["not spam", "spam"], "It is not spam; not spam.", "not spam"),
        (["not spam", "spam"], "It is not at all spam", FAILURE),
        (["non-hateful", "hateful"], "Non-Hateful", "non-hateful"),
    ],
)
def test_which_label_an_answer_is(labels, answer, found):
    tally = Tally(["classification"], labels)
    tally.add(0, answer, labels[0])
    assert tally.confusion()[labels[0]][found] == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_answer_scores_nothing_and_is_counted(name):
    tally = Tally([name], ["5", "6"])
    assert tally.add(0, "5", "5", "5")[name] > 0
    before = tally.values()
    assert tally.add(1, None, "5", "5") == {name: 0}
    assert tally.num_examples == 2
    assert all(value <= before[key] for key, value in tally.values().items())
    if name not in ("bleu", "chrf", "classification"):
        assert tally.values()[name] == pytest.approx(before[name] / 2, abs=GRID)


def test_a_failed_answer_is_not_an_empty_one():
    """Which is right where nothing was to be said, and deletes what was to go."""
    names = ["exact_match", "normalised_match", "sari"]
    assert Tally(names).add(0, None, "", "a prompt") == dict.fromkeys(names, 0)
    assert all(score > 0 for score in Tally(names).add(0, "", "", "a prompt").values())


def test_no_examples_have_no_values():
    tally = Tally(NAMES, LABELS)
    assert (tally.num_examples, tally.values(), tally.intervals()) == (0, {}, {})
    assert scores.compare_tallies(tally, Tally(NAMES, LABELS)) == {}


# --- examples of all ranks ------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(ranks=st.lists(st.integers(0, 4), min_size=63, max_size=63), order=st.randoms())
def test_any_cut_over_ranks_and_any_order_give_the_same_report_to_the_bit(ranks, order):
    examples = list(enumerate(corpus()))
    parts = [Tally(PLAIN) for _ in range(5)]
    whole = Tally(PLAIN)
    for number, (answer, reference) in examples:
        whole.add(number, answer, reference, reference)
    order.shuffle(examples)
    for (number, (answer, reference)), rank in zip(examples, ranks, strict=True):
        parts[rank].add(number, answer, reference, reference)
    together = Tally(PLAIN)
    together.rows = np.concatenate([part.rows for part in parts])
    assert np.array_equal(together.rows, whole.rows)
    assert together.report() == whole.report()


def test_examples_are_added_to_rows_that_were_set():
    pairs = corpus()
    tally = tallied(pairs[:20], ["chrf"])
    again = Tally(["chrf"])
    again.rows = tally.rows
    for number, (answer, reference) in enumerate(pairs[20:], 20):
        again.add(number, answer, reference)
    assert np.array_equal(again.rows, tallied(pairs, ["chrf"]).rows)
    assert tally.num_examples == 20  # a copy was set


def peak(action) -> int:
    """Bytes that `action` takes at the most, beside what there was."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_example_takes_eight_bytes_a_statistic():
    tally = Tally(["exact_match", "bleu"])

    def add(numbers: range) -> None:
        for number in numbers:
            tally.add(number, f"answer {number}", f"reference {number}")

    add(range(100))  # what is made once
    kept = 8 * (1 + 1 + 10)
    assert peak(lambda: add(range(100, 3000))) < 1.5 * kept * 2900


def test_the_memory_of_exchanges_does_not_grow_with_examples(monkeypatch):
    monkeypatch.setattr(scores, "AT_ONCE", 20_000)
    monkeypatch.setattr(scores, "EXCHANGES", 50)
    taken = {}
    for num in (1_000, 10_000):
        tally = tallied(matches(np.arange(num) % 2), ["exact_match"])
        rows = tally.rows
        scores._p_values(tally, rows, 1 - rows)  # what is made once
        taken[num] = peak(lambda r=rows, t=tally: scores._p_values(t, r, 1 - r)) - 6 * rows.nbytes
    assert taken[10_000] < 1.5 * taken[1_000] < 60 * 20_000


# --- intervals -----------------------------------------------------------------------------------


def test_a_group_scores_as_its_examples_do_alone():
    names = ["exact_match", "bleu", "classification"]
    pairs = [(a, b) for a, b in labelled(60)]
    whole = Tally(names, LABELS)
    for number, (answer, reference) in enumerate(pairs):
        whole.add(number, answer, reference, group="abb"[number % 3])
    found = whole.report()
    assert list(found["groups"]) == ["a", "b"]
    for name in "ab":
        alone = Tally(names, LABELS)
        for number, (answer, reference) in enumerate(pairs):
            if "abb"[number % 3] == name:
                alone.add(number, answer, reference)
        assert found["groups"][name] == alone.report()
        assert found["groups"][name]["confusion"] == alone.confusion()
    assert found["metrics"] == tallied(pairs, names, labels=LABELS).values()


def matches(right) -> list[tuple[str, str]]:
    return [("5" if each else "6", "5") for each in right]


def test_a_share_has_the_interval_of_wilson():
    tally = tallied(matches([1] * 12 + [0] * 8), ["exact_match", "json_valid"])
    expected = binomtest(12, 20).proportion_ci(method="wilson")
    found = tally.intervals()
    assert found["exact_match"] == pytest.approx(tuple(expected), abs=1e-6)
    assert found["json_valid"] == pytest.approx((0.8389, 1), abs=1e-4)  # all of 20


def test_labels_have_the_intervals_of_their_shares():
    pairs = [("a", "a")] * 12 + [("b", "a")] * 4 + [("b", "b")] * 3 + [("?", "c")]
    found = tallied(pairs, ["classification"], labels=["a", "b", "c"]).intervals()
    counts = {
        "accuracy": (15, 20),
        "precision/a": (12, 12),
        "recall/a": (12, 16),
        "precision/b": (3, 7),
        "recall/b": (3, 3),
        "recall/c": (0, 1),
    }
    for name, (right, num) in counts.items():
        expected = binomtest(right, num).proportion_ci(method="wilson")
        assert found[name] == pytest.approx(tuple(expected), abs=1e-6)
    low, high = binomtest(12, 16).proportion_ci(method="wilson")  # 12 / (12 + 4 wrong)
    assert found["f1/a"] == pytest.approx((2 * low / (1 + low), 2 * high / (1 + high)), abs=1e-6)
    assert found["precision/c"] == (0, 1)  # never answered
    assert not any("macro" in name for name in found)  # c has one row


def test_a_macro_score_has_an_interval_if_each_label_has_ten_references():
    rare = [("a", "a")] * 30 + [("b", "b")] * 9
    enough = [*rare, ("a", "b")]
    tallies = [tallied(pairs, ["classification"], labels=["a", "b"]) for pairs in (rare, enough)]
    assert ["macro_f1" in tally.intervals() for tally in tallies] == [False, True]
    low, high = tallies[1].intervals()["macro_f1"]
    assert 0 < low < tallies[1].values()["macro_f1"] < high <= 1
    row = scores.compare_tallies(tallies[0], tallies[0])["macro_f1"]
    assert (row.low, row.high, row.p_value) == (None, None, 1)


@pytest.mark.parametrize("name", ["rouge_l", "bleu", "chrf", "classification"])
def test_influences_give_the_standard_error_of_a_bootstrap(name):
    pairs = labelled(150) if name == "classification" else corpus(150)
    tally = tallied(pairs, [name], labels=LABELS)
    ((measure, rows),) = tally._parts(tally.rows)
    num = len(pairs)
    found = {each: np.std(pulls) / num**0.5 for each, pulls in influences(measure, rows).items()}
    counts = np.random.default_rng(0).multinomial(num, [1 / num] * num, 1500).astype(float)
    resampled = measure.values(measure.sums(rows, counts))
    expected = {each: values.std() for each, values in resampled.items()}
    assert found == pytest.approx(expected, rel=0.12)


def test_an_influence_is_what_leaving_out_the_example_changes():
    pairs = [*corpus(5), *corpus(2)]  # some of them twice
    whole = tallied(pairs, ["chrf"])
    ((measure, rows),) = whole._parts(whole.rows)
    value, last = whole.values()["chrf"], len(pairs) - 1
    without = [pairs[:n] + pairs[n + 1 :] for n in range(len(pairs))]
    expected = [last * (value - tallied(each, ["chrf"]).values()["chrf"]) for each in without]
    assert influences(measure, rows)["chrf"] == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_an_interval_of_equal_examples_has_a_width(name):
    for num in (1, 2, 12):
        for answer in ("5", "6", None):
            tally = tallied([(answer, "5")] * num, [name], labels=["5", "6"])
            values, most = tally.values(), 100 if name in ("bleu", "chrf") else 1
            for key, (low, high) in tally.intervals().items():
                assert 0 <= low <= values[key] <= high <= most
                assert high - low > most / (num + 4)
            for row in scores.compare_tallies(tally, tally).values():
                assert (row.difference, row.adjusted_p) == (0, 1)
                assert row.verdict == "not distinguishable"


def runs(a, b) -> list[Tally]:
    return [tallied(matches(each), ["exact_match"]) for each in (a, b)]


def test_a_p_value_of_matches_is_that_of_the_exact_test_of_mcnemar():
    a, b = [0] * 12 + [1] * 30, [1] * 10 + [0] * 2 + [1] * 27 + [0] * 3  # 10 gained, 3 lost
    found = scores.compare_tallies(*runs(a, b))["exact_match"]
    assert found.p_value == pytest.approx(binomtest(3, 13).pvalue, abs=0.01)
    assert found.difference == pytest.approx(7 / 42)
    assert found.low < found.difference < found.high


def test_a_p_value_of_any_score_is_that_of_the_permutation_test_of_scipy():
    drawn = np.random.default_rng(2)
    tallies, kept = [], []
    for shift in (0, 0.1):
        tally = Tally(["rouge_l"])
        kept.append(np.round(np.clip(drawn.random(11) + shift, 0, 1) / GRID) * GRID)
        tally.rows = np.stack([np.arange(11), kept[-1]], axis=1)
        tallies.append(tally)
    expected = permutation_test(
        kept, lambda a, b, axis: np.mean(b - a, axis), permutation_type="samples", vectorized=True
    )
    found = scores.compare_tallies(*tallies)["rouge_l"]
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.015)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0] * 20 + [1] * 30, [1] * 50, "better"),
        ([1] * 50, [0] * 20 + [1] * 30, "worse"),
        ([0] * 20 + [1] * 30, [1] * 30 + [0] * 20, "not distinguishable"),
        ([1] * 50, [1] * 50, "not distinguishable"),
        ([0] * 6, [1] * 6, "better"),
        ([0] * 5 + [1] * 95, [1] * 100, "not distinguishable"),  # chance does that once in 16
    ],
)
def test_a_verdict_needs_a_difference_that_chance_rarely_gives(a, b, verdict):
    assert scores.compare_tallies(*runs(a, b))["exact_match"].verdict == verdict


def test_a_verdict_among_many_needs_more():
    alone = scores.compare_tallies(*runs([0] * 6, [1] * 6))["exact_match"]
    same = scores.compare_tallies(*runs([1] * 6, [1] * 6))["exact_match"]
    assert (alone.verdict, alone.adjusted_p) == ("better", alone.p_value)
    assert alone.p_value == pytest.approx(1 / 32, abs=0.006)
    found = scores.judge({"x": same, "y": alone, "z": same})
    assert list(found) == ["x", "y", "z"]
    assert found["y"].adjusted_p == pytest.approx(3 * alone.p_value)
    assert (found["y"].verdict, found["y"].p_value) == ("not distinguishable", alone.p_value)
    (border,) = scores.judge({"x": replace(alone, p_value=0.05)}).values()  # must be below
    assert border.verdict == "not distinguishable"


def test_tallies_of_other_examples_are_not_compared():
    a = tallied(matches([1, 0, 1]), ["exact_match"])
    with pytest.raises(AssertionError, match="not the same examples"):
        scores.compare_tallies(a, tallied(matches([1, 0, 1]), ["exact_match"], start=1))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels", "reported"),
    [
        (["exact_macth"], (), "unknown metric 'exact_macth'; did you mean exact_match?"),
        (["accuracy of all"], (), f"unknown metric 'accuracy of all'; known: {', '.join(NAMES)}"),
        (["classification"], (), "classification needs evaluation.labels: .*; found none"),
        (["classification"], ["a", "a "], r"each once .*; found \['a', 'a'\]"),
        (["classification"], ["a", " "], "neither empty"),
        (["classification"], ["a", FAILURE], "nor '.none of them.'"),
    ],
)
def test_a_tally_of_what_there_is_not_is_refused(names, labels, reported):
    with pytest.raises(UserError, match=reported):
        Tally(names, labels)


@pytest.mark.parametrize(
    ("name", "reference", "reported"),
    [
        ("numeric_match", "five", "example 7: numeric_match needs a number .* found 'five'"),
        ("json_fields", "{", "example 7: json_fields needs JSON as the reference, found '{'"),
        ("classification", "hatefull", "found 'hatefull'; did you mean hateful?"),
    ],
)
def test_a_reference_that_a_metric_cannot_use_is_refused_before_and_after(
    name, reference, reported
):
    tally = Tally([name], LABELS)
    for refused in (
        lambda: tally.add(7, None, reference),
        lambda: tally.add(7, "5", reference),
    ):
        with pytest.raises(UserError, match=reported):
            refused()
    assert tally.num_examples == 0
