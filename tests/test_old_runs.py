"""Runs from before version 0.1.0 are evaluated, asked, merged and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import forked
import pytest
from conftest import ROOT, representatives

RUNS = ROOT / "tests/fixtures/runs_before_0.1.0"
FP32 = ("--precision", "fp32")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "runs"
    shutil.copytree(RUNS, folder)
    return folder


def script(name: str, *words: object) -> str:
    done = forked.run(f"scripts/{name}.py", *map(str, words))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", representatives(["qlora", "crowd"]))
def test_an_old_run_has_the_scores_that_it_had(old, kind):
    script("evaluate", "--run", old / kind, "--name", "again", "train.precision=fp32")
    found = json.loads((old / kind / "evaluation/again/metrics.json").read_text())["metrics"]
    stored = json.loads((old / kind / "evaluation/metrics.json").read_text())["tuned"]
    assert found == pytest.approx(stored, rel=1e-4)


def test_an_old_run_of_distillation_plays_the_same_episodes(old):
    script("evaluate", "--run", old / "darkroom", "--name", "again")
    files = ("evaluation/again/metrics.json", "evaluation/metrics.json")
    found, stored = (json.loads((old / "darkroom" / file).read_text()) for file in files)
    assert found["curve"] == pytest.approx(stored["curve"])


@pytest.mark.parametrize("folder", ["qlora", "crowd", "crowd/final_checkpoint/agent1"])
def test_an_old_run_answers(old, folder):
    row = (old / folder.split("/")[0] / "evaluation/predictions.jsonl").read_text().splitlines()[0]
    asked = json.loads(row)
    answer = script("infer", "--model", old / folder, "--prompt", asked["prompt"], *FP32)
    if "agent" not in folder:
        assert answer.strip() == asked["answer"].strip()


@pytest.mark.parametrize(("kind", "part"), [("qlora", []), ("crowd", ["crowd.agent=1"])])
def test_an_old_run_is_merged_and_proven(old, tmp_path, kind, part):
    out = tmp_path / "merged"
    script("merge", "--run", old / kind, "--output", out, "--dtype", "fp32", *part)
    report = json.loads((out / "merge_report.json").read_text())
    assert all(check["ok"] for check in report["checks"].values())
    script("merge", "--test", out, "--run", old / kind)


def test_old_runs_are_compared(old, tmp_path):
    file = tmp_path / "compared.json"
    printed = script("compare", "--a", old / "qlora", "--b", old / "crowd", "--json", file)
    assert "8 examples" in printed
    assert json.loads(file.read_text())["num_examples"] == 8
