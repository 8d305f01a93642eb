"""The processes of a run: joining them, and making sure that they are the ones that were asked for.

Launchers fail silently: two processes that each believe to be alone, or one where two were asked
for, train without an error. So the world is compared with what was launched and with what was
asked.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DeepSpeedPlugin

from sft import hardware
from sft.config import Config, ConfigError, Train, with_values


def resolve_precision(
    train: Train, devices: list[hardware.Device] | None = None
) -> tuple[str, str]:
    """(precision, reason) on these GPUs (None: on this process's own)."""
    if train.precision != "auto":
        return train.precision, "configured"
    on_gpu = torch.cuda.is_available() if devices is None else bool(devices)
    if not on_gpu:
        return "fp32", "no GPU; fp32 is exact and on CPUs seldom slower"
    own = devices is None and torch.cuda.is_bf16_supported(including_emulation=False)
    if own or (devices and all(device.bf16 for device in devices)):
        return "bf16", "the GPU computes in bf16"
    return "fp32", "the GPU has no bf16"


def any_launch(config: Config) -> Config:
    """`config` without its demands on the launch: for using a run's result, not repeating it."""
    free = {"train.num_processes": None, "train.engine": "ddp", "train.deepspeed_config": None}
    free |= {"train.micro_batch": "auto", "train.gradient_accumulation_steps": "auto"}
    return with_values(config, free)


def start_processes(train: Train) -> Accelerator:
    """Joins the process group. Raises ConfigError if it is not the one that was asked for."""
    check_launch(train)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    precision, _ = resolve_precision(train)
    _refuse_other_launchers(train, precision)
    on_cpu = not torch.cuda.is_available()
    if on_cpu and world > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        torch.set_num_threads(max(1, hardware.usable_cores() // local))
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guesses so
    # Longer than the watch of `guard`, which names who is missing; a collective just aborts.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=2 * train.stall_timeout))
    if train.engine == "deepspeed":
        group.backend = "gloo" if on_cpu else group.backend
        accelerator = Accelerator(
            deepspeed_plugin=_deepspeed_plugin(train, precision), kwargs_handlers=[group]
        )
    else:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            kwargs_handlers=[
                group,
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
            ],
        )
    if accelerator.num_processes != world:
        raise _another_world(world, accelerator.num_processes)
    return accelerator


def check_launch(train: Train) -> None:
    """Raises ConfigError if the launcher did not start as many processes as were asked for."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if train.num_processes not in (None, world):
        raise _another_world(train.num_processes, world)


def _another_world(expected: int | None, found: int) -> ConfigError:
    return ConfigError(
        f"expected {expected} process(es), found {found}: the launcher did not start one run of "
        f"{expected}. Launch with `make train-distributed NUM_PROCESSES=n`, "
        "`torchrun --nproc-per-node n`, or with an Accelerate file of distributed_type MULTI_GPU "
        "(also for CPU processes)."
    )


def _refuse_other_launchers(train: Train, precision: str) -> None:
    flags = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp"}
    for variable, engine in flags.items():
        if os.environ.get(variable) == "true" and train.engine != engine:
            raise ConfigError(
                f"the Accelerate launch file asks for {engine}, train.engine says {train.engine}: "
                f"set train.engine={engine} where that is supported, or launch with "
                "ACCELERATE_CONFIG=configs/accelerate/ddp.yaml"
            )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise ConfigError(
            f"the Accelerate launch file asks for mixed_precision {launched}, the configuration "
            f"for {precision}: set train.precision={launched} (bf16 or fp32), or 'no' in the file"
        )


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
    """Those of `train.deepspeed_config`. Raises ConfigError for what cannot be used."""
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
    if stage not in (1, 2):
        raise ConfigError(f"{path}: zero_optimization.stage: expected 1 or 2, found {stage}")
    return settings


def _deepspeed_plugin(train: Train, precision: str) -> DeepSpeedPlugin:
    import deepspeed

    settings = deepspeed_settings(train)
    if not torch.cuda.is_available():
        # Otherwise compiled at first use, for a minute, where gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # accumulation is ours: boundaries are set by hand
        "gradient_clipping": train.max_grad_norm,
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
    }
    return DeepSpeedPlugin(hf_ds_config=settings)


def end_processes(accelerator: Accelerator) -> None:
    """Ends a successful run of several ranks: leaves the group and, abruptly, the process.

    gloo can abort in its destructors at interpreter exit, after all work is done and on disk; a
    rank that has closed its files has nothing left to do there.
    """
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)
