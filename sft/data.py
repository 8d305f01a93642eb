"""Files -> rows, and what can be told of rows before anything renders them.

Every row of every file is accounted for: it becomes a `Row` of messages (`sft/formats.py`) or a
`BadRow` with its place, the reason and an excerpt; none is dropped unsaid and none is repaired.
Files are told by their content, then by their name. All but JSON lists are streamed: memory does
not grow with the number of rows.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from sft.config import Data, UserError, did_you_mean
from sft.formats import (
    TEXT,
    Messages,
    Tools,
    column_of,
    normalise,
    parse_json,
    question,
    reason_of,
    recognise,
    with_columns,
    with_system,
)
from sft.metrics import text_of

LONGEST = 64 << 20  # bytes of a line or of a document; what is longer is never held in memory
SEPARATOR = b"<|endoftext|>"  # between the documents of a raw text
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
HUB = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
HELD_OUT = re.compile(r"(?i)(^|[/._-])(test|dev|val|valid|validation|eval)([/._-]|$)")


class DataError(UserError):
    """The data cannot be trained on as it is; the message says which rows, why, and what to do."""

    exit_code = 3

    @classmethod
    def of_rows(cls, path: str, problems: list[str], total: int | None = None) -> DataError:
        """One error for all (`total`) bad rows, the first ten listed (`file:line: reason`)."""
        total = total or len(problems)
        more = [f"... and {total - 10} more"] if total > 10 else []
        listed = "\n  ".join(problems[:10] + more)
        num = f"{total} bad row{'s' if total > 1 else ''}"
        return cls(f"{path}: {num}; correct or remove them, none is skipped\n  {listed}")


@dataclass(frozen=True, slots=True)
class Row:
    messages: Messages
    tools: Tools | None
    file: str
    line: int  # where the row begins, from 1; index + 1 in a list or a table
    entry: int = 0  # which entry of a list of paths it came from
    format: str = ""
    group: str | None = None  # what it has in the column that scores are told by; None: in none

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    file: str
    line: int
    reason: str
    excerpt: str

    def __str__(self) -> str:
        return f'{self.file}:{self.line}: {self.reason}: "{self.excerpt}"'


class Source(NamedTuple):
    file: str  # or a hub id
    entry: int = 0
    on_hub: bool = False


class Found(NamedTuple):
    """What a reader finds: a raw row, or the error that reading it raised."""

    line: int
    value: Any
    shown: Any  # its bytes, or what stands for them, for the excerpt


# --- files -------------------------------------------------------------------------------------


def sources(path: str | list[str]) -> list[Source]:
    """The files that a path, or each of a list of paths, means: a file, a folder, a glob, a hub id.

    Raises DataError for one that means nothing.
    """
    paths = [path] if isinstance(path, str) else path
    found = [source for entry, text in enumerate(paths) for source in _sources(text, entry)]
    for source in found:
        if isinstance(_tried(source.file.encode), ValueError):
            raise _unreadable(repr(source.file), "a name that is not UTF-8; rename the file")
    return found


def _sources(text: str, entry: int) -> list[Source]:
    path = Path(text)
    if path.is_dir():
        return [Source(str(file), entry) for file in _files_in(path)]
    if path.exists():
        if not path.is_file():  # a pipe, whose rows could be read only once
            raise _unreadable(text, "no regular file")
        return [Source(text, entry)]
    if glob.has_magic(text):
        files = sorted(name for name in glob.glob(text, recursive=True) if Path(name).is_file())
        if not files:
            raise _unreadable(text, "no file that fits the pattern")
        return [Source(name, entry) for name in files]
    if HUB.fullmatch(text) and not _suffix(path):
        return [Source(text, entry, on_hub=True)]
    raise _unreadable(text, "No such file or directory")


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder; those of `datasets.save_to_disk` in their own order."""
    if (splits := folder / "dataset_dict.json").is_file():
        names = _listed(splits, "splits")
        if len(names) != 1:
            raise _several(folder, names)
        return _files_in(folder / names[0])
    if (state := folder / "state.json").is_file():
        return [folder / item["filename"] for item in _listed(state, "_data_files")]
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _suffix(file)]
    files = [f for f in files if f.name not in ("dataset_info.json", "dataset_infos.json")]
    if not files:
        raise _unreadable(str(folder), "a folder without a file that ends in one of these")
    if len(kinds := sorted({_suffix(file) for file in files})) > 1:
        raise _several(folder, kinds)
    names = [file.relative_to(folder).as_posix() for file in files]
    held_out = [name for name in names if HELD_OUT.search(name)]
    if 0 < len(held_out) < len(names):
        raise _several(folder, [next(n for n in names if n not in held_out), held_out[0]])
    return files


