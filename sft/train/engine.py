"""Trains. A task brings a model, examples and a loss; the engine decides everything else.

Law 1: loss and gradient are the sum over the supervised items of the global batch divided by their
number, for every cut over processes and micro-batches. Law 2: order, learning rate and randomness
are functions of (configuration, step). So a checkpoint is the weights, the optimizer's state, the
step with a few counts, and in fp16 the loss scale. The engine never asks which task it runs.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, release_memory
from torch import nn

from sft.config.schema import Train
from sft.data.batches import MicroBatch, cut, global_batch_ids, steps_per_epoch
from sft.errors import CheckpointError, NonFiniteError, OutOfMemory, Preempted, oom_message
from sft.models.groups import freeze_groups
from sft.runtime import checkpoint, disk, run_folder
from sft.runtime.console import Advance, duration, metrics_line, size
from sft.runtime.hardware import resolve_precision
from sft.runtime.processes import Context, sum_over_ranks
from sft.runtime.tensor_file import TensorFile
from sft.train.checkpoints import (
    SECONDS_OF_WAIT,
    Best,
    Keeper,
    changed_settings,
    identity,
    read_state,
    write_state,
)
from sft.train.early_stopping import Stopper
from sft.train.loss_scale import LossScale
from sft.train.parallel import share_model
from sft.train.parallel.trial import checkpoint_bytes
from sft.train.profile import memory_bytes, profiled
from sft.train.recovery import AccumulatedStep, Oom, OomGuard, smaller_budget
from sft.train.schedule import is_due, learning_rate, order_seed, total_steps
from sft.train.task import Batch, Trainable


class Engine:
    """Trains `task` as `train` says and writes to `train.output_dir`."""

    def __init__(self, task: Trainable, train: Train, context: Context):
        self.task, self.train = task, train
        self.accelerator, self.log, self.guard = context.accelerator, context.log, context.guard
        self.folder = Path(train.output_dir)
        self.step = 0
        self.last_evaluated = 0  # the last step that was followed by an evaluation
        self.num_skipped = 0  # steps without an update: loss or gradient was not finite
        self.loss_scale = LossScale() if resolve_precision(train)[0] == "fp16" else None
        self.total_steps = total_steps(train, len(task.lengths))
        freeze_groups(task.model, train)
        need = checkpoint_bytes(train, task.model)
        shared = train, context.accelerator, context.log, context.guard.status
        self.keeper = Keeper(*shared, need, task.held_out_sha256)
        self.stopper = Stopper(train.early_stopping, task.held_out_sha256)
        task.model.train()
        self.parallel = share_model(task.model, train, context.accelerator)
        if self.parallel.remark:
            self.log.say(self.parallel.remark)
        self.model, self.optimizer = self.parallel.model, self.parallel.optimizer

    # -- one step

    def window(self, step: int) -> tuple[list[int], list[MicroBatch]]:
        """Returns the ids of the step's global batch and this rank's micro-batches of it."""
        ids, cuts = self._cuts(step)
        return ids, cuts[self.accelerator.process_index]

    def _cuts(self, step: int) -> tuple[list[int], list[list[MicroBatch]]]:
        lengths, world = self.task.lengths, self.accelerator.num_processes
        ids = global_batch_ids(len(lengths), order_seed(self.train), step, self.train.global_batch)
        return ids, cut(ids, lengths, world, self.task.budget)

    def collate(self, micro_batch: MicroBatch) -> Batch:
        """Returns the batch of these examples. A dry run overrides this method."""
        return self.task.collate(micro_batch)

    def clip(self) -> float:
        """Clips gradients and returns their norm. A dry run overrides this method."""
        return self.parallel.clip()

    def optimizer_step(self) -> dict[str, float]:
        """Makes one update from the global batch of `self.step`, and returns the values to log.

        If loss or gradient is not finite, skips the update, or raises NonFiniteError after
        `train.skip_nonfinite` skipped ones. Raises OutOfMemory if no smaller micro-batches help.
        """
        started = time.perf_counter()
        rate = learning_rate(self.train, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, self.step, self.total_steps, group.get("peak"))
        done, grad_norm = self._compute_gradient()
        ids, loss = done.ids, done.totals["loss"]
        if not math.isfinite(loss):
            self._skip("loss", loss, done.not_finite)
        elif not math.isfinite(grad_norm):
            self._skip("gradient norm", grad_norm, ids)
        else:
            self._call_once(ids, self.parallel.update)
            if self.loss_scale:
                self.loss_scale.count_update()
        seconds = time.perf_counter() - started
        tokens = sum(self.task.lengths[i] for i in ids)
        number = done.supervised or 1.0
        values = {f"train/{name}": value / number for name, value in done.totals.items()}
        if self.train.skip_nonfinite:
            values["train/skipped_steps"] = self.num_skipped
        if self.loss_scale:
            values["train/loss_scale"] = self.loss_scale.value
            values["train/overflows"] = self.loss_scale.num_overflows
        return {
            **values,
            "train/grad_norm": grad_norm,
            "train/learning_rate": rate,
            "train/tokens": tokens,
            "train/supervised_tokens": done.supervised,
            "data/examples_crc32": zlib.crc32(repr(ids).encode()),  # which examples, in which order
            "speed/tokens_per_second": tokens / seconds,
            "speed/step_seconds": seconds,
            "memory/gib": memory_bytes() / 2**30,
        }

    def _compute_gradient(self) -> tuple[AccumulatedStep, float]:
        """Computes and clips the gradient of the step's global batch.

        Returns the batch's sums, and the gradient's norm before clipping: the same on all ranks,
        and NaN if the loss is not finite. If memory runs out, repeats the global batch in smaller
        micro-batches, as far as `recovery` allows it. If gradients overflow in fp16, repeats it
        with a smaller loss scale.
        """
        scale = self.loss_scale and replace(self.loss_scale)  # its value before this step
        while True:
            done = self._accumulate()
            if isinstance(done, Oom):
                self._shrink_budget(done)
                continue
            if not math.isfinite(done.totals["loss"]):
                return done, math.nan
            norm = self._call_once(done.ids, self.clip)
            if math.isfinite(norm):
                break
            if self.loss_scale is None or not self.loss_scale.halve():
                self.loss_scale = scale  # a smaller scale does not help, so it was not the cause
                return done, norm
            self.parallel.zero_grad()
        if self.loss_scale and scale and self.loss_scale.value != scale.value:
            self.log.say(
                f"step {self.step + 1:,}: gradients overflowed in fp16; the step was repeated with "
                f"a loss scale of {self.loss_scale.value:,.0f} (before: {scale.value:,.0f})"
            )
        return done, norm

    def _accumulate(self) -> AccumulatedStep | Oom:
        """Runs the forward and backward passes of the step's global batch.

        If memory runs out on a rank, returns that error on all ranks. If no item is supervised,
        loss and gradient are 0, not 0 / 0.
        """
        ids, micro_batches = self.window(self.step)
        guard, waits_in = OomGuard(), self.parallel.waits_in
        self.parallel.begin_step(self.step)
        if self.loss_scale:
            self.parallel.set_loss_scale(self.loss_scale.value)
        batches = [guard.call(m, self.collate, m) for m in micro_batches]
        count = 0.0 if guard.oom else self._count(batches)
        flags = self.keeper.is_writing, *self.guard.flags()
        supervised, writing, *signals = self._sum([count, *flags])
        self.keeper.agree(writing)
        self.guard.agree(*signals)
        factor = self.parallel.loss_factor / (supervised or 1.0)
        self.task.begin_step(self.step, factor * self.parallel.loss_scale)
        if waits_in == "forward" and (oom := self._oom_on_any_rank(guard)):
            return oom
        if self.task.needs_global_batch and (
            oom := self._summarise(ids, micro_batches, batches, supervised, guard)
        ):
            return oom
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        for i, micro_batch in enumerate(micro_batches):
            self.guard.mark()
            last = i == len(micro_batches) - 1
            forward = (self._forward, micro_batch, batches[i], ids, self.task.loss)
            result = guard.call(micro_batch, *forward)
            is_collective = waits_in in ("backward", "forward") or (last and waits_in != "never")
            if is_collective and (oom := self._oom_on_any_rank(guard)):
                return oom
            if result is None:  # memory has run out
                continue
            loss, extras = result
            self.parallel.prepare_backward(last)
            call = self._call_once if is_collective else guard.call
            call(micro_batch, self.parallel.backward, loss * factor)
            losses.append(loss.detach())
            for name, value in {"loss": loss, **extras}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
        if guard.oom:
            return guard.oom
        totals = dict(zip(sums, self._sum(list(sums.values())), strict=True))
        not_finite: list[int] = []
        if not math.isfinite(totals["loss"]):
            pairs = zip(micro_batches, losses, strict=True)
            mine = [i for micro_batch, loss in pairs if not loss.isfinite() for i in micro_batch]
            not_finite = gather_object(mine)
        return AccumulatedStep(ids, supervised, totals, not_finite)

    def _count(self, batches: list[Batch]) -> float:
        return float(sum(self.task.num_supervised(batch) for batch in batches))

    def _sum(self, values: list[Any]) -> list[float]:
        """Returns sums over ranks, in fp64."""
        self.guard.mark()
        return sum_over_ranks(values, self.accelerator)

    def _seed(self, micro_batch: MicroBatch, ids: list[int]) -> None:
        """Makes randomness (dropout) a function of seed, step and position in the global batch."""
        position = ids.index(micro_batch[0]) if micro_batch else len(ids)
        # Processes that share sequences have other tokens of them.
        part = self.accelerator.process_index % self.task.budget.shared_by
        position += part * (len(ids) + 1)
        torch.manual_seed((((self.train.seed * 1_000_003 + self.step) << 20) + position) % 2**63)

    def _summarise(
        self,
        ids: list[int],
        micro_batches: list[MicroBatch],
        batches: list[Batch],
        supervised: float,
        guard: OomGuard,
    ) -> Oom | None:
        """Gives the task the summaries of the whole global batch, if the batch is cut.

        If memory runs out on a rank, returns that error on all ranks.
        """
        table = None
        if self._is_cut(micro_batches):
            places = {i: place for place, i in enumerate(ids)}
            for micro_batch, batch in zip(micro_batches, batches, strict=True):
                self.guard.mark()
                forward = (self._forward, micro_batch, batch, ids, self.task.summarise)
                summary = guard.call(micro_batch, *forward)
                if self.parallel.waits_in == "forward" and (oom := self._oom_on_any_rank(guard)):
                    return oom
                if summary is not None:
                    if table is None:
                        table = summary.new_zeros(len(ids), *summary.shape[1:])
                    table[[places[i] for i in micro_batch]] = summary
            if oom := self._oom_on_any_rank(guard):
                return oom
            # Each row is filled on one rank, and 0 on the others.
            table = self._call_once(ids, self.accelerator.reduce, table, "sum")
        self._seed([], ids)  # the same on all ranks
        self._call_once(ids, self.task.set_global_batch, ids, table, supervised)
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
        """Returns the result of `action`, the task's `loss` or `summarise`, for a micro-batch.

        Raises OutOfMemory if memory runs out in a pass in which other ranks wait.
        """
        self._seed(micro_batch, ids)
        if self.parallel.waits_in != "forward":
            with self.parallel.no_sync():
                return action(self.model, batch)
        passed: list[bool] = []  # not empty once the pass in which other ranks wait is over
        handle = self.model.register_forward_hook(lambda *_: passed.append(True))
        try:
            with self.parallel.no_sync():
                return action(self.model, batch)
        except Exception as error:
            if not passed and (reason := oom_message(error)):
                raise self._out_of_memory(reason, micro_batch) from None
            raise
        finally:
            handle.remove()

    # -- what goes wrong in a step

    def _on_any_rank(self, flag: bool) -> bool:
        """Returns whether `flag` is true on any rank. Collective."""
        return flag if self.accelerator.num_processes == 1 else self._sum([flag])[0] > 0

    def _oom_on_any_rank(self, guard: OomGuard) -> Oom | None:
        """Returns the first out-of-memory error of any rank, the same on all. Collective."""
        if self.accelerator.num_processes == 1 or not self._on_any_rank(guard.oom is not None):
            return guard.oom
        return next(found for found in gather_object([guard.oom]) if found)

    def _shrink_budget(self, oom: Oom) -> None:
        """Halves the token budget; raises OutOfMemory if each micro-batch is one example."""
        self.parallel.zero_grad()
        release_memory()
        lengths = self.task.lengths
        _, cuts = self._cuts(self.step)
        budget = smaller_budget(self.task.budget, cuts, lengths)
        if budget is None:
            raise OutOfMemory(
                f"memory ran out in step {self.step + 1} with one example of "
                f"{max(lengths[i] for i in oom.ids):,} tokens "
                f"({self.task.name_examples(oom.ids)}): {oom.reason}; `make plan` shows changes "
                "that save memory"
            )
        self.task.budget = budget
        self.log.record({"event": "cut", "after_step": self.step, "tokens": str(budget)})
        self.log.say(
            f"step {self.step + 1:,}: memory ran out ({oom.reason}); the step is repeated, and "
            f"train.max_tokens is {budget.max_tokens:,} from here on; the result stays the same"
        )

    def _call_once(self, ids: list[int], action: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the result of an action that cannot be repeated.

        Raises OutOfMemory, which ends the run, if memory runs out.
        """
        try:
            return action(*arguments)
        except Exception as error:
            if (reason := oom_message(error)) is None:
                raise
            raise self._out_of_memory(reason, ids) from None

    def _out_of_memory(self, reason: str, ids: list[int]) -> OutOfMemory:
        return OutOfMemory(
            f"rank {self.accelerator.process_index}: memory ran out in a part of step "
            f"{self.step + 1} that cannot be repeated: {reason}. "
            f"Examples: {self.task.name_examples(ids)}. "
            f"Lower train.max_tokens (now {self.task.budget.max_tokens:,}) and resume"
        )

    def _skip(self, what: str, value: float, ids: list[int]) -> None:
        """Skips the update; raises NonFiniteError after `train.skip_nonfinite` skipped ones."""
        self.parallel.zero_grad()
        allowed, reason = self.train.skip_nonfinite, f"{what} is {value} in step {self.step + 1}"
        named = self.task.name_examples(ids)
        if self.num_skipped >= allowed:
            before = f" Skipped before it: {allowed} (train.skip_nonfinite)." if allowed else ""
            raise NonFiniteError(
                f"{reason}; the step was not applied and no checkpoint of it exists.{before} "
                f"Examples: {named}. Look at these rows; if they are sound, a lower "
                "train.learning_rate or train.precision=fp32 helps."
            )
        self.num_skipped += 1
        self.log.say(f"{reason}: skipped ({self.num_skipped} of {allowed}). Examples: {named}")

    # -- trials

    def probe_seconds_per_step(self) -> float:
        """Returns the seconds that forward and backward of this rank's next step take."""
        window = self.window(self.step)[1]
        self.try_out(window)  # warm-up
        return self.try_out(window)

    def try_out(self, micro_batches: list[MicroBatch]) -> float:
        """Returns the seconds that forward and backward of `micro_batches` take on this rank.

        Changes no gradient, random state or weight. With ZeRO, whose backward pass keeps state,
        runs forward only, and counts a backward pass as two forward passes.
        """
        is_zero = self.train.engine == "deepspeed"
        batches = [self.task.collate(micro_batch) for micro_batch in micro_batches]
        if self.task.needs_global_batch:
            self.task.set_global_batch([], None, 0.0)
        started = time.perf_counter()
        try:
            with nullcontext() if is_zero else self.parallel.no_sync():
                if self.task.needs_global_batch and self._is_cut(micro_batches):
                    for batch in batches:
                        self.task.summarise(self.model, batch)
                for batch in batches:
                    loss = self.task.loss(self.model, batch)[0]
                    if not is_zero:
                        loss.backward()
                    loss.item()  # waits for the device
        finally:
            self.parallel.zero_grad()
        return (time.perf_counter() - started) * (3 if is_zero else 1)

    # -- the loop

    def train_to_end(self, resumed_from: Path | None) -> dict[str, float]:
        """Trains to the last step, from a checkpoint if there is one. Collective.

        Returns the seconds that this took, and the seconds that a probe predicted.
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
        """Trains from the current step to the last, with evaluations and checkpoints."""
        log, guard = self.log, self.guard
        log.open_metrics(self.step)
        if self.train.save_steps and self.step == 0:
            with guard.section("save"):
                self.prove_saving()
        started, first = time.perf_counter(), self.step
        with (
            self.preemptible(),
            guard.section("step"),
            log.progress("train", self.total_steps, self.step) as advance,
            profiled(self.train, log) as trace_step,
        ):
            self._follow_up(save=False)  # repeats an evaluation that a signal interrupted
            while self.step < self.total_steps and not self.stopper.is_over:
                guard.mark(self.step + 1)
                values = self.optimizer_step()
                trace_step()
                self.step += 1
                self._report(values, advance, (time.perf_counter() - started) / (self.step - first))
                self._follow_up(save=self._is_due(self.train.save_steps))
                guard.stop_if_agreed()
            self.keeper.settle()
        if self.step < self.total_steps:
            log.say(self.stopper.reason(self.step, self.total_steps))

    def _follow_up(self, *, save: bool) -> None:
        """Evaluates and saves a checkpoint after a step, if they are due."""
        best = None
        self.keeper.settle(wait=False)
        due = self._is_due(self.train.eval_steps) and self.last_evaluated != self.step
        if due and not self.guard.stopping:
            metrics = self.evaluate()
            self.keeper.settle()  # the best checkpoint so far may be the one that is being written
            best = self.keeper.find_better(self.step, metrics)
        if self.guard.take_save_request() or best or save:
            with self.guard.section("save"):
                self.keeper.try_to_save(self.step, self._write, best)

    def _is_due(self, interval: int | str | None) -> bool:
        per_epoch = steps_per_epoch(len(self.task.lengths), self.train.global_batch)
        return 0 < self.step < self.total_steps and is_due(interval, self.step, per_epoch)

    def evaluate(self) -> dict[str, float]:
        """Logs and returns the held-out metrics of the current weights. Collective."""
        with self.parallel.averaged():
            metrics = self.task.evaluate(self.model)
            metrics |= self.task.score_answers(self.model, self.step)
        self.last_evaluated = self.step
        self.log.log(self.step, {f"eval/{name}": value for name, value in metrics.items()})
        self.log.say(f"step {self.step:,}: held-out {metrics_line(metrics)}")
        if metric := self.train.early_stopping.metric:
            rows, improvement = self.task.rows_of(metric), self.task.improvement
            said = self.stopper.add(self.step, metrics[metric], rows, improvement)
            self.log.say(f"step {self.step:,}: {said}")
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
        """Commits `checkpoint_step_<n>`. Raises CheckpointError if that fails."""
        return self.keeper.save(self.step, self._write)

    def prove_saving(self) -> None:
        """Saves a checkpoint and reads it back as a resume would.

        Raises CheckpointError if the trained weights cannot be written, for example on a full disk,
        or if any bit differs when they are read back.
        """
        before = self.parallel.checksums()
        folder = self.save()
        reason = checkpoint.catch_error(self.read, folder)
        if reason is None and self.parallel.checksums() != before:
            reason = "the weights that were read back differ from those that were saved"
        if reason := next(filter(None, gather_object([reason])), None):
            raise CheckpointError(f"{folder} was saved, but cannot be used: {reason}")
        if self.log.folder:
            taken = size(disk.folder_bytes(folder))
            self.log.say(
                f"a checkpoint takes {self.keeper.seconds:.1f} s and {taken} (step 0, read back; "
                f"{size(self.keeper.need_bytes)} once the optimizer has a state)"
            )

    def digest(self) -> str:
        """Returns a digest of the trained weights of all ranks, the same on each. Collective."""
        return " ".join(map(str, gather_object(self.parallel.checksums())))

    def _write(self, staging: Path, best: Best | None, behind: bool) -> list[TensorFile]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        shards = self.parallel.optimizer_shards()
        files = self.write_final(staging, behind)
        files += checkpoint.save_optimizer(shards, staging, rank, world, behind)
        if self.accelerator.is_main_process:
            counts = {  # the keys are those of `checkpoints.COUNTS`
                "step": self.step,
                "evaluated": self.last_evaluated,
                "num_skipped": self.num_skipped,
                "optimizer_updates": self.parallel.num_updates,
                "world_size": world,
            }
            own = identity(self.train, self.task.identity())
            watched = self.stopper.save(staging)
            write_state(staging, counts, self.train, own, best, self.loss_scale, watched)
        return files

    def save_final(self, need_bytes: int) -> None:
        """Commits what a user loads, without the state that only training needs."""

        def wait() -> None:
            for _ in range(SECONDS_OF_WAIT):
                self.guard.stop_if_asked()
                time.sleep(1)

        self.keeper.save_final(self.step, self.write_final, self._write, need_bytes, wait)

    def add_card(self, card: str | None) -> None:
        """Adds README.md, with this text, to the final checkpoint."""
        if card is not None and self.accelerator.is_main_process:
            with self.log.optional("README.md"):
                checkpoint.add_file(self.folder / run_folder.FINAL, "README.md", card)

    def write_final(self, staging: Path, behind: bool = False) -> list[TensorFile]:
        """Writes what a user loads (weights, tokenizer, configuration) to `staging`. Collective.

        `behind`: the files of tensors are written later, from copies.
        """
        with self.parallel.averaged():
            return self.task.save(staging, self.parallel.weights(behind))

    def resume(self, folder: Path) -> None:
        """Continues from a verified checkpoint, written by any engine and number of processes."""
        state = self.read(folder)
        changes = [*changed_settings(state, self.train, self.accelerator.num_processes)]
        self.keeper.continue_from(folder, state, bool(changes))
        self.log.say(f"resumed from {folder} after step {self.step:,}")
        for change in changes:
            self.log.say(f"changed since: {change}")

    def read(self, folder: Path) -> dict[str, Any]:
        """Loads step, weights and optimizer state from a verified checkpoint folder."""
        state = read_state(folder, identity(self.train, self.task.identity()))
        for name, value in self.task.read(folder):
            if name in self.parallel.trained:  # frozen ones are as they were built
                self.parallel.set_weight(name, value)
        with checkpoint.OptimizerState(folder) as saved:
            self.parallel.load_optimizer(state["optimizer_updates"], saved.read)
        self.step, self.num_skipped = state["step"], state["num_skipped"]
        if self.loss_scale:
            self.loss_scale = LossScale.restore(state.get("loss_scale"))
        self.last_evaluated = state["evaluated"]
        self.stopper.restore(folder, state.get("early_stopping"))
        return state

    # -- stopping

    @contextmanager
    def preemptible(self) -> Iterator[None]:
        """Saves a checkpoint if a signal stops the run within this context.

        After an error that all ranks raise, commits a checkpoint that is being written.
        """
        try:
            yield
        except Preempted as error:
            if not self.step:  # nothing to save
                raise
            self.log.say(f"asked to stop: saving step {self.step:,}")
            with self.guard.section("save"):
                folder = self.save()
            raise self.guard.preemption(f"after step {self.step:,}; saved {folder}") from error
        except Exception as error:
            if isinstance(error, NonFiniteError) or self.accelerator.num_processes == 1:
                self.keeper.settle()
            raise
