"""The command that starts vLLM's server for a run or a model, where the program `vllm` exists."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Collection
from pathlib import Path

from sft.errors import UserError
from sft.serve.runs import load_run_config

MISSING = (
    "there is no program `vllm`; install it into an environment of its own (python3 -m venv vllm; "
    "vllm/bin/pip install vllm) and add that environment's bin to the end of PATH"
)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank that vLLM accepts


def is_installed() -> bool:
    """Returns whether there is a program `vllm`. Its libraries need an environment of their own."""
    return shutil.which("vllm") is not None


def command(name: str, adapter: str | None = None, served: str | None = None) -> list[str]:
    """Returns the command, without an address, for a run, a merged folder, a model or a hub id.

    An adapter is served on its base. `served`: the model's name at the server; None: that of its
    folder. Raises UserError for what vLLM would serve otherwise than it was trained.
    """
    folder = Path(name)
    served = served or (folder.name if folder.exists() else name)
    if adapter is not None:
        raise UserError("ADAPTER: merge it for vLLM (make merge), or give ENGINE=own")
    if not (folder / "config.yaml").is_file() or (folder / "config.json").exists():
        return ["vllm", "serve", name, "--served-model-name", served]
    config, weights = load_run_config(folder), folder / "final_checkpoint"
    tuning, revision = config.tuning, config.model.revision
    if tuning.mode == "full":
        return ["vllm", "serve", str(weights), "--served-model-name", served]
    rank = next((each for each in RANKS if each >= tuning.r), None)
    if tuning.mode == "qlora" or rank is None or not (weights / "adapter_config.json").exists():
        raise UserError(
            f"{name}: vLLM takes LoRA adapters of rank {RANKS[-1]} or less on a base in full; make "
            f"merge RUN={name}, then MODEL={name}/merged, or give ENGINE=own"
        )
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{served}={weights}"]
    base = [config.model.name, *(["--revision", revision] if revision else [])]
    return ["vllm", "serve", *base, "--tokenizer", str(weights), *lora]


def split_args(args: str, own: Collection[str]) -> list[str]:
    """Returns options of `vllm serve` as words. Raises UserError for those in `own`."""
    try:
        words = shlex.split(args)
    except ValueError as error:
        raise UserError(f"VLLM_ARGS: expected options of `vllm serve`: {error}") from None
    for word in words:
        option = word.removeprefix("--").partition("=")[0].replace("_", "-")
        if word.startswith("--") and option in own:
            raise UserError(f"VLLM_ARGS: --{option} is set by this program; leave it out")
    return words
