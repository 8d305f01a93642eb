"""Starts the ranks of a run on this machine, and ends with the exit code of the run.

`accelerate launch` and torchrun's agent run inside this process, so the ranks are its children.
Three things differ from torchrun:

- Signals. torchrun kills ranks 30 s after SIGTERM or SIGINT, and SIGUSR1 kills torchrun. Here each
  signal reaches every rank once, and a rank may take as long as it needs to save.
- Exit codes. torchrun always ends with 1. Here the code is that of the run, from `status.json`.
- Messages. The rank that fails first prints its error (`cli`); torchrun's report goes to
  `launcher.log`.

    python -m sft.runtime.launcher FOLDER PROGRAM ...   NUM_PROCESSES ranks of any program
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from sft.config.schema import Train
from sft.errors import ConfigError, PeerError, require_extra
from sft.runtime import children, output, plain
from sft.runtime.output import show
from sft.runtime.plain import read_json
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
TORCHRUN = [f"torch.distributed.{name}" for name in ("elastic", "run", "launcher")]  # loggers


def is_rank() -> bool:
    """Returns whether torchrun, srun or `accelerate launch` has started this process.

    `accelerate launch` sets no WORLD_SIZE if it starts a single process.
    """
    join_slurm()
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def check_launch(train: Train) -> None:
    """Raises ConfigError if the launcher did not start as many processes as were asked for."""
    if train.engine == "deepspeed":
        require_extra("deepspeed", "train.engine: deepspeed", ["deepspeed"])
    join_slurm()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if train.num_processes not in (None, world):
        raise wrong_world(train.num_processes, world)


def wrong_world(expected: int | None, found: int) -> ConfigError:
    """Returns the error of a launch that started another number of processes."""
    return ConfigError(
        f"expected {expected} process(es), found {found}: the launcher did not start one run of "
        f"{expected} process(es). Launch with `make train-distributed NUM_PROCESSES=n`, "
        "`torchrun --nproc-per-node n`, or with an Accelerate file of distributed_type MULTI_GPU "
        "(also for CPU processes)."
    )


def has_ranks_to_start() -> bool:
    """Returns whether NUM_PROCESSES or NUM_MACHINES asks for processes that are yet to start."""
    several = (read_number(name, 1, least=1) > 1 for name in ("NUM_PROCESSES", "NUM_MACHINES"))
    return any(several) and not is_rank()


def this_command() -> list[str]:
    """Returns the running program (a script, or `-m` and a module) and its arguments."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return [*program, *sys.argv[1:]]


def launch_self(folder: Path) -> int:
    """Runs this very command on all ranks; they write their status.json into `folder`."""
    return launch(Train(output_dir=str(folder)), this_command())


def launch(train: Train, program: Sequence[str], *, trains: bool = False) -> int:
    """Runs `program` (a script or `-m` and a module, with arguments) on all ranks of this machine.

    A program that `trains` gets an override with the number of ranks, which it then checks. Returns
    the exit code of the run in `train.output_dir`.
    """
    output.begin_run()
    path = launch_file(train)
    file = read_launch_file(path)
    refuse_hidden_failures(path, file)
    world = world_of(train, file)
    folder = Path(train.output_dir)
    status = folder / "status.json"
    before = _stamp(status)
    with (
        tempfile.TemporaryDirectory(prefix="sft_launch_") as logs,
        SignalRelay(Path(logs)) as relay,
        _captured_messages() as report,
    ):
        command = [*_options(path, world, logs), *program]
        command += [f"train.num_processes={world.num_processes}"] if trains else []
        failures = _run(world, command)
    if _report_kill(failures, relay.stops):
        _save(report.getvalue(), folder / LOG if _stamp(status) != before else None)
    written = read_json(status).get("exit_code") if _stamp(status) != before else None
    return _outcome(written, failures, relay.stops)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Returns what changes whenever a file is replaced, also if the clock has jumped back."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _options(path: Path, world: World, logs: str) -> list[str]:
    """Returns options of `accelerate launch`."""
    options = ["--config_file", str(path), "--num_processes", str(world.num_processes)]
    options += ["--num_machines", str(world.machines), "--log_dir", logs]
    if world.address:
        options += ["--machine_rank", str(world.rank), "--same_network", "--rdzv_backend", "static"]
        options += ["--main_process_ip", world.address, "--main_process_port", str(world.port)]
        options += ["--deepspeed_multinode_launcher", "standard"]  # torchrun, not ssh
    return options


