"""`make setup-accelerate`: write Accelerate's configuration and prove that it starts what it says.

On a terminal: what was detected, the answers that fit it, and Accelerate's own wizard. Without one,
or with `--auto`: the recommended file. Either way the file is then tried for real: it launches a
tiny worker (this script again) on as many processes as it names, each adds its rank + 1 over all,
and the results that the workers wrote are judged. Not their exit code: a gloo run can abort at exit
after its work. Not the file's words: one that says MULTI_CPU and 2 starts one process, silently.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from sft import cli
from sft.errors import UserError
from sft.runtime import hardware
from sft.runtime.hardware import Hardware, default_num_processes
from sft.runtime.world import read_launch_file

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import ClusterConfig

VERIFY_SECONDS = 180  # a cold file system can take a minute to import torch
TAIL_LINES = 15
HEADER = """\
# Written by `make setup-accelerate` for {what}.
# mixed_precision is "no" here because the training configuration owns precision.
"""
# Left over from an outer launcher, these would tell the workers another world than the file does.
WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
WORLD_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PMI_", "OMPI_COMM_", "MV2_COMM_")


def main() -> None:
    args = arguments()
    if args.verify_worker:
        return worker(args.verify_worker)
    target = args.config_file or default_location()
    hw = hardware.detect(target)
    if args.verify_only:
        require(target)
    elif args.auto or not sys.stdin.isatty():
        write_recommended(target, hw)
    else:
        show_recommended(hw)
        run_wizard(target)
    verify(target, hw)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config-file", type=Path, help="default: where Accelerate looks for it")
    parser.add_argument(
        "--auto", action="store_true", help="write the recommended file, ask nothing"
    )
    parser.add_argument("--verify-only", action="store_true", help="try an existing file")
    parser.add_argument("--verify-worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def default_location() -> Path:
    """Where `accelerate launch` looks without --config_file; follows HF_HOME and XDG_CACHE_HOME."""
    from accelerate.commands.config.config_args import default_yaml_config_file

    return Path(default_yaml_config_file)


# ---- the recommended file


def recommended(hw: Hardware) -> ClusterConfig:
    """One process per GPU, or two gloo processes: always torchrun (MULTI_GPU) for more than one."""
    from accelerate.commands.config.config_args import ClusterConfig

    several = default_num_processes(hw) > 1
    return ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type="MULTI_GPU" if several else "NO",
        num_processes=default_num_processes(hw),
        main_process_port=0 if several else None,  # a free one: two runs on one machine never meet
        gpu_ids="all",
        mixed_precision="no",
        use_cpu=False,
        debug=False,
    )


def describe(hw: Hardware) -> str:
    return (
        f"{len(hw.devices)} GPU(s)"
        if hw.devices
        else f"{default_num_processes(hw)} processes on the CPU"
    )


def write_recommended(target: Path, hw: Hardware) -> None:
    text = as_text(target, recommended(hw), HEADER.format(what=describe(hw)))
    if target.exists() and target.read_text() == text:
        print(f"{target} already is the recommended file for {describe(hw)}")
        return
    make_folder(target)
    keep_backup(target)
    staged = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    staged.write_text(text)
    staged.replace(target)
    print(f"wrote {target} for {describe(hw)}")


def as_text(target: Path, config: ClusterConfig, header: str) -> str:
    if target.suffix == ".json":  # Accelerate reads both, and JSON has no comments
        return json.dumps(config.to_dict(), indent=2) + "\n"
    return header + yaml.safe_dump(config.to_dict())


def make_folder(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder of {target}: {error.strerror}") from error


def keep_backup(target: Path) -> Path | None:
    """Copies an existing file to the first free of `.bak`, `.bak1`, ...; says so."""
    if not target.exists():
        return None
    names = (f"{target.name}.bak{number or ''}" for number in range(1_000_000))
    backup = next(path for path in map(target.with_name, names) if not path.exists())
    shutil.copy2(target, backup)
    print(f"{target} exists: kept as {backup.name} beside it")
    return backup


# ---- the wizard


def show_recommended(hw: Hardware) -> None:
    console = Console(highlight=False, width=100)
    console.print(hardware.machine_table(hw))
    answers = Table("the wizard asks", "answer for this machine", title="\nRecommended answers")
    answers.title_justify = "left"
    for question, answer in wizard_answers(hw):
        answers.add_row(question, answer)
    console.print(answers)
    if not hw.devices:
        console.print(
            "multi-GPU is right here too: it selects the launcher that starts several processes, "
            "which then run on the CPU. multi-CPU would silently start one."
        )


def wizard_answers(hw: Hardware) -> list[tuple[str, str]]:
    """In the order of accelerate/commands/config/cluster.py, version 1.15."""
    several = default_num_processes(hw) > 1
    first = [
        ("In which compute environment are you running?", "This machine"),
        (
            "Which type of machine are you using?",
            "multi-GPU" if several else "No distributed training",
        ),
    ]
    if several:
        first += [
            ("How many different machines will you use?", "1"),
            ("Should distributed operations be checked while running for errors?", "no"),
        ]
    else:
        first += [("Do you want to run your training on CPU only?", "no")]
    engines = ["DeepSpeed", "FullyShardedDataParallel", "Megatron-LM"] if several else ["DeepSpeed"]
    return [
        *first,
        ("Do you wish to optimize your script with torch dynamo?", "no"),
        *((f"Do you want to use {engine}?", "no") for engine in engines),
        *([("How many GPU(s) should be used?", str(default_num_processes(hw)))] if several else []),
        ("What GPU(s) (by id) should be used?", "all"),
        ("Would you like to enable numa efficiency?", "no"),
        ("Do you wish to use mixed precision?", "no (the training configuration owns it)"),
    ]


def run_wizard(target: Path) -> None:
    make_folder(target)
    backup = keep_backup(target)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "config"]
    status = subprocess.run([*command, "--config_file", str(target)], check=False).returncode
    if backup and target.read_bytes() == backup.read_bytes():
        backup.unlink()
    if status != 0 or not target.exists():
        raise UserError(
            f"the wizard ended (exit code {status}) without writing {target}. "
            "Start again, or let `make setup-accelerate AUTO=1` write the recommended file."
        )


# ---- the proof


@dataclass(frozen=True)
class Result:
    """What one worker saw."""

    rank: int
    world: int
    sum: float
    backend: str | None
    device: str


def worker(folder: Path) -> None:
    """One process of the proof. A file per process id: independent copies all claim rank 0."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    value = torch.tensor([accelerator.process_index + 1.0], device=accelerator.device)
    total = accelerator.reduce(value, reduction="sum")
    result = {
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "sum": total.item(),
        "backend": accelerator.state.backend,
        "device": str(accelerator.device),
    }
    staged = folder / f"{os.getpid()}.tmp"
    staged.write_text(json.dumps(result))
    staged.replace(staged.with_suffix(".json"))
    accelerator.end_training()


