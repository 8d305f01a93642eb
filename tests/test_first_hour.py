"""The first hour of a new user: what is missing, mistaken or too little is said, with a remedy."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import yaml
from conftest import ROOT, clean_environment, run
from rich.table import Table

from sft.config import foreign
from sft.config.load import load_config, with_values
from sft.config.schema import Config, sections_of
from sft.data import readers
from sft.errors import ConfigError, ModelError
from sft.models import pretrained
from sft.runtime.log import Log
from sft.tasks.base import Results
from sft.tasks.sft import card, report

NANO = ROOT / "configs/nano.yaml"

# --- names of models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_local"),
    [
        ("outputs/nosuch", True),
        ("./x", True),
        ("../x/y", True),
        ("/x", True),
        ("~/x/y", True),
        ("a/b/c", True),
        ("owner/model/", True),
        ("owner/model", False),
        ("gpt2", False),
        ("", False),
        ("runs/mine", True),
        ("models/mine", False),
    ],
)
def test_a_name_that_looks_like_a_folder_is_one(name, is_local, tmp_path, monkeypatch):
    (tmp_path / "runs/other").mkdir(parents=True)
    (tmp_path / "runs/other/config.yaml").touch()
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert pretrained.looks_local(name) == is_local


def test_a_run_that_does_not_exist_is_not_looked_for_at_the_hub(tmp_path, monkeypatch):
    (tmp_path / "outputs/first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained.AutoTokenizer, "from_pretrained", lambda *_, **__: 1 / 0)
    config = with_values(load_config(NANO), {"model.name": "outputs/nosuch"})
    with pytest.raises(
        ModelError, match=r"no such folder here \(outputs has first\)\. Train first"
    ):
        pretrained.load_tokenizer(config.model)


# --- configurations ------------------------------------------------------------------------------


def test_a_missing_configuration_is_one_problem():
    with pytest.raises(ConfigError) as found:
        load_config("nosuch.yaml")
    reported = str(found.value)
    assert reported == "cannot read the configuration nosuch.yaml: No such file or directory"
    for name, expected in (("nano.yml", r"nano\.yaml\?"), (".", r"ad_darkroom\.yaml or .*\?")):
        with pytest.raises(ConfigError, match=f"directory; did you mean .*configs/{expected}$"):
            load_config(ROOT / "configs" / name)


AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
adapter: lora
lora_r: 16
lora_alpha: 32
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
warmup_ratio: 0.1
weight_decay: 0.0
flux_capacitor: 1
"""
FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
per_device_train_batch_size: 1
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
bf16: true
"""
TRL = """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_checkpointing: true
use_peft: true
lora_r: 32
lora_alpha: 16
output_dir: Qwen2-0.5B-SFT
"""

SWIFT = "model: Qwen/Qwen2-0.5B\ntrain_type: lora\ndataset: AI/alpaca\ntorch_dtype: bfloat16\n"
ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_processes: 2
"""
DEEPSPEED = (
    """{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "train_batch_size": 8}"""
)

UNSLOTH = """\
model_name: unsloth/llama-3-8b-bnb-4bit
max_seq_length: 2048
load_in_4bit: true
r: 16
lora_alpha: 16
use_gradient_checkpointing: unsloth
per_device_train_batch_size: 2
learning_rate: 2.0e-4
"""
TORCHTUNE = """\
output_dir: /tmp/torchtune/llama3_2_1B
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/Llama-3.2-1B-Instruct/original/tokenizer.model
dataset: {_component_: torchtune.datasets.alpaca_dataset, packed: false}
seed: null
batch_size: 4
epochs: 1
optimizer: {_component_: torch.optim.AdamW, lr: 3.0e-4}
model: {_component_: torchtune.models.llama3_2.lora_llama3_2_1b, lora_rank: 64}
gradient_accumulation_steps: 8
log_every_n_steps: 1
"""
NEMO = """\
name: megatron_gpt_sft
trainer: {devices: 1, precision: bf16, max_steps: 100}
exp_manager: {exp_dir: null}
model: {restore_from_path: base.nemo, global_batch_size: 128, data: {train_ds: {file_names: []}}}
"""
ARGUMENTS = """{"output_dir": "out", "per_device_train_batch_size": 8, "num_train_epochs": 3.0,
 "learning_rate": 5e-05, "evaluation_strategy": "steps", "logging_steps": 10, "seed": 42}"""
MODEL = (ROOT / "nano/model/config.json").read_text()
ADAPTER = '{"peft_type": "LORA", "base_model_name_or_path": "x", "task_type": "CAUSAL_LM", "r": 8}'
LITGPT = """
checkpoint_dir: checkpoints/meta
out_dir: out/finetune
devices: 1
lora_r: 32
data: {class_path: litgpt.data.Alpaca}
train: {save_interval: 200, epochs: 4}
"""
AUTOTRAIN = """
task: llm-sft
base_model: meta-llama/Meta-Llama-3-8B
project_name: x
log: tensorboard
data: {path: argilla, chat_template: chatml}
params: {epochs: 1}
"""
TRL_MIXTURE = """
model_name_or_path: Qwen/Qwen2-0.5B
datasets: [{path: trl-lib/Capybara}]
use_peft: true
"""
MAYBE = (".json", ".txt", ".text")  # endings that a configuration may have, too


