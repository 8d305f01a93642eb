"""Defines a task: one class that prepares its data, builds its model, trains and reports.

Class methods answer before a model exists; an instance has one and is what the engine trains
(`train.task.Trainable`). To add a task, add a folder with such a class, and a line in `registry`.

A minimal task (tests/support/toy_task.py) defines a schema, a `RunConfig` with a section of its
own, and

    model_sections      the sections that say what the model is
    prepare             reads or makes the data
    workload            the sizes of the training examples and of the held-out ones
    build_model         the model, random or from files
    collate             a micro-batch of training examples: a dataclass of tensors
    collate_held_out    a micro-batch of held-out examples
    num_supervised      the number of items in a micro-batch that the loss is a sum over
    loss                that sum, and further sums to report

With these it trains on any number of processes, resumes, evaluates and plans. All other methods
have defaults, and a task overrides those that do not suit it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import RenderableType
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from sft.data import batches
from sft.errors import ConfigError, UserError, VerificationError
from sft.evaluate import answers
from sft.models.export import load_weights, read_weights
from sft.models.sequences import SequenceGroup
from sft.models.weights import Weights
from sft.runtime.console import Advance, metrics_line, write_json
from sft.runtime.processes import BetweenCollectives, Context
from sft.runtime.tensor_file import TensorFile
from sft.train.engine import Engine
from sft.train.parallel.trial import refuse_unusable
from sft.train.task import Batch

ExampleSize = tuple[int, int]  # tokens of an example, and how many of them the loss is a sum over


@dataclass(frozen=True)
class Labels:
    """The words that a plan of the task uses."""

    examples: str = "examples"
    each: str = ""  # follows `examples`, such as " of 120 transitions"
    items: str = "supervised"  # the tokens that the loss is a sum over
    answers: str = "answering held-out prompts"
    answers_key: str = "evaluation.batch_size"  # the key that lowers the memory of answers
    eval_remedy: str = "shorter held-out rows"  # how the held-out loss takes less memory


@dataclass(frozen=True)
class TaskInfo:
    """The values on which memory and time depend, besides `train`."""

    sizes: Any  # of the model, named as in transformers' configurations of text models
    cache: Path  # a folder that outlives a run
    mode: str = "full"  # as in `tuning.mode`
    copies: int = 1  # how often each token goes through the model
    deepest_layer: int = -1  # the last layer that the loss reads; -1: the last of all
    needs_global_batch: bool = False  # needs one more pass (train.task.Trainable)
    packs: bool = True  # whether several examples can share a row
    attention: str = "auto"  # as in `model.attn_implementation`
    vocabulary: int = 0  # entries of the tokenizer that is saved
    small: bool = False  # traced whole, and without gradient checkpointing
    repeats: bool = True  # whether layers of one kind have equal trained parts
    examples_bytes: int = 0  # bytes of all training examples, if each process keeps them in RAM
    waiting_bytes: int = 0  # bytes of a token in a collated micro-batch that waits for its turn
    starts_split: bool = False  # whether a rank of FSDP2 or ZeRO-3 reads its own elements only
    most_shared_tokens: float = math.inf  # of a row that processes can share
    labels: Labels = Labels()


@dataclass(frozen=True)
class Workload:
    """The sizes of the examples, on which memory and time depend."""

    lengths: Sequence[int]  # tokens of each example
    supervised: np.ndarray  # (examples,) the number of items that the loss is a sum over
    held_out: Workload | None = None

    def sizes(self, chosen: Sequence[int]) -> tuple[ExampleSize, ...]:
        """Returns the sizes of the `chosen` examples."""
        lengths, supervised = self.lengths, self.supervised
        return tuple((lengths[i], min(int(supervised[i]), lengths[i])) for i in chosen)


@dataclass(frozen=True)
class Alternative:
    """A change of the configuration that takes less memory, and what it costs."""

    values: dict[str, Any]  # by dotted path
    price: str
    max_length: int | None = None  # tokens to which longer examples are cut


@dataclass(frozen=True)
class Finding:
    """The result of one check of `make check`. `do`: how the user corrects it."""

    ok: bool
    what: str
    do: str = ""


@dataclass(frozen=True)
class Shrunk:
    """A task made small for `make verify-*`."""

    values: dict[str, Any]  # for its sections, by dotted path
    changes: list[tuple[str, str]]  # shown to people: name, difference from the configuration
    exact: dict[str, Any]  # further values, if runs with different cuts are compared
    batch: int  # examples of a global batch, at most
    chosen_from: str  # names the data that the examples come from


@dataclass(frozen=True)
class Results:
    """The results of an evaluation."""

    metrics: dict[str, float]
    details: Any = None  # further results for the task's report


class Task(ABC):
    """One kind of training; see the module's docstring. `Any` is the task's own configuration."""

    model_sections: ClassVar[tuple[str, ...]]
    """Sections of the configuration that say what the model is."""
    placeholders: ClassVar[Mapping[str, Any]] = {}
    """Values for required keys of other sections, where only the model matters."""
    shares_sequences: ClassVar[bool] = False
    """Whether several processes can share a sequence (`train.context_parallel`)."""
    compares_evaluations: ClassVar[bool] = False
    """Whether the task has `rows_of` and `improvement` (`train.early_stopping`)."""
    needs_global_batch = False

    # -- before there is a model

    @classmethod
    @abstractmethod
    def prepare(cls, config: Any, tick: Callable[[], None] = lambda: None) -> Any:
        """Returns the data, before a process group exists; calls `tick` when there is progress."""

    @classmethod
    def prepare_evaluation(cls, config: Any, tick: Callable[[], None] = lambda: None) -> Any:
        """Returns the data that an evaluation needs."""
        return cls.prepare(config, tick)

    @classmethod
    def refuse_untrainable(cls, config: Any) -> None:
        """Raises ConfigError for a configuration that can be used, but not trained."""
        refuse_unusable(config.train)
        if config.train.early_stopping.metric and not cls.compares_evaluations:
            raise ConfigError(
                "train.early_stopping.metric: this task has no interval for the difference of two "
                "evaluations; set null"
            )
        if config.train.context_parallel > 1 and not cls.shares_sequences:
            raise ConfigError(
                "train.context_parallel: only fine-tuning shares sequences between processes, "
                "not this task; set 1"
            )

    @classmethod
    def digests(cls, prepared: Any) -> dict[str, str]:
        """Returns digests of the data, which all ranks must share."""
        return {}

    @classmethod
    def identity_of(cls, config: Any, prepared: Any) -> dict[str, str]:
        """Returns the values that a checkpoint of this run has; known before weights are loaded."""
        own = {name: getattr(config, name).model_dump_json() for name in cls.model_sections}
        return own | cls.digests(prepared)

    @classmethod
    def refuse_unusable(cls, config: Any, prepared: Any) -> None:
        """Raises UserError for data that training or evaluation could not use."""

    @classmethod
    def info(cls, config: Any) -> TaskInfo:
        """Returns what memory and time depend on. By default the model counts as small."""
        shapes = [p.shape for p in cls.skeleton(config).parameters() if p.ndim > 1]
        widest = max((max(shape) for shape in shapes), default=1)
        sizes = {"hidden_size": widest, "num_hidden_layers": len(shapes), "vocab_size": 1}
        return TaskInfo(SimpleNamespace(**sizes), Path(".cache", config.task), small=True)

    @classmethod
    @abstractmethod
    def workload(cls, config: Any, prepared: Any = None) -> Workload:
        """Returns the sizes of the examples; if `prepared` is None, prepares the data for that."""

    @classmethod
    @abstractmethod
    def build_model(
        cls,
        config: Any,
        precision: str,
        device: torch.device,
        weights: bool = True,
        depth: int | None = None,
    ) -> nn.Module:
        """Returns the model ready to train; without `weights` it is random and reads no file.

        `depth`: how many layers it gets, of random weights; None: all.
        """

    @classmethod
    def build(
        cls,
        config: Any,
        prepared: Any,
        precision: str,
        budget: batches.Budget,
        context: Context,
    ) -> Task:
        """Returns the task with its model."""
        model = cls.build_model(config, precision, context.accelerator.device)
        return cls(config, prepared, model, budget, context)

    @classmethod
    def skeleton(cls, config: Any, depth: int | None = None) -> nn.Module:
        """Returns the model without storage, adapters included; `depth`: the layers it gets."""
        meta = torch.device("meta")
        with meta:
            return cls.build_model(config, "fp32", meta, weights=False, depth=depth)

    @classmethod
    def with_depth(cls, config: Any, depth: int) -> Any:
        """Returns a configuration for a model with `depth` layers."""
        return config

    @classmethod
    def blank_data(cls, config: Any, sizes: Sequence[ExampleSize]) -> Any:
        """Returns data with examples of these sizes for a dry run, which ignores their content.

        The default, the prepared data, suits tasks whose examples all have one size.
        """
        with _disable_current_modes():  # a dry run makes tensors without values
            return cls.prepare(config)

    @classmethod
    def answering_bytes(
        cls, config: Any, precision: str, prompts: Sequence[int], world_size: int
    ) -> int:
        """Returns the bytes that an evaluation adds to those of the model, in one process.

        `prompts`: tokens of each held-out prompt.
        """
        return 0

    @classmethod
    def resident_bytes(cls, prepared: Any) -> int:
        """Returns the bytes of data that each process has in memory already."""
        return 0

    @classmethod
    def alternatives(cls, config: Any, workload: Workload) -> Iterator[Alternative]:
        """Yields changes that take less memory, cheapest first."""
        yield from ()

    # -- what people see before training

    @classmethod
    def describe(cls, config: Any) -> list[tuple[str, str]]:
        """Returns rows for the table at the beginning of a run: model and data."""
        return [("task", config.task)]

    @classmethod
    def preview(cls, prepared: Any) -> Iterator[RenderableType]:
        """Yields the output about the data."""
        yield from ()

    @classmethod
    def write_data_report(cls, prepared: Any, folder: Path) -> None:
        """Writes the files about the data into the run folder."""

    # -- check and verify

    @classmethod
    def check_data(cls, config: Any) -> Iterator[Finding]:
        """Yields findings about the data of `config`."""
        number = len(cls.workload(config).lengths)
        yield Finding(True, f"data: {number:,} {cls.info(config).labels.examples} to train on")

    @classmethod
    def trial_config(cls, config: Any) -> Any:
        """Returns the configuration for two steps of few examples."""
        return config

    @classmethod
    def trial_data(cls, config: Any) -> Any:
        """Returns the data of the trial that `trial_config` describes."""
        return cls.prepare(config)

    def check_result(self, engine: Engine, folder: Path) -> Iterator[Finding]:
        """Yields findings about the model after its first step, whose run folder is `folder`."""
        yield from ()

    trial_saves = True
    """Whether the trial of `make check` saves a checkpoint; a run tries that at its start."""

    @classmethod
    def shrink(cls, config: Any, folder: Path, exact: bool) -> Shrunk:
        """Returns a version of the task that is small enough for many whole runs.

        `exact`: without randomness, so that runs with different cuts can be compared.
        """
        raise VerificationError(f"task: {config.task} cannot be made small, so it cannot be tried")

    # -- with a model

    def __init__(
        self, config: Any, prepared: Any, model: Any, budget: batches.Budget, context: Context
    ):
        self.config, self.prepared, self.model = config, prepared, model
        self.budget, self.context = budget, context
        self.accelerator, self.log, self.guard = context.accelerator, context.log, context.guard

    def prove_sharing(self, group: SequenceGroup, precision: str) -> None:
        """Raises ConfigError unless processes that share a row compute what one process would.

        Needs no other process. `group` follows the model.
        """

    def identity(self) -> dict[str, str]:
        return self.identity_of(self.config, self.prepared)

    @cached_property
    def held_out_sha256(self) -> str:
        return ""

    @cached_property
    def _workload(self) -> Workload:
        return self.workload(self.config, self.prepared)

    @property
    def lengths(self) -> Sequence[int]:
        return self._workload.lengths

    @abstractmethod
    def collate(self, ids: list[int]) -> Batch: ...

    @abstractmethod
    def collate_held_out(self, ids: list[int]) -> Batch:
        """Returns a micro-batch of held-out examples; for no ids, one without items."""

    @abstractmethod
    def num_supervised(self, batch: Batch) -> float: ...

    def begin_step(self, step: int, factor: float) -> None: ...

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...

    def summarise(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        return None

    def set_global_batch(
        self, ids: list[int], summaries: torch.Tensor | None, supervised: float
    ) -> None: ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns the held-out loss, its perplexity and the means of what the loss reports."""
        with (
            self.guard.section("evaluation"),
            self.log.progress("held-out loss", len(self.held_out_lengths)) as advance,
        ):
            return answers.held_out_loss(
                self.eval_loss,
                self.num_supervised,
                model,
                self._held_out_batches(advance),
                self.accelerator,
            )

    def score_answers(self, model: nn.Module, step: int) -> dict[str, float]:
        return {}

    def rows_of(self, metric: str) -> np.ndarray:
        raise NotImplementedError

    def improvement(self, metric: str, before: np.ndarray, now: np.ndarray) -> tuple[float, float]:
        raise NotImplementedError

    @property
    def held_out_lengths(self) -> Sequence[int]:
        assert self._workload.held_out is not None
        return self._workload.held_out.lengths

    def _held_out_batches(self, advance: Advance) -> Iterator[Batch]:
        """Yields this rank's micro-batches, as many as on every other rank.

        It cuts `WINDOW` examples at a time: a cut of all would take memory for each of them.
        """
        lengths, world = self.held_out_lengths, self.accelerator.num_processes
        everything = range(len(lengths))
        for start in everything[:: answers.WINDOW]:
            ids = everything[start : start + answers.WINDOW]
            cut = batches.cut(ids, lengths, world, self.budget)
            for own in cut[self.accelerator.process_index]:
                self.guard.stop_if_asked()
                yield self.collate_held_out(own)
                advance(len(own) * world // self.budget.shared_by)

    def eval_loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.loss(model, batch)

    def save(self, folder: Path, weights: Weights) -> list[TensorFile]:
        file = TensorFile(folder / "model.safetensors", weights.empty(), {}, weights.behind)
        with BetweenCollectives() as local:
            for name in weights.tensors:
                whole = weights.whole(name)
                if weights.is_main:
                    local(file.write, name, whole)
        return [file] if weights.is_main else []

    def read(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        return read_weights(self.model, folder)

    def name_examples(self, ids: list[int]) -> str:
        named = ", ".join(map(self.name_example, ids[:8]))
        return named + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")

    def name_example(self, number: int) -> str:
        """Returns the origin of a training example."""
        return f"example {number}"

    def check_model(self, precision: str, layout: str) -> None:
        """Checks the model that was built, and says what its user should know.

        Changes the layout of the budget if this model cannot use the planned one.

        Raises ConfigError if the configured `layout` demands that one.
        """

    def finish(self, model: nn.Module) -> None:
        """Computes values from the trained weights after the last step. Collective."""

    # -- results

    def measure_base(self, engine: Engine, precision: str, resumed: bool) -> Results | None:
        """Returns results of the untrained model, if the report compares with them. Collective."""
        return None

    def measure(self, model: nn.Module, folder: Path, state: str) -> Results:
        """Returns the results that the run reports; files go to `folder`. Collective.

        `state` names the model's weights and precision, on which the results depend.
        """
        return Results(self.evaluate(model))

    def measure_saved(self, model: nn.Module, folder: Path, state: str) -> Results:
        """Returns the results of a finished run's model, with files in `folder`. Collective."""
        return self.measure(model, folder, state)

    def answer_by(self, choose: Callable[[answers.AnswerModel], answers.AnswerModel]) -> None:
        """Lets `choose` return what writes answers in place of the model's own decoding."""
        raise UserError("ENGINE: this run writes no answers, so only ENGINE=own can measure it")

    def report(
        self, base: Results | None, tuned: Results, folder: Path
    ) -> Iterator[RenderableType]:
        """Writes `metrics.json` into `folder` and yields what is printed. Main process only."""
        write_json(folder / "metrics.json", {"metrics": tuned.metrics})
        yield f"results: {metrics_line(tuned.metrics)}"

    def model_card(self, base: Results | None, tuned: Results) -> str | None:
        """Returns README.md of the final checkpoint; None for a model that has no card."""
        return None

    def closing_rows(
        self, base: Results | None, tuned: Results
    ) -> tuple[list[tuple[str, str]], dict[str, str]]:
        """Returns rows of the last table, and commands to try next with what they do."""
        return [], {}

    # -- a finished run

    @classmethod
    def open(
        cls,
        run: Path,
        config: Any,
        prepared: Any,
        precision: str,
        budget: batches.Budget,
        context: Context,
    ) -> Task:
        """Returns the task with the model of the finished run in the folder `run`."""
        folder, device = run / "final_checkpoint", context.accelerator.device
        model = cls.load_model(folder, config, precision, device)
        return cls(config, prepared, model, budget, context)

    @classmethod
    def load_model(
        cls, folder: Path, config: Any, precision: str, device: torch.device
    ) -> nn.Module:
        """Returns the model that `save` wrote into `folder`, for use."""
        model = cls.build_model(config, precision, device)
        load_weights(model, folder)
        return model.eval()
