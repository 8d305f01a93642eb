"""The plan: exact counts, values for `auto` with their reasons, and what it says of memory."""

from __future__ import annotations

import json

import pytest
import torch
from allocations import allocated_bytes
from conftest import ROOT

from sft import batching, engine, finetune, hardware, model, plan, prepare, rehearsal
from sft.config import Config, dump_config, load_config, with_values
from sft.log import Log

GIB = 2**30


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(ROOT / "configs/nano.yaml")


@pytest.fixture(scope="module")
def prepared(config) -> prepare.Prepared:
    return prepare.prepare(with_values(config, {"data.max_rows": 300}))


def machine(ram_bytes: int, gpu_bytes: int | None = None) -> hardware.Hardware:
    gpu = hardware.Device(0, "a GPU", gpu_bytes or 0, gpu_bytes, True, (9, 0))
    return hardware.Hardware(
        [gpu] if gpu_bytes else [], "a CPU", 2, ram_bytes, ram_bytes, True, 100 * GIB, None
    )


def test_counts_are_those_of_the_data_and_of_the_model(config, prepared):
    made = plan.make_plan(config, prepared, machine(8 * GIB), 1)
    assert made.num_examples == 300
    assert made.tokens_per_epoch == sum(len(example.ids) for example in prepared.train)
    built = model.build(config, "fp32", torch.device("cpu"))
    shares = model.shares(built)
    assert made.num_parameters == sum(s.num_parameters for s in shares)
    assert made.num_trained == sum(s.num_parameters for s in shares if s.trained)
    storages = [tensor.untyped_storage() for tensor in rehearsal.held(built)]
    assert made.memory.weights == sum({s._cdata: s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_fixed_memory_by_mode(config, prepared, mode):
    made = plan.make_plan(with_values(config, {"tuning.mode": mode}), prepared, machine(8 * GIB), 1)
    assert made.memory.method == "traced"
    assert made.memory.gradients == 4 * made.num_trained  # two micro-batches: all at the peak
    # Two moments, and a count of steps for each tensor.
    assert 8 * made.num_trained < made.memory.optimizer < 8.01 * made.num_trained
    assert (made.num_trained == made.num_parameters) == (mode == "full")


def test_the_budget_is_what_fits_what_saturates_or_the_longest(config, prepared):
    longest = max(len(example.ids) for example in prepared.train)
    roomy = plan.make_plan(config, prepared, machine(64 * GIB), 1)
    assert roomy.budget.max_tokens == plan.SATURATING_TOKENS["cpu"]
    tight = plan.make_plan(config, prepared, machine(100 * 2**20), 1)
    assert longest < tight.budget.max_tokens < plan.SATURATING_TOKENS["cpu"]
    assert tight.memory.total < 100 * 2**20
    hopeless = plan.make_plan(config, prepared, machine(2**20), 1)
    assert hopeless.budget.max_tokens == longest
    assert "longest" in hopeless.reasons["train.max_tokens"]


def memory_at(tokens: int) -> plan.Memory:
    return plan.Memory(1000, 100, 200, 10 * tokens, 5 * tokens, 0, "traced")


def test_memory_between_two_traces_lies_on_their_line():
    line = plan.Line(memory_at(100), memory_at(500), 100, 500)
    assert line.at(300) == memory_at(300)
    assert line.fits(memory_at(417).total) == 417
    assert line.fits(memory_at(600).total) == 600
    assert line.fits(0) < 0


def test_a_micro_batch_between_the_traced_ones_takes_what_the_line_says(config):
    given = with_values(config, {"tuning.mode": "lora", "train.gradient_checkpointing": True})
    shape = rehearsal.Shape(rows=16, length=60, supervised=25, micro_batches=2)
    line = plan._memory(given, torch.nn.Module(), "fp32", shape)
    for rows in (2, 9):
        part = rehearsal.Shape(rows=rows, length=60, supervised=25, micro_batches=2)
        true = rehearsal.rehearse(given, "fp32", part).peak().num_bytes
        assert true <= line.at(part.tokens).total + 6  # each part is rounded up
        assert line.at(part.tokens).total == pytest.approx(true, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"tuning.mode": "full"}, {"train.gradient_checkpointing": True}]
)
def test_the_planned_memory_is_what_the_first_step_allocates(config, prepared, changes):
    given = with_values(config, changes)
    made = plan.make_plan(given, prepared, machine(8 * GIB), 1)
    alone = rehearsal.Alone("fp32")
    built = model.build(given, "fp32", rehearsal.CPU)
    task = finetune.FineTune(given, prepared, built, alone, Log(None), made.budget)  # type: ignore[arg-type]
    trained = engine.Engine(task, given.train, alone, Log(None), made.budget)  # type: ignore[arg-type]
    trained.optimizer_step()  # now there is a state of the optimizer
    trained.optimizer.zero_grad()
    true_bytes = allocated_bytes(trained)
    assert true_bytes < made.memory.total * 1.001
    assert made.memory.total == pytest.approx(true_bytes, rel=0.05)


