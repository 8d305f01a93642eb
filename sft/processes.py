"""The processes of a run: joining them, and making sure that they are the ones that were asked for.

Launchers fail silently: two processes that each believe to be alone, or one where two were asked
for, train without an error. So the world is compared with what was launched and with what was
asked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DeepSpeedPlugin, gather_object
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sft import hardware
from sft.config import AnyConfig, ConfigError, Configured, PeerError, Train, with_values


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


def any_launch(config: Configured) -> Configured:
    """`config` without its demands on the launch: for using a run's result, not repeating it."""
    free: dict[str, Any] = dict.fromkeys(("train.num_processes", "train.deepspeed_config"))
    free |= {"train.engine": "ddp", "train.offload": False, "train.micro_batch": "auto"}
    free |= {"train.gradient_accumulation_steps": "auto"}
    return with_values(config, free)


def start_processes(train: Train) -> Accelerator:
    """Joins the process group. Raises ConfigError if it is not the one that was asked for."""
    check_launch(train)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    precision, _ = resolve_precision(train)
    _refuse_other_launchers(train, precision)
    _forget_launch_file()
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    on_cpu = not torch.cuda.is_available()
    if on_cpu and world > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        torch.set_num_threads(max(1, hardware.usable_cores() // local))
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guesses so
    # Longer than the watch of `guard`, which names who is missing; a collective just aborts.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=2 * train.stall_timeout))
    if train.offload and not on_cpu:
        group.backend = "cuda:nccl,cpu:gloo"  # norms and whole weights of shards on the host
    if train.engine == "deepspeed":
        plugin = _deepspeed_plugin(train)
        _be_a_group_of_one()
        group.backend = "gloo" if on_cpu else group.backend
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[group])
        # Under ZeRO-3 transformers would split weights while it reads them, which neither NF4 nor
        # the plan's models on fake tensors can have: one way to build a model, split afterwards.
        unset_hf_deepspeed_config()
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


def _be_a_group_of_one() -> None:
    """A process without a launcher: DeepSpeed wants a group also for one."""
    if "RANK" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(told | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def be_alone() -> bool:
    """Makes the first of several processes one of its own; False on the others, which may go."""
    join_slurm()
    is_first = os.environ.get("RANK", "0") == "0"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    return is_first


def check_launch(train: Train) -> None:
    """Raises ConfigError if the launcher did not start as many processes as were asked for."""
    join_slurm()
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
    """Raises ConfigError if the launch file, known by what it exports, contradicts `train`."""
    flags = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp"}
    for variable, engine in flags.items():
        if os.environ.get(variable) == "true" and train.engine != engine:
            raise ConfigError(
                f"the Accelerate launch file asks for {engine}, train.engine says {train.engine}: "
                f"set train.engine={engine}, or launch with "
                "ACCELERATE_CONFIG=configs/accelerate/ddp.yaml, which fits every engine"
            )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") != "2":
        raise ConfigError(
            "the Accelerate launch file asks for FSDP version "
            f"{os.environ.get('FSDP_VERSION', '1')}; only 2 is here: set fsdp_config.fsdp_version: "
            "2 in the file, or launch with ACCELERATE_CONFIG=configs/accelerate/fsdp2.yaml"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _refuse_other_deepspeed(train)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise ConfigError(
            f"the Accelerate launch file asks for mixed_precision {launched}, the configuration "
            f"for {precision}: set train.precision={launched} (bf16 or fp32), or 'no' in the file"
        )


def _refuse_other_deepspeed(train: Train) -> None:
    """The launch file may name the stage and the file of `train`, and no setting besides."""
    named = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    free = {"", "mixed_precision", "zero_stage", "deepspeed_config_file"}
    more = [key for key in named if key not in free and not key.startswith("deepspeed_")]
    stage = deepspeed_settings(train)["zero_optimization"]["stage"]
    found = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(train.deepspeed_config))
    if found != str(stage):
        more.append(f"zero_stage {found} (there it is {stage})")
    if Path(file).resolve() != Path(str(train.deepspeed_config)).resolve():
        more.append(f"deepspeed_config_file {file}")
    if more:
        raise ConfigError(
            f"the Accelerate launch file sets {', '.join(more)}; DeepSpeed's settings are in "
            f"train.deepspeed_config ({train.deepspeed_config}): remove them from the launch file, "
            f"or launch with ACCELERATE_CONFIG=configs/accelerate/deepspeed_z{stage}.yaml"
        )


def _forget_launch_file() -> None:
    """Takes away what an agreed launch file would make Accelerate and transformers do besides."""
    prefixes = ("FSDP_", "ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        del os.environ[name]
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)


# --- SLURM ---------------------------------------------------------------------------------------


def join_slurm() -> None:
    """Gives a task that srun started the variables that torchrun would have set.

    Only where it is one of several tasks and no launcher has set them.
    """
    own = os.environ
    if "WORLD_SIZE" in own or "SLURM_PROCID" not in own or int(own.get("SLURM_NTASKS", "1")) < 2:
        return
    nodes = own.get("SLURM_STEP_NODELIST") or own.get("SLURM_JOB_NODELIST", "localhost")
    tasks = own.get("SLURM_STEP_TASKS_PER_NODE") or own.get("SLURM_TASKS_PER_NODE", "")
    here = tasks_per_node(tasks)[int(own.get("SLURM_NODEID", "0")) :] or [int(own["SLURM_NTASKS"])]
    own["RANK"], own["WORLD_SIZE"] = own["SLURM_PROCID"], own["SLURM_NTASKS"]
    own["LOCAL_RANK"], own["LOCAL_WORLD_SIZE"] = own.get("SLURM_LOCALID", "0"), str(here[0])
    own.setdefault("MASTER_ADDR", first_host(nodes))
    own.setdefault("MASTER_PORT", str(15000 + int(own.get("SLURM_JOB_ID", "0")) % 15000))


def first_host(nodes: str) -> str:
    """Of a list as SLURM writes it: 'gpu[07-09,12],login' -> 'gpu07'."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def tasks_per_node(text: str) -> list[int]:
    """'4(x2),3' -> [4, 4, 3]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


# --- one run, not several ------------------------------------------------------------------------


LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


def facts(config: AnyConfig, data: Mapping[str, str]) -> dict[str, str]:
    """What all ranks must have alike, by name. Of configured values the digest: some are secret.

    `data`: digests of what the task is trained on.
    """
    values = {
        f"{section}.{key}": _digest(json.dumps(value, sort_keys=True))
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return {
        **values,
        **data,
        **{f"version of {name}": _version(name) for name in LIBRARIES},
        "code of sft": hashlib.sha256(b"".join(code)).hexdigest(),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def agree(accelerator: Accelerator, facts: Mapping[str, str]) -> None:
    """Raises PeerError, on all ranks, if `facts` are not the same on all. Collective.

    What most ranks have is taken for right, of two ranks what the first one has.
    """
    if accelerator.num_processes == 1:
        return
    told: list[dict[str, str]] = gather_object([dict(facts)])
    problems = []
    for name in sorted({name for each in told for name in each}):
        found = [each.get(name, "absent") for each in told]
        usual = Counter(found).most_common(1)[0][0]
        for value in dict.fromkeys(value for value in found if value != usual):
            others = [rank for rank, each in enumerate(found) if each == value]
            problems.append(
                f"{name}: {_short(value)} on rank {', '.join(map(str, others))}, "
                f"{_short(usual)} on rank {found.index(usual)}"
            )
    if problems:
        raise PeerError(
            "the ranks are not one run; these differ (values of the configuration by their "
            "digest):\n  " + "\n  ".join(problems) + "\nStart all of them with the same "
            "configuration, data, environment and code."
        )


def _short(value: str) -> str:
    return value[:12] if re.fullmatch(r"[0-9a-f]{64}", value) else value


def described(accelerator: Accelerator) -> dict[str, str]:
    """`devices` of all ranks and how ranks are `spread` over machines, for people. Collective."""
    world, device = accelerator.num_processes, accelerator.device
    cpu = f"CPU with {torch.get_num_threads()} thread(s)"
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    names = Counter(gather_object([own]) if world > 1 else [own])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    backend = f", {torch.distributed.get_backend()}" if world > 1 else ""
    machines = f" on {math.ceil(world / local)} machines, {local} on each" if local < world else ""
    devices = ", ".join(f"{number} x {name}" for name, number in names.items())
    return {"devices": devices, "spread": f"{machines}{backend}"}


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
    if stage not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage: expected 1, 2 or 3, found {stage}")
    offloads = {
        key: told for key, told in settings["zero_optimization"].items() if "offload" in key
    }
    tried = {"offload_optimizer"} if stage > 1 else set()
    if offloads.keys() - tried or any(told.get("device") == "nvme" for told in offloads.values()):
        raise ConfigError(
            f"{path}: {', '.join(offloads)}: only offload_optimizer to the device cpu is "
            "supported, with stages 2 and 3; use it, or train.engine: fsdp with train.offload: true"
        )
    return settings


def _deepspeed_plugin(train: Train) -> DeepSpeedPlugin:
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
