"""Estimates how much a run writes, and refuses runs that do not fit on the disk."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sft.config.schema import Train
from sft.config.section import interval_steps
from sft.errors import CheckpointError
from sft.runtime import hardware
from sft.runtime.console import size
from sft.runtime.run_folder import newest_first, step_of

TOKENIZER_BYTES = 130  # per token of the vocabulary; files of Llama-3, Qwen2 and Gemma have 70-130
SMALL_BYTES = 64 * 1024  # headers of tensors, JSON of configuration, optimizer and manifest
STEP_BYTES = 2000  # of metrics.jsonl, training.log and TensorBoard, per step


@dataclass(frozen=True)
class Need:
    """The maximum bytes of disk that a run needs."""

    checkpoint: int  # bytes of one checkpoint
    copies: int  # checkpoints at the same time: those that are kept and the one being written
    final: int  # bytes of the final checkpoint
    logs: int
    merged: int = 0  # bytes of a merge in bf16 after the run; not in the total

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


def checkpoint_bytes(train: Train, num_trained: int, state_bytes: int, vocabulary: int) -> int:
    """Returns the size of trained weights, the optimizer's state and the tokenizer."""
    return _final_bytes(train, num_trained, vocabulary) + state_bytes


def _final_bytes(train: Train, num_trained: int, vocabulary: int) -> int:
    return num_trained * train.trained_bytes + vocabulary * TOKENIZER_BYTES + SMALL_BYTES


def estimate_need(
    train: Train,
    num_trained: int,
    state_bytes: int,
    vocabulary: int,
    steps: int,
    steps_per_epoch: int,
) -> Need:
    """Returns what a run of `steps` steps needs. Without `save_steps`, only a signal saves.

    `state_bytes`: the bytes of a checkpoint that belong to the optimizer.
    """
    saves = 1
    if train.save_steps:
        saves += math.ceil(steps / interval_steps(train.save_steps, steps_per_epoch))
    best = bool(train.save_best)
    kept = min(saves, train.save_total_limit) + best
    staging = saves > 1 or best
    return Need(
        checkpoint=checkpoint_bytes(train, num_trained, state_bytes, vocabulary),
        copies=kept + staging,
        final=_final_bytes(train, num_trained, vocabulary),
        logs=steps * STEP_BYTES + 2**20,
    )


def refuse_if_full(needed: Need, train: Train, step: float = math.inf) -> str | None:
    """Raises CheckpointError if the disk of the run folder cannot hold what the run will write.

    Returns a warning if only a merged model would not fit. Checkpoints up to `step`, from which the
    run continues, count as free space, since they will be replaced; later ones are set aside.
    """
    folder = Path(train.output_dir)
    replaced = [path for path in newest_first(folder) if step_of(path) <= step]
    have = free_bytes(folder) + sum(map(folder_bytes, replaced))
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
    """Raises CheckpointError if no file can be written into `folder`, the value of `key`."""
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
    """Returns the free bytes of the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(hardware.nearest_existing(path)).free


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
