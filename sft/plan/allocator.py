"""A model of PyTorch's caching allocator (c10/cuda/CUDACachingAllocator.cpp)."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 2**20
ROUNDING = 512  # bytes: the smallest chunk; sizes are rounded up to multiples of it
SMALL = MIB  # requests of at most this size belong to the small pool, others to the large one
SMALL_PAGE = 2 * MIB  # the segment of the small pool grows by multiples of this
LARGE_PAGE = 20 * MIB  # that of the large pool


@dataclass(eq=False)
class Chunk:
    """A part of a segment, used or free; its neighbours are parts of the same segment."""

    address: int
    size: int
    small: bool  # which pool it belongs to
    free: bool = False
    previous: Chunk | None = None
    next: Chunk | None = None


class CachingAllocator:
    """A model of the allocator for one stream: best fit, splitting and merging.

    It returns no memory to the device. As with PYTORCH_ALLOC_CONF=expandable_segments:True, each
    pool is one segment that grows at its end. It grows by whole pages or, if `pages` is false, by
    only as many bytes as are needed.
    """

    min_rest = ROUNDING  # a large chunk is split if at least this many bytes are left over

    def __init__(self, pages: bool = True):
        # The dictionaries have the key True for the small pool and False for the large one.
        self._page_bytes = {True: SMALL_PAGE, False: LARGE_PAGE} if pages else {}
        self.reserved_bytes = 0
        # Free chunks are sorted by `_order`.
        self._free: dict[bool, list[tuple[bool, int, int, Chunk]]] = {True: [], False: []}
        self._ends: dict[bool, Chunk] = {}  # the chunk at the end of each segment

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
        insort(self._free[chunk.small], self._order(chunk))

    def _remove(self, chunk: Chunk) -> Chunk:
        chunk.free = False
        pool = self._free[chunk.small]
        del pool[bisect_left(pool, self._order(chunk))]
        return chunk

    def _best_fit(self, size: int, small: bool) -> Chunk | None:
        pool = self._free[small]
        place = bisect_left(pool, (False, size, -1))
        # The chunk at the end of the segment is the last of the pool, whatever its size.
        if place == len(pool) or pool[place][3].size < size:
            return None
        return self._remove(pool[place][3])

    # -- neighbours

    def _split(self, chunk: Chunk, size: int) -> Chunk:
        left = chunk.size - size
        if left < (ROUNDING if chunk.small else self.min_rest):
            return chunk
        rest = Chunk(chunk.address + size, left, chunk.small, False, chunk, chunk.next)
        if rest.next is not None:
            rest.next.previous = rest
        if self._is_end(chunk):
            self._ends[rest.small] = rest
        chunk.size, chunk.next = size, rest
        self._add(rest)
        return chunk

    def _merge(self, chunk: Chunk, other: Chunk) -> None:
        """Extends `chunk` by its neighbour."""
        if other is chunk.next:
            chunk.next = other.next
        else:
            chunk.address, chunk.previous = other.address, other.previous
        chunk.size += other.size
        if self._is_end(other):
            self._ends[chunk.small] = chunk
        if chunk.next is not None:
            chunk.next.previous = chunk
        if chunk.previous is not None:
            chunk.previous.next = chunk

    def _grow(self, size: int, small: bool) -> Chunk:
        """Extends the segment, and returns a chunk of at least `size` bytes at its end."""
        end = self._ends.get(small)
        if end is not None and end.free:
            self._remove(end)
        else:  # the last chunk is in use: add an empty one, which grows
            address = end.address + end.size if end else 0
            new = Chunk(address, 0, small, False, end)
            if end is not None:
                end.next = new
            end = self._ends[small] = new
        page = self._page_bytes.get(small, ROUNDING)
        needed = math.ceil((size - end.size) / page) * page
        self.reserved_bytes += needed
        end.size += needed
        return end

    def _is_end(self, chunk: Chunk) -> bool:
        return self._ends.get(chunk.small) is chunk

    def _order(self, chunk: Chunk) -> tuple[bool, int, int, Chunk]:
        """Returns a key that sorts by best fit; the chunk that can grow comes last."""
        return self._is_end(chunk), chunk.size, chunk.address, chunk
