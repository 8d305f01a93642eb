"""Writes Accelerate's launch file and proves that it starts as many processes as it says.

On a terminal Accelerate's own wizard asks; the answers that fit this machine are shown first.
Without a terminal, or with `--auto`, the recommended file is written. The file is then tried: it
launches `sft.runtime.worker`, whose ranks sum their numbers and write what they saw. Only these
results count. A gloo run can end with an error after its work, and a file that says MULTI_CPU and
two processes starts one, without a message.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sft import cli
from sft.errors import UserError
from sft.runtime import hardware
from sft.runtime.children import run_captured
from sft.runtime.console import make_console, table
from sft.runtime.hardware import Hardware
from sft.runtime.output import show
from sft.runtime.worker import Result
from sft.runtime.world import read_launch_file

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import ClusterConfig

VERIFY_SECONDS = 180  # a cold file system can take a minute to import torch
TAIL_LINES = 15
# If another launcher has set these, the workers would form another world than the file says.
WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
WORLD_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PMI_", "OMPI_COMM_", "MV2_COMM_")


def setup_accelerate_options(parser: cli.Parser) -> None:
    parser.add_argument("--config-file", type=Path, help="default: where Accelerate looks for it")
    parser.add_argument("--auto", action="store_true", help="write the recommended file unasked")
    parser.add_argument("--verify-only", action="store_true", help="try an existing file")


def setup_accelerate(args: Namespace) -> None:
    """Writes the file and tries it. Raises UserError if it does not start what it says."""
    from accelerate.commands.config.config_args import default_yaml_config_file

    target = args.config_file or Path(default_yaml_config_file)  # follows HF_HOME
    machine = hardware.detect(target)
    if args.verify_only:
        if not target.is_file():
            raise UserError(f"{target} does not exist: `make setup-accelerate` writes it")
    elif args.auto or not sys.stdin.isatty():
        write_recommended(target, machine)
    else:
        show_recommended(machine)
        run_wizard(target)
    verify(target, machine)


def recommended(machine: Hardware) -> ClusterConfig:
    """Returns a launch file for one process per GPU, or for two on CPUs.

    MULTI_GPU selects torchrun, which several processes need. The training configuration, not this
    file, decides about the precision.
    """
    from accelerate.commands.config.config_args import ClusterConfig

    number = hardware.default_num_processes(machine)
    return ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type="MULTI_GPU" if number > 1 else "NO",
        num_processes=number,
        main_process_port=0 if number > 1 else None,  # a free one: two runs can start at once
        gpu_ids="all",
        mixed_precision="no",
        use_cpu=False,
        debug=False,
    )


def write_recommended(target: Path, machine: Hardware) -> None:
    """Writes the recommended file; a copy of a different one is kept beside it."""
    config = recommended(machine)
    with _keep_copy(target) as copy:
        (config.to_json_file if target.suffix == ".json" else config.to_yaml_file)(str(target))
    gpus, cpus = f"{len(machine.devices)} GPU(s)", f"{config.num_processes} processes on the CPU"
    is_same = copy is not None and not copy.exists()
    done = f"{target} already is the recommended file" if is_same else f"wrote {target}"
    show(f"{done} for {gpus if machine.devices else cpus}")


@contextmanager
def _keep_copy(target: Path) -> Iterator[Path | None]:
    """Yields a copy of `target`, or None if there is no such file; makes its folder.

    The copy has the first free name of `.bak`, `.bak1`, ... It is removed if `target` is the same
    at the end.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder of {target}: {error.strerror}") from error
    if not target.exists():
        yield None
        return
    names = (f"{target.name}.bak{number or ''}" for number in itertools.count())
    copy = next(path for path in map(target.with_name, names) if not path.exists())
    shutil.copy2(target, copy)
    yield copy
    if target.exists() and target.read_bytes() == copy.read_bytes():
        copy.unlink()
    else:
        show(f"{target} existed: kept as {copy.name} beside it")


def show_recommended(machine: Hardware) -> None:
    """Prints what was detected, and what to answer."""
    console = make_console()
    console.print(hardware.machine_table(machine))
    columns = ("the wizard asks", "answer for this machine")
    console.print(table("\nRecommended answers", columns, wizard_answers(machine), left=2))
    if not machine.devices:
        console.print(
            "multi-GPU is right here too: it selects the launcher that starts several processes, "
            "which then run on the CPU. multi-CPU would start one, without a message."
        )


