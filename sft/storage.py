"""What a run writes: how much there will be, which checkpoints stay, what a failed save does.

`Need` is the one formula of disk space, for the plan, `make check` and the refusal at start. The
`Keeper` of a run saves, keeps the newest `train.save_total_limit` checkpoints and the best one, and
lets training go on where a save fails: the checkpoints before it are untouched.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from sft import checkpoint, hardware
from sft.checkpoint import CheckpointError
from sft.config import Train
from sft.log import Log, size, write_json

ADAM_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2.05, "paged_adamw_8bit": 2.05}
WEIGHT_BYTES = 4  # trained weights are kept in fp32
TOKENIZER_BYTES = 130  # per token of the vocabulary; files of Llama-3, Qwen2 and Gemma have 70-130
SMALL_BYTES = 64 * 1024  # headers of tensors, JSON of configuration, optimizer and manifest
STEP_BYTES = 2000  # of metrics.jsonl, training.log and TensorBoard, per step
BEST = "best.json"
# Metrics by which a checkpoint can be the best (train.save_best), and whether less is better.
LESS_IS_BETTER = {"loss": True, "perplexity": True, "token_accuracy": False}


# --- how much ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Bytes of disk that a run takes at most."""

    checkpoint: int  # one of them
    copies: int  # of it: those that stay, and the one that is being written
    final: int  # what a user loads in the end
    logs: int
    merged: int = 0  # of `make merge` in bf16, should it be called; not in the total

    @property
    def total(self) -> int:
        return self.copies * self.checkpoint + self.final + self.logs

    def __str__(self) -> str:
        return (
            f"{size(self.total)}: {self.copies} checkpoint{'s' if self.copies > 1 else ''} of "
            f"{size(self.checkpoint)}, {size(self.final)} for the final one, "
            f"{size(self.logs)} for logs"
            + (f"; merged later {size(self.merged)} more" if self.merged else "")
        )


def checkpoint_bytes(train: Train, num_trained: int, vocabulary: int) -> int:
    """Trained weights, their optimizer state as the optimizer keeps it, and the tokenizer."""
    state = ADAM_BYTES[train.optimizer]
    return _final_bytes(num_trained, vocabulary) + math.ceil(num_trained * state)


def _final_bytes(num_trained: int, vocabulary: int) -> int:
    return num_trained * WEIGHT_BYTES + vocabulary * TOKENIZER_BYTES + SMALL_BYTES


def need(train: Train, num_trained: int, vocabulary: int, steps: int) -> Need:
    """Of a run of so many steps. Without `save_steps` there may be one checkpoint: a signal's."""
    saves = 1 + math.ceil(steps / train.save_steps) if train.save_steps else 1
    staying = min(saves, train.save_total_limit) if train.save_steps else 1
    staging = 1 if saves > 1 or train.save_best else 0
    best = 1 if train.save_best else 0
    return Need(
        checkpoint=checkpoint_bytes(train, num_trained, vocabulary),
        copies=staying + staging + best,
        final=_final_bytes(num_trained, vocabulary),
        logs=steps * STEP_BYTES + 2**20,
    )


def refuse_if_full(needed: Need, train: Train) -> str | None:
    """CheckpointError if the disk of the run folder cannot hold what the run will write; a warning
    if it can, but not a merged model besides.

    Checkpoints that lie there already count as free: these are the ones that will be replaced.
    """
    folder = Path(train.output_dir)
    have = free_bytes(folder) + sum(map(folder_bytes, checkpoint.newest_first(folder)))
    if needed.total > have:
        raise CheckpointError(
            f"{folder}: need {needed}; have {size(have)}. Make room, lower "
            f"train.save_total_limit (now {train.save_total_limit}, at least 2), or set "
            "train.output_dir to another disk"
        )
    if needed.total + needed.merged > have:
        return (
            f"there is room for the run, but not for `make merge` after it ({size(needed.merged)} "
            f"more, have {size(have - needed.total)}): make room until then, or give it OUTPUT= on "
            "another disk"
        )
    return None


