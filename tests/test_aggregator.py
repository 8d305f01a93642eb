"""Mixtures of agents: written out, decoded, sampled, fitted; no batch changes what is drawn."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from conftest import ROOT, representatives
from scipy.optimize import minimize
from scipy.special import gammaln
from scipy.stats import beta, chisquare
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from sft.config.schema import Generation, Train
from sft.evaluate import generate
from sft.runtime import processes
from sft.tasks.crowd import aggregator as crowd_aggregator
from sft.tasks.crowd import diversity
from sft.tasks.crowd.aggregator import (
    CONCENTRATIONS,
    GAP,
    ITERATIONS,
    Aggregator,
    AggregatorError,
    Mixture,
    fit,
    mix,
)

pytestmark = pytest.mark.slow

STOP = [2, 3, 4, 5, 6]  # so that answers end at different times
GREEDY = Generation(max_new_tokens=16)


class Caches(list):
    """Of each agent, as one of K x B rows."""

    def reorder_cache(self, rows: torch.Tensor) -> None:
        for k, (cache, part) in enumerate(zip(self, rows.chunk(len(self)), strict=True)):
            batch = len(cache.layers[0].keys)
            assert (part // batch == k).all()
            cache.reorder_cache(part - k * batch)


class Crowd(nn.Module):
    """K models, each asked by itself, behind the interface of a crowd."""

    def __init__(self, num_agents: int):
        super().__init__()
        self.agents, self.num_agents = nn.ModuleList(), num_agents
        for agent in range(num_agents):
            model = tiny.llama()
            random = torch.Generator().manual_seed(agent)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn(weight.shape, generator=random), alpha=0.15)
            self.agents.append(model)
        self.config, self.generation_config = model.config, model.generation_config
        self.asked: list[tuple[int, int]] = []

    def forward(
        self,
        input_ids,
        position_ids=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
    ):
        self.asked.append(tuple(input_ids.shape))
        caches = past_key_values or (
            Caches(DynamicCache() for _ in self.agents) if use_cache else None
        )
        outputs = [
            agent(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=caches[k] if caches else None,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
            )
            for k, agent in enumerate(self.agents)
        ]
        logits = torch.cat([output.logits for output in outputs])
        return CausalLMOutputWithPast(logits=logits, past_key_values=caches)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return processes.start_processes(Train(output_dir="-"))


@pytest.fixture(scope="module")
def crowd() -> Crowd:
    return Crowd(3).eval()


AGGREGATORS = {
    "uniform": Aggregator("uniform", (1.0, 1.0, 1.0), 5),
    "sampled": Aggregator("sampled", (0.6, 0.3, 0.9), 5),
    "learned": Aggregator("learned", (0.2, 3.0, 0.8), 5),
}


def prompts(number: int = 11) -> list[list[int]]:
    return [row.ids for row in tiny.examples(1, number, longest=12)]


# --- the mixture ---------------------------------------------------------------------------------

SAID = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.25, 0.75], [0.3125, 0.125, 0.5625, 0.0]),
        ([1.0, 0.0], [0.5, 0.5, 0.0, 0.0]),
        ([0.0, 1.0], [0.25, 0.0, 0.75, 0.0]),
    ],
)
def test_a_mixture_is_the_weighted_mean_of_the_distributions(weights, expected):
    found = mix(SAID.log(), torch.tensor(weights))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.exp(), torch.tensor(expected, dtype=torch.float64))
    assert found[3] == -torch.inf


def test_each_row_has_weights_of_its_own_whatever_stands_behind_it():
    weights = torch.tensor([[0.25, 1.0], [0.75, 0.0]], dtype=torch.float64)  # (K, B)
    expected = torch.tensor([[0.3125, 0.125, 0.5625, 0.0], [0.5, 0.5, 0.0, 0.0]]).double()
    found = mix(SAID[:, None].expand(-1, 2, -1).log(), weights)
    torch.testing.assert_close(found.exp(), expected)
    tokens = SAID[:, None, None].expand(-1, 2, 3, -1).log()  # (K, B, T, V)
    found = mix(tokens, weights)
    torch.testing.assert_close(found.exp(), expected[:, None].expand(-1, 3, -1))
    same = mix(tokens, weights[:, :, None].expand(-1, -1, 3))
    torch.testing.assert_close(same, found)


def test_a_mixture_of_hardly_possible_tokens_does_not_underflow():
    said = torch.tensor([[-1000.0, -2.0], [-1001.0, -3.0]], dtype=torch.bfloat16)
    found = mix(said, torch.tensor([0.5, 0.5]))
    assert found.dtype == torch.float32
    expected = torch.tensor([-1000.0, -2.0]) + math.log((1 + math.exp(-1)) / 2)
    # bf16 knows neither 1001 nor the sum, so the first is compared as it was rounded
    expected[0] = float(said[:, 0].double().logsumexp(0) - math.log(2))
    torch.testing.assert_close(found, expected)


# --- weights -------------------------------------------------------------------------------------


def test_expected_weights_are_those_of_the_dirichlet_and_even_if_uniform():
    assert AGGREGATORS["learned"].expected().tolist() == pytest.approx([0.05, 0.75, 0.2])
    assert Aggregator("uniform", (9.0, 1.0)).expected().tolist() == [0.5, 0.5]
    drawn = AGGREGATORS["learned"].weights_for(prompts(4))
    assert drawn.shape == (3, 4)
    torch.testing.assert_close(drawn.T, AGGREGATORS["learned"].expected().expand(4, -1))


def test_drawn_weights_depend_on_the_prompt_and_the_seed_alone():
    sampled, asked = AGGREGATORS["sampled"], prompts()
    drawn = sampled.weights_for(asked)
    assert drawn.shape == (3, 11)
    assert len(set(drawn[0].tolist())) == 11
    assert torch.equal(sampled.weights_for(asked[::-1]), drawn.flip(1))
    assert torch.equal(sampled.weights_for([asked[7]])[:, 0], drawn[:, 7])
    assert sampled.weights_for([]).shape == (3, 0)
    other = Aggregator("sampled", sampled.concentration, 6).weights_for(asked)
    assert (other != drawn).all()


def test_drawn_weights_have_the_moments_of_the_dirichlet():
    sampled = Aggregator("sampled", (0.5, 1.5, 0.0, 2.0), 0)
    number = 4000
    drawn = sampled.weights_for([[i, 7] for i in range(number)])
    torch.testing.assert_close(drawn.sum(0), torch.ones(number, dtype=torch.float64))
    mean = sampled.expected()
    variance = mean * (1 - mean) / (4.0 + 1)
    error = (variance / number).sqrt()
    assert ((drawn.mean(1) - mean).abs() <= 4 * error).all()
    assert ((drawn.var(1) - variance).abs() <= 0.1 * variance).all()
    assert (drawn[2] == 0).all()


@pytest.mark.parametrize(
    ("kind", "concentration", "message"),
    [
        ("smapled", (1.0, 1.0), "did you mean sampled"),
        ("learned", (1.0, -1.0), r"found \[1.0, -1.0\]"),
        ("learned", (0.0, 0.0), "one above"),
        ("learned", (math.nan, 1.0), "nan"),
        ("learned", (math.inf, 1.0), "inf"),
        ("learned", (), "for each agent"),
    ],
)
def test_an_aggregator_that_means_nothing_is_refused(kind, concentration, message):
    with pytest.raises(AggregatorError, match=message):
        Aggregator(kind, concentration)


def test_an_aggregator_of_another_crowd_is_refused(crowd):
    with pytest.raises(AggregatorError, match="each of 3 agents, found 2"):
        Mixture(crowd, Aggregator("uniform", (1.0, 1.0)))


# --- fitted weights ------------------------------------------------------------------------------


def spoken(weights: np.ndarray, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log likelihoods (K, T) and answers (T,): answer i says `length` tokens of the mixture with
    `weights[i]` (A, K) of agents whose distributions over 8 words change from token to token."""
    random = np.random.default_rng(seed)
    number, num_agents = weights.shape
    answers = np.repeat(np.arange(number), length)
    said = random.dirichlet([0.3] * 8, (len(answers), num_agents))  # (T, K, 8)
    mixed = np.einsum("tk,tkv->tv", weights[answers], said)
    words = (mixed.cumsum(1) < random.random((len(answers), 1))).sum(1).clip(max=7)
    likely = said[np.arange(len(answers)), :, words]
    return torch.from_numpy(likely.T).log(), torch.from_numpy(answers)


