"""The plan: exact counts, values for `auto` with their reasons, and what it says of memory."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from allocations import allocated_bytes
from conftest import ROOT, representatives
from transformers import BloomConfig

from sft import errors
from sft.config.load import dump_config, load_config, with_values
from sft.config.schema import Config
from sft.data import batches, cache
from sft.errors import ConfigError
from sft.models import dtypes, load
from sft.plan import advice, choose, dry_run, gpus, memory, plan, report
from sft.plan.counts import count_parameters
from sft.plan.trace import Recorder
from sft.runtime import console, hardware
from sft.runtime.log import Log
from sft.runtime.processes import Context
from sft.tasks.base import Workload
from sft.tasks.registry import task_of
from sft.tasks.sft.task import FineTune
from sft.train import engine
from sft.train.parallel.trial import state_bytes

GIB = 2**30


def sizes(prepared: cache.Prepared) -> Workload:
    return FineTune.workload(load_config(ROOT / "configs/nano.yaml"), prepared)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """The default configuration, with the first two layers of its model."""
    model = tiny.shallow_nano(tmp_path_factory.mktemp("plan"))
    return load_config(ROOT / "configs/nano.yaml", [f"model.name={model}"])


@pytest.fixture(scope="module")
def prepared(config) -> cache.Prepared:
    return cache.prepare(with_values(config, {"data.max_rows": 300}))


def machine(ram_bytes: int, gpu_bytes: int | None = None) -> hardware.Hardware:
    gpu = hardware.Device(0, "a GPU", gpu_bytes or 0, gpu_bytes, True, (9, 0))
    return hardware.Hardware(
        [gpu] if gpu_bytes else [], "a CPU", 2, ram_bytes, ram_bytes, True, 100 * GIB, None
    )


@pytest.mark.parametrize("on_gpu", [True, False])
def test_host_memory_that_cannot_hold_the_copy_of_a_checkpoint_is_reported(
    config, prepared, on_gpu
):
    full = with_values(config, {"tuning.mode": "full", "train.save_steps": 10})
    behind = with_values(full, {"train.checkpoint_async": True})

    def made(config: Config, ram_bytes: int) -> plan.Plan:
        gpu = 80 * GIB if on_gpu else None
        return plan.make_plan(config, sizes(prepared), machine(ram_bytes, gpu), 1)

    much, without = made(behind, 8 * GIB), made(full, 8 * GIB)
    assert (much.warnings, without.host) == (without.warnings, {})
    assert much.host[memory.COPIES] == pytest.approx(
        much.disk.checkpoint, rel=0.05
    )  # it has a tokenizer
    assert "per process: copies of a checkpoint" in report._host(much)
    used = 0 if on_gpu else without.memory.reserved
    little = int((used + 0.5 * much.host[memory.COPIES]) / (1 - choose.MARGIN["cpu"]))
    fixed = {"train.max_tokens": without.budget.max_tokens, "train.gradient_checkpointing": False}
    tight = made(with_values(behind, fixed), little)
    (warning,) = (text for text in tight.warnings if "expect to run out of" in text)
    assert warning.endswith(
        f"; train.checkpoint_async=false takes {console.size(tight.host[memory.COPIES])} less"
    )
    assert "does not fit" in tight.verdict
    assert "fits: " in made(with_values(full, fixed), little).verdict


@pytest.mark.thorough("layers that are compiled when it is asked for, in test_compiled.py")
def test_layers_are_compiled_where_a_run_on_a_cpu_takes_hours(config, prepared, monkeypatch):
    """It does not depend on memory, so a resumed run does the same."""
    monkeypatch.setenv("CXX", sys.executable)  # a program that exists

    def made(machine: hardware.Hardware, **changes: Any) -> plan.Plan:
        changes |= {"global_batch": 300}  # one step is an epoch: fewer steps to scan
        changed = with_values(config, {f"train.{key}": value for key, value in changes.items()})
        return plan.make_plan(changed, sizes(prepared), machine, 1)

    short = made(machine(8 * GIB))
    assert not short.compile
    assert "does not earn" in short.reasons["train.compile"]
    for given in (machine(8 * GIB), machine(GIB)):
        long = made(given, epochs=20_000)
        assert long.compile
        assert "earns" in long.reasons["train.compile"]
        assert plan.resolved_values(long)["train.compile"] is True
    monkeypatch.setenv("CXX", "nowhere++")
    without = made(machine(8 * GIB), epochs=20_000)
    assert not without.compile
    assert "no C++ compiler (looked for nowhere++)" in without.reasons["train.compile"]
    on_gpu = made(machine(8 * GIB, 80 * GIB), epochs=20_000)
    assert not on_gpu.compile
    assert "on GPUs" in on_gpu.reasons["train.compile"]
    given = made(machine(8 * GIB), compile=True)
    assert given.compile
    assert "train.compile" not in given.reasons


def test_counts_are_those_of_the_data_and_of_the_model(config, prepared):
    made = plan.make_plan(config, sizes(prepared), machine(8 * GIB), 1)
    assert made.num_examples == 300
    assert made.tokens_per_epoch == sum(len(example.ids) for example in prepared.train)
    built = load.build(config, "fp32", torch.device("cpu"))
    shares = dtypes.parameter_groups(built)
    assert made.num_parameters == sum(s.num_parameters for s in shares)
    assert made.num_trained == sum(s.num_parameters for s in shares if s.trained)
    for what, tensors in dry_run.tensors_by_use(built).items():
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        assert made.memory.breakdown[what] == sum(storages.values())


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_fixed_memory_by_mode(config, prepared, mode):
    made = plan.make_plan(
        with_values(config, {"tuning.mode": mode}), sizes(prepared), machine(8 * GIB), 1
    )
    parts = made.memory.breakdown
    assert made.memory.method == "traced"
    assert made.memory.allocated == made.memory.reserved == sum(parts.values())
    assert parts["gradients"] == 4 * made.num_trained  # several micro-batches: all at the peak
    # Two moments, and a count of steps for each tensor.
    assert 8 * made.num_trained < parts["optimizer"] < 8.01 * made.num_trained
    assert (made.num_trained == made.num_parameters) == (mode == "full")


def test_the_budget_is_what_fits_what_saturates_or_the_longest(config, prepared):
    given = with_values(config, {"train.gradient_checkpointing": False})
    longest = max(len(example.ids) for example in prepared.train)
    roomy = plan.make_plan(given, sizes(prepared), machine(64 * GIB), 1)
    assert roomy.budget.max_tokens == choose.SATURATING_TOKENS["cpu"]
    assert [text.split(":")[0] for text in roomy.warnings] == ["10 steps of 32 examples"]
    room = 35 * 2**20
    tight = plan.make_plan(given, sizes(prepared), machine(room), 1)
    assert longest < tight.budget.max_tokens < choose.SATURATING_TOKENS["cpu"]
    # No less than nine tenths of what fits is used, and no more than fits with the margin.
    assert 0.9 * tight.usable_bytes < tight.memory.reserved <= tight.usable_bytes < 0.86 * room
    hopeless = plan.make_plan(given, sizes(prepared), machine(2**20), 1)
    assert hopeless.budget.max_tokens == longest
    assert "longest" in hopeless.reasons["train.max_tokens"]
    assert hopeless.missing_bytes == hopeless.memory.reserved - hopeless.usable_bytes > 0
    assert "expect to run out of memory" in hopeless.warnings[0]


@pytest.mark.slow
def test_activations_are_checkpointed_where_nothing_else_makes_room(config, prepared):
    roomy = plan.make_plan(config, sizes(prepared), machine(64 * GIB), 1)
    assert roomy.rung == choose.Rung(False)
    tight = plan.make_plan(config, sizes(prepared), machine(17 * 2**20), 1)
    assert tight.rung in choose.LADDER[1:3]
    assert not tight.missing_bytes
    assert "micro-batch without it" in tight.reasons["train.gradient_checkpointing"]
    kept = with_values(config, {"train.gradient_checkpointing": False})
    without = plan.make_plan(kept, sizes(prepared), machine(17 * 2**20), 1)
    assert without.budget.max_tokens < tight.budget.max_tokens


UPDATE_DECIDES = {"tuning.mode": "full", "train.max_tokens": 32, "train.global_batch": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    representatives(
        [
            {},
            {"tuning.mode": "full"},
            {"crowd.num_agents": 3},
            {"train.gradient_checkpointing": True},
            {"crowd.num_agents": 3, "tuning.mode": "lora", "train.gradient_checkpointing": True},
            *({"train.optimizer": each} | UPDATE_DECIDES for each in ("muon", "adafactor", "lion")),
            {"train.optimizer": "schedule_free", "train.schedule": "constant"} | UPDATE_DECIDES,
        ],
        3,
    ),
)
def test_the_planned_memory_is_what_the_heaviest_window_allocates(config, prepared, changes):
    given = with_values(config, {"train.gradient_checkpointing": False} | changes)
    made = plan.make_plan(given, sizes(prepared), machine(8 * GIB), 1)
    alone: Any = dry_run.CpuAccelerator("fp32")
    built = task_of(given).build_model(given, "fp32", dry_run.CPU)
    task = task_of(given)(given, prepared, built, made.budget, Context(alone, Log(None)))
    trained = engine.Engine(task, given.train, Context(alone, Log(None)))
    trained.optimizer_step()  # now there is a state of the optimizer
    trained.optimizer.zero_grad()
    at = plan.planner_of(given, sizes(prepared), machine(8 * GIB), made)
    heaviest, _ = at.heaviest_micro_batch(made.budget, made.rung.checkpointing)
    trained.window = lambda _: (heaviest * 2, [heaviest] * 2)
    assert made.memory.allocated == pytest.approx(allocated_bytes(trained), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("mode", representatives(["lora", "qlora"]))
def test_the_planned_answers_take_what_real_ones_take(config, prepared, mode, tmp_path):
    changes = {"tuning.mode": mode, "evaluation.num_examples": 48, "evaluation.batch_size": 48}
    given = with_values(config, changes)
    made = plan.make_plan(given, sizes(prepared), machine(8 * GIB), 1)
    built = load.build(given, "fp32", dry_run.CPU)
    recorder = Recorder()
    for tensors in dry_run.tensors_by_use(built).values():
        recorder.label_tensors(tensors, "held")
    alone: Any = dry_run.CpuAccelerator("fp32")
    alone.unwrap_model, alone.wait_for_everyone = lambda model: model, lambda: None
    task = FineTune(given, prepared, built, made.budget, Context(alone, Log(None)))
    with recorder:
        task.answer_held_out(built, tmp_path / "answers.jsonl", "base")
    trained = 4 * made.num_trained
    true_bytes = recorder.trace.peak().num_bytes + 3 * trained  # gradients, and two moments
    assert true_bytes < made.generation_bytes < 1.5 * true_bytes


# --- the cut -----------------------------------------------------------------------------------


def cut_of(config, prepared, world_size, **train):
    given = with_values(config, {f"train.{key}": value for key, value in train.items()})
    made = plan.make_plan(given, sizes(prepared), machine(8 * GIB), world_size)
    lengths = prepared.train.lengths
    ids = batches.global_batch_ids(300, given.train.seed, 0, given.train.global_batch)
    ranks = batches.cut(ids, lengths, world_size, made.budget)
    assert sorted(i for rank in ranks for m in rank for i in m) == sorted(ids)
    assert max(len(m) for rank in ranks for m in rank) == made.micro_batch
    assert {len(rank) for rank in ranks} == {made.micro_batches}
    return made


@pytest.mark.slow
@pytest.mark.parametrize("layout", representatives(["padded", "packed"]))
def test_the_batch_that_was_asked_for_is_made_of_what_was_asked_for(config, prepared, layout):
    given = with_values(config, {"train.layout": layout})
    made = cut_of(given, prepared, 2, micro_batch=4)
    assert (made.micro_batch, made.micro_batches) == (4, 4)  # 32 = 2 x 4 x 4
    made = cut_of(given, prepared, 2, gradient_accumulation_steps=8)
    assert (made.micro_batch, made.micro_batches) == (2, 8)
    made = cut_of(given, prepared, 4, gradient_accumulation_steps=2, micro_batch=4)
    assert (made.micro_batch, made.micro_batches) == (4, 2)
    assert "train.micro_batch" not in made.reasons


def test_every_choice_has_a_reason(config, prepared):
    for train in ({}, {"train.micro_batch": 4}, {"train.gradient_accumulation_steps": 2}):
        made = plan.make_plan(with_values(config, train), sizes(prepared), machine(8 * GIB), 1)
        assert all(made.reasons.values())
        assert not set(train) & set(made.reasons)


def test_fewer_tokens_than_the_accumulation_needs_are_refused(config, prepared):
    train = {"gradient_accumulation_steps": 2, "max_tokens": 200}
    with pytest.raises(ConfigError, match="200 tokens do not hold 16 examples"):
        cut_of(config, prepared, 1, **train)


@pytest.mark.thorough("advice on trained weights")
def test_random_weights_are_advised_on_without_adapters(config, prepared, monkeypatch, capsys):
    given = with_values(config, {"model.init": "random", "tuning.mode": "full"})
    work = sizes(prepared)
    made = plan.make_plan(given, work, machine(8 * GIB), 1)
    monkeypatch.setattr(console, "LINE_EVERY", 0)
    found = advice.advise(given, work, machine(8 * GIB), made, console.make_console())
    assert found
    assert not any("tuning.mode" in each.change for each in found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"other settings: 1 of {len(lines)}, ETA ")


def test_a_batch_that_the_processes_cannot_make_is_refused(config, prepared):
    with pytest.raises(
        ConfigError, match=r"3 process\(es\) with 4 micro-batches of 2 make 24 .* 32"
    ):
        cut_of(config, prepared, 3, gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="with 4 micro-batches of 5 make 40 examples, not 32"):
        cut_of(config, prepared, 2, gradient_accumulation_steps=4, micro_batch=5)


# --- elsewhere ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_for_gpus_that_are_not_here(config, prepared):
    devices = gpus.named_gpus("H100-80GB x 8")
    made = plan.make_plan(config, sizes(prepared), replace(machine(8 * GIB), devices=devices), 8)
    assert (made.precision, made.device) == ("bf16", "H100-80GB x 8")
    assert made.available_bytes == devices[0].total_bytes
    assert made.memory.reserved > made.memory.allocated
    assert {"libraries", "attention workspace"} <= set(made.memory.breakdown)
    time = made.time
    assert time is not None
    assert time.seconds > 0
    assert "kernel launches" in report._time(made, time)
    middle = report.LAUNCH_SECONDS * made.steps * made.micro_batches + 7200
    slow = replace(time, seconds=middle, least=0.7 * middle, most=3 * middle)
    assert "15 to 50 % of the GPU's peak is reached; not measured" in report._time(made, slow)
    old = gpus.named_gpus("T4")
    made = plan.make_plan(config, sizes(prepared), replace(machine(8 * GIB), devices=old), 1)
    assert made.precision == "fp16"
    assert made.time is not None


@pytest.mark.slow
def test_what_would_take_less_takes_less(config, prepared):
    full = with_values(config, {"tuning.mode": "full"})
    work = sizes(prepared)
    made = plan.make_plan(full, work, machine(8 * GIB), 1)
    found = {each.change: each for each in advice.advise(full, work, machine(8 * GIB), made)}
    rungs = [f"train.gradient_checkpointing={kind}" for kind in ("false", "selective", "true")]
    assert [change for change, each in found.items() if each.is_rung] == rungs
    assert [change for change, each in found.items() if each.is_planned] == rungs[:1]
    assert list(found)[3] == "train.optimizer=adamw_8bit"
    assert found[rungs[1]].saved_bytes < found[rungs[2]].saved_bytes
    for change in list(found)[1:4]:
        key, value = change.split("=")
        changed = with_values(full, {"train.gradient_checkpointing": False})
        changed = with_values(changed, {key: value == "true" or value})
        then = plan.make_plan(changed, work, machine(8 * GIB), 1)
        saved = made.memory.reserved - then.memory.reserved
        assert found[change].saved_bytes == pytest.approx(saved, rel=0.01)
    values = report.plan_values(made, list(found.values()))
    assert values["advice"][0]["saved_bytes"] > 0
    assert [each["change"] for each in values["ladder"]] == rungs


@pytest.mark.slow
def test_what_is_kept_in_host_memory_is_counted_for_each_machine(config, prepared, monkeypatch):
    """The state that FSDP2 offloads: weights, gradients and two moments of half the model."""
    changes = {"tuning.mode": "full", "train.engine": "fsdp", "train.offload": True}
    offloaded = with_values(config, changes)
    two = replace(machine(64 * GIB, 8 * GIB), devices=machine(0, 8 * GIB).devices * 2)
    made = plan.make_plan(offloaded, sizes(prepared), two, 2)
    state = 4 * 4 * made.num_trained // 2
    assert made.host == {"offloaded state": pytest.approx(state, rel=0.05)}
    assert made.verdict.startswith("fits")
    shown = report._host(made)
    needed = console.size(2 * made.host_bytes)
    assert f"a machine with 2 processes needs {needed} of {console.size(int(54.4 * GIB))}" in shown
    little = plan.make_plan(offloaded, sizes(prepared), replace(two, ram_available_bytes=state), 2)
    assert little.verdict.startswith("does not fit the host")
    elsewhere = plan.make_plan(offloaded, sizes(prepared), replace(two, is_here=False), 2)
    assert report._host(elsewhere).endswith(f"needs {needed}")


@pytest.mark.parametrize(
    ("tuning", "splits"),
    [
        ({}, True),
        ({"tuning.mode": "full"}, True),
        ({"tuning.mode": "lora", "tuning.lora": {"init_lora_weights": "pissa"}}, False),
        ({"tuning.lora": {"init_lora_weights": "loftq"}, "tuning.lora_alpha": 16}, False),
        ({"tuning.lora": {"use_dora": True}}, False),
        ({"tuning.mode": "lora", "tuning.lora": {"use_dora": True}}, True),
        ({"crowd.num_agents": 2}, False),
    ],
)
def test_adapters_that_are_computed_from_the_base_need_it_whole(config, tuning, splits):
    given = with_values(config, {"tuning.r": 16} | tuning)
    assert task_of(given).info(given).starts_split == splits


def test_a_model_that_cannot_be_traced_gets_a_closed_form(config, prepared, monkeypatch):
    traced = plan.make_plan(config, sizes(prepared), machine(8 * GIB), 1)

    def refuse(*_):
        raise NotImplementedError("no shape rule for this operation\nand more")

    monkeypatch.setattr(memory, "_trace", refuse)
    made = plan.make_plan(config, sizes(prepared), machine(8 * GIB), 1)
    assert made.memory.method.startswith("closed form")
    assert made.memory.method.endswith("no shape rule for this operation")
    assert 0.5 < made.memory.allocated / traced.memory.allocated < 2


MOMENTS = {  # number, and bytes of an element
    "adamw": (2, 4),
    "adamw_8bit": (2, 1),
    "paged_adamw": (2, 4),
    "lion": (1, 4),
    "schedule_free": (2, 4),
    "torch.optim.SGD": (0, 4),
    "bitsandbytes.optim.Lion8bit": (1, 1),
}


@pytest.mark.parametrize("kind", MOMENTS)
def test_the_state_of_an_optimizer_is_measured(config, prepared, kind):
    """Traced where the optimizer takes tensors without data, else that of a real step."""
    given = with_values(config, {"train.optimizer": kind, "tuning.mode": "full"})
    made = plan.make_plan(given, sizes(prepared), machine(8 * GIB), 1)
    (number, width), expected = MOMENTS[kind], 0
    for (shape, _), times in count_parameters(given).shapes.items():
        size = math.prod(shape)
        packed = size + 4 * math.ceil(size / 256)  # a scale for each block
        each = packed if width == 1 and size >= 4096 else 4 * size
        expected += times * number * each
    assert made.memory.method.startswith("traced")
    assert made.memory.breakdown.get("optimizer", 0) == pytest.approx(expected, rel=0.01)
    extra = 4 * made.num_trained if kind == "schedule_free" else 0  # the weights in training
    of_checkpoint = made.disk.checkpoint - made.disk.final
    assert of_checkpoint == pytest.approx(expected + extra, rel=0.01)


def test_the_state_of_muon_and_adafactor_depends_on_the_shapes(config):
    """Muon keeps one moment of matrices in layers; Adafactor their rows and columns."""
    shapes = {((100, 30), False): 2, ((100, 30), True): 1, ((30,), False): 1}
    kinds = ({"train.optimizer": each} for each in ("muon", "adafactor"))
    muon, adafactor = (state_bytes(with_values(config, kind).train, shapes) for kind in kinds)
    assert muon == 4 * (2 * 3000 + 2 * 3000 + 2 * 30)
    assert adafactor == 4 * (3 * 130 + 30)


def test_processes_share_the_memory_of_a_cpu(config, prepared):
    one, four = (plan.make_plan(config, sizes(prepared), machine(8 * GIB), n) for n in (1, 4))
    assert four.available_bytes == one.available_bytes // 4
    assert four.micro_batches <= one.micro_batches


def test_a_value_that_was_given_is_kept(config, prepared):
    given = with_values(config, {"train.max_tokens": 333})
    made = plan.make_plan(given, sizes(prepared), machine(8 * GIB), 1)
    assert made.budget.max_tokens == 333
    assert "train.max_tokens" not in made.reasons


def test_auto_values_and_their_reasons_go_into_the_resolved_configuration(
    config, prepared, tmp_path
):
    made = plan.make_plan(config, sizes(prepared), machine(8 * GIB), 1)
    resolved = with_values(config, plan.resolved_values(made))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(resolved, made.reasons))
    loaded = load_config(path)
    assert loaded == resolved
    assert loaded.train.max_tokens == made.budget.max_tokens
    assert "# auto: " in path.read_text()


def test_the_plan_is_written_with_what_was_measured(config, prepared, tmp_path):
    made = plan.make_plan(config, sizes(prepared), machine(8 * GIB), 1)
    report.write_plan(made, tmp_path / "plan.json", {"training_seconds": 3.0})
    read = json.loads((tmp_path / "plan.json").read_text())
    steps = -(-300 // config.train.global_batch) * config.train.epochs
    assert read["work"]["steps"] == made.steps == steps
    predicted, chosen = read["predicted"], read["chosen"]
    assert predicted["allocated_bytes"] == sum(predicted["breakdown"].values())
    assert chosen["max_tokens"] == made.budget.max_tokens
    assert chosen["gradient_accumulation_steps"] == made.micro_batches
    assert set(chosen) == {*read["reasons"], "activation_offload"}  # this one is not `auto`
    assert read["measured"] == {"training_seconds": 3.0}


def test_packed_layout_only_where_attention_reads_borders(config):
    """`varlen` has its kernel on a GPU in bf16 alone: elsewhere it would be a dense mask."""
    everywhere = [(precision, on_gpu) for precision in ("fp32", "bf16") for on_gpu in (False, True)]
    expected = {"auto": [], "varlen": [("bf16", True)], "flash_attention_2": everywhere}
    for name, packed in expected.items():
        given = with_values(config, {"model.attn_implementation": name})
        for place in everywhere:
            layout, why = choose.resolve_layout(given, *place)
            assert layout == ("packed" if place in packed else "padded")
            assert ("on a GPU, in bf16" in why) == (name == "varlen" and not packed.count(place))
    padded = with_values(config, {"train.layout": "padded"})
    assert choose.resolve_layout(padded, "bf16", True) == ("padded", "configured")


def test_a_plan_packs_with_varlen_for_a_gpu_only(config):
    """Also for one that is not here."""
    asked = {"model.attn_implementation": "varlen", "train.max_tokens": 2000}
    given = with_values(config, asked | {"train.gradient_checkpointing": False})
    work = Workload([20] * 64, np.full(64, 9))
    made = {
        kind: plan.make_plan(given, work, machine(8 * GIB, gpu), 1)
        for kind, gpu in (("cpu", None), ("gpu", 80 * GIB))
    }
    assert {kind: each.budget.layout for kind, each in made.items()} == {
        "cpu": "padded",
        "gpu": "packed",
    }
    assert all(each.memory.method == "traced" for each in made.values())
    assert "in bf16" in made["cpu"].reasons["train.layout"]


def test_a_plan_refuses_an_attention_that_the_model_cannot_have(config, tmp_path):
    BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=64).save_pretrained(tmp_path)
    changes = {"model.name": str(tmp_path), "model.attn_implementation": "varlen"}
    given, work = with_values(config, changes), Workload([20] * 64, np.full(64, 9))
    for gpu in (None, 80 * GIB):
        with pytest.raises(errors.ModelError, match="attn_implementation: varlen expects"):
            plan.make_plan(given, work, machine(8 * GIB, gpu), 1)


@pytest.mark.parametrize(
    ("gib", "keeps", "why"),
    [(8.0, "all", "it fits, and less is exchanged"), (0.0, False, "more does not fit")],
)
def test_fsdp2_keeps_whole_what_memory_allows(config, prepared, gib, keeps, why):
    sharded = with_values(config, {"train.engine": "fsdp"})
    made = plan.make_plan(sharded, sizes(prepared), machine(int(gib * GIB) + 1), 2)
    assert plan.resolved_values(made)["train.keep_whole"] == keeps
    assert made.reasons["train.keep_whole"] == why
    once = plan.make_plan(
        with_values(sharded, {"train.keep_whole": "gradients"}),
        sizes(prepared),
        machine(8 * GIB),
        2,
    )
    assert (made.sent_bytes < once.sent_bytes) == (keeps == "all")
