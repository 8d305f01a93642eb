"""How far apart K agents are: sliced Wasserstein distances between clouds of their representations.

The squared 2-Wasserstein distance of two clouds of N points on a line is the mean squared
difference of the sorted points. Its mean over random directions, onto which clouds in d dimensions
are projected, is the squared sliced distance (Bonneel et al. 2015, equation 13; Monte Carlo over
`num_projections` directions).

`normalised` points have length sqrt(d). The distance is then between 0 and 4, whatever d is (an
estimate from few directions can be more), and cannot be won by blowing up norms; of raw points it
has no bound, and its gradient grows with them.
"""

from __future__ import annotations

import torch


def directions(num_projections: int, dimension: int, seed: int) -> torch.Tensor:
    """Unit vectors (num_projections, dimension), uniform on the sphere, in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_projections, dimension, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def normalised(points: torch.Tensor) -> torch.Tensor:
    """Points (..., d) scaled to length sqrt(d); those of length 0 stay."""
    return points * torch.rsqrt(points.pow(2).mean(-1, keepdim=True) + 1e-12)


def diversity(points: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of agents of the squared sliced 2-Wasserstein distance; 0 for one agent.

    points (agents, N, d), `onto` directions (P, d) -> scalar, differentiable in the points.
    """
    agents = len(points)
    if agents < 2 or not points.shape[1]:
        return points.sum() * 0.0
    ordered = (points @ onto.to(points).T).sort(dim=1).values  # (agents, N, P)
    # The mean over pairs of (a - b)^2 is twice the unbiased variance.
    return 2 * ordered.var(dim=0).mean()


def disagreement(logits: torch.Tensor) -> torch.Tensor:
    """(agents, N, V) -> (N,): the share of pairs of agents whose most likely tokens differ."""
    said = logits.argmax(-1)
    agents = len(said)
    if agents < 2:
        return torch.zeros_like(said[0], dtype=logits.dtype)
    differ = (said[:, None] != said[None]).sum((0, 1))  # each pair twice
    return differ.to(logits) / (agents * (agents - 1))
