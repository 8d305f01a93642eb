"""Activations in host memory: the same bits, each storage once, no memory freed too early."""

from __future__ import annotations

import weakref
from itertools import product

import pytest
import torch
from conftest import representatives
from shapes import SIZES, architectures, configured, uniform_window
from torch import nn
from transformers import LlamaConfig

from sft.models import offload
from sft.plan import dry_run, memory
from sft.plan.dry_run import OFFLOADED
from sft.plan.trace import Block, Trace

WINDOW = uniform_window(3, 40, 20, micro_batches=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 1024)


@pytest.fixture
def late(monkeypatch):
    """Copies that run as late as they may: when something waits for them, or for a later one."""
    queue: list[tuple] = []

    def copy(storage, source, target):
        queue.append((weakref.ref(storage), weakref.ref(source), weakref.ref(target)))
        return len(queue)

    def join(storage):
        for place in range(storage._event or 0):
            owner, source, target = (each() for each in queue[place] or (dict,) * 3)
            if target is not None and isinstance(owner, offload.Storage):
                assert source is not None, "freed while it was copied"
                target.copy_(source)
                queue[place] = None
        storage._event = None

    monkeypatch.setattr(offload.Storage, "_copy", copy)
    monkeypatch.setattr(offload.Storage, "_join", join)
    empty_like = torch.empty_like  # new memory holds nothing of use
    poisoned = lambda x, **options: empty_like(x, **options | {"pin_memory": False}).fill_(99)  # noqa: E731
    monkeypatch.setattr(offload.torch, "empty_like", poisoned)
    return queue


def gradients(config, precision: str = "fp32") -> list:
    engine = dry_run.make_engine(config, precision, WINDOW, weights=False)
    done, norm = engine._compute_gradient()
    return [done.totals["loss"], norm, *(p.grad.clone() for p in engine.parallel.trained.values())]


def same(one: list, other: list) -> bool:
    return one[:2] == other[:2] and all(map(torch.equal, one[2:], other[2:]))


CASES = [*product(["Llama", "GPT2"], ["full", "lora"], [False, True]), ("Llama", "qlora", False)]
CASES += [("Llama", "lora", "selective"), ("Gemma2", "full", False)]


@pytest.mark.parametrize(("name", "mode", "kind"), CASES)
def test_loss_and_gradients_keep_their_bits(tmp_path, late, name, mode, kind):
    given = {"gradient_checkpointing": kind}
    plain, offloaded = (
        configured(tmp_path, architectures()[name], mode, **given, activation_offload=each)
        for each in (False, True)
    )
    expected = gradients(plain)
    assert not late
    assert same(gradients(offloaded), expected)
    assert late


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_same_bits_under_autocast(tmp_path, late, precision):
    one, other = (
        configured(tmp_path, architectures()["Qwen2"], "full", activation_offload=each)
        for each in (False, True)
    )
    assert same(gradients(one, precision), gradients(other, precision))


