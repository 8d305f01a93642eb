"""Opens the files of a run: plain files only, and never through a link.

A run folder may come from a stranger. A link in it could make a run overwrite another file of its
user, and a pipe or a device in the place of a file could block it or fill its memory. Another name
of a file (a hard link) may be a stranger's trap or a backup made with `cp -al`. So a file that has
other names is replaced by a copy before it is changed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from sft.errors import CheckpointError

LIMIT = 16 * 2**20  # bytes of a JSON file of a run
TEMPORARY = ".{}.{}"  # the name of a file, and the process that writes it


def opener(path: str, flags: int, *, follow: bool = False, detach: bool = True) -> int:
    """Opens a file, as `opener` of `open`. Raises OSError if a folder, pipe or device is in its
    place, or a link unless it may `follow` one.

    A file that is opened to be changed loses its other names, unless `detach` is False.
    """
    descriptor = _open_plain(path, flags & ~os.O_TRUNC, follow)
    is_changed = detach and flags & (os.O_WRONLY | os.O_RDWR)
    if is_changed and os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        _replace_by_copy(Path(path))
        descriptor = _open_plain(path, flags & ~os.O_TRUNC, follow)
    if flags & os.O_TRUNC:
        os.ftruncate(descriptor, 0)
    return descriptor


def _open_plain(path: str, flags: int, follow: bool) -> int:
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


def _replace_by_copy(path: Path) -> None:
    """Puts a copy in the place of a file; its other names keep the file."""
    path = path.resolve()
    part = path.with_name(TEMPORARY.format(path.name, os.getpid()))
    part.unlink(missing_ok=True)
    try:
        shutil.copy(path, part, follow_symlinks=False)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def open_file(
    path: Path, mode: str, *, follow: bool = False, detach: bool = True, **options: Any
) -> IO[Any]:
    """Opens a plain file as `open` does. Raises OSError for anything else in its place."""
    return open(path, mode, opener=partial(opener, follow=follow, detach=detach), **options)


def open_to_append(path: Path) -> IO[bytes]:
    """Opens a file to which several processes append, and waits until this one has its lock."""
    while True:
        file = open_file(path, "ab+", follow=True, detach=False, buffering=0)
        with suppress(OSError):  # a file system without locks: single appends stay whole
            fcntl.flock(file, fcntl.LOCK_EX)
        found = os.fstat(file.fileno())
        if os.path.samestat(found, path.stat()):
            if found.st_nlink == 1:
                return file
            _replace_by_copy(path)
        file.close()


def read_bytes(path: Path, limit: int = LIMIT, *, follow: bool = False) -> bytes:
    """Returns the contents of a plain file. Raises OSError, also if it has more than `limit`.

    Only with `follow` a link to one is read, as in a folder that a hub's library has made.
    """
    with open_file(path, "rb", follow=follow) as file:
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
