"""Joins the processes of a run, and checks that they are the ones that were asked for.

Launchers fail silently. They may start one process in place of two, or two that do not know of
each other, and either trains without an error. So the number of processes is compared with what
was launched and with what was asked for, and the ranks compare their code, configuration and data.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, gather_object
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sft.config.load import with_values
from sft.config.schema import Configured, RunConfig, Train
from sft.errors import ConfigError, PeerError
from sft.runtime import hardware
from sft.runtime.hardware import resolve_precision
from sft.runtime.launcher import check_launch, wrong_world
from sft.runtime.log import Log
from sft.runtime.slurm import join_slurm
from sft.runtime.watchdog import Guard


@dataclass(frozen=True)
class Context:
    """The processes of a run, its log and its watchdog. By default nothing is logged or watched."""

    accelerator: Accelerator
    log: Log = field(default_factory=lambda: Log(None))
    guard: Guard = field(default_factory=Guard)


def drop_launch_requirements(config: Configured) -> Configured:
    """Returns `config` without its requirements on the launch, for use with any processes."""
    values: dict[str, Any] = dict.fromkeys(("train.num_processes", "train.deepspeed_config"))
    values |= {"train.engine": "ddp", "train.offload": False, "train.micro_batch": "auto"}
    values |= {"train.gradient_accumulation_steps": "auto", "train.context_parallel": 1}
    return with_values(config, values)


def start_processes(train: Train, *, shared: bool = False) -> Accelerator:
    """Joins the process group. Raises ConfigError if it is not the one that was asked for.

    `shared`: leaves other connectors of this process usable; Accelerate raises ValueError if their
    settings differ from these.
    """
    check_launch(train)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    precision, _ = resolve_precision(train)
    _refuse_conflicting_launch_file(train, precision)
    _forget_launch_file()
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
    torch.use_deterministic_algorithms(train.deterministic)
    on_cpu = not torch.cuda.is_available()
    if on_cpu and world > 1:
        local = processes_here(world)
        torch.set_num_threads(max(1, hardware.usable_cores() // local))
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed
    if not shared:
        _reset_accelerate()
    # Twice the watchdog's limit: the watchdog reports the missing rank, this timeout only aborts.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=2 * train.stall_timeout))
    if train.offload and not on_cpu:
        group.backend = "cuda:nccl,cpu:gloo"  # gloo for norms and gathered weights
    if train.engine == "deepspeed":
        plugin = deepspeed_plugin(train)
        _form_group_of_one()
        group.backend = "gloo" if on_cpu else group.backend
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[group])
        # Else transformers would split the weights for ZeRO-3 while it reads them, which fails with
        # NF4 and with the plan's fake tensors. Here every model is built whole and split later.
        unset_hf_deepspeed_config()
    else:
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        mixed = "bf16" if precision == "bf16" else "no"
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=[group, ddp])
    if accelerator.num_processes != world:
        raise wrong_world(world, accelerator.num_processes)
    return accelerator


class BetweenCollectives:
    """A context for what a rank does by itself between collective operations.

    An error would keep this rank from the next of them, for which the others wait. So it is raised
    at the end, and what comes after it is left out.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    def __call__(self, action: Callable[..., object], *arguments: Any) -> None:
        if self._error is None:
            try:
                action(*arguments)
            except Exception as error:  # noqa: BLE001  # it is raised later
                self._error = error

    def __enter__(self) -> BetweenCollectives:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._error is not None and kind is None:
            raise self._error


def _form_group_of_one() -> None:
    """Sets what a launcher would have set, since DeepSpeed needs a group even for one process."""
    if "RANK" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def keep_first_process() -> bool:
    """Lets the first of several processes go on by itself; returns False on those that must end."""
    join_slurm()
    is_first = os.environ.get("RANK", "0") == "0"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    return is_first


def _refuse_conflicting_launch_file(train: Train, precision: str) -> None:
    """Raises ConfigError if the variables that a launch file has set contradict `train`."""
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
            f"{os.environ.get('FSDP_VERSION', '1')}; only 2 is supported: "
            "set fsdp_config.fsdp_version: 2 in the file, or launch with "
            "ACCELERATE_CONFIG=configs/accelerate/fsdp2.yaml"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _refuse_conflicting_deepspeed(train)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise ConfigError(
            f"the Accelerate launch file asks for mixed_precision {launched}, the configuration "
            f"for {precision}: set train.precision={launched}, or 'no' in the file"
        )


def _refuse_conflicting_deepspeed(train: Train) -> None:
    """Raises ConfigError if the launch file and `train` configure DeepSpeed differently."""
    named = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    allowed = {"", "mixed_precision", "zero_stage", "deepspeed_config_file"}
    refused = [key for key in named if key not in allowed and not key.startswith("deepspeed_")]
    stage = deepspeed_settings(train)["zero_optimization"]["stage"]
    found = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(train.deepspeed_config))
    if found != str(stage):
        refused.append(f"zero_stage {found} (expected {stage})")
    if Path(file).resolve() != Path(str(train.deepspeed_config)).resolve():
        refused.append(f"deepspeed_config_file {file}")
    if refused:
        raise ConfigError(
            f"the Accelerate launch file sets {', '.join(refused)}; DeepSpeed's settings belong in "
            f"train.deepspeed_config ({train.deepspeed_config}): remove them from the launch file, "
            f"or launch with ACCELERATE_CONFIG=configs/accelerate/deepspeed_z{stage}.yaml"
        )


