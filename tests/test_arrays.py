"""Arrays in files are what numpy makes in memory, block by block, and hold no memory themselves."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft import arrays, data, similar
from sft.arrays import Scratch
from sft.data import DIGEST

NUMBERS = st.lists(st.integers(0, 20), max_size=60)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 7)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return Scratch(tmp_path_factory.mktemp("scratch"))


@given(numbers=NUMBERS, others=NUMBERS)
@pytest.mark.parametrize("dtype", [np.uint64, DIGEST])
def test_as_numpy_does_it_in_memory(scratch, dtype, numbers, others):
    def keys(values):
        array = np.array([[value, 0] for value in values], np.uint64).reshape(-1, 2)
        return array.view(DIGEST).ravel() if dtype is DIGEST else array[:, 0].copy()

    firsts = [numbers.index(value) for value in numbers]
    assert scratch.groups(keys(numbers)).tolist() == firsts
    assert scratch.firsts(keys(numbers)).tolist() == [n == first for n, first in enumerate(firsts)]
    assert scratch.among(keys(numbers), keys(others)).tolist() == [n in others for n in numbers]
    array = np.array(numbers, np.int64)
    assert scratch.keep([array, array[:3]], np.int32).tolist() == [*numbers, *numbers[:3]]
    assert scratch.collect(iter(numbers), np.int64).tolist() == numbers
    assert scratch.distinct([array, array], np.int64).tolist() == sorted(set(numbers))
    even = [n for n, value in enumerate(numbers) if value % 2 == 0]
    chosen = scratch.where(len(array), lambda block: array[block] % 2 == 0)
    assert chosen.tolist() == even
    assert scratch.take(array, chosen).tolist() == [numbers[n] for n in even]
    ranked = scratch.ranked(array.astype(">u8"))["index"]
    assert ranked.tolist() == np.argsort(array, kind="stable").tolist()
    assert scratch.zeros(len(numbers), bool).tolist() == [False] * len(numbers)


def test_what_is_written_into_one_stays_when_memory_is_given_back(scratch):
    array = scratch.zeros(50, np.int64)
    for block in arrays.blocks(50):
        array[block] = np.arange(block.start, block.stop)
    assert array.tolist() == list(range(50))


def test_nothing_is_left_in_the_folder(tmp_path):
    kept = Scratch(tmp_path).zeros(50, np.int64)
    assert kept.nbytes == 400
    assert not list(tmp_path.iterdir())


def decided(num_rows, scratch):
    """The peak memory, in bytes, while duplicates, a split, a mix and leaks of rows are decided."""
    draw = np.random.default_rng(0)

    def random(shape, dtype):
        return scratch.keep([draw.integers(0, 2**32, shape, np.uint32)], np.uint32).view(dtype)

    def sketches():
        ends = scratch.keep([np.arange(1, num_rows + 1) * 4], np.int64)
        keys = random(num_rows * similar.BANDS, np.uint32).reshape(-1, similar.BANDS)
        return similar.Sketches(
            random(num_rows * 2, np.uint64), keys, ends, random(4 * num_rows, "u4")
        )

    digests = [random(num_rows * 4, DIGEST) for _ in range(2)]
    digests[0][: num_rows // 4] = digests[0][num_rows // 4 : num_rows // 4 * 2]
    told = similar.Told(digests[0], digests[1], sketches(), sketches())
    tracemalloc.start()
    held = data.split(told.digests, 0.3, 0, scratch)
    assert round(0.3 * num_rows) - 2 < np.count_nonzero(held) <= round(0.3 * num_rows)
    rows = scratch.where(num_rows, lambda block: ~held[block])
    held_out = scratch.where(num_rows, lambda block: held[block])
    entries = scratch.zeros(len(rows), np.uint16)
    assert len(data.mix(entries, [1.5], 0, scratch)) == len(rows) + round(len(rows) / 2)
    repeated, _ = similar.duplicates(told, rows, scratch)
    assert len(repeated) > num_rows // 10
    leaked, _ = similar.leaks(told, rows, held_out, scratch)
    assert not len(leaked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(monkeypatch, scratch):
    monkeypatch.setattr(arrays, "BLOCK", 1024)
    decided(2_000, scratch)  # what is imported and cached once
    assert decided(32_000, scratch) < decided(8_000, scratch) + 24_000  # not a byte a row
