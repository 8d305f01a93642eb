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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from sft import batching, checkpoint, recovery, storage
from sft.config import ConfigError, Train, UserError
from sft.log import Advance, Log, duration, size
from sft.recovery import NonFiniteError, OutOfMemory, Shortage

Batch = Any


class Task(Protocol):
    """What is trained. Ids are positions in `lengths`."""

    model: nn.Module
    budget: batching.Budget  # how evaluation is cut; the engine lowers it where memory runs out

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


@dataclass(frozen=True)
class Passes:
    """A global batch behind its backward passes; the gradients are not applied yet."""

    ids: list[int]
    supervised: float  # items, over all ranks
    totals: dict[str, float]  # sums over them: the loss, and what the task reports
    broken: list[int]  # ids of micro-batches whose loss is not finite


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
        self.num_skipped = 0  # steps without an update, since they were not finite
        self.total_steps = total_steps(train, len(task.lengths))
        self.optimizer: torch.optim.Optimizer
        self.model: nn.Module
        self._stop: signal.Signals | None = None  # set by a signal on this rank
        self.stopping = 0.0  # ranks that were asked to stop
        trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        need = storage.checkpoint_bytes(train, trained, 0)
        self.keeper = storage.Keeper(train, accelerator, log, need)
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
        """One update from the global batch of `self.step`, or none if that is skipped.

        NonFiniteError comes before the update. Where memory runs out, the same global batch is done
        again in smaller micro-batches; `recovery` says in which passes that is possible.
        """
        started = time.perf_counter()
        rate = learning_rate(self.train, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        while isinstance(passed := self._passes(), Shortage):
            self._shrink(passed)
        ids, loss, grad_norm = passed.ids, passed.totals["loss"], math.nan
        if not math.isfinite(loss):
            self._skip("loss", loss, passed.broken)
        else:
            grad_norm = self._for_good(ids, self._grad_norm)
            if self._anywhere(not math.isfinite(grad_norm)):
                self._skip("gradient norm", grad_norm, ids)
            else:
                self._for_good(ids, self._update)
        seconds = time.perf_counter() - started
        tokens = sum(self.task.lengths[i] for i in ids)
        number = passed.supervised or 1.0
        values = {f"train/{name}": value / number for name, value in passed.totals.items()}
        if self.train.skip_nonfinite:
            values["train/skipped_steps"] = self.num_skipped
        return {
            **values,
            "train/grad_norm": grad_norm,
            "train/learning_rate": rate,
            "train/tokens": tokens,
            "train/supervised_tokens": passed.supervised,
            "speed/tokens_per_second": tokens / seconds,
            "speed/step_seconds": seconds,
            "memory/gib": memory_bytes() / 2**30,
        }

    def _passes(self) -> Passes | Shortage:
        """Forward and backward of the step's global batch; or the memory that ran out on any rank,
        the same on all. Without a supervised item loss and gradient are 0, never 0 / 0."""
        ids, micro_batches = self.window(self.step)
        watch = recovery.Watch()
        self._drop_gradients()
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.reducer._rebuild_buckets()  # collective: not in a pass that may be given up
        batches = [watch.call(m, self.task.collate, m) for m in micro_batches]
        count = 0.0 if watch.met else self._count(batches)
        supervised, self.stopping = self._sum([count, self._stop is not None])
        world = self.accelerator.num_processes if self.is_deepspeed else 1  # DeepSpeed averages
        if self.waits == "forward" and (met := self._met(watch)):
            return met
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        for i, micro_batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            found = watch.call(micro_batch, self._forward, micro_batch, batches[i], ids)
            waited = self.waits in ("backward", "forward") or (last and self.waits != "never")
            if waited and (met := self._met(watch)):
                return met
            if found is None:
                continue
            loss, extras = found
            attempt = self._for_good if waited else watch.call
            self._exchange(last)
            attempt(micro_batch, self._backward, loss * (world / (supervised or 1.0)))
            losses.append(loss.detach())
            for name, value in {"loss": loss, **extras}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
        if watch.met:
            return watch.met
        totals = dict(zip(sums, self._sum(list(sums.values())), strict=True))
        broken: list[int] = []
        if not math.isfinite(totals["loss"]):
            pairs = zip(micro_batches, losses, strict=True)
            mine = [i for micro_batch, loss in pairs if not loss.isfinite() for i in micro_batch]
            broken = gather_object(mine)
        return Passes(ids, supervised, totals, broken)

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

    def _forward(
        self, micro_batch: batching.MicroBatch, batch: Batch, ids: list[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a micro-batch. OutOfMemory where other ranks wait in the same pass."""
        self._seed(micro_batch, ids)
        if self.waits != "forward":
            with self._alone():
                return self.task.loss(self.model, batch)
        behind: list[bool] = []  # the pass in which others wait is over
        handle = self.model.register_forward_hook(lambda *_: behind.append(True))
        try:
            return self.task.loss(self.model, batch)
        except Exception as error:
            if not behind and (said := recovery.shortage(error)):
                raise self._out_of_memory(said, micro_batch) from None
            raise
        finally:
            handle.remove()

    def _alone(self) -> AbstractContextManager[Any]:
        """Forward and backward passes in it exchange no gradients."""
        alone = self.accelerator.num_processes > 1 and not self.is_deepspeed
        return self.accelerator.no_sync(self.model) if alone else nullcontext()

    def _exchange(self, last: bool) -> None:
        """Gradients are exchanged between ranks in the backward pass of the last micro-batch.

        DDP would arm itself for that in the forward pass, and an attempt that is given up behind it
        would exchange in some later pass; so every forward pass is one without, and DDP is armed
        here, once all ranks are sure to go on.
        """
        if self.is_deepspeed:
            self.model.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        elif last and isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.reducer.prepare_for_backward([])

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

    def _drop_gradients(self) -> None:
        """So that nothing of an attempt is in the next one."""
        self.optimizer.zero_grad()
        if self.is_deepspeed:
            recovery.drop_zero_gradients(self.model.optimizer)

    # -- what goes wrong in a step

    @property
    def waits(self) -> recovery.Waits:
        """The passes in which ranks wait for each other."""
        if self.is_deepspeed:
            return "forward" if self.model.zero_optimization_stage() == 3 else "backward"  # type: ignore[operator]
        if self.accelerator.num_processes == 1:
            return "never"
        ddp = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return "last backward" if ddp else "forward"

    def _anywhere(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag if self.accelerator.num_processes == 1 else self._sum([flag])[0] > 0

    def _met(self, watch: recovery.Watch) -> Shortage | None:
        """The shortage that any rank has met, the same on all. Collective."""
        if self.accelerator.num_processes == 1 or not self._anywhere(watch.met is not None):
            return watch.met
        return next(met for met in gather_object([watch.met]) if met)

    def _shrink(self, met: Shortage) -> None:
        """A smaller token budget; OutOfMemory if every micro-batch is one example already."""
        self._drop_gradients()
        recovery.release()
        lengths, world = self.task.lengths, self.accelerator.num_processes
        ids, _ = self.window(self.step)
        cuts = batching.cut(ids, lengths, world, self.budget)
        budget = recovery.smaller(self.budget, cuts, lengths)
        if budget is None:
            raise OutOfMemory(
                f"memory ran out in step {self.step + 1} with one example of "
                f"{max(lengths[i] for i in met.ids):,} tokens "
                f"({self.task.name_examples(met.ids)}): {met.reason}. Shorter rows "
                "(data.max_seq_len) or train.gradient_checkpointing=true take less, see `make plan`"
            )
        self.budget = self.task.budget = budget
        self.log.say(
            f"step {self.step + 1:,}: memory ran out ({met.reason}); it is done again, and "
            f"train.max_tokens is {budget.max_tokens:,} from here on, with the same result"
        )

    def _for_good(self, ids: list[int], action: Callable[..., Any], *arguments: Any) -> Any:
        """What `action` returns. It cannot be done again: without memory for it, the run ends."""
        try:
            return action(*arguments)
        except Exception as error:
            if (said := recovery.shortage(error)) is None:
                raise
            raise self._out_of_memory(said, ids) from None

    def _out_of_memory(self, said: str, ids: list[int]) -> OutOfMemory:
        return OutOfMemory(
            f"rank {self.accelerator.process_index}: memory ran out in step {self.step + 1} where "
            f"the step cannot be done again: {said}. Examples: {self.task.name_examples(ids)}. "
            f"Lower train.max_tokens (now {self.budget.max_tokens:,}) and resume"
        )

    def _skip(self, what: str, value: float, ids: list[int]) -> None:
        """No update in this step; NonFiniteError beyond `train.skip_nonfinite` of them."""
        self._drop_gradients()
        most, told = self.train.skip_nonfinite, f"{what} is {value} in step {self.step + 1}"
        named = self.task.name_examples(ids)
        if self.num_skipped >= most:
            before = f" Skipped before it: {most} (train.skip_nonfinite)." if most else ""
            raise NonFiniteError(
                f"{told}; the step was not applied and no checkpoint of it exists.{before} "
                f"Examples: {named}. Look at these rows; if they are sound, a lower "
                "train.learning_rate or train.precision=fp32 helps."
            )
        self.num_skipped += 1
        self.log.say(f"{told}: skipped ({self.num_skipped} of {most}). Examples: {named}")

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
        self.keeper.recall(self.step)
        if train.save_steps and self.step == 0:
            self.prove_saving()
        started, first = time.perf_counter(), self.step
        with (
            self._signals(),
            log.progress("train", self.total_steps, self.step) as advance,
        ):
            while self.step < self.total_steps:
                values = self.optimizer_step()
                self.step += 1
                self._report(values, advance, (time.perf_counter() - started) / (self.step - first))
                best = None
                if self._due(train.eval_steps):
                    best = self.keeper.candidate(self.step, self.evaluate())
                if best or self._due(train.save_steps):
                    self.keeper.try_to_save(self.step, self._write, best)
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
        """Commits `checkpoint_step_<n>`; CheckpointError if that fails."""
        return self.keeper.save(self.step, self._write)

    def prove_saving(self) -> None:
        """A checkpoint is saved and read back, so that a full disk, a missing permission or a file
        system that forgets is found before the first step. CheckpointError if it is.

        It is read as a resume would, and has to leave every trained weight as it is, bit for bit.
        """
        before = self._checksums()
        folder = self.save()
        reason = checkpoint.attempt(lambda: self.read(folder))
        if reason is None and self._checksums() != before:
            reason = "weights that were read back are not those that were saved"
        if any(reasons := gather_object([reason])):
            told = next(each for each in reasons if each)
            raise checkpoint.CheckpointError(f"{folder} was saved, but cannot be used: {told}")
        if self.log.folder:
            taken = size(storage.folder_bytes(folder))
            self.log.say(
                f"a checkpoint takes {self.keeper.seconds:.1f} s and {taken} (step 0, read back; "
                f"{size(self.keeper.need_bytes)} once the optimizer has a state)"
            )

    def _checksums(self) -> list[int]:
        """Of this rank's trained weights."""
        trained = (p.detach() for p in self.model.parameters() if p.requires_grad)
        local = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
        return [zlib.crc32(p.cpu().flatten().view(torch.uint8).numpy().data) for p in local]

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
        state = {"step": self.step, "num_skipped": self.num_skipped, "identity": self._identity()}
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
        self.read(folder)
        self.log.say(f"resumed from {folder} after step {self.step:,}")

    def read(self, folder: Path) -> None:
        """Takes step, weights and optimizer state from a verified checkpoint folder."""
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
        self.step, self.num_skipped = state["step"], state.get("num_skipped", 0)

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