def _listed(file: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(file.read_text("utf-8"))[key])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file}: expected {key} of a saved dataset; save it again") from None


def _suffix(path: Path) -> str:
    """The ending that tells a data file (that of `a.jsonl.gz` is .jsonl), or ""."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _several(folder: Path, found: Iterable[str]) -> DataError:
    return DataError(
        f"{folder}: expected files of one kind and one split, found {', '.join(found)}; give the "
        "one to use as a folder or a glob, such as folder/train*.parquet"
    )


def _unreadable(path: str, found: str) -> DataError:
    return DataError(
        f"{path}: expected rows ({', '.join(SUFFIXES)}, or these as .gz or .zst), a folder or glob "
        f"of such files, or a hub id, found: {found} (relative paths start at {Path.cwd()}); "
        "correct the path in the section data"
    )


def _broken(path: str, error: Exception) -> DataError:
    return DataError(f"{path}: the file is broken: {error}; copy or make it again")


# --- rows --------------------------------------------------------------------------------------


def read(
    source: Source,
    *,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    system: Literal["keep", "replace", "prepend"] = "keep",
    system_prompt: str | None = None,
    group: str | None = None,
    asking: bool = False,
) -> Iterator[Row | BadRow]:
    """Every row of a file in its order, good or bad. Raises DataError if it cannot be read on.

    `group`: the column that scores are told by; what a row has there is kept, as text.
    `asking`: rows are to be answered, so they need no answer (`formats.question`).
    """
    empty = True
    for line, value, shown in _found(source, format):
        empty = False
        try:
            if isinstance(value, Exception):
                raise value
            raw = with_columns(value, columns) if columns else value
            name = "" if asking else recognise(raw) if format == "auto" else format
            messages, tools = question(raw) if asking else normalise(raw, name)
            messages = with_system(messages, system, system_prompt)
            own = None if group is None else text_of(_in_column(value, group))
            yield Row(messages, tools, source.file, line, source.entry, name, own)
        except (ValueError, RecursionError) as error:
            reason = _printable(reason_of(error), 400)
            yield BadRow(source.file, line, reason, excerpt_of(shown))
    if empty:
        raise DataError(f"{source.file}: expected rows (docs/DATA.md), found none in the file")


def read_all(path: str | list[str], **options: Any) -> Iterator[Row | BadRow]:
    """Every row of every file; options as in `read`."""
    return (row for source in sources(path) for row in read(source, **options))


def read_raw(path: str | list[str]) -> Iterator[tuple[str, Any]]:
    """(file:line, row as its file has it, or the error in it) of every row of every file."""
    for source in sources(path):
        for line, value, _ in _found(source, "auto"):
            yield f"{source.file}:{line}", value


def check_column(path: str | list[str], column: str, key: str) -> None:
    """Raises DataError if no row of the files has the column, which `key` of a configuration names.

    The first row that has it ends the search.
    """
    known = set[str]()
    for _, row in read_raw(path):
        if _in_column(row, column) is not None:
            return
        known |= row.keys() if isinstance(row, dict) else set()
    raise no_column(path, column, key, known)


def no_column(path: str | list[str], column: str, key: str, known: Iterable[str]) -> DataError:
    shown = path if isinstance(path, str) else ", ".join(path)
    hint = did_you_mean(column, sorted(known))
    return DataError(f"{shown}: no column {column!r}, which {key} names; {hint}")


def _in_column(row: Any, column: str) -> Any:
    """None if the row has nothing there."""
    try:
        return column_of(row, column) if isinstance(row, dict) else None
    except ValueError:
        return None


def contents(path: str | list[str]) -> list[dict[str, str | int]]:
    """Name and sha256 (of the hub: fingerprint) of every file: what rows are a function of."""
    found: list[dict[str, str | int]] = []
    for source in sources(path):
        if source.on_hub:
            digest = str(_from_hub(source.file)._fingerprint)
        else:
            try:
                with Path(source.file).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _unreadable(source.file, error.strerror or str(error)) from None
        found.append({"entry": source.entry, "name": source.file, "digest": digest})
    return found


def options(section: Data) -> dict[str, Any]:
    """What a configuration says of how rows are read, as the options of `read`."""
    return {
        "format": section.format,
        "columns": section.columns,
        "system": section.system,
        "system_prompt": section.system_prompt,
    }


def process(settings: Data, output: Path) -> list[tuple[str, str]]:
    """Normalised training rows as JSONL, streamed, and rejected ones beside it; what to report.

    Raises DataError with every bad row, unless `on_bad_row` is skip; then `output` is not made.
    """
    sources(settings.train_path)  # one that is missing is told before anything is made
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(output.name + ".tmp")
    try:
        return _process(settings, output, staged)
    finally:
        staged.unlink(missing_ok=True)


def _process(settings: Data, output: Path, staged: Path) -> list[tuple[str, str]]:
    written, seen, repeated = Counter[str](), set[bytes](), 0
    bad: list[BadRow] = []
    found = read_all(settings.train_path, **options(settings))
    with staged.open("w", encoding="utf-8", newline="\n") as file:
        for row in islice(found, settings.max_rows):
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            key = content_digest(row)
            repeated += key in seen
            if key in seen and settings.duplicates == "drop":
                continue
            seen.add(key)
            written[row.format] += 1
            is_text = row.messages[0]["role"] == TEXT
            shown = {"text": row.messages[0]["content"]} if is_text else {"messages": row.messages}
            shown |= {"tools": row.tools} if row.tools else {}
            file.write(json.dumps(shown, ensure_ascii=False) + "\n")
    if (bad and settings.on_bad_row == "error") or not written:
        raise DataError.of_rows(bad[0].file, [str(row) for row in bad])
    staged.replace(output)
    report = [("rows", f"{written.total():,}")]
    report += [(f"from {name}", f"{count:,}") for name, count in written.most_common()]
    fate = "dropped" if settings.duplicates == "drop" else "kept"
    report += [("duplicates", f"{repeated:,} ({fate})")] if repeated else []
    if bad:
        rejected = output.with_name("rejected.jsonl")
        write_rejected(bad, rejected)
        report.append(("rejected", f"{len(bad):,}, listed in {rejected}"))
    return report


def write_rejected(bad: list[BadRow], path: str | Path) -> None:
    """One JSON line {file, line, reason, excerpt} for each bad row."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad]
    Path(path).write_text("".join(lines), "utf-8")


