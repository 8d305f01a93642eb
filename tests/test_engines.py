"""Every engine on two ranks, operation by operation, against a loop of one process.

The loop shares no code with the engines. `engine_worker` has the network and its rows.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace as Has
from typing import Any

import engine_worker
import forked
import pytest
import tiny
import torch
from conftest import ROOT, representatives
from engine_worker import NORM, ROWS, STEPS, Net, rows

from sft.errors import ConfigError
from sft.train.parallel.ddp import Replicated
from sft.train.parallel.fsdp import Sharded
from sft.train.parallel.state import decode, split_state

pytestmark = pytest.mark.slow
ENGINES = ("ddp", "fsdp", "fsdp_all", "zero1", "zero2", "zero3")
ABOUT = {  # the class, where ranks wait, whether weights are split, the factor of losses
    "ddp": ("Replicated", "last backward", False, 1.0),
    "fsdp": ("Sharded", "forward", True, 1.0),
    "fsdp_all": ("Sharded", "forward", True, 1.0),
    "zero1": ("Zero", "backward", False, 2.0),
    "zero2": ("Zero", "backward", False, 2.0),
    "zero3": ("Zero", "forward", True, 2.0),
}
SIZES = {  # of 65 elements of matrices and 14 of vectors, 1 of them not used; of both ranks
    "ddp": [78, 0],
    "fsdp": [3 * 5 + 3 * 5 + 2 * 5 + 3 + 3 + 2 + 1, 30],  # rows: 3 and 2 of 5, 2 and 1 of 3
    "fsdp_all": [3 * 5 + 3 * 5 + 2 * 5 + 3 + 3 + 2 + 1, 30],
    "zero1": [34 + 8, 31 + 6],  # halves of both groups, in multiples of two elements
    "zero2": [34 + 8, 31 + 6],
    "zero3": [13 + 13 + 8 + 3 + 3 + 2 + 1, 36],  # halves of each parameter, rounded up
}
CHECKSUMS = {  # of parameters; ZeRO-1 and 2 also have fp32 copies of the part that they update
    "ddp": [6, 6],
    "fsdp": [7, 7],
    "fsdp_all": [7, 7],
    "zero1": [7 + 5, 7 + 4],
    "zero2": [7 + 5, 7 + 4],
    "zero3": [7, 6],
}


def train_alone(has_unused: bool, limit: float = NORM, steps: int = STEPS) -> dict[str, Any]:
    """Returns norms, and weights and moments after each step, of all rows in one process."""
    net = Net(has_unused)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    found: dict[str, Any] = {"norms": [], "weights": [], "moments": []}
    for step in range(steps):
        optimizer.zero_grad()
        (net(rows(step)).square().sum() / ROWS).backward()
        for parameter in trained.values():
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
        norm = torch.cat([p.grad.flatten() for p in trained.values()]).norm()
        for parameter in trained.values():
            parameter.grad *= min(1.0, limit / float(norm))
        optimizer.step()
        found["norms"].append(float(norm))
        found["weights"].append({name: p.detach().clone() for name, p in trained.items()})
        state = {name: optimizer.state[p] for name, p in trained.items()}
        keys = ("exp_avg", "exp_avg_sq")
        found["moments"].append({n: {k: s[k].clone() for k in keys} for n, s in state.items()})
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("engines")
    for stage in (1, 2, 3):
        settings = json.loads((ROOT / f"configs/deepspeed_z{max(stage, 2)}.json").read_text())
        settings["zero_optimization"]["stage"] = stage
        (out / f"zero{stage}.json").write_text(json.dumps(settings))
    return out


@pytest.fixture(scope="module")
def alone() -> dict[bool, Any]:
    return {has_unused: train_alone(has_unused) for has_unused in (False, True)}


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


@pytest.fixture(params=representatives(ENGINES, ["ddp", "fsdp", "zero2"]))
def ranks(request, out, kept) -> list[dict[str, Any]]:
    """What both ranks saw. DeepSpeed's processes can make no others, so each engine has its own."""
    name = request.param
    if name not in kept:
        printed = forked.launch(2, ["tests/support/engine_worker.py", str(out), name])
        files = sorted(out.glob(f"{name}.rank*.pt"))
        assert len(files) == 2, printed
        kept[name] = [torch.load(file) | {"name": name} for file in files]
    return kept[name]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-7), name


