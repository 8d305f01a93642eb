"""Any number of processes and any engine: the same run; and resumed on others, the same run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, clean_environment, representatives
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sft import errors
from sft.runtime import checkpoint
from sft.runtime.checkpoint import OptimizerShard

STEPS, MIDDLE = 6, 5
MODEL: list[str] = []  # the override that names it
MODES = ("lora", "qlora", "full")
ENGINES = {  # as a user would ask for them
    "ddp": [],
    "fsdp": ["train.engine=fsdp"],
    "zero1": ["train.engine=deepspeed"],
    "zero2": ["train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z2.json"],
    "zero3": ["train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z3.json"],
}


def case(mode: str, engine: str, world: int, resume: str = "", **given: Any) -> dict[str, Any]:
    """A run of 6 steps; the first epoch ends after 4, the checkpoint is one of the second. Eight
    rows are held out."""
    name = f"{mode}-{engine}-{world}" + ("-resumed" if resume else "")
    overrides = [*MODEL, f"tuning.mode={mode}", "data.max_rows=24", "train.global_batch=4"]
    overrides += ["data.eval_path=null", "data.eval_fraction=0.334"]
    overrides += [f"train.max_steps={STEPS}", "train.learning_rate=1e-3", *ENGINES[engine]]
    tokens = 128 if mode == "lora" else 200  # one or two examples in a micro-batch
    overrides += ["train.precision=fp32"]
    if mode == "lora":  # the other modes wait for their checkpoints
        overrides += ["train.checkpoint_async=true", "train.save_steps=1"]
    more = {"max_tokens": tokens, "steps": STEPS, "save_at": [MIDDLE], "prove": False}
    return {"name": name, "overrides": overrides, "resume": resume} | more | given


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("parallel")
    MODEL[:] = [f"model.name={tiny.shallow_nano(folder)}"]
    stage_1 = json.loads((ROOT / "configs/deepspeed_z2.json").read_text())
    stage_1["zero_optimization"]["stage"] = 1
    (folder / "z1.json").write_text(json.dumps(stage_1))
    ENGINES["zero1"] = ["train.engine=deepspeed", f"train.deepspeed_config={folder / 'z1.json'}"]
    yield folder
    MODEL.clear()


def run(folder: Path, world: int, cases: list[dict[str, Any]]) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    log = folder / f"{cases[0]['name']}.log"
    command = ["tests/support/parallel_worker.py", str(folder / "cases.json"), str(folder)]
    forked.start(world, command, log).join()
    for each in cases:
        ranks = list(folder.glob(f"{each['name']}.rank*.json"))
        assert len(ranks) == world, log.read_text(errors="replace")


def found(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(f.read_text()) for f in sorted(folder.glob(f"{name}.rank*.json"))]


def difference(folder: Path, *names: str) -> float:
    """Norm of the difference of the final weights over the norm of the first."""
    a, b = (load_file(folder / f"{name}.weights") for name in names)
    assert a.keys() == b.keys()
    one, other = (torch.cat([w[k].double().flatten() for k in sorted(a)]) for w in (a, b))
    return float((one - other).norm() / one.norm())


def assert_same(folder: Path, name: str, reference: str) -> None:
    expected = found(folder, reference)[0]
    ranks = found(folder, name)
    first = STEPS - len(ranks[0]["steps"])
    for number, step in enumerate(expected["steps"][first:]):
        for rank in ranks:
            ids, _, loss = rank["steps"][number]
            assert ids == step[0]
            assert float.fromhex(loss) == pytest.approx(float.fromhex(step[2]), rel=1e-5)
        consumed = chain.from_iterable(rank["steps"][number][1] for rank in ranks)
        assert sorted(consumed) == sorted(step[0])  # every example once, over all ranks
    assert ranks[0]["held_out"] == pytest.approx(expected["held_out"], rel=1e-5)
    assert difference(folder, name, reference) < 1e-4


def assert_bit_equal(folder: Path, one: str, other: str) -> None:
    for mine, theirs in zip(found(folder, one), found(folder, other), strict=True):
        steps = min(len(mine["steps"]), len(theirs["steps"]))
        assert mine["steps"][-steps:] == theirs["steps"][-steps:]
    a, b = (load_file(folder / f"{name}.weights") for name in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    cases = []
    for mode in MODES:
        saved = str(folder / f"{mode}-ddp-1" / f"checkpoint_step_{MIDDLE}")
        cases += [case(mode, "ddp", 1), case(mode, "ddp", 1, saved, save_at=[])]
    cases += [crowd(mode, "ddp", 1) for mode in ("lora", "qlora")]
    run(folder, 1, cases)
    return folder


def offloaded(folder: Path, engine: str) -> list[str]:
    """Overrides that keep state in host memory, as each engine is reported to."""
    if engine == "fsdp":
        return [*ENGINES[engine], "train.offload=true"]
    reported = json.loads(
        (ROOT / f"configs/deepspeed_z{3 if engine == 'zero3' else 2}.json").read_text()
    )
    reported["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    file = folder / f"{engine}_offload.json"
    file.write_text(json.dumps(reported))
    return ["train.engine=deepspeed", f"train.deepspeed_config={file}"]


def cell(mode: str, engine: str, what: str, changed: list[str]) -> dict[str, Any]:
    """Two steps, of the matrix of docs/LAUNCH.md."""
    short = case(mode, engine, 2, steps=2, save_at=[], max_tokens=400, evaluate=False)
    return short | {"name": f"{mode}-{engine}-{what}", "overrides": short["overrides"] + changed}


def crowd(mode: str, engine: str, world: int) -> dict[str, Any]:
    """Three steps of two agents, of which the diversity is one of the whole batch."""
    short = case(mode, engine, world, steps=3, save_at=[], prove=True)
    own = ["crowd.num_agents=2", "crowd.lambda_sw=0.5", "tuning.r=4", "train.learning_rate=3e-3"]
    own += ["data.max_rows=40", "data.eval_fraction=0.2"]
    return short | {"name": f"crowd-{short['name']}", "overrides": short["overrides"] + own}


CROWDS = [("lora", e) for e in ("ddp", "fsdp", "zero3")] + [("qlora", e) for e in ("ddp", "zero2")]
OFFLOADING = ("fsdp", "zero2", "zero3")
KEEPS_ALL = ("fsdp", "zero3")  # what they save without checkpointing: gathered weights, too
CELLS = [
    *product(ENGINES, ("checkpointing", "selective")),
    *product(OFFLOADING, ["offload"]),
    *product(KEEPS_ALL, ["activations"]),
]
# Each with one way of tuning, in turn: every engine with everything that saves memory, and all
# three ways with each of these (two with `activations`). Whole runs have every way on every engine.
SAVING = [(MODES[number % 3], *each) for number, each in enumerate(CELLS)]
WHOLE = list(product(MODES, ENGINES))
# `make test` has every engine, and one cell of each kind of saving.
FEW_WHOLE = [("lora", "zero1"), ("qlora", "zero2"), ("full", "ddp"), ("lora", "fsdp")]
FEW_WHOLE += [("full", "fsdp"), ("full", "zero3")]
FEW_BF16 = ["fsdp", "zero2"]
FEW_CROWDS = [("lora", "fsdp"), ("qlora", "zero2")]
FEW_SAVING = [
    next(each for each in SAVING if each[2] == what) for what in ("checkpointing", "selective")
]
FEW_SAVING += [each for each in SAVING if each[1] == "fsdp"]


@pytest.fixture(scope="module")
def two(alone, thorough) -> Path:
    """Every engine in every mode on two processes: whole, resumed in its middle, and two steps of
    each cell of the matrix; or the few of `make test`."""
    cases = []
    whole, crowds, saving, bf16s = FEW_WHOLE, FEW_CROWDS, FEW_SAVING, ["ddp", *FEW_BF16]
    if thorough:
        whole, crowds, saving, bf16s = WHOLE, CROWDS, SAVING, list(ENGINES)
    for engine in ENGINES:  # DeepSpeed's last: after them a process makes no others
        bf16 = cell("lora", engine, "bf16", ["train.precision=bf16"])
        bf16 |= {"prove": True, "max_tokens": 128, "steps": 1, "save_at": [1]}
        cases += [bf16] if engine in bf16s else []  # of which step 0 is saved and read back, too
        cases += [crowd(mode, each, 2) for mode, each in crowds if each == engine]
        for mode in (mode for mode, each in whole if each == engine):
            saved = str(alone / f"{mode}-{engine}-2" / f"checkpoint_step_{MIDDLE}")
            rest = case(mode, engine, 2, saved, save_at=[], evaluate=False)
            cases += [case(mode, engine, 2), rest]
        activations = ["train.activation_offload=true"]
        changes = {
            "checkpointing": ["train.gradient_checkpointing=true"],
            "selective": ["train.gradient_checkpointing=selective", *activations],
            "activations": activations,
        }
        if engine in OFFLOADING:
            changes["offload"] = offloaded(alone, engine)
        for mode, own, what in saving:
            cases += [cell(mode, engine, what, changes[what])] if own == engine else []
    run(alone, 2, cases)
    return alone


@pytest.mark.slow
@pytest.mark.parametrize("engine", representatives(["fsdp", "zero1", "zero2", "zero3"], FEW_BF16))
def test_in_bf16_ranks_exchange_gradients_in_fp32(two, engine):
    """The first moments after one step are a tenth of the gradient; in bf16 2e-3 would be lost."""

    def moments(name: str) -> torch.Tensor:
        with checkpoint.OptimizerState(two / f"lora-{name}-bf16/checkpoint_step_1") as saved:
            read = (saved.read(each, 0, None).state["exp_avg"] for each in sorted(saved.found))
            return torch.cat([value.double().flatten() for value in read])

    expected = moments("ddp")
    assert float((moments(engine) - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "engine", "what"), representatives(SAVING, FEW_SAVING))
def test_checkpointing_and_offloading_change_no_loss(two, mode, engine, what):
    expected = found(two, f"{mode}-ddp-1")[0]["steps"][:2]
    for rank in found(two, f"{mode}-{engine}-{what}"):
        for mine, theirs in zip(rank["steps"], expected, strict=True):
            assert mine[0] == theirs[0]
            assert float.fromhex(mine[2]) == pytest.approx(float.fromhex(theirs[2]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "engine"), representatives(WHOLE, FEW_WHOLE))
def test_two_processes_with_any_engine_are_the_run_of_one(two, mode, engine):
    expected = {"ddp": "Replicated", "fsdp": "Sharded"}.get(engine, "Zero")
    for rank in found(two, f"{mode}-{engine}-2"):
        assert (rank["world_size"], rank["engine"]) == (2, expected)
    assert_same(two, f"{mode}-{engine}-2", f"{mode}-ddp-1")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "engine"), representatives(CROWDS, FEW_CROWDS))
def test_a_crowd_on_two_processes_is_that_of_one(two, mode, engine):
    name, reference = f"crowd-{mode}-{engine}-2", f"crowd-{mode}-ddp-1"
    [alone] = found(two, reference)
    ranks = found(two, name)
    for number, (ids, _, loss) in enumerate(alone["steps"]):
        consumed = chain.from_iterable(rank["steps"][number][1] for rank in ranks)
        assert sorted(consumed) == sorted(ids)
        for rank in ranks:
            assert rank["steps"][number][0] == ids
            assert float.fromhex(rank["steps"][number][2]) == pytest.approx(
                float.fromhex(loss), rel=1e-5
            )
    assert len(ranks) == 2
    assert len(alone["steps"]) == 3
    assert ranks[0]["held_out"] == pytest.approx(alone["held_out"], rel=1e-5)
    assert difference(two, name, reference) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_process_resumes_bit_for_bit(alone, mode):
    assert_bit_equal(alone, f"{mode}-ddp-1-resumed", f"{mode}-ddp-1")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "engine"), representatives(WHOLE, FEW_WHOLE))
def test_resumed_equals_uninterrupted_bit_for_bit(two, mode, engine):
    assert_bit_equal(two, f"{mode}-{engine}-2-resumed", f"{mode}-{engine}-2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", representatives(ENGINES, [e for m, e in FEW_WHOLE if m == "full"])
)
def test_the_state_of_the_optimizer_is_sharded_where_the_engine_shards(two, engine):
    saved = two / f"full-{engine}-2" / f"checkpoint_step_{MIDDLE}"
    sizes = [path.stat().st_size for path in sorted(saved.glob("optimizer-*.safetensors"))]
    model = (saved / "model.safetensors").stat().st_size
    assert sum(sizes) == pytest.approx(2 * model, rel=0.02)  # both moments, once
    assert len(sizes) == (1 if engine == "ddp" else 2)
    assert max(sizes) < sum(sizes) * (1.01 if engine == "ddp" else 0.6)


def resumed(folder: Path, world: int, mode: str, source: str) -> dict[str, Any]:
    """The rest of another run, in smaller micro-batches than it had."""
    saved = folder / f"{mode}-{source}" / f"checkpoint_step_{MIDDLE}"
    made = case(mode, "ddp", world, str(saved), max_tokens=90, save_at=[])
    return made | {"name": f"{mode}-{source}-by-{world}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "sources"),
    representatives([(3, ["ddp-1"]), (1, ["zero2-2", "fsdp-2"]), (4, ["ddp-2", "zero3-2"])]),
)
def test_other_numbers_of_processes_are_the_run_of_one_whole_and_resumed(two, world, sources):
    """Resumed on another number of processes, by another engine, with another token budget: the
    same examples, once each, losses within rounding."""
    cases = [resumed(two, world, mode, source) for mode in ("lora", "full") for source in sources]
    if world == 3:
        cases += [case(mode, "ddp", world, save_at=[]) for mode in MODES]
    run(two, world, cases)
    for each in cases:
        assert_same(two, each["name"], each["name"].split("-")[0] + "-ddp-1")


def in_groups(mode: str, resume: str = "", name: str = "", **given: Any) -> dict[str, Any]:
    """A run by two groups of two processes, each of which has all shards."""
    made = case(mode, "fsdp", 4, resume, **given)
    groups = ["train.shard_within=2", "train.keep_whole=gradients"]
    name = name or made["name"].replace("fsdp", "hsdp")
    return made | {"name": name, "overrides": made["overrides"] + groups}


@pytest.mark.slow
def test_groups_of_shards_are_the_run_of_one_whole_and_resumed(alone):
    """Whole, resumed in its middle bit for bit, and from and by one process."""
    modes, cases = ("lora", "full"), []
    for mode in modes:
        own, other = (
            str(alone / f"{mode}-{of}" / f"checkpoint_step_{MIDDLE}") for of in ("hsdp-4", "ddp-1")
        )
        cases += [in_groups(mode), in_groups(mode, own, save_at=[])]
        cases += [in_groups(mode, other, f"{mode}-ddp-1-by-hsdp", save_at=[])]
    run(alone, 4, cases)
    run(alone, 1, [resumed(alone, 1, mode, "hsdp-4") for mode in modes])
    for mode in modes:
        for name in (f"{mode}-hsdp-4", f"{mode}-ddp-1-by-hsdp", f"{mode}-hsdp-4-by-1"):
            assert_same(alone, name, f"{mode}-ddp-1")
        assert_bit_equal(alone, f"{mode}-hsdp-4-resumed", f"{mode}-hsdp-4")
    saved = alone / "full-hsdp-4" / f"checkpoint_step_{MIDDLE}"
    assert len([*saved.glob("optimizer-*.safetensors")]) == 2, "the copies write nothing"


LAUNCHER = """
import sys
from sft import cli
from sft.config.load import load_config
from sft.runtime import launcher

