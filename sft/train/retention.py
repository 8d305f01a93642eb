"""What a run writes: how much there will be, which checkpoints stay, what a failed save does.

`Need` is the one formula of disk space, for the plan, `make check` and the refusal at start. The
`Keeper` of a run saves, keeps the newest `train.save_total_limit` checkpoints and the best one, and
lets training go on where a save fails: the checkpoints before it are untouched.
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
# Metrics by which a checkpoint can be the best (train.save_best), and whether less is better.
LESS_IS_BETTER = {"loss": True, "perplexity": True, "token_accuracy": False}


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
        attempts = [checkpoint.catch_error(self._settle, step, best)] if main else []
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
