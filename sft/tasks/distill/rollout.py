"""Plays rooms with a model that learns in context: its weights stay, its history grows.

All attempts are played together, each a row of one batch, with a cache of keys and values. If the
context is full, the oldest episodes are dropped and the rest is encoded again. So the model always
sees a window as in training, and the cache equals a new encoding of that window. With `compress`
the model decides when the older of two regions is dropped.

The random numbers of an attempt depend only on its goal and seed, for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft.tasks.distill.config import Distill
from sft.tasks.distill.grid import Rooms, World
from sft.tasks.distill.source import Histories
from sft.tasks.distill.transformer import (
    BEGIN,
    END,
    ENDS,
    NUM_FEATURES,
    Cache,
    Transformer,
    features,
    mark,
    num_positions,
    without_past,
)
from sft.tasks.distill.worlds import world_of

Attempt = tuple[int, int]  # goal, seed


class History:
    """The tokens in the context of each attempt, with their keys and values."""

    def __init__(self, model: Transformer, rows: int, device: torch.device, cached: bool):
        self.model, self.settings, self.cached = model, model.settings, cached
        shape = (rows, num_positions(self.settings), NUM_FEATURES)
        self.tokens = torch.zeros(shape, device=device)
        self.cache = Cache(model, rows, device)
        self.regions, self.num_forced = list[int](), 0  # as in `Played`

    @property
    def lengths(self) -> torch.Tensor:
        return self.cache.lengths

    def add(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Adds a token (rows, features) to each row and returns the model's outputs for it."""
        rows, at = torch.arange(len(token), device=token.device), self.lengths
        self.tokens[rows, at] = token
        if self.cached:
            actions, types = self.model(token[:, None], self.cache)
            return actions[:, 0], None if types is None else types[:, 0]
        actions, types = self.model(self.tokens[:, : int(at.max()) + 1])
        self.cache.lengths = at + 1
        return actions[rows, at], None if types is None else types[rows, at]

    def replace(self, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """Replaces the history by the first `lengths` of `tokens` (rows, tokens, features)."""
        self.tokens[:, : tokens.shape[1]] = tokens
        self.cache.lengths = torch.zeros_like(lengths)
        if self.cached and tokens.shape[1]:
            self.model(tokens, self.cache)
        self.cache.lengths = lengths

    def begin_episode(self) -> None:
        """Makes room for an episode."""

    def after_step(self, types: torch.Tensor | None) -> None:
        """Receives the logits of token types that the model gave for the step."""


class Sliding(History):
    """A history of the newest episodes; the oldest are dropped when the context is full."""

    def begin_episode(self) -> None:
        most, dropped = self.settings.context, num_dropped(self.settings)
        if int(self.lengths[0]) == most:  # as in all rows
            kept = self.tokens[:, dropped:most].clone()
            if kept.shape[1]:
                kept[:, 0] = without_past(kept[:, 0])
            self.replace(kept, self.lengths - dropped)


class Regions(History):
    """A history of up to two regions; the older is dropped when the model ends the newer."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.starts = torch.zeros_like(self.lengths)  # places of the newer regions' begin marks
        self.add(mark(BEGIN, self.tokens[:, 0]))

    def after_step(self, types: torch.Tensor | None) -> None:
        assert types is not None
        steps = self.lengths - self.starts - 1
        chosen, full = types.argmax(-1) == ENDS, steps >= self.settings.context // 2
        ends = chosen | full
        if not ends.any():
            return
        self.regions += steps[chosen].tolist()
        self.num_forced += int((full & ~chosen).sum())
        lengths, tokens = self.lengths.clone(), self.tokens.clone()
        for row in ends.nonzero()[:, 0].tolist():
            kept = self.tokens[row, int(self.starts[row]) : int(lengths[row])].clone()
            kept[1] = without_past(kept[1])
            whole = torch.cat([kept, *(mark(kind, kept[:1]) for kind in (END, BEGIN))])
            tokens[row, : len(whole)] = whole
            lengths[row], self.starts[row] = len(whole), len(whole) - 1
        self.replace(tokens[:, : int(lengths.max())], lengths)


def num_dropped(settings: Distill) -> int:
    """Returns the number of oldest steps that are dropped when the context is full."""
    steps = settings.episode
    return steps * (settings.slide or max(1, settings.context // steps // 2))


def bytes_per_attempt(settings: Distill) -> int:
    """Returns the bytes of an attempt beside the weights.

    They hold its random numbers, its cache and its tokens. While its history is encoded again, they
    also hold a copy of the tokens and one block's tensors: the residual stream twice, the result of
    attention, its norm, and the inner layer twice.
    """
    width, positions = settings.width, num_positions(settings)
    stay = positions if settings.compress else positions - num_dropped(settings)
    held = positions * (2 * width * settings.num_layers + NUM_FEATURES)
    held += settings.eval_episodes * settings.episode
    return 4 * (held + max(1, stay) * (12 * width + 4 * NUM_FEATURES))


@dataclass(frozen=True)
class Played:
    """What happened in all attempts."""

    returns: torch.Tensor  # (attempts, episodes)
    regions: list[int]  # steps of each region that the model has ended itself (`compress`)
    num_forced: int  # regions that were full before the model ended them


@torch.no_grad()
def play(
    model: Transformer,
    attempts: Sequence[Attempt],
    num_episodes: int,
    *,
    cached: bool = True,
    after_episode: Callable[[], None] = lambda: None,
) -> Played:
    """Plays so many episodes of each attempt, which begins with an empty history.

    Not `cached`: every step encodes the whole window.
    """
    device, rows = next(model.parameters()).device, len(attempts)
    world, steps = world_of(model.settings.world), model.settings.episode
    drawn = _uniform(world, attempts, num_episodes * steps).to(device)
    rooms = Rooms(world, [goal for goal, _ in attempts], device)
    kind = Regions if model.settings.compress else Sliding
    history = kind(model, rows, device, cached)
    first = without_past(torch.zeros(rows, NUM_FEATURES, device=device))
    before: Histories | None = None
    returns = []
    for episode in range(num_episodes):
        now, total = rooms.reset(), torch.zeros(rows, device=device)
        history.begin_episode()
        for step in range(steps):
            token = first if before is None else features(now, before)
            actions, types = history.add(token)
            action = _draw(actions, drawn[:, episode * steps + step])
            cell, (now, reward, _) = now, rooms.step(action)
            before = Histories(cell, action, reward, now)
            total += reward
            history.after_step(types)
        returns.append(total)
        after_episode()
    return Played(torch.stack(returns, 1).cpu(), history.regions, history.num_forced)


def _uniform(world: World, attempts: Sequence[Attempt], number: int) -> torch.Tensor:
    """Returns (attempts, number) random numbers from 0 to 1, a function of each attempt."""
    drawn = []
    for goal, seed in attempts:
        own = seed * max(100, world.num_goals) + goal
        generator = torch.Generator().manual_seed(own)
        drawn.append(torch.rand(number, generator=generator))
    return torch.stack(drawn)


def _draw(logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Returns actions (rows,) from the softmax of `logits`; `drawn`: numbers from 0 to 1."""
    upto = logits.float().softmax(-1).cumsum(-1)
    return (upto < drawn[:, None] * upto[:, -1:]).sum(-1)
