"""Stands for Python in `train.sbatch` (PYTHON): runs its arguments, but for what the tests change.

TASK=ends: in place of the training, a task that ends at once.
TASK=waits: a task that waits for SIGTERM, saves, and ends with 75; in its next attempt, it ends.
TASK=trains: the training itself, slowly in its first attempt.
What a task was given goes to tasks.jsonl in the run folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("PROCID", "NTASKS", "NODEID", "CPUS_PER_TASK", "ARRAY_TASK_ID")
ATTEMPT = int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def main() -> None:
    program, *arguments = sys.argv[1:]
    if program != "scripts/train_distributed.py" or "--requeue-after" in arguments:
        os.execv(sys.executable, [sys.executable, program, *arguments])
    given = dict(each.split("=", 1) for each in arguments if "=" in each)
    folder = Path(given["train.output_dir"])
    (folder / ".ranks").mkdir(parents=True, exist_ok=True)
    if os.environ["TASK"] == "waits":
        wait(folder)
    note(folder, given)
    if os.environ["TASK"] == "trains":
        from slow_training import main as train

        train(0.0 if ATTEMPT else 1.0, arguments)


def wait(folder: Path) -> None:
    stops = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(time.monotonic()))
    note(folder, {"process": os.getpid()})
    if ATTEMPT:
        sys.exit(0)
    while not stops:
        time.sleep(0.05)
    time.sleep(4)  # the save takes longer than srun's patience
    note(folder, {"between signals": stops[-1] - stops[0]})
    if os.environ["SLURM_PROCID"] == "0":
        (folder / "checkpoint_step_1").mkdir()
        job = f"{os.environ['SLURM_JOB_ID']} {os.environ.get('SLURM_RESTART_COUNT', '-')}"
        (folder / ".ranks/attempt.json").write_text(json.dumps({"attempt": 1, "job": job}))
        (folder / "status.json").write_text('{"attempt": 1, "exit_code": 75}')
    sys.exit(75)


def note(folder: Path, more: dict[str, Any]) -> None:
    own: dict[str, Any] = {name: os.environ.get(f"SLURM_{name}") for name in NAMES}
    own |= {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "attempt": ATTEMPT}
    with (folder / "tasks.jsonl").open("a") as file:
        file.write(json.dumps(own | more) + "\n")


if __name__ == "__main__":
    main()
