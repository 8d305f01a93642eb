"""Finds files, reads their rows, and normalises them.

Every row of every file becomes a `Row` of messages (`data/formats`), or a `BadRow` with its place,
the reason and an excerpt. No row is dropped silently, and none is repaired.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from sft.config.schema import Data
from sft.data import formats, readers, remote
from sft.data.formats import TEXT, Messages, Tools
from sft.data.messages import error_reason, scalar_text
from sft.data.split import HELD_OUT
from sft.data.tokenised import is_tokenised
from sft.errors import DataError, redact, suggest
from sft.runtime.console import atomic_write

DIGEST = np.dtype("V16")  # of `content_digest`
Paths = str | list[str]  # what data.train_path is
CACHE_DIR: str = Data.model_fields["cache_dir"].default
# Endings of files that may hold rows and are not read, so that a folder of them is ambiguous.
OTHER_KINDS = re.compile(
    r"(?i)\.(zip|tar|tgz|tar\.gz|7z|rar|xlsx?|ods|np[yz]|h5|hdf5|db|sqlite3?|orc|avro|tfrecord)$"
)
UNFINISHED = re.compile(r"(?i)(~|\.(tmp|temp|bak|orig|part|partial|crdownload|download))$")
MAC = "__MACOSX"  # folder of an archive that macOS made, with a `._name` for each file


@dataclass(frozen=True, slots=True)
class Row:
    """A good row: the messages and tools that the chat template renders, and their place."""

    messages: Messages
    tools: Tools | None
    file: str
    line: int  # where the row begins, from 1; index + 1 in a list or a table
    entry: int = 0  # index of its path in a list of paths
    format: str = ""
    group: str | None = None  # its value in the column `evaluation.group`; None: has none
    template_kwargs: dict[str, Any] | None = None  # its variables for the chat template
    ignored: tuple[str, ...] = ()  # its columns that are not used; not stored

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be trained on, with the reason."""

    file: str
    line: int
    reason: str
    excerpt: str

    def __str__(self) -> str:
        return f'{self.file}:{self.line}: {self.reason}: "{self.excerpt}"'


class Source(NamedTuple):
    """A file, or a dataset of the hub, and which of the given paths named it."""

    file: str  # for messages: its path, hub id, or address without credentials
    entry: int = 0
    on_hub: bool = False
    copy: str = ""  # local copy of a remote file
    digest: str = ""  # sha256 of the copy

    @property
    def path(self) -> str:
        """Returns where its bytes are on this machine."""
        return self.copy or self.file


class Listing(NamedTuple):
    """What a path, or a list of paths, names."""

    sources: list[Source]
    hidden: list[str]  # data files that are not read: hidden ones, unfinished ones, backups


def sources(path: Paths, cache_dir: str = CACHE_DIR) -> list[Source]:
    """Returns the files that a path, or each of a list, names (`list_files`)."""
    return list_files(path, cache_dir).sources


def list_files(
    path: Paths, cache_dir: str = CACHE_DIR, tick: Callable[[], None] = lambda: None
) -> Listing:
    """Returns the files that a path, or each of a list, names, and hidden ones that are not read.

    A path is a file, a folder, a glob, a hub id, or an address, whose files are fetched into
    `cache_dir` first; `tick` is called whenever they make progress. Raises DataError for a path
    that names no file.
    """
    found = Listing([], [])
    for entry, text in enumerate([path] if isinstance(path, str) else path):
        if remote.is_remote(text):
            listed = _list_remote(text, entry, cache_dir, tick)
        else:
            try:
                listed = _list(re.sub(r"^file://(localhost(?=/))?", "", text), entry)
            except (OSError, RuntimeError) as error:  # too long a name, no home ...
                reason = getattr(error, "strerror", None) or str(error)
                raise readers.unreadable(readers.one_line(text, 80), reason) from None
        found.sources.extend(listed.sources)
        found.hidden.extend(listed.hidden)
    for source in found.sources:
        if source.file.encode(errors="replace").decode() != source.file:
            raise readers.unreadable(repr(source.file), "a name that is not UTF-8; rename the file")
    return found


