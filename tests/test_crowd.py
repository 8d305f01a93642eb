"""The crowd: K agents in one pass, kept apart whatever the cut, and folders that load alone."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import shapes
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT, representatives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from scipy.stats import norm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from sft import errors
from sft import run as sft_run
from sft.config import schema
from sft.config.load import load_config, with_values
from sft.config.schema import Config, Generation
from sft.data import batches, template
from sft.errors import ConfigError, UserError
from sft.evaluate import generate
from sft.models import checkpointing, digests, load, quantise
from sft.models.adapt import add_adapters
from sft.plan import dry_run, memory
from sft.runtime.log import Log
from sft.serve import merge, runs
from sft.serve.connector import AccelerateConnector
from sft.tasks.crowd import aggregator, diversity
from sft.tasks.crowd.agents import META, Agents, AgentsLinear
from sft.tasks.crowd.task import CrowdTune
from sft.tasks.registry import task_of
from sft.train import engine

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 9, 30, 2, 17, 44], [7, 7, 8, 60, 3, 1]])


# --- agents --------------------------------------------------------------------------------------


def gpt2(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": tiny.VOCAB}
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return tiny.build(GPT2Config(**sizes, **none, **ends, initializer_range=0.2), dtype)


def nf4(dtype: torch.dtype) -> torch.nn.Module:
    base = tiny.llama(dtype)
    quantise.quantise(base, dtype)
    return base


def gradients(built: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in built.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("base", "dtype", "tolerance"),
    [
        (tiny.llama, torch.float64, 1e-12),
        (gpt2, torch.float64, 1e-12),  # Conv1D: weights the other way round
        (nf4, torch.float32, 1e-5),
    ],
)
def test_one_pass_is_each_agent_loaded_alone(tmp_path, base, dtype, tolerance):
    crowd = tiny.adapted(tiny.crowd_config(tmp_path), dtype, base(dtype))
    crowd.save_pretrained(str(tmp_path))
    logits = crowd(input_ids=IDS, use_cache=False).logits.view(3, *IDS.shape, tiny.VOCAB)
    asked = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    (logits * asked).sum().backward()
    for agent in range(3):
        plain = base(dtype).requires_grad_(False)
        alone: Any = PeftModel.from_pretrained(plain, tmp_path / f"agent{agent}", is_trainable=True)
        own = alone(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(logits[agent], own, rtol=tolerance, atol=10 * tolerance)
        (own * asked[agent]).sum().backward()
        assert tiny.relative_error([g[agent] for g in gradients(crowd)], gradients(alone)) < (
            10 * tolerance
        )
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_agents_of_a_mixture_need_names_of_linear_layers(tmp_path):
    """`auto` adapts experts, too, which agents cannot."""
    families.tiny_config("qwen3_moe").save_pretrained(tmp_path)
    config = with_values(tiny.crowd_config(tmp_path), {"model.name": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"each expert .* \[self_attn.k_proj, .*v_proj\]$"):
        CrowdTune.refuse_untrainable(config)
    named = with_values(config, {"tuning.target_modules": ["q_proj", "o_proj"]})
    CrowdTune.refuse_untrainable(named)


@pytest.mark.parametrize(
    ("kind", "targets"), [("qwen3_moe", ["q_proj", "v_proj"]), ("gemma3", "auto")]
)
def test_agents_on_other_bases_than_dense_ones_are_saved_and_read(tmp_path, kind, targets):
    """Of a vision-language base, agents adapt what text reaches, also where they are read."""
    base = families.tiny_model(kind)
    config = with_values(tiny.crowd_config(tmp_path), {"tuning.target_modules": targets})
    crowd = tiny.adapted(config, torch.float32, base)
    logits = crowd(input_ids=IDS, use_cache=False).logits
    logits.square().sum().backward()
    assert all(p.grad is not None for p in crowd.parameters() if p.requires_grad)
    crowd.save_pretrained(str(tmp_path))
    (tmp_path / META).write_text(json.dumps({**crowd.describe(), "base": {"name": "base"}}))
    read = CrowdTune.with_adapter(families.tiny_model(kind), "base", tmp_path).eval()
    torch.testing.assert_close(read(input_ids=IDS, use_cache=False).logits, logits)
    alone = PeftModel.from_pretrained(families.tiny_model(kind), tmp_path / "agent1").eval()
    own = alone(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits.view(3, *own.shape)[1], own, rtol=1e-4, atol=1e-5)


def test_agents_start_as_peft_starts_adapters_each_by_itself(tmp_path):
    given = tiny.crowd_config(tmp_path)
    built = []
    for crowd in (None, given.crowd):
        base = tiny.llama()
        torch.manual_seed(5)
        adapted = add_adapters(base, given.tuning)
        built.append(Agents(adapted, crowd) if crowd else adapted)
    single, crowd = ([(n, p) for n, p in each.named_parameters() if "lora_" in n] for each in built)
    for (_, expected), (name, found) in zip(single, crowd, strict=True):
        assert torch.equal(found[0], expected)
        if "lora_B" in name:
            assert not found.any()
            continue
        bound = 1 / math.sqrt(found.shape[-1])  # uniform, as PEFT's own
        flat = found.detach().flatten(1)
        assert flat.abs().max() <= bound
        torch.testing.assert_close(flat.std(1), torch.full((3,), bound / 3**0.5), rtol=0.2, atol=0)
        correlated = np.corrcoef(flat.numpy()) - np.eye(3)
        assert np.abs(correlated).max() < 5 / math.sqrt(flat.shape[1])


def trained(folder: Path, steps: int, changes: dict[str, Any], **crowd: Any) -> engine.Engine:
    given = with_values(tiny.crowd_config(folder, train={"global_batch": 4}, **crowd), changes)
    torch.manual_seed(5)
    built = task_of(given).adapt(tiny.llama().requires_grad_(False), given)
    rows = tiny.examples(0, 11)
    return steps_of(tiny.make_engine(built, rows, rows, given, batches.Budget(60, "padded")), steps)


def steps_of(made: engine.Engine, number: int) -> engine.Engine:
    made.losses = [*getattr(made, "losses", [])]
    for _ in range(number):
        made.losses.append(made.optimizer_step()["train/loss"])
        made.step += 1
    return made


def adapters(made: engine.Engine) -> torch.Tensor:
    named = made.task.model.named_parameters()
    return torch.cat([p.detach().flatten() for _, p in named if p.requires_grad])


def test_a_crowd_of_one_trains_as_one_adapter_does(tmp_path):
    crowd = trained(tmp_path, 3, {}, num_agents=1)
    plain = {f"crowd.{key}": value for key, value in schema.Crowd().model_dump().items()}
    single = trained(tmp_path, 3, plain)
    assert type(single.task).__name__ == "FineTune"
    assert crowd.losses == pytest.approx(single.losses, rel=1e-6)
    torch.testing.assert_close(adapters(crowd), adapters(single), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "crowd", representatives([{}, {"layer": 0}, {"representation": "logits"}, {"dropconnect": 0.2}])
)
def test_gradient_checkpointing_changes_no_gradient(tmp_path, crowd):
    given = tiny.crowd_config(tmp_path, train={"global_batch": 11}, **crowd)
    rows, found = tiny.examples(1, 11), []
    for kind in (False, True, "selective"):
        built = tiny.adapted(given, torch.float64)
        if kind:
            checkpointing.enable(built, kind)
        made = tiny.make_engine(built, rows, rows, given, batches.Budget(60, "padded"))
        made.optimizer_step()
        found.append(gradients(built))
    assert tiny.relative_error(*found[:2]) < 1e-12
    assert tiny.relative_error(found[0], found[2]) < 1e-12


# --- DropConnect ---------------------------------------------------------------------------------


def layer(folder: Path, dropconnect: float) -> AgentsLinear:
    built: Any = tiny.adapted(tiny.crowd_config(folder, dropconnect=dropconnect), torch.float64)
    return built.base.model.layers[0].self_attn.q_proj


def test_dropconnect_masks_weights_and_their_gradients_for_one_pass(tmp_path):
    made, x = layer(tmp_path, 0.3).train(), torch.randn(3, 5, 32, dtype=torch.float64)
    before = [made.lora_A.clone(), made.lora_B.clone()]
    torch.manual_seed(8)
    found = made(x)
    found.square().sum().backward()
    assert torch.equal(made.lora_A, before[0])
    assert torch.equal(made.lora_B, before[1])
    torch.manual_seed(8)
    masks = [F.dropout(torch.ones_like(each), 0.3) for each in before]
    a, b = (
        (each * mask).detach().requires_grad_() for each, mask in zip(before, masks, strict=True)
    )
    expected = made.base_layer(x) + 2.0 * torch.einsum("knd,krd,kor->kno", x, a, b)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.square().sum().backward()
    for weight, masked, mask in zip((made.lora_A, made.lora_B), (a, b), masks, strict=True):
        torch.testing.assert_close(weight.grad, masked.grad * mask, rtol=1e-12, atol=1e-12)
        dropped = (weight.grad == 0).double().mean()
        assert float(dropped) == pytest.approx(0.3, abs=0.1)


def test_dropconnect_is_off_in_answers_and_right_on_average(tmp_path):
    made, plain = layer(tmp_path, 0.3), layer(tmp_path, 0.0).eval()
    torch.manual_seed(0)
    x = torch.randn(3, 1, 32, dtype=torch.float64)
    assert torch.equal(made.eval()(x), plain(x))
    made.train()
    draws = torch.stack([made(x).detach() for _ in range(3000)])
    error = (draws.mean(0) - plain(x)).abs() / (draws.std(0) / math.sqrt(len(draws)))
    assert draws.std(0).min() > 0
    assert error.max() < 5  # standard errors, of 96 numbers


# --- diversity -----------------------------------------------------------------------------------

LINE = torch.ones(1, 1, dtype=torch.float64)


def cloud(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.array(values), dtype=torch.float64)[..., None]


def test_on_a_line_the_distance_is_that_of_sorted_points():
    assert float(diversity.diversity(cloud([[2.0], [5.0]]), LINE)) == pytest.approx(9)
    assert float(diversity.diversity(cloud([[3.0, 1], [2, 8]]), LINE)) == pytest.approx(
        (1 + 25) / 2
    )
    # three agents: pairs 01, 02, 12
    assert float(diversity.diversity(cloud([[0.0], [1.0], [3.0]]), LINE)) == pytest.approx(
        (1 + 9 + 4) / 3
    )


def test_of_many_points_the_distance_is_the_closed_form():
    share = (np.arange(20_000) + 0.5) / 20_000
    share = np.random.default_rng(0).permuted(np.stack([share, share]), axis=1)
    gaussians = cloud(norm.ppf(share) * [[0.5], [2.0]] + [[1.0], [-2.0]])
    assert float(diversity.diversity(gaussians, LINE)) == pytest.approx(3**2 + 1.5**2, rel=1e-3)
    uniform = cloud(share * [[1.0], [3.0]])  # on [0, 1] and [0, 3]: the mean of (2 u)^2
    assert float(diversity.diversity(uniform, LINE)) == pytest.approx(4 / 3, rel=1e-3)


@pytest.mark.parametrize(
    ("d", "apart", "scales"), representatives([(3, 2.0, (1.0, 1.0)), (8, 3.0, (0.5, 1.5))])
)
def test_of_isotropic_gaussians_the_distance_is_the_closed_form(d, apart, scales):
    """|m1 - m2|^2 / d + (s1 - s2)^2: the mean over directions of that of the projections."""
    random = torch.Generator().manual_seed(1)
    points = torch.randn(2, 3000, d, generator=random) * torch.tensor(scales)[:, None, None]
    points[1] += apart / math.sqrt(d)  # |m1 - m2| = apart
    found = float(diversity.diversity(points, diversity.directions(1000, d, seed=0)))
    assert found == pytest.approx(apart**2 / d + (scales[0] - scales[1]) ** 2, rel=0.08)


def test_directions_are_uniform_on_the_sphere_and_a_function_of_the_seed():
    drawn = diversity.directions(20_000, 5, seed=3)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(20_000))
    torch.testing.assert_close(drawn.mean(0), torch.zeros(5), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.T @ drawn / 20_000, torch.eye(5) / 5, atol=0.01, rtol=0)
    assert torch.equal(drawn, diversity.directions(20_000, 5, seed=3))
    assert not torch.equal(drawn, diversity.directions(20_000, 5, seed=4))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    agents=st.integers(2, 4),
    number=st.integers(1, 9),
    d=st.integers(1, 6),
    scale=st.floats(0.1, 100),
)
def test_what_a_distance_is(seed, agents, number, d, scale):
    random = np.random.default_rng(seed)
    points = torch.from_numpy(random.normal(size=(agents, number, d)) + random.normal())
    points = points + 0.1 * points.sign()  # none so short that normalising would not reach it
    onto = torch.linalg.qr(torch.from_numpy(random.normal(size=(d, d)))).Q
    found = diversity.diversity(points, onto)
    assert found >= 0
    mixed = points[random.permutation(agents)]
    mixed = torch.stack([each[random.permutation(number)] for each in mixed])
    torch.testing.assert_close(diversity.diversity(mixed, onto), found)
    equal = torch.stack([points[0], points[0][random.permutation(number)]])
    assert float(diversity.diversity(equal, onto)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(diversity.diversity(scale * points, onto), scale**2 * found)
    bounded = diversity.diversity(diversity.normalise(points), onto)
    torch.testing.assert_close(
        diversity.diversity(diversity.normalise(scale * points), onto),
        bounded,
        rtol=1e-6,
        atol=1e-9,
    )
    assert bounded <= 4 + 1e-9  # in an orthonormal basis; else on average


def test_opposite_points_are_as_far_apart_as_can_be():
    point = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = diversity.normalise(torch.cat([point, -point]))
    basis = torch.eye(6, dtype=torch.float64)
    assert float(diversity.diversity(points, basis)) == pytest.approx(4)


def test_the_gradient_of_the_diversity_is_that_of_finite_differences():
    random = torch.Generator().manual_seed(0)
    points = torch.randn(3, 5, 4, generator=random, dtype=torch.float64, requires_grad=True)
    onto = diversity.directions(7, 4, seed=1)
    for shaped in (lambda each: each, diversity.normalise):
        assert torch.autograd.gradcheck(lambda x, f=shaped: diversity.diversity(f(x), onto), points)


def test_alone_and_without_points_there_is_no_distance():
    for shape in ((1, 4, 3), (3, 0, 3)):
        points = torch.zeros(shape, requires_grad=True)
        found = diversity.diversity(points, diversity.directions(4, 3, seed=0))
        found.backward()
        assert found == 0
        assert not points.grad.any()


# --- law 1 ---------------------------------------------------------------------------------------


def step(folder: Path, rows: list[template.Example], budget: batches.Budget, **crowd: Any):
    """(the engine behind the gradients of one step of all rows, what it reported)"""
    given = tiny.crowd_config(folder, train={"global_batch": len(rows)}, **crowd)
    made = tiny.make_engine(exact(given), rows, rows, given, budget)
    return made, made.optimizer_step()


def exact(given: Config) -> torch.nn.Module:
    """A GPT-2 in fp64: the norms of a Llama would compute in fp32 nonetheless."""
    return tiny.adapted(given, torch.float64, gpt2(torch.float64))


def assert_law(folder, rows, budget, **crowd) -> None:
    made, values = step(folder, rows, budget, **crowd)
    given = made.task.config
    loss, expected = tiny.crowd_reference(exact(given), rows, given, made.task.seed)
    assert values["train/loss"] == pytest.approx(loss, rel=1e-10)
    assert tiny.relative_error(gradients(made.task.model), expected) < 1e-10
    together = values["train/cross_entropy"] - given.crowd.lambda_sw * values["train/diversity"]
    assert values["train/loss"] == pytest.approx(together, rel=1e-10)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10_000),
    number=st.integers(1, 9),
    max_tokens=st.integers(1, 300),
    layout=st.sampled_from(["padded", "packed"]),
    read=st.sampled_from([("hidden", -1), ("hidden", 0), ("logits", -1)]),
    pooling=st.sampled_from(["last", "mean", "first"]),
    normalise=st.booleans(),
    agents=st.integers(2, 3),
)
def test_any_cut_gives_the_same_loss_and_gradient_diversity_included(
    tmp_path, seed, number, max_tokens, layout, read, pooling, normalise, agents
):
    """A quarter of the rows have no supervised token, and no part in the diversity."""
    rows = tiny.examples(seed, number, longest=16)
    if any(row.num_supervised for row in rows):
        crowd = {"num_agents": agents, "representation": read[0], "layer": read[1]}
        crowd |= {"pooling": pooling, "normalise": normalise}
        assert_law(tmp_path, rows, batches.Budget(max_tokens, layout), **crowd)


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_token_weights_are_in_the_cross_entropy_of_all_agents(tmp_path, max_tokens):
    random = np.random.default_rng(5)
    rows = [replace(r, weights=random.random(len(r.ids)).tolist()) for r in tiny.examples(5, 7)]
    assert_law(tmp_path, rows, batches.Budget(max_tokens, "padded"))


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_a_row_that_is_supervised_in_its_first_token_alone_has_no_part(tmp_path, max_tokens):
    first = template.Example(
        [4, 5, 6], [4, template.IGNORED, template.IGNORED]
    )  # nothing predicts that one
    rows = [first, *tiny.examples(5, 5), first]
    assert_law(tmp_path, rows, batches.Budget(max_tokens, "padded"))


def test_padding_changes_nothing(tmp_path):
    """A row beside one that is shorter, and beside one that is longer, neither supervised."""
    row = tiny.examples(3, 1, longest=8)[0]
    others = [template.Example([5] * n, [template.IGNORED] * n) for n in (2, 30)]
    for pooling in ("last", "mean", "first"):
        found = [
            gradients(
                step(tmp_path, rows, batches.Budget(999, "padded"), pooling=pooling)[0].task.model
            )
            for rows in ([row, other] for other in others)
        ]
        assert tiny.relative_error(*found) < 1e-12


def test_directions_are_those_of_the_step_for_every_cut(tmp_path):
    rows, seeds = tiny.examples(1, 8), []
    for max_tokens in (1, 50, 9999):
        made, _ = step(tmp_path, rows, batches.Budget(max_tokens, "padded"), dropconnect=0.1)
        seeds.append(made.task.seed)
        made.step += 1
        made.optimizer_step()
        seeds.append(made.task.seed)
    assert seeds[:2] * 3 == seeds
    assert seeds[0] != seeds[1]


def test_a_batch_without_supervised_tokens_is_defined(tmp_path):
    nothing = [template.Example(ids=[3, 4, 5], labels=[template.IGNORED] * 3)] * 3
    for max_tokens in (1, 100):
        made, values = step(tmp_path, nothing, batches.Budget(max_tokens, "padded"))
        assert values["train/loss"] == values["train/diversity"] == 0
        assert not any(g.any() for g in gradients(made.task.model))


def test_a_batch_that_is_whole_needs_no_survey(tmp_path, monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("sft.tasks.crowd.task.CrowdTune.summarise", never)
    rows = tiny.examples(1, 8)
    _, values = step(tmp_path, rows, batches.Budget(9999, "padded"))
    assert values["train/diversity"] > 0
    step(tmp_path, rows, batches.Budget(30, "padded"), lambda_sw=0.0, num_projections=64)
    with pytest.raises(AssertionError):
        step(tmp_path, rows, batches.Budget(30, "padded"))


@pytest.mark.parametrize("place", representatives(["summarise", "loss"]))
def test_where_memory_runs_out_the_same_batch_is_done_in_smaller_pieces(
    tmp_path, monkeypatch, place
):
    rows = tiny.examples(1, 8)
    made, expected = step(tmp_path, rows, batches.Budget(60, "padded"))
    starved = copied(made)
    real = getattr(starved.task, place)

    def fail(built, batch):
        if batch.input_ids.numel() > 30:
            raise MemoryError
        return real(built, batch)

    monkeypatch.setattr(starved.task, place, fail)
    found = starved.optimizer_step()
    assert starved.task.budget.max_tokens <= 30
    for key in ("train/loss", "train/diversity"):
        assert found[key] == pytest.approx(expected[key], rel=1e-10)


def test_what_a_pass_that_was_given_up_has_left_is_gone_before_the_next(tmp_path):
    made, _ = step(tmp_path, tiny.examples(1, 8), batches.Budget(60, "padded"))
    left = made.task.reader.states = torch.zeros(3)
    gone, seen = weakref.ref(left), []
    del left
    embeddings = made.task.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda *_: seen.append(gone() is None))
    made.optimizer_step()
    assert all(seen)
    assert seen


def test_a_probe_takes_the_survey_too_and_leaves_no_trace(tmp_path, monkeypatch):
    made, expected = step(tmp_path, tiny.examples(1, 8), batches.Budget(60, "padded"))
    probed, calls = copied(made), []
    real = probed.task.summarise

    def survey(*given: Any) -> torch.Tensor:
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(probed.task, "summarise", survey)
    probed.probe_seconds_per_step()
    assert len(calls) == 2 * len(probed.window(0)[1]) > 2  # the first to warm up
    found = probed.optimizer_step()
    assert found["train/loss"] == expected["train/loss"]
    assert found["train/diversity"] == expected["train/diversity"]


def copied(made: engine.Engine) -> engine.Engine:
    """A fresh one of the same settings and rows."""
    prepared, given = made.task.prepared, made.task.config
    rows = [prepared.train[i] for i in range(len(prepared.train))]
    return tiny.make_engine(exact(given), rows, rows, given, made.task.budget)


def test_a_layer_that_the_model_lacks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"crowd\.layer: expected one of this model's 2 layers"):
        step(tmp_path, tiny.examples(1, 2), batches.Budget(60, "padded"), layer=2)


def test_modules_that_are_not_linear_are_refused(tmp_path):
    given = with_values(tiny.crowd_config(tmp_path), {"tuning.target_modules": ["embed_tokens"]})
    with pytest.raises(ConfigError, match=r"target_modules: .* found model.embed_tokens, a Embedd"):
        tiny.adapted(given)


@pytest.mark.thorough("test_memory.py, and a crowd's plan in test_plan.py")
@pytest.mark.slow
def test_a_plan_of_few_layers_is_that_of_all_wherever_a_crowd_reads(tmp_path):
    deep = shapes.configured(tmp_path, shapes.architectures(num_hidden_layers=7)["Llama"])
    window = shapes.uniform_window(3, 40, 20, micro_batches=2)
    given = with_values(deep, {"crowd.num_agents": 2, "crowd.layer": 5})
    found = memory.predict(given, "fp32", window, on_gpu=False)
    assert found.method == "traced with 2 and 3 of 7 layers"
    whole = dry_run.trace_step(given, "fp32", window).peak().num_bytes
    assert found.allocated == pytest.approx(whole, rel=0.01)
    with pytest.raises(ConfigError, match="one of this model's 7 layers"):
        memory.predict(with_values(given, {"crowd.layer": 7}), "fp32", window, on_gpu=False)


# --- law 2 ---------------------------------------------------------------------------------------

RANDOM = {"tuning.lora_dropout": 0.2, "crowd.dropconnect": 0.1, "train.max_steps": 6}


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = trained(tmp_path / "whole", 6, RANDOM)
    first = trained(tmp_path / "parts", 3, RANDOM)
    second = trained(tmp_path / "parts", 0, RANDOM)
    second.resume(first.save())
    assert first.losses + steps_of(second, 3).losses == whole.losses
    assert torch.equal(adapters(second), adapters(whole))
    assert whole.losses[0] != whole.losses[5]


@pytest.mark.parametrize(
    ("changes", "reported"),
    representatives(
        [
            ({"crowd.num_agents": 2}, r"crowd\.num_agents: was 3, is 2"),
            ({"crowd.lambda_sw": 0.1}, r"crowd\.lambda_sw: was 0\.7, is 0\.1"),
            ({"crowd.pooling": "mean"}, r"crowd\.pooling: was last, is mean"),
            ({"tuning.r": 2}, r'tuning: was .*"r":4.*, is .*"r":2'),
            ({"model.name": "another"}, r"model: was \w{64}, is \w{64}"),
            (
                {f"crowd.{key}": value for key, value in schema.Crowd().model_dump().items()},
                r"crowd\.num_agents: was 3, is None",
            ),
        ],
        2,
    ),
)
def test_another_crowd_is_not_resumed(tmp_path, monkeypatch, changes, reported):
    real = digests.model_sha256
    monkeypatch.setattr(digests, "model_sha256", lambda each: _fingerprint(real, each))
    folder = trained(tmp_path, 1, {}).save()
    other = trained(tmp_path, 0, changes)
    with pytest.raises(errors.AnotherRunError, match=reported) as error:
        other.resume(folder)
    assert "belongs to another run" in str(error.value)


def _fingerprint(real: Any, each: Any) -> str:
    """Of a base that is another: its weights are not looked at."""
    return "0" * 64 if each.name == "another" else real(each)


def test_an_adapter_is_not_resumed_as_a_crowd(tmp_path):
    plain = {f"crowd.{key}": value for key, value in schema.Crowd().model_dump().items()}
    folder = trained(tmp_path, 1, plain).save()
    with pytest.raises(errors.AnotherRunError, match=r"crowd\.num_agents: was None, is 3"):
        trained(tmp_path, 0, {}).resume(folder)


# --- what is held out ----------------------------------------------------------------------------


def mixture_loss(
    crowd: Any, rows: list[template.Example], weights: torch.Tensor
) -> dict[str, float]:
    """From the definitions, one example at a time."""
    sums, number = {"loss": 0.0, "agent_loss": 0.0, "token_accuracy": 0.0}, 0
    for row in rows:
        each = crowd(input_ids=torch.tensor([row.ids]), use_cache=False).logits.double().softmax(-1)
        for t, label in enumerate(row.labels[1:]):
            if label != template.IGNORED:
                mixed = (weights[:, None] * each[:, t]).sum(0)
                sums["loss"] -= math.log(mixed[label])
                sums["agent_loss"] -= float(each[:, t, label].log().mean())
                sums["token_accuracy"] += int(mixed.argmax() == label)
                number += 1
    return {name: value / number for name, value in sums.items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["uniform", "learned"])
def test_what_is_held_out_is_scored_as_the_mixture(tmp_path, kind):
    rows = tiny.examples(7, 9)
    given = tiny.crowd_config(tmp_path, aggregator=kind)
    weights = torch.tensor([1, 1, 1] if kind == "uniform" else [6, 3, 1], dtype=torch.float64)
    for max_tokens, layout in ((1, "padded"), (50, "packed"), (9999, "padded")):
        built = tiny.adapted(given, torch.float64)
        built.concentration = tuple(weights.tolist())
        budget = batches.Budget(max_tokens, layout)
        made = tiny.make_engine(built, rows, rows, given, budget)
        found = made.evaluate()
        expected = mixture_loss(built.eval(), rows, weights / weights.sum())
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-10)
        assert found["loss"] < found["agent_loss"]  # a mean of logarithms
        assert 0 < found["disagreement"] < 1


def test_the_concentration_is_fitted_on_the_rows_kept_from_training(tmp_path, monkeypatch):
    """The same for every cut; without shrinking, for rows as few as these."""
    monkeypatch.setattr(aggregator, "EVEN_SHARES", np.zeros(1))
    given = tiny.crowd_config(tmp_path, aggregator="learned")
    train, kept = tiny.examples(1, 6), tiny.examples(2, 5)
    found = []
    for max_tokens in (1, 9999):
        made = tiny.make_engine(
            tiny.adapted(given, torch.float64),
            train,
            train,
            given,
            batches.Budget(max_tokens, "padded"),
        )
        made.task.prepared = replace(made.task.prepared, validation=tiny.stored(kept))
        made.task.log = tiny.Said()
        made.task.finish(made.model)
        assert "at least 30 rows to fit weights on, found 5" in made.task.log.lines[-1]
        found.append(made.task.model.concentration)
        assert made.task.model.training
    assert found[0] == pytest.approx(found[1])
    with torch.no_grad():
        likely, owners = [], []
        for i, row in enumerate(kept):
            logits = made.task.model.eval()(input_ids=torch.tensor([row.ids])).logits
            for t, label in enumerate(row.labels[1:]):
                if label != template.IGNORED:
                    likely.append(logits[:, t].log_softmax(-1)[:, label])
                    owners.append(i)
    expected = aggregator.fit(torch.stack(likely, 1), torch.tensor(owners))
    assert found[0] == pytest.approx(expected)
    assert found[0] != pytest.approx(made.task.model.num_agents * (1.0,), rel=0.01)


# --- folders -------------------------------------------------------------------------------------

CPU = torch.device("cpu")
ASKED = ["set a timer for ten minutes", "what is the time", "book a table for two at five"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A whole run of three agents on the embedded model in NF4."""
    folder = tmp_path_factory.mktemp("crowd") / "run"
    overrides = {
        "tuning.r": 4,
        "crowd.num_agents": 3,
        "crowd.lambda_sw": 0.5,
        "data.max_rows": 40,
        "data.eval_path": "null",
        "data.eval_fraction": 0.2,
        "data.cache_dir": folder.parent / "cache",
        "train.output_dir": folder,
        "train.max_steps": 3,
        "train.global_batch": 8,
        "train.learning_rate": 1e-2,
        "train.max_tokens": 300,
        "train.precision": "fp32",
        "train.tensorboard": "false",
        "evaluation.num_examples": 3,
        "evaluation.max_new_tokens": 8,
    }
    given = [f"{key}={value}" for key, value in overrides.items()]
    sft_run.train(load_config(ROOT / "configs/crowd_nano.yaml", given))
    return folder


