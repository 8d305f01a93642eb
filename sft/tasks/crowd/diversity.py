"""The diversity of K agents: sliced Wasserstein distances between clouds of representations.

The squared 2-Wasserstein distance of two clouds of N points on a line is the mean squared
difference of the sorted points. The squared sliced distance of clouds in d dimensions is its mean
over random directions that the clouds are projected onto (Bonneel et al. 2015, equation 13; Monte
Carlo over `num_projections` directions).

Normalised points have length sqrt(d). Then the distance is between 0 and 4 for every d (an estimate
from few directions can be larger), and large norms do not raise it. For raw points it has no bound,
and its gradient grows with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sft.config.schema import Crowd
from sft.data.examples import Batch
from sft.errors import ConfigError
from sft.models.head import SupervisedHead
from sft.models.layers import repeated_layers
from sft.tasks.crowd.agents import Agents


def directions(num_projections: int, dimension: int, seed: int) -> torch.Tensor:
    """Returns unit vectors (num_projections, dimension), uniform on the sphere, fp32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_projections, dimension, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def normalise(points: torch.Tensor) -> torch.Tensor:
    """Returns points (..., d) scaled to length sqrt(d); points of length 0 stay."""
    return points * torch.rsqrt(points.pow(2).mean(-1, keepdim=True) + 1e-12)


def diversity(points: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """Returns the mean over pairs of agents of the squared sliced distance; 0 for one agent.

    The scalar is differentiable in points (agents, N, d); `onto`: directions (P, d).
    """
    agents = len(points)
    if agents < 2 or not points.shape[1]:
        return points.sum() * 0.0
    ordered = (points @ onto.to(points).T).sort(dim=1).values  # (agents, N, P)
    # The mean over pairs of (a - b)^2 is twice the unbiased variance.
    return 2 * ordered.var(dim=0).mean()


def disagreement(logits: torch.Tensor) -> torch.Tensor:
    """Returns the share of pairs of agents whose likeliest tokens differ: (N,)."""
    tokens = logits.argmax(-1)
    agents = len(tokens)
    if agents < 2:
        return torch.zeros_like(tokens[0], dtype=logits.dtype)
    differ = (tokens[:, None] != tokens[None]).sum((0, 1))  # each pair twice
    return differ.to(logits) / (agents * (agents - 1))


# --- representations in a batch ------------------------------------------------------------------


class RepresentationReader:
    """Takes the representation of each example by each agent from a forward pass.

    It is the output of layer `crowd.layer`, or the logits, at positions whose next token is
    supervised: at the last one of an example, at the first one, or the mean over all.
    """

    def __init__(self, built: Agents, head: SupervisedHead, settings: Crowd):
        self.head, self.settings = head, settings
        self.clear()
        layers = repeated_layers(built)
        if settings.layer >= len(layers):
            raise ConfigError(
                f"crowd.layer: expected one of this model's {len(layers)} layers, 0 to "
                f"{len(layers) - 1}, or -1, found {settings.layer}"
            )
        if settings.representation == "hidden" and settings.layer == -1:
            # It runs after the hook of `head`, which selects the supervised positions.
            built.get_output_embeddings().register_forward_pre_hook(self._read_head)
        elif settings.representation == "hidden":
            layers[settings.layer].register_forward_hook(self._read_layer)

    def clear(self) -> None:
        """Drops the states of an abandoned pass: they would keep its whole graph in memory."""
        self.states: torch.Tensor | None = None  # (agents * supervised, d)

    def _read_head(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.head.positions is not None:
            self.states = inputs[0]

    def _read_layer(self, _: nn.Module, __: Any, output: Any) -> None:
        if self.head.positions is not None:
            states = output[0] if isinstance(output, tuple) else output
            self.states = states.flatten(0, 1)[self.head.positions]

    def read_points(self, logits: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Returns points (examples with a supervised token, agents, d), in fp32 or wider.

        `logits`: (agents, supervised, vocabulary), of the pass whose states were read; needed only
        if they are compared.
        """
        states = logits if self.settings.representation == "logits" else self.states
        assert states is not None
        self.clear()
        agents = self.settings.num_agents
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        states = states.view(agents, -1, states.shape[-1]).movedim(0, 1)  # (supervised, agents, d)
        counts = [count for count in batch.counts if count]
        pooled = [_pool(part, self.settings.pooling) for part in states.split(counts)]
        points = torch.stack(pooled) if pooled else states[:0]
        return normalise(points) if self.settings.normalise else points


def _pool(states: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pools the states of an example: (positions, agents, d) -> (agents, d)."""
    if pooling == "mean":
        return states.mean(0)
    return states[-1 if pooling == "last" else 0]


def select_pooled(batch: Batch, pooling: str) -> Batch:
    """Returns the batch with only the supervised positions that are pooled, to save time."""
    if pooling == "mean":
        return batch
    ends = [*itertools.accumulate(batch.counts)]  # in a dry run, tensors have no values
    pairs = [(end, count) for end, count in zip(ends, batch.counts, strict=True) if count]
    places = [end - (1 if pooling == "last" else count) for end, count in pairs]
    return replace(
        batch,
        positions=batch.positions[places],
        targets=batch.targets[places],
        weights=None,
        counts=[min(count, 1) for count in batch.counts],
    )


@dataclass(frozen=True)
class BatchDiversity:
    """The diversity of a global batch and its gradient in each example's representation."""

    rows: dict[int, int]  # example id -> row of `gradient`
    value: torch.Tensor
    gradient: torch.Tensor  # (examples, agents, d)
    supervised: float  # items of the global batch

    @classmethod
    def of_points(
        cls, ids: Sequence[int], points: torch.Tensor, supervised: float, onto: torch.Tensor
    ) -> BatchDiversity:
        """Measures points (examples, agents, d) of the examples `ids` in the directions `onto`."""
        points = points.requires_grad_()
        with torch.enable_grad():
            value = diversity(points.movedim(0, 1), onto)
            (gradient,) = torch.autograd.grad(value, points)
        rows = {number: row for row, number in enumerate(ids)}
        return cls(rows, value.detach(), gradient, supervised)

    def share(self, ids: Sequence[int], points: torch.Tensor) -> torch.Tensor:
        """Returns a micro-batch's share of the diversity, times the items of the global batch.

        `points` are those of the examples `ids` that have a supervised token. The shares of all
        micro-batches add up to the value, and their gradients to its gradient.
        """
        rows = [self.rows[i] for i in ids if i in self.rows]
        pull = (points * self.gradient[rows]).sum()
        share = self.value * (len(rows) / len(self.rows)) if rows else 0.0
        return self.supervised * (pull - pull.detach() + share)
