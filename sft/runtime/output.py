"""Standard output and error that never fail: what cannot be written there is lost.

The disk of the console may be full, its reader gone (`| head -1`), stopped, or closed from the
start. None of these may end a training, whose results are files. So `protect` puts streams in place
that lose text instead of raising OSError, and that report the first loss where it is possible.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import select
import sys
import warnings
from contextlib import suppress
from typing import Any, TextIO

from sft.errors import redact

PIECE = 4096  # bytes; a pipe that `poll` calls writable takes as many at once
PATIENCE = 10.0  # seconds that a run waits for a reader that has stopped reading

# What a terminal obeys instead of showing it: C0 and C1 but tab and newline, and marks that reorder
# text. A terminal that gets them from the name of a file can be made to write or run something.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Escapes the control characters of a text, so that a terminal does not obey them."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def show(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Prints a text, made `visible` and without secrets, on standard output or error.

    All that this package prints goes through here or `console.make_console`, since any part of it,
    such as the name of a file or host, may come from a stranger.
    """
    print(visible(redact(text)), end=end, file=sys.stderr if error else sys.stdout, flush=True)


class Output(io.RawIOBase):
    """A file descriptor whose writes never fail; what it does not take is lost."""

    def __init__(self, fd: int, name: str):
        super().__init__()
        self.fd, self.name = fd, name
        self.loss: OSError | None = None  # why text is lost at present
        self._is_reported = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.fd

    def isatty(self) -> bool:
        with suppress(OSError):
            return os.isatty(self.fd)
        return False

    def write(self, data: object) -> int:
        text = bytes(memoryview(data))  # type: ignore[arg-type]
        try:
            if self.loss:
                self._put(f"\n[lines are missing here: {_reason(self.loss)}]\n".encode())
            self._put(text)
            self.loss = None
        except OSError as error:
            self._lose(error)
        return len(text)

    def _put(self, text: bytes) -> None:
        while text:
            self._wait()
            with suppress(BlockingIOError):  # another process has made the stream non-blocking
                text = text[os.write(self.fd, text[:PIECE]) :]

    def _wait(self) -> None:
        """Waits until the reader takes text; raises TimeoutError if a run has waited too long."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        seconds = None if not _runs else 0 if self.loss else PATIENCE
        if not poll.poll(seconds if seconds is None else 1000 * seconds):
            raise TimeoutError(errno.ETIMEDOUT, "its reader has stopped reading")

    def _lose(self, error: OSError) -> None:
        self.loss = error
        # A reader that has seen enough of a table (`sft plan | head`) is nothing to warn about.
        if self._is_reported or (error.errno == errno.EPIPE and not _runs):
            return
        self._is_reported = True
        text = f"warning: {self.name} cannot be written: {_reason(error)}; its lines are lost"
        _warnings.append(text)
        for other in _outputs:
            if other is not self:
                other.write(f"{text}\n".encode())


_outputs: list[Output] = []
_warnings: list[str] = []  # not yet in the log of the run
_runs: list[bool] = []  # not empty in a run, which must go on without its console


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def protect() -> None:
    """Makes standard output and error never fail, from now on.

    Streams that the surrounding program has replaced, as a notebook does, are left alone.
    """
    for fd in range(3):  # closed by the shell: else the next files to be opened get their numbers
        _reserve(fd)
    for fd, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            mode = "r" if fd == 0 else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif fd and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _protected(stream, fd, name))


def _reserve(fd: int) -> None:
    """Opens /dev/null as `fd`, if that is not open."""
    try:
        os.fstat(fd)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != fd:
            os.dup2(null, fd)
            os.close(null)
        os.set_inheritable(fd, True)


def _protected(stream: io.TextIOWrapper, fd: int, name: str) -> io.TextIOWrapper:
    """Returns a stream with the settings of `stream`, which writes what no encoding has as escapes.

    Each line is written at once, so that a loss is noticed where it happens.
    """
    with suppress(OSError, ValueError):
        stream.flush()
    raw = Output(fd, "standard output" if name == "stdout" else "standard error")
    _outputs.append(raw)
    return io.TextIOWrapper(
        raw,  # as Python's own streams with -u; it takes all it is given
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def cover_libraries() -> None:
    """Makes what libraries log and warn of `visible` and free of secrets, as all that is shown."""
    make, form = logging.getLogRecordFactory(), warnings.formatwarning

    def make_record(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        with suppress(Exception):  # logging itself reports a message that does not fit its values
            record.msg, record.args = visible(redact(record.getMessage())), ()
        return record

    logging.setLogRecordFactory(make_record)
    warnings.formatwarning = lambda *given, **options: visible(redact(form(*given, **options)))


def begin_run() -> None:
    """Declares that results are files from now on, so a reader that stops is not waited for."""
    _runs.append(True)


def is_lost() -> bool:
    """Returns whether this command has lost text that was its result."""
    losses = [output.loss for output in _outputs]
    return not _runs and any(loss and loss.errno != errno.EPIPE for loss in losses)


def take_warnings() -> list[str]:
    """Returns the warnings about lost text that no log has yet."""
    taken = _warnings[:]
    _warnings.clear()
    return taken
