"""The one loop. A `Task` brings a model, examples and a loss; the engine owns everything else.

Law 1: loss and gradient are the sum over the supervised items of the global batch divided by their
number, for every cut over processes and micro-batches. Law 2: the only state is the global step;
order, learning rate and randomness are functions of (configuration, step), so a checkpoint is the
weights, the optimizer's state and one number. The engine never asks which task it runs.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn

from sft import batching, checkpoint
from sft.config import ConfigError, Train, UserError
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

    def save(self, folder: Path) -> None:
        """Writes what a user loads: model or adapter in its library's format. Main process only."""

    def load(self, folder: Path) -> None:
        """Puts the weights that `save` wrote into `model`."""

    def identity(self) -> dict[str, str]:
        """What must not change between a checkpoint and the run that resumes it."""

    def name_examples(self, ids: list[int]) -> str:
        """Where these examples come from, for messages."""


class NonFiniteError(UserError):
    """Loss or gradient is NaN or infinite; the step was not applied."""

    exit_code = 5


class Preempted(UserError):
    """A signal asked the run to stop; it saved a checkpoint and can be resumed."""

    exit_code = 75


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


def build_optimizer(train: Train, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW of PyTorch or bitsandbytes; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    arguments: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, **arguments, fused=True)
    from bitsandbytes import optim

    classes = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return classes[train.optimizer](groups, **arguments)


