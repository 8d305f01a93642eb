"""New tokens: added, begun as the mean of their pieces, trained alone, saved, served, counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT
from peft import PeftModel
from test_export import commit
from test_lora import problem
from test_merge import quiet
from test_models import wake
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.config.load import dump_config, load_config, with_values
from sft.config.schema import Config, Model
from sft.data import audit_report, cache
from sft.errors import ModelError
from sft.models import export, layers, load, pretrained
from sft.plan import dry_run
from sft.serve import merge, runs
from sft.tasks.sft.saved import SavedTuning
from sft.tasks.sft.task import FineTune

CPU = torch.device("cpu")
NEW = ["<plan>", "Slowga"]
IDS = [1024, 1025]


def base(folder: Path, tied: bool) -> Path:
    """A random Llama with the embedded tokenizer, of 1,024 tokens."""
    shutil.copytree(ROOT / "nano/model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    built: Any = tiny.llama(vocab_size=1024, tie_word_embeddings=tied)
    built.generation_config.eos_token_id = 1
    built.save_pretrained(folder)
    return folder


def configured(base: Path, mode: str, folder: Path) -> Config:
    values = {"model.name": str(base), "model.new_tokens": NEW, "tuning.mode": mode}
    values |= {"train.output_dir": str(folder), "tuning.r": 4}
    return with_values(load_config(ROOT / "configs/nano.yaml"), values)


def finished(config: Config) -> Any:
    """Returns a trained model, which is saved as that of a finished run."""
    built: Any = FineTune.build_model(config, "fp32", CPU)
    wake(built, 0.1)
    tokenizer = cache.load_tokenizer(config)
    own = None if config.tuning.mode == "full" else config.model
    commit(config, lambda target: export.save(built, tokenizer, target, base=own))
    Path(config.train.output_dir, "config.yaml").write_text(dump_config(config))
    return built.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([[5, 9, *IDS, 200, 17]])).logits


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_begin_as_the_mean_of_their_pieces(tmp_path, tied):
    folder = base(tmp_path / "base", tied)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    built = load.load_base(Model(name=str(folder), new_tokens=NEW), "lora", "fp32", CPU)
    assert built.config.vocab_size == 1026  # type: ignore[union-attr]
    for old, new in zip(
        layers.embedding_layers(plain), layers.embedding_layers(built), strict=True
    ):
        assert torch.equal(new.weight[:1024], old.weight)  # type: ignore[union-attr,index]
        for token, i in zip(NEW, IDS, strict=True):
            pieces = tokenizer.encode(token, add_special_tokens=False)
            torch.testing.assert_close(new.weight[i], old.weight[pieces].mean(0))  # type: ignore[union-attr,index]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "tied"), [("lora", True), ("qlora", False), ("full", False)])
def test_new_tokens_are_trained_saved_served_and_merged(tmp_path, mode, tied):
    config = configured(base(tmp_path / "base", tied), mode, tmp_path / "run")
    built = finished(config)
    skeleton = FineTune.skeleton(config)
    sizes = {name: p.shape for name, p in layers.weights_to_save(skeleton).items()}
    assert sizes == {name: p.shape for name, p in layers.weights_to_save(built).items()}
    assert dry_run.trace_step(config, "bf16", dry_run.Window((((20, 9),),))).phases
    served, tokenizer = runs.load_trained(tmp_path / "run", runs.load_run_config(tmp_path / "run"))
    torch.testing.assert_close(logits(served), logits(built))
    assert tokenizer.convert_tokens_to_ids(NEW) == IDS
    assert tokenizer.encode("<plan>", add_special_tokens=False) == [1024]
    if mode == "full":
        return
    rows = {n: p.shape[0] for n, p in built.named_parameters() if p.requires_grad}
    own = {name: size for name, size in rows.items() if "lora_" not in name}
    assert list(own.values()) == [2] * (1 if tied else 2)  # no whole matrix is trained
    final = tmp_path / "run/final_checkpoint"
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    if mode == "lora":
        alone = SavedTuning.with_adapter(plain, str(tmp_path / "base"), final)
        torch.testing.assert_close(logits(alone), logits(built))
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        fresh.resize_token_embeddings(1026)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, final)), logits(built))
    report = merge.merge(tmp_path / "run", tmp_path / "merged", "fp32", quiet)
    assert all(check["ok"] for check in report["checks"].values())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 1026
    if mode == "lora":
        torch.testing.assert_close(logits(merged), logits(built), atol=1e-4, rtol=1e-4)


def test_the_audit_counts_how_often_new_tokens_are_supervised(tmp_path):
    rows = [("Slowga", "go to Slowga <plan>"), ("<plan>", "to Slowga"), ("a", "b")]
    messages = [
        {"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}
        for u, a in rows
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, messages)))
    config = configured(ROOT / "nano/model", "lora", tmp_path / "run")
    paths = {"data.train_path": str(path), "data.cache_dir": str(tmp_path / "cache")}
    prepared = cache.prepare(with_values(config, {**paths, "data.audit": "warn"}))
    assert prepared.audit["new_tokens"] == {"<plan>": 1, "Slowga": 2}
    line = audit_report.summarise(prepared.audit)
    assert line.endswith(
        "new token <plan> is once supervised; new token Slowga is 2 times supervised"
    )


def test_a_token_that_exists_is_no_new_one():
    nano = str(ROOT / "nano/model")
    known = max(AutoTokenizer.from_pretrained(nano).get_vocab(), key=len)
    with pytest.raises(ModelError, match="is a token of this tokenizer already"):
        pretrained.load_tokenizer(Model(name=nano, new_tokens=[known]))


def test_what_cannot_work_with_new_tokens_is_refused(tmp_path):
    new = "model.new_tokens=['<a>']"
    assert "agents share the embeddings" in problem(tmp_path, new, "crowd.num_agents=2")
    indices = "tuning.lora.trainable_token_indices={embed_tokens: [1]}"
    assert "trained in all embeddings" in problem(tmp_path, new, indices)
