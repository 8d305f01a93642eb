"""Decides which processes a launch starts, from the environment and Accelerate's file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from sft.config.schema import Train
from sft.errors import ConfigError, UserError

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import ClusterConfig

PLAIN = Path(__file__).with_name("launch.yaml")
LAUNCHES = ("MULTI_GPU", "FSDP", "DEEPSPEED")  # every other distributed_type starts one process
PORT = 29500  # at which machines connect, unless MASTER_PORT is set


@dataclass(frozen=True)
class World:
    """The number of processes that this machine starts, and the machines of the run."""

    per_machine: int
    machines: int = 1
    rank: int = 0
    """The number of this machine, from 0."""
    address: str | None = None
    """The address of the first machine; None if there is only one."""
    port: int = PORT

    @property
    def num_processes(self) -> int:
        return self.per_machine * self.machines


def launch_file(train: Train) -> Path:
    """Returns ACCELERATE_CONFIG; for DDP, the file of `make setup-accelerate`; or `PLAIN`."""
    if named := os.environ.get("ACCELERATE_CONFIG"):
        return Path(named)
    if train.engine == "ddp":
        from accelerate.commands.config.config_args import default_yaml_config_file

        default = Path(default_yaml_config_file)
        if default.is_file() and _kind(read_launch_file(default)) == "MULTI_GPU":
            return default
    return PLAIN


def read_launch_file(path: Path) -> ClusterConfig:
    """Reads an Accelerate launch file. Raises UserError for anything else."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    try:
        config = load_config_from_file(str(path))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a configuration of Accelerate: {error}") from error
    if not isinstance(config, ClusterConfig):
        raise UserError(f"{path} is for Amazon SageMaker, which cannot be launched from here")
    return config


def _kind(file: ClusterConfig) -> str:
    return str(getattr(file.distributed_type, "value", file.distributed_type))


def world_of(train: Train, file: ClusterConfig) -> World:
    """Returns the world of a launch. Raises ConfigError if its values do not fit together.

    It reads NUM_PROCESSES (on each machine), NUM_MACHINES, MACHINE_RANK, MASTER_ADDR and
    MASTER_PORT. What these do not set is taken from the launch file, if that is for several
    machines, and from train.num_processes; by default, one process per GPU (two without a GPU).
    """
    given: dict[str, Any] = vars(file) if (file.num_machines or 1) > 1 else {}
    machines = read_number("NUM_MACHINES", given.get("num_machines", 1), least=1)
    per_machine = read_number("NUM_PROCESSES", None, least=1) or _per_machine(train, machines)
    if machines == 1:
        return World(per_machine)
    rank = read_number("MACHINE_RANK", given.get("machine_rank"), least=0)
    if rank is None or rank >= machines:
        raise ConfigError(
            f"NUM_MACHINES={machines}: expected a MACHINE_RANK of 0 to {machines - 1}, another on "
            f"each machine, found {rank}"
        )
    address = os.environ.get("MASTER_ADDR") or given.get("main_process_ip")
    if not address:
        raise ConfigError(
            f"NUM_MACHINES={machines}: expected MASTER_ADDR, the address of the machine of "
            f"MACHINE_RANK=0, the same on each machine (and a free MASTER_PORT there: {PORT})"
        )
    port = read_number("MASTER_PORT", given.get("main_process_port") or PORT, least=1)
    return World(per_machine, machines, rank, address, port)


def read_number(name: str, default: int | None, least: int) -> Any:
    """Returns the whole number in a variable of the environment, or `default` if it is not set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}: expected a whole number from {least} on, found {text!r}")
    return int(text)


def _per_machine(train: Train, machines: int) -> int:
    if train.num_processes is None:  # in another process: CUDA would stay open in this one
        command = [sys.executable, "-m", "sft.runtime.hardware"]
        root = Path(__file__).parents[2]
        counted = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
        return int(counted.stdout)
    if train.num_processes % machines:
        raise ConfigError(
            f"train.num_processes: {train.num_processes} cannot be shared evenly by {machines} "
            "machines; set NUM_PROCESSES, the number on each"
        )
    return train.num_processes // machines


def refuse_hidden_failures(path: Path, file: ClusterConfig) -> None:
    """Raises ConfigError for a launch file that starts only one process, or hides failures."""
    if _kind(file) not in LAUNCHES:
        raise ConfigError(
            f"{path}: expected distributed_type {', '.join(LAUNCHES[:-1])} or {LAUNCHES[-1]} (for "
            f"processes on CPUs as well), found {_kind(file)}, which starts one process"
        )
    if file.debug:
        raise ConfigError(
            f"{path}: with debug: true Accelerate hides failures; set it false and, for its "
            "checks, ACCELERATE_DEBUG_MODE=true in the environment"
        )