train = load_config("configs/nano.yaml", [f"train.output_dir={sys.argv[2]}"]).train
cli.run(lambda: launcher.launch(train, ["tests/support/parallel_worker.py", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_two_machines_are_the_run_of_one(alone, request):
    """Two launchers: in two networks joined by a cable where that can be made, else on loopback.
    LoRA from the start, the other modes from where one process had come to."""
    cases = [case("lora", "ddp", 2)]
    for mode in ("qlora", "full"):
        saved = alone / f"{mode}-ddp-1" / f"checkpoint_step_{MIDDLE}"
        cases += [case(mode, "ddp", 2, str(saved))]
    cases = [each | {"name": f"{each['name']}-machines", "save_at": []} for each in cases]
    (alone / "machines.json").write_text(json.dumps(cases))
    try:
        names, host = request.getfixturevalue("namespaces"), "10.213.77.1"
    except pytest.skip.Exception:
        names, host = [None, None], "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"NUM_PROCESSES": "1", "NUM_MACHINES": "2", "MASTER_ADDR": host}
    machines = []
    for rank, name in enumerate(names):
        command = ["ip", "netns", "exec", name] if name else []
        command += [sys.executable, "-c", LAUNCHER, str(alone / "machines.json"), str(alone)]
        own = {"MACHINE_RANK": str(rank)} | ({"GLOO_SOCKET_IFNAME": f"sft{rank}"} if name else {})
        environment = clean_environment(**common, MASTER_PORT=str(port), **own)
        machines.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [machine.wait(timeout=600) for machine in machines] == [0, 0]
    for each in cases:
        ranks = found(alone, each["name"])
        assert [reported["world_size"] for reported in ranks] == [2, 2]
        assert [reported["engine"] for reported in ranks] == ["Replicated"] * 2
        assert {reported["spread"] for reported in ranks} == {" on 2 machines, 1 on each, gloo"}
        assert_same(alone, each["name"], each["name"].split("-")[0] + "-ddp-1")


# --- the files of the optimizer ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_what_some_ranks_wrote_any_others_read(tmp_path_factory, sizes, writers, readers, seed):
    """Slices of any cut, ranks with nothing among them, give any other cut."""
    folder, random = tmp_path_factory.mktemp("slices"), np.random.default_rng(seed)
    whole = {f"p{i}": {k: torch.randn(n) for k in ("exp_avg", "sq")} for i, n in enumerate(sizes)}
    cuts = {n: np.sort(random.integers(0, len(v["sq"]) + 1, writers - 1)) for n, v in whole.items()}
    for rank in range(writers):
        pieces = []
        for name, state in whole.items():
            edges = [0, *map(int, cuts[name]), len(state["sq"])]
            start, end = edges[rank], edges[rank + 1]
            if end > start:
                own = {k: v[start:end] for k, v in state.items()}
                pieces.append(OptimizerShard(name, start, own))
        checkpoint.save_optimizer(pieces, folder, rank, writers)
    with checkpoint.OptimizerState(folder) as saved:
        for name, state in whole.items():
            everything = saved.read(name, 0, None).state
            assert all(torch.equal(everything[key], state[key]) for key in state)
            step = -(-len(state["sq"]) // readers)
            for start in range(0, len(state["sq"]), step):
                number = min(step, len(state["sq"]) - start)
                part = saved.read(name, start, number).state
                for key, value in state.items():
                    assert torch.equal(part[key], value[start : start + number])
        with pytest.raises(errors.CheckpointError, match="no optimizer state of other"):
            saved.read("other", 0, 1)


def test_empty_slices_hide_no_others(tmp_path):
    """FSDP2 gives a rank without a row of a parameter an empty slice that starts at 0."""
    for rank, part in enumerate((torch.ones(3), torch.ones(0))):
        checkpoint.save_optimizer([OptimizerShard("p", 0, {"sq": part})], tmp_path, rank, 2)
    with checkpoint.OptimizerState(tmp_path) as saved:
        for number, expected in ((None, 3), (3, 3), (0, 0)):
            assert len(saved.read("p", 0, number).state["sq"]) == expected


def test_the_same_state_is_the_same_file(tmp_path):
    """safetensors once wrote two entries of a header in a random order."""
    shards = [OptimizerShard(f"p{i}", 0, {"sq": torch.ones(3)}, plain={"k": i}) for i in range(3)]
    for copy in range(12):
        (tmp_path / str(copy)).mkdir()
        checkpoint.save_optimizer(shards, tmp_path / str(copy), 0, 1)
    assert len({path.read_bytes() for path in tmp_path.rglob("*.safetensors")}) == 1


def test_a_missing_slice_is_an_error(tmp_path):
    checkpoint.save_optimizer([OptimizerShard("p", 4, {"sq": torch.ones(4)})], tmp_path, 1, 2)
    with checkpoint.OptimizerState(tmp_path) as saved:
        with pytest.raises(errors.CheckpointError, match="lacks elements from 0 on"):
            saved.read("p", 0, 8)
        with pytest.raises(errors.CheckpointError, match="lacks elements from 0 on"):
            saved.read("p", 0, None)
