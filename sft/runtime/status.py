"""How an attempt ended: `status.json`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from sft.runtime import checkpoint
from sft.runtime.console import write_json


def written_exit_code(path: Path) -> int | None:
    try:
        code = json.loads(path.read_text("utf-8"))["exit_code"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, int) else None


RANKS = ".ranks"  # in the run folder: what each rank is doing, and who was first to tell the end
TRACEBACK = "traceback.txt"


# --- the state of a run ------------------------------------------------------------------------


class Status:
    """status.json: state, exit code, reason, rank, step, attempt, newest checkpoint."""

    NAME = "status.json"

    def __init__(self, folder: Path):
        self.folder = folder
        self.attempt: int | None = None  # of the run in the folder; None: not begun, or not ours

    def begin(self) -> None:
        """The next attempt in this folder. By the first rank, which holds the lock."""
        shutil.rmtree(self.folder / RANKS, ignore_errors=True)
        (self.folder / RANKS).mkdir(parents=True)
        self.attempt = 1 + (self.read().get("attempt") or 0)
        announced = {"attempt": self.attempt, "launch": launch()}
        write_json(self.folder / RANKS / "attempt.json", announced)
        self._write("running")

    def follow(self) -> None:
        """Takes the attempt that the first rank of this very launch has begun, if it has."""
        announced = read_status(self.folder / RANKS / "attempt.json")
        is_ours = announced.get("launch") == launch() and announced["attempt"] != self.attempt
        if is_ours and not self._mark(announced["attempt"]).exists():
            self.attempt = announced["attempt"]

    def end(self, state: str, code: int, reason: str | None, rank: int, step: int | None) -> bool:
        """Writes how the attempt ended; False if another rank has, or a later attempt began."""
        if self.attempt is None or self.read().get("attempt", self.attempt) != self.attempt:
            return False
        try:
            self._mark(self.attempt).parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._mark(self.attempt), os.O_CREAT | os.O_EXCL))
            self._write(state, code, reason, rank, step)
        except FileExistsError:
            return False
        except OSError as error:
            print(f"cannot write {self.folder / self.NAME}: {error}", file=sys.stderr)
        return True

    def _mark(self, attempt: int) -> Path:
        """The file that only one rank can make: the first to tell how this attempt ended."""
        return self.folder / RANKS / f"ended_{attempt}"

    def has_ended(self) -> bool:
        return self.attempt is not None and self._mark(self.attempt).exists()

    def verdict(self) -> dict[str, Any]:
        """What the first to tell has written; waits a moment for it to be there."""
        told: dict[str, Any] = {}
        for _ in range(20):
            told = self.read()
            if told.get("state") != "running":
                break
            time.sleep(0.1)
        return told

    def read(self) -> dict[str, Any]:
        return read_status(self.folder / self.NAME)

    def _write(
        self,
        state: str,
        code: int | None = None,
        reason: str | None = None,
        rank: int | None = None,
        step: int | None = None,
    ) -> None:
        values = {
            "state": state,
            "exit_code": code,
            "reason": reason,
            "rank": rank,
            "step": step,
            "attempt": self.attempt,
            "checkpoint": self._newest(state),
        }
        write_json(self.folder / self.NAME, values, sync=True)

    def _newest(self, state: str) -> str | None:
        found = checkpoint.newest_first(self.folder)
        if state == "finished":
            found.insert(0, self.folder / "final_checkpoint")
        whole = (path.name for path in found if checkpoint.fault(path, digests=False) is None)
        return next(whole, None)


def launch() -> str:
    """What all ranks of one launch have in common, and those of another not."""
    names = ["MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"]
    names += ["SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
    return " ".join(os.environ.get(name, "-") for name in names)


def read_status(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
