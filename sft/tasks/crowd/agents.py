"""K LoRA agents on one frozen base, in one batched forward pass.

Every row goes through the base K times, once for each agent, in one batch: row k * B + b is example
b for agent k. The frozen weights are read (and, in NF4, dequantised) once for K times the rows. The
adapters of all agents are one batched low-rank product per layer (`AgentsLinear`). `Agents` behaves
like a transformers model with K * B rows; each agent is saved as a PEFT folder that loads alone.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from sft.config.adapters import SHARED, adapter_tuning
from sft.config.schema import Crowd, Tuning
from sft.errors import CheckpointError, ConfigError
from sft.models.export import ADAPTER
from sft.runtime import plain
from sft.runtime.checkpoint import open_tensors
from sft.runtime.tensor_file import TensorFile, write_tensors

META = "ci_llm_meta_config.json"  # the description of the agents, beside their folders


class AgentsLinear(nn.Module):
    """A frozen linear layer with the low-rank updates of K agents.

    Rows of agent k get W + s B_k A_k (Hu et al. 2021), with s = lora_alpha / r. In training,
    `dropconnect` is the probability of dropping a weight of A or B (Wan et al. 2013). The mask is
    drawn anew in each forward pass; the weights stay as they are and their gradients are exact.
    """

    in_place = True
    """Whether the update is added in place: a copy takes 8 % longer. Not if W's product is kept."""

    def __init__(self, adapted: Any, num_agents: int, dropconnect: float):
        super().__init__()
        self.base_layer = adapted.base_layer
        self.num_agents, self.dropconnect = num_agents, dropconnect
        self.scale = adapted.scaling["default"]
        self.dropout = adapted.lora_dropout["default"]
        down, up = (getattr(adapted, name)["default"].weight for name in ("lora_A", "lora_B"))
        stacked = torch.empty(num_agents, *down.shape, device=down.device)
        stacked[0] = down.detach()  # a crowd of one agent starts like PEFT's adapter
        for agent in stacked[1:]:
            nn.init.kaiming_uniform_(agent, a=math.sqrt(5))
        self.lora_A = nn.Parameter(stacked)  # (agents, r, in)
        zeros = torch.zeros(num_agents, *up.shape, device=up.device)
        self.lora_B = nn.Parameter(zeros)  # (agents, out, r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x (agents * rows, ..., in) to (agents * rows, ..., out)."""
        rows = x.reshape(self.num_agents, -1, x.shape[-1])
        y = self.base_layer(rows)
        a: torch.Tensor = self.lora_A
        b: torch.Tensor = self.lora_B
        if self.training and self.dropconnect:
            a, b = (F.dropout(weight, self.dropconnect) for weight in (a, b))
        if not torch.is_autocast_enabled(x.device.type):
            rows = rows.to(a.dtype)
        low = torch.bmm(self.dropout(rows), a.mT) * self.scale
        if y.dtype == low.dtype == b.dtype:  # no backward pass reads y
            y = y.baddbmm_(low, b.mT) if self.in_place else y.baddbmm(low, b.mT)
        else:
            y = y + torch.bmm(low, b.mT).to(y.dtype)
        return y.view(*x.shape[:-1], -1)


