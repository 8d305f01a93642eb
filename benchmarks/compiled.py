"""Processor seconds of training steps with and without `train.compile`, and of collating them.

    PYTHONPATH=. .venv/bin/python benchmarks/compiled.py [--steps 4] [--only nano 60M]

Each case is one process on one thread: the embedded nano model on its own rows, and a Llama of
about 60M parameters (random weights) on rows of 32 to 512 tokens, full and LoRA. The step is that
of the engine. Steps are timed in pairs of the same examples, eager and compiled in turn, by the
processor time of the process, so that other work on the machine counts little; the gain is the
ratio of the sums, its range that of the pairs. `break_even_steps`: those that earn the processor
time of compiling back, that of the C++ compiler included. `collate_share`: of an eager step, to
choose and cut the global batch and to lay out its micro-batches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
from rich.table import Table

from sft.config.load import load_config
from sft.data import batches, cache
from sft.models import load
from sft.models.layers import repeated_layers
from sft.runtime import processes
from sft.runtime.console import make_console
from sft.runtime.processes import Context
from sft.tasks.sft.task import FineTune
from sft.train import compiled
from sft.train.engine import Engine

RESULTS = Path(__file__).parent / "results/compiled.json"
SHAPE = {  # 12 layers, 57M parameters
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 16384,
    "max_position_embeddings": 1024,
}
CASES = {
    "nano lora": ["tuning.mode=lora"],
    "nano full": ["tuning.mode=full"],
    "60M lora": ["tuning.mode=lora"],
    "60M full": ["tuning.mode=full"],
}


def make(case: str, folder: Path) -> Engine:
    overrides = [*CASES[case], f"train.output_dir={folder / 'run'}", "train.precision=fp32"]
    overrides += ["data.max_rows=2000", f"data.cache_dir={folder / 'cache'}"]
    if is_large := case.startswith("60M"):
        shape = json.loads(Path("nano/model/config.json").read_text("utf-8")) | SHAPE
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(json.dumps(shape), "utf-8")
        overrides += [f"model.name={folder / 'model'}", "train.global_batch=8"]
    config = load_config("configs/nano.yaml", overrides)
    accelerator = processes.start_processes(config.train)
    if is_large:
        lengths = np.random.default_rng(0).integers(32, 513, 64)
        prepared: Any = FineTune.blank_data(config, [(int(n), int(n) // 2) for n in lengths])
    else:
        prepared = cache.prepare(config)
    context = Context(accelerator)
    model = load.build(config, "fp32", accelerator.device, weights=not is_large)
    task = FineTune(config, prepared, model, batches.Budget(2048, "padded", 64), context)
    train = config.train.model_copy(update={"compile": True})
    return Engine(task, train, context)


def measure(case: str, folder: Path, steps: int) -> dict[str, Any]:
    engine = make(case, folder)
    collating = 0.0

    def timed(function: Any) -> Any:
        def call(*given: Any) -> Any:
            nonlocal collating
            started = time.process_time()
            result = function(*given)
            collating += time.process_time() - started
            return result

        return call

    engine.collate, engine.window = timed(engine.collate), timed(engine.window)  # type: ignore[method-assign]
    engine.optimizer_step()  # allocates
    seconds: dict[bool, list[float]] = {True: [], False: []}
    before, compiler = os.times(), time.perf_counter()
    layers = repeated_layers(engine.task.model)
    tokens, share = 0.0, list[float]()
    with compiled.compiled(engine, required=True) as values:
        after = os.times()
        compiler = time.perf_counter() - compiler
        made = [layer.forward for layer in layers]
        for step in range(1, steps + 1):
            for compiles in (False, True):
                for layer, forward in zip(layers, made, strict=True):
                    vars(layer).pop("forward", None)
                    if compiles:
                        layer.forward = forward
                engine.step, collating, started = step, 0.0, time.process_time()
                done = engine.optimizer_step()
                seconds[compiles].append(time.process_time() - started)
                if not compiles:
                    share.append(collating / seconds[False][-1])
                    tokens += done["train/tokens"]
    eager, fast = sum(seconds[False]), sum(seconds[True])
    spent = sum(after[:4]) - sum(before[:4])
    pairs = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
    return {
        "case": case,
        "parameters": sum(p.numel() for p in engine.task.model.parameters()),
        "tokens_per_second_eager": tokens / eager,
        "tokens_per_second_compiled": tokens / fast,
        "gain": eager / fast - 1,
        "gain_range": [min(pairs) - 1, max(pairs) - 1],
        "compile_seconds": spent,
        "compile_wall_seconds": compiler,
        "break_even_steps": round(spent / max(1e-9, (eager - fast) / steps))
        if eager > fast
        else None,
        "break_even_seconds": spent / (eager - fast) * eager if eager > fast else None,
        "step_seconds_eager": eager / steps,
        "collate_share": sum(share) / steps,
        "steps": steps,
        **{key: values[key] for key in ("compiled_graphs", "graph_breaks", "recompilations")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="names or their beginnings")
    parser.add_argument("--one", help="used by the program itself")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.one, Path(folder), args.steps)))
        return
    rows = []
    for case in CASES:
        if case.startswith(tuple(args.only)):
            command = [sys.executable, __file__, "--one", case, "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(
        "case", "eager tok/s", "compiled", "gain", "compile s", "break-even s", "collate %"
    )
    for row in rows:
        cells = [f"{row[f'tokens_per_second_{each}']:,.0f}" for each in ("eager", "compiled")]
        even = "-" if row["break_even_seconds"] is None else f"{row['break_even_seconds']:,.0f}"
        cells += [f"{row['gain']:.1%}", f"{row['compile_seconds']:.0f}", even]
        table.add_row(row["case"], *cells, f"{row['collate_share']:.2%}")
    make_console().print(table)
    versions = {"torch": torch.__version__, "threads": 1}
    args.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
