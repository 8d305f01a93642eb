"""One answer from K agents: the mixture of their next-token distributions.

A mixture is a distribution, so its logarithm stands where a model's logits stand: temperature,
top-p and top-k then act on the mixture itself. Everything is in log space, in fp32 at least. All
agents answer in one pass of K x B rows, agent-major: row k * B + b is example b seen by agent k.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from sft.config.load import make_generation
from sft.config.schema import Generation
from sft.errors import UserError, suggest
from sft.evaluate.generate import Answer, Decoder, eval_mode

Kind = Literal["uniform", "sampled", "learned"]
GAP = 1e-6  # nats per token that fitted weights may be below the best ones
ITERATIONS = 1000  # of EM at most: then they are log(K) / 1000 below at the worst
DRAWS = 256  # of weights, that stand for their distribution
TOTALS = 10 ** (np.arange(-8, 17) / 4)  # per agent, 0.01 to 10,000: below, few draws mix agents
CHUNK = 2**22  # likelihoods of tokens under drawn weights at once: 32 MiB


class AggregatorError(UserError):
    """Agents that cannot be combined as asked."""


def mix(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Log probabilities (K, *, V) -> those of the mixture (*, V); weights (K,), (K, B) or (K, *).

    fp32, or fp64 if it is given. A weight of 0 leaves an agent out whatever it says, and what all
    others find impossible (-inf) is so.
    """
    log_probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    trailing = (1,) * (log_probs.dim() - weights.dim())
    log_weights = weights.to(log_probs).log().reshape(*weights.shape, *trailing)
    return torch.logsumexp(log_probs + log_weights, dim=0)


