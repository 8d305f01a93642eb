"""What a step launches, keeps, moves, computes, waits for and exchanges, as exact integers."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import partial

import counted
import forked
import pytest
import torch
from conftest import ROOT
from counting import Counting, count, gpu_choices, num_bytes, weights_of
from hypothesis import given
from hypothesis import strategies as st
from shapes import architectures, configured
from torch import nn

from sft.config.load import dump_config, load_config
from sft.plan import dry_run, memory, network, sharding
from sft.train.parallel.ddp import Replicated

# --- the table -----------------------------------------------------------------------------------


def test_no_counter_of_a_small_step_has_changed():
    """If a change is meant, the command in the table's second line writes it anew."""
    expected = counted.TABLE.read_text("utf-8")
    assert counted.small_table() == expected, f"is it meant? {counted.UPDATE}"
    assert max(map(len, expected.splitlines())) <= 100


@pytest.mark.parametrize(
    ("mode", "checkpointing"), [("lora", False), ("qlora", True), ("full", False)]
)
def test_a_step_on_fake_tensors_counts_as_the_real_one(tmp_path, mode, checkpointing):
    """So a shape of 8B parameters can be counted."""
    config = configured(tmp_path, counted.LLAMA, mode, gradient_checkpointing=checkpointing)
    window = dry_run.Window(counted.ROWS)
    real = counted.small_step(tmp_path, mode, "padded", checkpointing)
    found = []

    def record(engine, **_):
        engine.recorder = dry_run.Recorder()
        with gpu_choices(), Counting(weights_of(engine.task.model)) as counting:
            engine.optimizer_step()
        found.append(replace(counting.counts, views=real.views))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "record_step", record)
        dry_run.trace_step(config, "bf16", window)
    assert found == [real]


@pytest.mark.thorough("counters of a step; the engines in test_parallel.py")
@pytest.mark.slow
def test_what_ranks_exchange_is_what_their_engine_needs(tmp_path):
    cases = [
        {"engine": name, "mode": mode, "config": dump_config(config)}
        for name, mode, config in counted.rank_cases(tmp_path)
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    out = tmp_path / "found.json"
    command = ["tests/support/counted.py", str(tmp_path / "cases.json"), str(out)]
    printed = forked.launch(2, command)
    assert out.exists(), printed
    found = {(row["engine"], row["mode"]): row for row in json.loads(out.read_text("utf-8"))}
    kept = json.loads((ROOT / "benchmarks/results/counters.json").read_text("utf-8"))
    assert list(found.values()) == kept["after"]["ranks"], counted.UPDATE_RANKS
    for mode in ("full", "lora"):
        row = found["DDP", mode]
        assert row["exchanged"] == pytest.approx(row["trained_bytes"], rel=0.01)
    for name, mode, config in counted.rank_cases(tmp_path):
        zero = {"stage": int(name[-1])} if name.startswith("ZeRO") else {}
        group = sharding.Group(2, config.train.engine, True, zero)
        whole = memory.predict(config, "fp32", counted.WINDOW, on_gpu=False).model_bytes
        planned = network.predict_traffic(config, "fp32", group, whole, 2)
        given = planned.gathered / 2 + planned.scattered + planned.reduced  # to collectives
        assert given == pytest.approx(found[name, mode]["exchanged"], rel=0.01), (name, mode)


def test_fsdp2_exchanges_no_more_than_that_of_other_tools():
    kept = json.loads((ROOT / "benchmarks/results/counters.json").read_text("utf-8"))
    found = {row["case"]: row for row in kept["after"]["exchange"]}

    def pairs(key, ours, theirs):
        return [(found[f"{ours}, {n}"][key], found[f"{theirs}, {n}"][key]) for n in (1, 2)]

    once, hsdp = "FSDP2, keep_whole: gradients", "HSDP, keep_whole: gradients"
    for keeps in ("false", "gradients", "all"):
        ours = f"FSDP2, keep_whole: {keeps}"
        for mine, titan in pairs("sent", f"{ours}, fp32", "torchtitan"):
            assert mine < titan
        for mine, accelerate in pairs("sent", f"{ours}, bf16", "Accelerate"):
            assert mine < accelerate or keeps == "false"  # which exchanges more often
    for key in ("sent", "collectives"):
        for mine, titan in pairs(key, f"{hsdp}, fp32", "torchtitan, HSDP"):
            assert mine < titan
    for mine, accelerate in pairs("collectives", f"{once}, bf16", "Accelerate"):
        assert mine <= accelerate


@pytest.mark.slow
def test_no_engine_exchanges_more_than_it_did_and_the_plan_knows_it(tmp_path):
    """Those whose exchange is not shown by others: in bf16, once in a step, and within groups."""
    kept = json.loads((ROOT / "benchmarks/results/counters.json").read_text("utf-8"))
    names = ("DDP, bf16", "FSDP2, keep_whole: gradients", "HSDP")
    cases = [c for c in counted.exchange_cases(tmp_path, (2,)) if c["name"].startswith(names)]
    found = {row["case"]: row for row in counted.count_exchange(tmp_path, cases)}
    expected = {row["case"]: row for row in kept["after"]["exchange"] if row["case"] in found}
    assert found == expected, counted.UPDATE_EXCHANGE
    assert len(found) == 5
    for case in cases:
        config = load_config(case["config"])
        engine, within = config.train.engine, config.train.shard_within
        group = sharding.Group(counted.EXCHANGING, engine, True, {}, within)
        whole = memory.predict(config, "bf16", counted.WINDOW, on_gpu=False).model_bytes
        planned = network.predict_traffic(config, "bf16", group, whole, 2)
        sent = planned.sent(counted.EXCHANGING)
        assert sent == pytest.approx(found[case["name"]]["sent"], rel=0.01), case["name"]


def test_no_step_of_8b_launches_moves_or_waits_more_than_that_of_trl():
    kept = json.loads((ROOT / "benchmarks/results/counters.json").read_text("utf-8"))
    ours, theirs = (
        {row["case"]: row for row in kept[name]["shapes"]} for name in ("after", "TRL 1.16.0")
    )
    assert len(ours) == 12
    for case, row in ours.items():
        for key in ("launches", "moved", "syncs"):
            assert row[key] < theirs[case][key], (case, key)


# --- the counters themselves ---------------------------------------------------------------------


def test_every_kind_of_work_is_counted_as_what_it_is():
    x = torch.ones(4, 8, requires_grad=True)
    counts, launched = count(lambda: x.t()[2:].view(6, 2, 2))
    assert (counts.launches, counts.views, counts.moved) == (0, 3, 0)
    counts, launched = count(lambda: (x.detach() + 1).mul_(2))
    assert (dict(launched), counts.moved) == ({"add": 1, "mul_": 1}, 4 * 128)  # each reads, writes
    counts, _ = count(lambda: x @ torch.ones(8, 3))
    assert (counts.flops, counts.saved) == (2 * 4 * 8 * 3, 8 * 3 * 4)
    counts, _ = count(lambda: x.detach().expand(5, 4, 8) + 0.0)
    assert counts.moved == 128 + 5 * 128
    counts, _ = count(lambda: torch.zeros(10).copy_(torch.ones(10)))
    assert counts.moved == 40 + 40 + 80
    q = torch.ones(1, 2, 6, 8)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    assert count(attend)[0].flops == 2 * 2 * 2 * 6 * 6 * 8
    assert count(partial(attend, is_causal=True))[0].flops == 2 * 2 * 6 * 6 * 8


@pytest.mark.parametrize(
    ("call", "syncs"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x.sum()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu().tolist(), 1),  # the second is on the host
        (lambda x: x.to("cpu"), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: torch.tensor([1.0]).item(), 0),
        (lambda x: torch.as_tensor(3.0).cpu().tolist(), 0),
        (lambda x: x[:2] + x.to(torch.float64)[2:], 0),
    ],
)
def test_the_host_waits_where_it_needs_values(call, syncs):
    x = torch.ones(4)
    assert count(lambda: call(x))[0].syncs == syncs


