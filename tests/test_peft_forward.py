"""LoRA layers without the casts, copies and passes of PEFT: fewer of them, and less rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from counting import count
from peft import LoraConfig, get_peft_model
from shapes import architectures, configured
from torch import nn

from sft.config.load import with_values
from sft.models import adapt, peft_forward
from sft.plan import dry_run
from sft.plan.dry_run import Window

WINDOW = Window((((24, 12), (17, 9)), ((30, 4),)))
TOKENS = 2 * 24  # of the larger micro-batch, padding included
PLAIN, DROPOUT = {}, {"tuning.lora_dropout": 0.1}
DORA = {"tuning.lora.use_dora": True}


def trained(folder, mode, precision, changes, name="Llama"):
    """Returns what two steps launch, and the trained weights and losses after them."""
    config = with_values(configured(folder, architectures()[name], mode), changes)
    made = dry_run.make_engine(config, precision, WINDOW, weights=False)
    losses = []
    counts, launched = count(lambda: losses.append(made.optimizer_step()["train/loss"]))
    losses.append(made.optimizer_step()["train/loss"])
    return counts, launched, [p.detach() for p in made.parallel.trained.values()], losses


@pytest.mark.parametrize(
    ("mode", "precision", "changes"),
    [
        ("lora", "fp32", PLAIN),
        ("qlora", "fp32", PLAIN),
        ("lora", "bf16", DROPOUT),
        ("lora", "bf16", DORA),
    ],
)
def test_without_autocast_or_with_dropout_or_dora_every_bit_is_that_of_peft(
    tmp_path, monkeypatch, mode, precision, changes
):
    given = tmp_path, mode, precision, changes
    ours, _, weights, losses = trained(*given)
    monkeypatch.setattr(adapt, "forward_once", lambda _: None)
    peft, _, expected, before = trained(*given)
    assert losses == before
    assert all(map(torch.equal, weights, expected))
    assert (ours.moved, ours.launches) == (peft.moved, peft.launches)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_with_autocast_it_is_peft_within_rounding_and_launches_less(tmp_path, monkeypatch, mode):
    given = tmp_path, mode, "bf16", PLAIN
    ours, _, weights, losses = trained(*given)
    monkeypatch.setattr(adapt, "forward_once", lambda _: None)
    peft, _, expected, before = trained(*given)
    assert losses == pytest.approx(before, rel=1e-3)
    norms = [torch.stack([a.norm() for a in each]) for each in (weights, expected)]
    torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-4)
    per_layer = (peft.launches - ours.launches) / (7 * 2 * len(WINDOW.micro_batches))
    assert per_layer >= (6 if mode == "qlora" else 5)
    assert ours.moved < 0.9 * peft.moved


def adapted_layer(factor, seed=0):
    """Returns a LoRA layer on a base of 48 x 32 in bf16, with A and B that are not 0."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(48, 32)).to(torch.bfloat16)
    config = LoraConfig(r=8, lora_alpha=8 * factor, target_modules=["0"])
    model = get_peft_model(base, config)
    layer = model.base_model.model[0]
    for part in (layer.lora_A, layer.lora_B):
        part.default.weight.data = torch.randn_like(part.default.weight, dtype=torch.float32)
    return model, layer


def passed(layer, x):
    """Returns the output of a layer under autocast, and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    weights = layer.lora_A.default.weight, layer.lora_B.default.weight
    probe = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *weights], probe)]


@pytest.mark.parametrize("factor", [2.0, 0.3])
@pytest.mark.parametrize("shape", [(3, 17, 48), (5, 48), (0, 48)])
def test_output_and_gradients_are_at_least_as_exact_as_those_of_peft(factor, shape):
    model, layer = adapted_layer(factor)
    x = torch.randn(shape, dtype=torch.bfloat16)
    peft = passed(layer, x)
    peft_forward.forward_once(model)
    ours = passed(layer, x)
    exact = copy.deepcopy(layer).double()
    with torch.autocast("cpu", enabled=False):
        expected = passed_in_fp64(exact, x)
    for one, other, true in zip(ours, peft, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        errors = [(each.double() - true).norm() for each in (one, other)]
        assert errors[0] <= 1.02 * errors[1]


def passed_in_fp64(layer, x):
    x = x.double().requires_grad_()
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    y = layer.base_layer(x) + layer.scaling["default"] * x @ a.T @ b.T
    probe = torch.linspace(-1, 1, y.numel()).view_as(y).to(torch.bfloat16).double()
    return [y, *torch.autograd.grad(y, [x, a, b], probe)]


def test_what_is_attached_to_a_or_b_still_runs():
    """As ZeRO-3 does, which gathers their weights in hooks."""
    model, layer = adapted_layer(2.0)
    peft_forward.forward_once(model)
    x, calls = torch.randn(5, 48, dtype=torch.bfloat16), []
    layer.lora_B.default.register_forward_pre_hook(lambda *_: calls.append("B"))
    passed(layer, x)
    assert calls == ["B"]
    with model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_an_input_is_kept_once_for_all_layers_that_share_it(tmp_path, monkeypatch):
    given = tmp_path, "lora", "bf16", PLAIN, "Qwen2"
    ours, launched, *_ = trained(*given)
    monkeypatch.setattr(adapt, "forward_once", lambda _: None)
    peft, casts, *_ = trained(*given)
    adapted = 2 * 7 * len(WINDOW.micro_batches)
    assert casts["_to_copy"] - launched["_to_copy"] >= 2 * adapted  # in the backward pass, too
    # In each layer k and v see what q sees, up what gate sees, and attention keeps what o sees.
    assert peft.saved - ours.saved == 2 * 4 * TOKENS * 64 * 2


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_without_autocast_it_is_the_pass_of_peft(tmp_path, mode):
    """As in serving: bf16 goes into an adapter in fp32."""
    config = configured(tmp_path, architectures()["Llama"], mode)
    model = dry_run.task_of(config).build_model(config, "bf16", dry_run.CPU, False, None).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        for layer in model.modules():
            for name in ("forward", "_cast_input_dtype"):
                vars(layer).pop(name, None)
        assert torch.equal(model(input_ids=ids).logits, ours)