# --- weights -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aggregator:
    """How much each agent counts: weights w ~ Dirichlet(concentration), one number per agent.

    The model: weights are drawn once per answer, and each of its tokens from the mixture that they
    make. `sampled` does that. `uniform` and `learned` take the expectation of w instead, of equal
    concentrations and of the given ones: that is the same as to draw w anew at each token, since a
    token of a mixture with random weights has the distribution of the mixture with expected ones.
    """

    kind: Kind
    concentration: tuple[float, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise AggregatorError(
                f"aggregator: expected one of {', '.join(get_args(Kind))}, found {self.kind!r}; "
                f"{suggest(str(self.kind), get_args(Kind))}"
            )
        numbers = self.concentration
        if not all(0 <= number < math.inf for number in numbers) or not sum(numbers) > 0:
            raise AggregatorError(
                "aggregator: expected a concentration for each agent, none below 0 and one above, "
                f"found {list(numbers)}; equal ones, such as 1, prefer no agent"
            )

    def expected(self) -> Tensor:
        """The expectation of the weights (K,), fp64; of `uniform` 1/K each."""
        numbers = torch.tensor(self.concentration, dtype=torch.float64)
        numbers = torch.ones_like(numbers) if self.kind == "uniform" else numbers
        return numbers / numbers.sum()

    def drawn(self, prompts: Sequence[list[int]]) -> Tensor:
        """Weights (K, B), fp64, for the answers to prompts (token ids).

        Those of `sampled` are a function of (seed, ids of the prompt) alone: of no batch, order,
        padding or number of processes.
        """
        if self.kind != "sampled":
            return self.expected()[:, None].expand(-1, len(prompts))
        drawn = [self._random(prompt).dirichlet(self.concentration) for prompt in prompts]
        return torch.from_numpy(np.array(drawn).reshape(-1, len(self.concentration)).T.copy())

    def _random(self, prompt: list[int]) -> np.random.Generator:
        digest = hashlib.sha256(np.array(prompt, dtype="<i8").tobytes()).digest()
        return np.random.default_rng([self.seed, *np.frombuffer(digest, dtype="<u4").tolist()])


def aggregator_of(crowd: Any) -> Aggregator:
    """The one that a crowd was built, or loaded, with."""
    return Aggregator(crowd.aggregator, crowd.concentration)


def fit(log_likelihoods: Tensor, answers: Tensor) -> tuple[float, ...]:
    """The concentration that held-out answers ask for, agents frozen: K numbers.

    `log_likelihoods` (K, T): of each supervised token by each agent. `answers` (T,): whole numbers
    that say which answer a token belongs to.

    First the mean: the weights whose mixture gives all tokens the highest likelihood, by EM
    (Dempster et al. 1977) from 1/K each. It is concave in the weights and never falls, so it is
    never below that of `uniform`. Then their total, of `TOTALS` that which gives whole answers the
    highest likelihood, the expectation over w ~ Dirichlet(total * mean) of the product over the
    answer's tokens, by the same seeded draws for all: small where each answer has an agent of its
    own, large where all agents share in each. Of totals that are as good as each other, the one
    nearest to K (flat). Without tokens: ones. Tokens that no agent can say do not count. fp64,
    deterministic; memory is a few times the arguments', `CHUNK`, and `DRAWS` numbers an answer.
    """
    scaled, which = _said(log_likelihoods, answers)
    mean = _fit_mean(scaled)
    number = len(mean)
    values = [_whole(scaled, which, number * each * mean.numpy()) for each in TOTALS]
    enough = max(values) - 1e-9 * (1 + len(scaled))
    best = [each for each, value in zip(TOTALS, values, strict=True) if value >= enough]
    total = number * min(best, key=lambda each: abs(math.log(each)))
    return tuple((total * mean).tolist())


def _said(log_likelihoods: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Likelihoods (T, K) over the largest of each token, and numbers of answers (T,), from 0.

    So none is lost to underflow that matters; what is divided out is the same for all weights.
    """
    agents = log_likelihoods.detach().cpu().double().T
    largest = agents.max(1).values
    said = largest > -torch.inf
    which = torch.unique(answers.detach().cpu()[said], return_inverse=True)[1]
    return (agents[said] - largest[said, None]).exp(), which


def _fit_mean(scaled: Tensor) -> Tensor:
    """Weights (K,) of the mixture that is likeliest to have said the tokens (T, K).

    With gain_k, the mean over tokens of what agent k says over what the mixture says, the
    likelihood of any weights is within log(max gain) nats per token (Jensen), and EM multiplies by
    the gains.
    """
    number = scaled.shape[1]
    weights = torch.full((number,), 1 / number, dtype=torch.float64)
    if not len(scaled):
        return weights
    for _ in range(ITERATIONS):
        gains = scaled.T @ (1 / (scaled @ weights)) / len(scaled)
        if gains.max() < 1 + GAP:
            break
        weights = weights * gains
    return weights / weights.sum()


def _whole(scaled: Tensor, which: Tensor, concentration: np.ndarray) -> float:
    """Log likelihood of all answers, each with weights of its own from this Dirichlet."""
    drawn = np.random.default_rng(0).dirichlet(concentration, DRAWS)
    weights = torch.from_numpy(drawn).T  # (K, draws)
    number = int(which.max()) + 1 if len(which) else 0
    sums = torch.zeros(number, DRAWS, dtype=torch.float64)
    for some, theirs in zip(_chunks(scaled), _chunks(which), strict=True):
        sums.index_add_(0, theirs, (some @ weights).log())
    return float((sums.logsumexp(1) - math.log(DRAWS)).sum())


def _chunks(tokens: Tensor) -> Iterator[Tensor]:
    return iter(tokens.split(CHUNK // DRAWS))


# --- answers -------------------------------------------------------------------------------------


@dataclass
class MixtureCache:
    """What a mixture keeps between tokens, with the method that generation asks a cache for."""

    agents: Any  # the base's cache, of K x B rows
    weights: Tensor  # (K, B)

    def reorder_cache(self, rows: Tensor) -> None:
        """Keeps these examples (n,), in this order, for every agent."""
        number, batch = self.weights.shape
        agents = torch.arange(number, device=rows.device) * batch
        self.agents.reorder_cache((agents[:, None] + rows).flatten())
        self.weights = self.weights[:, rows]


class Mixture(nn.Module):
    """A crowd and its aggregator, asked as one model: `evaluate.generate` takes it as it is."""

    def __init__(self, crowd: nn.Module, aggregator: Aggregator):
        super().__init__()
        number = len(aggregator.concentration)
        if number != crowd.num_agents:
            raise AggregatorError(
                f"aggregator: expected a concentration for each of {crowd.num_agents} agents, "
                f"found {number}; take the aggregator that was saved or fitted with this crowd"
            )
        self.crowd, self.aggregator, self.num_agents = crowd, aggregator, number
        self.rows_per_prompt = number  # which decoding asks for
        self.training = crowd.training  # which `eval_mode` restores

    @property
    def config(self) -> Any:
        return self.crowd.config

    @property
    def generation_config(self) -> Any:
        return self.crowd.generation_config

    @property
    def device(self) -> torch.device:
        return next(self.crowd.parameters()).device

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MixtureCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """`logits` (B, kept, V) are log probabilities of the mixture; all else as of the crowd.

        Without `past_key_values` the ids that the mask shows are the prompts, for which `sampled`
        draws its weights; the cache keeps them for the answers.
        """
        past = past_key_values
        output = self.crowd(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=None if past is None else past.agents,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )
        logits = output.logits.unflatten(0, (self.crowd.num_agents, len(input_ids)))
        precision = torch.promote_types(logits.dtype, torch.float32)
        log_probs = logits.log_softmax(-1, dtype=precision)  # (K, B, kept, V)
        if past is None:
            weights = self.aggregator.drawn(_shown(input_ids, attention_mask)).to(log_probs)
        else:
            weights = past.weights
        cache = output.past_key_values
        return CausalLMOutputWithPast(
            logits=mix(log_probs, weights),
            past_key_values=None if cache is None else MixtureCache(cache, weights),  # type: ignore[arg-type]
        )

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Prompts (B, T), padded on either side -> (B, T + longest answer), padded with the pad id.

        As `generate` of transformers does, with its defaults and those of `generation_config`:
        `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`, `eos_token_id`,
        `pad_token_id`; the token that ends an answer is part of it. `seed` makes what is drawn
        a function of itself; else it comes from torch's generator. Raises UserError for other
        options; of `generation_config` they are not looked at.
        """
        settings, stop, pad = _conventions(self.generation_config, options)
        prompts, heard = _shown(input_ids, attention_mask), list[list[int]]()
        with eval_mode(self):
            found = Decoder(self, stop, settings).decode(
                prompts, seeds=range(len(prompts)), on_tokens=heard.append
            )
        answers = _with_ends(found, heard)
        width = max(map(len, answers), default=0)
        padded = [answer + [pad] * (width - len(answer)) for answer in answers]
        return torch.cat([input_ids, input_ids.new_tensor(padded).reshape(-1, width)], 1)


def _shown(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The ids of each row that are no padding."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = zip(input_ids.tolist(), mask.bool().tolist(), strict=True)
    return [[token for token, seen in zip(*row, strict=True) if seen] for row in rows]


# What `generate` of transformers takes where neither the call nor the model says anything.
DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 20,
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "eos_token_id": None,
    "pad_token_id": None,
    "seed": None,
}


def _conventions(own: Any, options: dict[str, Any]) -> tuple[Generation, list[int], int]:
    """(settings, tokens that end an answer, pad id) from options of transformers."""
    for name in options.keys() - DEFAULTS.keys():
        raise AggregatorError(
            f"generate: expected options that a mixture takes, found {name}; "
            f"{suggest(name, list(DEFAULTS))}"
        )
    said = {name: getattr(own, name, None) for name in DEFAULTS}
    values = DEFAULTS | {name: value for name, value in said.items() if value is not None} | options
    settings = {
        "max_new_tokens": values["max_new_tokens"],
        "temperature": (values["temperature"] or 1.0) if values["do_sample"] else 0.0,
        "top_p": values["top_p"] or 1.0,
        "top_k": values["top_k"] or 0,
        "seed": values["seed"] if values["seed"] is not None else int(torch.randint(2**32, ())),
    }
    ends = values["eos_token_id"]
    stop = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = values["pad_token_id"]
    return make_generation(settings), stop, pad if pad is not None else (*stop, 0)[0]


def _with_ends(found: list[Answer], heard: list[list[int]]) -> list[list[int]]:
    """Answers with the token that ended them, from the tokens of each step: rows that are no longer
    in a step are those that had ended."""
    passes = [len(answer.ids) + (answer.finish_reason == "stop") for answer in found]
    answers: list[list[int]] = [[] for _ in found]
    rows = list(range(len(found)))
    for step, tokens in enumerate(heard):
        if len(tokens) < len(rows):
            rows = [row for row in rows if passes[row] > step]
        for row, token in zip(rows, tokens, strict=True):
            if passes[row] > step:
                answers[row].append(token)
    return answers
