"""The vocabulary head in chunks: the loss and gradients of all logits at once."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import families
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import representatives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from test_experts import mixture
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sft.config.load import with_values
from sft.config.schema import Train
from sft.data import batches
from sft.models import head
from sft.models.head import SupervisedHead
from sft.models.tail import NotRepeatable
from sft.plan import dry_run
from sft.runtime.log import Log
from sft.runtime.processes import Context
from sft.tasks.sft import losses
from sft.tasks.sft.task import FineTune

WORDS, WIDTH = 24, 6


def _hide(logits: torch.Tensor) -> torch.Tensor:
    logits[..., 3:5] = -10.0
    return logits


TAILS = {
    "none": lambda logits: logits,
    "softcap": lambda logits: torch.tanh(logits / 3.0) * 3.0,
    "scale": lambda logits: logits * 0.3,
    "in place": lambda logits: logits.mul_(0.3).add_(1.0),
    "hidden words": _hide,
    "cut": lambda logits: logits[..., : WORDS - 3].double().contiguous(),
    "softplus": lambda logits: torch.where(logits > 0, logits, F.softplus(logits)),
}


class Small(nn.Module):
    """Embeds tokens, mixes them with those before, and gives logits."""

    def __init__(self, tail, *, tied: bool = False, bias: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.table.weight
        self.tail, self.config = tail, SimpleNamespace()

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, position_ids=None, use_cache=None):
        hidden = torch.tanh(self.body(self.table(input_ids).cumsum(1)))
        return SimpleNamespace(logits=self.tail(self.head(hidden)))


def with_lora(model: nn.Module) -> nn.Module:
    """Adapts the head of a model whose base is frozen, but for its embeddings."""
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"], lora_alpha=3), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
        parameter.requires_grad_("lora_" in name or "table" in name)
    return model


class Chunks:
    """Runs a model whole, and in chunks of `rows` positions."""

    def __init__(self, model: nn.Module, rows: int, monkeypatch: pytest.MonkeyPatch):
        self.model, self.rows, self.monkeypatch = model, rows, monkeypatch
        monkeypatch.setattr(SupervisedHead, "_trained_bytes", lambda _: 0)
        self.head = SupervisedHead(model)

    def run(self, whole: bool, ids, positions, measure, factor: float = 1.0):
        """Returns the sums, all gradients, and whether the head ran in chunks."""
        limit = 2**40 if whole else 4 * self.head._vocabulary() * self.rows
        self.monkeypatch.setattr(head, "CHUNK_BYTES", limit)
        self.model.zero_grad()
        torch.manual_seed(0)  # for dropout
        sums, output = self.head.sums(
            lambda: self.model(input_ids=ids, use_cache=False), positions, measure
        )
        (sums["loss"] * factor).backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
        return sums, gradients, output.logits.ndim == 0


def weighted(targets: torch.Tensor, weights: torch.Tensor, **changes) -> head.Measure:
    given = SimpleNamespace(targets=targets, weights=weights)
    return losses.measure(given, Train(output_dir="x", **changes))  # type: ignore[arg-type]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10_000),
    tail=st.sampled_from(list(TAILS)),
    kind=st.sampled_from(["plain", "bias", "tied", "adapted", "frozen"]),
    number=st.integers(2, 40),
    rows=st.integers(1, 17),
    changes=st.sampled_from(
        [{}, {"label_smoothing": 0.2}, {"z_loss": 0.05, "label_smoothing": 0.1}, {"loss": "dft"}]
    ),
)
def test_chunks_give_the_sums_and_gradients_of_the_whole(
    monkeypatch, seed, tail, kind, number, rows, changes
):
    model = Small(TAILS[tail], tied=kind == "tied", bias=kind == "bias").double()
    if kind == "adapted":
        model = with_lora(model).double()
    if kind == "frozen":
        model.head.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (3, 15), generator=random)
    positions = torch.randperm(45, generator=random)[:number]
    targets = torch.randint(WORDS - 5, (number,), generator=random)
    weights = torch.rand(number, generator=random, dtype=torch.float64)
    measure = weighted(targets, weights, **changes)
    chunks = Chunks(model, rows, monkeypatch)
    expected, gradients, is_chunked = chunks.run(True, ids, positions, measure, 0.37)
    assert not is_chunked
    found, own, is_chunked = chunks.run(False, ids, positions, measure, 0.37)
    assert is_chunked == (number > rows), chunks.head.why_whole
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    assert any(g.abs().max() > 0 for g in gradients)
    assert tiny.relative_error(own, gradients) < 1e-12
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


def test_hooks_that_move_what_a_pass_saves_see_no_logits(monkeypatch):
    """Such as those of activations that are offloaded to host memory."""
    seen: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    model, positions = Small(TAILS["softcap"]), torch.arange(30)
    measure = weighted(torch.arange(30) % WORDS, torch.ones(30))
    chunks = Chunks(model, 7, monkeypatch)
    chunks.head.prove()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _, found, is_chunked = chunks.run(False, torch.arange(30)[None] % WORDS, positions, measure)
    assert is_chunked
    assert seen
    assert not [shape for shape in seen if shape[-1:] == (WORDS,) and shape[0] > 1]
    _, expected, _ = chunks.run(True, torch.arange(30)[None] % WORDS, positions, measure)
    assert tiny.relative_error(found, expected) < 1e-5


ADAPTED = {
    "copy": {"tuning.lora.modules_to_save": ["lm_head"]},
    "adapter": {"tuning.target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"tuning.target_modules": ["q_proj", "lm_head"], "tuning.lora.use_dora": True},
    "rows": {"tuning.lora.trainable_token_indices": [3, 5, 9]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ADAPTED)
def test_heads_that_peft_wraps(monkeypatch, tmp_path, name, tied):
    """With tied embeddings, rows of tokens reach the head from a module that is not part of it."""
    given_ = with_values(tiny.config(tmp_path), {"tuning.mode": "lora", **ADAPTED[name]})
    base = tiny.llama(torch.float64, tie_word_embeddings=tied)
    model = tiny.adapted(given_, torch.float64, base).double().eval()
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(2, tiny.VOCAB, (2, 15), generator=random)
    measure = weighted(torch.arange(25), torch.rand(25, generator=random, dtype=torch.float64))
    chunks = Chunks(model, 7, monkeypatch)
    whole, expected, _ = chunks.run(True, ids, torch.arange(25), measure)
    sums, found, is_chunked = chunks.run(False, ids, torch.arange(25), measure)
    assert is_chunked, chunks.head.why_whole
    assert sums["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_balanced_router_with_chunks(monkeypatch, tmp_path):
    saved = mixture("qwen3_moe", torch.float64)
    saved.config.router_aux_loss_coef = 0.5
    saved.save_pretrained(tmp_path / "base")
    changes = {"model.name": str(tmp_path / "base"), "tuning.router": "trained"}
    given_ = with_values(tiny.config(tmp_path / "run", global_batch=8), changes)
    rows, found = tiny.examples(4, 8), []
    for chunk in (10**9, 5):
        small_chunks(monkeypatch, chunk)
        model = mixture("qwen3_moe", torch.float64)
        model.config.router_aux_loss_coef = 0.5
        model.set_experts_implementation("eager")
        engine = tiny.make_engine(model, rows, rows, given_, batches.Budget(60, "padded"))
        values = engine.optimizer_step()
        assert (engine.task.head.tail is None) == (chunk > 5)
        found.append((values["train/loss"], values["train/balance"], model))
    (loss, balance, whole), (mine, own, cut) = found
    assert (mine, own) == pytest.approx((loss, balance), rel=1e-7)
    gradients = [[p.grad for p in each.parameters()] for each in (cut, whole)]
    assert tiny.relative_error(*gradients) < 1e-7


SAMPLE = ["llama", "gemma2", "gemma3n_text", "cohere", "granite", "recurrent_gemma", "mamba"]
SAMPLE += ["qwen2_moe", "gpt_oss", "granitemoehybrid", "falcon_h1", "opt", "gemma3", "qwen2_vl"]
REST = [name for name in families.DECODERS if name not in SAMPLE]


@pytest.mark.parametrize("model_type", representatives(SAMPLE + REST, SAMPLE))
def test_chunks_of_a_type_give_what_its_own_code_gives(monkeypatch, model_type):
    model = families.tiny_model(model_type).train()
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1000, (2, 20), generator=random)
    positions = torch.randperm(40, generator=random)[:23]
    targets = torch.randint(1000, (23,), generator=random)
    measure = weighted(targets, torch.rand(23, generator=random), label_smoothing=0.1)
    chunks = Chunks(model, 5, monkeypatch)
    expected, gradients, _ = chunks.run(True, ids, positions, measure, 0.37)
    found, own, is_chunked = chunks.run(False, ids, positions, measure, 0.37)
    assert is_chunked, chunks.head.why_whole
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    assert tiny.relative_error(own, gradients) < 1e-5


class Twice(Small):
    def forward(self, input_ids, position_ids=None, use_cache=None):
        found = super().forward(input_ids)
        return SimpleNamespace(logits=found.logits + self.head(self.table(input_ids)))


def _over_positions(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(0)


def _of_this_size(logits: torch.Tensor) -> torch.Tensor:
    return logits.reshape(2, len(logits) // 2, -1).flatten(0, 1)


def _by_value(logits: torch.Tensor) -> torch.Tensor:
    return logits / 2 if logits.max().item() > 5 else logits


def _with_weights(logits: torch.Tensor) -> torch.Tensor:
    return logits + WEIGHTS


WEIGHTS = torch.ones(WORDS)
REFUSED = {
    "mean over positions": (Small(_over_positions), "do not give the loss and gradients"),
    "shape": (Small(_of_this_size), "a proof with a few tokens failed"),
    "value": (Small(_by_value), r"reads values of logits \(item\)"),
    "tensor": (Small(_with_weights), "combines logits with another tensor"),
    "twice": (Twice(TAILS["none"]), "calls its head 2 times"),
    "detached": (Small(lambda logits: torch.tensor(logits.tolist())), "reads values of logits"),
    "values alone": (Small(lambda logits: WEIGHTS.expand(8, -1)), "not computed from the output"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repeated_is_computed_whole_and_reported(monkeypatch, name):
    model, reason = REFUSED[name]
    said: list[str] = []
    chunks = Chunks(model, 3, monkeypatch)
    chunks.head.say = said.append
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    chunks.head.prove("fp32")
    [text] = said
    assert chunks.head.why_whole == text
    assert chunks.head._rows_per_chunk(40) == 0
    assert re.search(reason, text)


def test_a_batch_that_fits_takes_no_chunks_and_no_proof():
    model = tiny.llama()
    made = SupervisedHead(model)
    made.prove = lambda *_: pytest.fail("no proof is needed")  # type: ignore[method-assign]
    positions = torch.arange(20)
    measure = weighted(torch.arange(20), torch.ones(20))
    ids = torch.arange(2, 22)[None]
    sums, output = made.sums(lambda: model(input_ids=ids), positions, measure)
    assert torch.equal(output.logits, model(input_ids=ids).logits[0])
    assert torch.equal(sums["loss"], measure(output.logits, slice(None))["loss"])


def test_a_trained_head_takes_chunks_once_they_save_memory():
    """Its gradient exists twice then: 128,256 words by 4,096 in fp32 are 1.96 GiB."""
    assert head.most_rows(128_256) == 2**28 // (4 * 128_256) == 523
    assert head.most_rows(128_256, 4 * 128_256 * 4_096) == 4_096 // 4 + 4_096 // 3
    model = tiny.llama()
    made = SupervisedHead(model)
    assert made.limit() == (2**28 + 4 * tiny.VOCAB * 32 // 3) // (4 * tiny.VOCAB)
    model.get_output_embeddings().requires_grad_(False)
    assert made.limit() == 2**28 // (4 * tiny.VOCAB)


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(SupervisedHead, "_trained_bytes", lambda _: 0)
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * tiny.VOCAB * rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_tokens", [60, 10_000])
def test_law_1_with_chunks(monkeypatch, tmp_path, dtype, max_tokens):
    rows = [
        replace(row, weights=np.random.default_rng(i).random(len(row.ids)).tolist())
        for i, row in enumerate(tiny.examples(5, 9))
    ]
    model = tiny.llama(dtype)
    loss, gradients = tiny.reference(model, rows)
    small_chunks(monkeypatch, 7)
    settings_ = tiny.config(tmp_path, global_batch=9)
    for layout in ("padded", "packed"):
        budget = batches.Budget(max_tokens, layout)
        engine = tiny.make_engine(model, rows, rows, settings_, budget)
        values = engine.optimizer_step()
        assert engine.task.head.tail is not None
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert values["train/loss"] == pytest.approx(loss, rel=tolerance)
        assert tiny.relative_error([p.grad for p in model.parameters()], gradients) < tolerance
        found = tiny.make_engine(tiny.llama(dtype), rows, rows, settings_, budget)
        assert found.task.evaluate(found.model)["loss"] == pytest.approx(loss, rel=tolerance)
        model.zero_grad()
        model = tiny.llama(dtype)


@pytest.mark.parametrize("representation", ["hidden", "logits"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_crowd_in_chunks(monkeypatch, tmp_path, representation, pooling):
    rows = tiny.examples(3, 9)
    settings_ = tiny.crowd_config(
        tmp_path, train={"global_batch": 9}, representation=representation, pooling=pooling
    )
    results = []
    for chunk in (10**9, 4):
        small_chunks(monkeypatch, chunk)
        model = tiny.adapted(settings_, torch.float64)
        engine = tiny.make_engine(model, rows, rows, settings_, batches.Budget(90, "packed"))
        values = engine.optimizer_step()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        held_out = engine.task.evaluate(engine.model)
        likely = engine.task._likelihoods(engine.model, engine.task.prepared.held_out)
        results.append((values, gradients, held_out, likely))
        assert (engine.task.head.tail is None) == (chunk > 4)
    (values, gradients, held_out, likely), (own, found, mine, parts) = results
    for name in ("loss", "cross_entropy", "token_accuracy", "diversity"):
        assert own[f"train/{name}"] == pytest.approx(values[f"train/{name}"], rel=1e-11)
    assert tiny.relative_error(found, gradients) < 1e-11
    assert mine == pytest.approx(held_out, rel=1e-11)
    torch.testing.assert_close(parts[0], likely[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("agents", [1, 3])
def test_agents_on_the_head_get_rows_of_their_own(monkeypatch, tmp_path, agents):
    rows = tiny.examples(3, 6)
    settings_ = with_values(
        tiny.crowd_config(tmp_path, train={"global_batch": 6}, num_agents=agents),
        {"tuning.target_modules": ["lm_head", "q_proj"]},
    )
    found = []
    for chunk in (10**9, 4):
        small_chunks(monkeypatch, chunk)
        model = tiny.adapted(settings_, torch.float64)
        engine = tiny.make_engine(model, rows, rows, settings_, batches.Budget(10**5, "padded"))
        engine.optimizer_step()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert tiny.relative_error(found[1], found[0]) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_chunks_is_computed_in_fp32(monkeypatch, dtype):
    """Autocast, which the head runs in, would compute sums of the loss in 16 bits."""
    model, ids = tiny.llama(), torch.arange(2, 42)[None]
    measure = weighted(torch.arange(40), torch.linspace(0.1, 1, 40))
    model.forward = torch.autocast("cpu", dtype)(model.forward)
    chunks = Chunks(model, 9, monkeypatch)
    (whole, expected, _), (found, own, _) = (
        chunks.run(is_whole, ids, torch.arange(40), measure) for is_whole in (True, False)
    )
    assert found["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-6)
    assert tiny.relative_error(own, expected) < 2e-2


def test_gradients_of_chunks_do_not_vanish_in_fp16(monkeypatch):
    """They are computed in the forward pass, before the engine multiplies by the loss scale."""
    model, ids = tiny.llama(), torch.arange(2, 42)[None]
    targets, weights = torch.arange(40), torch.full((40,), 1e-7)
    measure = weighted(targets, weights)
    scale = 2.0**16
    cast = torch.autocast("cpu", torch.float16)
    model.forward = cast(model.forward)
    chunks = Chunks(model, 9, monkeypatch)
    _, expected, _ = chunks.run(True, ids, targets, measure, scale)
    errors = []
    for factor in (scale, 1.0):
        chunks.head.factor = factor
        _, found, is_chunked = chunks.run(False, ids, targets, measure, scale)
        assert is_chunked, chunks.head.why_whole
        errors.append(tiny.relative_error(found, expected))
    assert errors[0] < 2e-2 < errors[1]


def test_the_engine_gives_the_factor_of_its_losses(tmp_path):
    rows = tiny.examples(5, 9)
    settings_ = tiny.config(tmp_path, global_batch=9, precision="fp16")
    engine = tiny.make_engine(tiny.llama(), rows, rows, settings_, batches.Budget(60, "padded"))
    assert engine.loss_scale
    scale = engine.loss_scale.value
    values = engine.optimizer_step()
    assert engine.task.head.factor == scale / values["train/supervised_tokens"]


def test_gradients_of_chunks_are_exact_with_another_factor(monkeypatch):
    model, ids = tiny.llama(torch.float64), torch.arange(2, 42)[None]
    measure = weighted(torch.arange(40), torch.ones(40))
    chunks = Chunks(model, 9, monkeypatch)
    _, expected, _ = chunks.run(True, ids, torch.arange(40), measure, 3.0)
    for factor in (1.0, 1e-6, 48.0):
        chunks.head.factor = factor
        _, found, _ = chunks.run(False, ids, torch.arange(40), measure, 3.0)
        assert tiny.relative_error(found, expected) < 1e-13


def peak_of_logits(folder, supervised: int, evaluation: bool) -> int:
    """Returns the bytes of logits and loss at the peak of a dry run of the nano model."""
    window = dry_run.Window((((supervised, supervised),),))
    trace = dry_run.trace_step(tiny.config(folder), "bf16", window, depth=1, evaluation=evaluation)
    return max(peak.breakdown.get("logits and loss", 0) for peak in trace.peaks().values())


@pytest.mark.slow
@pytest.mark.parametrize("evaluation", [False, True])
def test_the_peak_of_logits_does_not_depend_on_the_supervised_tokens(
    monkeypatch, tmp_path, evaluation
):
    """Only the head's input and its gradient do: 4 bytes for each of their 96 elements."""
    sizes, words = (400, 800), families.VOCABULARY
    whole = [peak_of_logits(tmp_path, number, evaluation) for number in sizes]
    assert whole[1] - whole[0] > 400 * words * 4
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * words * 50)
    monkeypatch.setattr(SupervisedHead, "_trained_bytes", lambda _: 0)
    peaks = [peak_of_logits(tmp_path, number, evaluation) for number in sizes]
    assert peaks[1] - peaks[0] <= 400 * 96 * 8
    assert peaks[1] < whole[1] / 4


