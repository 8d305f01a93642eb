"""Optimizers by name and by import path: laws 1 and 2 on every engine, or refused with the reason.

The table of docs/OPTIMIZERS.md is what these tests check, cell by cell.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import engine_worker
import forked
import optimizer_worker
import pytest
import test_distill
import tiny
import torch
from conftest import ROOT, representatives
from engine_worker import STEPS, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from safetensors.torch import load_file

from sft.config.load import load_config
from sft.config.optimizers import LIKE_ADAM, OPTIMIZERS
from sft.config.schema import Train
from sft.data.batches import Budget
from sft.errors import ConfigError, UserError
from sft.tasks.sft.task import FineTune
from sft.train.optimizer import class_arguments, optimizer_class
from sft.train.parallel.trial import is_smooth, refuse_unusable

ENGINES = ("ddp", "fsdp", "zero2", "zero3")


def table() -> dict[str, list[str]]:
    """Returns the cells of each optimizer: DDP, FSDP2, ZeRO."""
    lines = (ROOT / "docs/OPTIMIZERS.md").read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| optimizer | one process"))
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[name.strip("`")] = cells[:3]
    return found


CELLS = {
    (name, engine): cells[min(ENGINES.index(engine), 2)]
    for name, cells in table().items()
    for engine in ENGINES
}
WORKING = [cell for cell, text in CELLS.items() if text == "yes"]
FEW = [(name, "ddp") for name in ("adamw", "adamw_8bit", "muon", "schedule_free")]
FEW += [("adamw", "fsdp")]
REASONS = {
    "matrices": "updates a weight from others of its matrix",
    "library": "calls operations of bitsandbytes",
    "early": "keeps state before its first step",
    "together": "keeps values for all parameters together",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("optimizers")
    for stage in (2, 3):
        settings = json.loads((ROOT / f"configs/deepspeed_z{stage}.json").read_text())
        (out / f"zero{stage}.json").write_text(json.dumps(settings))
    return out


@pytest.fixture(scope="module")
def alone(out) -> dict[str, dict]:
    """What one process sees, by optimizer."""
    seen = {}
    for name in table():
        own = [rows(step) for step in range(STEPS)]
        seen[name] = optimizer_worker.try_out("one", name, out, own)
    return seen


@pytest.fixture(scope="module")
def ranks(out, alone, thorough) -> Callable[[str, str], list[dict]]:
    """What both ranks see of an optimizer with an engine, whose processes try all optimizers."""
    printed: dict[str, str] = {}

    def see(name: str, engine: str) -> list[dict]:
        if engine not in printed:
            cells = WORKING if thorough else FEW
            names = [each for each, its in cells if its == engine]
            worker = "tests/support/optimizer_worker.py"
            printed[engine] = forked.launch(2, [worker, str(out), engine, *names])
        files = sorted(out.glob(f"{engine}-{name}.rank*.pt"))
        assert len(files) == 2, printed[engine]
        return [torch.load(file) for file in files]

    return see


NAMES = ("muon", "adafactor", "lion", "schedule_free", "torch.optim.SGD")


def make(folder, name, tokens=60, layout="padded", **train):
    rows = tiny.examples(0, 11)
    given = {"global_batch": 4, "max_steps": 8} | optimizer_worker.settings_of(name) | train
    model = tiny.llama(intermediate_size=48)
    return tiny.make_engine(model, rows, rows, tiny.config(folder, **given), Budget(tokens, layout))


def take_steps(engine, number):
    for _ in range(number):
        yield engine.optimizer_step()["train/loss"]
        engine.step += 1


@pytest.mark.parametrize("name", representatives(NAMES, 2))
def test_a_run_with_a_save_and_evaluations_is_the_run_without_bit_for_bit(tmp_path, name):
    whole = make(tmp_path / "whole", name)
    losses = [*take_steps(whole, 6)]
    first = make(tmp_path / "parts", name)
    first.prove_saving()  # of step 0
    found = [*take_steps(first, 3)]
    first.evaluate()
    folder = first.save()
    first.evaluate()
    resumed = make(tmp_path / "parts", name)
    resumed.resume(folder)
    assert [*found, *take_steps(resumed, 3)] == losses
    assert resumed.parallel.checksums() == whole.parallel.checksums()
    assert [*take_steps(first, 3)] == losses[3:]


@pytest.mark.parametrize("name", representatives(NAMES, 2))
def test_another_cut_ends_with_the_same_weights(tmp_path, name):
    """Also packed. Muon computes in bf16, to which a difference of rounding may grow."""
    cuts = [(60, "padded"), (400, "padded"), (400, "packed")]
    ends = []
    for number, cut in enumerate(cuts):
        engine = make(tmp_path / str(number), name, *cut)
        before = torch.cat([p.detach().flatten().clone() for p in engine.parallel.trained.values()])
        list(take_steps(engine, 3))
        after = torch.cat([p.detach().flatten() for p in engine.parallel.trained.values()])
        ends.append(after - before)
    for other in ends[1:]:
        assert float((other - ends[0]).norm() / ends[0].norm()) < (1e-2 if name == "muon" else 1e-3)


def test_schedule_free_evaluates_and_saves_the_averages(tmp_path):
    """As schedulefree computes them, and training goes on from other weights."""
    engine = make(tmp_path / "a", "schedule_free")
    list(take_steps(engine, 4))
    trained = {name: p.detach().clone() for name, p in engine.parallel.trained.items()}
    metrics, folder = engine.evaluate(), engine.save()
    optimizer = engine.parallel._base_optimizer
    saved = load_file(folder / "model.safetensors")
    for name, parameter in engine.parallel.trained.items():
        assert torch.equal(parameter, trained[name])
        expected = parameter + (optimizer.state[parameter]["z"] - parameter) * (1 - 1 / 0.9)
        assert torch.allclose(saved[name], expected, atol=1e-6)
    assert any(not torch.equal(saved[name], value) for name, value in trained.items())
    other = make(tmp_path / "b", "adamw")
    for name, value in saved.items():
        other.parallel.set_weight(name, value)
    assert other.evaluate()["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


def test_muon_trains_matrices_of_layers_and_adamw_the_rest(tmp_path):
    """The two learn at one rate; LoRA+ and groups change it, and only matrices decay."""
    own = {"weight_decay": 0.1, "groups": [{"match": "q_proj", "learning_rate": 1e-3}]}
    engine = make(tmp_path, "muon", **own)
    optimizer = engine.parallel._base_optimizer
    names = {id(p): name for name, p in engine.parallel.trained.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            in_layer = "proj" in name
            assert in_layer == ("momentum" in group), name
            assert group["peak"] == (1e-3 if "q_proj" in name else 1e-2)
            assert group["weight_decay"] == (0.1 if parameter.ndim == 2 else 0.0)
    before = {name: p.detach().clone() for name, p in engine.parallel.trained.items()}
    list(take_steps(engine, 1))
    for name, parameter in engine.parallel.trained.items():
        if "proj" in name and "q_proj" not in name:  # the size of AdamW's first update is 1
            rms = float((parameter.detach() - before[name]).square().mean().sqrt()) / 1e-2
            assert 0.1 < rms < 0.4, name


@pytest.mark.parametrize("name", representatives(["adafactor", "lion", "schedule_free"]))
def test_a_crowd_resumes_bit_for_bit(tmp_path, name):
    given = tiny.crowd_config(
        tmp_path, train={"global_batch": 4, **optimizer_worker.settings_of(name)}
    )
    rows = tiny.examples(0, 11)
    whole, resumed = (
        tiny.make_engine(tiny.adapted(given), rows, rows, given, Budget(60, "padded"))
        for _ in range(2)
    )
    list(take_steps(whole, 2))
    resumed.resume(whole.save())
    whole.evaluate()
    assert [*take_steps(resumed, 2)] == [*take_steps(whole, 2)]
    assert resumed.parallel.checksums() == whole.parallel.checksums()


def test_muon_refuses_agents_of_which_a_layer_has_all_in_one_tensor(tmp_path):
    given = tiny.crowd_config(tmp_path, train={"optimizer": "muon"})
    rows = tiny.examples(0, 4)
    with pytest.raises(ConfigError, match="no trained parameter is a matrix in a layer"):
        tiny.make_engine(tiny.adapted(given), rows, rows, given, Budget(60, "padded"))


@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_the_transformer_of_distillation_resumes_bit_for_bit(tmp_path, name):
    own = optimizer_worker.settings_of(name)
    asked = test_distill.config(tmp_path, **own)
    whole, resumed = (test_distill.make_engine(asked, 100, torch.float32) for _ in range(2))
    list(take_steps(whole, 2))
    resumed.resume(whole.save())
    assert [*take_steps(resumed, 2)] == [*take_steps(whole, 2)]
    assert resumed.parallel.checksums() == whole.parallel.checksums()


WRONG = {  # keys of `train`, and how the message ends
    "{optimizer: adamww}": "did you mean adamw?",
    "{optimizer: torch.optim.AdamX}": "did you mean Adam?",
    "{optimizer: nowhere.Adam}": "nowhere is not installed, or misspelt",
    "{optimizer: torch.nn.Linear}": "is no torch.optim.Optimizer; known: ",
    "{optimizer: torch.optim.LBFGS}": "LBFGS doesn't support per-parameter options",
    "{optimizer_args: {beta: [0.9, 0.99]}}": "unknown to torch.optim.AdamW; did you mean betas?",
    "{optimizer_args: {betas: [0.9, 0.99]}}": "comes from train.adam_beta1, adam_beta2 and",
    "{optimizer_args: {lr: 0.1}}": "lr: comes from train.learning_rate; remove it here",
    "{optimizer: lion, optimizer_args: {weight_decay: 1.0}}": "comes from train.weight_decay",
    "{optimizer: schedule_free, optimizer_args: {warmup_steps: 3}}": "from train.warmup_steps",
    "{optimizer: muon, optimizer_args: {momentum: -1.0}}": "momentum should be >= 0 but is: -1.0",
    "{optimizer: torch.optim.Rprop, weight_decay: 0.1}": "Rprop has no weight decay",
    "{optimizer: schedule_free}": "set train.schedule: constant (found cosine)",
    "{optimizer: schedulefree.SGDScheduleFree, schedule: linear}": "(found linear)",
    "{optimizer: optimi.Adan, precision: bf16_pure}": "steps them one at a time",
    "{optimizer: muon, engine: fsdp, precision: bf16_pure}": "gathers whole matrices, but train.",
    "{optimizer: optimizer_of_tests.Noisy}": "draws random numbers, or keeps values outside",
    "{optimizer: optimizer_of_tests.Forgetful}": "draws random numbers, or keeps values outside",
    "{optimizer: optimizer_of_tests.Listing}": "keeps history as list, which no checkpoint",
}


@pytest.mark.parametrize("written", WRONG)
def test_what_cannot_be_trained_is_refused_before_the_run(tmp_path, written):
    train = YAML(typ="safe").load(written) | {"output_dir": str(tmp_path)}
    file = tmp_path / "a.yaml"
    YAML().dump({"model": {"name": "m"}, "data": {"train_path": "d"}, "train": train}, file)
    with pytest.raises(ConfigError) as error:
        FineTune.refuse_untrainable(load_config(file))
    assert WRONG[written] in str(error.value)


def test_every_argument_that_agrees_with_a_key_is_taken(tmp_path):
    args = {"betas": [0.9, 0.95], "amsgrad": True}
    train = tiny.config(tmp_path, adam_beta2=0.95, optimizer_args=args).train
    refuse_unusable(train)
    assert class_arguments(train) == {
        "fused": True,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "amsgrad": True,
    }


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.errors.find_spec", lambda name: None)
    train = tiny.config(tmp_path, optimizer="lion").train
    with pytest.raises(UserError, match=r'lion needs optimi, not installed: pip install "sft\['):
        optimizer_class(train)


def test_keys_of_adam_are_read_by_optimizers_whose_signature_has_them(tmp_path):
    """Two betas and one epsilon; Muon has AdamW beside it."""
    for name in OPTIMIZERS:
        found = inspect.signature(optimizer_class(tiny.config(tmp_path, optimizer=name).train))
        given = found.parameters
        eps = given["eps"].default if "eps" in given else None
        is_adam = "betas" in given and isinstance(eps, float)
        assert (name in LIKE_ADAM) == (is_adam or name == "muon"), name


@pytest.mark.parametrize("name", table())
def test_one_process_resumes_bit_for_bit(alone, name):
    assert alone[name]["loaded"]
    assert alone[name]["resumed"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), representatives(WORKING, FEW))
def test_two_processes_are_one_and_resume_bit_for_bit(ranks, alone, name, engine):
    both = ranks(name, engine)
    assert all(rank["loaded"] and rank["resumed"] for rank in both)
    first = both[0]
    for part in ("saved", "weights"):
        for key, value in first[part].items():
            expected = alone[name][part][key]
            assert torch.allclose(value, expected, rtol=1e-4, atol=2e-6), (part, key)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), representatives(WORKING, FEW))
def test_what_one_engine_saved_another_continues(ranks, alone, out, name, engine):
    both = ranks(name, engine)
    same_net = "ddp" if engine == "ddp" else "one"  # of one process, too
    single, _ = engine_worker.make(same_net, out, **optimizer_worker.settings_of(name))
    optimizer_worker.load(single, out / f"{engine}-{name}")
    for found in (both[0]["from one"], optimizer_worker.step_from(single, rows(2))):
        for key, value in found.items():
            expected = alone[name]["weights"][key]
            assert torch.allclose(value, expected, rtol=1e-4, atol=2e-6), key


@pytest.mark.parametrize(("name", "engine"), CELLS)
def test_the_table_says_what_is_refused_and_why(tmp_path, name, engine):
    given = optimizer_worker.settings_of(name) | {"engine": engine}
    if engine.startswith("zero"):
        given |= {"engine": "deepspeed", "deepspeed_config": "z.json"}
    train = tiny.config(tmp_path, **given).train
    if (text := CELLS[name, engine]) == "yes":
        refuse_unusable(train)
        return
    with pytest.raises(ConfigError, match=REASONS[text.removeprefix("refused: ")]):
        refuse_unusable(train)


@settings(max_examples=10, deadline=None)
@given(
    rate=st.floats(1e-7, 1.0),
    decay=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.95), st.floats(0.5, 0.999)),
)
def test_no_setting_of_adamw_keeps_it_from_an_engine(rate, decay, betas):
    """A weight decay of matrices once looked like an update from other weights of the matrix."""
    own = {"learning_rate": rate, "weight_decay": decay}
    own |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    for engine in ("ddp", "fsdp", "deepspeed"):
        refuse_unusable(Train(output_dir="runs/a", engine=engine, **own))


ROUGH = {"muon", "adamw_8bit", "paged_adamw_8bit", "torchao_adamw_8bit", "torchao_adamw_4bit"}


def test_optimizers_that_round_are_not_smooth(tmp_path):
    given = {name: tiny.config(tmp_path, **optimizer_worker.settings_of(name)) for name in table()}
    assert {name for name, each in given.items() if not is_smooth(each.train)} == ROUGH
