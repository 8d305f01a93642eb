"""Save, load back, merge and prove; a merge that is not the same model fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_model import wake
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft import chat, checkpoint, export, model, processes
from sft.config import Config, dump_config, load_config, with_values

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["lora", "qlora"])
def run(request, tmp_path_factory) -> Path:
    """A finished run with an adapter that changes the model, without the training."""
    folder = tmp_path_factory.mktemp(request.param)
    return finished(folder, request.param)


def finished(folder: Path, mode: str, base: Path = ROOT / "nano/model", std: float = 0.1) -> Path:
    config = with_values(
        load_config(ROOT / "configs/nano.yaml"),
        {
            "tuning.mode": mode,
            "model.name": str(base),
            "train.output_dir": str(folder),
        },
    )
    tokenizer = chat.prepare_tokenizer(model.load_tokenizer(config.model))
    built = model.build(config, "fp32", CPU)
    wake(built, std)
    commit(config, lambda target: export.save(built, tokenizer, target, base=config.model))
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def commit(config: Config, write) -> None:
    accelerator = processes.start_processes(config.train)
    checkpoint.commit(Path(config.train.output_dir) / "final_checkpoint", write, accelerator)


def logits(loaded: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return loaded(input_ids=torch.tensor([ids])).logits


IDS = [5, 9, 30, 200, 17, 44]


def test_a_merge_is_the_model_that_was_trained(run, tmp_path):
    report = export.merge(run, tmp_path / "merged", "fp32")
    assert report["against_unmerged"]["kl"] < 1e-6
    adapted, _ = export.load_tuned(run, export.run_config(run), "fp32", CPU, quantised=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, IDS), logits(adapted, IDS), rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "nano/model", dtype=torch.float32)
    assert (logits(merged, IDS) - logits(base, IDS)).abs().max() > 0.1  # the adapter is in it
    assert merged.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (
        tokenizer.chat_template == AutoTokenizer.from_pretrained(ROOT / "nano/model").chat_template
    )
    assert ("against_trained" in report) == ("qlora" in run.name)


def test_a_merge_that_is_another_model_fails(run, tmp_path, monkeypatch):
    def forgetful(self, **_):
        return self.unload()

    monkeypatch.setattr("peft.PeftModel.merge_and_unload", forgetful, raising=False)
    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", forgetful)
    with pytest.raises(export.ExportError, match="does not equal the adapter on its base"):
        export.merge(run, tmp_path / "merged", "fp32")


def test_saved_weights_load_back_bit_for_bit(run):
    config = export.run_config(run)
    first, second = (model.build(config, "fp32", CPU) for _ in range(2))
    wake(first)
    export.load_weights(second, run / "final_checkpoint")
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_weights_of_another_shape_are_refused(run):
    config = with_values(export.run_config(run), {"tuning.r": 3})
    with pytest.raises(checkpoint.CheckpointError, match="does not fit the model"):
        export.load_weights(model.build(config, "fp32", CPU), run / "final_checkpoint")


def test_an_unfinished_run_is_one_message(tmp_path):
    with pytest.raises(export.ExportError, match="expected a finished run"):
        export.run_config(tmp_path)
    with pytest.raises(export.ExportError, match="found nothing"):
        export.run_config(tmp_path / "missing")


def test_a_damaged_adapter_is_not_loaded(tmp_path):
    folder = finished(tmp_path, "lora")
    path = folder / "final_checkpoint" / export.ADAPTER
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(export.ExportError, match="is damaged"):
        export.run_config(folder)


def test_what_stands_in_the_way_of_a_merge_is_told(run, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/model-00001-of-00009.safetensors").touch()
    with pytest.raises(export.ExportError, match="merged exists already; remove it"):
        export.merge(run, tmp_path / "merged", "fp32")
    answers = run / "evaluation/predictions.jsonl"
    answers.parent.mkdir()
    for text in ('{"prompt": "Hi"}\n', '{"prompt": "Hi", "refer'):
        answers.write_text(text)
        with pytest.raises(export.ExportError, match=r"predictions\.jsonl cannot be read"):
            export.merge(run, tmp_path / "other", "fp32")
    answers.unlink()
    answers.parent.rmdir()


def test_full_fine_tuning_has_nothing_to_merge(tmp_path):
    config = with_values(
        load_config(ROOT / "configs/nano.yaml"),
        {"tuning.mode": "full", "train.output_dir": str(tmp_path)},
    )
    commit(config, lambda target: (target / "config.json").write_text(json.dumps({})))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with pytest.raises(export.ExportError, match="has no adapter"):
        export.merge(tmp_path, tmp_path / "merged", "fp32")


def test_an_adapter_is_not_put_on_another_base(tmp_path, run):
    config = export.run_config(run)
    copy = shutil.copytree(config.model.name, tmp_path / "copy")
    moved = export.run_config(run, [f"model.name={copy}"])
    export.load_tuned(run, moved, "fp32", CPU)  # the same weights in another place
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(export.ExportError, match="expected its weights, of digest"):
        export.load_tuned(run, moved, "fp32", CPU)
