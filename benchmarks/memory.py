"""Predicted memory against the truth: here, on GPUs of others, and how long a plan takes.

    PYTHONPATH=.:tests:tests/support python benchmarks/memory.py
        [--parts grid published processes distillation]

grid       The dry run against the same recorder on the real step, and against what the CPU
           allocator of the process really gave: architectures x tuning x checkpointing x windows.
published  Rows that others printed, by kind of tuning, with their step in place of ours where it
           differs (`published.Row`). Nothing is fitted to them; what they leave open is said in
           `unknown`, and why a number is left out in `excluded`.
processes  One of two real processes (DDP, FSDP2, ZeRO, offloading) against its prediction.
distillation  Both of these of a model of histories.
gpu        Real steps on a GPU, where there is one (not by default; not yet run).
budget     Likewise: the planned micro-batch against the largest that runs, found by bisection.
speed      `make plan` of an 8B and a 70B model: seconds and peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import forked
import memory_worker
import published
import torch
from accelerate import Accelerator
from allocations import FixedSegments, RoundedSizes, allocated_bytes
from published import LLAMA_8B, llama
from rich.console import Group
from rich.table import Table
from shapes import architectures, configured, uniform_window

from sft.cli import prepare_libraries
from sft.config.load import dump_config, with_values
from sft.config.schema import Config, RunConfig
from sft.errors import OutOfMemory
from sft.plan import choose, dry_run, memory, sharding
from sft.plan.dry_run import Window
from sft.runtime.console import make_console, table
from sft.runtime.processes import deepspeed_settings
from sft.tasks.distill.transformer import num_positions
from sft.tasks.registry import load_run

MIB = 2**20


# --- here --------------------------------------------------------------------------------------

ARCHITECTURES = architectures(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=4096,
    max_position_embeddings=1024,
)
WINDOWS = {
    "2 x 4 x 128": uniform_window(4, 128, 50, micro_batches=2),
    "1 x 4 x 512": uniform_window(4, 512, 200),
}


def grid(folder: Path) -> list[dict[str, Any]]:
    found = []
    modes = ("full", "lora", "qlora")
    for name, mode, checkpointing, (size, window) in product(
        ARCHITECTURES, modes, (False, True), WINDOWS.items()
    ):
        train = {"gradient_checkpointing": checkpointing}
        config = configured(folder, ARCHITECTURES[name], mode, **train)
        row = {"architecture": name, "mode": mode, "checkpointing": checkpointing, "window": size}
        found.append(row | against_real(config, window))
    return found


def against_real(config: RunConfig, window: Window) -> dict[str, Any]:
    fake = dry_run.trace_step(config, "fp32", window).peak().num_bytes
    real = [dry_run.make_engine(config, "fp32", window, weights=False) for _ in range(2)]
    tracked = dry_run.record_step(real[0]).peak().num_bytes
    true = allocated_bytes(real[1])
    return {
        "dry_run_bytes": fake,
        "tracked_bytes": tracked,
        "allocated_bytes": true,
        "against_tracker": fake / tracked - 1,
        "against_allocator": fake / true - 1,
    }


def show_grid(found: list[dict[str, Any]]) -> Table:
    columns = ("architecture", "tuning", "combinations", "MiB", "to tracker", "to allocator")
    result = table("The dry run against the real step, here", columns, [], left=2)
    for name, mode in product(ARCHITECTURES, ("full", "lora", "qlora")):
        rows = [r for r in found if (r["architecture"], r["mode"]) == (name, mode)]
        sizes = [r["dry_run_bytes"] / MIB for r in rows]
        worst = [
            max((r[k] for r in rows), key=abs) for k in ("against_tracker", "against_allocator")
        ]
        span = f"{min(sizes):,.0f} to {max(sizes):,.0f}"
        result.add_row(name, mode, str(len(rows)), span, *(f"{each:+.2%}" for each in worst))
    return result


# --- what others measured ----------------------------------------------------------------------

ALLOCATORS = {"fixed": FixedSegments, "rounded": RoundedSizes}
KINDS = ("full", "LoRA", "QLoRA", "sharded", "DDP")


def against_published(folder: Path) -> dict[str, Any]:
    """Compares every published step, and returns those that are none with the reason."""
    found = [against_row(row, folder / str(n)) for n, row in enumerate(published.rows())]
    return {"rows": found, "excluded": published.EXCLUDED}


def against_row(row: published.Row, folder: Path) -> dict[str, Any]:
    num_bytes, method = predict_row(row, folder)
    result = {
        "kind": row.kind,
        "source": row.source,
        "what": row.what,
        "measured_bytes": row.measured_bytes,
        "predicted_bytes": num_bytes,
        "error": num_bytes / row.measured_bytes - 1,
        "is_bound": row.is_bound,
        "method": method,
        "unknown": row.unknown,
    }
    if row.old_nf4:  # what today's bitsandbytes takes
        today, _ = predict_row(replace(row, old_nf4=False), folder / "today")
        result["error_today"] = today / row.measured_bytes - 1
    return result


def predict_row(row: published.Row, folder: Path) -> tuple[int, str]:
    config = configured(folder, row.architecture, **{"gradient_checkpointing": False} | row.train)
    config = with_values(config, {f"tuning.{key}": each for key, each in row.tuning.items()})
    with published.their_step(row):
        predicted = memory.predict(config, row.precision, row.window, on_gpu=True, group=row.group)
        if not row.reserved:
            return predicted.allocated, predicted.method
        if row.allocator == "growing":
            return predicted.reserved, predicted.method
        trace = dry_run.trace_step(config, row.precision, row.window, on_gpu=True)
        untraced = predicted.allocated - trace.peak().num_bytes
        return trace.reserved(ALLOCATORS[row.allocator]()) + untraced, "traced"


def summaries(found: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Yields (kind, number of rows, median error, worst row) of each kind."""
    for kind in KINDS:
        rows = [row for row in found if row["kind"] == kind and not row["is_bound"]]
        if not rows:
            yield kind, "0", "-", "no published number is of this kind; see one of two processes"
            continue
        median = statistics.median(abs(row["error"]) for row in rows)
        worst = max(rows, key=lambda row: abs(row["error"]))
        name = f"{worst['error']:+.1%} ({worst['source']}, {worst['what']})"
        yield kind, str(len(rows)), f"{median:.1%}", name


