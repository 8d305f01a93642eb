"""Machines that join a run and machines that die, with torchrun's agents: the same global batches.

An agent stands for a machine. It is torch's own, started as docs/LAUNCH.md has it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, clean_environment

pytestmark = pytest.mark.slow
STEPS, PATIENCE = 40, 400  # seconds that a start of all processes takes at most


class Machines:
    """Agents of one run, each with one process; a step takes five seconds until `hurry`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.agents = folder, list[subprocess.Popen[bytes]]()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.endpoint = f"localhost:{free.getsockname()[1]}"
        self.environment = clean_environment(
            TORCH_ELASTIC_SHUTDOWN_TIMEOUT="600",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            HURRY=str(folder / "hurry"),
        )

    def add(self, *overrides: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:4"]
        command += ["--nproc-per-node", "1", "--max-restarts", "10", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", self.endpoint, "--rdzv-conf", "last_call_timeout=1"]
        command += ["tests/support/slow_training.py", "5", "--config", "configs/nano.yaml"]
        with (self.folder / f"machine{len(self.agents)}.log").open("wb") as log:
            agent = subprocess.Popen(
                [*command, *overrides, "train.resume_from_checkpoint=auto"],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.agents.append(agent)

    def kill(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.agents[number].pid, signal.SIGKILL)
        self.agents[number].wait()

    def hurry(self) -> None:
        (self.folder / "hurry").touch()

    def log(self) -> str:
        """Returns what all machines have said."""
        logs = sorted(self.folder.glob("machine*.log"))
        return "".join(f"{path.name}:\n{path.read_text(errors='replace')}" for path in logs)

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)


@pytest.fixture
def machines(tmp_path) -> Iterator[Machines]:
    found = Machines(tmp_path)
    try:
        yield found
    finally:
        for number in range(len(found.agents)):
            found.kill(number)


def losses(run: Path) -> list[tuple[int, float]]:
    """Returns (step, loss) of each line, in the order of the file."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    rows = (json.loads(line) for line in lines if line.endswith(b"\n"))
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def test_a_machine_joins_and_dies(tmp_path, machines, run_script):
    rows = (ROOT / "nano/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:24]))
    given = [f"model.name={tiny.shallow_nano(tmp_path)}", "tuning.mode=lora", "data.audit=warn"]
    given += [f"data.train_path={tmp_path}/rows.jsonl", "data.eval_path=null"]
    given += ["data.eval_fraction=0.2", "evaluation.num_examples=0", "train.global_batch=12"]
    given += [f"train.max_steps={STEPS}", "train.log_steps=1", "train.save_steps=1"]
    given += ["train.precision=fp32", "train.num_processes=null"]
    run, alone = tmp_path / "run", tmp_path / "alone"
    machines.add(*given, f"train.output_dir={run}")
    machines.wait(lambda: len(losses(run)) >= 2)
    machines.add(*given, f"train.output_dir={run}")
    machines.wait(lambda: "2 (ddp) on 2 machines" in machines.log())
    before = len(losses(run))
    machines.wait(lambda: len(losses(run)) > before)
    machines.kill(1)
    machines.hurry()
    assert machines.agents[0].wait(PATIENCE) == 0, machines.log()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["attempt"], status["step"]) == ("finished", 3, STEPS)
    found = losses(run)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    whole = run_script(
        "train.py", "--config", "configs/nano.yaml", *given, f"train.output_dir={alone}"
    )
    assert whole.returncode == 0, whole.stderr
    assert [loss for _, loss in found] == pytest.approx(
        [loss for _, loss in losses(alone)], rel=1e-4
    )
