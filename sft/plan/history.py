"""The memory that earlier runs took, compared with its prediction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

HISTORY = "memory.jsonl"  # in the folder that outlives a run: `TaskInfo.cache`
KEPT = 50  # the last lines that count


@dataclass(frozen=True)
class Past:
    """The memory of earlier runs on a device beyond its prediction, as shares of that."""

    runs: int
    least: float
    most: float


def read_past(folder: Path, device: str) -> Past | None:
    """Returns the history of the last KEPT runs; skips lines that cannot be read."""
    try:
        lines = (folder / HISTORY).read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return None
    errors = [error for line in lines if (error := _error(line, device)) is not None][-KEPT:]
    return Past(len(errors), min(errors), max(errors)) if errors else None


def _error(line: str, device: str) -> float | None:
    try:
        row = json.loads(line)
        if row["device"] != device:
            return None
        return float(row["measured_bytes"]) / float(row["predicted_bytes"]) - 1
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def append(folder: Path, device: str, predicted: int, measured: int) -> None:
    """Adds a line to the history; ignores a folder that cannot be written."""
    line = {"device": device, "predicted_bytes": predicted, "measured_bytes": measured}
    try:
        with (folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        return
