"""Writes the logs of a run: console, `training.log`, `metrics.jsonl`, TensorBoard, trackers, bar.

Only the main process has a `Log` that writes. On the others every method does nothing, so callers
never ask which rank they are.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.progress import Progress

from sft.errors import Preempted, UserError, redact
from sft.runtime import output, plain
from sft.runtime.console import Advance, bar, make_console
from sft.runtime.run_folder import HISTORY, METRICS, last_step, metrics_end


def _hide_writers_trace(found: threading.ExceptHookArgs) -> None:
    """Prints a thread's traceback, but not that of TensorBoard's writer: `Log` warns of it."""
    if not (
        type(found.thread).__name__ == "_AsyncWriterThread" and issubclass(found.exc_type, OSError)
    ):
        threading.__excepthook__(found)


class _Lines(io.TextIOBase):
    """A file that gets only whole lines, without secrets. A line that cannot be written is dropped,
    with a warning."""

    def __init__(self, path: Path, warn: Callable[[str, Exception], None]):
        super().__init__()
        self._path, self._warn = path, warn
        self._raw: IO[bytes] | None = None
        self.write("")

    def write(self, text: str) -> int:
        data = redact(text).encode("utf-8", "backslashreplace")
        try:
            raw = self._raw = self._raw or plain.open_file(self._path, "ab", buffering=0)
            end = os.fstat(raw.fileno()).st_size
            try:
                if raw.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                raw.truncate(end)  # removes the part of the line that was written
                raise
        except OSError as error:
            self._warn(self._path.name, error)
        return len(text)

    def sync(self) -> None:
        """Waits until the disk has the lines."""
        try:
            if self._raw:
                os.fsync(self._raw.fileno())
        except OSError as error:
            self._warn(self._path.name, error)

    def close(self) -> None:
        with suppress(OSError):
            if self._raw:
                self._raw.close()
        super().close()


def first_card(name: str) -> str | None:
    """Returns the second name that TensorBoard gets of the curves that it shows first, or None.

    It sorts groups and cards by name: first the loss, then the held-out one, then the scores.
    """
    group, _, metric = name.partition("/")
    if name == "train/loss":
        return "0_overview/1_loss"
    if group != "eval" or metric == "perplexity" or "/" in metric:
        return None
    return "0_overview/2_held_out_loss" if metric == "loss" else f"0_overview/3_{metric}"


class Log:
    """The log files and the console of a run. Without a folder, as on other ranks, it is silent."""

    has_lines = False  # whether progress is printed as lines where there is no terminal

    def __init__(
        self,
        folder: Path | None,
        *,
        tensorboard: bool = False,
        trackers: Mapping[str, Any] | None = None,
    ):
        self.folder = folder
        self.console = make_console() if folder else None
        self._file: Console | None = None
        self._metrics: _Lines | None = None
        self._warned: set[str] = set()
        self._board: Any = None
        self._use_tensorboard = tensorboard
        self._trackers = dict(trackers or {})  # by name: Accelerate's, started
        self._texts: list[tuple[str, str, int]] = []  # that wait for TensorBoard
        self._step = 0
        self._progress: Progress | None = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = make_console(_Lines(folder / "training.log", self._warn))

    def say(self, what: RenderableType = "") -> None:
        for console in (self.console, self._file):
            if console:
                console.print(what)
                console.file.flush()
        if self._file:
            for warning in output.take_warnings():
                self._file.print(warning)

    def _warn(self, name: str, error: Exception) -> None:
        """Warns once for each file: a log that cannot be written is no reason to stop a run."""
        if name not in self._warned:
            self._warned.add(name)
            self.say(f"warning: {name} cannot be written: {error}; the run goes on without it")

    @contextmanager
    def optional(self, name: str) -> Iterator[None]:
        """Goes on with a warning if what the body writes, `name`, cannot be written."""
        try:
            yield
        except Preempted:
            raise
        except (OSError, UserError) as error:
            self._warn(name, error)

    def open_metrics(self, step: int) -> None:
        """Opens metrics.jsonl and TensorBoard, and drops what they have of steps after `step`."""
        folder = self.folder
        if not folder:
            return
        path = folder / METRICS
        self._metrics = _Lines(path, self._warn)
        with self.optional(path.name):  # truncating needs no disk space
            plain.cut(path, metrics_end(path, step) if step else 0)
            if 0 < (last := last_step(path)) < step:
                self.say(
                    f"warning: {path} has no steps {last + 1:,} to {step:,}, which the checkpoint "
                    "has: was an older copy of it restored?"
                )
        if self._use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _hide_writers_trace
            with self._board_errors():
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        for waiting in self._texts:
            self.text(*waiting)
        self._texts.clear()

    @contextmanager
    def _board_errors(self) -> Iterator[None]:
        """Stops using TensorBoard after an error of its thread, which is raised in this context."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            self._board = None
            self._warn("tensorboard", error)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs the scalars of one step, with names as in `train/loss`."""
        self._step = step
        if self._metrics:
            finite = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
            self._metrics.flush()
        if self._board:
            with self._board_errors():
                for name, value in values.items():
                    if name.startswith("data/"):  # a checksum is no curve
                        continue
                    self._board.add_scalar(name, value, step)
                    if card := first_card(name):
                        self._board.add_scalar(card, value, step)
                self._board.flush()
        for name, tracker in [*self._trackers.items()]:
            with self._tracker_errors(name):
                tracker.log(values, step=step)

    def text(self, name: str, markdown: str, step: int | None = None) -> None:
        """Adds a text to TensorBoard, once that is open. `step`: None: that of the last scalars."""
        step = self._step if step is None else step
        if self._board:
            with self._board_errors():
                self._board.add_text(name, redact(markdown), step)
        elif self._use_tensorboard and self._metrics is None:
            self._texts.append((name, markdown, step))

    def record(self, event: dict[str, Any]) -> None:
        """Appends a line to history.jsonl, from which a receipt is made."""
        if self.folder:
            with closing(_Lines(self.folder / HISTORY, self._warn)) as lines:
                lines.write(json.dumps(event) + "\n")
                lines.sync()

    def sync_metrics(self) -> None:
        """Waits until the disk has metrics.jsonl, of which a checkpoint needs what came before."""
        if self._metrics:
            self._metrics.sync()

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """Shows a bar with an ETA on a terminal; elsewhere nothing, or lines if it `has_lines`."""
        if self.console and (self.console.is_terminal or self.has_lines):
            with bar(self.console, title, total, done) as advance:
                yield advance
        else:
            yield lambda n=1, note="": None

    def close(self) -> None:
        for name, tracker in [*self._trackers.items()]:
            with self._tracker_errors(name):
                tracker.finish()
        if self._board:
            with self._board_errors():
                self._board.close()
        for stream in (self._metrics, self._file and self._file.file):
            if stream:
                stream.close()

    @contextmanager
    def _tracker_errors(self, name: str) -> Iterator[None]:
        """Stops using a tracker after any error: neither its service nor its disk may end a run."""
        try:
            yield
        except Preempted:
            raise
        except Exception as error:  # noqa: BLE001
            self._trackers.pop(name, None)
            self._warn(name, error)


class Screen(Log):
    """A log that only prints; its progress is a line every ten seconds if there is no terminal."""

    has_lines = True

    def __init__(self) -> None:
        super().__init__(None)
        self.console = make_console()
