"""Run by the launcher in place of a training script: launch_worker.py MODE FOLDER, on every rank.

signals: notes every signal, saves for a second after one that stops, ends with 75.
bug: rank 1 raises what nobody catches, the other then loses its peer.
run: a run in which rank 1 has another configuration, other data and another library.
world: trains one step of DDP and writes what it saw.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from sft import cli
from sft.config.load import load_config

MODE, FOLDER, RANK = sys.argv[1], Path(sys.argv[2]), int(os.environ.get("RANK", "0"))


def signals() -> None:
    stops = []

    def note(number: int, _: object) -> None:
        with (FOLDER / f"signals{RANK}").open("a") as file:
            file.write(f"{signal.Signals(number).name}\n")
        if number != signal.SIGUSR1:
            stops.append(number)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    (FOLDER / f"ready{RANK}").touch()
    while not stops:
        time.sleep(0.05)
    time.sleep(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when the first rank has ended
    (FOLDER / f"done{RANK}").touch()
    while len(list(FOLDER.glob("done*"))) < 2:
        time.sleep(0.05)
    if RANK == 0:
        (FOLDER / "status.json").write_text('{"exit_code": 75}')
    sys.exit(75)


def bug() -> None:
    if RANK == 1:
        raise ZeroDivisionError("the cause")
    time.sleep(1)  # the other has reported its error, and ends
    raise ConnectionError("connection closed by peer")


def run() -> None:
    rows = Path("nano/valid.jsonl").read_text().splitlines(keepends=True)
    path = FOLDER.with_name(f"rows{RANK}.jsonl")
    path.write_text("".join(rows[RANK : RANK + 20]))
    settings = [f"data.train_path={path}", f"data.eval_path={path}", f"train.output_dir={FOLDER}"]
    settings.append("data.audit=warn")  # the rows are held out as well
    rate = ["train.learning_rate=0.7"] if RANK else []
    config = load_config("configs/nano.yaml", [*settings, *rate])
    from sft import run
    from sft.runtime import hardware

    found = hardware.library_versions()
    if RANK == 1:
        hardware.library_versions = lambda: found | {"peft": "0.0.1"}
    run.train(config)


def world() -> None:
    import torch

    from sft.runtime import processes

    config = load_config("configs/nano.yaml", [f"train.output_dir={FOLDER}"])
    accelerator = processes.start_processes(config.train)
    rank = accelerator.process_index
    torch.manual_seed(0)
    model = accelerator.prepare(torch.nn.Linear(3, 1, bias=False))
    model(torch.full((1, 3), rank + 1.0, device=accelerator.device)).sum().backward()
    reported = {
        "world": accelerator.num_processes,
        "gradient": next(model.parameters()).grad.tolist(),
        **processes.describe_world(accelerator),
    }
    (FOLDER / f"rank{rank}.json").write_text(json.dumps(reported))
    processes.end_processes(accelerator)


if __name__ == "__main__":
    cli.run(globals()[MODE])
