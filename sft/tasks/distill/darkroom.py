"""The Darkroom: a grid in which a goal is hidden, found by the reward alone.

Facts of the published protocol: 9 x 9 cells, start in the middle, five moves clipped to the grid,
20 steps an episode, reward 1 for every step that ends on the goal. A cell is a number, 9 x row +
column, so a step is two look-ups, for one room or for thousands.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch

from sft.tasks.distill.config import EPISODE

SIZE = 9
NUM_CELLS = SIZE * SIZE
START = (SIZE // 2) * SIZE + SIZE // 2
MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0, 0))  # (row, column) that each action adds
NUM_UNSEEN = 8


def cell_of(row: Any, column: Any) -> Any:
    """Returns the cell of a place, or the cells of arrays of places."""
    return row * SIZE + column


def place_of(cell: Any) -> tuple[Any, Any]:
    """Returns (row, column) of a cell, or of an array of cells."""
    return divmod(cell, SIZE)


def _neighbours() -> list[list[int]]:
    """Returns (cells, actions): the cell in which each move ends."""

    def clipped(x: int) -> int:
        return min(max(x, 0), SIZE - 1)

    places = map(place_of, range(NUM_CELLS))
    return [[cell_of(clipped(r + dr), clipped(c + dc)) for dr, dc in MOVES] for r, c in places]


NEXT = torch.tensor(_neighbours())


def split_goals(split_seed: int) -> tuple[list[int], list[int]]:
    """Returns (training goals, unseen goals), in the published order for seed 0."""
    cells = list(range(NUM_CELLS))
    random.Random(split_seed).shuffle(cells)
    return cells[:-NUM_UNSEEN], cells[-NUM_UNSEEN:]


def best_return(goal: int) -> int:
    """Returns the highest return of an episode: the shortest way to the goal, then staying."""
    (row, column), (r, c) = place_of(goal), place_of(START)
    return min(EPISODE, EPISODE + 1 - abs(row - r) - abs(column - c))


def random_return(goal: int) -> float:
    """Returns the expected return of an episode in which all actions are equally likely."""
    at = np.zeros(NUM_CELLS)
    at[START] = 1.0
    total = 0.0
    for _ in range(EPISODE):
        after = np.zeros(NUM_CELLS)
        np.add.at(after, NEXT.numpy().ravel(), np.repeat(at / len(MOVES), len(MOVES)))
        at, total = after, total + after[goal]
    return float(total)


def name_of(goal: int) -> str:
    """Returns 'row,column', the name of a goal in files and tables."""
    return "{},{}".format(*place_of(goal))


def reference_returns(goals: Sequence[int]) -> dict[str, dict[str, float]]:
    """Returns what random actions and the best ones get for each goal."""
    return {
        "random": {name_of(goal): random_return(goal) for goal in goals},
        "best": {name_of(goal): best_return(goal) for goal in goals},
    }


class Rooms:
    """A room for each goal, all stepped together. All tensors are (rooms,)."""

    def __init__(self, goals: Sequence[int] | torch.Tensor, device: torch.device | None = None):
        self.goals = torch.as_tensor(goals, device=device)
        self.next = NEXT.to(self.goals.device)
        self.reset()

    def reset(self) -> torch.Tensor:
        """Begins an episode and returns the cells in which it begins."""
        self.cells = torch.full_like(self.goals, START)
        self.num_steps = 0
        return self.cells

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Returns (cells, rewards, whether the episode is over).

        After the last step the cells are those that were reached, not those of a reset.
        """
        assert self.num_steps < EPISODE, "the episode is over: reset"
        self.num_steps += 1
        self.cells = self.next[self.cells, actions]
        return self.cells, self.cells == self.goals, self.num_steps == EPISODE


class Darkroom(gymnasium.Env[np.ndarray, np.int64]):
    """One room for Gymnasium.

    Its last step is part of the task, so an episode is `terminated`, not `truncated`: no value is
    estimated after it.
    """

    def __init__(self, goal: tuple[int, int]):
        self.observation_space = gymnasium.spaces.Box(0, SIZE - 1, (2,), np.int64)
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))
        self.rooms = Rooms([cell_of(*goal)])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(self.rooms.reset()), {}

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        cells, rewards, over = self.rooms.step(torch.tensor([int(action)]))
        return self._observation(cells), float(rewards), over, False, {}

    def _observation(self, cells: torch.Tensor) -> np.ndarray:
        return np.array(place_of(int(cells)))
