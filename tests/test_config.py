"""Law 5, a configuration cannot lie: what is read, what is refused, and how both are reported."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, clean_environment, representatives, run
from hypothesis import given, settings
from hypothesis import strategies as st

from sft import cli
from sft.config.aliases import ALIASES, UNSET
from sft.config.load import dump_config, load_config, parse_generation, with_values
from sft.config.reference import render_reference
from sft.config.rules import RULES, conditions, overlap
from sft.config.schema import NESTED, Config, EarlyStopping, Section, sections_of
from sft.data.files import read_options
from sft.errors import ConfigError, UserError
from sft.tasks.distill.config import RULES as DISTILL_RULES
from sft.tasks.registry import load_run, schemas

MINIMAL = """\
model:
  name: m
data:
  train_path: rows.jsonl
train:
  output_dir: outputs/x
"""

SECTIONS: dict[str, type[Section]] = {}
for _schema in schemas().values():
    SECTIONS |= sections_of(_schema)
KNOWN = {**SECTIONS, **NESTED}


STEPS_OR_EPOCHS = "expected a number of steps, or of epochs as in `epoch`, `0.5 epoch`, `1/3 epoch`"


@pytest.fixture
def minimal(tmp_path) -> Path:
    return write(tmp_path / "a.yaml", MINIMAL)


def write(file: Path, text: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def problems(file: Path, *overrides: str) -> list[str]:
    """The lines of the one message, without the folder; a header counts them if there are more."""
    with pytest.raises(ConfigError) as caught:
        load_run(file, list(overrides))
    assert caught.value.exit_code == 2
    header, *lines = str(caught.value).replace(f"{file.parent}/", "").split("\n  ")
    if not lines:
        return [header]
    plural = "s" if len(lines) > 1 else ""
    assert header == f"{file.name}: {len(lines)} problem{plural} in the configuration"
    return lines


def value(config: Config, path: str) -> Any:
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


# --- problems ----------------------------------------------------------------------------------


def test_all_problems_come_in_one_message_each_with_its_path_and_place(tmp_path):
    write(tmp_path / "base.yaml", "data:\n  train_path: [1]\n  eval_fraction: 0\n")
    text = """\
include: base.yaml
model:
  init: random
tuning:
  r: 0
train:
  output_dir: ../x
  epoch: 1
  lora_alpha: 3
  xyz: 3
  seed: x
  learning_rate: -1
  epochs: .inf
  weight_decay: .nan
  tensorboard: true
  tensorboard: no
