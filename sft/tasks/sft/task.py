"""The SFT task: examples -> supervised tokens -> summed cross-entropy; the engine's Task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from sft.config.schema import Config, Crowd, Generation
from sft.data import batches, template
from sft.data.cache import Prepared
from sft.data.examples import Batch, Examples, collate
from sft.errors import ConfigError, UserError
from sft.evaluate import generate, scores
from sft.evaluate.answers import WINDOW, Scores, Speaker, answer_all, held_out_loss, question, score
from sft.evaluate.predictions import Predictions, key_of
from sft.models import digest, export, head
from sft.runtime.console import Advance
from sft.runtime.log import Log
from sft.runtime.watchdog import Guard


def usable_budget(
    budget: batches.Budget,
    asked: str,
    built: nn.Module,
    precision: str,
    device: torch.device,
    log: Log,
) -> batches.Budget:
    """The planned budget; padded where documents of this model, packed, would see each other.

    `asked`: `train.layout`; ConfigError if that is `packed` and cannot be.
    """
    if budget.layout == "padded" or head.documents_are_isolated(built, precision, device):
        return budget
    reason = "packed documents of this model would attend to each other"
    if asked == "packed":
        raise ConfigError(f"train.layout: {reason}; use train.layout: padded")
    log.say(f"layout: padded, since {reason}")
    return replace(budget, layout="padded")


def check_references(config: Config, prepared: Prepared) -> None:
    """UserError if a metric cannot use the reference of a row that it will score."""
    settings = config.evaluation
    tally = scores.Tally(settings.metrics, settings.labels or ())
    asked = (r for r in prepared.held_out.rows() if not template.is_document(r.messages))
    for number, row in enumerate(islice(asked, settings.num_examples)):
        reference = question(row, prepared.tokenizer).told["reference"]
        try:
            tally.add(number, None, reference)  # as if its answer had failed
        except UserError as error:
            raise UserError(f"{row.place}: {error}") from None


def identity(config: Config, prepared: Prepared) -> dict[str, str]:
    """What makes a checkpoint one of this run; known before a weight is loaded."""
    return {
        "model": digest.fingerprint(config.model),
        "tuning": config.tuning.model_dump_json(),
        **_crowd(config.crowd),
        "data": prepared.audit["data_sha256"],
        "tokenizer": prepared.audit["train"]["tokenizer_sha256"],
        "template": prepared.audit["train"]["template_sha256"],
    }


def _crowd(settings: Crowd) -> dict[str, str]:
    """Each key by itself, so that it is told which one differs."""
    if not settings.num_agents:
        return {}
    return {f"crowd.{key}": str(value) for key, value in settings.model_dump().items()}


class FineTune:
    """The engine's Task for supervised fine-tuning (see engine.Task for what each method owes)."""

    surveys = False

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        built: nn.Module,
        accelerator: Accelerator,
        log: Log,
        budget: batches.Budget,
        guard: Guard | None = None,
    ):
        self.guard = guard or Guard()
        self.config, self.prepared, self.model = config, prepared, built
        self.accelerator, self.log = accelerator, log
        self.budget = budget
        self.lengths = prepared.train.lengths
        self.head = head.SupervisedHead(built)

    def collate(self, ids: list[int]) -> Batch:
        return self._collate(self.prepared.train, ids)

    def _collate(self, examples: Examples, ids: list[int]) -> Batch:
        pad = self.prepared.tokenizer.pad_token_id
        return collate(examples, ids, pad, self.budget.layout, self.accelerator.device)

    def num_supervised(self, batch: Batch) -> float:
        """Tokens, or the sum of their weights."""
        return batch.targets.numel() if batch.weights is None else float(batch.weights.sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self.logits(model, batch, batch.positions)
        correct = logits.detach().argmax(-1) == batch.targets
        if batch.weights is None:
            loss = F.cross_entropy(logits, batch.targets, reduction="sum")
            return loss, {"token_accuracy": correct.sum()}
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        weights = batch.weights.to(losses)
        return losses @ weights, {"token_accuracy": correct.to(losses) @ weights}

    def logits(self, model: nn.Module, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """(positions, vocabulary), in fp32 or wider; `positions` as in `SupervisedHead`."""
        self.head.positions = positions
        try:
            logits = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits
        finally:
            self.head.positions = None
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def survey(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """Nothing: the loss is a sum over examples."""
        return None

    def surveyed(self, ids: list[int], found: torch.Tensor | None, supervised: float) -> None: ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        num = len(self.prepared.held_out)
        with (
            self.guard.section("evaluation"),
            self.log.progress("held-out loss", num) as advance,
        ):
            return held_out_loss(
                self.scored, self.num_supervised, model, self._held_out(advance), self.accelerator
            )

    def scored(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As `loss`, of what is held out: of the model as it will be used."""
        return self.loss(model, batch)

    def answering(self, model: nn.Module) -> nn.Module:
        """The model that writes answers."""
        return self.accelerator.unwrap_model(model)

    def finish(self, model: nn.Module) -> None:
        """After the last step: what follows from the trained weights. Collective."""

    def _held_out(self, advance: Advance) -> Iterator[Batch]:
        """This rank's micro-batches, as many as every rank's, of some examples after the others: a
        cut of all of them would take memory by their number."""
        examples, world = self.prepared.held_out, self.accelerator.num_processes
        everything = range(len(examples))
        for start in everything[::WINDOW]:
            ids = everything[start : start + WINDOW]
            cut = batches.cut(ids, examples.lengths, world, self.budget)
            for own in cut[self.accelerator.process_index]:
                self.guard.stop_if_asked()
                yield self._collate(examples, own)
                advance(len(own) * world)

    def answers(self, model: nn.Module, path: Path, state: str) -> Scores:
        """The first `evaluation.num_examples` held-out prompts, answered into `path` and scored.

        `state`: what of the model changes: its weights, the precision.
        """
        settings, tokenizer = self.config.evaluation, self.prepared.tokenizer
        asked = (r for r in self.prepared.held_out.rows() if not template.is_document(r.messages))
        identity = key_of(self.identity(), self.config.train.seed, state)
        stop = generate.stop_ids(tokenizer, self.model.generation_config)
        speaker = Speaker(self.answering(model), tokenizer, stop, identity)
        predictions = Predictions(path)
        with self.guard.section("generation"):
            answer_all(
                speaker,
                (question(r, tokenizer) for r in islice(asked, settings.num_examples)),
                Generation(max_new_tokens=settings.max_new_tokens),
                predictions,
                self.accelerator,
                self.log,
                rows=settings.batch_size,
                between=self.guard.stop_if_asked,
                total=min(settings.num_examples, len(self.prepared.held_out)),
            )
        return score(path, settings.metrics, self.accelerator, settings.labels or ())

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        base = None if self.config.tuning.mode == "full" else self.config.model
        export.save(self.model, self.prepared.tokenizer, folder, weights, base)

    def read(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        return export.read_weights(self.model, folder)

    def identity(self) -> dict[str, str]:
        return identity(self.config, self.prepared)

    def name_examples(self, ids: list[int]) -> str:
        named = ", ".join(self.prepared.train.row(i).place for i in ids[:8])
        return named + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