# By address and cache, so that a process asks the server once.
_fetched: dict[tuple[str, str], Listing] = {}


def _list_remote(text: str, entry: int, cache_dir: str, tick: Callable[[], None]) -> Listing:
    """Returns the files of an address as local copies, fetched unless they are current."""
    key = (text, str(Path(cache_dir).resolve()))
    known = _fetched.get(key)
    if known is None or not all(Path(source.copy).exists() for source in known.sources):
        shown, found, is_folder = remote.find(text)
        names, hidden = list(found), [name for name in found if is_hidden(name)]
        if is_folder:
            inner = {name.removeprefix(f"{shown.rstrip('/')}/"): name for name in found}
            names, hidden = ([inner[n] for n in part] for part in choose_files(shown, inner))
        elif not is_hidden(shown):  # a pattern names hidden files by their dot alone
            names = [name for name in names if name not in hidden]
        copies = [remote.fetch(found[name], name, cache_dir, tick) for name in names]
        listed = [Source(copy.name, 0, False, copy.path, copy.sha256) for copy in copies]
        known = _fetched[key] = Listing(listed, hidden if len(found) > 1 else [])
    return Listing([source._replace(entry=entry) for source in known.sources], known.hidden)


def _list(text: str, entry: int) -> Listing:
    path = Path(text).expanduser()
    text = str(path) if text.startswith("~") else text
    if path.is_dir() and text:
        files, hidden = _files_in(path)
        return Listing([Source(str(file), entry) for file in files], hidden)
    if path.exists() and text:
        if not path.is_file():  # a pipe, whose rows could be read only once
            raise readers.unreadable(text, "no regular file")
        return Listing([Source(text, entry)], [])
    if glob.has_magic(text):
        names, hidden = _files_of_glob(text)
        if not names:
            raise readers.unreadable(text, "no file that fits the pattern")
        return Listing([Source(name, entry) for name in names], hidden)
    if readers.HUB.fullmatch(text) and not readers.data_suffix(path):
        return Listing([Source(text, entry, on_hub=True)], [])
    raise readers.unreadable(text, "No such file or directory")


def is_hidden(name: str) -> bool:
    """Returns whether a part of a relative path begins with a dot, or is what macOS adds."""
    return any((p.startswith(".") and p not in (".", "..")) or p == MAC for p in name.split("/"))


def _files_of_glob(text: str) -> tuple[list[str], list[str]]:
    """Returns the files that a pattern matches, and the hidden ones that it leaves out."""
    fitting = set(glob.glob(text, recursive=True))
    if MAC not in text.split("/"):
        fitting = {name for name in fitting if MAC not in name.split("/")}
    with_hidden = set(glob.glob(text, recursive=True, include_hidden=True)) - fitting
    names = sorted(name for name in fitting if Path(name).is_file())
    return names, sorted(name for name in with_hidden if Path(name).is_file())


def _files_in(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the data files of a folder, and its hidden ones, which are not read.

    The files of `datasets.save_to_disk` come in their own order.
    """
    if (splits := folder / "dataset_dict.json").is_file():
        names = _read_list(splits, "splits")
        if len(names) != 1:
            raise _ambiguous(str(folder), names)
        return _files_in(folder / names[0])
    if (state := folder / "state.json").is_file():
        return [folder / name for name in _read_list(state, "_data_files")], []
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    chosen, hidden = choose_files(str(folder), names)
    return [folder / name for name in chosen], [str(folder / name) for name in hidden]


def choose_files(folder: str, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the data files among the names of the files in a folder, and the hidden ones.

    Raises DataError if there are none, or those of several kinds or splits.
    """
    suffixes = {
        name: readers.data_suffix(Path(UNFINISHED.sub("", name)), any_packing=True)
        for name in sorted(names)
    }
    data = [name for name, suffix in suffixes.items() if suffix]
    hidden = [name for name in data if is_hidden(name) or UNFINISHED.search(name)]
    about = ("dataset_info.json", "dataset_infos.json")
    shown = [name for name in data if name not in hidden and Path(name).name not in about]
    if not shown:
        others = [name for name in suffixes if not is_hidden(name)]
        has = f"only {', '.join(others[:3])}{' ...' * (len(others) > 3)}" if others else "nothing"
        has = f"only {describe_hidden(hidden)}" if hidden and not others else has
        reason = f"a folder without a file that ends in one of these, {readers.one_line(has, 200)}"
        raise readers.unreadable(folder, reason)
    kinds = {suffixes[name] for name in shown}
    kinds |= {m[0] for n in suffixes if (m := OTHER_KINDS.search(n)) and not is_hidden(n)}
    if len(found := sorted(kinds)) > 1:
        raise _ambiguous(folder, found)
    held_out = [name for name in shown if HELD_OUT.search(name)]
    if 0 < len(held_out) < len(shown):
        raise _ambiguous(folder, [next(n for n in shown if n not in held_out), held_out[0]])
    return shown, hidden


def _read_list(file: Path, key: str) -> list[str]:
    """Returns the names of files or folders beside `file` that it lists."""
    try:
        items = json.loads(file.read_text("utf-8"))[key]
        return [Path(item["filename"] if isinstance(item, dict) else item).name for item in items]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file}: expected {key} of a saved dataset; save it again") from None


