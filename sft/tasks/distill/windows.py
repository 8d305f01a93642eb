"""Windows of histories: those that are trained on, those that are held out, and their sizes.

A window has episodes of one goal, in the order in which the source learnt. Each comes from any
stream, because one policy acts in every stream. A window begins with some of the first episodes, in
which the source walks at random. For each, several streams are drawn, and the window takes the one
that visits most new cells. So the model learns to search. When an episode has found the goal, or
earlier, the window jumps to late episodes. So the model learns to use its first reward at once. The
episodes between are left out: there the source moves to a goal that only other streams have found,
which the model cannot know. The choice of episodes is a function of the window's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sft.tasks.base import Workload
from sft.tasks.distill.config import Distill
from sft.tasks.distill.grid import NUM_CELLS
from sft.tasks.distill.source import Histories
from sft.tasks.distill.transformer import num_positions
from sft.tasks.distill.worlds import world_of


@dataclass(frozen=True)
class Windows:
    """Numbered windows of the streams [first, last) of all goals: as many as their episodes."""

    histories: Histories
    settings: Distill
    first: int
    last: int

    def __len__(self) -> int:
        return self.num_goals * (self.last - self.first) * self.num_episodes

    @property
    def num_goals(self) -> int:
        return len(self.histories.cells)

    @property
    def num_episodes(self) -> int:
        """Returns the number of episodes of a history."""
        return self.settings.num_steps // self.settings.episode

    @cached_property
    def _episodes(self) -> Histories:
        """Returns the histories as (goals, streams, episodes, steps)."""
        steps = self.settings.episode
        return Histories(*(each.unflatten(-1, (-1, steps)) for each in self.histories))

    @cached_property
    def _rewarded(self) -> np.ndarray:
        """Returns whether the goal was found, (goals, own streams, episodes)."""
        returns = self.histories.returns(self.settings.episode)
        return (returns[:, self.first : self.last] > 0).numpy()

    @cached_property
    def _visited(self) -> np.ndarray:
        """Returns whether an episode visits a cell, (goals, own streams, first episodes, cells)."""
        searching = self.settings.search_episodes
        reached = self._episodes.next_cells[:, self.first : self.last, :searching].long()
        visited = torch.zeros(*reached.shape[:-1], NUM_CELLS, dtype=torch.bool)
        return visited.scatter_(-1, reached, True).numpy()

    def choose(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Returns (goal, streams, episodes) of a window."""
        random = np.random.default_rng([self.settings.source_seed, number])
        goal, size = number % self.num_goals, self.settings.context // self.settings.episode
        streams = random.integers(self.first, self.last, size)
        limit = random.integers(2 * size)  # of early episodes; in half of the windows there is none
        early = np.sort(random.integers(self.settings.search_episodes, size=size))[:limit]
        found = self._search(random, goal, early)
        streams[: len(found)] = found
        later = random.integers(self.settings.jump_to, self.num_episodes, size - len(found))
        return goal, streams, np.concatenate([early[: len(found)], np.sort(later)])

    def _search(self, random: np.random.Generator, goal: int, episodes: np.ndarray) -> list[int]:
        """Returns streams for these episodes, up to the first that finds the goal.

        For each episode some streams are drawn; the one that visits most new cells is taken.
        """
        streams: list[int] = []
        seen = np.zeros(NUM_CELLS, dtype=bool)
        for episode in episodes:
            drawn = random.integers(self.last - self.first, size=self.settings.search_best_of)
            visited = self._visited[goal, drawn, episode]
            best = int((visited & ~seen).sum(-1).argmax())
            seen |= visited[best]
            streams.append(self.first + int(drawn[best]))
            if self._rewarded[goal, drawn[best], episode]:
                break
        return streams

    def gather(self, numbers: Sequence[int]) -> Histories:
        """Returns the histories (windows, context) of these windows."""
        chosen = [self.choose(number) for number in numbers]
        goal = torch.tensor([goal for goal, _, _ in chosen], dtype=torch.long)[:, None]
        size = self.settings.context // self.settings.episode
        stream, episode = (
            torch.from_numpy(np.array([c[i] for c in chosen]).reshape(-1, size)).long()
            for i in (1, 2)
        )
        return Histories(*(each[goal, stream, episode].flatten(1) for each in self._episodes))


def split(found: Histories, settings: Distill) -> tuple[Windows, Windows]:
    """Returns the training windows, and those of the held-out streams."""
    first = settings.num_streams - settings.held_out_streams
    train, held_out = (0, first), (first, settings.num_streams)
    return Windows(found, settings, *train), Windows(found, settings, *held_out)


def blank_histories(settings: Distill) -> Histories:
    """Returns zeros for uses in which only sizes matter; all share one place in memory."""
    number = world_of(settings.world).num_trained
    shape = (number, settings.num_streams, settings.num_steps)
    return Histories(*[torch.zeros(1, 1, 1, dtype=torch.uint8).expand(shape)] * 4)


def num_bytes(settings: Distill) -> int:
    """Returns the bytes of all histories, and of the rewards and visits that select windows."""
    number = world_of(settings.world).num_trained * settings.num_streams
    rewarded, visited = settings.num_steps // settings.episode, settings.search_episodes * NUM_CELLS
    return number * (4 * settings.num_steps + rewarded + visited)


def workload(found: Histories, settings: Distill) -> Workload:
    """Returns the sizes of all windows of these histories, of which only the shape is read."""
    train, held_out = split(found, settings)

    def sizes(number: int, rest: Workload | None = None) -> Workload:
        supervised = np.full(number, settings.context)
        return Workload([num_positions(settings)] * number, supervised, rest)

    # The loss is measured on one held-out window for each goal and stream.
    return sizes(len(train), sizes(len(held_out) // held_out.num_episodes))