def _run(world: World, command: list[str]) -> dict[int, int]:
    """Runs the ranks to their end; returns {rank: exit code} of the failed, earliest first."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks on CPUs choose their own number later
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the only one left to torchrun
    os.environ[children.LAUNCHER] = str(os.getpid())
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        logging.getLogger(TORCHRUN[0]).error(str(error))
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
    """Returns the exit code of the run: the one it has `written`, or else one of its ranks'."""
    if not failures:
        return 0
    own = [code for code in failures.values() if code > 0]
    if written is not None and not (written == 0 and own):  # 0, and gloo died when all was done
        return written
    if own:
        return next((code for code in own if code > 1), own[0])
    return 128 + stops[-1] if stops else PeerError.exit_code


def _report_kill(failures: dict[int, int], stops: list[int]) -> bool:
    """Reports that the first rank to fail was killed, if it was. Returns whether torchrun's report
    is of use: after a kill or a bug."""
    rank, code = next(iter(failures.items()), (0, 0))
    killed = code < 0 and not stops
    if killed:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        name = signal.Signals(-code).name
        show(f"error: rank {rank} was killed by {name}{hint}", error=True)
    return killed or code == 1


class SignalRelay:
    """A context in which this process forwards signals, once to each rank.

    Ranks are in sessions of their own, so signals of a terminal do not reach them. The first
    SIGTERM, SIGINT or SIGHUP asks them to save and stop, the second to stop at once, the third
    kills them. SIGUSR1 (save and go on) is sent only to ranks that handle it; it would kill others.
    A thread forwards, since the main one runs no handlers while torch waits for other machines.
    """

    def __init__(self, scratch: Path):
        self.scratch = scratch  # torchrun's folder, empty until it starts ranks
        self.stops: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalRelay:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write)  # the number of every signal is written there at once
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                self._handlers[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _listen(self) -> None:
        while numbers := os.read(self._read, 1):
            if numbers[0] == signal.SIGUSR1:
                self._save()
            elif numbers[0] in self._handlers:
                self._stop(numbers[0])

    def _stop(self, number: int) -> None:
        sent = signal.SIGTERM if number == signal.SIGHUP else number
        self.stops.append(sent)
        if not any(self.scratch.iterdir()):
            self.scratch.rmdir()
            os._exit(128 + sent)
        _send(rank_pids(), sent if len(self.stops) < 3 else signal.SIGKILL)

    def _save(self) -> None:
        training = [pid for pid in rank_pids() if has_handler(pid, signal.SIGUSR1)]
        _send(training, signal.SIGUSR1)
        if not training:
            show("SIGUSR1: no rank is training, there is nothing to save", error=True)


def rank_pids() -> list[int]:
    """Returns the process ids of the ranks that this process has started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "LOCAL_RANK" in child.environ():
                found.append(child.pid)
    return found


def has_handler(pid: int, number: int) -> bool:
    """Returns whether a process handles signal `number`; True if the system cannot say so."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return not Path("/proc/self/status").exists()
    mask = re.search(r"^SigCgt:\s*([0-9a-f]+)$", text, re.M)
    return bool(mask and int(mask.group(1), 16) >> (number - 1) & 1)


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(pid, number)


@contextmanager
def _captured_messages() -> Iterator[io.StringIO]:
    """Collects torchrun's messages for a file instead of the console."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%F %T"))
    loggers = [logging.getLogger(name) for name in TORCHRUN]
    for each in loggers:
        each.addHandler(handler)
        each.propagate = False
    try:
        yield text
    finally:
        for each in loggers:
            each.removeHandler(handler)
            each.propagate = True


def _save(text: str, path: Path | None) -> None:
    """Adds a text to the file, or to a new one that nobody else could have made or linked."""
    try:
        if path is None:
            handle, name = tempfile.mkstemp(f"_{LOG}", "sft_")
            os.close(handle)
            path = Path(name)
        with plain.open_file(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        show(f"cannot write {path or LOG}: {error.strerror}\n{text}", error=True, end="")
    else:
        show(f"what every rank ended with: {path}", error=True)


if __name__ == "__main__":
    sys.exit(launch(Train(output_dir=sys.argv[1]), sys.argv[2:]))
