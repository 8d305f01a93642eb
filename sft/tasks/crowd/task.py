"""The crowd's task: what SFT does, for K agents at once, and a term that keeps them apart.

    loss = mean over agents of the cross-entropy per supervised token - lambda_sw * diversity

The diversity is one of the whole global batch, however that is cut (law 1): where it is cut, a
first pass without gradients surveys the representations of all its examples, from which follow the
diversity and its gradient in each of them; the passes that train then pull on their own examples
(as GradCache does for contrastive losses, Gao et al. 2021). What is held out is scored as it is
served: by the aggregator's mixture of the agents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.load import with_values
from sft.config.schema import Config, Crowd
from sft.data import batches, cache
from sft.data.cache import Prepared
from sft.data.examples import Batch, Examples
from sft.data.template import IGNORED
from sft.errors import ConfigError, DataError, MergeError
from sft.evaluate import generate
from sft.models import export
from sft.models.head import SupervisedHead
from sft.models.layers import repeated_layers
from sft.tasks.base import Finding, Shrunk, Task, TaskInfo
from sft.tasks.crowd import files
from sft.tasks.crowd.agents import Agents
from sft.tasks.crowd.aggregator import Aggregator, Mixture, aggregator_of, fit, mix
from sft.tasks.crowd.diversity import directions, disagreement, diversity, normalised
from sft.tasks.sft.saved import BaseRecord, read_base_record
from sft.tasks.sft.task import FineTune
from sft.train.engine import Engine


class Reader:
    """The representations of a batch's examples, of all agents, in the forward pass that is under
    way: what layer `crowd.layer` gives, or the logits, at supervised positions (those whose next
    token is supervised): the last of each example, the first, or their mean."""

    def __init__(self, built: Agents, head: SupervisedHead, settings: Crowd):
        self.head, self.settings = head, settings
        self.forget()
        layers = repeated_layers(built)
        if settings.layer >= len(layers):
            raise ConfigError(
                f"crowd.layer: expected one of this model's {len(layers)} layers, 0 to "
                f"{len(layers) - 1}, or -1, found {settings.layer}"
            )
        if settings.representation == "hidden" and settings.layer == -1:
            # After the hook of `head`, which takes the supervised positions.
            built.get_output_embeddings().register_forward_pre_hook(self._of_head)
        elif settings.representation == "hidden":
            layers[settings.layer].register_forward_hook(self._of_layer)

    def forget(self) -> None:
        """What is left of a pass that was given up would keep its whole graph."""
        self.states: torch.Tensor | None = None  # (agents * supervised, d)

    def _of_head(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.head.positions is not None:
            self.states = inputs[0]

    def _of_layer(self, _: nn.Module, __: Any, output: Any) -> None:
        if self.head.positions is not None:
            states = output[0] if isinstance(output, tuple) else output
            self.states = states.flatten(0, 1)[self.head.positions]

    def take(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """logits (agents, supervised, vocabulary) -> points (examples with a supervised token,
        agents, d), in fp32 or wider."""
        states = logits if self.settings.representation == "logits" else self.states
        assert states is not None
        self.forget()
        agents = self.settings.num_agents
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        states = states.view(agents, -1, states.shape[-1]).movedim(0, 1)  # (supervised, agents, d)
        counts = [count for count in batch.counts if count]
        pooled = [_pooled(part, self.settings.pooling) for part in states.split(counts)]
        points = torch.stack(pooled) if pooled else states[:0]
        return normalised(points) if self.settings.normalise else points


def _pooled(states: torch.Tensor, pooling: str) -> torch.Tensor:
    """(positions, agents, d) -> (agents, d)."""
    if pooling == "mean":
        return states.mean(0)
    return states[-1 if pooling == "last" else 0]


def _needed(batch: Batch, pooling: str) -> Batch:
    """With only those supervised positions that are pooled: logits of others take long."""
    if pooling == "mean":
        return batch
    ends = [*itertools.accumulate(batch.counts)]  # no tensors: a plan's have no values
    pairs = [(end, count) for end, count in zip(ends, batch.counts, strict=True) if count]
    places = [end - (1 if pooling == "last" else count) for end, count in pairs]
    return replace(
        batch,
        positions=batch.positions[places],
        targets=batch.targets[places],
        weights=None,
        counts=[min(count, 1) for count in batch.counts],
    )


@dataclass(frozen=True)
class Summary:
    """What is known of the global batch: its diversity, and the gradient in each example."""

    rows: dict[int, int]  # example id -> row of `gradient`
    diversity: torch.Tensor
    gradient: torch.Tensor  # (examples, agents, d)
    supervised: float  # items of the global batch


class CrowdTune(FineTune):
    """K LoRA agents on one frozen base."""

    modelled = (*FineTune.modelled, "crowd")
    merge_arguments = " AGENT=0"
    model: Agents

    # -- before there is a model

    @classmethod
    def refuse_untrainable(cls, config: Config) -> None:
        if config.crowd.agent is not None:
            raise ConfigError("crowd.agent: all agents of a crowd are trained; remove it")

    @classmethod
    def prepare(cls, config: Config, tick: Callable[[], None] = lambda: None) -> Prepared:
        return _with_validation(config, super().prepare(config, tick))

    @classmethod
    def prepare_evaluation(
        cls, config: Config, tick: Callable[[], None] = lambda: None
    ) -> Prepared:
        return _with_validation(config, super().prepare_evaluation(config, tick))

    @classmethod
    def identity_of(cls, config: Config, prepared: Prepared) -> dict[str, str]:
        """Names each key of the crowd by itself, so that a message says which one differs."""
        own = {f"crowd.{key}": str(value) for key, value in config.crowd.model_dump().items()}
        return super().identity_of(config, prepared) | own

    @classmethod
    def info(cls, config: Config) -> TaskInfo:
        crowd = config.crowd
        return replace(
            super().info(config),
            copies=crowd.num_agents,
            deepest_layer=crowd.layer,
            needs_global_batch=crowd.num_agents > 1 and crowd.lambda_sw > 0,
        )

    @classmethod
    def with_depth(cls, config: Config, depth: int) -> Config:
        if config.crowd.layer < depth:
            return config
        return with_values(config, {"crowd.layer": depth - 1})  # the last that there is

    @classmethod
    def adapt(cls, base: nn.Module, config: Config) -> nn.Module:
        return Agents(super().adapt(base, config), config.crowd)

    @classmethod
    def shrink(cls, config: Config, folder: Path, exact: bool) -> Shrunk:
        made = super().shrink(config, folder, exact)
        return replace(made, smooth=made.smooth | {"crowd.dropconnect": 0.0})

    def check_result(self, engine: Engine, folder: Path) -> Iterator[Finding]:
        if self.needs_global_batch:
            yield self._check_diversity(engine)
        yield from super().check_result(engine, folder)

    @staticmethod
    def _check_diversity(engine: Engine) -> Finding:
        """Measures the diversity in the second step: before the first, agents are one function."""
        engine.step += 1
        found = engine.optimizer_step()["train/diversity"]
        engine.step -= 1
        what = f"diversity: {found:.3g} after one step"
        remedy = "agents do not diverge: raise train.learning_rate"
        return Finding(found > 0, what, "" if found > 0 else remedy)

    # -- with a model

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.settings = self.config.crowd
        self.needs_global_batch = self.settings.lambda_sw > 0 and self.settings.num_agents > 1
        if self.needs_global_batch:
            self.reader = Reader(self.model, self.head, self.settings)
        self.summary: Summary | None = None
        self.seed = self.config.train.seed

    # -- training

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self._forward(model, batch)
        agents, _, vocabulary = logits.shape
        targets = batch.targets.repeat(agents)
        losses = F.cross_entropy(logits.view(-1, vocabulary), targets, reduction="none")
        correct = logits.detach().argmax(-1) == batch.targets
        loss = self._summed(losses.view(agents, -1), batch)
        extras = {
            "cross_entropy": loss.detach(),
            "token_accuracy": self._summed(correct.to(losses), batch),
        }
        if not self.needs_global_batch:
            return loss, extras
        apart = self._diversity_sum(self.reader.take(logits, batch), batch)
        return loss - self.settings.lambda_sw * apart, {**extras, "diversity": apart.detach()}

    def _forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits (agents, supervised, vocabulary)."""
        if self.needs_global_batch:
            self.reader.forget()
        size, agents = batch.input_ids.numel(), self.settings.num_agents
        positions = torch.cat([batch.positions + agent * size for agent in range(agents)])
        logits = self.logits(model, batch, positions)
        return logits.view(agents, -1, logits.shape[-1])

    @staticmethod
    def _summed(values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(agents, supervised) -> the sum over tokens, by their weights, of the agents' mean."""
        mean = values.mean(0)
        return mean.sum() if batch.weights is None else mean @ batch.weights.to(mean)

    def _diversity_sum(self, points: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A micro-batch's share of the global batch's diversity times its number of items: what is
        left of it when the engine has divided the sum of all shares."""
        found = self.summary
        if found is None:  # all examples are here
            onto = directions(self.settings.num_projections, points.shape[-1], self.seed)
            return self.num_supervised(batch) * diversity(points.movedim(0, 1), onto)
        rows = [found.rows[i] for i in batch.examples if i in found.rows]
        pull = (points * found.gradient[rows]).sum()
        share = found.diversity * (len(rows) / len(found.rows)) if rows else 0.0
        return found.supervised * (pull - pull.detach() + share)

    @torch.no_grad()
    def summarise(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(examples, agents, d): their representations, 0 for those without a supervised token."""
        batch = _needed(batch, self.settings.pooling)
        points = self.reader.take(self._forward(model, batch), batch)
        whole = points.new_zeros(len(batch.examples), *points.shape[1:])
        whole[[i for i, count in enumerate(batch.counts) if count]] = points
        return whole

    def set_global_batch(
        self, ids: list[int], summaries: torch.Tensor | None, supervised: float
    ) -> None:
        self.seed, self.summary = torch.initial_seed(), None
        if summaries is None:
            return
        seen = [place for place, i in enumerate(ids) if self._is_supervised(i)]
        points = summaries[seen].requires_grad_()
        onto = directions(self.settings.num_projections, points.shape[-1], self.seed)
        with torch.enable_grad():
            value = diversity(points.movedim(0, 1), onto)
            (gradient,) = torch.autograd.grad(value, points)
        rows = {ids[place]: row for row, place in enumerate(seen)}
        self.summary = Summary(rows, value.detach(), gradient, supervised)

    def _is_supervised(self, number: int) -> bool:
        _, labels, _ = self.prepared.train.tokens(number)
        return bool((labels[1:] != IGNORED).any())

    # -- what is held out

    def eval_loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of the mixture, which answers; besides, what an agent alone would lose, and how often two
        agents would not write the same token."""
        logits = self._forward(model, batch).log_softmax(-1)
        mixed = mix(logits, self.aggregator.expected().to(logits))
        chosen = batch.targets[:, None]
        losses = -mixed.gather(-1, chosen)[:, 0]
        own = -logits.gather(-1, chosen.expand(len(logits), -1, 1))[..., 0]
        correct = (mixed.argmax(-1) == batch.targets).to(own)
        return self._summed(losses[None], batch), {
            "token_accuracy": self._summed(correct[None], batch),
            "agent_loss": self._summed(own, batch),
            "disagreement": self._summed(disagreement(logits)[None], batch),
        }

    @property
    def aggregator(self) -> Aggregator:
        return aggregator_of(self.model)

    @classmethod
    def as_answer_model(cls, model: nn.Module) -> nn.Module:
        if not isinstance(model, Agents):  # one agent alone
            return model
        return Mixture(model, aggregator_of(model)).eval()

    def answer_model(self, model: nn.Module) -> nn.Module:
        return Mixture(self.accelerator.unwrap_model(model), self.aggregator)

    @property
    def answered_by(self) -> str:
        return f", by {self.settings.num_agents} agents ({self.settings.aggregator})"

    def finish(self, model: nn.Module) -> None:
        """Fits the learned concentration on the rows that were kept from training. Collective."""
        rows = self.prepared.validation
        if self.settings.aggregator != "learned" or rows is None:
            return
        with self.guard.section("aggregator"):
            self.model.concentration = fit(*self._likelihoods(model, rows))
        told = ", ".join(f"{each:.3g}" for each in self.model.concentration)
        self.log.say(f"aggregator: concentration {told}, fitted on {len(rows):,} rows")

    def _likelihoods(self, model: nn.Module, rows: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every target of `rows`: its log likelihood (agents, tokens), and whose it is
        (tokens,); the same on all ranks."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = batches.cut(range(len(rows)), rows.lengths, world, self.budget)[rank]
        found: list[tuple[int, torch.Tensor]] = []
        with (
            generate.eval_mode(model),
            self.log.progress("likelihoods for the aggregator", len(mine)) as advance,
        ):
            for ids in mine:
                self.guard.stop_if_asked()
                advance()
                batch = self._collate(rows, ids)
                logits = self._forward(model, batch).log_softmax(-1)
                chosen = batch.targets[:, None].expand(len(logits), -1, 1)
                parts = logits.gather(-1, chosen)[..., 0].double().cpu().split(batch.counts, dim=1)
                found += zip(batch.examples, parts, strict=True)
        every = sorted(gather_object(found), key=lambda pair: pair[0])
        owners = [torch.full((part.shape[1],), i) for i, part in every]
        return torch.cat([part for _, part in every], 1), torch.cat(owners)

    # -- on disk

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        files.save(self.model, self.prepared.tokenizer, folder, weights, self.config.model)

    def read(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        return files.read_agents(self.model, folder)

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
        files.take_concentration(adapted, folder, config.crowd)
        export.put_weights(adapted, files.read_agents(adapted, folder))

    @classmethod
    def is_adapter(cls, folder: Path) -> bool:
        return (folder / files.META).exists()

    @classmethod
    def adapter_files(cls, folder: Path) -> list[Path]:
        own = super().adapter_files
        return [folder / files.META, *itertools.chain(*map(own, sorted(folder.glob("agent*"))))]

    @classmethod
    def recorded_base(cls, folder: Path) -> BaseRecord | None:
        return read_base_record(folder / files.META, "base")

    @classmethod
    def base_name(cls, folder: Path) -> str:
        return str(files.read_meta(folder)["base"]["name"])

    @classmethod
    def with_adapter(cls, base: nn.Module, name: str, folder: Path) -> nn.Module:
        return files.with_agents(base, folder)

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


def _with_validation(config: Config, prepared: Prepared) -> Prepared:
    """Keeps rows from training for the learned aggregator."""
    if config.crowd.aggregator != "learned":
        return prepared
    try:
        return cache.with_validation(prepared, config.crowd.fit_fraction)
    except DataError as error:
        raise DataError(f"crowd.aggregator: learned: {error}") from None
