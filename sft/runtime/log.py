"""Everything a run tells: console, `training.log`, `metrics.jsonl`, TensorBoard, progress bar.

One `log(step, values)` feeds them all. Only the main process has a `Log` that writes; on the others
every method does nothing, so callers never ask which rank they are.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    Progress,
)

from sft.errors import redact
from sft.runtime.console import Advance, bar, make_console


def _step_of(line: bytes) -> int:
    """The step of a line of metrics.jsonl; -1 if the line was torn by a kill or a full disk."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else -1
    except (ValueError, TypeError, KeyError):
        return -1


class _Lines(io.TextIOBase):
    """A file to which whole lines are added, without secrets of the environment. What a full disk
    does not take is lost, with one warning; what comes when there is room again is written."""

    def __init__(self, path: Path, warn: Callable[[str, Exception], None]):
        super().__init__()
        self._path, self._warn = path, warn
        self._raw = path.open("ab", buffering=0)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        data, end = (
            redact(text).encode("utf-8", "backslashreplace"),
            os.fstat(self._raw.fileno()).st_size,
        )
        try:
            if self._raw.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._raw.truncate(end)  # no torn line
            self._warn(self._path.name, error)
        return len(text)

    def close(self) -> None:
        self._raw.close()
        super().close()


class Log:
    """The files and the console of one run. `folder=None` (another rank): silent."""

    def __init__(self, folder: Path | None, *, tensorboard: bool = False, wandb: Any = None):
        self.folder = folder
        self.console = make_console() if folder else None
        self._file: Console | None = None
        self._metrics: io.TextIOBase | None = None
        self._warned: set[str] = set()
        self._board: Any = None
        self._use_tensorboard = tensorboard
        self._wandb = wandb
        self._progress: Progress | None = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = make_console(_Lines(folder / "training.log", self._warn))

    def say(self, what: RenderableType = "") -> None:
        for console in (self.console, self._file):
            if console:
                console.print(what)
                console.file.flush()

    def _warn(self, name: str, error: Exception) -> None:
        """Once for each file: a log is no reason to stop a run."""
        if name not in self._warned:
            self._warned.add(name)
            self.say(f"warning: {name} cannot be written: {error}; the run goes on without it")

    def open_metrics(self, step: int) -> None:
        """Starts (or continues, after `step`) the curves; what a killed run logged later is cut."""
        folder = self.folder
        if not folder:
            return
        path = folder / "metrics.jsonl"
        self._metrics = _Lines(path, self._warn)
        kept = 0  # bytes; cutting needs no room on the disk, and a kill cannot cost the history
        for line in path.read_bytes().splitlines(True) if step else []:
            if not 0 <= _step_of(line) <= step:
                break
            kept += len(line)
        os.truncate(path, kept)
        if self._use_tensorboard:
            self._to_board(lambda: self._open_board(folder / "tensorboard", step))

    def _open_board(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def _to_board(self, action: Callable[[], None]) -> None:
        """Its own thread writes, and what that meets is raised here; it cannot be used again."""
        try:
            action()
        except (OSError, RuntimeError) as error:
            self._board = None
            self._warn("tensorboard", error)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars of one step, with names as in `train/loss`."""
        if self._metrics:
            finite = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
            self._metrics.flush()
        if self._board:
            self._to_board(lambda: self._add_scalars(step, values))
        if self._wandb:
            self._wandb.log(values, step=step)

    def _add_scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """A bar with ETA on a terminal; elsewhere nothing moves and `say` lines tell the story."""
        if not self.console or not self.console.is_terminal:
            yield lambda n=1, note="": None
            return
        with bar(self.console, title, total, done) as advance:
            yield advance

    def close(self) -> None:
        if self._board:
            self._to_board(self._board.close)
        for stream in (self._metrics, self._file and self._file.file):
            if stream:
                stream.close()
        if self._wandb:
            self._wandb.finish()


class Screen(Log):
    """The console alone, for work that keeps no log; a line every ten seconds if it is a file."""

    def __init__(self) -> None:
        super().__init__(None)
        self.console = make_console()

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        assert self.console
        with bar(self.console, title, total, done) as advance:
            yield advance
