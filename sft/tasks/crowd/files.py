"""Reads and checks the files of a crowd's agents."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.schema import Crowd, Model
from sft.errors import CheckpointError, ExportError, ModelError
from sft.models.adapters import add_adapters
from sft.models.export import ADAPTER, BASE, adapter_tuning, base_record, put_weights
from sft.runtime import checkpoint
from sft.tasks.crowd.agents import Agents, in_peft

META = "ci_llm_meta_config.json"  # beside the agents of a crowd


def save(
    crowd: Agents,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor],
    base: Model,
) -> None:
    """Writes each agent as an adapter that loads alone, and what the agents are together."""
    crowd.save_pretrained(str(folder), state_dict=weights)
    record = base_record(base)
    for place in sorted(folder.glob("agent*")):
        tokenizer.save_pretrained(str(place))
        (place / BASE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    tokenizer.save_pretrained(str(folder))
    meta = json.dumps({**crowd.described(), "base": record}, indent=2)
    (folder / META).write_text(meta + "\n", "utf-8")


def read_agents(crowd: Agents, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All agents' weights, joined."""
    _refuse_another_crowd(crowd, folder)
    paths = [folder / f"agent{agent}" / ADAPTER for agent in range(crowd.num_agents)]
    for path in paths:
        if reason := checkpoint.tensor_fault(path):
            raise CheckpointError(f"{path} cannot be loaded: {reason}")
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        for name, parameter in crowd.named_parameters():
            if not parameter.requires_grad:
                continue
            saved = in_peft(name)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's are split
            for path, file in zip(paths, files, strict=True):
                if saved not in file.keys():  # noqa: SIM118  # not a mapping
                    raise CheckpointError(f"{path} does not fit the model: it lacks {saved}")
                found = file.get_slice(saved).get_shape()
                if found != list(shape[1:]):
                    raise CheckpointError(
                        f"{path} does not fit the model: {saved} is {found}, expected "
                        f"{list(shape[1:])}"
                    )
            yield name, torch.stack([file.get_tensor(saved) for file in files])


def _refuse_another_crowd(crowd: Agents, folder: Path) -> None:
    """CheckpointError if `folder` holds no crowd, or one of other agents; the names that differ."""
    told = read_meta(folder)
    given = crowd.described()
    other = [
        f"{key}: saved with {told[key]}, found {given[key]}"
        for key in ("num_agents", "r", "lora_alpha", "target_modules")
        if told[key] != given[key]
    ]
    if other:
        raise CheckpointError(f"{folder} holds another crowd:\n  " + "\n  ".join(other))


def read_meta(folder: Path) -> dict[str, Any]:
    """What `save` told about the crowd in `folder`. CheckpointError if it holds none."""
    path = folder / META
    try:
        told = json.loads(path.read_text("utf-8"))
        adapter_tuning(told)
        settings = Crowd(num_agents=told["num_agents"], aggregator=told["aggregator"])
        numbers = list(map(float, told["concentration"]))
        whole = len(numbers) == settings.num_agents and 0 < sum(numbers) < math.inf
        whole = whole and min(numbers) >= 0 and isinstance(told["base"]["name"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(repr(error).split())
        raise CheckpointError(f"{path}: expected a crowd's description: {reason}") from None
    if not whole:
        raise CheckpointError(f"{path} is not what a run writes")
    return told


def take_concentration(crowd: Agents, folder: Path, settings: Crowd) -> None:
    """A fitted one, where the configuration has none of its own."""
    told = read_meta(folder)
    if told["aggregator"] == "learned" and settings.concentration == Crowd().concentration:
        crowd.concentration = tuple(map(float, told["concentration"]))
    elif settings.aggregator == "learned":
        raise ExportError(
            f"{folder}: crowd.aggregator: expected {told['aggregator']}, as it was trained, found "
            "learned, for which nothing was fitted; remove the override, or train with it"
        )


def with_agents(base: nn.Module, folder: Path) -> nn.Module:
    told = read_meta(folder)
    settings = Crowd(num_agents=told["num_agents"], aggregator=told["aggregator"])
    try:
        crowd: Any = Agents(add_adapters(base, adapter_tuning(told)), settings)
        put_weights(crowd, read_agents(crowd, folder))
    except ModelError as error:
        raise ExportError(f"{folder} is no crowd of this base: {error}") from None
    crowd.concentration = tuple(map(float, told["concentration"]))
    return crowd