def without_buffers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: v for name, v in weights.items() if name not in ("root", "layers.1.inner", "frozen")
    }


def test_what_an_engine_says_of_itself(ranks):
    for rank in ranks:
        about = rank["train"]["about"]
        keys = ("engine", "waits_in", "is_split", "loss_factor")
        assert tuple(about[key] for key in keys) == ABOUT[rank["name"]]
        if rank["name"].startswith("fsdp"):
            assert about["quant_state"] == "kept"
            assert about["sharded"] == ["", "layers.0", "layers.1"]
            assert about["policies"] == {"OffloadPolicy"}
            assert rank["vary"]["about"]["policies"] == {"CPUOffloadPolicy"}


def test_norms_weights_and_moments_are_those_of_one_process(ranks, alone):
    expected = alone[ranks[0]["name"] != "ddp"]
    for rank in ranks:
        assert rank["train"]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert rank["train"]["updates"] == [0, 2]
    known = {*expected["weights"][0], "frozen"}
    kept = {n: v for n, v in ranks[0]["train"]["saved"].items() if n not in known}
    assert_close(kept, {"root": torch.arange(2.0), "layers.1.inner": torch.arange(3.0)})
    assert_close(without_buffers(ranks[0]["train"]["saved"]), expected["weights"][1])
    assert_close(without_buffers(ranks[0]["train"]["weights"]), expected["weights"][2])
    frozen = [ranks[0]["train"][part]["frozen"] for part in ("saved", "weights")]
    assert torch.equal(frozen[0], frozen[1]), "it is saved too, and no step changes it"
    assert "frozen" not in ranks[1]["train"]["saved"]
    assert not ranks[1]["train"]["saved"]
    assert not ranks[1]["train"]["weights"]
    for name, moments in expected["moments"][1].items():
        parts = [s for rank in ranks for s in rank["train"]["shards"] if s[0] == name]
        assert all(start == 0 for _, start, state in parts if not state["exp_avg"].numel())
        parts = sorted((p for p in parts if p[2]["exp_avg"].numel()), key=lambda part: part[1])
        ends = [start + state["exp_avg"].numel() for _, start, state in parts]
        assert [start for _, start, _ in parts] == [0, *ends[:-1]]  # once each, without a gap
        found = {key: torch.cat([s[key].flatten() for *_, s in parts]) for key in moments}
        assert_close(found, {key: value.flatten() for key, value in moments.items()})


def test_a_step_of_a_resumed_run_is_bit_for_bit_that_of_the_run(ranks):
    for rank in ranks:
        resumed, trained = rank["resume"], rank["train"]
        assert resumed["checksums"] == trained["checksums"][1:]
        assert not any(trained["before"])  # no state before the first update
        assert resumed["norm"] == trained["norms"][2]
        assert resumed["updates"] == [2, 0]
        assert all(not value.any() for value in resumed["moments"])


def test_an_evaluation_after_loading_uses_the_loaded_weights(ranks):
    """Although another evaluation came before, which leaves some layers of FSDP2 gathered."""
    for number, rank in enumerate(ranks):
        net = Net(rank["name"] != "ddp")
        net.load_state_dict(ranks[0]["train"]["saved"], strict=False)
        with torch.no_grad():
            expected = net(rows(2).chunk(2)[number])
        assert torch.allclose(rank["resume"]["outputs"], expected, rtol=1e-5, atol=1e-6)


def test_ranks_keep_their_own_part_where_an_engine_splits(ranks):
    name = ranks[0]["name"]
    first, second = (rank["train"]["checksums"][1] for rank in ranks)
    assert (first == second) == (name == "ddp")
    assert [len(first), len(second)] == CHECKSUMS[name]
    if name == "ddp":
        weights = without_buffers(ranks[0]["train"]["saved"])
        order = [key for key, p in Net(False).named_parameters() if p.requires_grad]
        assert first == [zlib.crc32(weights[key].numpy().tobytes()) for key in order]
    states = [[state for *_, state in rank["train"]["shards"]] for rank in ranks]
    sizes = [sum(state["exp_avg"].numel() for state in each) for each in states]
    assert sizes == SIZES[name]


