"""Safetensors files that anyone may have written: looked at before they are read, told by name.

The library itself checks lengths, offsets and shapes against the size of the file before it
allocates. What is added: names given twice, and an error that says which file it is about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def fault(path: Path) -> str | None:
    """Why the file is not one of tensors, or None; reads its header only."""
    try:
        with safe_open(path, "pt"):  # which has checked the length of the header
            pass
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        json.loads(header, object_pairs_hook=_distinct)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        return f"it is no sound safetensors file ({error})"
    return None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found
