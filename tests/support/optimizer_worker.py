"""Run by any number of ranks: optimizers of the table of docs/OPTIMIZERS.md, with one engine.

optimizer_worker.py OUT ENGINE NAME...; every rank writes OUT/ENGINE-NAME.rank<n>.pt
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from engine_worker import STEPS, make, rows, take_step

from sft.runtime import checkpoint

SETTINGS: dict[str, dict[str, Any]] = {  # besides the name
    "torch.optim.SGD": {"optimizer_args": {"momentum": 0.9, "nesterov": True}},
    "muon": {"optimizer_args": {"momentum": 0.9}, "adam_beta2": 0.95},
    "adafactor": {"optimizer_args": {"beta1": 0.9}},
}


def settings_of(name: str) -> dict[str, Any]:
    """Returns the keys of `train` that a case of this optimizer has."""
    own = {"optimizer": name, "learning_rate": 1e-2, "schedule": "constant"}
    return own | SETTINGS.get(name, {})


def try_out(engine: str, name: str, out: Path, own: list[torch.Tensor]) -> dict[str, Any]:
    """Returns what this rank sees of three steps, of which the last is made again by a resumed run.

    The weights that are saved are evaluated in between, which changes nothing.
    """
    parallel, accelerator = make(engine, out, **settings_of(name))
    for step in (0, 1):
        take_step(parallel, own[step])
    before = parallel.checksums()
    for _ in range(2):
        with parallel.averaged():
            saved = {key: value.clone() for key, value in parallel.weights().all().items()}
    assert parallel.checksums() == before
    folder = out / f"{engine}-{name}"
    folder.mkdir(exist_ok=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    checkpoint.save_optimizer(parallel.optimizer_shards(), folder, rank, world)
    if accelerator.is_main_process:
        torch.save(saved, folder / "weights.pt")
    accelerator.wait_for_everyone()
    take_step(parallel, own[2])
    trained = parallel.checksums()
    with parallel.averaged():
        weights = {key: value.clone() for key, value in parallel.weights().all().items()}
    resumed, _ = make(engine, out, **settings_of(name))
    take_step(resumed, own[2])  # it had another state before
    load(resumed, folder)
    loaded = resumed.checksums()
    take_step(resumed, own[2])
    found: dict[str, Any] = {"loaded": loaded == before, "resumed": resumed.checksums() == trained}
    if engine != "one" and (other := out / f"one-{name}").exists():
        load(resumed, other)
        found["from one"] = step_from(resumed, own[2])
    return found | {"weights": weights, "saved": saved}


def load(parallel: Any, folder: Path) -> None:
    """Loads the weights and the optimizer's state that any engine saved after two steps."""
    for key, value in torch.load(folder / "weights.pt").items():
        if key in parallel.trained:
            parallel.set_weight(key, value)
    with checkpoint.OptimizerState(folder) as state:
        parallel.load_optimizer(2, state.read)


def step_from(parallel: Any, own: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the weights after one more step."""
    take_step(parallel, own)
    with parallel.averaged():
        return {key: value.clone() for key, value in parallel.weights().all().items()}


def main(out: Path, engine: str, names: list[str]) -> None:
    for name in names:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        own = [rows(step).chunk(world)[int(os.environ.get("RANK", "0"))] for step in range(STEPS)]
        seen = try_out(engine, name, out, own)
        torch.save(seen, out / f"{engine}-{name}.rank{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
