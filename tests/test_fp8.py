"""FP8: what a CPU can show. Which layers, the law with emulated products, and refusals."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from sft.errors import ConfigError, UserError
from sft.models import fp8


def model():
    return tiny.llama(torch.bfloat16, hidden_size=64, intermediate_size=96, num_attention_heads=4)


def test_linear_layers_compute_in_fp8_but_not_the_head():
    with torch.device("meta"):
        built = tiny.llama(torch.bfloat16, hidden_size=64, intermediate_size=100)
    replaced = fp8.convert(built)
    kinds = {name: type(m).__name__ for name, m in built.named_modules()}
    assert kinds["lm_head"] == "Linear"
    assert {kinds[name] for name in replaced} == {"Float8Linear"}
    assert {name.split(".")[-1] for name in replaced} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    # The others have a side of 100, no multiple of 16.


def test_adapters_stay_as_they_are_and_their_base_computes_in_fp8():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model(), LoraConfig(r=16, target_modules="all-linear"))
    names = {name for name, _ in adapted.named_parameters()}
    replaced = fp8.convert(adapted)
    assert replaced
    assert all(name.endswith("base_layer") for name in replaced)
    assert {name for name, _ in adapted.named_parameters()} == names


def test_law_1_a_token_is_computed_as_it_is_alone():
    """With one scale for a whole micro-batch, a large neighbour would change its rounding."""
    layer = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 16, bias=False)).bfloat16()
    layer[1].requires_grad_(False)
    layer.get_output_embeddings = layer.get_input_embeddings = lambda: None
    fp8.convert(layer, emulate=True)
    rows = torch.randn(4, 64).bfloat16()
    rows[1] *= 1000
    together, alone = rows.clone().requires_grad_(), rows[:1].clone().requires_grad_()
    found, expected = layer(together), layer(alone)
    assert torch.equal(found[:1], expected)
    upstream = torch.randn(4, 16).bfloat16()
    found.backward(upstream)
    expected.backward(upstream[:1])
    assert torch.equal(together.grad[:1], alone.grad)
    exact = nn.functional.linear(rows, layer[0].weight)
    assert not torch.equal(layer[0](rows), exact)  # it does round


def test_a_device_without_fp8_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="or more, found cpu"):
        fp8.compute_in_fp8(model(), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    with pytest.raises(ConfigError, match=r"found RTX 3090, compute capability \(8, 6\)"):
        fp8.refuse_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    fp8.refuse_device(torch.device("cuda"))


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match="no linear layer of this model"):
        fp8.convert(tiny.llama(hidden_size=36, num_attention_heads=2, intermediate_size=50))


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("sft.errors.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'needs torchao, .*"sft\[torchao\]"'):
        fp8.compute_in_fp8(model(), torch.device("cpu"))
