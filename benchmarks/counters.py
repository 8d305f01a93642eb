"""What an optimizer step does, counted without a GPU: ours, before and after, and TRL's.

    PYTHONPATH=.:tests:tests/support .venv/bin/python benchmarks/counters.py
        [--parts shapes ranks exchange TRL] [--name after] [--trl FOLDER]

shapes  A Llama of 8B parameters on fake tensors, as a GPU would run it: 16 conversations with the
        lengths of GSM8K in one optimizer step of LoRA r16, QLoRA or full weights in bf16; padded in
        micro-batches of at most 4,096 tokens, or packed with the varlen kernel; with and without
        checkpointing.
TRL     The same by TRL's `SFTTrainer.train()` with its default settings, where the case does not
        say otherwise: batches of 8, its fused head, whose kernels count as one operator each, and
        for packing a flash kernel. TRL is installed into a temporary folder (`pip install
        --no-deps --target`), or taken from `--trl`.
ranks   Collectives of one of two real processes, and the bytes that it gives to them, against the
        bytes of the trained weights in fp32.
exchange
        What one of four processes exchanges in a step of full weights in bf16, of one and of two
        micro-batches, with each engine, and with FSDP2 as torchtitan and Accelerate set it up.

The result is in benchmarks/results/counters.json under `--name`, with the commit that was counted.
To count an earlier version, make a worktree of it and run this file with its folder in place of the
first `.` of PYTHONPATH (`--name before`). `--small` writes the table that tests/test_counters.py
compares with real steps of small shapes. tests/support/counting.py says what the counters are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import counted
import forked
import torch
from conftest import ROOT
from counting import Counting, gpu_choices, minimum_flops, weights_of
from rich.table import Table
from shapes import configured
from transformers import LlamaConfig

import sft
from sft.cli import prepare_libraries
from sft.config.load import dump_config, with_values
from sft.config.schema import Config
from sft.data import batches
from sft.plan import dry_run
from sft.plan.dry_run import Window
from sft.runtime.console import make_console, table

RESULTS = ROOT / "benchmarks/results/counters.json"
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
ROWS = (  # tokens, and those supervised, of conversations as in GSM8K
    *((212, 118), (187, 95), (243, 141), (158, 72), (301, 169), (176, 88), (229, 127), (195, 101)),
    *((264, 150), (141, 66), (338, 201), (204, 109), (183, 84), (412, 246), (167, 79), (218, 120)),
)
MAX_TOKENS, RANK, TRL_BATCH = 4096, 16, 8
CASES = list(product(("lora", "qlora", "full"), ("padded", "packed"), (False, True)))


def case_name(mode: str, layout: str, checkpointing: bool) -> str:
    return f"{mode}, {layout}{', checkpointing' if checkpointing else ''}"


def case_config(folder: Path, mode: str, layout: str, checkpointing: bool) -> Config:
    config = configured(folder, LLAMA_8B, mode, gradient_checkpointing=checkpointing)
    kernel = "varlen" if layout == "packed" else "auto"
    return with_values(config, {"tuning.r": RANK, "model.attn_implementation": kernel})


def share_of_scores(layout: str) -> float:
    """Returns the part of the scores of a packed row that are within its conversations."""
    lengths = [length for length, _ in ROWS]
    whole = sum(lengths) ** 2
    return sum(length**2 for length in lengths) / whole if layout == "packed" else 1.0


# --- ours --------------------------------------------------------------------------------------


def our_window(layout: batches.Layout) -> Window:
    lengths = [length for length, _ in ROWS]
    (mine,) = batches.cut(range(len(ROWS)), lengths, 1, batches.Budget(MAX_TOKENS, layout))
    return Window(tuple(tuple(ROWS[i] for i in each) for each in mine), layout)


def count_ours(folder: Path, mode: str, layout: batches.Layout, checkpointing: bool) -> Any:
    """Returns the counts of the step that a dry run traces, in place of its allocations."""
    found: list[Counting] = []

    def record(engine: Any, **_: Any) -> None:
        engine.recorder = mock.MagicMock()  # makes the batch fake; its labels are not used
        engine.optimizer_step()  # the first step also proves that its head may be cut
        weights = weights_of(engine.task.model)
        with gpu_choices(), Counting(weights, share_of_scores(layout)) as counting:
            engine.optimizer_step()
        found.append(counting)

    config = case_config(folder, mode, layout, checkpointing)
    with mock.patch.object(dry_run, "record_step", record):
        dry_run.trace_step(config, "bf16", our_window(layout), on_gpu=True)
    return found[0]


def shapes(folder: Path, _: argparse.Namespace) -> list[dict[str, Any]]:
    result = []
    for case in CASES:
        counting = count_ours(folder / "model", *case)
        result.append(as_row(case, counting.counts, counting.launched))
        print(json.dumps(result[-1])[:160], flush=True)
    return result


def as_row(case: tuple[Any, ...], counts: Any, launched: Any) -> dict[str, Any]:
    least = minimum_flops(LLAMA_8B, case[0], RANK, ROWS)
    values = asdict(counts) | {"flops_over_minimum": counts.flops / least}
    return {"case": case_name(*case), **values, "most": dict(launched.most_common(12))}


# --- TRL ---------------------------------------------------------------------------------------


def trl(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    where = args.trl or folder / "trl"
    if not args.trl:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(where), "trl==1.16.0"], check=True)
    sys.path.append(str(where))
    import peer_counts

    result = []
    for case in CASES:
        counts, launched = peer_counts.count_step(folder, LLAMA_8B, ROWS, case, TRL_BATCH)
        result.append(as_row(case, counts, launched))
        print(json.dumps(result[-1])[:160], flush=True)
    return result


# --- ranks -------------------------------------------------------------------------------------


def ranks(folder: Path, _: argparse.Namespace) -> list[dict[str, Any]]:
    config = folder / "cases.json"
    cases = [
        {"engine": name, "mode": mode, "config": dump_config(each)}
        for name, mode, each in counted.rank_cases(folder)
    ]
    config.write_text(json.dumps(cases), "utf-8")
    out = folder / "found.json"
    printed = forked.launch(2, ["tests/support/counted.py", str(config), str(out)])
    assert out.exists(), printed
    return json.loads(out.read_text("utf-8"))


def exchange(folder: Path, _: argparse.Namespace) -> list[dict[str, Any]]:
    return counted.count_exchange(folder, counted.exchange_cases(folder, (1, 2)))


# --- all of it ---------------------------------------------------------------------------------

PARTS = {"shapes": shapes, "TRL": trl, "ranks": ranks, "exchange": exchange}


def show(found: dict[str, Any]) -> Iterator[Table]:
    columns = ("step of 8B", "of", "launches", "syncs", "moved", "saved", "FLOP / least")
    rows = []
    for case in (case_name(*each) for each in CASES):
        for name, run in found.items():
            for row in run.get("shapes", []):
                if row["case"] == case:
                    sizes = (f"{row[key] / 2**30:,.1f} GiB" for key in ("moved", "saved"))
                    ratio = f"{row['flops_over_minimum']:.2f}"
                    numbers = (f"{row['launches']:,}", str(row["syncs"]))
                    rows.append((case, name, *numbers, *sizes, ratio))
    yield table("Counters of a step", columns, rows, left=2)
    rows = []
    for name, run in found.items():
        for row in run.get("ranks", []):
            ratio = f"{row['exchanged'] / row['trained_bytes']:.2f}"
            cells = (f"{row['collectives']}", f"{row['exchanged']:,}", ratio)
            rows.append((row["engine"], row["mode"], name, *cells))
    columns = ("engine, two ranks", "tuning", "of", "collectives", "bytes", "over trained weights")
    yield table("Exchanged by a rank", columns, rows, left=3)
    rows = []
    for name, run in found.items():
        for row in run.get("exchange", []):
            rows.append((row["case"], name, f"{row['collectives']}", f"{row['sent']:,}"))
    columns = ("of four ranks, micro-batches", "of", "collectives", "bytes sent in a ring")
    yield table("Exchanged in bf16", columns, rows, left=2)


def commit_of(package: str) -> str:
    git = ["git", "-C", str(Path(package).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", default=["shapes", "ranks", "exchange"], choices=PARTS
    )
    parser.add_argument("--name", default="after", help="of the version that is counted")
    parser.add_argument("--trl", type=Path, help="a folder with trl 1.16.0")
    parser.add_argument("--small", action="store_true", help="write the table of the test")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    prepare_libraries()
    torch.set_num_threads(1)
    if args.small:
        counted.TABLE.write_text(counted.small_table(), "utf-8")
        return
    values = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](Path(folder), args)
        name, key = ("TRL 1.16.0", "shapes") if part == "TRL" else (args.name, part)
        versions = {each: version(each) for each in ("torch", "transformers", "peft")}
        run = values.setdefault(name, {})
        commits = run.get("commits", {}) | {key: commit_of(str(sft.__path__[0]))}
        run |= {"commits": commits, "versions": versions, key: found}
        args.json.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    for each in show(values):
        make_console().print(each)


if __name__ == "__main__":
    main()
