"""Fine-tunes K agents at once, with a term in the loss that keeps them apart.

    loss = mean over agents of the cross-entropy per supervised token - lambda_sw * diversity

The diversity is that of the whole global batch, however the batch is cut (law 1). If it is cut, a
first pass without gradients collects the representations of all its examples. They determine the
diversity and its gradient in each example, and the training passes apply that gradient to their own
examples, as GradCache does for contrastive losses (Gao et al. 2021). Held-out rows are scored as
they are served: by the aggregator's mixture of the agents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.load import with_values
from sft.config.schema import Config, Crowd
from sft.data import batches, cache
from sft.data.cache import Prepared
from sft.data.examples import Batch, Examples
from sft.data.template import IGNORED
from sft.errors import ConfigError, DataError, ExportError, MergeError, ModelError
from sft.evaluate import generate
from sft.models import classes, pretrained
from sft.models.adapt import add_adapters
from sft.models.experts import auto_targets
from sft.models.export import BASE, base_record, put_weights
from sft.models.head import WHOLE, Measure, take, widen
from sft.models.reach import reach
from sft.models.weights import Weights
from sft.runtime.console import write_json
from sft.runtime.tensor_file import TensorFile
from sft.tasks.base import Finding, Shrunk, Task, TaskInfo
from sft.tasks.crowd.agents import META, Agents, read_agents, read_meta, shape_of
from sft.tasks.crowd.aggregator import FEW_ANSWERS, Mixture, aggregator_of, fit, mix
from sft.tasks.crowd.diversity import (
    BatchDiversity,
    RepresentationReader,
    directions,
    disagreement,
    diversity,
    select_pooled,
)
from sft.tasks.sft import losses
from sft.tasks.sft.saved import BaseRecord, read_base_record
from sft.tasks.sft.task import FineTune
from sft.train.engine import Engine


class CrowdTune(FineTune):
    """K LoRA agents on one frozen base."""

    model_sections = (*FineTune.model_sections, "crowd")
    merge_arguments = " AGENT=0"
    shares_sequences = False
    model: Agents

    # -- before there is a model

    @classmethod
    def refuse_untrainable(cls, config: Config) -> None:
        super().refuse_untrainable(config)
        if config.crowd.agent is not None:
            raise ConfigError("crowd.agent: all agents of a crowd are trained; remove it")
        if config.tuning.target_modules != "auto":
            return
        arch = pretrained.architecture(config.model)
        with pretrained.explain_load_errors(config.model.name), torch.device("meta"):
            base = classes.from_config(arch, trust_remote_code=config.model.trust_remote_code)
        if (auto := auto_targets(base, reach(base))).parameters:
            raise ConfigError(
                "tuning.target_modules: agents adapt linear layers, and this model has a matrix "
                f"for each expert in one parameter ({auto.parameters[0]}), which `auto` adapts, "
                f"too; name its linear layers: [{', '.join(auto.modules)}]"
            )

    @classmethod
    def prepare(cls, config: Config, tick: Callable[[], None] = lambda: None) -> Prepared:
        """Returns the data; for the learned aggregator some rows are kept from training."""
        prepared = super().prepare(config, tick)
        if config.crowd.aggregator != "learned":
            return prepared
        try:
            return cache.with_validation(prepared, config.crowd.fit_fraction)
        except DataError as error:
            raise DataError(f"crowd.aggregator: learned: {error}") from None

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
            starts_split=False,
            deepest_layer=crowd.layer,
            needs_global_batch=crowd.num_agents > 1 and crowd.lambda_sw > 0,
        )

    @classmethod
    def adapt(cls, base: nn.Module, config: Config) -> nn.Module:
        return Agents(super().adapt(base, config), config.crowd)

    @classmethod
    def with_depth(cls, config: Config, depth: int) -> Config:
        if config.crowd.layer < depth:
            return config
        return with_values(config, {"crowd.layer": depth - 1})  # the last that there is

    @classmethod
    def shrink(cls, config: Config, folder: Path, exact: bool) -> Shrunk:
        made = super().shrink(config, folder, exact)
        return replace(made, exact=made.exact | {"crowd.dropconnect": 0.0})

    def check_result(self, engine: Engine, folder: Path) -> Iterator[Finding]:
        if self.needs_global_batch:
            engine.step += 1  # in the first step, all agents are still one function
            found = engine.optimizer_step()["train/diversity"]
            engine.step -= 1
            remedy = "" if found > 0 else "agents do not diverge: raise train.learning_rate"
            yield Finding(found > 0, f"diversity: {found:.3g} after one step", remedy)
        yield from super().check_result(engine, folder)

    # -- with a model

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.settings = self.config.crowd
        self.needs_global_batch = self.settings.lambda_sw > 0 and self.settings.num_agents > 1
        if self.needs_global_batch:
            self.reader = RepresentationReader(self.model, self.head, self.settings)
        self.batch_diversity: BatchDiversity | None = None
        self.seed = self.config.train.seed

    # -- training

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        measure, train = self._token_sums(batch), True
        logits = None
        if self.needs_global_batch and self.settings.representation == "logits":
            logits = self._forward(model, batch, train)  # whole: they are compared, too
            sums = measure(logits.flatten(0, 1), WHOLE)
        else:
            sums = self._agent_sums(model, batch, measure, train)
        loss = sums.pop("loss")
        extras = {"cross_entropy": loss.detach(), **sums}
        if not self.needs_global_batch:
            return loss, extras
        spread = self._diversity_sum(self.reader.read_points(logits, batch), batch)
        return loss - self.settings.lambda_sw * spread, {**extras, "diversity": spread.detach()}

    def _token_sums(self, batch: Batch) -> Measure:
        """Returns a function that sums losses and hits of logits (agents * positions, words)."""
        train, agents = self.config.train, self.settings.num_agents

        def sums(logits: torch.Tensor, part: slice) -> dict[str, torch.Tensor]:
            targets = take(batch.targets, part)
            each, plain = losses.token_losses(logits, targets.repeat(agents), train)
            correct = logits.detach().argmax(-1).view(agents, -1) == targets
            found = {"loss": each, "cross_entropy": plain, "token_accuracy": correct.to(each)}
            if losses.is_plain(train):
                del found["cross_entropy"]
            return {
                name: self._weighted_sum(values.view(agents, -1), batch, part)
                for name, values in found.items()
            }

        return sums

    def _agent_sums(
        self, model: nn.Module, batch: Batch, measure: Measure, trains: bool = False
    ) -> dict[str, torch.Tensor]:
        """Returns what `measure` sums over the supervised positions of all agents."""
        run = lambda: self._call(model, batch, trains)  # noqa: E731
        return self.head.sums(run, self._all_positions(batch), measure)[0]

    def _all_positions(self, batch: Batch) -> torch.Tensor:
        """Returns the supervised positions of each agent's rows, agent by agent."""
        if self.needs_global_batch:
            self.reader.clear()
        size, agents = batch.input_ids.numel(), self.settings.num_agents
        return torch.cat([batch.positions + agent * size for agent in range(agents)])

    def _forward(self, model: nn.Module, batch: Batch, trains: bool = False) -> torch.Tensor:
        """Returns logits (agents, supervised, vocabulary)."""
        logits = widen(self._run(model, batch, self._all_positions(batch), trains).logits)
        return logits.view(self.settings.num_agents, -1, logits.shape[-1])

    @staticmethod
    def _weighted_sum(values: torch.Tensor, batch: Batch, part: slice) -> torch.Tensor:
        """Returns the weighted sum over tokens of the agents' mean: (agents, positions) -> ().

        `part`: which supervised positions these are.
        """
        mean = values.mean(0)
        return mean.sum() if batch.weights is None else mean @ take(batch.weights, part).to(mean)

    def _diversity_sum(self, points: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns a micro-batch's share of the diversity times the number of items.

        The engine sums the shares and divides the sum by that number.
        """
        if self.batch_diversity is not None:
            return self.batch_diversity.share(batch.examples, points)
        whole = diversity(points.movedim(0, 1), self._directions(points))  # all examples are here
        return self.num_supervised(batch) * whole

    def _directions(self, points: torch.Tensor) -> torch.Tensor:
        return directions(self.settings.num_projections, points.shape[-1], self.seed)

    @torch.no_grad()
    def summarise(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns representations (examples, agents, d), 0 for examples without a target."""
        batch, logits = select_pooled(batch, self.settings.pooling), None
        if self.settings.representation == "logits":
            logits = self._forward(model, batch, True)
        else:
            self._agent_sums(model, batch, lambda found, _: {"loss": found.new_zeros(())}, True)
        points = self.reader.read_points(logits, batch)
        table = points.new_zeros(len(batch.examples), *points.shape[1:])
        table[[i for i, count in enumerate(batch.counts) if count]] = points
        return table

    def set_global_batch(
        self, ids: list[int], summaries: torch.Tensor | None, supervised: float
    ) -> None:
        self.seed, self.batch_diversity = torch.initial_seed(), None
        if summaries is None:
            return
        kept = [place for place, i in enumerate(ids) if self._is_supervised(i)]
        self.batch_diversity = BatchDiversity.of_points(
            [ids[place] for place in kept],
            summaries[kept],
            supervised,
            self._directions(summaries),
        )

    def _is_supervised(self, number: int) -> bool:
        _, labels, _ = self.prepared.train.tokens(number)
        return bool((labels[1:] != IGNORED).any())

    # -- what is held out

    def eval_loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss of the mixture, which answers.

        Reported besides: the mean loss of single agents, and the share of tokens on which two
        agents differ.
        """
        agents = self.settings.num_agents

        def sums(logits: torch.Tensor, part: slice) -> dict[str, torch.Tensor]:
            targets = take(batch.targets, part)
            logits = logits.view(agents, -1, logits.shape[-1]).log_softmax(-1)
            mixed = mix(logits, aggregator_of(self.model).expected().to(logits))
            chosen = targets[:, None]
            found = -mixed.gather(-1, chosen)[:, 0]
            own = -logits.gather(-1, chosen.expand(len(logits), -1, 1))[..., 0]
            correct = (mixed.argmax(-1) == targets).to(own)
            if self.example_sums is not None:
                self.example_sums.add(batch, part, found, correct)
            return {
                "loss": self._weighted_sum(found[None], batch, part),
                "token_accuracy": self._weighted_sum(correct[None], batch, part),
                "agent_loss": self._weighted_sum(own, batch, part),
                "disagreement": self._weighted_sum(disagreement(logits)[None], batch, part),
            }

        found = self._agent_sums(model, batch, sums)
        return found.pop("loss"), found

    @classmethod
    def as_answer_model(cls, model: nn.Module) -> nn.Module:
        if not isinstance(model, Agents):  # one agent alone
            return model
        return Mixture(model, aggregator_of(model))

    @property
    def answered_by(self) -> str:
        return f", by {self.settings.num_agents} agents ({self.settings.aggregator})"

    def finish(self, model: nn.Module) -> None:
        """Fits the learned concentration on rows that were kept from training. Collective."""
        rows = self.prepared.validation
        if self.settings.aggregator != "learned" or rows is None:
            return
        with self.guard.section("aggregator"):
            self.model.concentration = fit(*self._likelihoods(model, rows))
        numbers = ", ".join(f"{each:.3g}" for each in self.model.concentration)
        self.log.say(f"aggregator: concentration {numbers}, fitted on {len(rows):,} rows")
        if len(rows) < FEW_ANSWERS:
            self.log.say(
                f"warning: crowd.aggregator: learned: expected at least {FEW_ANSWERS} rows to fit "
                f"weights on, found {len(rows)}, so they stay near even ones; raise "
                "crowd.fit_fraction, or set uniform, which keeps no rows from training"
            )

    def _likelihoods(self, model: nn.Module, rows: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each target's log likelihoods (agents, tokens) and its row (tokens,).

        The results are the same on all ranks.
        """
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
                parts = self._likelihoods_of(model, batch).split(batch.counts, dim=1)
                found += zip(batch.examples, parts, strict=True)
        every = sorted(gather_object(found), key=lambda pair: pair[0])
        owners = [torch.full((part.shape[1],), i) for i, part in every]
        return torch.cat([part for _, part in every], 1), torch.cat(owners)

    def _likelihoods_of(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns each target's log likelihoods (agents, supervised) in fp64 on the CPU."""
        agents, found = self.settings.num_agents, list[torch.Tensor]()

        def collect(logits: torch.Tensor, part: slice) -> dict[str, torch.Tensor]:
            logits = logits.view(agents, -1, logits.shape[-1]).log_softmax(-1)
            chosen = batch.targets[part, None].expand(agents, -1, 1)
            found.append(logits.gather(-1, chosen)[..., 0].double().cpu())
            return {"loss": logits.new_zeros(())}

        self._agent_sums(model, batch, collect)
        return torch.cat(found, dim=1)

    def save(self, folder: Path, weights: Weights) -> list[TensorFile]:
        """Writes each agent as an adapter that loads alone, and a description of all of them."""
        crowd, tokenizer, whole = self.model, self.prepared.tokenizer, weights.all()
        if not weights.is_main:
            return []
        files = crowd.save_pretrained(str(folder), whole, weights.behind)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form
        record = base_record(self.config.model)
        for agent in sorted(folder.glob("agent*")):
            tokenizer.save_pretrained(str(agent))
            write_json(agent / BASE, record)
        tokenizer.save_pretrained(str(folder))
        write_json(folder / META, {**crowd.describe(), "base": record})
        return files

    def loading(self) -> str:
        run = self.config.train.output_dir
        return (
            f"`make infer RUN={run}` asks all agents; `AGENT=0` one of them. Each folder "
            f"`agent<n>` is an adapter that loads alone:\n\n{super().loading()}"
        ).replace("path/to/this/folder", "path/to/this/folder/agent0")

    def read(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        return read_agents(self.model, folder)

    # -- a finished run, or its agents without it

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
    def load_adapter(cls, adapted: Any, folder: Path, config: Config) -> None:
        """Loads all agents, and the fitted concentration unless the configuration has its own."""
        saved, settings = read_meta(folder), config.crowd
        if saved["aggregator"] == "learned" and settings.concentration == Crowd().concentration:
            adapted.concentration = tuple(map(float, saved["concentration"]))
        elif settings.aggregator == "learned":
            raise ExportError(
                f"{folder}: crowd.aggregator: expected {saved['aggregator']}, as it was trained, "
                "found learned, for which nothing was fitted; remove the override, or train with it"
            )
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
            crowd: Any = Agents(add_adapters(base, shape_of(saved)), settings)
            put_weights(crowd, read_agents(crowd, folder))
        except ModelError as error:
            raise ExportError(f"{folder} is no crowd of this base: {error}") from None
        crowd.concentration = tuple(map(float, saved["concentration"]))
        return crowd

    @classmethod
    def overrides_for(cls, folder: Path) -> list[str] | None:
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
    def selection(cls, config: Config) -> dict[str, Any]:
        return {"agent": config.crowd.agent}

    @classmethod
    def recorded_overrides(cls, record: Mapping[str, Any]) -> list[str]:
        agent = record.get("agent")
        return [] if agent is None else [f"crowd.agent={agent}"]

    @classmethod
    def describe_selection(cls, config: Config) -> str:
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