@pytest.fixture
def moved(run, tmp_path) -> Path:
    """The agents without the run beside them."""
    return shutil.copytree(run / "final_checkpoint", tmp_path / "moved")


def loaded(run: Path, *overrides: str, weights: Path | None = None) -> Any:
    config = runs.load_run_config(run, list(overrides))
    folder = weights or run / "final_checkpoint"
    return task_of(config).load_saved(folder, config, "fp32", CPU)[0]


@torch.no_grad()
def said(built: Any) -> torch.Tensor:
    return built(input_ids=IDS, use_cache=False).logits


@pytest.mark.thorough("one agent evaluated and merged here")
@pytest.mark.slow
def test_each_agent_of_a_run_loads_alone(run):
    crowd = said(loaded(run)).view(3, *IDS.shape, -1)
    for agent in range(3):
        base = load.load_base(runs.load_run_config(run).model, "qlora", "fp32", CPU)
        alone = PeftModel.from_pretrained(base, run / f"final_checkpoint/agent{agent}").eval()
        torch.testing.assert_close(said(alone), crowd[agent], rtol=1e-4, atol=1e-4)
        one = said(loaded(run, f"crowd.agent={agent}"))
        torch.testing.assert_close(one, crowd[agent], rtol=1e-4, atol=1e-4)
        assert AutoTokenizer.from_pretrained(run / f"final_checkpoint/agent{agent}").chat_template
    assert (crowd[0] - crowd[1]).abs().max() > 0.01