def refuse_if_unwritable(folder: Path, key: str = "train.output_dir") -> None:
    """CheckpointError if the folder that `key` names, where it is or will be, takes no files."""
    existing = hardware.nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot write to {existing}: {error.strerror}; set {key} to a folder that "
            "is writable"
        ) from None


def free_bytes(path: Path) -> int:
    """Where `path` is, or would be."""
    return shutil.disk_usage(hardware.nearest_existing(path)).free


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- which stay --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Best:
    """The best evaluated checkpoint: best.json."""

    metric: str
    value: float
    step: int

    @property
    def name(self) -> str:
        return f"checkpoint_step_{self.step}"

    def beats(self, other: Best | None) -> bool:
        if math.isnan(self.value):
            return False
        if other is None:
            return True
        less = self.value < other.value
        return less if LESS_IS_BETTER[self.metric] else self.value > other.value


class Keeper:
    """Saves a run's checkpoints, and decides which stay. Its methods are collective."""

    def __init__(self, train: Train, accelerator: Accelerator, log: Log, need_bytes: int):
        self.train, self.accelerator, self.log = train, accelerator, log
        self.folder = Path(train.output_dir)
        self.need_bytes = need_bytes  # of a checkpoint
        self.best: Best | None = None
        self.num_failed = 0  # saves in a row
        self.seconds = 0.0  # that the last save took
        self.saved: int | None = None  # the step whose checkpoint is this run's own

    def recall(self, step: int) -> None:
        """The best checkpoint of the run that is resumed after `step`, if it is still there."""
        main = self.accelerator.is_main_process
        (self.best,) = gather_object([self._recalled(step)] if main else [])

    def _recalled(self, step: int) -> Best | None:
        path = self.folder / BEST
        try:
            told = json.loads(path.read_text("utf-8"))
            best = Best(str(told["metric"]), float(told["value"]), int(told["step"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        same = best.metric == self.train.save_best and best.step <= step
        return best if same and checkpoint.fault(self.folder / best.name) is None else None

    def candidate(self, step: int, metrics: dict[str, float]) -> Best | None:
        """A new best, if these held-out metrics are one."""
        metric = self.train.save_best
        if metric is None:
            return None
        found = Best(metric, metrics[metric], step)
        return found if found.beats(self.best) else None

    def save(self, step: int, write: Callable[[Path], None], best: Best | None = None) -> Path:
        """Commits `checkpoint_step_<n>`, notes a new best one, prunes what is too old.

        CheckpointError on all ranks if that fails anywhere.
        """
        final = self.folder / f"checkpoint_step_{step}"
        if self.saved != step:
            started = time.perf_counter()
            checkpoint.commit(final, write, self.accelerator, self.need_bytes)
            self.seconds = time.perf_counter() - started
            self.saved = step
        main = self.accelerator.is_main_process
        attempts = [checkpoint.attempt(self._settle, step, best)] if main else []
        (reason,) = gather_object(attempts)
        if reason:
            raise CheckpointError(f"saved {final}, but cannot tidy {self.folder}: {reason}")
        self.best = best or self.best
        return final

    def _settle(self, step: int, best: Best | None) -> None:
        if best:
            told = asdict(best) | {"checkpoint": best.name}
            write_json(self.folder / BEST, told, sync=True)
        kept = best or self.best
        spared = [kept.name] if kept else []
        checkpoint.prune(self.folder, self.train.save_total_limit, spared, step)

    def try_to_save(
        self, step: int, write: Callable[[Path], None], best: Best | None = None
    ) -> None:
        """Training goes on without this checkpoint; not after `max_failed_saves` in a row."""
        try:
            self.save(step, write, best)
        except CheckpointError as error:
            self.num_failed += 1
            most = self.train.max_failed_saves
            if self.num_failed >= most:
                raise CheckpointError(
                    f"{error}. That was failed save {self.num_failed} in a row "
                    "(train.max_failed_saves)"
                ) from None
            self.log.say(
                f"warning: {error}. Training goes on; the run ends with failed save {most} in a "
                f"row, this is {self.num_failed}"
            )
        else:
            self.num_failed = 0
