"""The loss scale of fp16: losses are multiplied by it, so that small gradients do not vanish.

fp16 represents no number below 6e-8 and none above 65,504 (Micikevicius et al. 2018, Mixed
Precision Training, section 3.2). The scale doubles after `INTERVAL` updates, and halves when a
gradient overflows; these are the numbers of `torch.amp.GradScaler`. That class skips the update of
a step that overflows. Then the examples of the step would be lost, and which steps these are would
depend on the cut. Here the same global batch is computed again with half the scale. All scales are
powers of two, so they change no gradient that neither overflows nor vanishes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FIRST, LEAST, INTERVAL = 2.0**16, 1.0, 2000  # scales; updates between two doublings


@dataclass
class LossScale:
    """The scale, and what it depends on. It is part of each checkpoint."""

    value: float = FIRST
    updates: int = 0
    """Updates since the scale last changed."""
    num_overflows: int = 0
    """How often a global batch was repeated with a smaller scale, in the whole run."""

    @classmethod
    def restore(cls, saved: Any) -> LossScale:
        """Returns the scale that a checkpoint holds, or a new one if it has none (`saved`: None).

        Raises ValueError if `saved` is not what `dataclasses.asdict` makes of a scale.
        """
        if saved is None:
            return cls()
        try:
            found = cls(float(saved["value"]), int(saved["updates"]), int(saved["num_overflows"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a loss scale: {saved}") from error
        counts = found.updates, found.num_overflows
        if not (LEAST <= found.value < math.inf and min(counts) >= 0):
            raise ValueError(f"not a loss scale: {saved}")
        return found

    def halve(self) -> bool:
        """Halves the scale after an overflow; returns False, unchanged, if it is `LEAST`."""
        if self.value <= LEAST:
            return False
        self.value, self.updates, self.num_overflows = self.value / 2, 0, self.num_overflows + 1
        return True

    def count_update(self) -> None:
        """Counts an update, and doubles the scale after `INTERVAL` of them without an overflow."""
        self.updates += 1
        if self.updates == INTERVAL:
            self.value, self.updates = self.value * 2, 0
