"""Plans the models of docs/recipes on four GPUs, and writes the plans into their pages.

    python benchmarks/recipes.py [--models qwen3 llama31 gemma3 gpt_oss]    plans: 10 minutes each
    python benchmarks/recipes.py --plans        only what `make plan` prints; rows stay as they are
    python benchmarks/recipes.py --pages        writes the results into the pages

Shapes are those of the models' own config.json, and their parameters are counted. Nothing is run:
these are predictions (docs/PLAN.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft.config.load import load_config, with_values
from sft.config.schema import Config
from sft.plan import gpus, report
from sft.plan.choose import Planner
from sft.plan.dry_run import Window
from sft.plan.memory import predict
from sft.plan.plan import make_plan
from sft.runtime import hardware
from sft.tasks.sft.task import FineTune

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/recipes.json"
PAGES = ROOT / "docs/recipes"
CARDS = {16: "4080", 24: "4090", 48: "A6000", 80: "H100-80GB"}
TOKENS = 4096  # of the rows for which a page has the plan
LENGTHS = (2048, 4096, 16_384)  # of rows of which one is trained at a time
TUNINGS = {  # keys of each way of tuning
    "lora": {"tuning.mode": "lora"},
    "qlora": {"tuning.mode": "qlora"},
    "full, weights in bf16": {"tuning.mode": "full", "train.precision": "bf16_pure"},
    "the same, moments in 8 bits, updated in the backward pass": {
        "tuning.mode": "full",
        "train.precision": "bf16_pure",
        "train.optimizer": "paged_adamw_8bit",
        "train.optimizer_in_backward": True,
        "train.max_grad_norm": 0,
    },
}
BEGIN, END = "<!-- of benchmarks/recipes.py -->", "<!-- end -->"
SHORT = dict(zip(TUNINGS, ("LoRA", "QLoRA", "full (bf16)", "full (8 bits)"), strict=True))
NAMES = {
    "qwen3": "Qwen3-8B",
    "llama31": "Llama-3.1-8B",
    "gemma3": "Gemma-3-12B",
    "gpt_oss": "gpt-oss-20b",
}
PLANNED = ("lora", "qlora")  # of each card: the first one that fits
PARAMETERS = {  # as published
    "qwen3": 8_190_735_360,
    "llama31": 8_030_261_248,
    "gemma3": 12_187_325_040,
    "gpt_oss": 20_914_757_184,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "max_position_embeddings": 40_960,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vocab_size": 151_936,
    },
    "llama31": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128_256,
    },
    "gemma3": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "head_dim": 256,
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "max_position_embeddings": 131_072,
            "num_attention_heads": 16,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            "vocab_size": 262_208,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "vocab_size": 201_088,
    },
}


def configured(folder: Path, model: str, tokens: int, changes: dict[str, Any]) -> Config:
    """Returns a run on rows of so many tokens."""
    (folder / "config.json").write_text(json.dumps(SHAPES[model]))
    given = [f"model.name={folder}", "data.train_path=none", "train.output_dir=none"]
    return with_values(load_config(None, [*given, f"data.max_seq_len={tokens}"]), changes)


def machine_of(card: str) -> hardware.Hardware:
    devices = gpus.named_gpus(card)
    return replace(hardware.detect(), devices=devices, is_here=False)


def usable_bytes(config: Config, card: str) -> float:
    workload = FineTune.uniform_workload(config)
    return Planner(config, workload, machine_of(card), 1, "bf16", "padded").usable_bytes


def longest_rows(folder: Path, model: str, changes: dict[str, Any]) -> dict[int, int]:
    """Returns for each card the largest of LENGTHS that fits with checkpointing, or 0."""
    found = dict.fromkeys(CARDS, 0)
    changes = changes | {"train.gradient_checkpointing": True}
    for tokens in LENGTHS:
        config = configured(folder, model, tokens, changes)
        window = Window((((tokens, tokens),),), gradients=not config.train.optimizer_in_backward)
        reserved = predict(config, "bf16", window, on_gpu=True).reserved
        fits = [gib for gib, card in CARDS.items() if reserved <= usable_bytes(config, card)]
        if not fits:
            break
        found |= dict.fromkeys(fits, tokens)
    return found


SHOWN = ("verdict", "batch", "memory", "auto train.gradient_checkpointing")


def plan_of(folder: Path, model: str, tuning: str, gib: int, tokens: int) -> dict[str, Any]:
    """Returns the plan of one global batch of rows of so many tokens, with lines that it prints."""
    config = configured(folder, model, tokens, TUNINGS[tuning])
    workload = FineTune.uniform_workload(config)
    found = make_plan(config, workload, machine_of(CARDS[gib]), 1, is_question=True)
    assert not found.missing_bytes
    names, texts = (list(column.cells) for column in report.plan_table(found).columns)
    lines = [" ".join(map(str, line)) for line in zip(names, texts, strict=True)]
    return {
        "card": CARDS[gib],
        "tuning": tuning,
        "row_tokens": tokens,
        "base_parameters": found.num_parameters - found.num_trained,
        "trained": found.num_trained,
        "max_tokens": found.budget.max_tokens,
        "reserved_bytes": found.memory.reserved,
        "usable_bytes": found.usable_bytes,
        "lines": [line for line in lines if line.startswith(SHOWN)],
    }


def measure(model: str, longest: dict[str, dict[str, int]] | None) -> dict[str, Any]:
    """Returns the longest rows, or those that are given, and the plan of each card."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if longest is None:
            longest = {}
            for tuning, changes in TUNINGS.items():
                found = longest_rows(folder, model, changes)
                longest[tuning] = {str(gib): tokens for gib, tokens in found.items()}
                print(model, tuning, longest[tuning], flush=True)
        plans = {}
        for gib in CARDS:
            tokens, tuning = most_rows(longest, gib)
            if tokens:
                plans[str(gib)] = plan_of(folder, model, tuning, gib, tokens)
                print(model, *plans[str(gib)]["lines"], sep="\n  ", flush=True)
        return {"longest": longest, "plans": plans}


