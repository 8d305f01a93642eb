"""Opens a run, a checkpoint or a model for use, and reads the configuration of a finished run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.config.load import load_config
from sft.config.schema import Config, Model, RunConfig, sections_of
from sft.data import audit, template
from sft.errors import ExportError
from sft.evaluate import generate
from sft.evaluate.answers import AnswerModel
from sft.evaluate.predictions import key_of
from sft.models import digests, load, pretrained
from sft.runtime import checkpoint, run_folder
from sft.tasks.registry import fine_tuning_tasks, load_run, task_of
from sft.tasks.sft.saved import refuse_another_base
from sft.tasks.sft.task import FineTune

CPU = torch.device("cpu")
Quantization = Literal["nf4"] | None
# A folder that came from elsewhere must not grant itself the right to run code.
# What it has learnt is in its own adapter, not in the one that it went on from.
AS_SAVED = ["model.trust_remote_code=false", "model.adapter=null"]


def load_run_config(run: Path, overrides: list[str] | None = None) -> Config:
    """Returns the configuration of a finished fine-tuning run, with overrides."""
    _refuse_unfinished(run)
    return load_config(run / "config.yaml", [*AS_SAVED, *(overrides or [])])


def load_any_run_config(run: Path, overrides: list[str]) -> RunConfig:
    """Returns the configuration of a finished run of any task, with overrides."""
    _refuse_unfinished(run)
    file = run / "config.yaml"
    has_model = "model" in sections_of(type(load_run(file)))
    return load_run(file, [*(AS_SAVED if has_model else []), *overrides])


def _refuse_unfinished(run: Path) -> None:
    """Raises ExportError if `run` is not a finished run, or if it is damaged."""
    if not (run / "config.yaml").is_file() or not (run / "final_checkpoint").exists():
        raise ExportError(
            f"{run}: expected a finished run (config.yaml and final_checkpoint/), found "
            f"{_describe(run)}"
        )
    _refuse_damaged(run / "final_checkpoint")


def _describe(run: Path) -> str:
    """Returns what is in the place of a finished run, and what to do."""
    if whole := _run_around(run):
        return f"a part of one; give RUN={whole}"
    if (run / "config.yaml").is_file():
        last = run_folder.newest_valid(run)
        use = f", or use its last checkpoint: make infer RUN={last}" if last else ""
        return (
            f"a run that has not finished; continue it with make train CONFIG={run}/config.yaml "
            f'ARGS="train.output_dir={run} train.resume_from_checkpoint=auto"{use}'
        )
    if own := _runs_in(run):
        return f"a folder with the runs {', '.join(own)}; give RUN={run / own[0]}"
    found = "a folder without them" if run.is_dir() else "a file" if run.exists() else "nothing"
    if beside := _runs_in(run.parent):
        return f"{found}; {run.parent} has the runs {', '.join(beside)}"
    return f"{found}; run `make train` first, or give RUN=<folder>"


def _run_around(folder: Path) -> Path | None:
    """Returns the run of which a file or folder is a part, at most three levels below it."""
    return next((each for each in folder.parents[:3] if (each / "config.yaml").is_file()), None)


def _runs_in(folder: Path) -> list[str]:
    """Returns the names of the first runs in a folder."""
    return sorted(file.parent.name for file in folder.glob("*/config.yaml"))[:12]


def load_trained(
    run: Path, config: Config, *, quantised: bool = True
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Returns the final model of a run, in fp32 on the CPU, and its tokenizer.

    `config` is what `load_run_config(run)` returned. `quantised=False` puts a QLoRA adapter on the
    original weights instead of those in 4 bits.
    """
    folder = run / "final_checkpoint"
    return task_of(config).load_saved(folder, config, "fp32", CPU, quantised=quantised)


@dataclass(frozen=True)
class Opening:
    """What to open and how: arguments of AccelerateConnector, and the device to compute on."""

    name: str
    adapter: str | None
    quantization: Quantization
    cache_dir: str | Path | None
    precision: str
    device: torch.device
    batch_size: int | None = None  # see `Decoder`


