"""benchmarks/gpu.sh is rehearsed on tiny shapes, so that it runs at the first try on a lent GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import forked
import pytest
from conftest import ROOT, run

PARTS = ("machine", "speed", "memory", "variants", "attention", "inference", "tests")


def summarise(folder: Path, parts: str, **rows: list[dict]) -> str:
    (folder / "parts.txt").write_text(parts)
    for part, each in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in each)
        (folder / f"{part}.jsonl").write_text(lines + '{"who": "cut of')  # a kill comes at any time
    done = run(".venv/bin/python", "benchmarks/gpu_summary.py", str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout


def speed(who: str, tokens: float, what: str = "rows of 4,096 tokens, packed") -> dict:
    return {"who": who, "what": f"8B lora, {what}", "tokens_per_second": tokens}


def test_the_limits_of_all_parts_are_eight_minutes():
    script = (ROOT / "benchmarks/gpu.sh").read_text("utf-8")
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", script))
    assert sum(map(int, limits.values())) <= 480
    default = re.search(r"PARTS=\$\{PARTS:-(.*)\}", script)
    assert default is not None
    assert sorted(default[1].split()) == sorted(limits)
    assert {*limits} == {*PARTS, "resume"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], ["bar: not measured"]),
        ([speed("ours", 12_000)], ["bar 1.*12,000, met", "bar 2.*no peer was measured"]),
        ([speed("ours", 11_999)], ["bar 1.*11,999, NOT met"]),
        (
            [speed("ours", 13_000), speed("TRL", 5_000), speed("TRL with Liger, packing", 10_000)],
            ["bar 2.*TRL with Liger, packing.*1.30, met"],
        ),
        ([speed("ours", 13_000), speed("TRL", 11_000)], ["bar 2.*1.18, NOT met"]),
        ([speed("ours", 99_999, "conversations, packed")], ["bar: not measured"]),
    ],
)
def test_the_bar_is_that_of_the_large_shape(tmp_path, rows, expected):
    printed = summarise(tmp_path, "speed 0 3\n", speed=rows)
    for pattern in expected:
        assert re.search(pattern, printed), printed
    assert json.loads((tmp_path / "results.json").read_text())["speed"]["rows"] == rows


def test_what_a_part_measured_before_it_failed_or_ran_out_of_time_is_kept(tmp_path):
    memory = {"what": "8B qlora, rows of 2048", "planned_rows": 9, "planned_fits": False}
    rows = [{"reserved_error": -0.1}, {"reserved_error": 0.3}, memory | {"most_rows": 7}]
    parts = "memory 124 100\nspeed 1 9\ntests 0 5\n"
    printed = summarise(tmp_path, parts, memory=rows, speed=[{"failed": "OutOfMemoryError: 3"}])
    assert "memory: ran out of time after 100 s, 3 measurements" in printed
    assert "planned 9 rows, which does NOT fit; 7 run" in printed
    assert "speed: failed with 1 after 9 s" in printed
    assert "FAILED: OutOfMemoryError: 3" in printed
    assert "tests: ended after 5 s, 0 measurements" in printed
    assert "reserved memory, 2 steps: median error 20.0%, worst 30.0%" in printed


def test_an_unknown_part_is_refused_before_any_runs(tmp_path):
    done = run("benchmarks/gpu.sh", OUT=str(tmp_path), PARTS="machine sped", REHEARSE="1")
    assert done.returncode == 2
    assert "no part is called sped" in done.stderr
    assert not (tmp_path / "machine.txt").exists()


@pytest.mark.slow
def test_the_script_runs_a_part(tmp_path):
    limit = {"LIMIT_machine": "600"}  # this machine may be busy
    done = run("benchmarks/gpu.sh", OUT=str(tmp_path), PARTS="machine", REHEARSE="1", **limit)
    assert done.returncode == 0, done.stderr
    assert "a rehearsal" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["machine"]["rows"]


@pytest.mark.thorough("the first part, by the same lines of the script")
@pytest.mark.slow
def test_every_part_runs_on_tiny_shapes(tmp_path):
    """The script itself runs one part of each of its two programs. The other parts, which it starts
    by the same line as the first, are forked: each would import for six seconds. verify-resume
    takes minutes on a CPU and has tests of its own."""
    by_script = ("machine", "tests")
    limits = {f"LIMIT_{part}": "600" for part in by_script}  # this machine may be busy
    named = {"OUT": str(tmp_path), "PARTS": " ".join(by_script), "REHEARSE": "1"}
    done = run("benchmarks/gpu.sh", **named, **limits)
    assert done.returncode == 0
    assert "a rehearsal" in done.stdout
    assert re.search(r"\d passed, 2 skipped", (tmp_path / "tests.txt").read_text("utf-8"))
    environment = {"PYTHONPATH": str(ROOT / "benchmarks"), "SFT_TEST_GPU": "rehearse"}
    for part in sorted({*PARTS} - {*by_script}):
        done = forked.run("benchmarks/gpu.py", part, "--out", str(tmp_path), **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        with (tmp_path / "parts.txt").open("a") as ended:
            ended.write(f"{part} {done.returncode} 1\n")
    summary = run(".venv/bin/python", "benchmarks/gpu_summary.py", str(tmp_path))
    assert summary.returncode == 0, summary.stderr
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert {part: each["exit_code"] for part, each in found.items()} == dict.fromkeys(PARTS, 0)
    assert not [row for part in found.values() for row in part["rows"] if "failed" in row]
    assert all(found[part]["rows"] for part in PARTS if part != "tests")
