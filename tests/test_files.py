"""Files -> rows: each kind of file and of broken file, bad rows with their places, what sets of
rows are (split, mix, digest), and memory that does not grow with a file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import load_rows, representatives
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from sft.config.schema import Data
from sft.data import files, readers
from sft.data.files import (
    DIGEST,
    BadRow,
    Row,
    content_digest,
    num_rows,
    read,
    sources,
    write_rejected,
)
from sft.data.split import first_equal, is_first, mix, split
from sft.errors import DataError

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD = b'{"question": "Hi", "answer": "Hello"}'

# source of the row, the reason reported
BAD = {
    "broken": (b'{"question": "Hi"', "not valid JSON (Expecting ',' delimiter, column 18)"),
    "two objects": (GOOD + GOOD, "not valid JSON (Extra data, column 38)"),
    "raw control": (b'{"question": "a\x00b"}', "not valid JSON (Invalid control character at"),
    "not an object": (b"5", "expected an object, found int"),
    "duplicate key": (b'{"answer": "a", "answer": "b"}', "the key 'answer' is given twice"),
    "duplicate below": (
        b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
        "the key 'role' is given twice",
    ),
    "nan": (b'{"question": "Hi", "answer": "a", "score": NaN}', "NaN is not a JSON value"),
    "infinity": (b'{"question": "Hi", "answer": -Infinity}', "-Infinity is not a JSON value"),
    "huge number": (b'{"question": 1' + b"0" * 5000 + b"}", "Exceeds the limit"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "no format": (b'{"a": "b"}', "expected the keys of one format (messages, conversations,"),
    "empty": (b'{"prompt": "a", "completion": ""}', "completion is empty"),
    "surrogate": (
        b'{"question": "a", "answer": "\\ud83d"}',
        "answer contains a lone surrogate (U+D83D)",
    ),
    "not UTF-8": (b'{"question": "caf\xe9"}', "not UTF-8 text (byte 0xe9 at 17)"),
}
KINDS = [pytest.param(*case, id=name) for name, case in BAD.items()]


def write(path, *lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def refused(path, **options):
    """What load_rows says of it."""
    with pytest.raises(DataError) as caught:
        load_rows(path if isinstance(path, list) else str(path), **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


def asked(rows):
    return [row.messages[0]["content"] for row in rows]


# --- bad rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "reason"), KINDS)
def test_bad_line(tmp_path, bad, reason):
    path = write(tmp_path / "rows.jsonl", GOOD, b"", bad, GOOD)
    first, reported = refused(path).split("\n")
    assert first == f"{path}: 1 bad row; correct or remove them, none is skipped"
    assert reported.startswith(f"  {path}:3: ")
    assert reason in reported
    assert reported.endswith('"')
    rows, (skipped,) = load_rows(path, on_bad_row="skip")
    assert [row.line for row in rows] == [1, 4]
    assert reported == f"  {skipped}"


@pytest.mark.parametrize("kind", BAD)
def test_bad_item_of_a_list(tmp_path, kind):
    bad, reason = BAD[kind]
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + GOOD + b",\n" + bad + b"]")
    message = refused(path)
    if kind in ("broken", "two objects", "raw control", "huge number", "deep", "not UTF-8"):
        assert message.startswith(f"{path}: the list cannot be read: {reason.split(' (')[0]}"[:70])
    else:
        assert f"\n  {path}:2: " in message
        assert reason in message


def test_all_bad_rows_are_counted_and_ten_are_listed(tmp_path):
    bad = [json.dumps({"question": f"q{i}", "answer": ""}).encode() for i in range(13)]
    path = write(tmp_path / "rows.jsonl", *[row for b in bad for row in (GOOD, b)])
    first, *listed, more = refused(path).split("\n")
    assert "13 bad rows" in first
    places = [line.split(": ")[0].strip() for line in listed]
    assert places == [f"{path}:{2 * n}" for n in range(1, 11)]
    assert listed[2] == f'  {path}:6: answer is empty: "{bad[2].decode()}"'
    assert more.strip() == "... and 3 more"


def test_excerpt_is_one_short_printable_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", b'{"question": "\x1b[31m \xff' + b"a" * 200)
    excerpt = refused(path).split(': "', 1)[1]
    assert excerpt.startswith('{"question": "\\x1b[31m \\xffaaa')
    assert excerpt.endswith('a..."')
    assert len(excerpt) < 80


def test_skipped_rows_are_written_down(tmp_path):
    keys = b'{"messages": [{"role": "user", "content": "a", "\\ud83d\\n": 1}]}'
    path = write(tmp_path / "rows.jsonl", GOOD, b"\xff", "{é".encode(), keys)
    _, bad = load_rows(path, on_bad_row="skip")
    with (tmp_path / "rejected.jsonl").open("w", encoding="utf-8") as file:
        write_rejected(bad, file)
    lines = (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines()
    assert [BadRow(**json.loads(line)) for line in lines] == bad
    assert [(row.line, row.excerpt) for row in bad[:2]] == [(2, "\\xff"), (3, "{é")]
    assert bad[2].reason.startswith("message 1: would not be rendered: \\ud83d\\n; ")


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_that_is_too_long_is_a_bad_row_and_never_held(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(readers, "LONGEST", 2**16)
    long = b'{"question": "' + b"a" * 5_000_000 + b'", "answer": "b"}'
    path = write(tmp_path / "rows.jsonl", GOOD, long, GOOD, long)
    with (tmp_path / "rows.jsonl").open("r+b") as file:
        file.truncate((tmp_path / "rows.jsonl").stat().st_size - 1 + len(ending))
    (source,) = sources(path)
    tracemalloc.start()
    rows = list(read(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(row) for row in rows] == [Row, BadRow, Row, BadRow]
    assert str(rows[1]).startswith(f'{path}:2: the line is longer than 0.0625 MiB: "{{"questi')
    assert peak < 1_000_000


# --- kinds of files ----------------------------------------------------------------------------


def in_csv(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def in_parquet(rows):
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue()


def in_arrow(rows, new=pyarrow.ipc.new_stream):
    sink = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def in_jsonl(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


ROWS = [{"question": f'é "{n}",\n\t', "answer": f"{n}, yes"} for n in range(5)]
FILES = {
    "a.jsonl": in_jsonl(ROWS),
    "a.ndjson": in_jsonl(ROWS),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "list.jsonl": json.dumps(ROWS).encode(),  # the content wins over the name
    "lines.json": in_jsonl(ROWS),
    "lines.csv": in_jsonl(ROWS),
    "none": in_jsonl(ROWS),
    "a.csv": in_csv(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + in_csv(ROWS),
    "a.tsv": in_csv(ROWS, "\t"),
    "a.parquet": in_parquet(ROWS),
    "table.bin": in_parquet(ROWS),
    "a.arrow": in_arrow(ROWS),
    "b.arrow": in_arrow(ROWS, pyarrow.ipc.new_file),
}


@pytest.mark.parametrize("compressed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, compressed):
    content = FILES[name]
    if compressed == ".gz":
        content = gzip.compress(content[:40]) + gzip.compress(content[40:])
    if compressed == ".zst":
        content = pyarrow.compress(content, "zstd", asbytes=True)
    path = tmp_path / (name + compressed)
    path.write_bytes(content)
    rows, bad = load_rows(str(path))
    assert bad == []
    assert asked(rows) == [row["question"] for row in ROWS]
    lines = (
        [2, 4, 6, 8, 10] if name.endswith(("csv", "tsv")) and name != "lines.csv" else range(1, 6)
    )
    assert [row.line for row in rows] == list(lines)
    assert {(row.file, row.tools, row.format) for row in rows} == {
        (str(path), None, "question_answer")
    }


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_broken_compressed_file_is_reported(tmp_path, suffix):
    rows = in_jsonl([{**ROWS[0], "id": random.random()} for _ in range(20_000)])
    whole = gzip.compress(rows) if suffix == ".gz" else pyarrow.compress(rows, "zstd", asbytes=True)
    path = tmp_path / f"rows.jsonl{suffix}"
    for content in (whole[: len(whole) // 2], whole[:4] + bytes(99) + whole[103:]):
        path.write_bytes(content)
        assert f"{path}: the file is broken: " in refused(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow"])
def test_a_broken_table_is_reported(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name][: len(FILES[name]) // 2])
    assert f"{path}: the file is broken: " in refused(path)


def test_a_table_of_messages_has_no_padding_of_nulls(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "sub", "arguments": {"b": 2}}}
    conversations = [
        [HELLO[0], {"role": "assistant", "content": "", "tool_calls": calls}]
        for calls in ([call], [other])
    ]
    path = tmp_path / "rows.parquet"
    path.write_bytes(in_parquet([{"messages": messages} for messages in conversations]))
    assert [row.messages for row in load_rows(str(path))[0]] == conversations


def test_a_table_with_text_that_is_not_utf8(tmp_path):
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"user": texts, "assistant": texts}), path)
    rows, (bad,) = load_rows(str(path), on_bad_row="skip")
    assert [row.line for row in rows] == [1, 3]
    assert (bad.line, bad.reason) == (2, "not UTF-8 text (byte 0xff at 0)")


def test_what_stands_around_rows(tmp_path):
    """BOM, CRLF, blank lines, a line separator inside a string, no newline at the end."""
    path = tmp_path / "rows.jsonl"
    inner = '{"question": "a\u2028b", "answer": "é"}'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n \t\r\n\n" + inner)
    rows, _ = load_rows(str(path))
    assert [(row.line, row.messages[0]["content"]) for row in rows] == [(1, "Hi"), (4, "a\u2028b")]
    path.write_bytes(b"\xef\xbb\xbf \n[" + inner + b"\n ,\n" + GOOD + b"]\n")
    rows, _ = load_rows(str(path))
    assert [(row.line, row.messages[1]["content"]) for row in rows] == [(1, "é"), (2, "Hello")]


def test_max_rows_reads_no_further(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, b"", GOOD, b"broken")
    assert [row.line for row in load_rows(path, max_rows=2)[0]] == [1, 3]
    assert ":4: not valid JSON" in refused(path, max_rows=3)
    assert len(load_rows([path, path], max_rows=2)[0]) == 2


CSV = b"question,answer\nHi,Hello\n"
BROKEN_CSV = {  # what stands below good rows, its line, the reason
    "too few cells": (b"a\nx,y\n", 3, "expected 2 cells as in the header, found 1"),
    "too many cells": (b"a,b,c\nx,y\n", 3, "expected 2 cells as in the header, found 3"),
    "blank lines before": (b"\r\n\na\nx,y\n", 5, "expected 2 cells as in the header, found 1"),
    "behind a record of two lines": (b'"a\nb",c\na\n', 5, "expected 2 cells"),
    "quote": (b'"a"b,c\nx,y\n', 3, "broken quoting (',' expected after '\"')"),
    "open quote": (b'x,y\n"a,b\n\nc,d\n', 4, "broken quoting (unexpected end of data)"),
    "not UTF-8": (b"a,\xe9\nx,y\n", 3, "not UTF-8 text (byte 0xe9 at 2)"),
    "NUL": (b"a,b\0\nx,y\n", 3, "answer contains a NUL character"),
    "empty cell": (b"a,\nx,y\n", 3, "answer is empty"),
    "too long": (b"a,%b\nx,y\n" % (b"b" * 2**17), 3, "the line is longer than 0.0625 MiB"),
}


@pytest.mark.parametrize(("below", "line", "reason"), BROKEN_CSV.values(), ids=BROKEN_CSV)
def test_bad_record_of_a_csv(tmp_path, monkeypatch, below, line, reason):
    monkeypatch.setattr(readers, "LONGEST", 2**16)
    path = write(tmp_path / "rows.csv", CSV + below)
    rows, (bad,) = load_rows(path, on_bad_row="skip")
    assert (bad.line, bad.reason[: len(reason)]) == (line, reason)
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("header", "found"),
    [(b"a,b,a", "the column 'a' twice"), (b'"a"b', "broken quoting"), (b"\xff", "not UTF-8")],
)
def test_bad_header_of_a_csv(tmp_path, header, found):
    path = write(tmp_path / "rows.csv", header, b"x,y")
    reported = refused(path)
    assert reported.startswith(
        f"{path}: expected a header that names each column once, found {found}"
    )


def test_columns_of_a_csv(tmp_path):
    path = write(tmp_path / "rows.csv", b",label,text", b"0,spam,Buy!")
    (row,), _ = load_rows(path, columns={"prompt": "text", "completion": "label"})
    assert [message["content"] for message in row.messages] == ["Buy!", "spam"]
    assert "no column 'lable', the row has ['', 'label', 'text']" in refused(
        path, columns={"prompt": "text", "completion": "lable"}
    )


def test_rows_keep_what_scores_are_reported_by(tmp_path):
    chat = {"prompt": "a", "completion": "b"}
    rows = [{"kind": 7.0}, {"kind": ""}, {}, {"kind": None}, {"kind": True}, {"kind": "ü"}]
    rows = [json.dumps(chat | row | {"meta": {"kind": "x"}}).encode() for row in rows]
    path = write(tmp_path / "rows.jsonl", *rows)
    assert [row.group for row in load_rows(path, group="kind")[0]] == ["7", "", "", "", "true", "ü"]
    assert {row.group for row in load_rows(path, group="meta.kind")[0]} == {"x"}
    assert {row.group for row in load_rows(path)[0]} == {None}
    mapped = {"prompt": "prompt", "completion": "completion"}
    assert load_rows(path, group="meta.kind", columns=mapped)[0][0].group == "x"


def test_a_column_that_no_row_has_is_reported(tmp_path):
    path = write(tmp_path / "rows.jsonl", b'{"prompt": "a"}', b"{", b"[]", b'{"kind": "", "b": 1}')
    for column in ("kind", "prompt", "b"):
        files.check_column(path, column, "section.key")
    with pytest.raises(DataError) as error:
        files.check_column(path, "knd", "section.key")
    expected = f"{path}: no column 'knd', which section.key names; did you mean kind?"
    assert str(error.value).startswith(expected)


def test_raw_text_is_a_row_per_document(tmp_path):
    path = write(tmp_path / "a.txt", b"\n  Once\nupon\n", b" a time.\n\n")
    (row,), _ = load_rows(path)
    assert row.messages == [{"role": "text", "content": "  Once\nupon\n\n a time."}]
    assert (row.line, row.format) == (2, "text")
    separated = b"a\nb<|endoftext|>\n\nc\n<|endoftext|><|endoftext|>d <|endoftext|> \n"
    rows, _ = load_rows(write(tmp_path / "b.txt", separated))
    assert [(row.line, asked([row])[0]) for row in rows] == [(1, "a\nb"), (4, "c"), (5, "d ")]


def test_a_bad_document(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 2**10)
    long = b"a line\n" * 1000 + b"b" * 3000 + b"\n"
    path = write(tmp_path / "a.txt", b"\xff", b"<|endoftext|>", long, b"<|endoftext|>good")
    (row,), bad = load_rows(path, on_bad_row="skip")
    assert asked([row]) == ["good"]
    assert [(one.line, one.reason.split(" (")[0]) for one in bad] == [
        (1, "not UTF-8 text"),
        (3, "the document is longer than 0.000976562 MiB; put <|endoftext|> between documents"),
    ]


@pytest.mark.parametrize("content", [GOOD, b'[{"text": "a"}]', b'\n[ "a" ]'])
def test_rows_are_not_taken_for_raw_text(tmp_path, content):
    path = write(tmp_path / "rows.txt", content)
    assert "expected raw text, found what looks like JSON; name the file .jsonl" in refused(path)
    assert len(load_rows(path, format="text")[0]) == 1


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"\xef\xbb\xbf", b"\xef\xbb\xbf[ ]\n"])
def test_no_rows(tmp_path, content):
    for name in ("rows.jsonl", "rows.txt"):
        path = tmp_path / name
        path.write_bytes(content if name == "rows.jsonl" else b"\n\n")
        assert refused(path).startswith(f"{path}: expected rows (docs/DATA.md), found none")


@pytest.mark.parametrize("tail", [b"", b",", b"] x"])
def test_broken_list(tmp_path, tail):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + GOOD + tail)
    reported = refused(path)
    assert "rows.json: the list cannot be read: not valid JSON" in reported
    assert "line" in reported


def test_a_file_of_no_known_kind(tmp_path):
    path = write(tmp_path / "rows.mat", b"MATLAB\3\4")
    assert (
        r"found: a file that begins with 'MATLAB\x03\x04' and whose name says no kind"
        in refused(path)
    )


# --- paths -------------------------------------------------------------------------------------


def files_of(path):
    return [source.file for source in sources(path)]


def test_paths(tmp_path):
    names = ("b.jsonl", "a.jsonl", "deep/c.jsonl.gz", "deep/README.md", "deep/dataset_info.json")
    (tmp_path / "deep").mkdir()
    b, a, c, _, _ = (write(tmp_path / name, GOOD) for name in names)
    assert files_of(b) == [b]
    assert files_of(f"{tmp_path}/*.jsonl") == [a, b]
    assert files_of(f"{tmp_path}/**/*.jsonl*") == [a, b, c]
    assert files_of(str(tmp_path / "deep")) == [c]
    assert [(s.file, s.entry) for s in sources([b, f"{tmp_path}/[ab].jsonl"])] == [
        (b, 0),
        (a, 1),
        (b, 1),
    ]
    bracketed = write(tmp_path / "a[1].jsonl", GOOD)
    assert files_of(bracketed) == [bracketed]
    rows, _ = load_rows([b, f"{tmp_path}/[ab].jsonl"])
    assert [(row.place, row.entry) for row in rows] == [(f"{b}:1", 0), (f"{a}:1", 1), (f"{b}:1", 1)]


def test_further_endings_and_paths(tmp_path, monkeypatch):
    for name in ("a.jsonlines", "a.ldjson", "a.jl", "a.csv", "a.tab", "a.text"):
        path = write(tmp_path / name, GOOD)
        assert len(load_rows(path, format="text" if name == "a.text" else "auto")[0]) == 1
        (tmp_path / name).unlink()
    path = write(tmp_path / "a b.jsonl", GOOD)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files_of("~/a b.jsonl") == files_of(f"file://{path}") == [path]
    assert files_of(f"file://localhost{path}") == [path]
    for bad, found in {"": "No such file", "x" * 5000: "File name too long"}.items():
        with pytest.raises(DataError, match=f"found: {found}"):
            files_of(bad)


def test_a_number_of_32_bits_keeps_its_text(tmp_path):
    table = pyarrow.table({"question": ["a", "b"], "answer": pyarrow.array([3.8, None], "float32")})
    parquet.write_table(table, tmp_path / "a.parquet")
    (row,), (bad,) = load_rows(str(tmp_path / "a.parquet"), on_bad_row="skip")
    assert row.messages[1]["content"] == "3.8"
    assert "answer: expected text, found NoneType" in bad.reason


def test_unfinished_files_and_other_kinds_of_a_folder(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    unfinished = [
        write(tmp_path / f"a.jsonl{ending}", GOOD)
        for ending in (".bak", ".crdownload", ".part", ".tmp", "~")
    ]
    assert files_of(str(tmp_path)) == [path]
    assert hidden_of(tmp_path) == unfinished
    for name in ("b.zip", "b.xlsx", "b.tar.gz", "b.sqlite", "b.feather"):
        other = Path(write(tmp_path / name, b""))
        assert "expected files of one kind and one split, found ." in refused(tmp_path)
        other.unlink()


def hidden_of(path):
    return [str(name) for name in files.list_files(str(path)).hidden]


def test_hidden_files_are_not_read_and_are_counted(tmp_path):
    names = ("a.jsonl", "b/c.jsonl", "b/_part.jsonl")
    hidden = (".a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", ".git/x/y.csv")
    hidden += ("b/.c/d.parquet", "__MACOSX/b/c.jsonl", "__MACOSX/._a.jsonl", ".c.jsonl.xz")
    for name in (*names, *hidden, ".git/HEAD", "__MACOSX/readme"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, GOOD)
    for path in (tmp_path, f"{tmp_path}/**/*"):
        found = [file for file in files_of(str(path)) if readers.data_suffix(Path(file))]
        assert found == sorted(f"{tmp_path}/{name}" for name in names)
        expected = {f"{tmp_path}/{name}" for name in hidden}
        assert {name for name in hidden_of(path) if name in expected} == expected
    assert hidden_of(tmp_path) == sorted(expected)
    assert hidden_of(f"{tmp_path}/*.jsonl") == [f"{tmp_path}/._a.jsonl", f"{tmp_path}/.a.jsonl"]
    described = files.describe_hidden(hidden_of(tmp_path))
    assert described == f"8 hidden files, such as {tmp_path}/{sorted(hidden)[0]}"
    for named in (".git/x", ".a.jsonl", "__MACOSX/b/*.jsonl", ".ipynb_checkpoints/*"):
        assert len(load_rows(str(tmp_path / named), on_bad_row="skip")[0]) < 2, named
        assert hidden_of(tmp_path / named) == []  # whoever names them wants them


def test_a_folder_of_hidden_files_alone(tmp_path):
    assert "a file that ends in one of these, nothing (relative" in refused(tmp_path)
    hidden = write(tmp_path / "._a.jsonl", GOOD)
    assert f"a file that ends in one of these, only 1 hidden file, {hidden[-9:]}" in refused(
        tmp_path
    )
    write(tmp_path / "rows.xlsx", b"PK")
    assert "a file that ends in one of these, only rows.xlsx (relative" in refused(tmp_path)
    (tmp_path / "rows.xlsx").unlink()
    assert "found: no file that fits the pattern" in refused(f"{tmp_path}/*")


def test_a_file_of_a_folder_that_cannot_be_read_is_not_overlooked(tmp_path):
    write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(GOOD))
    assert f"{tmp_path}/b.jsonl.xz: expected rows (docs/DATA.md), found an xz" in refused(tmp_path)


def shown_rows(path, place):
    section = Data(train_path=path)
    return [(row.line, type(row)) for row in files.select_rows(section, place)]


def test_the_row_at_a_line(tmp_path):
    table = write(
        tmp_path / "a.csv", b"question,answer", b"", b'"a', b'b",c', b"d,e", b'f,"g', b'"'
    )
    assert shown_rows(table, None) == [(3, Row)]
    found = {line: shown_rows(table, str(line)) for line in range(1, 9)}
    assert found == {1: [(3, Row)], 2: [(3, Row)], 3: [(3, Row)], 4: [(3, Row)], 5: [(5, Row)]} | {
        6: [(6, Row)],
        7: [(6, Row)],
        8: [],
    }
    lines = write(tmp_path / "a.jsonl", GOOD, b"", b"broken", GOOD)
    assert shown_rows(lines, None) == shown_rows(lines, "1") == [(1, Row)]
    assert shown_rows(lines, "2") == []
    assert shown_rows(lines, f"{lines}:3") == [(3, BadRow)]
    assert shown_rows(lines, "b.jsonl:3") == shown_rows(lines, "x") == shown_rows(lines, "5") == []
    both = [row.file for row in files.select_rows(Data(train_path=table, eval_path=lines), "4")]
    assert both == [table, lines]


def test_no_file(tmp_path):
    for name in ("no.jsonl", "*.jsonl", "", "no/folder/at/all"):
        reported = refused(tmp_path / name)
        assert reported.startswith(f"{tmp_path / name}: expected rows (.jsonl, ")
        assert reported.endswith("correct the path in the section data")
    assert "found: No such file or directory" in refused("missing.jsonl")
    assert "found: no file that fits the pattern" in refused(tmp_path / "*.jsonl")
    assert "found: a folder without a file" in refused(tmp_path)


@pytest.mark.parametrize(
    "names", [("a.jsonl", "LICENSE.txt"), ("data/train-0.csv", "data/test-0.csv")]
)
def test_a_folder_of_several_kinds_or_splits_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"")
    assert "expected files of one kind and one split, found " in refused(tmp_path)


def test_a_dataset_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    rows, _ = load_rows(str(tmp_path / "one"))
    assert asked(rows) == [row["question"] for row in ROWS]
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "train")
    assert asked(load_rows(str(tmp_path / "train"))[0]) == asked(rows)
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "both")
    assert "found train, test; give the one to use" in refused(tmp_path / "both")
    assert asked(load_rows(str(tmp_path / "both/test"))[0]) == asked(rows)
    for broken in ("{}", '{"_data_files": [1]}', '{"_data_files": [{"name": "a"}]}', "[]", "{"):
        (tmp_path / "one/state.json").write_text(broken)
        assert "expected _data_files of a saved dataset; save it again" in refused(tmp_path / "one")
    write(tmp_path / "secret.arrow", b"")
    outside = {"_data_files": [{"filename": "../secret.arrow"}]}
    (tmp_path / "one/state.json").write_text(json.dumps(outside))
    assert files_of(str(tmp_path / "one")) == [f"{tmp_path}/one/secret.arrow"]


def test_a_dataset_of_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked_for = []

    def load(*names, split):
        asked_for.append((*names, split))
        if names[0] == "a/missing":
            raise datasets.exceptions.DatasetNotFoundError("offline\nmore")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows, _ = load_rows("owner/name:main@test")
    assert asked(rows) == [row["question"] for row in ROWS]
    assert rows[1].place == "owner/name:main@test:2"
    assert refused("a/missing").startswith(
        "a/missing: no such file, and the hub gave no dataset owner/name:config@split of this "
        "name: offline; correct data.train_path"
    )
    assert asked_for == [("owner/name", "main", "test"), ("a/missing", None, "train")]


# --- memory ------------------------------------------------------------------------------------


def peak_of_reading(path):
    (source,) = sources(str(path))
    tracemalloc.start()
    assert sum(isinstance(row, Row) for row in read(source)) > 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "name",
    representatives(
        ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow", "a.txt"],
        ["a.jsonl", "a.parquet"],
    ),
)
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    peaks = []
    for num in (1_500, 6_000):
        rows = [{"question": f"{n} " * 20, "answer": "yes"} for n in range(num)]
        written = {
            "a.jsonl": in_jsonl,
            "a.jsonl.gz": lambda rows: gzip.compress(in_jsonl(rows)),
            "a.csv": in_csv,
            "a.parquet": in_parquet,
            "a.arrow": in_arrow,
            "a.txt": lambda rows: b"<|endoftext|>\n".join(r["question"].encode() for r in rows),
        }
        path = tmp_path / name
        path.write_bytes(written[name](rows))
        peaks.append(peak_of_reading(path))
    assert peaks[1] < 1.3 * peaks[0] + 100_000


# --- sets of rows ------------------------------------------------------------------------------


def rows_of(contents):
    return [
        Row([{"role": "assistant", "content": c}], None, "f", n) for n, c in enumerate(contents, 1)
    ]


def digests_of(contents):
    return np.array([content_digest(row) for row in rows_of(contents)], DIGEST)


@given(st.lists(st.integers(0, 20), max_size=60))
@pytest.mark.parametrize("dtype", [np.uint64, DIGEST])
def test_the_first_of_equal_ones(dtype, numbers):
    pairs = np.array([[number, 0] for number in numbers], np.uint64).reshape(-1, 2)
    keys = pairs.view(DIGEST).ravel() if dtype is DIGEST else pairs[:, 0]
    expected = [numbers.index(number) for number in numbers]
    assert first_equal(keys).tolist() == expected
    assert is_first(keys).tolist() == [n == first for n, first in enumerate(expected)]


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_split_is_a_partition_without_a_shared_content(contents, fraction, seed):
    digests = digests_of(contents)
    if len(set(contents)) < 2:
        with pytest.raises(DataError, match="needs two different rows, found 1"):
            split(digests, fraction, seed)
        return
    held = split(digests, fraction, seed)
    assert 0 < held.sum() < len(contents)
    texts = np.array(contents)
    assert not set(texts[held]) & set(texts[~held])
    assert (held == split(digests, fraction, seed)).all()


def test_split_sizes_and_seeds():
    digests = digests_of(map(str, range(200)))
    held_out = [split(digests, 0.1, seed) for seed in range(5)]
    assert [held.sum() for held in held_out] == [20] * 5
    assert len({held.tobytes() for held in held_out}) == 5
    assert not split(digests, 0.0, 0).any()
    assert split(digests_of("abc"), 0.5, 0).any()
    # the same contents are held out wherever the rows stand
    assert (split(digests[::-1], 0.1, 3)[::-1] == held_out[3]).all()


def test_digest_is_of_content():
    (row,) = rows_of("a")
    assert content_digest(row) == content_digest(Row(row.messages, None, "g", 9, 1))
    as_user = Row([{"role": "user", "content": "a"}], None, "f", 1)
    with_tools = Row(row.messages, [{"type": "function"}], "f", 1)
    others = [as_user, with_tools, *rows_of(["a ", "b"])]
    assert len({content_digest(other) for other in (row, *others)}) == 5


@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.lists(st.sampled_from([0.1, 0.5, 0.9, 1.0, 2.0, 2.5, 3.25]), min_size=3, max_size=3),
    st.integers(0, 5),
)
def test_mix_gives_each_row_as_often_as_its_entry_weighs(entries, weights, seed):
    entries = np.array(entries, np.uint16)
    mixed = mix(entries, weights, seed)
    assert (mixed == mix(entries, weights, seed)).all()
    times = np.bincount(mixed, minlength=len(entries))
    for entry, weight in enumerate(weights):
        mine = times[entries == entry]
        assert set(mine) <= {int(weight), int(weight) + (weight % 1 > 0)}
        assert mine.sum() == int(weight) * len(mine) + round(weight % 1 * len(mine))


def test_mix_draws_by_seed():
    entries = np.zeros(100, np.uint16)
    drawn = {tuple(mix(entries, [0.5], seed).tolist()) for seed in range(5)}
    assert {len(rows) for rows in drawn} == {50}
    assert len(drawn) == 5
    assert all(list(rows) == sorted(rows) for rows in drawn)
    assert mix(entries, [1.0], 0).tolist() == list(range(100))


def test_num_rows_is_reported_without_reading_rows(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_bytes((GOOD + b"\n") * 7)
    table = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), table)
    assert num_rows([str(lines), str(table)]) == 9
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(GOOD))
    assert num_rows(str(packed)) is None
    assert num_rows(str(write(tmp_path / "d.json", b"[" + GOOD + b"]"))) is None
