"""The token with which an assistant turn ends, for each way in which templates end turns."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from faults import catalogue

from sft.data import ends
from sft.data.rendering import MARKS, Renderings

HEADER = "<|im_start|>{{ m.role }}\n"  # a token at which no serving stops
NAMED = '{{ "<|observation|>" if m.role == "tool" else "<|" + m.role + "|>" }}'
PLAIN_RESULT = '{{ "\nResult <|a|>" if m.role == "tool" else "\n<|" + m.role + "|>" }}'
OWN_RESULT = '{{ "<|result|>" if m.role == "tool" else "\n<|" + m.role + "|>" }}'
ONLY_RESULTS = '{{ "\n<|observation|>" if m.role == "tool" else "<|a|>" }}'
NO_RESULT = '{{ raise_exception("no") if m.role == "tool" else "<|" + m.role + "|>" }}'
OTHERS = ("<|system|>", "<|assistant|>", "<|result|>", "<|a|>", "<|b|>")
STOPS = ("<|user|>", "<|observation|>")  # and eos, which is <|im_end|>
THOUGHTS = "{{ m.reasoning_content if loop.last }}"  # as templates that drop those of earlier turns
SHOWN = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
REFUSED = "{% if m.reasoning_content and not loop.last %}{{ raise_exception('no') }}{% endif %}"

ASK: dict[str, Any] = {"role": "user", "content": "a"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "7"}
RESULT: dict[str, Any] = {"role": "tool", "content": "r"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "s"}
CALL = {**ANSWER, "tool_calls": [{"type": "function", "function": {"name": "b", "arguments": {}}}]}
THOUGHT = {**ANSWER, "reasoning_content": "so"}
THOUGHT_INSIDE = {**ANSWER, "content": "<think>so</think>7"}


class Case(NamedTuple):
    """A template by its parts, a conversation whose message 1 is the turn, and what ends it."""

    header: str
    tail: str  # behind an answer
    messages: list[dict[str, Any]]
    end: str
    is_added: bool
    call_tail: str = ""  # behind a call
    content: str = "{{ m.content }}"


CASES = {
    "a token at which serving stops": Case(
        HEADER, "<|a|>.<|im_end|><|im_end|><|b|>\n", [ASK, ANSWER], "<|a|>.<|im_end|>", False
    ),
    "the last token of an answer": Case(
        HEADER, "<|a|> <|b|>\n", [ASK, ANSWER], "<|a|> <|b|>", False
    ),
    "a call ends as an answer": Case(
        HEADER, "<|b|>", [ASK, CALL], "<|b|>", False, "<|b|>.<|b|><|a|>"
    ),
    "the last token of a call": Case(
        HEADER, "<|b|>", [ASK, CALL], "<|result|>.<|a|>", False, "<|result|>.<|a|>."
    ),
    "no token": Case(HEADER, " \n", [ASK, ANSWER], "<|im_end|>", True),
    "no token behind answers": Case(HEADER, ".", [ASK, CALL], "<|a|>.<|im_end|>", True, "<|a|>."),
    "the next header": Case(NAMED, "\n", [ASK, ANSWER], "\n<|user|>", True),
    "blanks before the next header": Case(
        "{{ '\n' }}" + NAMED, "", [ASK, ANSWER], "\n<|user|>", True
    ),
    "the header of a result": Case(NAMED, "", [ASK, CALL], "<|observation|>", True),
    "a user's behind a call": Case(NAMED, "", [ASK, CALL, ASK], "<|user|>", True),
    "a result's behind an answer": Case(
        NAMED, "", [ASK, ANSWER, RESULT, ASK], "<|observation|>", True
    ),
    "a system prompt behind an answer": Case(NAMED, "", [ASK, ANSWER, SYSTEM], "<|user|>", True),
    "a system prompt behind a call": Case(NAMED, "", [ASK, CALL, SYSTEM], "<|observation|>", True),
    "nothing said behind it": Case(
        "{% if m.content %}" + NAMED + "{% endif %}",
        "",
        [ASK, ANSWER, {**ASK, "content": ""}],
        "<|user|>",
        True,
    ),
    "a result's header, where a user's ends turns": Case(
        OWN_RESULT, "", [ASK, CALL], "<|result|>", True
    ),
    "a result's header, where a user's ends none": Case(
        ONLY_RESULTS, "", [ASK, CALL], "\n<|observation|>", True
    ),
    "a result without a header": Case(PLAIN_RESULT, "", [ASK, CALL], "<|im_end|>", True),
    "results are refused": Case(NO_RESULT, "", [ASK, CALL], "<|im_end|>", True),
    "thoughts that earlier turns drop": Case(
        NAMED, "", [ASK, THOUGHT], "<|user|>", True, "", THOUGHTS + "{{ m.content }}"
    ),
    "thoughts in a content that earlier turns drop": Case(
        NAMED, "", [ASK, THOUGHT_INSIDE], "<|user|>", True, "", SHOWN
    ),
    "thoughts that earlier turns must not have": Case(
        NAMED, "", [ASK, THOUGHT], "<|user|>", True, "", REFUSED + "{{ m.content }}"
    ),
}


def make(case: Case) -> Any:
    """Returns the tokenizer of a case. Its template writes the name of a call as the content."""
    tail = f"{{{{ {case.call_tail!r} if m.tool_calls else {case.tail!r} }}}}"
    source = f"{{% for m in messages %}}{case.header}{case.content}"
    source += f"{{% if m.role == 'assistant' %}}{tail}{{% endif %}}{{% endfor %}}"
    return catalogue.tokenizer(source, None, (*OTHERS, *STOPS))


@pytest.mark.parametrize("name", CASES)
def test_a_turn_ends_with(name):
    case = CASES[name]
    given = Renderings(make(case), case.messages)
    tail = given.until(1).rpartition("7")[2]
    found = ends.find_end(given, 1, given.messages[1], " 7" + tail, tail)
    assert found == (" 7" + case.end, case.is_added)


def typed(text: str) -> str:
    return text.join(MARKS)


@pytest.mark.parametrize(
    ("answer", "token"),
    [
        ("", None),
        ("b", None),
        ("b<|im_end|>", None),
        ("b<|a|>c<|b|>d<|im_end|>", None),
        ("b<|im_end|>c<|im_end|>", "<|im_end|>"),
        ("b<|user|>c<|im_end|>", "<|user|>"),
        ("b<|a|>c<|user|>d<|im_end|>", "<|user|>"),
        ("b<|a|>c<|a|>", "<|a|>"),
        (f"b{typed('<|user|>')}c<|im_end|>", None),
        (f"b<|us{typed('<|im_end|>')}er|>c<|im_end|>", None),
    ],
)
def test_a_token_that_stops_serving_before_the_end(answer, token):
    assert ends.early_stop(make(CASES["no token"]), answer) == token
