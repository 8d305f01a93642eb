"""The store gives back what was put in, and micro-batches are what a plain loop makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sft.data.examples
from sft.data.examples import Batch, ExampleArrays, Examples, append_array, collate, map_array
from sft.data.files import Row
from sft.data.template import IGNORED, Example
from sft.runtime import hardware

CPU = torch.device("cpu")
PAD = 0


@st.composite
def examples(draw):
    length = draw(st.integers(1, 12))
    ids = draw(st.lists(st.integers(1, 99), min_size=length, max_size=length))
    learnt = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    labels = [token if each else IGNORED for token, each in zip(ids, learnt, strict=True)]
    weight = st.sampled_from([0.0, 0.3, 1.0, 2.5])
    weights = draw(st.none() | st.lists(weight, min_size=length, max_size=length))
    return Example(ids, labels, weights)


def row(number: int) -> Row:
    messages = [{"role": "user", "content": f"ask {number} ünï"}]
    tools = [{"name": "t"}] if number % 2 else None
    group = (None, "", "ü")[number % 3]
    return Row(messages, tools, f"file {number % 3}", number + 1, group=group)


def packed(made: list[Example]) -> ExampleArrays:
    return ExampleArrays.pack((number, row(number), example) for number, example in enumerate(made))


def test_what_is_appended_is_mapped_one_after_the_other(tmp_path):
    starts = [append_array(tmp_path / "a", np.arange(n, dtype=np.int32)) for n in (3, 0, 2)]
    assert append_array(tmp_path / "empty", np.zeros(0)) == 0
    assert starts == [0, 3, 3]
    array = map_array(tmp_path / "a", np.int32)
    assert array.tolist() == [0, 1, 2, 0, 1]
    assert not array.flags.writeable
    assert map_array(tmp_path / "empty", np.int32).tolist() == []


def test_what_is_written_into_a_map_is_in_the_file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(8))
    map_array(tmp_path / "a", np.int32, "r+")[1] = 5
    assert map_array(tmp_path / "a", np.int32).tolist() == [0, 5]


@given(st.lists(examples(), min_size=1, max_size=9), st.integers(1, 4))
def test_what_is_written_in_parts_comes_back(tmp_path_factory, made, size):
    folder = tmp_path_factory.mktemp("store")
    for start in range(0, len(made), size):
        part = [(n, row(n), made[n]) for n in range(start, min(start + size, len(made)))]
        ExampleArrays.pack(part).append_to(folder)
    read = Examples(ExampleArrays.open(folder))
    assert list(read) == made == list(Examples(packed(made)))
    assert list(read.rows()) == [row(number) for number in range(len(made))]
    assert list(read.lengths) == [len(example.ids) for example in made]
    supervised = [example.num_supervised for example in made]
    assert read.arrays.index["supervised"].tolist() == supervised
    order = np.array([len(made) - 1, 0, 0])
    assert list(Examples(read.arrays, order)) == [made[-1], made[0], made[0]]


@given(st.lists(examples(), min_size=1, max_size=6), st.data())
def test_padded_rows(made, draw):
    chosen = draw.draw(st.lists(st.integers(0, len(made) - 1), min_size=1, max_size=6))
    batch = collate(Examples(packed(made)), chosen, PAD, "padded", CPU)
    rows = [made[i] for i in chosen]
    width = max(len(example.ids) for example in rows)
    expected = [example.ids + [PAD] * (width - len(example.ids)) for example in rows]
    assert batch.input_ids.tolist() == expected
    assert batch.position_ids is None
    check_targets(batch, rows, [n * width for n in range(len(rows))])


@given(st.lists(examples(), min_size=1, max_size=6), st.data())
def test_packed_documents(made, draw):
    chosen = draw.draw(st.lists(st.integers(0, len(made) - 1), min_size=1, max_size=6))
    batch = collate(Examples(packed(made)), chosen, PAD, "packed", CPU)
    rows = [made[i] for i in chosen]
    assert batch.input_ids.tolist() == [[token for example in rows for token in example.ids]]
    restarting = [i for example in rows for i in range(len(example.ids))]
    assert batch.position_ids.tolist() == [restarting]
    lengths = [len(example.ids) for example in rows]
    check_targets(batch, rows, [sum(lengths[:n]) for n in range(len(rows))])


def check_targets(batch: Batch, rows: list[Example], starts: list[int]) -> None:
    """Position t predicts token t + 1; weights are those of the predicted tokens."""
    expected = [
        (start + i - 1, example.labels[i], example.weights[i] if example.weights else 1.0)
        for start, example in zip(starts, rows, strict=True)
        for i in range(1, len(example.ids))
        if example.labels[i] != IGNORED
    ]
    assert batch.positions.tolist() == [position for position, _, _ in expected]
    assert batch.targets.tolist() == [target for _, target, _ in expected]
    if any(example.weights for example in rows):
        assert batch.weights.tolist() == [weight for _, _, weight in expected]
    else:
        assert batch.weights is None


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_micro_batch_of_nothing_is_a_token_that_nothing_is_learnt_from(layout):
    batch = collate(Examples(packed([Example([5], [5])])), [], PAD, layout, CPU)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.positions.dtype == batch.targets.dtype == torch.long
    assert len(batch.positions) == len(batch.targets) == 0
    assert batch.weights is batch.position_ids is None


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chosen", [[0, 1], []])
def test_a_micro_batch_lies_on_its_device(layout, chosen, monkeypatch):
    sent = []

    def send(tensor, device):
        sent.append(hardware.to_device(tensor, device))
        return sent[-1]

    monkeypatch.setattr(sft.data.examples, "to_device", send)
    made = packed([Example([5, 6], [5, 6], [1.0, 0.5]), Example([7], [7])])
    batch = collate(Examples(made), chosen, PAD, layout, torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 3 + (layout == "packed" and bool(chosen)) + bool(chosen)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert all(any(each is one for one in sent) for each in tensors if each.numel())


def test_a_copy_to_a_gpu_comes_from_pinned_memory_and_is_not_waited_for():
    calls = []

    class Host:
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, **given):
            calls.append((device.type, given))

    hardware.to_device(Host(), torch.device("cuda", 1))
    assert calls == ["pinned", ("cuda", {"non_blocking": True})]
    assert torch.equal(hardware.to_device(torch.arange(3), CPU), torch.arange(3))
