"""Opens the files of a run: plain files only, and never through a link.

A run folder may come from a stranger. A link in it could make a run overwrite another file of its
user, and a pipe or a device in the place of a file could block it or fill its memory.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from sft.errors import CheckpointError

LIMIT = 16 * 2**20  # bytes of a JSON file of a run


def opener(path: str, flags: int) -> int:
    """Opens a file, as `opener` of `open`. Raises OSError if a link, folder, pipe or device is in
    its place."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "it is a link", path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a plain file", path)
    return descriptor


def open_file(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Opens a plain file as `open` does. Raises OSError for anything else in its place."""
    return open(path, mode, opener=opener, **options)


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """Returns the contents of a plain file. Raises OSError, also if it has more than `limit`."""
    with open_file(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return data


def load_json(path: Path) -> Any:
    """Returns what a JSON file holds. Raises OSError, or ValueError if it is no JSON."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; {} if the file is missing, damaged or not plain."""
    try:
        found = load_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def cut(path: Path, length: int) -> None:
    """Shortens a plain file to so many bytes, which needs no space on the disk."""
    with open_file(path, "r+b") as file:
        file.truncate(length)


def write_text(path: Path, text: str) -> None:
    with open_file(path, "w", encoding="utf-8") as file:
        file.write(text)


def refuse_others(files: Iterable[Path], folders: Iterable[Path]) -> None:
    """Raises CheckpointError if any of these exists and is no plain file, or no folder."""
    wrong = [f"{path} is {_kind(path)}, not a plain file" for path in files if _is_other(path)]
    others = [path for path in folders if _is_other(path, stat.S_IFDIR)]
    wrong += [f"{path} is {_kind(path)}, not a folder" for path in others]
    if wrong:
        raise CheckpointError("\n  ".join(["remove these from the run folder:", *wrong]))


def _is_other(path: Path, kind: int = stat.S_IFREG) -> bool:
    try:
        return stat.S_IFMT(path.lstat().st_mode) != kind
    except OSError:
        return False


def _kind(path: Path) -> str:
    names = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    names |= {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(path.lstat().st_mode), "a device")
