"""Distillation as the engine's Task: windows of histories -> the action behind every transition."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn

from sft.config.schema import Distill
from sft.data import batches
from sft.evaluate import answers
from sft.models import export, layers
from sft.runtime.log import Log
from sft.runtime.watchdog import Guard
from sft.tasks.distill import darkroom, histories, rollout
from sft.tasks.distill.histories import Windows
from sft.tasks.distill.source import Histories
from sft.tasks.distill.transformer import (
    ENDS,
    GOES_ON,
    Transformer,
    num_positions,
    window_tokens,
    with_marks,
)

WEIGHTS, SETTINGS = "model.safetensors", "distill.json"


def identity(settings: Distill, digest: str) -> dict[str, str]:
    """What makes a checkpoint one of this run; `digest`: of the histories."""
    played = {name for name in Distill.model_fields if name.startswith("eval_")} | {"data_dir"}
    return {"distill": settings.model_dump_json(exclude=played), "data": digest}


def build(settings: Distill, seed: int, device: torch.device) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(settings).to(device)


def split(found: Histories, settings: Distill) -> tuple[Windows, Windows]:
    """Windows that are trained on, and those of the streams that are held out."""
    first = settings.num_streams - settings.held_out_streams
    train, held_out = (0, first), (first, settings.num_streams)
    return Windows(found, settings, *train), Windows(found, settings, *held_out)


def num_held_out(windows: Windows) -> int:
    """Of them that the held-out loss is of."""
    return windows.num_goals * (windows.last - windows.first)


def blank_histories(settings: Distill) -> Histories:
    """Of noughts that share one place in memory: for what depends on their number alone."""
    number = len(darkroom.goals(settings.split_seed)[0])
    shape = (number, settings.num_streams, settings.num_steps)
    return Histories(*[torch.zeros(1, 1, 1, dtype=torch.uint8).expand(shape)] * 4)


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor  # (windows, tokens, features)
    actions: torch.Tensor  # (windows, steps)

    @property
    def num_steps(self) -> int:
        return self.actions.numel()


@dataclass(frozen=True)
class Tried:
    """What the unseen goals brought, the same on every rank."""

    goals: list[int]
    returns: torch.Tensor  # (goals, seeds, episodes)
    regions: list[int]  # steps of each region that the model ended
    num_forced: int


class Distillation:
    """The engine's Task for algorithm distillation (see engine.Task for what each method owes)."""

    surveys = False

    def __init__(
        self,
        settings: Distill,
        found: Histories,
        model: Transformer,
        accelerator: Accelerator,
        log: Log,
        budget: batches.Budget,
        guard: Guard | None = None,
    ):
        self.settings, self.budget = settings, budget
        self.model: nn.Module = model
        self.accelerator, self.log, self.guard = accelerator, log, guard or Guard()
        self.train, self.held_out = split(found, settings)
        self.lengths = [num_positions(settings)] * len(self.train)
        self.steps, self.types = _layout(settings, accelerator.device)

    def collate(self, ids: Sequence[int]) -> Batch:
        return self._collate(self.train, ids)

    def _collate(self, windows: Windows, ids: Sequence[int]) -> Batch:
        device = self.accelerator.device
        window = Histories(*(each.to(device) for each in windows.gather(ids).tensors()))
        tokens = window_tokens(window)
        tokens = with_marks(tokens) if self.settings.compress else tokens
        return Batch(tokens, window.actions.long())

    def num_supervised(self, batch: Batch) -> float:
        """Steps: each has an action."""
        return batch.num_steps

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        actions, types = model(batch.tokens)
        loss, right = _cross_entropy(actions[:, self.steps], batch.actions)
        sums = {"action_loss": loss, "action_accuracy": right}
        if types is None:
            return loss, {"action_accuracy": right}
        targets = self.types.expand(len(batch.tokens), -1)
        type_loss, type_right = _cross_entropy(types[:, self.steps], targets)
        sums |= {"type_loss": type_loss, "type_accuracy": type_right}
        return loss + self.settings.type_weight * type_loss, sums

    def survey(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """Nothing: the loss is a sum over windows."""
        return None

    def surveyed(self, ids: list[int], found: torch.Tensor | None, supervised: float) -> None: ...

    def scored(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As `loss`, of what is held out."""
        return self.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss on held-out histories, and the return in context on the unseen goals."""
        with self.guard.section("evaluation"):
            found = answers.held_out_loss(
                self.scored, self.num_supervised, model, self._held_out(), self.accelerator
            )
            number = self.settings.eval_quick
            quick = try_unseen(model, self.settings, self.accelerator, number, self.guard.mark)
        return {**found, "in_context_return": float(quick.returns.mean())}

    def _held_out(self) -> Iterator[Batch]:
        """A window for each stream and goal that is held out, once."""
        ids = range(num_held_out(self.held_out))
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for micro_batch in batches.cut(ids, self.lengths, world, self.budget)[rank]:
            self.guard.stop_if_asked()  # as many on every rank
            yield self._collate(self.held_out, micro_batch)

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / SETTINGS).write_text(self.settings.model_dump_json(indent=2) + "\n", "utf-8")

    def read(self, folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
        return export.read_weights(self.model, folder)

    def identity(self) -> dict[str, str]:
        return identity(self.settings, self.digest)

    @cached_property
    def digest(self) -> str:
        return histories.digest(self.train.histories)

    def name_examples(self, ids: list[int]) -> str:
        named = []
        for number in ids[:8]:
            goal, _, episodes = self.train.choice(number)
            place = darkroom.place_of(darkroom.goals(self.settings.split_seed)[0][goal])
            named.append(f"goal {place}, episodes {episodes[0]} to {episodes[-1]}")
        return "; ".join(named) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def _layout(settings: Distill, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions of the steps in a window, the token type behind each)."""
    half = settings.context // 2
    steps = torch.arange(settings.context, device=device)
    types = torch.full_like(steps, GOES_ON)
    if settings.compress:
        types[[half - 1, -1]] = ENDS
        steps = steps + torch.where(steps < half, 1, 3)
    return steps, types


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss, number of right ones)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    targets = targets.flatten()
    right = (logits.detach().argmax(-1) == targets).sum()
    return F.cross_entropy(logits, targets, reduction="sum"), right


def try_unseen(
    model: nn.Module,
    settings: Distill,
    accelerator: Accelerator,
    num_episodes: int,
    between: Callable[[], None],
) -> Tried:
    """Every unseen goal with every seed, shared out over all processes. Collective.

    Each rank plays on a copy of its own, whatever the engine has made of the weights: nothing is
    exchanged before the end. `between` is called after each episode.
    """
    copy = whole_copy(model, settings, accelerator)
    _, unseen = darkroom.goals(settings.split_seed)
    rows = [(goal, seed) for goal in unseen for seed in range(settings.eval_seeds)]
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    played = rollout.play(copy, mine, num_episodes, between=between) if mine else None
    returns = torch.zeros(len(unseen), settings.eval_seeds, num_episodes)
    told = [each for each in gather_object([(mine, played)]) if each[1]]
    for theirs, found in told:
        for (goal, seed), own in zip(theirs, found.returns, strict=True):
            returns[unseen.index(goal), seed] = own
    regions = [steps for _, found in told for steps in found.regions]
    return Tried(unseen, returns, regions, sum(found.num_forced for _, found in told))


def whole_copy(model: nn.Module, settings: Distill, accelerator: Accelerator) -> Transformer:
    """The model by itself, in fp32 and for use, with the weights as they are now. Collective."""
    plain = accelerator.unwrap_model(model)
    with torch.random.fork_rng(devices=[]):
        copy = Transformer(settings).to(accelerator.device)
    weights = {name: layers.whole(p) for name, p in plain.named_parameters()}
    copy.load_state_dict(weights)
    return copy.eval()


def load(folder: Path, device: torch.device) -> Transformer:
    """The model that `save` wrote."""
    saved = json.loads((folder / SETTINGS).read_text("utf-8"))
    known = {key: value for key, value in saved.items() if key in Distill.model_fields}
    settings = Distill.model_validate(known)  # how another version drew its windows is no matter
    model = build(settings, 0, device)
    export.load_weights(model, folder)
    return model.eval()
