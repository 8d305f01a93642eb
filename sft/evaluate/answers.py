"""Held-out loss and scored answers, over all processes, every example once.

The loss is the training loss: a sum over supervised tokens divided by their number, so it does not
depend on how the examples are cut (law 1). Answers go to a file of `predictions` as they come; they
<<<<<<< HEAD
are scored from there, each process its share. Memory holds a few numbers of an example, no text,
and what a killed run has answered is not asked again.
=======
are scored from there, each process its share, by sums that are added up. So no answer stays in
memory, and what a killed run has answered is not asked again.
>>>>>>> h_arrays
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.schema import Generation
from sft.data import template
from sft.data.files import BadRow, Row
from sft.data.formats import Messages, Tools
from sft.errors import DataError
from sft.evaluate import generate, scores
from sft.evaluate.generate import eval_mode
from sft.evaluate.predictions import Predictions, Record, key_of, read
from sft.runtime.console import duration, visible
from sft.runtime.log import Log

WINDOW = 4096  # examples that are sorted by length and shared out together


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


# --- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What is asked, and what its line will say besides; `error`: why it cannot be asked."""

    messages: Messages
    tools: Tools | None
    told: Record
    error: str | None = None


def question(row: Row | BadRow, tokenizer: PreTrainedTokenizerBase | None = None) -> Question:
    """A row's last assistant turn, if it ends in one, is the reference; all before it is asked.

    With a tokenizer the reference of a tool call is what its template writes for that.
    """
    if isinstance(row, BadRow):
        return Question(
            [], None, {"row": f"{row.file}:{row.line}", "prompt": row.excerpt}, row.reason
        )
    *before, last = row.messages
    asked = before if last["role"] == "assistant" else row.messages
    told = {"row": row.place, "prompt": asked[-1]["content"] if asked else ""}
    told |= {} if row.group is None else {"group": row.group}
    if last["role"] == "assistant":
        told["reference"] = last["content"]
        if "tool_calls" in last and tokenizer is not None:
            whole = template.render(tokenizer, row.messages, row.tools, "last")
            ids = [i for i, label in zip(whole.ids, whole.labels, strict=True) if label >= 0]
            told["reference"] = tokenizer.decode(ids, skip_special_tokens=True)
    return Question(asked, row.tools, told)


