"""Reads DeepSpeed's configuration file and refuses keys that `train` owns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin

from sft.config.schema import Train
from sft.errors import ConfigError

# Keys of a DeepSpeed file that train.* owns; two places for one value would let one of them lie.
DEEPSPEED_OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.max_tokens",
    "gradient_accumulation_steps": "train.max_tokens",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
}


def deepspeed_settings(train: Train) -> dict[str, Any]:
    """Reads `train.deepspeed_config`. Raises ConfigError for what cannot be used."""
    path = Path(str(train.deepspeed_config))
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.deepspeed_config: cannot read {path}: {error}") from error
    if owned := [
        f"{key} (use {DEEPSPEED_OWNED[key]})" for key in settings if key in DEEPSPEED_OWNED
    ]:
        raise ConfigError(f"{path}: remove {', '.join(owned)}: the training configuration sets it")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage: expected 1, 2 or 3, found {stage}")
    offloads = {k: v for k, v in settings["zero_optimization"].items() if "offload" in k}
    supported = {"offload_optimizer"} if stage > 1 else set()
    if offloads.keys() - supported or any(v.get("device") == "nvme" for v in offloads.values()):
        raise ConfigError(
            f"{path}: {', '.join(offloads)}: only offload_optimizer to the device cpu is "
            "supported, with stages 2 and 3; use it, or train.engine: fsdp with train.offload: true"
        )
    return settings


def deepspeed_plugin(train: Train) -> DeepSpeedPlugin:
    import deepspeed

    settings = deepspeed_settings(train)
    if not torch.cuda.is_available():
        # Otherwise compiled at first use, for a minute, where gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings |= {
        "zero_force_ds_cpu_optimizer": False,  # its own Adam would be compiled at first use
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # accumulation is ours: boundaries are set by hand
        "gradient_clipping": train.max_grad_norm,
    }
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
