"""A random tiny model, random examples, and the engine around them: what the law tests train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from sft import batching, chat, data, engine, finetune, prepare, processes, store
from sft.config import Config
from sft.log import Log

VOCAB = 61


class Said(Log):
    """Keeps what it is told, for tests to read."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[Any] = []

    def say(self, text: Any) -> None:
        self.lines.append(text)


class Tokenizer:
    """All that the task asks of a tokenizer when examples are made of ids."""

    pad_token_id = 0
    eos_token_id = 1

    def save_pretrained(self, folder: str) -> None: ...


AUDIT = {"data_sha256": "-", "train": {"tokenizer_sha256": "-", "template_sha256": "-"}}


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # large, so that attention and gradients are far from trivial
    }
    return build(LlamaConfig(**(sizes | changes)), dtype)


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model


def examples(seed: int, number: int, longest: int = 30) -> list[chat.Example]:
    """Random lengths and labels; a quarter of the examples have no supervised token at all."""
    random = np.random.default_rng(seed)
    result = []
    for i in range(number):
        ids = random.integers(2, VOCAB, random.integers(2, longest + 1)).tolist()
        share = 0.0 if i % 4 == 3 else random.uniform(0.05, 1.0)
        labels = [t if random.random() < share else chat.IGNORED for t in ids]
        result.append(chat.Example(ids=ids, labels=labels))
    return result


def config(folder: Path, **train: Any) -> Config:
    values = {"output_dir": str(folder), "max_grad_norm": 0.0, "learning_rate": 1e-3} | train
    return Config.model_validate(
        {
            "model": {"name": "nano/model"},  # of which only the digest is read
            "tuning": {"mode": "full"},
            "data": {"train_path": "none"},
            "train": values,
        }
    )


def stored(examples: list[chat.Example]) -> store.Examples:
    """Examples as training reads them; row i is line i + 1 of a file tiny."""
    rows = (data.Row([], None, "tiny", i + 1) for i in range(len(examples)))
    return store.Examples(store.pack(zip(range(len(examples)), rows, examples, strict=True)))


def make_engine(
    model: nn.Module,
    rows: list[chat.Example],
    held_out: list[chat.Example],
    settings: Config,
    budget: batching.Budget,
) -> engine.Engine:
    accelerator = processes.start_processes(settings.train)
    prepared = prepare.Prepared(Tokenizer(), stored(rows), stored(held_out), AUDIT)  # type: ignore[arg-type]
    task = finetune.FineTune(settings, prepared, model, accelerator, Log(None), budget)
    return engine.Engine(task, settings.train, accelerator, Log(None), budget)


def reference(model: nn.Module, rows: list[chat.Example]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients by the plainest loop: one example at a time, all logits, one division."""
    model.zero_grad()
    weights = [row.weights or [1.0] * len(row.ids) for row in rows]
    total = sum(
        weight
        for row, own in zip(rows, weights, strict=True)
        for label, weight in zip(row.labels[1:], own[1:], strict=True)
        if label != chat.IGNORED
    )
    loss_sum = 0.0
    for row, weight in zip(rows, weights, strict=True):
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        losses = F.cross_entropy(logits, labels, ignore_index=chat.IGNORED, reduction="none")
        loss = losses @ torch.tensor(weight[1:], dtype=losses.dtype)
        (loss / total).backward()
        loss_sum += loss.item()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss_sum / total, gradients


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm, all tensors as one vector."""
    difference = torch.cat(
        [(a - b).double().flatten() for a, b in zip(found, expected, strict=True)]
    )
    return float(difference.norm() / torch.cat([b.double().flatten() for b in expected]).norm())
