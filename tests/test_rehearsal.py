"""Configurations for models that no test machine holds, with all their layers and narrow ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from sft.config.load import load_config
from sft.models.pretrained import narrow

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
GEMMA_27B = {
    "model_type": "gemma2",
    "hidden_size": 4608,
    "intermediate_size": 36_864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
}
SHAPES = {"run_70b": LLAMA_70B, "run_gemma27b_distributed": GEMMA_27B}


def write_narrow(folder: Path, shape: dict[str, Any]) -> Path:
    """A random model with all layers of `shape`, and the embedded model's tokenizer."""
    model = folder / "model"
    shutil.copytree(ROOT / "nano/model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    ends = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    (model / "config.json").write_text(json.dumps(shape | ends))
    torch.manual_seed(0)
    whole = narrow(AutoConfig.from_pretrained(model))
    assert whole.num_hidden_layers == shape["num_hidden_layers"]
    AutoModelForCausalLM.from_config(whole, dtype=torch.bfloat16).save_pretrained(model)
    return model


@pytest.mark.slow
@pytest.mark.thorough("the engines with few layers: test_parallel")
@pytest.mark.parametrize("name", SHAPES)
def test_a_large_model_is_rehearsed_with_all_its_layers(tmp_path, name):
    """The configuration's own engine and precision on two processes; saved, stopped and resumed."""
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    rows.write_text("".join((ROOT / "nano/train.jsonl").open().readlines()[:24]))
    own = [f"model.name={write_narrow(tmp_path, SHAPES[name])}", f"data.train_path={rows}"]
    own += [f"data.cache_dir={tmp_path / 'cache'}", f"train.output_dir={out}"]
    own += ["data.audit=warn", "data.eval_fraction=0.2", "evaluation.num_examples=0"]
    own += ["train.max_steps=2", "train.global_batch=4", "train.save_steps=1"]
    own += ["train.eval_steps=null"]
    config = load_config(str(ROOT / f"configs/{name}.yaml"), own)
    command = ["scripts/train_distributed.py", "--config", f"configs/{name}.yaml", *own]
    printed = forked.launch(2, command)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 2), printed
    assert f"2 ({config.train.engine})" in printed
    assert "every rank reads the whole model" not in printed
    saved = {**load_file(next((out / "final_checkpoint").glob("*.safetensors")))}
    layers = {int(part) for each in saved for part in each.split(".") if part.isdigit()}
    assert layers == set(range(SHAPES[name]["num_hidden_layers"]))
    assert all(bool(weight.isfinite().all()) for weight in saved.values())
