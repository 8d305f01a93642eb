"""Weights in bf16, and updates in the backward pass: laws 1 and 2, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import shapes
import test_distill
import test_parallel
import tiny
import torch
from conftest import SHARED, representatives
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parallel import assert_bit_equal, case, difference, found
from transformers import LlamaConfig

from sft import errors
from sft.config.load import load_config
from sft.data import batches
from sft.models.dtypes import store_trained
from sft.plan import dry_run, memory
from sft.plan.dry_run import Window
from sft.runtime import processes
from sft.runtime.log import Log
from sft.runtime.processes import Context
from sft.tasks.distill import task
from sft.train import engine, packed, rounding, updates

PURE, EARLY = ["train.precision=bf16_pure"], ["train.optimizer_in_backward=true"]
UNCLIPPED = ["train.max_grad_norm=0"]


def round_all(values: torch.Tensor, start: int = 0, *parts: object) -> torch.Tensor:
    target = torch.empty_like(values, dtype=torch.bfloat16)
    rounding.round_into(target, values, start, *parts)
    return target


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("first", [1.0, -1.0, 3e-20, 1e30])
def test_rounding_is_exact_on_average_and_never_leaves_the_two_neighbours(share, first):
    low = torch.tensor(first).bfloat16().float()
    high = (low.view(torch.int32) + 0x10000).view(torch.float32)  # away from 0
    values = (low + share * (high - low)).expand(100_000).contiguous()
    rounded = round_all(values, 0, "a").float()
    assert {*rounded.tolist()} <= {float(low), float(high)}
    up = float((rounded == high).double().mean())
    exact = float((values[0] - low) / (high - low))
    assert up == pytest.approx(exact, abs=5 * math.sqrt(0.25 / 100_000))


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 300), max_size=4),
    chunk=st.integers(1, 300),
    start=st.sampled_from([0, 7, 2**31 - 5, 2**32 - 5, 2**40]),
)
def test_the_noise_depends_on_the_place_not_on_the_cut(cuts, chunk, start):
    values = torch.randn(300, generator=torch.Generator().manual_seed(1))
    whole = round_all(values, start, 0, 3, "p")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "CHUNK", chunk)
        edges = [0, *sorted(cuts), 300]
        parts = [
            round_all(values[a:b].clone(), start + a, 0, 3, "p")
            for a, b in itertools.pairwise(edges)
        ]
    assert torch.equal(torch.cat(parts), whole)


def test_the_noise_differs_by_seed_step_parameter_tensor_and_high_positions():
    values = torch.rand(4096) + 1
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "a", "exp_avg")]
    drawn = [(round_all(values, 0, *key).float() - values) for key in keys]
    drawn.append(round_all(values, 2**32, *keys[0]).float() - values)
    assert torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0).abs().max() < 0.1
    # Rounded to the nearest, the same values would give the same errors: a correlation of 1.


def test_infinity_stays_infinity():
    values = torch.tensor([math.inf, -math.inf, 0.0])
    assert round_all(values).tolist() == values.tolist()


# --- one process ---------------------------------------------------------------------------------


def make(folder, budget=10_000, layout="padded", model=None, **train):
    rows = tiny.examples(0, 12)
    values = {"global_batch": 6, "max_steps": 6, "learning_rate": 1e-3} | train
    kept = torch.bfloat16 if values.get("precision") == "bf16_pure" else torch.float32
    built = tiny.llama(kept) if model is None else model
    settings = tiny.config(folder, **values)
    return tiny.make_engine(built, rows, rows, settings, batches.Budget(budget, layout))


def weights(built):
    return {name: value.clone() for name, value in built.task.model.state_dict().items()}


def go(built, steps):
    for _ in range(steps):
        built.optimizer_step()
        built.step += 1
    return weights(built)


def apart(one, other):
    return tiny.relative_error(list(one.values()), list(other.values()))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_what_bf16_loses_to_the_nearest_stochastic_rounding_keeps(tmp_path, optimizer):
    """Updates of 1e-5 to weights of 0.2: less than half the distance of two bf16 numbers."""
    built = make(tmp_path, precision="bf16_pure", learning_rate=1e-5, optimizer=optimizer)
    first = {n: v.double() for n, v in weights(built).items()}
    exact = make(tmp_path, learning_rate=1e-5, precision="bf16", optimizer=optimizer)
    before = {n: v.double() for n, v in weights(exact).items()}
    moved, expected = go(built, 4), go(exact, 4)
    moves = torch.cat([(moved[n].double() - first[n]).flatten() for n in first])
    wanted = torch.cat([(expected[n].double() - before[n]).flatten() for n in first])
    along = float(moves @ wanted / (wanted @ wanted))
    assert along == pytest.approx(1, abs=0.25)
    assert {p.dtype for p in built.task.model.parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in built.task.model.parameters()} == {torch.bfloat16}


def test_moments_are_in_bf16_too_and_a_run_can_go_on_in_fp32_and_back(tmp_path):
    pure = make(tmp_path / "a", precision="bf16_pure")
    go(pure, 2)
    saved = pure.save()
    moments = [v for s in pure.optimizer.state.values() for k, v in s.items() if k != "step"]
    assert {v.dtype for v in moments} == {torch.bfloat16}
    plain = make(tmp_path / "b", precision="bf16")
    plain.read(saved)
    assert all(torch.equal(v.float(), weights(plain)[n]) for n, v in weights(pure).items())
    go(plain, 1)
    back = make(tmp_path / "c", precision="bf16_pure")
    back.read(plain.save())
    go(back, 1)
    moments = [v for s in back.optimizer.state.values() for k, v in s.items() if k != "step"]
    assert {v.dtype for v in moments} == {torch.bfloat16}


@pytest.mark.parametrize(("budget", "layout"), [(1, "padded"), (60, "padded"), (10_000, "packed")])
def test_law_1_in_bf16_pure(tmp_path, budget, layout):
    """Another cut changes roundings of the gradient, not the noise. Adam's first steps are +-rate
    for gradients of any size, so single weights differ where gradients are roundings of 0."""
    one = make(tmp_path / "a", precision="bf16_pure")
    other = make(tmp_path / "b", budget, layout, precision="bf16_pure")
    first, second = one.optimizer_step(), other.optimizer_step()
    assert second["train/loss"] == pytest.approx(first["train/loss"], rel=2e-3)
    assert second["train/grad_norm"] == pytest.approx(first["train/grad_norm"], rel=5e-3)
    assert apart(weights(one), weights(other)) < 5e-4
    nearest = {name: value.bfloat16() for name, value in weights(make(tmp_path)).items()}
    assert apart(weights(one), nearest) > 3e-3  # what the step itself changes


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_moments_are_those_of_torchao(bits, monkeypatch):
    """In parts, too. torchao's own class cuts blocks of 256 or 128, as ours do in such rows."""
    from torchao.optim import subclass_4bit, subclass_8bit
    from torchao.optim.adam import single_param_adam

    kind = subclass_8bit.OptimState8bit if bits == 8 else subclass_4bit.OptimState4bit
    monkeypatch.setattr(packed, "PART", 4096)
    mine = torch.nn.Parameter(torch.randn(20, 512))
    theirs = mine.detach().clone()
    block = 256 if bits == 8 else 128
    moments = [kind.zeros(theirs.shape, sign, block, dtype=torch.float32) for sign in (True, False)]
    optimizer = {8: packed.AdamW8bit, 4: packed.AdamW4bit}[bits]([mine], 1e-2, weight_decay=0.1)
    for step in range(1, 5):
        mine.grad = torch.randn(20, 512)
        optimizer.step()
        settings = (None, torch.tensor(1e-2), 0.9, 0.999, 0.1, 1e-8, True, False)
        single_param_adam(theirs, mine.grad, torch.tensor(float(step)), *moments, *settings)
    assert torch.equal(mine, theirs)
    sizes = {key: value.numel() for key, value in optimizer.state[mine].items() if key != "step"}
    assert sizes["exp_avg_codes"] == sizes["exp_avg_sq_codes"] == 20 * 512 * bits // 8
    assert sizes["exp_avg_scale"] == sizes["exp_avg_sq_scale"] == 20 * 512 // block


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((512, 896), 128),
        ((512, 2880), 64),
        ((16, 96), 32),
        ((16, 33), 1),
        ((4096,), 1),
        ((0, 64), 64),
    ],
)
def test_blocks_divide_rows_so_no_slice_of_rows_cuts_one(shape, block):
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.zeros(shape)
    optimizer = packed.AdamW8bit([parameter])
    optimizer.step()
    sizes = optimizer.per_value(parameter)
    assert max(sizes.values()) == block
    state = optimizer.state[parameter]
    assert all(state[key].numel() == parameter.numel() // each for key, each in sizes.items())


@pytest.mark.parametrize(
    "optimizer", representatives(["adamw", "adamw_8bit", "torchao_adamw_8bit"])
)
@pytest.mark.parametrize("early", [False, True])
def test_law_2_in_bf16_pure(tmp_path, optimizer, early):
    options = {"precision": "bf16_pure", "optimizer": optimizer, "optimizer_in_backward": early}
    whole = make(tmp_path / "whole", 60, **options)
    go(whole, 3)
    saved = whole.save()
    expected = go(whole, 3)
    resumed = make(tmp_path / "resumed", 60, **options)
    resumed.resume(saved)
    found = go(resumed, 3)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_parts_of_a_parameter_are_updated_as_the_whole(tmp_path, monkeypatch):
    whole = go(make(tmp_path / "a", precision="bf16_pure"), 3)
    monkeypatch.setattr(updates, "PART", 64)  # a multiple of what a vector unit takes at once
    parts = go(make(tmp_path / "b", precision="bf16_pure"), 3)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_gradient_is_clipped_in_fp32(tmp_path):
    free, clipped = (make(tmp_path, precision="bf16_pure", max_grad_norm=n) for n in (0.0, 1e-3))
    first, second = free.optimizer_step(), clipped.optimizer_step()
    assert first["train/grad_norm"] == second["train/grad_norm"] > 1
    assert clipped.parallel.updates.factor == pytest.approx(1e-3 / first["train/grad_norm"], 1e-3)
    moments = [
        torch.cat([s["exp_avg"].float().flatten() for s in each.optimizer.state.values()]).norm()
        for each in (free, clipped)
    ]
    assert float(moments[0] / moments[1]) == pytest.approx(first["train/grad_norm"] / 1e-3, 1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("budget", representatives([60, 10_000]))
def test_in_the_backward_pass_the_same_bits_and_no_gradients(
    tmp_path, precision, optimizer, budget
):
    options = {"precision": precision, "optimizer": optimizer}
    late = make(tmp_path / "a", budget, **options)
    early = make(tmp_path / "b", budget, optimizer_in_backward=True, **options)
    for _ in range(3):
        expected, found = late.optimizer_step(), early.optimizer_step()
        late.step, early.step = late.step + 1, early.step + 1
        for key in ("train/loss", "train/grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-6), key
        assert all(p.grad is None for p in early.task.model.parameters())
        assert early.parallel.num_updates == late.parallel.num_updates
    assert all(torch.equal(value, weights(early)[name]) for name, value in weights(late).items())


def test_a_weight_without_a_gradient_is_updated_as_with_a_gradient_of_0(tmp_path):
    """Weight decay and moments move it; an expert that no token chose is such a weight."""

    def with_unused():
        model = tiny.llama()
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, 3)))
        return model

    options = {"weight_decay": 0.1, "learning_rate": 1e-2}
    late = make(tmp_path / "a", model=with_unused(), **options)
    early = make(tmp_path / "b", model=with_unused(), optimizer_in_backward=True, **options)
    expected, found = go(late, 2), go(early, 2)
    assert float(found["unused"].mean()) < 1
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path):
    """It is known before the last backward pass, from whichever micro-batch it came."""
    built = make(tmp_path, 1, optimizer_in_backward=True)
    _, micro_batches = built.window(0)
    real, calls = built.task.loss, []

    def loss(model, batch):
        total, extras = real(model, batch)
        calls.append(batch)
        return total * (math.nan if len(calls) == 2 else 1.0), extras

    built.task.loss = loss
    before = weights(built)
    with pytest.raises(errors.NonFiniteError, match="loss is nan in step 1; the step was not"):
        built.optimizer_step()
    assert len(calls) == len(micro_batches) > 2
    assert all(torch.equal(value, weights(built)[name]) for name, value in before.items())


