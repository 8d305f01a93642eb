"""Moves saved activations to host memory in the forward pass, and back in the backward pass.

What a forward pass saves for its backward pass is copied to pinned host memory on a stream of its
own, while the computation goes on. It comes back before it is needed. Values are copied, never
converted, so the result keeps its bits. PyTorch's `save_on_cpu` copies between two operations, once
for each of the operations that save a tensor; copies of parameters, too.

Tensors are moved by storage: what several operations save, and views of it, is copied once. With
checkpointing only the inputs of layers are saved, so only these are moved. On a CPU the same copies
are made in its own memory, which saves nothing.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 2**20  # smaller storages stay: a transfer would cost more than they do
AHEAD = 3  # storages on their way to the host, and on their way back


def on_copy(tensor: torch.Tensor) -> None:
    """Receives each new tensor in host memory; the dry run replaces it, to count them."""


def install(model: nn.Module) -> None:
    """Makes the forward passes of a model offload what they save."""
    hooks = Offload(model)
    model.register_forward_pre_hook(lambda *_: hooks.open())
    model.register_forward_hook(lambda *_: hooks.close(), always_call=True)


class Offload(saved_tensors_hooks):
    """Packs saved tensors as views of storages that are on the host."""

    def __init__(self, model: nn.Module):
        super().__init__(self._pack, self._unpack)
        self._model = model
        self._depth = 0  # of forward passes that have begun
        self._own: set[int] = set()  # storages of parameters and buffers
        self._count = 0
        self._storages: weakref.WeakValueDictionary[int, Storage] = weakref.WeakValueDictionary()
        self._by_address: weakref.WeakValueDictionary[int, Storage] = weakref.WeakValueDictionary()
        self._leaving: deque[weakref.ref[Storage]] = deque()

    def open(self) -> None:
        tensors = (*self._model.parameters(), *self._model.buffers())
        self._own = {_address(getattr(each, "_local_tensor", each)) for each in tensors}
        self._depth += 1
        self.__enter__()

    def close(self) -> None:
        if self._depth:  # else the pass failed before it began
            self._depth -= 1
            self.__exit__()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | View:
        if not self._can_move(tensor):
            return tensor
        storage = self._by_address.get(_address(tensor))
        if storage is None or not storage.holds(tensor):
            storage = Storage(self._count, tensor)
            on_copy(storage.host)
            self._count += 1
            self._storages[storage.number] = self._by_address[_address(tensor)] = storage
            self._leaving.append(weakref.ref(storage))
            while len(self._leaving) > AHEAD:
                oldest = self._leaving.popleft()()
                if oldest is not None:
                    oldest.leave()
        offset = int(tensor.storage_offset())
        return View(storage, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def _can_move(self, tensor: torch.Tensor) -> bool:
        """Returns whether it is a plain tensor, large, and no weight."""
        if type(tensor) not in (torch.Tensor, FakeTensor) or tensor.layout != torch.strided:
            return False
        if tensor.is_conj() or tensor.is_neg():
            return False
        num_bytes = tensor.untyped_storage().nbytes()
        root = tensor if tensor._base is None else tensor._base
        is_weight = isinstance(root, nn.Parameter) or _address(tensor) in self._own
        return num_bytes >= MIN_BYTES and num_bytes % tensor.itemsize == 0 and not is_weight

    def _unpack(self, packed: torch.Tensor | View) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        number = packed.storage.number
        for other in range(number, number - AHEAD, -1):  # what was saved last is needed first
            if (storage := self._storages.get(other)) is not None:
                storage.begin_return()
        return packed.restore()


@dataclass(frozen=True)
class View:
    """A saved tensor: a view of a storage."""

    storage: Storage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def restore(self) -> torch.Tensor:
        flat = self.storage.wait()
        flat = flat if flat.dtype == self.dtype else flat.view(self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset)


class Storage:
    """The content of a storage: on the device, on the host, or on its way.

    Memory of the device is allocated and freed in the order of the computation. The computation
    waits for a copy to the host before the original is freed, and for a copy from the host before
    it is used. So what the caching allocator does is a function of the program, as without
    offloading.
    """

    def __init__(self, number: int, tensor: torch.Tensor):
        self._returning = False
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        flat = tensor.detach().as_strided((size,), (1,), 0)
        self.number = number
        self._source = weakref.ref(tensor.untyped_storage())
        self._version = tensor._version
        self._device = tensor.device
        self._on_device: torch.Tensor | None = flat
        on_gpu = tensor.device.type == "cuda"
        self._stream = _side_stream(tensor.device) if on_gpu else None
        self.host = torch.empty_like(flat, device="cpu", pin_memory=on_gpu)
        self._event = self._copy(flat, self.host)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Returns whether the tensor has this storage, and nothing has changed it since."""
        return self._source() is tensor.untyped_storage() and self._version == tensor._version

    def leave(self) -> None:
        """Frees the original."""
        if not self._returning:
            self._join()
            self._on_device = None

    def begin_return(self) -> None:
        """Begins to copy the content back, unless it is on the device."""
        if self._on_device is None:
            self._on_device = torch.empty_like(self.host, device=self._device)
            self._event, self._returning = self._copy(self.host, self._on_device), True

    def wait(self) -> torch.Tensor:
        """Returns the content on the device; later operations see it."""
        self.begin_return()
        if self._returning:
            self._join()
        assert self._on_device is not None
        return self._on_device

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _join(self) -> None:
        """Makes the computation wait for the last copy."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
            self._event = None

    def __del__(self) -> None:
        if self._returning:  # nobody needed it, but the copy still writes to its memory
            self._join()


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    """Returns the stream of a GPU on which all copies are made, in order."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
