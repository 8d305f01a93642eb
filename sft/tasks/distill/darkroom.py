"""The Darkroom: reward 1 for every step that ends on the hidden goal.

Facts of the published protocol: 20 steps an episode, 73 of the 81 cells are goals to train on.
"""

from __future__ import annotations

import torch

from sft.tasks.distill.grid import NUM_CELLS, NUM_UNSEEN, World, place_of


class Darkroom(World):
    """A goal is its cell."""

    num_goals, num_trained = NUM_CELLS, NUM_CELLS - NUM_UNSEEN

    def arrive(
        self, goals: torch.Tensor, stages: torch.Tensor, cells: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return cells == goals, stages

    def name_of(self, goal: int) -> str:
        return "{},{}".format(*place_of(goal))