def likelihood(log_likelihoods: torch.Tensor, weights) -> float:
    """Mean over tokens of the log likelihood under the mixture."""
    return float(mix(log_likelihoods[..., None], torch.as_tensor(weights)).mean())


def mean_of(concentration: tuple[float, ...]) -> np.ndarray:
    return np.array(concentration) / sum(concentration)


def test_fitting_finds_the_weights_of_a_known_mixture():
    true = np.array([0.6, 0.3, 0.1])
    heard, answers = spoken(np.tile(true, (200, 1)), 40)
    found = mean_of(fit(heard, answers))
    assert np.abs(found - true).max() < 0.02
    best = minimize(
        lambda free: -likelihood(heard, np.exp(free) / np.exp(free).sum()), np.zeros(3), tol=1e-10
    )
    assert likelihood(heard, found) >= -best.fun - GAP


@pytest.mark.parametrize("seed", range(8))
def test_fitted_weights_are_never_below_even_ones_nor_any_others(seed):
    random = np.random.default_rng(seed)
    number = int(random.integers(2, 6))
    heard = torch.from_numpy(random.normal(-3, 3, (number, int(random.integers(1, 60)))))
    heard[0, :3] = -torch.inf  # impossible to one agent
    heard[1, 5:9] = -torch.inf
    answers = torch.arange(heard.shape[1]) // 4
    even = likelihood(heard, np.full(number, 1 / number))
    assert likelihood(heard, mean_of(fit(heard, answers))) >= even - 1e-12
    scaled, _ = crowd_aggregator._scaled_likelihoods(heard, answers)
    reached = likelihood(heard, crowd_aggregator._fit_mean(scaled).numpy())
    others = random.dirichlet([0.5] * number, 300)
    slack = max(GAP, math.log(number) / ITERATIONS)
    assert reached >= max(likelihood(heard, other) for other in others) - slack


