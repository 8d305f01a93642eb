"""Reads raw rows from each kind of file, and from the hub.

The content of a file decides its kind, then its name. All but JSON lists are streamed: memory does
not grow with the number of rows.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from sft.data import delimiters, kinds
from sft.data.messages import error_reason, parse_json
from sft.errors import DataError

LONGEST = 64 << 20  # bytes of a line or of a document; a longer one is never held in memory
EXPANDED = 512 * 2**20  # bytes that a compressed list or table, or rows read at once, may have
SEPARATOR = b"<|endoftext|>"  # between the documents of a raw text
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
ALIASES = {".jsonlines": ".jsonl", ".jl": ".jsonl", ".ldjson": ".jsonl", ".tab": ".tsv"}
ALIASES |= {".pq": ".parquet", ".feather": ".arrow", ".text": ".txt"}
TABLES = (".csv", ".tsv")
JSON = re.compile(rb'\{\s*"|\[\s*[{"]')  # how rows of JSON begin
PACKED = (".gz", ".zst")
UNREADABLE_PACKED = (".xz", ".bz2", ".zip", ".7z", ".lz4", ".br", ".lzma", ".z")
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
HUB = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")


class RawRow(NamedTuple):
    """A row as its file has it, or the error that reading it raised."""

    line: int
    value: Any
    shown: Any  # for the excerpt: its bytes, or its value


def read_file(
    path: str, format: str, *, is_mapped: bool = False, delimiter: str = "auto"
) -> Iterator[RawRow]:
    """Yields every raw row of a file. Raises DataError for a file that cannot be read to its end.

    With `format` auto a text file that looks like JSON is refused, and so is a file of one object
    that holds the rows, unless `is_mapped`: columns of its rows are named. `delimiter` separates
    the cells of a CSV; `auto`: found by its first records.
    """
    try:
        read_rows = _choose_reader(path, format, is_mapped or format != "auto", delimiter)
        with _open(path) as file:
            yield from read_rows(path, file)
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise unreadable(path, error.strerror) from None
        raise _broken_file(path, error) from None


def read_hub(name: str) -> Iterator[RawRow]:
    """Yields every raw row of a dataset of the hub, `owner/name:config@split`."""
    tables = load_from_hub(name).with_format("arrow").iter(256)
    yield from _rows_of_batches(batch for table in tables for batch in table.to_batches())


def load_from_hub(name: str) -> Any:
    """Loads a dataset of the hub, `owner/name:config@split` (split: train).

    Raises DataError if the hub gives none of this name.
    """
    import datasets

    parts = HUB.fullmatch(name)
    assert parts
    try:
        return datasets.load_dataset(
            parts["name"], parts["config"], split=parts["split"] or "train"
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(
            f"{name}: no such file, and the hub gave no dataset owner/name:config@split of this "
            f"name: {reason[0]}; correct data.train_path or data.eval_path, or give a local copy"
        ) from None


def data_suffix(path: Path, *, any_packing: bool = False) -> str:
    """Returns the ending of a data file (that of `a.jsonl.gz` is .jsonl), or "".

    `any_packing`: also behind the endings of compressions that are refused (`a.jsonl.xz`).
    """
    name = path.name.lower()
    for packing in (*PACKED, *(UNREADABLE_PACKED if any_packing else ())):
        name = name.removesuffix(packing)
    found = next((suffix for suffix in (*SUFFIXES, *ALIASES) if name.endswith(suffix)), "")
    return ALIASES.get(found, found)


def unreadable(path: str, found: str) -> DataError:
    """Returns the error for a path that gives no rows, with what was found there."""
    return DataError(
        f"{path}: expected rows ({', '.join(SUFFIXES)}, or these as .gz or .zst), a folder or glob "
        f"of such files, or a hub id, found: {found} (relative paths start at {Path.cwd()}); "
        "correct the path in the section data"
    )


def _broken_file(path: str, error: Exception) -> DataError:
    return DataError(f"{path}: the file is broken: {error}; copy or make it again")


def make_excerpt(shown: Any, num: int = 60) -> str:
    """Returns the first characters of a row, which is bytes or any JSON value."""
    if not isinstance(shown, bytes):
        shown = json.dumps(shown, ensure_ascii=False, default=str).encode("utf-8", "replace")
    return one_line(shown[: 8 * num].decode("utf-8", "backslashreplace").strip(), num)


def one_line(text: str, num: int) -> str:
    """Cuts a text to `num` characters, on one line that any console can show."""
    cut = text[:num] + ("..." if len(text) > num else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


Reader = Callable[[str, io.BufferedReader], Iterator[RawRow]]


def _choose_reader(path: str, format: str, is_mapped: bool, delimiter: str) -> Reader:
    with _open(path) as file:
        head = file.read(4096)
    start, suffix = head.removeprefix(codecs.BOM_UTF8).lstrip(), data_suffix(Path(path))
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return _table_rows
    if refusal := kinds.refused_kind(path, head, suffix):
        raise _not_rows(path, refusal)
    if suffix == ".txt":
        if format == "auto" and JSON.match(start):
            raise DataError(
                f"{path}: expected raw text, found what looks like JSON; name the file .jsonl or "
                ".json if it holds rows, or set data.format: text"
            )
        return _text_rows
    if suffix in TABLES and not JSON.match(start):
        return partial(_csv_rows, delimiter=delimiter)
    if start.startswith(b"["):
        return _list_rows
    if suffix in (".jsonl", ".ndjson", ".json") or start.startswith(b"{"):
        return partial(_json_rows, is_mapped=is_mapped)
    begins = f"a file that begins with '{make_excerpt(head, 20)}' and whose name says no kind"
    raise unreadable(path, begins if head else "an empty file")


def _not_rows(path: str, found: str) -> DataError:
    return DataError(f"{path}: expected rows (docs/DATA.md), found {found}")


def has_long_rows(path: str) -> bool:
    """Returns whether a row of the file may take several lines: a record of a CSV, a document."""
    with _open(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    suffix = data_suffix(Path(path))
    return suffix == ".txt" or (suffix in TABLES and not JSON.match(start))


def num_lines(path: str) -> int:
    """Counts the lines of a file; the last one need not have a line end."""
    with _open(path) as file:
        return sum(1 for _ in _lines(file))


def estimate_rows(path: str) -> int | None:
    """Returns about how many rows a file has, by its lines, or None if they do not say it."""
    if compression_of(path):
        return None
    with Path(path).open("rb") as file:
        head = file.read(6)
    if head.startswith(b"PAR1"):
        from pyarrow import ArrowException, parquet

        try:
            return int(parquet.read_metadata(path).num_rows)
        except ArrowException:  # its reader will report it
            return None
    is_table = data_suffix(Path(path)) in TABLES
    return num_lines(path) if is_table or head.lstrip().startswith(b"{") else None


def compression_of(path: str) -> str | None:
    """Returns gzip, zstd or None, by the first bytes of a file."""
    with Path(path).open("rb") as file:
        head = file.read(4)
    return next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)


def _open(path: str) -> io.BufferedReader:
    """Opens a file for its bytes, decompressed if they are gzip or zstd."""
    method = compression_of(path)
    if method == "gzip":
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(path)))
    if method == "zstd":
        import pyarrow  # which, unlike zstandard, notices a file that was cut off

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return Path(path).open("rb")


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes, bool]]:
    """Yields (number, line, is too long); of a line that is too long only the beginning."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if is_long := len(line) > LONGEST:
            rest, line = line, line[:1000]
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(1 << 16)
        yield number, line, is_long