def show_published(values: dict[str, Any]) -> Group:
    found = values["rows"]
    title, columns = "Against what others measured", ("source", "run", "measured", "predicted")
    result = table(title, (*columns, "error"), [], left=2)
    for row in sorted(found, key=lambda row: KINDS.index(row["kind"])):
        measured, size = (
            f"{row[key] / 2**30:.1f} GiB" for key in ("measured_bytes", "predicted_bytes")
        )
        error = f"{row['error']:+.1%}"
        if row["is_bound"]:
            measured, error = f"more than {measured}", "fits" if row["error"] < 0 else "as measured"
        if "error_today" in row:
            error += f" ({row['error_today']:+.1%} with today's bitsandbytes)"
        result.add_row(row["source"], f"{row['kind']}: {row['what']}", measured, size, error)
    kinds = ("kind", "rows", "median error", "worst")
    left_out = table("Numbers that are left out", ("number", "reason"), values["excluded"], left=2)
    return Group(result, table("By kind", kinds, list(summaries(found)), left=1), left_out)


# --- speed -------------------------------------------------------------------------------------

LARGE = {
    "8B LoRA": (LLAMA_8B, "lora"),
    "8B full": (LLAMA_8B, "full"),
    "70B QLoRA": (llama(8192, 28672, 80, 64, 8, 128256), "qlora"),
}


