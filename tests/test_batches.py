"""Which examples form a global batch and how it is cut: properties, and one cut written out."""

from __future__ import annotations

import math
from itertools import chain, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.batches import Budget, cut, global_batch_ids, num_tokens, steps_per_epoch

any_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)
any_layout: Any = st.sampled_from(["padded", "packed"])
any_ranks = st.integers(1, 9)
any_budget = st.integers(1, 200)
property_of = settings(deadline=None, max_examples=150)


def flat(ranks):
    return [i for rank in ranks for micro_batch in rank for i in micro_batch]


def cost(lengths, micro_batch, layout):
    """Positions of a micro-batch, counted one by one."""
    rows = [lengths[i] for i in micro_batch]
    if layout == "packed":
        return sum(1 for row in rows for _ in range(row))
    return sum(1 for _ in rows for _ in range(max(rows)))


# --- order -------------------------------------------------------------------------------------


def epoch(num_examples, seed, number, global_batch):
    steps = steps_per_epoch(num_examples, global_batch)
    batches = [
        global_batch_ids(num_examples, seed, step, global_batch)
        for step in range(number * steps, (number + 1) * steps)
    ]
    return batches, list(chain.from_iterable(batches))


@property_of
@given(
    num_examples=st.integers(1, 60),
    seed=st.integers(0, 2**40),
    number=st.integers(0, 50),
    global_batch=st.integers(1, 70),
)
def test_an_epoch_takes_every_example_once_in_full_batches_but_the_last(
    num_examples, seed, number, global_batch
):
    batches, order = epoch(num_examples, seed, number, global_batch)
    assert sorted(order) == list(range(num_examples))
    assert [len(batch) for batch in batches[:-1]] == [global_batch] * (len(batches) - 1)
    assert len(batches[-1]) == (num_examples % global_batch or global_batch)


