"""Law 3 as a property: what is supervised is what a model has to write after the served prompt."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from functools import cache
from typing import Any

import pytest
import test_template as families
from conftest import ROOT, SHARED
from faults import catalogue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.data import audit, template
from sft.data.files import Row
from sft.data.rendering import read_form
from sft.errors import DataError

TEMPLATES = SHARED / "data/templates/templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
LOCAL = {
    "tools": catalogue.CHATML,
    "thoughts of the last question": catalogue.THINKS,
    "thoughts closed by default": catalogue.CLOSES,
    "thoughts opened by the prompt": catalogue.OPENS,
    "channels": catalogue.CHANNELS,
    "headers end turns": catalogue.HEADERS,
    "results inside the turn": catalogue.INSIDE,
    "header ends in a quote": catalogue.QUOTES,
    "blocks": families.GENERATION,
    "no end": families.NO_END,
    "an end of the last": families.LAST_ONLY,
}
LIMIT = 10**6
MARK = re.compile(r"~\d+~")  # stands in each value of a conversation, with a number of its own


@cache
def oracle() -> Any:
    """Returns the module benchmarks/templates.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("templates")
    finally:
        sys.path.pop(0)


@cache
def pairs() -> list[dict[str, Any]]:
    return list(oracle().read_lines(SHARED / "data/templates/oracle.jsonl"))


@cache
def stand_in(name: str) -> Any:
    """Returns a tokenizer with a shared template. Those without a row of the oracle are Llama's."""
    if not TEMPLATES.is_dir():
        pytest.skip(f"no templates in {TEMPLATES}: set SFT_SHARED")
    known = {pair["template"]: pair for pair in pairs()}
    made = oracle().stand_in(SHARED, {**known.get(name, known["llama3"]), "template": name})
    made.chat_control_tokens = []  # special tokens are plain text in messages, others are tokens
    return made


@cache
def local(name: str) -> Any:
    text = LOCAL[name]
    made = catalogue.tokenizer(text, None, catalogue.TOKENS.get(text, ()))
    made.chat_control_tokens = []
    return made


def serve(tokenizer: Any, row: Row, turn: int) -> list[int]:
    """Returns the prompt of a turn as transformers itself renders it for inference."""
    plain = [{k: v for k, v in m.items() if k != "weight"} for m in row.messages[:turn]]
    return tokenizer.apply_chat_template(
        read_form(tokenizer).apply(plain),
        tools=row.tools,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
        **(row.template_kwargs or {}),
    )


def generate(tokenizer: Any, prompt: list[int], model: list[int]) -> list[int]:
    """Returns what a server makes of a model that continues `prompt` with the tokens `model`."""
    stops, written = audit.stop_ids(tokenizer), []
    for token in model[len(prompt) :]:
        written.append(token)
        if token in stops:
            break
    return written


