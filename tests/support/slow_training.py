"""slow_training.py SECONDS ARGUMENT ...: train_distributed with longer steps.

Steps take no longer from the moment on at which the file of the variable HURRY exists.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from sft.train.engine import Engine

TRAINING = "scripts/train_distributed.py"


def main(seconds: float, arguments: list[str]) -> None:
    step, hurry = Engine.optimizer_step, Path(os.environ.get("HURRY", "/nowhere"))

    def slow(engine: Engine) -> dict[str, float]:
        time.sleep(0 if hurry.exists() else seconds)
        return step(engine)

    Engine.optimizer_step = slow  # type: ignore[method-assign]
    sys.argv = [TRAINING, *arguments]
    runpy.run_path(TRAINING, run_name="__main__")


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
