"""Whole runs, as a user starts them: real processes, real files, the embedded model, real data.

Targets of make that train start everything anew; other runs are forked (forked.py), but for the one
that is resumed: two interpreters have unlike seeds of hash(), and the same weights nonetheless.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, representatives, run
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.config.load import load_config
from sft.runtime import checkpoint

pytestmark = pytest.mark.slow

ROWS = ["data.max_rows=240", "data.eval_path=null", "data.eval_fraction=0.1"]
ROWS += ["train.global_batch=8", "train.learning_rate=1e-3"]
STEPS = 5
SHORT = [*ROWS, f"train.max_steps={STEPS}"]
SHORT += ["evaluation.num_examples=4", "evaluation.max_new_tokens=8"]
BRIEF = [*ROWS, "train.max_steps=2", "evaluation.num_examples=0"]


def make(target: str, *overrides: str) -> str:
    """`make TARGET`, as in the README, by two processes where it takes several; returns what it
    reported."""
    arguments = ["make", target, f"ARGS={' '.join(overrides)}"]
    processes = {} if target == "train" else {"NUM_PROCESSES": "2"}
    done = run(*arguments, HF_HOME="/nonexistent", **processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run("scripts/train.py", f"train.output_dir={folder}", *overrides, **environment)


def train_until(step: int, sent: int, folder: Path, *overrides: str) -> int | None:
    """Trains, sends that signal once the step is reported, and returns the exit code."""
    command = ["scripts/train.py", f"train.output_dir={folder}", *overrides, "train.log_steps=1"]
    reported = folder.with_suffix(".reported")
    process = forked.start(1, command, reported)
    while process.is_alive():
        if reported.exists() and f"\nstep {step:5}/" in reported.read_text():
            os.kill(process.pid or 0, sent)
            break
        time.sleep(0.02)
    process.join()
    return process.exitcode


def metrics(folder: Path, key: str = "train/loss") -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def results(folder: Path) -> dict:
    return json.loads((folder / "evaluation/metrics.json").read_text())


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


# --- what the README promises --------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> tuple[Path, str]:
    """`make train`, only into another folder, with a tenth of its training and fewer answers."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    shorter = ["data.max_rows=2000", "train.max_steps=75", "train.global_batch=16"]
    shorter += ["evaluation.num_examples=25"]
    return folder, make("train", f"train.output_dir={folder}", *shorter)


def test_make_train_teaches_the_task(nano):
    found = results(nano[0])
    assert found["base"]["exact_match"] <= 0.02
    assert found["tuned"]["exact_match"] >= 0.3
    assert found["num_examples"] == 25
    assert found["tuned"]["loss"] < 0.1 * found["base"]["loss"]


def test_the_run_shows_machine_plan_answers_and_where_to_go(nano):
    folder, reported = nano
    for part in (
        "cores",
        "steps",
        "memory",
        "frozen",
        "ETA",
        "before:",
        "after:",
        "base",
        "fine-tuned",
        "next",
    ):
        assert part in reported
    assert reported.count("make ") >= 3
    assert max(map(len, reported.splitlines())) <= 100
    found = status(folder)
    assert (found["state"], found["exit_code"], found["reason"]) == ("finished", 0, None)
    assert (found["attempt"], found["checkpoint"]) == (1, "final_checkpoint")
    assert found["step"] == len(metrics(folder))
    assert (folder / "training.log").read_text() in reported + "\n"
    device = json.loads((folder / "plan.json").read_text("utf-8"))["device"]["name"]
    history = ROOT / load_config(folder / "config.yaml").data.cache_dir / "speed.jsonl"
    assert device in history.read_text("utf-8")  # a later plan takes the time from it