def _forget_launch_file() -> None:
    """Removes the variables of a launch file, which Accelerate and transformers would act on."""
    prefixes = ("FSDP_", "ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        del os.environ[name]
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)


def sum_over_ranks(values: list[Any], accelerator: Accelerator) -> list[float]:
    """Returns the sums of numbers and scalar tensors over ranks, in fp64. Collective.

    The host waits for the device once, and for plain numbers of a single process not at all.
    """
    are_numbers = not any(isinstance(value, torch.Tensor) for value in values)
    if are_numbers and accelerator.num_processes == 1:
        return [float(value) for value in values]
    place: Any = {"dtype": torch.float64, "device": accelerator.device}
    each = values if are_numbers else [torch.as_tensor(value, **place) for value in values]
    local = torch.tensor(each, **place) if are_numbers else torch.stack(each)
    return accelerator.reduce(local, "sum").tolist()


def processes_here(world: int) -> int:
    """Returns how many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def shards_within(train: Train, world: int, here: int) -> int | None:
    """Returns over how many processes FSDP2 splits weights, if not over all of them.

    `here`: the processes on a machine. Raises ConfigError if the processes make no such groups.
    """
    if train.engine != "fsdp" or train.shard_within is None or world == 1:
        return None
    number = here if train.shard_within == "node" else train.shard_within
    if number == 1 or world % number:
        raise ConfigError(
            f"train.shard_within: {train.shard_within}: {world} processes, {here} on this machine, "
            f"cannot be cut into groups of {number}: expected a divisor above 1 of {world}"
        )
    return number if number < world else None


def describe_world(accelerator: Accelerator) -> dict[str, str]:
    """Returns texts: the `devices` of all ranks, and their `spread` over machines. Collective."""
    world, device = accelerator.num_processes, accelerator.device
    cpu = f"CPU with {torch.get_num_threads()} thread(s)"
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    names = Counter(gather_object([own]))
    local = processes_here(world)
    backend = f", {torch.distributed.get_backend()}" if world > 1 else ""
    machines = f" on {math.ceil(world / local)} machines, {local} on each" if local < world else ""
    devices = ", ".join(f"{number} x {name}" for name, number in names.items())
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        machines = "; `accelerate launch` starts one without a GPU, whatever --num_processes says"
    return {"devices": devices, "spread": f"{machines}{backend}"}


def collect_facts(config: RunConfig, data: Mapping[str, str]) -> dict[str, str]:
    """Returns what must be equal on all ranks, by name. `data` has digests of the training data.

    Values of the configuration may be secret, so only their digests are in the result.
    """
    values = {
        f"{section}.{key}": sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }
    return {**values, **data, **software()}


def software() -> dict[str, str]:
    """Returns the versions of libraries, and a digest of this package."""
    code = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    return {
        **{f"version of {name}": found for name, found in hardware.library_versions().items()},
        "code of sft": sha256(b"".join(code)).hexdigest(),
    }


def refuse_differences(facts: Mapping[str, str]) -> None:
    """Raises PeerError, on all ranks, if `facts` are not the same on all. Collective.

    The most frequent value counts as right; with two ranks, that of the first.
    """
    ranks: list[dict[str, str]] = gather_object([dict(facts)])
    problems = []
    for name in sorted({name for each in ranks for name in each}):
        found = [each.get(name, "absent") for each in ranks]
        usual = Counter(found).most_common(1)[0][0]
        for value in dict.fromkeys(value for value in found if value != usual):
            others = [rank for rank, each in enumerate(found) if each == value]
            problems.append(
                f"{name}: {_short(value)} on rank {', '.join(map(str, others))}, "
                f"{_short(usual)} on rank {found.index(usual)}"
            )
    if problems:
        raise PeerError(
            "the ranks are not one run; these differ (values of the configuration are shown as "
            "digests):\n  " + "\n  ".join(problems) + "\nStart all of them with the same "
            "configuration, data, environment and code."
        )


def _short(value: str) -> str:
    return value[:12] if re.fullmatch(r"[0-9a-f]{64}", value) else value


def end_processes(accelerator: Accelerator) -> None:
    """Waits for all ranks of a run that ended well. Keeps their process group for the next run.

    A second group would find the addresses of the first one in the launcher's store, and hang.
    """
    accelerator.wait_for_everyone()
    _reset_accelerate()
    atexit.register(leave_process_group)


def _reset_accelerate() -> None:
    """Clears what Accelerate keeps of an earlier run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def leave_process_group() -> None:
    """Leaves the process group, which is safe only before the interpreter exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Keys that a DeepSpeed file may not have, because `train` sets their values.
REFUSED_DEEPSPEED_KEYS = {
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
    """Reads `train.deepspeed_config`. Raises ConfigError for keys that cannot be used."""
    path = Path(str(train.deepspeed_config))
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.deepspeed_config: cannot read {path}: {error}") from error
    if refused := [
        f"{key} (use {option})" for key in settings if (option := REFUSED_DEEPSPEED_KEYS.get(key))
    ]:
        raise ConfigError(
            f"{path}: remove {', '.join(refused)}: the training configuration sets it"
        )
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
        # Compiling this backend takes a minute at its first use, and gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings |= {
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's Adam would be compiled at first use
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the engine accumulates and sets the boundaries
        "gradient_clipping": train.max_grad_norm,
    }
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
