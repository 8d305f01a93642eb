"""Forwards signals from the launcher to the ranks."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


class SignalRelay:
    """A context in which this process forwards signals, once to each rank.

    Ranks are in sessions of their own, so signals of a terminal do not reach them. The first
    SIGTERM, SIGINT or SIGHUP asks them to save and stop, the second to stop at once, the third
    kills them. SIGUSR1 (save and go on) is sent only to ranks that handle it, since others would
    die. A thread forwards: while torch waits for other machines, the main thread runs no handlers.
    """

    def __init__(self, scratch: Path):
        self.scratch = scratch  # empty until torchrun starts ranks
        self.stops: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalRelay:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write)  # gets the number of every signal, whatever is running
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
            print("SIGUSR1: no rank is training, there is nothing to save", file=sys.stderr)


def rank_pids() -> list[int]:
    """Returns the process ids of the ranks that this process has started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "LOCAL_RANK" in child.environ():
                found.append(child.pid)
    return found


def has_handler(pid: int, number: int) -> bool:
    """Returns whether a process handles that signal; True where the kernel does not show it."""
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
