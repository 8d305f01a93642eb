"""Files -> rows: each format, each kind of bad row with its place, the split and the digest."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.data import DataError, Row, digest, load_rows, split

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD = b'{"question": "Hi", "answer": "Hello"}'
ROWS = (
    ({"messages": HELLO, "id": 7}, HELLO),
    ({"prompt": "Hi", "completion": "Hello"}, HELLO),
    ({"question": "Hi", "answer": "Hello"}, HELLO),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, HELLO),
    ({"instruction": "Hi", "output": "Hello"}, HELLO),
    (
        {"instruction": "Add", "input": "1, 2", "output": " 3\n"},
        [{"role": "user", "content": "Add\n\n1, 2"}, {"role": "assistant", "content": " 3\n"}],
    ),
)


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# source of the row, the reason told
BAD = {
    "broken": (b'{"question": "Hi"', "not valid JSON (Expecting ',' delimiter, column 18)"),
    "two objects": (GOOD + GOOD, "not valid JSON (Extra data, column 38)"),
    "raw control": (b'{"question": "a\x00b"}', "not valid JSON (Invalid control character at"),
    "not an object": (b'"Hi"', "expected an object, found str"),
    "duplicate key": (b'{"answer": "a", "answer": "b"}', "the key 'answer' is given twice"),
    "duplicate below": (
        b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
        "the key 'role' is given twice",
    ),
    "nan": (b'{"question": "Hi", "answer": "a", "score": NaN}', "NaN is not a JSON value"),
    "infinity": (b'{"question": "Hi", "answer": -Infinity}', "-Infinity is not a JSON value"),
    "huge number": (b'{"question": 1' + b"0" * 5000 + b"}", "Exceeds the limit"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "no format": ({"text": "a"}, "expected the keys of one format (messages, prompt/completion,"),
    "half a format": ({"prompt": "a"}, "question/answer, instruction/output), found ['prompt']"),
    "two formats": (
        {"prompt": "a", "completion": "b", "messages": HELLO},
        "found ['completion', 'messages', 'prompt']",
    ),
    "tools": ({"messages": HELLO, "tools": "[{}]"}, "tools are not supported"),
    "no list": ({"messages": "Hi"}, "messages: expected a list, found str"),
    "no messages": ({"messages": []}, "no assistant turn, so nothing to learn"),
    "no assistant": (chat(("user", "a")), "no assistant turn, so nothing to learn"),
    "last is user": (chat(("assistant", "a"), ("user", "b")), "the last turn is the user's"),
    "message": ({"messages": ["Hi"]}, "message 1: expected an object, found str"),
    "role": (chat(("user", "a"), ("bot", "b")), "message 2: unknown role 'bot', expected one of"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1: unknown role None"),
    "role is a list": (chat((["user"], "a")), "message 1: unknown role ['user']"),
    "more keys": (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]},
        "message 1: would not be rendered: tool_calls",
    ),
    "empty": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "blank": (chat(("user", " \n\t"), ("assistant", "b")), "message 1: content is blank"),
    "blank input": ({"instruction": "a", "input": " ", "output": "b"}, "input is blank"),
    "null": ({"question": None, "answer": "b"}, "question: expected text, found NoneType"),
    "null input": (
        {"instruction": "a", "input": None, "output": "b"},
        "input: expected text, found NoneType",
    ),
    "number": ({"question": "a", "answer": 4}, "answer: expected text, found int"),
    "parts": (
        chat(("assistant", [{"text": "a"}])),
        "message 1: content: expected text, found list",
    ),
    "NUL": ({"question": "a", "answer": "b\0"}, "answer contains a NUL character"),
    "surrogate": (
        b'{"question": "a", "answer": "\\ud83d"}',
        "answer contains a lone surrogate (U+D83D)",
    ),
    "not UTF-8": (b'{"question": "caf\xe9"}', "not UTF-8 text (byte 0xe9 at 17)"),
}
KINDS = [pytest.param(*case, id=name) for name, case in BAD.items()]


def write(path, *sources):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in sources]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.mark.parametrize(("row", "messages"), ROWS)
def test_formats(tmp_path, row, messages):
    lines = write(tmp_path / "rows.jsonl", GOOD, row)
    assert load_rows(lines)[1] == Row(messages, lines, 2)
    items = tmp_path / "rows.json"
    items.write_text(json.dumps([ROWS[0][0], row], indent=2))
    assert load_rows(str(items))[1] == Row(messages, str(items), 2)


@pytest.mark.parametrize(("bad", "reason"), KINDS)
def test_bad_line(tmp_path, bad, reason):
    path = write(tmp_path / "rows.jsonl", GOOD, b"", bad, GOOD)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert caught.value.exit_code == 3
    first, told = str(caught.value).split("\n")
    assert first == f"{path}: 1 bad row; correct or remove them, none is skipped"
    assert told.startswith(f"  {path}:3: ")
    assert reason in told
    assert told.endswith('"')


@pytest.mark.parametrize("kind", BAD)
def test_bad_item_of_a_list(tmp_path, kind):
    bad, reason = BAD[kind]
    source = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + GOOD + b",\n" + source + b"]")
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    message = str(caught.value)
    if kind in ("broken", "two objects", "raw control", "huge number", "deep", "not UTF-8"):
        assert message.startswith(f"{path}: the list cannot be read: {reason.split(' (')[0]}"[:70])
    else:
        assert f"\n  {path}:2: " in message
        assert reason in message


def test_all_bad_rows_are_counted_and_ten_are_listed(tmp_path):
    bad = [{"question": f"q{i}", "answer": ""} for i in range(13)]
    path = write(tmp_path / "rows.jsonl", *[row for b in bad for row in (GOOD, b)])
    with pytest.raises(DataError) as caught:
        load_rows(path)
    first, *listed, more = str(caught.value).split("\n")
    assert "13 bad rows" in first
    places = [line.split(": ")[0].strip() for line in listed]
    assert places == [f"{path}:{2 * n}" for n in range(1, 11)]
    assert listed[2] == f'  {path}:6: answer is empty: "{json.dumps(bad[2])}"'
    assert more.strip() == "... and 3 more"


def test_excerpt_is_one_short_printable_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", b'{"question": "\x1b[31m \xff' + b"a" * 200)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    excerpt = str(caught.value).split(': "', 1)[1]
    assert excerpt.startswith('{"question": "\\x1b[31m \\xffaaa')
    assert excerpt.endswith('a..."')
    assert len(excerpt) < 80


def test_what_stands_around_rows(tmp_path):
    """BOM, CRLF, blank lines, a line separator inside a string, no newline at the end."""
    path = tmp_path / "rows.jsonl"
    inner = '{"question": "a\u2028b", "answer": "é"}'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n \t\r\n\n" + inner)
    rows = load_rows(str(path))
    assert [(row.line, row.messages[0]["content"]) for row in rows] == [(1, "Hi"), (4, "a\u2028b")]
    path.write_bytes(b"\xef\xbb\xbf \n[" + inner + b"\n ,\n" + GOOD + b"]\n")
    assert [(row.line, row.messages[1]["content"]) for row in load_rows(str(path))] == [
        (1, "é"),
        (2, "Hello"),
    ]


def test_max_rows_reads_no_further(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, b"", GOOD, b"broken")
    assert [row.line for row in load_rows(path, max_rows=2)] == [1, 3]
    with pytest.raises(DataError, match=":4: not valid JSON"):
        load_rows(path, max_rows=3)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"\xef\xbb\xbf", b"\xef\xbb\xbf[ ]\n"])
def test_no_rows(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows.jsonl: expected rows .* found none"):
        load_rows(str(path))


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"no.jsonl: expected a JSONL .* No such file.* correct"):
        load_rows(str(tmp_path / "no.jsonl"))
    with pytest.raises(DataError, match=r"expected a JSONL .* Is a directory"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("tail", [b"", b",", b"] x"])
def test_broken_list(tmp_path, tail):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + GOOD + tail)
    with pytest.raises(
        DataError, match=r"rows.json: the list cannot be read: not valid JSON .*line"
    ):
        load_rows(str(path))


# --- split and digest --------------------------------------------------------------------------


def rows_of(contents):
    return [Row([{"role": "assistant", "content": c}], "f", n) for n, c in enumerate(contents, 1)]


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_split_is_a_partition_without_a_shared_content(contents, fraction, seed):
    rows = rows_of(contents)
    if len(set(contents)) < 2:
        with pytest.raises(DataError, match="needs two different rows, found 1"):
            split(rows, fraction, seed)
        return
    train, held_out = split(rows, fraction, seed)
    assert sorted(row.line for row in train + held_out) == [row.line for row in rows]
    assert train
    assert held_out
    texts = [{row.messages[0]["content"] for row in part} for part in (train, held_out)]
    assert not texts[0] & texts[1]
    assert (train, held_out) == split(rows, fraction, seed)
    assert all([r.line for r in part] == sorted(r.line for r in part) for part in (train, held_out))


def test_split_sizes_and_seeds():
    rows = rows_of(map(str, range(200)))
    held_out = [split(rows, 0.1, seed)[1] for seed in range(5)]
    assert [len(part) for part in held_out] == [20] * 5
    assert len({tuple(row.line for row in part) for part in held_out}) == 5
    assert split(rows, 0.0, 0) == (rows, [])
    assert [row.line for row in split(rows_of("abc"), 0.5, 0)[1]] != []
    # the same contents are held out wherever the rows stand
    turned = split(rows[::-1], 0.1, 3)[1]
    assert sorted(row.line for row in turned) == [row.line for row in held_out[3]]


def test_digest_is_of_content_and_order():
    assert digest(rows_of("ab")) == digest([Row(r.messages, "g", 9) for r in rows_of("ab")])
    assert len({digest(rows_of(c)) for c in ("ab", "ba", "a", "abb", ["a b"], ["a", "b "])}) == 6
    as_user = [Row([{"role": "user", "content": "a"}], "f", 1)]
    assert digest(as_user) != digest(rows_of("a"))
    assert len(digest([])) == 64
