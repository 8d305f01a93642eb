"""Files -> rows of messages, and what a bad row gets.

A row is never dropped and never repaired: all bad rows of a file are collected and told in one
`DataError` as `file:line: reason`. Formats are recognised by their keys, a JSON list by its first
character; every row ends up as the messages that the chat template will render (`sft/chat.py`).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sft.config import UserError

Messages = list[dict[str, str]]  # each with exactly the keys "role" and "content"

ROLES = ("system", "user", "assistant")
FORMATS: tuple[
    tuple[str, ...], ...
] = (  # the keys that tell a row's format; "instruction" may have an "input" too
    ("messages",),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
)


class DataError(UserError):
    """The data cannot be trained on as it is; the message says which rows, why, and what to do."""

    exit_code = 3

    @classmethod
    def of_rows(cls, path: str, problems: list[str]) -> DataError:
        """One error for all bad rows of a file, the first ten listed (`file:line: reason`)."""
        num = f"{len(problems)} bad row{'s' if len(problems) > 1 else ''}"
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        listed = "\n  ".join(problems[:10] + more)
        return cls(f"{path}: {num}; correct or remove them, none is skipped\n  {listed}")


@dataclass(frozen=True, slots=True)
class Row:
    messages: Messages
    file: str
    line: int  # of a JSONL file, from 1; index + 1 in a JSON list


def load_rows(path: str, max_rows: int | None = None) -> list[Row]:
    """The first `max_rows` rows of a JSONL file or a JSON list (all if None).

    Raises DataError with every bad row among them, or if there is no file or no row in it.
    """
    rows, problems = [], []
    for line, source in islice(_sources(path), max_rows):
        try:
            rows.append(Row(_messages(_parse(source)), path, line))
        except (ValueError, RecursionError) as error:
            problems.append(f'{path}:{line}: {_reason(error)}: "{_excerpt(source)}"')
    if problems:
        raise DataError.of_rows(path, problems)
    if not rows:
        raise DataError(f"{path}: expected rows (JSONL or a JSON list), found none in the file")
    return rows


def split(rows: list[Row], eval_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, eval), in file order. Which rows are held out is a function of content and seed.

    Rows with identical messages stay together, so no held-out row was trained on; the held-out part
    can therefore be somewhat smaller than asked for.
    """
    if not eval_fraction:
        return rows, []
    groups: dict[bytes, set[int]] = defaultdict(set)
    for index, row in enumerate(rows):
        groups[_content(row)].add(index)
    if len(groups) < 2:
        raise DataError(
            f"holding out data.eval_fraction={eval_fraction:g} needs two different rows, found "
            f"{len(groups)}; give data.eval_path, or set eval_fraction to 0"
        )
    drawn = sorted(groups, key=lambda text: hashlib.sha256(b"%d:" % seed + text).digest())
    wanted = min(round(eval_fraction * len(rows)), len(rows) - 1)
    held: set[int] = set()
    for key in drawn:
        if len(held) + len(groups[key]) <= wanted:
            held |= groups[key]
    held = held or min(groups.values(), key=len)
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [rows[index] for index in sorted(held)]


def digest(rows: list[Row]) -> str:
    """sha256 of the messages in their order; where they were read from does not matter."""
    return hashlib.sha256(b"\n".join(map(_content, rows))).hexdigest()


def _content(row: Row) -> bytes:
    return json.dumps(row.messages).encode()


# --- reading -----------------------------------------------------------------------------------


def _sources(path: str) -> Iterator[tuple[int, bytes]]:
    """(line, text) of every row of a JSONL file; (index + 1, text) of every item of a list."""
    try:
        with Path(path).open("rb") as file:
            is_list = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            file.seek(0)
            if is_list:
                yield from _items(path, file.read())
                return
            for number, line in enumerate(file, 1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text := text.strip():
                    yield number, text
    except OSError as error:
        raise DataError(
            f"{path}: expected a JSONL file or a JSON list of rows, found: {error.strerror} "
            f"(relative paths start at {Path.cwd()}); correct the path in the section data"
        ) from None


def _items(path: str, source: bytes) -> Iterator[tuple[int, bytes]]:
    """The text of every item of a list, so that a bad one is told like a bad line is."""
    try:
        text = source.decode("utf-8-sig")
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the list cannot be read: {_reason(error)}") from None
    between, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    index, at = 0, text.index("[") + 1
    while (found := between.match(text, at)) and text[at := found.end()] != "]":
        index, start = index + 1, at
        at = decoder.raw_decode(text, start)[1]
        yield index, text[start:at].encode()


def _parse(source: bytes) -> Any:
    """JSON without what Python's reader lets pass: repeated keys, NaN and Infinity."""
    return json.loads(
        source.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} is given twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"not valid JSON ({error.msg}, {line}column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _excerpt(source: bytes, num: int = 60) -> str:
    text = source.decode("utf-8", "backslashreplace").strip()
    cut = text[:num] + ("..." if len(text) > num else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


# --- judging -----------------------------------------------------------------------------------


def _messages(row: Any) -> Messages:
    """The messages of a row in any known format; ValueError with the reason if it is a bad one."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    formats = [keys for keys in FORMATS if row.keys() >= set(keys)]
    if len(formats) != 1:
        known = ", ".join("/".join(keys) for keys in FORMATS)
        raise ValueError(f"expected the keys of one format ({known}), found {sorted(row)}")
    if row.get("tools"):
        raise ValueError("tools are not supported, and would not be rendered")
    if formats == [("messages",)]:
        return _conversation(row["messages"])
    ask, answer = formats[0]
    question = _text(row[ask], ask)
    if ask == "instruction" and row.get("input", "") != "":
        question += "\n\n" + _text(row["input"], "input")
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row[answer], answer)},
    ]


def _conversation(messages: Any) -> Messages:
    if not isinstance(messages, list):
        raise ValueError(f"messages: expected a list, found {type(messages).__name__}")
    result = [_message(message, f"message {n}") for n, message in enumerate(messages, 1)]
    roles = [message["role"] for message in result]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so nothing to learn")
    if roles[-1] != "assistant":
        raise ValueError(f"the last turn is the {roles[-1]}'s, expected the assistant's")
    return result


def _message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{name}: expected an object, found {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{name}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
    if ignored := sorted(message.keys() - {"role", "content"}):
        raise ValueError(f"{name}: would not be rendered: {', '.join(ignored)}")
    return {"role": role, "content": _text(message.get("content"), f"{name}: content")}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, found {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name} is {'blank' if value else 'empty'}")
    if "\0" in value:
        raise ValueError(f"{name} contains a NUL character")
    if lone := re.search(r"[\ud800-\udfff]", value):
        raise ValueError(f"{name} contains a lone surrogate (U+{ord(lone[0]):X})")
    return value
