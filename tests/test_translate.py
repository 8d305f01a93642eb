"""Configurations of other programs, as their examples have them, become ours line by line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sft import commands
from sft.config import foreign, translate
from sft.config.load import load_config
from sft.config.schema import Config
from sft.errors import ConfigError, UserError

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets:
  - {path: teknium/GPT4-LLM-Cleaned, type: alpaca}
  - {path: rows.jsonl, type: chat_template, roles_to_train: [assistant]}
val_set_size: 0.1
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
warmup_steps: 10
saves_per_epoch: 4
flux_capacitor: 88
"""
FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
finetuning_type: lora
lora_target: all
dataset: identity, alpaca_en_demo
template: llama3
cutoff_len: 1024
max_samples: 1000
output_dir: saves/llama3
save_steps: 500
eval_strategy: epoch
report_to: [tensorboard, comet_ml]
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
dataset_test_split: test
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
eos_token: '<|im_end|>'
use_peft: true
lora_r: 32
lora_target_modules: all-linear
output_dir: out
"""
EXPECTED = {
    AXOLOTL: (
        {
            "model": {"name": "NousResearch/Llama-3.2-1B"},
            "data": {
                "train_path": ["teknium/GPT4-LLM-Cleaned", "rows.jsonl"],
                "eval_fraction": 0.1,
                "max_seq_len": 2048,
                "on_long": "drop",
                "supervise": "all",
            },
            "tuning": {"mode": "qlora", "r": 32, "lora_alpha": 16, "target_modules": "auto"},
            "train": {
                "layout": "packed",
                "optimizer": "adamw_8bit",
                "schedule": "cosine",
                "learning_rate": 2e-4,
                "precision": "auto",
                "warmup_steps": 10,
                "save_steps": "1/4 epoch",
                "epochs": 1.0,
                "global_batch": 2 * 4 * 3,
            },
        },
        {"flux_capacitor"},
    ),
    FACTORY: (
        {
            "model": {"name": "meta-llama/Meta-Llama-3-8B-Instruct"},
            "data": {
                "train_path": ["identity", "alpaca_en_demo"],
                "max_seq_len": 1024,
                "on_long": "truncate",
                "max_rows": 1000,
            },
            "tuning": {"mode": "lora", "r": 8, "lora_alpha": 16, "target_modules": "auto"},
            "train": {
                "output_dir": "saves/llama3",
                "save_steps": 500,
                "eval_steps": "epoch",
                "trackers": ["comet"],
                "learning_rate": 1e-4,
                "schedule": "cosine",
                "warmup_ratio": 0.1,
                "precision": "bf16",
                "epochs": 3.0,
                "global_batch": 8 * 3,
            },
        },
        {"trust_remote_code", "template"},
    ),
    TRL: (
        {
            "model": {"name": "Qwen/Qwen2.5-0.5B", "stop_tokens": ["<|im_end|>"]},
            "data": {
                "train_path": "trl-lib/Capybara",
                "eval_path": "trl-lib/Capybara@test",
                "max_seq_len": 1024,
                "on_long": "truncate",
                "supervise": "everything",
            },
            "tuning": {"mode": "lora", "r": 32, "target_modules": "auto", "lora_dropout": 0.05},
            "train": {
                "epochs": 1,
                "layout": "packed",
                "output_dir": "out",
                "learning_rate": 2e-5,
                "schedule": "linear",
                "warmup_ratio": 0.0,
                "global_batch": 2 * 8 * 3,
            },
        },
        {"dataset_test_split"},
    ),
}


@pytest.mark.parametrize("text", EXPECTED, ids=translate.RULES)
def test_an_example_of_another_program_becomes_ours(text):
    expected, left_out = EXPECTED[text]
    tree = yaml.safe_load(text.replace("2e-4", "0.0002"))  # YAML 1.1 reads that as a text
    program, lines = translate.translate(tree, processes=3)
    assert program == [*translate.RULES][[*EXPECTED].index(text)]
    assert translate.merged(lines) == expected
    given = {key for key, value in tree.items() if value is not None} - {*translate.BATCH}
    assert given <= {line.key for line in lines}  # nothing is left out silently
    assert left_out <= {line.key for line in lines if not line.ours and line.note}


def test_weights_that_are_trained_follow_their_defaults():
    def trained(text: str, *left_out: str) -> dict[str, object]:
        tree = yaml.safe_load(text.replace("2e-4", "0.0002"))
        few = {key: value for key, value in tree.items() if key not in left_out}
        return translate.merged(translate.translate(few, 1)[1])["tuning"]

    assert trained(AXOLOTL, "adapter", "load_in_4bit")["mode"] == "full"
    assert trained(FACTORY, "finetuning_type")["mode"] == "lora"
    assert trained(TRL, "use_peft", "lora_r", "lora_target_modules") == {"mode": "full"}
    assert "target_modules" not in trained(TRL, "lora_target_modules")


def test_what_it_trains_on_follows_their_defaults():
    def supervised(text: str, *changes: str) -> str:
        tree = yaml.safe_load("\n".join([text.replace("2e-4", "0.0002"), *changes]))
        return translate.merged(translate.translate(tree, 1)[1])["data"].get("supervise", "all")

    assert supervised(TRL, "assistant_only_loss: true") == "all"
    assert supervised(TRL, "completion_only_loss: true") == "all"
    assert supervised(AXOLOTL, "train_on_inputs: true") == "everything"
    assert supervised(FACTORY, "train_on_prompt: true") == "everything"
    assert supervised(FACTORY, "mask_history: true") == "last"


@pytest.mark.parametrize(
    ("text", "change", "ours"),
    [
        (AXOLOTL, "excess_length_strategy: truncate", "data.on_long=truncate"),
        (AXOLOTL, "excess_length_strategy: raise", "data.on_long=error"),
        (AXOLOTL, "bfloat16: true", "train.precision=bf16_pure"),
        (FACTORY, "pure_bf16: true", "train.precision=bf16_pure"),
        (FACTORY, "neat_packing: true", "train.layout=packed"),
        (TRL, "warmup_steps: 0.1", "train.warmup_ratio=0.1"),
        (TRL, "warmup_steps: 20", "train.warmup_steps=20"),
        (TRL, "loss_type: dft", "train.loss=dft"),
        (TRL, "activation_offloading: true", "train.activation_offload=True"),
    ],
)
def test_keys_whose_meaning_depends_on_their_value(text, change, ours):
    tree = yaml.safe_load("\n".join([text.replace("2e-4", "0.0002"), change]))
    (section, key), value = ours.split("=")[0].split("."), ours.split("=")[1]
    written = translate.merged(translate.translate(tree, 1)[1])
    assert str(written[section][key]) == value


def test_packing_that_is_not_neat_is_reported():
    for changes, is_reported in (({}, True), ({"neat_packing": True}, False)):
        tree = yaml.safe_load(FACTORY) | {"packing": True} | changes
        (line,) = (e for e in translate.translate(tree, 1)[1] if e.key == "packing")
        assert ("see each other" in line.note) == is_reported
        assert line.ours == {"train.layout": "packed"}


@pytest.mark.parametrize("program", translate.RULES)
def test_every_key_that_is_known_of_a_program_has_a_rule(program):
    known = {*foreign.PROGRAMS[program]}
    known |= {*foreign.ARGUMENTS} if program in foreign.WITH_ARGUMENTS else set()
    assert known <= {*translate.COMMON, *translate.RULES[program], *translate.BATCH}


@pytest.mark.parametrize("text", EXPECTED, ids=translate.RULES)
def test_the_verb_writes_a_configuration_that_loads(tmp_path, capsys, monkeypatch, text):
    monkeypatch.setenv("COLUMNS", "200")
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "new/ours.yaml"
    theirs.write_text(text + ("output_dir: out\n" if "output_dir" not in text else ""))
    commands.run("import", [f"--config={theirs}", f"--output={ours}", "--num-processes=3"])
    config = load_config(ours)
    assert isinstance(config, Config)
    assert config.train.global_batch == EXPECTED[text][0]["train"]["global_batch"]
    assert f"make check CONFIG={ours}" in capsys.readouterr().out.replace("\n", "")
    assert ("# not here: flux_capacitor: 88" in ours.read_text()) == ("flux" in text)
    with pytest.raises(UserError, match="exists already"):
        commands.run("import", [f"--config={theirs}", f"--output={ours}"])


def refused(folder: Path, text: str) -> str:
    theirs = folder / "theirs.yaml"
    theirs.write_text(text)
    with pytest.raises(ConfigError) as found:
        commands.run("import", [f"--config={theirs}", f"--output={folder}/ours.yaml"])
    return str(found.value)


def test_what_cannot_be_taken_over_is_refused(tmp_path):
    other = "checkpoint_dir: a\nout_dir: b\nlora_query: true\nlora_key: true\n"
    assert "expected a configuration of Axolotl, LLaMA-Factory, TRL, found" in refused(
        tmp_path, other
    )
    assert "expected supervised fine-tuning, found 'dpo'" in refused(
        tmp_path, FACTORY.replace("stage: sft", "stage: dpo")
    )
    missing = refused(tmp_path, AXOLOTL)  # Axolotl has a default for it
    assert "ours.yaml is written, and needs changes by hand" in missing
    assert "train.output_dir" in missing
