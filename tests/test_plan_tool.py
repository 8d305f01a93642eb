"""`make plan` as a user gives it, on this machine and for others."""

from __future__ import annotations

import json
import re

import pytest
from conftest import run

pytestmark = pytest.mark.slow

SIZES = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SIZES))
    return path


def plan(*assignments: str):
    done = run("make", "plan", *assignments)
    assert "Traceback" not in done.stderr
    assert max(map(len, done.stdout.splitlines()), default=0) <= 100
    return done


def test_a_model_without_a_configuration_on_a_gpu_that_is_not_here(model, tmp_path):
    out = tmp_path / "out" / "plan.json"
    done = plan(f"MODEL={model}", "TUNING=qlora", "SEQ=1024", "GPU=H100-80GB x 8", f"JSON={out}")
    assert done.returncode == 0, done.stderr
    for told in ("Plan", "Peak memory: H100-80GB x 8", "activations", "What would take less"):
        assert told in done.stdout
    read = json.loads(out.read_text())
    predicted = read["predicted"]
    assert sum(predicted["breakdown"].values()) == predicted["allocated_bytes"]
    assert predicted["allocated_bytes"] <= predicted["reserved_bytes"] < 2**33
    assert predicted["method"] == "traced with 2 and 3 of 8 layers"
    chosen, work = read["chosen"], read["work"]
    assert (work["world_size"], work["global_batch"]) == (8, 32)
    made = chosen["micro_batch"] * chosen["gradient_accumulation_steps"] * work["world_size"]
    assert made == 32
    assert chosen["max_tokens"] >= chosen["micro_batch"] * 1024
    assert set(chosen) == set(read["reasons"])
    assert read["advice"][0]["change"] == "train.gradient_checkpointing=true"


def test_the_matrix(model):
    done = plan(f"MODEL={model}", "SEQ=512", "COMPARE=1")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ (full|lora|qlora)( \+ ckpt)? ", done.stdout, re.M)
    assert len(rows) == 6
    assert "A100-80GB" in done.stdout


def test_this_machine_and_the_default_configuration(tmp_path):
    out = tmp_path / "plan.json"
    done = plan(f"JSON={out}", "ARGS=data.max_rows=200 train.gradient_accumulation_steps=4")
    assert done.returncode == 0, done.stderr
    chosen = json.loads(out.read_text())["chosen"]
    assert (chosen["micro_batch"], chosen["gradient_accumulation_steps"]) == (8, 4)


@pytest.mark.parametrize(
    ("assignments", "told"),
    [
        (["MODEL=missing"], "cannot load 'missing': expected a folder in Hugging Face format"),
        (["GPU=Voodoo 2"], "expected one of T4, .* found 'Voodoo 2'; for any other .* GIB=48"),
        (["SEQ=9999"], "has positions for 4,096 tokens, found 9,999: give a smaller SEQ"),
        (
            ["ARGS=train.gradient_accumulation_steps=3", "GPU=4090 x 2"],
            r"2 process\(es\) with 3 micro-batches of 5 make 30 examples, not 32",
        ),
        (["GIB=24", "GPU=mine", "SEQ=64"], None),
    ],
)
def test_bad_input_is_one_sentence(model, assignments, told):
    given = [] if assignments[0].startswith("MODEL") else [f"MODEL={model}"]
    done = plan(*given, *assignments)
    if told is None:
        assert done.returncode == 0, done.stderr
        assert "mine x 1" in done.stdout
        return
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(told, error)


def test_a_model_that_transformers_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    done = plan(f"MODEL={tmp_path}")
    assert done.returncode != 0
    assert "does not recognize this architecture" in done.stderr
    (tmp_path / "config.json").unlink()
    done = plan(f"MODEL={tmp_path}")
    assert done.returncode != 0
    assert "expected a folder in Hugging Face format" in done.stderr
