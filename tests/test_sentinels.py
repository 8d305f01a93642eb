"""What stands around the values of a turn: sentinels take their places, and each form fits."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from faults import catalogue
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft.data import sentinels
from sft.data.rendering import MARKS, Renderings
from sft.data.sentinels import Frame, Slot
from sft.errors import DataError

ASK: dict[str, Any] = {"role": "user", "content": "a"}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, **more: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, **more}}


# --- values and sentinels ------------------------------------------------------------------------

NESTED = {"x": "v0", "y": ["v1", {"z": "v2", "n": 7}], "flag": True, "none": None, "blank": " "}
STANDS_IN = {  # a turn -> the same with sentinels, and what they stand for
    "content": (answer("b"), answer("W0e"), [Slot("content", "b")]),
    "blank": (answer(" \n"), answer(" \n"), []),
    "parts": (
        answer([{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]),
        answer([{"type": "text", "text": "W0e"}, {"type": "text", "text": "W1e"}]),
        [Slot("content", "b"), Slot("content", "c")],
    ),
    "thoughts": (
        answer("<think>b</think>", reasoning_content="so"),
        answer("W1e", reasoning_content="W0e"),
        [Slot("thoughts", "so"), Slot("content", "<think>b</think>")],
    ),
    "a block of thoughts": (
        answer("<think>\nso\n</think>\n\nb"),
        answer("<think>\nW0e\n</think>\n\nW1e"),
        [Slot("thoughts", "so"), Slot("content", "b")],
    ),
    "an empty block": (
        answer("<think>\n\n</think>\n\nb"),
        answer("<think>\n\n</think>\n\nW0e"),
        [Slot("content", "b")],
    ),
    "calls": (
        answer("", tool_calls=[call("f", arguments=NESTED), call("g")]),
        answer(
            "",
            tool_calls=[
                call("W0e", arguments={**NESTED, "x": "W1e", "y": ["W2e", {"z": "W3e", "n": 7}]}),
                call("W4e", arguments={}),
            ],
        ),
        [
            Slot("the name of a call", "f"),
            *(Slot("an argument", value) for value in ("v0", "v1", "v2")),
            Slot("the name of a call", "g"),
        ],
    ),
}


@pytest.mark.parametrize("name", STANDS_IN)
def test_a_sentinel_stands_in_place_of_each_text(name):
    message, expected, slots = STANDS_IN[name]
    before = json.dumps(message)
    assert sentinels.stand_in(message, "W") == (expected, slots)
    assert json.dumps(message) == before


FORMS = {  # a value and its forms, in the order in which they are sought
    "XaX": ["XaX"],
    ' "é"\n': [
        *(' "é"\n', ' "é"', '"é"\n', '"é"'),
        *(r" \"é\"\n", r" \\\"é\\\"\\n", r" \"\u00e9\"\n", r" \\\"\\u00e9\\\"\\n", r' "é"\n'),
    ],
    "\n a \n": ["\n a \n", "\n a ", "\n a", " a \n", "a \n", " a ", "a", r"\n a \n", r"\\n a \\n"],
}


@pytest.mark.parametrize("value", FORMS)
def test_the_forms_in_which_templates_write_a_value(value):
    assert list(dict.fromkeys(sentinels.forms(value))) == FORMS[value]


TEXTS = st.text(st.sampled_from(' \n"\\é<ab'), max_size=4)
PIECES = st.lists(st.tuples(TEXTS, st.integers(0, 11), TEXTS), min_size=1, max_size=4)


def split(parts: list[tuple[str, int, str]], last: str) -> tuple[list[str], list[Slot], str]:
    """Returns the pieces around values, the values, and a text with a form of each."""
    pieces, text = [], ""
    for number, (before, form, value) in enumerate(parts):
        pieces += [before, str(number)]
        forms = [*sentinels.forms(value)]
        text += before + forms[form % len(forms)]
    return [*pieces, last], [Slot("content", value) for _, _, value in parts], text + last


@settings(max_examples=200, deadline=None)
@given(parts=PIECES)
def test_a_text_fits_where_each_value_has_one_of_its_forms(parts):
    # Pieces begin and end in a tag, so that no form of a value runs into the next piece.
    parts = [(f">{before}<", form, value) for before, form, value in parts]
    pieces, slots, text = split(parts, "><")
    assert sentinels._misfit(text, pieces, slots) is None
    assert sentinels._misfit(text + "!", pieces, slots) == len(slots) - 1
    assert sentinels._misfit("!" + text, pieces, slots) == 0
    for number, (before, _, _) in enumerate(parts):
        place = len(split(parts[:number], before)[2])
        assert sentinels._misfit(text[:place] + "!" + text[place:], pieces, slots) == number
        *_, cut = split(parts[:number], "")
        assert sentinels._misfit(cut, pieces, slots) == max(0, number - 1)


def test_a_text_without_values_fits_if_it_is_the_piece():
    fits = [sentinels._misfit(text, ["a"], []) for text in ("a", "ab", "b")]
    assert fits == [None, 0, 0]


def test_keys_and_numbers_of_an_argument_are_literals():
    value = {"a": 1, "b c": [2, {"é": 3, 'd"': 4, "e\\": 5, "f\n": 6}], "g": [True, None, 7.5, "8"]}
    assert list(sentinels._literals(value)) == ["a", "1", "b c", "2", "3", "4", "5", "6", "g"]


# --- tags ----------------------------------------------------------------------------------------

TAGS = ["<think>", "</think>", "<b>", "</s>", "<|a|>", "< b>", "<b", "x", " ", "\n", "zq7s"]
TAGGED = st.lists(st.sampled_from(TAGS), max_size=6).map("".join)
TAG = re.compile(r"</?\w+>")
BLOCK = re.compile(r"(?s)\s*<think>.*?</think>\s*")


@settings(max_examples=100, deadline=None)
@given(content=TAGGED, thoughts=TAGGED)
@example(content="<think>\n<b></think> <b>", thoughts="")
def test_hidden_tags_are_shown_again(content, thoughts):
    tokenizer = catalogue.tokenizer(bos="</s>")
    parts = [{"type": "text", "text": content}, {"type": "text", "text": thoughts}]
    for message in (
        answer(content),
        *(answer(each, reasoning_content="<b>" + thoughts) for each in (content, parts)),
        answer(parts),
    ):
        rendered = Renderings(tokenizer, [ASK, message])
        hidden = sentinels.hide_tags(rendered, message)
        assert message.keys() == hidden.keys()
        for key in message.keys() - {"role"}:
            is_text = isinstance(message[key], str)
            texts, expected = (
                [value] if is_text else [part["text"] for part in value]
                for value in (hidden[key], message[key])
            )
            block = BLOCK.match(content) if message == answer(content) else None
            start = block.end() if block else 0
            assert not TAG.search("|".join(texts)[start:])
            assert texts[0][:start] == expected[0][:start]
            shown = [sentinels.show_tags(rendered, text[start:]) for text in texts]
            marked = "</s>".join(MARKS)
            assert shown == [text[start:].replace("</s>", marked) for text in expected]


# --- confirming ----------------------------------------------------------------------------------

LONG = "L" * 60
SILENT = "{% for m in messages %}{{ m.content if m.role == 'user' }}.{% endfor %}"


class Template:
    """Confirms turns against a template, given as a function, and counts what it is asked."""

    def __init__(self, source: str, write: Any):
        self.tokenizer, self.write, self.asked = catalogue.tokenizer(source), write, 0

    def trace(self, message: dict[str, Any]) -> str | None:
        self.asked += 1
        return self.write(message)

    def confirm(self, message: dict[str, Any], is_usual: bool = True, body: str = "") -> Frame:
        rendered = Renderings(self.tokenizer, [ASK, message])
        said = rendered.messages[1]
        body = body or self.write(said)
        return sentinels.confirm(rendered, 1, body, 1, self.trace, is_usual)


def frame_of(message: dict[str, Any]) -> str:
    return f"[{message['content'].strip()}]"


def test_the_text_around_plain_contents_is_asked_for_once():
    template = Template("once" + SILENT, frame_of)
    for content in ("b", "c", " d\n", "[e]"):
        assert template.confirm(answer(content)) == Frame("[", "]", False)
    assert template.asked == 1
    for body in ("[b", "b]", "[c]"):
        with pytest.raises(DataError, match="alters or drops what assistant turn 1 says"):
            template.confirm(answer("b"), body=body)
    assert template.asked == 4
    template.confirm(answer("<think>so</think>b"))
    template.confirm(answer("b", reasoning_content="so"))
    template.confirm(answer("b"), is_usual=False)
    assert template.asked == 7


def test_no_more_than_eight_frames_are_kept():
    template = Template("eight" + SILENT, None)
    for expected in (9, 10):
        for number in range(9):
            template.write = lambda message, number=number: f"{number}[{message['content']}]"
            assert template.confirm(answer("b")) == Frame(f"{number}[", "]", False)
        assert template.asked == expected


def test_a_frame_around_another_turn_is_not_kept():
    template = Template("others" + SILENT, frame_of)
    template.confirm(answer("b"), is_usual=False)
    template.confirm(answer("b", reasoning_content="so"))
    assert template.asked == 2
    template.confirm(answer("b"))
    assert template.asked == 3


WITH_THOUGHTS = Frame("<", ">", True)


@pytest.mark.parametrize(
    ("message", "write", "expected"),
    [
        (
            answer("b", reasoning_content="so"),
            lambda m: f"<{m['reasoning_content']}|{m['content']}>",
            WITH_THOUGHTS,
        ),
        (answer("b", reasoning_content="so"), frame_of, Frame("[", "]", False)),
        (answer("<think>so</think>b"), lambda m: f"<{m['content'][7:]}>", WITH_THOUGHTS),
        (answer(" "), lambda m: "<>", Frame("<>", "<>", False)),
    ],
)
def test_thoughts_are_seen_where_the_template_writes_them(message, write, expected):
    assert Template(SILENT, write).confirm(message) == expected


def calls(message: dict[str, Any]) -> str:
    return json.dumps([each["function"] for each in message["tool_calls"]])


@pytest.mark.parametrize(
    ("message", "write", "missing"),
    [
        (answer(LONG), lambda m: "[]", f"content \\('{LONG[:40]}'\\)"),
        (
            answer("", tool_calls=[call("f"), call("g", arguments={"x": "v", "y": 1})]),
            lambda m: calls(m).replace(m["tool_calls"][1]["function"]["name"], ""),
            r"the name of a call \('g'\)",
        ),
        (
            answer("", tool_calls=[call("f", arguments={"x": LONG})]),
            lambda m: m["tool_calls"][0]["function"]["name"],
            f"an argument \\('{LONG[:40]}'\\)",
        ),
        (
            answer("", tool_calls=[call("f", arguments={"x": "v", "y": 17})]),
            lambda m: calls(m).replace("17", ""),
            r"an argument \(17\)",
        ),
        (
            answer("", tool_calls=[call("f", arguments={"x": 17}), call("g", arguments={"y": 2})]),
            lambda m: calls(m).replace("17", "").replace('"y"', ""),
            r"an argument \(17\)",
        ),
    ],
)
def test_a_refusal_names_the_first_value_that_is_missing(message, write, missing):
    with pytest.raises(DataError, match=f"does not write {missing} of assistant turn 1 "):
        Template(SILENT, write).confirm(message)


@pytest.mark.parametrize(
    ("message", "write", "said"),
    [
        (answer(LONG), lambda m: m["content"].replace("L", "l"), LONG[:40]),
        (answer(LONG), lambda m: None if "L" not in m["content"] else m["content"], LONG[:40]),
        (
            answer("b", reasoning_content="so"),
            lambda m: f"<{m['reasoning_content']}|{m['content'].replace('b', 'c')}>",
            "b",
        ),
    ],
)
def test_a_refusal_names_the_value_that_is_altered(message, write, said):
    reason = rf"alters or drops what assistant turn 1 says \('{said}'\) at its line 1 \(`.*`\), so"
    with pytest.raises(DataError, match=reason):
        Template(SILENT, write).confirm(message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (answer("b"), True),
        (answer(" "), False),
        (answer("b<think>"), False),
        (answer([{"type": "text", "text": "b"}]), False),
        (answer("b", reasoning_content="so"), False),
        (answer("b", reasoning_content=""), True),
        (answer("b", tool_calls=[call("f")]), False),
        (answer("b", tool_calls=[]), True),
    ],
)
def test_a_plain_turn_is_nothing_but_a_text(message, expected):
    assert sentinels.is_plain(message) is expected
