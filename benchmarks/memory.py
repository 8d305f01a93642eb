"""Predicted memory against the truth: here, on GPUs of others, and how long a plan takes.

    PYTHONPATH=.:tests:tests/support python benchmarks/memory.py
        [--parts grid published processes distillation]

grid       The dry run against the same recorder on the real step, and against what the CPU
           allocator of the process really gave: architectures x tuning x checkpointing x windows.
published  Rows that others printed, with their step in place of ours where it differs (see Row).
           Nothing is fitted to them; what they leave open is said in `unknown`.
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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import memory_worker
import torch
from accelerate import Accelerator
from allocations import FixedSegments, allocated_bytes
from conftest import launch
from rich.table import Table
from shapes import architectures, configured, uniform_window
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import LlamaConfig, PhiConfig, PretrainedConfig, Qwen2Config

from sft.cli import prepare_libraries
from sft.config.load import dump_config, with_values
from sft.config.schema import Config, RunConfig
from sft.errors import OutOfMemory
from sft.models import adapt, load
from sft.plan import choose, dry_run, memory, sharding
from sft.plan.dry_run import Window
from sft.runtime.console import make_console, table
from sft.runtime.processes import deepspeed_settings
from sft.tasks.distill.transformer import num_positions
from sft.tasks.registry import load_run
from sft.tasks.sft.task import FineTune

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


def llama(hidden: int, inter: int, layers: int, heads: int, kv: int, vocab: int, **more: Any):
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        max_position_embeddings=32768,
        **more,
    )


def qwen1(hidden: int, inter: int, layers: int, heads: int) -> PretrainedConfig:
    """Qwen (v1) in the shape of Qwen2: the same parts, with separate query, key and value."""
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )


LLAMA_3B = llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True)
LLAMA_8B = llama(4096, 14336, 32, 32, 8, 128256)
LLAMA2_7B, LLAMA2_13B = llama(4096, 11008, 32, 32, 32, 32000), llama(5120, 13824, 40, 40, 40, 32000)
PHI_15 = PhiConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
    vocab_size=51200, max_position_embeddings=2048, hidden_act="gelu_pytorch_tanh",
)  # fmt: skip
QV = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Row:
    """A published run."""

    source: str
    what: str
    architecture: PretrainedConfig
    tuning: dict[str, Any]
    window: Window
    measured_bytes: float
    unknown: str
    checkpointing: bool = False
    reserved: bool = True  # what was measured: reserved, or allocated
    autocast: bool = True  # else everything is computed in the dtype that it is stored in
    adapters: torch.dtype = torch.float32
    own_loss: bool = False
    native: bool = False  # a full trace through the allocator without expandable segments
    group: sharding.Group = sharding.ONE_PROCESS
    selective: bool = False  # layers keep attention and every second matrix product


def published() -> list[Row]:
    rows = []
    for rank, modules, mib in (
        (32, QV, 21260),
        (64, QV, 21508),
        (10, ["gate_proj", "up_proj", "down_proj"], 23554),
    ):
        rows.append(
            Row(
                "PEFT method comparison, L40S",
                f"Llama-3.2-3B LoRA r{rank} {'q,v' if modules is QV else 'MLP'}",
                LLAMA_3B,
                {"mode": "lora", "r": rank, "target_modules": modules},
                uniform_window(4, 699, 699),
                mib * MIB,
                "longest padded batch: 699 tokens, which the reference found from the first row",
                autocast=False,
                native=True,
                own_loss=True,
            )
        )
    for name, arch, layers in (
        ("phi-1.5", PHI_15, 1044),
        ("Llama-2 7B", LLAMA2_7B, 1304),
        ("Llama-2 13B", LLAMA2_13B, 1304),
    ):
        measured = {
            "phi-1.5": {1: 4.82, 2: 6.76, 4: 10.68},
            "Llama-2 7B": {1: 21.30, 2: 29.07},
            "Llama-2 13B": {1: 38.12},
        }[name]
        for number, gb in measured.items():
            rows.append(
                Row(
                    "LitGPT, A100-40GB",
                    f"{name} LoRA r8 q,v, micro-batch {number}",
                    arch,
                    {"mode": "lora", "r": 8, "target_modules": QV},
                    uniform_window(number, layers, layers),
                    gb * 1e9,
                    "its own model code and loss; whether the longest rows meet in one batch",
                    reserved=False,
                    autocast=False,
                    adapters=torch.bfloat16,
                )
            )
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    for name, arch, sizes in (
        ("1.8B", qwen1(2048, 5504, 24, 16), (6.7, 7.4, 8.4, 11.0, 16.2, 21.8)),
        ("7B", qwen1(4096, 11008, 32, 32), (20.1, 20.4, 21.5, 23.8, 29.7, 36.6)),
    ):
        for length, gb in zip(lengths, sizes, strict=True):
            rows.append(
                Row(
                    "Qwen README, A100-80GB",
                    f"Qwen {name} LoRA r64, {length} tokens",
                    arch,
                    {"mode": "lora", "r": 64, "target_modules": "auto"},
                    uniform_window(1, length, length),
                    gb * 1e9,
                    "what was read (taken as reserved, 1e9 bytes), dtypes of adapters, engine",
                    checkpointing=True,
                )
            )
    for world, gib in ((8, 82.4), (128, 67.0)):
        rows.append(
            Row(
                f"torchtitan, {world} x H100",
                "Llama-3.1 8B full, FSDP2, 2 rows of 8,192 tokens",
                LLAMA_8B,
                {"mode": "full"},
                uniform_window(2, 8192, 8192),
                gib * 2**30,
                "which operations its checkpointing keeps (taken: every second product); what was "
                "read (taken as reserved); it gathers bf16, and head and embedding on their own",
                checkpointing=True,
                selective=True,
                group=sharding.Group(world, "fsdp"),
            )
        )
    return rows


CHECKPOINT = "transformers.modeling_utils.checkpoint"


def selective(function: Any, *arguments: Any, **options: Any) -> Any:
    """Checkpointing as torchtitan's option "op": attention and every second matrix product are
    kept, the rest is computed again."""
    seen = Counter[bool]()

    def policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operation is torch.ops.aten.mm.default:
            seen[context.is_recompute] += 1
            keeps = seen[context.is_recompute] % 2 == 1
        else:
            keeps = "scaled_dot_product" in str(operation)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)


@contextmanager
def their_step(row: Row) -> Iterator[None]:
    """Where their step differs from ours."""
    prepare = dry_run.CpuAccelerator.prepare

    def plain(_: Any, built: Any, optimizer: Any) -> tuple[Any, Any]:
        return built, optimizer

    def loss(task: Any, built: Any, batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """transformers' own, of all tokens; a padded batch has a mask, and outputs are kept."""
        rows, length = batch.input_ids.shape
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
        task.kept = built(input_ids=batch.input_ids, attention_mask=mask, labels=batch.input_ids)
        return task.kept.loss, {}

    def added(base: nn.Module, config: Config) -> Any:
        built = adapt.add_adapters(base, config.tuning)
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(row.adapters)
        return built

    with (
        mock.patch.object(dry_run.CpuAccelerator, "prepare", prepare if row.autocast else plain),
        mock.patch.object(FineTune, "adapt", staticmethod(added)),
        mock.patch.object(load, "check_dtypes"),
        mock.patch.object(adapt, "forward_once"),  # PEFT's own layers, with all their casts
        mock.patch.object(FineTune, "loss", loss) if row.own_loss else nullcontext(),
        mock.patch(CHECKPOINT, selective) if row.selective else nullcontext(),
    ):
        yield


