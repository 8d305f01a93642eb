"""What this process really allocates: the truth that traces are held against."""

from __future__ import annotations

import gc

import torch

from sft.plan import dry_run
from sft.plan.allocator import LARGE_PAGE, MIB, SMALL, SMALL_PAGE, CachingAllocator, Chunk
from sft.train.engine import Engine


def allocated_bytes(engine: Engine) -> int:
    """What the model and the optimizer hold, and what the CPU allocator gives in a step."""
    kept = [t for tensors in dry_run.tensors_by_use(engine.task.model).values() for t in tensors]
    for state in engine.optimizer.state.values():
        kept += dry_run.tensors_in(state)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    return sum(storages.values()) + true_peak(engine.optimizer_step)[0]


def true_peak(work, *arguments) -> tuple[int, object]:
    """(bytes that the CPU allocator gave out at most during `work`, beyond what was there before;
    its result), from the allocator's own events, which the profiler records."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()  # what earlier work left in cycles would be freed within, and count below zero
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


class FixedSegments(CachingAllocator):
    """The allocator without expandable segments, as published numbers were measured with it."""

    min_rest = SMALL + 1

    def __init__(self):
        super().__init__()
        self.top = 0  # the next address of a new segment

    def _grow(self, size: int, small: bool) -> Chunk:
        if small:
            needed = SMALL_PAGE
        elif size < LARGE_PAGE // 2:
            needed = LARGE_PAGE
        else:  # a segment of its own
            needed = -(-size // (2 * MIB)) * 2 * MIB
        self.reserved_bytes += needed
        address, self.top = self.top, self.top + needed
        return Chunk(address, needed, small)


class RoundedSizes(CachingAllocator):
    """The allocator as Axolotl sets it: roundup_power2_divisions:16."""

    def malloc(self, num_bytes: int) -> Chunk:
        power = 2 ** max(0, num_bytes - 1).bit_length() // 2
        step = max(1, power // 16)
        return super().malloc(-(-num_bytes // step) * step)