def repeated_fits(rows: int, better: float = 0.0) -> np.ndarray:
    """Weights of four agents (fits, agents), fitted to so many answers of 12 tokens. All agents are
    equally good, but the first one may be better, in nats per token."""
    random, found = np.random.default_rng(0), []
    for _ in range(12):
        common = random.normal(-1, 0.8, 12 * rows)
        heard = common + random.normal(0, 0.25, (4, 12 * rows))
        heard[0] += better
        owners = torch.arange(rows).repeat_interleave(12)
        found.append(mean_of(fit(torch.tensor(np.minimum(heard, -1e-3)), owners)))
    return np.array(found)


def test_equally_good_agents_keep_a_weight_also_with_few_rows():
    """The likeliest weights left one out in 9 of 12 fits."""
    assert (repeated_fits(8).min(1) < 0.02).sum() <= 1


def test_a_better_agent_gets_its_weight_also_from_few_rows():
    assert (repeated_fits(8, better=0.6)[:, 0] > 0.9).all()


def test_one_answer_prefers_no_agent():
    heard = torch.tensor([[-1.0] * 9, [-3.0] * 9])
    assert mean_of(fit(heard, torch.zeros(9))) == pytest.approx([0.5, 0.5])
    assert mean_of(fit(heard, torch.arange(9)))[0] > 0.99


def test_the_total_reports_whether_answers_have_an_agent_each():
    number, random = 3, np.random.default_rng(1)
    alone = np.eye(number)[random.integers(number, size=120)]
    even = np.full((120, number), 1 / number)
    between = random.dirichlet([2.0] * number, 120)
    totals = [sum(fit(*spoken(each, 30))) for each in (alone, between, even)]
    assert totals[0] < 0.5
    assert 3 <= totals[1] <= 12  # 6
    assert totals[2] > 30


@pytest.fixture
def likeliest_mean(monkeypatch):
    """The expected weights are the likeliest ones, not shrunk."""
    monkeypatch.setattr(crowd_aggregator, "EVEN_SHARES", np.zeros(1))


@pytest.mark.usefixtures("likeliest_mean")
@pytest.mark.parametrize("true", [0.3, 3.0, 30.0])
def test_the_total_is_that_of_the_exact_likelihood(true):
    """Two agents: the expectation over a Beta distribution, by quadrature on 1,000 quantiles."""
    drawn = np.random.default_rng(2).dirichlet([true / 2, true / 2], 40)
    heard, answers = spoken(drawn, 12)
    found = fit(heard, answers)
    likely, mean = heard.exp().numpy(), mean_of(found)

    def exact(total: float) -> float:
        share = beta(*(total * mean)).ppf((np.arange(1000) + 0.5) / 1000)
        each = np.log(np.outer(likely[0], share) + np.outer(likely[1], 1 - share))  # (T, 1000)
        whole = each.reshape(40, 12, -1).sum(1)
        return float(np.logaddexp.reduce(whole, 1).sum() - 40 * math.log(1000))

    best = max(exact(2 * each) for each in CONCENTRATIONS)
    assert exact(sum(found)) > best - 0.5


