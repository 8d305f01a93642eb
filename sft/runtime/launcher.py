"""Starts the ranks of a run on this machine, and ends with the exit code of the run.

`accelerate launch` starts them with torchrun's agent, here inside this very process, so that the
ranks are its children. Three things are done here that torchrun does otherwise:

- Signals. torchrun turns SIGTERM and SIGINT into a kill after 30 s, and SIGUSR1 kills it. Here each
  reaches every rank once, and the ranks take the time that a save takes.
- Exit codes. torchrun turns all of them into 1. The run's own code is in `status.json`.
- Messages. The rank that fails first prints its error (`cli`); torchrun's report goes to
  `launcher.log`.

    python -m sft.runtime.launcher FOLDER PROGRAM ...   NUM_PROCESSES ranks of any program
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.config.schema import Train
from sft.errors import PeerError
from sft.runtime import children
from sft.runtime.console import read_json
from sft.runtime.signals import SignalRelay
from sft.runtime.slurm import join_slurm
from sft.runtime.world import (
    World,
    launch_file,
    read_launch_file,
    read_number,
    refuse_hidden_failures,
    world_of,
)

LOG = "launcher.log"


def is_rank() -> bool:
    """Returns whether a launcher has started this process: torchrun, srun or `accelerate launch`.

    The last sets no WORLD_SIZE where it starts one process only.
    """
    join_slurm()
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def has_ranks_to_start() -> bool:
    """Returns whether NUM_PROCESSES or NUM_MACHINES asks for processes that are yet to start."""
    several = (read_number(name, 1, least=1) > 1 for name in ("NUM_PROCESSES", "NUM_MACHINES"))
    return any(several) and not is_rank()


def this_program() -> list[str]:
    """Returns the running program without its arguments: a script, or `-m` and a module."""
    spec = sys.modules["__main__"].__spec__
    return ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]


def launch_self(folder: Path) -> int:
    """Runs this very command on all ranks; `folder` has the status.json of what they do."""
    return launch(Train(output_dir=str(folder)), [*this_program(), *sys.argv[1:]])


def launch(train: Train, program: Sequence[str], *, trains: bool = False) -> int:
    """Runs `program` (a script or `-m` and a module, with arguments) on all ranks of this machine.

    If it `trains`, an override states how many ranks there must be. Returns the exit code of the
    run in `train.output_dir`.
    """
    path = launch_file(train)
    file = read_launch_file(path)
    refuse_hidden_failures(path, file)
    world = world_of(train, file)
    folder, status = Path(train.output_dir), _Status(Path(train.output_dir))
    report = _Report()
    with (
        tempfile.TemporaryDirectory(prefix="sft_launch_") as logs,
        SignalRelay(Path(logs)) as relay,
        report.capture(),
    ):
        command = [*_options(path, world, logs), *program]
        command += [f"train.num_processes={world.num_processes}"] if trains else []
        failures = _run(world, command, report)
    code = _outcome(status.exit_code(), failures, relay.stops)
    if _needs_report(failures, relay.stops):
        own = Path(tempfile.gettempdir()) / f"sft_{os.getpid()}_{LOG}"
        report.save(folder / LOG if status.is_ours() else own)
    return code


def _options(path: Path, world: World, logs: str) -> list[str]:
    """Returns options of `accelerate launch`."""
    options = ["--config_file", str(path), "--num_processes", str(world.num_processes)]
    options += ["--num_machines", str(world.machines), "--log_dir", logs]
    if world.address:
        options += ["--machine_rank", str(world.rank), "--same_network", "--rdzv_backend", "static"]
        options += ["--main_process_ip", world.address, "--main_process_port", str(world.port)]
        options += ["--deepspeed_multinode_launcher", "standard"]  # torchrun, not ssh
    return options


def _run(world: World, command: list[str], report: _Report) -> dict[int, int]:
    """Runs the ranks to their end; returns {rank: exit code} of those that failed, first first."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks on CPUs decide for themselves
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's; the others are ours
    os.environ[children.LAUNCHER] = str(os.getpid())
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        report.add(str(error))
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except (ConnectionError, DistError) as error:
        meeting = f"{world.address}:{world.port}" if world.address else "a port of this machine"
        found = str(error).splitlines()[0]
        raise PeerError(
            f"the {world.machines} machine(s) did not meet at {meeting} (MASTER_ADDR, MASTER_PORT; "
            f"this is MACHINE_RANK={world.rank}): {found}"
        ) from error
    return {}


def _outcome(written: int | None, failures: dict[int, int], stops: list[int]) -> int:
    """Returns the exit code of the run: what it wrote, or else what its ranks ended with."""
    if not failures:
        return 0
    own = [code for code in failures.values() if code > 0]
    if written is not None and not (written == 0 and own):  # 0, and gloo died when all was done
        return written
    if own:
        return next((code for code in own if code > 1), own[0])
    return 128 + stops[-1] if stops else PeerError.exit_code


def _needs_report(failures: dict[int, int], stops: list[int]) -> bool:
    """Returns whether a rank met a bug or was killed, which its own messages do not explain.

    A rank that was killed could print nothing, so this does.
    """
    rank, code = next(iter(failures.items()), (0, 0))
    killed = code < 0 and not stops
    if killed:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        name = signal.Signals(-code).name
        print(f"error: rank {rank} was killed by {name}{hint}", file=sys.stderr)
    return killed or code == 1


class _Status:
    """The run's status.json, trusted only if it was written after this object was made."""

    def __init__(self, folder: Path):
        self.path = folder / "status.json"
        self.before = self._stamp()

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def is_ours(self) -> bool:
        return self._stamp() not in (None, self.before)

    def exit_code(self) -> int | None:
        """Returns what this attempt has written; None while it runs or if it wrote nothing."""
        return read_json(self.path).get("exit_code") if self.is_ours() else None


class _Report(logging.Handler):
    """A log handler that collects torchrun's messages for a file instead of the console."""

    NAMES = ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.add(self.format(record))

    def add(self, text: str) -> None:
        self.lines.append(f"{time.strftime('%F %T')} {text}\n")

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        loggers = [logging.getLogger(name) for name in self.NAMES]
        for each in loggers:
            each.addHandler(self)
            each.propagate = False
        try:
            yield
        finally:
            for each in loggers:
                each.removeHandler(self)
                each.propagate = True

    def save(self, path: Path) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(self.lines)
        except OSError as error:
            print(f"cannot write {path}: {error.strerror}", file=sys.stderr)
            sys.stderr.writelines(self.lines)
        else:
            print(f"what every rank ended with: {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(launch(Train(output_dir=sys.argv[1]), sys.argv[2:]))
