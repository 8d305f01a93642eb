"""Ranks that build only their own elements of a model: each has the bits of the whole model."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import ROOT
from torch import nn
from transformers import core_model_loading

from sft.config.load import load_config
from sft.config.schema import Config
from sft.errors import ModelError
from sft.models import load
from sft.models.cut import CannotCut, Cutting, Rule
from sft.tasks.sft.task import FineTune
from sft.train.parallel.deepspeed import elements_of
from sft.train.parallel.fsdp import rows_of

WORLD = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Any:
    """Returns the folder of a tiny model of a type, with the nano tokenizer."""
    folder = tmp_path_factory.mktemp("models")

    def make(kind: str) -> Path:
        if kind == "nano":
            return ROOT / "nano/model"
        made = folder / kind
        if not made.exists():
            families.tiny_model(kind).save_pretrained(made)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ROOT / "nano/model" / file, made)
        return made

    return make


def settings(model: Path, mode: str, *more: str) -> Config:
    given = [f"model.name={model}", f"tuning.mode={mode}", "tuning.r=4", *more]
    return load_config("configs/nano.yaml", given)


def build(config: Config, rule: Rule | None = None, precision: str = "bf16") -> nn.Module:
    if rule is None:
        return load.build(config, precision, CPU, adapt=FineTune.adapt)
    with Cutting(rule, CPU, keep_ends=FineTune.reads_rows(config)) as cutting:
        made = load.build(config, precision, CPU, adapt=FineTune.adapt, cutting=cutting)
        return cutting.finish(made)


def assert_cut(config: Config, split: Any, precision: str = "bf16", whole: int = 0) -> None:
    """Every rank has its elements of each weight; all but `whole` weights are cut."""
    expected = build(config, None, precision)
    after = torch.rand(1)
    weights = dict(expected.named_parameters())
    for rank in (0, WORLD - 1):
        rule = partial(split, rank=rank, world=WORLD)
        model = build(config, rule, precision)
        assert torch.equal(torch.rand(1), after)  # the same random numbers were drawn
        found = dict(model.named_parameters())
        assert list(found) == list(weights)
        assert sum(not p.is_meta for p in found.values()) == whole
        for name, weight in weights.items():
            own: Any = found[name]
            assert (own.shape, own.dtype) == (weight.shape, weight.dtype), name
            assert own.requires_grad == weight.requires_grad, name
            start, stop = rule(weight.shape)
            if own.is_meta:
                assert own.piece.dtype == weight.dtype, name
                assert torch.equal(own.piece, weight.detach().flatten()[start:stop]), name
            else:
                assert torch.equal(own, weight), name
            states = [getattr(each, "quant_state", None) for each in (own, weight)]
            if states[1] is not None:
                assert torch.equal(*[state.absmax for state in states])
        buffers = zip(model.named_buffers(), expected.named_buffers(), strict=True)
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in buffers)


@pytest.mark.parametrize("split", [rows_of, elements_of])
@pytest.mark.parametrize("shape", [(7, 3), (2, 5), (1,), (9,), (3, 4, 5)])
def test_ranks_have_every_element_once(split, shape):
    parts = [split(torch.Size(shape), rank, 4) for rank in range(4)]
    assert [i for part in parts for i in range(*part)] == [*range(torch.Size(shape).numel())]


CASES = [  # tied, untied, converted experts, fp32 parts and experts in 4 bits, (in, out)
    *(("nano", "full"), ("nano", "qlora"), ("qwen2", "lora"), ("qwen3_moe", "full")),
    *(("qwen3_moe", "qlora"), ("granitemoehybrid", "qlora"), ("gpt2", "lora")),
]


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_a_rank_has_its_elements_of_the_whole_model(kind, mode, models):
    split = elements_of if mode == "lora" else rows_of
    assert_cut(settings(models(kind), mode), split)


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_random_weights_are_those_of_one_process(kind, models):
    assert_cut(settings(models(kind), "full", "model.init=random"), rows_of)


def test_random_weights_of_code_that_cannot_be_cut_are_refused(models):
    config = settings(models("gemma3"), "full", "model.init=random")
    with pytest.raises(CannotCut, match="weight"):
        build(config, partial(rows_of, rank=0, world=2))


def test_rows_of_new_tokens_and_copies_of_modules(models):
    new = 'model.new_tokens=["<one>","<two>"]'
    assert_cut(settings(models("nano"), "full", new), rows_of, whole=1)
    assert_cut(settings(models("qwen2"), "lora", new), rows_of, whole=4)
    copied = 'tuning.lora.modules_to_save=["lm_head"]'
    assert_cut(settings(models("qwen2"), "qlora", copied), elements_of)


def test_an_adapter_of_an_earlier_run_is_read(models, tmp_path):
    config = settings(models("qwen2"), "lora")
    trained = build(config)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    trained.save_pretrained(tmp_path)
    assert_cut(settings(models("qwen2"), "lora", f"model.adapter={tmp_path}"), rows_of)


@pytest.mark.parametrize(
    ("mode", "more"), [("lora", "init_lora_weights=pissa"), ("qlora", "use_dora=true")]
)
def test_an_adapter_that_is_computed_from_whole_weights_is_refused(mode, more, models):
    config = settings(models("qwen2"), mode, f"tuning.lora.{more}")
    with pytest.raises(ModelError):
        build(config, partial(rows_of, rank=0, world=2))


def test_one_weight_at_a_time_is_whole(models, monkeypatch):
    put, most = core_model_loading.set_param_for_module, []

    def spy(model: nn.Module, *arguments: Any) -> None:
        whole = [name for name, p in model.named_parameters() if not p.is_meta]
        most.append(len(whole))
        put(model, *arguments)

    monkeypatch.setattr(core_model_loading, "set_param_for_module", spy)
    build(settings(models("qwen2"), "full"), partial(rows_of, rank=0, world=2))
    assert len(most) > 20
    assert max(most) == 0  # those before the next one are cut


def test_what_changes_a_cut_weight_is_not_missed():
    rule = partial(rows_of, rank=1, world=2)
    whole = torch.arange(12.0).reshape(4, 3)
    changes: dict[str, Any] = {
        "in place": lambda w: w.add_(1),
        "of a row": lambda w: w[3].zero_(),
        "of a list": lambda w: torch._foreach_mul_([w], 2.0),
        "as a result": lambda w: torch.mul(w, 2.0, out=w),
        "drawn": lambda w: w.normal_(),
    }
    for change in changes.values():
        model = nn.ParameterDict({"w": nn.Parameter(whole.clone())})
        with torch.no_grad(), Cutting(rule, CPU) as cutting:
            cutting.cut_rest(model)
            change(model["w"])
            with pytest.raises(CannotCut):
                cutting.finish(model)
    for computed in (lambda w: w.t(), lambda w: w * 2, lambda w: w.view(torch.int32)):
        model = nn.ParameterDict({"w": nn.Parameter(whole.clone())})
        with torch.no_grad(), Cutting(rule, CPU) as cutting:
            cutting.cut_rest(model)
            model["w"] = nn.Parameter(computed(model["w"]), requires_grad=False)
            with pytest.raises(CannotCut):
                cutting.finish(model)


def test_copies_and_casts_of_a_cut_weight_are_cut():
    rule = partial(rows_of, rank=1, world=2)
    whole = torch.arange(12.0).reshape(4, 3) / 7
    model = nn.ParameterDict({"w": nn.Parameter(whole.clone()), "v": nn.Parameter(whole.clone())})
    with torch.no_grad(), Cutting(rule, CPU) as cutting:
        cutting.cut_rest(model)
        model["w"] = nn.Parameter(model["w"].to(torch.bfloat16).float().clone())
        model["v"].data.copy_(2 * whole)
        cutting.finish(model)
    assert torch.equal(model["w"].piece, whole.bfloat16().float().flatten()[6:])
    assert torch.equal(model["v"].piece, 2 * whole.flatten()[6:])