optimiser: {}
tunning: {}
evaluation: 5
"""
    file = write(tmp_path / "a.yaml", text)
    known = ", ".join(SECTIONS["train"].model_fields)
    expected = [
        "a.yaml:16: train.tensorboard is given twice",
        "override 'train.log_steps': expected section.key=value, as in train.epochs=1",
        "model.name: required, and not given: "
        "Folder of a model in Hugging Face format, or a hub id.",
        "tuning.r (a.yaml:5): expected integer ≥ 1, found 0",
        "data.train_path (base.yaml:2): expected text or list of text, found [1]",
        "train.seed (a.yaml:11): expected integer ≥ 0, < 4294967296, found 'x'",
        "train.epochs (a.yaml:13): expected number > 0, found inf",
        "train.learning_rate (a.yaml:12): expected number > 0, found -1",
        "train.weight_decay (a.yaml:14): expected number ≥ 0, found nan",
        "train.tensorboard (a.yaml:16): expected true or false, found 'no'",
        f"train.save_steps (override): {STEPS_OR_EPOCHS}, found 'often'",
        "train.epoch (a.yaml:8): unknown key; did you mean epochs?",
        "train.lora_alpha (a.yaml:9): unknown key; did you mean tuning.lora_alpha?",
        f"train.xyz (a.yaml:10): unknown key; known: {known}",
        f"optimiser (a.yaml:17): unknown key; known: {', '.join(sections_of(Config))}",
        "tunning (a.yaml:18): unknown key; did you mean tuning?",
        "evaluation (a.yaml:19): expected a section with keys, found 5",
        "model.init (a.yaml:3): random weights have nothing to adapt: set tuning.mode: full",
        "data.eval_path: nothing would be held out: "
        "give data.eval_path or an eval_fraction above 0",
        "train.output_dir (a.yaml:7): must name a folder: printable characters, at most 200, "
        "without '..' and '~'",
    ]
    found = problems(file, "train.log_steps", "train.save_steps=often")
    assert sorted(found) == sorted(expected)


def test_a_key_without_its_section_is_reported_where_it_belongs(tmp_path):
    file = write(tmp_path / "a.yaml", f"epochs: 3\n{MINIMAL}")
    assert problems(file) == ["epochs (a.yaml:1): unknown key; did you mean train.epochs?"]


@pytest.mark.parametrize("key", ["train.epochs", "foo.bar", ".0", "train.", "a.b.c"])
def test_a_dotted_key_in_a_file_is_refused(tmp_path, key):
    file = write(tmp_path / "a.yaml", f"{key}: 3\n{MINIMAL}")
    (found,) = problems(file)
    assert found.startswith(f"{key} (a.yaml:1): unknown key; ")
    assert "did you mean" not in found, "what was written can be no advice"


BROKEN = {  # text of the file -> what its first problem says
    "": "a.yaml: expected sections (model:, data:, train: ...), found none",
    "# nothing\n": "a.yaml: expected sections (model:, data:, train: ...), found none",
    "- model\n- data\n": "a.yaml: expected sections (model:, data:, train: ...), found none",
    "5\n": "a.yaml: expected sections (model:, data:, train: ...), found none",
    b"model: \xff\xfe": "cannot read the configuration a.yaml: it is not UTF-8 text",
    "model: [1\n": "a.yaml:2: not valid YAML: ",
    "model:\n\tname: x\n": "a.yaml:2: not valid YAML: ",
    f"{MINIMAL}---\n{MINIMAL}": "a.yaml:7: not valid YAML: ",
    f"{MINIMAL}  seed: \x07\n": "a.yaml: not valid YAML: ",
    f"{MINIMAL}model: {{name: n}}\n": "a.yaml:7: model is given twice",
    f"? [a, b]\n: 1\n{MINIMAL}": "a.yaml:1",
    f"task: [sft]\n{MINIMAL}": "task (a.yaml:1): expected ",
    f"{MINIMAL}tuning: {'[' * 600}": "a.yaml",
}


@pytest.mark.parametrize(("text", "problem"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_file_that_is_no_configuration_is_refused_with_the_reason(tmp_path, text, problem):
    assert problem in problems(write(tmp_path / "a.yaml", text))[0]


def test_a_missing_file_is_refused_with_the_reason(tmp_path):
    found = "cannot read the configuration a.yaml: No such file or directory"
    assert problems(tmp_path / "a.yaml")[0] == found


@pytest.mark.parametrize(
    "text",
    [
        "data: &x {train_path: t}\n",
        "data: *x\n",
        "a: &x 1\nb: *x\n",
        "a: it's\nb: &x 1\nc: *x\nd: it's\n",  # between two apostrophes that are no quotes
    ],
)
def test_anchors_and_aliases_are_refused(tmp_path, text):
    (first, *_) = problems(write(tmp_path / "a.yaml", text))
    assert "anchors and aliases are not read" in first


def test_an_alias_bomb_is_never_unfolded(tmp_path):
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 40)]
    text = "\n".join(["l0: &l0 lol", *levels, MINIMAL])
    (first, *_) = problems(write(tmp_path / "a.yaml", text))
    assert first == "a.yaml:1: YAML anchors and aliases are not read; use include:"


def test_a_tag_makes_no_object(tmp_path):
    tag = f"!!python/object/apply:os.mkdir [{tmp_path / 'made'}]"
    (found,) = problems(write(tmp_path / "a.yaml", MINIMAL.replace("name: m", f"name: {tag}")))
    assert found.startswith("model.name (a.yaml:2): expected text, found [")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["R &D", "it's &x", "a *b", "'a &b'", '"a *b"', "x # don't &b"])
def test_an_ampersand_or_asterisk_inside_a_text_is_no_anchor(tmp_path, name):
    file = write(tmp_path / "a.yaml", MINIMAL.replace("name: m", f"name: {name}"))
    assert load_config(file).model.name == name.split(" #")[0].strip("'\"")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("epochs=1", "override 'epochs=1': expected section.key=value, as in train.epochs=1"),
        ("train.=1", "override 'train.=1': expected section.key=value, as in train.epochs=1"),
        ("epochs", "override 'epochs': expected section.key=value, as in train.epochs=1"),
        ("train.epochs=", "train.epochs (override): expected number > 0, found None"),
        ("train.epoch=1", "train.epoch (override): unknown key; did you mean epochs?"),
        ("trian.seed=1", "trian (override): unknown key; did you mean train?"),
        (
            "train.seed.x=1",
            "train.seed (override): expected integer ≥ 0, < 4294967296, found {'x': 1}",
        ),
    ],
)
def test_a_bad_override_is_refused_with_the_reason(tmp_path, override, problem):
    file = write(tmp_path / "a.yaml", f"{MINIMAL}  seed: 3\n")
    assert problems(file, override) == [problem]


def test_a_word_that_is_nearly_one_of_the_known_ones_is_answered_with_it(minimal):
    (found,) = problems(minimal, "evaluation.metrics=[exact_match, rouge_1]")
    assert found.endswith("found 'rouge_1'; did you mean rouge_l?")
    (found,) = problems(minimal, "train.engine=fdsp")
    assert found == "train.engine (override): expected ddp or fsdp or deepspeed, found 'fdsp'; " + (
        "did you mean fsdp?"
    )


def test_an_override_that_is_not_yaml_is_refused(minimal):
    (found,) = problems(minimal, "train.seed=[1")
    assert found.startswith("override train.seed")
    assert "not valid YAML" in found


DEEPSPEED = ["train.engine=deepspeed", "train.deepspeed_config=f"]
EVA = ["tuning.mode=lora", "tuning.lora.init_lora_weights=eva"]
DURING = ["train.eval_steps=10", "evaluation.during=5"]
WATCHED = "train.early_stopping.metric"
EARLY = "train.optimizer_in_backward=true"
AUTO_SHARE = ["data.replay.path=base", "data.replay.share=auto"]
BREAKS = [  # for each rule, in order: overrides that break it, and one more that repairs it
    (["data.cache_dir=outputs/x/cache"], "train.output_dir=outputs/y"),
    (["data.train_path=[a.jsonl, nano]", "train.output_dir=nano/x/y"], "train.output_dir=outputs"),
    (["train.save_best=loss"], "train.eval_steps=10"),
    ([f"{WATCHED}=loss"], "train.eval_steps=10"),
    (["evaluation.during=5"], "train.eval_steps=10"),
    (["train.save_best=bleu", "train.eval_steps=10"], "train.save_best=loss"),
    (["train.save_best=macro_f1", *DURING], "train.save_best=exact_match"),
    ([f"{WATCHED}=exact_match", "train.eval_steps=10"], "evaluation.during=5"),
    ([f"{WATCHED}=bleu", *DURING], "evaluation.metrics=[bleu]"),
    (["train.checkpoint_async=true"], "train.save_steps=10"),
    (["train.max_shard_size=5Gb"], "train.max_shard_size=5GB"),
    (["train.engine=deepspeed"], "train.deepspeed_config=z2.json"),
    ([*DEEPSPEED, "train.precision=bf16_pure"], "train.precision=bf16"),
    (["train.context_parallel=2", "train.neftune_alpha=5"], "train.neftune_alpha=0"),
    (["train.context_parallel=2", *EVA], "tuning.lora.init_lora_weights=true"),
    (["train.context_parallel=2", "train.compile=true"], "train.compile=auto"),
    ([*DEEPSPEED, "train.reduce_dtype=bf16"], "train.reduce_dtype=fp32"),
    (["train.reduce_dtype=bf16", "train.precision=bf16_pure"], "train.precision=bf16"),
    (["train.fp8=true", "tuning.mode=qlora"], "tuning.mode=lora"),
    (["train.fp8=true", *DEEPSPEED], "train.fp8=false"),
    ([EARLY], "train.max_grad_norm=0"),
    ([EARLY, "train.max_grad_norm=0", "train.skip_nonfinite=1"], "train.skip_nonfinite=0"),
    ([EARLY, "train.max_grad_norm=0", "train.precision=fp16"], "train.precision=bf16"),
    ([EARLY, "train.max_grad_norm=0", *DEEPSPEED], "train.optimizer_in_backward=false"),
    (["model.init=random"], "tuning.mode=full"),
    (["data.eval_fraction=0"], "data.eval_path=held_out.jsonl"),
    (["data.mix=[1, 2]"], "data.train_path=[a.jsonl, b.jsonl]"),
    (["data.replay.share=0.2"], "data.replay.path=base"),
    (AUTO_SHARE, "evaluation.max_drift=1"),
    ([*AUTO_SHARE, "evaluation.max_drift=1", *DEEPSPEED], "data.replay.share=0.1"),
    ([*AUTO_SHARE, "evaluation.max_drift=1", "crowd.num_agents=2"], "data.replay.share=0.1"),
    (
        ["data.replay.path=base", "model.init=random", "tuning.mode=full"],
        "data.replay.path=general.jsonl",
    ),
    (["data.system=replace"], "data.system_prompt=Be kind."),
    (["evaluation.metrics=[classification]"], "evaluation.labels=[yes, no]"),
    (["crowd.num_agents=2", "tuning.mode=full"], "tuning.mode=qlora"),
    (["crowd.num_agents=2", "tuning.router=trained"], "tuning.router=frozen"),
    (["crowd.num_agents=2", "crowd.agent=2"], "crowd.agent=1"),
    (["distill.context=50"], "distill.context=60"),
    (["distill.num_steps=300", "distill.context=320"], "distill.context=300"),
    (["distill.jump_to=50"], "distill.num_steps=1020"),
    (["distill.held_out_streams=100"], "distill.num_streams=101"),
    (["distill.width=66"], "distill.num_heads=3"),
    (["distill.slide=7"], "distill.context=140"),
    (["train.layout=packed", "distill.context=40"], "train.layout=padded"),
    (
        ["train.gradient_checkpointing=true", "distill.context=40"],
        "train.gradient_checkpointing=auto",
    ),
    (
        ["train.activation_offload=true", "distill.context=40"],
        "train.activation_offload=auto",
    ),
    (["train.fp8=true", "distill.context=40"], "train.fp8=false"),
    (
        ["train.save_best=token_accuracy", "train.eval_steps=1", "distill.context=40"],
        "train.save_best=loss",
    ),
    (["train.loss=dft", "distill.context=40"], "train.loss=cross_entropy"),
    (["train.label_smoothing=0.1", "distill.context=40"], "train.label_smoothing=0"),
    (["train.z_loss=1e-4", "distill.context=40"], "train.z_loss=0"),
    (["train.mean_per=example", "distill.context=40"], "train.mean_per=token"),
    (["train.neftune_alpha=5", "distill.context=40"], "train.neftune_alpha=0"),
    (["distill.data_dir=outputs"], "distill.data_dir=out"),
]


ADAM = (
    "train.optimizer: adamw or adamw_8bit or paged_adamw or paged_adamw_8bit or muon or "
    "schedule_free or torchao_adamw_8bit or torchao_adamw_4bit"
)
IF_WATCHED = (
    "train.early_stopping.metric: loss or perplexity or token_accuracy or exact_match or "
    "normalised_match or numeric_match or json_valid or json_fields or rouge_l or bleu or chrf or "
    "sari or accuracy or macro_precision or macro_recall or macro_f1"
)
READ_ONLY_WITH = {  # key -> value, the condition, and overrides under which it is read
    "train.deepspeed_config": ("z2.json", "train.engine: deepspeed", "train.engine=deepspeed"),
    "train.fp8": ("true", "train.precision: auto or bf16 or bf16_pure", "train.precision=bf16"),
    "train.offload": ("true", "train.engine: fsdp", "train.engine=fsdp"),
    "train.keep_whole": ("all", "train.engine: fsdp", "train.engine=fsdp"),
    "train.shard_within": ("node", "train.engine: fsdp", "train.engine=fsdp"),
    "train.loraplus_lr_ratio": ("16", "tuning.mode: lora or qlora", "tuning.mode=lora"),
    "train.label_smoothing": ("0.1", "train.loss: cross_entropy", "train.loss=cross_entropy"),
    "train.decay_ratio": ("0.1", "train.schedule: wsd", "train.schedule=wsd"),
    "train.adam_beta1": ("0.8", ADAM, "train.optimizer=muon"),
    "train.adam_beta2": ("0.95", ADAM, "train.optimizer=schedule_free"),
    "train.adam_epsilon": ("1e-6", ADAM, "train.optimizer=paged_adamw"),
    "train.num_cycles": (
        "3",
        "train.schedule: cosine_with_restarts",
        "train.schedule=cosine_with_restarts",
    ),
    "train.early_stopping.patience": ("9", IF_WATCHED, f"{WATCHED}=loss"),
    "train.early_stopping.min_delta": ("0.1", IF_WATCHED, f"{WATCHED}=loss"),
    "data.system_prompt": ("Hi.", "data.system: replace or prepend", "data.system=prepend"),
    "evaluation.labels": (
        "[yes, no]",
        "evaluation.metrics: classification",
        "evaluation.metrics=[bleu, classification]",
    ),
    "crowd.lambda_sw": ("1", "crowd.num_agents > 0", "crowd.num_agents=2"),
    "crowd.dropconnect": ("0.5", "crowd.num_agents > 0", "crowd.num_agents=2"),
    "crowd.aggregator": ("sampled", "crowd.num_agents > 0", "crowd.num_agents=2"),
    "crowd.agent": ("0", "crowd.num_agents > 0", "crowd.num_agents=2"),
    "crowd.num_projections": ("9", "crowd.lambda_sw > 0", "crowd.lambda_sw=1"),
    "crowd.representation": ("logits", "crowd.lambda_sw > 0", "crowd.lambda_sw=1"),
    "crowd.pooling": ("mean", "crowd.lambda_sw > 0", "crowd.lambda_sw=1"),
    "crowd.normalise": ("false", "crowd.lambda_sw > 0", "crowd.lambda_sw=1"),
    "crowd.layer": ("0", "crowd.representation: hidden", "crowd.representation=hidden"),
    "crowd.concentration": ("2", "crowd.aggregator: sampled", "crowd.aggregator=sampled"),
    "crowd.fit_fraction": ("0.1", "crowd.aggregator: learned", "crowd.aggregator=learned"),
    "distill.slide": ("2", "distill.compress: false", "distill.compress=false"),
    "distill.type_weight": ("1", "distill.compress: true", "distill.compress=true"),
}
UNDER = {  # overrides under which only the condition of READ_ONLY_WITH is broken
    "tuning.mode: lora or qlora": ["tuning.mode=full"],
    "train.precision: auto or bf16 or bf16_pure": ["train.precision=fp32"],
    "train.loss: cross_entropy": ["train.loss=dft"],
    ADAM: ["train.optimizer=torch.optim.SGD"],
    IF_WATCHED: ["train.eval_steps=10"],
    "crowd.lambda_sw > 0": ["crowd.num_agents=2", "crowd.lambda_sw=0"],
    "crowd.representation: hidden": ["crowd.num_agents=2", "crowd.representation=logits"],
    "crowd.aggregator: sampled": ["crowd.num_agents=2"],
    "crowd.aggregator: learned": ["crowd.num_agents=2"],
    "distill.compress: false": ["distill.compress=true"],
}


def of_task(file: Path, path: str) -> Path:
    """Writes the smallest configuration of the task whose section `path` is in."""
    distill = "task: distill\ntrain:\n  output_dir: outputs/x\n"
    return write(file, distill if path.startswith("distill.") else MINIMAL)


@pytest.mark.parametrize(("rule", "case"), list(zip([*RULES, *DISTILL_RULES], BREAKS, strict=True)))
def test_a_combination_that_cannot_work_is_refused_and_its_repaired_form_is_not(
    minimal, rule, case
):
    overrides, repair = case
    of_task(minimal, "distill." if rule in DISTILL_RULES else "")
    (found,) = problems(minimal, *overrides)
    assert found.startswith(rule.paths[0])
    assert found.endswith(rule.message)
    load_run(minimal, [*overrides, repair])


@pytest.mark.parametrize(("path", "case"), READ_ONLY_WITH.items())
def test_a_key_that_would_not_be_read_is_refused(minimal, path, case):
    value, condition, repair = case
    of_task(minimal, path)
    overrides = [*UNDER.get(condition, []), f"{path}={value}"]
    assert problems(minimal, *overrides) == [
        f"{path} (override): is only read with {condition}; set that, or remove this key"
    ]
    load_run(minimal, [*overrides, repair])


def test_every_condition_of_a_key_has_a_case():
    stated = {
        f"{name}.{key}"
        for name, section in {**SECTIONS, "train.early_stopping": EarlyStopping}.items()
        for key in section.model_fields
        if conditions(section, key)
    }
    assert stated == READ_ONLY_WITH.keys()


@settings(deadline=None, max_examples=200)
@given(
    text=st.text("model:\n -[]{}#&*!|>'\",?0x1.e_\t%@`<~", max_size=40) | st.binary(max_size=40),
    override=st.text("-=.[]{}&*!'\"_0xb1eE.nafNIA~", max_size=15),
)
def test_whatever_stands_in_it_only_a_configerror_is_raised(tmp_path_factory, text, override):
    file = write(tmp_path_factory.getbasetemp() / "fuzz.yaml", text)
    with suppress(ConfigError):
        load_config(file, [f"train.seed={override}", override])


# --- values ------------------------------------------------------------------------------------

SCALARS = [  # path, as written in YAML, value
    ("train.learning_rate", "3e-5", 3e-5),
    ("train.learning_rate", "1e-4", 1e-4),
    ("train.learning_rate", "1E+2", 100.0),
    ("train.learning_rate", ".5", 0.5),
    ("train.epochs", "1", 1.0),
    ("train.seed", "010", 10),
    ("train.seed", "08", 8),
    ("train.seed", "0x10", 16),
    ("train.seed", "0o17", 15),
    ("train.seed", "+5", 5),
    ("train.output_dir", "no", "no"),
    ("train.output_dir", "yes", "yes"),
    ("train.output_dir", "on", "on"),
    ("train.output_dir", "12:30", "12:30"),
    ("train.output_dir", "2024-01-01", "2024-01-01"),
    ("train.output_dir", "'5'", "5"),
    ("train.output_dir", '"null"', "null"),
    ("train.output_dir", "a b # comment", "a b"),
    ("train.tensorboard", "false", False),
    ("train.tensorboard", "True", True),
    ("train.max_steps", "null", None),
    ("train.max_steps", "~", None),
    ("train.max_tokens", "auto", "auto"),
    ("train.max_tokens", "4096", 4096),
    ("tuning.target_modules", "[q_proj, 'v_proj']", ["q_proj", "v_proj"]),
]


def test_a_newline_in_an_override_stays_in_a_path_and_is_refused_in_a_run_name():
    assert (
        load_config(ROOT / "configs/nano.yaml", ["data.train_path=a\n b.jsonl"]).data.train_path
        == "a\n b.jsonl"
    )
    with pytest.raises(ConfigError, match=r"train.output_dir \(override\): must name a folder"):
        load_config(ROOT / "configs/nano.yaml", ["train.output_dir=outputs/a\nb"])


@pytest.mark.parametrize(("path", "written", "expected"), SCALARS)
def test_a_scalar_is_read_the_same_from_a_file_and_an_override(tmp_path, path, written, expected):
    section, key = path.split(".")
    base = write(tmp_path / "base.yaml", MINIMAL)
    file = write(tmp_path / "a.yaml", f"include: base.yaml\n{section}:\n  {key}: {written}\n")
    for config in (load_config(file), load_config(base, [f"{path}={written}"])):
        found = value(config, path)
        assert found == expected
        assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("path", "written"),
    [
        *[("train.seed", text) for text in ("1.0", "true", "-1", "0b11", "1__0", "", "9" * 5000)],
        *[("train.seed", text) for text in ("'1'", "[1]", "{a: 1}", "null", "1e3", "!!int x")],
        *[("train.max_steps", text) for text in ("0", "-1", str(2**63), "9" * 30)],
        *[("train.epochs", text) for text in (".inf", "-.inf", ".Inf", ".INF", "1e400")],
        *[("train.epochs", text) for text in (".nan", ".NaN", ".NAN", "0", "-1", "9" * 400, "x")],
        *[("train.warmup_ratio", text) for text in ("1", "-0.1", ".nan", ".inf")],
        *[("train.tensorboard", text) for text in ("yes", "no", "on", "1", "'true'", "!!bool x")],
        *[("train.output_dir", text) for text in ("5", "3e-5", "true", "null", "''")],
        *[("train.max_tokens", text) for text in ("Auto", "0", "1.5", "null")],
        *[("tuning.target_modules", text) for text in ("q_proj", "[1]", "[q, null]", "['']")],
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_at_its_path(minimal, path, written):
    (found,) = problems(minimal, f"{path}={written}")
    assert found.startswith(f"{path} (override): expected ")
    assert ", found " in found
    assert len(found) < 200


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "a/../b",
        "..",
        ".",
        "/",
        "./",
        "' '",
        "~/x",
        "x" * 300,
        '"a\\0b"',
        '"a\\nb"',
        "a\u200b",
    ],
)
@pytest.mark.parametrize("path", ["train.output_dir", "classify.output_dir", "distill.data_dir"])
def test_a_text_that_names_no_folder_is_refused(minimal, path, name):
    of_task(minimal, path)
    (found,) = problems(minimal, f"{path}={name}")
    reason = "must name a folder: printable characters, at most 200, without '..' and '~'"
    assert found == f"{path} (override): {reason}"


@pytest.mark.parametrize("name", ["outputs/x", "/scratch/me/run 7", "a/b..c", "1e5x", "x" * 200])
def test_a_run_may_be_in_any_folder_that_can_be_named(minimal, name):
    assert load_config(minimal, [f"train.output_dir={name}"]).train.output_dir == name


@pytest.mark.parametrize(
    "path",
    ["model.name", "model.revision", "data.train_path", "data.system_prompt", "data.cache_dir"],
)
def test_a_nul_in_a_text_is_refused(minimal, path):
    assert any(found.startswith(path) for found in problems(minimal, f'{path}="a\\0b"'))


def test_overrides_beat_the_file_and_the_file_beats_what_it_includes(tmp_path):
    write(tmp_path / "base.yaml", f"{MINIMAL}  seed: 1\n  log_steps: 1\n  max_steps: 1\n")
    text = "include: base.yaml\ntrain:\n  log_steps: 2\n  max_steps: 2\n"
    train = load_config(write(tmp_path / "a.yaml", text), ["train.max_steps=3"]).train
    assert (train.seed, train.log_steps, train.max_steps) == (1, 2, 3)
    assert train.output_dir == "outputs/x"  # a section is laid over, not replaced


def test_of_several_includes_and_of_several_overrides_the_last_wins(tmp_path):
    write(tmp_path / "one.yaml", f"{MINIMAL}  seed: 1\n  log_steps: 1\n")
    write(tmp_path / "two.yaml", "train: {seed: 2}\n")
    file = write(tmp_path / "a.yaml", "include: [one.yaml, two.yaml]\n")
    train = load_config(file, ["train.max_steps=7", "train.max_steps=8"]).train
    assert (train.seed, train.log_steps, train.max_steps) == (2, 1, 8)


def test_an_include_is_relative_to_the_file_that_names_it_at_any_depth(tmp_path, monkeypatch):
    write(tmp_path / "a.yaml", "include: sub/b.yaml\ntrain: {log_steps: 3}\n")
    write(tmp_path / "sub/b.yaml", "include: deep/c.yaml\ntrain: {log_steps: 2, max_steps: 2}\n")
    write(tmp_path / "sub/deep/c.yaml", "include: ../../base.yaml\ntrain: {save_steps: 1}\n")
    write(tmp_path / "base.yaml", f"{MINIMAL}  max_steps: 1\n  save_steps: 9\n")
    monkeypatch.chdir("/")
    train = load_config(tmp_path / "a.yaml").train
    assert (train.log_steps, train.max_steps, train.save_steps) == (3, 2, 1)


def test_a_file_included_twice_without_a_cycle_is_read(tmp_path):
    write(tmp_path / "base.yaml", MINIMAL)
    write(tmp_path / "b.yaml", "include: base.yaml\n")
    write(tmp_path / "c.yaml", "include: base.yaml\n")
    load_config(write(tmp_path / "a.yaml", "include: [b.yaml, c.yaml]\n"))


def test_an_include_cycle_is_refused(tmp_path):
    write(tmp_path / "b.yaml", "include: a.yaml\n")
    file = write(tmp_path / "a.yaml", f"include: b.yaml\n{MINIMAL}")
    assert problems(file) == ["a.yaml: includes itself (a.yaml -> b.yaml)"]


def test_a_missing_include_is_refused(tmp_path):
    file = write(tmp_path / "a.yaml", f"include: none.yaml\n{MINIMAL}")
    assert problems(file) == ["cannot read the configuration none.yaml: No such file or directory"]


@pytest.mark.parametrize("include", ["5", "[1]", "", "{b.yaml: 1}", "[[b.yaml]]", '"b\\0.yaml"'])
def test_an_include_that_names_no_file_is_refused(tmp_path, include):
    file = write(tmp_path / "a.yaml", f"{MINIMAL}include: {include}\n")
    (found,) = problems(file)
    assert "include" in found or "cannot read" in found


TRICKY = "null|~|no|1|010|1e5|a: b|# x|a &b|it's *x|&a|- a|<<|=|[a]|{a|!x|%x|'|\"|12:30|  a |é|😀"
printable = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=20
) | st.sampled_from(TRICKY.split("|"))


# --- flags and other names ---------------------------------------------------------------------

PATHS = [
    (task, f"{name}.{key}")
    for task, schema in schemas().items()
    for name, section in sections_of(schema).items()
    for key in section.model_fields
]
WRITTEN = ["1", "-1", "0.5", "1e-4", "true", "null", "auto", "[a, b]", "{a: b}", "x y", "it's", ""]


def outcome(file: Path, *words: str) -> Any:
    """The configuration, or the message that refuses it, without the name that was used."""
    try:
        return load_run(file, list(words))
    except ConfigError as error:
        return re.sub(r" as \w+\)", ")", str(error))


@pytest.mark.thorough("overrides and aliases here")
@settings(deadline=None, max_examples=150)
@given(
    key=st.sampled_from(PATHS),
    written=st.sampled_from(WRITTEN)
    | printable.filter(lambda text: not re.match(r"--|[\w.]+=", text)),
    joined=st.booleans(),
    dashes=st.booleans(),
    short=st.booleans(),
)
def test_a_flag_gives_what_its_override_gives(
    tmp_path_factory, key, written, joined, dashes, short
):
    task, path = key
    text = MINIMAL if task == "sft" else "task: distill\ntrain: {output_dir: outputs/x}\n"
    file = write(tmp_path_factory.getbasetemp() / f"{task}.yaml", text)
    last = path.split(".")[1]
    same = [p for p, *_ in schemas()[task].paths() if p.endswith(f".{last}")]
    name = last if short and (len(same) == 1 or path.startswith("train.")) else path
    flag = f"--{name.replace('_', '-') if dashes else name}"
    words = [f"{flag}={written}"] if joined else [flag, written]
    assert outcome(file, *words) == outcome(file, f"{path}={written}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tensorboard"], {"tensorboard": True}),
        (["--deterministic", "train.epochs=2"], {"deterministic": True, "epochs": 2.0}),
        (["--deterministic", "--epochs", "2"], {"deterministic": True, "epochs": 2.0}),
        (["--deterministic", "false"], {"deterministic": False}),
        (["--gradient_checkpointing"], {"gradient_checkpointing": True}),
        (["--max_steps", "20", "--max_steps", "30"], {"max_steps": 30}),
        (["--seed", "3", "--output_dir", "a b"], {"seed": 3, "output_dir": "a b"}),
        (["--bf16"], {"precision": "bf16"}),
        (["--bf16", "false"], {"precision": "fp32"}),
        (["--bf16", "--fp16", "false"], {"precision": "bf16"}),
        (["--bf16", "train.precision=bf16"], {"precision": "bf16"}),
        (["--fp16", "false"], {"precision": "auto"}),
        (["--fp16"], {"precision": "fp16"}),
        (["--mixed_precision", "fp16"], {"precision": "fp16"}),
        (["--mixed_precision", "no"], {"precision": "fp32"}),
        (["--per-device-train-batch-size=4", "train.seed=1"], {"micro_batch": 4, "seed": 1}),
        (["train.num_train_epochs=3"], {"epochs": 3.0}),
        (["--train.logging_steps", "5"], {"log_steps": 5}),
        (["--optim", "adamw_torch_fused"], {"optimizer": "adamw"}),
        (["--lr_scheduler_type", "constant_with_warmup"], {"schedule": "constant"}),
        (
            ["--lr_scheduler_type", "linear", "--packing"],
            {"schedule": "linear", "layout": "packed"},
        ),
        (["--resume_from_checkpoint", "auto"], {"resume_from_checkpoint": "auto"}),
    ],
)
def test_flags_are_read_as_people_type_them(minimal, words, expected):
    changed = {f"train.{key}": value for key, value in expected.items()}
    assert load_config(minimal, words) == with_values(load_config(minimal), changed)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--learning_rat", "1"], "--learning_rat: unknown flag; did you mean --learning_rate?"),
        (["--learning_rat=1"], "--learning_rat: unknown flag; did you mean --learning_rate?"),
        (["--confg", "x.yaml"], "--confg: unknown flag; did you mean --config?"),
        (["--zzzzzzzz"], "--zzzzzzzz: unknown flag; docs/CONFIG.md lists the keys"),
        (["--num_streams", "3"], "--num_streams: unknown flag; did you mean --num_"),
        (["--train."], "--train.: unknown flag; "),
        (
            ["--group", "x"],
            "--group: several sections have this key: expected --evaluation.group or "
            "--classify.group",
        ),
        (["--epochs"], "--epochs: expected a value, as in --epochs=1"),
        (["--epochs", "--tensorboard"], "--epochs: expected a value, as in --epochs=1"),
        (["--epochs", "train.seed=1"], "train.epochs (override): expected number > 0, found"),
        (["--train.epoch", "1"], "train.epoch (override): unknown key; did you mean epochs?"),
        (["--trian.seed", "1"], "trian (override): unknown key; did you mean train?"),
        (["--bf16=yes"], "train.bf16 (override): expected true or false, found 'yes'"),
        (
            ["--logging_steps", "x"],
            "train.log_steps (override as logging_steps): expected integer ≥ 1, found 'x'",
        ),
        (
            ["train.micro_batch=8", "--per_device_train_batch_size", "4"],
            "train.per_device_train_batch_size (override): another name of train.micro_batch, "
            "which is given as well, with another value: 4 and 8; remove one",
        ),
        (["data.num_train_epochs=3"], "data.num_train_epochs (override): unknown key; did you"),
        *(
            (words, "train.precision (override" + found)
            for words, found in (
                (["--mixed_precision", "fp8"], " as mixed_precision): expected auto or fp32 or"),
                (["--precision", "fp8"], "): expected auto or fp32 or bf16 or fp16 or bf16_pure"),
            )
        ),
    ],
)
def test_a_flag_that_cannot_be_read_is_one_problem(minimal, words, problem):
    (found,) = problems(minimal, *words)
    assert found.startswith(problem)


def test_bf16_and_fp16_together_are_refused(minimal):
    (conflict,) = problems(minimal, "--bf16", "--fp16")
    assert conflict.startswith("train.fp16 (override): another name of train.precision, ")


def test_other_names_work_in_files_and_each_file_is_laid_over_the_next(tmp_path):
    write(tmp_path / "base.yaml", f"{MINIMAL}  micro_batch: 4\n  bf16: true\n  logging_steps: 7\n")
    text = "include: base.yaml\ntrain:\n  per_device_train_batch_size: 8\n  precision: fp32\n"
    train = load_config(write(tmp_path / "a.yaml", text), ["--logging_steps", "9"]).train
    assert (train.micro_batch, train.precision, train.log_steps) == (8, "fp32", 9)
    file = write(tmp_path / "b.yaml", f"{text}  micro_batch: 2\n  num_train_epochs: x\n")
    assert problems(file) == [
        "train.per_device_train_batch_size (b.yaml:3): another name of train.micro_batch, which "
        "is given as well, with another value: 8 and 2; remove one",
        "train.epochs (b.yaml:6 as num_train_epochs): expected number > 0, found 'x'",
    ]


@pytest.mark.parametrize(("name", "alias"), representatives(ALIASES.items(), 8))
def test_an_alias_is_another_name_of_a_key_and_hides_none(minimal, name, alias):
    section, key = alias.key.split(".")
    assert key in SECTIONS[section].model_fields
    assert name == key or name not in SECTIONS[section].model_fields
    for written in () if alias.is_switch else WRITTEN:
        assert outcome(minimal, f"--{name}={written}") == outcome(minimal, f"{alias.key}={written}")
    for under, own in alias.values.items():
        meant = [] if own is UNSET else [f"{alias.key}={own}"]
        assert outcome(minimal, f"--{name}", str(under).lower()) == outcome(minimal, *meant)


def test_generation_takes_flags(minimal):
    found = parse_generation(["--temperature", "0.5", "generation.top_k=3", "--seed=7"])
    assert (found.temperature, found.top_k, found.seed) == (0.5, 3, 7)


@pytest.mark.usefixtures("own_environment")
def test_a_parser_leaves_flags_of_keys_where_they_stand():
    parser = cli.Parser("sft verb", "A verb.", "configs/nano.yaml")
    parser.add_argument("--seq", type=int)
    line = "--learning_rate 1e-4 --config c.yaml train.epochs=1 --seq 5 --layer -1 --x=y"
    args = parser.parse(shlex.split(line))
    assert (args.config, args.seq) == ("c.yaml", 5)
    assert " ".join(args.overrides) == "--learning_rate 1e-4 train.epochs=1 --layer -1 --x=y"
    with pytest.raises(SystemExit):
        cli.Parser("sft verb", "A verb without a configuration.", None).parse(["--x=y"])


# --- writing -----------------------------------------------------------------------------------

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
no_folder = printable.filter(lambda path: not Path(path).is_dir())  # the run may lie in "."
VALUES = {
    "model.name": printable,
    "model.revision": st.none() | printable,
    "data.train_path": no_folder | st.lists(no_folder, min_size=1, max_size=3),
    "data.columns": st.none() | st.dictionaries(printable, printable, min_size=1, max_size=3),
    "tuning.target_modules": st.just("auto") | st.lists(printable, max_size=3),
    "tuning.lora_alpha": positive,
    "train.learning_rate": positive,
    "train.epochs": positive,
    "train.warmup_ratio": st.floats(0, 1, exclude_max=True),
    "train.seed": st.integers(0, 2**32 - 1),
    "train.max_steps": st.none() | st.integers(1, 10**9),
    "train.max_tokens": st.just("auto") | st.integers(1, 10**9),
    "train.tensorboard": st.booleans(),
    "train.optimizer": st.sampled_from(["adamw", "paged_adamw_8bit"]),
}


@settings(deadline=None, max_examples=30)
@given(
    values=st.fixed_dictionaries(VALUES),
    reasons=st.dictionaries(st.sampled_from(list(VALUES)), printable),
)
def test_what_is_dumped_loads_as_the_same_configuration(tmp_path_factory, values, reasons):
    folder = tmp_path_factory.getbasetemp()
    config = with_values(load_config(write(folder / "minimal.yaml", MINIMAL)), values)
    assert load_config(write(folder / "dumped.yaml", dump_config(config, reasons))) == config


def test_a_dump_names_every_key_and_reasons_stand_beside_their_values(minimal):
    reasons = {
        "train.max_tokens": "16,384 fit in memory: measured # twice",
        "train.max_steps": "no limit",
        "evaluation.num_shown": "the\nlast",
    }
    text = dump_config(load_config(minimal), reasons)
    assert "  max_tokens: auto  # auto: 16,384 fit in memory: measured # twice\n" in text
    assert "  max_steps: null  # auto: no limit\n" in text
    assert "  num_shown: 3  # auto: the last" in text
    lines = [line for line in text.splitlines() if line.startswith("  ") and line[2] != "-"]
    keys = [line.split(":")[0].strip() for line in lines]
    assert keys == [key for path, _, key in Config.paths() if "." in path]


def test_a_configuration_cannot_be_changed_in_place(minimal):
    config = load_config(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 1


# --- documentation and use ---------------------------------------------------------------------


def test_the_reference_is_the_generated_one():
    assert (ROOT / "docs/CONFIG.md").read_text("utf-8") == render_reference(schemas().values()), (
        "run `make docs`"
    )


def test_the_reference_has_a_row_with_a_meaning_for_every_key():
    text = render_reference(schemas().values()).partition("## Other names")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert (
        "| `epochs` | number > 0 | `1` | Passes over the training rows; 0.5 is half a pass. |"
        in rows
    )
    keys = [key for section in KNOWN.values() for key in section.model_fields]
    assert [row.split("`")[1] for row in rows] == keys
    for row in rows:
        _, _, kind, default, meaning, _ = (cell.strip() for cell in row.split("|"))
        assert kind
        assert default
        assert len(meaning) > 10
        assert meaning != "None"


def _pairs(target: ast.expr, source: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(source, ast.Tuple):
        return list(zip(target.elts, source.elts, strict=True))
    return [(target, source)]


def section_names(tree: ast.AST) -> dict[str, str]:
    """Variables that hold a section: annotated with its class, assigned from it, or named so."""
    classes = {section.__name__: name for name, section in SECTIONS.items()}
    names = {name: name for name in SECTIONS}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and getattr(node.annotation, "id", None) in classes:
            names[node.arg] = classes[node.annotation.id]
        if isinstance(node, ast.Assign):
            for target, source in _pairs(node.targets[0], node.value):
                section = getattr(source, "attr", None)
                name = getattr(target, "id", None) or getattr(target, "attr", None)
                if name and section in SECTIONS:
                    names[name] = section
    return names


def keys_read(source: str) -> Iterator[str]:
    """`section.key` of every attribute that is read from a section, or dumped by name."""
    tree = ast.parse(source)
    names = section_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            held = getattr(node.value, "attr", None)  # config.train.key, whatever `train` is here
            holder = getattr(node.value, "id", None) or held
            if held in SECTIONS or holder in names:
                yield f"{held if held in SECTIONS else names[holder]}.{node.attr}"
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "model_dump":
            holder = getattr(node.func.value, "id", None)
            for given in node.keywords:
                literal = not isinstance(given.value, ast.Name)  # else a set that is computed
                if given.arg == "include" and holder in names and literal:
                    yield from (f"{names[holder]}.{key}" for key in ast.literal_eval(given.value))


def test_every_key_of_the_schema_is_read_by_the_package(minimal):
    files = [
        file
        for file in (ROOT / "sft").rglob("*.py")
        if "config" not in file.with_suffix("").parts[-2:]
    ]
    read = {key for file in files for key in keys_read(file.read_text("utf-8"))}
    read |= {f"data.{key}" for key in read_options(load_config(minimal).data)}
    keys = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    assert keys - read == set(), "accepted but read by nobody"


def test_the_search_for_read_keys_sees_reads_and_nothing_else():
    source = """