def test_a_gradient_that_is_not_finite_ends_the_run_and_is_named(tmp_path):
    built = make(tmp_path, optimizer_in_backward=True)
    parameter = next(built.task.model.parameters())
    parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    with pytest.raises(errors.NonFiniteError, match="is inf in step 1"):
        built.optimizer_step()


def test_a_probe_updates_nothing(tmp_path):
    built = make(tmp_path, optimizer_in_backward=True)
    go(built, 1)
    before = weights(built)
    built.probe_seconds_per_step()
    assert all(torch.equal(value, weights(built)[name]) for name, value in before.items())


def test_memory_that_runs_out_in_the_last_pass_cannot_be_repeated(tmp_path, monkeypatch):
    """Some weights are updated by then. Before it, the step is repeated in smaller parts."""
    built = make(tmp_path, optimizer_in_backward=True)
    run_out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def backward(*_):
        raise run_out

    monkeypatch.setattr(built.parallel.in_backward, "backward", backward)
    with pytest.raises(errors.OutOfMemory, match="cannot be repeated"):
        built.optimizer_step()


def test_an_automatic_fp16_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(updates, "resolve_precision", lambda _: ("fp16", "no bf16"))
    with pytest.raises(errors.ConfigError, match="in fp16 a step whose gradients overflow"):
        make(tmp_path, optimizer_in_backward=True)


