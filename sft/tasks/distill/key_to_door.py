"""Dark Key-to-Door (Laskin et al. 2022): reward 1 for the hidden key, then 1 for the hidden door.

Each is rewarded once in an episode of 50 steps, the door only after the key. There are 81 x 81
goals; sources learn some of them, each for itself.
"""

from __future__ import annotations

import torch

from sft.tasks.distill.grid import NUM_CELLS, World, place_of


class KeyToDoor(World):
    """A goal is 81 x the key's cell + the door's. Stages: no key, a key, the door is open."""

    num_goals, num_trained, num_stages = NUM_CELLS**2, 120, 3

    def arrive(
        self, goals: torch.Tensor, stages: torch.Tensor, cells: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        aims = torch.where(stages == 0, goals // NUM_CELLS, goals % NUM_CELLS)
        rewards = (cells == aims) & (stages < 2)
        return rewards, stages + rewards

    def name_of(self, goal: int) -> str:
        key, door = divmod(goal, NUM_CELLS)
        return "{},{},{},{}".format(*place_of(key), *place_of(door))
