"""Plays rooms with a model that learns in context: its weights stay, its history grows.

All rows (a goal and a seed each) are played together with a cache of keys and values. If the
context is full, the oldest episodes are dropped and the rest is encoded again. So the model always
sees a window as in training, and the cache equals a new encoding of that window. With `compress`
the model decides when the older of two regions is dropped.

The random numbers of a row depend only on its goal and seed, for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sft.tasks.distill.config import EPISODE, Distill
from sft.tasks.distill.darkroom import Rooms
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

Row = tuple[int, int]  # goal, seed


@dataclass
class Context:
    """The history of each row: its tokens, their number, and their keys and values."""

    model: Transformer
    tokens: torch.Tensor  # (rows, positions, features)
    cached: bool
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = Cache(self.model, len(self.tokens), self.tokens.device)

    @property
    def lengths(self) -> torch.Tensor:
        return self.cache.lengths

    def add(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Adds a token (rows, features) to each row and returns the model's outputs for it."""
        rows, at = torch.arange(len(token), device=token.device), self.lengths
        self.tokens[rows, at] = token
        if not self.cached:
            return self._encode_all(at)
        actions, types = self.model(token[:, None], self.cache)
        return actions[:, 0], None if types is None else types[:, 0]

    def _encode_all(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the outputs for the last token by encoding all tokens, without the cache."""
        actions, types = self.model(self.tokens[:, : int(at.max()) + 1])
        rows = torch.arange(len(at), device=at.device)
        self.cache.lengths = at + 1
        return actions[rows, at], None if types is None else types[rows, at]

    def replace(self, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """Replaces the history by the first `lengths` of `tokens` (rows, tokens, features)."""
        self.tokens[:, : tokens.shape[1]] = tokens
        self.cache.lengths = torch.zeros_like(lengths)
        if self.cached and tokens.shape[1]:
            self.model(tokens, self.cache)
        self.cache.lengths = lengths


def dropped(settings: Distill) -> int:
    """Returns the number of oldest steps that are dropped when the context is full."""
    return EPISODE * (settings.slide or max(1, settings.context // EPISODE // 2))


def bytes_per_row(settings: Distill) -> int:
    """Returns the bytes of a row beside the weights.

    They hold its random numbers, cache and tokens. While its history is encoded again, there are
    also a copy of the tokens and one block: the stream twice, the result of attention, its norm,
    and the inner layer twice.
    """
    width, positions = settings.width, num_positions(settings)
    stay = positions if settings.compress else positions - dropped(settings)
    held = positions * (2 * width * settings.num_layers + NUM_FEATURES)
    held += settings.eval_episodes * EPISODE
    return 4 * (held + max(1, stay) * (12 * width + 4 * NUM_FEATURES))


@dataclass(frozen=True)
class Played:
    returns: torch.Tensor
    """(rows, episodes)"""
    regions: list[int]
    """Steps of each region that the model has ended itself (`compress`), over all rows."""
    num_forced: int
    """The number of regions that were full before the model ended them."""


@torch.no_grad()
def play(
    model: Transformer,
    rows: Sequence[Row],
    num_episodes: int,
    *,
    cached: bool = True,
    between: Callable[[], None] = lambda: None,
) -> Played:
    """Plays each row's goal for so many episodes from an empty history.

    `between` is called after each episode. Not `cached`: every step encodes the whole window.
    """
    settings = model.settings
    device = next(model.parameters()).device
    drawn = _uniform(rows, num_episodes * EPISODE).to(device)
    rooms = Rooms([goal for goal, _ in rows], device)
    empty = torch.zeros(len(rows), num_positions(settings), NUM_FEATURES, device=device)
    context = Context(model, empty, cached)
    memory = _Regions(context) if settings.compress else _Sliding(context, settings)
    before: Histories | None = None
    returns = []
    for episode in range(num_episodes):
        now, total = rooms.reset(), torch.zeros(len(rows), device=device)
        memory.begin_episode()
        for step in range(EPISODE):
            token = without_past(empty[:, 0]) if before is None else features(now, before)
            actions, types = context.add(token)
            action = _draw(actions, drawn[:, episode * EPISODE + step])
            cell, (now, reward, _) = now, rooms.step(action)
            before = Histories(cell, action, reward, now)
            total += reward
            memory.after_step(types)
        returns.append(total)
        between()
    return Played(torch.stack(returns, 1).cpu(), memory.regions, memory.num_forced)


def _uniform(rows: Sequence[Row], number: int) -> torch.Tensor:
    """Returns (rows, number) random numbers from 0 to 1, a function of each row."""
    drawn = []
    for goal, seed in rows:
        generator = torch.Generator().manual_seed(seed * 100 + goal)
        drawn.append(torch.rand(number, generator=generator))
    return torch.stack(drawn)


def _draw(logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Returns actions (rows,) from the softmax of `logits`; `drawn`: numbers from 0 to 1."""
    upto = logits.float().softmax(-1).cumsum(-1)
    return (upto < drawn[:, None] * upto[:, -1:]).sum(-1)


class _Sliding:
    """A context of the newest episodes; the oldest are dropped when it is full."""

    def __init__(self, context: Context, settings: Distill):
        self.context, self.most, self.dropped = context, settings.context, dropped(settings)
        self.regions, self.num_forced = list[int](), 0  # there are none

    def begin_episode(self) -> None:
        context = self.context
        if int(context.lengths[0]) == self.most:  # as all rows are
            kept = context.tokens[:, self.dropped : self.most].clone()
            if kept.shape[1]:
                kept[:, 0] = without_past(kept[:, 0])
            context.replace(kept, context.lengths - self.dropped)

    def after_step(self, types: torch.Tensor | None) -> None: ...


class _Regions:
    """A context of up to two regions; the older is dropped when the model ends the newer."""

    def __init__(self, context: Context):
        self.context = context
        self.size = context.model.settings.context // 2
        self.starts = torch.zeros_like(context.lengths)  # of the present region: its begin mark
        self.regions, self.num_forced = list[int](), 0
        context.add(mark(BEGIN, context.tokens[:, 0]))

    def begin_episode(self) -> None: ...

    def after_step(self, types: torch.Tensor | None) -> None:
        assert types is not None
        steps = self.context.lengths - self.starts - 1
        chosen, full = types.argmax(-1) == ENDS, steps >= self.size
        ends = chosen | full
        if not ends.any():
            return
        self.regions += steps[chosen].tolist()
        self.num_forced += int((full & ~chosen).sum())
        lengths = self.context.lengths.clone()
        tokens = self.context.tokens.clone()
        for row in ends.nonzero()[:, 0].tolist():
            start, end = int(self.starts[row]), int(lengths[row])
            kept = self.context.tokens[row, start:end].clone()
            kept[1] = without_past(kept[1])
            marks = [mark(kind, kept[:1]) for kind in (END, BEGIN)]
            whole = torch.cat([kept, *marks])
            tokens[row, : len(whole)] = whole
            lengths[row], self.starts[row] = len(whole), len(whole) - 1
        self.context.replace(tokens[:, : int(lengths.max())], lengths)
