"""Save and load back; what is damaged, unfinished or of another base is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import families
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_models import wake

from sft import errors
from sft.config.load import dump_config, load_config, with_values
from sft.config.schema import Config
from sft.data import template
from sft.models import classes, export, load, pretrained
from sft.runtime import checkpoint, processes
from sft.serve import runs
from sft.tasks.sft.task import FineTune

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
    tokenizer = template.prepare_tokenizer(pretrained.load_tokenizer(config.model))
    built = load.build(config, "fp32", CPU)
    wake(built, std)
    commit(config, lambda target: export.save(built, tokenizer, target, base=config.model))
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def commit(config: Config, write) -> None:
    accelerator = processes.start_processes(config.train)
    checkpoint.commit(Path(config.train.output_dir) / "final_checkpoint", write, accelerator)


def test_saved_weights_load_back_bit_for_bit(run):
    config = runs.load_run_config(run)
    first, second = (load.build(config, "fp32", CPU) for _ in range(2))
    wake(first)
    export.load_weights(second, run / "final_checkpoint")
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_weights_of_another_shape_are_refused(run):
    config = with_values(runs.load_run_config(run), {"tuning.r": 3})
    with pytest.raises(errors.CheckpointError, match="does not fit the model"):
        export.load_weights(load.build(config, "fp32", CPU), run / "final_checkpoint")


@pytest.mark.parametrize("lost", ["one tensor", "all tensors", "the file"])
def test_missing_adapter_weights_are_refused(run, tmp_path, lost):
    folder = Path(shutil.copytree(run / "final_checkpoint", tmp_path / "final"))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if lost == "the file":
        path.unlink()
    else:
        removed = sorted(tensors)[:1] if lost == "one tensor" else list(tensors)
        kept = {name: value for name, value in tensors.items() if name not in removed}
        save_file(kept, path, {"format": "pt"})
    built = load.build(runs.load_run_config(run), "fp32", CPU)
    with pytest.raises(errors.CheckpointError, match="does not fit the model: it lacks"):
        export.load_weights(built, folder)


def test_an_unfinished_run_is_one_message(tmp_path):
    with pytest.raises(errors.ExportError, match="expected a finished run"):
        runs.load_run_config(tmp_path)
    with pytest.raises(errors.ExportError, match="found nothing"):
        runs.load_run_config(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(errors.ExportError, match="found a file; run `make train`"):
        runs.load_run_config(tmp_path / "file")
    (tmp_path / "config.yaml").write_text("train: {}")
    with pytest.raises(errors.ExportError, match="a part of one; give RUN="):
        runs.load_run_config(tmp_path / "checkpoint_step_2")
    with pytest.raises(errors.ExportError, match="has not finished; continue it with make train"):
        runs.load_run_config(tmp_path)


@pytest.mark.parametrize("given", ["evaluation", "status.json", "evaluation/test", "", "nosuch"])
def test_what_is_in_or_around_a_run_is_answered_with_the_run(tmp_path, given):
    (tmp_path / "mine/evaluation/test").mkdir(parents=True)
    for name in ("config.yaml", "status.json"):
        (tmp_path / "mine" / name).touch()
    run = tmp_path / "mine"
    place = run / given if given.startswith(("eval", "stat")) else tmp_path / given
    expected = "has the runs mine" if given == "nosuch" else f"give RUN={run}"
    with pytest.raises(errors.ExportError, match=f"{expected}$"):
        runs.load_run_config(place)
    opening = runs.Opening(str(place), None, None, None, "fp32", runs.CPU)
    with pytest.raises(errors.UserError, match="has mine" if given == "nosuch" else expected):
        runs.open_model(opening)


def test_a_damaged_adapter_is_not_loaded(tmp_path):
    folder = finished(tmp_path, "lora")
    path = folder / "final_checkpoint" / export.ADAPTER
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(errors.ExportError, match="is damaged"):
        runs.load_run_config(folder)


def test_an_adapter_is_not_put_on_another_base(tmp_path, run):
    config = runs.load_run_config(run)
    copy = shutil.copytree(config.model.name, tmp_path / "copy")
    moved = runs.load_run_config(run, [f"model.name={copy}"])
    runs.load_trained(run, moved)  # the same weights in another place
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(errors.ExportError, match="expected its weights, of digest"):
        runs.load_trained(run, moved)


@pytest.mark.parametrize(
    ("override", "reported"),
    [
        ("tuning.lora_alpha=64", "tuning.lora_alpha: trained with 32.0, found 64.0"),
        ("tuning.r=8", "tuning.r: trained with 16, found 8"),
        ("tuning.target_modules=[q_proj]", r"trained with \['down_proj', .*, found \['q_proj'\]"),
    ],
)
def test_an_adapter_is_not_computed_otherwise_than_it_was_trained(run, override, reported):
    with pytest.raises(errors.ExportError, match=reported) as error:
        runs.load_trained(run, runs.load_run_config(run, [override]))
    assert str(run / "final_checkpoint") in str(error.value)
    assert "adapter_config.json" in str(error.value)


def test_the_modules_of_an_adapter_may_be_written_out(run):
    modules = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
    config = runs.load_run_config(run, [f"tuning.target_modules={modules}"])
    runs.load_trained(run, config)


# --- the example of a model card, run as a reader would ------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2_5_vl", "voxtral"])
def test_a_card_loads_the_class_that_was_trained(tmp_path, kind, mode):
    base, saved = tmp_path / "base", tmp_path / "saved"
    shutil.copytree(ROOT / "nano/model", base, ignore=shutil.ignore_patterns("*.safetensors"))
    families.tiny_model(kind).save_pretrained(base)
    changes = {"model.name": str(base), "tuning.mode": mode, "tuning.r": 2}
    config = with_values(load_config(ROOT / "configs/nano.yaml"), changes)
    built = load.build(config, "fp32", CPU)
    whose = {"origin": config.model} if mode == "full" else {"base": config.model}
    export.save(built, pretrained.load_tokenizer(config.model), saved, **whose)
    task = FineTune.__new__(FineTune)
    task.config = config
    code = task.loading().split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code.replace("path/to/this/folder", str(saved)), found)
    model = found["model"] if mode == "full" else found["model"].get_base_model()
    assert type(model) is families.model_class(kind)
    expected, given = built.state_dict(), found["model"].state_dict()
    assert expected.keys() == given.keys()
    assert all(torch.equal(expected[name], given[name]) for name in expected)


@pytest.mark.parametrize(
    ("kind", "architectures", "name"),
    [
        ("llama", None, "AutoModelForCausalLM"),
        ("qwen2_5_vl", None, "AutoModelForImageTextToText"),
        ("voxtral", None, "AutoModelForMultimodalLM"),  # no images
        ("llama4", ["Llama4ForCausalLM"], "AutoModelForCausalLM"),  # what the files name is loaded
    ],
)
def test_a_card_names_the_auto_class_of_the_base(kind, architectures, name):
    config = families.tiny_config(kind)
    config.architectures = architectures
    assert classes.auto_name(config) == name
