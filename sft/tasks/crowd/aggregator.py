"""One answer from K agents: the mixture of their next-token distributions.

A mixture is a distribution, so its logarithm replaces a model's logits: temperature, top-p and
top-k act on the mixture itself. Everything is in log space, in fp32 at least. All agents answer in
one pass of K x B rows, agent-major: row k * B + b is example b for agent k.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from sft.errors import UserError, suggest

Kind = Literal["uniform", "sampled", "learned"]
GAP = 1e-6  # nats per token by which fitted weights may be below the best ones
ITERATIONS = 1000  # maximum steps of EM; then weights are at most log(K) / 1000 below the best ones
DRAWS = 256  # draws of weights that represent their distribution
# Candidates for the mean of the K concentrations, 0.01 to 10,000: with smaller ones hardly any draw
# would mix agents.
CONCENTRATIONS = 10 ** (np.arange(-8, 17) / 4)
FOLDS = 5  # parts of the answers, for the cross-validation of weights
EVEN_SHARES = np.linspace(0, 1, 21)  # candidates for how far fitted weights are shrunk to even ones
FEW_ANSWERS = 30  # with fewer, weights are mostly noise (benchmarks/results/crowd.json: fits)
CHUNK = 2**22  # likelihoods of tokens under drawn weights at once: 32 MiB


class AggregatorError(UserError):
    """An error in how agents are combined."""


def mix(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Returns the mixture (*, V) of log probabilities (K, *, V); weights (K,), (K, B) or (K, *).

    The result is fp32, or fp64 for fp64 input. A weight of 0 leaves an agent out. A token that all
    agents with a weight find impossible (-inf) stays impossible.
    """
    log_probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    trailing = (1,) * (log_probs.dim() - weights.dim())
    log_weights = weights.to(log_probs).log().reshape(*weights.shape, *trailing)
    return torch.logsumexp(log_probs + log_weights, dim=0)


# --- weights -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aggregator:
    """The weights of the agents: w ~ Dirichlet(concentration), one number per agent.

    `sampled` draws w once per answer and each token from the mixture with these weights. `uniform`
    and `learned` use the expectation of w instead, of equal and of the given concentrations. That
    equals drawing w anew at each token: a token from a mixture with random weights has the
    distribution of the mixture with the expected weights.
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
        """Returns the expected weights (K,) in fp64; for `uniform` 1/K each."""
        numbers = torch.tensor(self.concentration, dtype=torch.float64)
        numbers = torch.ones_like(numbers) if self.kind == "uniform" else numbers
        return numbers / numbers.sum()

    def weights_for(self, prompts: Sequence[list[int]]) -> Tensor:
        """Returns weights (K, B) in fp64 for the answers to prompts (token ids).

        For `sampled` they depend only on the seed and the ids of the prompt, not on batch, order,
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
    """Returns the aggregator that a crowd was built or loaded with."""
    return Aggregator(crowd.aggregator, crowd.concentration)


def fit(log_likelihoods: Tensor, answers: Tensor) -> tuple[float, ...]:
    """Returns the concentration (K numbers) that gives held-out answers the highest likelihood.

    `log_likelihoods` (K, T): of each supervised token by each agent. `answers` (T,): the number of
    the answer that each token belongs to.

    First the expected weights are fitted to the tokens (`_fit_mean`), and shrunk towards even ones
    as far as the answers do not speak against it (`_shrink`). Then their concentration is fitted to
    whole answers: the one of `CONCENTRATIONS` with the highest likelihood, which is an
    expectation over drawn weights. It is small if each answer has an agent of its own, and large if
    all agents share in each answer. Among equally good ones the one nearest to 1 is taken.

    Without tokens the concentrations are ones. Tokens that no agent can produce do not count.
    Everything is fp64 and deterministic. Memory is a few times that of the arguments, plus `CHUNK`
    numbers, plus `DRAWS` numbers per answer.
    """
    scaled, numbers = _scaled_likelihoods(log_likelihoods, answers)
    mean = _shrink(scaled, numbers, _fit_mean(scaled))
    scales = len(mean) * CONCENTRATIONS
    values = [_answer_likelihood(scaled, numbers, scale * mean.numpy()) for scale in scales]
    enough = max(values) - 1e-9 * (1 + len(scaled))
    best = [scale for scale, value in zip(scales, values, strict=True) if value >= enough]
    return tuple((min(best, key=lambda scale: abs(math.log(scale / len(mean)))) * mean).tolist())


