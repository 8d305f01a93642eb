"""The heaviest micro-batch is tried before step 1; what was measured is remembered."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import ROOT

from sft.config.load import load_config, with_values
from sft.data import batches, cache
from sft.data.batches import Budget
from sft.errors import UserError
from sft.models import load
from sft.plan import calibration, dry_run, gpus, plan, records, report
from sft.runtime import hardware
from sft.runtime.log import Log
from sft.runtime.processes import Context
from sft.tasks.sft.task import FineTune
from sft.train.engine import Engine


@pytest.fixture
def engine(tmp_path):
    rows = tiny.examples(0, 16)
    made = tiny.make_engine(
        tiny.llama(), rows, rows, tiny.config(tmp_path, global_batch=16), Budget(200, "padded")
    )
    made.log = tiny.Said()
    return made


def heaviest(engine):
    lengths = engine.task.lengths

    def of(budget):
        (cuts,) = batches.cut(range(16), lengths, 1, budget)
        return [max(cuts, key=lambda m: batches.num_tokens(lengths, m, "padded"))] * 2

    return of


def limit_device(engine, most):
    """Makes memory run out beyond so many tokens."""
    real = engine.task.loss

    def loss(model, batch):
        if batch.input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return real(model, batch)

    engine.task.loss = loss


@pytest.mark.slow
def test_a_budget_that_the_device_cannot_hold_shrinks(engine):
    weights = [p.clone() for p in engine.task.model.parameters()]
    longest = max(engine.task.lengths)
    more = calibration.fit_budget(engine, heaviest(engine), 1000)
    assert engine.task.budget == Budget(200, "padded")
    assert not engine.log.lines
    limit_device(engine, 70)
    engine.task.budget = Budget(200, "padded", 64)
    less = calibration.fit_budget(engine, heaviest(engine), 1000)
    assert engine.task.budget == Budget(max(50, longest), "padded", 64)
    assert less < more
    assert (
        "a micro-batch of 200 tokens does not fit the memory: train.max_tokens is 100"
        in (engine.log.lines[0])
    )
    assert all(p.grad is None for p in engine.task.model.parameters())
    pairs = zip(weights, engine.task.model.parameters(), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)
    engine.task.budget = Budget(400, "padded", None, 8)
    calibration.fit_budget(engine, heaviest(engine), 0)
    assert engine.task.budget.max_rows < 8


@pytest.mark.slow
def test_a_device_that_cannot_hold_the_longest_example_is_an_error(engine):
    limit_device(engine, max(engine.task.lengths) - 1)
    message = r"the longest example \(\d+ tokens\) does not fit .* 2.00 GiB"
    with pytest.raises(UserError, match=message):
        calibration.fit_budget(engine, heaviest(engine), 0)


def test_what_is_measured_is_what_the_step_takes(engine):
    micro_batches = [[0, 1, 2], [3, 4, 5, 6]]
    context = Context(engine.accelerator)
    engine = dry_run.DryEngine(engine.task, engine.train, context)
    engine.micro_batches = micro_batches
    measured = calibration.fit_budget(engine, lambda _: micro_batches, 0)
    engine.optimizer_step()  # now there is a state of the optimizer
    engine.optimizer.zero_grad()
    state = sum(t.nbytes for s in engine.optimizer.state.values() for t in s.values())
    assert calibration.fit_budget(engine, lambda _: micro_batches, 10**9) == measured + state
    real = dry_run.record_step(engine).peaks()
    passes = max(peak.num_bytes for name, peak in real.items() if name != "update")
    assert measured + state == pytest.approx(passes, rel=0.001)


@pytest.mark.slow
def test_a_run_whose_device_holds_less_goes_on_with_a_smaller_budget(tmp_path):
    """The plan, the history and the configuration are those of what fits."""
    config = load_config(
        ROOT / "configs/nano.yaml",
        ["data.max_rows=64", f"data.cache_dir={tmp_path}", "train.precision=fp32"],
    )
    prepared = cache.prepare(config)
    machine = replace(hardware.detect(), devices=gpus.named_gpus("H100-80GB"))
    planned = plan.make_plan(config, FineTune.workload(config, prepared), machine, 1)
    resolved = with_values(config, plan.resolved_values(planned))
    alone = dry_run.CpuAccelerator("fp32")
    built = load.build(resolved, "fp32", dry_run.CPU)
    task = FineTune(resolved, prepared, built, planned.budget, Context(alone, tiny.Said()))
    engine = Engine(task, resolved.train, Context(alone, Log(tmp_path / "run")))
    report.write_resolved(resolved, planned, engine.log.folder)
    limit_device(engine, 900)
    smaller, measured = calibration.calibrate(
        engine, planned, resolved, FineTune.workload(config, prepared), machine
    )
    assert task.budget == smaller.budget
    assert smaller.budget.max_tokens < 2000 < planned.budget.max_tokens
    assert smaller.micro_batches > planned.micro_batches
    assert smaller.memory.allocated < planned.memory.allocated
    (line,) = map(json.loads, (tmp_path / records.HISTORY).read_text().splitlines())
    assert line["predicted_bytes"] == smaller.memory.allocated
    assert line["measured_bytes"] == measured["heaviest_micro_batch_bytes"]
    kept = load_config(tmp_path / "run/config.yaml")
    assert kept == with_values(resolved, {"train.max_tokens": smaller.budget.max_tokens})
    written = json.loads((tmp_path / "run/plan.json").read_text())
    assert written == json.loads(json.dumps(report.plan_values(smaller))) | {"measured": None}


def test_history(tmp_path):
    assert records.read_past_runs(tmp_path, "a GPU") is None
    for measured in (990, 1000, 1040):
        records.append_run(tmp_path, "a GPU", 1000, measured)
    records.append_run(tmp_path, "another", 1000, 5000)
    with (tmp_path / records.HISTORY).open("a") as file:
        file.write('broken\n{"device": "a GPU"}\n[]\n{"device": "a GPU", "predicted_bytes": 0, ')
        file.write('"measured_bytes": 1}\n')
    past = records.read_past_runs(tmp_path, "a GPU")
    assert past.runs == 3
    assert (past.least, past.most) == (pytest.approx(-0.01), pytest.approx(0.04))
    for _ in range(records.KEPT_RUNS):
        records.append_run(tmp_path, "a GPU", 1000, 1000)
    assert records.read_past_runs(tmp_path, "a GPU") == records.PastRuns(records.KEPT_RUNS, 0, 0)
    (tmp_path / records.HISTORY).write_bytes(b"\xff\xfe")
    assert records.read_past_runs(tmp_path, "a GPU") is None
    records.append_run(tmp_path / "missing", "a GPU", 1, 1)
