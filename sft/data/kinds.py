"""Recognises files that hold no rows by their first bytes, and says what they are and what to do.

Nothing is unpacked, executed or loaded here: a refused file is looked at, and no more.
"""

from __future__ import annotations

import codecs
import json
import re
import shlex
import zipfile
from collections.abc import Iterable
from itertools import islice
from typing import Any

from sft.data.formats import FORMATS

UNPACK = "unpack it and give the files in it"
SAVE_SHEET = "save the sheet as CSV in UTF-8"
TO_LINES = "write its rows as JSON lines"

# First bytes of binary files -> (what the file is, what to do). PATH stands for its path.
MAGIC: dict[bytes, tuple[str, str]] = {
    b"SQLite format 3\0": (
        "an SQLite database",
        'export a table: sqlite3 -csv -header PATH "select * from TABLE" > rows.csv',
    ),
    b"\xfd7zXZ\0": ("an xz archive", "decompress it (xz -dk PATH), or use gzip or zstd"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!\x1a\x07": ("a RAR archive", UNPACK),
    b"\x04\x22\x4d\x18": ("lz4 data", "decompress it (lz4 -d PATH), or use gzip or zstd"),
    b"\x93NUMPY": ("a NumPy array", TO_LINES),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", f"{TO_LINES} or Parquet"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Microsoft Office document", SAVE_SHEET),
    b"%PDF-": ("a PDF document", "extract its text into .txt"),
}
PICKLE = (
    "a pickle, which is never loaded, because loading runs whatever program it holds",
    "write its rows as JSON lines with the program that made it",
)
INSIDE_ZIP = {  # a name in a zip file -> what the file is
    r"xl/": ("an Excel workbook", SAVE_SHEET),
    r"word/": ("a Word document", "save it as text in UTF-8"),
    r".*\.pkl$": (PICKLE[0].replace("a pickle", "a PyTorch file (a pickle)"), PICKLE[1]),
    r".*\.npy$": ("NumPy arrays", TO_LINES),
    r"content\.xml$": ("an OpenDocument file", SAVE_SHEET),
}
PAGE = re.compile(rb"(?i)\s*<(!doctype html|html|head|body)\b")
POINTER = b"version https://git-lfs.github.com/spec/"


def refused_kind(path: str, head: bytes, suffix: str) -> str | None:
    """Returns what a file without rows is and what to do with it, or None if it may hold rows.

    `head`: its first 4096 bytes, decompressed. `suffix`: the known ending of its name, or "".
    """
    found = _binary_kind(path, head) or _text_kind(head, suffix)
    return f"{found[0]}; {found[1].replace('PATH', path)}" if found else None


def _binary_kind(path: str, head: bytes) -> tuple[str, str] | None:
    for magic, found in MAGIC.items():
        if head.startswith(magic):
            return found
    if head.startswith(b"PK\3\4"):
        return _zip_kind(path)
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
        return "bzip2 data", "decompress it (bzip2 -dk PATH), or use gzip or zstd"
    if head[256:262] == b"\0ustar":
        return "a tar archive", f"{UNPACK} (tar -xf PATH)"
    if re.match(rb"\x80[\x02-\x05][\x95}\]c(K\x8c\x8a]", head):
        return PICKLE
    if name := _wide_encoding(head):
        from_name = name.removesuffix(" text").replace(" without a byte order mark", "")
        return name, f"save it as UTF-8: iconv -f {from_name} -t UTF-8 PATH > rows"
    return None


def _zip_kind(path: str) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        names = []  # broken, or a zip file that is compressed again
    for pattern, found in INSIDE_ZIP.items():
        if any(re.match(pattern, name) for name in names):
            return found
    return "a zip archive", UNPACK


def _wide_encoding(head: bytes) -> str:
    """Returns 'UTF-16LE text without a byte order mark' and the like, or ""."""
    name = json.detect_encoding(head)  # by the mark, or by the NULs of its first character
    if name.startswith("utf-8"):
        return ""
    try:
        codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return ""
    family, *order = re.findall(r"utf-\d+|[bl]e", name)
    unmarked = " without a byte order mark" if order else ""
    return f"{family.upper()}{''.join(order).upper()} text{unmarked}"


def _text_kind(head: bytes, suffix: str) -> tuple[str, str] | None:
    if head.startswith(POINTER):
        return "a pointer of Git LFS in place of the file", "fetch the file (git lfs pull)"
    if suffix == ".txt":  # whatever it looks like, it may be a text to learn
        return None
    if PAGE.match(head.removeprefix(codecs.BOM_UTF8)):
        return "a web page (HTML)", "download the file itself, by its raw link"
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"<?xml"):
        return "an XML file", TO_LINES
    return None


def refused_object(path: str, value: Any) -> str | None:
    """Returns what a file of one JSON object is and what to do, if the rows are inside the object.

    None: the object may be a row.
    """
    if not isinstance(value, dict) or _is_row(value):
        return None
    lists = [key for key, item in value.items() if _holds_rows(item)]
    if lists:
        first = f".[{json.dumps(lists[0])}][]"
        what = f"{len(value[lists[0]])} rows in its key {lists[0]!r}"
        what = what if len(lists) == 1 else f"rows in several keys ({_names(lists)})"
        return f"one object with {what}; {_by_jq(path, first)}"
    values = list(value.values())
    if len(values) > 1 and _holds_rows(values) and len({frozenset(item) for item in values}) == 1:
        return f"one object with a row in each of its {len(values)} keys; {_by_jq(path, '.[]')}"
    lengths = {len(item) if isinstance(item, list) else 0 for item in values}
    if len(values) > 1 and len(lengths) == 1 and lengths != {0}:
        return (
            f"one object of columns ({_names(value)}); write one row on a line, in pandas: "
            "frame.to_json('rows.jsonl', orient='records', lines=True)"
        )
    return None


def multiline_object(path: str, start: bytes, is_whole: bool) -> str | None:
    """Returns what a file is whose JSON objects take several lines each, and what to do, or None.

    `start`: its content, or with `is_whole` False the beginning of it. Its first line is not valid
    JSON by itself.
    """
    text = start.decode("utf-8-sig", "replace").strip()
    try:
        value, end = json.JSONDecoder(parse_int=len).raw_decode(text)
    except RecursionError:
        return None
    except json.JSONDecodeError as error:
        is_late = error.pos > len(text) // 2 or "Unterminated" in error.msg
        if is_whole or not is_late:  # else it is where the beginning ends
            return None
        return f"JSON objects over several lines each; {_by_jq(path, '.')}"
    num_lines = text.count("\n", 0, end) + 1
    if not isinstance(value, dict) or num_lines == 1:
        return None
    if len(text) > end or not is_whole:
        return f"JSON objects over several lines each; {_by_jq(path, '.')}"
    return refused_object(path, value) or (
        f"one JSON object over {num_lines} lines; {_by_jq(path, '.')}"
    )


def _is_row(value: dict[str, Any]) -> bool:
    return any(known.fits(value) for known in FORMATS)


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(i, dict) for i in value)


def _names(keys: Iterable[str]) -> str:
    return ", ".join(repr(key)[:40] for key in islice(keys, 5))


def _by_jq(path: str, query: str) -> str:
    words = shlex.join(["jq", "-c", query, path])
    return f"write each row on a line of its own: {words} > rows.jsonl"
