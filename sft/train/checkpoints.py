"""The checkpoints of a run: the state that they hold, when they are saved and which are kept.

A run keeps the newest `train.save_total_limit` checkpoints and the best one. Training continues
after a failed save, and earlier checkpoints stay as they are. A checkpoint names the one that it
continues (`runtime/run_folder`) and the best one so far; best.json repeats the latter for people.

With `train.checkpoint_async` a save copies to host memory, and a thread of each rank writes. The
ranks report with each step's counts whether they still write. Once none does, the main threads
commit the checkpoint, as they do without it. At most one checkpoint is being written.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object

from sft.config.schema import Train
from sft.config.section import Section
from sft.errors import AnotherRunError, CheckpointError, ExitCode, LostFolder
from sft.runtime import checkpoint, run_folder
from sft.runtime.attempt import Status
from sft.runtime.console import write_json
from sft.runtime.log import Log
from sft.runtime.plain import load_json, read_json
from sft.runtime.tensor_file import TensorFile
from sft.train.loss_scale import LossScale

LESS_IS_BETTER = ("loss", "perplexity")  # of the metrics for `train.save_best`
STATE = "trainer.json"
TRIES = 20  # to save the result of a run that has no checkpoint
SECONDS_OF_WAIT = 30  # before the next
COUNTS = ("step", "evaluated", "num_skipped", "optimizer_updates", "world_size")
WriteState = Callable[[Path, "Best | None", bool], list[TensorFile]]
"""Writes a checkpoint, which names the best one so far, into a folder (see `checkpoint.Write`). If
True, the files of tensors keep copies, which are written later."""
NO_CHANGE = ("output_dir", "resume_from_checkpoint")  # may differ in the same run


def identity(train: Train, of_task: dict[str, str]) -> dict[str, str]:
    """Returns the values that a run and the run that resumes it must share."""
    arguments = train.optimizer_args
    frozen = [each.match for each in train.groups or () if each.freeze]
    return {
        "train.seed": str(train.seed),
        "train.shuffle": str(train.shuffle),
        "train.global_batch": str(train.global_batch),
        "train.optimizer": train.optimizer,
        **({"train.optimizer_args": str(arguments)} if arguments else {}),
        **({"train.groups": f"freeze {frozen}"} if frozen else {}),
        **of_task,
    }


def write_state(
    folder: Path,
    counts: dict[str, int],
    train: Train,
    own: dict[str, str],
    best: Best | None,
    loss_scale: LossScale | None = None,
    early_stopping: dict[str, Any] | None = None,
) -> None:
    """Writes trainer.json. `counts`: a number for each of `COUNTS`; `own`: the run's identity."""
    assert counts.keys() == set(COUNTS)
    state = {**counts, "identity": own, "settings": train.model_dump()}
    state["best"] = asdict(best) if best else None
    if loss_scale:
        state["loss_scale"] = asdict(loss_scale)
    if early_stopping:
        state["early_stopping"] = early_stopping
    (folder / STATE).write_text(json.dumps(state, indent=1), "utf-8")


def changed_settings(state: dict[str, Any], train: Train, world_size: int) -> Iterator[str]:
    """Yields the settings of a resumed run that differ from the run that wrote `state`.

    A key that is newer than that run counts as its default, which does what was done without it;
    if that is `auto`, as what it was decided to be, or as false.
    """
    now = train.model_dump() | {"processes": world_size}
    then = state["settings"] | {"processes": state["world_size"]}
    for key in now.keys() - then.keys() - {*NO_CHANGE}:
        default = type(train).model_fields[key].get_default(call_default_factory=True)
        default = default.model_dump() if isinstance(default, Section) else default
        then[key] = False if default == "auto" != now[key] else default
    for key in now:
        if then.get(key) != now[key] and key not in NO_CHANGE:
            yield f"{key} was {then.get(key)}, is {now[key]}"


