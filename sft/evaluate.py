"""Held-out loss and generated answers, over all processes, every example once.

The loss is the training loss: a sum over supervised tokens divided by their number, so it does not
depend on how the examples are cut (law 1). Answers are greedy and come back in the order of the
prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sft import chat
from sft.guard import Guard
from sft.log import Log
from sft.parallel import is_split


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def held_out_loss(
    loss: Callable[[nn.Module, Any], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    num_supervised: Callable[[Any], float],
    model: nn.Module,
    batches: Iterable[Any],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean loss per supervised item over the batches of all ranks, and its perplexity.

    `loss` and `num_supervised` are those of an engine.Task.
    """
    sums: dict[str, torch.Tensor] = {}
    count = 0.0
    with eval_mode(model):
        for batch in batches:
            total, extras = loss(model, batch)
            count += num_supervised(batch)
            for name, value in {"loss": total, **extras}.items():
                sums[name] = sums.get(name, 0) + value.double()
    local = torch.stack([value.cpu() for value in sums.values()] + [torch.tensor(float(count))])
    *totals, number = accelerator.reduce(local.to(accelerator.device), "sum").tolist()
    means = {name: total / (number or 1.0) for name, total in zip(sums, totals, strict=True)}
    return {**means, "perplexity": math.exp(min(means["loss"], 700.0))}


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    accelerator: Accelerator,
    log: Log,
    guard: Guard,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Greedy answers to `prompts` (token ids), in their order, on every rank.

    Prompts are sorted by length and dealt out to the ranks, so that rows of a batch are alike and
    ranks have like work; the index travels with the answer. A signal stops all ranks at one batch,
    so each has as many, if need be empty ones.
    """
    plain = accelerator.unwrap_model(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine = order[accelerator.process_index :: accelerator.num_processes]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    together = is_split(plain)  # then a rank without prompts must take part in each batch
    found: list[tuple[int, str]] = []
    most = -(-len(prompts) // accelerator.num_processes)
    with (
        guard.section("generation"),
        eval_mode(plain),
        log.progress("answers", len(mine)) as advance,
    ):
        for start in range(0, most, batch_size):
            guard.stop_if_asked()
            indices = mine[start : start + batch_size]
            if not indices and not together:
                continue
            asked = [prompts[i] for i in indices or order[:1]]
            texts = _answer(plain, tokenizer, asked, settings, synced_gpus=together)
            found += zip(indices, texts, strict=bool(indices))
            advance(len(indices))
    if accelerator.num_processes > 1:
        found = gather_object(found)
    return [text for _, text in sorted(found)]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: eos, and what the chat template writes at the end of a turn."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    supervised = [i for i in chat.render(tokenizer, turns).labels if i != chat.IGNORED]
    return sorted({tokenizer.eos_token_id, supervised[-1]})


def _answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: GenerationConfig,
    *,
    synced_gpus: bool,
) -> list[str]:
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        synced_gpus=synced_gpus,
    )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers equal to their reference, surrounding white space aside."""
    pairs = zip(answers, references, strict=True)
    return sum(a.strip() == r.strip() for a, r in pairs) / max(1, len(references))
