"""`make plan` as a user gives it, on this machine and for others."""

from __future__ import annotations

import json
import re

import forked
import pytest
from conftest import ROOT

from sft import commands
from sft.errors import UserError

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
    done = forked.make("plan", *assignments)
    assert "Traceback" not in done.stderr
    assert max(map(len, done.stdout.splitlines()), default=0) <= 100
    return done


@pytest.mark.thorough("a GPU without a name here, the ladder in test_plan.py")
def test_a_model_without_a_configuration_on_a_gpu_that_is_not_here(model, tmp_path):
    out = tmp_path / "out" / "plan.json"
    done = plan(f"MODEL={model}", "TUNING=qlora", "SEQ=1024", "GPU=H100-80GB x 8", f"JSON={out}")
    assert done.returncode == 0, done.stderr
    for part in ("Plan", "Peak memory: H100-80GB x 8", "activations", "Ladder"):
        assert part in done.stdout
    assert "one batch of 32 rows of 1,024 tokens" in done.stdout
    assert re.search(r"verdict +fits: [\d.,]+ GiB are left beside a margin", done.stdout)
    for invented in ("per epoch", "steps ", "a model hardly learns"):  # there are no data
        assert invented not in done.stdout
    assert "train.optimizer=adamw_8bit" in done.stdout
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
    # The first is not `auto`, the second needs a run, and the third belongs to the chosen layout.
    given = {"activation_offload", "compile", "gradient_checkpointing"}
    assert read["layout"]["train.gradient_checkpointing"] == chosen["gradient_checkpointing"]
    assert set(chosen) - given == set(read["reasons"])
    assert read["advice"][0]["change"] == "train.gradient_checkpointing=selective"
    ladder = read["ladder"]
    assert [each["is_planned"] for each in ladder] == [True, False, False, False]
    sizes = [each["reserved_bytes"] for each in ladder]
    assert sizes == sorted(sizes, reverse=True)
    assert "recomputes" in ladder[1]["price"]
    assert "offloads" in ladder[3]["price"]
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.thorough("one plan here and in test_plan.py")
def test_the_matrix(model):
    model.write_text(json.dumps(SIZES | {"num_hidden_layers": 2}))
    done = plan(f"MODEL={model}", "SEQ=512", "COMPARE=1")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(full|lora|qlora)( \+ ckpt)? ", done.stdout, re.M)
    assert len(rows) == 6
    assert "A100-80GB" in done.stdout


def test_this_machine_and_the_default_configuration(tmp_path):
    out = tmp_path / "plan.json"
    done = plan(f"JSON={out}", "ARGS=data.max_rows=200 train.gradient_accumulation_steps=4")
    assert done.returncode == 0, done.stderr
    chosen = json.loads(out.read_text())["chosen"]
    assert (chosen["micro_batch"], chosen["gradient_accumulation_steps"]) == (8, 4)


# --- bad input, in this process ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model=/no/where"],
            "cannot load '/no/where': expected a folder with a run or a model, or a hub id",
        ),
        (["--gpu=Voodoo 2"], "expected one of T4, .* found 'Voodoo 2'; for any other .* GIB=48"),
        (["--gpu=4090 x 0"], "at least one GPU"),
        (["--gib=-5"], "a memory above 0"),
        (["--seq=9999"], "has positions for 4,096 tokens, found 9,999: give a smaller SEQ"),
        (["--compare", "--gpu=4090"], "COMPARE has GPUs of its own"),
        (["--seq=512", "--config=configs/nano.yaml"], "TUNING and SEQ describe a MODEL"),
        (["--cost-per-hour=-1"], "COST_PER_HOUR is the price of one GPU .* found -1"),
        (["--cost-per-hour=nan"], "COST_PER_HOUR is the price of one GPU .* found nan"),
        (["--cost-per-hour=1", "--compare"], "COST_PER_HOUR .* no COMPARE"),
        (["--link=0"], "LINK is what a GPU sends to others, in GB/s.* found 0"),
        (["--link=50", "--compare"], "LINK .* no COMPARE"),
        (
            ["train.gradient_accumulation_steps=3", "--gpu=4090 x 2"],
            r"2 process\(es\) with 3 micro-batches of 5 make 30 examples, not 32",
        ),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, model, arguments, message):
    monkeypatch.chdir(ROOT)
    alone = any(each.startswith(("--model", "--config")) for each in arguments)
    given = arguments if alone else [*arguments, f"--model={model}"]
    with pytest.raises(UserError, match=message):
        commands.run("plan", given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare"], "COMPARE and UNIFORM .* expected task: sft, found task: distill"),
        (["--uniform"], "COMPARE and UNIFORM .* expected task: sft, found task: distill"),
        (["--seq=512"], "TUNING and SEQ describe a MODEL"),
        (["train.gradient_accumulation_steps=3"], "make 63 examples, not 64"),
    ],
)
def test_what_distillation_has_none_of_is_refused(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        commands.run("plan", ["--config=configs/ad_darkroom.yaml", *arguments])


@pytest.mark.thorough("plans of distillation in test_distill.py")
def test_distillation_on_gpus_that_are_not_here(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "plan.json"
    given = ["--config=configs/ad_darkroom.yaml", "--gpu=H100-80GB x 2", f"--json={out}"]
    commands.run("plan", [*given, f"distill.data_dir={tmp_path}/rooms", "train.engine=fsdp"])
    printed = capsys.readouterr().out
    for part in ("346,750 of 120 transitions", "15,360,000 in total", "Changes that save memory"):
        assert part in printed
    read = json.loads(out.read_text())
    predicted, chosen = read["predicted"], read["chosen"]
    assert sum(predicted["breakdown"].values()) == predicted["allocated_bytes"]
    assert "communication" in predicted["breakdown"]  # what FSDP2 gathers
    assert predicted["seconds"] is None  # nobody knows what of a GPU so small a model uses
    assert (chosen["precision"], chosen["micro_batch"]) == ("bf16", 32)
    assert not (tmp_path / "rooms").exists()  # nothing was collected


@pytest.fixture
def without_ladder(monkeypatch):
    """Traces no other settings than the planned ones; the first test above has the ladder."""
    monkeypatch.setattr("sft.plan.advice.advise", lambda *_: [])


def test_a_gpu_without_a_known_name(without_ladder, model, tmp_path, capsys):
    model.write_text(json.dumps(SIZES | {"num_hidden_layers": 2}))
    given = ["--gib=24", "--gpu=mine", "--seq=64", f"--model={model}", f"--json={tmp_path}/a.json"]
    commands.run("plan", given)
    assert "mine x 1" in capsys.readouterr().out
    commands.run("plan", ["--gib=0.7", *given[1:]])  # the context alone takes 0.6 GiB
    printed = capsys.readouterr().out
    assert re.search(r"verdict +does not fit: \d+ MiB more than fits with a margin", printed)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="JSON: cannot write"):
        commands.run("plan", [*given[:-1], f"--json={tmp_path}/file/a.json"])


def test_a_model_that_transformers_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UserError, match="does not recognize this architecture"):
        commands.run("plan", [f"--model={tmp_path}"])
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="expected a folder in Hugging Face format"):
        commands.run("plan", [f"--model={tmp_path}"])
