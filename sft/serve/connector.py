"""`AccelerateConnector`: inference and training on one process or on many.

    connector = AccelerateConnector("outputs/nano")  # a run, checkpoint, model, adapter, hub id
    connector.complete([{"role": "user", "content": "Hi"}]).choices[0].message.content
    connector.complete_batch(conversations, predictions="answers.jsonl", temperature=0.7)

Every process calls the same methods with the same arguments and gets the same results, in the order
of the data, every example once. Prompts are rendered as in training (law 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.load import make_generation
from sft.config.schema import Train
from sft.data import batches, formats, rendering
from sft.data.files import BadRow, Row
from sft.data.messages import error_reason
from sft.errors import UserError
from sft.evaluate import answers, generate
from sft.evaluate.answers import AnswerModel, Question
from sft.evaluate.generate import Answer
from sft.evaluate.predictions import MemoryPredictions, Predictions, Record, read_records
from sft.models import export
from sft.models.weights import Weights
from sft.runtime import checkpoint
from sft.runtime.hardware import resolve_precision
from sft.runtime.log import Log, Screen
from sft.runtime.processes import Context, start_processes
from sft.runtime.tensor_file import TensorFile
from sft.serve.runs import Opening, Quantization, open_model
from sft.serve.vllm_engine import AnswerEngine, Kind

PRECISIONS: dict[str, Any] = {
    **dict.fromkeys(("no", "fp32"), "fp32"),
    **{name: name for name in ("bf16", "fp16", "auto")},
}


@dataclass(frozen=True)
class Message:
    """An answer. This class and the next three have the shape of chat clients' responses."""

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
    def from_record(record: Record) -> Completion:
        choice = Choice(Message(record["answer"]), record["finish_reason"])
        usage = Usage(record["prompt_tokens"], record["completion_tokens"])
        return Completion((choice,), usage, record.get("error"))


class DatasetPart(list):
    """This process's part of a dataset; `indices` are its items' places in the dataset."""

    def __init__(self, items: Iterable[Any], indices: list[int]):
        super().__init__(items)
        self.indices = indices