def verify(target: Path, hw: Hardware) -> None:
    """Launches with the file; a UserError when the processes are not one world of its size."""
    config = read_launch_file(target)
    any_number = config.num_processes < 1  # -1: left to --num_processes
    expected = default_num_processes(hw) if any_number else config.num_processes
    expected = max(1, expected // max(1, config.num_machines))  # here only one machine's share
    results, output = launch(target, config, expected)
    problem = judge(results, expected)
    if problem:
        raise UserError(
            f"{target} does not start what it says.\n"
            f"  expected: {expected} process(es) that form one world, sum {triangle(expected)}\n"
            f"  found:    {problem}\n"
            f"  do:       {advice(config, results, expected, hw)}{tail(output, results)}"
        )
    part = f" (this machine's share of {config.num_machines})" if config.num_machines > 1 else ""
    where = sorted({name for result in results for name in (result.device, result.backend) if name})
    print(f"ok: {target} starts {expected} process(es){part} in one world ({', '.join(where)})")


def require(target: Path) -> None:
    if not target.is_file():
        raise UserError(f"{target} does not exist: `make setup-accelerate` writes it")


def launch(target: Path, config: ClusterConfig, expected: int) -> tuple[list[Result], str]:
    """Runs the workers; their results, and what the launcher printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(target)]
    if config.num_processes < 1 or config.num_machines > 1:
        command += ["--num_processes", str(expected)]
    if config.num_machines > 1:
        command += ["--num_machines", "1", "--machine_rank", "0", "--rdzv_backend", "static"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                [*command, __file__, "--verify-worker", folder],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=clean_environment(),
            )
            try:
                process.wait(VERIFY_SECONDS)
            except subprocess.TimeoutExpired:
                sink.write(f"\nno end after {VERIFY_SECONDS} s: stopped\n")
            finally:
                end(process)
        results = [Result(**json.loads(path.read_text())) for path in Path(folder).glob("*.json")]
        return results, log.read_text(errors="replace")


def clean_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name not in WORLD_VARIABLES and not name.startswith(WORLD_PREFIXES)
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a launcher that hangs or was interrupted, and its workers (each in its own session)."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def triangle(count: int) -> int:
    """1 + 2 + ... + count: what the ranks' sum must be."""
    return count * (count + 1) // 2


def judge(results: list[Result], expected: int) -> str | None:
    """What is wrong, or None."""
    worlds = sorted({result.world for result in results})
    if len(results) != expected:
        return f"{len(results)} process(es) did the work, in worlds of {worlds or 'none'}"
    if worlds != [expected]:
        return f"{len(results)} independent copies: each is in a world of {worlds}"
    if sorted(result.rank for result in results) != list(range(expected)):
        return f"ranks {sorted(result.rank for result in results)}"
    sums = sorted({result.sum for result in results})
    return None if sums == [triangle(expected)] else f"sums {sums}"


def advice(config: ClusterConfig, results: list[Result], expected: int, hw: Hardware) -> str:
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    mend = "set `distributed_type: MULTI_GPU` (on the CPU too: it only selects the launcher)"
    auto = "or let `make setup-accelerate AUTO=1` write the recommended file."
    if alone(results) and kind == "MULTI_CPU":
        return f"MULTI_CPU starts one process unless mpirun is set up; {mend}, {auto}"
    if alone(results) and kind in ("NO", "False"):  # an unquoted NO is False in YAML 1.1
        return f"NO starts one process, whatever num_processes says; {mend}, {auto}"
    if hw.devices and expected > len(hw.devices):
        return f"this machine has {len(hw.devices)} GPU(s); set num_processes to it, {auto}"
    return f"read the launcher's messages below; {mend}, {auto}"


def tail(output: str, results: list[Result]) -> str:
    """The launcher's last lines, where processes failed; none where they ran but were too few."""
    lines = output.strip().splitlines()[-TAIL_LINES:]
    return "" if alone(results) else "".join(f"\n  | {line}" for line in lines)


def alone(results: list[Result]) -> bool:
    """One process in a world of its own did its work: nothing failed, it was only too few."""
    return [result.world for result in results] == [1]


if __name__ == "__main__":
    cli.run(main)
