"""Vision-language bases, tuned on text by two processes: towers, class and processor stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import forked
import pytest
import torch
from conftest import ROOT, representatives
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.slow

ENGINES = {
    "ddp": ["train.engine=ddp"],
    "fsdp": ["train.engine=fsdp"],
    "zero3": ["train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z3.json"],
}
CASES = [  # base, engine, mode; the first four in `make test`
    ("gemma3", "ddp", "full"),
    ("gemma3", "fsdp", "full"),
    ("gemma3", "zero3", "full"),
    ("llama4", "fsdp", "lora"),
    ("qwen2_5_vl", "ddp", "full"),
    ("qwen2_5_vl", "zero3", "lora"),
    ("llama4", "ddp", "full"),
]
PROCESSOR = b'{"image_processor_type": "kept as it is"}\n'
TOWER = ("vision", "visual", "multi_modal_projector")


def base(name: str, folder: Path) -> Path:
    ignored = shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    shutil.copytree(ROOT / "nano/model", folder / name, ignore=ignored)
    families.tiny_model(name, initializer_range=0.1).save_pretrained(folder / name)
    (folder / name / "preprocessor_config.json").write_bytes(PROCESSOR)
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory, thorough) -> Path:
    """The runs, all in one launch of two processes; the last one resumes the first."""
    folder = tmp_path_factory.mktemp("towers")
    chosen = CASES if thorough else CASES[:4]
    bases = {name: base(name, folder) for name in sorted({name for name, *_ in chosen})}
    cases = []
    in_turn = sorted(
        [*chosen, chosen[0]], key=lambda case: case[1] == "zero3"
    )  # permanent in a process
    for name, engine, mode in in_turn:
        own = f"{name}-{engine}-{mode}"
        resumes = any(case["name"] == own for case in cases)
        overrides = [
            *ENGINES[engine],
            f"model.name={bases[name]}",
            f"tuning.mode={mode}",
            "tuning.r=4",
            f"data.cache_dir={folder}/cache",
            "data.max_rows=16",
            "data.eval_path=null",
            "train.precision=fp32",
            "train.global_batch=4",
            "train.max_steps=2",
            "evaluation.num_examples=0",
        ]
        cases.append(
            {
                "name": "resumed" if resumes else own,
                "overrides": overrides,
                "max_tokens": 400,
                "steps": 2,
                "save_at": [1, 2],
                "resume": str(folder / own / "checkpoint_step_1") if resumes else None,
                "prove": not resumes,
                "evaluate": False,
            }
        )
    (folder / "cases.json").write_text(json.dumps(cases))
    log = folder / "log"
    worker = "tests/support/parallel_worker.py"
    forked.start(2, [worker, str(folder / "cases.json"), str(folder)], log).join()
    assert len(list(folder.glob("*.rank?.json"))) == 2 * len(cases), log.read_text()
    return folder


@pytest.mark.parametrize(("name", "engine", "mode"), representatives(CASES, 4))
def test_towers_stay_and_the_saved_model_is_of_the_bases_class(folder, name, engine, mode):
    run = folder / f"{name}-{engine}-{mode}"
    steps = json.loads((folder / f"{run.name}.rank0.json").read_text())["steps"]
    assert len(steps) == 2
    saved = run / "checkpoint_step_2"
    if mode == "lora":
        names = load_file(saved / "adapter_model.safetensors").keys()
        assert names
        assert not [each for each in names if any(part in each for part in TOWER)]
        return
    before, after = (load_file(each / "model.safetensors") for each in (folder / name, saved))
    assert before.keys() == after.keys()
    towers = {each for each in before if any(part in each for part in TOWER)}
    assert len(towers) > 10
    routers = {each for each in before if "router" in each}  # frozen by default
    assert {each for each in before if torch.equal(before[each], after[each])} == towers | routers
    assert (saved / "preprocessor_config.json").read_bytes() == PROCESSOR
    loaded, info = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert type(loaded) is families.model_class(name)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_engines_agree_and_a_resumed_run_equals_the_uninterrupted_one(folder):
    first = load_file(folder / "gemma3-ddp-full.weights")
    for other, limit in (("gemma3-fsdp-full", 1e-4), ("gemma3-zero3-full", 1e-4), ("resumed", 0)):
        found = load_file(folder / f"{other}.weights")
        assert first.keys() == found.keys()
        error = max(float((first[n] - found[n]).norm() / (1e-9 + first[n].norm())) for n in first)
        assert error <= limit, other
