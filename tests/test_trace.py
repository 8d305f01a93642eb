"""A step recorded on fake tensors is the real step; the allocator makes written-out moves."""

from __future__ import annotations

import pytest
import torch

from sft import trace
from sft.trace import MIB, Block, CachingAllocator, Recorder, Trace

# --- recording ---------------------------------------------------------------------------------


def test_births_and_deaths_of_storages():
    with Recorder() as recorder:
        a = torch.zeros(100)  # 400 bytes
        b = a.view(10, 10)[2:]  # the same storage
        with recorder.labelled("sum"):
            c = a + 1
        del a
        assert recorder.trace.peak() == trace.Peak(800, {"other": 400, "sum": 400})
        del b  # the last reference to the first storage
        recorder.name([c], "result")
        d = torch.zeros(50)
    events = [(born, block.num_bytes) for born, block in recorder.trace.events]
    assert events == [(True, 400), (True, 400), (False, 400), (True, 200)]
    assert recorder.trace.peak().breakdown == {"other": 400, "result": 400}
    del c, d
    assert len(recorder.trace.events) == 6
    assert recorder.trace.events[-1][0] is False


def test_what_was_there_before_is_born_when_it_is_named():
    weight = torch.zeros(1000)
    recorder = Recorder()
    recorder.name([weight, weight.view(10, 100), None], "weights")
    with recorder:
        doubled = weight * 2
    assert recorder.trace.peak().breakdown == {"weights": 4000, "other": 4000}
    assert doubled is not None


def accumulating_step(weight: torch.Tensor) -> None:
    """Three gradients meet in one tensor; some may be overwritten, one is used elsewhere."""
    for _ in range(2):
        x = (weight * 2).sin()
        y = x.cos() + x.exp() + x.tanh()
        ((x + y).sum() + (x + x).sum()).backward()


def test_the_observer_changes_nothing_that_it_observes():
    true_bytes, _ = true_peak(accumulating_step, torch.randn(1000, requires_grad=True))
    recorder = Recorder()
    weight = torch.randn(1000, requires_grad=True)
    with recorder:
        accumulating_step(weight)
    assert recorder.trace.peak().num_bytes == pytest.approx(true_bytes, rel=0.01)


def true_peak(work, *arguments) -> tuple[int, object]:
    """(bytes that the CPU allocator gave out at most during `work`, beyond what was there before;
    its result), from the allocator's own events, which the profiler records."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = work(*arguments)
    nodes = list(profile.profiler.kineto_results.experimental_event_tree())
    for node in nodes:  # grows while it is read
        nodes.extend(node.children)
    events = [n for n in nodes if n.tag == torch._C._profiler._EventType.Allocation]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        now += event.extra_fields.alloc_size
        most = max(most, now)
    return most, result


# --- the caching allocator ---------------------------------------------------------------------


def replay(*moves: float, **options) -> CachingAllocator:
    """Positive: allocates so many MiB; negative: frees the -nth allocation (from 1)."""
    allocator, chunks = CachingAllocator(**options), []
    for move in moves:
        if move > 0:
            chunks.append(allocator.malloc(int(move * MIB)))
        else:
            allocator.free(chunks[-int(move) - 1])
    return allocator


# fmt: off
SEQUENCES = [
    # moves, reserved MiB without and with expandable segments
    ((0.0001,), 2, 2),  # a small segment
    ((0.5, 0.5, 0.5, 0.5, 0.5), 4, 4),  # the fifth needs a second one
    ((1, 1.0005), 22, 22),  # 1 MiB is small, 512 bytes more are not
    ((9.9, 9.9, 0.3), 22, 22),  # two share 20 MiB; 0.2 MiB are left, and not for small ones
    ((10,), 10, 20),  # of 10 MiB on: a segment of its own, in steps of 2 MiB; pages of 20 MiB
    ((10.5, 11), 24, 40),
    ((30, -1, 20, 10), 30, 40),  # split
    ((30, -1, 29.5, 2), 50, 40),  # at most 1 MiB left: not split
    ((12, 12, -1, -2, 24), 48, 40),  # segments cannot be joined, what grows can
    ((6, 6, 6, -1, -3, 7), 20, 20),  # 6 + 8 free: best fit takes the end
    ((6, 6, 6, -2, 5, 2), 20, 20),
    ((16, 4, 12, 4, -1, -3, 12), 36, 40),  # best fit: the hole of 12, not that of 16
    ((6, 6, 6, -1, -2, 12), 20, 20),  # merged with the neighbour before it
]
# fmt: on


@pytest.mark.parametrize(("moves", "plain", "expandable"), SEQUENCES)
def test_reserved_bytes_of_written_out_sequences(moves, plain, expandable):
    for expected, option in ((plain, False), (expandable, True)):
        allocator = replay(*moves, expandable=option)
        assert allocator.reserved_bytes == allocator.peak_bytes == expected * MIB
        assert sum(allocator.segments.values()) == expected * MIB


def test_sizes_are_rounded_to_512_bytes():
    allocator = CachingAllocator()
    assert [allocator.malloc(n).size for n in (1, 512, 513, 5000)] == [512, 512, 1024, 5120]


def test_everything_freed_leaves_whole_segments():
    moves = (0.3, 0.9, 1.5, 6, 6, 15, 0.7, 3, 30)
    for option in (False, True):
        order = (-4, -1, -9, -3, -7, -2, -8, -6, -5)
        allocator = replay(*moves, *order, expandable=option)
        free = [entry[3] for pool in allocator._free.values() for entry in pool]
        assert sorted(c.size for c in free) == sorted(allocator.segments.values())
        assert all(c.previous is None and c.next is None for c in free)


def test_at_the_capacity_free_segments_are_given_back_first():
    allocator = replay(12, 14, -1, 20, capacity=40 * MIB)
    assert (allocator.reserved_bytes, allocator.peak_bytes) == (34 * MIB, 34 * MIB)
    with pytest.raises(MemoryError, match="in use"):
        replay(12, 14, 20, capacity=40 * MIB)


def test_a_trace_is_replayed_through_the_allocator():
    big, small = Block(12 * MIB, "a"), Block(1000, "b")
    record = Trace([(True, big), (True, small), (True, Block(0, "c")), (False, big), (True, big)])
    assert record.reserved() == trace.Reserved(14 * MIB, 2)
    assert record.reserved(expandable=True) == trace.Reserved(22 * MIB, 2)
    with pytest.raises(MemoryError):
        record.reserved(capacity=13 * MIB)
