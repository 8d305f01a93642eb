"""Writes, reads and checks the files of a crowd's agents."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.schema import Config, Crowd, Model
from sft.errors import CheckpointError, ExportError, MergeError, ModelError
from sft.models.export import ADAPTER, BASE, adapter_tuning, base_record, put_weights
from sft.models.load import add_adapters
from sft.runtime.checkpoint import open_tensors
from sft.tasks.base import Task
from sft.tasks.crowd.agents import Agents, peft_name
from sft.tasks.sft.saved import BaseRecord, read_base_record
from sft.tasks.sft.task import FineTune

META = "ci_llm_meta_config.json"  # beside the agents of a crowd


def save_agents(
    crowd: Agents,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor],
    base: Model,
) -> None:
    """Writes each agent as an adapter that loads alone, and a description of all of them."""
    crowd.save_pretrained(str(folder), state_dict=weights)
    record = base_record(base)
    for place in sorted(folder.glob("agent*")):
        tokenizer.save_pretrained(str(place))
        (place / BASE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    tokenizer.save_pretrained(str(folder))
    meta = json.dumps({**crowd.describe(), "base": record}, indent=2)
    (folder / META).write_text(meta + "\n", "utf-8")


def read_agents(crowd: Agents, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of all agents in `folder`, stacked, by their name in `crowd`."""
    _refuse_another_crowd(crowd, folder)
    paths = [folder / f"agent{agent}" / ADAPTER for agent in range(crowd.num_agents)]
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path)) for path in paths]
        for name, parameter in crowd.named_parameters():
            if not parameter.requires_grad:
                continue
            saved = peft_name(name)
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
    """Raises CheckpointError if `folder` holds no crowd, or one of other agents."""
    saved = read_meta(folder)
    given = crowd.describe()
    other = [
        f"{key}: saved with {saved[key]}, found {given[key]}"
        for key in ("num_agents", "r", "lora_alpha", "target_modules")
        if saved[key] != given[key]
    ]
    if other:
        raise CheckpointError(f"{folder} holds another crowd:\n  " + "\n  ".join(other))


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns the description of the crowd in `folder`. Raises CheckpointError if it holds none."""
    path = folder / META
    try:
        found = json.loads(path.read_text("utf-8"))
        adapter_tuning(found)
        settings = Crowd(num_agents=found["num_agents"], aggregator=found["aggregator"])
        numbers = list(map(float, found["concentration"]))
        is_sound = len(numbers) == settings.num_agents and 0 < sum(numbers) < math.inf
        is_sound = is_sound and min(numbers) >= 0 and isinstance(found["base"]["name"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(repr(error).split())
        raise CheckpointError(f"{path}: expected a crowd's description: {reason}") from None
    if not is_sound:
        raise CheckpointError(f"{path} is not what a run writes")
    return found


def take_concentration(crowd: Agents, folder: Path, settings: Crowd) -> None:
    """Sets the fitted concentration, if the configuration has none of its own."""
    saved = read_meta(folder)
    if saved["aggregator"] == "learned" and settings.concentration == Crowd().concentration:
        crowd.concentration = tuple(map(float, saved["concentration"]))
    elif settings.aggregator == "learned":
        raise ExportError(
            f"{folder}: crowd.aggregator: expected {saved['aggregator']}, as it was trained, found "
            "learned, for which nothing was fitted; remove the override, or train with it"
        )


class SavedCrowd(FineTune):
    """The part of the crowd's task that writes and reads its agents."""

    merge_arguments = " AGENT=0"
    model: Agents

    @classmethod
    def adapt(cls, base: nn.Module, config: Config) -> nn.Module:
        return Agents(super().adapt(base, config), config.crowd)

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        save_agents(self.model, self.prepared.tokenizer, folder, weights, self.config.model)

    def read(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        return read_agents(self.model, folder)

    @classmethod
    def open(cls, run: Path, config: Config, *arguments: Any) -> Task:
        if config.crowd.agent is not None:  # one agent alone is an adapter like any other
            return _Agent.open(run, config, *arguments)
        return super().open(run, config, *arguments)

    @classmethod
    def load_saved(
        cls, folder: Path, config: Config, *arguments: Any, **options: Any
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        if config.crowd.agent is not None:
            return _Agent.load_saved(folder, config, *arguments, **options)
        return super().load_saved(folder, config, *arguments, **options)

    @classmethod
    def take_saved(cls, adapted: Any, folder: Path, config: Config) -> None:
        take_concentration(adapted, folder, config.crowd)
        put_weights(adapted, read_agents(adapted, folder))

    @classmethod
    def is_adapter(cls, folder: Path) -> bool:
        return (folder / META).exists()

    @classmethod
    def adapter_files(cls, folder: Path) -> list[Path]:
        own = super().adapter_files
        return [folder / META, *itertools.chain(*map(own, sorted(folder.glob("agent*"))))]

    @classmethod
    def recorded_base(cls, folder: Path) -> BaseRecord | None:
        return read_base_record(folder / META, "base")

    @classmethod
    def base_name(cls, folder: Path) -> str:
        return str(read_meta(folder)["base"]["name"])

    @classmethod
    def with_adapter(cls, base: nn.Module, name: str, folder: Path) -> nn.Module:
        saved = read_meta(folder)
        settings = Crowd(num_agents=saved["num_agents"], aggregator=saved["aggregator"])
        try:
            crowd: Any = Agents(add_adapters(base, adapter_tuning(saved)), settings)
            put_weights(crowd, read_agents(crowd, folder))
        except ModelError as error:
            raise ExportError(f"{folder} is no crowd of this base: {error}") from None
        crowd.concentration = tuple(map(float, saved["concentration"]))
        return crowd

    @classmethod
    def overrides_of_part(cls, folder: Path) -> list[str] | None:
        number = folder.name.removeprefix("agent")
        if not (cls.is_adapter(folder.parent) and number.isdecimal()):
            return None
        return [f"crowd.agent={number}"]

    @classmethod
    def refuse_merge(cls, config: Config, run: Path) -> None:
        number = config.crowd.num_agents
        if config.crowd.agent is None:
            raise MergeError(
                f"{run}: a mixture of {number} agents is no single model; give one of them, "
                f"AGENT=0 to {number - 1}"
            )

    @classmethod
    def part(cls, config: Config) -> dict[str, Any]:
        return {"agent": config.crowd.agent}

    @classmethod
    def overrides_of(cls, record: Mapping[str, Any]) -> list[str]:
        agent = record.get("agent")
        return [] if agent is None else [f"crowd.agent={agent}"]

    @classmethod
    def describe_part(cls, config: Config) -> str:
        agent = config.crowd.agent
        return "" if agent is None else f"agent {agent} of {config.crowd.num_agents}, "


class _Agent(FineTune):
    """One agent of a crowd, used alone."""

    @classmethod
    def load_saved(
        cls, folder: Path, config: Config, *arguments: Any, **options: Any
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        place = folder / f"agent{config.crowd.agent}"
        return super().load_saved(place, config, *arguments, **options)
