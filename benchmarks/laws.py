"""Law 1 as a table: how far a run on other processes is from the run of one.

    PYTHONPATH=.:tests:tests/support python benchmarks/laws.py [--modes lora full qlora]

The embedded model, cut to two layers, makes six optimizer steps in fp32 on the CPU, which are more
than an epoch. Each row is one way to run them, against one process. It has the largest relative
difference of the loss of a step, that of the held-out loss at the end, and the norm of the
difference of the final weights, relative to their norm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import tiny
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
STEPS = 6
WAYS: list[tuple[str, int, list[str]]] = [  # name, processes, overrides
    ("other micro-batches", 1, []),
    ("DDP", 2, []),
    ("DDP", 3, []),
    ("FSDP2", 2, ["train.engine=fsdp"]),
    ("FSDP2", 4, ["train.engine=fsdp"]),
    ("FSDP2, offloaded", 2, ["train.engine=fsdp", "train.offload=true"]),
    ("HSDP, groups of 2", 4, ["train.engine=fsdp", "train.shard_within=2"]),
    ("ZeRO-2", 2, ["train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z2.json"]),
    ("ZeRO-3", 2, ["train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z3.json"]),
    ("rows shared by 2, DDP", 2, ["train.context_parallel=2"]),
    ("rows shared by 3, DDP", 3, ["train.context_parallel=3"]),
    ("rows shared by 2, FSDP2", 4, ["train.engine=fsdp", "train.context_parallel=2"]),
]


def case(name: str, model: str, mode: str, tokens: int, overrides: list[str]) -> dict[str, Any]:
    """Returns a run as tests/support/parallel_worker.py takes it."""
    common = [f"model.name={model}", f"tuning.mode={mode}", "data.max_rows=24"]
    common += ["data.eval_path=null", "data.eval_fraction=0.334", "train.global_batch=4"]
    common += [f"train.max_steps={STEPS}", "train.learning_rate=1e-3", "train.precision=fp32"]
    what = {"name": name, "overrides": common + overrides, "max_tokens": tokens, "steps": STEPS}
    return what | {"resume": "", "save_at": [], "prove": False}


def run(folder: Path, world: int, given: dict[str, Any]) -> None:
    """Raises RuntimeError if a rank wrote nothing; gloo may abort after all work is done."""
    cases, log = folder / "cases.json", folder / f"{given['name']}.log"
    cases.write_text(json.dumps([given]))
    worker = ["tests/support/parallel_worker.py", str(cases), str(folder)]
    forked.start(world, worker, log).join()
    if len(list(folder.glob(f"{given['name']}.rank*.json"))) != world:
        raise RuntimeError(log.read_text(errors="replace")[-4000:])


def result(folder: Path, name: str) -> tuple[list[float], float, torch.Tensor]:
    """Returns the losses of the steps, the held-out loss and the flat final weights, in fp64."""
    found = json.loads((folder / f"{name}.rank0.json").read_text())
    weights = load_file(folder / f"{name}.weights")
    flat = torch.cat([weights[key].double().flatten() for key in sorted(weights)])
    return [float.fromhex(loss) for _, _, loss in found["steps"]], found["held_out"], flat


def compare(mode: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields a row for each way."""
    model = tiny.shallow_nano(folder)
    run(folder, 1, case("alone", model, mode, 400, []))
    losses, held_out, weights = result(folder, "alone")
    for number, (way, world, overrides) in enumerate(WAYS):
        run(folder, world, case(f"way{number}", model, mode, 200, overrides))
        found, found_held_out, found_weights = result(folder, f"way{number}")
        errors = [abs(a - b) / b for a, b in zip(found, losses, strict=True)]
        yield {
            "mode": mode,
            "way": way,
            "processes": world,
            "loss": max(errors),
            "held_out": abs(found_held_out - held_out) / held_out,
            "weights": float((found_weights - weights).norm() / weights.norm()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--modes", nargs="+", default=["lora", "full", "qlora"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/laws.json")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for mode in given.modes:
        with tempfile.TemporaryDirectory() as folder:
            for row in compare(mode, Path(folder)):
                rows.append(row)
                errors = "".join(f"{row[key]:>12.1e}" for key in ("loss", "held_out", "weights"))
                print(f"{mode:6} {row['way']:26} {row['processes']} {errors}", flush=True)
                given.out.write_text(json.dumps({"steps": STEPS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
