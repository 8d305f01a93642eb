"""What every task has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sft.config.schema import Config, Distill
from sft.data.cache import Prepared
from sft.errors import ConfigError
from sft.tasks.distill.task import blank_histories, num_held_out, split
from sft.tasks.distill.transformer import num_positions
from sft.tasks.registry import traits
from sft.train.task import Task

Row = tuple[int, int]  # tokens of an example, and those of them that the loss sees


@dataclass(frozen=True)
class Words:
    """How a plan of the task is told."""

    examples: str = "examples"
    each: str = ""  # what one is
    items: str = "supervised"  # tokens that the loss is of
    answers: str = "answering held-out prompts"
    fewer: str = "evaluation.batch_size"  # the key that makes these take less
    shorter: str = "shorter held-out rows"  # what makes the held-out loss take less


@dataclass(frozen=True)
class Traits:
    """Of a configuration, beside `train`: what memory and time depend on."""

    text: Any  # sizes of the model, by their names in configurations of transformers
    cache: Path  # what outlives a run
    mode: str = "full"  # as `tuning.mode`
    agents: int = 1  # how often each token goes through the model
    layer: int = -1  # that the crowd looks at
    surveys: bool = False  # a pass more (engine.Task)
    attention: str = "auto"  # as `model.attn_implementation`
    vocabulary: int = 0  # of the tokenizer that is saved
    small: bool = False  # its layers: nothing is gained by tracing few of them or by checkpointing
    examples_bytes: int = 0  # of all that are trained on, where the RAM of each process has them
    waiting_bytes: int = 0  # of a token in a micro-batch that is collated and has to wait
    words: Words = Words()


# --- all of them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What the functions above do for a task; Any is the task's own configuration."""

    traits: Callable[[Any], Traits]
    skeleton: Callable[[Any, int | None], nn.Module]
    blank: Callable[..., Task]
    answering: Callable[[Any, str, Sequence[int], int], int]


@dataclass(frozen=True)
class Work:
    """What is trained on, as far as memory and time depend on it."""

    lengths: Sequence[int]  # tokens of each example
    supervised: np.ndarray  # (examples,) those of them that the loss sees
    held_out: Work | None = None

    def rows(self, chosen: Sequence[int]) -> tuple[Row, ...]:
        lengths, supervised = self.lengths, self.supervised
        return tuple((lengths[i], min(int(supervised[i]), lengths[i])) for i in chosen)

    @staticmethod
    def of(prepared: Prepared) -> Work:
        train, held_out = (
            (part.lengths, part.arrays.index["supervised"][part.order])
            for part in (prepared.train, prepared.held_out)
        )
        return Work(*train, Work(*held_out))

    @staticmethod
    def uniform(config: Config) -> Work:
        """One global batch of the longest rows that are allowed, all of whose tokens are learnt.

        Raises ConfigError if the model has no positions for them.
        """
        length, number = config.data.max_seq_len, config.train.global_batch
        positions = getattr(traits(config).text, "max_position_embeddings", None)
        if positions and length > positions:
            raise ConfigError(
                f"{config.model.name} has positions for {positions:,} tokens, found {length:,}: "
                "give a smaller SEQ (data.max_seq_len)"
            )
        return Work([length] * number, np.full(number, length))

    @staticmethod
    def windows(settings: Distill) -> Work:
        """Of histories, which need not be there: how many there are follows from the settings."""
        train, held_out = split(blank_histories(settings), settings)

        def work(number: int, rest: Work | None = None) -> Work:
            learnt = np.full(number, settings.context)
            return Work([num_positions(settings)] * number, learnt, rest)

        return work(len(train), work(num_held_out(held_out)))
