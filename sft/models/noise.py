"""NEFTune: uniform noise on the embeddings of a training pass (Jain et al. 2023).

The noise is a function of (seed, step, example, position in the example, feature): a hash of these
numbers in integers. So it is the same for any cut, layout, number of processes and device, and a
resumed run draws it again. It is scaled by alpha / sqrt(L * d), where L is the length of the
example itself and not that of a padded row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sft.errors import ModelError
from sft.models.layers import embedding_layers

FACTORS = 0x7FEB352D, 0x846CA68B - 2**32  # of the hash "lowbias32" (C. Wellons, 2018)
GOLDEN = 0x1E3779B9  # odd: products with it are distinct for all features
BLOCK = 2**22  # elements that are hashed at once


def mix(bits: torch.Tensor) -> torch.Tensor:
    """Hashes int32 numbers in place: each bit of the result depends on all bits."""
    for shift, factor in ((16, FACTORS[0]), (15, FACTORS[1]), (16, 1)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << 32 - shift) - 1))
        bits.mul_(factor)
    return bits


def token_keys(
    seed: int, step: int, examples: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two hashes (tokens,) of each token, as int32, which together name it."""
    keys = []
    for word in (1, 2):
        key = torch.full_like(examples, word, dtype=torch.int32)
        for number in (seed, step, examples, positions):
            key = mix(key.bitwise_xor_(_to_int32(number)).add_(word))
        keys.append(key)
    return keys[0], keys[1]


def _to_int32(number: int | torch.Tensor) -> int | torch.Tensor:
    """Returns the lower 32 bits, with their sign."""
    if isinstance(number, torch.Tensor):
        return number.to(torch.int32)
    return (number + 2**31) % 2**32 - 2**31


def uniform(keys: tuple[torch.Tensor, torch.Tensor], number: int) -> torch.Tensor:
    """Returns (tokens, number) in fp32, uniform in [-1, 1), of the tokens with these keys."""
    first, second = keys
    features = torch.arange(number, dtype=torch.int32, device=first.device) * GOLDEN
    numbers = first[:, None] + features
    mix(mix(numbers).bitwise_xor_(second[:, None]))
    return (numbers >> 8).float().mul_(2.0**-23)


class EmbeddingNoise:
    """A hook on the embeddings of tokens that adds noise in the passes within `on`."""

    def __init__(self, model: nn.Module, alpha: float, seed: int):
        layer = embedding_layers(model)[0]
        if layer is None:
            raise ModelError(
                "train.neftune_alpha: the model does not say which layer embeds its tokens "
                "(get_input_embeddings); set 0"
            )
        self.alpha, self.seed, self.step = alpha, seed, 0
        self._pass: _Tokens | None = None
        layer.register_forward_hook(self._add)

    @contextmanager
    def on(
        self,
        shape: torch.Size,
        places: torch.Tensor,
        examples: Sequence[int],
        lengths: Sequence[int],
    ) -> Iterator[None]:
        """Adds noise in the pass within this context.

        `shape`: (rows, time) of its token ids. `places`: flat indices of the tokens of `examples`,
        which have these `lengths`, one example after the other.
        """
        self._pass = _Tokens(shape, places, examples, lengths)
        try:
            yield
            if not self._pass.is_noisy:
                raise ModelError(
                    "train.neftune_alpha: the model does not embed its tokens with the layer that "
                    "it names (get_input_embeddings), so they get no noise; set 0"
                )
        finally:
            self._pass = None

    def _add(self, _: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        tokens = self._pass
        if tokens is None or embedded.shape[1:-1] != tokens.shape[1:]:
            return None
        tokens.is_noisy = True
        copies = len(embedded) // tokens.shape[0]  # models that share a pass get the same noise
        noise = self._noise(tokens, embedded.shape[-1], embedded.dtype)
        return embedded + noise.view(*tokens.shape, -1).repeat(copies, 1, 1)

    def _noise(self, tokens: _Tokens, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns noise (rows * time, width), 0 for padding."""
        device = tokens.places.device
        noise = torch.zeros(math.prod(tokens.shape), width, dtype=dtype, device=device)
        lengths = torch.tensor(tokens.lengths, dtype=torch.long, device=device)
        owner = torch.repeat_interleave(lengths, output_size=len(tokens.places))
        starts = lengths.cumsum(0) - lengths
        positions = torch.arange(len(owner), device=device) - starts[owner]
        examples = torch.tensor(tokens.examples, dtype=torch.long, device=device)[owner]
        keys = token_keys(self.seed, self.step, examples, positions)
        scales = [self.alpha / math.sqrt(n * width) for n in tokens.lengths]
        scale = torch.tensor(scales, dtype=torch.float32, device=device)[owner]
        rows = max(1, BLOCK // width)
        for start in range(0, len(owner), rows):
            part = slice(start, start + rows)
            drawn = uniform((keys[0][part], keys[1][part]), width) * scale[part, None]
            noise[tokens.places[part]] = drawn.to(dtype)
        return noise


class _Tokens:
    """The tokens of a pass that get noise; arguments as of `EmbeddingNoise.on`."""

    def __init__(
        self,
        shape: torch.Size,
        places: torch.Tensor,
        examples: Sequence[int],
        lengths: Sequence[int],
    ):
        self.shape, self.places, self.examples, self.lengths = shape, places, examples, lengths
        self.is_noisy = not len(places)  # without tokens there is nothing to add
