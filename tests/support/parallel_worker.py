"""Of a launcher, or forked: short runs of the nano model, in turn; ranks write what they saw.

parallel_worker.py CASES.json OUT, with cases as in tests/test_parallel.py.
"""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file

from sft.config.load import load_config
from sft.data import batches, cache
from sft.models import head, offload
from sft.runtime import checkpoint, processes
from sft.runtime.hardware import resolve_precision
from sft.runtime.processes import Context
from sft.tasks.registry import task_of
from sft.train import engine
from sft.train.compiled import compiled

offload.MIN_BYTES = 1  # the model is so small that nothing would be offloaded


def make(case: dict[str, Any], folder: Path) -> engine.Engine:
    AcceleratorState._reset_state(False)  # Accelerate takes one DeepSpeed configuration a process
    config = load_config("configs/nano.yaml", [*case["overrides"], f"train.output_dir={folder}"])
    prepared = cache.prepare(config)
    accelerator = processes.start_processes(config.train)
    shared_by = config.train.context_parallel
    budget = batches.Budget(case["max_tokens"], "padded", shared_by=shared_by)
    context = Context(accelerator)
    precision = resolve_precision(config.train)[0]
    task = task_of(config).build(config, prepared, precision, budget, context)
    made = engine.Engine(task, config.train, context)
    if rows := case.get("chunk_rows"):  # of logits; their weights' gradient does not count
        head.CHUNK_BYTES = 4 * rows * task.head._vocabulary()
        head.SupervisedHead._trained_bytes = lambda _: 0  # type: ignore[method-assign]
        task.head.prove(precision)
    return made


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    made = make(case, out / case["name"])
    backend = case.get("backend", "inductor")
    with compiled(made, required=True, backend=backend) as of_compiler:
        if case["prove"]:
            made.prove_saving()
        if case["resume"]:
            assert checkpoint.fault(Path(case["resume"])) is None
            made.resume(Path(case["resume"]))
        steps = []
        while made.step < case["steps"]:
            ids, mine = made.window(made.step)
            values = made.optimizer_step()
            made.step += 1
            steps.append([ids, list(chain.from_iterable(mine)), values["train/loss"].hex()])
            made.keeper.settle(wait=False)
            if made.step in case["save_at"]:
                made.keeper.try_to_save(made.step, made._write)
        made.keeper.settle()
    metrics = made.evaluate() if case.get("evaluate", True) else {"loss": None}
    weights = made.parallel.weights().all()
    if made.accelerator.is_main_process:
        save_file({k: v.contiguous() for k, v in weights.items()}, out / f"{case['name']}.weights")
    return {
        "world_size": made.accelerator.num_processes,
        "engine": type(made.parallel).__name__,
        "spread": processes.describe_world(made.accelerator)["spread"],
        "steps": steps,
        "chunks": made.task.head.tail is not None,
        "why_whole": made.task.head.why_whole,
        "compiler": of_compiler,
        "held_out": metrics["loss"],
        "metrics": metrics,
        "rows": None if made.stopper.rows is None else made.stopper.rows.tolist(),
    }


def main(cases: Path, out: Path) -> None:
    for case in json.loads(cases.read_text("utf-8")):
        found = run(case, out)
        rank = PartialState().process_index
        (out / f"{case['name']}.rank{rank}.json").write_text(json.dumps(found), "utf-8")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
