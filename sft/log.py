"""Everything a run tells: console, `training.log`, `metrics.jsonl`, TensorBoard, progress bar.

One `log(step, values)` feeds them all. Only the main process has a `Log` that writes; on the others
every method does nothing, so callers never ask which rank they are.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sft.config import redacted

WIDTH = 100  # columns that every table fits
LINE_EVERY = 10  # seconds, where there is no bar
Advance = Callable[..., None]  # advance(n=1, note="")


def make_console(file: IO[str] | None = None) -> Console:
    """At most `WIDTH` columns; text is printed as it is, never read as markup."""
    console = Console(
        file=file,
        highlight=False,
        markup=False,
        emoji=False,
        force_terminal=False if file else None,  # FORCE_COLOR is not meant for files
    )
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    return console


def visible(text: str) -> str:
    """Text from data or a model for a terminal, which would obey its control characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", lambda m: repr(m[0])[1:-1], text)


def facts(title: str, rows: Sequence[tuple[str, str | Text]]) -> Table:
    """A two-column table: name, value."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def duration(seconds: float) -> str:
    """'41 s', '3 min 05 s', '2 h 10 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )


@contextmanager
def bar(console: Console, title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
    """A bar with ETA on a terminal; elsewhere a line every ten seconds. total=None: not known."""
    if not console.is_terminal:
        with _lines(console, title, total, done) as advance:
            yield advance
        return
    columns = (
        TextColumn("[cyan]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(title, total=total, completed=done, note="")
        yield lambda n=1, note="": shown.update(task, advance=n, note=note)


@contextmanager
def _lines(console: Console, title: str, total: int | None, done: int) -> Iterator[Advance]:
    started = told = time.monotonic()
    first = done

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, told
        done += n
        now = time.monotonic()
        if now - told < LINE_EVERY:
            return
        told = now
        left = (now - started) / (done - first) * (total - done) if total and done > first else -1
        eta = f", ETA {duration(left)}" if left >= 0 else ""
        of = f" of {total:,}" if total else ""
        console.print(f"{title}: {done:,}{of}{eta}  {note}".rstrip())

    yield advance


def _step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; -1 if the line was torn by a kill or a full disk."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else -1
    except (ValueError, TypeError, KeyError):
        return -1


class _WithoutSecrets:
    """A file of text that never gets a secret of the environment, whatever is told to it."""

    def __init__(self, file: IO[str]):
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(redacted(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Log:
    """The files and the console of one run. `folder=None` (another rank): silent."""

    def __init__(self, folder: Path | None, *, tensorboard: bool = False, wandb: Any = None):
        self.folder = folder
        self.console = make_console() if folder else None
        self._file: Console | None = None
        self._metrics: IO[str] | None = None
        self._board: Any = None
        self._use_tensorboard = tensorboard
        self._wandb = wandb
        self._progress: Progress | None = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            kept = _WithoutSecrets((folder / "training.log").open("a", encoding="utf-8"))
            self._file = make_console(cast(IO[str], kept))

    def say(self, what: RenderableType = "") -> None:
        for console in (self.console, self._file):
            if console:
                console.print(what)
                console.file.flush()

    def open_metrics(self, step: int) -> None:
        """Starts (or continues, after `step`) the curves; what a killed run logged later is cut."""
        if not self.folder:
            return
        path = self.folder / "metrics.jsonl"
        kept = path.read_text("utf-8").splitlines(True) if path.exists() and step else []
        kept = [line for line in kept if 0 <= _step_of(line) <= step]
        rewritten = path.with_suffix(".tmp")  # a kill in between must not cost the history
        rewritten.write_text("".join(kept), "utf-8")
        rewritten.replace(path)
        self._metrics = path.open("a", encoding="utf-8")
        if self._use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars of one step, with names as in `train/loss`."""
        if self._metrics:
            finite = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
            self._metrics.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb:
            self._wandb.log(values, step=step)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar with ETA on a terminal; elsewhere nothing moves and `say` lines tell the story."""
        if not self.console or not self.console.is_terminal:
            yield lambda n=1, note="": None
            return
        with bar(self.console, title, total, done) as advance:
            yield advance

    def close(self) -> None:
        for stream in (self._metrics, self._board, self._file and self._file.file):
            if stream:
                stream.close()
        if self._wandb:
            self._wandb.finish()
