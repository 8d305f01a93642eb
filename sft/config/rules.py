"""Combinations of configuration values that cannot work."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft.config.lora import CHANGES_BASE, Lora
from sft.config.schema import (
    BASE_ANSWERS,
    OF_LOSS,
    HeldOutMetric,
    MetricName,
    Replay,
    Rule,
    RunConfig,
)
from sft.config.section import OnlyWith, Section


def overlap(one: str | None, other: str | None) -> bool:
    """Returns whether two folders are the same or one lies in the other, also through links."""
    if not one or not other:  # missing, which is reported elsewhere
        return False
    return _identity(Path(one)) in _path_of(other) or _identity(Path(other)) in _path_of(one)


def lies_in(folder: str | None, paths: str | list[str] | None) -> bool:
    """Returns whether a folder is one of `paths`, or lies in one of them; files hold nothing."""
    named = [paths] if isinstance(paths, str) else paths or []
    holders = {_identity(Path(each)) for each in named if os.path.isdir(each)}
    return bool(folder) and not holders.isdisjoint(_path_of(str(folder)))


def _path_of(folder: str) -> list[tuple[int, int] | str]:
    real = Path(os.path.realpath(folder))
    return [_identity(each) for each in (real, *real.parents)]


def _identity(folder: Path) -> tuple[int, int] | str:
    """Returns what a folder has in common with its other names: mounts and links."""
    try:
        found = folder.stat()
    except (OSError, ValueError):
        return os.path.realpath(folder)
    return found.st_dev, found.st_ino


SCORES = {*typing.get_args(HeldOutMetric)} - {*OF_LOSS}


def _is_scored(metric: str, names: list[str]) -> bool:
    """Returns whether `evaluation.metrics` has that metric."""
    is_of_labels = metric not in typing.get_args(MetricName)
    return metric in names or (is_of_labels and "classification" in names)


def _score_rules(key: str) -> Iterator[Rule]:
    """Yields the rules of a key of `train` that may name a score of answers."""
    yield Rule(
        (f"train.{key}", "evaluation.during"),
        lambda metric, number: metric in SCORES and number == 0,
        "nothing would be answered during training: set evaluation.during",
    )
    yield Rule(
        (f"train.{key}", "evaluation.metrics"),
        lambda metric, names: metric in SCORES and not _is_scored(metric, names),
        "is no score of evaluation.metrics: add it there (accuracy and macro_ belong to "
        "classification)",
    )


RULES = [
    Rule(
        ("data.cache_dir", "train.output_dir"),
        overlap,
        "must not be, hold or lie in train.output_dir: a cache is pruned, and a run is moved aside",
    ),
    Rule(
        ("train.output_dir", "data.train_path"),
        lies_in,
        "lies in the folder data.train_path, so the run's own files would be read as data",
    ),
    Rule(
        ("train.save_best", "train.eval_steps"),
        lambda metric, interval: metric is not None and interval is None,
        "nothing would be evaluated during training: set train.eval_steps",
    ),
    Rule(
        ("train.early_stopping.metric", "train.eval_steps"),
        lambda metric, interval: metric is not None and interval is None,
        "nothing would be evaluated during training: set train.eval_steps",
    ),
    Rule(
        ("evaluation.during", "train.eval_steps"),
        lambda number, interval: number > 0 and interval is None,
        "nothing would be answered during training: set train.eval_steps",
    ),
    *(rule for key in ("save_best", "early_stopping.metric") for rule in _score_rules(key)),
    Rule(
        ("train.checkpoint_async", "train.save_steps", "train.save_best"),
        lambda behind, interval, metric: behind and interval is None and metric is None,
        "no checkpoint would be written during training: set train.save_steps, or remove this key",
    ),
    Rule(
        ("train.max_shard_size",),
        lambda size: not re.fullmatch(r"[1-9]\d*[KMGT]B", size),
        "must be a whole number with KB, MB, GB or TB, such as 5GB",
    ),
    Rule(
        ("train.engine", "train.deepspeed_config"),
        lambda engine, path: engine == "deepspeed" and path is None,
        "engine: deepspeed needs train.deepspeed_config (for example configs/deepspeed_z2.json)",
    ),
    Rule(
        ("train.precision", "train.engine"),
        lambda precision, engine: precision == "bf16_pure" and engine == "deepspeed",
        "DeepSpeed keeps an fp32 copy of the trained weights, so weights in bf16 would save "
        "nothing: set train.engine: fsdp, or train.precision: bf16",
    ),
    Rule(
        ("train.context_parallel", "train.neftune_alpha"),
        lambda size, alpha: size > 1 and alpha > 0,
        "noise is drawn for whole examples, of which a process has a part: set neftune_alpha: 0",
    ),
    Rule(
        ("train.context_parallel", "tuning.lora.init_lora_weights"),
        lambda size, init: size > 1 and init == "eva",
        "EVA looks at whole rows, of which a process has a part: use another initialisation",
    ),
    Rule(
        ("train.context_parallel", "train.compile"),
        lambda size, compiles: size > 1 and compiles is True,
        "compiled layers cannot exchange tokens around attention: set train.compile: false",
    ),
    Rule(
        ("train.reduce_dtype", "train.engine"),
        lambda dtype, engine: dtype != "fp32" and engine == "deepspeed",
        "DeepSpeed exchanges gradients itself: set communication_data_type in "
        "train.deepspeed_config, and remove this key",
    ),
    Rule(
        ("train.reduce_dtype", "train.precision"),
        lambda dtype, precision: dtype != "fp32" and precision == "bf16_pure",
        "gradients of bf16_pure are in bf16 and are exchanged so: remove this key",
    ),
    Rule(
        ("train.fp8", "tuning.mode"),
        lambda eight, mode: eight and mode == "qlora",
        "a 4-bit base is dequantised to bf16 and computed in it: set tuning.mode: lora or full, or "
        "remove this key",
    ),
    Rule(
        ("train.fp8", "train.engine"),
        lambda eight, engine: eight and engine == "deepspeed",
        "it has not been tried with ZeRO, which gathers weights by hooks on other layers: set "
        "train.engine: fsdp, or remove this key",
    ),
    Rule(
        ("train.optimizer_in_backward", "train.max_grad_norm"),
        lambda early, norm: early and norm > 0,
        "the norm of the whole gradient is known only after the backward pass: set "
        "train.max_grad_norm: 0, or remove this key",
    ),
    Rule(
        ("train.optimizer_in_backward", "train.skip_nonfinite"),
        lambda early, allowed: early and allowed > 0,
        "when a gradient is found not to be finite, weights have been updated: set "
        "train.skip_nonfinite: 0, or remove this key",
    ),
    Rule(
        ("train.optimizer_in_backward", "train.precision"),
        lambda early, precision: early and precision == "fp16",
        "in fp16 a step whose gradients overflow is repeated, which needs the weights of before: "
        "set train.precision: bf16, or remove this key",
    ),
    Rule(
        ("train.optimizer_in_backward", "train.engine"),
        lambda early, engine: early and engine == "deepspeed",
        "DeepSpeed updates in its own step, after the backward pass: set train.engine: fsdp, or "
        "remove this key",
    ),
    Rule(
        ("model.init", "tuning.mode"),
        lambda init, mode: init == "random" and mode != "full",
        "random weights have nothing to adapt: set tuning.mode: full",
    ),
    Rule(
        ("data.eval_path", "data.eval_fraction"),
        lambda path, fraction: path is None and fraction == 0,
        "nothing would be held out: give data.eval_path or an eval_fraction above 0",
    ),
    Rule(
        ("data.mix", "data.train_path"),
        lambda weights, path: (
            weights is not None and len(weights) != (len(path) if isinstance(path, list) else 1)
        ),
        "must have one weight for each path of data.train_path",
    ),
    Rule(
        ("data.replay.share", "data.replay.path"),
        lambda share, path: path is None and share != Replay().share,
        "is only read with data.replay.path; set that, or remove this key",
    ),
    Rule(
        ("data.replay.share", "evaluation.max_drift"),
        lambda share, limit: share == "auto" and limit is None,
        "auto looks for a share under a limit: set evaluation.max_drift",
    ),
    Rule(
        ("data.replay.share", "train.engine"),
        lambda share, engine: share == "auto" and engine != "ddp",
        "short runs come first, and only with ddp can a process train again: run `make train` or "
        "`make train-distributed` once, and give the share that it chose",
    ),
    Rule(
        ("data.replay.share", "crowd.num_agents"),
        lambda share, agents: share == "auto" and agents > 0,
        "a verdict compares one model with its base: give a share",
    ),
    Rule(
        ("data.replay.path", "model.init"),
        lambda path, init: path == BASE_ANSWERS and init == "random",
        "a model of random weights has no answers to keep: give a path of rows",
    ),
    Rule(
        ("data.system", "data.system_prompt"),
        lambda system, prompt: system != "keep" and prompt is None,
        "replace and prepend need a text: set data.system_prompt",
    ),
    Rule(
        ("evaluation.metrics", "evaluation.labels"),
        lambda names, labels: "classification" in names and labels is None,
        "classification counts answers by label: set evaluation.labels",
    ),
    Rule(
        ("crowd.num_agents", "tuning.mode"),
        lambda agents, mode: agents > 0 and mode == "full",
        "agents are LoRA adapters on a frozen base: set tuning.mode: lora or qlora",
    ),
    Rule(
        ("crowd.num_agents", "tuning.router"),
        lambda agents, router: agents > 0 and router == "trained",
        "agents adapt linear layers of a frozen base: set tuning.router: frozen",
    ),
    Rule(
        ("crowd.agent", "crowd.num_agents"),
        lambda agent, number: agent is not None and 0 < number <= agent,
        "is no agent of this crowd: give 0 to crowd.num_agents - 1",
    ),
]


def _broken_lora(*keys: str) -> Callable[[Callable[..., bool], str], Rule]:
    """Returns a function that makes a rule on keys of `tuning`, the first of which is wrong."""
    return lambda broken, message: Rule(tuple(f"tuning.{key}" for key in keys), broken, message)


def _changes_base(init: Any) -> bool:
    return isinstance(init, str) and init.startswith(CHANGES_BASE)


INIT = "lora.init_lora_weights"
PATTERNS = ("lora.use_rslora", "lora.rank_pattern", "lora.alpha_pattern")
LORA_RULES = [
    _broken_lora("quantization")(
        lambda kind: kind == "int8",
        "bitsandbytes also computes in 8 bits what it stores in 8 bits: it rounds activations, "
        "and keeps whole the columns with the largest values of a micro-batch, so the cut of a "
        "batch would change the result: use nf4 or fp4",
    ),
    _broken_lora("quantization", "mode")(
        lambda kind, mode: kind == "none" and mode == "qlora",
        "qlora is a base in 4 bits: set tuning.mode: lora, or remove this key",
    ),
    _broken_lora("quantization", "mode")(
        lambda kind, mode: kind in ("nf4", "fp4") and mode == "full",
        "weights in 4 bits cannot be trained: set tuning.mode: qlora, or none",
    ),
    _broken_lora(INIT, "mode")(
        lambda init, mode: _changes_base(init) and mode == "qlora",
        "changes the weights of the base, and a 4-bit base would be quantised once more: the "
        "adapter would not fit the base that others load; use tuning.mode: lora, or loftq",
    ),
    _broken_lora(INIT, "mode")(
        lambda init, mode: init == "loftq" and mode != "qlora",
        "loftq fits adapters to the error of a 4-bit base: set tuning.mode: qlora",
    ),
    _broken_lora(INIT, "r", "lora_alpha", *PATTERNS)(
        lambda init, r, alpha, *others: init == "loftq" and (alpha != r or any(others)),
        "PEFT fits loftq without the scale: set lora_alpha equal to r, without use_rslora and "
        "patterns",
    ),
    _broken_lora(INIT, "lora.rank_pattern", "lora.alpha_pattern")(
        lambda init, *patterns: init == "eva" and any(patterns),
        "PEFT's eva writes patterns of its own: leave these out",
    ),
    _broken_lora(INIT, *PATTERNS)(
        lambda init, rslora, *patterns: _changes_base(init) and rslora and any(patterns),
        "with use_rslora and a pattern, PEFT cannot express what is learnt as an adapter of the "
        "base as it is: leave one of them out",
    ),
    _broken_lora(INIT, "r")(
        lambda init, r: init == "orthogonal" and isinstance(r, int) and r % 2 == 1,
        "orthogonal needs an even tuning.r",
    ),
    _broken_lora("lora.lora_bias", INIT)(
        lambda bias, init: bias and not isinstance(init, bool),
        "PEFT initialises it with init_lora_weights: true or false only",
    ),
    _broken_lora("lora.lora_bias", "lora.use_dora")(
        lambda bias, dora: bias and dora, "DoRA has no bias: leave one of them out"
    ),
    _broken_lora("lora.layers_pattern", "lora.layers_to_transform")(
        lambda pattern, layers: pattern is not None and layers is None,
        "is read with layers_to_transform only: set that, or remove this key",
    ),
    _broken_lora("lora.layers_to_transform", "target_modules")(
        lambda layers, targets: (
            layers is not None and isinstance(targets, str) and targets != "auto"
        ),
        "a regular expression in target_modules names the layers itself: give names, or leave "
        "this key out",
    ),
    _broken_lora("lora.target_parameters", "lora_dropout", "lora.use_dora", "lora.lora_bias")(
        lambda parameters, *others: parameters is not None and any(others),
        "PEFT adapts parameters without lora_dropout, use_dora and lora_bias: leave them out",
    ),
    Rule(
        ("model.adapter", "tuning.mode"),
        lambda adapter, mode: adapter is not None and mode == "full",
        "an adapter is trained with tuning.mode: lora or qlora",
    ),
    Rule(
        ("model.adapter", "crowd.num_agents"),
        lambda adapter, agents: adapter is not None and agents > 0,
        "agents begin with adapters of their own: remove one of the two",
    ),
    Rule(
        ("model.new_tokens", "crowd.num_agents"),
        lambda tokens, agents: tokens and agents > 0,
        "agents share the embeddings of the base: add tokens to the base first, with one model",
    ),
    Rule(
        ("tuning.lora", "crowd.num_agents"),
        lambda lora, agents: agents > 0 and lora not in (Lora(), Lora().model_dump(), {}),
        "agents are plain LoRA adapters of one shape: remove this section",
    ),
]


def rules_of(schema: type[RunConfig]) -> list[Rule]:
    """Returns the rules of a schema: those of all tasks, of its own task, and of its keys."""
    return [*RULES, *LORA_RULES, *schema.rules, *_rules_of_keys(schema)]


def conditions(section: type[Section], key: str) -> list[OnlyWith]:
    """Returns the conditions under which a key of a section is read."""
    of_key = [item for item in section.model_fields[key].metadata if isinstance(item, OnlyWith)]
    of_section = section.only_with
    if of_section is None or of_section.path.endswith(f".{key}"):  # a key cannot depend on itself
        return of_key
    return [of_section, *of_key]


def _rules_of_keys(schema: type[RunConfig]) -> Iterator[Rule]:
    """Yields a rule for each condition of a key: unless it holds, the key must have its default."""
    for path, section, key in schema.paths():
        for condition in conditions(section, key):
            yield Rule(
                (path, condition.path),
                lambda value, other, default=section.model_fields[key].default, on=condition: (
                    value != default and not on.holds(other)
                ),
                f"is only read with {condition}; set that, or remove this key",
            )
