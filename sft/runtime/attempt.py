"""Gives a run folder to one run at a time, and records how each attempt ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft import __version__
from sft.errors import CheckpointError, LockedError
from sft.runtime import checkpoint, plain, run_folder, slurm
from sft.runtime.children import is_dead, machine_id
from sft.runtime.console import parse_temporary, write_json
from sft.runtime.output import show
from sft.runtime.plain import read_json

RANKS = ".ranks"  # in the run folder: heartbeats, and which rank reported the end first
TRACEBACK = "traceback.txt"


class Lock:
    """The right to write into a run folder; the kernel releases it when its owner dies.

    Making one raises LockedError, which names the owner, if another run has it.
    """

    NAME = ".lock"

    def __init__(self, folder: Path):
        self.folder = folder
        self._is_lost = False  # to another run
        run_folder.refuse_foreign(folder)
        try:
            self._acquire()
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {folder}: {error.strerror}; set train.output_dir to a folder "
                "that is writable"
            ) from None

    def _acquire(self) -> None:
        path = self.folder / self.NAME
        while True:
            self.folder.resolve().mkdir(parents=True, exist_ok=True)  # also where a link points to
            self._file = plain.open_file(path, "a+", detach=False, encoding="utf-8")
            owner = read_json(path)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use(owner) from None
            except OSError as error:  # a file system without locks: trust what the file says
                if owner and not (owner.get("machine") == machine_id() and is_dead(owner["pid"])):
                    raise self._in_use(owner, f" (no locks here: {error.strerror})") from None
            with suppress(FileNotFoundError):  # moved aside or released since it was opened
                found = os.fstat(self._file.fileno())
                if os.path.samestat(found, path.stat()):
                    if found.st_nlink == 1:
                        break
                    path.unlink()  # the other names keep the file, which is not ours to change
            self._file.close()
        if owner:
            show(f"removed the stale lock of {_describe(owner)} ({self.folder})")
        self._own = {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine_id()}
        self._own |= {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "id": secrets.token_hex(8)}
        self._file.truncate(0)
        self._file.write(json.dumps(self._own) + "\n")
        self._file.flush()

    def _in_use(self, owner: dict[str, Any], why: str = "") -> LockedError:
        return LockedError(
            f"{self.folder} is in use by the run of {_describe(owner)}{why}: wait for it or stop "
            "it, or give this run another train.output_dir. (If it is surely gone, remove "
            f"{self.folder / self.NAME}.)"
        )

    def move_folder(self) -> Path:
        """Gives the folder an unused name, which it returns, and locks a new one in its place.

        A link to the folder stays; the folder that it points to is renamed.
        """
        folder = self.folder.resolve()
        aside = checkpoint.unused_name(folder)
        try:
            folder.rename(aside)
        except OSError as error:
            raise CheckpointError(
                f"{folder} holds an earlier run and cannot be renamed: {error.strerror}; give this "
                "run another train.output_dir"
            ) from None
        (aside / self.NAME).unlink()
        self._file.close()
        self._acquire()
        return aside

    def _is_held(self) -> bool:
        """Returns whether the lock in the folder is still that of this run."""
        path = self.folder / self.NAME
        if self._is_lost:
            return False
        is_same = is_same_file(self._file.fileno(), path)
        return is_same or read_json(path) == self._own  # a file system whose inodes change

    def renew(self) -> str | None:
        """Locks the folder again if the lock was removed; returns why that is impossible."""
        if self._is_held():
            return None
        former = self._file
        try:
            self._acquire()
            former.close()
        except LockedError as error:
            self._is_lost = True
            return str(error)
        except OSError as error:  # a full disk, for example
            show(f"warning: {self.folder / self.NAME} cannot be made again: {error.strerror}")
        return None

    def release(self) -> None:
        with suppress(OSError):
            if self._is_held():
                (self.folder / self.NAME).unlink()
        self._file.close()


def _describe(owner: dict[str, Any]) -> str:
    pid, host, since = (owner.get(key, "?") for key in ("pid", "host", "since"))
    return f"process {pid} on {host} (since {since})"


class Status:
    """The file status.json: how the newest attempt ended, at which step, and its checkpoint."""

    NAME = "status.json"

    def __init__(self, folder: Path):
        self.folder = folder
        self.attempt: int | None = None  # of the run in the folder; None before it has begun
        self._pinned: int | None = None  # a descriptor of the folder
        self._loss: str | None = None

    def pin(self) -> None:
        """Remembers which folder this is, so that `find_loss` notices if it is moved or removed."""
        self._pinned = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)

    def find_loss(self, lock: Lock | None) -> str | None:
        """Returns why the folder is not that of this run any more, or None.

        It was moved or removed, or another run has its lock. The status is then written where the
        folder is now, or not at all.
        """
        if self._pinned is None or self._loss:
            return self._loss
        found = Path(_path_of(self._pinned) or "/nonexistent")
        if is_same_file(self._pinned, self.folder) or found == self.folder.resolve():
            if (reason := lock.renew() if lock else None) is not None:
                self.attempt, self._loss = None, reason
        elif found.is_dir():
            last = run_folder.newest_valid(found)
            kept = f"its last checkpoint is {last}" if last else "it has no checkpoint yet"
            self._loss = f"{self.folder} was moved to {found} while the run used it; {kept}"
            self.folder = found
        else:
            self._loss = f"{self.folder} was removed while the run used it"
            self.attempt = None
        return self._loss

    def begin(self) -> None:
        """Begins the next attempt in this folder. Only the first rank calls it."""
        (self.folder / RANKS).mkdir(parents=True, exist_ok=True)
        self.pin()
        for name in own_ranks_files(self.folder):
            (self.folder / RANKS / name).unlink(missing_ok=True)
        self.attempt = 1 + (self.read().get("attempt") or 0)
        announced = {"attempt": self.attempt, "launch": launch_id(), "job": slurm.attempt_of_job()}
        write_json(self.folder / slurm.ANNOUNCED, announced)
        self._write("running")

    def update(self) -> None:
        """Writes which checkpoint is the newest now, while the run goes on."""
        if self.attempt is not None:
            self._write("running")

    def follow(self) -> None:
        """Adopts the attempt that the first rank of the same launch has begun, if it has."""
        announced = read_json(self.folder / slurm.ANNOUNCED)
        number = announced.get("attempt")
        if announced.get("launch") == launch_id() and not self._end_mark(number).exists():
            self.attempt = number

    def end(self, state: str, code: int, reason: str | None, rank: int, step: int | None) -> bool:
        """Writes how the attempt ended; returns False if a rank has, or a later attempt began."""
        if self.attempt is None or self.read().get("attempt", self.attempt) != self.attempt:
            return False
        try:
            self._end_mark(self.attempt).parent.mkdir(exist_ok=True)
            self._end_mark(self.attempt).touch(exist_ok=False)
            self._write(state, code, reason, rank, step)
        except FileExistsError:
            return False
        except OSError as error:
            show(f"cannot write {self.folder / self.NAME}: {error}", error=True)
        return True

    def _end_mark(self, attempt: int | None) -> Path:
        """Returns a file that one rank alone can create: the first to report the attempt's end."""
        return self.folder / RANKS / f"ended_{attempt}"

    def has_ended(self) -> bool:
        return self.attempt is not None and self._end_mark(self.attempt).exists()

    def verdict(self) -> dict[str, Any]:
        """Returns the status when a rank has written the end; waits at most two seconds for it."""
        for _ in range(20):
            if self.read().get("state") != "running":
                break
            time.sleep(0.1)
        return self.read()

    def read(self) -> dict[str, Any]:
        return read_json(self.folder / self.NAME)

    def _write(
        self,
        state: str,
        code: int | None = None,
        reason: str | None = None,
        rank: int | None = None,
        step: int | None = None,
    ) -> None:
        final, found = self.folder / run_folder.FINAL, run_folder.newest_valid(self.folder)
        if state == "finished" and checkpoint.fault(final, digests=False) is None:
            found = final
        values = {
            "version": __version__,
            "state": state,
            "exit_code": code,
            "reason": reason,
            "rank": rank,
            "step": step,
            "attempt": self.attempt,
            "checkpoint": found.name if found else None,
        }
        path = self.folder / self.NAME
        try:
            write_json(path, values, sync=True)
        except OSError as error:
            if error.errno != errno.ENOSPC or not path.exists():
                raise
            # A full disk has room in the place of the old status: how the run ended matters more
            # than that a kill in this moment leaves a whole file.
            with plain.open_file(path, "r+", encoding="utf-8") as file:
                file.write(json.dumps(values, indent=2) + "\n")
                file.truncate()