def test_the_order_differs_between_epochs_and_between_seeds():
    orders = [epoch(50, seed, number, 8)[1] for seed in range(4) for number in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert list(range(50)) not in orders


@property_of
@given(
    seed=st.integers(0, 99),
    number=st.integers(0, 9),
    sizes=st.tuples(any_ranks, st.integers(1, 40)),
)
def test_the_order_of_an_epoch_does_not_depend_on_the_size_of_the_batches(seed, number, sizes):
    one, other = (epoch(37, seed, number, size)[1] for size in sizes)
    assert one == other


def test_the_batch_of_a_step_is_a_function_of_its_arguments_not_of_earlier_calls():
    arguments = [(20, seed, step, 6) for seed in range(5) for step in range(9)]
    forwards = [global_batch_ids(*each) for each in arguments]
    backwards = [global_batch_ids(*each) for each in reversed(arguments)]
    assert forwards == backwards[::-1]


def test_a_returned_batch_belongs_to_the_caller():
    batch = global_batch_ids(10, 0, 0, 4)
    expected = list(batch)
    batch.clear()
    assert global_batch_ids(10, 0, 0, 4) == expected


ORDER = {  # of 7 examples with seed 5: a checkpoint is only resumed rightly while this stays so
    0: [[1, 4, 2], [3, 6, 5], [0]],
    1: [[4, 2, 0], [6, 5, 3], [1]],
}


@pytest.mark.parametrize("number", ORDER)
def test_the_order_of_a_seed_is_the_one_written_out(number):
    assert epoch(7, 5, number, 3)[0] == ORDER[number]


@pytest.mark.parametrize(
    ("num_examples", "global_batch", "steps"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (16, 8, 2)]
)
def test_an_epoch_has_so_many_steps(num_examples, global_batch, steps):
    assert steps_per_epoch(num_examples, global_batch) == steps


# --- cut ---------------------------------------------------------------------------------------


@property_of
@given(
    lengths=any_lengths,
    num_ranks=any_ranks,
    max_tokens=any_budget,
    layout=any_layout,
    micro_batch_cost=st.sampled_from([None, 0, 5, 64]),
)
def test_a_cut_keeps_its_promises(lengths, num_ranks, max_tokens, layout, micro_batch_cost):
    ids = list(range(len(lengths)))
    ranks = cut(ids, lengths, num_ranks, Budget(max_tokens, layout, micro_batch_cost))
    assert len(ranks) == num_ranks
    assert sorted(flat(ranks)) == ids, "every example once"
    assert len({len(rank) for rank in ranks}) == 1, "collectives match"
    for rank in ranks:
        for micro_batch in rank:
            if len(micro_batch) > 1:
                assert cost(lengths, micro_batch, layout) <= max_tokens


@property_of
@given(
    lengths=any_lengths,
    num_ranks=any_ranks,
    max_tokens=any_budget | st.just(10**9),
    layout=any_layout,
    rows=st.integers(1, 9),
)
def test_a_micro_batch_has_no_more_rows_than_allowed(lengths, num_ranks, max_tokens, layout, rows):
    budget = Budget(max_tokens, layout, None, rows)
    ranks = cut(range(len(lengths)), lengths, num_ranks, budget)
    assert sorted(flat(ranks)) == list(range(len(lengths)))
    assert max(len(micro_batch) for rank in ranks for micro_batch in rank) <= rows
    if max_tokens == 10**9:  # then the rows alone say how many are needed
        assert {len(rank) for rank in ranks} == {math.ceil(len(lengths) / rows / num_ranks)}


@property_of
@given(lengths=any_lengths, num_ranks=any_ranks, max_tokens=any_budget, layout=any_layout)
def test_no_micro_batch_is_there_without_need(lengths, num_ranks, max_tokens, layout):
    ranks = cut(range(len(lengths)), lengths, num_ranks, Budget(max_tokens, layout))
    assert any(all(rank) for rank in ranks), "one rank needs all of them"
    for rank in ranks:
        filled = [micro_batch for micro_batch in rank if micro_batch]
        assert rank[: len(filled)] == filled, "empty ones come last"
        for one, following in pairwise(filled):
            if layout == "packed":
                assert cost(lengths, [*one, following[0]], layout) > max_tokens
    if layout == "padded":
        assert len(ranks[0]) == math.ceil(runs_needed(lengths, max_tokens) / num_ranks)


def runs_needed(lengths, max_tokens):
    """Runs of the sorted examples under a budget, padded to the longest, which is the first."""
    runs, longest, count = 0, 0, 0
    for length in sorted(lengths, reverse=True):
        if not runs or longest * (count + 1) > max_tokens:
            runs, longest, count = runs + 1, length, 0
        count += 1
    return runs


@property_of
@given(lengths=any_lengths, num_ranks=any_ranks, max_tokens=any_budget)
def test_padded_micro_batches_are_as_even_as_their_number_allows(lengths, num_ranks, max_tokens):
    ranks = cut(range(len(lengths)), lengths, num_ranks, Budget(max_tokens, "padded"))
    largest = max(cost(lengths, m, "padded") for rank in ranks for m in rank if m)
    alone = max(lengths)
    if largest > alone:  # a smaller budget would need one more on some rank
        assert runs_needed(lengths, largest - 1) > num_ranks * len(ranks[0])


@property_of
@given(lengths=any_lengths, num_ranks=any_ranks, max_tokens=any_budget)
def test_padded_micro_batches_hold_likes(lengths, num_ranks, max_tokens):
    ranks = cut(range(len(lengths)), lengths, num_ranks, Budget(max_tokens, "padded"))
    filled = [sorted(lengths[i] for i in m) for rank in ranks for m in rank if m]
    spans = sorted((m[0], m[-1]) for m in filled)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


@property_of
@given(lengths=any_lengths, num_ranks=any_ranks)
def test_packed_ranks_differ_by_one_longest_example_at_most(lengths, num_ranks):
    ranks = cut(range(len(lengths)), lengths, num_ranks, Budget(100, "packed"))
    loads = [sum(lengths[i] for i in flat([rank])) for rank in ranks]
    assert max(loads) <= sum(lengths) / num_ranks + max(lengths)
    assert max(loads) - min(loads) <= max(lengths)


@property_of
@given(
    lengths=any_lengths,
    num_ranks=any_ranks,
    max_tokens=any_budget,
    layout=any_layout,
    random=st.randoms(use_true_random=False),
)
def test_a_cut_depends_on_the_set_of_examples_only(lengths, num_ranks, max_tokens, layout, random):
    budget = Budget(max_tokens, layout)
    ids = list(range(len(lengths)))
    shuffled = random.sample(ids, len(ids))
    assert cut(shuffled, lengths, num_ranks, budget) == cut(ids, lengths, num_ranks, budget)


@property_of
@given(lengths=any_lengths, step=st.integers(0, 30), max_tokens=any_budget, layout=any_layout)
def test_a_step_takes_the_same_examples_on_any_number_of_ranks(lengths, step, max_tokens, layout):
    ids = global_batch_ids(len(lengths), 3, step, 8)
    for num_ranks in (1, 2, 3, 8, 64):
        ranks = cut(ids, lengths, num_ranks, Budget(max_tokens, layout))
        assert sorted(flat(ranks)) == sorted(ids)


@property_of
@given(lengths=any_lengths, layout=any_layout, data=st.data())
def test_the_cost_counts_padding_only_where_there_is_padding(lengths, layout, data):
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    assert num_tokens(lengths, chosen, layout) == cost(lengths, chosen, layout)
    assert num_tokens(lengths, [], layout) == 0


LENGTHS = [5, 9, 2, 7, 2, 5, 12, 1]
#   by length: 6 (12), 1 (9), 3 (7), 0 (5), 5 (5), 2 (2), 4 (2), 7 (1). Packed, each to the lighter
#   rank: rank 0: 6 (12), 0 (17), 2 (19), 4 (21), 7 (22); rank 1: 1 (9), 3 (16), 5 (21).
#   Padded: runs under the smallest budget that needs no more: 24 -> 18: 6 | 1 3 | 0 5 2 | 4 7.
CUTS = {
    ("packed", 12): [[[6], [0, 2, 4, 7]], [[1], [3, 5]]],
    ("padded", 12): [[[6], [2, 4, 7], [5]], [[1], [3], [0]]],
    ("packed", 10): [[[6], [0, 2, 4, 7], []], [[1], [3], [5]]],
    ("padded", 24): [[[1, 3], [4, 7]], [[0, 5, 2], [6]]],
    ("packed", 22): [[[6, 0, 2, 4, 7]], [[1, 3, 5]]],
    ("padded", 1): [[[6], [0], [2], [4]], [[1], [3], [5], [7]]],
}


@pytest.mark.parametrize(("layout", "max_tokens"), CUTS)
def test_a_small_cut_is_the_one_written_out(layout, max_tokens):
    expected = CUTS[layout, max_tokens]
    assert cut(range(8), LENGTHS, 2, Budget(max_tokens, layout)) == expected


def test_micro_batches_whose_budget_is_smaller_by_quarters_are_tried():
    """Of 29, 21, 15, 11 and 8 tokens, 15 cost least: 15 + 10 + 8 + 7 + 6 positions, and 5."""
    expected = [[[4], [0], [5], [2], [1, 3]]]
    assert cut(range(6), [10, 3, 7, 2, 15, 8], 1, Budget(29, "padded", 1)) == expected


def test_ranks_share_the_rows_where_their_number_is_given():
    budget = Budget(10**9, "packed", None, 2)
    assert cut(range(4), [60, 1, 1, 1], 2, budget) == [[[0, 3]], [[1, 2]]]


def whole_cost(ranks, lengths, micro_batch_cost):
    filled = [m for rank in ranks for m in rank if m]
    return sum(cost(lengths, m, "padded") + micro_batch_cost for m in filled)


@property_of
@given(
    lengths=any_lengths, max_tokens=any_budget, micro_batch_cost=st.sampled_from([0, 3, 20, 10**6])
)
def test_more_micro_batches_only_where_they_cost_less_than_padding(
    lengths, max_tokens, micro_batch_cost
):
    ids = range(len(lengths))
    few = cut(ids, lengths, 1, Budget(max_tokens, "padded"))
    more = cut(ids, lengths, 1, Budget(max_tokens, "padded", micro_batch_cost))
    assert whole_cost(more, lengths, micro_batch_cost) <= whole_cost(few, lengths, micro_batch_cost)
    if micro_batch_cost == 0:
        assert sum(cost(lengths, m, "padded") for m in more[0]) == sum(lengths)
    if micro_batch_cost == 10**6:
        assert len(more[0]) == len(few[0])


def test_without_a_seed_the_order_is_that_of_the_data():
    assert global_batch_ids(10, None, 1, 4) == [4, 5, 6, 7]
    assert global_batch_ids(10, None, 3, 4) == [0, 1, 2, 3]  # the next epoch