def _scaled_likelihoods(log_likelihoods: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns likelihoods (T, K) divided by each token's largest, and numbers (T,) of answers.

    The division avoids underflow, and its factor is the same for all weights.
    """
    agents = log_likelihoods.detach().cpu().double().T
    largest = agents.max(1).values
    is_possible = largest > -torch.inf
    numbers = torch.unique(answers.detach().cpu()[is_possible], return_inverse=True)[1]
    return (agents[is_possible] - largest[is_possible, None]).exp(), numbers


def _fit_mean(scaled: Tensor) -> Tensor:
    """Returns the weights (K,) whose mixture gives the tokens (T, K) the highest likelihood.

    EM (Dempster et al. 1977) begins with 1 / K and multiplies by gains: the mean over tokens of an
    agent's likelihood over the mixture's. The likelihood never falls, so it is at least that of
    `uniform`. No weights are better by more than log(max gain) nats per token (Jensen).
    """
    number, tokens = scaled.shape[1], scaled.numpy()  # whose small products are faster
    weights = np.full(number, 1 / number)
    if not len(tokens):
        return torch.from_numpy(weights)
    for _ in range(ITERATIONS):
        gains = tokens.T @ (1 / (tokens @ weights)) / len(tokens)
        if gains.max() < 1 + GAP:
            break
        weights = weights * gains
    return torch.from_numpy(weights / weights.sum())


def _shrink(scaled: Tensor, numbers: Tensor, fitted: Tensor) -> Tensor:
    """Returns the fitted weights (K,), moved towards 1 / K by a share that answers decide.

    Weights fitted to few answers are noise: the likeliest ones leave out agents as good as the
    others. The share is the largest one whose likelihood, cross-validated over answers, is within
    one standard error of the best (Breiman et al. 1984). With one answer, weights are even.
    """
    num_answers = int(numbers.max()) + 1 if len(numbers) else 0
    if num_answers < 2:
        return torch.full_like(fitted, 1 / len(fitted))
    shares = torch.from_numpy(EVEN_SHARES)

    def shrunk(weights: Tensor) -> Tensor:  # (K, shares)
        return shares / len(weights) + (1 - shares) * weights[:, None]

    values = torch.zeros(num_answers, len(shares), dtype=torch.float64)
    for fold in range(min(FOLDS, num_answers)):
        left_out = numbers % FOLDS == fold
        weights = shrunk(_fit_mean(scaled[~left_out]))
        values.index_add_(0, numbers[left_out], (scaled[left_out] @ weights).log())
    behind = values[:, values.sum(0).argmax(), None] - values
    error = behind.std(0) * math.sqrt(num_answers)  # of the sum
    is_close = behind.sum(0) <= error + 1e-9
    return shrunk(fitted)[:, is_close.nonzero().max()]


def _answer_likelihood(scaled: Tensor, numbers: Tensor, concentration: np.ndarray) -> float:
    """Returns the log likelihood of all answers, each with its own weights from this Dirichlet."""
    drawn = np.random.default_rng(0).dirichlet(concentration, DRAWS)
    weights = torch.from_numpy(drawn).T  # (K, draws)
    num_answers = int(numbers.max()) + 1 if len(numbers) else 0
    sums = torch.zeros(num_answers, DRAWS, dtype=torch.float64)
    size = CHUNK // DRAWS
    for tokens, owners in zip(scaled.split(size), numbers.split(size), strict=True):
        sums.index_add_(0, owners, (tokens @ weights).log())
    return float((sums.logsumexp(1) - math.log(DRAWS)).sum())


# --- answers -------------------------------------------------------------------------------------


@dataclass
class MixtureCache:
    """What a mixture keeps between tokens; generation calls `reorder_cache`."""

    agents: Any  # the base's cache, of K x B rows
    weights: Tensor  # (K, B)

    def reorder_cache(self, rows: Tensor) -> None:
        """Keeps these examples (n,), in this order, for every agent."""
        num_agents, batch = self.weights.shape
        first = torch.arange(num_agents, device=rows.device)[:, None] * batch  # rows of example 0
        self.agents.reorder_cache((first + rows).flatten())
        self.weights = self.weights[:, rows]


class Mixture(nn.Module, GenerationMixin):
    """A crowd and its aggregator as one model: for `Decoder`, and with transformers' `generate`."""

    main_input_name, _is_stateful = "input_ids", False

    def __init__(self, crowd: Any, aggregator: Aggregator):
        super().__init__()
        number = len(aggregator.concentration)
        if number != crowd.num_agents:
            raise AggregatorError(
                f"aggregator: expected a concentration for each of {crowd.num_agents} agents, "
                f"found {number}; take the aggregator that was saved or fitted with this crowd"
            )
        self.crowd, self.aggregator = crowd, aggregator
        self.config, self.generation_config = crowd.config, crowd.generation_config
        self.rows_per_prompt = number  # read by `Decoder`
        self.draws_per_prompt = aggregator.kind == "sampled"  # read by `serve/benchmark/harness`
        self.training = crowd.training  # restored by `eval_mode`

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # then `generate` begins without a cache, and takes the `MixtureCache`

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> None: ...

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
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Returns log probabilities of the mixture as `logits` (B, kept, V).

        Without `past_key_values` the unmasked ids are the prompts, for which `sampled` draws its
        weights; the cache keeps the weights for the answers.
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
        logits = output.logits.unflatten(0, (self.rows_per_prompt, len(input_ids)))
        precision = torch.promote_types(logits.dtype, torch.float32)
        log_probs = logits.log_softmax(-1, dtype=precision)  # (K, B, kept, V)
        if past is None:
            prompts = _unpadded(input_ids, attention_mask)
            weights = self.aggregator.weights_for(prompts).to(log_probs)
        else:
            weights = past.weights
        cache = output.past_key_values
        return CausalLMOutputWithPast(
            logits=mix(log_probs, weights),
            past_key_values=None if cache is None else MixtureCache(cache, weights),  # type: ignore[arg-type]
        )


def _unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Returns the ids of each row without padding."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = zip(input_ids.tolist(), mask.bool().tolist(), strict=True)
    return [[token for token, seen in zip(*row, strict=True) if seen] for row in rows]
