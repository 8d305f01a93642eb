"""Scripts run by real processes that need not import anything: forks of a server.

A fresh Python with torch and transformers costs six seconds before it does anything, a fork of a
process that has imported them some milliseconds. Each run is forked anew, so none inherits what
another has computed; only the seed of hash() and what warm.py found are common to all. Without a
GPU only: CUDA, once looked at, cannot be forked. No backward pass in the server, either: autograd
cannot be forked then.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import conftest
import numpy as np
from conftest import PATHS, ROOT, clean_environment

IMPORTED = ["sft.run", "sft.verify", "peft", "bitsandbytes", "deepspeed", "forked"]
IMPORTED += ["scipy.stats", "torch.utils.tensorboard"]  # which a run imports late
IMPORTED += ["sft.tasks.distill.config", "warm"]
CONSOLES = ("full disk", "closed pipe", "no stderr")
GRACE = 5.0  # seconds that a launcher leaves the others, when one rank has failed


def server() -> multiprocessing.context.ForkServerContext:
    """Starts with the first process; ends with this one."""
    quiet = {"DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error"}  # as cli does
    os.environ |= clean_environment(PYTHONPATH=PATHS, **quiet)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def server_ready() -> None:
    """Returns when the server has imported everything: the first run is as fast as others."""
    process = server().Process(target=len, args=("",))
    process.start()
    process.join()


def start(world: int, command: list[str], log: Path, console: str = "") -> ForkServerProcess:
    """A script, or `-m module`, with its arguments: by one process, or by a launcher of `world`.

    `console`: one of CONSOLES, in place of the file `log`.
    """
    arguments = (world, command, str(log), str(log), {}, console)
    process = server().Process(target=_main, args=arguments)
    process.start()
    return process


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script by one process, as `conftest.run`; PYTHONPATH comes first, before what is there."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [f"{folder}/out", f"{folder}/err"]
        process = server().Process(target=_main, args=(1, command, *streams, environment))
        process.start()
        process.join()
        reported = [Path(path).read_text("utf-8") for path in streams]
    return subprocess.CompletedProcess(command, process.exitcode or 0, *reported)


def make(target: str, *assignments: str) -> subprocess.CompletedProcess[str]:
    """`make TARGET`: the command is what make says it would run (`make -n`)."""
    printed = conftest.run("make", "-n", target, *assignments).stdout
    values = dict(each.split("=", 1) for each in assignments)  # make exports them to the shell
    words = conftest.run("bash", "-c", f"printf '%s\\0' {printed}", **values).stdout
    python, *command = words.split("\0")[:-1]
    assert python.endswith("/bin/python"), printed
    return run(*command)


def launch(world: int, command: list[str]) -> str:
    """Runs a script on so many ranks and returns what they printed, as `sft.verify.fresh`.

    The exit code is not judged: gloo may abort after all work is done. Tests read the ranks' files.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "printed")
        start(world, command, log).join()
        for pid in ranks(log):
            while alive(pid):
                time.sleep(0.01)
        return log.read_text("utf-8", errors="replace")


def ranks(log: Path) -> list[int]:
    """Process ids of the ranks of a run; of a run by one process none but its own."""
    try:
        return [int(pid) for pid in log.with_suffix(".pids").read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _main(
    world: int,
    command: list[str],
    out: str,
    err: str,
    environment: dict[str, str],
    console: str = "",
) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    _break(console)
    os.chdir(ROOT)
    os.environ |= environment
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os._exit(_script(command) if world == 1 else _launcher(world, command, Path(out)))


def _break(console: str) -> None:
    """Makes standard output one that cannot be written, or closes standard error."""
    if console == "full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif console == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    elif console == "no stderr":
        os.close(2)


def _launcher(world: int, command: list[str], log: Path) -> int:
    """What torchrun does: starts the ranks, waits for them, and ends all when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    running = set()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(_script(command))
        running.add(pid)
    temporary = log.with_suffix(".tmp")
    temporary.write_text(" ".join(map(str, running)))
    temporary.rename(log.with_suffix(".pids"))
    failed = 0.0
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        running.discard(pid)
        if pid and status and not failed:
            failed = time.monotonic()
            _send(running, signal.SIGTERM)
        if failed and time.monotonic() - failed > GRACE:
            _send(running, signal.SIGKILL)
        time.sleep(0 if pid else 0.01)
    return int(bool(failed))


def _send(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def _script(command: list[str]) -> int:
    """The exit code of the script, run in this process."""
    random.seed()  # not the state that all forks share
    np.random.seed()
    is_module = command[0] == "-m"
    sys.argv = list(command[1:] if is_module else command)
    try:
        if is_module:
            sys.argv = [sys.argv[0], *sys.argv[1:]]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:  # noqa: BLE001  # as the interpreter would tell it
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
