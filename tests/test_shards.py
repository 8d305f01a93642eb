"""A model is written a weight at a time, by all ranks that keep parts of it, as plain files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import families
import forked
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft.models import export, shards
from sft.models.weights import Weights
from sft.runtime import checkpoint
from sft.runtime.tensor_file import TensorFile


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_of_tensors_is_that_of_safetensors(tmp_path):
    tensors = {
        "b": torch.arange(3.0).bfloat16(),
        "a": torch.rand(2, 3),
        "é": torch.rand(4, 2).t(),
        "empty": torch.zeros(0, 5),
        "mask": torch.tensor([True, False, True]),
    }
    file = TensorFile(tmp_path / "one", tensors, {"format": "pt"})
    for name in reversed(tensors):  # in any order
        file.write(name, tensors[name])
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "two", {"format": "pt"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    TensorFile(tmp_path / "none", {}, {}).finish()
    save_file({}, tmp_path / "empty")
    assert (tmp_path / "none").read_bytes() == (tmp_path / "empty").read_bytes()


def test_a_file_that_is_written_behind_has_the_values_of_its_time(tmp_path):
    value = torch.zeros(4)
    file = TensorFile(tmp_path / "file", {"a": value}, {}, behind=True)
    file.write("a", value)
    value += 1
    assert not file.path.exists()
    expected = file.finish()
    assert load_file(file.path)["a"].tolist() == [0.0] * 4
    assert expected == {"bytes": file.path.stat().st_size, "sha256": checkpoint.sha256(file.path)}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])  # plain, tied, converted
def test_what_is_written_is_what_save_pretrained_writes(tmp_path, kind):
    model = families.tiny_model(kind)
    for size in ("5GB", "100KB"):
        ours, theirs = (tmp_path / f"{who}-{size}" for who in ("ours", "theirs"))
        model.save_pretrained(theirs, max_shard_size=size)
        shards.save_whole(model, ours, Weights(dict(model.state_dict(keep_vars=True))), size)
        if size == "5GB" or kind != "qwen3_moe":
            assert tree(ours) == tree(theirs)
        else:  # transformers puts all experts of a layer into one file, however large
            index, expected = (
                json.loads((each / "model.safetensors.index.json").read_text())
                for each in (ours, theirs)
            )
            assert index["metadata"] == expected["metadata"]
            assert index["weight_map"].keys() == expected["weight_map"].keys()
        assert len(list(ours.glob("*.safetensors"))) > 1 or size == "5GB"
        loaded = AutoModelForCausalLM.from_pretrained(ours).state_dict()
        assert all(torch.equal(loaded[n], each) for n, each in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_ranks_write_a_split_model_together_and_none_gathers_it(tmp_path, engine):
    model = tiny.shallow_nano(tmp_path)
    command = ["tests/support/shards_worker.py", engine, str(model), str(tmp_path)]
    printed = forked.launch(2, command)
    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    assert len(ranks) == 2, printed
    for rank in ranks:
        assert "No space left" in rank["error"]  # on all ranks, though one alone failed
        assert rank["most"] <= 2 * rank["largest"]
        assert rank["behind"]["failed"][:2] == [True, 1]
        (warning,) = rank["behind"]["failed"][2:]  # the same on both, though one alone failed
        assert "cannot save" in warning
        assert "No space left" in warning
        assert rank["behind"]["saved"][:2] == [True, 0]
        assert re.fullmatch(
            r"saved checkpoint_step_1: the slowest of 2 ranks took [\d.]+ s, of which training "
            r"waited [\d.]+ s, at most .* more memory",
            rank["behind"]["saved"][2],
        )
        assert rank["behind"]["same"]
        assert rank["moved"]
        assert rank["resumed"]
    own = [{name for name in rank["files"] if name.startswith("model")} for rank in ranks]
    assert min(map(len, own)) >= 1
    assert not own[0] & own[1]
    folder = Path(ranks[0]["folder"])
    assert own[0] | own[1] == {path.name for path in folder.glob("model*.safetensors")}
    assert checkpoint.fault(folder) is None
    expected = torch.load(tmp_path / "weights.pt")
    for each in (folder, tmp_path / "run/final_checkpoint"):
        assert max(path.stat().st_size for path in each.glob("model*")) <= 800_000 + 4_000
        loaded = AutoModelForCausalLM.from_pretrained(each)
        weights = dict(loaded.named_parameters())
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], each) for name, each in expected.items())
        assert dict(export.read_weights(loaded, folder)).keys() == weights.keys()
