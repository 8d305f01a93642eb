"""The forms of messages that templates read, and what a rendering may take."""

from __future__ import annotations

from typing import Any

import pytest
from faults import catalogue

from sft.data import rendering
from sft.data.rendering import Form, Renderings
from sft.errors import DataError

PARTS = [{"type": "text", "text": "b"}]
NESTED = {"type": "function", "function": {"name": "f", "arguments": {"ü": 1}}}
FLAT = {"name": "f", "arguments": {"ü": 1}}
WRITTEN = {"name": "f", "arguments": '{"ü": 1}'}
FORMS: list[tuple[Form, dict[str, Any], dict[str, Any]]] = [
    (Form("text", "object", "key"), {"content": PARTS}, {"content": "b"}),
    (Form("either", "object", "key"), {"content": PARTS}, {"content": PARTS}),
    (Form("either", "object", "key"), {"content": "b"}, {"content": "b"}),
    (Form("parts", "object", "key"), {"content": "b"}, {"content": PARTS}),
    (
        Form("text", "object", "content"),
        {"content": "b", "reasoning_content": " a "},
        {"content": "<think>\na\n</think>\n\nb"},
    ),
    (
        Form("parts", "object", "content"),
        {"content": PARTS, "reasoning_content": "a"},
        {"content": [{"type": "text", "text": "<think>\na\n</think>\n\nb"}]},
    ),
    (
        Form("text", "text", "none"),
        {"content": "b", "tool_calls": [NESTED, FLAT], "reasoning_content": "a"},
        {"tool_calls": [{**NESTED, "function": WRITTEN}, WRITTEN]},
    ),
    (Form("text", "object", "none"), {"content": "b", "tool_calls": [NESTED]}, {}),
]


@pytest.mark.parametrize(("form", "message", "changes"), FORMS)
def test_a_message_takes_the_form_that_a_template_reads(form, message, changes):
    given = {"role": "assistant", **message}
    assert form.apply([given]) == [{**given, **changes}]


def test_a_text_may_grow_with_its_row_and_no_further():
    most = rendering.FREE + rendering.GROWTH * len('""')
    assert rendering._join(["x" * (most - 1), "y"], "") == "x" * (most - 1) + "y"
    with pytest.raises(DataError, match=f"more than {most:,} characters for 2 of the row"):
        rendering._join(["x" * most, "y"], "")


def test_a_long_row_is_rendered_whole():
    said = "word " * rendering.FREE
    tokenizer = catalogue.tokenizer()
    assert said in rendering.render_text(tokenizer, [{"role": "user", "content": said}])


def test_typed_tokens_that_a_template_quotes_stand_between_marks():
    quotes = catalogue.CHATML.replace("{{ m.content }}", "{{ [m.content] }}")
    tokenizer = catalogue.tokenizer(quotes)
    token = tokenizer.eos_token
    text = Renderings(tokenizer, [{"role": "user", "content": f"a {token} b"}]).text
    assert f"['a {token.join(rendering.MARKS)} b']" in text


def test_renderings_are_those_of_the_template_for_the_tools():
    tokenizer = catalogue.tokenizer()
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    messages = [{"role": "user", "content": "a"}]
    made = [rendering.renderings_of(tokenizer, messages, tools, None) for tools in (None, [])]
    assert [each.text for each in made] == ["D", "T"]
