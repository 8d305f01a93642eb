"""Worlds on a grid in which something is hidden, found by the reward alone.

All have 9 x 9 cells, a start in the middle, five moves clipped to the grid, and episodes of a fixed
number of steps. A cell is a number, 9 x row + column, so a step is two look-ups, for one room or
for thousands. What is hidden, and what is rewarded, is up to each `World`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch

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


class World(ABC):
    """A family of tasks on the grid, one for each goal: a number below `num_goals`.

    An episode begins in stage 0. The stage is what a room knows and an agent does not see, such as
    whether a key was found.
    """

    num_goals: ClassVar[int]
    num_trained: ClassVar[int]  # goals that a source learns
    num_stages: ClassVar[int] = 1

    def __init__(self, episode: int):
        self.episode = episode  # steps

    @abstractmethod
    def arrive(
        self, goals: torch.Tensor, stages: torch.Tensor, cells: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (rewards, next stages) of steps that end in `cells`; all of one shape."""

    @abstractmethod
    def name_of(self, goal: int) -> str:
        """Returns the name of a goal in files and tables: numbers with commas between."""

    def split_goals(self, split_seed: int) -> tuple[list[int], list[int]]:
        """Returns (training goals, unseen goals), in the published order for seed 0."""
        goals = list(range(self.num_goals))
        random.Random(split_seed).shuffle(goals)
        return goals[: self.num_trained], goals[-NUM_UNSEEN:]

    def best_return(self, goal: int) -> float:
        """Returns the highest return of an episode, by a search through all states."""
        return self._value(goal, lambda values: values.amax(-1))

    def random_return(self, goal: int) -> float:
        """Returns the expected return of an episode in which all actions are equally likely."""
        return self._value(goal, lambda values: values.mean(-1))

    def _value(self, goal: int, choose: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Returns the value of the start, by dynamic programming from the last step backwards.

        `choose` makes the value of a state of those of its actions (stages, cells, actions).
        """
        stages = torch.arange(self.num_stages)[:, None, None].expand(-1, *NEXT.shape)
        after = NEXT.expand_as(stages)
        rewards, later = self.arrive(torch.full_like(after, goal), stages, after)
        values = torch.zeros(self.num_stages, NUM_CELLS, dtype=torch.float64)
        for _ in range(self.episode):
            values = choose(rewards + values[later, after])
        return float(values[0, START])

    def reference_returns(self, goals: Sequence[int]) -> dict[str, dict[str, float]]:
        """Returns what random actions and the best ones get for each goal."""
        return {
            "random": {self.name_of(goal): self.random_return(goal) for goal in goals},
            "best": {self.name_of(goal): self.best_return(goal) for goal in goals},
        }


class Rooms:
    """A room for each goal, all stepped together. All tensors are (rooms,), or of any shape."""

    def __init__(
        self, world: World, goals: Sequence[int] | torch.Tensor, device: torch.device | None = None
    ):
        self.world, self.goals = world, torch.as_tensor(goals, device=device)
        self.next = NEXT.to(self.goals.device)
        self.reset()

    def reset(self) -> torch.Tensor:
        """Begins an episode and returns the cells in which it begins."""
        self.cells = torch.full_like(self.goals, START)
        self.stages = torch.zeros_like(self.goals)
        self.num_steps = 0
        return self.cells

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Returns (cells, rewards, whether the episode is over).

        After the last step the cells are those that were reached, not those of a reset.
        """
        assert self.num_steps < self.world.episode, "the episode is over: reset"
        self.num_steps += 1
        self.cells = self.next[self.cells, actions]
        rewards, self.stages = self.world.arrive(self.goals, self.stages, self.cells)
        return self.cells, rewards, self.num_steps == self.world.episode


class Room(gymnasium.Env[np.ndarray, np.int64]):
    """One room for Gymnasium.

    Its last step is part of the task, so an episode is `terminated`, not `truncated`: no value is
    estimated after it.
    """

    def __init__(self, world: World, goal: int):
        self.observation_space = gymnasium.spaces.Box(0, SIZE - 1, (2,), np.int64)
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))
        self.rooms = Rooms(world, [goal])

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