@pytest.mark.slow
def test_the_folder_reports_what_the_crowd_is(run):
    reported = json.loads((run / "final_checkpoint" / META).read_text())
    concentration = reported.pop("concentration")
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert reported == {
        "num_agents": 3,
        "r": 4,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "target_modules": sorted(linear),
        "aggregator": "learned",
        "base": {
            "name": str(ROOT / "nano/model"),
            "weights_sha256": digests.weights_sha256(runs.load_run_config(run).model),
        },
    }
    assert loaded(run).concentration == tuple(concentration) != (1.0, 1.0, 1.0)
    names = {path.name for path in (run / "final_checkpoint").iterdir()}
    assert {"agent0", "agent1", "agent2", META} <= names
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.slow
def test_rows_kept_for_the_aggregator_are_in_no_other_part(run):
    prepared = CrowdTune.prepare(runs.load_run_config(run))
    parts = [prepared.train, prepared.held_out, prepared.validation]
    lines = [{part.row(i).line for i in range(len(part))} for part in parts]
    assert [len(each) for each in lines] == [len(part) for part in parts]
    assert len(set.union(*lines)) == 40
    assert len(prepared.validation) == 2  # of 32, a twentieth
    everything = CrowdTune.prepare(runs.load_run_config(run, ["crowd.aggregator=uniform"]))
    assert everything.validation is None
    assert len(everything.train) == len(prepared.train) + 2


