"""Run by several ranks: steps of small models, and what ranks exchange in the last one.

exchange_worker.py CASES.json OUT, with cases as in tests/test_exchange.py; rank 0 writes OUT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from counting import Counting
from shapes import uniform_window

from sft.models import head
from sft.models.rounded import Casts
from sft.plan import dry_run
from sft.runtime.hardware import resolve_precision
from sft.runtime.processes import start_processes
from sft.tasks.registry import load_run
from sft.train.parallel import fsdp, gathered

STEPS, ROWS = 2, 4  # rows of a micro-batch, over all ranks


def run(case: dict[str, Any]) -> dict[str, Any]:
    AcceleratorState._reset_state(False)  # Accelerate takes one DeepSpeed configuration a process
    config = load_run(case["config"])
    accelerator = start_processes(config.train)
    torch.manual_seed(0)  # the same random weights on all ranks and in all cases
    window = uniform_window(ROWS // accelerator.num_processes, 24, 24, micro_batches=2)
    precision = resolve_precision(config.train)[0]
    made = dry_run.make_engine(config, precision, window, weights=False, accelerator=accelerator)
    if rows := case.get("chunk_rows"):  # of logits; their weights' gradient does not count
        head.CHUNK_BYTES = 4 * rows * made.task.head._vocabulary()
        head.SupervisedHead._trained_bytes = lambda _: 0  # type: ignore[method-assign]
        made.task.prove_head(precision)
    steps = []
    for _ in range(STEPS):
        with Counting(()) as counting:
            values = made.optimizer_step()
        steps.append([values["train/loss"].hex(), values["train/grad_norm"].hex()])
    sums = {
        name: float(w.double().sum()).hex() for name, w in made.parallel.gather_weights().items()
    }
    sharded = isinstance(made.parallel, fsdp.Sharded)
    records = gathered.parameters_of(made.task.model) if sharded else ()
    counts = counting.counts
    return {
        "world_size": accelerator.num_processes,
        "steps": steps,
        "sums": sums,
        "chunks": made.task.head.tail is not None,
        "rounded": sum(each._orig_size.numel() for each in records if each.gathered_dtype),
        "collectives": counts.collectives,
        "exchanged": counts.exchanged,
    }


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    found, find = {}, fsdp.find_casts
    for case in json.loads(cases.read_text("utf-8")):
        fsdp.find_casts = (lambda *_: Casts()) if case.get("as_stored") else find
        found[case["name"]] = run(case)
    state = PartialState()
    if state.is_main_process:
        out.write_text(json.dumps(found), "utf-8")
    state.wait_for_everyone()
    os._exit(0)  # gloo may abort in its destructors


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
