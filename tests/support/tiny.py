"""A random tiny model, random examples, and the engine around them: what the law tests train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from sft.config.load import with_values
from sft.config.schema import Config
from sft.data import batches, cache, files, template
from sft.data.examples import ExampleArrays, Examples
from sft.runtime import processes
from sft.runtime.log import Log
from sft.runtime.processes import Context
from sft.tasks.registry import task_of
from sft.train import engine

VOCAB = 61


class Said(Log):
    """Keeps what it is reported, for tests to read."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[Any] = []
        self.events: list[dict[str, Any]] = []

    def say(self, text: Any) -> None:
        self.lines.append(text)

    def record(self, event: dict[str, Any]) -> None:
        self.events.append(event)


class Spy:
    """Stands for an object, and records the calls of its methods."""

    def __init__(self, real: Any, seen: list[tuple[Any, ...]]):
        self._real, self._seen = real, seen

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if not callable(value):
            return value

        def call(*given: Any, **named: Any) -> Any:
            self._seen.append((name, *given))
            return value(*given, **named)

        return call


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


def shallow_nano(folder: Path) -> Path:
    """The first two of the embedded model's four layers: a step takes half."""
    model = folder / "nano"
    shutil.copytree(ROOT / "nano/model", model)
    shape = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 2}
    (model / "config.json").write_text(json.dumps(shape))
    weights = load_file(model / "model.safetensors")
    dropped = ("model.layers.2.", "model.layers.3.")
    kept = {name: value for name, value in weights.items() if not name.startswith(dropped)}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    return model


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model


def examples(seed: int, number: int, longest: int = 30) -> list[template.Example]:
    """Random lengths and labels; a quarter of the examples have no supervised token at all."""
    random = np.random.default_rng(seed)
    result = []
    for i in range(number):
        ids = random.integers(2, VOCAB, random.integers(2, longest + 1)).tolist()
        share = 0.0 if i % 4 == 3 else random.uniform(0.05, 1.0)
        labels = [t if random.random() < share else template.IGNORED for t in ids]
        result.append(template.Example(ids=ids, labels=labels))
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


def crowd_config(folder: Path, *, train: dict[str, Any] | None = None, **crowd: Any) -> Config:
    """Of three agents of rank 4 that are kept apart."""
    values = {"num_agents": 3, "lambda_sw": 0.7, "num_projections": 16} | crowd
    changes = {"tuning.mode": "lora", "tuning.r": 4, "tuning.lora_alpha": 8.0}
    changes |= {f"crowd.{key}": value for key, value in values.items()}
    return with_values(config(folder, **(train or {})), changes)


def adapted(settings: Config, dtype: torch.dtype = torch.float32, base: Any = None) -> nn.Module:
    """`base` (None: `llama`) with adapters, those of a crowd where there is one, none of them 0."""
    base = (llama(dtype) if base is None else base).requires_grad_(False)
    built = task_of(settings).adapt(base, settings)
    random = torch.Generator().manual_seed(3)
    for parameter in built.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=random, dtype=dtype)
            parameter.data = 0.2 * drawn
    return built


def stored(examples: list[template.Example]) -> Examples:
    """Examples as training reads them; row i is line i + 1 of a file tiny."""
    rows = (files.Row([], None, "tiny", i + 1) for i in range(len(examples)))
    return Examples(ExampleArrays.pack(zip(range(len(examples)), rows, examples, strict=True)))


def make_engine(
    built: nn.Module,
    rows: list[template.Example],
    held_out: list[template.Example],
    settings: Config,
    budget: batches.Budget,
) -> engine.Engine:
    accelerator = processes.start_processes(settings.train)
    prepared = cache.Prepared(Tokenizer(), stored(rows), stored(held_out), AUDIT)  # type: ignore[arg-type]
    task = task_of(settings)(settings, prepared, built, budget, Context(accelerator, Log(None)))
    return engine.Engine(task, settings.train, Context(accelerator, Log(None)))


def reference(model: nn.Module, rows: list[template.Example]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients by the plainest loop: one example at a time, all logits, one division."""
    model.zero_grad()
    weights = [row.weights or [1.0] * len(row.ids) for row in rows]
    total = sum(
        weight
        for row, own in zip(rows, weights, strict=True)
        for label, weight in zip(row.labels[1:], own[1:], strict=True)
        if label != template.IGNORED
    )
    loss_sum = 0.0
    for row, weight in zip(rows, weights, strict=True):
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        losses = F.cross_entropy(logits, labels, ignore_index=template.IGNORED, reduction="none")
        loss = losses @ torch.tensor(weight[1:], dtype=losses.dtype)
        (loss / total).backward()
        loss_sum += loss.item()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return loss_sum / total, gradients


def crowd_reference(
    crowd: Any, rows: list[template.Example], settings: Config, seed: int
) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a crowd from the definitions: one example at a time, all logits, one
    direction and one pair of agents at a time. `seed`: of the directions."""
    crowd.zero_grad()
    reported = settings.crowd
    total, entropy, clouds = 0.0, torch.zeros((), dtype=torch.float64), []
    for row in rows:
        ids = torch.tensor([row.ids] * reported.num_agents)
        output = crowd.base(input_ids=ids, output_hidden_states=True)
        places = [t for t, label in enumerate(row.labels[1:]) if label != template.IGNORED]
        for t in places:
            weight = row.weights[t + 1] if row.weights else 1.0
            total += weight
            likely = output.logits[:, t].double().log_softmax(-1)[:, row.labels[t + 1]]
            entropy = entropy - weight * likely.sum() / reported.num_agents
        if places:
            hidden = output.hidden_states[
                reported.layer if reported.layer == -1 else reported.layer + 1
            ]
            states = (output.logits if reported.representation == "logits" else hidden)[:, places]
            pooled = {"last": states[:, -1], "first": states[:, 0], "mean": states.mean(1)}
            point = pooled[reported.pooling].double()
            length = point.shape[-1] ** 0.5
            clouds.append(length * F.normalize(point, dim=-1) if reported.normalise else point)
    loss = entropy / (total or 1.0)
    if clouds and reported.num_agents > 1:
        loss = loss - reported.lambda_sw * _apart(
            torch.stack(clouds, 1), reported.num_projections, seed
        )
    loss.backward()
    gradients = [p.grad.clone() for p in crowd.parameters() if p.requires_grad]
    crowd.zero_grad()
    return loss.item(), gradients


def _apart(points: torch.Tensor, num_projections: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_projections, points.shape[-1], generator=random)
    distances = []
    for direction in drawn:
        onto = (direction / direction.norm()).double()
        for i, one in enumerate(points):
            for other in points[:i]:
                a, b = (one @ onto).sort().values, (other @ onto).sort().values
                distances.append((a - b).square().mean())
    return torch.stack(distances).mean()


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm, all tensors as one vector."""
    difference = torch.cat(
        [(a - b).double().flatten() for a, b in zip(found, expected, strict=True)]
    )
    return float(difference.norm() / torch.cat([b.double().flatten() for b in expected]).norm())
