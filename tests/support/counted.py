"""Steps whose counters are compared: small shapes for real, and two processes on each engine.

counted.py CASES OUT, on two ranks: files of cases, and of what rank 0 exchanges in their steps.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from counting import Counting, Counts, weights_of
from shapes import architectures, configured, uniform_window

from sft.config.load import with_values
from sft.config.schema import Config
from sft.data.batches import Layout
from sft.plan import dry_run
from sft.plan.dry_run import Window
from sft.runtime.processes import start_processes
from sft.tasks.registry import load_run

TABLE = ROOT / "tests/fixtures/counters.txt"
UPDATE = "PYTHONPATH=.:tests:tests/support .venv/bin/python benchmarks/counters.py --small"
UPDATE_RANKS = UPDATE.replace("--small", "--parts ranks")
LLAMA = architectures(num_hidden_layers=1)["Llama"]
ROWS = (((24, 12), (17, 9)), ((30, 4), (30, 7)))  # micro-batches of (tokens, supervised)
SMALL = list(product(("lora", "qlora", "full"), ("padded", "packed"), (False, True)))
NUMBERS = ("launches", "syncs", "saved", "saved_weights", "moved", "flops")


def small_step(folder: Path, mode: str, layout: Layout, checkpointing: bool) -> Counts:
    """Returns the counts of a real step in bf16 on this CPU."""
    config = configured(folder, LLAMA, mode, gradient_checkpointing=checkpointing)
    made = dry_run.make_engine(config, "bf16", Window(ROWS, layout), weights=False)
    with Counting(weights_of(made.task.model)) as counting:
        made.optimizer_step()
    return counting.counts


def small_table() -> str:
    """Returns a line for each case, with the numbers of a step."""
    lines = [
        "# Counters of steps of small shapes (tests/support/counting.py says what they are), by",
        f"# {UPDATE}",
    ]
    lines.append(f"{'':30}" + "".join(f"{name[:9]:>10}" for name in NUMBERS))
    for mode, layout, checkpointing in SMALL:
        with tempfile.TemporaryDirectory() as folder:
            counts = small_step(Path(folder), mode, layout, checkpointing)
        name = f"{mode} {layout}{' checkpointing' if checkpointing else ''}"
        lines.append(f"{name:30}" + "".join(f"{getattr(counts, each):>10}" for each in NUMBERS))
    return "\n".join(lines) + "\n"


# --- two processes -------------------------------------------------------------------------------

WINDOW = uniform_window(4, 24, 24, micro_batches=2)  # of each rank


def rank_cases(folder: Path) -> Iterator[tuple[str, str, Config]]:
    """Yields (engine, tuning, configuration) of steps that exchange something."""

    def zero(stage: int) -> dict[str, Any]:
        file = folder / f"zero{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}), "utf-8")
        return {"engine": "deepspeed", "deepspeed_config": str(file)}

    engines = {"DDP": {}, "FSDP2": {"engine": "fsdp"}}
    engines |= {f"ZeRO-{stage}": zero(stage) for stage in (1, 2, 3)}
    for (name, train), mode in product(engines.items(), ("full", "lora")):
        config = configured(folder / "model", architectures()["Llama"], mode, **train)
        yield name, mode, with_values(config, {"train.gradient_checkpointing": False})


def exchange(config: Config) -> dict[str, int]:
    """Returns what a rank exchanges in the second step."""
    AcceleratorState._reset_state(False)  # Accelerate takes one DeepSpeed configuration a process
    accelerator = start_processes(config.train)
    made = dry_run.make_engine(config, "fp32", WINDOW, weights=False, accelerator=accelerator)
    made.optimizer_step()
    trained = sum(p.numel() for p in made.task.model.parameters() if p.requires_grad)
    trained = trained or sum(p.ds_numel for p in made.parallel.trained.values())  # type: ignore[attr-defined]
    with Counting(()) as counting:
        made.optimizer_step()
    counts = counting.counts
    found = {"collectives": counts.collectives, "exchanged": counts.exchanged}
    return found | {"syncs": counts.syncs, "trained_bytes": 4 * trained}


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    found = []
    for case in json.loads(cases.read_text("utf-8")):
        file = out.with_suffix(".yaml")
        if os.environ["RANK"] == "0":
            file.write_text(case.pop("config"), "utf-8")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        found.append(case | exchange(load_run(str(file))))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(found), "utf-8")
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort in its destructors


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
