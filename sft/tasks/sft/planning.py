"""What the plan needs to know of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from sft.config.schema import Config
from sft.data import batches, files, template
from sft.data.cache import Prepared
from sft.data.examples import Examples, pack
from sft.evaluate.generate import bytes_per_row
from sft.models import adapters, load
from sft.runtime.log import Log
from sft.tasks.base import Row, Traits
from sft.tasks.registry import make_task
from sft.train.task import Task

# --- fine-tuning -------------------------------------------------------------------------------


def _traits(config: Config) -> Traits:
    text = load.architecture(config.model).get_text_config()
    return Traits(
        text,
        Path(config.data.cache_dir),
        config.tuning.mode,
        max(1, config.crowd.num_agents),
        config.crowd.layer,
        config.crowd.num_agents > 1 and config.crowd.lambda_sw > 0,
        config.model.attn_implementation,
        text.vocab_size,
    )


def _skeleton(config: Config, depth: int | None) -> nn.Module:
    load.check_attention(config.model)  # a plan for a GPU loads nothing with it
    arch = load.architecture(config.model)
    base = AutoModelForCausalLM.from_config(
        arch if depth is None else load.shallow(arch, depth),
        trust_remote_code=config.model.trust_remote_code,
    )
    if config.tuning.mode == "full":
        return base
    return adapters.add_adapters(base.requires_grad_(False), config.tuning, config.crowd)


def _blank(
    config: Config,
    precision: str,
    rows: Sequence[Row],
    group: Any,
    budget: batches.Budget,
    weights: bool,
) -> Task:
    packed = pack(
        (i, files.Row([], None, "rehearsal", i), _example(*row)) for i, row in enumerate(rows)
    )
    examples = Examples(packed)
    prepared = Prepared(SimpleNamespace(pad_token_id=0), examples, examples, {})  # type: ignore[arg-type]
    built = load.build(config, precision, group.device, weights=weights)
    return make_task(config, prepared, built, group, Log(None), budget)


def _example(length: int, supervised: int) -> template.Example:
    ids = [0] * length
    return template.Example(ids, [template.IGNORED] * (length - supervised) + ids[:supervised])


def _answering(config: Config, precision: str, prompts: Sequence[int], world_size: int) -> int:
    settings = config.evaluation
    asked = prompts[: settings.num_examples]
    if not len(asked):
        return 0
    rows = min(settings.batch_size, math.ceil(len(asked) / world_size))
    arch = load.architecture(config.model)
    each = bytes_per_row(arch, precision, int(max(asked)), settings.max_new_tokens)
    return rows * each * max(1, config.crowd.num_agents)
