"""Writes answers to prompts of token ids, in length-sorted batches, with a key-value cache.

An answer is a function of (model, prompt, settings, its own number). The other rows of the batch,
their order, the padding and the number of processes change only the speed. Rounding is the one
exception: if two tokens are equally likely to six digits, either may win. Rows are padded on the
left. Finished rows are dropped from the batch and the cache, so the longest answer does not delay
the others.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, release_memory
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.schema import Generation
from sft.data import audit, batches
from sft.errors import ModelError, oom_message
from sft.models.dtypes import DTYPES
from sft.models.layers import is_split
from sft.models.sizes import read_sizes

ROWS_CPU, ROWS_GPU = 64, 256  # the largest batch; a CPU is no faster with more (docs/LOG.md)
CACHES = ("past_key_values", "cache_params")  # names of the cache; the latter of a state alone
Result = TypeVar("Result")
DROP_SHARE = 1 / 8  # share of a batch that must have finished before its rows are dropped


class Answer(NamedTuple):
    """An answer's token ids, without the one that ended it; `finish_reason`: `stop` or `length`."""

    ids: list[int]
    finish_reason: str


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, without gradients, and restores its mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def stop_ids(tokenizer: PreTrainedTokenizerBase, config: Any = None) -> list[int]:
    """Returns the tokens that end an answer: those of tokenizer, chat template and model."""
    own = getattr(config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({*audit.stop_ids(tokenizer), *own} - {None})


def context_length(model: nn.Module) -> int | None:
    """Returns the maximum length of prompt and answer together; None if the model has no limit."""
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return getattr(text, "max_position_embeddings", None)


def bytes_per_row(architecture: Any, precision: str, prompt: int, answer: int) -> int:
    """Returns the bytes that one answer takes in addition to the weights; lengths are in tokens.

    It is the larger of two amounts. While the prompt is read: its keys and values, and one layer's
    activations. At the end: all keys and values, and those of one layer again, because a growing
    cache is copied layer by layer.
    """
    sizes = read_sizes(architecture)
    heads, layers = sizes.num_attention_heads or 1, sizes.num_hidden_layers
    size = sizes.head_dim or sizes.hidden_size // heads
    kept = 2 * (sizes.num_key_value_heads or heads) * size
    inner = sizes.intermediate_size or 4 * sizes.hidden_size
    first = prompt * (layers * kept + 6 * sizes.hidden_size + 4 * inner)
    last = (prompt + answer) * (layers + 1) * kept
    return max(first, last) * DTYPES[precision].itemsize


def cut_batches(lengths: Sequence[int], num_ranks: int, rows: int) -> list[list[list[int]]]:
    """Returns length-sorted batches of at most `rows` prompts for each rank.

    All ranks get the same number of batches (some may be empty) and about the same number of
    tokens. A length is that of a prompt with its longest answer.
    """
    longest = max(lengths, default=1)
    budget = batches.Budget(rows * longest, "padded", max_rows=rows)
    return batches.cut(range(len(lengths)), lengths, num_ranks, budget)


@dataclass(frozen=True)
class Decoder:
    """A model with all that it needs to write answers.

    `stop`: the tokens that end an answer. `batch_size`: prompts in a batch; None: see
    `max_batch_size`. `ends`: says of the tokens so far whether their text ends the answer.
    """

    model: nn.Module
    stop: Sequence[int]
    settings: Generation = field(default_factory=Generation)
    batch_size: int | None = None
    ends: Callable[[list[int]], bool] = field(default=lambda _: False, kw_only=True)

    def answer_batches(
        self,
        prompts: Sequence[list[int]],
        accelerator: Accelerator,
        numbers: Sequence[int] | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Yields this rank's share in batches: (positions in `prompts`, answers). Collective.

        `numbers` has a seed for each prompt's random draws; None: its position. `before_batch` is
        called before each batch. Ranks that hold only parts of the weights (FSDP2, ZeRO-3) must go
        through all batches.
        """
        needs_all_ranks = is_split(self.model) and accelerator.num_processes > 1

        def any_rank_goes_on(has_unfinished: bool) -> bool:
            flag = torch.tensor(float(has_unfinished), device=accelerator.device)
            return bool(accelerator.reduce(flag, "sum"))

        def decode(batch: list[int]) -> list[Answer]:
            seeds = batch if numbers is None else [numbers[i] for i in batch]
            goes_on = any_rank_goes_on if needs_all_ranks else bool
            return self.decode([prompts[i] for i in batch], seeds=seeds, goes_on=goes_on)

        rows = self.max_batch_size(prompts, accelerator)
        lengths = [len(prompt) + self.settings.max_new_tokens for prompt in prompts]
        own = cut_batches(lengths, accelerator.num_processes, rows)[accelerator.process_index]
        with eval_mode(self.model):
            for batch in own:
                before_batch()
                if needs_all_ranks:
                    yield batch, decode(batch)
                elif batch:
                    yield batch, halve_until_it_fits(batch, decode)

    def max_batch_size(self, prompts: Sequence[list[int]], accelerator: Accelerator) -> int:
        """Returns `batch_size`, or how many prompts half of the free memory holds on every rank, at
        most ROWS_CPU or ROWS_GPU, since larger batches are no faster. Collective."""
        if self.batch_size:
            return self.batch_size
        precision = weight_precision(self.model)
        longest = max((len(prompt) for prompt in prompts), default=1)
        new = self.settings.max_new_tokens
        return self.max_rows(bytes_per_row(self.model.config, precision, longest, new), accelerator)

    def max_rows(self, row_bytes: int, accelerator: Accelerator) -> int:
        """Returns `batch_size`, or how many rows half of the free memory holds on every rank, at
        most ROWS_CPU or ROWS_GPU. Collective."""
        if self.batch_size:
            return self.batch_size
        parameter = next(self.model.parameters())
        on_gpu = parameter.device.type == "cuda"
        if on_gpu:
            free = torch.cuda.mem_get_info(parameter.device)[0]
        else:
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            free = psutil.virtual_memory().available // local_ranks
        copies = getattr(self.model, "rows_per_prompt", 1)  # a mixture of models has several
        most = (ROWS_GPU if on_gpu else ROWS_CPU) // copies
        own = max(1, min(free // 2 // (row_bytes * copies), most))
        return min(gather_object([own])) if accelerator.num_processes > 1 else own

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int] = (0,),
        on_tokens: Callable[[list[int]], None] | None = None,
        goes_on: Callable[[bool], bool] = bool,
    ) -> list[Answer]:
        """Returns the answers to prompts, as one batch of a model in eval mode.

        `on_tokens` receives each step's tokens, one per row. `goes_on` receives whether this batch
        has unfinished answers, and returns whether this rank has to run another forward pass: with
        split weights as long as any rank has unfinished answers.
        """
        device = next(self.model.parameters()).device
        context = context_length(self.model) or 2**62
        limits = [min(self.settings.max_new_tokens, context - len(prompt)) for prompt in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        reasons = ["length"] * len(prompts)
        unfinished = [i for i in range(len(prompts)) if limits[i] > 0]
        rows = list(range(len(prompts)))  # the prompt of each row in the batch
        # One stream of random numbers per prompt, a function of (settings.seed, its own seed).
        draws = [np.random.default_rng([self.settings.seed, seed]) for seed in seeds]
        forward = _Forward(self.model, device)
        ids, mask = _pad(prompts, device)
        while goes_on(bool(unfinished)):
            if not unfinished:
                forward.join_others()
                continue
            drawn = None
            if self.settings.temperature:
                drawn = torch.tensor([draws[row].random() for row in rows], dtype=torch.float64)
            tokens = choose(forward(ids, mask), self.settings, drawn)
            if on_tokens:
                on_tokens(tokens.tolist())
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row not in unfinished:
                    continue
                if is_end := token in self.stop:
                    reasons[row] = "stop"
                else:
                    written[row].append(token)
                    if is_end := self.ends(written[row]):
                        reasons[row] = "stop"
                if is_end or len(written[row]) == limits[row]:
                    unfinished.remove(row)
            ids = tokens[:, None]
            if unfinished and len(unfinished) <= (1 - DROP_SHARE) * len(rows):
                kept = torch.tensor([rows.index(row) for row in unfinished], device=device)
                ids, mask, rows = ids[kept], mask[kept], list(unfinished)
                forward.keep_rows(kept)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        return [Answer(*each) for each in zip(written, reasons, strict=True)]


def halve_until_it_fits(
    batch: list[int], compute: Callable[[list[int]], list[Result]]
) -> list[Result]:
    """Returns the results for a batch; if memory runs out, for one half after the other."""
    try:
        return compute(batch)
    except Exception as error:
        if len(batch) == 1 or oom_message(error) is None:
            raise
    release_memory()
    half = len(batch) // 2
    return [
        *halve_until_it_fits(batch[:half], compute),
        *halve_until_it_fits(batch[half:], compute),
    ]


def _pad(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask [rows, longest prompt], padded on the left."""
    width = max((len(prompt) for prompt in prompts), default=0)
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def accepted_by(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Returns the arguments of a model's forward pass by name, without those of its adapter."""
    return inspect.signature(_without_adapter(model).forward).parameters


def _without_adapter(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def weight_precision(model: nn.Module) -> str:
    """Returns the name of the precision in which a model computes; fp32 for an unknown one."""
    dtype = next(model.parameters()).dtype
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")


class _Forward:
    """Forward passes that return the last position's logits, and the cache between them."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device, self.cache = model, device, None
        self.accepted = accepted_by(model)
        names = [name for name in CACHES if name in self.accepted]
        if not names:
            name = type(_without_adapter(model)).__name__
            raise ModelError(
                f"{name} keeps no keys and values (past_key_values) between tokens, which "
                "writing answers needs; use the model's own `generate`"
            )
        self.cache_name = names[0]

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits [rows, vocabulary] for ids [rows, new] and mask [rows, so far]."""
        options: dict[str, Any] = {}
        if "position_ids" in self.accepted:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self.accepted:
            options["logits_to_keep"] = 1
        output = self.model(
            input_ids=ids,
            attention_mask=mask if self.cache_name == CACHES[0] else mask[:, -ids.shape[1] :],
            use_cache=True,
            **options,
            **{self.cache_name: self.cache},
        )
        self.cache = getattr(output, self.cache_name)
        return output.logits[:, -1].float()

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)  # type: ignore[attr-defined]  # every kind of cache has it

    def join_others(self) -> None:
        """Takes part in a pass of ranks that still write."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.model(input_ids=ids, use_cache=False)


@torch.no_grad()
def log_probs(model: nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Returns fp64 log probabilities [len(answer) + 1, vocabulary]: of each token and the next."""
    ids = torch.tensor([[*prompt, *answer]], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return logits.double().log_softmax(-1)


def choose(
    logits: torch.Tensor, settings: Generation, drawn: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns each row's next token from its logits or log probabilities [rows, vocabulary].

    At temperature 0 it is the most likely token. Otherwise it is drawn as in transformers. Logits
    are divided by the temperature. The `top_k` most likely tokens are kept, with those as likely as
    the last of them. Of the kept ones, with probabilities that add up to 1 again, the fewest that
    reach `top_p` remain (Holtzman et al. 2020). The distribution function of the rest is inverted
    at `drawn`: a uniform number in [0, 1) for each row.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    assert drawn is not None
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    scores = (ordered - ordered[:, :1]) / settings.temperature  # softmax does not overflow
    if settings.top_k:
        last = min(settings.top_k, scores.shape[-1]) - 1
        scores = scores.masked_fill(scores < scores[:, last : last + 1], -torch.inf)
    likely = scores.softmax(-1)
    if settings.top_p < 1:
        likely = likely * (likely.cumsum(-1) - likely < settings.top_p)
    reached = likely.cumsum(-1)
    chosen = (reached <= drawn.to(reached)[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    end = (likely > 0).sum(-1, keepdim=True) - 1  # rounding may give a later index
    return tokens.gather(-1, torch.minimum(chosen, end))[:, 0]