class AccelerateConnector:
    """A model and the processes that share its work. Raises UserError for invalid arguments.

    `model_name`: folder of a run, of one of its checkpoints, of a model or adapter, or a hub id.
    `adapter`: folder of a LoRA adapter for it. `quantization`: `nf4`; None: as it was trained.
    `mixed_precision`: `bf16`, `fp16`, `no` (fp32), or `auto`, as in training. `batch_size`: prompts
    in a batch on each process. `cache_dir`: folder for downloads of a hub id. `before_batch`:
    called before each batch. `engine`: what answers `complete_batch`; `vllm`, or `auto`: vLLM
    where it is installed and gives the same (docs/INFER.md). `vllm_args`: options of `vllm serve`.
    """

    def __init__(
        self,
        model_name: str | Path,
        cache_dir: str | Path | None = None,
        batch_size: int | Literal["auto"] = "auto",
        mixed_precision: Literal["bf16", "fp16", "no", "fp32", "auto"] = "bf16",
        adapter: str | Path | None = None,
        quantization: Quantization = None,
        engine: Kind = "own",
        vllm_args: str = "",
        *,
        log: Log | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ):
        if batch_size != "auto" and not (type(batch_size) is int and batch_size > 0):
            expected = "expected 'auto' or a number above 0"
            raise UserError(f"batch_size: {expected}, found {batch_size!r}")
        for name, value, known in (
            ("mixed_precision", mixed_precision, PRECISIONS),
            ("quantization", quantization, (None, "nf4")),
        ):
            if value not in known:
                expected = " or ".join(map(repr, known))
                raise UserError(f"{name}: expected {expected}, found {value!r}")
        self.model_name = str(model_name)
        train = Train(output_dir="outputs/connector", precision=PRECISIONS[mixed_precision])
        self.precision, _ = resolve_precision(train)
        try:
            self.accelerator: Accelerator = start_processes(train, shared=True)
        except ValueError as error:
            if isinstance(error, UserError) or "AcceleratorState" not in str(error):
                raise
            raise UserError(
                f"mixed_precision: found {mixed_precision}, but the first connector of this "
                "process uses another one; give both the same"
            ) from None
        self._opening = Opening(
            self.model_name,
            str(adapter) if adapter else None,
            quantization,
            cache_dir,
            self.precision,
            self.accelerator.device,
            None if batch_size == "auto" else batch_size,
        )
        self.log = log or (Screen() if self.is_main_process else Log(None))
        self.before_batch = before_batch
        changed = {"adapter": adapter, "quantization": quantization, "cache_dir": cache_dir}
        given = [name for name, value in changed.items() if value is not None]
        unable = f"{given[0]} is only opened by our own decoding" if given else None
        self._engine = AnswerEngine(engine, self.model_name, vllm_args, unable)
        self._model: AnswerModel | None = None
        self._last_part: DatasetPart | None = None

    @property
    def is_main_process(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def process_index(self) -> int:
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    def load_model_once(self) -> AnswerModel:
        """Returns the model with its tokenizer, loaded at the first call. Collective."""
        if self._model is None:
            with self.accelerator.local_main_process_first():  # one download for this machine
                self._model = open_model(self._opening)
            if self._model.tokenizer.chat_template == rendering.DEFAULT_TEMPLATE:
                self.log.say(f"{self.model_name} has no chat template: uses User: / Assistant:")
        return self._model

    @property
    def model(self) -> nn.Module:
        """Returns the model that answers, loaded at the first call. Collective."""
        return self.load_model_once().model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns its tokenizer, loaded with it at the first call. Collective."""
        return self.load_model_once().tokenizer

    def model_with(self, settings: dict[str, Any]) -> AnswerModel:
        """Returns the model with these settings. Checks them before it loads the model."""
        checked = make_generation(settings)
        return replace(self.load_model_once(), settings=checked)

    def complete(
        self,
        messages: list[dict[str, Any]],
        on_text: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> Completion:
        """Returns the answer to a conversation. `on_text` receives the text while it is written.

        `settings` are those of `Generation`. Raises UserError if it cannot answer.
        """
        return self.ask({"messages": messages}, on_text, **settings)[2]

    def ask(
        self,
        row: dict[str, Any],
        on_text: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> tuple[list[int], Answer, Completion]:
        """Returns the token ids of a prompt, its answer, and the answer as text; see `complete`.

        `row` has `messages` and perhaps `tools`, as a row of data has.
        """
        self.model_with(settings)  # checks them
        prompt = self.render(row)
        return prompt, *self.continue_ids(prompt, on_text, **settings)

    def continue_ids(
        self,
        prompt: list[int],
        on_text: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> tuple[Answer, Completion]:
        """Returns what follows the token ids of a prompt, and the same as text; see `complete`."""
        model = self.model_with(settings)
        if problem := model.find_problem(prompt):
            raise UserError(f"cannot answer: {problem}")
        stream = _TextStream(model, on_text) if on_text else None
        with generate.eval_mode(model.model):
            [answer] = model.decode([prompt], on_tokens=stream.add if stream else None)
        if stream:
            stream.flush()
        record = model.to_record(Question([], None, {}), prompt, answer)
        return answer, Completion.from_record(record)

    def render(self, row: dict[str, Any]) -> list[int]:
        """Returns the token ids of a prompt. Raises UserError with the reason if it has none."""
        prompt = self.load_model_once().render_prompt(_make_question(row, 0))
        if isinstance(prompt, str):
            raise UserError(f"cannot answer: {prompt}")
        return prompt

    def complete_batch(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        predictions: str | Path | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Returns the answers to all conversations, in their order, on every process. Collective.

        If one cannot be answered, its `finish_reason` is "error", and `error` has the reason.
        `predictions` names a JSONL file for the answers; a later call reuses those in it.
        """
        questions = [
            _make_question({"messages": messages}, i) for i, messages in enumerate(conversations)
        ]
        if predictions is not None:
            path = Path(predictions)
            self.answer(questions, Predictions(path), len(questions), **settings)
            return [Completion.from_record(record) for record in read_records(path)]
        memory = MemoryPredictions()
        self.answer(questions, memory, len(questions), **settings)
        found = gather_object(memory.records)
        by_index = {record["index"]: record for record in found}
        return [Completion.from_record(by_index[i]) for i in range(len(questions))]

    def answer(
        self,
        questions: Iterable[Question],
        predictions: Predictions | MemoryPredictions,
        total: int | None = None,
        **settings: Any,
    ) -> None:
        """Adds an answer for each question that has none in `predictions` yet. Collective."""
        context = Context(self.accelerator, self.log)
        own = self.model_with(settings)
        answers.answer_all(
            self._engine.answering(own, self.precision, context, self.before_batch),
            questions,
            predictions,
            context,
            before_batch=self.before_batch,
            total=total,
        )

    def close(self) -> None:
        """Ends vLLM, if it was started; it also ends with this process."""
        self._engine.close()

    def split_dataset(self, dataset: Sequence[Any]) -> DatasetPart:
        """Returns this process's part; the parts are balanced by the length of the items as text.

        Each item is in one part. With fewer items than processes some parts are empty.
        """
        lengths = [len(item if isinstance(item, str) else str(item)) + 1 for item in dataset]
        budget = batches.Budget(1, "packed", max_rows=None)
        parts = batches.cut(range(len(lengths)), lengths, self.num_processes, budget)
        mine = sorted(i for micro_batch in parts[self.process_index] for i in micro_batch)
        self._last_part = DatasetPart([dataset[i] for i in mine], mine)
        return self._last_part

    def gather_results(self, results: Sequence[Any], part: DatasetPart | None = None) -> list[Any]:
        """Returns the results of all processes on every process, in the order of the dataset.

        `results` has one result for each item of `part`, this process's part. If `part` is None, it
        is the last part that `split_dataset` returned. Collective.
        """
        part = self._last_part if part is None else part
        if part is None or len(results) != len(part):
            expected = "a part of split_dataset" if part is None else f"{len(part)} results"
            raise UserError(f"gather_results: expected {expected}, found {len(results)} results")
        pairs = gather_object(list(zip(part.indices, results, strict=True)))
        return [result for _, result in sorted(pairs, key=lambda pair: pair[0])]

    def prepare_for_training(self, model: nn.Module, optimizer: Any, *dataloaders: Any) -> Any:
        """Returns (model, optimizer, *dataloaders), prepared for this process group."""
        return self.accelerator.prepare(model, optimizer, *dataloaders)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def save_model(self, model: nn.Module, output_dir: str | Path) -> None:
        """Saves model or adapter as safetensors, with the tokenizer, whole or not at all.

        It replaces only what it saved there before. Collective.
        """
        folder = Path(output_dir)
        if folder.exists() and not (folder.is_dir() and _is_replaceable(folder)):
            raise UserError(
                f"{folder} holds something else than a saved model; give a new output_dir"
            )
        weights = self.accelerator.get_state_dict(model)
        tokenizer = self.load_model_once().tokenizer
        plain = self.accelerator.unwrap_model(model)
        if getattr(plain, "rows_per_prompt", 1) > 1:
            raise UserError("save_model: a mixture of models is saved by the run that trains it")

        def write(staging: Path) -> list[TensorFile]:
            if not self.is_main_process:
                return []
            return export.save(plain, tokenizer, staging, Weights(weights))

        checkpoint.commit(folder, write, self.accelerator)


def _is_replaceable(folder: Path) -> bool:
    """Returns whether a folder is empty, or holds what `save_model` saved and nothing else."""
    return not any(folder.iterdir()) or checkpoint.fault(folder, digests=False) is None


def _make_question(row: dict[str, Any], number: int) -> Question:
    """Returns a conversation as a question, with the reason if it cannot be asked."""
    try:
        found = formats.read_question(row)
    except (ValueError, RecursionError) as error:
        bad = BadRow("", number, error_reason(error), str(row["messages"])[:60])
        return answers.make_question(bad)
    return answers.make_question(Row(found.messages, found.tools, "", number))


class _TextStream:
    """Passes on the text of tokens as soon as later tokens cannot change it."""

    def __init__(self, model: AnswerModel, on_text: Callable[[str], None]):
        self.model, self.on_text = model, on_text
        self.ids: list[int] = []
        self.num_passed_on = 0

    def add(self, tokens: list[int]) -> None:
        """Receives the next token of the only row."""
        if tokens[0] not in self.model.stop:
            self.ids.append(tokens[0])
            self.flush(is_last=False)

    def flush(self, is_last: bool = True) -> None:
        """Passes on the new text; a character without its last bytes waits for them."""
        text = str(self.model.tokenizer.decode(self.ids, skip_special_tokens=True))
        if is_last or not text.endswith("\ufffd"):
            self.on_text(text[self.num_passed_on :])
            self.num_passed_on = max(self.num_passed_on, len(text))
