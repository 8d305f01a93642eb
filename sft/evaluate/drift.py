"""Measures how far a tuned model has moved from its base where it was not trained.

The base answers general prompts greedily. Then both models read prompt and answer, and at each
token of the answer their distributions are compared: the divergence KL(base || tuned) in nats, and
whether the most likely token is the same. Beside that stands the loss on general texts.

What the base says is a function of the base alone. So it can be computed at any time, also after
the training, and is kept in a file: answers, losses, and at each position the TOP most likely
tokens with their log probabilities. All other tokens count as one, so the divergence is a lower
bound; with no more than TOP tokens it is exact. Both models are never in memory together.

Each model reads one sequence at a time, and prompts are answered in batches that do not depend on
the number of processes. So any number gives the same bits.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sft.data import template
from sft.data.files import Row
from sft.data.formats import TEXT
from sft.errors import UserError
from sft.evaluate.answers import AnswerModel
from sft.evaluate.general import GeneralSet, domain_of
from sft.evaluate.generate import eval_mode
from sft.evaluate.intervals import Interval, bounded, unbounded
from sft.runtime import plain

FORMAT = 1  # of the files
TOP = 256  # tokens at each position whose probabilities are kept
BATCH = 32  # prompts that are answered together
MOST_TOKENS = 512  # of a text; the rest is not read
ALL = "all"  # stands for the prompts of all domains together
Item = TypeVar("Item")


class Processes(Protocol):
    """The processes that share the work: an Accelerator, or one process alone."""

    @property
    def num_processes(self) -> int: ...
    @property
    def process_index(self) -> int: ...


@dataclass(frozen=True)
class BaseAnswer:
    """An answer of the base, and its distributions where it wrote it.

    A position more than the answer has tokens is that of the end, if the answer ended by itself.
    """

    prompt: list[int]
    answer: list[int]  # without the token that ended it
    ended_by: int | None  # that token; None: the answer was cut off
    top: np.ndarray  # (positions, TOP) int32: token ids, the most likely one first
    log_probabilities: np.ndarray  # (positions, TOP) float32


@dataclass(frozen=True)
class Base:
    """What the base says: its answers, and the mean loss per token of each text."""

    answers: list[BaseAnswer]
    losses: list[float]


@dataclass(frozen=True)
class Moved:
    """How far the distributions of one answer moved: means over its positions."""

    divergence: float
    agreement: float


@dataclass(frozen=True)
class Drift:
    """The means of some prompts with 95 % intervals over prompts, if there are two or more."""

    num_prompts: int
    divergence: float
    divergence_interval: Interval | None
    agreement: float
    agreement_interval: Interval


@torch.no_grad()
def measure_base(
    model: AnswerModel,
    general: GeneralSet,
    processes: Processes,
    tick: Callable[[], None] = lambda: None,
) -> Base:
    """Returns what the base says to the prompts and texts of a set. Collective.

    `tick` is called before each batch. Raises UserError for a prompt that it cannot be asked.
    """
    prompts = [_render(model, each) for each in general.prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [by_length[at : at + BATCH] for at in range(0, len(by_length), BATCH)]

    def answer(batch: list[int]) -> list[BaseAnswer]:
        tick()
        written = model.decode([prompts[i] for i in batch])
        made = []
        for i, found in zip(batch, written, strict=True):
            ids, ends = prompts[i] + found.ids, found.finish_reason == "stop"
            own = _log_probabilities(model, ids, len(prompts[i]) - 1, len(found.ids) + ends)
            kept = own.topk(min(TOP, own.shape[1]))
            top, probabilities = kept.indices.int().cpu().numpy(), kept.values.cpu().numpy()
            ended_by = max(model.stop, key=lambda token: float(own[-1, token])) if ends else None
            made.append(BaseAnswer(prompts[i], found.ids, ended_by, top, probabilities))
        return made

    with eval_mode(model.model):
        answered = _share_out(batches, answer, processes)
        losses = _measure_texts(model, general.texts, processes, tick)
    by_prompt = dict(zip(by_length, (each for batch in answered for each in batch), strict=True))
    return Base([by_prompt[i] for i in range(len(prompts))], losses)


@torch.no_grad()
def measure_tuned(
    model: AnswerModel,
    base: Base,
    general: GeneralSet,
    processes: Processes,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[Moved], list[float]]:
    """Returns how far the model moved at each answer, and the loss of each text. Collective."""

    def compare(said: BaseAnswer) -> Moved:
        tick()
        ids, first = said.prompt + said.answer, len(said.prompt) - 1
        return _compare(said, _log_probabilities(model, ids, first, len(said.top)))

    with eval_mode(model.model):
        moved = _share_out(base.answers, compare, processes)
        return moved, _measure_texts(model, general.texts, processes, tick)


def _compare(said: BaseAnswer, tuned: torch.Tensor) -> Moved:
    """Compares the base's distributions with those of the tuned model (positions, vocabulary)."""
    top = torch.from_numpy(said.top).to(tuned.device, torch.long)
    p = torch.from_numpy(said.log_probabilities).to(tuned.device).double()
    q = tuned.gather(1, top).double()
    divergence = (p.exp() * (p - q)).sum(1)
    if top.shape[1] < tuned.shape[1]:  # all other tokens together
        rest_p, rest_q = (1 - each.exp().sum(1) for each in (p, q))
        rest_p, rest_q = rest_p.clamp(min=0), rest_q.clamp(min=1e-12)
        divergence += torch.special.xlogy(rest_p, rest_p / rest_q)
    same = tuned.argmax(1) == top[:, 0]
    return Moved(float(divergence.mean()), float(same.double().mean()))