def marks_of(message: dict[str, Any]) -> list[str]:
    """Returns the marks of a turn's values, in the order in which a turn has them."""
    said = [message.get("reasoning_content", ""), message["content"]]
    said += [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
    return MARK.findall(" ".join(json.dumps(value) for value in said))


# --- conversations -----------------------------------------------------------------------------

HOSTILE = [
    *("zq7s0e", "zq7s1ezq7s0e", "zq7sq0e", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>"),
    *("<|user|>", "<|call|>", "<|end|>", "<|eot_id|>", "<|return|>", "<end_of_turn>", "<turn|>"),
    *("<think>", "</think>", "<think>\nhm\n</think>\n\n", "<tool_call>", "</tool_call>", "<tool>"),
    *("assistant\n", "\nuser: no", "[INST]", "### assistant\n", "<|assistant|>\n", "Assistant:\n"),
    *('{"name": "b", "arguments": {}}', '"', "\\", "'", "\\n", "{{ m.content }}", "{% endfor %}"),
    *(" ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "e\u0301", "\u0301", "\ufeff", "&amp;"),
    *(
        "\U0001f469\u200d\U0001f467",
        "\u4f60\u597d",
        "\u05e9\u05dc",
        "\u0928\u092e\u0938\u094d",
        "7",
    ),
]
CHARACTERS = st.characters(exclude_categories=["Cs", "Co"], exclude_characters="\0~")
SAID = st.lists(st.sampled_from(HOSTILE) | st.text(CHARACTERS, max_size=6), max_size=3).map("".join)


@st.composite
def rows(draw: Any) -> Row:
    """Draws a conversation, each of whose values has a mark of its own."""
    numbers = itertools.count()

    def said() -> str:
        return f"{draw(SAID)}~{next(numbers)}~{draw(SAID)}"

    def content() -> Any:
        parts = [{"type": "text", "text": said()} for _ in range(draw(st.integers(1, 2)))]
        return parts if draw(st.integers(0, 5)) == 5 else said()

    def argument(depth: int = 0) -> Any:
        kind = draw(st.sampled_from(["text", "text", "number", "null", "list", "object"]))
        if kind in ("list", "object") and depth < 2:
            items = [argument(depth + 1) for _ in range(draw(st.integers(0, 2)))]
            return items if kind == "list" else {f"key{n}": item for n, item in enumerate(items)}
        return {"number": 7, "null": None}.get(kind, said() if kind == "text" else True)

    def call(number: int) -> dict[str, Any]:
        arguments = {f"a{n}": argument() for n in range(draw(st.integers(0, 2)))}
        function = {"name": f"get_~{next(numbers)}~", "arguments": arguments}
        return {"id": f"call0000{number}", "type": "function", "function": function}

    def answer(**more: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"role": "assistant", "content": content(), **more}
        if draw(st.integers(0, 2)) == 2:
            made["reasoning_content"] = said()
        if draw(st.integers(0, 5)) == 5:
            made["weight"] = draw(st.sampled_from([0, 0.5]))
        return made

    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": said()})
    elif draw(st.integers(0, 7)) == 7:
        messages.append(answer())
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": content()})
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            calls = [call(n) for n in range(draw(st.integers(1, 2)))]
            text = draw(st.sampled_from(["", said()]))
            messages.append(answer(content=text, tool_calls=calls))
            messages += [
                {
                    "role": "tool",
                    "content": said(),
                    "tool_call_id": each["id"],
                    "name": each["function"]["name"],
                }
                for each in calls
            ]
        messages.append(answer())
    if draw(st.integers(0, 4)) == 4:
        messages[-1] = answer(content="", tool_calls=[call(0)])
    messages[-1].pop("weight", None)
    called = [c["function"]["name"] for m in messages for c in m.get("tool_calls", [])]
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": said(),
                "parameters": {"type": "object", "properties": {}},
            },
        }
        for name in dict.fromkeys(called)
    ]
    return Row(messages, tools or None, "f", 1)


# --- the property ------------------------------------------------------------------------------

# What the audit says of the template, not of what is supervised.
OF_PROMPTS = {"content_altered", "tools_dropped", "repeated_bos"}


def check(tokenizer: Any, row: Row) -> None:
    """Asserts the definition of docs/DATA.md for every example of a row."""
    try:
        made = template.render_row(tokenizer, row, LIMIT)
    except DataError:  # with a reason
        return
    learnt = Counter[int]()
    turns = {n: marks_of(m) for n, m in enumerate(row.messages) if m["role"] == "assistant"}
    for kept, example in made:
        assert len(example.ids) == len(example.labels)
        for first, stop in audit.supervised_runs(example.labels):
            run = example.ids[first:stop]
            assert example.labels[first:stop] == run
            text = template.decode_slice(tokenizer, example.ids, first, stop)
            (turn,) = (n for n, marks in turns.items() if marks == MARK.findall(text))
            weight = row.messages[turn].get("weight", 1)
            assert set((example.weights or [1] * stop)[first:stop]) == {weight}
            prompt = serve(
                tokenizer,
                Row(row.messages, row.tools, "f", 1, template_kwargs=kept.template_kwargs),
                turn,
            )
            assert example.ids[:first] == prompt
            assert generate(tokenizer, prompt, example.ids) == run
            assert run[-1] in audit.stop_ids(tokenizer)
            learnt[turn] += 1
        errors = set(audit.examine(tokenizer, kept, example, LIMIT)) & set(audit.ERRORS)
        assert errors <= OF_PROMPTS
    flags = {flag for _, example in made for flag in example.flags}
    assert "not_as_served" not in flags
    for turn in turns:
        if not row.messages[turn].get("weight", 1):
            assert not learnt[turn]
        elif not learnt[turn]:
            assert "thoughts_dropped" in flags if turn else "no_prompt" in flags
        else:
            assert learnt[turn] == 1


PROPERTY = settings(
    max_examples=int(os.environ.get("SFT_EXAMPLES", "6")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.mark.parametrize("name", LOCAL)
@PROPERTY
@given(row=rows())
def test_what_is_supervised_is_what_follows_the_prompt_of_serving(name, row):
    check(local(name), row)


@pytest.mark.skipif(not NAMES, reason=f"no templates in {TEMPLATES}: set SFT_SHARED")
@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(row=rows())
def test_what_is_supervised_on_real_templates_is_what_follows_the_prompt(name, row):
    check(stand_in(name), row)
