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
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml  # type: ignore[import-untyped]

from sft import cli
from sft.config import ConfigError, PeerError, Preempted, Train, UserError

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import ClusterConfig

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "scripts/train.py"
CHECKED = ROOT / "configs/accelerate"
LAUNCHES = ("MULTI_GPU", "FSDP", "DEEPSPEED")  # the others start one process, whatever they say
PORT = 29500  # on which machines meet, unless MASTER_PORT says otherwise
LOG = "launcher.log"


# --- what to launch ----------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What this machine starts, and of what it is a part."""

    per_machine: int
    machines: int = 1
    rank: int = 0
    """Of this machine."""
    address: str | None = None
    """Where the machines meet; None on one machine."""
    port: int = PORT

    @property
    def num_processes(self) -> int:
        return self.per_machine * self.machines


def launch_file(train: Train) -> Path:
    """ACCELERATE_CONFIG; else that of `make setup-accelerate` for DDP; else the engine's own."""
    if named := os.environ.get("ACCELERATE_CONFIG"):
        return Path(named)
    if train.engine == "fsdp":
        return CHECKED / "fsdp2.yaml"
    if train.engine == "deepspeed":
        own = CHECKED / f"deepspeed_z{_stage(train)}.yaml"
        return own if own.exists() else CHECKED / "ddp.yaml"  # which starts any engine
    from accelerate.commands.config.config_args import default_yaml_config_file

    default = Path(default_yaml_config_file)
    if default.is_file() and _kind(read_launch_file(default)) == "MULTI_GPU":
        return default
    return CHECKED / "ddp.yaml"


def _stage(train: Train) -> Any:
    """ZeRO stage of the DeepSpeed file, or None: what is wrong with it the ranks will say."""
    try:
        settings = json.loads(Path(str(train.deepspeed_config)).read_text("utf-8"))
        return settings["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_launch_file(path: Path) -> ClusterConfig:
    """An Accelerate launch file. Raises UserError for anything else."""
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
    """From NUM_PROCESSES (on each machine), NUM_MACHINES, MACHINE_RANK, MASTER_ADDR, MASTER_PORT.

    Where these are not set: the launch file, if it is for several machines; one machine; as many
    processes as train.num_processes asks for, or one per GPU (two without a GPU).
    """
    own: dict[str, Any] = vars(file) if (file.num_machines or 1) > 1 else {}
    machines = _number("NUM_MACHINES", own.get("num_machines", 1), least=1)
    per_machine = _number("NUM_PROCESSES", None, least=1) or _per_machine(train, machines)
    if machines == 1:
        return World(per_machine)
    rank = _number("MACHINE_RANK", own.get("machine_rank"), least=0)
    if rank is None or rank >= machines:
        raise ConfigError(
            f"NUM_MACHINES={machines}: expected a MACHINE_RANK of 0 to {machines - 1}, another on "
            f"each machine, found {rank}"
        )
    address = os.environ.get("MASTER_ADDR") or own.get("main_process_ip")
    if not address:
        raise ConfigError(
            f"NUM_MACHINES={machines}: expected MASTER_ADDR, the address of the machine of "
            f"MACHINE_RANK=0, the same on each machine (and a free MASTER_PORT there: {PORT})"
        )
    port = _number("MASTER_PORT", own.get("main_process_port") or PORT, least=1)
    return World(per_machine, machines, rank, address, port)


def _number(name: str, default: int | None, least: int) -> Any:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}: expected a whole number from {least} on, found {text!r}")
    return int(text)


def _per_machine(train: Train, machines: int) -> int:
    if train.num_processes is None:  # asked of another process: CUDA would stay open in this one
        command = [sys.executable, "-m", "sft.hardware"]
        told = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return int(told.stdout)
    if train.num_processes % machines:
        raise ConfigError(
            f"train.num_processes: {train.num_processes} cannot be shared evenly by {machines} "
            "machines; set NUM_PROCESSES, the number on each"
        )
    return train.num_processes // machines


def _refuse_what_hides_failures(path: Path, file: ClusterConfig) -> None:
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


# --- launching ---------------------------------------------------------------------------------


def launch(train: Train, arguments: list[str], script: Path = TRAIN) -> int:
    """Runs `script` with `arguments` on all ranks of this machine; the exit code of the run."""
    path = launch_file(train)
    file = read_launch_file(path)
    _refuse_what_hides_failures(path, file)
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
    several = (_number(name, 1, least=1) > 1 for name in ("NUM_PROCESSES", "NUM_MACHINES"))
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
    os.environ[cli.LAUNCHER] = str(os.getpid())
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