def _log_probabilities(model: AnswerModel, ids: list[int], first: int, num: int) -> torch.Tensor:
    """Returns fp32 log probabilities (num, vocabulary) of what follows `ids[: first + 1]`, of what
    follows one token more, and so on."""
    device = next(model.model.parameters()).device
    output: Any = model.model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    return output.logits[0, first : first + num].float().log_softmax(-1)


def _measure_texts(
    model: AnswerModel, texts: Sequence[str], processes: Processes, tick: Callable[[], None]
) -> list[float]:
    """Returns the mean loss per token of each text."""

    def loss(text: str) -> float:
        tick()
        row = Row([{"role": TEXT, "content": text}], None, "", 0)
        _, example = template.render_row(model.tokenizer, row, MOST_TOKENS)[0]
        ids = torch.tensor(example.ids[1:])
        found = _log_probabilities(model, example.ids, 0, len(ids))
        return -float(found.cpu().gather(1, ids[:, None]).double().mean())

    return _share_out(texts, loss, processes)


def _render(model: AnswerModel, question: Any) -> list[int]:
    prompt = model.render_prompt(question)
    if isinstance(prompt, str):
        raise UserError(f"general prompt {question.fields['row']}: {prompt}")
    return prompt


def _share_out(
    items: Sequence[Item], work: Callable[[Item], Any], processes: Processes
) -> list[Any]:
    """Returns the result for each item, on every rank, each of which does its share."""
    world, rank = processes.num_processes, processes.process_index
    own = [(number, work(items[number])) for number in range(rank, len(items), world)]
    found = dict(gather_object(own) if world > 1 else own)
    return [found[number] for number in range(len(items))]


def summarise(general: GeneralSet, moved: Sequence[Moved]) -> dict[str, Drift]:
    """Returns the drift of all prompts together, then that of each domain."""
    by_domain = defaultdict(list)
    for prompt, each in zip(general.prompts, moved, strict=True):
        by_domain[domain_of(prompt)].append(each)
    parts = {ALL: list(moved), **by_domain} if len(by_domain) > 1 else {ALL: list(moved)}
    return {name: _summarise(part) for name, part in parts.items()}


def _summarise(moved: Sequence[Moved]) -> Drift:
    divergences = [each.divergence for each in moved]
    agreements = np.array([each.agreement for each in moved])
    num, agreement = len(moved), float(agreements.mean())
    error = float(agreements.std(ddof=1)) / num**0.5 if num > 1 else 0.0
    interval = unbounded(divergences)
    return Drift(
        num,
        sum(divergences) / num,
        interval and (max(0.0, interval[0]), interval[1]),  # no divergence is below 0
        agreement,
        bounded(agreement, error, num),
    )


def write_base(path: Path, base: Base) -> None:
    """Writes what the base says; the file appears whole or not at all."""
    parts = {
        "prompts": _flat(base.answers, "prompt"),
        "answers": _flat(base.answers, "answer"),
        "sizes": np.array([(len(a.prompt), len(a.answer)) for a in base.answers], np.int32),
        "ended_by": np.array(
            [-1 if a.ended_by is None else a.ended_by for a in base.answers], np.int32
        ),
        "top": np.concatenate([a.top for a in base.answers]),
        "log_probabilities": np.concatenate([a.log_probabilities for a in base.answers]),
        "losses": np.array(base.losses, np.float64),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(plain.TEMPORARY.format(path.name, os.getpid()))
    try:
        save_file(parts, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _flat(answers: Sequence[BaseAnswer], name: str) -> np.ndarray:
    return np.array([token for each in answers for token in getattr(each, name)], np.int32)


def read_base(path: Path) -> Base | None:
    """Returns what `write_base` wrote; None if there is no such file, or a damaged one."""
    try:
        parts = load_file(path)
        return Base(list(_answers(parts)), parts["losses"].tolist())
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _answers(parts: dict[str, np.ndarray]) -> Iterator[BaseAnswer]:
    prompt_at = answer_at = at = 0
    for (asked, answered), ended_by in zip(parts["sizes"], parts["ended_by"], strict=True):
        positions = int(answered) + int(ended_by >= 0)
        yield BaseAnswer(
            parts["prompts"][prompt_at : prompt_at + asked].tolist(),
            parts["answers"][answer_at : answer_at + answered].tolist(),
            int(ended_by) if ended_by >= 0 else None,
            parts["top"][at : at + positions],
            parts["log_probabilities"][at : at + positions],
        )
        prompt_at, answer_at, at = prompt_at + asked, answer_at + answered, at + positions