@pytest.mark.slow
def test_of_a_crowd_of_one_row_none_can_be_kept(run):
    with pytest.raises(UserError, match="learned: expected at least 2 training rows"):
        CrowdTune.prepare(runs.load_run_config(run, ["data.max_rows=2", "data.eval_fraction=0.5"]))


def lacking(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def rewritten(**changes: Any) -> Any:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


WEIGHTS = "agent1/adapter_model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "reported"),
    representatives(
        [
            (WEIGHTS, lacking, rf"{WEIGHTS} cannot be loaded: .*No such file"),
            (WEIGHTS, cut_off, rf"{WEIGHTS} cannot be loaded: it is no valid safetensors file"),
            (META, lacking, rf"{META}: expected a crowd's description: No such file"),
            (META, cut_off, rf"{META} is not what a run writes: JSONDecodeError"),
            (META, rewritten(num_agents=2), f"{META} is not what a run writes"),
            (META, rewritten(concentration=[1, -1, 1]), f"{META} is not what a run writes"),
            (
                META,
                rewritten(num_agents=2, concentration=[1, 1]),
                r"holds another crowd:\n  num_agents: saved with 2, configured as 3",
            ),
            (META, rewritten(r=8), r"holds another crowd:\n  r: saved with 8, configured as 4"),
            (
                META,
                rewritten(base={"name": "x", "weights_sha256": "0"}),
                "belongs to 'x': expected",
            ),
        ],
        3,
    ),
)
def test_a_folder_that_is_not_that_of_the_crowd_is_refused(run, moved, name, change, reported):
    change(moved / name)
    with pytest.raises(UserError, match=reported):
        loaded(run, weights=moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "reported"),
    [
        ("crowd.num_agents=2", "num_agents: saved with 3, configured as 2"),
        ("tuning.r=8", "r: saved with 4, configured as 8"),
        ("tuning.lora_alpha=4", r"lora_alpha: saved with 16\.0, configured as 4\.0"),
        ("tuning.target_modules=[q_proj]", r"target_modules: saved with \['down_proj', "),
    ],
)
def test_a_configuration_that_is_not_that_of_the_crowd_is_refused(run, override, reported):
    with pytest.raises(UserError, match=reported):
        loaded(run, override)