@pytest.mark.usefixtures("likeliest_mean")
@pytest.mark.parametrize("true", [0.1, 2.0, 50.0])
def test_agents_that_exclude_each_other_are_a_dirichlet_multinomial(true):
    """Each token is possible to one agent alone, so an answer's likelihood is a ratio of gammas."""
    random = np.random.default_rng(5)
    drawn = random.dirichlet(true * np.array([0.5, 0.3, 0.2]), 60)
    counts = np.array([random.multinomial(10, weights) for weights in drawn])  # (A, K)
    agents = np.concatenate([np.repeat(np.arange(3), each) for each in counts])
    heard = torch.full((3, 600), -torch.inf)
    heard[torch.from_numpy(agents), torch.arange(600)] = -7.0
    found = fit(heard, torch.arange(60).repeat_interleave(10))
    np.testing.assert_allclose(mean_of(found), counts.sum(0) / 600, atol=1e-6)

    def exact(total: float) -> float:
        prior = total * mean_of(found)
        rising = (gammaln(prior + counts) - gammaln(prior)).sum(1)
        return float((rising + gammaln(total) - gammaln(total + 10)).sum())

    best = max(exact(3 * each) for each in CONCENTRATIONS)
    assert exact(sum(found)) > best - 2


def test_fitting_depends_on_neither_order_nor_names_nor_chunks(monkeypatch):
    heard, answers = spoken(np.random.default_rng(3).dirichlet([1.0, 0.5], 30), 9)
    found = fit(heard, answers)
    order = torch.from_numpy(np.random.default_rng(4).permutation(len(answers)))
    assert fit(heard[:, order], 7 * answers[order] + 100) == pytest.approx(found)
    assert fit(heard + torch.randn(270), answers) == pytest.approx(found)
    monkeypatch.setattr(crowd_aggregator, "CHUNK", 10 * crowd_aggregator.DRAWS)
    assert crowd_aggregator.fit(heard, answers) == pytest.approx(found)


def test_fitting_nothing_prefers_nothing():
    nothing = torch.zeros(0, dtype=torch.long)
    assert crowd_aggregator.fit(torch.zeros(3, 0), nothing) == pytest.approx((1.0, 1.0, 1.0))
    impossible = torch.full((2, 4), -torch.inf)
    assert crowd_aggregator.fit(impossible, torch.zeros(4)) == pytest.approx((1.0, 1.0))
    same = torch.full((2, 5), -800.0)  # agents that agree, on tokens whose probability is 0 in fp64
    assert crowd_aggregator.fit(same, torch.arange(5)) == pytest.approx((1.0, 1.0))
    assert crowd_aggregator.fit(
        torch.tensor([[-1.0, -2.0]]), torch.tensor([0, 1])
    ) == pytest.approx((1.0,))


def test_an_agent_that_finds_answers_impossible_gets_no_weight():
    heard = torch.tensor([[-1.0, -2.0, -1.0], [-torch.inf] * 3])
    found = crowd_aggregator.fit(heard, torch.tensor([0, 0, 1]))
    assert found[1] == 0
    assert Aggregator("sampled", found).weights_for([[1, 2]]).tolist() == [[1.0], [0.0]]


# --- answers -------------------------------------------------------------------------------------


@torch.no_grad()
def distribution(crowd: Crowd, weights: torch.Tensor, text: list[int]) -> np.ndarray:
    """The mixture after `text`, written out: agents one by one, no cache, padding or logarithm."""
    ids = torch.tensor([text])
    each = [agent(input_ids=ids, use_cache=False).logits[0, -1] for agent in crowd.agents]
    return sum(
        float(weight) * logits.double().softmax(-1).numpy()
        for weight, logits in zip(weights, each, strict=True)
    )


def drawn_from(likely: np.ndarray, settings: Generation, uniform: float) -> int:
    """A token by inversion, from the plainest definitions of temperature and top-p."""
    powered = likely ** (1 / settings.temperature)
    order = np.argsort(-powered)
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += powered[token] / powered.sum()
        if mass >= settings.top_p:
            break
    reached = np.cumsum(powered[kept]) / powered[kept].sum()
    return int(kept[int((reached <= uniform).sum())])


