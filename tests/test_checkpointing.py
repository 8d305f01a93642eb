"""Selective checkpointing: the same bits, products kept, everything else recomputed."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import families
import pytest
import torch
from conftest import representatives
from shapes import architectures, configured, uniform_window
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from sft.config.load import with_values
from sft.errors import ModelError
from sft.models import checkpointing, load
from sft.models.checkpointing import is_product
from sft.plan import dry_run, memory

aten = torch.ops.aten
KEPT = CheckpointPolicy.MUST_SAVE
FAMILIES = {  # a model type, and what its layers would draw random numbers for
    "llama": {"attention_dropout": 0.2},
    "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.2},
    "gpt_neox": {"hidden_dropout": 0.2},
    "bloom": {},  # baddbmm
    "qwen3_moe": {},
    "llama4_text": {},
    "falcon_h1": {},
    "mamba": {},
}


def gradients(model: torch.nn.Module, precision: str) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(input_ids=torch.arange(2, 34)[None], use_cache=False).logits
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_selective_checkpointing_keeps_the_bits_of_every_gradient(model_type, precision):
    model = families.tiny_model(model_type, **FAMILIES[model_type])
    expected = gradients(model, precision)
    checkpointing.enable(model, "selective")
    found = gradients(model, precision)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def kept_results(function, *arguments: torch.Tensor) -> list[tuple[int, ...]]:
    """The shapes of what is kept for the backward pass of a checkpointed function."""
    contexts = checkpointing.selective_contexts()
    with contexts[0]:
        function(*arguments)
    entries = [e for each in contexts[0].storage.values() for e in each.values()]
    return [tuple(each.val.shape) for each in entries if hasattr(each, "val")]


def test_products_of_activations_are_kept_but_not_those_of_weights_or_of_low_rank():
    x = torch.randn(5, 32, requires_grad=True)
    weight, a, b = (torch.nn.Parameter(torch.randn(*s)) for s in ((24, 32), (2, 32), (24, 2)))
    assert kept_results(lambda x: (x @ weight.t()).sin(), x) == [(5, 24)]
    assert kept_results(lambda x: x @ (weight + b @ a).t(), x) == [(5, 24)]
    assert kept_results(lambda x: x @ a.t() @ b.t(), x) == [(5, 2)]  # 12 times as large
    scores = torch.randn(1, 50, 4)
    assert kept_results(lambda q: q @ q.mT, scores) == []


def test_a_result_that_is_changed_in_place_is_recomputed_from_the_beginning():
    weight = torch.nn.Parameter(torch.randn(6, 6))

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = x @ weight
        y.view(-1).mul_(2)
        z = torch.zeros(3, 6).index_add_(0, torch.arange(3), x @ weight.t())
        return (y.sin() * z).sum()

    x = torch.randn(3, 6, requires_grad=True)
    assert kept_results(layer, x) == [(3, 6)]  # the second, which is only read
    found = []
    for options in ({}, {"context_fn": checkpointing.selective_contexts}):
        x.grad = weight.grad = None
        checkpoint(layer, x, use_reentrant=False, **options).backward()
        found.append((x.grad, weight.grad))
    assert all(map(torch.equal, *found))


def test_attention_that_drops_scores_is_repeated_so_that_later_dropout_is_the_same():
    q = torch.randn(1, 2, 8, 4)
    output = SimpleNamespace(op_output=(q, q))
    for operation in (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._flash_attention_forward.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ):
        names = [argument.name for argument in operation._schema.arguments]

        def decide(dropout: float, operation=operation, names=names) -> CheckpointPolicy:
            arguments = [q if name in names[:3] else None for name in names]
            arguments[names.index("dropout_p")] = dropout
            return checkpointing.Policy()(output, operation, *arguments)

        assert decide(0.0) is KEPT
        assert decide(0.1) is not KEPT


def test_what_is_a_product_is_told_by_name_or_formula():
    yes = ["mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_int_mm", "convolution"]
    yes += ["_scaled_dot_product_flash_attention_for_cpu", "_flash_attention_forward"]
    no = ["mul", "add", "_softmax", "cumsum", "embedding", "native_layer_norm", "native_dropout"]
    no += ["_scaled_dot_product_flash_attention_backward", "convolution_backward"]
    for names, expected in ((yes, True), (no, False)):
        for name in names:
            operation = getattr(aten, name)
            overload = getattr(operation, operation.overloads()[0])
            assert is_product(overload) == expected, name


def test_results_are_freed_without_the_garbage_collector(monkeypatch):
    died = []
    decide = checkpointing.Policy.__call__

    def watch(policy, context, operation, *args, **kwargs):
        decision = decide(policy, context, operation, *args, **kwargs)
        if decision is KEPT:
            weakref.finalize(context.op_output.untyped_storage(), died.append, True)
        return decision

    monkeypatch.setattr(checkpointing.Policy, "__call__", watch)
    weight, x = torch.nn.Parameter(torch.randn(4, 4)), torch.randn(2, 4, requires_grad=True)
    gc.disable()
    try:
        options = {"use_reentrant": False, "context_fn": checkpointing.selective_contexts}
        checkpoint(lambda x: (x @ weight).sin() @ weight, x, **options).sum().backward()
        assert len(died) == 2
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    representatives(
        [
            ("Llama", "qlora"),
            ("Gemma2", "lora"),
            ("GPT2", "full"),
        ],
        [("GPT2", "full")],
    ),
)
def test_the_dry_run_takes_what_the_real_step_takes(tmp_path, name, mode):
    architecture = architectures(hidden_size=128, intermediate_size=320)[name]
    window, forward, share = uniform_window(2, 96, 20, micro_batches=2), {}, {}
    for kind in (False, "selective", True):
        config = configured(tmp_path, architecture, mode, gradient_checkpointing=kind)
        config = with_values(config, {"tuning.r": 4})
        fake = dry_run.trace_step(config, "fp32", window)
        real = dry_run.record_step(dry_run.make_engine(config, "fp32", window, weights=False))
        assert fake.peak() == real.peak()
        assert fake.flops == real.flops
        forward[kind] = fake.peaks()["loss 2"].num_bytes
        share[kind] = fake.flops["recomputed"] / fake.flops["forward"]
        if kind == "selective":  # `memory` traces once more, in the same way for every kind
            predicted = memory.predict(config, "fp32", window, on_gpu=False)
            assert share[kind] == predicted.recomputed
    assert forward[True] < forward["selective"] < forward[False]
    assert share[False] == 0
    assert share["selective"] < 0.12
    assert 0.6 < share[True] <= 1


def test_a_model_that_cannot_is_refused(tmp_path):
    given = {"gradient_checkpointing": "selective"}
    config = configured(tmp_path, families.tiny_config("jetmoe"), "full", **given)
    with pytest.raises(ModelError, match=r"^train.gradient_checkpointing: expected a model that"):
        load.build(config, "fp32", dry_run.CPU, weights=False)
    model = families.tiny_model("llama")
    enable = model.gradient_checkpointing_enable
    model.gradient_checkpointing_enable = lambda **_: enable()  # code of its own, without options
    with pytest.raises(ModelError, match="set it to true"):
        checkpointing.enable(model, "selective")
