"""The layout that a plan of a model alone chooses: against a search of all, and case by case."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT

from sft import commands
from sft.config.load import load_config, with_values
from sft.plan import layouts, plan, report
from sft.plan.layouts import GAIN, Question, choose_layout
from sft.runtime import hardware
from sft.tasks.sft.task import FineTune

GIB = 2**30
SIZES = {  # 7 million parameters: their state takes 120 MB, and rows of 8,192 tokens about as much
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 16384,
}
STATED = {"gradient_checkpointing": "true", "global_batch": "2", "max_tokens": "4096"}
ON_GPU = {"offload": "false", "activation_offload": "false"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "config.json").write_text(json.dumps(SIZES))
    return folder


def ask(model, gpu_bytes: float, number: int = 2, mode="full", **stated: Any) -> Question:
    """Asks about `number` GPUs that are elsewhere, with so much memory each."""
    keys = {f"train.{key}": value for key, value in (STATED | stated).items()}
    given = {"model.name": model, "tuning.mode": mode, "data.max_seq_len": 8192} | keys
    config = load_config(
        None,
        [*(f"{k}={v}" for k, v in given.items()), "data.train_path=no", "train.output_dir=no"],
    )
    gpu = hardware.Device(0, "a GPU", int(gpu_bytes), None, True, None)
    machine = replace(hardware.detect(), devices=[gpu] * number, is_here=False)
    work = FineTune.uniform_workload(config)
    return Question(config, work, machine, number, frozenset(config.train.model_fields_set))


@pytest.fixture(scope="module")
def everything(model):
    """The plans of all layouts of two GPUs with the same result; too little room to keep more."""
    question = ask(model, GIB / 2)
    found = [question.try_plan(layout) for layout in question.tiers[0]]
    return [made for made in found if made]


def needed(made: plan.Plan) -> float:
    """Returns the memory of a GPU on which the step of a plan just fits."""
    return (made.memory.reserved + made.context_bytes) / 0.94 + 2**20


def short(made: plan.Plan) -> dict[str, Any]:
    """Returns what was chosen, without what was stated and without prefixes."""
    values = {key.removeprefix("train."): value for key, value in made.layout.items()}
    return {key: value for key, value in values.items() if key != "gradient_checkpointing"}


def test_the_fastest_that_fits_is_chosen_whatever_the_memory(model, everything):
    """As a search of everything finds it; and its own plan has the same bytes."""
    rooms, names = sorted({needed(made) for made in everything}), set()
    for room in (rooms[0], rooms[len(rooms) // 2], rooms[-1]):
        question = ask(model, room)
        chosen, tried = choose_layout(question)
        plans = [question.try_plan(layout) for layout in question.tiers[0]]
        fitting = [made for made in plans if made and made.fits]
        assert chosen.fits
        assert chosen.step_seconds * (1 - GAIN) <= min(made.step_seconds for made in fitting)
        assert len(tried) <= len(everything)
        names.add(str(short(chosen)))
        config = with_values(question.config, chosen.layout)
        own = plan.make_plan(config, question.workload, question.machine, 2, is_question=True)
        assert own.memory == chosen.memory
        assert own.sent_bytes == chosen.sent_bytes
    assert len(names) >= 2


def test_each_way_of_sharing_is_chosen_where_it_is_needed(model, everything):
    by_name = {str(short(made)): made for made in everything}
    fsdp = by_name["{'engine': 'fsdp'}"]
    shared = by_name["{'engine': 'fsdp', 'context_parallel': 2}"]
    least = min(everything, key=needed)
    assert needed(least) < needed(shared) < needed(fsdp) < needed(by_name["{'engine': 'ddp'}"])

    def choose(room: float, **stated: Any) -> dict[str, Any]:
        return short(choose_layout(ask(model, room, **stated))[0])

    assert choose(needed(fsdp)) == {"engine": "fsdp"}
    assert choose(needed(shared), **ON_GPU) == {"engine": "fsdp", "context_parallel": 2}
    assert choose(needed(least)) == short(least)
    assert "offload" in str(short(least))
    # Of adapters, copies exchange little, while shards of the base would be gathered.
    assert choose(80 * GIB, mode="lora") == {"engine": "ddp"}


def test_weights_in_bf16_are_the_last_resort(model, everything):
    least = min(needed(made) for made in everything if not made.host)
    pure, _ = choose_layout(ask(model, least - 2 * 2**20, **ON_GPU))
    assert pure.fits
    assert short(pure)["precision"] == "bf16_pure"
    assert "precision" not in short(choose_layout(ask(model, least, **ON_GPU))[0])


def test_where_nothing_fits_the_missing_memory_and_enough_gpus_are_named(model, everything):
    kept = ON_GPU | {"precision": "bf16"}
    room = min(needed(made) for made in everything if not made.host) - 2 * 2**20
    lacking, _ = choose_layout(ask(model, room, **kept))
    assert not lacking.fits
    assert lacking.enough == 4  # of three GPUs, two cannot share a row
    assert [choose_layout(ask(model, room, n, **kept))[0].fits for n in (3, 4)] == [False, True]
    assert report._missing(lacking).endswith("; 4 such GPUs would be enough")
    hopeless, _ = choose_layout(ask(model, 600 * 2**20, **kept))
    assert hopeless.enough is None
    assert "no number of such GPUs" in report._missing(hopeless)


def test_what_is_stated_is_kept(model, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sft.plan.advice.advise", lambda *_: [])
    given = [f"--model={model}", "--gib=24", "--gpu=mine x 2", "--seq=8192", "--tuning=full"]
    given += [f"--json={tmp_path}/a.json", "train.global_batch=2"]
    commands.run("plan", [*given, "train.context_parallel=2", "train.gradient_checkpointing=true"])
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["layout"]["train.context_parallel"] == 2
    printed = capsys.readouterr().out
    assert "Layouts: the first of" in printed
    assert "at 25 GB/s (assumed: give LINK)" in printed
    for key, value in read["layout"].items():
        assert f"{key}={str(value).lower()}\n" in printed.replace(" ", "")
    commands.run("plan", [*given, "train.engine=ddp", "train.gradient_checkpointing=true"])
    assert json.loads((tmp_path / "a.json").read_text())["layout"] == {}
    assert "Layouts" not in capsys.readouterr().out


def test_a_bound_is_below_what_a_plan_predicts(model, everything):
    question = ask(model, 80 * GIB)
    for layout in question.tiers[0]:
        if (made := question.try_plan(layout)) is not None:
            bound = question.bound(layout)
            assert bound is not None
            assert bound[0] <= made.memory.reserved - made.usable_bytes
            assert bound[1] <= made.step_seconds


@pytest.mark.parametrize(
    ("number", "is_here", "parts", "node"),
    [(2, False, [1, 2], False), (16, False, [1, 2], True), (16, True, [1, 2], False)],
)
def test_what_is_tried(model, number, is_here, parts, node):
    """Two heads can be shared by two processes; 16 GPUs elsewhere are two machines of eight."""
    question = ask(model, GIB, number)
    question = replace(question, machine=replace(question.machine, is_here=is_here))
    tried = [layout for tier in question.tiers for layout in tier]
    assert sorted({layout.parts for layout in tried}) == parts
    assert any("train.shard_within" in layout.values for layout in tried) == node
    assert {layout.rung for layout in tried} == {2, 3}  # checkpointing is stated
    heavier, lighter = (replace(tried[0], parts=n) for n in (1, 2))
    assert heavier.takes_more_than(lighter)
    assert not lighter.takes_more_than(heavier)
    assert not replace(heavier, family="other").takes_more_than(lighter)
    assert layouts.AS_STATED.values == {}
