"""Whole runs, as a user starts them: real processes, real files, the embedded model, real data."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment, run
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft import checkpoint

pytestmark = pytest.mark.slow

ROWS = ["data.max_rows=600", "data.eval_path=nano/valid.jsonl"]
SHORT = [*ROWS, "train.max_steps=8", "evaluation.num_examples=8", "train.learning_rate=1e-3"]
BRIEF = [*ROWS, "train.max_steps=2", "evaluation.num_examples=0"]


def make(target: str, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`make target`, as in the README."""
    assignments = [f"{name}={value}" for name, value in variables.items()]
    arguments = [f"ARGS={' '.join(overrides)}"] if overrides else []
    return run("make", target, *assignments, *arguments, HF_HOME="/nonexistent")


def train(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/train.py", f"train.output_dir={folder}", *overrides]
    return run(*command, **environment)


def train_until(step: int, sent: int, folder: Path, *overrides: str) -> int:
    """Trains, sends that signal once the step is told, and returns the exit code."""
    command = [sys.executable, "scripts/train.py", f"train.output_dir={folder}", *overrides]
    with subprocess.Popen(
        [*command, "train.log_steps=1"],
        cwd=ROOT,
        env=clean_environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout or []:
            if line.startswith(f"step {step:5}/"):
                process.send_signal(sent)
                break
        process.communicate(timeout=120)
    return process.returncode


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
    """`make train`, only into another folder."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    done = make("train", f"train.output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_make_train_teaches_the_task(nano):
    found = results(nano[0])
    assert found["base"]["exact_match"] <= 0.02
    assert found["tuned"]["exact_match"] >= 0.90
    assert found["num_examples"] == 200
    assert found["tuned"]["loss"] < 0.1 * found["base"]["loss"]


def test_the_run_shows_machine_plan_answers_and_where_to_go(nano):
    folder, told = nano
    for part in (
        "cores",
        "steps",
        "memory",
        "ETA",
        "before:",
        "after:",
        "base",
        "fine-tuned",
        "next",
    ):
        assert part in told
    assert told.count("make ") >= 3
    assert max(map(len, told.splitlines())) <= 100
    found = status(folder)
    assert (found["state"], found["exit_code"], found["reason"]) == ("finished", 0, None)
    assert (found["attempt"], found["checkpoint"]) == (1, "final_checkpoint")
    assert found["step"] == len(metrics(folder))
    assert (folder / "training.log").read_text() in told + "\n"


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
        right += answer == row["reference"]
    assert right >= 16  # unquantised weights under an adapter for NF4: a little may differ


def test_evaluate_infer_and_merge_use_the_run(nano, tmp_path):
    folder = nano[0]
    tuned = results(folder)["tuned"]
    done = make("evaluate", "evaluation.num_examples=200", RUN=str(folder))
    assert done.returncode == 0, done.stderr
    again = json.loads((folder / "evaluation/evaluate/metrics.json").read_text())["metrics"]
    assert again["exact_match"] == tuned["exact_match"]
    assert again["loss"] == pytest.approx(tuned["loss"], rel=1e-5)

    row = json.loads((folder / "evaluation/predictions.jsonl").read_text().splitlines()[0])
    done = make("infer", RUN=str(folder), PROMPT=row["prompt"])
    assert done.stdout.strip() == row["answer"], done.stderr

    done = make("merge", RUN=str(folder), OUTPUT=str(tmp_path / "merged"), DTYPE="fp32")
    assert done.returncode == 0, done.stderr
    checks = json.loads((tmp_path / "merged/merge_report.json").read_text())["checks"]
    assert checks["kl"]["measured"] < 1e-9
    assert checks["top1"]["measured"] == checks["greedy"]["measured"] == 1
    assert checks["trained"]["measured"] > checks["kl"]["measured"]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_other_modes_learn_too(tmp_path, mode):
    done = train(tmp_path / "run", f"tuning.mode={mode}", *SHORT, "train.max_steps=30")
    assert done.returncode == 0, done.stderr
    assert (
        results(tmp_path / "run")["tuned"]["loss"] < 0.5 * results(tmp_path / "run")["base"]["loss"]
    )


# --- a real model on real data -------------------------------------------------------------------

REAL = [("rasbt_instruction_data.json", 2.95)]  # file, held-out loss to be reached (nats per token)


def short_rows(path: Path, target: Path, most: int = 600) -> Path:
    """The first rows that surely fit 512 tokens: what is longer stops a run, rightly."""
    text = path.read_text("utf-8")
    rows = json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))
    fitting = [row for row in rows if sum(map(len, row.values())) < 450][:most]
    target.write_text("\n".join(map(json.dumps, fitting)), "utf-8")
    return target


@pytest.mark.parametrize(("file", "reached"), REAL)
def test_a_real_model_on_real_data(tmp_path, shared, file, reached):
    config = tmp_path / "real.yaml"
    data = short_rows(shared / "data/instruct" / file, tmp_path / "rows.jsonl")
    config.write_text(
        f"model: {{name: {shared}/models/stories260K}}\n"
        "tuning: {mode: qlora}\n"
        f"data: {{train_path: {data}, max_seq_len: 512}}\n"
        f"train: {{output_dir: {tmp_path}/run, learning_rate: 1e-2, max_steps: 60}}\n"
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


@pytest.mark.parametrize("target", ENGINES)
def test_two_processes_give_the_run_of_one_and_tensorboard_serves_it(alone, target):
    folder = ROOT / "outputs" / f"test-tb-{os.getpid()}"
    try:
        done = make(target, f"train.output_dir={folder}", *SHORT, NUM_PROCESSES="2")
        assert status(folder)["state"] == "finished", done.stdout + done.stderr
        assert re.search(rf"processes\s+2 \({ENGINES[target]}\)", done.stdout)
        assert done.stdout.count("step     1/8") == 1  # output of many ranks comes from one
        assert metrics(folder) == pytest.approx(metrics(alone), rel=1e-4)
        assert results(folder)["base"] == pytest.approx(results(alone)["base"], rel=1e-5)
        tuned = results(folder)["tuned"]["loss"]
        assert tuned == pytest.approx(results(alone)["tuned"]["loss"], rel=1e-4)
        address = re.search(r"http://localhost:\d+", done.stdout)
        assert address, done.stdout + done.stderr
        query = urllib.parse.urlencode({"run": f"{folder.name}/tensorboard", "tag": "train/loss"})
        served: list = []
        deadline = time.monotonic() + 60
        while len(served) < 8 and time.monotonic() < deadline:  # the server reads files every 5 s
            try:
                url = f"{address[0]}/data/plugin/scalars/scalars?{query}"
                served = json.load(urllib.request.urlopen(url, timeout=10))
            except OSError:
                pass
            time.sleep(1)
        assert [point[1] for point in served] == list(range(1, 9))
        assert [point[2] for point in served] == pytest.approx(metrics(folder), rel=1e-6)
    finally:
        stopped = make("tb-stop")
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    assert stopped.returncode == 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address[0], timeout=10)


# --- stopped and resumed -------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final_checkpoint/adapter_model.safetensors")


def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(tmp_path, alone):
    folder = tmp_path / "run"
    assert train_until(3, signal.SIGTERM, folder, *SHORT) == 75
    assert status(folder)["state"] == "preempted"
    assert len(metrics(folder)) < 8
    done = train(folder, *SHORT, "train.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert metrics(folder) == metrics(alone)
    assert all(torch.equal(value, weights(alone)[name]) for name, value in weights(folder).items())
    assert results(folder) == results(alone)


def test_a_second_run_moves_the_first_aside(tmp_path):
    folder = tmp_path / "run"
    assert train(folder, *BRIEF).returncode == 0
    mark = (folder / "training.log").read_text()
    done = train(folder, *BRIEF)
    assert "moved to" in done.stdout, done.stderr
    assert (tmp_path / "run.1/training.log").read_text() == mark
    assert len(metrics(folder)) == 2


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["train.epoch=1"], 2, "train.epoch (override): unknown key; did you mean epochs?"),
        (["model.name=no/such"], 2, "cannot load 'no/such'"),
        (["data.train_path=missing.jsonl"], 3, "missing.jsonl"),
        (["data.max_seq_len=16"], 3, "too_long"),
        (["train.wandb=true"], 2, "wandb is not installed"),
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


WANDB = """
import json

class Run:
    def log(self, values, step): open("{file}", "a").write(json.dumps([step, *values]) + "\\n")
    def finish(self): open("{file}", "a").write('"finished"')

def init(project, name, config): return Run()
"""


def test_wandb_gets_the_scalars_if_asked_for(tmp_path):
    (tmp_path / "wandb.py").write_text(WANDB.format(file=tmp_path / "told"))
    done = train(tmp_path / "run", "train.wandb=true", *BRIEF, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [line[0] for line in told if "train/loss" in line] == [1, 2]
    assert told[-1] == "finished"


def test_secrets_of_the_environment_stay_out_of_the_run_folder(tmp_path):
    folder = tmp_path / "run"
    done = train(
        folder,
        *BRIEF,
        HF_TOKEN="hf_sEcReT123",
        WANDB_API_KEY="wSeCrEt9",
    )
    assert done.returncode == 0, done.stderr
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        assert b"hf_sEcReT123" not in content
        assert b"wSeCrEt9" not in content
