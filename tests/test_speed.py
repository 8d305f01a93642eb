"""Time from the speed of earlier runs on the device, else as a range; and what a run costs."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from sft import commands
from sft.plan import calibration, report, speed
from sft.plan.memory import Memory

KIND = speed.Kind("lora", "bf16", 8_000_000_000)
H100, PEAK = "H100-80GB", 989e12
PLAN: Any = SimpleNamespace(is_question=False, steps=10, micro_batches=1)


def predicted(folder, kind=KIND, gpu=H100, device=f"{H100} x 2", world_size=2):
    return speed.predict_time(PEAK * 3600, folder, device, gpu, world_size, kind)


def test_a_gpu_without_earlier_runs_has_a_range(tmp_path):
    time = predicted(tmp_path)
    assert (time.runs, time.shares) == (0, pytest.approx((0.15, 0.5)))
    hours = [seconds / 3600 for seconds in (time.least, time.seconds, time.most)]
    assert hours == pytest.approx([1 / 2 / 0.5, 1 / 2 / 0.35, 1 / 2 / 0.15])
    shown = report._time(PLAN, time)
    assert shown == (
        "1 h 0 min to 3 h 20 min, if 15 to 50 % of the GPU's peak is reached; "
        "not measured on this GPU"
    )
    assert predicted(tmp_path, replace(KIND, precision="fp32")) is None  # peaks are of bf16
    assert predicted(tmp_path, gpu=None) is None


def test_time_is_that_of_earlier_runs_of_the_kind_on_the_device(tmp_path):
    device = f"{H100} x 2"
    for share in (0.31, 0.38, 0.33):
        speed.append_speed(tmp_path, device, KIND, share * PEAK)
    others = [
        (H100, KIND),  # on another number of GPUs
        (device, replace(KIND, tuning="full")),
        (device, replace(KIND, precision="fp32")),
        (device, replace(KIND, parameters=KIND.parameters // 5)),  # a much smaller model
        (device, replace(KIND, parameters=KIND.parameters * 5)),
    ]
    for name, kind in others:
        speed.append_speed(tmp_path, name, kind, 0.01 * PEAK)
    with (tmp_path / speed.HISTORY).open("a") as file:
        file.write('broken\n[]\n{"device": "H100-80GB x 2"}\n')
    time = predicted(tmp_path)
    assert time.runs == 3
    assert time.shares == pytest.approx((0.31, 0.38))
    seconds = [3600 / 2 / share for share in (0.33, 0.38, 0.31)]
    assert [time.seconds, time.least, time.most] == pytest.approx(seconds)
    assert report._time(PLAN, time) == (
        "about 1 h 30 min (1 h 18 min to 1 h 36 min), from 3 earlier runs on this device at "
        "31 to 38 % of its peak"
    )
    (tmp_path / speed.HISTORY).write_bytes(b"\xff\xfe")
    assert predicted(tmp_path).runs == 0
    speed.append_speed(tmp_path / "missing", device, KIND, 1.0)


def test_a_cpu_has_a_history_and_no_peak(tmp_path):
    kind = replace(KIND, precision="fp32")
    speed.append_speed(tmp_path, "a CPU", kind, 1e15)
    time = speed.predict_time(36e17, tmp_path, "a CPU", None, 1, kind)
    assert time == speed.Time(3600, 3600, 3600, 1)
    assert report._time(PLAN, time) == "about 1 h 0 min, from 1 earlier run on this device"


def test_a_speed_that_is_kept_predicts_the_time_that_was_measured(tmp_path, monkeypatch):
    planner: Any = SimpleNamespace(
        flops=lambda _, recomputed, tokens: (2 + recomputed) * tokens * 1e9,
        speed_kind=lambda _: KIND,
        info=SimpleNamespace(cache=tmp_path),
        config=None,
    )
    monkeypatch.setattr(calibration, "count_parameters", lambda _: None)
    made: Any = SimpleNamespace(
        tokens=5000,
        steps=50,
        rung=SimpleNamespace(checkpointing=True),
        memory=Memory({}, 0, "closed form"),
        device="a CPU",
        world_size=2,
    )
    calibration.keep_speed(made, planner, speed.FEW_STEPS - 1, 3.0)
    assert not (tmp_path / speed.HISTORY).exists()
    calibration.keep_speed(made, planner, 20, 30.0)
    time = speed.predict_time(3 * 5000 * 1e9, tmp_path, "a CPU", None, 2, KIND)
    assert time is not None
    assert time.seconds == pytest.approx(30.0 * 50 / 20)


@pytest.mark.parametrize(
    ("sizes", "spans"),
    [
        ({}, [99, 99]),
        ({"sliding_window": 4}, [4, 4]),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}, [4, 99]),
        ({"layer_types": ["chunked_attention"] * 2, "attention_chunk_size": 5}, [5, 5]),
        ({"layer_types": ["linear_attention", "full_attention"]}, [0, 99]),
        ({"num_attention_heads": None}, [0, 0]),
    ],
)
def test_attention_compares_a_token_with_those_before_it(sizes, spans):
    """Two products of a query, each of as many multiplications and additions as it has features."""
    shape = {"num_attention_heads": 3, "head_dim": 8, "num_hidden_layers": 2, "hidden_size": 24}
    lengths = [7, 20, 1]
    pairs = sum(min(i + 0.5, span) for n in lengths for i in range(n) for span in spans)
    expected = 2 * 2 * 3 * 8 * pairs / sum(lengths)
    found = speed.attention_flops(SimpleNamespace(**(shape | sizes)), lengths)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.thorough("times and traffic, from which the cost is computed")
@pytest.mark.slow
def test_what_a_run_costs(tmp_path, shared, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sft.plan.advice.advise", lambda *_: [])  # traces eleven other settings
    model, out = shared / "data/model_configs/Llama-3.2-1B.json", tmp_path / "plan.json"
    given = ["--model", str(model), "--seq", "2048", "--json", str(out)]
    commands.run("plan", [*given, "--gpu=H100-80GB x 2", "--cost-per-hour=2.5", "--link=50"])
    said = " ".join(capsys.readouterr().out.split())
    assert "at 2.50 an hour x 2" in said
    values = json.loads(out.read_text())["predicted"]
    expected = [2 * 2.5 * values["time"][end] / 3600 for end in ("least", "most")]
    assert values["cost"] == pytest.approx(expected)
    trained = json.loads(out.read_text())["work"]["num_trained"]
    assert values["traffic"]["sent_bytes"] == 4 * trained  # all-reduced by two: 2 * 1 / 2 times
    assert "each process sends" in said
    assert " s at 50 GB/s" in said