def _ambiguous(folder: str, found: Iterable[str]) -> DataError:
    return DataError(
        f"{folder}: expected files of one kind and one split, found {', '.join(found)}; give the "
        "one to use as a folder or a glob, such as folder/train*.parquet"
    )


def read(
    source: Source,
    *,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    system: Literal["keep", "replace", "prepend"] = "keep",
    system_prompt: str | None = None,
    csv_delimiter: str = "auto",
    group: str | None = None,
    ignore_columns: list[str] | None = None,
    to_answer: bool = False,
) -> Iterator[Row | BadRow]:
    """Yields every row of a file in its order, good or bad. Raises DataError if reading fails.

    `group`: a column whose value is kept with each row, as text (`evaluation.group`).
    `to_answer`: rows are prompts to be answered, so they need no answer (`read_question`).
    """
    is_empty, ignore = True, ignore_columns or ()
    used = () if group is None else (group.partition(".")[0], group)
    raw_rows = _raw_rows(source, format, is_mapped=bool(columns), delimiter=csv_delimiter)
    for line, value, shown in raw_rows:
        is_empty = False
        try:
            if isinstance(value, Exception):
                raise value
            found = (
                formats.read_question(value)
                if to_answer
                else formats.normalise(value, format, columns, ignore, used)
            )
            made = found._asdict()
            made["messages"] = formats.set_system_prompt(found.messages, system, system_prompt)
            own = None if group is None else scalar_text(_value_in(value, group))
            yield Row(**made, file=source.file, line=line, entry=source.entry, group=own)
        except (ValueError, RecursionError) as error:
            reason = readers.one_line(error_reason(error), 400)
            yield BadRow(source.file, line, reason, readers.make_excerpt(shown))
    if is_empty:
        raise DataError(f"{source.file}: expected rows (docs/DATA.md), found none in the file")


def _raw_rows(source: Source, format: str, **options: Any) -> Iterator[readers.RawRow]:
    if source.on_hub:
        yield from readers.read_hub(source.file)
        return
    try:
        yield from readers.read_file(source.path, format, **options)
    except DataError as error:  # a message about a copy names what it is a copy of
        raise DataError(str(error).replace(source.path, source.file)) from None


def read_all(path: Paths, cache_dir: str = CACHE_DIR, **options: Any) -> Iterator[Row | BadRow]:
    """Yields every row of every file; takes the options of `read`."""
    return (row for source in sources(path, cache_dir) for row in read(source, **options))


def read_raw(
    path: Paths, cache_dir: str = CACHE_DIR, csv_delimiter: str = "auto"
) -> Iterator[tuple[str, Any]]:
    """Yields (file:line, the row as it stands in its file, or an error) of every row of a path."""
    for source in sources(path, cache_dir):
        for line, value, _ in _raw_rows(source, "auto", is_mapped=True, delimiter=csv_delimiter):
            yield f"{source.file}:{line}", value