def read_state(folder: Path, own: dict[str, str]) -> dict[str, Any]:
    """Returns trainer.json of a checkpoint folder.

    Raises AnotherRunError if the run that wrote it has another identity than `own`; its exit code
    is 3 if only the data differ.
    """
    path = folder / STATE
    if not path.exists():
        raise CheckpointError(
            f"{folder} holds a model, not the state of a run: expected trainer.json; "
            "resume from a checkpoint_step_<n> folder"
        )
    try:
        state = load_json(path)
        is_valid = all(type(state[key]) is int and state[key] >= 0 for key in COUNTS)
        then = dict(state["identity"])
        dict(state["settings"])
        LossScale.restore(state.get("loss_scale"))
    except (OSError, KeyError, TypeError, ValueError):
        is_valid = False
    named = run_folder.NAME.fullmatch(folder.name)
    if not is_valid or (named and int(named[1]) != state["step"]):
        raise CheckpointError(f"{path} is not what a run writes into such a folder")
    if changed := [key for key in own | then if then.get(key) != own.get(key)]:
        error = AnotherRunError(
            f"{folder} belongs to another run; resuming would not continue it:\n  "
            + "\n  ".join(f"{key}: was {then.get(key)}, is {own.get(key)}" for key in changed)
            + "\nRestore these, or start anew with another train.output_dir."
        )
        error.exit_code = ExitCode.DATA if changed == ["data"] else error.exit_code
        raise error
    return state


@dataclass(frozen=True)
class Best:
    """The best evaluated checkpoint, as best.json records it."""

    metric: str
    value: float
    step: int
    held_out_sha256: str = ""  # of the examples that were evaluated

    @property
    def name(self) -> str:
        return f"checkpoint_step_{self.step}"

    def is_better_than(self, other: Best | None) -> bool:
        if other is None or math.isnan(self.value):
            return not math.isnan(self.value)
        is_less = self.value < other.value
        return is_less if self.metric in LESS_IS_BETTER else self.value > other.value


class Pending(NamedTuple):
    """A checkpoint that is not committed yet."""

    saving: checkpoint.Saving
    step: int
    best: Best | None  # a new best one, which this is
    started: float


