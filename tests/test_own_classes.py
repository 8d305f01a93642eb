"""Models of a user's own classes: what multiplies is adapted and quantised, whatever holds it."""

from __future__ import annotations

import copy
from types import SimpleNamespace as Has
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import distributed, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from sft.config.schema import Tuning
from sft.errors import ConfigError, ModelError
from sft.models.adapt import add_adapters
from sft.models.head import SupervisedHead
from sft.models.quantise import matrices_to_quantise, quantise
from sft.models.reach import freeze_untrained, may_leave_out, reach
from sft.serve import merge, proof
from sft.tasks.sft.task import FineTune
from sft.train.parallel.ddp import Replicated

WIDTH, WORDS = 32, 61
IDS = torch.arange(2, 26)[None]


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


class Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Groups(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(-1, (4, -1)), self.weight.unflatten(0, (4, -1))
        return torch.einsum("btgi,goi->btgo", *parts).flatten(-2)


class Own(nn.Module):
    """A linear layer that is no `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix


class Block(nn.Module):
    """One way to hold matrices. Those that get adapters by themselves are in `ADAPTED`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(WIDTH)
        if kind in LAYERS:
            self.first = LAYERS[kind]()
        if kind in ("sequences", "raw router", "raw choice", "read router"):
            pairs = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(3))
            self.experts = nn.ModuleList(pairs)
        if kind in ("raw router", "raw choice"):
            self.scores = nn.Parameter(torch.empty(3, WIDTH))
            self.lift = nn.Parameter(torch.empty(3))
        if kind in ("mixed", "raw choice"):
            self.inner = nn.Linear(WIDTH, 3)
            self.up = nn.Parameter(torch.empty(3, WIDTH, WIDTH))
        if kind == "read router":
            self.choice = nn.Linear(WIDTH, 3)
        if kind == "either":
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        if kind == "indexed":
            self.index, self.first = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(x))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "pair":
            return self.first(x)[0]
        if self.kind in LAYERS:
            return self.first(x)
        if self.kind == "either":
            return self.first(x) if float(x.sum()) > 0 else self.second(x)
        if self.kind == "sequences":
            return sum(each(x) for each in self.experts)  # type: ignore[return-value]
        if self.kind == "indexed":  # what only chooses gets no gradient
            with torch.no_grad():
                best = self.index(x).relu().sum(-1, keepdim=True)
            return self.first(x) * (best > best.mean())
        result = torch.zeros_like(x)
        if self.kind == "mixed":
            return result + torch.einsum("bte,eio,bti->bto", self.inner(x).softmax(-1), self.up, x)
        if self.kind == "read router":
            scores = F.linear(x, self.choice.weight).softmax(-1)
        else:
            scores = F.linear(x, self.scores, self.lift).softmax(-1)
        weight = 0.1 + scores * (scores == scores.topk(1).values)  # all get a gradient
        if self.kind == "raw choice":
            result = result + torch.einsum("bte,eio,bti->bto", self.inner(x) * weight, self.up, x)
        for number, expert in enumerate(self.experts):
            result = result + expert(x) * weight[..., number, None]
        return result


