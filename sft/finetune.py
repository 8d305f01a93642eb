"""The SFT task: examples -> supervised tokens -> summed cross-entropy; the engine's Task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from sft import batching, chat, evaluate, export, model
from sft.config import Config, ConfigError
from sft.log import Advance, Log
from sft.prepare import Prepared


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `positions` index into batch * time; position t predicts token t + 1."""

    input_ids: torch.Tensor  # (rows, time)
    position_ids: torch.Tensor | None  # (1, time), restarting at each document; packed only
    positions: torch.Tensor  # (supervised,)
    targets: torch.Tensor  # (supervised,)
    weights: torch.Tensor | None = None  # (supervised,); None: 1 everywhere


def collate(
    examples: Sequence[chat.Example], pad: int, layout: batching.Layout, device: torch.device
) -> Batch:
    """Padded: rows padded on the right. Packed: one row of documents with restarting position ids.

    Neither needs an attention mask: causal attention cannot see padding on the right, and
    transformers confines attention to documents by their position ids as long as no mask and no
    cache is passed.
    """
    width = max((len(example.ids) for example in examples), default=1)
    ids: list[list[int]] = []
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    starts = 0
    for example in examples:
        ids.append(example.ids + [pad] * (width - len(example.ids) if layout == "padded" else 0))
        for i, label in enumerate(example.labels[1:]):
            if label != chat.IGNORED:
                positions.append(starts + i)
                targets.append(label)
                weights.append(example.weights[i + 1] if example.weights else 1.0)
        starts += len(ids[-1])
    position_ids = None
    if layout == "packed" and examples:
        restarting = [i for example in examples for i in range(len(example.ids))]
        position_ids = torch.tensor([restarting], device=device)
        ids = [[token for row in ids for token in row]]
    return Batch(
        torch.tensor(ids or [[pad]], device=device),
        position_ids,
        torch.tensor(positions, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        torch.tensor(weights, dtype=torch.float64, device=device) if set(weights) - {1.0} else None,
    )


class FineTune:
    """The engine's Task for supervised fine-tuning (see engine.Task for what each method owes)."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        built: nn.Module,
        accelerator: Accelerator,
        log: Log,
        budget: batching.Budget,
    ):
        self.config, self.prepared, self.model = config, prepared, built
        self.accelerator, self.log = accelerator, log
        self.budget = budget
        self.lengths = [len(example.ids) for example in prepared.train]
        self.head = model.SupervisedHead(built)
        if budget.layout == "packed" and not model.documents_are_isolated(
            built, accelerator.device
        ):
            raise ConfigError(
                "train.layout: packed documents of this model would attend to each other; "
                "use train.layout: padded"
            )

    def collate(self, ids: list[int]) -> Batch:
        return self._collate([self.prepared.train[i] for i in ids])

    def _collate(self, examples: list[chat.Example]) -> Batch:
        pad = self.prepared.tokenizer.pad_token_id
        return collate(examples, pad, self.budget.layout, self.accelerator.device)

    def num_supervised(self, batch: Batch) -> float:
        """Tokens, or the sum of their weights."""
        return batch.targets.numel() if batch.weights is None else float(batch.weights.sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.head.positions = batch.positions
        try:
            logits = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits  # (supervised, vocabulary)
        finally:
            self.head.positions = None
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        correct = logits.detach().argmax(-1) == batch.targets
        if batch.weights is None:
            loss = F.cross_entropy(logits, batch.targets, reduction="sum")
            return loss, {"token_accuracy": correct.sum()}
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        weights = batch.weights.to(losses)
        return losses @ weights, {"token_accuracy": correct.to(losses) @ weights}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        examples = self.prepared.held_out
        lengths = [len(example.ids) for example in examples]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = batching.cut(range(len(lengths)), lengths, world, self.budget)[rank]
        with self.log.progress("held-out loss", len(mine)) as advance:
            batches = self._following(advance, ([examples[i] for i in ids] for ids in mine))
            return evaluate.held_out_loss(
                self.loss, self.num_supervised, model, batches, self.accelerator
            )

    def _following(self, advance: Advance, parts: Iterable[list[chat.Example]]) -> Iterator[Batch]:
        for part in parts:
            yield self._collate(part)
            advance()

    def answers(self, model: nn.Module) -> list[dict[str, Any]]:
        """The first `evaluation.num_examples` held-out prompts, answered by the model."""
        settings, tokenizer = self.config.evaluation, self.prepared.tokenizer
        asked = [r for r in self.prepared.held_out_rows if not chat.is_document(r.messages)]
        rows = asked[: settings.num_examples]
        prompts = [chat.prompt_ids(tokenizer, row.messages[:-1], row.tools) for row in rows]
        texts = evaluate.generate(
            model,
            tokenizer,
            prompts,
            self.accelerator,
            self.log,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )
        return [
            {
                "row": f"{row.file}:{row.line}",
                "prompt": row.messages[-2]["content"] if len(row.messages) > 1 else "",
                "reference": row.messages[-1]["content"],
                "answer": text,
            }
            for row, text in zip(rows, texts, strict=True)
        ]

    def save(self, folder: Path) -> None:
        export.save(self.accelerator.unwrap_model(self.model), self.prepared.tokenizer, folder)

    def load(self, folder: Path) -> None:
        export.load_weights(self.model, folder)

    def identity(self) -> dict[str, str]:
        config = self.config
        return {
            "model.name": config.model.name,
            "tuning": config.tuning.model_dump_json(),
            "data": self.prepared.audit["data_sha256"],
            "tokenizer": self.prepared.audit["train"]["tokenizer_sha256"],
            "template": self.prepared.audit["train"]["template_sha256"],
        }

    def name_examples(self, ids: list[int]) -> str:
        rows = [self.prepared.train_rows[i] for i in ids]
        named = ", ".join(f"{row.file}:{row.line}" for row in rows[:8])
        return named + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
