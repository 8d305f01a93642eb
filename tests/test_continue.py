"""A run that goes on from an adapter: its shape, its weights and its base are those that it has."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_export import commit
from test_models import wake
from transformers import AutoModelForCausalLM

from sft.config.load import dump_config, load_config
from sft.config.schema import Config
from sft.data import cache
from sft.errors import CheckpointError, ConfigError, ExportError
from sft.models import export, layers
from sft.models.digests import model_sha256
from sft.serve import runs
from sft.tasks.sft.task import FineTune

CPU = torch.device("cpu")
SHAPE = ["tuning.r=6", "tuning.lora_alpha=9", "tuning.lora.use_dora=true"]


def base(folder: Path, seed: int) -> Path:
    shutil.copytree(ROOT / "nano/model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    built: Any = tiny.llama(vocab_size=1024)
    torch.manual_seed(seed)
    built.lm_head.weight.data.normal_()
    built.save_pretrained(folder)
    return folder


def configured(base: Path, folder: Path, *overrides: str) -> Config:
    given = [f"model.name={base}", "data.train_path=d", f"train.output_dir={folder}"]
    return load_config(None, [*given, *overrides])


def finished(config: Config) -> dict[str, torch.Tensor]:
    """Saves a run; returns its trained weights."""
    built: Any = FineTune.build_model(config, "fp32", CPU)
    wake(built, 0.1)
    tokenizer = cache.load_tokenizer(config)
    commit(config, lambda to: export.save(built, tokenizer, to, base=config.model))
    Path(config.train.output_dir, "config.yaml").write_text(dump_config(config))
    return trained(built)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in layers.weights_to_save(model).items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("first")
    config = configured(base(folder / "base", 1), folder / "run", *SHAPE)
    return folder / "base", folder / "run/final_checkpoint", finished(config)


def test_it_begins_with_the_weights_and_the_shape_of_the_adapter(first, tmp_path):
    folder, adapter, weights = first
    config = configured(folder, tmp_path / "run", f"model.adapter={adapter}")
    assert (config.tuning.r, config.tuning.lora_alpha, config.tuning.lora.use_dora) == (6, 9, True)
    built = FineTune.build_model(config, "fp32", CPU)
    found = trained(built)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    plain = configured(folder, tmp_path / "run", *SHAPE)
    assert model_sha256(config.model) != model_sha256(plain.model)
    skeleton = FineTune.skeleton(config)
    assert trained(skeleton).keys() == weights.keys()


def test_what_it_has_learnt_needs_the_first_adapter_no_more(first, tmp_path):
    folder, adapter, _ = first
    lent = shutil.copytree(adapter, tmp_path / "lent")
    weights = finished(configured(folder, tmp_path / "run", f"model.adapter={lent}"))
    shutil.rmtree(lent)
    served, _ = runs.load_trained(tmp_path / "run", runs.load_run_config(tmp_path / "run"))
    found = trained(served)
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("overrides", "reported"),
    [
        (["tuning.r=8"], "tuning.r (override): the adapter in "),
        (["tuning.lora.r=8"], "has 6, found 8; remove this key, or model.adapter"),
        (["tuning.lora.use_dora=false"], "has True, found False"),
        (["tuning.lora.init_lora_weights=pissa"], "has True, found 'pissa'"),
        (["tuning.target_modules=[q_proj]"], "found ['q_proj']"),
        (["tuning.mode=full"], "an adapter is trained with tuning.mode: lora or qlora"),
        (["crowd.num_agents=2"], "agents begin with adapters of their own"),
        (["model.adapter=nowhere"], "nowhere: expected the folder of an adapter"),
    ],
)
def test_contradictions_are_refused(first, tmp_path, overrides, reported):
    folder, adapter, _ = first
    with pytest.raises(ConfigError) as caught:
        configured(folder, tmp_path, f"model.adapter={adapter}", *overrides)
    assert reported in str(caught.value)


@pytest.mark.parametrize("given", [[], SHAPE, ["tuning.target_modules=auto", "tuning.r=6"]])
def test_what_agrees_may_be_written_out(first, tmp_path, given):
    folder, adapter, _ = first
    assert configured(folder, tmp_path, f"model.adapter={adapter}", *given).tuning.r == 6


def test_another_base_is_refused(first, tmp_path):
    _, adapter, _ = first
    other = base(tmp_path / "base", 2)
    config = configured(other, tmp_path / "run", f"model.adapter={adapter}")
    with pytest.raises(ExportError, match=r"belongs to .*: expected its weights, of digest"):
        FineTune.build_model(config, "fp32", CPU)


def test_an_adapter_of_peft_goes_on_and_one_of_a_changed_base_is_only_used(first, tmp_path):
    folder, _, _ = first
    for init in (False, "pissa"):
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        shape = LoraConfig(r=3, target_modules=["q_proj", "no_such_proj"], init_lora_weights=init)
        built: Any = get_peft_model(plain, shape)
        wake(built, 0.1)
        built.save_pretrained(tmp_path / str(init))
        ids = torch.arange(2, 9)[None]
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = PeftModel.from_pretrained(again, tmp_path / str(init))(input_ids=ids).logits
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        used = FineTune.with_adapter(own, str(folder), tmp_path / str(init))
        torch.testing.assert_close(used(input_ids=ids).logits, expected)
        given = f"model.adapter={tmp_path / str(init)}"
        if init:
            with pytest.raises(ConfigError, match="pissa: it belongs to a changed base"):
                configured(folder, tmp_path / "run", given)
            continue
        config = configured(folder, tmp_path / "run", given)
        gone_on: Any = FineTune.build_model(config, "fp32", CPU).eval()
        torch.testing.assert_close(gone_on(input_ids=ids).logits, expected)


def test_a_file_that_is_no_adapter_is_one_problem(first, tmp_path):
    folder, adapter, _ = first
    known = json.loads((adapter / "adapter_config.json").read_text())
    for text in ("", "[]", "7", '{"r": 1}', json.dumps(known | {"r": "x"}), "[" * 9000):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"1 problem in the configuration\n  model\.adapter"):
            configured(folder, tmp_path / "run", f"model.adapter={tmp_path}")


def other_file(folder: Path, adapter: Path, kind: str) -> Path:
    """Copies an adapter whose weights are missing, pickled, in parts, or more than those it names.

    Or whose config is that of another kind of adapter.
    """
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    known = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(path)
    if kind == "none":
        path.unlink()
    elif kind in ("adapter_model.bin", "adapter_model-00001-of-00002.safetensors"):
        path.rename(folder / kind)
    elif kind.startswith("base_model"):
        save_file(weights | {kind: torch.ones(6, 32)}, path)
    else:
        known["peft_type"] = kind
    (folder / "adapter_config.json").write_text(json.dumps(known))
    return folder


OTHER_FILES = {
    "none": "expected adapter_model.safetensors, found none",
    "adapter_model.bin": "found adapter_model.bin (a pickle, which could make code run); load it",
    "adapter_model-00001-of-00002.safetensors": "of-00002.safetensors; load it with PEFT",
    "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": "for which there is no place",
    "base_model.model.model.norm.weight": "unlike that of the base",
    "IA3": "expected peft_type LORA, found 'IA3'",
    "PREFIX_TUNING": "expected peft_type LORA, found 'PREFIX_TUNING'",
}


@pytest.mark.parametrize(("kind", "reported"), OTHER_FILES.items())
def test_weights_that_are_not_read_are_refused_with_the_reason(first, tmp_path, kind, reported):
    folder, adapter, _ = first
    other = other_file(tmp_path / "other", adapter, kind)
    with pytest.raises((ConfigError, CheckpointError), match=re.escape(reported)):
        FineTune.build_model(configured(folder, tmp_path, f"model.adapter={other}"), "fp32", CPU)
    base = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ExportError, match=re.escape(reported)):
        FineTune.with_adapter(base, str(folder), other)


def test_copies_of_embeddings_that_peft_saves_are_those_of_the_base(first, tmp_path):
    folder, _, _ = first
    plain = AutoModelForCausalLM.from_pretrained(folder)
    built: Any = get_peft_model(plain, LoraConfig(target_modules=["q_proj", "lm_head"]))
    wake(built, 0.1)
    built.save_pretrained(tmp_path)
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    own: Any = FineTune.with_adapter(plain.from_pretrained(folder), str(folder), tmp_path)
    ids = torch.arange(2, 9)[None]
    torch.testing.assert_close(own(input_ids=ids).logits, built(input_ids=ids).logits)
