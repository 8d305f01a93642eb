"""What a step on text reaches, against a real backward pass; products of any class of module."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from support import shapes
from support.families import tiny_config, tiny_model
from torch import distributed, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Qwen3MoeForCausalLM,
)

from sft.config.lora import Lora
from sft.config.schema import Tuning
from sft.models import quantise
from sft.models.adapt import add_adapters
from sft.models.reach import Reach, freeze_untrained, reach, trace

WIDTH = 4


class Silent(torch.autograd.Function):
    """Multiplies, and gives the weight no gradient, although the graph leads to it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.saved_tensors[0].mT, None


class Block(nn.Module):
    """One of the ways in which a parameter can be used; `forward` gets and returns activations."""

    def __init__(self, kind: str, shared: nn.Linear) -> None:
        super().__init__()
        self.kind = kind
        self.first = shared if kind == "shared" else nn.Linear(WIDTH, WIDTH)
        if kind in ("experts", "routed", "short"):
            self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        if kind == "routed":
            self.routers = nn.ModuleList([nn.Linear(WIDTH, 3)])
        if kind in ("alien", "selected"):
            self.matrix = nn.Parameter(torch.rand(3, WIDTH, WIDTH))
        if kind == "choice":
            self.bias = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "unused":
                return x
            case "detached":
                return x + self.first(x).detach()
            case "no_grad":
                with torch.no_grad():
                    return x + self.first(x)
            case "experts":  # the value of a tensor chooses
                return x + self.parts[int(ids.sum()) % 3](self.first(x))
            case "routed":  # in a module that another one calls
                scores = self.routers[0](self.first(x)).mean((0, 1))
                chosen = int(0 * scores.topk(1).indices + ids.sum()) % 3
                return self.parts[chosen](x) * scores.sum()
            case "short":  # nothing that depends on values
                for part in self.parts[:2]:
                    x = part(self.first(x))
                return x
            case "alien":
                return torch.einsum("bti,noi->bto", self.first(x), 2 * self.matrix.double().float())
            case "selected":
                return x + torch.bmm(x.transpose(0, 1), self.matrix[ids[0] % 3].mT).mT.mT[:1]
            case "silent":
                return Silent.apply(x, self.first.weight)
            case "choice":  # used, but only to choose
                return x[..., (self.first(x).mean((0, 1)) + self.bias).argsort()]
        return x + self.first(x)


KINDS = ["plain", "unused", "detached", "no_grad", "experts", "routed", "short"]
KINDS += ["alien", "selected", "choice", "shared", "silent"]


class Toy(nn.Module):
    """Blocks of these kinds between embeddings and a head that may share their weight."""

    def __init__(self, kinds: list[str], tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
        self.vision = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        if tied:
            self.head.weight = self.table.weight
        shared = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(kind, shared) for kind in kinds)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        pixels: torch.Tensor | None = None,
        use_cache: bool = True,
    ) -> Any:
        x = self.table(input_ids) + position_ids[..., None]
        if pixels is not None:
            x = x + self.vision(pixels)
        for block in self.blocks:
            x = block(x, input_ids)
        return SimpleNamespace(logits=self.head(x))


def with_gradient(model: nn.Module) -> set[str]:
    """Returns the parameters that get a gradient from any of three inputs, which a real run takes.

    The sum of their ids modulo 3 is 0, 1 and 2, so each of three experts gets a token.
    """
    for ids in ([1] * 6, [1] * 7, [1] * 8):
        positions = torch.arange(len(ids))[None]
        model(torch.tensor([ids]), positions, use_cache=False).logits.sum().backward()
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.grad is not None}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5), st.booleans())
def test_what_is_reached_is_what_a_real_backward_pass_gives_a_gradient(kinds, tied) -> None:
    found = trace(lambda: Toy(kinds, tied))
    assert not found.problem
    states = found.parameters
    expected = with_gradient(Toy(kinds, tied))
    assert {name for name in states if states[name] != "unreached"} == expected
    conditional = {name for name in states if states[name] == "conditional"}
    lists = {f"blocks.{i}.parts." for i, k in enumerate(kinds) if k in ("experts", "routed")}
    lists = {each for each in lists if any(name.startswith(each) for name in expected)}
    assert all(name.startswith((*lists, "-")) for name in conditional)
    assert len(conditional) == 4 * len(lists)  # weight and bias of two experts each


def test_a_product_counts_whatever_module_has_its_matrix() -> None:
    found = trace(lambda: Toy(["alien", "selected", "routed", "unused"], tied=True))
    assert found.products["blocks.0.matrix"].shape == (3, WIDTH, WIDTH)  # through einsum and casts
    assert "blocks.1.matrix" in found.products  # through a selection by the inputs
    assert "blocks.0.first.weight" in found.products
    assert "head.weight" in found.products
    assert "blocks.0.first.bias" not in found.products
    assert "blocks.3.first.weight" not in found.products
    assert "vision.0.weight" not in found.products
    assert found.routers == {"blocks.2.routers.0.weight"}
    assert found.looked_up == {"table.weight", "head.weight"}  # tied: one parameter, two names


def test_a_model_that_cannot_be_traced_counts_as_reached_and_says_why() -> None:
    class Broken(Toy):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError("no text")

    found = trace(lambda: Broken(["plain"], tied=False))
    assert "no text" in found.problem
    assert {*found.parameters.values()} == {"reached"}
    assert not found.products


