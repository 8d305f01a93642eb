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

import torch


def directions(num_projections: int, dimension: int, seed: int) -> torch.Tensor:
    """Returns unit vectors (num_projections, dimension), uniform on the sphere, fp32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_projections, dimension, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def normalised(points: torch.Tensor) -> torch.Tensor:
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