LAYERS: dict[str, Any] = {
    "scaled": lambda: Scaled(WIDTH, WIDTH),
    "pair": lambda: Pair(WIDTH, WIDTH),
    "groups": lambda: Groups(WIDTH // 4, WIDTH),
    "own": Own,
}
ADAPTED = {
    **{key: ["first.weight"] for key in ("scaled", "pair", "groups", "indexed")},
    "own": ["first.matrix"],
    "sequences": [f"experts.{number}.0.weight" for number in range(3)],
    "mixed": ["inner.weight", "up"],
    "raw router": [f"experts.{number}.0.weight" for number in range(3)],
    "read router": [f"experts.{number}.0.weight" for number in range(3)],
    "raw choice": ["inner.weight", "up", *(f"experts.{number}.0.weight" for number in range(3))],
}


class Config(PreTrainedConfig):
    model_type = "own-classes"
    kind: str = "own"


class Network(PreTrainedModel, GenerationMixin):
    config_class = Config
    _keep_in_fp32_modules_strict: set[str] = set()  # noqa: RUF012

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.layers = nn.ModuleList(Block(config.kind) for _ in range(2))
        self.images = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for number, parameter in enumerate(module.parameters(recurse=False)):
            waves = torch.arange(parameter.numel()).mul(0.7 + number).sin()
            parameter.data = 0.3 * waves.view_as(parameter)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return Has(logits=self.head(x))


def network(kind: str) -> Network:
    return Network(Config(kind=kind))


def adapted(base: Network, **tuning: Any) -> Any:
    model = add_adapters(base.requires_grad_(False), Tuning(mode="lora", r=4, **tuning))
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
    return model


def gradients(model: Any) -> list[torch.Tensor]:
    model(input_ids=IDS).logits.square().sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def weights_with_adapter(model: Any) -> set[str]:
    """Returns the names of the weights of the base that the formulas of LoRA change."""
    plain = dict(network(model.config.kind).named_parameters())
    expected = proof._expected_weights(model, network(model.config.kind))
    return {name for name, value in expected if not torch.allclose(value, plain[name])}


@pytest.mark.parametrize("kind", ADAPTED)
def test_every_matrix_has_an_adapter_that_can_be_merged(kind) -> None:
    model = adapted(network(kind)).eval()
    wanted = {f"layers.{layer}.{name}" for layer in range(2) for name in ADAPTED[kind]}
    assert weights_with_adapter(model) == wanted
    assert all(each is not None and each.any() for each in gradients(model))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        checked = dict(proof._expected_weights(model, network(kind)))
        merged = merge.merge_weights(model)
        assert {n for n, _ in merged.named_parameters()} == checked.keys()
        for name, value in merged.named_parameters():
            torch.testing.assert_close(value, checked[name])
        found = merged(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ADAPTED)
def test_every_frozen_matrix_is_in_4_bits_and_its_gradient_right(kind) -> None:
    base = network(kind)
    wanted = {f"layers.{layer}.{name}" for layer in range(2) for name in ADAPTED[kind]}
    assert matrices_to_quantise(base) == wanted
    quantise(base, torch.float32)
    in_4_bits = {n for n, p in base.named_parameters() if p.dtype == torch.uint8}
    assert in_4_bits == wanted | {"images.0.weight"}  # no text reaches it, so nobody computes it
    reference = network(kind)
    for name, parameter in base.named_parameters():
        reference.get_parameter(name).data = proof.dequantise(parameter)
    found, expected = gradients(adapted(base)), gradients(adapted(reference))
    assert tiny.relative_error(found, expected) < 1e-5


def test_what_a_class_keeps_in_fp32_stays_so(monkeypatch) -> None:
    """Code of such classes reads the dtype of these weights, and rounds activations to it."""
    monkeypatch.setattr(Network, "_keep_in_fp32_modules_strict", {"first"})
    assert matrices_to_quantise(network("scaled")) == set()
    monkeypatch.setattr(Network, "_keep_in_fp32_modules_strict", {"irst"})
    assert len(matrices_to_quantise(network("scaled"))) == 2


@pytest.mark.parametrize("kind", ["raw router", "raw choice"])
def test_a_router_without_a_module_of_its_own_is_frozen_alone(kind) -> None:
    base = network(kind)
    assert reach(base).routers == {f"layers.{number}.scores" for number in range(2)}
    freeze_untrained(base, routers=True)
    frozen = {n.partition(".")[2] for n, p in base.named_parameters() if not p.requires_grad}
    assert frozen == {"0.scores", "0.lift", "1.scores", "1.lift", "0.weight", "0.bias"}  # images
    trained = copy.deepcopy(network(kind))
    freeze_untrained(trained, routers=False)
    assert trained.get_parameter("layers.0.scores").requires_grad


def test_a_router_that_no_adapter_can_change_is_named() -> None:
    raw = adapted(network("raw router"), router="trained")
    assert {f"layers.{number}.scores" for number in range(2)} <= weights_with_adapter(raw)
    with pytest.raises(ModelError, match=r"tuning\.router: no adapter can change .* set frozen"):
        adapted(network("read router"), router="trained")


def test_a_model_without_a_matrix_to_adapt_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Block, "mix", lambda *_: 0.0)
    with pytest.raises(ModelError, match=r"auto finds no matrix .* set tuning\.mode: full"):
        adapted(network("none"))


def test_a_model_that_needs_more_than_text_is_refused(tmp_path) -> None:
    def forward(pixels: torch.Tensor, **_: Any) -> None: ...

    model: Any = type("Images", (nn.Module,), {"forward": lambda _, **given: forward(**given)})()
    model.get_input_embeddings = lambda: nn.Embedding(WORDS, WIDTH)
    device = Has(device=torch.device("cpu"))
    task: Any = Has(model=model, config=tiny.config(tmp_path), balance=None, accelerator=device)
    with pytest.raises(ConfigError, match=r"nano/model does not run on text alone \(.*pixels"):
        FineTune.check_model(task, "fp32", "padded")
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="does not say which layer gives logits"):
        SupervisedHead(model)


def test_ddp_does_not_wait_for_what_a_step_leaves_out(tmp_path) -> None:
    """It died in step 2 with "Expected to have finished reduction in the prior iteration"."""
    assert not may_leave_out(network("own"))
    distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrap = nn.parallel.DistributedDataParallel
        accelerator: Any = Has(num_processes=1, prepare=lambda model, other: (wrap(model), other))
        parallel = Replicated(network("either"), tiny.config(tmp_path).train, accelerator)
        for _ in range(2):
            parallel.begin_step()
            with parallel.no_sync():
                loss = parallel.model(input_ids=IDS).logits.square().sum()
            parallel.prepare_backward(last=True)
            parallel.backward(loss)
            norms = [float(p.grad.norm()) for p in parallel.trained.values()]  # those left out: 0
            assert 0 in norms
            assert max(norms) > 0
            parallel.clip()
            parallel.update()
    finally:
        distributed.destroy_process_group()
