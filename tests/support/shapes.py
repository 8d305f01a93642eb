"""Small shapes of real architectures, and the configuration of a run that trains one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Gemma2Config, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from sft.config.schema import Config
from sft.data.batches import Layout
from sft.plan.dry_run import Window

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def architectures(**changes: Any) -> dict[str, PretrainedConfig]:
    """Llama; Qwen2, with biases; Gemma-2, with a window in every second layer; GPT-2."""
    sizes = SIZES | changes
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    window = sizes["max_position_embeddings"] // 8
    other = ("intermediate_size", "num_key_value_heads")
    gpt2 = {key: value for key, value in sizes.items() if key not in other}
    return {
        "Llama": LlamaConfig(**sizes),
        "Qwen2": Qwen2Config(**sizes),
        "Gemma2": Gemma2Config(**sizes, head_dim=hidden // heads, sliding_window=window),
        "GPT2": GPT2Config(**gpt2),
    }


def configured(
    folder: Path, architecture: PretrainedConfig, mode: str = "lora", **train: Any
) -> Config:
    """A run on random weights of `architecture`, whose config.json is written to `folder`."""
    architecture.save_pretrained(folder)
    return Config.model_validate(
        {
            "model": {"name": str(folder)},
            "tuning": {"mode": mode},
            "data": {"train_path": "none", "cache_dir": str(folder / "cache")},
            "train": {"output_dir": "none", **train},
        }
    )


def uniform_window(
    rows: int,
    length: int,
    supervised: int,
    micro_batches: int = 1,
    layout: Layout = "padded",
) -> Window:
    """Returns a window of `micro_batches` with `rows` each, all of one length."""
    return Window((((length, supervised),) * rows,) * micro_batches, layout)
