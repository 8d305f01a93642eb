"""A step recorded on fake tensors is the real step; the allocator makes written-out moves."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from allocations import FixedSegments, allocated_bytes, true_peak
from conftest import ROOT, representatives
from shapes import SIZES, architectures, configured, uniform_window
from transformers import Gemma2Config

from sft.config.load import load_config, with_values
from sft.config.schema import Config
from sft.plan import dry_run, trace
from sft.plan.allocator import MIB, CachingAllocator
from sft.plan.dry_run import Window
from sft.plan.trace import Block, Recorder, Trace
from sft.tasks.sft.task import FineTune
from sft.train.engine import Engine

pytestmark = pytest.mark.slow

# --- recording ---------------------------------------------------------------------------------


def test_births_and_deaths_of_storages():
    with Recorder() as recorder:
        a = torch.zeros(100)  # 400 bytes
        b = a.view(10, 10)[2:]  # the same storage
        recorder.label = "sum"
        c = a + 1
        del a
        assert recorder.trace.peak() == trace.Peak(800, {"other": 400, "sum": 400})
        del b  # the last reference to the first storage
        recorder.label_tensors([c], "result")
        recorder.label = "other"
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
    recorder.label_tensors([weight, weight.view(10, 100), None], "weights")
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


# --- the step ----------------------------------------------------------------------------------

ARCHITECTURES = architectures()
BUDGETS = [uniform_window(4, 32, 20, micro_batches=2), uniform_window(6, 96, 30)]
GRID = list(product(ARCHITECTURES, ["full", "lora", "qlora"], [False, True], BUDGETS))


def real_engine(config: Config, window: Window, precision: str = "fp32", **options) -> Engine:
    return dry_run.make_engine(config, precision, window, **({"weights": False} | options))


def fake_and_real(config: Config, window: Window, precision: str = "fp32", **options):
    """(peak of the dry run, of the real step under the same recorder)."""
    fake = dry_run.trace_step(config, precision, window).peak()
    return fake, dry_run.record_step(real_engine(config, window, precision, **options)).peak()


# A third of the grid: every architecture in every mode, with and without checkpointing.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode", "checkpointing", "window"), representatives(GRID[::3], 2))
def test_the_dry_run_takes_what_the_real_step_takes(tmp_path, name, mode, checkpointing, window):
    config = configured(tmp_path, ARCHITECTURES[name], mode, gradient_checkpointing=checkpointing)
    fake, real = fake_and_real(config, window)
    assert fake == real


# The whole grid, with larger models: benchmarks/memory.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode", "checkpointing", "window"), representatives(GRID[1::5], 3)
)
def test_the_dry_run_takes_what_the_process_allocates(tmp_path, name, mode, checkpointing, window):
    config = configured(tmp_path, ARCHITECTURES[name], mode, gradient_checkpointing=checkpointing)
    fake, real = fake_and_real(config, window)
    assert fake == real
    assert fake.num_bytes == pytest.approx(allocated_bytes(real_engine(config, window)), rel=0.02)


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_the_dry_evaluation_takes_what_the_real_one_takes(tmp_path, mode):
    config, window = configured(tmp_path, ARCHITECTURES["Qwen2"], mode), uniform_window(4, 32, 20)
    fake = dry_run.trace_step(config, "fp32", window, evaluation=True).peak()
    real = dry_run.record_step(real_engine(config, window), gradients=True, evaluation=True).peak()
    assert fake == real
    step = dry_run.trace_step(config, "fp32", replace(window, gradients=True)).peak()
    assert fake.num_bytes < step.num_bytes
    assert fake.breakdown["gradients"] == step.breakdown["gradients"]


@pytest.mark.parametrize("attention", ["auto", "varlen"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_what_is_traced_is_the_real_step_in_both_layouts(tmp_path, layout, attention):
    config = configured(tmp_path, ARCHITECTURES["Qwen2"])
    config = with_values(config, {"model.attn_implementation": attention})
    fake, real = fake_and_real(config, uniform_window(3, 40, 9, 2, layout))
    assert fake == real


def test_packed_rows_take_a_mask_wherever_varlen_has_no_kernel(tmp_path):
    config, window = (
        configured(tmp_path, ARCHITECTURES["Qwen2"]),
        uniform_window(3, 40, 9, 2, "packed"),
    )

    def taken(name, precision):
        asked = with_values(config, {"model.attn_implementation": name})
        traced = dry_run.trace_step(asked, precision, window, depth=1, on_gpu=True)
        return traced.peak().num_bytes

    assert taken("varlen", "bf16") < taken("sdpa", "bf16")
    assert taken("varlen", "fp32") == taken("sdpa", "fp32")


def test_flash_attention_of_a_model_without_sdpa_is_traced_as_its_own(tmp_path):
    """Which has a mask: an upper bound."""
    config = configured(tmp_path, Gemma2Config(**SIZES, head_dim=16))
    window, taken = uniform_window(3, 40, 9, 2, "packed"), []
    for name in ("flash_attention_2", "auto"):
        asked = with_values(config, {"model.attn_implementation": name})
        traced = dry_run.trace_step(asked, "bf16", window, depth=1, on_gpu=True)
        taken.append(traced.peak().num_bytes)
    assert taken[0] == taken[1]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradients_from_the_start_are_those_of_a_micro_batch_before(tmp_path, mode):
    config = configured(tmp_path, ARCHITECTURES["Llama"], mode)
    two = dry_run.trace_step(config, "fp32", uniform_window(4, 32, 20, micro_batches=2)).peak()
    one = dry_run.trace_step(
        config, "fp32", replace(uniform_window(4, 32, 20), gradients=True)
    ).peak()
    assert one.num_bytes == pytest.approx(two.num_bytes, rel=0.002)
    assert one.breakdown["gradients"] == two.breakdown["gradients"]


def test_the_loaded_quantised_model_and_dropout():
    """Not a stand-in for weights, but those of the embedded model, loaded by transformers."""
    config = with_values(load_config(ROOT / "configs/nano.yaml"), {"tuning.lora_dropout": 0.1})
    fake, real = fake_and_real(config, uniform_window(4, 50, 20, 2), weights=True)
    assert fake == real


def test_under_autocast_the_stand_in_for_accelerate_does_as_accelerate(tmp_path, monkeypatch):
    config = configured(tmp_path, ARCHITECTURES["Llama"], "full")
    window = uniform_window(4, 64, 40, 2)
    fake = dry_run.trace_step(config, "bf16", window).peak()
    assert fake.num_bytes < dry_run.trace_step(config, "fp32", window).peak().num_bytes
    monkeypatch.setattr(
        dry_run,
        "CpuAccelerator",
        lambda precision, *_: Accelerator(cpu=True, mixed_precision=precision),
    )
    AcceleratorState._reset_state(True)
    real = dry_run.record_step(real_engine(config, window, "bf16")).peak()
    AcceleratorState._reset_state(True)
    assert fake == real


def test_the_breakdown_names_everything(tmp_path):
    config = configured(tmp_path, ARCHITECTURES["Llama"], "full")
    peak = dry_run.trace_step(config, "fp32", BUDGETS[0]).peak()
    parameters = 4 * sum(p.numel() for p in real_engine(config, BUDGETS[0]).model.parameters())
    assert sum(peak.breakdown.values()) == peak.num_bytes
    assert peak.breakdown["gradients"] == parameters  # there is a second micro-batch
    assert peak.breakdown["optimizer"] == pytest.approx(2 * parameters, rel=0.001)
    assert peak.breakdown["weights"] == pytest.approx(parameters, rel=0.001)  # and buffers
    logits = 4 * 20 * 256 * 4  # rows, supervised, vocabulary, bytes
    assert peak.breakdown["logits and loss"] > 2 * logits
    assert set(peak.breakdown) <= {
        "weights", "gradients", "optimizer", "activations", "logits and loss", "backward",
    }  # fmt: skip


def fail(*_: object) -> None:
    """A loss that cannot be traced, when the model has been built and optimised already."""
    raise RuntimeError("no shape rule")


def test_a_dry_run_leaves_nothing_behind(tmp_path, caplog, monkeypatch):
    config = configured(tmp_path, ARCHITECTURES["Llama"], "qlora")
    seeded = torch.random.get_rng_state()
    dry_run.trace_step(config, "fp32", BUDGETS[0])
    assert torch.equal(torch.random.get_rng_state(), seeded)
    assert type(torch.zeros(1)) is torch.Tensor
    with monkeypatch.context() as broken:
        broken.setattr(FineTune, "loss", fail)
        with pytest.raises(RuntimeError, match="no shape rule"):
            dry_run.trace_step(config, "fp32", BUDGETS[0])
    assert caplog.text == ""
    assert type(torch.zeros(1)) is torch.Tensor
    config = configured(tmp_path, ARCHITECTURES["Llama"], "qlora")
    losses = [real_engine(config, BUDGETS[0]).optimizer_step()["train/loss"] for _ in range(2)]
    assert losses[0] == losses[1] > 0


# --- the caching allocator ---------------------------------------------------------------------


def replay(allocator: CachingAllocator, *moves: float) -> CachingAllocator:
    """Positive: allocates so many MiB; negative: frees the -nth allocation (from 1)."""
    chunks = []
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
    for expected, kind in ((plain, FixedSegments), (expandable, CachingAllocator)):
        allocator = replay(kind(), *moves)
        assert allocator.reserved_bytes == expected * MIB


def test_sizes_are_rounded_to_512_bytes():
    allocator = CachingAllocator()
    assert [allocator.malloc(n).size for n in (1, 512, 513, 5000)] == [512, 512, 1024, 5120]


def test_everything_freed_leaves_whole_segments():
    moves = (0.3, 0.9, 1.5, 6, 6, 15, 0.7, 3, 30)
    for kind in (FixedSegments, CachingAllocator):
        order = (-4, -1, -9, -3, -7, -2, -8, -6, -5)
        allocator = replay(kind(), *moves, *order)
        free = [entry[3] for pool in allocator._free.values() for entry in pool]
        assert sum(c.size for c in free) == allocator.reserved_bytes
        assert all(c.previous is None and c.next is None for c in free)


def test_a_trace_is_replayed_through_the_allocator():
    big, small = Block(12 * MIB, "a"), Block(1000, "b")
    record = Trace([(True, big), (True, small), (True, Block(0, "c")), (False, big), (True, big)])
    assert record.reserved(FixedSegments()) == 14 * MIB
    assert record.reserved() == 22 * MIB
    assert record.reserved(CachingAllocator(pages=False)) == 12 * MIB + 1024


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_copies_of_weights_that_autocast_makes_have_a_name(tmp_path, mode):
    config = configured(tmp_path, architectures(num_hidden_layers=4)["Llama"], mode)
    weights, found = 0, {}
    for checkpointing in (False, True):
        asked = with_values(config, {"train.gradient_checkpointing": checkpointing})
        engine = dry_run.make_engine(asked, "bf16", uniform_window(2, 16, 4), weights=False)
        weights = sum(p.numel() for p in engine.parallel.trained.values())
        peaks = dry_run.record_step(engine).peaks()
        found[checkpointing] = peaks["loss 1"].breakdown.get(trace.WEIGHT_COPIES, 0)
    # The table of embeddings is looked up in fp32; the norms of a layer compute in fp32.
    if mode == "full":
        assert 0.7 * 2 * weights < found[False] < 2 * weights
    assert found[True] < found[False] / 2


def test_a_cache_of_weight_copies_changes_no_bit_of_a_step(tmp_path, monkeypatch):
    config = configured(tmp_path, architectures()["Llama"], "full", gradient_checkpointing=True)
    gradients = []
    for caches in (True, False):
        monkeypatch.setattr(dry_run, "keeps_weight_copies", lambda _, caches=caches: caches)
        engine = dry_run.make_engine(config, "bf16", uniform_window(2, 16, 4), weights=False)
        engine.optimizer_step()
        gradients.append([p.grad.clone() for p in engine.parallel.trained.values()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accelerate_caches_copies_of_weights_as_the_plan_says(tmp_path, checkpointing):
    config = configured(tmp_path, architectures()["Llama"], "full")
    config = with_values(config, {"train.gradient_checkpointing": checkpointing})
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    window, cached = uniform_window(2, 16, 4), []
    engine = dry_run.make_engine(config, "bf16", window, weights=False, accelerator=accelerator)
    head = engine.task.model.get_output_embeddings()
    head.register_forward_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    engine.optimizer_step()
    assert cached == [not checkpointing]
    AcceleratorState._reset_state(reset_partial_state=True)
