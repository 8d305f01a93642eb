"""`AccelerateConnector`: one object that infers and trains, on one process or on many.

    connector = AccelerateConnector("outputs/nano")  # a run, checkpoint, model, adapter, hub id
    connector.complete([{"role": "user", "content": "Hi"}]).choices[0].message.content
    connector.complete_batch(conversations, predictions="answers.jsonl", temperature=0.7)

Every process calls the same methods with the same arguments and gets the same results, in the order
of the data, every example once. Prompts are rendered as in training (law 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.load import generation
from sft.config.schema import Generation, Train
from sft.data import batches, formats, rendering
from sft.data.files import BadRow, Row
from sft.errors import UserError
from sft.evaluate import answers, generate
from sft.evaluate.answers import Question, Speaker
from sft.evaluate.predictions import Predictions, Record, read
from sft.models import export
from sft.runtime import checkpoint
from sft.runtime.log import Log, Screen
from sft.runtime.precision import resolve_precision
from sft.runtime.processes import start_processes
from sft.serve.open import Opening, Quantization, open_speaker

PRECISIONS: dict[str, Any] = {"bf16": "bf16", "no": "fp32", "fp32": "fp32", "auto": "auto"}


# --- responses, in the shape that users of chat clients know -------------------------------------


@dataclass(frozen=True)
class Message:
    content: str | None
    role: str = "assistant"


@dataclass(frozen=True)
class Choice:
    message: Message
    finish_reason: str  # stop | length | error
    index: int = 0


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Completion:
    choices: tuple[Choice, ...]
    usage: Usage
    error: str | None = None

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @staticmethod
    def of(record: Record) -> Completion:
        choice = Choice(Message(record["answer"]), record["finish_reason"])
        usage = Usage(record["prompt_tokens"], record["completion_tokens"])
        return Completion((choice,), usage, record.get("error"))


class Share(list):
    """This process's part of a dataset; `indices` are the places of its items in it."""

    def __init__(self, items: Iterable[Any], indices: list[int]):
        super().__init__(items)
        self.indices = indices


