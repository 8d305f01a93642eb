"""Saves the checkpoints of a run, and decides which of them to keep.

A run keeps the newest `train.save_total_limit` checkpoints and the best one. Training continues
after a failed save, and earlier checkpoints stay as they are.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from sft.config.schema import Train
from sft.errors import CheckpointError
from sft.runtime import checkpoint
from sft.runtime.console import write_json
from sft.runtime.log import Log

BEST = "best.json"
# Metrics for `train.save_best`, and whether a smaller value is better.
LESS_IS_BETTER = {"loss": True, "perplexity": True, "token_accuracy": False}


@dataclass(frozen=True)
class Best:
    """The best evaluated checkpoint, as best.json records it."""

    metric: str
    value: float
    step: int

    @property
    def name(self) -> str:
        return f"checkpoint_step_{self.step}"

    def is_better_than(self, other: Best | None) -> bool:
        if math.isnan(self.value):
            return False
        if other is None:
            return True
        less = self.value < other.value
        return less if LESS_IS_BETTER[self.metric] else self.value > other.value


class Keeper:
    """Saves a run's checkpoints and decides which of them stay. Its methods are collective."""

    def __init__(self, train: Train, accelerator: Accelerator, log: Log, need_bytes: int):
        self.train, self.accelerator, self.log = train, accelerator, log
        self.folder = Path(train.output_dir)
        self.need_bytes = need_bytes  # size of a checkpoint
        self.best: Best | None = None
        self.num_failed = 0  # consecutive failed saves
        self.seconds = 0.0  # duration of the last save
        self.saved: int | None = None  # the last step of which this run has a checkpoint

    def restore_best(self, step: int) -> None:
        """Reads which checkpoint was the best one up to `step`, if it still exists."""
        main = self.accelerator.is_main_process
        (self.best,) = gather_object([self._read_best(step)] if main else [])

    def _read_best(self, step: int) -> Best | None:
        path = self.folder / BEST
        try:
            found = json.loads(path.read_text("utf-8"))
            best = Best(str(found["metric"]), float(found["value"]), int(found["step"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        is_ours = best.metric == self.train.save_best and best.step <= step
        return best if is_ours and checkpoint.fault(self.folder / best.name) is None else None

    def candidate(self, step: int, metrics: dict[str, float]) -> Best | None:
        """Returns a new best checkpoint if these held-out metrics are better, else None."""
        metric = self.train.save_best
        if metric is None:
            return None
        found = Best(metric, metrics[metric], step)
        return found if found.is_better_than(self.best) else None

    def save(self, step: int, write: Callable[[Path], None], best: Best | None = None) -> Path:
        """Commits `checkpoint_step_<n>`, records a new best one and removes old ones.

        Raises CheckpointError on all ranks if that fails on any.
        """
        final = self.folder / f"checkpoint_step_{step}"
        if self.saved != step:
            started = time.perf_counter()
            checkpoint.commit(final, write, self.accelerator, self.need_bytes)
            self.seconds = time.perf_counter() - started
            self.saved = step
        main = self.accelerator.is_main_process
        attempts = [checkpoint.catch_error(self._tidy, step, best)] if main else []
        (reason,) = gather_object(attempts)
        if reason:
            raise CheckpointError(f"saved {final}, but cannot tidy {self.folder}: {reason}")
        self.best = best or self.best
        return final

    def _tidy(self, step: int, best: Best | None) -> None:
        if best:
            write_json(self.folder / BEST, asdict(best) | {"checkpoint": best.name}, sync=True)
        kept = best or self.best
        spared = [kept.name] if kept else []
        checkpoint.prune(self.folder, self.train.save_total_limit, spared, step)

    def try_to_save(
        self, step: int, write: Callable[[Path], None], best: Best | None = None
    ) -> None:
        """Saves a checkpoint; a failure is logged, and raised after `max_failed_saves` in a row."""
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
