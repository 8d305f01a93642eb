"""Writes the logs of a run: console, `training.log`, `metrics.jsonl`, TensorBoard, progress bar.

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
from rich.progress import Progress

from sft.errors import redact
from sft.runtime.console import Advance, bar, make_console


def _step_of(line: bytes) -> int:
    """Returns the step of a line of metrics.jsonl, or -1 if a kill or a full disk cut it short."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else -1
    except (ValueError, TypeError, KeyError):
        return -1


class _Lines(io.TextIOBase):
    """A file that gets whole lines, without secrets of the environment.

    Lines that a full disk does not take are lost, with one warning.
    """

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
            self._raw.truncate(end)  # removes the part of the line that was written
            self._warn(self._path.name, error)
        return len(text)

    def close(self) -> None:
        self._raw.close()
        super().close()


class Log:
    """The files and the console of one run; silent without a folder, as on other ranks."""

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
        """Warns once for each file, since a log is no reason to stop a run."""
        if name not in self._warned:
            self._warned.add(name)
            self.say(f"warning: {name} cannot be written: {error}; the run goes on without it")

    def open_metrics(self, step: int) -> None:
        """Starts the curves, or continues them after `step` and cuts what was logged later."""
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
            self._try_board(lambda: self._open_board(folder / "tensorboard", step))

    def _open_board(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def _try_board(self, action: Callable[[], None]) -> None:
        """Uses TensorBoard, whose thread's errors are raised here; gives it up after one."""
        try:
            action()
        except (OSError, RuntimeError) as error:
            self._board = None
            self._warn("tensorboard", error)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs the scalars of one step, with names as in `train/loss`."""
        if self._metrics:
            finite = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
            self._metrics.flush()
        if self._board:
            self._try_board(lambda: self._add_scalars(step, values))
        if self._wandb:
            self._wandb.log(values, step=step)

    def _add_scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """Shows a bar with an ETA on a terminal, and nothing elsewhere."""
        if not self.console or not self.console.is_terminal:
            yield lambda n=1, note="": None
            return
        with bar(self.console, title, total, done) as advance:
            yield advance

    def close(self) -> None:
        if self._board:
            self._try_board(self._board.close)
        for stream in (self._metrics, self._file and self._file.file):
            if stream:
                stream.close()
        if self._wandb:
            self._wandb.finish()


class Screen(Log):
    """A log on the console only, whose progress is a line every ten seconds if that is a file."""

    def __init__(self) -> None:
        super().__init__(None)
        self.console = make_console()

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        assert self.console
        with bar(self.console, title, total, done) as advance:
            yield advance