def speed(folder: Path) -> list[dict[str, Any]]:
    found = []
    for name, (architecture, mode) in LARGE.items():
        architecture.save_pretrained(folder)
        command = [sys.executable, "scripts/plan.py", "--model", str(folder), "--tuning", mode]
        started = time.perf_counter()
        subprocess.run(
            [*command, "--seq", "4096", "--gpu", "H100-80GB"], check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        found.append({"what": name, "seconds": seconds, "peak_bytes_so_far": peak})
    return found


def show_speed(found: list[dict[str, Any]]) -> Table:
    result = table("make plan", ("model", "seconds", "peak RAM up to here"), [], left=1)
    for row in found:
        ram = f"{row['peak_bytes_so_far'] / 2**30:.2f} GiB"
        result.add_row(row["what"], f"{row['seconds']:.1f}", ram)
    return result


# --- several processes -------------------------------------------------------------------------

BUCKETS = (500_000, 50_000_000)  # elements


def engines(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    def zero(stage: int, bucket: int, **more: Any) -> dict[str, Any]:
        values = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, **more}
        values |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        file = folder / f"zero{stage}_{bucket}{''.join(more)}.json"
        file.write_text(json.dumps({"zero_optimization": values}))
        return {"engine": "deepspeed", "deepspeed_config": str(file)}

    yield "DDP", {}
    yield "FSDP2", {"engine": "fsdp"}
    yield "FSDP2, offload", {"engine": "fsdp", "offload": True}
    for stage, bucket in product((1, 2, 3), BUCKETS):
        yield f"ZeRO-{stage}, buckets of {bucket:,}", zero(stage, bucket)
    for stage in (2, 3):
        yield f"ZeRO-{stage}, offload", zero(stage, BUCKETS[0], offload_optimizer={"device": "cpu"})


def processes(folder: Path) -> list[dict[str, Any]]:
    found = []
    for (name, train), mode in product(engines(folder), ("full", "lora")):
        config = configured(folder, ARCHITECTURES["Llama"], mode, **train)
        config = with_values(config, {"train.gradient_checkpointing": False})
        found.append({"engine": name, "mode": mode} | one_of_two(config, folder))
    return found


def one_of_two(config: RunConfig, folder: Path, length: int | None = None) -> dict[str, Any]:
    """`length`: tokens of an example, if another than the worker asks for."""
    file, out = folder / "run.yaml", folder / "peak"
    file.write_text(dump_config(config))
    forked.launch(2, ["tests/support/memory_worker.py", str(file), str(out)])
    (rows, _) = memory_worker.WINDOW.micro_batches
    if length:
        rows = ((length, length),) * len(rows)
    window = Window((rows,), gradients=True, waiting=len(rows) * rows[0][0])
    zero = {}
    if config.train.deepspeed_config:
        zero = deepspeed_settings(config.train)["zero_optimization"]
    group = sharding.Group(2, config.train.engine, accumulates=True, zero=zero)
    taken = memory.predict(config, "fp32", window, on_gpu=False, group=group)
    predicted = taken.allocated - taken.breakdown.get("examples", 0)  # the worker has none
    measured = int(out.read_text())
    error = predicted / measured - 1
    return {"measured_bytes": measured, "predicted_bytes": predicted, "error": error}


def show_processes(found: list[dict[str, Any]]) -> Table:
    result = table(
        "One of two processes, here",
        ("engine", "tuning", "measured", "predicted", "error"),
        [],
        left=2,
    )
    for row in found:
        sizes = (f"{row[key] / MIB:,.0f} MiB" for key in ("measured_bytes", "predicted_bytes"))
        result.add_row(row["engine"], row["mode"], *sizes, f"{row['error']:+.2%}")
    return result


# --- distillation ------------------------------------------------------------------------------

HISTORIES: dict[str, dict[str, Any]] = {
    "as configured": {},
    "compressed": {"distill.compress": True},
    "dropout": {"distill.dropout": 0.1},
    "256 wide, 6 layers": {"distill.width": 256, "distill.num_layers": 6},
}


def distillation(folder: Path) -> list[dict[str, Any]]:
    config, found = load_run("configs/ad_darkroom.yaml"), []
    for (name, changes), number in product(HISTORIES.items(), (1, 4)):
        changed = with_values(config, changes)
        window = uniform_window(64 // number, num_positions(changed.distill), 120, number)
        values = {"model": name, "how": f"{number} micro-batch(es)"}
        found.append(values | against_real(changed, window))
    wide = "256 wide, 6 layers"  # so that weights and gradients count for something
    for engine, train in engines(folder):
        values = HISTORIES[wide] | {f"train.{key}": value for key, value in train.items()}
        row = one_of_two(with_values(config, values), folder, num_positions(config.distill))
        found.append({"model": wide, "how": engine} | row)
    return found


def show_distillation(found: list[dict[str, Any]]) -> Table:
    columns = ("model", "step, or engine of two processes", "measured", "predicted", "error")
    result = table("Distillation, here", columns, [], left=2)
    for row in found:
        measured = row.get("allocated_bytes") or row["measured_bytes"]
        predicted = row.get("dry_run_bytes") or row["predicted_bytes"]
        sizes = (f"{each / MIB:,.1f} MiB" for each in (measured, predicted))
        result.add_row(row["model"], row["how"], *sizes, f"{predicted / measured - 1:+.2%}")
    return result


# --- a GPU of our own ----------------------------------------------------------------------------

SHAPES = {
    "135M": llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "1.1B": llama(2048, 5632, 22, 32, 4, 32000),
    "8B": LLAMA_8B,
}
STEPS = [  # shape, mode, checkpointing, rows x tokens
    *product(["135M"], ["full", "lora"], [False, True], [(8, 512), (2, 4096)]),
    *product(["1.1B"], ["full", "lora", "qlora"], [False, True], [(2, 2048)]),
    *product(["1.1B"], ["lora"], [False, True], [(1, 8192)]),
    *product(["8B"], ["lora", "qlora"], [True], [(1, 512), (1, 4096), (2, 2048)]),
]


def gpu(folder: Path) -> list[dict[str, Any]]:
    """Real steps on a GPU with random weights, against what is predicted for them."""
    if not torch.cuda.is_available():
        raise SystemExit("the part gpu needs a GPU that torch can use")
    accelerator, found = Accelerator(mixed_precision="bf16"), []
    for number, (name, mode, checkpointing, (rows, length)) in enumerate(STEPS):
        train = {"gradient_checkpointing": checkpointing}
        config = configured(folder / str(number), SHAPES[name], mode, **train)
        window = uniform_window(rows, length, length, micro_batches=2)
        one = replace(uniform_window(rows, length, length), gradients=True)
        predicted = memory.predict(config, "bf16", one, on_gpu=True)
        torch.cuda.empty_cache()
        made = dry_run.make_engine(config, "bf16", window, weights=False, accelerator=accelerator)
        made.optimizer_step()
        torch.cuda.reset_peak_memory_stats()
        made.optimizer_step()
        values = {"what": f"{name} {mode}{' + ckpt' if checkpointing else ''}, {rows} x {length}"}
        measured = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        for kind, true, expected in zip(
            ("allocated", "reserved"),
            measured,
            (predicted.allocated, predicted.reserved),
            strict=True,
        ):
            values |= {f"{kind}_bytes": true, f"{kind}_error": expected / true - 1}
        found.append(values | {"breakdown": predicted.breakdown})
        print(json.dumps(values), flush=True)  # a time limit may end it before the table
        accelerator.free_memory(made.model, made.optimizer)
        del made
    return found


def largest(fits: Callable[[int], bool], most: int = 4096) -> int:
    """The largest number of rows that fits, found by bisection; 0 if one does not."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


BUDGETS = (
    ("135M", "full", False, 1024),
    ("1.1B", "lora", False, 2048),
    ("1.1B", "full", True, 4096),
    ("8B", "qlora", True, 2048),
)


def budget(folder: Path) -> list[dict[str, Any]]:
    """The rows that the plan would give a micro-batch, against the most that run on this GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("the part budget needs a GPU that torch can use")
    accelerator, found = Accelerator(mixed_precision="bf16"), []
    room = (1 - choose.MARGIN["cuda"]) * torch.cuda.mem_get_info()[0]
    for name, mode, checkpointing, length in BUDGETS:
        train = {"gradient_checkpointing": checkpointing}
        config = configured(folder / f"{name}{mode}{length}", SHAPES[name], mode, **train)
        run = partial(_runs, config, accelerator, length)
        chosen, most = largest(partial(_planned, config, room, length)), largest(run)
        values = {"what": f"{name} {mode}{' + ckpt' if checkpointing else ''}, rows of {length}"}
        found.append(values | {"planned_rows": chosen, "most_rows": most, "runs": run(chosen)})
        print(json.dumps(found[-1]), flush=True)
    return found


def _planned(config: Config, room: float, length: int, rows: int) -> bool:
    window = replace(uniform_window(rows, length, length), gradients=True)
    return memory.predict(config, "bf16", window, on_gpu=True).reserved <= room


def _runs(config: Config, accelerator: Accelerator, length: int, rows: int) -> bool:
    window, made = uniform_window(rows, length, length, micro_batches=2), None
    options: dict[str, Any] = {"weights": False, "accelerator": accelerator}
    try:
        made = dry_run.make_engine(config, "bf16", window, **options)
        for _ in range(2):
            made.optimizer_step()
        return True
    except (torch.OutOfMemoryError, OutOfMemory):
        return False
    finally:
        if made is not None:
            accelerator.free_memory(made.model, made.optimizer)
        del made
        torch.cuda.empty_cache()


def show_budget(found: list[dict[str, Any]]) -> Table:
    result = table(
        "The largest micro-batch", ("step", "planned", "runs", "share", "fits"), [], left=1
    )
    for row in found:
        chosen, true = row["planned_rows"], row["most_rows"]
        share = f"{chosen / true:.0%}" if true else "-"
        result.add_row(row["what"], str(chosen), str(true), share, str(row["runs"]))
    return result


def show_gpu(found: list[dict[str, Any]]) -> Table:
    result = table(
        "Real steps on this GPU", ("step", "allocated", "error", "reserved", "error"), [], left=1
    )
    for row in found:
        cells = [row["what"]]
        for kind in ("allocated", "reserved"):
            size, error = row[f"{kind}_bytes"], row[f"{kind}_error"]
            cells += [f"{size / 2**30:.2f} GiB", f"{error:+.1%}"]
        result.add_row(*cells)
    for title, pick in (("median", statistics.median), ("worst", max)):
        cells = [title]
        for kind in ("allocated", "reserved"):
            cells += ["", f"{pick([abs(row[f'{kind}_error']) for row in found]):.1%}"]
        result.add_row(*cells)
    return result


PARTS = {
    "processes": (processes, show_processes),
    "speed": (speed, show_speed),
    "grid": (grid, show_grid),
    "distillation": (distillation, show_distillation),
    "published": (against_published, show_published),
    "gpu": (gpu, show_gpu),
    "budget": (budget, show_budget),
}
ON_GPU = ("gpu", "budget")
HERE = [part for part in PARTS if part not in ON_GPU]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=HERE, choices=PARTS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/memory.json"))
    args = parser.parse_args()
    prepare_libraries()
    values = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
    for part in args.parts:
        run, show = PARTS[part]
        with tempfile.TemporaryDirectory() as folder:
            values[part] = run(Path(folder))
        make_console().print(show(values[part]))
        args.json.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
