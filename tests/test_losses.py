"""Losses, their means, and noise on embeddings: formulas, and laws 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import test_parallel as parallel
import tiny
import torch
import torch.nn.functional as F
from conftest import representatives
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.config.load import with_values
from sft.config.schema import Train
from sft.data import batches, template
from sft.data.examples import collate
from sft.errors import ModelError
from sft.models.layers import embedding_layers
from sft.models.noise import EmbeddingNoise, token_keys, uniform
from sft.plan import dry_run
from sft.plan.dry_run import Window
from sft.plan.memory import predict
from sft.tasks.sft import losses

CPU = torch.device("cpu")
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "mean_per": "example", "neftune_alpha": 5.0}
CHANGES = [{"loss": "dft", "z_loss": 0.01}, OPTIONS]


# --- formulas ------------------------------------------------------------------------------------


def of_token(logits: list[float], target: int, train: dict[str, Any]) -> float:
    """The loss of a token by the formulas of the papers, in plain numbers."""
    total = float(np.exp(logits).sum())
    logs = [value - np.log(total) for value in logits]
    smoothing = train.get("label_smoothing", 0.0)
    loss = -(1 - smoothing) * logs[target] - smoothing * float(np.mean(logs))
    if train.get("loss") == "dft":
        loss = float(np.exp(logs[target])) * -logs[target]
    return loss + train.get("z_loss", 0.0) * float(np.log(total)) ** 2


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999),
    train=st.sampled_from(
        [{}, {"loss": "dft"}, {"label_smoothing": 0.3}, {"z_loss": 0.1}, *CHANGES]
    ),
)
def test_the_loss_of_a_token_is_that_of_the_papers(seed, train):
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, 7, generator=random, dtype=torch.float64)
    targets = torch.randint(7, (5,), generator=random)
    each, plain = losses.token_losses(logits, targets, Train(output_dir="x", **train))
    for row, target, loss, entropy in zip(logits, targets, each, plain, strict=True):
        assert loss.item() == pytest.approx(of_token(row.tolist(), int(target), train))
        assert entropy.item() == pytest.approx(of_token(row.tolist(), int(target), {}))


def test_the_gradient_of_dft_is_that_of_cross_entropy_times_the_probability():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 0, 6, 3])
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
    each, _ = losses.token_losses(logits, targets, Train(output_dir="x", loss="dft"))
    (found,) = torch.autograd.grad(each.sum(), logits)
    likely = logits.detach().softmax(-1).gather(1, targets[:, None])
    torch.testing.assert_close(found, plain * likely)


# --- the mean over examples ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_weights_of_an_example_sum_to_1(layout):
    rows = tiny.examples(5, 9)
    rows[2] = replace(rows[2], weights=[0.5] * len(rows[2].ids))
    rows[4] = replace(rows[4], weights=[0.0] * len(rows[4].ids))
    batch = collate(tiny.stored(rows), [*range(9)], 0, layout, CPU, True)
    sums = [part.sum().item() for part in batch.weights.split(batch.counts)]
    counts = [i != 4 and bool(count) for i, count in enumerate(batch.counts)]
    assert sums == pytest.approx([1.0 if counts[i] else 0.0 for i in range(9)])
    assert batch.num_items == sum(counts)
    assert collate(tiny.stored(rows), [*range(9)], 0, layout, CPU).num_items is None


def reference(model, rows, train: dict[str, Any], embed=lambda i, ids: None):
    """Loss and gradients, one example at a time. `embed`: its noisy embeddings."""
    model.zero_grad()
    total, parts = 0.0, []
    for i, row in enumerate(rows):
        places = [t for t, label in enumerate(row.labels[1:]) if label != template.IGNORED]
        weights = row.weights or [1.0] * len(row.ids)
        own = torch.tensor([weights[t + 1] for t in places], dtype=torch.float64)
        if not places or not own.sum():
            continue
        if train.get("mean_per") == "example":
            own = own / own.sum()
        ids = torch.tensor([row.ids])
        noisy = embed(i, ids)
        output = model(inputs_embeds=noisy) if noisy is not None else model(input_ids=ids)
        logits = output.logits[0, places]
        logs = logits.log_softmax(-1)
        targets = torch.tensor([row.labels[t + 1] for t in places])
        chosen = logs.gather(1, targets[:, None])[:, 0]
        smoothing = train.get("label_smoothing", 0.0)
        each = -(1 - smoothing) * chosen - smoothing * logs.mean(-1)
        if train.get("loss") == "dft":
            each = -chosen * chosen.detach().exp()
        each = each + train.get("z_loss", 0.0) * logits.logsumexp(-1) ** 2
        parts.append(each @ own)
        total += own.sum().item()
    loss = torch.stack(parts).sum() / (len(parts) if train.get("mean_per") == "example" else total)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss.item(), gradients


def noisy_embeddings(model, alpha: float, seed: int, step: int):
    """Returns the function that embeds an example with its noise, from the hash alone."""

    def embed(i: int, ids: torch.Tensor) -> torch.Tensor:
        embedded = model.get_input_embeddings()(ids)
        length, width = embedded.shape[1:]
        keys = token_keys(seed, step, torch.full((length,), i), torch.arange(length))
        noise = uniform(keys, width) * np.float32(alpha / np.sqrt(length * width))
        return embedded + noise.to(embedded.dtype)

    return embed


@pytest.mark.parametrize("train", CHANGES, ids=["dft", "options"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_law_1_and_the_held_out_loss_stays_plain(tmp_path, train, layout, max_tokens):
    rows = tiny.examples(5, 9)
    rows[2] = replace(rows[2], weights=np.linspace(0, 2, len(rows[2].ids)).tolist())
    model = tiny.llama(torch.float64)
    plain, _ = tiny.reference(model, rows)
    alpha = train.get("neftune_alpha", 0.0)
    embed = noisy_embeddings(model, alpha, 7, 3) if alpha else lambda *_: None
    loss, gradients = reference(model, rows, train, embed)
    given_ = tiny.config(tmp_path, global_batch=9, seed=7, shuffle=False, max_steps=9, **train)
    engine = tiny.make_engine(model, rows, rows, given_, batches.Budget(max_tokens, layout))
    held_out = engine.task.evaluate(engine.model)
    assert held_out["loss"] == pytest.approx(plain, rel=1e-10)
    engine.step = 3
    values = engine.optimizer_step()
    assert values["train/loss"] == pytest.approx(loss, rel=1e-10)
    assert tiny.relative_error([p.grad for p in model.parameters()], gradients) < 1e-9
    if alpha == 0:
        assert values["train/cross_entropy"] == pytest.approx(plain, rel=1e-10)
    if train.get("mean_per") == "example":
        assert values["train/supervised_tokens"] == sum(row.num_supervised > 0 for row in rows)


@pytest.mark.parametrize("train", CHANGES, ids=["dft", "options"])
def test_a_crowd_takes_these_keys_for_any_cut(tmp_path, train):
    rows, found = tiny.examples(5, 9), []
    given_ = tiny.crowd_config(tmp_path, train={"global_batch": 9, **train})
    for layout, max_tokens in [("padded", 10**5), ("padded", 40), ("packed", 60)]:
        model = tiny.adapted(given_, torch.float64)
        engine = tiny.make_engine(model, rows, rows, given_, batches.Budget(max_tokens, layout))
        values = engine.optimizer_step()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found.append((values["train/loss"], values["train/cross_entropy"], gradients))
    for loss, entropy, gradients in found[1:]:
        assert (loss, entropy) == pytest.approx(found[0][:2], rel=1e-9)
        assert tiny.relative_error(gradients, found[0][2]) < 1e-8
    assert found[0][0] != pytest.approx(found[0][1])
    plain = with_values(given_, {f"train.{k}": Train.model_fields[k].default for k in train})
    model = tiny.adapted(plain, torch.float64)
    engine = tiny.make_engine(model, rows, rows, plain, batches.Budget(10**5, "padded"))
    assert engine.optimizer_step()["train/loss"] != pytest.approx(found[0][0], rel=1e-3)


# --- noise ---------------------------------------------------------------------------------------


def test_noise_is_uniform_and_independent():
    examples, positions = torch.arange(64).repeat_interleave(32), torch.arange(32).repeat(64)
    examples = examples + 100
    drawn = uniform(token_keys(0, 0, examples, positions), 128)
    assert drawn.dtype == torch.float32
    assert -1 <= drawn.min() < -0.9999
    assert 0.9999 < drawn.max() < 1
    number = drawn.numel()
    assert abs(drawn.mean().item()) < 4 / np.sqrt(3 * number)
    assert drawn.square().mean().item() == pytest.approx(1 / 3, rel=0.01)
    counts = torch.histc(drawn, 64, -1, 1) / number * 64
    assert (counts - 1).abs().max() < 5 * np.sqrt(64 / number)
    others = [
        uniform(token_keys(1, 0, examples, positions), 128),
        uniform(token_keys(0, 1, examples, positions), 128),
        uniform(token_keys(0, 0, examples + 1, positions), 128),
        uniform(token_keys(0, 0, examples, positions + 1), 128),
        uniform(token_keys(0, 0, positions, examples), 128),
        drawn.roll(1, 1),
        drawn.roll(1, 0),
    ]
    for other in others:
        correlation = 3 * (drawn * other).mean().item()
        assert abs(correlation) < 5 / np.sqrt(number)


def test_noise_has_the_same_bits_on_every_machine():
    """Written down once: other numbers would change the noise of runs that are resumed."""
    keys = token_keys(3, 5, torch.tensor([7, 2**31 - 1]), torch.tensor([0, 11]))
    found = (uniform(keys, 3).double() * 2**23).long().tolist()
    assert found == NOISE


NOISE = [[-3963921, 5707542, 114338], [4828954, -2776141, -4549605]]


@pytest.mark.parametrize("model_type", ["llama", "gemma3", "qwen2_vl", "gemma3n_text", "gpt2"])
def test_noise_is_on_the_embeddings_of_tokens_alone(model_type):
    model = families.tiny_model(model_type).eval()
    ids = torch.randint(3, 1000, (2, 6))
    seen: list[torch.Tensor] = []
    embedding_layers(model)[0].register_forward_hook(lambda *_: None)
    noise = EmbeddingNoise(model, 5.0, 0)
    embedding_layers(model)[0].register_forward_hook(lambda *given: seen.append(given[2]))
    plain = model(input_ids=ids, use_cache=False).logits
    places = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8])  # the second row has three tokens
    with noise.on(ids.shape, places, [4, 9], [6, 3]):
        noisy = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(plain, model(input_ids=ids, use_cache=False).logits)
    assert not torch.equal(plain, noisy)
    added = seen[1] - seen[0]
    width = added.shape[-1]
    assert added[1, 3:].abs().max() == 0
    for row, length in ((0, 6), (1, 3)):
        part = added[row, :length]
        most = 5.0 / np.sqrt(length * width)
        assert 0.9 * most < part.abs().max() <= most * 1.001
    keys = token_keys(0, 0, torch.tensor([9]), torch.tensor([2]))
    expected = uniform(keys, width)[0] * 5.0 / np.sqrt(3 * width)
    torch.testing.assert_close(added[1, 2], expected, atol=1e-6, rtol=1e-4)


def test_a_model_that_embeds_elsewhere_is_refused():
    model = tiny.llama()
    noise = EmbeddingNoise(model, 5.0, 0)
    with (
        pytest.raises(ModelError, match="neftune_alpha: the model does not embed its tokens with"),
        noise.on(torch.Size([1, 3]), torch.arange(3), [0], [3]),
    ):
        model(inputs_embeds=torch.randn(1, 3, 32))
    with noise.on(torch.Size([1, 1]), torch.zeros(0, dtype=torch.long), [], []):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # of a rank without examples


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", representatives(["loss", "label_smoothing", "z_loss", "mean_per", "neftune_alpha"])
)
def test_the_plan_traces_these_keys(tmp_path, monkeypatch, name):
    """The step that is traced allocates what they need, and no trace of another value is reused."""
    value = {**OPTIONS, "loss": "dft"}[name]
    window = Window((((40, 40),) * 4,))
    config = with_values(tiny.config(tmp_path / "run"), {"data.cache_dir": str(tmp_path / "cache")})
    changed = with_values(config, {f"train.{name}": value})
    traced: list[Any] = []

    def record(given: Any, *arguments: Any, **options: Any) -> Any:
        traced.append((getattr(given.train, name), trace(given, *arguments, **options)))
        return traced[-1][1]

    trace = dry_run.trace_step
    monkeypatch.setattr(dry_run, "trace_step", record)
    for each in (config, changed):
        assert predict(each, "fp32", window, on_gpu=False).method == "traced"
    (before, one), (after, other) = traced
    assert (before, after) == (Train.model_fields[name].default, value)
    assert len(other.events) > len(one.events)


# --- every engine --------------------------------------------------------------------------------

KEYS = [f"train.{name}={value}" for name, value in OPTIONS.items()]
TARGETS = ["tuning.target_modules=[q_proj, lm_head]", "tuning.mode=lora"]
WHY = "ZeRO-3 gathers parts of this head one by one"
# Chunks of a frozen head ask nothing of an engine; a trained one runs on all that split anything,
# and one with an adapter on those that split weights. DeepSpeed's last, as in test_parallel.
ON_TWO = [("lora", "ddp"), ("full", "fsdp"), ("head", "fsdp")]
ON_TWO += [("full", "zero2"), ("full", "zero3"), ("head", "zero3")]


def with_keys(mode: str, engine: str, world: int, rows: int, **given: Any) -> dict[str, Any]:
    made = parallel.case("lora" if mode == "head" else mode, engine, world, steps=3, **given)
    more = TARGETS if mode == "head" else []
    name = f"keys-{mode}-{engine}-{world}" + ("-resumed" if given.get("resume") else "")
    changed = [*made["overrides"], *KEYS, *more]
    return made | {"name": name, "overrides": changed, "chunk_rows": rows}


@pytest.fixture(scope="module")
def with_chunks(tmp_path_factory, thorough) -> Iterator[Path]:
    """Runs of one process without chunks, then of each engine on two with chunks of 7 rows."""
    folder = tmp_path_factory.mktemp("losses")
    parallel.MODEL[:] = [f"model.name={tiny.shallow_nano(folder)}"]
    alone = [with_keys(mode, "ddp", 1, 0, save_at=[2]) for mode in ("lora", "full", "head")]
    saved = str(folder / "keys-full-ddp-1/checkpoint_step_2")
    alone += [with_keys("full", "ddp", 1, 0, resume=saved, save_at=[])]
    parallel.run(folder, 1, alone)
    on_two = ON_TWO if thorough else ON_TWO[:2]
    parallel.run(folder, 2, [with_keys(*each, 2, 7, save_at=[]) for each in on_two])
    yield folder
    parallel.MODEL.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "engine"), representatives(ON_TWO, 2))
def test_chunks_and_these_keys_on_two_processes_are_the_run_of_one(with_chunks, mode, engine):
    [expected] = parallel.found(with_chunks, f"keys-{mode}-ddp-1")
    name = f"keys-{mode}-{engine}-2"
    assert not expected["chunks"]
    for rank in parallel.found(with_chunks, name):
        is_whole = (mode, engine) == ("head", "zero3")
        assert rank["chunks"] != is_whole
        assert rank["why_whole"] == (WHY if is_whole else "")
        for mine, theirs in zip(rank["steps"], expected["steps"], strict=True):
            assert mine[0] == theirs[0]
            assert float.fromhex(mine[2]) == pytest.approx(float.fromhex(theirs[2]), rel=1e-5)
        assert rank["held_out"] == pytest.approx(expected["held_out"], rel=1e-5)
    assert parallel.difference(with_chunks, name, f"keys-{mode}-ddp-1") < 1e-4


@pytest.mark.slow
def test_law_2_with_noise(with_chunks):
    parallel.assert_bit_equal(with_chunks, "keys-full-ddp-1-resumed", "keys-full-ddp-1")
