"""Opens a run, a checkpoint or a model for use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.load import load_config
from sft.config.schema import Config, Model
from sft.data import audit, template
from sft.errors import ExportError
from sft.evaluate import generate
from sft.evaluate.answers import Speaker
from sft.evaluate.predictions import key_of
from sft.models import digest, load
from sft.runtime import checkpoint
from sft.serve import runs
from sft.tasks.crowd import agents
from sft.tasks.crowd.agents import Agents
from sft.tasks.crowd.aggregator import Mixture, aggregator_of
from sft.tasks.crowd.files import META

Quantization = Literal["nf4"] | None


# --- what can be opened --------------------------------------------------------------------------


@dataclass(frozen=True)
class Opening:
    """What is opened, and how: arguments of AccelerateConnector, and where it is to compute."""

    name: str
    adapter: str | None
    quantization: Quantization
    cache_dir: str | Path | None
    precision: str
    device: torch.device


def open_speaker(asked: Opening) -> Speaker:
    """The model that is named, ready to answer."""
    folder = Path(asked.name)
    if (folder / "config.yaml").exists() and not (folder / "config.json").exists():
        config, weights = runs.run_config(folder), folder / "final_checkpoint"
    elif (folder / checkpoint.MANIFEST).exists() and (folder.parent / "config.yaml").exists():
        _require_whole(folder)
        untrusting = ["model.trust_remote_code=false"]
        config, weights = load_config(folder.parent / "config.yaml", untrusting), folder
    elif agent := _agent_in_run(folder):
        config, weights = agent, folder.parent
    elif asked.adapter is None and any((folder / name).exists() for name in runs.ADAPTED):
        if (folder / checkpoint.MANIFEST).exists():  # a checkpoint without its run
            _require_whole(folder)
        return open_speaker(replace(asked, name=runs.base_of(folder), adapter=asked.name))
    else:
        return _open_model(asked)
    return _open_run(asked, config, weights)


def _agent_in_run(folder: Path) -> Config | None:
    """The configuration of one agent of a run's crowd, if `folder` is its."""
    crowd, run = folder.parent, folder.parent.parent / "config.yaml"
    number = folder.name.removeprefix("agent")
    if not ((crowd / META).exists() and run.exists() and number.isdecimal()):
        return None
    _require_whole(crowd)
    return load_config(run, ["model.trust_remote_code=false", f"crowd.agent={number}"])


def _open_run(asked: Opening, config: Config, weights: Path) -> Speaker:
    """A run, or one of its checkpoints, as it was trained."""
    name = asked.name
    if asked.adapter is not None:
        raise ExportError(f"{name} is a run with weights of its own; give its base and the adapter")
    if asked.quantization and config.tuning.mode == "full":
        raise ExportError(
            f"{name}: quantization: a run of full fine-tuning is used as it was trained; for NF4 "
            f"give its model, {weights}"
        )
    if asked.quantization:
        tuning = config.tuning.model_copy(update={"mode": "qlora"})
        config = config.model_copy(update={"tuning": tuning})
    built, tokenizer = runs.load_tuned(
        Path(name), config, asked.precision, asked.device, weights=weights
    )
    of = f"{checkpoint.sha256(weights / checkpoint.MANIFEST)} {config.crowd.agent}"
    base = digest.fingerprint(config.model) if config.tuning.mode != "full" else ""
    return _speaker(built, tokenizer, base, of, config.tuning.mode, asked.precision)


def _require_whole(folder: Path) -> None:
    if reason := checkpoint.fault(folder):
        raise ExportError(f"{folder} cannot be trusted: {reason}")


def _open_model(asked: Opening) -> Speaker:
    """A model by itself, or with an adapter."""
    name, adapter = asked.name, asked.adapter
    if asked.cache_dir is not None and not Path(name).exists():
        name = _downloaded(name, Path(asked.cache_dir))
    settings = Model(name=name)
    mode = "qlora" if asked.quantization else "lora"  # storage: NF4, or the compute dtype
    tokenizer = load.load_tokenizer(settings)
    base = load.load_base(settings, mode, asked.precision, asked.device)
    of = ""
    if adapter is not None:
        base = runs.with_adapter(base, settings, Path(adapter))
        names = (agents.WEIGHTS, *runs.ADAPTED)
        files = (file for name in names for file in sorted(Path(adapter).rglob(name)))
        of = " ".join(map(checkpoint.sha256, files))
        if (Path(adapter) / "tokenizer_config.json").exists():
            tokenizer = load.load_tokenizer(Model(name=adapter))
    return _speaker(base.eval(), tokenizer, digest.fingerprint(settings), of, mode, asked.precision)


def _speaker(built: nn.Module, tokenizer: PreTrainedTokenizerBase, *of: str) -> Speaker:
    tokenizer = template.prepare_tokenizer(tokenizer)
    if isinstance(built, Agents):
        built = Mixture(built, aggregator_of(built)).eval()
    stop = generate.stop_ids(tokenizer, built.generation_config)
    written = audit.tokenizer_sha256(tokenizer), tokenizer.get_chat_template()
    return Speaker(built, tokenizer, stop, key_of(of, stop, written))


def _downloaded(name: str, cache_dir: Path) -> str:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    with load.explained(name):
        return str(snapshot_download(name, cache_dir=cache_dir, allow_patterns=wanted))