def select_rows(section: Data, place: str | None) -> Iterator[Row | BadRow]:
    """Yields the rows of a configuration at `place`: a line of any file, or file:line.

    A row of several lines is found by each of them, and the first row also by the lines before it,
    such as the header of a CSV. Without a place, yields the first training row.
    """
    options = read_options(section)
    cache_dir = options.pop("cache_dir")
    if place is None:
        yield from islice(read_all(section.train_path, cache_dir, **options), 1)
        return
    name, _, digits = f":{place}".rpartition(":")
    if not digits.isdecimal():
        return
    for path in row_paths(section):
        is_replayed = path == section.replay.path
        for source in sources(path, cache_dir):
            if f":{source.file}".endswith(name):
                own = {} if is_replayed else options
                yield from _rows_at(source, int(digits), own)


def _rows_at(source: Source, line: int, options: dict[str, Any]) -> Iterator[Row | BadRow]:
    """Yields the row of a file to which a line belongs, if there is one."""
    before: Row | BadRow | None = None
    is_long = not source.on_hub and readers.has_long_rows(source.path)
    for row in read(source, **options):
        if row.line == line or (row.line > line and before is None):
            before = row
        if row.line >= line:
            break
        before = row
    else:
        is_long = is_long and line <= readers.num_lines(source.path)
    if before and (is_long or before.line >= line):
        yield before


def check_column(path: Paths, column: str, key: str, **options: str) -> None:
    """Raises DataError if no row of the files has the column, which `key` of a configuration names.

    The first row that has it ends the search. Takes the options of `read_raw`.
    """
    known = set[str]()
    for _, row in read_raw(path, **options):
        if _value_in(row, column) is not None:
            return
        known |= row.keys() if isinstance(row, dict) else set()
    raise missing_column(path, column, key, known)


def check_columns(settings: Data) -> None:
    """Raises DataError for a column that data.columns names for an optional key, and no row has."""
    options = {"cache_dir": settings.cache_dir, "csv_delimiter": settings.csv_delimiter}
    for field, column in (settings.columns or {}).items():
        if field in formats.OPTIONAL:
            check_column(settings.train_path, column, f"data.columns.{field}", **options)


def missing_column(path: Paths, column: str, key: str, known: Iterable[str]) -> DataError:
    """Returns the error for a column that no row has; `known`: the columns that rows have."""
    shown = redact(path if isinstance(path, str) else ", ".join(path))
    hint = suggest(column, sorted(known))
    return DataError(f"{shown}: no column {column!r}, which {key} names; {hint}")


def _value_in(row: Any, column: str) -> Any:
    try:
        return formats.get_column(row, column) if isinstance(row, dict) else None
    except ValueError:
        return None


def file_digests(path: Paths, cache_dir: str = CACHE_DIR) -> list[dict[str, str | int]]:
    """Returns entry, name and sha256 (of the hub: fingerprint) of every file of a path."""
    found: list[dict[str, str | int]] = []
    for source in sources(path, cache_dir):
        digest = source.digest  # of a copy that was verified when it was fetched or found
        if source.on_hub:
            digest = str(readers.load_from_hub(source.file)._fingerprint)
        elif not digest:
            try:
                with Path(source.path).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise readers.unreadable(source.file, error.strerror or str(error)) from None
        found.append({"entry": source.entry, "name": source.file, "digest": digest})
    return found


def read_options(section: Data) -> dict[str, Any]:
    """Returns the options of `read_all` that a configuration sets."""
    names = {*signature(read).parameters, *signature(read_all).parameters}
    return section.model_dump(include=names)


def content_digest(row: Row) -> bytes:
    """Hashes what a row says: messages, tools and variables of the template, but not its place.

    A content given as parts is the same as their text.
    """
    messages = [{**m, "content": formats.content_text(m)} for m in row.messages]
    content = json.dumps(messages) + (json.dumps(row.tools) if row.tools else "")
    content += json.dumps(row.template_kwargs, sort_keys=True) if row.template_kwargs else ""
    return hashlib.sha256(content.encode()).digest()[:16]


