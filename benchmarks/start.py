"""Measures the memory with which ranks start, and the bytes that they read, against shards + layer.

    python benchmarks/start.py [--worlds 2 4] [--gib 2] [--out benchmarks/results/start.json]

A Llama of random weights is written once. Each row starts a run of it up to its first step: the
model is built, split and given an optimizer. Other rows that the file has are kept. `peak` is
private memory (RssAnon of /proc/self/status, every 2 ms; pages of mapped files belong to the page
cache and are not counted), less what the process had before, and the most of all ranks. `own` is
the bytes of a rank's elements. In ZeRO-3 these have fp32 copies and gradients if they are trained,
for which DeepSpeed makes room at the start. `layer` is the largest layer as it is stored; the bound
is their sum. The C library returns what is freed (MALLOC_MMAP_THRESHOLD_).
`read` is what all ranks together read from disk (read_bytes of /proc/self/io), after the files were
dropped from the page cache. The rows `whole` are runs in which every rank reads the whole model, as
it is done where a model cannot be cut.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
ENGINES = {
    "FSDP2": ["train.engine=fsdp"],
    "ZeRO-3": ["train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z3.json"],
}
MODES = ("full", "lora", "qlora")
LAYER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
LAYER |= {"num_key_value_heads": 4, "vocab_size": 16384, "tie_word_embeddings": False}


def write_model(folder: Path, gib: float) -> None:
    """Writes a Llama whose fp32 weights take `gib` GiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = [
        sum(p.numel() for p in _on_meta(LlamaConfig(**LAYER, num_hidden_layers=n)).parameters())
        for n in (0, 1)
    ]
    layers = max(1, round((gib * 2**28 - sizes[0]) / (sizes[1] - sizes[0])))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LAYER, num_hidden_layers=layers))
    model.save_pretrained(folder)


def _on_meta(config: Any) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(config)


# -- a rank


def private_bytes() -> int:
    """Returns the private memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def read_bytes() -> int:
    """Returns the bytes that this process has read from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


class Peak:
    """The most private memory within this context, beyond that at its begin."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.before = self.most = private_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, private_bytes())

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()
        gc.collect()
        self.peak, self.kept = self.most - self.before, private_bytes() - self.before


def own_bytes(parameter: Any) -> int:
    """Returns the bytes of this rank's elements of a parameter."""
    if hasattr(parameter, "ds_tensor"):
        copied = 8 * parameter.ds_tensor.numel() if parameter.requires_grad else 0
        return int(parameter.ds_tensor.nbytes + copied)
    return int(parameter.to_local().nbytes if hasattr(parameter, "to_local") else parameter.nbytes)


def rank(model: str, mode: str, engine: str, start: str, out: Path) -> None:
    """Starts a run, as one of its ranks, and writes what it took."""
    from sft.config.load import load_config
    from sft.models.layers import repeated_layers
    from sft.runtime.processes import Context, start_processes
    from sft.tasks.sft.task import FineTune
    from sft.train.parallel import share_model

    def begin(name: str) -> tuple[Any, int, int]:
        config = load_config(
            ROOT / "configs/nano.yaml",
            [
                *(f"model.name={name}", f"tuning.mode={mode}", "tuning.r=16"),
                *("train.precision=bf16", f"train.output_dir={out}/run", *ENGINES[engine]),
            ],
        )
        accelerator = accelerators[0] if accelerators else start_processes(config.train)
        accelerators[:] = [accelerator]
        log: Any = SimpleNamespace(say=messages.append)
        built = None
        if start == "cut":
            built = FineTune._build_cut(config, "bf16", Context(accelerator, log))
            assert built is not None, messages
        else:
            built = FineTune.build_model(config, "bf16", accelerator.device)
        layer = max(
            sum(p.nbytes for p in each.parameters())
            for each in [*repeated_layers(built), built.get_input_embeddings()]
        )
        shared = share_model(built, config.train, accelerator)
        return shared, layer, sum(map(own_bytes, shared.module.parameters()))

    accelerators: list[Any] = []
    messages: list[str] = []
    kept = [begin(str(ROOT / "nano/model"))]  # libraries import and compile at the first use
    accelerators[0].wait_for_everyone()
    already = read_bytes()
    with Peak() as memory:
        started = time.perf_counter()
        kept.append(begin(model))
        seconds = time.perf_counter() - started
    found = {
        "peak_bytes": memory.peak,
        "kept_bytes": memory.kept,
        "layer_bytes": kept[1][1],
        "own_bytes": kept[1][2],
        "read_bytes": read_bytes() - already,
        "seconds": seconds,
    }
    index = accelerators[0].process_index
    (out / f"rank{index}.json").write_text(json.dumps(found))
    accelerators[0].wait_for_everyone()


