"""Formats what people see: tables, progress, sizes and durations; writes files whole."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from sft.errors import redact, redact_environment
from sft.runtime import plain
from sft.runtime.output import visible

WIDTH = 100  # columns of a terminal; no table is wider
LINE_EVERY = 10  # seconds between lines of progress, where there is no bar
Advance = Callable[..., None]  # advance(n=1, note="")


class _Console(Console):
    """A console that shows no secret, and shows control characters in any text but its own."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(redact(text)), **options)

    def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
        for each in super().render(*arguments, **options):
            yield each if each.control else Segment(visible(each.text), each.style)


def make_console(file: Any = None) -> Console:
    """Returns a console of at most `WIDTH` columns that prints text as it is, never as markup."""
    console = _Console(
        file=file,
        highlight=False,
        markup=False,
        emoji=False,
        force_terminal=False if file else None,  # FORCE_COLOR is not meant for files
    )
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    return console


def beginning(text: str, most: int = 300) -> str:
    """Returns the first `most` characters of a text, made `visible`."""
    return visible(text if len(text) <= most else text[: most - 1] + "…")


def as_markdown(shown: RenderableType) -> str:
    """Returns what is printed as Markdown that keeps its columns."""
    stream = io.StringIO()
    make_console(stream).print(shown)
    return "\n".join(f"    {line.rstrip()}" for line in stream.getvalue().splitlines())


def facts(title: str, rows: Sequence[tuple[str, str | Text]]) -> Table:
    """Returns a two-column table: name, value."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    left: int = 1,
    lines: bool = False,
    note: str | None = None,
) -> Table:
    """Returns a table within `WIDTH` columns; all but the first `left` columns are right-aligned.

    `lines` draws lines between rows and wraps every column, for texts of any length. `note` stands
    below.
    """
    result = Table(title=title, title_justify="left", show_lines=lines, pad_edge=lines)
    result.caption, result.caption_justify = note, "left"
    result.box = result.box if lines else None
    for number, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if number < left else "right"
        result.add_column(column, justify=justify, overflow="fold", ratio=1 if lines else None)
    for row in rows:
        result.add_row(*row)
    return result


def metrics_line(metrics: dict[str, float]) -> str:
    """Returns 'loss 0.0269, token accuracy 0.9986'."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())


def parse_temporary(name: str) -> tuple[str, int] | None:
    """Returns the file for which a process writes a temporary one of this name, and the process;
    None for another name."""
    found = re.fullmatch(r"\.(.+)\.(\d{1,9})", name)
    return (found[1], int(found[2])) if found else None


@contextmanager
def atomic_write(path: Path, *, sync: bool = False, follow: bool = True) -> Iterator[IO[str]]:
    """Opens a text file that appears whole or not at all.

    A link or a special file such as `/dev/stdout` is written directly; without `follow`, as in a
    run folder, it is refused (OSError). `sync` waits until the disk has the file.
    """
    is_special = path.is_symlink() or (path.exists() and not path.is_file())
    if is_special and not follow:
        raise OSError(errno.EINVAL, "a link, folder, pipe or device is in its place", str(path))
    part = path if is_special else path.with_name(plain.TEMPORARY.format(path.name, os.getpid()))
    if not is_special:
        part.unlink(missing_ok=True)
    opener = None if is_special else plain.opener
    try:
        mode = "w" if is_special else "x"
        with open(part, mode, encoding="utf-8", errors="backslashreplace", opener=opener) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if not is_special:
            part.replace(path)
    finally:
        if not is_special:
            part.unlink(missing_ok=True)  # what an error left


def write_json(path: Path, values: Any, *, sync: bool = False, follow: bool = False) -> None:
    """Writes JSON, without secrets, that appears whole or not at all (`atomic_write`)."""
    with atomic_write(path, sync=sync, follow=follow) as file:
        text = json.dumps(values, indent=2, ensure_ascii=False)
        file.write(redact_environment(text) + "\n")


def duration(seconds: float) -> str:
    """Returns '41 s', '3 min 05 s' or '2 h 10 min'."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float) -> str:
    """Returns '12 KiB', '1.5 MiB', '300 MiB' or '5.1 GiB'."""
    if num_bytes >= 4 * 2**30:
        return f"{num_bytes / 2**30:,.1f} GiB"
    if num_bytes >= 10 * 2**20:
        return f"{num_bytes / 2**20:,.0f} MiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**10:.0f} KiB"


def quantity(number: int) -> str:
    """Returns '640', '999,000', '1.5 M' or '30.5 B'."""
    for unit, size_of_unit in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if round(number / size_of_unit, 4) >= 1:
            return f"{number / size_of_unit:,.1f} {unit}"
    return f"{number:,}"


@contextmanager
def bar(console: Console | None, title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
    """Shows a bar with an ETA on a terminal, elsewhere a line every ten seconds.

    `total` is None if it is unknown. Shows nothing without a console.
    """
    if console is None:
        yield lambda n=1, note="": None
        return
    if not console.is_terminal:
        yield _print_lines(console, title, total, done)
        return
    columns = (
        TextColumn("{task.description}", style="cyan", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(title, total=total, completed=done, note="")
        yield lambda n=1, note="": shown.update(task, advance=n, note=note)


def _print_lines(console: Console, title: str, total: int | None, done: int) -> Advance:
    started = printed_at = time.monotonic()
    first = done

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, printed_at
        done += n
        now = time.monotonic()
        if now - printed_at < LINE_EVERY:
            return
        printed_at = now
        left = (now - started) / (done - first) * (total - done) if total and done > first else -1
        eta = f", ETA {duration(left)}" if left >= 0 else ""
        of = f" of {total:,}" if total else ""
        console.print(f"{title}: {done:,}{of}{eta}  {note}".rstrip())

    return advance
