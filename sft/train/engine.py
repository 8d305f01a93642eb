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
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object
from torch import nn

from sft import errors
from sft.config.schema import Train
from sft.data.batches import Budget, MicroBatch, cut, global_batch_ids
from sft.errors import NonFiniteError, OutOfMemory, Preempted
from sft.runtime import checkpoint, disk, oom
from sft.runtime.console import Advance, duration, size
from sft.runtime.context import Context
from sft.train import recovery, retention
from sft.train.parallel import share as parallel_share
from sft.train.profile import profiled
from sft.train.recovery import Shortage
from sft.train.schedule import learning_rate, order_seed, total_steps
from sft.train.state import identity, read_state
from sft.train.task import Batch, Trainable


@dataclass(frozen=True)
class AccumulatedStep:
    """A global batch after its backward passes and before the update."""

    ids: list[int]
    supervised: float  # items, over all ranks
    totals: dict[str, float]  # sums over them: the loss, and what the task reports
    broken: list[int]  # ids of micro-batches whose loss is not finite


class Engine:
    """Trains `task` as `train` says; everything is written to `folder`."""

    def __init__(
        self,
        task: Trainable,
        train: Train,
        context: Context,
        budget: Budget,
    ):
        self.task, self.train = task, train
        self.accelerator, self.log, self.guard = context.accelerator, context.log, context.guard
        self.folder = Path(train.output_dir)
        self.budget = task.budget = budget
        self.step = 0
        self.evaluated = 0  # the last step after which there was an evaluation
        self.num_skipped = 0  # steps without an update, since they were not finite
        self.total_steps = total_steps(train, len(task.lengths))
        trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        need = disk.checkpoint_bytes(train, trained, 0)
        self.keeper = retention.Keeper(train, context.accelerator, context.log, need)
        task.model.train()
        self.parallel = parallel_share.share(task.model, train, context.accelerator)
        self.model, self.optimizer = self.parallel.model, self.parallel.optimizer

    # -- one step

    def window(self, step: int) -> tuple[list[int], list[MicroBatch]]:
        """Ids of the step's global batch, and this rank's micro-batches of it."""
        lengths, world = self.task.lengths, self.accelerator.num_processes
        ids = global_batch_ids(len(lengths), order_seed(self.train), step, self.train.global_batch)
        cuts = cut(ids, lengths, world, self.budget)
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
            grad_norm = self._for_good(ids, self.parallel.clip)
            if self._anywhere(not math.isfinite(grad_norm)):
                self._skip("gradient norm", grad_norm, ids)
            else:
                self._for_good(ids, self.parallel.update)
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
            "data/examples_crc32": zlib.crc32(repr(ids).encode()),  # which ones, in which order
            "speed/tokens_per_second": tokens / seconds,
            "speed/step_seconds": seconds,
            "memory/gib": memory_bytes() / 2**30,
        }

    def _passes(self) -> AccumulatedStep | Shortage:
        """Forward and backward of the step's global batch; or the memory that ran out on any rank,
        the same on all. Without a supervised item loss and gradient are 0, never 0 / 0."""
        ids, micro_batches = self.window(self.step)
        watch = recovery.Watch()
        self.parallel.begin()
        batches = [watch.call(m, self.task.collate, m) for m in micro_batches]
        count = 0.0 if watch.met else self._count(batches)
        supervised, *asked = self._sum([count, *self.guard.flags()])
        self.guard.agree(*asked)
        if self.parallel.waits == "forward" and (met := self._met(watch)):
            return met
        if self.task.needs_global_batch and (
            met := self._summarise(ids, micro_batches, batches, supervised, watch)
        ):
            return met
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        for i, micro_batch in enumerate(micro_batches):
            self.guard.mark()
            last = i == len(micro_batches) - 1
            loss_of = (self._forward, micro_batch, batches[i], ids, self.task.loss)
            found = watch.call(micro_batch, *loss_of)
            waited = self.parallel.waits in ("backward", "forward") or (
                last and self.parallel.waits != "never"
            )
            if waited and (met := self._met(watch)):
                return met
            if found is None:
                continue
            loss, extras = found
            attempt = self._for_good if waited else watch.call
            self.parallel.exchange(last)
            share = loss * (self.parallel.loss_scale / (supervised or 1.0))
            attempt(micro_batch, self.parallel.backward, share)
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
        return AccumulatedStep(ids, supervised, totals, broken)

    def _count(self, batches: list[Batch]) -> float:
        return float(sum(self.task.num_supervised(batch) for batch in batches))

    def _sum(self, values: list[Any]) -> list[float]:
        """Sums over ranks, in fp64."""
        self.guard.mark()
        local = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in values])
        return self.accelerator.reduce(local.to(self.accelerator.device), "sum").tolist()

    def _seed(self, micro_batch: MicroBatch, ids: list[int]) -> None:
        """Randomness (dropout) is a function of seed, step and position in the global batch."""
        position = ids.index(micro_batch[0]) if micro_batch else len(ids)
        torch.manual_seed((((self.train.seed * 1_000_003 + self.step) << 20) + position) % 2**63)

    def _summarise(
        self,
        ids: list[int],
        micro_batches: list[MicroBatch],
        batches: list[Batch],
        supervised: float,
        watch: recovery.Watch,
    ) -> Shortage | None:
        """Gives the task the summaries of the whole global batch, if the batch is cut.

        Returns the memory that ran out, as `_passes` does.
        """
        table = None
        if self._is_cut(micro_batches):
            places = {number: place for place, number in enumerate(ids)}
            for micro_batch, batch in zip(micro_batches, batches, strict=True):
                self.guard.mark()
                found = watch.call(
                    micro_batch, self._forward, micro_batch, batch, ids, self.task.summarise
                )
                if self.parallel.waits == "forward" and (met := self._met(watch)):
                    return met
                if found is not None:
                    if table is None:
                        table = found.new_zeros(len(ids), *found.shape[1:])
                    table[[places[number] for number in micro_batch]] = found
            if met := self._met(watch):
                return met
            # Each row comes from one rank.
            table = self._for_good(ids, self.accelerator.reduce, table, "sum")
        self._seed([], ids)  # the same on all
        self._for_good(ids, self.task.set_global_batch, ids, table, supervised)
        return None

    def _is_cut(self, micro_batches: list[MicroBatch]) -> bool:
        return self.accelerator.num_processes > 1 or len(micro_batches) > 1

    def _forward(
        self,
        micro_batch: MicroBatch,
        batch: Batch,
        ids: list[int],
        action: Callable[[nn.Module, Batch], Any],
    ) -> Any:
        """`action` of a micro-batch, a forward pass (the task's loss). OutOfMemory where other
        ranks wait in the same pass."""
        self._seed(micro_batch, ids)
        if self.parallel.waits != "forward":
            with self.parallel.alone():
                return action(self.model, batch)
        behind: list[bool] = []  # the pass in which others wait is over
        handle = self.model.register_forward_hook(lambda *_: behind.append(True))
        try:
            return action(self.model, batch)
        except Exception as error:
            if not behind and (said := oom.shortage(error)):
                raise self._out_of_memory(said, micro_batch) from None
            raise
        finally:
            handle.remove()

    # -- what goes wrong in a step

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
        self.parallel.drop()
        oom.release()
        lengths, world = self.task.lengths, self.accelerator.num_processes
        ids, _ = self.window(self.step)
        cuts = cut(ids, lengths, world, self.budget)
        budget = recovery.smaller(self.budget, cuts, lengths)
        if budget is None:
            raise OutOfMemory(
                f"memory ran out in step {self.step + 1} with one example of "
                f"{max(lengths[i] for i in met.ids):,} tokens "
                f"({self.task.name_examples(met.ids)}): {met.reason}; see what would take less "
                "with `make plan`"
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
            if (said := oom.shortage(error)) is None:
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
        self.parallel.drop()
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

    def try_out(self, micro_batches: list[MicroBatch]) -> float:
        """Seconds for forward and backward of these, without an update.

        Local to each rank and without traces: no gradient, random state or weight is left changed.
        """
        zero = self.train.engine == "deepspeed"  # whose backward keeps books of its own
        batches = [self.task.collate(micro_batch) for micro_batch in micro_batches]
        if self.task.needs_global_batch:
            self.task.set_global_batch([], None, 0.0)
        started = time.perf_counter()
        try:
            with nullcontext() if zero else self.parallel.alone():
                if self.task.needs_global_batch and self._is_cut(micro_batches):
                    for batch in batches:
                        self.task.summarise(self.model, batch)
                for batch in batches:
                    loss = self.task.loss(self.model, batch)[0]
                    if not zero:
                        loss.backward()
                    loss.item()  # waits for the device
        finally:
            self.parallel.drop()
        return (time.perf_counter() - started) * (3 if zero else 1)

    # -- the loop

    def train_to_end(self, resumed_from: Path | None) -> dict[str, float]:
        """Trains to the last step, from a checkpoint if there is one. Collective.

        Returns the seconds that it took, and the seconds that a probe predicted.
        """
        if resumed_from:
            self.resume(resumed_from)
        predicted = self.probe_seconds_per_step() * (self.total_steps - self.step)
        self.log.say(f"training: {self.total_steps:,} steps, about {duration(predicted)} (probed)")
        started = time.perf_counter()
        self.run()
        measured = time.perf_counter() - started
        return {"training_seconds": measured, "predicted_training_seconds": predicted}

    def run(self) -> None:
        """From the current step to the end, with evaluations and checkpoints at their intervals."""
        train, log, guard = self.train, self.log, self.guard
        log.open_metrics(self.step)
        self.keeper.recall(self.step)
        if train.save_steps and self.step == 0:
            with guard.section("save"):
                self.prove_saving()
        started, first = time.perf_counter(), self.step
        with (
            self.preemptible(),
            guard.section("step"),
            log.progress("train", self.total_steps, self.step) as advance,
            profiled(train, log) as trace_step,
        ):
            self._follow_up(save=False)  # an evaluation that a signal had abandoned
            while self.step < self.total_steps:
                guard.mark(self.step + 1)
                values = self.optimizer_step()
                trace_step()
                self.step += 1
                self._report(values, advance, (time.perf_counter() - started) / (self.step - first))
                self._follow_up(save=self._due(train.save_steps))
                guard.stop_if_agreed()

    def _follow_up(self, *, save: bool) -> None:
        """What is to be done after a step: evaluation, checkpoint."""
        best = None
        due = self._due(self.train.eval_steps) and self.evaluated != self.step
        if due and not self.guard.stopping:
            best = self.keeper.candidate(self.step, self.evaluate())
        if self.guard.take_saving() or best or save:
            with self.guard.section("save"):
                self.keeper.try_to_save(self.step, self._write, best)

    def _due(self, interval: int | None) -> bool:
        return bool(interval and self.step % interval == 0 and self.step < self.total_steps)

    def evaluate(self) -> dict[str, float]:
        metrics = self.task.evaluate(self.model)
        self.evaluated = self.step
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
        reason = checkpoint.attempt(self.read, folder)
        if reason is None and self._checksums() != before:
            reason = "weights that were read back are not those that were saved"
        if any(reasons := gather_object([reason])):
            told = next(each for each in reasons if each)
            raise errors.CheckpointError(f"{folder} was saved, but cannot be used: {told}")
        if self.log.folder:
            taken = size(disk.folder_bytes(folder))
            self.log.say(
                f"a checkpoint takes {self.keeper.seconds:.1f} s and {taken} (step 0, read back; "
                f"{size(self.keeper.need_bytes)} once the optimizer has a state)"
            )

    def digest(self) -> str:
        """Of the trained weights on all ranks, the same on each. Collective."""
        return " ".join(map(str, gather_object(self._checksums())))

    def _checksums(self) -> list[int]:
        """Of this rank's trained weights."""
        held = (tensor.detach().cpu().flatten() for tensor in self.parallel.held())
        return [zlib.crc32(each.view(torch.uint8).numpy().data) for each in held]

    def _write(self, staging: Path) -> None:
        weights = self.parallel.weights()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        checkpoint.save_optimizer(self.parallel.pieces(), staging, rank, world)
        if self.accelerator.is_main_process:
            self.task.save(staging, weights)
            state = {
                "step": self.step,
                "evaluated": self.evaluated,
                "num_skipped": self.num_skipped,
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
        state = self.read(folder)
        if folder.parent.resolve() == self.folder.resolve():
            self.keeper.saved = self.step
        self.log.say(f"resumed from {folder} after step {self.step:,}")
        now = self.train.model_dump() | {"processes": self.accelerator.num_processes}
        then = state["settings"] | {"processes": state["world_size"]}
        for key in now:
            if then.get(key) != now[key]:
                self.log.say(f"changed since: {key} was {then.get(key)}, is {now[key]}")

    def read(self, folder: Path) -> dict[str, Any]:
        """Takes step, weights and optimizer state from a verified checkpoint folder."""
        state = read_state(folder, identity(self.train, self.task.identity()))
        for name, value in self.task.read(folder):
            self.parallel.put(name, value)
        with checkpoint.OptimizerState(folder) as saved:
            self.parallel.restore(state["optimizer_updates"], saved.read)
        self.step, self.num_skipped = state["step"], state["num_skipped"]
        self.evaluated = state["evaluated"]
        return state

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
            with self.guard.section("save"):
                folder = self.save()
            raise self.guard.preempted(f"after step {self.step:,}; saved {folder}") from error


def memory_bytes() -> int:
    """Peak allocation on the GPU, or the resident memory of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