class Product(nn.Module):
    """Saves x three times, a view of it once, and its own weight and buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.register_buffer("scale", torch.randn(8, 64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x @ self.weight) * (x.mT @ self.weight) * self.scale
        return (y + x.sin() * x[:, ::2, :1].repeat(1, 2, 1)).sum()


def test_a_storage_is_copied_once_and_weights_and_small_tensors_never(monkeypatch):
    copied = []
    monkeypatch.setattr(offload, "MIN_BYTES", 4096)
    monkeypatch.setattr(offload, "on_copy", lambda tensor: copied.append(tensor.nbytes))
    model, found = Product(), []
    x = torch.randn(8, 64, 64, requires_grad=True)
    for installed in (False, True):
        if installed:
            offload.install(model)
        x.grad = model.weight.grad = None
        y = model(x * 2)
        y.backward()
        found.append((x.grad, model.weight.grad))
    assert all(map(torch.equal, *found))
    sizes = sorted(copied)
    assert sizes == [x.nbytes] * len(sizes)
    assert len(sizes) == 5  # x * 2, its sine, what that is multiplied by, and two products
    monkeypatch.setattr(offload, "MIN_BYTES", 2**20)
    model(x * 2).backward()
    assert len(copied) == len(sizes)


def test_a_storage_that_is_changed_between_two_uses_is_copied_again():
    pack, x = offload.Offload(nn.Module())._pack, torch.randn(600)
    first, part = pack(x), pack(x[5:])
    assert part.storage is first.storage
    expected = x.clone()
    x.add_(1)
    second = pack(x)
    assert second.storage is not first.storage
    assert torch.equal(first.storage.host, expected)
    assert torch.equal(second.restore(), x)


def test_originals_leave_once_a_few_more_are_saved():
    hooks = offload.Offload(nn.Module())
    views, storages = [], []
    for _ in range(offload.AHEAD + 4):
        x = torch.randn(600)
        storages.append(weakref.ref(x.untyped_storage()))
        views.append(hooks._pack(x))
        del x
    alive = [each() is not None for each in storages]
    assert alive == [False] * 4 + [True] * offload.AHEAD
    hooks._unpack(views[3])  # brings back those that are needed next
    back = [view.storage._on_device is not None for view in views[:4]]
    assert back == [False] + [True] * offload.AHEAD


def test_a_pass_that_fails_leaves_nothing_behind():
    model = Product()
    offload.install(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(8, 3, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch.randn(600, requires_grad=True).sin()
    assert len(saved) == 1  # by these hooks: the model's are no longer in place
    model(torch.randn(8, 64, 64, requires_grad=True)).backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "kind"), representatives([("full", False), ("qlora", True), ("lora", "selective")])
)
def test_the_dry_run_tells_what_is_on_the_device_and_what_on_the_host(
    tmp_path, monkeypatch, mode, kind
):
    monkeypatch.setattr(offload, "AHEAD", 1)
    sizes = SIZES | {"num_hidden_layers": 8}
    given = {"gradient_checkpointing": kind, "activation_offload": True}
    config = configured(tmp_path, LlamaConfig(**sizes), mode, **given)
    fake = dry_run.trace_step(config, "fp32", WINDOW)
    real = dry_run.record_step(dry_run.make_engine(config, "fp32", WINDOW, weights=False))
    assert fake.peak() == real.peak()
    assert fake.without(OFFLOADED).peaks() == real.without(OFFLOADED).peaks()
    kept = configured(tmp_path, LlamaConfig(**sizes), mode, gradient_checkpointing=kind)
    before = dry_run.trace_step(kept, "fp32", WINDOW).peaks()["loss 2"].num_bytes
    assert fake.without(OFFLOADED).peaks()["loss 2"].num_bytes < before
    predicted = memory.predict(config, "fp32", WINDOW, on_gpu=True)
    assert predicted.method == "traced with 3 and 4 of 8 layers"
    trace = dry_run.trace_step(config, "fp32", WINDOW, on_gpu=True)
    assert predicted.hosted == {memory.ACTIVATIONS: trace.pinned_bytes(OFFLOADED), memory.STATE: 0}
    assert predicted.copied_bytes == trace.born_bytes(OFFLOADED)
    libraries = predicted.breakdown["libraries"]
    assert predicted.allocated - libraries == trace.without(OFFLOADED).peak().num_bytes


def test_pinned_memory_is_rounded_up_to_powers_of_two():
    trace = Trace()
    blocks = [Block(size, OFFLOADED) for size in (1000, 1025, 1024)]
    trace.events = [(True, blocks[0]), (False, blocks[0])]
    trace.events += [(True, blocks[1]), (True, blocks[2]), (True, Block(5, "other"))]
    assert trace.pinned_bytes(OFFLOADED) == 1024 + 2048
    assert trace.born_bytes(OFFLOADED) == 3049
    assert [event[1].num_bytes for event in trace.without(OFFLOADED).events] == [5]