@pytest.mark.parametrize(
    ("text", "program", "lines"),
    [
        (AXOLOTL, "Axolotl", ["base_model model.name", "sequence_len data.max_seq_len"]),
        (FACTORY, "LLaMA-Factory", ["lora_rank tuning.r", "num_train_epochs train.epochs"]),
        (TRL, "TRL", ["dataset_name data.train_path", "lora_alpha tuning.lora_alpha"]),
        (SWIFT, "ms-swift", ["model model.name", "train_type tuning.mode"]),
        (ACCELERATE, "Accelerate (give it as ACCELERATE", ["mixed_precision train.precision"]),
        (DEEPSPEED, "DeepSpeed (give it as", ["zero_optimization train.deepspeed_config"]),
        (UNSLOTH, "Unsloth", ["max_seq_length data.max_seq_len", "r tuning.r"]),
        (TORCHTUNE, "torchtune", ["batch_size train.micro_batch", "epochs train.epochs"]),
        (NEMO, "NeMo", ["trainer train.epochs, train.max_steps, train.precision"]),
        (ARGUMENTS, "Transformers (TrainingArguments)", ["num_train_epochs train.epochs"]),
        (MODEL, "a model (give its folder as model.name)", []),
        (ADAPTER, "an adapter (give its folder as model.adapter)", ["r tuning.r"]),
        (LITGPT, "LitGPT", ["devices train.num_processes", "lora_r tuning.r"]),
        (AUTOTRAIN, "AutoTrain", ["project_name train.output_dir"]),
        (TRL_MIXTURE, "TRL", ["model_name_or_path model.name", "use_peft tuning.mode: lora"]),
    ],
)
def test_a_configuration_of_another_program_is_recognised(tmp_path, text, program, lines):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as found:
        load_config(path)
    reported = str(found.value)
    assert ("write its values" in reported) == (" -> " in reported)
    assert f"{path}: this looks like a configuration of {program}" in reported
    for line in lines:
        assert line in re.sub(r" +-> +", " ", reported)
    assert "unknown key" not in reported
    assert ("without an equivalent: flux_capacitor" in reported) == ("flux" in text)


@pytest.mark.parametrize(
    "name",
    [
        *("rows" + name for name in (*readers.SUFFIXES, *readers.ALIASES) if name not in MAYBE),
        *("rows.jsonl" + name for name in (*readers.PACKED, *readers.UNREADABLE_PACKED)),
        *("lines.json", "list.json", "long.json"),
    ],
)
def test_a_data_file_in_place_of_a_configuration_is_called_one(tmp_path, name):
    row = '{"messages": [{"role": "user", "content": "a"}]}\n'
    text = {"lines.json": row * 2, "list.json": f"[\n{row}]", "long.json": "[" + row * 30_000}
    path = tmp_path / name
    path.write_text(text.get(name, row))
    with pytest.raises(ConfigError) as found:
        load_config(path)
    assert "found a file of rows; give it as data.train_path" in str(found.value)
    assert f'ARGS="data.train_path={path}"' in str(found.value)


@pytest.mark.parametrize("name", ["own.json", "own.txt", "own"])
def test_a_configuration_may_have_another_ending(tmp_path, name):
    path, values = tmp_path / name, yaml.safe_load(NANO.read_text())
    values["train"]["learning_rate"] = 0.005  # YAML 1.1 reads 5e-3 as a text
    path.write_text(json.dumps(values, indent=1))
    assert load_config(path).model.name == "nano/model"
    path.write_text(json.dumps(values))
    assert load_config(path).model.name == "nano/model"


def test_every_equivalent_is_a_key_of_the_schema():
    keys = {
        f"{name}.{key}" for name, each in sections_of(Config).items() for key in each.model_fields
    }
    tables = [*foreign.PROGRAMS.values(), foreign.ARGUMENTS]
    named = [text for each in tables for text in each.values() if "." in text]
    assert {re.match(r"[\w.]+", text)[0] for text in named} <= keys


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_own_configurations_are_not_taken_for_others(path):
    keys = {name: each.model_fields for name, each in sections_of(Config).items()}
    assert foreign.explain(yaml.safe_load(path.read_text()), keys) == []
    assert foreign.explain({"model_name_or_path": "x", "learning_rate": 1}, keys) == []


# --- make ----------------------------------------------------------------------------------------


def make_at_terminal(*words: str, **environment: str) -> str:
    end, inner = pty.openpty()
    done = subprocess.run(
        ["make", *words], cwd=ROOT, env=clean_environment(**environment), stdout=inner, check=True
    )
    assert done.returncode == 0
    return os.read(end, 100_000).decode()


