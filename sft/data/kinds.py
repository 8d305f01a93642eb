"""Recognises files that hold no rows by their first bytes, and says what they are and what to do.

Nothing is unpacked, executed or loaded here: a refused file is looked at, and no more.
"""

from __future__ import annotations

import codecs
import json
import re
import shlex
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from sft.data.formats import FORMATS

UNPACK = "unpack it and give the files in it"
SAVE_SHEET = "save the sheet as CSV in UTF-8"
TO_LINES = "write its rows as JSON lines"
TO_TABLE = f"{TO_LINES} or Parquet"
ONLY_TEXT = "only text can be trained on"

# First bytes of binary files -> (what the file is, what to do). PATH stands for its path.
MAGIC: dict[bytes, tuple[str, str]] = {
    b"SQLite format 3\0": (
        "an SQLite database",
        'export a table: sqlite3 -csv -header PATH "select * from TABLE" > rows.csv',
    ),
    b"\xfd7zXZ\0": ("an xz archive", "decompress it (xz -dk PATH), or use gzip or zstd"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!\x1a\x07": ("a RAR archive", UNPACK),
    b"PK\5\6": ("an empty zip archive", "give the files themselves"),
    b"\x1f\x8b": ("data that gzip compressed twice", "decompress it once (gzip -dk PATH)"),
    b"\x28\xb5\x2f\xfd": ("data that zstd compressed twice", "decompress it once (zstd -dk PATH)"),
    b"\x1f\x9d": ("data of compress (.Z)", "decompress it, or use gzip or zstd"),
    b"\x5d\0\0": ("LZMA data", "decompress it (xz -dk --format=lzma PATH), or use gzip or zstd"),
    b"\x04\x22\x4d\x18": ("lz4 data", "decompress it (lz4 -d PATH), or use gzip or zstd"),
    b"\x93NUMPY": ("a NumPy array", TO_LINES),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", TO_TABLE),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": (
        "an old Microsoft Office document",
        f"{SAVE_SHEET}, or the document as text in UTF-8",
    ),
    b"{\\rtf": ("a document (RTF)", "save it as text in UTF-8"),
    b"ORC": ("an ORC table", TO_TABLE),
    b"Obj\1": ("an Avro file", TO_TABLE),
    b"FEA1": ("a table of Feather's first version", TO_TABLE),
    b"\x89PNG": ("an image", ONLY_TEXT),
    b"\xff\xd8\xff": ("an image", ONLY_TEXT),
    b"RIFF": ("sound or video", ONLY_TEXT),
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
    return f"{found[0]}; {found[1].replace('PATH', shlex.quote(path))}" if found else None


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
    if head and not head.strip(b"\0"):
        return "NUL bytes alone, so its content was never written", "copy or make it again"
    if name := _wide_encoding(head):
        unmarked = " without a byte order mark" * name.endswith("E")
        return f"{name} text{unmarked}", f"save it as UTF-8: iconv -f {name} -t UTF-8 PATH > rows"
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
    """Returns 'UTF-16', 'UTF-16LE' (without a byte order mark) and the like, or "".

    Text in such an encoding has NUL bytes, as its line ends and blanks have. Without a mark it must
    be text in it and no UTF-8, or have many of them.
    """
    names = [json.detect_encoding(head)]  # by the mark, or by the NULs of its first character
    if not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        names += ["utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"]
        if b"\0" not in head or (_decodes(head, "utf-8") and 4 * head.count(0) < len(head)):
            return ""
    found = next((name for name in names if "8" not in name and _decodes(head, name)), "")
    return re.sub(r"-(?=[BL]E)", "", found.upper())


def _decodes(head: bytes, name: str) -> bool:
    """Returns whether the beginning of a file is text in an encoding, without control characters.

    NUL may stand in UTF-8, where it is an error of its row.
    """
    try:
        text = codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return False
    text = re.sub(r"[\n\r\t\f\0]" if name == "utf-8" else r"[\n\r\t\f]", "", text)
    return not any(unicodedata.category(char) in ("Cc", "Cn", "Co") for char in text)


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
    if not isinstance(value, dict):
        return None
    values = list(value.values())
    cells = [_cells(item) for item in values]
    lengths = {len(column) for column in cells}
    if len(values) > 1 and len(lengths) == 1 and lengths != {0}:
        are_rows = not all(isinstance(cell, str) for column in cells for cell in column)
        if not (are_rows and _is_row(value)) and not _holds_rows(cells[0]):
            return (
                f"one object of columns ({_names(value)}); write one row on a line, in pandas: "
                "frame.to_json('rows.jsonl', orient='records', lines=True)"
            )
    if _is_row(value):
        return None
    lists = list(_lists_of_rows(value))
    if lists:
        (keys, rows), *others = lists
        what = f"{len(rows)} rows in its key {'.'.join(keys)!r}"
        what = f"rows in several keys ({_names('.'.join(k) for k, _ in lists)})" if others else what
        query = "".join(f"[{json.dumps(key)}]" for key in keys)
        return f"one object with {what}; {_by_jq(path, f'.{query}[]')}"
    if _holds_rows(values) and (
        any(map(_is_row, values)) or len(values) > 1 == len({frozenset(item) for item in values})
    ):
        return f"one object with a row in each of its {len(values)} keys; {_by_jq(path, '.[]')}"
    return None


def _cells(value: Any) -> list[Any]:
    """Returns the cells of a column, which pandas also writes as {"0": ..., "1": ...}."""
    if isinstance(value, dict) and all(map(str.isdecimal, value)):
        return list(value.values())
    return value if isinstance(value, list) else []


def _lists_of_rows(value: dict[str, Any], depth: int = 3) -> Iterator[tuple[list[str], list[Any]]]:
    """Yields (its keys, the list) of each list of objects in an object."""
    for key, item in value.items():
        if _holds_rows(item):
            yield [key], item
        elif isinstance(item, dict) and depth > 1:
            yield from (([key, *keys], rows) for keys, rows in _lists_of_rows(item, depth - 1))


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
    num_lines, rest = text.count("\n", 0, end) + 1, text[end:].lstrip(" \t\r")
    if not isinstance(value, dict):
        return None
    if re.match(r",\s*(\{|$)", rest):
        remove = shlex.join(["sed", "s/,[[:space:]]*$//", path])
        return f"commas between the rows; remove them: {remove} > rows.jsonl"
    if num_lines == 1 and re.match(r'\{\s*"', rest):
        return f"several JSON objects on a line; {_by_jq(path, '.')}"
    if num_lines == 1:
        return None
    if len(text) > end or not is_whole:
        return f"JSON objects over several lines each; {_by_jq(path, '.')}"
    return refused_object(path, value) or (
        f"one JSON object over {num_lines} lines; {_by_jq(path, '.')}"
    )


def lists_on_lines(path: str, more: str) -> str | None:
    """Returns what a file is that goes on with another list behind its first, or None."""
    more = more.lstrip()
    if not more.startswith("["):
        return None
    is_turn = re.match(r'\[\s*\{\s*"(role|content|from|value)"', more)
    return f"a list on each line; {_by_jq(path, '{messages: .}' if is_turn else '.[]')}"


def _is_row(value: dict[str, Any]) -> bool:
    return any(known.fits(value) for known in FORMATS)


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(i, dict) for i in value)


def _names(keys: Iterable[str]) -> str:
    return ", ".join(repr(key)[:40] for key in islice(keys, 5))


def _by_jq(path: str, query: str) -> str:
    words = shlex.join(["jq", "-c", query, path])
    return f"write each row on a line of its own: {words} > rows.jsonl"
