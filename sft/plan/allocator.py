"""A model of PyTorch's caching allocator."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 2**20
ROUNDING = 512  # bytes: the smallest chunk; sizes are rounded up to multiples of it
SMALL = MIB  # requests of at most this size are cut from small segments, others from large ones
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB  # for requests below half of it; larger ones get a segment of their own,
HUGE_ROUNDING = 2 * MIB  # whose size is rounded up to multiples of this


@dataclass(eq=False)
class Chunk:
    """A part of a segment, used or free; its neighbours are parts of the same segment."""

    address: int
    size: int
    small: bool  # which pool it belongs to
    free: bool = False
    previous: Chunk | None = None
    next: Chunk | None = None
    grows: bool = False  # whether it is the last of an expandable segment


class CachingAllocator:
    """A model of the allocator with its defaults, for one stream: best fit, splitting, merging.

    It returns no memory to the device. `expandable`: as with
    PYTORCH_ALLOC_CONF=expandable_segments:True, each pool is one segment that grows at its end.
    It grows by whole pages, unless `pages` is false.
    """

    def __init__(self, expandable: bool = True, pages: bool = True):
        self.expandable = expandable
        self.page = {True: SMALL_SEGMENT, False: LARGE_SEGMENT} if pages else {}
        self.reserved_bytes = 0
        self._free: dict[bool, list[tuple[bool, int, int, Chunk]]] = {True: [], False: []}
        self._top = 0  # the next address of a new segment
        self._ends: dict[bool, Chunk] = {}  # the chunk at the end of each expandable segment

    def malloc(self, num_bytes: int) -> Chunk:
        size = max(1, math.ceil(num_bytes / ROUNDING)) * ROUNDING
        small = size <= SMALL
        chunk = self._best_fit(size, small) or self._grow(size, small)
        return self._split(chunk, size)

    def free(self, chunk: Chunk) -> None:
        for other in (chunk.previous, chunk.next):
            if other is not None and other.free:
                self._remove(other)
                self._merge(chunk, other)
        self._add(chunk)

    # -- the free chunks of each pool

    def _add(self, chunk: Chunk) -> None:
        chunk.free = True
        insort(self._free[chunk.small], _order(chunk))

    def _remove(self, chunk: Chunk) -> Chunk:
        chunk.free = False
        pool = self._free[chunk.small]
        del pool[bisect_left(pool, _order(chunk))]
        return chunk

    def _best_fit(self, size: int, small: bool) -> Chunk | None:
        pool = self._free[small]
        place = bisect_left(pool, (False, size, -1))
        if place == len(pool) or pool[place][3].size < size:
            return None
        return self._remove(pool[place][3])

    # -- neighbours

    def _split(self, chunk: Chunk, size: int) -> Chunk:
        left = chunk.size - size
        if left < ROUNDING or (left <= SMALL and not chunk.small and not self.expandable):
            return chunk
        rest = Chunk(chunk.address + size, left, chunk.small, False, chunk, chunk.next, chunk.grows)
        if rest.next is not None:
            rest.next.previous = rest
        if rest.grows:
            self._ends[rest.small] = rest
        chunk.size, chunk.next, chunk.grows = size, rest, False
        self._add(rest)
        return chunk

    def _merge(self, chunk: Chunk, other: Chunk) -> None:
        """Extends `chunk` by its neighbour."""
        if other is chunk.next:
            chunk.next, chunk.grows = other.next, other.grows
        else:
            chunk.address, chunk.previous = other.address, other.previous
        chunk.size += other.size
        if chunk.grows:
            self._ends[chunk.small] = chunk
        if chunk.next is not None:
            chunk.next.previous = chunk
        if chunk.previous is not None:
            chunk.previous.next = chunk

    # -- segments

    def _grow(self, size: int, small: bool) -> Chunk:
        """Returns a new chunk of at least `size` bytes from the device."""
        if self.expandable:
            return self._expand(size, small)
        if small:
            needed = SMALL_SEGMENT
        elif size < LARGE_SEGMENT // 2:
            needed = LARGE_SEGMENT
        else:
            needed = math.ceil(size / HUGE_ROUNDING) * HUGE_ROUNDING
        self.reserved_bytes += needed
        address, self._top = self._top, self._top + needed
        return Chunk(address, needed, small)

    def _expand(self, size: int, small: bool) -> Chunk:
        end = self._ends.get(small)
        if end is not None and end.free:
            self._remove(end)
        else:  # adds an empty chunk
            address = end.address + end.size if end else 0
            new = Chunk(address, 0, small, False, end, None, True)
            if end is not None:
                end.next, end.grows = new, False
            end = self._ends[small] = new
        page = self.page.get(small, ROUNDING)
        needed = math.ceil((size - end.size) / page) * page
        self.reserved_bytes += needed
        end.size += needed
        return end


def _order(chunk: Chunk) -> tuple[bool, int, int, Chunk]:
    """Returns a key that sorts by best fit; the chunk that can grow comes last."""
    return chunk.grows, chunk.size, chunk.address, chunk
