"""Duplicates and leakage: exact ones, near ones by their real similarity, on disk as in memory."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from conftest import load_rows

from sft.data import duplicates as data_duplicates
from sft.data import split
from sft.data.duplicates import fingerprint
from sft.data.files import DIGEST, Row

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def duplicates(rows):
    repeated, near = data_duplicates.find_duplicates(fingerprint(rows), np.arange(len(rows)))
    return repeated.tolist(), near.tolist()


def leakage(train, held_out):
    numbers = np.arange(len(train) + len(held_out))
    known = fingerprint([*train, *held_out])
    leaked, nearly = data_duplicates.find_leaks(known, numbers[: len(train)], numbers[len(train) :])
    return (leaked - len(train)).tolist(), (nearly - len(train)).tolist()


def row_of(question, answer="yes", **more):
    return Row(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        None,
        "f",
        1,
        **more,
    )


def words_of(seed, num=60):
    draw = random.Random(seed)
    return [f"w{draw.randrange(5000)}" for _ in range(num)]


def jaccard(a, b):
    sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_duplicates():
    base = words_of(0)
    texts = {
        "base": base,
        "other": words_of(1),
        "same": base,
        "one word more": [*base, "more"],
        "upper case": [word.upper() for word in base],
        "half": base[:30],
        "same again": base,
    }
    rows = [row_of(" ".join(words)) for words in texts.values()]
    repeated, near = duplicates(rows)
    assert repeated == [2, 6]
    assert [(i, j) for i, j, _ in near] == [(0, 3), (0, 4)]
    answered = [[*words, "yes"] for words in texts.values()]
    assert near[0][2] == pytest.approx(jaccard(answered[0], answered[3]))
    assert near[1][2] == 1
    assert duplicates(rows) == (repeated, near)


def test_what_makes_rows_duplicates():
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    system = {"role": "system", "content": " ".join(words_of(3, 300))}
    short = [
        row_of("1 + 1 = ?", "2"),
        row_of("1 - 1 = ?", "0"),
        row_of("请问", "好"),
        row_of("请问", "不"),
    ]
    shared = [Row([system, *row.messages], None, "f", 1) for row in short]
    tools = [Row(HELLO, [tool], "f", 1) for tool in (call, {**call, "type": "x"})]
    assert duplicates(short) == duplicates(shared) == ([], [])
    assert duplicates(tools) == ([], [(0, 1, 1.0)])  # nearly: the words are the same
    assert duplicates([]) == ([], [])
    assert duplicates([Row([{"role": "text", "content": "a"}], None, "f", 1)] * 2) == ([1], [])


@pytest.mark.parametrize("size", [3, 2048])
def test_near_duplicates_are_found_by_their_real_similarity(monkeypatch, size):
    """Copies with so many words changed: every pair well above the bound is found, none below."""
    monkeypatch.setattr(data_duplicates, "QUERIES_PER_PASS", size)
    draw = random.Random(0)
    rows, expected = [], set()
    for number in range(150):
        base = words_of(number, draw.randrange(5, 200))
        copy = list(base)
        for _ in range(draw.randrange(4)):
            copy[draw.randrange(len(copy))] = "changed"
        rows += [row_of(" ".join(base)), row_of(" ".join(copy))]
        if jaccard([*base, "yes"], [*copy, "yes"]) >= 0.8 and base != copy:
            expected.add((2 * number, 2 * number + 1))
    found = {(i, j) for i, j, _ in duplicates(rows)[1]}
    assert found == expected
    assert len(found) > 30


@pytest.mark.parametrize("by_themselves", [True, False])
def test_rows_that_share_a_key_may_meet(by_themselves):
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 2**32, (2000, data_duplicates.BANDS), np.uint32)
    for row in range(0, 200, 2):
        band = draw.integers(data_duplicates.BANDS)
        keys[draw.integers(1000), band] = keys[1000 + row, band]
    asked = np.arange(2000) if by_themselves else np.arange(1000, 2000)
    shared = [
        [key in others for key in band]
        for band in keys.T
        for others in [{key for key, n in Counter(band[asked]).items() if n > by_themselves}]
    ]
    expected = set(np.flatnonzero(np.any(shared, 0)))
    found = data_duplicates._may_meet(keys, asked, by_themselves=by_themselves)
    assert expected <= set(np.flatnonzero(found))
    assert found.sum() < len(expected) + 100
    assert len(expected) >= 150


def test_copies_are_found_among_rows_of_one_template():
    """Rows of similarity 0.7 fill the buckets; a copy shares keys that no other row has."""
    template = " ".join(f"t{n}" for n in range(50))
    texts = [f"{template} {' '.join(words_of(n, 8))}" for n in range(600)]
    rows = [row_of(text) for text in [*texts, *(text + " more" for text in texts[300:320])]]
    assert {(i, j) for i, j, _ in duplicates(rows)[1]} == {(300 + n, 600 + n) for n in range(20)}


def test_leakage():
    words = [words_of(n) for n in range(6)]
    texts = [" ".join(each) for each in words]
    train = [row_of(text) for text in texts[:5]]
    held_out = [
        row_of(texts[5]),
        row_of(texts[0]),  # the row
        row_of(texts[1], "another answer " * 30),  # the prompt
        row_of(texts[2] + " more"),  # nearly the row
        row_of(" ".join(words[3][1:]), " ".join(words_of(9, 500))),  # nearly the prompt
        row_of("Hi"),
    ]
    assert leakage(train, held_out) == ([1], [2, 3, 4])
    assert leakage(train[:0], held_out) == leakage(train, []) == ([], [])
    system = {"role": "system", "content": "Be calm."}
    apart = [Row([system, *train[0].messages], None, "f", 1)]
    assert leakage(train, apart) == ([], [0])  # the same prompt under another system prompt
    text = [Row([{"role": "text", "content": t}], None, "f", 1) for t in texts[:2]]
    assert leakage(text[:1], text) == ([0], [])


def test_real_duplicates(shared):
    rows, _ = load_rows(str(shared / "data/chat/glaive_toolcall_en_demo.json"))
    repeated, near = duplicates(rows)
    assert (len(repeated), len(near)) == (68 - 33, 5)
    train, _ = load_rows(str(shared / "data/instruct/gsm8k_train.jsonl"), 2000)
    held_out, _ = load_rows(str(shared / "data/instruct/gsm8k_test.jsonl"), 500)
    assert leakage(train, held_out) == ([], [])
    assert leakage(train, train[:3] + held_out) == ([0, 1, 2], [])


def test_fingerprints_that_are_written_in_parts_are_the_same(tmp_path):
    rows = [row_of(" ".join(words_of(n % 7, 20)), f"answer {n % 3}") for n in range(40)]
    for start in range(0, 40, 16):
        fingerprint(rows[start : start + 16]).append_to(tmp_path)
    written, known = data_duplicates.RowFingerprint.open(tmp_path), fingerprint(rows)
    numbers = np.arange(40)
    parts = numbers[:30], numbers[30:]
    assert [part.tolist() for part in data_duplicates.find_leaks(written, *parts)] == [
        part.tolist() for part in data_duplicates.find_leaks(known, *parts)
    ]
    repeated, near = data_duplicates.find_duplicates(written, numbers)
    assert (repeated.tolist(), near.tolist()) == duplicates(rows)
    assert len(repeated) == 40 - 21
    assert len(near)


def decided(num_rows):
    """Returns the peak memory, in bytes, while a split, a mix, duplicates and leaks of rows are
    decided; not that of the sketches, which are files in a run."""
    draw = np.random.default_rng(0)

    def random(shape, dtype):
        return draw.integers(0, 2**32, shape, np.uint32).view(dtype)

    def sketches():
        keys = random(num_rows * data_duplicates.BANDS, np.uint32).reshape(
            -1, data_duplicates.BANDS
        )
        ends = np.arange(1, num_rows + 1) * 4
        return data_duplicates.Sketches(
            random(num_rows * 2, "u8"), keys, ends, random(4 * num_rows, "u4")
        )

    digests, prompts = random(num_rows * 4, DIGEST), random(num_rows * 4, DIGEST)
    digests[: num_rows // 4] = digests[num_rows // 4 : num_rows // 4 * 2]
    known = data_duplicates.RowFingerprint(digests, prompts, sketches(), sketches())
    tracemalloc.start()
    held = split.split(known.digests, 0.3, 0)
    assert round(0.3 * num_rows) - 2 < np.count_nonzero(held) <= round(0.3 * num_rows)
    rows, held_out = np.flatnonzero(~held), np.flatnonzero(held)
    entries = np.zeros(len(rows), np.uint16)
    assert len(split.mix(entries, [1.5], 0)) == len(rows) + round(len(rows) / 2)
    repeated, _ = data_duplicates.find_duplicates(known, rows)
    assert len(repeated) > num_rows // 10
    leaked, _ = data_duplicates.find_leaks(known, rows, held_out)
    assert not len(leaked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.slow
def test_to_decide_takes_less_than_100_bytes_of_memory_a_row():
    decided(2_000)  # what is imported and cached once
    assert decided(32_000) - decided(8_000) < 100 * 24_000
