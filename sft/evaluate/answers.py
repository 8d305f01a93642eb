"""Computes the held-out loss and scores answers, over all processes, each example once.

The loss is the training loss: a sum over supervised tokens divided by their number, so it does not
depend on how the examples are cut (law 1). Each answer is written to a file of predictions as
soon as it exists, and each process computes its share of the scores from this file. So memory holds
only a few numbers per example, and a run that was killed does not answer an example again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median_low
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.data import template
from sft.data.files import BadRow, Row
from sft.data.formats import Messages, Tools, content_text
from sft.errors import DataError
from sft.evaluate import scores
from sft.evaluate.generate import Answer, Decoder, context_length, eval_mode
from sft.evaluate.predictions import MemoryPredictions, Predictions, Record, key_of
from sft.models import vocabulary
from sft.runtime.console import duration, table
from sft.runtime.output import visible
from sft.runtime.processes import Context

WINDOW = 4096  # examples that are sorted by length and shared out together


def held_out_loss(
    loss: Callable[[nn.Module, Any], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    num_supervised: Callable[[Any], float],
    model: nn.Module,
    batches: Iterable[Any],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Returns the mean loss per supervised item over the batches of all ranks, and its perplexity.

    `loss` and `num_supervised` are those of a task. Collective.
    """
    sums: dict[str, torch.Tensor] = {}
    count = 0.0
    with eval_mode(model):
        for batch in batches:
            total, extras = loss(model, batch)
            count += num_supervised(batch)
            for name, value in {"loss": total, **extras}.items():
                sums[name] = sums.get(name, 0) + value.double()
    number_of_items = torch.tensor(count, dtype=torch.float64)  # fp32 would round it
    local = torch.stack([*(value.cpu() for value in sums.values()), number_of_items])
    *totals, number = accelerator.reduce(local.to(accelerator.device), "sum").tolist()
    means = {name: total / (number or 1.0) for name, total in zip(sums, totals, strict=True)}
    return {**means, "perplexity": math.exp(min(means["loss"], 700.0))}


@dataclass(frozen=True)
class Question:
    """Messages for a model to answer, and the first fields of the answer's record.

    `error` is the reason if they cannot be answered. `template_kwargs`: variables that the row sets
    for its chat template.
    """

    messages: Messages
    tools: Tools | None
    fields: Record
    error: str | None = None
    template_kwargs: dict[str, Any] | None = None


def make_question(row: Row | BadRow, tokenizer: PreTrainedTokenizerBase | None = None) -> Question:
    """Returns the question of a row. If the last turn is the assistant's, it is the reference.

    With a tokenizer, the reference of a tool call is the text that its template writes.
    """
    if isinstance(row, BadRow):
        fields = {"row": f"{row.file}:{row.line}", "prompt": row.excerpt}
        return Question([], None, fields, row.reason)
    *before, last = row.messages
    has_reference = last["role"] == "assistant"
    asked = before if has_reference else row.messages
    fields = {"row": row.place, "prompt": content_text(asked[-1]) if asked else ""}
    fields |= {} if row.group is None else {"group": row.group}
    if has_reference:
        fields["reference"] = content_text(last)
        if "tool_calls" in last and tokenizer is not None:
            whole = template.render(tokenizer, row.messages, row.tools, "last", row.template_kwargs)
            ids = [i for i, label in zip(whole.ids, whole.labels, strict=True) if label >= 0]
            fields["reference"] = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Question(asked, row.tools, fields, template_kwargs=row.template_kwargs)


@dataclass(frozen=True)
class AnswerModel(Decoder):
    """A model that answers questions.

    `identity` names everything that its answers depend on, except the question and the settings.
    """

    tokenizer: PreTrainedTokenizerBase = field(kw_only=True)
    identity: str = field(kw_only=True)

    def render_prompt(self, question: Question) -> list[int] | str:
        """Returns the token ids of a question, or the reason why it has none."""
        if question.error is not None:
            return question.error
        try:
            ids = template.prompt_ids(
                self.tokenizer, question.messages, question.tools, question.template_kwargs
            )
        except DataError as error:
            return str(error)
        return self.find_problem(ids) or ids

    def find_problem(self, ids: list[int]) -> str | None:
        """Returns why a prompt of these tokens cannot be answered; None if it can."""
        if problem := vocabulary.unknown_id(ids, self.model, self.tokenizer):
            return problem
        context = context_length(self.model)
        if context is not None and len(ids) >= context:
            return (
                f"the prompt has {len(ids):,} tokens, the model takes {context:,} including "
                "the answer: shorten the prompt"
            )
        return None if ids else "the prompt is empty"

    def to_record(
        self, question: Question, prompt: list[int] | str, answer: Answer | None = None
    ) -> Record:
        """Returns the record of an answer; without one, `prompt` is the error that is recorded."""
        record = question.fields | {"answer": None, "finish_reason": "error"}
        record |= {"prompt_tokens": 0, "completion_tokens": 0}
        if answer is None:
            return record | {"error": prompt}
        return record | {
            "answer": str(self.tokenizer.decode(answer.ids, skip_special_tokens=True)),
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(answer.ids),
        }

    def key(self, question: Question, number: int) -> str:
        """Returns a digest of everything that a record depends on.

        The example's number is part of it only if tokens are sampled.
        """
        sampled_number = number if self.settings.temperature else None
        asked = [question.messages, question.tools, question.fields, question.error]
        asked += [question.template_kwargs] if question.template_kwargs else []
        return key_of(self.identity, self.settings.model_dump(), sampled_number, asked)