# -- all


def run_ranks(
    script: str, world: int, scratch: Path, arguments: list[str], path: str = str(ROOT)
) -> list[dict[str, Any]]:
    """Returns what each rank of `script --rank ARGUMENTS FOLDER` writes into FOLDER/rank*.json.

    `path`: PYTHONPATH. Raises RuntimeError if a rank has written nothing.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
        command += [f"--master-port={free.getsockname()[1]}", script, "--rank"]
        free.close()
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        own |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
        own |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [*command, *arguments, folder],
            env=os.environ | own,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank*.json"))]
    if len(ranks) != world:
        raise RuntimeError(done.stderr[-4000:])
    return ranks


def measure(model: Path, world: int, mode: str, engine: str, start: str) -> dict[str, Any]:
    """Returns a row of the table."""
    files = sorted(model.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ranks = run_ranks(__file__, world, model.parent, [str(model), mode, engine, start])
    bound = max(each["own_bytes"] + each["layer_bytes"] for each in ranks)
    peak = max(each["peak_bytes"] for each in ranks)
    return {
        "processes": world,
        "engine": engine,
        "mode": mode,
        "start": start,
        "peak_bytes": peak,
        "kept_bytes": max(each["kept_bytes"] for each in ranks),
        "own_bytes": max(each["own_bytes"] for each in ranks),
        "layer_bytes": ranks[0]["layer_bytes"],
        "bound_bytes": bound,
        "peak_of_bound": peak / bound,
        "file_bytes": sum(file.stat().st_size for file in files),
        "read_bytes": sum(each["read_bytes"] for each in ranks),
        "seconds": max(each["seconds"] for each in ranks),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what a row measures: another row of the same replaces it."""
    return row["start"], row["processes"], row["engine"], MODES.index(row["mode"])


def line(row: dict[str, Any]) -> str:
    """Returns a row as it is printed."""
    peak, own, layer = (row[f"{key}_bytes"] / 2**20 for key in ("peak", "own", "layer"))
    return (
        f"{row['processes']} {row['engine']:6} {row['mode']:5} {row['start']:5}  peak {peak:6,.0f} "
        f"MiB  own {own:6,.0f}  layer {layer:4,.0f}  peak / (own + layer) "
        f"{row['peak_of_bound']:.2f}  "
        f"read {row['read_bytes'] / row['file_bytes']:.2f} x the files  {row['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engines", nargs="+", default=[*ENGINES])
    parser.add_argument("--modes", nargs="+", default=[*MODES])
    parser.add_argument("--starts", nargs="+", default=["cut"])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/start.json")
    parser.add_argument("--rank", nargs=5)
    given = parser.parse_args()
    if given.rank:
        *names, folder = given.rank
        rank(*names, Path(folder))
        return
    known = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    rows = {key(row): row for row in known}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        write_model(model, given.gib)
        for world in given.worlds:
            for engine in given.engines:
                for mode in given.modes:
                    for start in given.starts:
                        row = measure(model, world, mode, engine, start)
                        rows[key(row)] = row
                        print(line(row), flush=True)
                        ordered = [rows[each] for each in sorted(rows)]
                        given.out.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
