"""Passes signals on to the ranks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

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