def _value_or_error(parse: Callable[..., Any], *values: Any) -> Any:
    """Returns the result of `parse`, or the error that makes the row a bad one."""
    try:
        return parse(*values)
    except (ValueError, RecursionError) as error:
        return error


def _too_long_error(kind: str) -> ValueError:
    return ValueError(f"the {kind} is longer than {LONGEST / 2**20:g} MiB")


def _json_rows(path: str, file: io.BufferedReader, is_mapped: bool) -> Iterator[RawRow]:
    """Yields a row for each line. Refuses a file whose objects take several lines, or that is one
    object around the rows."""
    first: RawRow | None = None  # kept until it is known whether it is the only one
    is_single = True
    for number, line, is_long in _lines(file):
        if is_long:
            row = RawRow(number, _too_long_error("line"), line)
        elif text := line.strip():
            row = RawRow(
                number, _value_or_error(lambda line: parse_json(line.decode()), text), text
            )
        else:
            continue
        if first:
            yield from (first, row) if is_single else (row,)
            is_single = False
            continue
        first = row
        if isinstance(row.value, json.JSONDecodeError):
            _refuse_multiline_objects(path)
    if first and is_single:
        refusal = None if is_mapped else kinds.refused_object(path, first.value)
        if refusal:
            raise _not_rows(path, refusal)
        yield first


