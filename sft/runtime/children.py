"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

LAUNCHER = "SFT_LAUNCHER"  # the variable in which `launcher` tells the ranks its process id


def die_with_parent(parent: int) -> None:
    """This process is killed when `parent`, which started it, is gone, however that happens."""
    if sys.platform != "linux":
        return
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before this was asked for
        os._exit(1)


def machine() -> str:
    """What processes share that can look at each other by their numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def is_dead(pid: int) -> bool:
    """Whether that process of this machine is gone, or only waits to be buried."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return process_state(pid) in ("Z", "X")


def process_state(pid: int) -> str:
    """The kernel's letter: R running, S sleeping, T stopped, Z dead; '' where it is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""


# --- processes that must not be left over ------------------------------------------------------


def in_worker(parent: int) -> None:
    """For a forked worker: it dies with its parent, and leaves signals to it."""
    signal.set_wakeup_fd(-1)  # that pipe is the parent's
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the pool ends its workers
    die_with_parent(parent)
