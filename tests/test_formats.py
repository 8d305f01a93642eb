"""A raw row -> messages and tools: every format, every kind of bad row, real files."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from decimal import Decimal

import pytest
from conftest import load_rows
from hypothesis import given
from hypothesis import strategies as st

from sft.data.formats import (
    BY_NAME,
    FORMATS,
    NormalRow,
    is_conversation,
    normalise,
    read_question,
    recognise,
    set_system_prompt,
)
from sft.data.messages import THOUGHTS, parse_json


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASK, HELLO, CALM = turn("user", "Hi"), turn("assistant", "Hello"), turn("system", "Be calm.")
SAYS_HI, SAYS_HELLO = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
FUNCTION = {"name": "add", "description": "Adds", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = turn("assistant", "", tool_calls=[CALL])
RESULT = turn("tool", "2")


def called(**more):
    return {"messages": [ASK, {"role": "assistant", **more}, RESULT, HELLO]}


def lf(kind, value):
    return {"type": kind, "value": value}


def made_call(arguments):
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


SPOKEN = "\n\nHuman: Hi\n\nAssistant: Hello"

# row, its format, the messages, the tools
GOOD = {
    "messages": ({"messages": [ASK, HELLO], "id": 7}, "messages", [ASK, HELLO], None),
    "nothing is trimmed": (
        {"messages": [ASK, turn("assistant", " 3\n")]},
        "messages",
        [ASK, turn("assistant", " 3\n")],
        None,
    ),
    "developer": (
        {"messages": [turn("developer", "Be calm."), ASK, HELLO]},
        "messages",
        [CALM, ASK, HELLO],
        None,
    ),
    "system of the row": (
        {"messages": [ASK, HELLO], "system": "Be calm."},
        "messages",
        [CALM, ASK, HELLO],
        None,
    ),
    "parts": (
        {"messages": [turn("user", [{"type": "text", "text": t} for t in ("H", "i")]), HELLO]},
        "messages",
        [turn("user", [{"type": "text", "text": t} for t in ("H", "i")]), HELLO],
        None,
    ),
    "parts of a response": (
        {
            "messages": [
                turn("user", [{"type": "input_text", "text": "Hi"}]),
                turn("assistant", [{"type": "output_text", "text": "Hello", "annotations": []}]),
            ]
        },
        "messages",
        [
            turn("user", [{"type": "text", "text": "Hi"}]),
            turn("assistant", [{"type": "text", "text": "Hello"}]),
        ],
        None,
    ),
    "LLaMA-Factory v1": (
        {
            "messages": [
                turn("user", [lf("text", "H"), lf("text", "i")], loss_weight=0.0),
                turn(
                    "assistant",
                    [
                        lf("reasoning", "To add."),
                        lf("tool_call", json.dumps({"name": "add", "arguments": {"a": 1}})),
                    ],
                    loss_weight=0.0,
                ),
                turn("tool", [lf("text", "2")], loss_weight=0.0),
                turn("assistant", [lf("text", "Hello")], loss_weight=1.0),
            ],
            "tools": json.dumps([FUNCTION]),
        },
        "messages",
        [
            ASK,
            turn("assistant", "", tool_calls=[CALL], reasoning_content="To add.", weight=0),
            RESULT,
            HELLO,
        ],
        [TOOL],
    ),
    "an export of OpenAI": (
        {
            "messages": [
                turn("user", "Hi", name="ann"),
                turn(
                    "assistant",
                    None,
                    function_call={"name": "add", "arguments": '{"a": 1}'},
                    refusal=None,
                    annotations=[],
                    audio=None,
                    tool_calls=None,
                ),
                turn("function", "2", name="add"),
                turn("assistant", "Hello", refusal=None, annotations=[], weight=1),
            ],
            "functions": [FUNCTION],
            "parallel_tool_calls": False,
        },
        "messages",
        [
            turn("user", "Hi", name="ann"),
            CALLS,
            turn("tool", "2", name="add"),
            turn("assistant", "Hello", weight=1),
        ],
        [TOOL],
    ),
    "thoughts": (
        {
            "messages": [
                ASK,
                *(turn("assistant", "Hello", **{key: "Polite."}) for key in THOUGHTS),
                turn("assistant", "Hello", reasoning="Polite.", reasoning_content="Polite."),
                turn("assistant", "<think>a</think>Hello"),
            ]
        },
        "messages",
        [
            ASK,
            *[turn("assistant", "Hello", reasoning_content="Polite.")] * (len(THOUGHTS) + 1),
            turn("assistant", "<think>a</think>Hello"),
        ],
        None,
    ),
    "an empty result": (
        {"messages": [ASK, CALLS, turn("tool", ""), turn("tool", []), turn("tool", " "), HELLO]},
        "messages",
        [ASK, CALLS, turn("tool", ""), turn("tool", ""), turn("tool", " "), HELLO],
        None,
    ),
    "numbers of an answer and a result": (
        {"messages": [ASK, CALLS, turn("tool", 2), turn("assistant", 2.5)]},
        "messages",
        [ASK, CALLS, RESULT, turn("assistant", "2.5")],
        None,
    ),
    "messages as text": (
        {"messages": json.dumps([ASK, HELLO]), "tools": json.dumps([TOOL])},
        "messages",
        [ASK, HELLO],
        [TOOL],
    ),
    "calls and schemas as text": (
        called(tool_calls=json.dumps([CALL]))
        | {"tools": [json.dumps(FUNCTION | {"parameters": '{"type": "object"}'})]},
        "messages",
        [ASK, CALLS, RESULT, HELLO],
        [TOOL],
    ),
    "no arguments": (
        called(tool_calls=[{"name": "add", "arguments": ""}]),
        "messages",
        [
            ASK,
            turn("assistant", "", tool_calls=[made_call({})]),
            RESULT,
            HELLO,
        ],
        None,
    ),
    "conversations as text": (
        {"conversations": json.dumps([SAYS_HI, SAYS_HELLO])},
        "sharegpt",
        [ASK, HELLO],
        None,
    ),
    "pairs": (
        {
            "conversations": [
                {"assistant": "Hello", "human": "Hi"},
                {"user": "Hi", "gpt": "Hello", "system": None},
            ]
        },
        "sharegpt",
        [ASK, HELLO, ASK, HELLO],
        None,
    ),
    "pairs of input and output": (
        {"conversations": [{"input": "Hi", "output": "Hello"}]},
        "sharegpt",
        [ASK, HELLO],
        None,
    ),
    "a text for messages": (
        {"prompt": [ASK, HELLO, ASK], "completion": "Hello", "reasoning_content": "Polite."},
        "prompt_completion",
        [
            ASK,
            turn("assistant", "Hello", weight=0),
            ASK,
            turn("assistant", "Hello", reasoning_content="Polite."),
        ],
        None,
    ),
    "one turn each": (
        {"conversations": [{"system": "Be calm."}, {"human": "Hi"}, {"assistant": "Hello"}]},
        "sharegpt",
        [CALM, ASK, HELLO],
        None,
    ),
    "alpaca without an instruction": (
        {"instruction": "", "input": "Hi", "output": "Hello"},
        "alpaca",
        [ASK, HELLO],
        None,
    ),
    "alpaca with its rendered text": (
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "### Hi\n### Hello"},
        "alpaca",
        [ASK, HELLO],
        None,
    ),
    "messages with their rendered text": (
        {"messages": [ASK, HELLO], "text": "<|user|>Hi<|assistant|>Hello</s>"},
        "messages",
        [ASK, HELLO],
        None,
    ),
    "null is no key": (
        {"messages": None, "text": None, "prompt": "Hi", "completion": "Hello"},
        "prompt_completion",
        [ASK, HELLO],
        None,
    ),
    "numbers": (
        {"question": 1, "answer": -2},
        "question_answer",
        [turn("user", "1"), turn("assistant", "-2")],
        None,
    ),
    "thoughts beside an answer": (
        {"question": "Hi", "answer": "Hello", "reasoning_content": "Polite."},
        "question_answer",
        [ASK, turn("assistant", "Hello", reasoning_content="Polite.")],
        None,
    ),
    "weight and reasoning": (
        {"messages": [ASK, turn("assistant", "Hello", weight=0.5, reasoning_content="Polite.")]},
        "messages",
        [ASK, turn("assistant", "Hello", reasoning_content="Polite.", weight=0.5)],
        None,
    ),
    "null is not given": (
        {"messages": [ASK, turn("assistant", "Hello", tool_calls=None, weight=None)]},
        "messages",
        [ASK, HELLO],
        None,
    ),
    "tool calls": (
        {
            "messages": [
                ASK,
                turn("assistant", None, tool_calls=[{"id": "c1", **CALL}]),
                turn("tool", "2", tool_call_id="c1", name="add"),
                HELLO,
            ],
            "tools": [TOOL],
        },
        "messages",
        [
            ASK,
            turn("assistant", "", tool_calls=[{"id": "c1", **CALL}]),
            turn("tool", "2", tool_call_id="c1", name="add"),
            HELLO,
        ],
        [TOOL],
    ),
    "arguments as text": (
        called(tool_calls=[{"function": {"name": "add", "arguments": '{"a": 1}'}}]),
        "messages",
        [ASK, CALLS, RESULT, HELLO],
        None,
    ),
    "a bare call beside text": (
        called(tool_calls=[{"name": "add", "arguments": {"a": 1}}], content="Let me see."),
        "messages",
        [ASK, turn("assistant", "Let me see.", tool_calls=[CALL]), RESULT, HELLO],
        None,
    ),
    "tools as text": (
        {"messages": [ASK, HELLO], "tools": json.dumps([TOOL])},
        "messages",
        [ASK, HELLO],
        [TOOL],
    ),
    "sharegpt": ({"conversations": [SAYS_HI, SAYS_HELLO]}, "sharegpt", [ASK, HELLO], None),
    "sharegpt with roles": ({"conversations": [ASK, HELLO]}, "sharegpt", [ASK, HELLO], None),
    "sharegpt with tools": (
        {
            "conversations": [
                SAYS_HI,
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                SAYS_HELLO,
            ],
            "tools": json.dumps([FUNCTION]),
            "system": "Be calm.",
        },
        "sharegpt",
        [CALM, ASK, CALLS, RESULT, HELLO],
        [TOOL],
    ),
    "two calls at once": (
        {
            "conversations": [
                {"from": "system", "value": "Be calm."},
                SAYS_HI,
                {"from": "function_call", "value": json.dumps([CALL, CALL])},
                {"from": "tool", "value": "2"},
                {"from": "chatgpt", "value": "Hello"},
            ],
            "tools": "[]",
            "system": "",
        },
        "sharegpt",
        [CALM, ASK, turn("assistant", "", tool_calls=[CALL, CALL]), RESULT, HELLO],
        None,
    ),
    "alpaca": ({"instruction": "Hi", "output": "Hello"}, "alpaca", [ASK, HELLO], None),
    "alpaca without input": (
        {"instruction": "Hi", "input": "", "output": "Hello", "tools": ""},
        "alpaca",
        [ASK, HELLO],
        None,
    ),
    "alpaca with all": (
        {
            "instruction": "Add",
            "input": "1, 2",
            "output": "3",
            "system": "Be calm.",
            "history": [["Hi", "Hello"]],
        },
        "alpaca",
        [CALM, ASK, HELLO, turn("user", "Add\n\n1, 2"), turn("assistant", "3")],
        None,
    ),
    "prompt": ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion", [ASK, HELLO], None),
    "prompt of messages": (
        {"prompt": [ASK, HELLO, ASK], "completion": [HELLO]},
        "prompt_completion",
        [ASK, turn("assistant", "Hello", weight=0), ASK, HELLO],
        None,
    ),
    "prompt of messages as text": (
        {"prompt": json.dumps([ASK]), "completion": json.dumps([HELLO])},
        "prompt_completion",
        [ASK, HELLO],
        None,
    ),
    "question": ({"question": "Hi", "answer": "Hello"}, "question_answer", [ASK, HELLO], None),
    "decimals": (
        {"question": Decimal("1.50"), "answer": Decimal("1E+3")},
        "question_answer",
        [turn("user", "1.50"), turn("assistant", "1000")],
        None,
    ),
    "a number as an instruction": (
        {"instruction": 12, "input": 1.5, "output": "Hello"},
        "alpaca",
        [turn("user", "12\n\n1.5"), HELLO],
        None,
    ),
    "turns in columns, as Arrow has some": (
        {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}},
        "sharegpt",
        [ASK, HELLO],
        None,
    ),
    "names of both formats": (
        {
            "conversations": [
                {"role": "user", "value": "Hi"},
                {"from": "assistant", "content": "Hello"},
            ]
        },
        "sharegpt",
        [ASK, HELLO],
        None,
    ),
    "a result of a function": (
        {"conversations": [SAYS_HI, SAYS_HELLO, {"from": "function", "value": "2"}, SAYS_HELLO]},
        "sharegpt",
        [ASK, HELLO, RESULT, HELLO],
        None,
    ),
    "seed": ({"user": "Hi", "assistant": "Hello"}, "seed", [ASK, HELLO], None),
    "seed with system": (
        {"system": "Be calm.", "user": "Hi", "assistant": "Hello"},
        "seed",
        [CALM, ASK, HELLO],
        None,
    ),
    "raw text": ("Once upon a time", "text", [turn("text", "Once upon a time")], None),
    "raw text in a column": ({"text": " a\n", "id": 1}, "text", [turn("text", " a\n")], None),
}


def chat(*turns, **more):
    return {"messages": [turn(*t) if isinstance(t, tuple) else t for t in turns], **more}


PART = {"type": "image_url", "image_url": {"url": "a.png"}}
BAD = {
    "number": (5, "expected an object, found int"),
    "list": ([ASK, HELLO], 'expected an object, found list; write {"messages": [the turns]}'),
    "no format": ({"q": "a"}, "expected the keys of one format (messages, conversations, instr"),
    "half a format": ({"prompt": "a"}, "found ['prompt']; name the columns to use in data.columns"),
    "many columns": (
        dict.fromkeys("abcdefghijklmno"),
        "found ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j'] and 5 more; name the columns",
    ),
    "usual names": (
        {"instruction": "a", "context": "b", "Response": "c", "category": "d"},
        "data.columns, such as {instruction: instruction, input: context, output: Response}",
    ),
    "dialogues that people compared": (
        {"chosen": SPOKEN, "rejected": SPOKEN},
        "found ['chosen', 'rejected']; set data.format: human_assistant, data.columns: "
        "{text: chosen}, data.ignore_columns: [rejected]",
    ),
    "two formats": (
        {"prompt": "a", "completion": "b", "messages": [ASK, HELLO]},
        "the row fits several formats; set data.format: messages or prompt_completion",
    ),
    "no list": ({"messages": "Hi"}, "messages: expected a list, found str"),
    "no messages": ({"messages": []}, "no assistant turn, so nothing to learn"),
    "no assistant": (chat(ASK), "no assistant turn, so nothing to learn"),
    "last is user": (chat(HELLO, ASK), "the last turn is the user's, expected the assistant's"),
    "last is tool": (chat(ASK, CALLS, RESULT), "the last turn is the tool's"),
    "nested too far": ({"messages": [[ASK, HELLO]]}, "message 1: expected an object, found list"),
    "role": (chat(ASK, ("bot", "b")), "message 2: unknown role 'bot', expected one of system, "),
    "no role": (
        {"messages": [{"content": "a"}]},
        "message 1: expected the keys 'role' and 'content', found ",
    ),
    "role is a list": (chat((["user"], "a")), "message 1: unknown role ['user']"),
    "raw text among turns": (chat(("text", "a"), HELLO), "message 1: unknown role 'text'"),
    "more keys": (
        chat(turn("user", "a", mood="b"), HELLO),
        "message 1: would not be rendered: mood; remove or convert it, or name it in data.ignore_",
    ),
    "thoughts of a user": (chat(turn("user", "a", reasoning="b"), HELLO), "rendered: reasoning"),
    "trained or not": (
        chat(ASK, turn("assistant", "a", train=True)),
        "would not be rendered: train; use a weight of 0 or 1",
    ),
    "refusal": (
        chat(ASK, turn("assistant", None, refusal="No.")),
        "would not be rendered: refusal; if the answer is to refuse, put this text in content",
    ),
    "annotations": (
        chat(ASK, turn("assistant", "a", annotations=[{"type": "url_citation"}])),
        "would not be rendered: annotations",
    ),
    "thoughts twice": (
        chat(ASK, turn("assistant", "a", reasoning="b", thinking="c")),
        "message 2: expected its thoughts once, found several that differ",
    ),
    "thoughts are a switch": (
        chat(ASK, turn("assistant", "a", thinking=True)),
        "message 2: thinking: expected text, found bool",
    ),
    "two weights": (
        chat(ASK, turn("assistant", "a", weight=1, loss_weight=0.5)),
        "message 2: expected one weight, found weight and loss_weight",
    ),
    "a question with a weight": (
        chat(turn("user", "a", loss_weight=1.0), HELLO),
        "message 1: loss_weight: expected 0, since only turns of the assistant are learnt",
    ),
    "calls twice": (
        called(tool_calls=[CALL], function_call=CALL["function"]),
        "message 2: expected tool_calls or function_call, found both",
    ),
    "thoughts behind the answer": (
        chat(ASK, turn("assistant", [lf("text", "a"), lf("reasoning", "b")])),
        "content part 2: expected thoughts, then text, then calls, found reasoning last",
    ),
    "a call in a question": (
        chat(turn("user", [lf("tool_call", "{}")]), HELLO),
        "content part 1: expected {",
    ),
    "thoughts alone": (
        chat(ASK, turn("assistant", [lf("reasoning", "b")])),
        "message 2: content is empty",
    ),
    "tools and functions": (
        chat(ASK, HELLO, tools=[TOOL], functions=[FUNCTION]),
        "expected tools or functions, found both",
    ),
    "Python's text": (
        {"messages": "[{'role': 'user'}]"},
        "messages: not valid JSON (Expecting property name enclosed in double quotes, column 3); "
        "it is written as Python prints it: write it with json.dumps",
    ),
    "Python's text of a prompt": (
        {"prompt": str([ASK]), "completion": str([HELLO])},
        "column 3); it is written as Python prints it: write it with json.dumps",
    ),
    "true as an answer": ({"question": "a", "answer": True}, "answer: expected text, found bool"),
    "infinity as an answer": (
        {"question": "a", "answer": float("inf")},
        "answer: expected text, found float",
    ),
    "nothing asked": ({"instruction": "", "input": "", "output": "b"}, "instruction is empty"),
    "two texts": (
        {"prompt": "a", "completion": "b", "text": "c"},
        "set data.format: prompt_completion or text",
    ),
    "a dialogue": (
        {"text": SPOKEN},
        "the row fits several formats; set data.format: text or human_assistant",
    ),
    "the prompt of a dialogue": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello"},
        "set data.format: prompt_completion or human_assistant",
    ),
    "variables are text": (chat(ASK, HELLO, chat_template_kwargs="a"), "kwargs: not valid JSON"),
    "variables of no template": (
        chat(ASK, HELLO, chat_template_kwargs={"tokenize": False}),
        "chat_template_kwargs: 'tokenize' is not a variable of a template",
    ),
    "the tokens of a template": (
        chat(ASK, HELLO, chat_template_kwargs={"bos_token": "a"}),
        "chat_template_kwargs: 'bos_token' is not a variable of a template",
    ),
    "variables in a list": (
        chat(ASK, HELLO, chat_template_kwargs=[1]),
        "chat_template_kwargs: expected an object, found list",
    ),
    "variables with NUL": (
        chat(ASK, HELLO, chat_template_kwargs={"a": ["\0"]}),
        "chat_template_kwargs contains a NUL character",
    ),
    "two questions in a turn": (
        {"conversations": [{"human": "Hi", "input": "a", "output": "b"}]},
        "message 1: expected the keys 'role' and 'content', found ",
    ),
    "turns with other keys": (
        {"conversations": [{"human": "Hi", "mood": "b"}]},
        "message 1: expected the keys 'role' and 'content', found ",
    ),
    "calls of a user": (
        chat(turn("user", "a", tool_calls=[CALL])),
        "would not be rendered: tool_c",
    ),
    "empty": (chat(ASK, ("assistant", "")), "message 2: content is empty"),
    "blank": (chat(("user", " \n\t"), HELLO), "message 1: content is blank"),
    "no content": (chat(ASK, {"role": "assistant"}), "message 2: content: expected text, found No"),
    "empty calls": (chat(ASK, turn("assistant", None, tool_calls=[])), "content: expected text"),
    "number as content": (chat(("user", 4), HELLO), "message 1: content: expected text, found int"),
    "image": (
        chat(turn("user", [{"type": "text", "text": "a"}, PART]), HELLO),
        'message 1: content part 2: expected {"type": "text", "text": "..."}, found \'image_url\'',
    ),
    "part of text": (chat(turn("user", ["a"]), HELLO), "content part 1: expected {"),
    "part with more": (
        chat(turn("user", [{"type": "text", "text": "a", "cache_control": {}}]), HELLO),
        "content part 1: not rendered: cache_control",
    ),
    "weight below 0": (
        chat(ASK, turn("assistant", "a", weight=-1)),
        "weight: expected a number from 0",
    ),
    "weight of text": (chat(ASK, turn("assistant", "a", weight="1")), "found '1'"),
    "weight true": (chat(ASK, turn("assistant", "a", weight=True)), "found True"),
    "weight nan": (chat(ASK, turn("assistant", "a", weight=float("nan"))), "found nan"),
    "nothing weighs": (
        chat(ASK, turn("assistant", "a", weight=0)),
        "every assistant turn has weig",
    ),
    "result of nothing": (
        chat(ASK, RESULT, HELLO),
        "message 2: a tool's result needs an assistant",
    ),
    "call is text": (
        called(tool_calls=["add"]),
        "message 2: call 1: expected an object, found str",
    ),
    "calls are an object": (called(tool_calls=CALL), "tool_calls: expected a list, found dict"),
    "call without a name": (
        called(tool_calls=[{"arguments": {}}]),
        "name: expected text, found No",
    ),
    "call with more": (called(tool_calls=[{**CALL, "x": 1}]), "call 1: would not be rendered: x"),
    "call of another type": (called(tool_calls=[{**CALL, "type": "x"}]), "type 'function', found"),
    "arguments broken": (
        called(tool_calls=[{"name": "add", "arguments": '{"a": 1'}]),
        "message 2: call 1: arguments: not valid JSON (Expecting ',' delimiter, column 8)",
    ),
    "arguments are a list": (
        called(tool_calls=[{"name": "add", "arguments": "[1]"}]),
        "arguments: expected an object, found list",
    ),
    "arguments with NUL": (
        called(tool_calls=[{"name": "add", "arguments": {"a": ["b\0"]}}]),
        "message 2: call 1: arguments contains a NUL character",
    ),
    "tools broken": (chat(ASK, HELLO, tools="[{"), "tools: not valid JSON"),
    "tools are an object": (chat(ASK, HELLO, tools=TOOL), "tools: expected a list, found dict"),
    "tool without a name": (
        chat(ASK, HELLO, tools=[{}]),
        "tool 1: name: expected text, found None",
    ),
    "tool of another program": (
        chat(ASK, HELLO, tools=[{"name": "add", "input_schema": {"type": "object"}}]),
        "tool 1: expected its schema as parameters, found input_schema; rename it",
    ),
    "two system prompts": (
        chat(CALM, ASK, HELLO, system="a"),
        "a system prompt stands both in the",
    ),
    "system is a list": (
        chat(ASK, HELLO, system=["a"]),
        "system: expected text, found list; data.columns can name a part of it: system.0",
    ),
    "answers in an object": (
        {"question": "a", "answer": {"value": ["b"]}},
        "answer: expected text, found dict; data.columns can name a part of it: answer.value.0",
    ),
    "one turn": (
        {"role": "user", "content": "a"},
        'it is one turn of a conversation: write {"messages": [all its turns]} on one line',
    ),
    "other keys of turns": (
        {"messages": [{"type": "human", "data": {}}]},
        "message 1: expected the keys 'role' and 'content', found 'type', 'data'",
    ),
    "sharegpt role": (
        {"conversations": [{"from": "me", "value": "a"}]},
        "unknown role 'me', expec",
    ),
    "sharegpt call": (
        {"conversations": [SAYS_HI, {"from": "function_call", "value": "add(1)"}]},
        "message 2: function_call: not valid JSON (Expecting value, column 1)",
    ),
    "sharegpt more": (
        {"conversations": [SAYS_HI, {**SAYS_HELLO, "score": 1}]},
        "message 2: would not be rendered: score",
    ),
    "history": (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history 1: expected a pa",
    ),
    "blank input": ({"instruction": "a", "input": " ", "output": "b"}, "input is blank"),
    "list as completion": (
        {"prompt": "a", "completion": [HELLO]},
        "expected a prompt of messages beside such a completion, found text",
    ),
    "completion is the user's": ({"prompt": [ASK], "completion": [ASK]}, "no assistant turn"),
    "null": ({"question": None, "answer": "b"}, "question: expected text, found NoneType"),
    "NUL": ({"question": "a", "answer": "b\0"}, "answer contains a NUL character"),
    "surrogate": ({"user": "a\ud83d", "assistant": "b"}, "user contains a lone surrogate (U+D83D)"),
    "blank text": (" \n", "text is blank"),
    "text is a number": ({"text": 4}, "text: expected text, found int"),
}


@pytest.mark.parametrize(("row", "name", "messages", "tools"), GOOD.values(), ids=GOOD)
def test_a_good_row(row, name, messages, tools):
    before = repr(row)
    assert recognise(row) == name
    found = normalise(row)
    assert found == normalise(row, name)
    assert (found.messages, found.tools, found.format) == (messages, tools, name)
    assert repr(row) == before  # the row itself is let be


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row(row, reason):
    with pytest.raises(ValueError, match=r".") as caught:
        normalise(row)
    assert reason in str(caught.value)


def test_every_format_has_a_good_row():
    detected = {known.name for known in FORMATS if known.is_detected}
    assert {name for _, name, *_ in GOOD.values()} | {"tokenised"} == detected
    detected = [keys for known in FORMATS if known.is_detected for keys in known.keys]
    assert len({*detected}) == len(detected)


def test_a_given_format_wins_and_needs_its_keys():
    row = {"prompt": "a", "completion": "b", "question": "Hi", "answer": "Hello"}
    assert normalise(row, "question_answer").messages == [ASK, HELLO]
    with pytest.raises(ValueError, match=r"keys user/assistant \(data.format: seed\), found \["):
        normalise(row, "seed")
    with pytest.raises(ValueError, match="expected an object, found str"):
        normalise("Hi", "messages")


def test_columns():
    row = {"id": 3, "a.b": "Hi", "cases": [{"out": "Hello"}], "messages": "no", "prompt": "no"}
    columns = {"prompt": "a.b", "completion": "cases.0.out"}
    assert normalise(row, columns=columns).messages == [ASK, HELLO]
    for path in ("cases.1.out", "cases.0.in", "cases.out", "id.x", "nothing", "cases.-1"):
        with pytest.raises(ValueError, match=r"no column .*, the row has .*'a.b', 'cases', 'id'"):
            normalise(row, columns={"prompt": "a.b", "completion": path})
    with pytest.raises(ValueError, match=r"data.columns: expected an object, found str"):
        normalise("Hi", columns=columns)


def test_a_column_that_the_format_does_not_read_is_refused():
    for key in ("input", "reasoning_content", "question"):
        with pytest.raises(ValueError, match=f"the format messages has no key '{key}', expected"):
            normalise({"a": [ASK, HELLO], "b": "c"}, columns={"messages": "a", key: "b"})


def test_optional_columns_may_be_missing():
    columns = {"instruction": "q", "input": "more.text", "output": "a", "system": "s"}
    row = {"q": "Hi", "a": "Hello"}
    assert normalise(row, columns=columns).messages == [ASK, HELLO]
    asked = turn("user", "Hi\n\nnow")
    full = row | {"more": {"text": "now"}, "s": "Be calm."}
    assert normalise(full, columns=columns).messages == [CALM, asked, HELLO]
    with pytest.raises(ValueError, match="no column 'a', the row has"):
        normalise({"q": "Hi"}, columns=columns)


def test_numbers_are_written_as_their_file_writes_them():
    for number in ("7.50", "1e5", "-0.0", "12345678901234567890.125", "3"):
        row = parse_json(f'{{"question": "Hi", "answer": {number}}}')
        assert normalise(row).messages == [ASK, turn("assistant", number)]
    value = parse_json("[7.50]")[0]
    assert (pickle.loads(pickle.dumps(value)).text, json.dumps(value), f"{value}") == (
        "7.50",
        "7.5",
        "7.5",
    )


def test_variables_of_the_template():
    given = {"enable_thinking": False, "reasoning_effort": "low", "budget": 3, "xml_tools": ["a"]}
    for value in (given, json.dumps(given), given | {"none": None}):
        found = normalise({"messages": [ASK, HELLO], "chat_template_kwargs": value})
        assert (found.template_kwargs, found.ignored) == (given, ())
        assert read_question({"messages": [ASK], "chat_template_kwargs": value}) == (
            NormalRow([ASK], None, given)
        )
    assert normalise(chat(ASK, HELLO, chat_template_kwargs={})).template_kwargs is None


def test_dialogues_of_human_and_assistant():
    more = "\n\nHuman: I\nsay: Human: hi\n\nand\n\nAssistant:Bye "
    turns = [ASK, HELLO, turn("user", "I\nsay: Human: hi\n\nand"), turn("assistant", "Bye ")]
    assert normalise({"text": SPOKEN + more}, "human_assistant").messages == turns
    assert normalise({"text": SPOKEN[2:]}, "human_assistant").messages == [ASK, HELLO]
    chosen = {"chosen": SPOKEN, "rejected": SPOKEN + "!"}
    found = normalise(chosen, "human_assistant", {"text": "chosen"}, ["rejected"])
    assert (found.messages, found.ignored) == ([ASK, HELLO], ("rejected",))
    prompt = {"prompt": SPOKEN + "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello"}
    context = turn("assistant", "Hello", weight=0)
    assert normalise(prompt, "human_assistant").messages == [ASK, context, ASK, HELLO]
    assert normalise({"text": SPOKEN}, "text").messages == [turn("text", SPOKEN)]
    assert normalise({"text": "Human: Hi\n\nAssistant: Hello"}).format == "text"
    assert normalise({"text": "A play.\n\nHuman: Hi\n\nAssistant: Hello"}).format == "text"
    for text, reason in {
        "Hello": 'text: expected "\\\\n\\\\nHuman: ...',
        "A play." + SPOKEN: "found 'A play.",
        SPOKEN + "\n\nHuman: Hi": "the last turn is the user's",
        SPOKEN + "\n\nAssistant:": "message 3 is empty",
    }.items():
        with pytest.raises(ValueError, match=reason):
            normalise({"text": text}, "human_assistant")
    with pytest.raises(ValueError, match=r"prompt: expected .* at its end"):
        normalise({"prompt": SPOKEN, "completion": "a"}, "human_assistant")


def test_system_prompts():
    own = [CALM, ASK, HELLO]
    assert set_system_prompt(own, "keep", None) == own
    assert set_system_prompt(own, "replace", "New.") == [turn("system", "New."), ASK, HELLO]
    assert set_system_prompt(own, "prepend", "New.")[0] == turn("system", "New.\n\nBe calm.")
    for mode in ("replace", "prepend"):
        assert set_system_prompt([ASK, HELLO], mode, "New.") == [turn("system", "New."), ASK, HELLO]
        assert set_system_prompt([turn("text", "a")], mode, "New.") == [turn("text", "a")]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a", "{}", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "function", "arguments", "text", "a"]), inner)
    ),
    max_leaves=6,
)
turns = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.just("a") | values,
    },
    optional={
        "tool_calls": values | st.just([CALL]),
        "weight": values,
        "name": values,
        "reasoning_content": values,
    },
)
rows = st.one_of(
    values,
    st.fixed_dictionaries(
        {"messages": values | st.lists(turns, max_size=3).map(lambda made: [ASK, *made, HELLO])},
        optional={"tools": values | st.just([FUNCTION]), "system": values},
    ),
)


@given(rows, st.sampled_from(["auto", *BY_NAME]))
def test_any_row_is_good_or_bad_and_a_good_one_is_normal_already(row, format):
    try:
        messages, tools, *_ = normalise(row, format)
    except ValueError:
        return
    if format in ("auto", "messages") and is_conversation(messages):
        assert normalise({"messages": messages, "tools": tools})[:2] == (messages, tools)


# --- real files --------------------------------------------------------------------------------

SELF_INSTRUCT = {
    "instruction": "instruction",
    "input": "instances.0.input",
    "output": "instances.0.output",
}
REAL = {  # file, columns -> rows, format; none of them has a bad row
    "instruct/gsm8k_train.jsonl": (None, 7473, "question_answer"),
    "instruct/gsm8k_test.jsonl": (None, 1319, "question_answer"),
    "instruct/rasbt_instruction_data.json": (None, 1100, "alpaca"),
    "instruct/self_instruct_seed_tasks.jsonl": (SELF_INSTRUCT, 175, "alpaca"),
    "chat/fastchat_dummy_conversation.json": (None, 500, "sharegpt"),
    "chat/glaive_toolcall_en_demo.json": (None, 300, "sharegpt"),
    "classify/hatecheck_test_suite_cases.csv": (
        {"prompt": "test_case", "completion": "label_gold"},
        3728,
        "prompt_completion",
    ),
    "text/tinyshakespeare.txt": (None, 1, "text"),
    "text/tinystories_1000.json": (None, 1000, "text"),
}


@pytest.mark.parametrize(("file", "case"), REAL.items(), ids=REAL)
def test_every_row_of_real_files(shared, file, case):
    columns, num_rows, name = case
    rows, bad = load_rows(str(shared / "data" / file), columns=columns)
    assert (len(rows), bad) == (num_rows, [])
    assert {row.format for row in rows} == {name}


def test_the_tools_of_real_rows(shared):
    rows, _ = load_rows(str(shared / "data/chat/glaive_toolcall_en_demo.json"))
    assert sum(row.tools is None for row in rows) == 109
    assert all(tool["type"] == "function" for row in rows for tool in row.tools or [])
    messages = [message for row in rows for message in row.messages]
    assert Counter(m["role"] for m in messages) == {"user": 746, "assistant": 957, "tool": 211}
    calls = [m["tool_calls"] for m in messages if "tool_calls" in m]
    assert len(calls) == 211
    assert rows[3].messages[1]["tool_calls"][0]["function"] == {
        "name": "calculate_area",
        "arguments": {"shape": "rectangle", "dimensions": [5, 3]},
    }


def test_the_texts_of_real_rows(shared):
    file = shared / "data/classify/hatecheck_test_suite_cases.csv"
    rows, _ = load_rows(str(file), columns=REAL["classify/hatecheck_test_suite_cases.csv"][0])
    answers = Counter(row.messages[1]["content"] for row in rows)
    assert answers == {"hateful": 2563, "non-hateful": 1165}
    (text,), _ = load_rows(str(shared / "data/text/tinyshakespeare.txt"))
    written = (shared / "data/text/tinyshakespeare.txt").read_text()
    assert text.messages[0]["content"] == written.strip("\n")