class AccelerateConnector:
    """A model and the processes that share the work. Raises UserError for what cannot work.

    `model_name`: folder of a run, of one of its checkpoints, of a model or adapter, or a hub id.
    `adapter`: folder of a LoRA adapter for it. `quantization`: `nf4`; None: as it was trained.
    `mixed_precision`: `bf16`, `no` (fp32), or `auto`, as in training. `batch_size`: prompts at once
    on each process. `cache_dir`: where a hub id is downloaded to.
    """

    def __init__(
        self,
        model_name: str | Path,
        cache_dir: str | Path | None = None,
        batch_size: int | Literal["auto"] = "auto",
        mixed_precision: Literal["bf16", "no", "fp32", "auto"] = "bf16",
        adapter: str | Path | None = None,
        quantization: Quantization = None,
        *,
        log: Log | None = None,
        between: Callable[[], None] = lambda: None,
    ):
        for name, value, known in (
            ("batch_size", batch_size, ("auto",)),
            ("mixed_precision", mixed_precision, tuple(PRECISIONS)),
            ("quantization", quantization, (None, "nf4")),
        ):
            counts = name == "batch_size" and type(value) is int and value > 0
            if value not in known and not counts:
                more = " or a number above 0" if name == "batch_size" else ""
                expected = " or ".join(map(repr, known))
                raise UserError(f"{name}: expected {expected}{more}, found {value!r}")
        self.model_name = str(model_name)
        self.rows = None if batch_size == "auto" else batch_size
        train = Train(output_dir="outputs/connector", precision=PRECISIONS[mixed_precision])
        self.precision, _ = resolve_precision(train)
        try:
            self.accelerator: Accelerator = start_processes(train)
        except ValueError as error:
            if isinstance(error, UserError) or "AcceleratorState" not in str(error):
                raise
            raise UserError(
                f"mixed_precision: {mixed_precision} is not what this process computes in since "
                "its first connector; give both the same"
            ) from None
        self._opening = Opening(
            self.model_name,
            str(adapter) if adapter else None,
            quantization,
            cache_dir,
            self.precision,
            self.accelerator.device,
        )
        self.log = log or (Screen() if self.is_main_process else Log(None))
        self.between = between
        self._speaker: Speaker | None = None
        self._share: Share | None = None

    @property
    def is_main_process(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def process_index(self) -> int:
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    # -- inference

    def load_model_once(self) -> Speaker:
        """The model and its tokenizer, loaded at the first call. Collective."""
        if self._speaker is None:
            with self.accelerator.local_main_process_first():  # one download for this machine
                self._speaker = open_speaker(self._opening)
            if self._speaker.tokenizer.chat_template == rendering.DEFAULT_TEMPLATE:
                self.log.say(f"{self.model_name} has no chat template: asked as User: / Assistant:")
        return self._speaker

    def complete(
        self,
        messages: list[dict[str, Any]],
        told: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> Completion:
        """The answer to a conversation; `told` hears its text as it is written. Raises UserError
        for a conversation that cannot be answered. `settings`: see config.Generation.
        """
        speaker, how = self.load_model_once(), generation(settings)
        asked = _question(messages, 0)
        prompt = speaker.prompt(asked)
        if isinstance(prompt, str):
            raise UserError(f"cannot answer: {prompt}")
        stream = _Stream(speaker.tokenizer, speaker.stop, told) if told else None
        with generate.eval_mode(speaker.model):
            [answer] = generate.decode(
                speaker.model, [prompt], how, speaker.stop, told=stream.hear if stream else None
            )
        if stream:
            stream.end()
        return Completion.of(speaker.record(asked, prompt, answer))

    def complete_batch(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        predictions: str | Path | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Answers to all, in their order, on every process. Collective.

        One that cannot be answered gets `error` and the finish_reason `error`. With `predictions`,
        a JSONL file, what is answered is on disk, and not asked again by a later call.
        """
        asked = [_question(messages, i) for i, messages in enumerate(conversations)]
        if predictions is not None:
            self.answer(asked, Path(predictions), len(asked), **settings)
            return [Completion.of(record) for record in read(Path(predictions))]
        how, speaker = generation(settings), self.load_model_once()
        held = Held()
        self._answer_all(speaker, asked, how, held, len(asked))
        found = gather_object(held.records) if self.num_processes > 1 else held.records
        by_index = {record["index"]: record for record in found}
        return [Completion.of(by_index[i]) for i in range(len(asked))]

    def answer(
        self, asked: Iterable[Question], path: Path, total: int | None = None, **settings: Any
    ) -> None:
        """Answers to a stream of questions into a file of predictions. Collective."""
        how, speaker = generation(settings), self.load_model_once()
        self._answer_all(speaker, asked, how, Predictions(path), total)

    def _answer_all(
        self,
        speaker: Speaker,
        asked: Iterable[Question],
        how: Generation,
        predictions: Any,
        total: int | None,
    ) -> None:
        answers.answer_all(
            speaker,
            asked,
            how,
            predictions,
            self.accelerator,
            self.log,
            rows=self.rows,
            between=self.between,
            total=total,
        )

    # -- work that is not generation

    def split_dataset(self, dataset: Sequence[Any]) -> Share:
        """This process's part, balanced by the length of the items (as text). Every item is in the
        part of one process; with fewer items than processes some parts are empty."""
        lengths = [len(item if isinstance(item, str) else str(item)) + 1 for item in dataset]
        budget = batches.Budget(1, "packed", max_rows=None)
        parts = batches.cut(range(len(lengths)), lengths, self.num_processes, budget)
        mine = sorted(i for micro_batch in parts[self.process_index] for i in micro_batch)
        self._share = Share([dataset[i] for i in mine], mine)
        return self._share

    def gather_results(self, results: Sequence[Any], share: Share | None = None) -> list[Any]:
        """One result for each item of this process's part (the last one split), by all processes,
        in the order of the dataset, on every process. Collective."""
        share = self._share if share is None else share
        if share is None or len(results) != len(share):
            expected = "a part of split_dataset" if share is None else f"{len(share)} results"
            raise UserError(f"gather_results: expected {expected}, found {len(results)} results")
        pairs = list(zip(share.indices, results, strict=True))
        found = gather_object(pairs) if self.num_processes > 1 else pairs
        return [result for _, result in sorted(found, key=lambda pair: pair[0])]

    # -- training

    def prepare_for_training(self, model: nn.Module, optimizer: Any, *dataloaders: Any) -> Any:
        """The same, for this process group: (model, optimizer, *dataloaders)."""
        return self.accelerator.prepare(model, optimizer, *dataloaders)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def save_model(self, model: nn.Module, output_dir: str | Path) -> None:
        """Model or adapter as safetensors, with the tokenizer: whole, or not at all. Collective.

        Takes the place of what it saved there before, and of nothing else.
        """
        folder = Path(output_dir)
        if folder.exists() and not (folder.is_dir() and _is_own(folder)):
            raise UserError(f"{folder} holds something else; give an output_dir that is new")
        weights = self.accelerator.get_state_dict(model)
        speaker = self.load_model_once()
        plain = self.accelerator.unwrap_model(model)
        if getattr(plain, "rows_per_prompt", 1) > 1:
            raise UserError("save_model: a mixture of models is saved by the run that trains it")

        def write(staging: Path) -> None:
            if self.is_main_process:
                export.save(plain, speaker.tokenizer, staging, weights)

        checkpoint.commit(folder, write, self.accelerator)


def _is_own(folder: Path) -> bool:
    """Whether all that lies there was saved together, or nothing does."""
    return not any(folder.iterdir()) or checkpoint.fault(folder, digests=False) is None


class Held:
    """In place of a file of predictions: in memory, for results that the caller holds anyway."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.num_expected = 0

    def expect(self, _: str) -> bool:
        self.num_expected += 1
        return True

    def append(self, records: list[Record]) -> None:
        self.records += records

    def finish(self) -> None: ...


def _question(messages: Any, number: int) -> Question:
    """A conversation as a question; what is none becomes one with an error."""
    try:
        read_messages, tools = formats.question({"messages": messages})
    except (ValueError, RecursionError) as error:
        return answers.question(BadRow("", number, formats.reason_of(error), str(messages)[:60]))
    return answers.question(Row(read_messages, tools, "", number))


class _Stream:
    """Text of tokens as they come, told only where more tokens cannot change it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: list[int], told: Callable[[str], None]
    ):
        self.tokenizer, self.stop, self.told = tokenizer, stop, told
        self.ids: list[int] = []
        self.done = 0

    def hear(self, tokens: list[int]) -> None:
        if tokens[0] not in self.stop:
            self.ids.append(tokens[0])
            text = self._text()
            if not text.endswith("\ufffd"):  # the first bytes of a character
                self._tell(text)

    def end(self) -> None:
        self._tell(self._text())

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        self.told(text[self.done :])
        self.done = max(self.done, len(text))
