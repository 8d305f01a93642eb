"""How evenly global batches are cut: padding waste, and the slowest rank against the mean.

    python benchmarks/batches.py [--shared ../shared] [--json benchmarks/results/batches.json]

GSM8K with the Qwen2.5 tokenizer, 16 examples a rank on 8 ranks, 4,096 tokens a micro-batch; against
batches of 16 random examples a rank, padded to the longest, as most trainers cut.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from sft.data import batches, files, template
from sft.data.batches import Budget, MicroBatch
from sft.runtime.console import make_console

RANKS, EACH, BUDGET = 8, 16, 4096


def fixed(ids: list[int]) -> list[list[MicroBatch]]:
    """Gives 16 examples to each rank, in the order they come."""
    return [[ids[rank * EACH : (rank + 1) * EACH]] for rank in range(RANKS)]


def measure(lengths: list[int], layout: batches.Layout | None) -> dict[str, float]:
    """Returns the waste of padding, and the slowest rank over the mean, of full batches."""
    real, computed, slowest = 0, 0, []
    for step in range(len(lengths) // (RANKS * EACH)):
        ids = batches.global_batch_ids(len(lengths), 0, step, RANKS * EACH)
        shown = layout or "padded"
        cut = batches.cut(ids, lengths, RANKS, Budget(BUDGET, layout)) if layout else fixed(ids)
        ranks = [sum(batches.num_tokens(lengths, m, shown) for m in rank) for rank in cut]
        real += sum(lengths[i] for i in ids)
        computed += sum(ranks)
        slowest.append(max(ranks) / mean(ranks) - 1)
    return {"padding_waste": 1 - real / computed, "slowest_rank_over_mean": mean(slowest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/batches.json"))
    args = parser.parse_args()
    from transformers import AutoTokenizer

    folder = args.shared / "data/tokenizers/qwen2.5-instruct"
    tokenizer = template.prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    read = files.read_all(str(args.shared / "data/instruct/gsm8k_train.jsonl"))
    rows = [row for row in read if isinstance(row, files.Row)]
    lengths = [len(template.render(tokenizer, row.messages).ids) for row in rows]
    cases: list[tuple[str, batches.Layout | None]] = [
        ("ours, packed", "packed"),
        ("ours, padded", "padded"),
        ("random, 16 a rank, padded", None),
    ]
    results = {name: measure(lengths, layout) for name, layout in cases}
    console = make_console()
    console.print(f"GSM8K, {len(rows):,} rows, {RANKS} ranks x {EACH} examples, {BUDGET} tokens")
    for name, found in results.items():
        console.print(
            f"{name:<28}padding {found['padding_waste']:6.2%}   "
            f"slowest rank +{found['slowest_rank_over_mean']:.2%}"
        )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
