"""Other names of keys: those of Hugging Face's TrainingArguments and example scripts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from sft.config.section import Origins
from sft.errors import shorten


class Alias(NamedTuple):
    """The key that another name stands for, and how values are translated."""

    key: str
    values: Mapping[Any, Any] = {}
    """Value of the other name -> value of the key (UNSET: not set). Other values stay the same."""

    @property
    def is_switch(self) -> bool:
        """Returns whether the name takes only true and false."""
        return bool(self.values) and all(isinstance(value, bool) for value in self.values)


UNSET = object()

ALIASES = {
    "output_dir": Alias("train.output_dir"),  # two sections have these two: a flag means train's
    "seed": Alias("train.seed"),
    "num_train_epochs": Alias("train.epochs"),
    "per_device_train_batch_size": Alias("train.micro_batch"),
    "per_device_eval_batch_size": Alias("evaluation.batch_size"),
    "lr_scheduler_type": Alias(
        "train.schedule", {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}
    ),
    "optim": Alias(
        "train.optimizer",
        {
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "adamw_bnb_8bit": "adamw_8bit",
            "adamw_torch_8bit": "torchao_adamw_8bit",
            "adamw_torch_4bit": "torchao_adamw_4bit",
            "paged_adamw_32bit": "paged_adamw",
            "schedule_free_adamw": "schedule_free",
            "lion_32bit": "lion",
            "lion_8bit": "bitsandbytes.optim.Lion8bit",
            "sgd": "torch.optim.SGD",
            "adagrad": "torch.optim.Adagrad",
            "rmsprop": "torch.optim.RMSprop",
        },
    ),
    "bf16": Alias("train.precision", {True: "bf16", False: "fp32"}),
    "fp16": Alias("train.precision", {True: "fp16", False: UNSET}),
    "mixed_precision": Alias("train.precision", {"no": "fp32"}),
    "neftune_noise_alpha": Alias("train.neftune_alpha"),
    "label_smoothing_factor": Alias("train.label_smoothing"),
    "loss_type": Alias("train.loss", {"nll": "cross_entropy"}),
    "logging_steps": Alias("train.log_steps"),
    "wandb": Alias("train.trackers", {True: ["wandb"], False: UNSET}),  # of earlier versions
    "full_determinism": Alias("train.deterministic"),
    "torch_compile": Alias("train.compile"),
    "deepspeed": Alias("train.deepspeed_config"),
    "packing": Alias("train.layout", {True: "packed", False: "padded"}),
    "model_name_or_path": Alias("model.name"),
    "model_revision": Alias("model.revision"),
    "lora_r": Alias("tuning.r"),
    "lora_target_modules": Alias("tuning.target_modules", {"all-linear": "auto"}),
    "dataset_name": Alias("data.train_path"),
    "train_file": Alias("data.train_path"),
    "validation_file": Alias("data.eval_path"),
    "max_train_samples": Alias("data.max_rows"),
    "max_length": Alias("data.max_seq_len"),
    "max_seq_length": Alias("data.max_seq_len"),
}


def replace_aliases(tree: dict[str, Any], origins: Origins, problems: list[str]) -> None:
    """Renames each alias in `tree` to its key; adds contradictions with the key to `problems`."""
    for name, alias in ALIASES.items():
        section, key = alias.key.split(".")
        keys = tree.get(section)
        if name == key or not isinstance(keys, dict) or name not in keys:
            continue
        found, place = keys.pop(name), origins.get(f"{section}.{name}", "")
        if alias.is_switch and not isinstance(found, bool):
            wrong = f"expected true or false, found {shorten(found)}"
            problems.append(f"{section}.{name} ({place}): {wrong}")
            continue
        value = alias.values.get(found, found) if isinstance(found, Hashable) else found
        if value is UNSET:
            continue
        if key in keys and keys[key] != value:
            problems.append(
                f"{section}.{name} ({place}): another name of {alias.key}, which is given as well, "
                f"with another value: {shorten(value)} and {shorten(keys[key])}; remove one"
            )
        keys[key] = value
        origins[alias.key] = f"{place} as {name}"
