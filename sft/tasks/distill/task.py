"""Distillation: windows of histories -> the action after every transition."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import RenderableType
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from sft.models import layers
from sft.models.dtypes import store_trained
from sft.models.weights import Weights
from sft.runtime import hardware, plain
from sft.runtime.console import duration
from sft.runtime.disk import refuse_if_unwritable
from sft.runtime.hardware import to_device
from sft.runtime.tensor_file import TensorFile
from sft.tasks.base import ExampleSize, Finding, Labels, Results, Shrunk, Task, TaskInfo, Workload
from sft.tasks.distill import grid, histories, report, rollout
from sft.tasks.distill.config import Distill, DistillConfig
from sft.tasks.distill.source import SOURCES, Histories
from sft.tasks.distill.transformer import (
    ENDS,
    GOES_ON,
    NUM_FEATURES,
    Transformer,
    window_tokens,
    with_marks,
)
from sft.tasks.distill.windows import Windows, blank_histories, num_bytes, split, workload
from sft.tasks.distill.worlds import world_of
from sft.train.engine import Engine

SETTINGS = "distill.json"  # beside a saved model
SMALL_LAYERS, SMALL_WIDTH = 2, 32  # the largest model of `make verify-*`


def build(settings: Distill, seed: int, device: torch.device) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(settings).to(device)


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor  # (windows, tokens, features)
    actions: torch.Tensor  # (windows, steps)


class Distillation(Task):
    """Algorithm distillation (docs/research/DISTILL.md)."""

    model_sections = ("distill",)
    config: DistillConfig
    prepared: Histories

    # -- before there is a model

    @classmethod
    def prepare(cls, config: DistillConfig, tick: Callable[[], None] = lambda: None) -> Histories:
        """Returns the source histories; collects those that are missing."""
        histories.collect(config.distill, tick)
        return histories.load(config.distill)

    @classmethod
    def prepare_evaluation(
        cls, config: DistillConfig, tick: Callable[[], None] = lambda: None
    ) -> Histories:
        """Returns blank histories: the unseen goals are played, not read."""
        return blank_histories(config.distill)

    @classmethod
    def digests(cls, prepared: Histories) -> dict[str, str]:
        return {"data": histories.digest(prepared)}

    @classmethod
    def identity_of(cls, config: DistillConfig, prepared: Histories) -> dict[str, str]:
        left = {name for name in Distill.model_fields if name.startswith("eval_")} | {"data_dir"}
        if config.distill.world == Distill.model_fields["world"].default:
            left.add("world")  # older checkpoints have no such key
        settings = config.distill.model_dump_json(exclude=left)
        return {"distill": settings, **cls.digests(prepared)}

    @classmethod
    def info(cls, config: DistillConfig) -> TaskInfo:
        settings = config.distill
        sizes = {
            "hidden_size": settings.width,
            "num_hidden_layers": settings.num_layers,
            "num_attention_heads": settings.num_heads,
            "vocab_size": len(grid.MOVES),
        }
        return TaskInfo(
            SimpleNamespace(**sizes),
            Path(settings.data_dir),
            small=True,
            packs=False,
            examples_bytes=num_bytes(settings),
            waiting_bytes=4 * NUM_FEATURES + 8,  # and its action
            labels=Labels(
                "windows",
                f" of {settings.context} transitions",
                "transitions",
                "trying the unseen goals",
                "distill.eval_seeds",
                "a smaller distill.context",
            ),
        )

    @classmethod
    def workload(cls, config: DistillConfig, prepared: Histories | None = None) -> Workload:
        settings = config.distill
        return workload(blank_histories(settings) if prepared is None else prepared, settings)

    @classmethod
    def build_model(
        cls,
        config: DistillConfig,
        precision: str,
        device: torch.device,
        weights: bool = True,
        depth: int | None = None,
    ) -> nn.Module:
        assert depth is None  # `TaskInfo.small`: traced whole
        return store_trained(build(config.distill, config.train.seed, device), config.train)

    @classmethod
    def blank_data(cls, config: DistillConfig, sizes: Sequence[ExampleSize]) -> Histories:
        with _disable_current_modes():  # tensors with values, from which windows are gathered
            return blank_histories(config.distill)

    @classmethod
    def answering_bytes(
        cls, config: DistillConfig, precision: str, prompts: Sequence[int], world_size: int
    ) -> int:
        """Returns the bytes of an fp32 copy of the model and of the attempts that a rank plays."""
        settings = config.distill
        attempts = math.ceil(grid.NUM_UNSEEN * settings.eval_seeds / world_size)
        copy = 4 * sum(p.numel() for p in cls.skeleton(config).parameters())
        return copy + attempts * rollout.bytes_per_attempt(settings)

    @classmethod
    def resident_bytes(cls, prepared: Histories) -> int:
        return sum(each.nbytes for each in prepared)

    # -- what people see before training

    @classmethod
    def describe(cls, config: DistillConfig) -> list[tuple[str, str]]:
        settings = config.distill
        num_goals = world_of(settings.world).num_trained
        kind = "compressed context" if settings.compress else "plain context"
        heads = f"{settings.num_layers} layers, {settings.num_heads} heads, width {settings.width}"
        return [
            ("model", f"{heads}; {kind} of {settings.context} transitions"),
            (
                "data",
                f"{histories.folder_of(settings)}: {num_goals} goals x {settings.num_streams} "
                f"streams x {settings.num_steps} steps, {settings.source}",
            ),
        ]

    # -- check and verify

    @classmethod
    def check_data(cls, config: DistillConfig) -> Iterator[Finding]:
        """Yields whether histories exist, or else how long it takes to collect them."""
        settings = config.distill
        folder = histories.folder_of(settings)
        missing = histories.missing_jobs(settings)
        size = f"{settings.num_streams} streams x {settings.num_steps} steps"
        if not missing:
            number = len(histories.load(settings).cells)
            yield Finding(True, f"histories: {number} goals x {size} in {folder}")
            return
        refuse_if_unwritable(folder, "distill.data_dir")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the processes that collect
        started = time.process_time()  # not by the clock: other programs may use this core
        seed, learnt = missing[0]
        world, episode = world_of(settings.world), settings.episode
        SOURCES[settings.source](world, learnt, settings.num_streams, episode, seed)
        seconds = (time.process_time() - started) * settings.num_steps / episode
        torch.set_num_threads(threads)
        rounds = math.ceil(len(missing) / min(len(missing), hardware.usable_cores()))
        number = sum(len(learnt) for _, learnt in missing)
        yield Finding(
            True,
            f"histories: {number} goals x {size} are collected into {folder} first, which takes "
            f"about {duration(rounds * seconds)} (probed)",
        )

    @classmethod
    def trial_config(cls, config: DistillConfig) -> DistillConfig:
        settings = config.distill.model_copy(update={"eval_seeds": 1})
        return config.model_copy(update={"distill": settings})

    @classmethod
    def trial_data(cls, config: DistillConfig) -> Histories:
        """Returns the histories, or blank ones where they are not collected yet."""
        if histories.missing_jobs(config.distill):
            return blank_histories(config.distill)
        return histories.load(config.distill)

    def check_result(self, engine: Engine, folder: Path) -> Iterator[Finding]:
        settings = self.config.distill
        tried = self._try_unseen(engine.model, 1, lambda: None)
        data = ", on blank histories" if histories.missing_jobs(settings) else ""
        episodes = f"{len(tried.goals)} unseen goals, an episode each{data}"
        yield Finding(True, f"in context: {episodes}, return {float(tried.returns.mean()):.2f}")

    @classmethod
    def shrink(cls, config: DistillConfig, folder: Path, exact: bool) -> Shrunk:
        """Returns values with a narrow model and short histories of PPO, which it collects."""
        given = config.distill
        context = min(given.context, 2 * given.episode)  # one episode for each region of `compress`
        wide = given.width > SMALL_WIDTH
        sizes = {
            "num_layers": min(given.num_layers, SMALL_LAYERS),
            "width": SMALL_WIDTH if wide else given.width,
            "num_heads": 4 if wide else given.num_heads,
            "context": context,
            "search_episodes": 1,
            "jump_to": 1,
            "slide": None,
            "source": "ppo",
            "num_streams": 2,
            "num_steps": 2 * context,
            "held_out_streams": 1,
            "data_dir": str(folder / "histories"),
            "eval_episodes": 1,
            "eval_seeds": 1,
            "eval_quick": 1,
        }
        settings = given.model_copy(update=sizes)
        histories.collect(settings)
        number = len(workload(blank_histories(settings), settings).lengths)
        model = f"{settings.num_layers} layers of {settings.width} instead of {given.num_layers} "
        model += f"of {given.width}, context of {context} instead of {given.context} transitions"
        collected = f"2 streams of {2 * context} steps of each goal, collected for this"
        changes = [("model", model), ("histories", collected)]
        values = {f"distill.{key}": value for key, value in sizes.items()}
        batch = 2 * number // 5  # an epoch has two whole batches and a partial one
        # The biases of keys get gradients from rounding alone, which AdamW would scale up.
        epsilon = max(1e-6, config.train.adam_epsilon)  # `verify` takes AdamW if cuts are compared
        exactly = {"distill.dropout": 0.0, "train.adam_epsilon": epsilon}
        return Shrunk(values, changes, exactly, batch, "windows")

    # -- with a model

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.settings = self.config.distill
        self.train, self.held_out = split(self.prepared, self.settings)
        self.steps, self.types = _layout(self.settings, self.accelerator.device)

    def collate(self, ids: Sequence[int]) -> Batch:
        return self._collate(self.train, ids)

    def collate_held_out(self, ids: Sequence[int]) -> Batch:
        return self._collate(self.held_out, ids)

    def _collate(self, windows: Windows, ids: Sequence[int]) -> Batch:
        device = self.accelerator.device
        window = Histories(*(to_device(each, device) for each in windows.gather(ids)))
        tokens = window_tokens(window)
        tokens = with_marks(tokens) if self.settings.compress else tokens
        return Batch(tokens, window.actions.long())

    def num_supervised(self, batch: Batch) -> float:
        """Returns the number of steps, each of which has an action."""
        return batch.actions.numel()

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

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns the loss on held-out histories and the return in context on unseen goals."""
        found = super().evaluate(model)
        with self.guard.section("evaluation"):
            quick = self._try_unseen(model, self.settings.eval_quick, self.guard.mark)
        return {**found, "in_context_return": float(quick.returns.mean())}

    def save(self, folder: Path, weights: Weights) -> list[TensorFile]:
        if weights.is_main:
            settings = self.settings.model_dump_json(indent=2) + "\n"
            (folder / SETTINGS).write_text(settings, "utf-8")
        return super().save(folder, weights)

    def name_example(self, number: int) -> str:
        goal, _, episodes = self.train.choose(number)
        name = world_of(self.settings.world).name_of(histories.goals_of(self.settings)[0][goal])
        return f"goal {name} in episodes {episodes[0]} to {episodes[-1]}"

    # -- results

    def measure(self, model: nn.Module, folder: Path, state: str) -> Results:
        held_out = self.evaluate(model)
        return Results(held_out, (held_out, self._try_all(model)))

    def measure_saved(self, model: nn.Module, folder: Path, state: str) -> Results:
        """Plays only the unseen goals: the held-out histories may be gone."""
        return Results({}, ({}, self._try_all(model)))

    def _try_all(self, model: nn.Module) -> report.UnseenResults:
        """Plays the unseen goals for all episodes."""
        number = self.settings.eval_episodes
        with self.guard.section("evaluation"), self.log.progress("episodes", number) as advance:

            def after_episode() -> None:
                self.guard.mark()
                advance()

            return self._try_unseen(model, number, after_episode)

    def _try_unseen(
        self, model: nn.Module, num_episodes: int, after_episode: Callable[[], None]
    ) -> report.UnseenResults:
        """Plays every unseen goal with every seed, divided among all processes. Collective.

        Each rank plays on its own whole copy of the model, so nothing is exchanged before the end.
        `after_episode` is called when all attempts of this rank have played one.
        """
        settings, accelerator = self.settings, self.accelerator
        copy = whole_copy(model, settings, accelerator)
        _, unseen = histories.goals_of(settings)
        attempts = [(goal, seed) for goal in unseen for seed in range(settings.eval_seeds)]
        own = attempts[accelerator.process_index :: accelerator.num_processes]
        played = rollout.play(copy, own, num_episodes, after_episode=after_episode) if own else None
        gathered = [(tried, each) for tried, each in gather_object([(own, played)]) if each]
        returns = torch.zeros(len(unseen), settings.eval_seeds, num_episodes)
        for tried, each in gathered:
            for (goal, seed), values in zip(tried, each.returns, strict=True):
                returns[unseen.index(goal), seed] = values
        regions = [steps for _, each in gathered for steps in each.regions]
        num_forced = sum(each.num_forced for _, each in gathered)
        return report.UnseenResults(unseen, returns, regions, num_forced)

    def report(
        self, base: Results | None, tuned: Results, folder: Path
    ) -> Iterator[RenderableType]:
        held_out, tried = tuned.details
        return report.show(self.config, tried, held_out, folder)

    def closing_rows(
        self, base: Results | None, tuned: Results
    ) -> tuple[list[tuple[str, str]], dict[str, str]]:
        _, tried = tuned.details
        found = report.summarise_returns(world_of(self.settings.world), tried).items()
        rows = [(name.replace("_", " "), f"{each['mean']:.2f}") for name, each in found]
        command = f"make evaluate RUN={self.config.train.output_dir}"
        return rows, {command: "the same, with other seeds or more episodes"}

    # -- a finished run

    @classmethod
    def open(cls, run: Path, config: DistillConfig, prepared: Any, *arguments: Any) -> Task:
        """Returns the task with the settings that the model was trained with."""
        saved = plain.load_json(run / "final_checkpoint" / SETTINGS, follow=True)
        trained = {key: saved[key] for key in Distill.model_fields.keys() & saved.keys()}
        given = config.distill.model_dump()
        evaluation = {key: value for key, value in given.items() if key.startswith("eval_")}
        settings = Distill.model_validate(trained | evaluation)
        config = config.model_copy(update={"distill": settings})
        return super().open(run, config, blank_histories(settings), *arguments)


def _layout(settings: Distill, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the positions of the steps in a window and the token type after each."""
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
    """Returns (summed loss, number of right predictions)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    targets = targets.flatten()
    right = (logits.detach().argmax(-1) == targets).sum()
    return F.cross_entropy(logits, targets, reduction="sum"), right


def whole_copy(model: nn.Module, settings: Distill, accelerator: Accelerator) -> Transformer:
    """Returns an fp32 copy of the model for use, with its current weights. Collective."""
    plain = accelerator.unwrap_model(model)
    with torch.random.fork_rng(devices=[]):
        copy = Transformer(settings).to(accelerator.device)
    weights = {name: layers.full_tensor(p) for name, p in plain.named_parameters()}
    copy.load_state_dict(weights)
    return copy.eval()
