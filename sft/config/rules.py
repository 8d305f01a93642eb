"""Combinations of configuration values that cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.config.schema import Crowd, Rule, Section

OTHERS = tuple(key for key in Crowd.model_fields if key != "num_agents")  # of a crowd
DIVERSITY = ("num_projections", "representation", "layer", "pooling", "normalise")  # how measured


def _defaults(section: type[Section], keys: Sequence[str]) -> list[Any]:
    return [section.model_fields[key].default for key in keys]


RULES = [
    Rule(
        ("train.save_best", "train.eval_steps"),
        lambda metric, interval: metric is not None and interval is None,
        "nothing would be evaluated on the way: set train.eval_steps",
    ),
    Rule(
        ("train.engine", "train.deepspeed_config"),
        lambda engine, path: engine == "deepspeed" and path is None,
        "engine: deepspeed needs train.deepspeed_config (for example configs/deepspeed_z2.json)",
    ),
    Rule(
        ("train.deepspeed_config", "train.engine"),
        lambda path, engine: path is not None and engine != "deepspeed",
        "is only read with train.engine: deepspeed; set that, or remove this key",
    ),
    Rule(
        ("train.engine", "train.optimizer"),
        lambda engine, optimizer: engine != "ddp" and optimizer != "adamw",
        "fsdp and deepspeed keep slices of AdamW's state, which bitsandbytes packs: use adamw",
    ),
    Rule(
        ("train.offload", "train.engine"),
        lambda offload, engine: offload and engine != "fsdp",
        "is only read with train.engine: fsdp (DeepSpeed offloads as its own file says)",
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
        ("data.system", "data.system_prompt"),
        lambda system, prompt: system != "keep" and prompt is None,
        "replace and prepend need a text: set data.system_prompt",
    ),
    Rule(
        ("data.system_prompt", "data.system"),
        lambda prompt, system: prompt is not None and system == "keep",
        "is only read with data.system: replace or prepend; set that, or remove this key",
    ),
    Rule(
        ("evaluation.metrics", "evaluation.labels"),
        lambda names, labels: "classification" in names and labels is None,
        "classification counts answers by label: set evaluation.labels",
    ),
    Rule(
        ("evaluation.labels", "evaluation.metrics"),
        lambda labels, names: labels is not None and "classification" not in names,
        "is only read with evaluation.metrics: [classification]; set that, or remove this key",
    ),
    Rule(
        ("crowd.num_agents", "tuning.mode"),
        lambda agents, mode: agents > 0 and mode == "full",
        "agents are LoRA adapters on a frozen base: set tuning.mode: lora or qlora",
    ),
    Rule(
        ("crowd.agent", "crowd.num_agents"),
        lambda agent, number: agent is not None and 0 < number <= agent,
        "is no agent of this crowd: give 0 to crowd.num_agents - 1",
    ),
    Rule(
        ("crowd.layer", "crowd.representation"),
        lambda layer, representation: layer != -1 and representation == "logits",
        "is only read with crowd.representation: hidden; set that, or remove this key",
    ),
    Rule(
        ("crowd.fit_fraction", "crowd.aggregator"),
        lambda share, kind: share != Crowd().fit_fraction and kind != "learned",
        "is only read with crowd.aggregator: learned; set that, or remove this key",
    ),
    Rule(
        ("crowd.concentration", "crowd.aggregator"),
        lambda value, kind: value != Crowd().concentration and kind != "sampled",
        "is only read with crowd.aggregator: sampled; set that, or remove this key",
    ),
    Rule(
        ("crowd.lambda_sw", *(f"crowd.{key}" for key in DIVERSITY)),
        lambda weight, *others: weight == 0 and [*others] != _defaults(Crowd, DIVERSITY),
        "0 measures no diversity, whose other keys could be read; raise it, or remove them",
    ),
    Rule(
        ("crowd.num_agents", *(f"crowd.{key}" for key in OTHERS)),
        lambda agents, *others: agents == 0 and [*others] != _defaults(Crowd, OTHERS),
        "there is no crowd whose other keys could be read; set it, or remove them",
    ),
    *(
        Rule(
            (key,),
            lambda path: not is_safe_path(path),
            "must name a folder: printable characters, at most 200, without '..' and '~'",
        )
        for key in ("train.output_dir", "classify.output_dir")
    ),
]


def is_safe_path(path: str) -> bool:
    """Absolute ones are safe: whoever starts a run says where, and scratch disks are elsewhere."""
    parts = Path(path).parts
    is_name = path.isprintable() and len(path) <= 200 and Path(path).name.strip()
    return bool(is_name) and ".." not in parts and not path.startswith("~")