# --- two processes -------------------------------------------------------------------------------


# Both engines with full weights, which differ most: each engine once with each kind of adapter, and
# FSDP2, whose shards the updates must cut, with all others.
CASES = {  # name: tuning, overrides, engines
    "pure-lora": ("lora", PURE, ("fsdp",)),
    "pure-qlora": ("qlora", PURE, ("ddp",)),
    "pure-full": ("full", PURE, ("ddp", "fsdp")),
    "late-full": ("full", UNCLIPPED, ("fsdp",)),
    "early-full": ("full", [*UNCLIPPED, *EARLY], ("fsdp",)),
    "early-qlora": ("qlora", [*UNCLIPPED, *EARLY], ("fsdp",)),
    "packed8-full": ("full", ["train.optimizer=torchao_adamw_8bit"], ("fsdp",)),
    "packed4-lora": ("lora", ["train.optimizer=torchao_adamw_4bit"], ("fsdp",)),
    "packed8-pure-full": (
        "full",
        [*PURE, "train.optimizer=torchao_adamw_8bit"],
        ("fsdp",),
    ),
    "early-pure-full": ("full", [*UNCLIPPED, *EARLY, *PURE], ("fsdp",)),
}


def cases(folder: Path, world: int, names: list[str]) -> list[dict]:
    """The runs that those named are compared with if `world` is 1, else these and their rest."""
    found = []
    for name, (mode, more, all_engines) in CASES.items():
        engines = [each for each in all_engines if f"{name}-{each}-2" in names]
        for each in engines if world > 1 else ["ddp"] * bool(engines):
            plain = case(mode, each, world, save_at=[2], steps=3, evaluate=False)
            plain |= {"name": f"{name}-{each}-{world}", "overrides": plain["overrides"] + more}
            saved = str(folder / plain["name"] / "checkpoint_step_2")
            resumed = {"name": f"{plain['name']}-resumed", "resume": saved, "save_at": []}
            found += [plain] + ([plain | resumed] if world > 1 else [])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, thorough):
    folder = tmp_path_factory.mktemp("updates")
    test_parallel.MODEL[:] = [f"model.name={tiny.shallow_nano(folder)}"]
    for world in (1, 2):
        test_parallel.run(folder, world, cases(folder, world, NAMES if thorough else FEW))
    yield folder
    test_parallel.MODEL.clear()


