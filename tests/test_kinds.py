"""Files that hold no rows: each is named, with what to do, in one message."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import pickle
import shlex
import sqlite3
import subprocess
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import load_rows
from hypothesis import given
from hypothesis import strategies as st

from sft.data import kinds, readers
from sft.errors import DataError

ROWS = [{"question": f"q{n}", "answer": "ä"} for n in range(3)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def zipped(*names):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, LINES)
    return sink.getvalue()


def tarred():
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(LINES)
        archive.addfile(member, io.BytesIO(LINES))
    return sink.getvalue()


def saved(save):
    sink = io.BytesIO()
    save(sink)
    return sink.getvalue()


def database(folder):
    connection = sqlite3.connect(folder / "made.db")
    connection.execute("create table rows (question, answer)")
    connection.commit()
    connection.close()
    return (folder / "made.db").read_bytes()


BINARY = {
    "rows.xz": (lzma.compress(LINES), "an xz archive; decompress it (xz -dk "),
    "rows.jsonl": (bz2.compress(LINES), "bzip2 data; decompress it (bzip2 -dk "),
    "empty.jsonl": (bz2.compress(b""), "bzip2 data; decompress it (bzip2 -dk "),
    "rows.zip": (zipped("rows.jsonl"), "a zip archive; unpack it"),
    "rows.csv": (zipped("xl/workbook.xml"), "an Excel workbook; save the sheet as CSV"),
    "rows.docx": (zipped("word/document.xml"), "a Word document; save it as text"),
    "rows.tar": (tarred(), "a tar archive; unpack it and give the files in it (tar -xf "),
    "rows.tar.gz": (gzip.compress(tarred()), "a tar archive; unpack it"),
    "rows.zip.gz": (gzip.compress(zipped("a")), "a zip archive; unpack it"),
    "rows.7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive; unpack it"),
    "rows.pt": (saved(lambda file: torch.save(ROWS, file)), "a PyTorch file (a pickle), which is"),
    "rows.npy": (saved(lambda file: np.save(file, np.zeros(3))), "a NumPy array; write its rows"),
    "rows.npz": (saved(lambda file: np.savez(file, np.zeros(3))), "NumPy arrays; write its rows"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git"),
    "page.jsonl": (b"\n<!DOCTYPE html><html>", "a web page (HTML); download the file itself"),
    "page.csv": (b"<html lang=en>\n<body>", "a web page (HTML); download the file itself"),
    "rows.xml": (b"<?xml version='1.0'?>", "an XML file; write its rows as JSON lines"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES)), "data that gzip compressed twice; de"),
    "none.zip": (zipped(), "an empty zip archive; give the files themselves"),
    "rows.lzma": (lzma.compress(LINES, lzma.FORMAT_ALONE), "LZMA data; decompress it (xz -dk --f"),
    "lost.jsonl": (b"\0" * 5000, "NUL bytes alone, so its content was never written; copy or make"),
    "rows.rtf": (b"{\\rtf1\\ansi Once}", "a document (RTF); save it as text in UTF-8"),
    "page.txt": (b"\x89PNG\r\n\x1a\n", "an image; only text can be trained on"),
    "rows.orc": (b"ORC\n", "an ORC table; write its rows as JSON lines or Parquet"),
    "rows.avro": (b"Obj\1\4", "an Avro file; write its rows as JSON lines or Parquet"),
    "rows.feather": (b"FEA1\0\0", "a table of Feather's first version; write its rows as JSON"),
    "rows.pdf": (b"%PDF-1.7\n", "a PDF document; extract its text"),
    **{
        f"rows{protocol}.jsonl": (pickle.dumps(ROWS, protocol), "a pickle, which is never loaded")
        for protocol in (2, 3, 4, 5)
    },
}


def refused(path, **options):
    with pytest.raises(DataError) as caught:
        load_rows(str(path), **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected rows (docs/DATA.md), found ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", BINARY)
def test_a_binary_file_is_named(tmp_path, name):
    content, found = BINARY[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert f", found {found}" in refused(path, on_bad_row="skip")


def test_a_database_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(database(tmp_path))
    assert f"found an SQLite database; export a table: sqlite3 -csv -header {path}" in refused(path)


def test_html_may_be_a_text_to_learn(tmp_path):
    path = tmp_path / "page.txt"
    path.write_text("<!doctype html><p>Once")
    assert len(load_rows(str(path))[0]) == 1


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_no_text_is_taken_for_a_binary_file(text):
    found = kinds.refused_kind("a.txt", text.encode(), ".txt")
    assert found is None or text.startswith(("%PDF-", kinds.POINTER.decode()))


CODECS = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_in_a_wide_encoding_is_named(tmp_path, codec, name, mark):
    text = {"a.csv": "question,answer\nä,ö\n", "a.txt": "Once upon", "a.json": json.dumps(ROWS)}
    path = tmp_path / name
    path.write_bytes((mark + text.get(name, LINES.decode())).encode(codec))
    family = codec[:6].upper()
    name = (
        f"{family} text" if mark else f"{codec.upper().replace('-LE', 'LE').replace('-BE', 'BE')}"
    )
    message = refused(path)
    assert f"found {name}" in message
    command = shlex.split(message.split("save it as UTF-8: ")[1].removesuffix(" > rows"))
    made = subprocess.run(command, capture_output=True, check=True).stdout.decode("utf-8-sig")
    assert made == text.get(path.name, LINES.decode())
    assert ("without a byte order mark" in message) == (not mark)


@given(st.text(min_size=4), st.sampled_from(["", "{"]))
def test_text_in_utf8_is_never_taken_for_another_encoding(text, start):
    data = (start + text.replace("\0", "")).encode()
    assert kinds._wide_encoding(data) == ""


def test_words_without_a_mark_are_recognised_in_any_script():
    for text in ("質問,答え\nあ,い\n", "Вопрос\nОтвет\n", "질문\n답 하나\n"):
        for codec in CODECS:
            assert kinds._wide_encoding(text.encode(codec)) == codec.upper().replace(
                "-LE", "LE"
            ).replace("-BE", "BE")
    for other in (
        b"abc\0def",
        zlib.compress(LINES),
        b"\0\1\0\0Standard Jet DB\0",
        b"a" * 99 + b"\0",
    ):
        assert kinds._wide_encoding(other) == ""


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=4))
def test_ascii_in_a_wide_encoding_is_recognised(text):
    for codec in CODECS:
        assert kinds._wide_encoding(text.encode(codec)).startswith(codec[:6].upper())
    assert kinds._wide_encoding(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))


# --- JSON around the rows ------------------------------------------------------------------------

AROUND = {
    "one key": ({"data": ROWS}, "one object with 3 rows in its key 'data'; write each row on a"),
    "a quoted key": ({"my 'data'": ROWS}, "one object with 3 rows in its key \"my 'data'\"; "),
    "with a version": ({"version": 1, "data": ROWS}, "one object with 3 rows in its key 'data'"),
    "splits": ({"train": ROWS, "test": ROWS}, "one object with rows in several keys ('train', 't"),
    "by id": ({"a": ROWS[0], "b": ROWS[1]}, "one object with a row in each of its 2 keys; write"),
    "deep": ({"a": {"rows": ROWS}}, "one object with 3 rows in its key 'a.rows'; write each row"),
    "one by id": (
        {"a": ROWS[0]},
        "one object with a row in each of its 1 keys; write each row on a",
    ),
    "other columns": (
        {"prompts": [1, 2], "answers": [3, 4]},
        "one object of columns ('prompts', 'an",
    ),
    "columns of pandas": (
        {"question": {"0": "a", "1": "b"}, "answer": {"0": "c", "1": "d"}},
        "one object of columns ('question', 'answer'); write one row on a line, in pandas: ",
    ),
    "columns": (
        {"question": ["a", "b"], "answer": ["c", "d"]},
        "one object of columns ('question', 'answer'); write one row on a line, in pandas: ",
    ),
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_an_object_around_the_rows(tmp_path, kind, indent, name):
    value, found = AROUND[kind]
    path = tmp_path / name
    path.write_text(json.dumps(value, indent=indent))
    assert f", found {found}" in refused(path, on_bad_row="skip")


def test_what_is_proposed_for_an_object_is_a_command_that_works(tmp_path):
    path = tmp_path / "it's.json"
    path.write_text(json.dumps({"my 'data'": ROWS}))
    command = refused(path).split("own: ")[1].removesuffix(" > rows.jsonl")
    assert shlex.split(command) == ["jq", "-c", ".[\"my 'data'\"][]", str(path)]


def test_a_row_over_several_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[0], indent=2) + "\n")
    assert "found one JSON object over 4 lines; write each row on a line of its own: jq -c . " in (
        refused(path)
    )
    path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))
    assert "found JSON objects over several lines each; write each row on a" in refused(path)


JOINED = {
    "\r": "several JSON objects on a line; write each row on a line of its own: jq -c . ",
    "": "several JSON objects on a line; write each row on a line of its own: jq -c . ",
    ", ": "commas between the rows; remove them: sed ",
    ",\n": "commas between the rows; remove them: sed ",
}


@pytest.mark.parametrize("between", JOINED)
def test_rows_that_line_ends_do_not_part(tmp_path, between):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(between.join(map(json.dumps, ROWS)).encode())
    assert f", found {JOINED[between]}" in refused(path, on_bad_row="skip")


def test_a_list_on_each_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(f"{json.dumps(talk)}\n{json.dumps(talk)}\n")
    assert (
        "found a list on each line; write each row on a line of its own: jq -c '{messages: .}'"
        in (refused(path))
    )
    path.write_text(f"{json.dumps(ROWS)}\n{json.dumps(ROWS)}\n")
    assert "a list on each line; write each row on a line of its own: jq -c '.[]' " in refused(path)


def test_rows_over_several_lines_in_a_file_too_large_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 2**16)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [ROWS[0]] * 5000}, indent=2))
    assert "found JSON objects over several lines each" in refused(path)
    path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS * 2000))
    assert "found JSON objects over several lines each" in refused(path)


def test_a_bad_first_line_is_a_bad_row_and_no_more(tmp_path):
    path = tmp_path / "rows.jsonl"
    for first in (b'{"question": "Hi"', b"{", b"{}}", b"nonsense", b'{"question": "a\\'):
        path.write_bytes(first + b"\n" + LINES)
        rows, bad = load_rows(str(path), on_bad_row="skip")
        assert (len(rows), [row.line for row in bad]) == (3, [1]), first


def test_one_row_in_a_line_is_a_row(tmp_path):
    path = tmp_path / "rows.json"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in (ROWS[0], {"messages": talk}, {"messages": talk, "meta": [{}]}):
        path.write_text("\n" + json.dumps(row) + "\n\n")
        assert len(load_rows(str(path))[0]) == 1
    path.write_text(json.dumps({"data": talk}))
    assert len(load_rows(str(path), columns={"messages": "data"})[0]) == 1
    assert "found one object with 2 rows in its key 'data'" in refused(path)
