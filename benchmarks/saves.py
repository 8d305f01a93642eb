"""How long training stands still for a checkpoint, and what of it could be done beside it.

A save gathers, copies and writes tensors (which an asynchronous one could do later only from a copy
of them), then hashes, syncs, renames and prunes (which it could do later as it is). A step of the
same run is the measure.

    PYTHONPATH=.:tests:tests/support python benchmarks/saves.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
from rich.table import Table

from sft.cli import prepare_libraries
from sft.config.load import with_values
from sft.data import batches
from sft.models.adapt import add_adapters
from sft.runtime import checkpoint, disk
from sft.runtime.console import make_console, size
from sft.train.engine import Engine

SIZES = {
    "5M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 512},
    "60M": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10}
    | {"num_attention_heads": 10, "num_key_value_heads": 10, "vocab_size": 8192},
}
SAVES = 7


def make(folder: Path, name: str, mode: str) -> Engine:
    rows = tiny.examples(0, 32)
    settings = tiny.config(folder, global_batch=32, save_total_limit=2)
    model = tiny.llama(**SIZES[name])
    if mode == "lora":
        settings = with_values(settings, {"tuning.mode": "lora"})
        model = add_adapters(model.requires_grad_(False), settings.tuning)
    return tiny.make_engine(model, rows, rows, settings, batches.Budget(1024, "padded"))


def timed(spent: dict[str, float], name: str, action: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return action(*arguments, **options)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    return call


def measured(folder: Path, name: str, mode: str) -> dict[str, Any]:
    made, steps, saves = make(folder, name, mode), [], []
    for _ in range(SAVES + 1):
        started = time.perf_counter()
        made.optimizer_step()
        steps.append(time.perf_counter() - started)
        made.step += 1
        spent: dict[str, float] = {}
        parts = [
            mock.patch.object(made, "_write", timed(spent, "write", made._write)),
            mock.patch.object(checkpoint, "sha256", timed(spent, "hash", checkpoint.sha256)),
            mock.patch.object(checkpoint, "_sync", timed(spent, "sync", checkpoint._sync)),
            mock.patch.object(checkpoint, "prune", timed(spent, "prune", checkpoint.prune)),
        ]
        started = time.perf_counter()
        for part in parts:
            part.start()
        saved = made.save()
        for part in parts:
            part.stop()
        saves.append(spent | {"all": time.perf_counter() - started})
    medians = {key: statistics.median(save[key] for save in saves[1:]) for key in saves[0]}
    reported = {"model": name, "mode": mode, "checkpoint_bytes": disk.folder_bytes(saved)}
    return reported | {"step_seconds": statistics.median(steps[1:]), "save_seconds": medians}


def show(found: list[dict[str, Any]]) -> Table:
    table = Table(title="A checkpoint, and a step of the same run", title_justify="left", box=None)
    for column in ("model", "tuning"):
        table.add_column(column)
    for column in ("size", "step", "save", "write", "hash", "sync", "prune", "of 200 steps"):
        table.add_column(column, justify="right")
    for row in found:
        saves, step = row["save_seconds"], row["step_seconds"]
        cells = [f"{saves[key]:.3f} s" for key in ("all", "write", "hash", "sync", "prune")]
        share = saves["all"] / (200 * step + saves["all"])
        cells = [size(row["checkpoint_bytes"]), f"{step:.3f} s", *cells, f"{share:.1%}"]
        table.add_row(row["model"], row["mode"], *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/saves.json"))
    args = parser.parse_args()
    prepare_libraries()
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk, which /tmp may not be
        found = [
            measured(Path(folder, f"{name}_{mode}"), name, mode)
            for name in SIZES
            for mode in ("lora", "full")
        ]
    make_console().print(show(found))
    args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