def _sum_gradients(_, bucket):
    """Gradients summed over ranks; DDP's own mean rounds its 1 / world to fp32 on the way."""
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Engine:
    """Trains `task` as `train` says; everything is written to `folder`."""

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
        self.optimizer: torch.optim.Optimizer
        self.model: nn.Module
        self._stop: signal.Signals | None = None  # set by a signal on this rank
        self.stopping = 0.0  # ranks that were asked to stop
        task.model.train()
        self.model, self.optimizer = accelerator.prepare(
            task.model, build_optimizer(train, task.model)
        )
        self.is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.register_comm_hook(None, _sum_gradients)
        if accelerator.num_processes > 1 and self.model is task.model:
            raise ConfigError(
                f"{accelerator.num_processes} processes, but the model was not wrapped for "
                "them: they would train independent copies. Launch with "
                "configs/accelerate/ddp.yaml or torchrun."
            )

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
        supervised, self.stopping = self._sum([self._count(batches), self._stop is not None])
        world = self.accelerator.num_processes if self.is_deepspeed else 1  # DeepSpeed averages
        rate = learning_rate(self.train, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        for i, batch in enumerate(batches):
            self._seed(micro_batches[i], ids)
            with self._synchronised(i == len(batches) - 1):
                loss, extras = self.task.loss(self.model, batch)
                self._backward(loss * (world / (supervised or 1.0)))
            losses.append(loss.detach())
            for name, value in {"loss": loss, **extras}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
        totals = dict(zip(sums, self._sum(list(sums.values())), strict=True))
        if not math.isfinite(totals["loss"]):
            pairs = zip(micro_batches, losses, strict=True)
            broken = [i for micro_batch, loss in pairs if not loss.isfinite() for i in micro_batch]
            self._refuse("loss", totals["loss"], gather_object(broken))
        grad_norm = self._grad_norm()
        if not math.isfinite(grad_norm):
            self._refuse("gradient norm", grad_norm, ids)
        self._update()
        seconds = time.perf_counter() - started
        tokens = sum(self.task.lengths[i] for i in ids)
        return {
            **{f"train/{name}": value / (supervised or 1.0) for name, value in totals.items()},
            "train/grad_norm": grad_norm,
            "train/learning_rate": rate,
            "train/tokens": tokens,
            "train/supervised_tokens": supervised,
            "data/examples_crc32": zlib.crc32(repr(ids).encode()),  # which ones, in which order
            "speed/tokens_per_second": tokens / seconds,
            "speed/step_seconds": seconds,
            "memory/gib": memory_bytes() / 2**30,
        }

    def _count(self, batches: list[Batch]) -> float:
        return float(sum(self.task.num_supervised(batch) for batch in batches))

    def _sum(self, values: list[Any]) -> list[float]:
        """Sums over ranks, in fp64."""
        local = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in values])
        return self.accelerator.reduce(local.to(self.accelerator.device), "sum").tolist()

    def _seed(self, micro_batch: batching.MicroBatch, ids: list[int]) -> None:
        """Randomness (dropout) is a function of seed, step and position in the global batch."""
        position = ids.index(micro_batch[0]) if micro_batch else len(ids)
        torch.manual_seed((((self.train.seed * 1_000_003 + self.step) << 20) + position) % 2**63)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged between ranks in the last micro-batch only."""
        if self.is_deepspeed:
            self.model.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        alone = last or self.is_deepspeed or self.accelerator.num_processes == 1
        with nullcontext() if alone else self.accelerator.no_sync(self.model):
            yield

    def _backward(self, loss: torch.Tensor) -> None:
        if self.is_deepspeed:
            self.model.backward(loss)  # type: ignore[operator]
        else:
            loss.backward()

    def _grad_norm(self) -> float:
        """Global norm of the gradient; the gradient is clipped, by DeepSpeed in its own step."""
        if self.is_deepspeed:
            return float(self.model.optimizer.scaled_global_norm())  # type: ignore[operator,union-attr]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return float(nn.utils.clip_grad_norm_(trained, self.train.max_grad_norm or math.inf))

    def _update(self) -> None:
        if self.is_deepspeed:
            self.model.step()  # type: ignore[operator]
        else:
            self.optimizer.step()

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
        alone = nullcontext() if self.is_deepspeed else self.accelerator.no_sync(self.model)
        batches = [self.task.collate(micro_batch) for micro_batch in micro_batches]
        started = time.perf_counter()
        try:
            with alone:
                for batch in batches:
                    loss = self.task.loss(self.model, batch)[0]
                    if not self.is_deepspeed:  # whose backward keeps books of its own
                        loss.backward()
                    loss.item()  # waits for the device
        finally:
            self.optimizer.zero_grad()
        return (time.perf_counter() - started) * (3 if self.is_deepspeed else 1)

    # -- the loop

    def run(self) -> None:
        """From the current step to the end, with evaluations and checkpoints at their intervals."""
        train, log = self.train, self.log
        log.open_metrics(self.step)
        started, first = time.perf_counter(), self.step
        with (
            self._signals(),
            log.progress("train", self.total_steps, self.step) as advance,
        ):
            while self.step < self.total_steps:
                values = self.optimizer_step()
                self.step += 1
                self._report(values, advance, (time.perf_counter() - started) / (self.step - first))
                if self._due(train.eval_steps):
                    self.evaluate()
                if self._due(train.save_steps):
                    self.save()
                if self.stopping and self.step < self.total_steps:
                    self._preempt()

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
        if self.is_deepspeed:  # collective, in DeepSpeed's own format
            self.model.save_checkpoint(  # type: ignore[operator]
                str(staging), tag="deepspeed", exclude_frozen_parameters=True, save_latest=False
            )
        if not self.accelerator.is_main_process:
            return
        self.task.save(staging)
        if not self.is_deepspeed:
            checkpoint.save_optimizer(self.optimizer, staging)
        state = {"step": self.step, "identity": self._identity()}
        (staging / "trainer.json").write_text(json.dumps(state, indent=1), "utf-8")

    def _identity(self) -> dict[str, str]:
        train = self.train
        return {
            "train.seed": str(train.seed),
            "train.shuffle": str(train.shuffle),
            "train.global_batch": str(train.global_batch),
            "train.optimizer": train.optimizer,
            "train.engine": train.engine,
            **self.task.identity(),
        }

    def write_final(self, staging: Path) -> None:
        """What a user loads, without the state that only training needs."""
        if self.accelerator.is_main_process:
            self.task.save(staging)

    def resume(self, folder: Path) -> None:
        """Continues from a verified checkpoint folder."""
        if not (folder / "trainer.json").exists():
            raise checkpoint.CheckpointError(
                f"{folder} holds a model, not the state of a run: expected trainer.json; "
                "resume from a checkpoint_step_<n> folder"
            )
        state = json.loads((folder / "trainer.json").read_text("utf-8"))
        now = self._identity()
        if changed := [k for k in now if state["identity"].get(k) != now[k]]:
            lines = [f"{k}: was {state['identity'].get(k)}, is {now[k]}" for k in changed]
            raise ConfigError(
                f"{folder} belongs to another run; resuming would not continue it:\n  "
                + "\n  ".join(lines)
                + "\nRestore these, or start anew with another train.output_dir."
            )
        if self.is_deepspeed:
            self.model.load_checkpoint(  # type: ignore[operator]
                str(folder), tag="deepspeed", load_module_strict=False
            )
        else:
            self.task.load(folder)
            checkpoint.load_optimizer(self.optimizer, folder)
        self.step = state["step"]
        self.log.say(f"resumed from {folder} after step {self.step:,}")

    # -- signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C: stop after the step, saved. A second one: at once."""

        def request(number: int, _: Any) -> None:
            if self._stop is not None:
                os._exit(128 + number)
            self._stop = signal.Signals(number)
            if self.accelerator.is_main_process:  # unbuffered: it may interrupt a write of the log
                told = f"{self._stop.name}: stopping after this step; again to stop at once\n"
                os.write(2, told.encode())

        kept = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _preempt(self) -> None:
        self.log.say(f"asked to stop: saving step {self.step:,}")
        folder = self.save()
        raise Preempted(
            f"stopped by a signal after step {self.step:,}; saved {folder}. "
            'Continue with ARGS="train.resume_from_checkpoint=auto".'
        )


def memory_bytes() -> int:
    """Peak allocation on the GPU, or the resident memory of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
