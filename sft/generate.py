"""Prompts (token ids) -> answers: likes together, a cache of keys and values, finished rows leave.

An answer is a function of (model, prompt, settings, its own number): what else is in the batch, its
order and padding and the number of processes change how fast it comes, not what it is. Rounding
aside: sums of other shapes are rounded otherwise, and where two tokens are as likely to six digits
either may win. Rows are padded on the left; those that have ended are taken out of the batch and of
the cache, and the next prompts take their places, so the longest answer makes nobody wait.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from sft import batching, chat, recovery
from sft.config import Generation, UserError
from sft.model import DTYPES
from sft.parallel import is_split

ROWS_CPU, ROWS_GPU = 64, 256  # of a batch, at most: more do not make a CPU quicker (docs/LOG.md)
LEAVE = 1 / 8  # share of a batch that must have ended before its rows are taken out
GROUP = (
    4  # batches that are answered as one: where a row has ended, the next prompt takes its place
)
Told = Callable[[list[int]], None]  # hears of the tokens of a step, a row each


class GenerationError(UserError):
    """The model cannot be asked."""


class Answer(NamedTuple):
    """Token ids without the one that ended it, and what did: `stop`, or `length`."""

    ids: list[int]
    finish_reason: str


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def stop_ids(tokenizer: PreTrainedTokenizerBase, config: Any = None) -> list[int]:
    """Tokens that end an answer: eos, what the chat template writes at the end of a turn, and what
    the model's own generation config says."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    supervised = [i for i in chat.render(tokenizer, turns).labels if i != chat.IGNORED]
    own = getattr(config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, supervised[-1], *own} - {None})


def context_length(model: nn.Module) -> int | None:
    """Tokens of prompt and answer together that the model was made for, if it says."""
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return getattr(text, "max_position_embeddings", None)


def bytes_per_row(architecture: Any, precision: str, prompt: int, answer: int) -> int:
    """What the answer to one prompt takes beside the weights; lengths in tokens.

    By formula, the larger of: keys and values of the prompt and one layer's activations; keys and
    values with the answer, of one layer twice, since a cache that grows is copied.
    """
    text = architecture.get_text_config()
    heads, layers = getattr(text, "num_attention_heads", None) or 1, text.num_hidden_layers
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = 2 * (getattr(text, "num_key_value_heads", None) or heads) * size
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    first = prompt * (layers * kept + 6 * text.hidden_size + 4 * inner)
    last = (prompt + answer) * (layers + 1) * kept
    return max(first, last) * DTYPES[precision].itemsize


