"""Errors that a user can fix, their exit codes, and what must not reach a log."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """A mistake that the user can mend: told in one message, without a traceback."""

    exit_code = 2


class Preempted(UserError):
    """A signal asked the run to stop; what there was to save is saved, and it can be resumed."""

    exit_code = 75


class PeerError(UserError):
    """Another process of the run died, hung, is missing or disagreed."""

    exit_code = 7


class ConfigError(UserError):
    """The configuration cannot be run; the message lists every problem."""


# --- secrets -----------------------------------------------------------------------------------

SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY(_ID)?)$")  # HF_TOKEN, AWS_* ...


def redacted(text: str) -> str:
    """The text with `<HF_TOKEN>` in place of that variable's value, and of every other secret in
    the environment: for whatever is written to a file or told to a console that may be kept."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, f"<{name}>")
    return text


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The nearest of the known words, or all of them, as the end of a message."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def excerpt(value: Any) -> str:
    """At most 60 characters of what Python calls it, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class DataError(UserError):
    """The data cannot be trained on as it is; the message says which rows, why, and what to do."""

    exit_code = 3

    @classmethod
    def of_rows(cls, path: str, problems: list[str], total: int | None = None) -> DataError:
        """One error for all (`total`) bad rows, the first ten listed (`file:line: reason`)."""
        total = total or len(problems)
        more = [f"... and {total - 10} more"] if total > 10 else []
        listed = "\n  ".join(problems[:10] + more)
        num = f"{total} bad row{'s' if total > 1 else ''}"
        return cls(f"{path}: {num}; correct or remove them, none is skipped\n  {listed}")


class ModelError(UserError):
    """The model or tokenizer cannot be loaded or adapted as configured."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or none of those that exist is valid."""

    exit_code = 4


class LockedError(UserError):
    """Another run is at work in the folder."""

    exit_code = 4


class NonFiniteError(UserError):
    """Loss or gradient is NaN or infinite; the step was not applied."""

    exit_code = 5


class OutOfMemory(UserError):
    """Memory ran out where no smaller micro-batch helps, or where a step cannot be done again."""

    exit_code = 6


class AnotherRunError(ConfigError):
    """A checkpoint is not of the run that would resume it."""


class ExportError(UserError):
    """A run folder or an adapter is not what it should be."""


class MergeError(UserError):
    """There is nothing to merge, or the merged model is not the one that was trained."""


class VerificationError(UserError):
    """A law does not hold on this configuration, or could not be tried."""

    exit_code = 1
