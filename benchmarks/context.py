"""Plans rows of 8 to 512 thousand tokens: how many GPUs must share a row, and what they hold.

    python benchmarks/context.py [--thousands 8 32 128 512] [--out benchmarks/results/context.json]

The shapes are those of Llama 3.1 8B and 70B on H100 GPUs of 80 GB, trained with FSDP2. Each row is
the smallest `train.context_parallel` whose plan fits, for a global batch of one example for each
group of GPUs that share it. Nothing is run: these are predictions (docs/PLAN.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft.config.load import load_config
from sft.config.schema import Config
from sft.plan import gpus
from sft.plan.plan import Plan, make_plan
from sft.runtime import hardware
from sft.tasks.sft.task import FineTune

ROOT = Path(__file__).parent.parent
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 2**20,
    "tie_word_embeddings": False,
}
SHAPES = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
RUNS = (  # shape, GPUs, overrides
    ("8B", 8, ["tuning.mode=full"]),
    ("8B", 8, ["tuning.mode=lora"]),
    ("70B", 32, ["tuning.mode=full", "train.precision=bf16_pure"]),
    ("70B", 32, ["tuning.mode=lora"]),
)


def configured(folder: Path, shape: str, size: int, world: int, more: list[str]) -> Config:
    """Returns a run in which `size` GPUs share each row."""
    (folder / "config.json").write_text(json.dumps(COMMON | SHAPES[shape]))
    given = [f"model.name={folder}", "data.train_path=none", "train.output_dir=none"]
    given += ["train.engine=fsdp", f"train.context_parallel={size}"]
    return load_config(None, [*given, f"train.global_batch={world // size}", *more])


def plan(config: Config, world: int) -> Plan:
    machine = replace(hardware.detect(), devices=gpus.named_gpus(f"H100-80GB x {world}"))
    machine = replace(machine, is_here=False)
    return make_plan(config, FineTune.uniform_workload(config), machine, world, is_question=True)


def measure(shape: str, world: int, more: list[str], tokens: int, first: int) -> dict[str, Any]:
    """Returns the plan with the fewest GPUs for a row, from `first` on."""
    size, found = first, None
    with tempfile.TemporaryDirectory() as folder:
        while size <= min(world, int(SHAPES[shape]["num_attention_heads"])):
            more_of_row = [*more, f"data.max_seq_len={tokens}"]
            config = configured(Path(folder), shape, size, world, more_of_row)
            found = plan(config, world)
            if not found.missing_bytes:
                break
            size *= 2
    assert found is not None
    return {
        "shape": shape,
        "gpus": world,
        "settings": more,
        "tokens_of_row": tokens,
        "fits": not found.missing_bytes,
        "context_parallel": found.budget.shared_by,
        "tokens_of_gpu": found.budget.max_tokens,
        "rung": vars(found.rung),
        "reserved_gib": round(found.memory.reserved / 2**30, 1),
        "usable_gib": round(found.usable_bytes / 2**30, 1),
    }


def line(row: dict[str, Any]) -> str:
    """Returns a row as it is printed."""
    what = " ".join(each.split("=")[1] for each in row["settings"])
    fits = "" if row["fits"] else "  does not fit"
    return (
        f"{row['shape']:>3} {what:14} {row['gpus']:>3} GPUs  {row['tokens_of_row']:>7,} tokens, "
        f"each row on {row['context_parallel']:>2} GPUs: {row['tokens_of_gpu']:>6,} tokens and "
        f"{row['reserved_gib']:>5} GiB each{fits}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--thousands", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/context.json")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape, world, more in RUNS:
        size = 1
        for thousands in given.thousands:
            row = measure(shape, world, more, thousands * 1024, size)
            size = row["context_parallel"]  # a longer row needs no fewer
            rows.append(row)
            print(line(row), flush=True)
            given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