def test_storages_are_kept_once_and_until_they_die():
    w = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8)

    def two_layers():
        for _ in range(3):  # each frees what it kept
            y = (x @ w).exp()
            (y * y.view(4, 8) * (x @ w)).sum().backward()
            del y

    counts, _ = count(two_layers)
    kept = [x, x @ w, x @ w, x @ w]  # x for both products, y, its square, and the second product
    assert counts.saved == sum(map(num_bytes, kept))


# --- what a step need not do ---------------------------------------------------------------------


class OneProcess(Replicated):
    """Clips the gradients of a model without an optimizer."""

    def __init__(self, model: nn.Module, max_grad_norm: float):
        self.trained, self.max_grad_norm = dict(model.named_parameters()), max_grad_norm
        self.in_backward = self.updates = None


def check_clipping(scale: float, most: float) -> float:
    """Compares with torch, to the bit, and returns the norm."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for number, parameter in enumerate(model.parameters()):
        random = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=random) * scale
    other = copy.deepcopy(model)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        two.grad = one.grad.clone()
    found = OneProcess(model, most).clip()
    expected = float(nn.utils.clip_grad_norm_(other.parameters(), most))
    assert found == expected or (math.isnan(found) and math.isnan(expected))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad) or not math.isfinite(expected)
    return found


@given(
    scale=st.sampled_from([0.0, 1e-20, 1e-6, 1e-3, 1.0, 1e6, math.inf, math.nan]),
    most=st.sampled_from([1e-8, 1e-6, 1e-3, 0.5, 1.0, 1e3, math.inf]) | st.floats(1e-7, 1e7),
)
def test_gradients_are_clipped_to_the_bits_of_torch(scale, most):
    """A pass over gradients is left out only where it would multiply all of them by 1."""
    check_clipping(scale, most)


@pytest.mark.parametrize("share", [0.99, 0.9989, 0.9991, 0.9999, 1.0, 1.0001, 1.001, 1.01])
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_a_norm_near_the_limit_is_clipped_to_the_bits_of_torch(scale, share):
    check_clipping(scale, share * check_clipping(scale, math.inf))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_host_waits_for_the_loss_and_the_norm_only(tmp_path, layout):
    config = configured(tmp_path, architectures()["Llama"], "lora")
    window = dry_run.Window((((24, 12), (17, 9)),) * 3, layout)
    made = dry_run.make_engine(config, "bf16", window, weights=False)
    counts, _ = count(made.optimizer_step)
    assert counts.syncs == 2