def most_rows(longest: dict[str, dict[str, int]], gib: int) -> tuple[int, str]:
    """Returns the tokens of a row that a card is planned with, at most TOKENS, and the tuning."""
    rows = [(min(TOKENS, longest[tuning][str(gib)]), tuning) for tuning in PLANNED]
    return max(rows, key=lambda row: row[0])  # of equal ones the first


def block(found: dict[str, Any]) -> str:
    """Returns the part of a page that the results decide: the longest rows, and a plan."""
    head = ["longest row, in tokens", *(f"{gib} GB" for gib in CARDS)]
    rows = [head, ["---"] * len(head)]
    for tuning, longest in found["longest"].items():
        rows.append([tuning, *(f"{n:,}" if n else "-" for n in longest.values())])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    tried = ", ".join(f"{tokens:,}" for tokens in LENGTHS)
    text = (
        f"{table}\n\nThe longest of rows of {tried} tokens that fits, one at a time, "
        f"checkpointed; `-`: none.\nWhat `make plan MODEL=...` prints, among others (predicted, "
        "not run):"
    )
    for gib, plan in found["plans"].items():
        asked = f"GPU={plan['card']} TUNING={plan['tuning']} SEQ={plan['row_tokens']}"
        code = "\n".join(line for text in plan["lines"] for line in _wrapped(text))
        text += f"\n\n{gib} GB, with `{asked}`:\n\n```\n{code}\n```"
    return text


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 100, subsequent_indent="    ", break_on_hyphens=False) or [""]


def summary(results: dict[str, Any]) -> str:
    """Returns the table of the index: what fits each card, for rows of TOKENS tokens."""
    head = ["", *(f"{gib} GB" for gib in CARDS)]
    rows = [head, ["---"] * len(head)]
    for model, found in results.items():
        cells = []
        for gib in CARDS:
            fit = [t for t, n in found["longest"].items() if n[str(gib)] >= TOKENS]
            cells.append(", ".join(SHORT[tuning] for tuning in fit) or "-")
        rows.append([f"[{NAMES[model]}]({model}.md)", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_pages(results: dict[str, Any]) -> None:
    """Puts the results between the marks of each page."""
    texts = {f"{model}.md": block(found) for model, found in results.items()}
    for name, text in {"README.md": summary(results), **texts}.items():
        page = PAGES / name
        page.write_text(with_block(page.read_text("utf-8"), text), "utf-8")


def with_block(page: str, text: str) -> str:
    """Returns a page with a text between its marks."""
    begin, _, rest = page.partition(BEGIN)
    _, _, end = rest.partition(END)
    return f"{begin}{BEGIN}\n\n{text}\n\n{END}{end}"


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--plans", action="store_true", help="keep the longest rows")
    parser.add_argument("--pages", action="store_true", help="write the results into the pages")
    given = parser.parse_args()
    for model in [] if given.pages else given.models:
        found = measure(model, read_results()[model]["longest"] if given.plans else None)
        results = read_results()  # another process may have added to them
        ordered = {name: (results | {model: found}).get(name) for name in SHAPES}
        RESULTS.write_text(json.dumps({k: v for k, v in ordered.items() if v}, indent=1) + "\n")
    if given.pages:
        write_pages(read_results())


if __name__ == "__main__":
    main()