def _refuse_multiline_objects(path: str) -> None:
    with _open(path) as file:
        start = file.read(LONGEST + 1)
    if refusal := kinds.multiline_object(path, start[:LONGEST], len(start) <= LONGEST):
        raise _not_rows(path, refusal)


def _read_whole(path: str, file: io.BufferedReader) -> bytes:
    """Returns the bytes of a file. Refuses a compressed one that is far larger than it looks."""
    is_packed = compression_of(path) is not None
    content = file.read(EXPANDED + 1 if is_packed else -1)
    if is_packed and len(content) > EXPANDED:
        what = f"a list or table of more than {EXPANDED >> 20} MiB once it is decompressed"
        raise _not_rows(path, f"{what}, which is read whole; decompress it, or write JSON lines")
    return content


def _list_rows(path: str, file: io.BufferedReader) -> Iterator[RawRow]:
    """Yields the items of a JSON list, each parsed by itself, so that a bad one is a bad row."""
    content = _read_whole(path, file)
    decoder = json.JSONDecoder(parse_int=len)  # the item's parser limits how large it may be
    try:
        text = content.decode("utf-8-sig")
        decoder.decode(text)
    except (ValueError, RecursionError) as error:
        more = isinstance(error, json.JSONDecodeError) and error.doc[error.pos :]
        if more and (refusal := kinds.lists_on_lines(path, more)):
            raise _not_rows(path, refusal) from None
        where = path
        if isinstance(error, UnicodeDecodeError):
            number = content.count(b"\n", 0, error.start) + 1
            where = f"{path}:{number}"
        raise DataError(f"{where}: the list cannot be read: {error_reason(error)}") from None
    between = re.compile(r"[\s,]*")
    index, at = 0, text.index("[") + 1
    while (found := between.match(text, at)) and text[at := found.end()] != "]":
        index, start = index + 1, at
        at = decoder.raw_decode(text, start)[1]
        item = text[start:at]
        yield RawRow(index, _value_or_error(parse_json, item), item[:1000].encode())


def _find_delimiter(path: str) -> tuple[str, bool]:
    """Returns the delimiter of a CSV, and whether its first line is Excel's name of it."""
    lines: list[str] = []
    size, is_whole = 0, True
    csv.field_size_limit(LONGEST)
    with _open(path) as file:
        for _, line, _ in _lines(file):
            if size > delimiters.SAMPLE_BYTES or len(lines) == delimiters.SAMPLE_LINES:
                is_whole = False
                break
            lines.append(line.decode("utf-8", "surrogateescape"))
            size += len(line)
    if lines and (named := delimiters.EXCEL.fullmatch(lines[0])):
        return named[1], True
    if len(lines) == 1 and "\r" in lines[0].rstrip("\r\n"):
        raise _not_rows(path, "lines that end in a carriage return alone; end them in \\n")
    usual = "\t" if data_suffix(Path(path)) == ".tsv" else ","
    try:
        return delimiters.find_delimiter(lines, is_whole, usual), False
    except ValueError as error:
        raise _not_rows(path, str(error)) from None


def _csv_rows(path: str, file: io.BufferedReader, delimiter: str) -> Iterator[RawRow]:
    """Yields the records below a header; the raw lines of a record are kept until it ends."""
    delimiter, is_named = (delimiter, False) if delimiter != "auto" else _find_delimiter(path)
    csv.field_size_limit(LONGEST)
    raw: list[tuple[int, bytes, bool]] = []  # of the record that is being read

    def decoded_lines() -> Iterator[str]:
        for numbered in _lines(file):
            raw.append(numbered)
            yield numbered[1].decode("utf-8", "surrogateescape")

    lines = decoded_lines()
    if is_named:
        next(lines)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)

    def read_record() -> list[str] | ValueError | None:
        """Returns the next record, the error in it once it has been read whole, or None."""
        raw.clear()
        try:
            cells: list[str] | ValueError | None = next(reader, None)
        except csv.Error as error:
            cells = ValueError(f"broken quoting ({error})")
        if any(is_long for *_, is_long in raw):
            return _too_long_error("line")
        decoded = _value_or_error(b"".join(line for _, line, _ in raw).decode)
        return decoded if isinstance(decoded, ValueError) else cells

    header = read_record()
    while header == []:
        header = read_record()
    header = _checked_header(path, header)
    while (cells := read_record()) is not None:
        value: Any = cells
        if isinstance(cells, list) and len(cells) == len(header):
            value = dict(zip(header, cells, strict=True))
        elif isinstance(cells, list):
            value = ValueError(f"expected {len(header)} cells as in the header, found {len(cells)}")
        if cells != []:  # a blank line
            yield RawRow(raw[0][0], value, b"".join(line for _, line, _ in raw[:10]))


