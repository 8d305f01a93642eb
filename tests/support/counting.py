"""Counts what a step does, on any device and on fake tensors: a duration needs a GPU, these do not.

`count(call)` returns the counts of one call. They are exact integers, so two versions of the code,
or two trainers, can be compared on a laptop.

launches     Operators that start a kernel. Views, allocations and attributes are not among them.
saved        Bytes of distinct storages that autograd keeps for the backward pass, the most at one
             time, without parameters. Copies of weights in another dtype are `saved_weights`.
moved        Bytes that elementwise work, copies, reductions and gathers read and write: all but
             matrix products and attention, whose time is that of their floating-point work.
flops        Floating-point work of matrix products and attention. Attention that is causal without
             a mask counts half: kernels skip the other half. A mask hides nothing from a kernel.
syncs        Times that the host has to wait for a GPU: .item(), .tolist(), .cpu(), float(x), shapes
             that depend on values.
collectives  Operations that exchange tensors between ranks; the bytes of what they are given
             (exchanged); and what a rank of a ring sends for them (sent).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from sft.models.fake import FastMode

aten = torch.ops.aten
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
NOTHING_SENT = {"wait_tensor", "wrap_tensor_autograd", "barrier", "monitored_barrier"}
NO_LAUNCH = ALLOCATIONS | {"_unsafe_view", "lift_fresh", "detach", "set_", "record_stream"}
NO_LAUNCH |= {"_local_scalar_dense", "is_same_size", "resize_", "_has_compatible_shallow_copy_type"}
WRITES_ONLY = {"copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_", "random_"}
WRITES_ONLY |= {"_foreach_copy_"}
NEEDS_VALUES = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
NEEDS_VALUES |= {"_unique2", "unique_dim", "unique_consecutive"}
TO_HOST = {"cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__"}


@dataclass
class Counts:
    launches: int = 0
    views: int = 0
    saved: int = 0
    saved_weights: int = 0
    moved: int = 0
    flops: int = 0
    syncs: int = 0
    collectives: int = 0
    exchanged: int = 0
    sent: int = 0


def count(call: Callable[[], Any], model: nn.Module | None = None) -> tuple[Counts, Counter[str]]:
    """Returns the counts of a call, and how often it launched each operator.

    `model`: its parameters, quantised ones included, are no activations.
    """
    with Counting(() if model is None else weights_of(model)) as counting:
        call()
    return counting.counts, counting.launched


def weights_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yields parameters and buffers, and what bitsandbytes needs to dequantise them."""
    for value in [*model.parameters(), *model.buffers()]:
        yield value
        state = getattr(value, "quant_state", None)
        while state is not None:
            yield from (each for each in vars(state).values() if isinstance(each, torch.Tensor))
            state = state.state2