def test_a_model_that_cannot_be_traced_gets_a_closed_form(config, prepared, monkeypatch):
    traced = plan.make_plan(config, prepared, machine(8 * GIB), 1)

    def refuse(*_):
        raise NotImplementedError("no shape rule for this operation\nand more")

    monkeypatch.setattr(plan, "_peak", refuse)
    made = plan.make_plan(config, prepared, machine(8 * GIB), 1)
    assert made.memory.method.startswith("closed form")
    assert made.memory.method.endswith("no shape rule for this operation")
    assert 0.5 < made.memory.total / traced.memory.total < 2


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw"])
def test_the_state_of_optimizers_of_bitsandbytes(config, prepared, kind):
    given = with_values(config, {"train.optimizer": kind})
    made = plan.make_plan(given, prepared, machine(8 * GIB), 1)
    each = plan.ADAM_BYTES[kind]
    assert made.memory.optimizer == pytest.approx(each * made.num_trained, rel=0.01)


def test_processes_share_the_memory_of_a_cpu(config, prepared):
    one, four = (plan.make_plan(config, prepared, machine(8 * GIB), n) for n in (1, 4))
    assert four.available_bytes == one.available_bytes // 4
    assert four.micro_batches <= one.micro_batches


def test_a_value_that_was_given_is_kept(config, prepared):
    given = with_values(config, {"train.max_tokens": 333})
    made = plan.make_plan(given, prepared, machine(8 * GIB), 1)
    assert made.budget.max_tokens == 333
    assert "train.max_tokens" not in made.reasons


def test_auto_values_and_their_reasons_go_into_the_resolved_configuration(
    config, prepared, tmp_path
):
    made = plan.make_plan(config, prepared, machine(8 * GIB), 1)
    resolved = with_values(config, plan.resolved_values(made))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(resolved, made.reasons))
    loaded = load_config(path)
    assert loaded == resolved
    assert loaded.train.max_tokens == made.budget.max_tokens
    assert "# auto: " in path.read_text()


def test_the_plan_is_written_with_what_was_measured(config, prepared, tmp_path):
    made = plan.make_plan(config, prepared, machine(8 * GIB), 1)
    plan.write(made, tmp_path / "plan.json", {"training_seconds": 3.0})
    read = json.loads((tmp_path / "plan.json").read_text())
    assert read["steps"] == made.steps == -(-300 // config.train.global_batch) * config.train.epochs
    assert read["measured"] == {"training_seconds": 3.0}


def test_packed_layout_only_where_attention_reads_borders(config):
    assert plan.resolve_layout(config)[0] == "padded"
    flash = with_values(config, {"model.attn_implementation": "flash_attention_2"})
    assert plan.resolve_layout(flash)[0] == "packed"
    padded = with_values(config, {"train.layout": "padded"})
    assert plan.resolve_layout(padded) == ("padded", "configured")


def test_the_first_step_is_cut_as_the_plan_says(config, prepared):
    made = plan.make_plan(config, prepared, machine(100 * 2**20), 2)
    lengths = [len(example.ids) for example in prepared.train]
    ids = batching.global_batch_ids(300, config.train.seed, 0, config.train.global_batch)
    cuts = batching.cut(ids, lengths, 2, made.budget)
    assert [len(rank) for rank in cuts] == [made.micro_batches] * 2
