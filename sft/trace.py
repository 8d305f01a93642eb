"""Records every allocation of whatever runs under it, and replays the record.

`Recorder` is a dispatch mode: after each operation it looks for storages that it has not met, and a
weak reference tells when one dies. It sees the same on real tensors and on fake ones
(`torch._subclasses.FakeTensorMode`), which have shapes and lifetimes but no data; so a step of any
size can be recorded on a laptop. `peak` replays a record as requested bytes, `reserved` through a
model of PyTorch's CUDA caching allocator (c10/cuda/CUDACachingAllocator.cpp).

What no dispatch mode can see is missing: the workspace inside a kernel, the CUDA context, NCCL.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

MIB = 2**20

aten = torch.ops.aten


@dataclass(eq=False)
class Block:
    """One storage."""

    num_bytes: int
    label: str  # what it is for; may be told later than its birth


@dataclass
class Trace:
    """Births (True) and deaths (False) of blocks, in order; what still lives has no death."""

    events: list[tuple[bool, Block]] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)  # from which event on, its name

    def peak(self) -> Peak:
        """The first moment at which the living blocks have the most bytes."""
        return max(self.peaks().values(), key=lambda peak: peak.num_bytes)

    def peaks(self) -> dict[str, Peak]:
        """That of each phase; what was born before the first one belongs to it."""
        names = [name for _, name in self.phases] or [""]
        bounds = [0, *(start for start, _ in self.phases[1:]), len(self.events)]
        result: dict[str, Peak] = {}
        now, living = 0, Counter[str]()
        for name, (start, stop) in zip(names, pairwise(bounds), strict=True):
            most, then = now, living.copy()
            for born, block in self.events[start:stop]:
                size = block.num_bytes if born else -block.num_bytes
                now, living[block.label] = now + size, living[block.label] + size
                if now > most:
                    most, then = now, living.copy()
            if name not in result or most > result[name].num_bytes:
                sizes = {label: size for label, size in then.most_common() if size}
                result[name] = Peak(most, sizes)
        return result

    def reserved(self, expandable: bool = True, pages: bool = True) -> int:
        """Bytes that the caching allocator takes from the GPU for it, at most."""
        allocator = CachingAllocator(expandable, pages)
        chunks: dict[Block, Chunk] = {}
        for born, block in self.events:
            if born and block.num_bytes:
                chunks[block] = allocator.malloc(block.num_bytes)
            elif block in chunks:
                allocator.free(chunks.pop(block))
        return allocator.reserved_bytes


@dataclass(frozen=True)
class Peak:
    num_bytes: int
    breakdown: dict[str, int]  # label -> bytes, largest first


# --- recording ---------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records into `trace` while it is entered; `label` names what is born next."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.label = "other"
        self.labels: dict[str, str] = {}  # of what the operations of a namespace make
        self._known: dict[int, tuple[Block, weakref.ref]] = {}  # address of the storage -> block

    def enter(self, phase: str) -> None:
        self.trace.phases.append((len(self.trace.events), phase))

    def name(self, tensors: Iterable[torch.Tensor | None], label: str) -> None:
        """Says what these are for, whenever they were born; those not met are born now."""
        for tensor in tensors:
            if tensor is not None:
                self._meet(tensor, label).label = label

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.add.Tensor and _is_accumulation(*args):
            func = aten.add_.Tensor
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor, self.labels.get(func.namespace, self.label))
        return result

    def _meet(self, tensor: torch.Tensor, label: str) -> Block:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._known:
            block = Block(storage.nbytes(), label)
            self.trace.events.append((True, block))
            watch = weakref.ref(storage, lambda _: self._forget(address))
            self._known[address] = block, watch
        return self._known[address][0]

    def _forget(self, address: int) -> None:
        block, _ = self._known.pop(address)
        self.trace.events.append((False, block))


class Assume(TorchDispatchMode):
    """Lets 1 (True) be the value of a fake tensor where a program asks for one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _one(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _is_accumulation(left: Any, right: Any = None, *further: Any) -> bool:
    """Whether autograd sums two gradients of one tensor and may overwrite the first.

    It does so in place where it holds the last reference to the first, but not while a dispatch
    mode looks on (torch/csrc/autograd/input_buffer.cpp: `can_accumulate_inplace`); without this
    the observer would change what it observes.
    """
    return (
        torch._C._current_graph_task_id() != -1
        and not torch.is_grad_enabled()
        and not further
        and isinstance(right, torch.Tensor)
        and (left.shape, left.dtype) == (right.shape, right.dtype)
        # The gradient itself, and the object that asks; a view or a saved tensor would be a third.
        and torch._C._storage_Use_Count(left.untyped_storage()._cdata) == 2
    )


# --- the caching allocator ---------------------------------------------------------------------

ROUNDING = 512  # bytes: the smallest block, and what every size is rounded up to
SMALL = MIB  # requests up to it are cut from small segments, others from large ones
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB  # for requests below half of it; larger ones get a segment of their own
HUGE_ROUNDING = 2 * MIB  # of such a segment


@dataclass(eq=False)
class Chunk:
    """A piece of a segment, used or free; its neighbours are pieces of the same segment."""

    address: int
    size: int
    small: bool
    free: bool = False
    previous: Chunk | None = None
    next: Chunk | None = None
    grows: bool = False  # the last of an expandable segment


class CachingAllocator:
    """PyTorch's, for one stream and with its defaults: best fit, splitting, merging, and no return
    of memory to the device before a request would fail, which is not modelled.

    `expandable`: as with PYTORCH_ALLOC_CONF=expandable_segments:True, where each pool is one
    segment that grows at its end; by whole pages, unless `pages` is false.
    """

    def __init__(self, expandable: bool = True, pages: bool = True):
        self.expandable = expandable
        self.page = {True: SMALL_SEGMENT, False: LARGE_SEGMENT} if pages else {}
        self.reserved_bytes = 0
        self.segments: dict[int, int] = {}  # address -> bytes
        self._free: dict[bool, list[tuple[bool, int, int, Chunk]]] = {True: [], False: []}
        self._top = 0  # addresses are given out once
        self._ends: dict[bool, Chunk] = {}  # of the expandable segments

    def malloc(self, num_bytes: int) -> Chunk:
        size = max(1, math.ceil(num_bytes / ROUNDING)) * ROUNDING
        small = size <= SMALL
        chunk = self._best_fit(size, small) or self._more(size, small)
        return self._split(chunk, size)

    def free(self, chunk: Chunk) -> None:
        for other in (chunk.previous, chunk.next):
            if other is not None and other.free:
                self._take(other)
                self._merge(chunk, other)
        self._give(chunk)

    # -- the free chunks of each pool

    def _give(self, chunk: Chunk) -> None:
        chunk.free = True
        insort(self._free[chunk.small], _order(chunk))

    def _take(self, chunk: Chunk) -> Chunk:
        chunk.free = False
        pool = self._free[chunk.small]
        del pool[bisect_left(pool, _order(chunk))]
        return chunk

    def _best_fit(self, size: int, small: bool) -> Chunk | None:
        pool = self._free[small]
        place = bisect_left(pool, (False, size, -1))
        if place == len(pool) or pool[place][3].size < size:
            return None
        return self._take(pool[place][3])

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
        self._give(rest)
        return chunk

    def _merge(self, chunk: Chunk, other: Chunk) -> None:
        """`chunk` swallows its neighbour."""
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

    def _more(self, size: int, small: bool) -> Chunk:
        """A chunk of at least `size` bytes that the device gives; it is not in the pool."""
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
        self.segments[address] = needed
        return Chunk(address, needed, small)

    def _expand(self, size: int, small: bool) -> Chunk:
        end = self._ends.get(small)
        if end is not None and end.free:
            self._take(end)
        else:  # an empty chunk behind the last
            address = end.address + end.size if end else 0
            new = Chunk(address, 0, small, False, end, None, True)
            if end is not None:
                end.next, end.grows = new, False
            end = self._ends[small] = new
        page = self.page.get(small, ROUNDING)
        needed = math.ceil((size - end.size) / page) * page
        self.reserved_bytes += needed
        end.size += needed
        self.segments[small] = self.segments.get(small, 0) + needed
        return end


def _order(chunk: Chunk) -> tuple[bool, int, int, Chunk]:
    """Best fit first; the chunk that can grow comes last, since it counts as endless."""
    return chunk.grows, chunk.size, chunk.address, chunk