def wizard_answers(machine: Hardware) -> list[tuple[str, str]]:
    """Returns question and answer, in the order of accelerate/commands/config/cluster.py, 1.15."""
    number = recommended(machine).num_processes
    kind, engines = "No distributed training", ["DeepSpeed"]
    first = [("Do you want to run your training on CPU only?", "no")]
    count = []
    if number > 1:
        kind, engines = "multi-GPU", ["DeepSpeed", "FullyShardedDataParallel", "Megatron-LM"]
        first = [
            ("How many different machines will you use?", "1"),
            ("Should distributed operations be checked while running for errors?", "no"),
        ]
        count = [("How many GPU(s) should be used?", str(number))]
    return [
        ("In which compute environment are you running?", "This machine"),
        ("Which type of machine are you using?", kind),
        *first,
        ("Do you wish to optimize your script with torch dynamo?", "no"),
        *((f"Do you want to use {engine}?", "no") for engine in engines),
        *count,
        ("What GPU(s) (by id) should be used?", "all"),
        ("Would you like to enable numa efficiency?", "no"),
        ("Do you wish to use mixed precision?", "no (the training configuration decides)"),
    ]


def run_wizard(target: Path) -> None:
    """Runs `accelerate config`. Raises UserError if it wrote nothing."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "config"]
    with _keep_copy(target):
        status = subprocess.run([*command, "--config_file", str(target)], check=False).returncode
    if status != 0 or not target.exists():
        raise UserError(
            f"the wizard ended (exit code {status}) without writing {target}. "
            "Start again, or let `make setup-accelerate AUTO=1` write the recommended file."
        )


def verify(target: Path, machine: Hardware) -> None:
    """Launches with the file. Raises UserError if the processes are not one world of its size."""
    config = read_launch_file(target)
    left_open = config.num_processes < 1  # -1: left to --num_processes
    expected = recommended(machine).num_processes if left_open else config.num_processes
    expected = max(1, expected // max(1, config.num_machines))  # only this machine's share
    results, output = _launch(target, config, expected)
    if problem := judge(results, expected):
        total = sum(range(expected + 1))
        is_single = [result.world for result in results] == [1]  # alone in its world
        lines = [] if is_single else output.strip().splitlines()[-TAIL_LINES:]
        raise UserError(
            f"{target} does not start what it says.\n"
            f"  expected: {expected} process(es) that form one world, sum {total}\n"
            f"  found:    {problem}\n"
            f"  do:       {_advice(config, is_single, expected, machine)}"
            + "".join(f"\n  | {line}" for line in lines)
        )
    part = f" (this machine's share of {config.num_machines})" if config.num_machines > 1 else ""
    where = sorted({name for result in results for name in (result.device, result.backend) if name})
    show(f"ok: {target} starts {expected} process(es){part} in one world ({', '.join(where)})")


def _launch(target: Path, config: ClusterConfig, expected: int) -> tuple[list[Result], str]:
    """Runs the workers; returns their results and what was printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(target)]
    if config.num_processes < 1 or config.num_machines > 1:
        command += ["--num_processes", str(expected)]
    if config.num_machines > 1:
        command += ["--num_machines", "1", "--machine_rank", "0", "--rdzv_backend", "static"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in WORLD_VARIABLES and not name.startswith(WORLD_PREFIXES)
    }
    with tempfile.TemporaryDirectory() as folder:
        command += ["--module", "sft.runtime.worker", folder]
        output = run_captured(command, VERIFY_SECONDS, environment)
        return [Result(**json.loads(path.read_text())) for path in Path(folder).iterdir()], output


def judge(results: list[Result], expected: int) -> str | None:
    """Returns what is wrong with the results of `expected` processes, or None."""
    worlds = sorted({result.world for result in results})
    if len(results) != expected:
        return f"{len(results)} process(es) did the work, in worlds of {worlds or 'none'}"
    if worlds != [expected]:
        return f"{len(results)} independent copies: each is in a world of {worlds}"
    ranks = sorted(result.rank for result in results)
    if ranks != list(range(expected)):
        return f"ranks {ranks}"
    sums = sorted({result.sum for result in results})
    return None if sums == [sum(range(expected + 1))] else f"sums {sums}"


def _advice(config: ClusterConfig, is_single: bool, expected: int, machine: Hardware) -> str:
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    change = "set `distributed_type: MULTI_GPU` (on the CPU too: it only selects the launcher)"
    auto = "or let `make setup-accelerate AUTO=1` write the recommended file."
    if is_single and kind == "MULTI_CPU":
        return f"MULTI_CPU starts one process unless mpirun is set up; {change}, {auto}"
    if is_single and kind in ("NO", "False"):  # an unquoted NO is False in YAML 1.1
        return f"NO starts one process, whatever num_processes says; {change}, {auto}"
    if machine.devices and expected > len(machine.devices):
        return f"this machine has {len(machine.devices)} GPU(s); set num_processes to it, {auto}"
    return f"read the launcher's messages below; {change}, {auto}"