def rows_that_pay(model: nn.Module, prompts: Sequence[list[int]], settings: Generation) -> int:
    """Prompts of a batch: what half of the free memory holds, and no more than make it quicker."""
    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    if on_gpu:
        free = torch.cuda.mem_get_info(parameter.device)[0]
    else:
        free = psutil.virtual_memory().available // _local_ranks()
    precision = "bf16" if parameter.dtype == torch.bfloat16 else "fp32"
    longest = max((len(prompt) for prompt in prompts), default=1)
    each = bytes_per_row(model.config, precision, longest, settings.max_new_tokens)
    return max(1, min(free // 2 // each, ROWS_GPU if on_gpu else ROWS_CPU))


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cut(lengths: Sequence[int], num_ranks: int, rows: int) -> list[list[list[int]]]:
    """`result[rank]`: batches of at most `rows` prompts, likes together, as many on every rank and
    balanced by tokens; `lengths` are of prompts with the longest answer."""
    longest = max(lengths, default=1)
    budget = batching.Budget(rows * longest, "padded", max_rows=rows)
    return batching.cut(range(len(lengths)), lengths, num_ranks, budget)


def answers(
    model: nn.Module,
    prompts: Sequence[list[int]],
    settings: Generation,
    stop: list[int],
    accelerator: Accelerator,
    *,
    rows: int,
    numbers: Sequence[int] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Iterator[tuple[list[int], list[Answer]]]:
    """This rank's share of the answers, some at a time: (positions in `prompts`, answers).

    At most `rows` are written at once. `numbers` seed what is drawn for each prompt (its position,
    if not given). `between` is called before each of the parts; every rank has as many, if need be
    empty ones. Where ranks hold only parts of the weights (FSDP2, ZeRO-3), all of them must take
    part in all forward passes, so there no prompt takes the place of another.
    """
    plain = accelerator.unwrap_model(model)
    together = is_split(plain) and accelerator.num_processes > 1

    def others_write(writing: bool) -> bool:
        flag = torch.tensor(float(writing), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum"))

    def decoded(batch: list[int], most: int) -> list[Answer]:
        seeds = [numbers[i] if numbers is not None else i for i in batch]
        asked = [prompts[i] for i in batch]
        also = others_write if together else None
        return decode(plain, asked, settings, stop, seeds=seeds, rows=most, others_write=also)

    lengths = [len(prompt) + settings.max_new_tokens for prompt in prompts]
    at_once = rows if together else rows * GROUP
    mine = cut(lengths, accelerator.num_processes, at_once)[accelerator.process_index]
    with eval_mode(plain):
        for batch in mine:
            between()
            if batch and not together:
                yield batch, _within_memory(batch, rows, decoded)
            elif together:
                yield batch, decoded(batch, rows)


def _within_memory(
    batch: list[int], rows: int, decoded: Callable[[list[int], int], list[Answer]]
) -> list[Answer]:
    """Its answers, `rows` at once; where memory runs out half as many."""
    while True:
        try:
            return decoded(batch, rows)
        except Exception as error:
            if rows == 1 or recovery.shortage(error) is None:
                raise
        recovery.release()
        rows = min(rows, len(batch)) // 2 or 1


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[list[int]],
    settings: Generation,
    stop: list[int],
    *,
    seeds: Sequence[int] = (0,),
    rows: int | None = None,
    told: Told | None = None,
    others_write: Callable[[bool], bool] | None = None,
) -> list[Answer]:
    """Answers to the prompts, in eval mode, at most `rows` at once; where rows have ended the next
    prompts take their places, if the model's cache lets them.

    `others_write`, collective: whether any rank is still writing; until none is, this one takes
    part in their forward passes.
    """
    device = next(model.parameters()).device
    context = context_length(model) or 2**62
    room = [min(settings.max_new_tokens, context - len(prompt)) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    waiting = [i for i in range(len(prompts)) if room[i] > 0]
    most = rows or len(prompts)
    draw, batch = _Draws(settings, seeds), _Batch(model, [], [], device)

    def advance(some: _Batch) -> None:
        """One token for each row; rows that have ended leave once they are many enough."""
        tokens = choose(some.logits(), settings, draw(some.rows))
        if told:
            told(tokens.tolist())
        for row, token in zip(some.rows, tokens.tolist(), strict=True):
            if row not in some.writing:
                continue
            if token in stop:
                reasons[row] = "stop"
                some.writing.remove(row)
                continue
            written[row].append(token)
            if len(written[row]) == room[row]:
                some.writing.remove(row)
        some.take(tokens)

    def goes_on() -> bool:
        own = bool(batch.writing or waiting)
        return own if others_write is None else others_write(own)

    while goes_on():
        places = most - len(batch.rows)
        if waiting and places and (not batch.rows or (batch.can_grow and places >= LEAVE * most)):
            chosen, waiting = waiting[:places], waiting[places:]
            fresh = _Batch(model, chosen, [prompts[i] for i in chosen], device)
            advance(fresh)
            batch = batch.joined_by(fresh)
        elif batch.writing:
            advance(batch)
        else:
            batch.idle()
    return [Answer(*each) for each in zip(written, reasons, strict=True)]


class _Batch:
    """Prompts that are answered together: what is fed next, what is seen, and the cache.

    ids (rows, new), mask (rows, all so far), padded on the left; what pads is never looked at.
    """

    def __init__(
        self, model: nn.Module, rows: list[int], prompts: list[list[int]], device: torch.device
    ):
        self.model, self.device, self.cache = model, device, None
        self.rows, self.writing = rows, set(rows)  # which prompt each row is; those not ended
        width = max((len(prompt) for prompt in prompts), default=0)
        ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.ids = torch.tensor(ids, dtype=torch.long, device=device)
        self.mask = torch.tensor(mask, dtype=torch.long, device=device)
        plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.known = inspect.signature(plain.forward).parameters
        if "past_key_values" not in self.known:
            raise GenerationError(
                f"{type(plain).__name__} keeps no keys and values (past_key_values) between "
                "tokens, which answers are written with; ask it with its own `generate`"
            )

    def logits(self) -> torch.Tensor:
        """Of the next token: (rows, vocabulary), fp32."""
        options: dict[str, Any] = {}
        if "position_ids" in self.known:
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -self.ids.shape[1] :]
        if "logits_to_keep" in self.known:
            options["logits_to_keep"] = 1
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1].float()

    def take(self, tokens: torch.Tensor) -> None:
        """Feeds these tokens (rows,) next. Where enough rows have ended they leave."""
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)
        left = [place for place, row in enumerate(self.rows) if row in self.writing]
        if not left:
            self.rows = []
        elif len(left) <= (1 - LEAVE) * len(self.rows):
            kept = torch.tensor(left, device=self.device)
            self.ids, self.mask = self.ids[kept], self.mask[kept]
            self.rows = [self.rows[place] for place in left]
            self.cache.reorder_cache(kept)  # type: ignore[attr-defined]  # every kind of layer has it

    @property
    def can_grow(self) -> bool:
        """Whether all of the cache is keys and values of every position so far."""
        layers = getattr(self.cache, "layers", [])
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def joined_by(self, other: _Batch) -> _Batch:
        """Both as one; the shorter one is padded further on the left."""
        if not self.rows or not other.rows:
            return self if self.rows else other
        wider = other.mask.shape[1] - self.mask.shape[1]
        own, new = max(0, wider), max(0, -wider)

        def joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cat([pad(a, (0, 0, own, 0)), pad(b, (0, 0, new, 0))])

        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):  # type: ignore[attr-defined]
            mine.keys = joined(mine.keys, theirs.keys)
            mine.values = joined(mine.values, theirs.values)
        self.mask = torch.cat([pad(self.mask, (own, 0)), pad(other.mask, (new, 0))])
        self.ids = torch.cat([self.ids, other.ids])
        self.rows, self.writing = self.rows + other.rows, self.writing | other.writing
        return self

    def idle(self) -> None:
        """A pass for the others' sake."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.model(input_ids=ids, use_cache=False)


def choose(
    logits: torch.Tensor, settings: Generation, drawn: torch.Tensor | None = None
) -> torch.Tensor:
    """The next token of each row: logits (or log probabilities) (rows, vocabulary) -> (rows,).

    The most likely one; with a temperature, drawn by inverting the distribution function of the
    `top_k` most likely ones and of the fewest that have `top_p` (Holtzman et al. 2020) at `drawn`,
    uniform numbers (rows,) in [0, 1).
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    assert drawn is not None
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    likely = ((ordered - ordered[:, :1]) / settings.temperature).softmax(-1)  # no overflow
    before = likely.cumsum(-1) - likely
    likely = likely * (before < settings.top_p)
    if settings.top_k:
        likely[:, settings.top_k :] = 0
    reached = likely.cumsum(-1)
    chosen = (reached <= drawn.to(reached)[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    last = (likely > 0).sum(-1, keepdim=True) - 1  # rounding may point behind it
    return tokens.gather(-1, torch.minimum(chosen, last))[:, 0]


class _Draws:
    """Uniform numbers, a stream for each prompt: a function of (settings.seed, its number)."""

    def __init__(self, settings: Generation, seeds: Sequence[int]):
        self.streams = None
        if settings.temperature:
            self.streams = [np.random.default_rng([settings.seed, seed]) for seed in seeds]

    def __call__(self, rows: list[int]) -> torch.Tensor | None:
        if self.streams is None:
            return None
        return torch.tensor([self.streams[row].random() for row in rows], dtype=torch.float64)
