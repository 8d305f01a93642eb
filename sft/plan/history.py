"""What earlier runs took, compared with what was predicted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

HISTORY = "memory.jsonl"  # in what outlives a run: tasks.Traits.cache
KEPT = 50  # lines of it that count


# --- what earlier runs have shown --------------------------------------------------------------


@dataclass(frozen=True)
class Past:
    """What earlier runs on a device took beyond what was predicted, as shares of that."""

    runs: int
    least: float
    most: float


def past(folder: Path, device: str) -> Past | None:
    """Of the last KEPT runs; lines that cannot be read count nothing."""
    try:
        lines = (folder / HISTORY).read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return None
    beyond = [share for line in lines if (share := _beyond(line, device)) is not None][-KEPT:]
    return Past(len(beyond), min(beyond), max(beyond)) if beyond else None


def _beyond(line: str, device: str) -> float | None:
    try:
        told = json.loads(line)
        if told["device"] != device:
            return None
        return float(told["measured_bytes"]) / float(told["predicted_bytes"]) - 1
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def remember(folder: Path, device: str, predicted: int, measured: int) -> None:
    """Adds a line to the history; a folder that cannot be written to is no reason to stop."""
    line = {"device": device, "predicted_bytes": predicted, "measured_bytes": measured}
    try:
        with (folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        return