def plainly(crowd, weights, prompt, settings, number) -> generate.Answer:
    """An answer token by token, the whole text again for each of them."""
    text, random = list(prompt), np.random.default_rng([settings.seed, number])
    for _ in range(settings.max_new_tokens):
        likely = distribution(crowd, weights, text)
        if settings.temperature:
            token = drawn_from(likely, settings, random.random())
        else:
            token = int(likely.argmax())
        if token in STOP:
            return generate.Answer(text[len(prompt) :], "stop")
        text.append(token)
    return generate.Answer(text[len(prompt) :], "length")


def all_answers(mixture, asked, settings, accelerator, rows) -> list[generate.Answer]:
    found = {}
    decoder = generate.Decoder(mixture, STOP, settings, rows)
    for batch, answers in decoder.answer_batches(asked, accelerator):
        found |= dict(zip(batch, answers, strict=True))
    return [found[i] for i in range(len(asked))]


DRAWN = Generation(max_new_tokens=16, temperature=0.8, top_p=0.9, seed=3)


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", representatives(AGGREGATORS, ["learned"]))
def test_an_answer_is_that_of_the_plainest_loop_in_any_batch(crowd, accelerator, kind, settings):
    mixture, asked = Mixture(crowd, AGGREGATORS[kind]), prompts()
    weights = AGGREGATORS[kind].weights_for(asked)
    expected = [
        plainly(crowd, weights[:, i], prompt, settings, i) for i, prompt in enumerate(asked)
    ]
    assert {answer.finish_reason for answer in expected} == {"stop", "length"}
    assert len({len(answer.ids) for answer in expected}) > 3  # rows leave one after another
    for rows in (1, 4, 100):
        assert all_answers(mixture, asked, settings, accelerator, rows) == expected
    if not settings.temperature:
        assert all_answers(mixture, asked[::-1], settings, accelerator, 5) == expected[::-1]


def test_tokens_are_as_frequent_as_in_the_mixture(crowd):
    prompt, number = prompts()[0][:4], 3000
    mixture = Mixture(crowd, AGGREGATORS["learned"])
    settings = Generation(max_new_tokens=1, temperature=1.0)
    decoder = generate.Decoder(mixture, [], settings)
    found = decoder.decode([prompt] * number, seeds=range(number))
    counts = np.bincount([answer.ids[0] for answer in found], minlength=tiny.VOCAB)
    likely = distribution(crowd, AGGREGATORS["learned"].expected(), prompt)
    wrong = np.exp(likely) / np.exp(likely).sum()  # probabilities taken for logits

    def fits(expected: np.ndarray) -> float:
        often = expected * number >= 5
        sums = [[*each[often], each[~often].sum()] for each in (counts, expected * number)]
        return chisquare(*(np.array(sums) + 1e-9)).pvalue

    assert fits(likely) > 0.01
    assert fits(wrong) < 1e-6


def test_a_pass_without_cache_and_mask_gives_every_position(crowd):
    aggregator = AGGREGATORS["learned"]
    text = torch.tensor([prompts()[0][:6], prompts()[2][:6]])
    with torch.no_grad():
        output = Mixture(crowd, aggregator)(text, use_cache=False)
        last = Mixture(crowd, aggregator)(text, use_cache=False, logits_to_keep=1)
    assert output.past_key_values is None
    assert output.logits.shape == (2, 6, tiny.VOCAB)
    for row, end in ((0, 2), (1, 6)):
        expected = distribution(crowd, aggregator.expected(), text[row, :end].tolist())
        found = output.logits[row, end - 1].double().exp().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(last.logits, output.logits[:, -1:])


def test_an_answer_of_n_tokens_takes_n_passes_of_one_token_each(crowd):
    mixture, [prompt] = Mixture(crowd, AGGREGATORS["sampled"]), prompts(1)
    crowd.asked.clear()
    decoder = generate.Decoder(mixture, [], Generation(max_new_tokens=20))
    decoder.decode([prompt, prompt[1:]])
    assert crowd.asked == [(2, len(prompt))] + [(2, 1)] * 19


# --- as transformers asks ------------------------------------------------------------------------


def padded(asked: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, asked))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in asked]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 12, "eos_token_id": STOP},
        {"max_new_tokens": 30, "eos_token_id": 5, "pad_token_id": 9},
        {"eos_token_id": None},
        {"do_sample": True, "top_k": 1, "temperature": 2.0, "eos_token_id": STOP},
        {"do_sample": True, "top_p": 1e-6, "eos_token_id": STOP},
        {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": STOP},
    ],
)
def test_generate_of_one_agent_is_that_of_transformers(options):
    one, asked = Crowd(1).eval(), padded(prompts())
    options = {"pad_token_id": 0} | options
    expected = one.agents[0].generate(**asked, **options)
    found = Mixture(one, Aggregator("uniform", (1.0,))).generate(**asked, **options)
    assert found.tolist() == expected.tolist()