def f(settings: Train, other: Engine):
    '''train.seed'''
    part, size = config.evaluation, 3
    print(settings.epochs, part.batch_size, self.train.log_steps, other.layout, "data.max_rows")
    self.given = self.config.crowd
    print(self.given.agent)
def g(rows: Data):
    return rows.model_dump(include={"columns"})
"""
    assert set(keys_read(source)) - {"data.model_dump"} == {
        "crowd.agent",
        "data.columns",
        "train.epochs",
        "evaluation.batch_size",
        "train.log_steps",
    }


def test_the_loader_imports_no_heavy_library():
    heavy = "{'torch', 'transformers', 'accelerate', 'numpy', 'peft'}"
    code = f"import sys, sft.config.load, sft.cli; print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# --- scripts -----------------------------------------------------------------------------------


def test_a_script_reports_a_bad_key_in_one_message_before_torch_is_imported(minimal):
    command = [sys.executable, "scripts/train.py", "--config", str(minimal), "train.epoch=1"]
    done = run(*command, PYTHONPROFILEIMPORTTIME="1")
    lines = done.stderr.splitlines()
    imported = {line.rsplit("|")[-1].strip() for line in lines if line.startswith("import time:")}
    found = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == 2
    assert done.stdout == ""
    assert found == [
        f"error: {minimal}: 1 problem in the configuration",
        "  train.epoch (override): unknown key; did you mean epochs?",
    ]
    assert "sft.config" in imported
    assert "torch" not in imported


@pytest.fixture
def own_environment(monkeypatch) -> None:
    """A copy: a script may set variables for the libraries that it loads."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