def test_the_adapter_loads_with_peft_onto_the_base(nano):
    final = nano[0] / "final_checkpoint"
    assert checkpoint.fault(final) is None
    base = AutoModelForCausalLM.from_pretrained(ROOT / "nano/model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    rows = (nano[0] / "evaluation/predictions.jsonl").read_text().splitlines()
    right = 0
    for row in map(json.loads, rows[:20]):
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=64, do_sample=False)
        answer = tokenizer.decode(
            output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += answer == row["answer"]
    assert right >= 12  # unquantised weights under an adapter for NF4: a little may differ


def test_evaluate_infer_and_merge_use_the_run(nano, tmp_path):
    folder = nano[0]
    tuned = results(folder)["tuned"]
    done = forked.make("evaluate", "ARGS=evaluation.num_examples=25", f"RUN={folder}")
    assert done.returncode == 0, done.stderr
    again = json.loads((folder / "evaluation/evaluate/metrics.json").read_text())["metrics"]
    assert again["exact_match"] == tuned["exact_match"]
    assert again["loss"] == pytest.approx(tuned["loss"], rel=1e-5)

    row = json.loads((folder / "evaluation/predictions.jsonl").read_text().splitlines()[0])
    done = forked.make("infer", f"RUN={folder}", f"PROMPT={row['prompt']}")
    assert done.stdout.strip() == row["answer"], done.stderr

    done = forked.make("merge", f"RUN={folder}", f"OUTPUT={tmp_path / 'merged'}", "DTYPE=fp32")
    assert done.returncode == 0, done.stderr
    checks = json.loads((tmp_path / "merged/merge_report.json").read_text())["checks"]
    assert checks["kl"]["measured"] < 1e-9
    assert all(check["ok"] for check in checks.values())


@pytest.mark.thorough("mode full in test_parallel.py")
def test_full_weights_learn_too(tmp_path):
    """LoRA does below, on real data."""
    more = ["train.max_steps=15", "train.learning_rate=3e-3", "train.global_batch=16"]
    done = train(tmp_path / "run", "tuning.mode=full", *SHORT, *more)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "run")
    assert found["tuned"]["loss"] < 0.5 * found["base"]["loss"]


# --- a real model on real data -------------------------------------------------------------------

REAL = [("rasbt_instruction_data.json", 2.95)]  # file, held-out loss to be reached (nats per token)


def short_rows(path: Path, target: Path, most: int = 600) -> Path:
    """The first rows that surely fit 512 tokens: what is longer stops a run, rightly."""
    text = path.read_text("utf-8")
    rows = json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))
    fitting = [row for row in rows if sum(map(len, row.values())) < 450][:most]
    target.write_text("\n".join(map(json.dumps, fitting)), "utf-8")
    return target


@pytest.mark.thorough("the embedded model here, real data in test_cache.py")
@pytest.mark.parametrize(("file", "reached"), REAL)
def test_a_real_model_on_real_data(tmp_path, shared, file, reached):
    config = tmp_path / "real.yaml"
    data = short_rows(shared / "data/instruct" / file, tmp_path / "rows.jsonl")
    config.write_text(
        f"model: {{name: {shared}/models/stories260K}}\n"
        "tuning: {mode: lora}\n"
        f"data: {{train_path: {data}, max_seq_len: 512}}\n"
        f"train: {{output_dir: {tmp_path}/run, learning_rate: 1e-2, max_steps: 40,\n"
        "  global_batch: 16}\n"
        "evaluation: {num_examples: 4, max_new_tokens: 16}\n"
    )
    done = train(tmp_path / "run", "--config", str(config))
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "run")
    assert found["base"]["loss"] > 1.2 * reached
    assert found["tuned"]["loss"] < reached


# --- several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = train(folder, *SHORT)
    assert done.returncode == 0, done.stderr
    return folder


ENGINES = {
    "train-distributed-tb": "ddp",
    "train-fsdp-tb": "fsdp",
    "train-deepspeed-tb": "deepspeed",
}