def against_published(folder: Path) -> list[dict[str, Any]]:
    found = []
    for number, row in enumerate(published()):
        train = {"gradient_checkpointing": row.checkpointing}
        config = configured(folder / str(number), row.architecture, **train)
        config = with_values(config, {f"tuning.{key}": each for key, each in row.tuning.items()})
        with their_step(row):
            predicted = memory.predict(config, "bf16", row.window, on_gpu=True, group=row.group)
            num_bytes = predicted.reserved if row.reserved else predicted.allocated
            if row.native:
                trace = dry_run.trace_step(config, "bf16", row.window, on_gpu=True)
                libraries = predicted.breakdown.get("libraries", 0)
                num_bytes = trace.reserved(FixedSegments()) + libraries
        found.append(
            {
                "source": row.source,
                "what": row.what,
                "measured_bytes": row.measured_bytes,
                "predicted_bytes": num_bytes,
                "error": num_bytes / row.measured_bytes - 1,
                "method": predicted.method,
                "unknown": row.unknown,
            }
        )
    return found


def show_published(found: list[dict[str, Any]]) -> Table:
    result = table(
        "Against what others measured",
        ("source", "run", "measured", "predicted", "error"),
        [],
        left=2,
    )
    for row in found:
        sizes = (f"{row[key] / 2**30:.1f} GiB" for key in ("measured_bytes", "predicted_bytes"))
        result.add_row(row["source"], row["what"], *sizes, f"{row['error']:+.1%}")
    errors = [abs(row["error"]) for row in found]
    result.add_row(
        "", "median, worst", "", f"{statistics.median(errors):.1%}", f"{max(errors):.1%}"
    )
    return result


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
    launch(2, "tests/support/memory_worker.py", str(file), str(out))
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