def num_rows(path: Paths, cache_dir: str = CACHE_DIR) -> int | None:
    """Returns about how many rows there are, by their lines, or None if that is not known."""
    found = sources(path, cache_dir)
    numbers = [None if each.on_hub else readers.estimate_rows(each.path) for each in found]
    return None if None in numbers else sum(filter(None, numbers))


def process(settings: Data, output: Path) -> list[tuple[str, str]]:
    """Writes normalised training rows as JSONL, streamed, and rejected ones into a file beside it.

    Returns (name, number) pairs to report. Raises DataError with every bad row, unless
    `data.on_bad_row` is skip, or if no row is left; then `output` is not made.
    """
    hidden = list_files(settings.train_path, settings.cache_dir).hidden  # or reports no file
    check_columns(settings)
    output.parent.mkdir(parents=True, exist_ok=True)
    written, seen, repeated = Counter[str](), set[bytes](), 0
    bad: list[BadRow] = []
    rows = islice(read_all(settings.train_path, **read_options(settings)), settings.max_rows)
    with atomic_write(output) as file:
        for row in rows:
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            key = content_digest(row)
            repeated += key in seen
            if key in seen and settings.duplicates == "drop":
                continue
            seen.add(key)
            written[row.format] += 1
            file.write(json.dumps(_as_raw(row), ensure_ascii=False) + "\n")
        if (bad and settings.on_bad_row == "error") or not written:
            raise DataError.from_rows(bad[0].file, [str(row) for row in bad])
    report = [("rows", f"{written.total():,}")]
    report += [(f"from {name}", f"{count:,}") for name, count in written.most_common()]
    fate = "dropped" if settings.duplicates == "drop" else "kept"
    report += [("duplicates", f"{repeated:,} ({fate})")] if repeated else []
    report += [("not read", describe_hidden(hidden))] if hidden else []
    if bad:
        with atomic_write(rejected := output.with_name("rejected.jsonl")) as file:
            write_rejected(bad, file)
        report.append(("rejected", f"{len(bad):,}, listed in {rejected}"))
    return report


def row_paths(section: Data) -> list[Paths]:
    """Returns the paths of all rows that a configuration names."""
    given = (section.train_path, section.eval_path, section.replay.path)
    return [path for path in given if path]


def local_paths(section: Data) -> str | list[str]:
    """Returns `train_path` with a copy in place of each address of a single file.

    A run of verify has a cache of its own, and does not fetch them again.
    """
    given, paths = section.train_path, list[str]()
    for text in [given] if isinstance(given, str) else given:
        found = sources(text, section.cache_dir) if remote.is_remote(text) else []
        paths.append(found[0].path if len(found) == 1 else text)
    return paths[0] if isinstance(given, str) else paths


def hidden_files(section: Data) -> list[str]:
    """Returns the hidden data files in the folders and globs of a configuration; none is read."""
    paths, cache = row_paths(section), Path(section.cache_dir).resolve()
    hidden = (name for path in paths for name in list_files(path, section.cache_dir).hidden)
    return [name for name in hidden if not Path(name).resolve().is_relative_to(cache)]


def describe_hidden(hidden: list[str]) -> str:
    """Returns '2 hidden files, such as rows/.ipynb_checkpoints/a.jsonl'."""
    files = f"{len(hidden):,} hidden file{'s' * (len(hidden) > 1)}"
    return f"{files}, {'such as ' * (len(hidden) > 1)}{hidden[0]}"


def _as_raw(row: Row) -> dict[str, Any]:
    """Returns a row in the format that reads back as the same row."""
    first = row.messages[0]
    if first["role"] == TEXT:
        return {"text": first["content"]}
    if is_tokenised(row.messages):
        return {"input_ids": first["input_ids"], "labels": first["labels"]}
    keys = {"tools": row.tools, "chat_template_kwargs": row.template_kwargs}
    return {"messages": row.messages} | {key: value for key, value in keys.items() if value}


def write_rejected(bad: list[BadRow], file: IO[str]) -> None:
    """Writes one JSON line {file, line, reason, excerpt} for each bad row."""
    file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad)
