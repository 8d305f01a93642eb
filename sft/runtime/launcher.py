"""Starting the ranks of a run on this machine, and ending with the exit code of the run.

`accelerate launch` starts them with torchrun's agent, here inside this very process: the ranks are
its children and can be reached. Three things that torchrun does otherwise are done by us:

- Signals. torchrun turns SIGTERM and SIGINT into a kill after 30 s and dies of SIGUSR1. Ours go to
  every rank, once each, and the ranks take the time that a save takes.
- Exit codes. torchrun makes 1 of all of them. The run's own is in `status.json`.
- Words. Ranks tell the error that came first (`cli`); torchrun's report goes to `launcher.log`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sft.config.schema import Train
from sft.errors import PeerError
from sft.runtime import children
from sft.runtime.signals import Signals
from sft.runtime.status import written_exit_code
from sft.runtime.world import (
    ROOT,
    World,
    launch_file,
    read_launch_file,
    read_number,
    refuse_hidden_failures,
    world_of,
)

if TYPE_CHECKING:
    pass
TRAIN = ROOT / "scripts/train.py"
LOG = "launcher.log"


# --- launching ---------------------------------------------------------------------------------


def launch(train: Train, arguments: list[str], script: Path = TRAIN) -> int:
    """Runs `script` with `arguments` on all ranks of this machine; the exit code of the run."""
    path = launch_file(train)
    file = read_launch_file(path)
    refuse_hidden_failures(path, file)
    world = world_of(train, file)
    folder, status = Path(train.output_dir), _Status(Path(train.output_dir))
    asked = [f"train.num_processes={world.num_processes}"] if script == TRAIN else []
    told = _Report()
    with (
        tempfile.TemporaryDirectory(prefix="sft_launch_") as logs,
        Signals(Path(logs)) as signals,
        told.listening(),
    ):
        command = _command(path, world, logs)
        failures = _run(world, [*command, str(script), *arguments, *asked], told)
    code = _outcome(status.exit_code(), failures, signals.stops)
    if _has_more_to_tell(failures, signals.stops):
        own = Path(tempfile.gettempdir()) / f"sft_{os.getpid()}_{LOG}"
        told.keep(folder / LOG if status.is_ours() else own)
    return code


def is_asked() -> bool:
    """Whether NUM_PROCESSES or NUM_MACHINES asks for several processes that are yet to start."""
    several = (read_number(name, 1, least=1) > 1 for name in ("NUM_PROCESSES", "NUM_MACHINES"))
    return any(several) and "WORLD_SIZE" not in os.environ


def launch_script(script: Path, folder: Path) -> int:
    """Runs this very command on all ranks; `folder` is where its `guard` tells how it ended."""
    return launch(Train(output_dir=str(folder)), sys.argv[1:], script)


def _command(path: Path, world: World, logs: str) -> list[str]:
    """Arguments of `accelerate launch`."""
    command = ["--config_file", str(path), "--num_processes", str(world.num_processes)]
    command += ["--num_machines", str(world.machines), "--log_dir", logs]
    if world.address:
        command += ["--machine_rank", str(world.rank), "--same_network", "--rdzv_backend", "static"]
        command += ["--main_process_ip", world.address, "--main_process_port", str(world.port)]
        command += ["--deepspeed_multinode_launcher", "standard"]  # torchrun, not ssh
    return command


def _run(world: World, command: list[str], told: _Report) -> dict[int, int]:
    """Runs the ranks to their end: {rank: exit code} of those that failed, the first one first."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks on CPUs decide for themselves
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's; the others are ours
    os.environ[children.LAUNCHER] = str(os.getpid())
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        told.add(str(error))
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
    """The exit code of the run: what it wrote; else what its ranks ended with."""
    if not failures:
        return 0
    own = [code for code in failures.values() if code > 0]
    if written is not None and not (written == 0 and own):  # 0, and gloo died when all was done
        return written
    if meant := [code for code in own if code > 1]:
        return meant[0]
    if own:
        return own[0]
    return 128 + stops[-1] if stops else PeerError.exit_code


def _has_more_to_tell(failures: dict[int, int], stops: list[int]) -> bool:
    """Whether a rank met a bug or was killed: not all is said by what the ranks have told.

    A rank that was killed has no words, so they are found here.
    """
    rank, code = next(iter(failures.items()), (0, 0))
    killed = code < 0 and not stops
    if killed:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        name = signal.Signals(-code).name
        print(f"error: rank {rank} was killed by {name}{hint}", file=sys.stderr)
    return killed or code == 1


class _Status:
    """The run's status.json, believed only if it was written after this was made."""

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
        """None: this attempt wrote none, or is said to run still."""
        return written_exit_code(self.path) if self.is_ours() else None


class _Report(logging.Handler):
    """What torchrun has to say, for a file instead of the console."""

    NAMES = ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.add(self.format(record))

    def add(self, text: str) -> None:
        self.lines.append(f"{time.strftime('%F %T')} {text}\n")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
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

    def keep(self, path: Path) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(self.lines)
        except OSError as error:
            print(f"cannot write {path}: {error.strerror}", file=sys.stderr)
            sys.stderr.writelines(self.lines)
        else:
            print(f"what every rank ended with: {path}", file=sys.stderr)