class Odd(UserError):
    exit_code = 77


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize(
    ("raised", "code", "found"),
    [
        (None, 0, ""),
        (ConfigError("bad key"), 2, "error: bad key\n"),
        (Odd("odd"), 77, "error: odd\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_script_exits_with_the_code_of_what_ended_it(capsys, monkeypatch, raised, code, found):
    def main() -> None:
        if raised:
            raise raised

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as exited:
        cli.run(main)
    assert exited.value.code == code
    assert capsys.readouterr().err == found


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize("under", ["torchrun", "srun"])
def test_the_first_rank_of_a_node_reports_its_error_and_all_exit_with_their_code(
    capsys, monkeypatch, tmp_path, under
):
    def main() -> None:
        raise ConfigError("bad key")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = []
    for rank in ("1", "0"):
        (tmp_path / rank).mkdir()
        os.environ |= {"RANK": rank, "WORLD_SIZE": "2"}
        if under == "torchrun":
            os.environ["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / rank / "error.json")
        else:
            os.environ |= {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
        with pytest.raises(SystemExit) as exited:
            cli.run(main)
        assert exited.value.code == 2
        found.append(capsys.readouterr().err)
    assert found == ["error: rank 1: bad key\n", ""]


@pytest.mark.usefixtures("own_environment")
def test_a_mistake_in_the_program_is_not_hidden_as_one_of_the_user():
    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(main)


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize("given", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_of_gpu_memory_grow_unless_the_user_says_otherwise(monkeypatch, given):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:128")
    with pytest.raises(SystemExit):
        cli.run(lambda: None)
    expected = None if given == "PYTORCH_CUDA_ALLOC_CONF" else "max_split_size_mb:128"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (
        expected if given else "expandable_segments:True"
    )


@pytest.mark.parametrize(
    ("cache", "run"),
    [
        ("runs/a", "runs/a"),
        ("runs", "runs/a"),
        ("runs/a/cache", "runs/a"),
        ("runs/b/../a/cache", "runs/a"),
        ("link", "runs/a"),
        ("link/cache", "runs/a"),
        ("runs/a/cache", "link"),
        (".", "runs/a"),
    ],
)
def test_a_cache_and_a_run_folder_that_overlap_are_refused(tmp_path, monkeypatch, cache, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs/a")
    assert overlap(cache, run)
    assert overlap(run, cache)
    given = [f"data.cache_dir={cache}", f"train.output_dir={run}"]
    with pytest.raises(ConfigError, match="must not be, hold or lie in train"):
        load_config(ROOT / "configs/nano.yaml", given)


def test_a_cache_beside_a_run_folder_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for cache, folder in (("runs/cache", "runs/a"), ("runs/a2", "runs/a"), ("c/a", "d/a")):
        assert not overlap(cache, folder)


def test_a_name_that_the_encoding_of_file_names_lacks_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(cli, "prepare_libraries", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: "outputs/ünï".encode("ascii") and 0)
    assert ended.value.code == 2
    expected = "error: 'outputs/\\xfcn\\xef': a file cannot have this name in ascii"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_an_override_in_another_encoding_is_refused_with_the_remedy(minimal, monkeypatch, encoding):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    (found,) = problems(minimal, "data.train_path=caf\udce9.jsonl")
    assert found.startswith(f"override data.train_path: expected text in {encoding}, ")
    assert found.endswith("set PYTHONUTF8=1") == (encoding == "ascii")
