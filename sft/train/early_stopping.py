"""Ends a run whose held-out metric does not improve any more (`train.early_stopping`).

An evaluation improves on the best one if the 95 % interval of the difference, paired over the same
held-out examples, lies above `min_delta` as a whole. The best evaluation's values of each example
are part of each checkpoint, so a resumed run ends after the same step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft.config.schema import EarlyStopping
from sft.errors import CheckpointError
from sft.train.task import Paired

ROWS = "early_stopping.npy"


@dataclass
class Stopper:
    """Counts evaluations without an improvement. All ranks make the same decisions."""

    settings: EarlyStopping
    held_out_sha256: str  # of what is evaluated
    step: int = 0  # of the best evaluation
    value: float = 0.0
    count: int = 0  # evaluations since then
    rows: np.ndarray | None = None  # (examples, statistics) of the best one; None: there is none

    @property
    def is_over(self) -> bool:
        """Returns whether the run ends."""
        return self.settings.metric is not None and self.count >= self.settings.patience

    def add(self, step: int, value: float, rows: np.ndarray, paired: Paired) -> str:
        """Counts the evaluation after `step`; returns what it is, in words.

        `paired` returns the interval of the improvement from the first rows to the second.
        """
        if math.isnan(value):
            self.count += 1
            return f"{self.settings.metric} is not a number: {self._so_far()} without improvement"
        best, low, high = self.value, 0.0, 0.0
        if self.rows is not None:
            low, high = paired(str(self.settings.metric), self.rows, rows)
            if not low > self.settings.min_delta:
                self.count += 1
                return (
                    f"no improvement on {best:.4g} of step {self.step:,} (better by {low:.3g} to "
                    f"{high:.3g}, 95 % interval): {self._so_far()}"
                )
        before = f", better than {best:.4g} of step {self.step:,} by {low:.3g} to {high:.3g}"
        said = before if self.rows is not None else ""
        self.step, self.value, self.count, self.rows = step, value, 0, rows
        return f"the best {self.settings.metric} so far{said}"

    def _so_far(self) -> str:
        return f"{self.count} of {self.settings.patience}"

    def reason(self, step: int, total_steps: int) -> str:
        """Returns why the run ended."""
        metric, number = self.settings.metric, self.count
        return (
            f"stopped early after step {step:,} of {total_steps:,}: {number} evaluation"
            f"{'s' * (number > 1)} in a row did not improve {metric} on {self.value:.4g} of step "
            f"{self.step:,} (train.early_stopping)"
        )

    def save(self, folder: Path) -> dict[str, Any] | None:
        """Writes the best evaluation's rows; returns the other values for trainer.json."""
        if self.settings.metric is None:
            return None
        rows = np.zeros((0, 0)) if self.rows is None else self.rows
        np.save(folder / ROWS, rows, allow_pickle=False)
        return {
            "metric": self.settings.metric,
            "held_out_sha256": self.held_out_sha256,
            "step": self.step,
            "value": self.value,
            "count": self.count,
        }

    def restore(self, folder: Path, state: dict[str, Any] | None) -> None:
        """Continues from what `save` returned, unless another metric or data are watched now."""
        self.step, self.value, self.count, self.rows = 0, 0.0, 0, None
        own = {"metric": self.settings.metric, "held_out_sha256": self.held_out_sha256}
        if state is None or any(state.get(key) != value for key, value in own.items()):
            return
        try:
            rows = np.load(folder / ROWS, allow_pickle=False)
            self.step, self.count = int(state["step"]), int(state["count"])
            self.value, self.rows = float(state["value"]), rows if rows.size else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: cannot read {ROWS}: {error}") from None