@pytest.fixture(scope="module")
def targets(thorough) -> dict[str, tuple[Path, str, list[list[float]]]]:
    """Of each target: its run folder, what it reported, and the losses that TensorBoard serves.

    The first starts everything anew. Of the others, the ranks are forked with the command that
    make would give the launcher, which is the same for every engine.
    """
    made, address, outputs = {}, "", ROOT / "outputs" / f"test-tb-{os.getpid()}"
    try:
        for target in list(ENGINES)[: None if thorough else 1]:
            folder = outputs / target
            start = fork if made else make
            reported = start(target, f"train.output_dir={folder}", *SHORT)
            assert status(folder)["state"] == "finished", reported
            address = address or re.search(r"http://localhost:\d+", reported)[0]
            made[target] = (folder, reported, served(address, f"{outputs.name}/{target}"))
        yield made
    finally:
        stopped = run("make", "tb-stop")
        subprocess.run(["rm", "-rf", str(outputs)], check=True)
    assert stopped.returncode == 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=10)


def fork(target: str, *overrides: str) -> str:
    """`make TARGET` for two processes, without TensorBoard; returns what they reported."""
    printed = run("make", "-n", target, f"ARGS={' '.join(overrides)}").stdout
    tensorboard, train = printed.replace("\\\n", "").splitlines()
    assert " -m sft tensorboard" in tensorboard
    python, *command = shlex.split(train)
    assert python.endswith("/bin/python"), printed
    return forked.launch(2, command)


def served(address: str, name: str) -> list[list[float]]:
    """[time, step, loss] of every step, once TensorBoard has read them: it looks every 5 s."""
    query = urllib.parse.urlencode({"run": f"{name}/tensorboard", "tag": "train/loss"})
    found: list = []
    deadline = time.monotonic() + 60
    while len(found) < STEPS and time.monotonic() < deadline:
        try:
            url = f"{address}/data/plugin/scalars/scalars?{query}"
            found = json.load(urllib.request.urlopen(url, timeout=10))
        except OSError:
            pass
        time.sleep(0.2)
    return found


@pytest.mark.parametrize("target", representatives(ENGINES, 1))
def test_two_processes_give_the_run_of_one_and_tensorboard_serves_it(alone, targets, target):
    folder, reported, points = targets[target]
    assert re.search(rf"processes\s+2 \({ENGINES[target]}\)", reported)
    assert reported.count(f"step     1/{STEPS}") == 1  # output of many ranks comes from one
    assert metrics(folder) == pytest.approx(metrics(alone), rel=1e-4)
    assert results(folder)["base"] == pytest.approx(results(alone)["base"], rel=1e-5)
    tuned = results(folder)["tuned"]["loss"]
    assert tuned == pytest.approx(results(alone)["tuned"]["loss"], rel=1e-4)
    assert [point[1] for point in points] == list(range(1, STEPS + 1))
    assert [point[2] for point in points] == pytest.approx(metrics(folder), rel=1e-6)


@pytest.mark.thorough("groups in test_metrics.py and test_evaluate.py")
def test_scores_are_reported_by_a_column_of_the_rows_on_any_number_of_processes(alone, tmp_path):
    """`kind` is what a request asks for; the first row has none."""
    rows = [json.loads(line) for line in (ROOT / "nano/valid.jsonl").open()][:12]
    kinds = ["", *(json.loads(row["messages"][1]["content"])["call"] for row in rows[1:])]
    reported = [
        row | ({"kind": kind} if kind else {}) for row, kind in zip(rows, kinds, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reported))
    words = ["scripts/evaluate.py", "--run", str(alone), f"data.eval_path={tmp_path}/rows.jsonl"]
    words += ["evaluation.num_examples=12", "evaluation.group=kind"]
    words += ["evaluation.metrics=[exact_match, json_fields]"]
    found = []
    for world in (1, 2):
        log = tmp_path / f"{world}.log"
        forked.start(world, [*words, "--name", f"by-{world}"], log).join()
        folder = alone / f"evaluation/by-{world}"
        assert status(folder)["state"] == "finished", log.read_text()
        assert re.search(r"Scores by kind *\n *kind +examples +exact match", log.read_text())
        found.append(json.loads((folder / "metrics.json").read_text())["groups"])
        answered = map(json.loads, (folder / "predictions.jsonl").open())
        assert [row["group"] for row in answered] == kinds
    assert found[0] == found[1]
    assert {name: own["num_examples"] for name, own in found[0].items()} == Counter(kinds)


