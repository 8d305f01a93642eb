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
from functools import partial
from pathlib import Path
from typing import IO, Any

from sft.errors import CheckpointError

LIMIT = 16 * 2**20  # bytes of a JSON file of a run


def opener(path: str, flags: int, *, follow: bool = False) -> int:
    """Opens a file, as `opener` of `open`. Raises OSError if a folder, pipe or device is in its
    place, or a link unless it may `follow` one."""
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags, 0o666)
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


def read_bytes(path: Path, limit: int = LIMIT, *, follow: bool = False) -> bytes:
    """Returns the contents of a plain file. Raises OSError, also if it has more than `limit`.

    Only with `follow` a link to one is read, as in a folder that a hub's library has made.
    """
    with open(path, "rb", opener=partial(opener, follow=follow)) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return data


def load_json(path: Path, *, follow: bool = False) -> Any:
    """Returns what a JSON file holds. Raises OSError, or ValueError if it is no JSON."""
    try:
        return json.loads(read_bytes(path, follow=follow).decode("utf-8"))
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


def find_special(folder: Path) -> Path | None:
    """Returns a pipe, socket or device in a folder, or a link to one, whose reader would wait or
    never end; None if there is none."""
    for path in sorted(folder.glob("*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            return path
    return None


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