def excerpt_of(shown: Any, num: int = 60) -> str:
    if not isinstance(shown, bytes):
        shown = json.dumps(shown, ensure_ascii=False, default=str).encode("utf-8", "replace")
    return _printable(shown[: 8 * num].decode("utf-8", "backslashreplace").strip(), num)


def _printable(text: str, num: int) -> str:
    """At most `num` characters of it, on one line that any console can show."""
    cut = text[:num] + ("..." if len(text) > num else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


# --- readers, one per kind of file -------------------------------------------------------------


def _found(source: Source, format: str) -> Iterator[Found]:
    """Every raw row of a file, by the reader that its content and then its name tell."""
    if source.on_hub:
        yield from _hub_rows(source.file)
        return
    try:
        path, read_rows = source.file, _reader(source.file, format)
        with _open(path) as file:
            yield from read_rows(path, file)
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise _unreadable(source.file, error.strerror) from None
        raise _broken(source.file, error) from None


Reader = Callable[[str, io.BufferedReader], Iterator[Found]]


def _reader(path: str, format: str) -> Reader:
    with _open(path) as file:
        head = file.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _unreadable(path, "UTF-16 text; save it as UTF-8")
    start, suffix = head.removeprefix(codecs.BOM_UTF8).lstrip(), _suffix(Path(path))
    if head.startswith(b"PAR1"):
        return _parquet_rows
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _arrow_rows
    if suffix == ".txt":
        if format == "auto" and re.match(rb'\{\s*"|\[\s*[{"]', start):
            raise DataError(
                f"{path}: expected raw text, found what looks like JSON; name the file .jsonl or "
                ".json if it holds rows, or set data.format: text"
            )
        return _text_rows
    if start.startswith(b"["):
        return _list_rows
    if suffix in (".csv", ".tsv") and not start.startswith(b"{"):
        return _csv_rows
    if suffix in (".jsonl", ".ndjson", ".json") or start.startswith(b"{"):
        return _json_rows
    raise _unreadable(path, f"a file that begins with {excerpt_of(head, 20)!r}")


def _compression(path: str) -> str | None:
    with Path(path).open("rb") as file:
        head = file.read(4)
    return next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)


