"""CSV: the delimiter is found, or the file is refused; it is never read in a way not meant."""

from __future__ import annotations

import csv
import io
from contextlib import suppress

import pytest
from conftest import load_rows
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sft.data import delimiters, files
from sft.errors import DataError


def raw_rows(path, **options):
    return [value for _, value in files.read_raw(str(path), **options)]


def refused(path, **options):
    with pytest.raises(DataError) as caught:
        load_rows(str(path), **options)
    return str(caught.value)


@pytest.mark.parametrize("delimiter", delimiters.CANDIDATES)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_each_delimiter_is_found(tmp_path, delimiter, name, ending):
    cells = [["question", "answer"], ["1,5; or 2|3\t?", 'a "b"'], ["two\nlines", "yes, it is"]]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=ending).writerows(cells)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    rows, _ = load_rows(str(tmp_path / name))
    assert [[m["content"] for m in row.messages] for row in rows] == cells[1:]
    assert [row.line for row in rows] == [2, 3]


@pytest.mark.parametrize("name", ["{", "["])
def test_a_header_that_begins_with_a_bracket_is_no_json(tmp_path, name):
    (tmp_path / "a.csv").write_text(f"{name},answer\na,b\n")
    assert raw_rows(tmp_path / "a.csv") == [{name: "a", "answer": "b"}]


def test_excel_names_the_delimiter(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfsep=^\r\nquestion^answer\r\na^b\r\n")
    (row,), _ = load_rows(str(tmp_path / "a.csv"))
    assert (row.line, row.messages[1]["content"]) == (3, "b")


def test_the_key_names_the_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text("question^answer\nHi^Hello\nBye^See you\n")
    assert "found cells that '^' seems to separate; save it with commas" in refused(
        tmp_path / "a.csv"
    )
    rows, _ = load_rows(str(tmp_path / "a.csv"), csv_delimiter="^")
    assert len(rows) == 2


def test_a_file_that_two_delimiters_fit_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("question;answer,note\na;b,c\n")
    message = refused(tmp_path / "a.csv")
    assert "found cells that ',' and ';' could separate equally well; set data.csv_delim" in message
    rows = raw_rows(tmp_path / "a.csv", csv_delimiter=";")
    assert rows == [{"question": "a", "answer,note": "b,c"}]


def test_bad_records_do_not_change_the_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text("question;answer\na;b\nc,d\ne;f;g\nh;i, j\n")
    rows, bad = load_rows(str(tmp_path / "a.csv"), on_bad_row="skip")
    assert [row.line for row in rows] == [2, 5]
    assert [row.line for row in bad] == [3, 4]


def test_one_column_needs_no_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"Once upon a time, so; it | goes"\nShort\n')
    assert len(load_rows(str(tmp_path / "a.csv"))[0]) == 2


def test_lines_that_end_in_a_carriage_return(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"question,answer\ra,b\rc,d\r")
    assert "found lines that end in a carriage return alone" in refused(tmp_path / "a.csv")


def test_a_file_longer_than_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(delimiters, "SAMPLE_LINES", 3)
    (tmp_path / "a.csv").write_text('question;answer\n"a\nb\nc";d\n' * 1 + "e;f\n" * 9)
    assert len(load_rows(str(tmp_path / "a.csv"))[0]) == 10


CELLS = st.text(
    st.one_of(st.sampled_from(',;\t|"\n\r ^:a1'), st.characters(codec="utf-8")), max_size=8
)


@st.composite
def tables(draw):
    width = draw(st.integers(2, 4))
    cells = CELLS.filter(lambda cell: "\0" not in cell)
    header = draw(st.lists(cells, min_size=width, max_size=width, unique=True))
    rows = draw(st.lists(st.lists(cells, min_size=width, max_size=width), max_size=6))
    return header, rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    tables(),
    st.sampled_from(delimiters.CANDIDATES),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_csv_writes_is_read_back_or_refused(tmp_path, table, delimiter, quoting, ending):
    header, rows = table
    if quoting == csv.QUOTE_MINIMAL:  # a carriage return before the end of a line is not quoted
        header, *rows = ([cell.replace("\r", "R") for cell in row] for row in (header, *rows))
        assume(len(set(header)) == len(header))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=ending)
    writer.writerows([header, *rows])
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    written = [dict(zip(header, row, strict=True)) for row in rows]
    with suppress(DataError):
        assert raw_rows(path) == written
    assert raw_rows(path, csv_delimiter=delimiter) == written


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_column_that_is_named_twice_is_what_is_reported(tmp_path, delimiter):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,answer\na,b,c\n".replace(",", delimiter))
    with pytest.raises(DataError, match="names each column once, found the column 'answer' twice"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("lines", "delimiter"),
    [
        (["x,x,y;z\n", "1,2,3;4\n"], ";"),  # commas name a column twice
        (["a,b;c\n", '1,"2"3;4\n'], ";"),  # with commas, a quote ends inside a cell
        (["a:b\n"], ","),  # one line says nothing of another character
    ],
)
def test_a_candidate_that_does_not_fit_stands_in_no_way(lines, delimiter):
    assert delimiters.find_delimiter(lines, True, ",") == delimiter