def written_exit_code(path: Path) -> int | None:
    try:
        code = json.loads(path.read_text("utf-8"))["exit_code"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, int) else None


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


# --- signals -----------------------------------------------------------------------------------


class Signals:
    """Passes signals on to the ranks, once to each: they are in sessions of their own.

    The first SIGTERM, SIGINT or SIGHUP asks the ranks to save and stop, the second to stop at once;
    the third kills them. SIGUSR1 (save and go on) reaches ranks that expect it: others would die.
    A thread does it: while torch waits for other machines, the main one runs no handlers of Python.
    """

    def __init__(self, scratch: Path):
        self.scratch = scratch  # empty until torchrun starts ranks
        self.stops: list[int] = []
        self._kept: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write)  # gets the number of every signal, whoever is busy
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                self._kept[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _listen(self) -> None:
        while numbers := os.read(self._read, 1):
            if numbers[0] == signal.SIGUSR1:
                self._save()
            elif numbers[0] in self._kept:
                self._stop(numbers[0])

    def _stop(self, number: int) -> None:
        sent = signal.SIGTERM if number == signal.SIGHUP else number
        self.stops.append(sent)
        if not any(self.scratch.iterdir()):
            self.scratch.rmdir()
            os._exit(128 + sent)
        for pid in ranks():
            _send(pid, sent if len(self.stops) < 3 else signal.SIGKILL)

    def _save(self) -> None:
        expecting = [pid for pid in ranks() if catches(pid, signal.SIGUSR1)]
        for pid in expecting:
            _send(pid, signal.SIGUSR1)
        if not expecting:
            print("SIGUSR1: no rank is training, there is nothing to save", file=sys.stderr)


def ranks() -> list[int]:
    """Process ids of the ranks on this machine."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "LOCAL_RANK" in child.environ():
                found.append(child.pid)
    return found


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for that signal; assumed where the kernel does not tell."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return not Path("/proc/self/status").exists()
    mask = re.search(r"^SigCgt:\s*([0-9a-f]+)$", text, re.M)
    return bool(mask and int(mask.group(1), 16) >> (number - 1) & 1)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(pid, number)


# --- SLURM ---------------------------------------------------------------------------------------


def requeue(train: Train, code: int, since: int) -> int:
    """After srun ended with `code`: requeues this job if the run was preempted and gets on.

    `since`: when srun was started, seconds; an older status.json is of an earlier attempt. Returns
    the exit code of the run.
    """
    folder = Path(train.output_dir)
    status = folder / "status.json"
    written = written_exit_code(status) if _modified(status) >= since else None
    if written is not None and not (written == 0 and code in range(1, 128)):
        code = written
    if code != Preempted.exit_code:
        return code
    job, times = os.environ["SLURM_JOB_ID"], _number("SLURM_RESTART_COUNT", 0, least=0)
    step, most = newest_step(folder), _number("MAX_REQUEUES", 50, least=0)
    record = folder / "requeue.json"
    if times >= most:
        return _stay(f"it was requeued {times} times, and MAX_REQUEUES is {most}")
    if step <= _step_at_requeue(record, job):
        return _stay(f"no progress, the newest checkpoint is of step {step} again")
    record.write_text(json.dumps({"job": job, "step": step}) + "\n", "utf-8")
    done = subprocess.run(["scontrol", "requeue", job], check=False)
    if done.returncode:
        return _stay(f"`scontrol requeue {job}` failed with exit code {done.returncode}")
    print(f"preempted after step {step}: requeued job {job} ({times + 1} of at most {most})")
    return code


def _stay(reason: str) -> int:
    print(f"preempted and saved, but not requeued: {reason}", file=sys.stderr)
    return Preempted.exit_code


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint; 0 without one. A folder of that name is whole: it was renamed."""
    names = (re.fullmatch(r"checkpoint_step_(\d+)", path.name) for path in folder.glob("*"))
    return max((int(name.group(1)) for name in names if name), default=0)


def _step_at_requeue(record: Path, job: str) -> int:
    try:
        last = json.loads(record.read_text("utf-8"))
    except (OSError, ValueError):
        return -1
    return last["step"] if last["job"] == job else -1


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -1.0