def _open(path: str) -> io.BufferedReader:
    """The bytes of a file, decompressed if they are gzip or zstd."""
    method = _compression(path)
    if method == "gzip":
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(path)))
    if method == "zstd":
        import pyarrow  # which, unlike zstandard, tells a file that was cut off

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return Path(path).open("rb")


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes, bool]]:
    """(number, line, is too long) of every line; of one that is too long, only the beginning."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if is_long := len(line) > LONGEST:
            rest, line = line, line[:1000]
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(1 << 16)
        yield number, line, is_long


def _tried(parse: Callable[..., Any], *values: Any) -> Any:
    """What `parse` returns, or the error that tells a bad row."""
    try:
        return parse(*values)
    except (ValueError, RecursionError) as error:
        return error


def _too_long(kind: str) -> ValueError:
    return ValueError(f"the {kind} is longer than {LONGEST / 2**20:g} MiB")


def _json_rows(path: str, file: io.BufferedReader) -> Iterator[Found]:
    for number, line, is_long in _lines(file):
        if is_long:
            yield Found(number, _too_long("line"), line)
        elif text := line.strip():
            yield Found(number, _tried(_parse, text), text)


def _parse(text: bytes) -> Any:
    return parse_json(text.decode())


def _list_rows(path: str, file: io.BufferedReader) -> Iterator[Found]:
    """The items of a JSON list, each parsed apart, so that a bad one is told like a bad line is."""
    content = file.read()
    decoder = json.JSONDecoder(parse_int=len)  # how large a number may be, the item's parser judges
    try:
        text = content.decode("utf-8-sig")
        decoder.decode(text)
    except (ValueError, RecursionError) as error:
        where = path
        if isinstance(error, UnicodeDecodeError):
            number = content.count(b"\n", 0, error.start) + 1
            where = f"{path}:{number}"
        raise DataError(f"{where}: the list cannot be read: {reason_of(error)}") from None
    between = re.compile(r"[\s,]*")
    index, at = 0, text.index("[") + 1
    while (found := between.match(text, at)) and text[at := found.end()] != "]":
        index, start = index + 1, at
        at = decoder.raw_decode(text, start)[1]
        item = text[start:at]
        yield Found(index, _tried(parse_json, item), item[:1000].encode())


def _csv_rows(path: str, file: io.BufferedReader) -> Iterator[Found]:
    """The records below a header; a record's raw lines are kept until it ends."""
    raw: list[bytes] = []
    last, is_long = 0, False

    def fed() -> Iterator[str]:
        nonlocal last, is_long
        for last, line, cut in _lines(file):  # noqa: B007 (read by the loop below)
            is_long |= cut
            raw.append(line)
            yield line.decode("utf-8", "surrogateescape")

    def record() -> list[str] | ValueError | None:
        """The next record; None at the end. What is wrong with it is told when it is whole."""
        nonlocal is_long
        raw.clear()
        is_long = False
        try:
            cells: list[str] | ValueError | None = next(reader, None)
        except csv.Error as error:
            cells = ValueError(f"broken quoting ({error})")
        decoded = _tried(b"".join(raw).decode)
        if is_long:
            return _too_long("line")
        return decoded if isinstance(decoded, ValueError) else cells

    csv.field_size_limit(LONGEST)
    delimiter = "\t" if _suffix(Path(path)) == ".tsv" else ","
    reader = csv.reader(fed(), delimiter=delimiter, strict=True)
    header = record()
    while header == []:
        header = record()
    if not isinstance(header, list) or len(set(header)) < len(header):
        repeated = isinstance(header, list) and Counter(header).most_common(1)[0][0]
        problem = f"the column {repeated!r} twice" if header else "an empty file"
        problem = reason_of(header) if isinstance(header, ValueError) else problem
        raise DataError(f"{path}: expected a header that names each column once, found {problem}")
    while True:
        begins = last + 1
        cells = record()
        if cells is None:
            return
        if isinstance(cells, ValueError):
            yield Found(begins, cells, b"".join(raw[:10]))
        elif cells and len(cells) != len(header):
            wrong = f"expected {len(header)} cells as in the header, found {len(cells)}"
            yield Found(begins, ValueError(wrong), b"".join(raw[:10]))
        elif cells:
            yield Found(begins, dict(zip(header, cells, strict=True)), b"".join(raw[:10]))