def _checked_header(path: str, header: list[str] | ValueError | None) -> list[str]:
    if isinstance(header, list):
        name, times = Counter(header).most_common(1)[0]
        if times == 1:
            return header
        problem = f"the column {name!r} twice"
    else:
        problem = error_reason(header) if header else "an empty file"
    raise DataError(f"{path}: expected a header that names each column once, found {problem}")


def _text_rows(path: str, file: io.BufferedReader) -> Iterator[RawRow]:
    """Yields the document of a file, or those between SEPARATORs, without line ends around them."""
    parts: list[bytes] = []
    start, size = 1, 0

    def document() -> Iterator[RawRow]:
        text = b"".join(parts).strip(b"\r\n")
        if size > LONGEST:
            error = f"{_too_long_error('document')}; put {SEPARATOR.decode()} between documents"
            yield RawRow(start, ValueError(error), text)
        elif text.strip():
            yield RawRow(start, _value_or_error(bytes.decode, text), text)

    for number, line, is_long in _lines(file):
        first, *others = line.split(SEPARATOR)
        for part, is_next in [(first, False), *((other, True) for other in others)]:
            if is_next:
                yield from document()
                parts, start, size = [], number, 0
            size += len(part) + is_long * LONGEST
            if size > LONGEST:
                parts = [b"".join(parts)[:1000] or part]
            elif part.strip() or parts:
                parts.append(part)
            else:
                start = number + 1
    yield from document()


def _table_rows(path: str, file: io.BufferedReader) -> Iterator[RawRow]:
    """Yields the rows of a Parquet file, or of one that Arrow or `datasets.save_to_disk` wrote."""
    import pyarrow

    try:
        if compression_of(path):  # then it is held in memory
            whole = pyarrow.BufferReader(_read_whole(path, file))
        else:
            whole = pyarrow.memory_map(path)
        yield from _rows_of_batches(_batches(whole))
    except pyarrow.ArrowException as error:
        raise _broken_file(path, error) from None


def _batches(table: Any) -> Iterable[Any]:
    from pyarrow import ipc, parquet

    head = table.read(6)
    table.seek(0)
    if head.startswith(b"PAR1"):
        whole = parquet.ParquetFile(table)
        return whole.iter_batches(batch_size=_rows_at_once(whole.metadata))
    if head == b"ARROW1":
        whole = ipc.open_file(table)
        return map(whole.get_batch, range(whole.num_record_batches))
    return ipc.open_stream(table)


def _rows_at_once(metadata: Any) -> int:
    """Returns how many rows of a Parquet file to read at once: many may refer to one long value."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    sizes = (each.total_uncompressed_size for each in chunks if each.has_dictionary_page)
    return _rows_of(max(sizes, default=0))


def _rows_of(num_bytes: int) -> int:
    """Returns how many rows to make at once if each of them may refer to `num_bytes`."""
    return max(1, min(256, EXPANDED // max(1, num_bytes)))


def _rows_of_batches(batches: Iterable[Any]) -> Iterator[RawRow]:
    import pyarrow

    line = 0
    for batch in batches:
        _check_batch(batch)
        narrow = [f.name for f in batch.schema if f.type in (pyarrow.float16(), pyarrow.float32())]
        step = _rows_of(batch.nbytes) if "dictionary<" in str(batch.schema) else 256
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            rows = _value_or_error(part.to_pylist) if batch.nbytes <= LONGEST else None
            if not isinstance(rows, list):  # one by one if one is too long, or a text not UTF-8
                single = (part.slice(index, 1) for index in range(part.num_rows))
                rows = [_value_or_error(_only_row, row) for row in single]
            for row in rows:
                line += 1
                for name in narrow if isinstance(row, dict) else ():
                    if row[name] is not None:  # 3.8, which is 3.799999952316284 in 64 bits
                        row[name] = float(str(np.float32(row[name])))
                yield RawRow(line, _without_nulls(row) if isinstance(row, dict) else row, row)


def _only_row(batch: Any) -> Any:
    if batch.nbytes > LONGEST:
        raise _too_long_error("row")
    return batch.to_pylist()[0]


def _check_batch(batch: Any) -> None:
    """Raises ArrowInvalid for false offsets, which would end the process. Rows check their text."""
    try:
        batch.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error):
            raise


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Removes the nulls with which Arrow pads objects of different keys to one type."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in row.items()}