def answer_all(
    model: AnswerModel,
    questions: Iterable[Question],
    predictions: Predictions | MemoryPredictions,
    context: Context,
    *,
    before_batch: Callable[[], None] = lambda: None,
    total: int | None = None,
) -> None:
    """Adds the answers that `predictions` lacks: one record per question, in their order.

    `before_batch` is called before each batch. `total` is the number of questions, if known.
    Collective.
    """
    accelerator = context.accelerator
    accelerator.wait_for_everyone()  # all ranks read the file before any adds to it
    seconds, tokens, started = 0.0, 0, time.perf_counter()

    def start_batch() -> None:
        nonlocal started
        before_batch()
        started = time.perf_counter()  # waiting for others is not this rank's work

    with context.log.progress("answers", total) as advance:
        remaining = iter(questions)
        while window := list(islice(remaining, WINDOW)):
            missing = _find_missing(model, window, predictions)
            advance(len(window) - len(missing))
            good, failed = [], []
            for head, question in missing:
                prompt = model.render_prompt(question)
                if isinstance(prompt, str):
                    failed.append(head | model.to_record(question, prompt))
                else:
                    good.append((head, question, prompt))
            if failed and accelerator.is_main_process:
                predictions.append(failed)
            advance(len(failed))
            for batch, found in model.answer_batches(
                [prompt for *_, prompt in good],
                accelerator,
                numbers=[head["index"] for head, *_ in good],
                before_batch=start_batch,
            ):
                seconds += time.perf_counter() - started
                pairs = zip([good[i] for i in batch], found, strict=False)  # an idle rank has none
                predictions.append(
                    [head | model.to_record(asked, ids, a) for (head, asked, ids), a in pairs]
                )
                tokens += sum(len(answer.ids) for answer in found)
                advance(len(batch) * accelerator.num_processes)
    _warn_of_slow_ranks(seconds, tokens, context)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        predictions.finish()
    accelerator.wait_for_everyone()


def _find_missing(
    model: AnswerModel, window: list[Question], predictions: Predictions | MemoryPredictions
) -> list[tuple[Record, Question]]:
    """Returns the questions without a record, each with the index and key of its record."""
    missing = []
    for index, question in enumerate(window, predictions.num_expected):
        key = model.key(question, index)
        if predictions.expect(key):
            missing.append(({"index": index, "key": key}, question))
    return missing


def _warn_of_slow_ranks(seconds: float, tokens: int, context: Context) -> None:
    """Logs which ranks were much slower than the median one. Collective."""
    found = gather_object([(seconds, tokens)])
    typical = median_low(taken for taken, _ in found)
    for rank, (taken, written) in enumerate(found):
        if taken > 1.5 * typical and taken > typical + 5:
            context.log.say(
                f"warning: rank {rank} took {duration(taken)} for {written:,} tokens, others "
                f"{duration(typical)}: is its device shared, or slower?"
            )


@dataclass(frozen=True)
class Scores:
    """Scores of all answers in a file. `tally` has those with a reference."""

    tally: scores.Tally
    num_examples: int
    num_failed: int


def score_records(
    records: Iterable[Record],
    metrics: Sequence[str],
    accelerator: Accelerator,
    labels: Sequence[str] = (),
) -> Scores:
    """Returns the scores of all predictions, equal on every rank. Collective.

    Every rank gives all `records` in the same order.
    """
    tally = scores.Tally(metrics, labels)
    total = num_failed = 0
    world, rank = accelerator.num_processes, accelerator.process_index
    for number, record in enumerate(records):
        total += 1
        num_failed += record["answer"] is None
        if "reference" not in record:
            continue
        group = record.get("group")
        if number % world == rank:
            answer, reference = record["answer"], record["reference"]
            tally.add(record["index"], answer, reference, record["prompt"], group)
        elif group is not None:
            tally.groups[group]  # adds it, so that all ranks have the same groups in one order
    if world > 1:
        for each in (tally, *tally.groups.values()):
            each.rows = np.concatenate(gather_object([each.rows]))
    return Scores(tally, total, num_failed)


def groups_table(
    title: str, column: str, sizes: Mapping[str, int], cells: Mapping[str, Callable[[str], str]]
) -> Table:
    """Returns a table with a row for each group: its size, and a column for each of `cells`."""
    rows: list[list[str | Text]] = [
        [Text(visible(group) or "(none)"), f"{size:,}", *(cell(group) for cell in cells.values())]
        for group, size in sizes.items()
    ]
    return table(title, (column, "examples", *cells), rows)