def _text_rows(path: str, file: io.BufferedReader) -> Iterator[Found]:
    """A document per file, or several between SEPARATORs, without the line ends around them."""
    parts: list[bytes] = []
    begins, size = 1, 0

    def document() -> Iterator[Found]:
        text = b"".join(parts).strip(b"\r\n")
        if size > LONGEST:
            error = f"{_too_long('document')}; put {SEPARATOR.decode()} between documents"
            yield Found(begins, ValueError(error), text)
        elif text.strip():
            yield Found(begins, _tried(bytes.decode, text), text)

    for number, line, is_long in _lines(file):
        first, *others = line.split(SEPARATOR)
        for part, is_next in [(first, False), *((other, True) for other in others)]:
            if is_next:
                yield from document()
                parts, begins, size = [], number, 0
            size += len(part) + is_long * LONGEST
            if size > LONGEST:
                parts = [b"".join(parts)[:1000] or part]
            elif part.strip() or parts:
                parts.append(part)
            else:
                begins = number + 1
    yield from document()


def _parquet_rows(path: str, file: io.BufferedReader) -> Iterator[Found]:
    from pyarrow import ArrowException, parquet

    try:
        whole = parquet.ParquetFile(_mapped(path, file))
        yield from _table_rows(whole.iter_batches(batch_size=256))
    except ArrowException as error:
        raise _broken(path, error) from None


def _arrow_rows(path: str, file: io.BufferedReader) -> Iterator[Found]:
    """A file that `datasets.save_to_disk` or Arrow itself wrote."""
    from pyarrow import ArrowException, ipc

    try:
        mapped = _mapped(path, file)
        if mapped.read(6) == b"ARROW1":
            whole = ipc.open_file(mapped)
            parts = (whole.get_batch(index) for index in range(whole.num_record_batches))
            yield from _table_rows(parts)
        else:
            mapped.seek(0)
            yield from _table_rows(ipc.open_stream(mapped))
    except ArrowException as error:
        raise _broken(path, error) from None


def _mapped(path: str, file: io.BufferedReader) -> Any:
    """A table's file, which is not read as a stream; one that is compressed is held in memory."""
    import pyarrow

    if _compression(path):
        return pyarrow.BufferReader(file.read())
    return pyarrow.memory_map(path)


def _table_rows(batches: Iterable[Any]) -> Iterator[Found]:
    line = 0
    for batch in batches:
        _check_batch(batch)
        for start in range(0, batch.num_rows, 256):
            part = batch.slice(start, 256)
            rows = _tried(part.to_pylist)
            if not isinstance(rows, list):  # one by one if a text in it is not UTF-8
                rows = [_tried(_row_of_table, part, index) for index in range(part.num_rows)]
            for row in rows:
                line += 1
                yield Found(line, _without_nulls(row) if isinstance(row, dict) else row, row)


def _check_batch(batch: Any) -> None:
    """Raises ArrowInvalid for offsets that point outside their buffers: reading them would end the
    process. Text that is not UTF-8 is left to the rows."""
    try:
        batch.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error):
            raise


def _row_of_table(batch: Any, index: int) -> Any:
    return batch.slice(index, 1).to_pylist()[0]


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls in which Arrow pads objects of different keys to one type."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in row.items()}


