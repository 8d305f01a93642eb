"""Measures the time and the memory that each rank takes to save and to resume a checkpoint.

    python benchmarks/saves.py [--worlds 2 4] [--mib 400] [--out benchmarks/results/saves.json]

A Llama of random weights is trained for two steps by each engine that splits it. Then a checkpoint
is saved and read back. In between it is saved with `train.checkpoint_async`: a step waits for
`copy`, and `write` is the time from then until it is committed. `peak` is private memory (RssAnon
of /proc/self/status, every 2 ms) beyond that before the save or the resume, the most of all ranks:
0 is a save that needs nothing. `model` is the bytes of the whole model, `state` those of a rank's
part of the optimizer's state, `layer` those of the largest layer; all are fp32. `step` is the time
of the second step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from start import ENGINES, ROOT, Peak, run_ranks

LAYER = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
LAYER |= {"num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": False}


def write_model(folder: Path, mib: float) -> None:
    """Writes a Llama whose fp32 weights take about `mib` MiB, with the tokenizer of nano."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        built = [LlamaForCausalLM(LlamaConfig(**LAYER, num_hidden_layers=n)) for n in (0, 1)]
    sizes = [sum(p.nbytes for p in each.parameters()) for each in built]
    layers = max(1, round((mib * 2**20 - sizes[0]) / (sizes[1] - sizes[0])))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LAYER, num_hidden_layers=layers))
    shutil.copytree(ROOT / "nano/model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder)


def rank(model: str, engine: str, out: Path) -> None:
    """Trains, saves and resumes, as one of the ranks of a run, and writes what it took."""
    import torch
    from parallel_worker import make

    from sft.models.layers import repeated_layers

    overrides = [f"model.name={model}", "tuning.mode=full", "train.precision=fp32"]
    overrides += ["data.max_rows=16", "train.global_batch=2", "train.max_steps=4"]
    overrides += ["train.gradient_checkpointing=false", *ENGINES[engine]]
    made = make({"overrides": overrides, "max_tokens": 128}, out / "run")
    for _ in range(2):
        started = time.perf_counter()
        made.optimizer_step()
        made.step += 1
    found: dict[str, Any] = {"step_seconds": time.perf_counter() - started}
    sizes = {name: math_bytes(p) for name, p in made.model.named_parameters()}
    found["model_bytes"] = sum(sizes.values())
    found["layer_bytes"] = max(
        sum(map(math_bytes, each.parameters())) for each in repeated_layers(made.parallel.module)
    )
    shards = made.parallel.optimizer_shards()
    found["state_bytes"] = sum(t.nbytes for s in shards for t in s.state.values())
    folders: list[Path] = []
    keeper = made.keeper

    def copy() -> None:
        keeper.train = made.train.model_copy(update={"checkpoint_async": True})
        keeper.saved = None  # as if this step were not saved yet
        keeper.try_to_save(made.step, made._write)

    actions = {
        "save": lambda: folders.append(made.save()),
        "copy": copy,
        "write": keeper.settle,
        "resume": lambda: made.read(folders[0]),
    }
    for name, action in actions.items():
        made.accelerator.wait_for_everyone()
        with Peak() as memory:
            started = time.perf_counter()
            action()
            found[f"{name}_seconds"] = time.perf_counter() - started
        found[f"{name}_peak_bytes"] = memory.peak
    (out / f"rank{made.accelerator.process_index}.json").write_text(json.dumps(found))
    made.accelerator.wait_for_everyone()
    assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"])


def math_bytes(parameter: Any) -> int:
    """Returns the bytes of a whole parameter, which ZeRO-3 has split."""
    return int(getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size())


def measure(model: Path, world: int, engine: str) -> dict[str, Any]:
    """Returns a row of the table."""
    parts = (".", "benchmarks", "tests", "tests/support")
    path = os.pathsep.join(str(ROOT / part) for part in parts)
    ranks = run_ranks(__file__, world, model.parent, [str(model), engine], path)
    return {"processes": world, "engine": engine} | {
        key: max(each[key] for each in ranks) for key in ranks[0]
    }


def line(row: dict[str, Any]) -> str:
    """Returns a row as it is printed."""
    mib = {key: value / 2**20 for key, value in row.items() if key.endswith("_bytes")}
    return (
        f"{row['processes']} {row['engine']:6}  model {mib['model_bytes']:5,.0f} MiB  state "
        f"{mib['state_bytes']:4,.0f}  layer {mib['layer_bytes']:3,.0f}  "
        f"save {row['save_seconds']:4.1f} s, peak {mib['save_peak_bytes']:5,.0f} MiB  "
        f"copy {row['copy_seconds']:4.1f} s, peak {mib['copy_peak_bytes']:5,.0f} MiB  "
        f"write {row['write_seconds']:4.1f} s  "
        f"resume {row['resume_seconds']:4.1f} s, peak {mib['resume_peak_bytes']:5,.0f} MiB  "
        f"step {row['step_seconds']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engines", nargs="+", default=[*ENGINES])
    parser.add_argument("--mib", type=float, default=400.0)
    parser.add_argument("--label", default="after", help="what this code is called in the file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/saves.json")
    parser.add_argument("--rank", nargs=3)
    given = parser.parse_args()
    if given.rank:
        *names, folder = given.rank
        rank(*names, Path(folder))
        return
    known = json.loads(given.out.read_text()) if given.out.exists() else {}
    known[given.label] = []
    with tempfile.TemporaryDirectory(dir=".") as scratch:  # on a disk, which /tmp may not be
        model = Path(scratch, "model").resolve()
        write_model(model, given.mib)
        for world in given.worlds:
            for engine in given.engines:
                row = measure(model, world, engine)
                known[given.label].append(row)
                print(line(row), flush=True)
    given.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