def test_the_list_of_targets_has_colours_only_where_they_are_wanted():
    assert "\x1b[36m" in make_at_terminal("help")
    assert "\x1b" not in make_at_terminal("help", NO_COLOR="1")
    assert "\x1b" not in run("make", "help").stdout


def test_the_makefile_works_from_another_folder(tmp_path):
    for words in (["help"], []):
        command = f"cd {tmp_path} && make -f {ROOT}/Makefile {' '.join(words)}"
        done = run("bash", "-c", command)
        assert done.returncode == 0, done.stderr
        assert "Fine-tune CONFIG in one process" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_process_without_an_output_asks_for_one():
    done = run(sys.executable, "-m", "sft", "process", "--output", "")
    assert (done.returncode, done.stderr) == (2, "error: OUTPUT: required: OUTPUT=rows.jsonl\n")


# --- what a run says and leaves ------------------------------------------------------------------


def test_a_checksum_is_no_curve_of_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, tensorboard=True)
    log.open_metrics(0)
    log.log(1, {"train/loss": 1.0, "data/examples_crc32": 7})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {*board.Tags()["scalars"]} == {"train/loss", "0_overview/1_loss"}
    assert "examples_crc32" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("outputs/mine", "make tensorboard"),
        (f"{os.getcwd()}/outputs/mine", "make tensorboard"),
        ("/scratch/mine", "make tensorboard LOGDIR=/scratch"),
        ("/my disk/mine", "make tensorboard LOGDIR='/my disk'"),
    ],
)
def test_the_command_for_the_curves_names_their_folder(folder, command):
    config = with_values(load_config(NANO), {"train.output_dir": folder})
    _, commands = report.closing(config, None, Results({}), "")
    assert command in commands
    assert any(f"make infer RUN={folder}" == each.replace("'", "") for each in commands)


def test_a_card_has_no_marks_of_names(monkeypatch):
    config = load_config(NANO, ["train.output_dir='out|<b>'"])
    text = card.model_card(config, {}, None, Results({"loss": 1.0}), "")
    assert "# out\\|&lt;b>" in text


BRIEF = ["data.max_rows=75", "data.eval_path=null", "data.eval_fraction=0.2"]
BRIEF += ["evaluation.max_new_tokens=4", "train.global_batch=16"]
BRIEF += ["tuning.mode=lora", "train.epochs=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    done = forked.run(
        *("scripts/train.py", f"train.output_dir={folder}", "evaluation.num_examples=2", *BRIEF),
        ACCELERATE_MIXED_PRECISION="no",  # as `accelerate launch --num_processes 2` sets it
    )
    assert done.returncode == 0, done.stderr
    return folder, re.sub(r"\s+", " ", done.stdout)


@pytest.mark.slow
def test_few_steps_are_warned_of_with_the_remedy(trained):
    expected = (
        "8 steps of 16 examples: a model hardly learns in fewer than about 50; give more rows,"
    )
    assert f"{expected} train.epochs=14, or train.global_batch=2" in trained[1]


@pytest.mark.slow
def test_one_process_of_accelerate_says_why_it_is_one(trained):
    assert "`accelerate launch` starts one without a GPU, whatever --num_proc" in trained[1]


@pytest.mark.slow
def test_the_final_checkpoint_has_a_card_and_loads_from_any_folder(trained, tmp_path):
    folder = trained[0] / "final_checkpoint"
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    base = str(ROOT / "nano/model")
    assert yaml.safe_load(front)["base_model"] == base
    assert (
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    )
    record = json.loads((folder / "base.json").read_text())
    assert record["name"] == base
    audit = json.loads((trained[0] / "audit.json").read_text())
    for digest in (record["weights_sha256"], audit["data_sha256"]):
        assert digest in text
    assert "2 epochs of 16 examples" in text
    assert re.search(r"^\| exact match \| \S+ \[\S+, \S+\] \| \S+ \[\S+, \S+\] \|$", text, re.M)
    assert "More Information Needed" not in text
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    done = run(
        sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}\nmodel.config"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_questions_no_table_of_answers_is_shown(tmp_path):
    words = [f"train.output_dir={tmp_path}/run", "evaluation.num_examples=0", *BRIEF]
    words += ["train.max_steps=2"]
    done = forked.run("scripts/train.py", *words)
    assert done.returncode == 0, done.stderr
    assert "same prompts" not in done.stdout


def test_a_table_of_no_answers_is_not_shown(tmp_path):
    config = load_config(NANO)
    details = {"num_examples": 0, "metrics": {}, "intervals": {}}
    for name in ("base.jsonl", "predictions.jsonl"):
        (tmp_path / name).touch()
    results = Results({}, details)
    shown = report.show(config, results, results, tmp_path)
    assert not any(isinstance(each, Table) for each in shown)
