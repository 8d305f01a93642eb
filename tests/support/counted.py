"""Steps whose counters are compared: small shapes for real, and two processes on each engine.

counted.py CASES OUT, on two ranks: files of cases, and of what rank 0 exchanges in their steps.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import forked
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from counting import Counting, Counts, weights_of
from shapes import architectures, configured, uniform_window

from sft.config.load import dump_config, with_values
from sft.config.schema import Config
from sft.data.batches import Layout
from sft.plan import dry_run
from sft.plan.dry_run import Window
from sft.runtime.processes import start_processes
from sft.tasks.registry import load_run

TABLE = ROOT / "tests/fixtures/counters.txt"
UPDATE = "PYTHONPATH=.:tests:tests/support .venv/bin/python benchmarks/counters.py --small"
UPDATE_RANKS = UPDATE.replace("--small", "--parts ranks")
UPDATE_EXCHANGE = UPDATE.replace("--small", "--parts exchange")
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

    engines = {"DDP": {}, "FSDP2": {"engine": "fsdp", "keep_whole": False}}
    engines |= {f"ZeRO-{stage}": zero(stage) for stage in (1, 2, 3)}
    for (name, train), mode in product(engines.items(), ("full", "lora")):
        config = configured(folder / "model", architectures()["Llama"], mode, **train)
        yield name, mode, with_values(config, {"train.gradient_checkpointing": False})


EXCHANGING = 4  # processes, in two groups of two with HSDP
LLAMA_4 = architectures(num_hidden_layers=4, vocab_size=512)["Llama"]
OURS = {  # of `train`
    "DDP": {},
    "FSDP2, keep_whole: false": {"engine": "fsdp", "keep_whole": False},
    "FSDP2, keep_whole: gradients": {"engine": "fsdp", "keep_whole": "gradients"},
    "FSDP2, keep_whole: all": {"engine": "fsdp", "keep_whole": "all"},
    "HSDP, keep_whole: gradients": {
        "engine": "fsdp",
        "keep_whole": "gradients",
        "shard_within": 2,
    },
    "ZeRO-2": 2,
    "ZeRO-3": 3,
}
PEERS = {"torchtitan": "torchtitan", "torchtitan, HSDP": "torchtitan", "Accelerate": "accelerate"}


def exchange_cases(folder: Path, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yields cases of exchange_worker.py: full tuning in bf16, of several engines and tools.

    `numbers`: of micro-batches in a step.

    DeepSpeed's come last: after them a process makes no others.
    """
    numbers = tuple(numbers)
    for (name, own), narrow, number in product(OURS.items(), ("fp32", "bf16"), numbers):
        train: dict[str, Any] = {"precision": "bf16", "gradient_checkpointing": False}
        if isinstance(own, int):
            if narrow == "bf16":  # which is a setting of DeepSpeed's own file
                continue
            file = folder / f"zero{own}.json"
            file.write_text(json.dumps({"zero_optimization": {"stage": own}}), "utf-8")
            train |= {"engine": "deepspeed", "deepspeed_config": str(file)}
        else:
            train |= own | {"reduce_dtype": narrow}
        if (name, number) == ("ZeRO-2", numbers[0]):
            yield from _peer_cases(folder, numbers)
        config = configured(folder / "model", LLAMA_4, "full", **train)
        path = folder / f"{name}, {narrow}.yaml"
        path.write_text(dump_config(config), "utf-8")
        case = {"name": f"{name}, {narrow}, {number}", "micro_batches": number}
        yield case | {"config": str(path)}


def _peer_cases(folder: Path, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    config, model = str(folder / "DDP, fp32.yaml"), str(folder / "model")
    for (name, peer), number in product(PEERS.items(), numbers):
        case = {"name": f"{name}, {number}", "peer": peer, "model": model, "config": config}
        yield case | {"within": 2 if "HSDP" in name else None, "micro_batches": number}


def count_exchange(folder: Path, cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what a rank exchanges in a step of each case."""
    file, out = folder / "exchange.json", folder / "exchanged.json"
    file.write_text(json.dumps([*cases]), "utf-8")
    printed = forked.launch(EXCHANGING, ["tests/support/exchange_worker.py", str(file), str(out)])
    assert out.exists(), printed
    keys = ("collectives", "exchanged", "sent")
    found = json.loads(out.read_text("utf-8"))
    return [{"case": name} | {key: each[key] for key in keys} for name, each in found.items()]


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