def test_without_a_limit_the_gradient_is_not_scaled(ranks):
    expected = train_alone(ranks[0]["name"] != "ddp", float("inf"), 1)
    for rank in ranks:
        assert rank["vary"]["norm"] == pytest.approx(expected["norms"][0], rel=1e-5)
        assert not rank["vary"]["not_finite"] < float("inf")  # infinite or NaN
        assert rank["vary"]["small"][0] < 1
        assert rank["vary"]["small"][1] == 0
    assert_close(without_buffers(ranks[0]["vary"]["weights"]), expected["weights"][0])


def test_in_16_bits_the_network_computes_in_them_and_returns_fp32(ranks):
    net = Net()
    for number, rank in enumerate(ranks):
        own = rows(0).chunk(2)[number]
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            with torch.no_grad(), torch.autocast("cpu", dtype):
                expected = net(own)
            assert rank["vary"][name].dtype == torch.float32
            assert torch.equal(rank["vary"][name], expected.float())
            assert not torch.equal(net(own), expected.float())


def test_a_loss_scale_changes_no_gradient_but_by_overflow(ranks, alone):
    """Norms and updates are those of fp32 within the rounding of fp16, clipped at the same norm."""
    expected = alone[ranks[0]["name"] != "ddp"]["norms"]
    for rank in ranks:
        assert rank["vary"]["scaled"] == pytest.approx(expected, rel=2e-3)
        assert not math.isfinite(rank["vary"]["overflowed"])


def test_an_optimizer_in_host_memory_makes_the_same_steps(ranks, alone):
    for rank in ranks:
        if rank["name"] not in ("ddp", "zero1"):
            found = rank["vary"]["offloaded"]
            assert found == pytest.approx(alone[True]["norms"], rel=1e-5)


def test_one_process_makes_the_same_steps(tmp_path, alone):
    """Also with a parameter that no row uses, whose gradient is missing."""
    parallel, _ = engine_worker.make("one", tmp_path)
    assert engine_worker.describe(parallel)["waits_in"] == "never"
    norms = [engine_worker.take_step(parallel, rows(step)) for step in range(STEPS)]
    assert norms == pytest.approx(alone[True]["norms"], rel=1e-5)
    assert_close(without_buffers(parallel.weights().all()), alone[True]["weights"][-1])


def test_processes_that_nothing_joins_are_refused(tmp_path):
    accelerator = Has(num_processes=2, prepare=lambda *given: given)
    with pytest.raises(ConfigError, match=r"2 processes, .* would train independent copies"):
        Replicated(Net(), tiny.config(tmp_path).train, accelerator)


def test_state_is_cut_only_where_it_has_a_value_for_each_element():
    """And what no checkpoint can hold is refused."""
    state = {"step": torch.tensor(3.0), "k": 2, "none": None, "half": torch.tensor(0.5).half()}
    state |= {"m": torch.ones(2, 3), "row": torch.ones(2, 1), "flat": torch.ones(6)}
    by_element, whole, numbers = split_state(state, torch.ones(2, 3))
    assert (set(by_element), set(whole)) == ({"m"}, {"row", "flat"})
    found = {key: decode(value, "cpu") for key, value in json.loads(json.dumps(numbers)).items()}
    assert found == {key: state[key] for key in ("step", "k", "none", "half")}
    assert found["half"].dtype == torch.float16
    assert set(split_state({"step": torch.ones(()), "m": torch.ones(())}, torch.ones(()))[0]) == {
        "m"
    }
    with pytest.raises(ConfigError, match="keeps queue as list, which no checkpoint can hold"):
        split_state({"queue": [torch.ones(1)]}, torch.ones(1))


def test_weights_are_split_over_the_devices_of_the_run(tmp_path, monkeypatch):
    """Left to itself, PyTorch takes GPUs where there are some, for a run on CPUs too."""
    found = []
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *shape, **_: shape)
    monkeypatch.setattr(
        "torch.distributed.fsdp.fully_shard", lambda module, mesh, **_: found.append((module, mesh))
    )
    accelerator = Has(device=torch.device("cpu"), num_processes=2)
    net = Net()
    Sharded(net, tiny.config(tmp_path).train, accelerator)
    assert found == [(each, ("cpu", (2,))) for each in (*net.layers, net)]
