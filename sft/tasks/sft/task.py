"""Fine-tuning: examples -> supervised tokens -> summed cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import gather_object
from rich.console import RenderableType
from torch import nn

from sft.config.load import with_values
from sft.config.lora import Tuning
from sft.config.schema import OF_LOSS, Config, Generation, Model
from sft.data import audit, audit_report, cache, files, template
from sft.data.batches import Budget, global_batch_ids
from sft.data.cache import Prepared
from sft.data.examples import ExampleArrays, Examples, examples_sha256
from sft.data.formats import is_conversation
from sft.errors import ConfigError, DataError, ModelError, UserError, oom_message, redact
from sft.evaluate import answers, generate, scores
from sft.evaluate.answers import Scores
from sft.evaluate.intervals import difference_of_ratios
from sft.evaluate.predictions import (
    MemoryPredictions,
    Record,
    ScoredPredictions,
    key_of,
    read_records,
)
from sft.models import attention, classes, digests, eva, export, layers, load, pretrained
from sft.models.cut import CannotCut, Cutting
from sft.models.groups import freeze_groups
from sft.models.reach import freeze_untrained
from sft.models.sequences import SequenceGroup, find_difference, most_tokens
from sft.models.sizes import Sizes, read_sizes
from sft.models.weights import Weights
from sft.runtime import run_folder
from sft.runtime.console import write_json
from sft.runtime.plain import read_json
from sft.runtime.processes import Context
from sft.runtime.tensor_file import TensorFile
from sft.tasks.base import Alternative, ExampleSize, Finding, Results, Shrunk, TaskInfo, Workload
from sft.tasks.sft import card, losses, replay, report, shrink
from sft.tasks.sft.passes import Passes
from sft.train.engine import Engine
from sft.train.parallel import cutting_rule
from sft.train.schedule import order_seed, total_steps

EVA_TOKENS, EVA_PARTS = 1024, 64  # what init_lora_weights: eva looks at
TRIAL_ROWS, TRIAL_TOKENS = 8, 16  # rows of a trial, and tokens of its answer, at most


def _needs_whole_weights(tuning: Tuning) -> bool:
    """Returns whether adapters are computed from weights that a rank must have whole."""
    lora = tuning.lora
    computed = lora.changes_base or lora.init_lora_weights in ("loftq", "eva")
    return tuning.mode != "full" and (computed or (lora.use_dora and tuning.mode == "qlora"))


@lru_cache(maxsize=64)
def _read_sizes(model: str, _: int | None) -> tuple[Sizes, float]:
    """Returns the sizes of a model, and the most tokens of a row that processes can share.

    `model`: its section of the configuration; the time of its file, if any, belongs to the key.
    """
    architecture = pretrained.architecture(Model.model_validate_json(model))
    return read_sizes(architecture), most_tokens(architecture)


class FineTune(Passes):
    """Supervised fine-tuning of a causal language model: full, LoRA or QLoRA."""

    model_sections: ClassVar[tuple[str, ...]] = ("model", "tuning")
    placeholders: ClassVar[Mapping[str, Any]] = {"data": {"train_path": "none"}}
    shares_sequences = True
    compares_evaluations = True

    # -- before there is a model

    @classmethod
    def prepare(cls, config: Config, tick: Callable[[], None] = lambda: None) -> Prepared:
        return cache.prepare(replay.with_base_answers(config, tick), tick)

    @classmethod
    def digests(cls, prepared: Prepared) -> dict[str, str]:
        train = prepared.audit["train"]
        return {
            "data": prepared.audit["data_sha256"],
            "tokenizer": train["tokenizer_sha256"],
            "template": train["template_sha256"],
        }

    @classmethod
    def identity_of(cls, config: Config, prepared: Prepared) -> dict[str, str]:
        return {
            "model": digests.model_sha256(config.model),
            "tuning": config.tuning.identity(),
            **cls.digests(prepared),
        }

    @classmethod
    def refuse_unusable(cls, config: Config, prepared: Prepared) -> None:
        """Raises UserError if a metric cannot use the reference of a row that it will score."""
        tally = scores.Tally(config.evaluation.metrics, config.evaluation.labels or ())
        answered = max(config.evaluation.num_examples, config.evaluation.during)
        number = -1
        for number, question in enumerate(_questions(prepared, answered)):
            try:
                tally.add(number, None, question.fields["reference"])  # as a failed answer
            except UserError as error:
                raise UserError(f"{question.fields['row']}: {error}") from None
        if config.evaluation.during and number < 0:
            raise UserError("evaluation.during: no held-out row asks for an answer; set it to 0")

    @classmethod
    def info(cls, config: Config) -> TaskInfo:
        file = Path(config.model.name, "config.json")
        stamp = file.stat().st_mtime_ns if file.is_file() else None
        sizes, most_shared = _read_sizes(config.model.model_dump_json(), stamp)
        return TaskInfo(
            sizes,
            Path(config.data.cache_dir),
            config.tuning.mode,
            attention=config.model.attn_implementation,
            vocabulary=sizes.vocab_size,
            repeats=not (config.tuning.differs_by_layer or config.train.differs_by_layer),
            needs_global_batch=cls.balance_of(config) is not None,
            starts_split=not _needs_whole_weights(config.tuning),
            most_shared_tokens=most_shared,
        )

    @classmethod
    def workload(cls, config: Config, prepared: Prepared | None = None) -> Workload:
        if prepared is None:
            cls.refuse_untrainable(config)
            prepared = cls.prepare(config)
        train, held_out = (
            (part.lengths, part.arrays.index["supervised"][part.order])
            for part in (prepared.train, prepared.held_out)
        )
        return Workload(*train, Workload(*held_out))

    @classmethod
    def uniform_workload(cls, config: Config) -> Workload:
        """Returns one global batch of the longest rows that are allowed, all tokens supervised.

        Raises ConfigError if the model has no positions for them.
        """
        length, number = config.data.max_seq_len, config.train.global_batch
        positions = cls.info(config).sizes.max_position_embeddings
        if positions and length > positions:
            raise ConfigError(
                f"{config.model.name} has positions for {positions:,} tokens, found {length:,}: "
                "give a smaller SEQ (data.max_seq_len)"
            )
        return Workload([length] * number, np.full(number, length))

    @classmethod
    def build_model(
        cls,
        config: Config,
        precision: str,
        device: torch.device,
        weights: bool = True,
        depth: int | None = None,
    ) -> nn.Module:
        return load.build(config, precision, device, weights, depth, adapt=cls.adapt)

    @classmethod
    def build(
        cls, config: Config, prepared: Any, precision: str, budget: Budget, context: Context
    ) -> FineTune:
        model = cls._build_cut(config, precision, context)
        if model is None:
            model = cls.build_model(config, precision, context.accelerator.device)
        task = cls(config, prepared, model, budget, context)
        if config.tuning.lora.init_lora_weights == "eva":
            run = lambda batch: task._run(task.model, batch, batch.positions)  # noqa: E731
            eva.begin_with_inputs(task.model, task._first_rows(), task.collate, run)
        return task

    @classmethod
    def _build_cut(cls, config: Config, precision: str, context: Context) -> nn.Module | None:
        """Returns a model of which this rank has its own elements only; None: it must be whole."""
        accelerator, tuning = context.accelerator, config.tuning
        rule = cutting_rule(config.train, accelerator)
        if rule is None:
            return None
        model, reason = None, ""
        try:
            if tuning.mode != "full" and tuning.lora.init_lora_weights == "eva":
                raise CannotCut("init_lora_weights: eva runs it before it is split")
            device, host = accelerator.device, torch.device("cpu")
            kept_on = host if config.train.offload else device
            with Cutting(rule, kept_on, keep_ends=cls.reads_rows(config)) as cutting:
                model = load.build(config, precision, device, adapt=cls.adapt, cutting=cutting)
                cutting.finish(model)
        except (ModelError, RuntimeError) as error:  # or a library met a weight without values
            if oom_message(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        if reason := next(filter(None, gather_object([reason])), ""):
            context.log.say(f"start: every rank reads the whole model, since {reason}")
            return None
        return model

    @classmethod
    def reads_rows(cls, config: Config) -> bool:
        """Returns whether building the model reads single rows of its embeddings."""
        return bool(config.model.new_tokens or config.tuning.lora.trainable_token_indices)

    def _first_rows(self) -> list[list[int]]:
        """Returns the ids of the first rows of the run, in parts of at least `EVA_TOKENS` tokens.

        The parts do not depend on the cut of a global batch, nor on the number of processes.
        """
        train, lengths = self.config.train, self.lengths
        parts: list[list[int]] = [[]]
        for step in range(total_steps(train, len(lengths))):
            for i in global_batch_ids(len(lengths), order_seed(train), step, train.global_batch):
                if sum(lengths[j] for j in parts[-1]) >= max(EVA_TOKENS, 4 * self.config.tuning.r):
                    parts.append([])
                if len(parts) > EVA_PARTS:
                    return parts[:-1]
                parts[-1].append(i)
        return parts

    @classmethod
    def skeleton(cls, config: Config, depth: int | None = None) -> nn.Module:
        load.check_attention(config.model)  # as `load_base` does, which a plan may not call
        arch = pretrained.architecture(config.model)
        with pretrained.explain_load_errors(config.model.name), torch.device("meta"):
            base = classes.from_config(
                arch if depth is None else pretrained.keep_layers(arch, depth),
                trust_remote_code=config.model.trust_remote_code,
            )
            load.with_new_tokens(base, config.model)
            if config.tuning.mode == "full":
                freeze_untrained(base, routers=config.tuning.router == "frozen")
            else:
                base = cls.adapt(base.requires_grad_(False), config)
            freeze_groups(base, config.train)
            return base

    @classmethod
    def blank_data(cls, config: Config, sizes: Sequence[ExampleSize]) -> Prepared:
        examples = Examples(
            ExampleArrays.pack(
                (i, files.Row([], None, "dry run", i), _blank_example(*size))
                for i, size in enumerate(sizes)
            )
        )
        tokenizer: Any = SimpleNamespace(pad_token_id=0)
        return Prepared(tokenizer, examples, examples, {})

    @classmethod
    def answering_bytes(
        cls, config: Config, precision: str, prompts: Sequence[int], world_size: int
    ) -> int:
        settings = config.evaluation
        asked = prompts[: max(settings.num_examples, settings.during)]
        if not len(asked):
            return 0
        rows = min(settings.batch_size, math.ceil(len(asked) / world_size))
        arch = pretrained.architecture(config.model)
        each = generate.bytes_per_row(arch, precision, int(max(asked)), settings.max_new_tokens)
        return rows * each * cls.info(config).copies

    @classmethod
    def alternatives(cls, config: Config, workload: Workload) -> Iterator[Alternative]:
        if config.tuning.mode == "full":
            yield Alternative({"tuning.mode": "lora"}, "adapters instead of all weights")
        if config.tuning.mode != "qlora" and config.tuning.quantization != "none":
            yield Alternative({"tuning.mode": "qlora"}, "frozen weights in 4 bits, slower")
        half = max(8, max(workload.lengths) // 2)
        price = "longer rows are cut or left out (data.on_long)"
        yield Alternative({"data.max_seq_len": half}, price, max_length=half)

    # -- what people see before training

    @classmethod
    def describe(cls, config: Config) -> list[tuple[str, str]]:
        paths = config.data.train_path
        return [
            ("model", f"{config.model.name}, {config.tuning.mode}"),
            ("data", redact(paths if isinstance(paths, str) else ", ".join(paths))),
        ]

    @classmethod
    def preview(cls, prepared: Prepared) -> Iterator[RenderableType]:
        yield "First row, as the model sees it (supervised: green; special: magenta; context: dim)"
        yield audit_report.colour_text(prepared.tokenizer, prepared.train[0])
        yield f"audit: {audit_report.summarise(prepared.audit)}"

    @classmethod
    def write_data_report(cls, prepared: Prepared, folder: Path) -> None:
        cache.write_audit(prepared, folder)

    # -- check and verify

    @classmethod
    def check_data(cls, config: Config) -> Iterator[Finding]:
        yield _check_template(config)
        prepared = cls.prepare(config)
        yield Finding(
            True,
            f"data: {len(prepared.train):,} rows to train on, {len(prepared.held_out):,} held out, "
            f"longest {max(prepared.train.lengths):,} tokens",
        )

    @classmethod
    def trial_config(cls, config: Config) -> Config:
        few = {
            "data.max_rows": min(TRIAL_ROWS, config.data.max_rows or TRIAL_ROWS),
            "evaluation.num_examples": min(1, config.evaluation.num_examples),
            "evaluation.during": min(1, config.evaluation.during),
            "evaluation.max_new_tokens": min(TRIAL_TOKENS, config.evaluation.max_new_tokens),
        }
        return with_values(config, few)

    @property
    def trial_saves(self) -> bool:  # type: ignore[override]
        return self.config.tuning.mode != "full"  # whole weights can be large

    def check_result(self, engine: Engine, folder: Path) -> Iterator[Finding]:
        if not self.config.evaluation.num_examples:
            return
        path, by = folder / "predictions.jsonl", self.answered_by
        self.answer_held_out(engine.model, path, "check")
        record = next(read_records(path), None)
        if record is None:
            yield Finding(True, "generation: no held-out row asks for an answer")
        elif "error" in record:
            problem = f"generation: {record['row']}: {record['error']}"
            yield Finding(False, problem, "correct the row")
        else:
            counts = (
                f"{record['prompt_tokens']} tokens asked, {record['completion_tokens']} answered"
            )
            yield Finding(True, f"{'aggregated ' * bool(by)}generation: {counts}{by}")

    @classmethod
    def shrink(cls, config: Config, folder: Path, exact: bool) -> Shrunk:
        return shrink.shrink(config, folder, exact)

    # -- with a model

    def check_model(self, precision: str, layout: str) -> None:
        if self.config.tuning.mode != "full":
            self._warn_of_untrained_ends()
        if self.config.tuning.router == "trained" and self.balance is None:
            self.log.say("tuning.router: the model has no load-balancing loss; there is none")
        device = self.accelerator.device
        try:
            reads_later = attention.reads_later_tokens(self.model, precision, device)
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"model.name: {self.config.model.name} does not run on text alone "
                f"({' '.join(str(error).split())[:200]}); {classes.EXPECTED}"
            ) from error
        if reads_later:
            raise ConfigError(
                f"model.name: {self.config.model.name}: its tokens see those that follow; "
                f"{classes.EXPECTED}"
            )
        self.prove_head(precision)
        self._choose_layout(precision, layout, device)
        if self.sequences:
            self.prove_sharing(self.sequences, precision)

    def prove_sharing(self, group: SequenceGroup, precision: str) -> None:
        device, packed = self.accelerator.device, self.budget.layout == "packed"
        reason = find_difference(self.model, group.size, precision, device, packed)
        if exact := shrink.narrow_copy(self.config):  # where no rounding can hide a difference
            group.follow(exact)
            reason = reason or find_difference(exact, 2, "fp64", torch.device("cpu"), packed)
        if reason:
            raise ConfigError(
                f"train.context_parallel: processes cannot share sequences of this model: {reason};"
                " set 1. Attention must be one that transformers finds by name, and all other "
                "layers must compute each token by itself; recurrent layers and convolutions do not"
            )

    def _choose_layout(self, precision: str, layout: str, device: torch.device) -> None:
        """Pads rows if packed documents of this model would see each other."""
        if self.budget.layout == "padded":
            return
        # The loss of a trained router takes no other form of a mask.
        prove = attention.keep_documents_apart
        prove = attention.documents_are_isolated if self.balance else prove
        if prove(self.model, precision, device):
            return
        reason = "packed documents of this model would attend to each other"
        if layout == "packed":
            raise ConfigError(f"train.layout: {reason}; use train.layout: padded")
        self.log.say(f"layout: padded, since {reason}")
        self.budget = replace(self.budget, layout="padded")

    def _warn_of_untrained_ends(self) -> None:
        tokenizer = self.prepared.tokenizer
        if untrained := layers.untrained_rows(self.model, sorted(audit.stop_ids(tokenizer))):
            names = ", ".join(tokenizer.convert_ids_to_tokens(untrained))
            self.log.say(
                f"warning: the embedding of {names} was never trained in this base model, so "
                "adapters may not learn to end a turn; use tuning.mode: full, or the template of a "
                "token that the base knows (data.chat_template)"
            )

    @classmethod
    def as_answer_model(cls, model: nn.Module) -> nn.Module:
        """Returns the model that writes answers with the trained `model`."""
        return model

    @property
    def answered_by(self) -> str:
        """Returns what answers, to be added to a message; an empty text for a single model."""
        return ""

    _choose_answerer: Callable[[answers.AnswerModel], answers.AnswerModel] = staticmethod(
        lambda own: own
    )

    def answer_by(self, choose: Callable[[answers.AnswerModel], answers.AnswerModel]) -> None:
        self._choose_answerer = choose

    def _answer(
        self,
        model: nn.Module,
        number: int,
        predictions: ScoredPredictions | MemoryPredictions,
        state: str,
    ) -> None:
        """Adds the answers to the first `number` held-out prompts to `predictions`. Collective.

        `state` names the model's weights and precision, on which the answers depend.
        """
        settings, tokenizer = self.config.evaluation, self.prepared.tokenizer
        stop = generate.stop_ids(tokenizer, self.model.generation_config)
        answer_model = answers.AnswerModel(
            self.as_answer_model(self.accelerator.unwrap_model(model)),
            stop,
            Generation(max_new_tokens=settings.max_new_tokens),
            settings.batch_size,
            tokenizer=tokenizer,
            identity=key_of(self.identity(), self.config.train.seed, state),
        )
        with self.guard.section("generation"):
            answers.answer_all(
                self._choose_answerer(answer_model),
                _questions(self.prepared, number),
                predictions,
                self.context,
                before_batch=self.guard.stop_if_asked,
                total=min(number, len(self.prepared.held_out)),
            )

    def _score(self, records: Iterable[Record]) -> Scores:
        settings = self.config.evaluation
        labels = settings.labels or ()
        return answers.score_records(records, settings.metrics, self.accelerator, labels)

    def score_answers(self, model: nn.Module, step: int) -> dict[str, float]:
        """Answers the first `evaluation.during` held-out prompts; returns their scores. Collective.

        The answers go to `evaluation/during/` of the run folder, which no process has to share.
        """
        if not (number := self.config.evaluation.during):
            return {}
        own = MemoryPredictions()
        self._answer(model, number, own, f"step {step}")
        records = sorted(gather_object(own.records), key=lambda record: int(record["index"]))
        if self.log.folder:
            with self.log.optional(run_folder.DURING):
                report.write_during(records, run_folder.during(self.log.folder, step))
        self.log.text("answers", report.answers_text(records, self.config.evaluation), step)
        self._tally = self._score(records).tally
        return self._tally.values()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        watched, self.example_sums = self.config.train.early_stopping.metric, None
        if watched in OF_LOSS:
            self.example_sums = losses.ExampleSums(len(self.held_out_lengths))
        metrics = super().evaluate(model)
        if sums := self.example_sums:  # each example was on one rank, or was shared
            device = self.accelerator.device
            sums.sums = self.accelerator.reduce(sums.sums.to(device), "sum").cpu()
        return metrics

    def rows_of(self, metric: str) -> np.ndarray:
        if metric not in OF_LOSS:
            return self._tally.rows_of(self._metric_with(metric))
        assert self.example_sums is not None
        return self.example_sums.sums.numpy()

    def _metric_with(self, score: str) -> str:
        """Returns the one of `evaluation.metrics` that a score belongs to."""
        return score if score in self.config.evaluation.metrics else "classification"

    def improvement(self, metric: str, before: np.ndarray, now: np.ndarray) -> tuple[float, float]:
        """Returns the interval of how much smaller the loss is, or how much higher the score."""
        if metric not in OF_LOSS:
            names, labels = [self._metric_with(metric)], self.config.evaluation.labels or ()
            tallies = [scores.Tally(names, labels) for _ in range(2)]
            for tally, rows in zip(tallies, (before, now), strict=True):
                tally.rows = rows
            pair = scores.paired_intervals(*tallies)[metric]
            if pair.low is None or pair.high is None:
                return -math.inf, math.inf
            return pair.low, pair.high
        column = int(metric == "token_accuracy")
        low, high = difference_of_ratios(before[:, column], now[:, column], before[:, 2])
        if metric == "token_accuracy":
            return low, high
        if metric == "loss":
            return -high, -low
        perplexity = math.exp(min(before[:, 0].sum() / max(before[:, 2].sum(), 1e-9), 700.0))
        return perplexity * -math.expm1(high), perplexity * -math.expm1(low)

    def answer_held_out(self, model: nn.Module, path: Path, state: str) -> Scores:
        """Answers the first `evaluation.num_examples` held-out prompts into `path`; scores them."""
        predictions = ScoredPredictions(path)
        self._answer(model, self.config.evaluation.num_examples, predictions, state)
        records, reason = predictions.collect()
        if reason:
            self.log.say(
                f"warning: {reason}. All answers are scored, but the file lacks some; `make "
                f"evaluate RUN={self.config.train.output_dir}` writes them"
            )
        return self._score(read_records(path) if records is None else records)

    @cached_property
    def _held_out_rows_sha256(self) -> str:
        return examples_sha256(self.prepared.held_out)

    @cached_property
    def held_out_sha256(self) -> str:
        """Returns the digest of the held-out rows and, if a score is watched, of what is asked."""
        rows, settings, train = (
            self._held_out_rows_sha256,
            self.config.evaluation,
            self.config.train,
        )
        if {train.save_best, train.early_stopping.metric} <= {None, *OF_LOSS}:
            return rows
        return key_of(rows, settings.during, settings.max_new_tokens, settings.labels)

    def save(self, folder: Path, weights: Weights) -> list[TensorFile]:
        own = self.config.model
        whose: Any = {"origin": own} if self.config.tuning.mode == "full" else {"base": own}
        whose["max_shard_size"] = self.config.train.max_shard_size
        return export.save(self.model, self.prepared.tokenizer, folder, weights, **whose)

    def name_example(self, number: int) -> str:
        return self.prepared.train.row(number).place

    # -- results

    def measure_base(self, engine: Engine, precision: str, resumed: bool) -> Results:
        """Returns the base's results; a resumed run reads them if what is asked is the same."""
        path = engine.folder / "evaluation" / "base.json"
        settings = self.config.evaluation.model_dump(exclude={"num_shown", "batch_size", "during"})
        settings["held_out_sha256"] = self._held_out_rows_sha256
        if resumed and path.with_suffix(".jsonl").exists():
            found = read_json(path)  # a crash of the machine can leave it empty
            if found.get("settings") == settings:
                return Results(found["metrics"], found)
        state = f"{engine.digest()} {precision}"
        results = self._measure(engine.model, path.with_suffix(".jsonl"), state)
        if self.log.folder:
            with self.log.optional(path.name):
                write_json(path, results.details | {"settings": settings})
        return results

    def measure(self, model: nn.Module, folder: Path, state: str) -> Results:
        return self._measure(model, folder / "predictions.jsonl", state)

    def _measure(self, model: nn.Module, path: Path, state: str) -> Results:
        """Returns held-out metrics with the scores of the answers, which go to `path`."""
        held_out = self.evaluate(model)
        found = self.answer_held_out(model, path, state)
        results = found.tally.report()
        results["metrics"] = held_out | results["metrics"]
        results |= {"num_examples": found.num_examples, "num_failed": found.num_failed}
        return Results(results["metrics"], results)

    def report(
        self, base: Results | None, tuned: Results, folder: Path
    ) -> Iterator[RenderableType]:
        settings, path = self.config.evaluation, folder / "predictions.jsonl"
        with self.log.optional(path.name):
            first = list(islice(read_records(path), settings.num_shown))
            self.log.text("answers", report.answers_text(first, settings))
        return report.show(self.config, base, tuned, folder)

    merge_arguments = ""  # what `make merge` needs in addition to the run

    def model_card(self, base: Results | None, tuned: Results) -> str:
        digests = self.digests(self.prepared)
        return card.model_card(self.config, digests, base, tuned, self.loading())

    def loading(self) -> str:
        """Returns Markdown on how the final checkpoint is loaded."""
        auto = classes.auto_name(pretrained.architecture(self.config.model))
        return card.loading(auto, whole=self.config.tuning.mode == "full")

    def closing_rows(
        self, base: Results | None, tuned: Results
    ) -> tuple[list[tuple[str, str]], dict[str, str]]:
        return report.closing(self.config, base, tuned, self.merge_arguments)


def _questions(prepared: Prepared, number: int) -> Iterator[answers.Question]:
    """Yields the first `number` held-out prompts; documents ask nothing."""
    rows = (row for row in prepared.held_out.rows() if is_conversation(row.messages))
    for row in islice(rows, number):
        yield answers.make_question(row, prepared.tokenizer)


def _check_template(config: Config) -> Finding:
    """Renders a conversation and finds in it what a model writes after the prompt of serving."""
    tokenizer = cache.load_tokenizer(config)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    try:
        template.render(tokenizer, turns)
    except DataError as error:
        return Finding(False, f"chat template: {error}", "training and serving would differ")
    return Finding(
        True, f"tokenizer and template: {len(tokenizer):,} tokens, prompts as when served"
    )


def _blank_example(length: int, supervised: int) -> template.Example:
    ids = [0] * length
    return template.Example(ids, [template.IGNORED] * (length - supervised) + ids[:supervised])
