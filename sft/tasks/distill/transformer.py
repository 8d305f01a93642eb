"""A causal transformer over transitions, which predicts the next action at each of them.

A token holds the transition before it (cell, action, reward, next cell) and the cell whose action
is asked: the published transition token and query token in one. So a single causal pass over a
window predicts the action after any number of transitions, from none to all but the last one, and
the model learns to begin with an empty history. Cells are coordinates, not names, so an unseen goal
lies between seen ones.

With `compress` two more tokens mark where a region of the history begins and ends, and a second
head predicts after each step whether the region ends there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from sft.tasks.distill.config import Distill
from sft.tasks.distill.grid import MOVES, NUM_CELLS, SIZE, place_of
from sft.tasks.distill.source import Histories

# The features of a token, in this order: cell, action, reward and next cell of the transition;
# whether there is none; the present cell; whether it marks the beginning of a region, or its end.
NUM_BEFORE = 2 + len(MOVES) + 1 + 2  # features of the transition
NONE = NUM_BEFORE  # place of the feature
BEGIN, END = NUM_BEFORE + 3, NUM_BEFORE + 4  # places of these features
NUM_FEATURES = NUM_BEFORE + 5
GOES_ON, ENDS = 0, 1  # token types: whether the region ends after a step
COORDINATES = (torch.tensor([place_of(cell) for cell in range(NUM_CELLS)]) - (SIZE - 1) / 2) / (
    (SIZE - 1) / 2
)  # (cells, 2), from -1 to 1


def features(now: torch.Tensor, before: Histories) -> torch.Tensor:
    """Returns tokens (..., NUM_FEATURES) of steps in cells `now` after transitions `before`."""
    place = COORDINATES.to(now.device)
    action = F.one_hot(before.actions.long(), len(MOVES))
    reward = before.rewards[..., None]
    rest = torch.zeros(*now.shape, NUM_FEATURES - NUM_BEFORE, device=now.device)
    rest[..., 1:3] = place[now.long()]
    parts = (place[before.cells.long()], action, reward, place[before.next_cells.long()], rest)
    return torch.cat(parts, -1)


def without_past(tokens: torch.Tensor) -> torch.Tensor:
    """Returns the tokens without the transition before them, as at the beginning of a history."""
    result = tokens.clone()
    result[..., :NUM_BEFORE] = 0.0
    result[..., NONE] = 1.0
    return result


def mark(kind: int, like: torch.Tensor) -> torch.Tensor:
    """Returns a token of the mark `kind` (BEGIN or END) for each of `like` (..., NUM_FEATURES)."""
    result = torch.zeros_like(like)
    result[..., kind] = 1.0
    return result


def window_tokens(window: Histories) -> torch.Tensor:
    """Returns tokens (windows, steps, NUM_FEATURES) of windows that begin with an episode."""
    before = Histories(*(each.roll(1, -1) for each in window))
    tokens = features(window.cells, before)
    return torch.cat([without_past(tokens[:, :1]), tokens[:, 1:]], 1)


def with_marks(tokens: torch.Tensor) -> torch.Tensor:
    """Returns tokens of two regions, each half of `tokens`: begin, steps, end, begin, steps."""
    first, second = tokens.chunk(2, 1)
    begin, end = (mark(kind, tokens[:, :1]) for kind in (BEGIN, END))
    return torch.cat([begin, first, end, begin, second], 1)


def num_positions(settings: Distill) -> int:
    """Returns the maximum number of tokens in a window."""
    return settings.context + 3 * settings.compress


class Cache:
    """Keys and values of earlier tokens: (rows, positions, heads, size) for each block."""

    def __init__(self, model: Transformer, rows: int, device: torch.device):
        settings = model.settings
        heads, width = settings.num_heads, settings.width
        shape = (2, rows, num_positions(settings), heads, width // heads)
        self.blocks = [torch.zeros(shape, device=device) for _ in range(settings.num_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: torch.Tensor,
        kept: torch.Tensor | None,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attends in x (rows, tokens, width) and adds its keys and values to those of `kept`."""
        query, key, value = self.into(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if kept is not None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            kept[0][rows, positions], kept[1][rows, positions] = key.float(), value.float()
            seen = mask.shape[-1] if mask is not None else int(positions.max()) + 1
            key, value = (each[:, :seen].to(query.dtype) for each in kept)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        causal = mask is None
        if x.shape[1] == 1:  # a branch, since the compiler accepts no symbol as a flag
            causal = False
        found = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return self.out(found.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        kept: torch.Tensor | None,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        attended = self.attention(self.attention_norm(x), kept, positions, mask)
        x = x + self.dropout(attended)
        return x + self.dropout(self.layers(self.norm(x)))


class Transformer(nn.Module):
    def __init__(self, settings: Distill):
        super().__init__()
        self.settings = settings
        width, depth = settings.width, settings.num_layers
        self.embedding = nn.Linear(NUM_FEATURES, width)
        self.positions = nn.Parameter(torch.empty(num_positions(settings), width))
        self.blocks = nn.ModuleList(
            Block(width, settings.num_heads, settings.dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.action = nn.Linear(width, len(MOVES))
        self.kind = nn.Linear(width, 2) if settings.compress else None
        self._initialise()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the layer that embeds tokens; the name is that of transformers."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head of actions."""
        return self.action

    @torch.no_grad()
    def _initialise(self) -> None:
        """Makes each block add little at first, and all actions equally likely."""
        nn.init.normal_(self.positions, std=0.02)
        residual = 1 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                nn.init.normal_(parameter, std=1 / math.sqrt(self.settings.width))
                if name.endswith(("out.weight", "layers.2.weight")):
                    parameter.mul_(residual)
        nn.init.normal_(self.action.weight, std=0.02)

    def forward(
        self, tokens: torch.Tensor, cache: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns logits of (actions, token types) for tokens (rows, tokens, NUM_FEATURES).

        With a cache the tokens follow those of each row in it, and are added to it.
        """
        number = tokens.shape[1]
        positions = torch.arange(number, device=tokens.device)[None]
        mask = None
        if cache is not None:
            positions = positions + cache.lengths[:, None]
            mask = _mask(positions)
        x = self.embedding(tokens) + self.positions[positions]
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.blocks[i], positions, mask)
        if cache is not None:
            cache.lengths = cache.lengths + number
        x = self.norm(x)
        return self.action(x), None if self.kind is None else self.kind(x)


def _mask(positions: torch.Tensor) -> torch.Tensor | None:
    """Returns (rows, 1, tokens, keys): the keys that each token attends to.

    None if every token attends to all keys, or if the order is causal from an empty cache.
    """
    same = bool((positions == positions[:1]).all())
    if same and (positions.shape[1] == 1 or int(positions[0, 0]) == 0):
        return None
    keys = torch.arange(int(positions.max()) + 1, device=positions.device)
    return (keys <= positions[..., None])[:, None]