class Keeper:
    """Saves a run's checkpoints and removes old ones. Its public methods are collective."""

    def __init__(
        self,
        train: Train,
        accelerator: Accelerator,
        log: Log,
        status: Status,
        need_bytes: int,
        held_out_sha256: str = "",
    ):
        self.train, self.accelerator, self.log, self.status = train, accelerator, log, status
        self.folder = Path(train.output_dir)
        self.need_bytes = need_bytes  # size of a checkpoint
        self.held_out_sha256 = held_out_sha256
        self.best: Best | None = None
        self.num_failed = 0  # consecutive failed saves
        self.seconds = 0.0  # duration of the last save
        self.saved: int | None = None  # the last step of which this run has a checkpoint
        self._pending: Pending | None = None  # what threads are writing
        self._is_written = False  # all ranks have agreed that theirs have ended
        self.parent: dict[str, str] | None = None  # the checkpoint that the next one continues

    def continue_from(self, folder: Path, state: dict[str, Any], is_changed: bool) -> None:
        """Makes `folder`, whose trainer.json is `state`, the newest checkpoint of the lineage.

        Later checkpoints in the run folder are set aside, with what else followed from them.
        """
        result: list[Any] = []
        if self.accelerator.is_main_process:
            reason = checkpoint.catch_error(
                lambda: result.append(self._set_aside(folder, state, is_changed))
            )
            result = [(reason, *(result or [(None, None, None)])[0])]
        ((reason, moved, self.parent, self.best),) = gather_object(result)
        if reason:
            raise CheckpointError(f"{self.folder}: cannot continue from {folder.name}: {reason}")
        if folder.parent.resolve() == self.folder.resolve():
            self.saved = state["step"]
        if moved:
            self.log.say(moved)

    def _set_aside(
        self, folder: Path, state: dict[str, Any], is_changed: bool
    ) -> tuple[str | None, dict[str, str], Best | None]:
        """Returns a sentence about what was set aside, the parent, and the best checkpoint."""
        step, moved = state["step"], None
        best = self._read_best(state["best"] if "best" in state else self._recorded_best(), step)
        if folder.parent.resolve() == self.folder.resolve():
            moved = run_folder.set_aside(self.folder, step, self.status.attempt, is_changed)
            self.status.update()
        if best:
            self._record(best)
        return moved, run_folder.reference(folder, self.folder), best

    def _recorded_best(self) -> dict[str, Any]:
        return read_json(self.folder / run_folder.BEST)

    def _read_best(self, found: Any, step: int) -> Best | None:
        """Returns the best checkpoint up to `step` from its record, if it still exists."""
        try:
            held_out = str(found.get("held_out_sha256", self.held_out_sha256))  # not in old ones
            best = Best(str(found["metric"]), float(found["value"]), int(found["step"]), held_out)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        is_ours = best.metric == self.train.save_best and best.step <= step
        is_ours = is_ours and held_out == self.held_out_sha256
        return best if is_ours and run_folder.find_fault(self.folder / best.name) is None else None

    def _record(self, best: Best) -> None:
        values = asdict(best) | {"checkpoint": best.name}
        if self._recorded_best() != values:
            write_json(self.folder / run_folder.BEST, values, sync=True)

    def lineage(self) -> dict[str, Any]:
        """Returns what the manifest of a checkpoint says about its history."""
        return {"attempt": self.status.attempt, "parent": self.parent}

    def find_better(self, step: int, metrics: dict[str, float]) -> Best | None:
        """Returns the record of a new best checkpoint if these held-out metrics are better."""
        metric = self.train.save_best
        if metric is None:
            return None
        found = Best(metric, metrics[metric], step, self.held_out_sha256)
        return found if found.is_better_than(self.best) else None

    def save(self, step: int, write: WriteState, best: Best | None = None) -> Path:
        """Commits `checkpoint_step_<n>`, records a new best one and removes old ones.

        Calls `write` with the folder and the best checkpoint so far. Raises CheckpointError on all
        ranks if that fails on any.
        """
        self.settle()
        self._refuse_loss()
        if self.saved != step:
            started = time.perf_counter()
            cost = checkpoint.commit(*self._contents(step, write, best, behind=False))
            self._record_save(step, started, cost)
        self._finish(step, best)
        return self._folder_of(step)

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"checkpoint_step_{step}"

    def _contents(self, step: int, write: WriteState, best: Best | None, *, behind: bool) -> Any:
        """Returns the arguments of `checkpoint.commit` and `checkpoint.Saving`."""
        self.log.sync_metrics()
        known = best or self.best

        def write_all(staging: Path) -> list[TensorFile]:
            return write(staging, known, behind)

        final = self._folder_of(step)
        return final, write_all, self.accelerator, self.need_bytes, self.lineage()

    def _record_save(self, step: int, started: float, cost: checkpoint.Cost) -> None:
        self.seconds, self.saved = time.perf_counter() - started, step
        self.log.say(f"saved {self._folder_of(step).name}: {cost}")
        if self.log.folder:
            with self.log.optional(run_folder.HISTORY):
                digest = checkpoint.tensors_sha256(self._folder_of(step))
                self.log.record({"event": "checkpoint", "step": step, "tensors_sha256": digest})

    def _finish(self, step: int, best: Best | None) -> None:
        """Records a new best checkpoint, and removes old ones."""
        tidied, known = list[Any](), best or self.best
        if self.accelerator.is_main_process:
            tidied = [checkpoint.catch_error(self._tidy, step, best, known)]
        (reason,) = gather_object(tidied)
        if reason:
            raise CheckpointError(
                f"saved {self._folder_of(step)}, but cannot tidy {self.folder}: {reason}"
            )
        self.best = known

    def _begin(self, step: int, write: WriteState, best: Best | None) -> None:
        """Copies a checkpoint, and lets a thread write it."""
        self._refuse_loss()
        started = time.perf_counter()
        saving = checkpoint.Saving(*self._contents(step, write, best, behind=True))
        saving.flush_behind()
        self._pending = Pending(saving, step, best, started)

    @property
    def is_writing(self) -> bool:
        """Returns whether this rank's thread is writing; `agree` takes the number of such ranks."""
        return self._pending is not None and self._pending.saving.is_flushing

    def agree(self, writing: float) -> None:
        self._is_written = self._pending is not None and writing == 0

    def settle(self, *, wait: bool = True) -> None:
        """Commits the checkpoint that threads are writing, if there is one.

        Without `wait`, only if all ranks have agreed that it is written. A failure is treated as
        that of another save (`try_to_save`).
        """
        if self._pending is None or not (wait or self._is_written):
            return
        pending, self._pending = self._pending, None
        self._is_written = False
        with self._tolerate_failure():
            self._refuse_loss()
            cost = pending.saving.complete()
            self._record_save(pending.step, pending.started, cost)
            self._finish(pending.step, pending.best)
            self.num_failed = 0

    def save_final(
        self,
        step: int,
        write_final: checkpoint.Write,
        write: WriteState,
        need_bytes: int,
        wait: Callable[[], None],
    ) -> None:
        """Commits the final checkpoint, or else one of the last step, from which `auto` goes on.

        If neither can be written and the run has no checkpoint, it waits for room and tries again,
        `TRIES` times. Raises CheckpointError unless the final checkpoint is there.
        """
        final = self.folder / run_folder.FINAL
        for left in reversed(range(1 if self.saved else TRIES)):
            try:
                checkpoint.commit(final, write_final, self.accelerator, need_bytes, self.lineage())
                return
            except CheckpointError as error:
                failed = error
            try:
                folder = self.save(step, write)
            except LostFolder:
                raise
            except CheckpointError:
                if left == 0:
                    raise failed from None
                self.log.say(
                    f"warning: {failed}. Training is done, but nothing of it is saved: make room, "
                    f"or end it; it is tried again every {SECONDS_OF_WAIT} s, {left} times"
                )
                wait()
            else:
                raise CheckpointError(
                    f"{failed}. Training is done and saved in {folder}: remove the cause, and "
                    'continue with ARGS="train.resume_from_checkpoint=auto"'
                )

    def _refuse_loss(self) -> None:
        """Raises LostFolder on all ranks if the run folder is not this run's any more."""
        main = self.accelerator.is_main_process
        (reason,) = gather_object([self.status.find_loss(None)] if main else [])
        if reason:
            raise LostFolder(reason)

    def _tidy(self, step: int, best: Best | None, known: Best | None) -> None:
        # Only the main process writes it.
        self.parent = run_folder.reference(self._folder_of(step), self.folder)
        if best:
            self._record(best)
        spared = [known.name] if known else []
        run_folder.prune(self.folder, self.train.save_total_limit, spared, step)

    def try_to_save(self, step: int, write: WriteState, best: Best | None = None) -> None:
        """Saves a checkpoint; logs a failure, and raises it after `max_failed_saves` in a row.

        With `train.checkpoint_async`, returns once it is copied; `settle` commits it.
        """
        self.settle()
        with self._tolerate_failure():
            if self.train.checkpoint_async and self.saved != step:
                self._begin(step, write, best)
            else:
                self.save(step, write, best)
                self.num_failed = 0

    @contextmanager
    def _tolerate_failure(self) -> Iterator[None]:
        """Logs a save that fails; raises the error after `max_failed_saves` in a row."""
        try:
            yield
        except LostFolder:
            raise
        except CheckpointError as error:
            self.num_failed += 1
            allowed = self.train.max_failed_saves
            if self.num_failed >= allowed:
                raise CheckpointError(
                    f"{error}. That was failed save {self.num_failed} in a row "
                    "(train.max_failed_saves)"
                ) from None
            self.log.say(
                f"warning: {error}. Training goes on; this is failed save {self.num_failed} in a "
                f"row, and with number {allowed} the run ends"
            )