# --- stopped and resumed -------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final_checkpoint/adapter_model.safetensors")


@pytest.mark.thorough("test_watchdog.py stops and resumes small runs, test_verify.py whole ones")
def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(tmp_path, alone):
    folder = tmp_path / "run"
    assert train_until(2, signal.SIGTERM, folder, *SHORT) == 75
    assert status(folder)["state"] == "preempted"
    assert len(metrics(folder)) < STEPS
    resume = [f"train.output_dir={folder}", *SHORT, "train.resume_from_checkpoint=auto"]
    done = run(sys.executable, "scripts/train.py", *resume)
    assert done.returncode == 0, done.stderr
    assert metrics(folder) == metrics(alone)
    assert all(torch.equal(value, weights(alone)[name]) for name, value in weights(folder).items())
    assert results(folder) == results(alone)


WANDB = """
import json

class Run:
    def log(self, values, step): open("{file}", "a").write(json.dumps([step, *values]) + "\\n")
    def finish(self): open("{file}", "a").write('"finished"')

def init(project, name): return Run()

class config:
    def update(values, allow_val_change): open("{file}.json", "w").write(json.dumps(values))
"""
SECRETS = {
    "HF_TOKEN": "hf_sEcReT123",
    "WANDB_API_KEY": "wSeCrEt9",
    "AWS_SECRET_ACCESS_KEY": "aSeCrEt7",
}


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> tuple[Path, str, str]:
    """A folder in which a run was made twice, the first one's log, and the report of the second.

    The first one had secrets in its environment and a stand-in for wandb."""
    parent = tmp_path_factory.mktemp("again")
    (parent / "wandb.py").write_text(WANDB.format(file=parent / "wandb.reported"))
    first = {"PYTHONPATH": str(parent), **SECRETS}
    done = train(parent / "run", *BRIEF, "train.trackers=[wandb]", **first)
    assert done.returncode == 0, done.stderr
    mark = (parent / "run/training.log").read_text()
    done = train(parent / "run", *BRIEF)
    assert done.returncode == 0, done.stderr
    return parent, mark, done.stdout


def test_a_second_run_moves_the_first_aside(again):
    parent, mark, reported = again
    assert "moved to" in reported
    assert (parent / "run.1/training.log").read_text() == mark
    assert len(metrics(parent / "run")) == 2


def test_wandb_gets_the_scalars_if_asked_for(again):
    reported = [json.loads(line) for line in (again[0] / "wandb.reported").read_text().splitlines()]
    assert [line[0] for line in reported if "train/loss" in line] == [1, 2]
    assert reported[-1] == "finished"
    values = json.loads((again[0] / "wandb.reported.json").read_text())
    assert values["train.max_steps"] == 2


def test_secrets_of_the_environment_stay_out_of_the_run_folder(again):
    files = [path for path in (again[0] / "run.1").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["train.epoch=1"], 2, "train.epoch (override): unknown key; did you mean epochs?"),
        (["model.name=no/such"], 2, "cannot load 'no/such'"),
        (["data.train_path=missing.jsonl"], 3, "missing.jsonl"),
        (["data.max_seq_len=16"], 3, "too_long"),
        (["train.trackers=[mlflow]"], 2, 'mlflow is not installed; pip install ".[mlflow]"'),
        (["tuning.target_modules=[nothing]"], 2, "names no layer of this model"),
        (["train.resume_from_checkpoint=nowhere"], 4, "it has no MANIFEST.json"),
        (
            ["train.learning_rate=1e30", "train.max_grad_norm=0", "train.schedule=constant"],
            5,
            "step",
        ),
    ],
)
def test_a_mistake_is_one_message_and_its_exit_code(tmp_path, overrides, code, message):
    done = train(tmp_path / "run", *SHORT, *overrides)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if code == 5:
        assert status(tmp_path / "run")["exit_code"] == 5
        assert all(map(math.isfinite, metrics(tmp_path / "run")))