@pytest.mark.slow
def test_what_was_not_fitted_is_not_served_as_learned(run, moved):
    rewritten(aggregator="uniform", concentration=[1.0, 1.0, 1.0])(moved / META)
    with pytest.raises(errors.ExportError, match="expected uniform, as it was trained, found lear"):
        loaded(run, weights=moved)
    drawn = loaded(run, "crowd.aggregator=sampled", "crowd.concentration=2", weights=moved)
    assert aggregator.aggregator_of(drawn) == aggregator.Aggregator("sampled", (2.0, 2.0, 2.0))


@pytest.mark.slow
def test_an_agent_without_weight_is_part_of_a_sound_folder(run, moved):
    rewritten(concentration=[1.5, 0.0, 3.0])(moved / META)
    assert loaded(run, weights=moved).concentration == (1.5, 0.0, 3.0)


@pytest.mark.slow
def test_one_agent_is_evaluated_and_merged_alone(run, tmp_path):
    found = {}
    for agent in (None, 0, 1, 2):
        chosen = [] if agent is None else [f"crowd.agent={agent}"]
        sft_run.evaluate_run(run, f"of-{agent}", [*chosen, "evaluation.num_examples=0"])
        reported = json.loads((run / f"evaluation/of-{agent}/metrics.json").read_text())
        found[agent] = reported["metrics"]
    trained = json.loads((run / "evaluation/metrics.json").read_text())["tuned"]
    assert found[None]["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    own = [found[agent]["loss"] for agent in range(3)]
    assert len(set(own)) == 3
    assert sum(own) / 3 == pytest.approx(found[None]["agent_loss"], rel=1e-5)

    with pytest.raises(errors.MergeError, match="mixture of 3 agents is no single model; give one"):
        merge.merge(run, tmp_path / "whole", "fp32", quiet)
    report = merge.merge(run, tmp_path / "one", "fp32", quiet, overrides=["crowd.agent=1"])
    assert report["agent"] == 1
    assert "| adapter | agent 1 of 3, r 4," in (tmp_path / "one/README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    base = load.load_base(runs.load_run_config(run).model, "lora", "fp32", CPU)
    alone = PeftModel.from_pretrained(base, run / "final_checkpoint/agent1").eval()
    torch.testing.assert_close(said(merged), said(alone), rtol=1e-4, atol=1e-4)
    assert merge.retest(tmp_path / "one", quiet) == report  # by the agent of the report
    with pytest.raises(errors.MergeError, match="is not the model that was trained"):
        merge.retest(tmp_path / "one", quiet, overrides=["crowd.agent=2"])


def quiet(_: Any) -> None: ...


# --- served --------------------------------------------------------------------------------------


def connector(name: Path, **options: Any) -> AccelerateConnector:
    return AccelerateConnector(name, mixed_precision="no", log=Log(None), **options)


def answers(made: AccelerateConnector) -> list[str | None]:
    asked = [[{"role": "user", "content": text}] for text in ASKED]
    found = made.complete_batch(asked, max_new_tokens=8)
    return [each.choices[0].message.content for each in found]


@pytest.mark.slow
def test_a_crowd_answers_as_its_mixture_with_its_run_and_without(run, moved, tmp_path):
    made = connector(run)
    mixture, tokenizer = made.load_model_once().model, made.load_model_once().tokenizer
    crowd = loaded(run)
    assert mixture.aggregator == aggregator.Aggregator("learned", crowd.concentration)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in ASKED
    ]
    own = aggregator.Mixture(crowd, aggregator.aggregator_of(crowd)).eval()
    stop = generate.stop_ids(tokenizer, own.generation_config)
    with torch.no_grad():
        found = generate.Decoder(own, stop, Generation(max_new_tokens=8)).decode(prompts)
    expected = [tokenizer.decode(each.ids, skip_special_tokens=True) for each in found]
    assert any(expected)
    assert answers(made) == expected
    assert answers(connector(run / "final_checkpoint")) == expected
    alone = connector(moved, quantization="nf4")  # of an adapter without its run, the base's dtype
    assert answers(alone) == expected
    assert mixture.aggregator == alone.load_model_once().model.aggregator
    assert answers(connector(ROOT / "nano/model", adapter=moved, quantization="nf4")) == expected
    with pytest.raises(UserError, match="save_model: a mixture of models is saved by the run"):
        made.save_model(mixture, tmp_path / "saved")


@pytest.mark.slow
def test_a_moved_crowd_is_refused_where_it_is_damaged_or_the_base_is_another(moved, tmp_path):
    other = shutil.copytree(ROOT / "nano/model", tmp_path / "other")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(errors.ExportError, match="nano/model': expected its weights"):
        connector(other, adapter=moved).load_model_once()
    identities = [connector(moved).load_model_once().identity]
    rewritten(concentration=[1.0, 1.0, 5.0])(moved / META)
    with pytest.raises(errors.ExportError, match=f"cannot be trusted: {META} has"):
        connector(moved).load_model_once()
    (moved / "MANIFEST.json").unlink()
    identities.append(connector(moved).load_model_once().identity)
    assert len(set(identities)) == 2  # another mixture: what was answered is asked again
