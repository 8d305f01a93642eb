"""Rows that are tokens already: read, proven against the vocabulary, prepared."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.data.duplicates import compared_words
from sft.data.formats import normalise, read_question
from sft.data.tokenised import make_tokens
from sft.errors import DataError


def tokens(ids, labels):
    return [{"role": "tokens", "content": "", "input_ids": ids, "labels": labels}]


GOOD = {
    "labels": ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [5, 6, 7], [-100, 6, 7]),
    "no labels": ({"input_ids": [5, 6], "attention_mask": [1, 1]}, [5, 6], [5, 6]),
    "padding": (
        {
            "input_ids": [0, 5, 6, 0, 0],
            "labels": [-100, -100, 6, -100, -100],
            "attention_mask": [0, 1, 1, 0, 0],
        },
        [5, 6],
        [-100, 6],
    ),
    "as text": ({"input_ids": "[5, 6]", "labels": "[5, 6]"}, [5, 6], [5, 6]),
    "null labels": (
        {"input_ids": [5, 6], "labels": None, "attention_mask": [1, 1], "length": 2},
        [5, 6],
        [5, 6],
    ),
}
BAD = {
    "text": ({"input_ids": "a", "labels": [1]}, "input_ids: expected a list, found str"),
    "empty": ({"input_ids": [], "labels": []}, "input_ids is empty"),
    "floats": (
        {"input_ids": [1.5, 2], "labels": [1, 2]},
        "input_ids: expected integers, found 1.5",
    ),
    "bools": ({"input_ids": [True], "labels": [1]}, "expected integers, found True"),
    "batches": ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "expected integers, found [1, 2]"),
    "huge": ({"input_ids": [2**40], "labels": [1]}, "expected integers, found 1099511627776"),
    "lengths": (
        {"input_ids": [1, 2], "labels": [1]},
        "expected as many labels as input_ids, found",
    ),
    "shifted": (
        {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
        "labels are shifted by one already; give each token its own id as its label",
    ),
    "others": (
        {"input_ids": [1, 2, 3], "labels": [-100, 9, 3]},
        "labels: expected the id in the same place, or -100, found 9 for the id 2 (token 1)",
    ),
    "nothing learnt": (
        {"input_ids": [1, 2], "labels": [1, -100]},
        "every label behind the first is -100, so nothing to learn",
    ),
    "mask": ({"input_ids": [1, 2], "attention_mask": [2, 1]}, "expected 1 for tokens and 0 for"),
    "all padding": ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "expected 1 for tokens"),
    "holes": ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "padding at the ends only"),
    "learnt padding": (
        {"input_ids": [1, 2, 0], "labels": [1, 2, 0], "attention_mask": [1, 1, 0]},
        "labels: expected -100 for padding",
    ),
}


@pytest.mark.parametrize(("row", "ids", "labels"), GOOD.values(), ids=GOOD)
def test_a_good_row(row, ids, labels):
    found = normalise(row)
    assert (found.messages, found.format) == (tokens(ids, labels), "tokenised")


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row(row, reason):
    with pytest.raises(ValueError, match=r".") as caught:
        normalise(row)
    assert reason in str(caught.value)


def test_tokens_cannot_be_asked():
    with pytest.raises(ValueError, match="expected a conversation to answer, found tokens"):
        read_question({"input_ids": [1], "labels": [1]})


def test_rows_are_compared_by_their_ids():
    assert compared_words(tokens([5, 6], [5, 6])) == ["5", "6"]


class Vocabulary:
    """A tokenizer that knows the ids 0 to 4 and 9."""

    def get_vocab(self):
        return {str(number): number for number in (0, 1, 2, 3, 4, 9)}

    def __len__(self):
        return 6


def test_every_id_is_one_of_the_vocabulary():
    (message,) = tokens([0, 9, 4], [-100, 9, 4])
    assert make_tokens(Vocabulary(), message, 8, "error") == [([0, 9, 4], [-100, 9, 4], ())]
    for wrong in (5, 10, 2**31 - 1, -1):
        (message,) = tokens([0, wrong], [0, wrong])
        with pytest.raises(DataError, match=rf"input_ids: {wrong} \(token 1\) is no id"):
            make_tokens(Vocabulary(), message, 8, "error")


def test_long_rows():
    (message,) = tokens([0, 1, 2, 3], [-100, -100, 2, 3])
    whole = [([0, 1, 2, 3], [-100, -100, 2, 3], ())]
    assert make_tokens(Vocabulary(), message, 3, "error") == whole
    assert make_tokens(Vocabulary(), message, 3, "truncate_left_turns") == whole
    assert make_tokens(Vocabulary(), message, 3, "drop") == []
    cut = [([0, 1, 2], [-100, -100, 2], ("answer_cut",))]
    assert make_tokens(Vocabulary(), message, 3, "truncate") == cut
    assert make_tokens(Vocabulary(), message, 2, "truncate") == []


@given(st.data())
def test_labels_are_ids_in_place_and_padding_is_cut_off(data):
    ids = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=8))
    learnt = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    learnt[-1] = True
    labels = [i if is_learnt else -100 for i, is_learnt in zip(ids, learnt, strict=True)]
    left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    row = {
        "input_ids": [0] * left + ids + [0] * right,
        "labels": [-100] * left + labels + [-100] * right,
        "attention_mask": [0] * left + [1] * len(ids) + [0] * right,
    }
    assert normalise(row).messages == tokens(ids, labels)
    assert normalise(json.loads(json.dumps(row))).messages == tokens(ids, labels)
    wrong = {**row, "labels": [i + 1 if i >= 0 else i for i in row["labels"]]}
    with pytest.raises(ValueError, match="labels"):
        normalise(wrong)