def test_generate_takes_what_the_models_own_configuration_says(crowd):
    mixture, asked = Mixture(crowd, AGGREGATORS["uniform"]), padded(prompts())
    expected = mixture.generate(**asked, max_new_tokens=7, eos_token_id=STOP, pad_token_id=8)
    own = mixture.generation_config
    assert own is crowd.generation_config
    own.max_new_tokens, own.eos_token_id, own.pad_token_id = 7, STOP, 8
    try:
        assert torch.equal(mixture.generate(**asked), expected)
        assert mixture.generate(**asked, max_new_tokens=3).shape[1] == expected.shape[1] - 4
    finally:
        own.max_new_tokens = own.eos_token_id = own.pad_token_id = None
    assert 8 in expected
    assert mixture.config is crowd.config
    assert mixture.device == torch.device("cpu")


def test_what_generate_draws_comes_from_torch(crowd):
    mixture, asked = Mixture(crowd, AGGREGATORS["sampled"]), padded([prompts()[0]] * 6)

    def drawn():
        return mixture.generate(**asked, do_sample=True, max_new_tokens=5).tolist()

    torch.manual_seed(0)
    first, second = drawn(), drawn()
    assert len(set(map(tuple, first))) > 3
    torch.manual_seed(0)
    assert drawn() == first != second


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_generate_writes_what_a_decoder_writes(crowd, kind):
    mixture, asked = Mixture(crowd, AGGREGATORS[kind]), prompts()
    found = mixture.generate(**padded(asked), max_new_tokens=16, eos_token_id=STOP, pad_token_id=0)
    answers = generate.Decoder(mixture, STOP, GREEDY).decode(asked, seeds=range(len(asked)))
    for row, answer in zip(found[:, max(map(len, asked)) :].tolist(), answers, strict=True):
        assert row[: len(answer.ids)] == answer.ids
        assert all(token in (*STOP, 0) for token in row[len(answer.ids) :])


def test_generate_refuses_what_it_would_not_do(crowd):
    mixture, asked = Mixture(crowd, AGGREGATORS["uniform"]), padded(prompts(1))
    with pytest.raises(ValueError, match="temperatur"):
        mixture.generate(**asked, temperatur=0.5)


def test_generate_leaves_the_mode_of_the_crowd_alone():
    one = Crowd(1).train()
    mixture = Mixture(one, Aggregator("uniform", (1.0,)))
    mixture.generate(torch.tensor([[7, 8]]), max_new_tokens=2)
    assert one.training
    assert one.agents[0].training


# --- what answers are worth, in benchmarks/crowd.py ----------------------------------------------


@pytest.fixture
def calibration_error(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("crowd").calibration_error


def test_the_calibration_error_is_that_of_bins_written_out(calibration_error):
    low, high = [0.05, 1 / 15, 0.0], [0.95, 1.0]  # a bin has its upper edge
    confidence = torch.tensor([0.62, 0.65, *high, *low], dtype=torch.float64)
    correct = torch.tensor([1, 0, 1, 1, 0, 1, 0])
    gaps = (1 - sum(low)) + (0.62 + 0.65 - 1) + (2 - sum(high))
    assert calibration_error(confidence, correct) == pytest.approx(gaps / 7)


def test_the_calibration_error_reports_honest_from_boastful(calibration_error):
    random = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=random)
    correct = torch.rand(500, generator=random) < confidence
    assert calibration_error(confidence, correct) < 0.06
    assert calibration_error(confidence.sqrt(), correct) > 0.1
    assert calibration_error(torch.zeros(0), torch.zeros(0)) == 0


def test_disagreement_is_the_share_of_tokens_that_pairs_say_differently():
    said = torch.tensor([[0, 1, 2, 2], [0, 1, 1, 2], [0, 2, 0, 1]])  # (K, T)
    log_probs = torch.nn.functional.one_hot(said, 3).float().log_softmax(-1)
    # pairs 01, 02, 12: which tokens differ
    differ = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]])
    assert torch.allclose(diversity.disagreement(log_probs), differ.float().mean(0))
    assert diversity.disagreement(log_probs[:1]).tolist() == [0, 0, 0, 0]
