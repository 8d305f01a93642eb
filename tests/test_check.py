"""`make check`: every finding is a line, the exit code says so; only prepared data are kept."""

from __future__ import annotations

import shutil

import families
import pytest
from conftest import ROOT

from sft import check
from sft.config.load import load_config, with_values
from sft.runtime import hardware
from sft.tasks.distill import histories, source
from sft.tasks.registry import load_run

# Caches; and outputs/, where tests beside this one write. The run's folder is asked for by name.
OF_OTHERS = {".git", ".venv", ".cache", "__pycache__", ".hypothesis", ".pytest_cache", "outputs"}


def files() -> set:
    return {
        (path, path.stat().st_mtime)
        for path in ROOT.rglob("*")
        if path.is_file() and not OF_OTHERS & set(path.parts)
    }


@pytest.mark.slow
def test_a_sound_configuration_passes_and_leaves_no_file(tmp_path, run_script):
    before, run = files(), tmp_path / "run"
    done = run_script("check.py", f"train.output_dir={run}")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for what in ("Python", "packages", "device", "configuration", "precision", "write access"):
        assert any(line.startswith("ok") and what in line for line in lines), what
    for what in ("tokenizer and template", "data:", "disk", "one training step"):
        assert any(line.startswith("ok") and what in line for line in lines), what
    assert "NOT OK" not in done.stdout
    assert max(map(len, lines)) <= 100
    assert files() == before
    assert not run.exists()


@pytest.mark.slow
def test_an_accumulation_that_the_run_can_make_is_sound(run_script):
    done = run_script("check.py", "train.micro_batch=4", "train.gradient_accumulation_steps=8")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lr=1"], "unknown key"),
        (["data.train_path=missing.jsonl"], "missing.jsonl"),
        (["model.name=missing"], "cannot load 'missing'"),
        (["train.output_dir=/proc/nothing"], "cannot write"),
    ],
)
@pytest.mark.slow
def test_a_fault_is_a_finding_with_a_remedy_and_exit_code_2(run_script, overrides, message):
    done = run_script("check.py", *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "NOT OK" in done.stdout
    assert message in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr


def test_versions_are_compared_with_those_that_are_needed():
    found = check.packages(["rich==0.0.1", "no-such-package>=1.0", 'other==1; extra == "dev"'])
    assert not found.ok
    assert "rich: expected ==0.0.1, found" in found.what
    assert "no-such-package: expected >=1.0, found nothing" in found.what
    assert "other" not in found.what
    pins = check.needed_packages()
    assert "torch==2.13.0" in pins
    assert check.packages(pins).ok


def test_emulated_bf16_is_a_finding():
    config = with_values(load_config(ROOT / "configs/nano.yaml"), {"train.precision": "bf16"})
    machine = check.hardware.detect()
    assert check.precision(config, machine).ok == machine.cpu_bf16 or machine.devices


@pytest.mark.thorough("the default task")
@pytest.mark.slow
def test_a_crowd_is_tried_out_before_it_is_trained(tmp_path):
    run = f"train.output_dir={tmp_path / 'run'}"
    config = load_config(ROOT / "configs/crowd_nano.yaml", [run, "train.precision=fp32"])
    found = list(check.trial(config))
    assert all(finding.ok for finding in found), found
    reported = [finding.what.split(":")[0] for finding in found]
    assert reported == [
        *("Accelerate", "model", "one training step"),
        *("checkpoint", "diversity", "aggregated generation"),
    ]
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".check_*"))


@pytest.mark.thorough("the default task")
@pytest.mark.slow
def test_distillation_is_tried_before_it_is_trained(tmp_path, monkeypatch):
    """With its histories, and without: then on blank ones, and nothing is collected."""
    monkeypatch.setattr(hardware, "usable_cores", lambda: 1)
    monkeypatch.setattr(source, "EPOCHS", 1)
    sizes = ["distill.num_streams=2", "distill.held_out_streams=1", "distill.num_steps=260"]
    folders = [f"distill.data_dir={tmp_path}/rooms", f"train.output_dir={tmp_path}/run"]
    given = "configs/ad_darkroom.yaml", [*sizes, *folders, "train.precision=fp32"]

    def checked() -> dict[str, check.Finding]:
        found = check._findings(*given)
        return {finding.what.split(":")[0]: finding for finding in found}

    found = checked()
    assert list(found)[-7:] == [
        *("histories", "disk", "Accelerate", "model"),
        *("one training step", "checkpoint", "in context"),
    ]
    assert all(finding.ok for finding in found.values()), found
    assert "73 goals x 2 streams x 260 steps are collected" in found["histories"].what
    assert "blank histories" in found["in context"].what
    assert not [*tmp_path.iterdir()]

    settings = load_run(*given).distill
    folder = histories.collect(settings)
    found = checked()
    assert found["histories"].what.endswith(f"73 goals x 2 streams x 260 steps in {folder}")
    assert "blank" not in found["model"].what
    assert {path.name for path in tmp_path.iterdir()} == {"rooms"}
    histories.path_of(folder, 41).write_text("torn")
    *_, last = checked().values()
    assert not last.ok
    assert "goal_4_5.parquet" in last.what
    given[1].append("distill.data_dir=/proc/nothing")
    *_, last = checked().values()
    assert not last.ok
    assert "set distill.data_dir" in last.what


@pytest.mark.slow
def test_processes_that_cannot_share_rows_are_found_before_a_launch(tmp_path):
    """The proof needs no other process: nano passes, a model with convolutions does not."""
    given = [f"train.output_dir={tmp_path}/run", "train.precision=fp32"]
    given += ["evaluation.num_examples=0"]

    def checked(*overrides: str) -> list[check.Finding]:
        file = ROOT / "configs/nano.yaml"
        return list(check._findings(str(file), [*given, *overrides]))

    found = checked("train.context_parallel=2")
    assert all(finding.ok for finding in found), found
    proof = "train.context_parallel: 2 processes that share a row compute what one would"
    assert proof in [finding.what for finding in found]

    families.tiny_model("lfm2").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "nano/model" / name, tmp_path)
    *_, last = checked("train.context_parallel=2", f"model.name={tmp_path}")
    assert not last.ok
    assert "processes cannot share sequences of this model" in last.what


def test_one_agent_alone_is_not_trained(tmp_path):
    given = ["crowd.agent=1", f"train.output_dir={tmp_path}/run"]
    *_, last = check._findings(str(ROOT / "configs/crowd_nano.yaml"), given)
    assert not last.ok
    assert last.what.startswith("crowd.agent: all agents")


@pytest.mark.thorough("a sound configuration here")
@pytest.mark.slow
def test_text_that_asks_nothing_is_tried_without_an_answer(tmp_path):
    text = ROOT / "nano/README.md"
    for name in ("train.txt", "held_out.txt"):
        (tmp_path / name).write_text(text.read_text()[: 2000 if name == "train.txt" else 500])
    changes = {"data.train_path": "train.txt", "data.eval_path": "held_out.txt"}
    changes = {key: str(tmp_path / value) for key, value in changes.items()}
    changes |= {"train.output_dir": str(tmp_path / "run"), "data.on_long": "truncate"}
    found = list(check.trial(with_values(load_config(ROOT / "configs/nano.yaml"), changes)))
    assert found[-1].what == "generation: no held-out row asks for an answer"
    assert found[-1].ok
