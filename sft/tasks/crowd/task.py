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
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn

from sft.config.schema import Crowd
from sft.data import batches
from sft.data.examples import Batch, Examples
from sft.data.template import IGNORED
from sft.errors import ConfigError
from sft.evaluate import generate
from sft.models.head import SupervisedHead
from sft.models.layers import repeated_layers
from sft.tasks.crowd.agents import Agents
from sft.tasks.crowd.aggregator import Aggregator, Mixture, aggregator_of, fit, mix
from sft.tasks.crowd.diversity import directions, disagreement, diversity, normalised
from sft.tasks.sft.task import FineTune


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
class Survey:
    """What is known of the global batch: its diversity, and the gradient in each example."""

    rows: dict[int, int]  # example id -> row of `gradient`
    diversity: torch.Tensor
    gradient: torch.Tensor  # (examples, agents, d)
    supervised: float  # items of the global batch


class CrowdTune(FineTune):
    """The engine's Task for a crowd (see engine.Task for what each method owes)."""

    model: Agents

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.settings = self.config.crowd
        self.surveys = self.settings.lambda_sw > 0 and self.settings.num_agents > 1
        if self.surveys:
            self.reader = Reader(self.model, self.head, self.settings)
        self.survey_of: Survey | None = None
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
        if not self.surveys:
            return loss, extras
        apart = self._diversity_sum(self.reader.take(logits, batch), batch)
        return loss - self.settings.lambda_sw * apart, {**extras, "diversity": apart.detach()}

    def _forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits (agents, supervised, vocabulary)."""
        if self.surveys:
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
        found = self.survey_of
        if found is None:  # all examples are here
            onto = directions(self.settings.num_projections, points.shape[-1], self.seed)
            return self.num_supervised(batch) * diversity(points.movedim(0, 1), onto)
        rows = [found.rows[i] for i in batch.examples if i in found.rows]
        pull = (points * found.gradient[rows]).sum()
        share = found.diversity * (len(rows) / len(found.rows)) if rows else 0.0
        return found.supervised * (pull - pull.detach() + share)

    @torch.no_grad()
    def survey(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(examples, agents, d): their representations, 0 for those without a supervised token."""
        batch = _needed(batch, self.settings.pooling)
        points = self.reader.take(self._forward(model, batch), batch)
        whole = points.new_zeros(len(batch.examples), *points.shape[1:])
        whole[[i for i, count in enumerate(batch.counts) if count]] = points
        return whole

    def surveyed(self, ids: list[int], found: torch.Tensor | None, supervised: float) -> None:
        self.seed, self.survey_of = torch.initial_seed(), None
        if found is None:
            return
        seen = [place for place, i in enumerate(ids) if self._is_supervised(i)]
        points = found[seen].requires_grad_()
        onto = directions(self.settings.num_projections, points.shape[-1], self.seed)
        with torch.enable_grad():
            value = diversity(points.movedim(0, 1), onto)
            (gradient,) = torch.autograd.grad(value, points)
        rows = {ids[place]: row for row, place in enumerate(seen)}
        self.survey_of = Survey(rows, value.detach(), gradient, supervised)

    def _is_supervised(self, number: int) -> bool:
        _, labels, _ = self.prepared.train.tokens(number)
        return bool((labels[1:] != IGNORED).any())

    # -- what is held out

    def scored(
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

    def answering(self, model: nn.Module) -> nn.Module:
        return Mixture(super().answering(model), self.aggregator)

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
