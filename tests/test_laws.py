"""Law 1: the cut of a global batch changes speed and memory, never loss or gradient.

Every result is compared with `tiny.reference`, a loop of one example at a time that shares no code
with the engine. A quarter of the examples have no supervised token, so some micro-batches and some
ranks have none either.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import forked
import law_worker
import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.data import batches, template

WORKER = "tests/support/law_worker.py"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SEEDS = [1, 2]


def step(model, rows, budget, folder, **train):
    engine = tiny.make_engine(
        model, rows, rows, tiny.config(folder, global_batch=len(rows), **train), budget
    )
    return engine, engine.optimizer_step()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10_000),
    number=st.integers(1, 12),
    max_tokens=st.integers(1, 300),
    layout=st.sampled_from(["padded", "packed"]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_cut_into_micro_batches_gives_the_same_loss_and_gradient(
    tmp_path, seed, number, max_tokens, layout, dtype
):
    rows = tiny.examples(seed, number)
    if not any(example.num_supervised for example in rows):
        return
    loss, gradients = tiny.reference(tiny.llama(dtype), rows)
    model = tiny.llama(dtype)
    _, values = step(model, rows, batches.Budget(max_tokens, layout), tmp_path)
    assert values["train/loss"] == pytest.approx(loss, rel=TOLERANCE[dtype])
    assert tiny.relative_error([p.grad for p in model.parameters()], gradients) < TOLERANCE[dtype]


def test_padding_changes_nothing(tmp_path):
    """The same example alone and beside one three times as long."""
    short = tiny.examples(3, 1, longest=8)[0]
    long = template.Example(ids=[5] * 30, labels=[template.IGNORED] * 30)
    models = [tiny.llama(torch.float64) for _ in range(2)]
    step(models[0], [short], batches.Budget(10_000, "padded"), tmp_path)
    step(models[1], [short, long], batches.Budget(10_000, "padded"), tmp_path)
    gradients = [[p.grad for p in model.parameters()] for model in models]
    assert tiny.relative_error(*gradients) < 1e-12


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_token_weights_obey_the_law_however_small_they_are(tmp_path, layout, max_tokens):
    random = np.random.default_rng(5)
    rows = [
        replace(row, weights=(random.random(len(row.ids)) * 1e-3).tolist())
        for row in tiny.examples(5, 9)
    ]
    model = tiny.llama(torch.float64)
    loss, gradients = tiny.reference(model, rows)
    _, values = step(model, rows, batches.Budget(max_tokens, layout), tmp_path)
    assert values["train/loss"] == pytest.approx(loss, rel=1e-12)
    assert tiny.relative_error([p.grad for p in model.parameters()], gradients) < 1e-12


def test_a_batch_without_supervised_tokens_is_defined(tmp_path):
    nothing = [template.Example(ids=[3, 4, 5], labels=[template.IGNORED] * 3)]
    model = tiny.llama()
    _, values = step(model, nothing, batches.Budget(10, "padded"), tmp_path)
    assert values["train/loss"] == 0
    assert all(p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("world", [3])
@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_loss_and_gradient(tmp_path, world):
    reported = forked.launch(world, [WORKER, str(tmp_path), *map(str, SEEDS)])
    files = sorted(tmp_path.glob("rank*.json"))
    assert len(files) == world, reported
    ranks = [json.loads(file.read_text()) for file in files]
    for seed in SEEDS:
        rows, held_out = tiny.examples(seed, 13), tiny.examples(seed + 100, 9)
        for name, dtype in {"fp32": torch.float32, "fp64": torch.float64}.items():
            model = tiny.llama(dtype)
            loss, gradients = tiny.reference(model, rows)
            held_out_loss, _ = tiny.reference(model, held_out)
            flat = [torch.cat([g.double().flatten() for g in gradients])]
            cases = [r for rank in ranks for r in rank if r["case"][:2] == [seed, name]]
            assert len(cases) == world * 6  # layouts x budgets
            for result in cases:
                assert result["world_size"] == world
                tolerance = TOLERANCE[dtype]
                assert result["loss"] == pytest.approx(loss, rel=tolerance), result["case"]
                assert result["held_out_loss"] == pytest.approx(held_out_loss, rel=tolerance)
                found = [torch.tensor(result["gradients"], dtype=torch.float64)]
                assert tiny.relative_error(found, flat) < tolerance, result["case"]
        settings_ = law_worker.configured("crowd", tmp_path)
        crowd = law_worker.built("crowd", settings_, torch.float64)
        cases = [r for rank in ranks for r in rank if r["case"][:2] == [seed, "crowd"]]
        assert len(cases) == world * 6
        [seed_of_step] = {result["seed"] for result in cases}
        loss, gradients = tiny.crowd_reference(crowd, rows, settings_, seed_of_step)
        flat = [torch.cat([g.flatten() for g in gradients])]
        for result in cases:
            assert result["loss"] == pytest.approx(loss, rel=1e-10), result["case"]
            found = [torch.tensor(result["gradients"], dtype=torch.float64)]
            assert tiny.relative_error(found, flat) < 1e-10, result["case"]
        assert len({round(result["held_out_loss"], 10) for result in cases}) == 1


def test_evaluation_obeys_the_same_law(tmp_path):
    held_out = tiny.examples(7, 11)
    expected, _ = tiny.reference(tiny.llama(torch.float64), held_out)
    for layout in ("padded", "packed"):
        for max_tokens in (1, 50, 10_000):
            settings_ = tiny.config(Path(tmp_path), global_batch=4)
            budget = batches.Budget(max_tokens, layout)
            engine = tiny.make_engine(
                tiny.llama(torch.float64), held_out, held_out, settings_, budget
            )
            found = engine.task.evaluate(engine.model)["loss"]
            assert found == pytest.approx(expected, rel=1e-12)
