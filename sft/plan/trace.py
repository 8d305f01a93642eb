"""Records every allocation of whatever runs under it, and replays the record.

`Recorder` is a dispatch mode: after each operation it looks for new storages, and a weak reference
notices when one dies. It sees the same on real tensors and on fake ones
(`torch._subclasses.FakeTensorMode`), which have shapes and lifetimes but no data. So a step of any
size can be recorded on a laptop. `peak` replays a record as requested bytes, and `reserved` through
a model of PyTorch's caching allocator.

A dispatch mode cannot see the workspace inside a kernel, the CUDA context, or NCCL.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, compress, pairwise
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from sft.models.checkpointing import count_flops, is_product
from sft.models.fake import FastMode
from sft.plan.allocator import CachingAllocator, Chunk

aten = torch.ops.aten
KEPT = ("weights", "adapters")  # labels of what a model keeps; a cast makes a copy of it
WEIGHT_COPIES = "weight copies"  # in the dtype that autocast computes in


@dataclass(eq=False)
class Block:
    """One storage."""

    num_bytes: int
    label: str  # its use; may be set after its birth


@dataclass
class Trace:
    """Births (True) and deaths (False) of blocks, in order; a block may outlive the trace."""

    events: list[tuple[bool, Block]] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)  # first event, name
    flops: Counter[str] = field(default_factory=Counter)
    """Floating-point operations of matrix products: "forward", "recomputed", "backward"."""

    def peak(self) -> Peak:
        """Returns the first moment at which the living blocks have the most bytes."""
        return max(self.peaks().values(), key=lambda peak: peak.num_bytes)

    def peaks(self) -> dict[str, Peak]:
        """Returns the peak of each phase; blocks born before the first phase belong to it."""
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

    def reserved(self, allocator: CachingAllocator | None = None) -> int:
        """Returns the most bytes that the caching allocator takes from the GPU."""
        allocator = allocator or CachingAllocator()
        chunks: dict[Block, Chunk] = {}
        for born, block in self.events:
            if born and block.num_bytes:
                chunks[block] = allocator.malloc(block.num_bytes)
            elif block in chunks:
                allocator.free(chunks.pop(block))
        return allocator.reserved_bytes

    def without(self, label: str) -> Trace:
        """Returns the trace of all other blocks."""
        kept = [block.label != label for _, block in self.events]
        starts = [0, *accumulate(kept)]  # where each event is, or would be, among those kept
        events = list(compress(self.events, kept))
        return Trace(events, [(starts[start], name) for start, name in self.phases], self.flops)

    def pinned_bytes(self, label: str) -> int:
        """Returns the most bytes that PyTorch's allocator of pinned memory takes for these blocks.

        It rounds sizes up to powers of two, and gives no memory back (CachingHostAllocator.h).
        """
        now, most = Counter[int](), Counter[int]()  # by rounded size
        for born, block in self.events:
            if block.label == label:
                size = 1 << max(0, block.num_bytes - 1).bit_length()
                now[size] += size if born else -size
                most[size] = max(most[size], now[size])
        return most.total()

    def born_bytes(self, label: str) -> int:
        """Returns the bytes of all these blocks together."""
        return sum(block.num_bytes for born, block in self.events if born and block.label == label)


@dataclass(frozen=True)
class Peak:
    num_bytes: int
    breakdown: dict[str, int]  # label -> bytes, largest first


class Recorder(FastMode):
    """Records into `trace` while it is entered, and labels new blocks with `label`."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.label = "other"
        self.namespace_labels: dict[str, str] = {}  # labels of blocks by operations of a namespace
        self.recomputing = False  # whether checkpointing repeats a forward pass
        self._known: dict[int, tuple[Block, weakref.ref]] = {}  # address of the storage -> block

    def begin_phase(self, phase: str) -> None:
        self.trace.phases.append((len(self.trace.events), phase))

    def label_tensors(self, tensors: Iterable[torch.Tensor | None], label: str) -> None:
        """Labels tensors, whenever they were born; an unknown tensor counts as born now."""
        for tensor in tensors:
            if tensor is not None:
                self._block_of(tensor, label).label = label

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten.add.Tensor and _is_accumulation(*args):
            func = aten.add_.Tensor
        result = func(*args, **kwargs)
        label = self.namespace_labels.get(func.namespace, self.label)
        if func is aten._to_copy.default and self._label_of(args[0]) in KEPT:
            label = WEIGHT_COPIES
        elif func is aten._foreach_copy_.default:
            for copy, given in zip(*args[:2], strict=True):
                if self._label_of(given) in KEPT:
                    self._block_of(copy, label).label = WEIGHT_COPIES
        elif is_product(func):
            label = self.label
            self.trace.flops[self._pass()] += count_flops(func, args, kwargs, result)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._block_of(tensor, label)
        return result

    def _label_of(self, tensor: torch.Tensor) -> str | None:
        """Returns the label of a tensor's storage; None if it was born before the record."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known and known[0].label

    def _pass(self) -> str:
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        return "recomputed" if self.recomputing else "backward"

    def _block_of(self, tensor: torch.Tensor, label: str) -> Block:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._known:
            block = Block(storage.nbytes(), label)
            self.trace.events.append((True, block))
            death = weakref.ref(storage, lambda _: self._record_death(address))
            self._known[address] = block, death
        return self._known[address][0]

    def _record_death(self, address: int) -> None:
        block, _ = self._known.pop(address)
        self.trace.events.append((False, block))


def _is_accumulation(left: Any, right: Any = None, *further: Any) -> bool:
    """Returns whether autograd sums two gradients of one tensor and may overwrite the first.

    It does so in place if it holds the last reference to the first, but not under a dispatch mode
    (torch/csrc/autograd/input_buffer.cpp: `can_accumulate_inplace`). So without this function the
    recorder would change what it records.
    """
    return (
        torch._C._current_graph_task_id() != -1
        and not torch.is_grad_enabled()
        and not further
        and isinstance(right, torch.Tensor)
        and (left.shape, left.dtype) == (right.shape, right.dtype)
        # One use by the gradient, and one by this call; a view or a saved tensor would be a third.
        and torch._C._storage_Use_Count(left.untyped_storage()._cdata) == 2
    )
