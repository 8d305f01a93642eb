"""The one loop. A `Task` brings a model, examples and a loss; the engine owns everything else.

Law 1: loss and gradient are the sum over the supervised items of the global batch divided by their
number, for every cut over processes and micro-batches. Law 2: the only state is the global step;
order, learning rate and randomness are functions of (configuration, step), so a checkpoint is the
weights, the optimizer's state and one number. The engine never asks which task it runs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from sft import batching, checkpoint, parallel
from sft.config import ConfigError, Train, UserError
from sft.guard import Guard, Preempted
from sft.log import Advance, Log, duration

Batch = Any


class Task(Protocol):
    """What is trained. Ids are positions in `lengths`."""

    model: nn.Module

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each training example."""

    def collate(self, ids: list[int]) -> Batch:
        """A micro-batch on the device; `ids` may be empty (then nothing in it is supervised)."""

    def num_supervised(self, batch: Batch) -> float: ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """*Sum* of the loss over the supervised items, and further sums to be reported per item."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out metrics, computed by all processes together."""

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes what a user loads: model or adapter in its library's format. Main process only.

        `weights`: those of the model that are trained, and its buffers, whole, by name.
        """

    def read(self, folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
        """All trained weights that `save` wrote, by their name in `model`; or CheckpointError."""

    def identity(self) -> dict[str, str]:
        """What must not change between a checkpoint and the run that resumes it."""

    def name_examples(self, ids: list[int]) -> str:
        """Where these examples come from, for messages."""


class NonFiniteError(UserError):
    """Loss or gradient is NaN or infinite; the step was not applied."""

    exit_code = 5


class AnotherRunError(ConfigError):
    """A checkpoint is not of the run that would resume it."""


# --- the run -----------------------------------------------------------------------------------


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """Linear warm-up, then `schedule` down to `min_lr_ratio`: a function of the step (from 0)."""
    warmup = math.ceil(train.warmup_ratio * total_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - 1 - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    floor = 1.0 if train.schedule == "constant" else train.min_lr_ratio
    return train.learning_rate * (floor + (1 - floor) * shape[train.schedule])


def order_seed(train: Train) -> int | None:
    return train.seed if train.shuffle else None


def total_steps(train: Train, num_examples: int) -> int:
    per_epoch = batching.steps_per_epoch(num_examples, train.global_batch)
    return train.max_steps or max(1, math.ceil(train.epochs * per_epoch))


def identity(train: Train, of_task: dict[str, str]) -> dict[str, str]:
    """What must be the same in a run and one that resumes it."""
    return {
        "train.seed": str(train.seed),
        "train.shuffle": str(train.shuffle),
        "train.global_batch": str(train.global_batch),
        "train.optimizer": train.optimizer,
        **of_task,
    }


def read_state(checkpoint_folder: Path, now: dict[str, str]) -> dict[str, Any]:
    """trainer.json of a checkpoint. Raises AnotherRunError, with exit code 3 if it is the data, if
    the run that wrote it differs from the one that `now` is the identity of."""
    path = checkpoint_folder / "trainer.json"
    if not path.exists():
        raise checkpoint.CheckpointError(
            f"{checkpoint_folder} holds a model, not the state of a run: expected trainer.json; "
            "resume from a checkpoint_step_<n> folder"
        )
    state = json.loads(path.read_text("utf-8"))
    try:
        sound = min(state["step"] + 0, state["optimizer_updates"] + 0, state["world_size"] - 1) >= 0
        then = dict(state["identity"])
        dict(state["settings"])
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise checkpoint.CheckpointError(f"{path} is not what a run writes")
    if changed := [key for key in now if then.get(key) != now[key]]:
        error = AnotherRunError(
            f"{checkpoint_folder} belongs to another run; resuming would not continue it:\n  "
            + "\n  ".join(f"{key}: was {then.get(key)}, is {now[key]}" for key in changed)
            + "\nRestore these, or start anew with another train.output_dir."
        )
        error.exit_code = 3 if changed == ["data"] else error.exit_code
        raise error
    return state


class Engine:
    """Trains `task` as `train` says; everything is written to `folder`."""

    guard = Guard()  # `run.train` gives the one of the run; this one knows of no signal
    _saved = 0  # the last step that needs no saving: none, or on disk

    def __init__(
        self,
        task: Task,
        train: Train,
        accelerator: Accelerator,
        log: Log,
        budget: batching.Budget,
    ):
        self.task, self.train, self.accelerator, self.log = task, train, accelerator, log
        self.folder = Path(train.output_dir)
        self.budget = budget
        self.step = 0
        self.total_steps = total_steps(train, len(task.lengths))
        task.model.train()
        self.parallel = parallel.share(task.model, train, accelerator)
        self.model, self.optimizer = self.parallel.model, self.parallel.optimizer

    # -- one step

    def window(self, step: int) -> tuple[list[int], list[batching.MicroBatch]]:
        """Ids of the step's global batch, and this rank's micro-batches of it."""
        lengths, world = self.task.lengths, self.accelerator.num_processes
        ids = batching.global_batch_ids(
            len(lengths), order_seed(self.train), step, self.train.global_batch
        )
        cuts = batching.cut(ids, lengths, world, self.budget)
        return ids, cuts[self.accelerator.process_index]

    def optimizer_step(self) -> dict[str, float]:
        """One update from the global batch of `self.step`; NonFiniteError comes before it."""
        started = time.perf_counter()
        ids, micro_batches = self.window(self.step)
        batches = [self.task.collate(micro_batch) for micro_batch in micro_batches]
        supervised, *asked = self._sum([self._count(batches), *self.guard.flags()])
        self.guard.agree(*asked)
        rate = learning_rate(self.train, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.parallel.drop()
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        for i, batch in enumerate(batches):
            self.guard.mark()
            self._seed(micro_batches[i], ids)
            with self.parallel.synchronised(i == len(batches) - 1):
                loss, extras = self.task.loss(self.model, batch)
                self.parallel.backward(loss * (self.parallel.loss_scale / (supervised or 1.0)))
            losses.append(loss.detach())
            for name, value in {"loss": loss, **extras}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
        totals = dict(zip(sums, self._sum(list(sums.values())), strict=True))
        if not math.isfinite(totals["loss"]):
            pairs = zip(micro_batches, losses, strict=True)
            broken = [i for micro_batch, loss in pairs if not loss.isfinite() for i in micro_batch]
            self._refuse("loss", totals["loss"], gather_object(broken))
        grad_norm = self.parallel.clip()
        if not math.isfinite(grad_norm):
            self._refuse("gradient norm", grad_norm, ids)
        self.parallel.update()
        seconds = time.perf_counter() - started
        tokens = sum(self.task.lengths[i] for i in ids)
        return {
            **{f"train/{name}": value / (supervised or 1.0) for name, value in totals.items()},
            "train/grad_norm": grad_norm,
            "train/learning_rate": rate,
            "train/tokens": tokens,
            "train/supervised_tokens": supervised,
            "speed/tokens_per_second": tokens / seconds,
            "speed/step_seconds": seconds,
            "memory/gib": memory_bytes() / 2**30,
        }

    def _count(self, batches: list[Batch]) -> float:
        return float(sum(self.task.num_supervised(batch) for batch in batches))

    def _sum(self, values: list[Any]) -> list[float]:
        """Sums over ranks, in fp64."""
        self.guard.mark()
        local = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in values])
        return self.accelerator.reduce(local.to(self.accelerator.device), "sum").tolist()

    def _seed(self, micro_batch: batching.MicroBatch, ids: list[int]) -> None:
        """Randomness (dropout) is a function of seed, step and position in the global batch."""
        position = ids.index(micro_batch[0]) if micro_batch else len(ids)
        torch.manual_seed((((self.train.seed * 1_000_003 + self.step) << 20) + position) % 2**63)

    def _refuse(self, what: str, value: float, ids: list[int]) -> None:
        raise NonFiniteError(
            f"{what} is {value} in step {self.step + 1}; the step was not applied and no "
            f"checkpoint of it exists. Examples: {self.task.name_examples(ids)}. Look at these "
            "rows; if they are sound, a lower train.learning_rate or train.precision=fp32 helps."
        )

    def probe_seconds_per_step(self) -> float:
        """Seconds for forward and backward of this rank's next window."""
        window = self.window(self.step)[1]
        self.try_out(window)  # warm-up
        return self.try_out(window)

    def try_out(self, micro_batches: list[batching.MicroBatch]) -> float:
        """Seconds for forward and backward of these, without an update.

        Local to each rank and without traces: no gradient, random state or weight is left changed.
        """
        zero = self.train.engine == "deepspeed"  # whose backward keeps books of its own
        batches = [self.task.collate(micro_batch) for micro_batch in micro_batches]
        started = time.perf_counter()
        try:
            with nullcontext() if zero else self.parallel.synchronised(last=False):
                for batch in batches:
                    loss = self.task.loss(self.model, batch)[0]
                    if not zero:
                        loss.backward()
                    loss.item()  # waits for the device
        finally:
            self.parallel.drop()
        return (time.perf_counter() - started) * (3 if zero else 1)

    # -- the loop

    def run(self) -> None:
        """From the current step to the end, with evaluations and checkpoints at their intervals."""
        train, log, guard = self.train, self.log, self.guard
        log.open_metrics(self.step)
        started, first = time.perf_counter(), self.step
        self._saved = first
        with (
            self.preemptible(),
            guard.section("step"),
            log.progress("train", self.total_steps, self.step) as advance,
        ):
            while self.step < self.total_steps:
                guard.mark(self.step + 1)
                values = self.optimizer_step()
                self.step += 1
                self._report(values, advance, (time.perf_counter() - started) / (self.step - first))
                if self._due(train.eval_steps) and not guard.stopping:
                    self.evaluate()
                if guard.take_saving() or self._due(train.save_steps):
                    self._save_once()
                guard.stop_if_agreed()

    def _due(self, interval: int | None) -> bool:
        return bool(interval and self.step % interval == 0 and self.step < self.total_steps)

    def evaluate(self) -> dict[str, float]:
        metrics = self.task.evaluate(self.model)
        self.log.log(self.step, {f"eval/{name}": value for name, value in metrics.items()})
        told = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.log.say(f"step {self.step:,}: held-out {told}")
        return metrics

    def _report(self, values: dict[str, float], advance: Advance, seconds_per_step: float) -> None:
        self.log.log(self.step, values)
        speed = f"{values['speed/tokens_per_second']:,.0f} tokens/s"
        advance(1, f"loss {values['train/loss']:.4f}  {speed}")
        if self.step % self.train.log_steps == 0 or self.step in (1, self.total_steps):
            left = duration(seconds_per_step * (self.total_steps - self.step))
            self.log.say(
                f"step {self.step:>5,}/{self.total_steps:,}  loss {values['train/loss']:.4f}  "
                f"lr {values['train/learning_rate']:.2e}  |g| {values['train/grad_norm']:.3f}  "
                f"{speed}  ETA {left}"
            )

    # -- checkpoints

    def save(self) -> Path:
        """Commits `checkpoint_step_<n>` and prunes the oldest beyond `save_total_limit`."""
        final = self.folder / f"checkpoint_step_{self.step}"
        checkpoint.commit(final, self._write, self.accelerator)
        if self.accelerator.is_main_process:
            checkpoint.prune(self.folder, self.train.save_total_limit)
        return final

    def _write(self, staging: Path) -> None:
        weights = self.parallel.weights()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        checkpoint.save_optimizer(self.parallel.pieces(), staging, rank, world)
        if self.accelerator.is_main_process:
            self.task.save(staging, weights)
            state = {
                "step": self.step,
                "optimizer_updates": self.parallel.num_updates,
                "world_size": world,
                "identity": identity(self.train, self.task.identity()),
                "settings": self.train.model_dump(),
            }
            (staging / "trainer.json").write_text(json.dumps(state, indent=1), "utf-8")

    def write_final(self, staging: Path) -> None:
        """What a user loads, without the state that only training needs."""
        weights = self.parallel.weights()
        if self.accelerator.is_main_process:
            self.task.save(staging, weights)

    def resume(self, folder: Path) -> None:
        """Continues from a verified checkpoint folder, of any engine and number of processes."""
        state = read_state(folder, identity(self.train, self.task.identity()))
        for name, value in self.task.read(folder):
            self.parallel.put(name, value)
        with checkpoint.OptimizerState(folder) as saved:
            self.parallel.restore(state["optimizer_updates"], saved.read)
        self.step = state["step"]
        self.log.say(f"resumed from {folder} after step {self.step:,}")
        now = self.train.model_dump() | {"processes": self.accelerator.num_processes}
        then = state["settings"] | {"processes": state["world_size"]}
        for key in now:
            if then.get(key) != now[key]:
                self.log.say(f"changed since: {key} was {then.get(key)}, is {now[key]}")

    # -- stopping

    @contextmanager
    def preemptible(self) -> Iterator[None]:
        """A signal in here stops the run with the last step saved."""
        try:
            yield
        except Preempted as error:
            if not self.step:  # nothing to save
                raise
            self.log.say(f"asked to stop: saving step {self.step:,}")
            folder = self._save_once()
            raise self.guard.preempted(f"after step {self.step:,}; saved {folder}") from error

    def _save_once(self) -> Path:
        if self._saved != self.step:
            with self.guard.section("save"):
                self.save()
            self._saved = self.step
        return self.folder / f"checkpoint_step_{self.step}"


def memory_bytes() -> int:
    """Peak allocation on the GPU, or the resident memory of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