WITH = {
    "update in backward": {"optimizer_in_backward": True},
    "offload": {"activation_offload": True},
    "selective": {"gradient_checkpointing": "selective"},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "bf16_pure": {"precision": "bf16_pure"},
}


@pytest.mark.parametrize("name", WITH)
def test_chunks_with_what_else_changes_a_pass(monkeypatch, tmp_path, name):
    """Two steps end with the weights that the whole gives."""
    rows, found = tiny.examples(5, 9), []
    settings_ = tiny.config(tmp_path, global_batch=9, **WITH[name])
    is_bf16 = "bf16" in name
    for chunk in (10**9, 7):
        small_chunks(monkeypatch, chunk)
        model = tiny.llama(torch.bfloat16 if name == "bf16_pure" else torch.float32)
        engine = tiny.make_engine(model, rows, rows, settings_, batches.Budget(60, "padded"))
        for engine.step in range(2):
            values = engine.optimizer_step()
        assert (engine.task.head.tail is None) == (chunk > 7), engine.task.head.why_whole
        found.append((values["train/loss"], [p.detach().float() for p in model.parameters()]))
    (loss, weights), (mine, own) = found
    assert mine == pytest.approx(loss, rel=1e-3 if is_bf16 else 1e-5)
    assert tiny.relative_error(own, weights) < (5e-3 if is_bf16 else 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_type", ["gemma2", "mamba", "cohere"])
def test_a_run_tries_chunks_in_its_precision_before_it_trains(
    monkeypatch, tmp_path, precision, model_type
):
    said: list[str] = []
    context = Context(dry_run.CpuAccelerator(precision), Log(None))
    monkeypatch.setattr(context.log, "say", said.append)
    model = families.tiny_model(model_type)
    task = FineTune(tiny.config(tmp_path), None, model, batches.Budget(60, "padded"), context)
    task.prove_head(precision)
    assert task.head.tail is None  # 60 tokens never need chunks
    small_chunks(monkeypatch, 9)
    task.prove_head(precision)
    assert task.head.tail is not None
    assert not said
    task.head.tail = None
    monkeypatch.setattr(SupervisedHead, "_compare", _differ)
    task.prove_head(precision)
    [text] = said
    assert text.startswith("logits: those of a micro-batch are computed at once, since chunks")
    assert task.head._rows_per_chunk(60) == 0


def _differ(*_: object) -> None:
    raise NotRepeatable("chunks differ")
