"""New tokens: added, begun as the mean of their pieces, trained alone, saved, served, counted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
import torch
from conftest import ROOT, representatives
from peft import PeftModel
from test_export import commit
from test_lora import problem
from test_merge import quiet
from test_models import wake
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sft.config.load import dump_config, load_config, with_values
from sft.config.lora import Lora
from sft.config.schema import Config, Model, Tuning
from sft.data import audit_report, cache
from sft.data.batches import Budget
from sft.errors import ConfigError, DataError, ModelError
from sft.evaluate.answers import AnswerModel, Question
from sft.models import adapt, export, layers, load, pretrained, vocabulary
from sft.plan import dry_run
from sft.runtime import processes
from sft.runtime.log import Log
from sft.runtime.processes import Context
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
@pytest.mark.parametrize(
    ("mode", "tied"), representatives([("lora", True), ("full", False), ("qlora", False)], 2)
)
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


def test_a_run_goes_on_with_the_new_tokens_of_its_adapter(tmp_path):
    folder = base(tmp_path / "base", False)
    finished(configured(folder, "lora", tmp_path / "first"))
    adapter = f"model.adapter={tmp_path / 'first/final_checkpoint'}"
    given = [f"model.name={folder}", adapter, f"train.output_dir={tmp_path / 'run'}", "tuning.r=4"]
    config: Any = load_config(ROOT / "configs/nano.yaml", given)
    assert config.model.new_tokens == NEW
    own = f"model.new_tokens={json.dumps(NEW)}"
    assert load_config(ROOT / "configs/nano.yaml", [*given, own]) == config
    built = finished(config)
    served, _ = runs.load_trained(tmp_path / "run", runs.load_run_config(tmp_path / "run"))
    torch.testing.assert_close(logits(served), logits(built))
    for tokens in (["<b>"], [*NEW, "<b>"]):  # "<b>" would get the row of "<plan>"
        with pytest.raises(ConfigError, match=r"has rows of \['<plan>', 'Slowga'\], found"):
            load_config(
                None, [*given, "data.train_path=d", f"model.new_tokens={json.dumps(tokens)}"]
            )


def test_rows_that_a_base_has_learnt_stay(tmp_path):
    folder = base(tmp_path / "base", False)
    built = finished(configured(folder, "full", tmp_path / "run"))
    learnt = tmp_path / "run/final_checkpoint"
    for tokens in (["<more>"], ["<plan>", "<more>"]):
        again: Any = load.load_base(Model(name=str(learnt), new_tokens=tokens), "lora", "fp32", CPU)
        assert again.new_token_ids == ([1026] if len(tokens) == 1 else [1024, 1026])
        for old, new in zip(
            layers.embedding_layers(built), layers.embedding_layers(again), strict=True
        ):
            assert torch.equal(old.weight, new.weight[:1026])  # type: ignore[union-attr,index]


def test_rows_may_be_listed_by_module_beside_new_tokens():
    built: Any = tiny.llama()
    built.new_token_ids = [7]
    given = Tuning(lora=Lora(trainable_token_indices={"embed_tokens": [3]}))
    found = vocabulary.trained_tokens(built, given).lora.trainable_token_indices
    assert found == {"embed_tokens": [3, 7], "lm_head": [7]}


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


@pytest.mark.parametrize(
    ("token", "reported"),
    [
        ("<|im_start|>", "'<|im_start|>' is a token of this tokenizer already (id 1)"),
        ("é", "'é' is the name of another token in this tokenizer (id 168)"),  # of a byte
    ],
)
def test_a_token_that_exists_is_no_new_one(token, reported):
    with pytest.raises(ModelError, match=re.escape(reported)):
        pretrained.load_tokenizer(Model(name=str(ROOT / "nano/model"), new_tokens=[token]))


def test_a_token_with_a_space_may_be_stored_otherwise():
    table = {"Ġ": 0, "t": 1, "Ġt": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(table, [("Ġ", "t")]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(ModelError, match=r"' t' is a token of this tokenizer already \(id 2\)"):
        vocabulary.add_tokens(PreTrainedTokenizerFast(tokenizer_object=inner), [" t"])


def test_trained_rows_and_an_adapter_of_the_same_layer_are_refused():
    tuning = Tuning(target_modules=["lm_head"], lora=Lora(trainable_token_indices=[1]))
    with pytest.raises(ModelError, match="lm_head would have an adapter and trained rows"):
        adapt.add_adapters(tiny.llama(tie_word_embeddings=True), tuning)


def test_what_cannot_work_with_new_tokens_is_refused(tmp_path):
    new = "model.new_tokens=['<a>']"
    assert "agents share the embeddings" in problem(tmp_path, new, "crowd.num_agents=2")


# --- ids for which a model has no embedding ---------------------------------------------------

EXTRA = "<extra>"  # the tokenizer's 1,025th token; the model has 1,024


def outgrown(folder: Path, **special: str) -> Config:
    """A model whose tokenizer has one token more than it has embeddings, and no weights yet."""
    shutil.copytree(ROOT / "nano/model", folder / "base", ignore=lambda *_: ["model.safetensors"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens([EXTRA])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder / "base")
    values = {"model.name": str(folder / "base"), "train.output_dir": str(folder / "run")}
    values |= {"data.cache_dir": str(folder / "cache"), "data.max_rows": 20}
    return with_values(load_config(ROOT / "configs/nano.yaml"), values)


def with_rows(config: Config, folder: Path, last: dict[str, Any]) -> Config:
    rows = [*({"prompt": f"{n}?", "completion": f"{n}."} for n in range(9)), last]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return with_values(config, {"data.train_path": str(path), "data.eval_path": str(path)})


UNKNOWN = r"expected token ids below 1,024.* found 1,024 \('<extra>'\); use the tokenizer"


@pytest.mark.parametrize(
    "last",
    [
        {"prompt": f"{EXTRA}?", "completion": "10."},
        {"prompt": "10?", "completion": f"10.{EXTRA}"},
        {"input_ids": [5, 1024, 7], "labels": [-100, 1024, 7]},
    ],
    ids=["prompt", "answer", "tokenised"],
)
def test_a_row_with_an_id_beyond_the_embeddings_is_refused_before_weights_are_read(tmp_path, last):
    config = with_rows(outgrown(tmp_path), tmp_path, last)
    with pytest.raises(DataError, match=r"rows\.jsonl:10: " + UNKNOWN):
        FineTune.workload(config)  # of a plan; a run and a check prepare the same way


def test_a_tokenizer_may_have_ids_that_no_row_uses(tmp_path):
    config = outgrown(tmp_path, pad_token=EXTRA)
    prepared = FineTune.prepare(config)
    assert prepared.tokenizer.pad_token_id == 1024
    context = Context(processes.start_processes(config.train), Log(None))
    budget = Budget(10_000, "padded")
    task = FineTune(config, prepared, tiny.llama(vocab_size=1024), budget, context)
    lengths = np.asarray(prepared.train.lengths)
    batch = task.collate([int(lengths.argmin()), int(lengths.argmax())])  # the first one is padded
    assert task.loss(task.model, batch)[0].isfinite()


def test_a_prompt_with_an_id_beyond_the_embeddings_has_no_answer(tmp_path):
    tokenizer = cache.load_tokenizer(outgrown(tmp_path))
    model = AnswerModel(tiny.llama(vocab_size=1024), [], tokenizer=tokenizer, identity="")
    for text, is_known in ((EXTRA, False), ("Good day", True)):
        found = model.render_prompt(Question([{"role": "user", "content": text}], None, {}))
        assert is_known == isinstance(found, list)
        assert is_known or re.search(UNKNOWN, str(found))


def test_only_rows_that_exist_are_trained():
    tuning = Tuning(lora=Lora(trainable_token_indices={"embed_tokens": [5], "lm_head": [1024]}))
    with torch.device("meta"), pytest.raises(ModelError, match="indices: expected token ids below"):
        adapt.add_adapters(tiny.llama(vocab_size=1024), tuning)  # as a plan does, without values