class Agents(nn.Module):
    """A base whose adapted layers hold K agents. `adapted`: the base with PEFT's adapters."""

    num_agents: int

    def __init__(self, adapted: Any, settings: Crowd):
        super().__init__()
        self.num_agents = settings.num_agents
        self.aggregator = settings.aggregator
        self.concentration = (settings.concentration,) * settings.num_agents  # for the aggregator
        self.peft_config = adapted.peft_config["default"]
        self.base = adapted.get_base_model()
        for name, layer in [*self.base.named_modules()]:
            if not isinstance(layer, LoraLayer):
                continue
            if not isinstance(layer.base_layer, nn.Linear | Conv1D):
                raise ConfigError(
                    f"tuning.target_modules: agents adapt linear layers, found {name}, a "
                    f"{type(layer.base_layer).__name__}; leave it out"
                )
            parent, _, last = name.rpartition(".")
            agents = AgentsLinear(layer, self.num_agents, settings.dropconnect)
            setattr(self.base.get_submodule(parent), last, agents)
        self.base_arguments = inspect.signature(self.base.forward).parameters
        self.config = self.base.config
        self.generation_config = getattr(self.base, "generation_config", None)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> Any:
        """Runs the base on K times the rows: input_ids (B, T) -> logits (K * B, T, V)."""
        options: dict[str, Any] = {}
        for name, each in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if each is not None and name in self.base_arguments:
                options[name] = self._repeat(each)
        if logits_to_keep and "logits_to_keep" in self.base_arguments:
            options["logits_to_keep"] = logits_to_keep
        return self.base(
            input_ids=self._repeat(input_ids),
            past_key_values=past_key_values,
            use_cache=use_cache,
            **options,
        )

    def _repeat(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat(self.num_agents, *[1] * (rows.dim() - 1))

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.base.gradient_checkpointing_enable(**options)
        keeps_products = "context_fn" in (options.get("gradient_checkpointing_kwargs") or {})
        for module in self.base.modules():
            if isinstance(module, AgentsLinear):
                module.in_place = not keeps_products

    # -- folders

    def describe(self) -> dict[str, Any]:
        """Returns the description of the agents that is written to `META`."""
        lora = self.peft_config
        return {
            "num_agents": self.num_agents,
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "lora_dropout": lora.lora_dropout,
            "target_modules": sorted(lora.target_modules),
            **({"exclude_modules": lora.exclude_modules} if lora.exclude_modules else {}),
            "aggregator": self.aggregator,
            "concentration": list(self.concentration),
        }

    def save_pretrained(
        self,
        folder: str,
        state_dict: dict[str, torch.Tensor] | None = None,
        behind: bool = False,
    ) -> list[TensorFile]:
        """Writes `agent0` ... `agent{K-1}`, each an adapter in PEFT's format.

        `state_dict`: the full weights by name, if this rank's module holds only parts of them.
        `behind`: see `TensorFile`.
        """
        peft_config = copy.copy(self.peft_config)
        peft_config.inference_mode = True
        weights = self.state_dict() if state_dict is None else state_dict
        adapters = {name: each for name, each in weights.items() if "lora_" in name}
        files = list[TensorFile]()
        for agent in range(self.num_agents):
            agent_folder = Path(folder, f"agent{agent}")
            peft_config.save_pretrained(str(agent_folder))
            own = {peft_name(n): each[agent] for n, each in adapters.items()}
            files.append(write_tensors(agent_folder / ADAPTER, own, {"format": "pt"}, behind))
        return files


def peft_name(name: str) -> str:
    """Returns the name of an agent's weight in PEFT's files."""
    return f"base_model.model.{name.removeprefix('base.')}.weight"


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
            shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3, the full shape
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
    """Raises CheckpointError if `folder` holds no crowd, or not the crowd that is configured."""
    saved = read_meta(folder)
    configured = crowd.describe()
    differences = [
        f"{key}: saved with {saved[key]}, configured as {configured[key]}"
        for key in ("num_agents", "r", "lora_alpha", "target_modules")
        if saved[key] != configured[key]
    ]
    if differences:
        raise CheckpointError(f"{folder} holds another crowd:\n  " + "\n  ".join(differences))


def shape_of(meta: dict[str, Any]) -> Tuning:
    """Returns the shape of the agents in a description. Raises ValueError or KeyError."""
    excluded = ("exclude_modules",) if "exclude_modules" in meta else ()
    return adapter_tuning({key: meta[key] for key in (*SHARED, *excluded)})


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns the description of the crowd in `folder`. Raises CheckpointError if it holds none."""
    path = folder / META
    try:
        found = plain.load_json(path, follow=True)
        shape_of(found)
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
