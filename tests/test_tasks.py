"""A task that the package does not know runs through all verbs, with one line in the registry."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import toy_task
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS, MIDDLE = 6, 3


def start(verb: str, *arguments: str) -> str:
    """Runs the script of a verb with the toy task in the registry; returns what it prints."""
    done = forked.run("tests/support/toy_worker.py", f"scripts/{verb}.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def configured(folder: Path) -> list[str]:
    file = folder / "toy.yaml"
    lines = ["task: toy", "train:", f"  output_dir: {folder / 'run'}", "  global_batch: 8"]
    lines += ["  learning_rate: 0.01", f"  max_steps: {STEPS}", f"  save_steps: {MIDDLE}"]
    file.write_text("\n".join([*lines, f"  eval_steps: {MIDDLE}"]) + "\n")
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("toy")
    said = start("train", *configured(folder))
    assert f"step     {STEPS}/{STEPS}" in said
    return folder / "run"


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Returns what does not depend on time, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        kept = {k: v for k, v in values.items() if k.startswith(("train/", "eval/", "data/"))}
        found.setdefault(values["step"], {}).update(kept)
    return found


def test_it_is_a_task_of_sixty_lines():
    lines = Path(toy_task.__file__).read_text("utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 60


def test_it_is_planned_and_checked_before_it_runs(tmp_path):
    config = configured(tmp_path)
    plan = start("plan", *config, "--json", str(tmp_path / "plan.json"))
    assert "64 to train on, 16 held out" in plan
    assert "49 of 49 parameters" in plan
    assert "(traced" in plan  # what earlier runs took may follow
    checked = start("check", *config)
    assert "NOT OK" not in checked
    assert "checkpoint: saved, verified and read back" in checked


def test_it_learns_and_says_so(run):
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", STEPS)
    found = metrics(run)
    assert found[STEPS]["eval/loss"] < found[MIDDLE]["eval/loss"]
    assert found[STEPS]["train/absolute_error"] > 0
    written = json.loads((run / "evaluation/metrics.json").read_text())["metrics"]
    assert written["loss"] == found[STEPS]["eval/loss"]


def test_resumed_equals_uninterrupted_bit_for_bit(run, tmp_path):
    resume = f"train.resume_from_checkpoint={run / f'checkpoint_step_{MIDDLE}'}"
    start("train", *configured(tmp_path), resume)
    again = metrics(tmp_path / "run")
    whole = metrics(run)
    assert again == {step: whole[step] for step in range(MIDDLE + 1, STEPS + 1)}
    first, second = (
        load_file(each / "final_checkpoint/model.safetensors") for each in (run, tmp_path / "run")
    )
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_a_finished_run_is_evaluated_in_another_process(run):
    said = start("evaluate", "--run", str(run), "--name", "again")
    found = json.loads((run / "evaluation/again/metrics.json").read_text())["metrics"]
    assert found == json.loads((run / "evaluation/metrics.json").read_text())["metrics"]
    assert f"loss {found['loss']:.4g}" in said