class Counting(FastMode):
    """Counts into `counts` while it is entered."""

    def __init__(self, weights: Iterable[torch.Tensor], attention_share: float = 1.0):
        """`attention_share`: part of the scores that a kernel computes which knows documents, where
        attention over a whole packed row stands for it."""
        super().__init__()
        self.attention_share = attention_share
        self.counts, self.launched = Counts(), Counter[str]()
        self.weights = {storage_of(each) for each in weights}
        self.copies: dict[int, Any] = {}  # storages that hold a weight in another dtype
        self.kept: dict[int, tuple[int, Any]] = {}
        self.living = Counter[str]()
        self.in_sync = False  # a read of values is counted where Python asks for it
        self.is_paused = False

    def __enter__(self) -> Counting:
        def tolist(tensor: torch.Tensor) -> Any:
            return self._fake_list(tensor)

        self.others = ExitStack()
        self.others.enter_context(saved_tensors_hooks(self.pack, lambda tensor: tensor))
        self.others.enter_context(_Syncs(self))
        self.others.enter_context(mock.patch.object(FakeTensor, "tolist", tolist))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.others.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing within this context."""
        self.is_paused, before = True, self.is_paused
        try:
            yield
        finally:
            self.is_paused = before

    def _fake_list(self, tensor: torch.Tensor) -> Any:
        """Replaces a method that reads a fake tensor's elements one by one."""
        self.counts.syncs += not (self.in_sync or self.is_paused)
        with self.paused():
            return [each.item() for each in tensor] if tensor.ndim else tensor.item()

    def record_kernel(self, name: str, moved: int) -> None:
        """Counts a kernel that only a GPU would launch, in place of what stands for it here."""
        self.counts.launches += 1
        self.counts.moved += moved
        self.launched[name] += 1

    # -- operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(each.__name__ == "DTensor" for each in types):
            return NotImplemented  # its own operators on local tensors come here, one by one
        return super().__torch_dispatch__(func, types, args, kwargs)

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if self.is_paused:
            return result
        name = func._schema.name.partition("::")[2]
        self.counts.syncs += not self.in_sync and (name in NEEDS_VALUES or _is_mask(name, args))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._exchange(name, args)
        elif func.namespace in ("prim", "profiler") or name in NO_LAUNCH or _is_view(func):
            self.counts.views += 1
        else:
            self.counts.launches += 1
            self.launched[name] += 1
            self._work(func, name, args, kwargs, result)
        return result

    def _exchange(self, name: str, args: tuple[Any, ...]) -> None:
        if name.strip("_") not in NOTHING_SENT:
            self.counts.collectives += 1
            given = args[1] if "allgather" in name or "reduce_scatter" in name else args[0]
            size = sum(map(num_bytes, tensors_in(given)))
            self.counts.exchanged += size
            self.counts.sent += _sent(name, size, args)

    def _work(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        if name == "addmm" and args[0].ndim == 2 and kwargs.get("beta", 1):
            self.record_kernel("copy_", 2 * num_bytes(args[0]))  # to which the product is added
        if "scaled_dot_product" in name:
            whole = _attention_flops(func, name, args, kwargs)
            self.counts.flops += round(whole * self.attention_share)
        elif packet in flop_registry:
            self.counts.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif name in ("gemm_4bit", "gemv_4bit"):  # of bitsandbytes: x (..., in), shape (out, in)
            self.counts.flops += 2 * args[0].numel() * args[2][0]
        else:
            self.counts.moved += _bytes_moved(func, name, args, kwargs, result)
            pairs = [(result, args[0])] if name == "_to_copy" else []
            for copy, given in zip(*args[:2], strict=True) if name == "_foreach_copy_" else pairs:
                if storage_of(given) in self.weights:
                    self._remember_copy(copy)

    def _remember_copy(self, copy: torch.Tensor) -> None:
        address = storage_of(copy)
        forget = lambda _: self.copies.pop(address, None)  # noqa: E731
        self.copies[address] = weakref.ref(copy.untyped_storage(), forget)

    # -- what autograd saves

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes note of a tensor that autograd saves."""
        address = storage_of(tensor)
        if address in self.weights or address in self.kept or isinstance(tensor, nn.Parameter):
            return tensor
        storage, kind = tensor.untyped_storage(), "saved"
        if address in self.copies:
            kind = "saved_weights"
        size = storage.nbytes()
        self.kept[address] = size, weakref.ref(storage, lambda _: self._forget(address, kind))
        self.living[kind] += size
        most = max(getattr(self.counts, kind), self.living[kind])
        setattr(self.counts, kind, most)
        return tensor

    def _forget(self, address: int, kind: str) -> None:
        size, _ = self.kept.pop(address)
        self.living[kind] -= size


class _Syncs(TorchFunctionMode):
    """Counts the calls that bring values to the host. On a CPU, no operator shows them."""

    def __init__(self, counter: Counting):
        super().__init__()
        self.counter = counter
        self.on_host: dict[int, Any] = {}  # storages that would be in host memory, too

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        counter = self.counter
        to_host = name in TO_HOST or (name == "to" and _asks_for_host(args[1:], kwargs))
        if not to_host or counter.in_sync or counter.is_paused:
            result = func(*args, **kwargs)
            if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
                self._remember(result, args)
            return result
        counter.counts.syncs += storage_of(args[0]) not in self.on_host
        counter.in_sync = True
        try:
            result = func(*args, **kwargs)
        finally:
            counter.in_sync = False
        if isinstance(result, torch.Tensor):
            self._remember(result)
        return result

    def _remember(self, tensor: torch.Tensor, made_of: Any = ()) -> None:
        if not any(isinstance(each, torch.Tensor) for each in made_of):
            storage, address = tensor.untyped_storage(), storage_of(tensor)
            forget = lambda _: self.on_host.pop(address, None)  # noqa: E731
            self.on_host[address] = weakref.ref(storage, forget)


def _asks_for_host(args: Any, kwargs: Any) -> bool:
    return "cpu" in [each for each in (*args, *kwargs.values()) if isinstance(each, str)]


def storage_of(tensor: torch.Tensor) -> int:
    tensor = getattr(tensor, "_local_tensor", tensor)
    return tensor.untyped_storage()._cdata


def num_bytes(tensor: torch.Tensor) -> int:
    """Returns the bytes that a kernel reads or writes: repeated elements count once."""
    number = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= size if stride or not size else 1
    return number * tensor.element_size()


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_iter(values) if isinstance(each, torch.Tensor)]


def _is_view(func: Any) -> bool:
    """Returns whether the result only looks at an argument's memory in another way."""
    infos = [each.alias_info for each in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _is_mask(name: str, args: Any) -> bool:
    """Returns whether an index is a mask, whose number of hits is the shape of the result."""
    kinds = (torch.bool, torch.uint8)
    return name == "index" and any(each.dtype in kinds for each in tensors_in(args[1]))


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = (each.name for each in func._schema.arguments)
    return dict(zip(names, args, strict=False)) | kwargs


def _bytes_moved(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    given, total = _named(func, args, kwargs), 0
    written: set[int] = set()
    for argument in func._schema.arguments:
        tensors = tensors_in(given.get(argument.name))
        if argument.alias_info is not None and argument.alias_info.is_write:
            total += sum(map(num_bytes, tensors)) * (1 if name in WRITES_ONLY else 2)
            written |= {id(each) for each in tensors}
        else:
            total += sum(map(num_bytes, tensors))
    return total + sum(num_bytes(each) for each in tensors_in(result) if id(each) not in written)


def _attention_flops(func: Any, name: str, args: Any, kwargs: Any) -> int:
    """Returns the work of attention: two products in a forward pass, and in a backward pass four
    and one to compute scores again. torch has no formula for its kernel of CPUs."""
    given = _named(func, args, kwargs)
    query, key = given["query"], given["key"]  # (rows, heads, time, size)
    size = query.shape[-1]
    scores = 2 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * size
    whole = scores * (5 if "backward" in name else 2)
    return whole // 2 if given.get("is_causal") else whole


@contextmanager
def gpu_choices() -> Iterator[None]:
    """Makes libraries choose as on a GPU, where that is a matter of devices only.

    Norms of gradients are computed for lists of tensors at once, and PEFT finds the autocast of a
    CPU where it looks for that of a GPU.
    """
    enabled, clip = torch.is_autocast_enabled, torch.nn.utils.clip_grad
    with ExitStack() as stack:
        for name in ("_has_foreach_support", "_device_has_foreach_support"):
            stack.enter_context(mock.patch.object(clip, name, return_value=True))
        is_enabled = lambda device="cpu": enabled(device)  # noqa: E731
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", is_enabled))
        yield


def minimum_flops(llama: Any, mode: str, rank: int, rows: Iterable[tuple[int, int]]) -> int:
    """Returns the work that no step of a Llama on `rows` can avoid, without recomputation.

    Forward: 2 x matrix parameters x tokens, with the head at supervised positions only, and causal
    attention within each row. Backward: once more for frozen matrices, twice for others. `rows`:
    (tokens, supervised). `rank`: of adapters on all matrices but the head.
    """
    hidden, inner, layers = llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers
    kv = hidden * llama.num_key_value_heads // llama.num_attention_heads
    shapes = [*[(hidden, hidden)] * 2, *[(hidden, kv)] * 2, *[(hidden, inner)] * 3]
    lengths, supervised = zip(*rows, strict=True)
    matrices = layers * sum(a * b for a, b in shapes) * sum(lengths)
    matrices += hidden * llama.vocab_size * sum(supervised)
    adapters = layers * sum(rank * (a + b) for a, b in shapes) * sum(lengths)
    scores = layers * hidden * sum(n * n for n in lengths)  # two products, half of each
    if mode == "full":
        return 6 * matrices + 6 * scores
    return 4 * matrices + 6 * adapters + 6 * scores


def _sent(name: str, size: int, args: tuple[Any, ...]) -> int:
    """Returns the bytes that a rank sends in a ring, for a collective that was given `size`."""
    kind, n = name.replace("_", ""), _group_of(args).size()
    if kind.startswith("allgather"):
        return size * (n - 1)
    return round(size * (n - 1) / n) * (2 if kind.startswith("allreduce") else 1)


def _group_of(args: tuple[Any, ...]) -> Any:
    """Returns the process group of a collective, which some operators get by its name."""
    for each in args:
        if isinstance(each, torch.ScriptObject) and each._type().name() == "ProcessGroup":
            return torch.distributed.ProcessGroup.unbox(each)
    *_, name = (each for each in args if isinstance(each, str))
    return torch.distributed.distributed_c10d._resolve_process_group(name)
