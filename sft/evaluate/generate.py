"""Prompts (token ids) -> answers: likes together, a cache of keys and values, finished rows leave.

An answer is a function of (model, prompt, settings, its own number): what else is in the batch, its
order and padding and the number of processes change how fast it comes, not what it is. Rounding
aside: sums of other shapes are rounded otherwise, and where two tokens are as likely to six digits
either may win. Rows are padded on the left, and a row that has ended is taken out of the batch and
of the cache, so that the longest answer does not make all others wait.
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
from transformers import PreTrainedTokenizerBase

from sft.config.schema import Generation
from sft.data import batches, template
from sft.errors import UserError
from sft.models.dtypes import DTYPES
from sft.models.layers import is_split
from sft.runtime import oom

ROWS_CPU, ROWS_GPU = 64, 256  # of a batch, at most: more do not make a CPU quicker (docs/LOG.md)
LEAVE = 1 / 8  # share of a batch that must have ended before its rows are taken out
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
    supervised = [i for i in template.render(tokenizer, turns).labels if i != template.IGNORED]
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
    copies = getattr(model, "rows_per_prompt", 1)  # of a model that is several in one
    each = bytes_per_row(model.config, precision, longest, settings.max_new_tokens) * copies
    most = (ROWS_GPU if on_gpu else ROWS_CPU) // copies
    return max(1, min(free // 2 // each, most))


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cut(lengths: Sequence[int], num_ranks: int, rows: int) -> list[list[list[int]]]:
    """`result[rank]`: batches of at most `rows` prompts, likes together, as many on every rank and
    balanced by tokens; `lengths` are of prompts with the longest answer."""
    longest = max(lengths, default=1)
    budget = batches.Budget(rows * longest, "padded", max_rows=rows)
    return batches.cut(range(len(lengths)), lengths, num_ranks, budget)


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
    """This rank's share of the answers, a batch at a time: (positions in `prompts`, answers).

    `numbers` seed what is drawn for each prompt (its position, if not given). `between` is called
    before each batch; every rank has as many, if need be empty ones. Where ranks hold only parts
    of the weights (FSDP2, ZeRO-3), all must take all batches.
    """
    plain = accelerator.unwrap_model(model)
    together = is_split(plain) and accelerator.num_processes > 1

    def others_write(writing: bool) -> bool:
        flag = torch.tensor(float(writing), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum"))

    def decoded(batch: list[int]) -> list[Answer]:
        seeds = [numbers[i] if numbers is not None else i for i in batch]
        asked = [prompts[i] for i in batch]
        also = others_write if together else None
        return decode(plain, asked, settings, stop, seeds=seeds, others_write=also)

    lengths = [len(prompt) + settings.max_new_tokens for prompt in prompts]
    mine = cut(lengths, accelerator.num_processes, rows)[accelerator.process_index]
    with eval_mode(plain):
        for batch in mine:
            between()
            if batch and not together:
                yield batch, _in_pieces(batch, decoded)
            elif together:
                yield batch, decoded(batch)


def _in_pieces(batch: list[int], decoded: Callable[[list[int]], list[Answer]]) -> list[Answer]:
    """Its answers; if memory runs out those of its halves."""
    try:
        return decoded(batch)
    except Exception as error:
        if len(batch) == 1 or oom.shortage(error) is None:
            raise
    oom.release()
    half = len(batch) // 2
    return [*_in_pieces(batch[:half], decoded), *_in_pieces(batch[half:], decoded)]


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[list[int]],
    settings: Generation,
    stop: list[int],
    *,
    seeds: Sequence[int] = (0,),
    told: Told | None = None,
    others_write: Callable[[bool], bool] | None = None,
) -> list[Answer]:
    """Answers to the prompts as one batch, in eval mode.

    `others_write`, collective: whether any rank is still writing; until none is, this one takes
    part in their forward passes.
    """
    device = next(model.parameters()).device
    context = context_length(model) or 2**62
    room = [min(settings.max_new_tokens, context - len(prompt)) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    writing = [i for i in range(len(prompts)) if room[i] > 0]
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    draw, step = _Draws(settings, seeds), _Step(model, device)
    ids, mask = _padded(prompts, device)
    while writing if others_write is None else others_write(bool(writing)):
        if not writing:
            step.idle()
            continue
        tokens = choose(step(ids, mask), settings, draw(rows))
        if told:
            told(tokens.tolist())
        still = []
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row not in writing:
                continue
            if token in stop:
                reasons[row] = "stop"
                continue
            written[row].append(token)
            if len(written[row]) < room[row]:
                still.append(row)
        writing = still
        ids = tokens[:, None]
        if writing and len(writing) <= (1 - LEAVE) * len(rows):
            kept = torch.tensor([rows.index(row) for row in writing], device=device)
            ids, mask, rows = ids[kept], mask[kept], list(writing)
            step.keep(kept)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return [Answer(*each) for each in zip(written, reasons, strict=True)]


def _padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Any, Any]:
    """ids and mask (rows, longest prompt), padded on the left; what pads is never looked at."""
    width = max((len(prompt) for prompt in prompts), default=0)
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _Step:
    """One forward pass after another: logits of the last position, and the cache between them."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device, self.cache = model, device, None
        plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.known = inspect.signature(plain.forward).parameters
        if "past_key_values" not in self.known:
            raise GenerationError(
                f"{type(plain).__name__} keeps no keys and values (past_key_values) between "
                "tokens, which answers are written with; ask it with its own `generate`"
            )

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids (rows, new), mask (rows, all so far) -> (rows, vocabulary), fp32."""
        options: dict[str, Any] = {}
        if "position_ids" in self.known:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self.known:
            options["logits_to_keep"] = 1
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1].float()

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)  # type: ignore[attr-defined]  # every kind of layer has it

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