def own_ranks_files(folder: Path) -> list[str]:
    """Returns the names of the files in .ranks that runs have written."""
    names = [path.name for path in (folder / RANKS).glob("*")]
    own = re.compile(r"(attempt|\d+)\.json|\d+\.stacks|ended_\d+")
    return [name for name in names if own.fullmatch((parse_temporary(name) or (name,))[0])]


def remove_record(folder: Path) -> None:
    """Removes what `Guard` writes into a folder, and the folder if nothing else is in it."""
    for name in own_ranks_files(folder):
        (folder / RANKS / name).unlink(missing_ok=True)
    for name in (Status.NAME, Lock.NAME, TRACEBACK):
        (folder / name).unlink(missing_ok=True)
    for each in (folder / RANKS, folder):
        with suppress(OSError):
            each.rmdir()


def is_same_file(descriptor: int, path: Path) -> bool:
    """Returns whether `path` is the open file; True if the file system fails to answer."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
    except OSError:  # a server that is away for a while is no reason to end a run
        return True


def _path_of(descriptor: int) -> str | None:
    """Returns where an open folder is now, if the system knows."""
    with suppress(OSError):
        if hasattr(fcntl, "F_GETPATH"):  # macOS
            return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return None


def launch_id() -> str:
    """Returns a text that is equal on all ranks of a launch, and different in every launch."""
    names = ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
    return " ".join([slurm.attempt_of_job(), *(os.environ.get(name, "-") for name in names)])