def _hub_rows(name: str) -> Iterator[Found]:
    for line, row in enumerate(_from_hub(name), 1):
        yield Found(line, _without_nulls(row), row)


def _from_hub(name: str) -> Any:
    """A dataset of the hub, `owner/name:config@split` (split: train)."""
    import datasets

    parts = HUB.fullmatch(name)
    assert parts
    try:
        return datasets.load_dataset(
            parts["name"], parts["config"], split=parts["split"] or "train"
        )
    except (OSError, ValueError, RuntimeError) as error:
        told = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(
            f"{name}: no such file, and the hub gave no dataset owner/name:config@split of this "
            f"name: {told[0]}; correct data.train_path or data.eval_path, or give a local copy"
        ) from None


# --- the set of rows ---------------------------------------------------------------------------

DIGEST = np.dtype("V16")  # what makes a row the same as another


def content_digest(row: Row) -> bytes:
    """Of messages and tools; where they were read from does not matter."""
    content = json.dumps(row.messages) + (json.dumps(row.tools) if row.tools else "")
    return hashlib.sha256(content.encode()).digest()[:16]


def groups(digests: np.ndarray) -> np.ndarray:
    """Returns (n,): of each digest the first index that has it."""
    _, first, number = np.unique(digests, return_index=True, return_inverse=True)
    return first[number]


def firsts(digests: np.ndarray) -> np.ndarray:
    """Returns (n,) bool: whether a digest stands here for the first time."""
    return groups(digests) == np.arange(len(digests))


def mix(entries: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """Indices of rows of these entries, each as often as its entry's weight says: 2 is twice, 0.5
    a seeded half of the rows.

    Which rows the fraction takes is a function of (seed, entry, index in the entry) alone.
    """
    result = []
    for entry, weight in enumerate(weights):
        mine = np.flatnonzero(entries == entry)
        drawn = _drawn(b"%d:%d:%d" % (seed, entry, n) for n in range(len(mine)))
        part = np.sort(drawn[: round(weight % 1 * len(mine))])
        result += [mine] * int(weight) + [mine[part]]
    return np.concatenate(result)


def split(digests: np.ndarray, eval_fraction: float, seed: int) -> np.ndarray:
    """Which rows (n, bool) are held out: a function of content and seed.

    Rows with identical content stay together, so no held-out row was trained on; the held-out part
    can therefore be somewhat smaller than asked for.
    """
    held = np.zeros(len(digests), bool)
    if not eval_fraction:
        return held
    group = groups(digests)
    sizes = np.bincount(group)
    first = np.flatnonzero(sizes)  # of each content
    if len(first) < 2:
        raise DataError(
            f"holding out data.eval_fraction={eval_fraction:g} needs two different rows, found "
            f"{len(first)}; give data.eval_path, or more rows"
        )
    drawn = first[_drawn(b"%d:" % seed + bytes(digest) for digest in digests[first])]
    wanted = min(round(eval_fraction * len(digests)), len(digests) - 1)
    num_held = 0
    for row in drawn:
        if num_held + sizes[row] <= wanted:
            held[row], num_held = True, num_held + sizes[row]
    if not num_held:
        held[drawn[np.argmin(sizes[drawn])]] = True
    return held[group]


def _drawn(texts: Iterable[bytes]) -> np.ndarray:
    """Indices of the texts in a random order, the same at all times."""
    hashed = (int.from_bytes(hashlib.sha256(text).digest()[:8]) for text in texts)
    return np.argsort(np.fromiter(hashed, np.uint64), kind="stable")


def num_rows(path: str | list[str]) -> int | None:
    """About how many rows there are, without reading them as rows; None if that cannot be told."""
    total = 0
    for source in sources(path):
        if source.on_hub or _compression(source.file):
            return None
        with Path(source.file).open("rb") as file:
            head = file.read(6)
            if head.startswith(b"PAR1"):
                from pyarrow import ArrowException, parquet

                try:
                    total += parquet.read_metadata(source.file).num_rows
                except ArrowException:  # its reader will tell
                    return None
            elif head.lstrip().startswith(b"{") or _suffix(Path(source.file)) in (".csv", ".tsv"):
                file.seek(0)
                total += sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))
            else:
                return None
    return total