@dataclass(frozen=True)
class Speaker:
    """A model that answers. `identity`: what its answers are a function of, beside the question."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    stop: list[int]
    identity: str

    def prompt(self, asked: Question) -> list[int] | str:
        """Token ids, or why there are none."""
        if asked.error is not None:
            return asked.error
        try:
            ids = template.prompt_ids(self.tokenizer, asked.messages, asked.tools)
        except DataError as error:
            return str(error)
        context = generate.context_length(self.model)
        if context is not None and len(ids) >= context:
            return (
                f"the prompt has {len(ids):,} tokens, the model takes {context:,} with the answer: "
                "shorten it"
            )
        return ids or "the prompt is empty"

    def record(self, asked: Question, prompt: list[int], answer: generate.Answer) -> Record:
        text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
        return {
            **asked.told,
            "answer": text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(answer.ids),
        }


def failed(asked: Question, reason: str) -> Record:
    return {
        **asked.told,
        "answer": None,
        "finish_reason": "error",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "error": reason,
    }


def answer_all(
    speaker: Speaker,
    questions: Iterable[Question],
    settings: Generation,
    predictions: Predictions,
    accelerator: Accelerator,
    log: Log,
    *,
    rows: int | None = None,
    between: Callable[[], None] = lambda: None,
    total: int | None = None,
) -> None:
    """Answers what is not answered yet, into `predictions`; then that has one line a question, in
    their order. Collective.

    `rows`: prompts of a batch, at most; None: as many as memory holds and as make it quicker.
    `between` is called before each batch. `total`: number of questions, if known.
    """
    accelerator.wait_for_everyone()  # all have read the file before anyone adds to it
    busy, tokens, began = 0.0, 0, time.perf_counter()

    def begin() -> None:
        nonlocal began
        between()
        began = time.perf_counter()  # waiting for others is not this rank's work

    with log.progress("answers", total) as advance:
        rest = iter(questions)
        while window := list(islice(rest, WINDOW)):
            first = predictions.num_expected
            keys = [_key(speaker, settings, asked, first + i) for i, asked in enumerate(window)]
            open_ones = [i for i, key in enumerate(keys) if predictions.expect(key)]
            advance(len(window) - len(open_ones))
            own = [{"index": first + i, "key": key} for i, key in enumerate(keys)]
            prompts = {i: speaker.prompt(window[i]) for i in open_ones}
            bad = {i: prompt for i, prompt in prompts.items() if isinstance(prompt, str)}
            good = [(i, prompt) for i, prompt in prompts.items() if not isinstance(prompt, str)]
            if bad and accelerator.is_main_process:
                predictions.append([own[i] | failed(window[i], bad[i]) for i in bad])
            advance(len(bad))
            for batch, found in generate.answers(
                speaker.model,
                [prompt for _, prompt in good],
                settings,
                speaker.stop,
                accelerator,
                rows=rows or _rows(speaker, [prompt for _, prompt in good], settings, accelerator),
                numbers=[first + i for i, _ in good],
                between=begin,
            ):
                busy += time.perf_counter() - began
                pairs = zip([good[j] for j in batch], found, strict=False)  # none for idle ranks
                predictions.append(
                    [own[i] | speaker.record(window[i], prompt, a) for (i, prompt), a in pairs]
                )
                tokens += sum(len(answer.ids) for answer in found)
                advance(len(batch) * accelerator.num_processes)
    _tell_slow_ranks(busy, tokens, accelerator, log)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        predictions.finish()
    accelerator.wait_for_everyone()


def _rows(
    speaker: Speaker, prompts: list[list[int]], settings: Generation, accelerator: Accelerator
) -> int:
    """As many as the rank with the least memory holds: all must cut alike."""
    own = generate.rows_that_pay(speaker.model, prompts, settings)
    return min(gather_object([own])) if accelerator.num_processes > 1 else own


def _key(speaker: Speaker, settings: Generation, asked: Question, number: int) -> str:
    """What the line of an example is a function of; its number only where tokens are drawn."""
    drawn = number if settings.temperature else None
    of = (asked.messages, asked.tools, asked.told, asked.error)
    return key_of(speaker.identity, settings.model_dump(), drawn, of)


def _tell_slow_ranks(seconds: float, tokens: int, accelerator: Accelerator, log: Log) -> None:
    """Says which ranks were much slower than the median one."""
    if accelerator.num_processes == 1:
        return
    found = gather_object([(seconds, tokens)])
    middle = sorted(each for each, _ in found)[(len(found) - 1) // 2]
    for rank, (each, written) in enumerate(found):
        if each > 1.5 * middle and each > middle + 5:
            log.say(
                f"warning: rank {rank} took {duration(each)} for {written:,} tokens, others "
                f"{duration(middle)}: is its device shared, or slower?"
            )


# --- scores --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Of answers against their references. `tally`: of those that have a reference."""

    tally: scores.Tally
    num_examples: int
    num_failed: int


def score(
    path: Path,
    names: Sequence[str],
    accelerator: Accelerator,
    labels: Sequence[str] = (),
) -> Scores:
    """Scores a finished file of predictions; the same on every rank. Collective."""
    tally = scores.Tally(names, labels)
    total = num_failed = 0
    world, rank = accelerator.num_processes, accelerator.process_index
    for number, record in enumerate(read(path)):
        total += 1
        num_failed += record["answer"] is None
        if "reference" not in record:
            continue
        group = record.get("group")
        if number % world == rank:
            answer, reference = record["answer"], record["reference"]
            tally.add(record["index"], answer, reference, record["prompt"], group)
        elif group is not None:
            tally.of_group(group)  # all ranks have the same groups in the same order
    if world > 1:
        for each in (tally, *tally.groups.values()):
            each.rows = np.concatenate(gather_object([each.rows]))
    return Scores(tally, total, num_failed)


def groups_table(
    title: str,
    column: str,
    sizes: Mapping[str, int],
    cells: Mapping[str, Callable[[str], str]],
) -> Table:
    """A row for each group: its examples, and of each column the cell of this group."""
    table = Table(title=title, title_justify="left")
    table.add_column(column, overflow="fold")
    for name in ("examples", *cells):
        table.add_column(name, justify="right")
    for group, size in sizes.items():
        shown = (cell(group) for cell in cells.values())
        table.add_row(Text(visible(group) or "(none)"), f"{size:,}", *shown)
    return table
