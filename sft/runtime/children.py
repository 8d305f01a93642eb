"""Starts and ends other processes, and finds out whether a process is alive."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

LAUNCHER = "SFT_LAUNCHER"  # the variable in which the launcher gives the ranks its process id


def die_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Makes the kernel send `by` to this process when `parent`, which started it, ends for any
    reason."""
    if sys.platform != "linux":
        return
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, by, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before this call
        os._exit(1)


def bound_command(words: Sequence[str]) -> list[str]:
    """Returns a command that runs `words`, to be started in a session of its own.

    All processes of that session are killed when this process ends for any reason.
    """
    code = "import sys; from sft.runtime.children import run_bound as run"
    code = f"{code}; run(int(sys.argv[1]), sys.argv[2:])"
    return [sys.executable, "-c", code, str(os.getpid()), *words]


def run_bound(parent: int, words: list[str]) -> None:
    """Runs `words` and exits with their exit code; see `bound_command`.

    They run without PYTHONPATH: they may belong to another environment.
    """
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    die_with_parent(parent, signal.SIGTERM)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = subprocess.call(words, env=environment)
    sys.exit(code if code >= 0 else 128 - code)


def prepare_worker(parent: int) -> None:
    """Makes a worker process die with its parent, which alone handles signals."""
    signal.set_wakeup_fd(-1)  # the pipe belongs to the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool ends its workers with SIGTERM
    die_with_parent(parent)


def machine_id() -> str:
    """Returns a text that is equal for processes which see the same process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def is_dead(pid: int) -> bool:
    """Returns whether process `pid` of this machine has exited or is a zombie."""
    return process_state(pid) in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE)


def is_stopped(pid: int) -> bool:
    """Returns whether process `pid` of this machine waits for SIGCONT or for a debugger."""
    return process_state(pid) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def process_state(pid: int) -> str:
    """Returns psutil's name of the state of a process, or '' if the system hides it."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
    except psutil.AccessDenied:
        return ""


def kill_tree(pid: int) -> None:
    """Kills a process and its descendants. If this process is one of them, it is killed last."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
        for process in sorted(family, key=lambda each: each.pid == os.getpid()):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def run_captured(
    command: Sequence[str], seconds: float | None, environment: Mapping[str, str]
) -> str:
    """Returns what a command and its descendants print, when the last of them has ended.

    Kills them all after `seconds`, if that is given.
    """
    with subprocess.Popen(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            return process.communicate()[0] + f"\nerror: killed after {seconds} seconds"
        except BaseException:
            kill_tree(process.pid)
            raise
