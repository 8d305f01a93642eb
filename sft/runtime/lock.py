"""Allows one run at a time in a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft import errors
from sft.errors import LockedError
from sft.runtime.children import is_dead, machine_id
from sft.runtime.console import read_json


class Lock:
    """The right to write into a run folder, which the kernel frees when its owner dies.

    Raises LockedError, which names the owner, if another run has it.
    """

    NAME = ".lock"

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._acquire()
        except OSError as error:
            raise errors.CheckpointError(
                f"cannot write to {folder}: {error.strerror}; set train.output_dir to a folder "
                "that is writable"
            ) from None

    def _acquire(self) -> None:
        path = self.folder / self.NAME
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
            owner = read_json(path)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._held_by(owner) from None
            except OSError as error:  # a file system without locks: trust what the file says
                if owner and not (owner.get("machine") == machine_id() and is_dead(owner["pid"])):
                    raise self._held_by(owner, f" (no locks here: {error.strerror})") from None
            with suppress(FileNotFoundError):  # moved aside, or released, in between
                if os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
                    break
            self._file.close()
        if owner:
            print(f"removed the stale lock of {_describe(owner)} ({self.folder})")
        own = {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine_id()}
        own["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.truncate(0)
        self._file.write(json.dumps(own) + "\n")
        self._file.flush()

    def _held_by(self, owner: dict[str, Any], why: str = "") -> LockedError:
        return LockedError(
            f"{self.folder} is in use by the run of {_describe(owner)}{why}: wait for it or stop "
            "it, or give this run another train.output_dir. (If it is surely gone, remove "
            f"{self.folder / self.NAME}.)"
        )

    def move_folder(self, aside: Path) -> None:
        """Renames the folder to `aside`, and locks a new, empty one in its place."""
        self.folder.rename(aside)
        (aside / self.NAME).unlink()
        self._file.close()
        self._acquire()

    def release(self) -> None:
        with suppress(OSError):
            (self.folder / self.NAME).unlink()
        self._file.close()


def _describe(owner: dict[str, Any]) -> str:
    pid, host, since = (owner.get(key, "?") for key in ("pid", "host", "since"))
    return f"process {pid} on {host} (since {since})"
