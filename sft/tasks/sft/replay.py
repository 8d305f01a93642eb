"""Asks the base general prompts before training, and replays its answers (`data.replay`).

An answer becomes a row of tokens: the prompt, and what the base wrote, which is learnt. The end is
learnt only where the base ended. So nothing is taught that the base did not do, and answers that
were cut off teach no end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory
from filelock import FileLock
from torch import nn

from sft.config.load import with_values
from sft.config.schema import BASE_ANSWERS, Config, Generation
from sft.data import audit, cache, template
from sft.data.tokenised import IGNORED
from sft.errors import ConfigError, DataError
from sft.evaluate import drift
from sft.evaluate.answers import AnswerModel
from sft.evaluate.general import GeneralSet, domain_of, load_general
from sft.evaluate.generate import stop_ids
from sft.evaluate.predictions import key_of
from sft.models import digests, load
from sft.runtime.console import atomic_write
from sft.runtime.hardware import resolve_precision

ANSWER_TOKENS = 32  # of the base to a general prompt, at most
REPLAYED = 1  # the half of the general prompts that runs replay
MEASURED = 0  # the half by which such a run is measured


@dataclass(frozen=True)
class Alone:
    """The processes of work that one process does before it joins others."""

    num_processes: int = 1
    process_index: int = 0


def with_base_answers(config: Config, tick: Callable[[], None] = lambda: None) -> Config:
    """Returns `config` with a file of the base's answers where it names `base`.

    One process of a machine makes the file, if it is not in `data.cache_dir`; others wait.
    """
    if config.data.replay.path != BASE_ANSWERS:
        return config
    if config.model.adapter:
        raise ConfigError(
            "data.replay.path: base would be model.name without the adapter that the run begins "
            "with (model.adapter); give a path of rows"
        )
    general = load_general(config.evaluation.general_path, config.data.cache_dir).half(REPLAYED)
    tokenizer = cache.load_tokenizer(config)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    path = base_path(config, tokenizer, general, device).with_suffix(".jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _write_rows(path, config, tokenizer, general, device, tick)
    except OSError as error:
        raise DataError(
            f"data.replay: cannot write {path}: {error.strerror}; make room, or set data.cache_dir "
            "to another folder"
        ) from None
    return with_values(config, {"data.replay.path": str(path)})


def _write_rows(
    path: Path,
    config: Config,
    tokenizer: Any,
    general: GeneralSet,
    device: torch.device,
    tick: Callable[[], None],
) -> None:
    with open_base(config, tokenizer, device) as base:
        said = drift.measure_base(base, general, Alone(), tick)
    with atomic_write(path, sync=True) as file:
        for prompt, each in zip(general.prompts, said.answers, strict=True):
            learnt = [*each.answer, *([] if each.ended_by is None else [each.ended_by])]
            if learnt:
                ids, labels = each.prompt + learnt, [IGNORED] * len(each.prompt) + learnt
                row = {"input_ids": ids, "labels": labels, "domain": domain_of(prompt)}
                file.write(json.dumps(row) + "\n")


def base_path(config: Config, tokenizer: Any, general: GeneralSet, device: torch.device) -> Path:
    """Returns the file of what the base says, named by all that this depends on."""
    tuning = config.tuning
    made_of = (
        digests.model_sha256(config.model.model_copy(update={"adapter": None})),
        config.model.model_dump(include={"attn_implementation", "stop_tokens"}),
        tuning.four_bits if tuning.mode == "qlora" else "",
        resolve_precision(config.train)[0],
        device.type,
        audit.tokenizer_sha256(tokenizer),
        tokenizer.get_chat_template(),
        general.sha256,
        (drift.FORMAT, drift.TOP, drift.BATCH, drift.MOST_TOKENS, ANSWER_TOKENS),
        torch.__version__,
    )
    return Path(config.data.cache_dir, "base", f"{key_of(*made_of)}.safetensors")


@contextmanager
def open_base(config: Config, tokenizer: Any, device: torch.device) -> Iterator[AnswerModel]:
    """Yields the base as the run uses it, without adapters; frees it afterwards."""
    precision, tuning = resolve_precision(config.train)[0], config.tuning
    model = load.load_base(
        config.model, tuning.mode, precision, device, quantization=tuning.four_bits
    )
    yield answer_model(model.eval(), tokenizer)
    del model
    release_memory()


def answer_model(model: nn.Module, tokenizer: Any) -> AnswerModel:
    """Returns a model that answers general prompts, greedily and briefly."""
    tokenizer = template.prepare_tokenizer(tokenizer)
    stop = stop_ids(tokenizer, model.generation_config)
    settings = Generation(max_new_tokens=ANSWER_TOKENS)
    return AnswerModel(model, stop, settings, tokenizer=tokenizer, identity="")
