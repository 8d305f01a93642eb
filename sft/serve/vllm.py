"""The command that starts vLLM's server for a run or a model, where the program `vllm` exists."""

from __future__ import annotations

import shutil
from pathlib import Path

from sft.errors import UserError
from sft.serve.runs import load_run_config

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank that vLLM accepts


def is_installed() -> bool:
    """Returns whether there is a program `vllm`. Its libraries need an environment of their own."""
    return shutil.which("vllm") is not None


def command(name: str, adapter: str | None, host: str, port: int) -> list[str]:
    """Returns the command for a run, a merged folder, a model or a hub id.

    An adapter is served on its base under the name of its run. Raises UserError for what vLLM would
    serve otherwise than it was trained.
    """
    folder, more = Path(name), ["--host", host, "--port", str(port)]
    served = folder.name if folder.exists() else name
    if adapter is not None:
        raise UserError("ADAPTER: merge it for vLLM (make merge), or give ENGINE=own")
    if not (folder / "config.yaml").is_file() or (folder / "config.json").exists():
        return ["vllm", "serve", name, "--served-model-name", served, *more]
    config, weights = load_run_config(folder), folder / "final_checkpoint"
    tuning = config.tuning
    if tuning.mode == "full":
        return ["vllm", "serve", str(weights), "--served-model-name", served, *more]
    rank = next((each for each in RANKS if each >= tuning.r), None)
    if tuning.mode == "qlora" or rank is None or not (weights / "adapter_config.json").exists():
        raise UserError(
            f"{name}: vLLM takes LoRA adapters of rank {RANKS[-1]} or less on a base in full; make "
            f"merge RUN={name}, then MODEL={name}/merged, or give ENGINE=own"
        )
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{served}={weights}"]
    return ["vllm", "serve", config.model.name, "--tokenizer", str(weights), *lora, *more]