class NeedsValues(Qwen3MoeForCausalLM):
    """Reads activations as an array, which fake tensors are not."""

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        assert self.get_input_embeddings().weight[0].detach().numpy().size
        return super().forward(input_ids, **given)


def test_a_model_that_needs_values_is_run_as_a_narrow_copy() -> None:
    config = tiny_config("qwen3_moe", hidden_size=128, num_experts=6)
    with torch.device("meta"):
        found, expected = reach(NeedsValues(config)), reach(Qwen3MoeForCausalLM(config))
    assert "numpy" in found.narrowed
    assert not found.problem
    assert found.parameters == expected.parameters
    assert found.routers == expected.routers
    assert found.products.keys() == expected.products.keys()
    for name, product in found.products.items():
        assert product.shape == expected.products[name].shape
        assert product.per_token == pytest.approx(expected.products[name].per_token), name


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_dense_model_is_reached_whole(name: str) -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shapes.architectures()[name])
    found = reach(base)
    assert {*found.parameters.values()} == {"reached"}
    assert not found.routers
    # GPT-2's layers are of a class of their own, and its head is tied to the embeddings.
    layers = {"Llama": 7, "GPT2": 4}[name]
    assert len(found.products) == 2 * layers + {"Llama": 1, "GPT2": 2}[name]
    assert found is reach(base)  # traced once


def vision_language(kind: str) -> nn.Module:
    """Returns a tiny model for images and text."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(tiny_config(kind))


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_text_does_not_reach_the_parts_for_images(kind: str) -> None:
    found = reach(vision_language(kind))
    assert not found.problem
    vision = {n for n in found.parameters if "visual" in n or "vision" in n or "projector" in n}
    assert vision == {n for n in found.parameters if found.is_unreached(n)}
    assert vision.isdisjoint(found.products)


def test_a_mixture_has_its_experts_as_products_and_its_router_known() -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    found: Reach = reach(base)
    assert {*found.parameters.values()} == {"reached"}
    experts = {name for name, product in found.products.items() if len(product.shape) == 3}
    assert len(experts) == 4
    assert all("experts" in name for name in experts)
    assert found.routers == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}


def test_a_base_is_not_traced_again_once_it_is_quantised() -> None:
    base = tiny_model("llama")
    found = reach(base)
    base.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    assert reach(base) is found


def test_tracing_changes_no_random_numbers_and_no_mode_of_the_caller() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.device("meta"), torch.no_grad():
        trace(lambda: Toy(["plain"], tied=False))
        assert torch.empty(1).is_meta
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)


def test_a_layer_whose_weight_another_module_reads_gets_no_adapter() -> None:
    """Gemma-3n clamps the weight of a layer in training, and multiplies by it itself."""
    base = tiny_model("gemma3n_text").train()
    found = reach(base)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    read = {name for name in linear if f"{name}.weight" in found.borrowed}
    assert {name.split(".")[-1] for name in read} == {"correction_coefs"}
    model = add_adapters(base.requires_grad_(False), Tuning(mode="lora", r=2))
    assert not [n for n, p in model.named_parameters() if "correction_coefs.lora_" in n]


def test_a_weight_that_the_forward_pass_changes_stays_out_of_4_bits() -> None:
    """Gemma-3n clamps one in training: QLoRA, and the plan of it, ended in an error of dtypes."""
    base = tiny_model("gemma3n_text")
    written = reach(base).written
    assert {name.split(".")[-2] for name in written} == {"prediction_coefs"}
    quantise.quantise(base, torch.float32)
    assert all(base.get_parameter(name).is_floating_point() for name in written)
    output = base.train()(input_ids=torch.arange(8)[None], use_cache=False)
    assert output.logits.isfinite().all()


VISION = ["gemma3", "qwen2_5_vl", "qwen3_vl", "llama4", "mllama"]


def trained_parts(kind: str, mode: str) -> nn.Module:
    base = tiny_model(kind)
    if mode == "full":
        freeze_untrained(base, routers=True)
        return base
    return add_adapters(base.requires_grad_(False), Tuning(mode="lora", r=2))


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", VISION)
def test_all_that_is_trained_of_a_vision_language_base_gets_a_gradient(kind, mode) -> None:
    model = trained_parts(kind, mode)
    ids = torch.arange(3, 9)[None]
    output = model(input_ids=ids, position_ids=torch.arange(6)[None], use_cache=False)
    output.logits.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    if mode == "lora":
        base = tiny_model(kind)
        found = reach(base)
        head = {id(base.get_output_embeddings().weight)}
        wanted = {
            n for n, p in base.named_parameters() if id(p) not in head and n in found.products
        }
        layers = {n for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        adapted = {re.sub(r"^base_model.model.|.base_layer", "", name) for name in layers}
        assert adapted == {name.rpartition(".")[0] for name in wanted - found.routers}


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_ddp_of_adapters_on_a_vision_language_base_gets_past_the_first_step(tmp_path, kind) -> None:
    """It died in step 1 with "Expected to have finished reduction in the prior iteration"."""
    distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(trained_parts(kind, "lora"))
        for _ in range(2):
            ids = torch.arange(3, 9)[None]
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    finally:
        distributed.destroy_process_group()


def test_a_pattern_of_the_user_is_joined_with_what_no_text_reaches() -> None:
    tuning = Tuning(mode="lora", r=2, lora=Lora(exclude_modules=["v_proj"]))
    model = add_adapters(tiny_model("gemma3").requires_grad_(False), tuning)
    adapted = {n for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert adapted
    assert not [name for name in adapted if "vision" in name or "v_proj" in name]
