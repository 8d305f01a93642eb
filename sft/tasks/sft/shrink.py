"""Makes a model and its data small, so that `make verify-*` can try many whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft.config.lora import Lora, names_layer
from sft.config.schema import Config, Replay
from sft.data import files
from sft.errors import VerificationError, redact
from sft.models import classes
from sft.models.pretrained import architecture, keep_layers, load_tokenizer, narrow
from sft.tasks.base import Shrunk

LAYERS = 2
OF_LAYERS = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
EXAMPLES = 8  # maximum size of a global batch
HELD_OUT = 6  # held-out rows


def shrink(config: Config, folder: Path, exact: bool) -> Shrunk:
    """Returns values with a narrow model of random weights and a few rows of the data."""
    built, changes = small_model(config, exact)
    name = str(folder / "model")
    built.save_pretrained(name)  # type: ignore[operator]
    load_tokenizer(config.model).save_pretrained(name)
    batch = min(config.train.global_batch, EXAMPLES)
    rows = 2 * batch + max(1, batch // 2) + HELD_OUT
    values = {
        "model.name": name,
        "model.revision": None,
        "data.train_path": files.local_paths(config.data),
        "data.max_rows": rows,
        "data.eval_path": None,
        "data.replay.path": None,
        "data.replay.share": Replay().share,
        "data.eval_fraction": HELD_OUT / rows,
        "data.cache_dir": str(folder / "cache"),
        "evaluation.num_examples": min(config.evaluation.num_examples, 2),
        "evaluation.during": min(config.evaluation.during, 2),
        "evaluation.max_new_tokens": min(config.evaluation.max_new_tokens, 8),
    }
    if config.tuning.differs_by_layer:
        values |= {f"tuning.lora.{key}": Lora.model_fields[key].default for key in OF_LAYERS}
        changes.append(
            ("tuning", f"every layer has the same adapters, without {', '.join(OF_LAYERS)}")
        )
    if config.train.differs_by_layer:
        kept: list[Any] = [
            each for each in config.train.groups or () if not names_layer(each.match)
        ]
        values |= {"train.groups": [each.model_dump() for each in kept] or None}
        changes.append(("train", "without groups of single layers"))
    if config.tuning.lora.changes_base:
        values |= {"tuning.r": min(config.tuning.r, 8)}  # no matrix has a lower rank
    changes.append(("tuning", config.tuning.mode))
    chosen_from = f"the first {rows} of {redact(str(config.data.train_path))}"
    return Shrunk(values, changes, {"tuning.lora_dropout": 0.0}, batch, chosen_from)


def small_model(config: Config, exact: bool = False) -> tuple[nn.Module, list[tuple[str, str]]]:
    """Builds a model of the configured architecture with two narrow layers and random weights.

    Returns the model and its differences from the configured one. `exact`: without dropout.
    """
    whole = architecture(config.model)
    few = keep_layers(whole, min(LAYERS, whole.get_text_config().num_hidden_layers))
    changes = []
    if exact and (dropped := _without_dropout(few)):
        changes.append(("model", f"no dropout ({', '.join(dropped)})"))
    problem = ""
    # Not every architecture lets its widths be chosen.
    for candidate in (narrow(few, experts=True), few):
        try:
            built = _build(config, candidate, torch.float32)
        except Exception as error:  # noqa: BLE001  # code of the model may raise anything
            problem = f"{type(error).__name__}: {error}"
            continue
        was, now = whole.get_text_config(), candidate.get_text_config()
        sizes = f"{now.num_hidden_layers} layers of {now.hidden_size}"
        sizes += f" instead of {was.num_hidden_layers} of {was.hidden_size}, random weights"
        return built, [("model", f"{type(built).__name__}: {sizes}"), *changes]
    raise VerificationError(f"cannot make a small model of {config.model.name}: {problem}")


def narrow_copy(config: Config) -> nn.Module | None:
    """Returns a model of the configured architecture with all layers, narrow, random and in fp64;
    None if its widths cannot be chosen."""
    few = narrow(architecture(config.model), experts=True)
    few._experts_implementation = "batched_mm"  # for tensors of any dtype
    try:
        return _build(config, few, torch.float64).eval()
    except Exception:  # noqa: BLE001  # code of the model may raise anything
        return None


def _build(config: Config, candidate: Any, dtype: torch.dtype) -> nn.Module:
    """Builds a random model of a transformers configuration, and runs it once.

    Raises whatever the code of the model raises.
    """
    torch.manual_seed(config.train.seed)
    built: nn.Module = classes.from_config(
        candidate,
        dtype=dtype,
        trust_remote_code=config.model.trust_remote_code,
        attn_implementation="eager",
    )
    with torch.no_grad():
        built(input_ids=torch.arange(8)[None])
    return built


def _without_dropout(architecture: Any) -> list[str]:
    """Turns every dropout of a configuration off and returns the names of those that were on."""
    found = []
    for part in (architecture, architecture.get_text_config()):
        for name, value in [*vars(part).items()]:
            is_dropout = "dropout" in name or name.endswith("_pdrop")
            if is_dropout and isinstance(value, float) and value:
                setattr(part, name, 0.0)
                found.append(name)
    return found
