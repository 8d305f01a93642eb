"""Finished runs: their configuration and their trained model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.load import load_config
from sft.config.schema import Config, RunConfig
from sft.errors import ExportError
from sft.runtime import checkpoint
from sft.tasks.registry import load_run, task_of


def load_run_config(run: Path, overrides: list[str] | None = None) -> Config:
    """Returns the configuration of a finished run of fine-tuning, with overrides."""
    refuse_unfinished(run)
    # A folder that came from elsewhere must not grant itself the right to run code.
    untrusting = ["model.trust_remote_code=false", *(overrides or [])]
    return load_config(run / "config.yaml", untrusting)


def load_any_run_config(run: Path, overrides: list[str]) -> RunConfig:
    """Returns the configuration of a finished run of any task, with overrides."""
    refuse_unfinished(run)
    if isinstance(load_run(run / "config.yaml"), Config):
        return load_run_config(run, overrides)
    return load_run(run / "config.yaml", overrides)


def refuse_unfinished(run: Path) -> None:
    """Raises ExportError if `run` is not the undamaged folder of a finished run."""
    if not (run / "config.yaml").exists() or not (run / "final_checkpoint").exists():
        raise ExportError(
            f"{run}: expected a finished run (config.yaml and final_checkpoint/), found "
            f"{'a folder without them' if run.is_dir() else 'nothing'}; run `make train` first, "
            "or give RUN=<folder>"
        )
    if reason := checkpoint.fault(run / "final_checkpoint"):
        raise ExportError(f"{run / 'final_checkpoint'} cannot be trusted: {reason}")


def load_tuned(
    run: Path,
    config: Config,
    precision: str,
    device: torch.device,
    *,
    quantised: bool = True,
    weights: Path | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Returns the trained model of a run, as it was trained, and its tokenizer.

    `config` is what `load_run_config(run)` returned. `quantised=False` puts a QLoRA adapter on the
    original weights instead of NF4. `weights` names another checkpoint than the final one.
    """
    folder = weights or run / "final_checkpoint"
    return task_of(config).load_saved(folder, config, precision, device, quantised=quantised)
