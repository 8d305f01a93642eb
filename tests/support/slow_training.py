"""slow_training.py SECONDS ARGUMENT ...: train_distributed with longer steps."""

from __future__ import annotations

import runpy
import sys
import time

from sft.train.engine import Engine

TRAINING = "scripts/train_distributed.py"


def main(seconds: float, arguments: list[str]) -> None:
    step = Engine.optimizer_step

    def slow(engine: Engine) -> dict[str, float]:
        time.sleep(seconds)
        return step(engine)

    Engine.optimizer_step = slow  # type: ignore[method-assign]
    sys.argv = [TRAINING, *arguments]
    runpy.run_path(TRAINING, run_name="__main__")


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