def open_model(opening: Opening) -> AnswerModel:
    """Returns the run, checkpoint, adapter or base model that is named, ready to answer."""
    folder = Path(opening.name)
    if (folder / "config.yaml").is_file() and not (folder / "config.json").exists():
        config, weights = load_run_config(folder), folder / "final_checkpoint"
    elif (folder / checkpoint.MANIFEST).exists() and (folder.parent / "config.yaml").is_file():
        _refuse_damaged(folder)
        config, weights = load_config(folder.parent / "config.yaml", AS_SAVED), folder
    elif part := _part_of_run(folder):
        config, weights = part, folder.parent
    elif opening.adapter is None and (task := _task_of_adapter(folder)):
        if (folder / checkpoint.MANIFEST).exists():  # a checkpoint without its run
            _refuse_damaged(folder)
        return open_model(replace(opening, name=task.base_name(folder), adapter=opening.name))
    elif not (folder / "config.json").exists() and (
        (folder.exists() and _run_around(folder)) or _runs_in(folder)
    ):
        raise ExportError(
            f"{folder}: expected a run, a checkpoint, a model or a hub id, found "
            f"{_describe(folder)}"
        )
    else:
        return _open_base(opening)
    return _open_run(opening, config, weights)


def _part_of_run(folder: Path) -> Config | None:
    """Returns the configuration for `folder`, a part of a checkpoint of a run; None for others."""
    run = folder.parents[1] / "config.yaml" if len(folder.parents) > 1 else folder
    parts = (task.overrides_for(folder) for task in fine_tuning_tasks())
    overrides = next((part for part in parts if part is not None), None)
    if overrides is None or not run.is_file():
        return None
    _refuse_damaged(folder.parent)
    return load_config(run, [*AS_SAVED, *overrides])


def _task_of_adapter(folder: Path) -> type[FineTune] | None:
    """Returns the task whose adapters look like those in `folder`; None if there is none."""
    return next((task for task in fine_tuning_tasks() if task.is_adapter(folder)), None)


def _open_run(opening: Opening, config: Config, weights: Path) -> AnswerModel:
    """Returns a run, or one of its checkpoints, as it was trained."""
    name = opening.name
    if opening.adapter is not None:
        raise ExportError(f"{name} is a run with weights of its own; give its base and the adapter")
    if opening.quantization and config.tuning.mode == "full":
        raise ExportError(
            f"{name}: quantization: a run of full fine-tuning is used as it was trained; for NF4 "
            f"give its model, {weights}"
        )
    if opening.quantization:
        tuning = config.tuning.model_copy(update={"mode": "qlora"})
        config = config.model_copy(update={"tuning": tuning})
    task = task_of(config)
    built, tokenizer = task.load_saved(weights, config, opening.precision, opening.device)
    own = f"{checkpoint.sha256(weights / checkpoint.MANIFEST)} {task.selection(config)}"
    base = digests.model_sha256(config.model) if config.tuning.mode != "full" else ""
    return _answer_model(
        opening, task.as_answer_model(built), tokenizer, base, own, config.tuning.mode
    )


def _refuse_damaged(folder: Path) -> None:
    """Raises ExportError for a damaged checkpoint."""
    if reason := checkpoint.fault(folder):
        raise ExportError(f"{folder} cannot be trusted: {reason}")


def _open_base(opening: Opening) -> AnswerModel:
    """Returns a base model, with an adapter if `opening` names one; downloads a hub id."""
    name, adapter = opening.name, opening.adapter
    if opening.cache_dir is not None and not Path(name).exists():
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        with pretrained.explain_load_errors(name):
            name = snapshot_download(name, cache_dir=opening.cache_dir, allow_patterns=wanted)
    settings = Model(name=name)
    mode = "qlora" if opening.quantization else "lora"  # storage: NF4, or the compute dtype
    tokenizer = pretrained.load_tokenizer(settings)
    base = load.load_base(settings, mode, opening.precision, opening.device)
    own = ""
    if adapter is not None:
        folder = Path(adapter)
        pretrained.refuse_special(adapter)
        task = _task_of_adapter(folder) or FineTune  # reports what is missing
        refuse_another_base(settings, task.recorded_base(folder))
        base = task.as_answer_model(task.with_adapter(base, name, folder))
        own = " ".join(checkpoint.sha256(file) for file in task.adapter_files(folder))
        if (folder / "tokenizer_config.json").exists():
            tokenizer = pretrained.load_tokenizer(Model(name=adapter))
    return _answer_model(opening, base.eval(), tokenizer, digests.model_sha256(settings), own, mode)


def _answer_model(
    opening: Opening, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *weights: str
) -> AnswerModel:
    """Returns the model. `weights` are digests and names that together identify its weights."""
    tokenizer = template.prepare_tokenizer(tokenizer)
    stop = generate.stop_ids(tokenizer, model.generation_config)
    rendering = audit.tokenizer_sha256(tokenizer), tokenizer.get_chat_template()
    identity = key_of((*weights, opening.precision), stop, rendering)
    return AnswerModel(
        model, stop, batch_size=opening.batch_size, tokenizer=tokenizer, identity=identity
    )