NAMES = [f"{name}-{engine}-2" for name, each in CASES.items() for engine in each[2]]
FEW = [f"{name}-2" for name in ("pure-qlora-ddp", "late-full-fsdp", "early-full-fsdp")]
FEW += ["packed8-full-fsdp-2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", representatives(NAMES, FEW))
def test_two_processes_are_the_run_of_one(folder, name):
    [expected] = found(folder, name.rpartition("-")[0].rpartition("-")[0] + "-ddp-1")
    # A moment that is rounded to 8 bits may fall on the other side, after a different summation.
    tolerance = 5e-3 if "pure" in name else 1e-3 if "packed" in name else 1e-5
    for rank in found(folder, name):
        assert rank["world_size"] == 2
        for mine, theirs in zip(rank["steps"], expected["steps"], strict=True):
            assert mine[0] == theirs[0]
            assert float.fromhex(mine[2]) == pytest.approx(float.fromhex(theirs[2]), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", representatives(NAMES, FEW))
def test_resumed_on_two_processes_equals_uninterrupted_bit_for_bit(folder, name):
    assert_bit_equal(folder, f"{name}-resumed", name)


@pytest.mark.slow
def test_moments_in_blocks_resume_on_another_number_of_processes_and_engine(folder):
    saved = str(folder / "packed8-full-fsdp-2" / "checkpoint_step_2")
    rest = case("full", "ddp", 1, saved, save_at=[], steps=3, evaluate=False)
    rest["name"] = "packed8-by-1"
    rest["overrides"] += ["train.optimizer=torchao_adamw_8bit"]
    test_parallel.run(folder, 1, [rest])
    [by_one], [by_two, _] = found(folder, "packed8-by-1"), found(folder, "packed8-full-fsdp-2")
    for mine, theirs in zip(by_one["steps"], by_two["steps"][2:], strict=True):
        assert mine[0] == theirs[0]
        assert float.fromhex(mine[2]) == pytest.approx(float.fromhex(theirs[2]), 1e-4)


@pytest.mark.slow
def test_moments_in_blocks_are_stored_as_codes_and_scales(folder):
    saved = folder / "packed8-full-fsdp-2" / "checkpoint_step_2"
    sizes = [path.stat().st_size for path in sorted(saved.glob("optimizer-*.safetensors"))]
    model = (saved / "model.safetensors").stat().st_size
    assert sum(sizes) == pytest.approx(model * (2 + 2 * 4 / 64) / 4, rel=0.05)  # blocks of 64
    assert max(sizes) < 0.6 * sum(sizes)


@pytest.mark.slow
def test_fsdp_updates_in_the_backward_pass_the_same_bits(folder):
    assert difference(folder, "early-full-fsdp-2", "late-full-fsdp-2") == 0


@pytest.mark.slow
def test_ddp_refuses_updates_in_the_backward_pass(folder):
    asked = case("full", "ddp", 2) | {"name": "refused"}
    asked["overrides"] += [*UNCLIPPED, *EARLY]
    (folder / "refused.json").write_text(json.dumps([asked]))
    log = folder / "refused.log"
    command = ["tests/support/parallel_worker.py", str(folder / "refused.json"), str(folder)]
    test_parallel.forked.start(2, command, log).join()
    assert "DDP keeps all gradients in its buffers" in " ".join(log.read_text().split())


# --- tasks and the plan --------------------------------------------------------------------------


def test_a_crowd_trains_in_bf16_and_in_the_backward_pass(tmp_path):
    options = {"precision": "bf16_pure", "optimizer_in_backward": True, "max_grad_norm": 0.0}
    crowd = tiny.crowd_config(tmp_path, train={"global_batch": 6, **options})
    adapted = tiny.adapted(crowd, torch.float32)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.bfloat16()
    rows = tiny.examples(0, 12)
    built = tiny.make_engine(adapted, rows, rows, crowd, batches.Budget(60, "padded"))
    before = weights(built)
    after = go(built, 2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = set(built.parallel.trained)
    assert changed == trained
    assert {p.dtype for p in built.parallel.trained.values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("kind", representatives([test_distill.SMALL, test_distill.PAIR]))
def test_distillation_trains_in_bf16_and_in_the_backward_pass(tmp_path, kind):
    losses = []
    options = {"precision": "bf16_pure", "optimizer_in_backward": True}
    for changes in ({"precision": "bf16"}, options):
        asked = test_distill.config(tmp_path, kind, **changes)
        accelerator = processes.start_processes(asked.train)
        histories = test_distill.random_histories(4, kind.num_streams, kind.num_steps)
        model = store_trained(test_distill.made(kind), asked.train)
        context, budget = Context(accelerator, Log(None)), batches.Budget(100, "padded")
        work = task.Distillation(asked, histories, model, budget, context)
        built = engine.Engine(work, asked.train, context)
        go(built, 2)
        losses.append(built.evaluate()["loss"])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


LLAMA = SHARED / "data/model_configs/Llama-3.1-8B.json"


@pytest.mark.thorough("plans of these keys for a small model")
@pytest.mark.slow
@pytest.mark.skipif(not LLAMA.exists(), reason="needs ../shared")
def test_an_8b_model_is_planned_on_one_small_gpu(tmp_path):
    """All weights, moments in 8 bits that are paged: 21.0 GiB, and the context of CUDA."""
    given = [f"model.name={LLAMA}", "tuning.mode=full", "data.train_path=none", *UNCLIPPED, *PURE]
    given += [f"train.output_dir={tmp_path}", "train.optimizer=paged_adamw_8bit"]
    given += ["train.gradient_checkpointing=true", *EARLY]
    window = Window((((2048, 2048),),))
    found = memory.predict(load_config(None, given), "bf16", window, on_gpu=True)
    assert found.method.startswith("traced")
    assert 18 < (found.reserved + memory.CONTEXT_BYTES) / 2**30 < 24


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
@pytest.mark.parametrize("optimizer", ["adamw", "torchao_adamw_8bit", "torchao_adamw_4bit", "lion"])
def test_larger_weights_take_no_longer_to_plan(tmp_path, optimizer, precision):
    """What is updated in blocks takes the memory of two; a plan of 70B parameters has 17,000."""
    events = []
    for rows in (2**20, 2**21):  # of 64 elements: 16 and 32 blocks
        sizes = shapes.SIZES | {"num_hidden_layers": 1, "vocab_size": rows, "hidden_size": 64}
        train = {"optimizer": optimizer, "precision": precision}
        config = shapes.configured(tmp_path / str(rows), LlamaConfig(**sizes), "full", **train)
        events.append(len(dry_run.trace_step(config, "bf16", Window((((8, 8),),))).events))
    assert events[0] == events[1]


@pytest.mark.parametrize("optimizer", ["adamw", "torchao_adamw_8bit", "torchao_adamw_4bit"])
def test_two_blocks_of_a_plan_show_the_peak_of_all(tmp_path, monkeypatch, optimizer):
    for module, name in ((rounding, "CHUNK"), (updates, "PART"), (packed, "PART")):
        monkeypatch.setattr(module, name, 2**12)
    architecture, train = LlamaConfig(**shapes.SIZES), {"precision": "bf16_pure"}
    config = shapes.configured(tmp_path, architecture, "full", optimizer=optimizer, **train)
    window = Window((((8, 8),),))
    fake = dry_run.trace_step(config, "bf16", window)
    real = dry_run.record_step(dry_run.make_engine(config, "bf16", window, weights=False))
    assert len(fake.events) < len(real.events)
    for phase, peak in real.peaks().items():
        assert fake.peaks()[phase].num_bytes == peak.num_bytes, phase


@pytest.mark.thorough("two blocks of a plan, which show the peak of all")
@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", representatives(["adamw", "torchao_adamw_8bit", "adamw_8bit"])
)
def test_the_plan_sees_what_bf16_and_the_backward_pass_save(tmp_path, optimizer):
    model = tiny.shallow_nano(tmp_path)

    def predict(*more):
        given = [
            f"model.name={model}",
            "tuning.mode=full",
            f"train.optimizer={optimizer}",
            *UNCLIPPED,
            *more,
        ]
        config = load_config("configs/nano.yaml", given)
        return memory.predict(config, "bf16", Window((((64, 32),),)), on_gpu=True).breakdown

    late, early, wide = predict(*PURE), predict(*PURE, *EARLY), predict("train.precision=bf16")
    assert late["weights"] * 2 == pytest.approx(wide["weights"], rel=1e-3)
    assert late["gradients"] * 2 == pytest.approx(wide["gradients"], rel=1e-3)
    assert early.get("gradients", 0) == 0
    halves = 2 if optimizer == "adamw" else 1
    assert late["optimizer"] * halves == pytest.approx(wide["optimizer"], rel=0.02)
