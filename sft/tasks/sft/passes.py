"""Passes over a micro-batch: what a model computes from it, and what is summed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from sft.config.schema import Config
from sft.data.cache import Prepared
from sft.data.examples import Batch, Examples, collate, share
from sft.models import attention, pretrained, routing
from sft.models.head import Measure, SupervisedHead, widen
from sft.models.noise import EmbeddingNoise
from sft.models.sequences import SequenceGroup
from sft.tasks.sft import losses
from sft.tasks.sft.saved import SavedTuning

PAD = 0  # fills up rows; nothing reads it, and the tokenizer's own may have no embedding


class Passes(SavedTuning):
    """Losses of a language model at the supervised positions of a micro-batch."""

    prepared: Prepared

    @classmethod
    def balance_of(cls, config: Config) -> routing.Balance | None:
        """Returns the balancing of experts that is part of the loss; None without it."""
        if config.tuning.router == "frozen":
            return None
        return routing.balance_of(pretrained.architecture(config.model))

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        copies = getattr(self.model, "num_agents", 1)
        self.head = SupervisedHead(self.model, copies, self._report_whole)
        alpha, seed = self.config.train.neftune_alpha, self.config.train.seed
        self.example_sums: losses.ExampleSums | None = None  # of the evaluation that runs
        self.noise = EmbeddingNoise(self.model, alpha, seed) if alpha else None
        self.sequences = None
        if (size := self.config.train.context_parallel) > 1:
            self.sequences = SequenceGroup.of(self.accelerator, size)
            self.sequences.follow(self.model)
        self.balance = self.balance_of(self.config)
        self.needs_global_batch = self.balance is not None
        self.chosen: tuple[torch.Tensor | None, float] = None, 1.0

    def prove_head(self, precision: str) -> None:
        """Tries whether the head can run in chunks, if micro-batches can be so long."""
        if self.budget.max_tokens > self.head.limit():
            self.head.prove(precision)

    def _report_whole(self, reason: str) -> None:
        self.log.say(
            f"logits: those of a micro-batch are computed at once, since {reason}; a smaller "
            "train.max_tokens takes less memory"
        )

    def collate(self, ids: list[int]) -> Batch:
        return self._collate(self.prepared.train, ids, self.config.train.mean_per == "example")

    def collate_held_out(self, ids: list[int]) -> Batch:
        return self._collate(self.prepared.held_out, ids)

    def _collate(self, examples: Examples, ids: list[int], per_example: bool = False) -> Batch:
        layout = self.budget.layout
        device = self.accelerator.device
        if group := self.sequences:
            whole = collate(examples, ids, PAD, layout, torch.device("cpu"), per_example)
            return share(whole, group.rank, group.size, PAD).to(device)
        batch = collate(examples, ids, PAD, layout, device, per_example)
        attention.remember_starts(batch.position_ids, batch.lengths)
        return batch

    def num_supervised(self, batch: Batch) -> float:
        """Returns the number of supervised tokens or examples, or the sum of the weights."""
        if batch.num_items is not None:
            return batch.num_items
        return batch.targets.numel() if batch.weights is None else float(batch.weights.sum())

    def begin_step(self, step: int, factor: float) -> None:
        self.head.factor = factor
        if self.noise:
            self.noise.step = step

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sums, output = self._sums(model, batch, losses.measure(batch, self.config.train), True)
        loss = sums.pop("loss")
        if self.balance is None:
            return loss, sums
        routes, (counts, supervised) = (
            routing.logits_of(output, batch.token_positions()),
            self.chosen,
        )
        if counts is None:  # the whole global batch is here
            counts = self.balance.count(routes, batch.lengths).sum(0)
        share = supervised * self.balance.share(routes, counts)  # the engine divides by it
        return loss + self.balance.coefficient * share, {**sums, "balance": share.detach()}

    def eval_loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sums, _ = self._sums(model, batch, losses.measure(batch, rows=self.example_sums))
        return sums.pop("loss"), sums

    @torch.no_grad()
    def summarise(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """Returns the choices of each example's tokens, as `routing.Balance.count` does."""
        assert self.balance is not None
        few = batch.positions[:1]  # no logits are needed
        output = self._run(model, batch, few, trains=True)
        return self.balance.count(routing.logits_of(output, batch.token_positions()), batch.lengths)

    def set_global_batch(
        self, ids: list[int], summaries: torch.Tensor | None, supervised: float
    ) -> None:
        self.chosen = None if summaries is None else summaries.sum(0), supervised

    def logits(self, model: nn.Module, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """Returns logits (positions, vocabulary) in fp32 or wider; see `SupervisedHead`."""
        return widen(self._run(model, batch, positions).logits)

    def _sums(
        self, model: nn.Module, batch: Batch, measure: Measure, trains: bool = False
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """Returns what `measure` sums over supervised positions, and the model's output."""
        run = lambda: self._call(model, batch, trains)  # noqa: E731
        return self.head.sums(run, batch.positions, measure)

    def _run(
        self, model: nn.Module, batch: Batch, positions: torch.Tensor, trains: bool = False
    ) -> Any:
        """Returns the model's output, whose logits are those of `positions`."""
        self.head.positions = positions
        try:
            return self._call(model, batch, trains)
        finally:
            self.head.positions = None

    def _call(self, model: nn.Module, batch: Batch, trains: bool) -> Any:
        """Returns the model's output; in training with noise, and with the scores of routers."""
        balances = trains and self.balance is not None
        noise: AbstractContextManager[Any] = nullcontext()
        if trains and self.noise:
            places = batch.token_positions()
            noise = self.noise.on(batch.input_ids.shape, places, batch.examples, batch.lengths)
        documents = batch.lengths if self.budget.layout == "packed" else ()
        if self.sequences and batch.position_ids is not None and batch.whole_positions is not None:
            self.sequences.share(batch.position_ids, batch.whole_positions)
        with noise, attention.known_documents(documents):
            return model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                **({"output_router_logits": True} if balances else {}),
            )
