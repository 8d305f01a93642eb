"""Errors that a user can fix, their exit codes, and text that messages share."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from enum import IntEnum
from functools import cache
from importlib.util import find_spec
from typing import Any


class ExitCode(IntEnum):
    """How a command ended; docs/RUNS.md explains each code."""

    FINISHED = 0
    BUG = 1
    CONFIGURATION = 2
    DATA = 3
    CHECKPOINT = 4
    NOT_FINITE = 5
    OUT_OF_MEMORY = 6
    PEER = 7
    OVER_LIMIT = 8
    PREEMPTED = 75
    INTERRUPTED = 130  # 128 + SIGINT, as shells report it
    TERMINATED = 143  # 128 + SIGTERM


class UserError(ValueError):
    """An error that the user can fix; reported in one message, without a traceback."""

    exit_code: int = ExitCode.CONFIGURATION


class ConfigError(UserError):
    """The configuration cannot be run; the message lists every problem."""


class AnotherRunError(ConfigError):
    """The checkpoint belongs to another run than the one that resumes from it."""


class ModelError(UserError):
    """The model or tokenizer cannot be loaded or adapted as configured."""


class EngineError(UserError):
    """vLLM cannot answer, or does not answer as the opened model does."""

    exit_code = ExitCode.PEER


class ExportError(UserError):
    """A run folder or an adapter is incomplete, damaged or of another kind than expected."""


class MergeError(UserError):
    """There is nothing to merge, or the merged model differs from the trained one."""


class VerificationError(UserError):
    """A law does not hold for this configuration, or could not be tested."""

    exit_code = ExitCode.BUG


class DataError(UserError):
    """The data cannot be trained on as they are; the message lists rows, reasons and remedies."""

    exit_code = ExitCode.DATA

    @classmethod
    def from_rows(cls, path: str, problems: list[str], total: int | None = None) -> DataError:
        """Makes one error for all (`total`) bad rows; lists the first ten (`file:line: reason`)."""
        total = total or len(problems)
        more = [f"... and {total - 10} more"] if total > 10 else []
        listed = "\n  ".join(problems[:10] + more)
        num = f"{total} bad row{'s' if total > 1 else ''}"
        return cls(f"{path}: {num}; correct or remove them, none is skipped\n  {listed}")


class CheckpointError(UserError):
    """A checkpoint cannot be written, or no valid one exists."""

    exit_code = ExitCode.CHECKPOINT


class LostFolder(CheckpointError):
    """The run folder was moved or removed while the run used it, or another run has taken it."""


class LockedError(UserError):
    """Another run is using the folder."""

    exit_code = ExitCode.CHECKPOINT


class NonFiniteError(UserError):
    """Loss or gradient is NaN or infinite; the step was not applied."""

    exit_code = ExitCode.NOT_FINITE


class OutOfMemory(UserError):
    """Memory ran out where a smaller micro-batch does not help or the step cannot be repeated."""

    exit_code = ExitCode.OUT_OF_MEMORY


class PeerError(UserError):
    """Another process of the run died, stalled, is missing or has other inputs."""

    exit_code = ExitCode.PEER


class Preempted(UserError):
    """A signal stopped the run after its state was saved; the run can be resumed."""

    exit_code = ExitCode.PREEMPTED


def oom_message(error: BaseException) -> str | None:
    """Returns the message of an allocator (host, torch or GPU), or None for any other error."""
    message = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
    phrases = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    is_torch = isinstance(error, RuntimeError) and any(phrase in message for phrase in phrases)
    return message if is_torch or isinstance(error, MemoryError) else None


SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY(_ID)?)$")  # HF_TOKEN, AWS_* ...


HIDDEN = "<hidden>"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'`|]*[^\s\"'`|.,:;)\]]")
FROM_ENVIRONMENT = re.compile(r"\$\{(\w+)\}")  # a part of an address that the environment gives
SHOWN = re.compile(  # what a query may say in the open: which representation, and never who asks
    r"(?i)(download|raw|dl|format|version|revision|ref|split|config|subset|limit|offset|page|alt"
    r"|export|gid|inline)=([\w.-]{0,40}|%20)*"
)


def redact(text: str) -> str:
    """Hides the secrets of the environment, and the credentials in addresses.

    All text for files and the console passes through it, because clusters keep both.
    """
    return URL.sub(lambda match: hide_credentials(match[0]), redact_environment(text))


def redact_environment(text: str) -> str:
    """Replaces the value of each secret variable of the environment by its name, `<HF_TOKEN>`."""
    for name in filter(_is_secret, os.environ):
        if len(value := os.environ.get(name, "")) >= 8:
            text = text.replace(value, f"<{name}>")
    return text


@cache
def _is_secret(name: str) -> bool:
    return SECRET.search(name) is not None


def hide_credentials(address: str) -> str:
    """Returns an address without its user and password, and without the values of its query, of
    which only harmless ones stay (`?download=true`). `${NAME}` stays, since it names a variable."""
    scheme, mark, rest = address.partition("://")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in host and re.search(r"^[^\[].*:(?!\d*$)|^:", host) and "@" in rest:
        host = rest  # a password that is not quoted as it should be
    user = host[: host.rfind("@") + 1]
    place, fragment_mark, fragment = rest[len(user) :].partition("#")
    place, query_mark, query = place.partition("?")
    parts = [part if SHOWN.fullmatch(part) else _hide_value(part) for part in query.split("&")]
    shown_user = user if not user or _NAMED_USER.fullmatch(user) else f"{HIDDEN}@"
    shown_query = "&".join(parts) if query else ""
    shown_fragment = HIDDEN if "=" in fragment else fragment
    return (
        f"{scheme}{mark}{shown_user}{place}{query_mark}{shown_query}{fragment_mark}{shown_fragment}"
    )


_NAMED = r"(\$\{\w+\}|<hidden>)"  # says nothing
_NAMED_USER = re.compile(rf"{_NAMED}(:{_NAMED}?)?@")


def _hide_value(part: str) -> str:
    """Hides `value` in `name=value`, or all of a text without a name."""
    name, mark, value = part.partition("=") if "=" in part.rstrip("=") else ("", "", part)
    return name + mark + (value if not value or re.fullmatch(_NAMED, value) else HIDDEN)


def suggest(word: str, known: Sequence[str]) -> str:
    """Returns the end of a message: the most similar known word, or else all known words."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def shorten(value: Any) -> str:
    """Returns at most 60 characters of a value's representation, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def require_extra(extra: str, setting: str, modules: Iterable[str]) -> None:
    """Raises UserError if a module that `setting` needs is missing; `extra` installs it."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UserError(
            f'{setting} needs {", ".join(missing)}, not installed: pip install "sft[{extra}]"'
        )
