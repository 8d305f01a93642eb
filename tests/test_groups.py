"""Learning rates, weight decay and freezing by groups of parameters, and LoRA+."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_lora import problem

from sft.config.load import with_values
from sft.config.schema import Config
from sft.data import batches
from sft.errors import AnotherRunError, ConfigError
from sft.models.groups import freeze_groups
from sft.train.optimizer import build_optimizer
from sft.train.schedule import learning_rate

B, FIRST = {"match": "lora_B", "learning_rate": 0.5}, {"match": r"layers\.0\.", "freeze": True}


def configured(folder: Path, mode: str, **train: Any) -> Config:
    config = tiny.config(folder, max_steps=3, epochs=9.0, weight_decay=0.1)
    values = {"tuning.mode": mode, "tuning.r": 4}
    return with_values(config, values | {f"train.{key}": value for key, value in train.items()})


def built(config: Config) -> Any:
    return tiny.llama() if config.tuning.mode == "full" else tiny.adapted(config)


def engine_of(config: Config) -> Any:
    rows = tiny.examples(0, 16)
    budget = batches.Budget(4096, "padded")
    return tiny.make_engine(built(config), rows, rows[:2], config, budget)


def peaks(config: Config) -> dict[str, tuple[float, float]]:
    """Returns the peak learning rate and the weight decay of each trained parameter."""
    model = built(config)
    freeze_groups(model, config.train)
    names = {p: name for name, p in model.named_parameters()}
    groups = build_optimizer(config.train, model).param_groups
    return {names[p]: (g["peak"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("groups", [[B], [B, {"match": "q_proj", "weight_decay": 0.3}]])
def test_the_first_group_that_matches_decides(tmp_path, groups):
    for name, found in peaks(configured(tmp_path, "lora", groups=groups)).items():
        is_q = "q_proj" in name and len(groups) > 1
        assert found == ((0.5, 0.1) if "lora_B" in name else (1e-3, 0.3 if is_q else 0.1)), name


def test_lora_plus_trains_b_faster_as_peft_does(tmp_path):
    from peft.optimizers import create_loraplus_optimizer

    config = configured(tmp_path, "lora", loraplus_lr_ratio=16.0)
    model = built(config)
    names = {p: name for name, p in model.named_parameters()}
    rated = {"lr": 1e-3, "loraplus_weight_decay": 0.1}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=16.0, **rated)
    expected = {
        names[p]: (g["lr"], g["weight_decay"]) for g in theirs.param_groups for p in g["params"]
    }
    assert peaks(config) == expected
    assert {rate for rate, _ in expected.values()} == {1e-3, 16e-3}


def test_the_schedule_scales_the_peak_of_each_group(tmp_path):
    config = configured(tmp_path, "lora", groups=[B], warmup_ratio=0.5)
    engine = engine_of(config)
    for step in range(3):
        engine.step = step
        engine.optimizer_step()
        found = sorted(group["lr"] for group in engine.optimizer.param_groups)
        expected = [learning_rate(config.train, step, 3, peak) for peak in (1e-3, 0.5)]
        assert found == sorted(expected)


@pytest.mark.parametrize(("mode", "frozen"), [("full", r"layers\.0\.|embed"), ("lora", "lora_A")])
def test_frozen_parameters_stay_are_saved_and_resumed(tmp_path, mode, frozen):
    config = configured(tmp_path, mode, groups=[{"match": frozen, "freeze": True}])
    engine = engine_of(config)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    engine.optimizer_step()
    engine.step = 1
    folder = engine.save()
    for name, parameter in engine.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        is_trained = mode == "full" or "lora_" in name
        is_frozen = any(part in name for part in ("layers.0.", "embed")) and mode == "full"
        assert changed == (is_trained and not is_frozen and "lora_A" not in name), name
    files = [*folder.glob("*model*.safetensors")]
    saved = {key for path in files for key in load_file(path)}
    assert len(saved) == len(engine.parallel.saved)
    assert len(saved) > len(engine.parallel.trained)
    engine.optimizer_step()
    resumed = engine_of(config)
    resumed.read(folder)
    resumed.optimizer_step()
    for one, other in zip(engine.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(AnotherRunError, match="freeze"):
        engine_of(configured(tmp_path, mode)).read(folder)


@pytest.mark.parametrize(
    ("groups", "reported"),
    [
        ([{"match": "lora_C", "learning_rate": 1.0}], "no trained parameter; did you mean lora_"),
        ([B, {"match": "q_proj.lora_B", "freeze": True}], "only what 'lora_B' before it matches"),
        ([{"match": ".", "freeze": True}], "nothing is left to train"),
        ([{"match": "embed_tokens", "freeze": True}], "matches the name of no trained parameter"),
    ],
)
def test_a_group_of_nothing_is_refused(tmp_path, groups, reported):
    config = configured(tmp_path, "lora", groups=groups)
    with pytest.raises(ConfigError, match=reported):
        freeze_groups(built(config), config.train)


@pytest.mark.parametrize(
    ("override", "reported"),
    [
        ("train.groups=[{match: q, lr: 1}]", "train.groups.0.lr: unknown key; known: match"),
        ("train.groups=[{match: '(', freeze: true}]", "expected a regular expression"),
        ("train.groups=[{match: q}]", "or freeze: true; found neither"),
        (
            "train.groups=[{match: q, freeze: true, learning_rate: 1}]",
            "a frozen parameter has none",
        ),
        ("train.groups=[]", "train.groups"),
        ("train.loraplus_lr_ratio=0", "expected number > 0"),
    ],
)
def test_groups_that_say_nothing_are_refused(tmp_path, override, reported):
    assert reported in problem(tmp_path, override)


def test_lora_plus_needs_adapters(tmp_path):
    given = ["tuning.mode=full", "train.loraplus_lr_ratio=16"]
    assert "only read with tuning.mode: lora or qlora" in problem(tmp_path, *given)
