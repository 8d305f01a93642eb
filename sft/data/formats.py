"""Turns a raw row of any format into the messages and tools that the chat template renders.

No row is repaired. If something would be lost, guessed or not rendered, the row is bad: that is a
`ValueError` with the reason. A row's keys decide its format, one of FORMATS. `system` and `tools`
may be further keys of any chat format; other keys (id, source ...) are ignored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Message = dict[str, Any]  # role, content; maybe tool_calls, tool_call_id, name, weight, reasoning
Messages = list[Message]
Tools = list[Any]  # objects, each {"type": "function", "function": {"name": ..., ...}}

ROLES = ("system", "user", "assistant", "tool")
MAX_WEIGHT = 1e6  # of a message's weight in the loss
DEEPEST = 64  # levels in a tool or a call; templates and pickling handle at most 300
TEXT = "text"  # role of the only message of raw text, which is not a conversation
# Keys that a message may have besides role, content and weight; no others would be rendered.
EXTRAS = {
    "system": set[str](),
    "user": set[str](),
    "assistant": {"tool_calls", "reasoning_content"},
    "tool": {"tool_call_id", "name"},
}
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    **{role: role for role in ROLES},
}


class Format(NamedTuple):
    """A format of rows and the function that reads its messages."""

    name: str
    keys: tuple[str, ...]  # a row with all of these keys has the format
    read: Callable[[dict[str, Any]], Messages]


def recognise(row: Any) -> str:
    """Returns the name of the only format that the row's keys fit. Raises ValueError if there are
    none or several."""
    if isinstance(row, str):
        return "text"
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    found = [known.name for known in FORMATS if row.keys() >= set(known.keys)]
    if len(found) > 1:
        raise ValueError(f"the row fits several formats; set data.format: {' or '.join(found)}")
    if not found:
        known = ", ".join("/".join(known.keys) for known in FORMATS)
        raise ValueError(
            f"expected the keys of one format ({known}), found {sorted(row)}; "
            "name the columns to use in data.columns"
        )
    return found[0]


def normalise(
    row: Any, format: str = "auto", columns: dict[str, str] | None = None
) -> tuple[Messages, Tools | None]:
    """Returns the messages and tools of a row. Raises ValueError with the reason if it is bad."""
    row = select_columns(row, columns) if columns else row
    known = BY_NAME[recognise(row) if format == "auto" else format]
    if known.name == "text" and isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if not row.keys() >= set(known.keys):
        keys = "/".join(known.keys)
        raise ValueError(
            f"expected the keys {keys} (data.format: {known.name}), found {sorted(row)}"
        )
    messages = known.read(row)
    if known.name == "text":
        return messages, None
    if messages and messages[0]["role"] == "system" and row.get("system") not in (None, ""):
        raise ValueError("a system prompt stands both in the row and in its first message")
    messages = _with_system_of(row, messages)
    _check_turns(messages)
    return messages, _tools(row.get("tools"))


def _with_system_of(row: dict[str, Any], messages: Messages) -> Messages:
    if row.get("system") in (None, ""):
        return messages
    return [{"role": "system", "content": _text(row["system"], "system")}, *messages]


ANSWERED_BY = {
    "output": "instruction",
    "completion": "prompt",
    "answer": "question",
    "assistant": "user",
}


def read_question(row: Any) -> tuple[Messages, Tools | None]:
    """Returns the messages and tools of a row that is to be answered, not trained on.

    It may be a text, and it needs no answer. If its last turn is the assistant's, that is the
    expected answer. Raises ValueError with the reason for a bad row.
    """
    if isinstance(row, str) or (isinstance(row, dict) and row.keys() == {"text"}):
        text = row if isinstance(row, str) else row["text"]
        return [{"role": "user", "content": _text(text, "text")}], None
    given = dict(row) if isinstance(row, dict) else row
    placeholder = None
    for answer, ask in ANSWERED_BY.items():
        if isinstance(given, dict) and ask in given and given.get(answer) in (None, ""):
            placeholder = [{"role": "assistant", "content": "-"}]
            given[answer] = placeholder if isinstance(given[ask], list) else "-"
    known = BY_NAME[recognise(given)]
    messages = known.read(given)
    messages = _with_system_of(given, messages[:-1] if placeholder else messages)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no user turn, so nothing is asked")
    return messages, _tools(given.get("tools"))


def select_columns(row: Any, columns: dict[str, str]) -> dict[str, Any]:
    """Returns {field: value of its column}. Raises ValueError for a column that is missing."""
    if not isinstance(row, dict):
        raise ValueError(f"data.columns: expected an object, found {type(row).__name__}")
    try:
        return {field: get_column(row, column) for field, column in columns.items()}
    except ValueError as error:
        raise ValueError(f"data.columns: {error}") from None


def get_column(row: dict[str, Any], column: str) -> Any:
    """Returns the value of a row at a key, or at a path such as `instances.0.input`.

    Raises ValueError if there is none.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(f"no column {column!r}, the row has {sorted(row)}")
    return value


def set_system_prompt(
    messages: Messages, mode: Literal["keep", "replace", "prepend"], text: str | None
) -> Messages:
    """Puts the system prompt `text` in place of the conversation's own, or before it.

    Raw text has no system prompt and does not change.
    """
    if mode == "keep" or not text or messages[0]["role"] == TEXT:
        return messages
    own = [m["content"] for m in messages if m["role"] == "system"] if mode == "prepend" else []
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join([text, *own])}, *others]


def parse_json(text: str) -> Any:
    """Parses JSON more strictly than Python does: without repeated keys, NaN and Infinity."""
    return _DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated!r} is given twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def error_reason(error: ValueError | RecursionError) -> str:
    """Returns the reason of a bad row, from the error that reading it raised."""
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"not valid JSON ({error.msg}, {line}column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _from_messages(row: dict[str, Any]) -> Messages:
    return _conversation(row["messages"], "messages")


def _from_sharegpt(row: dict[str, Any]) -> Messages:
    turns = _list(row["conversations"], "conversations")
    named = [_from_turn(turn, f"message {n}") for n, turn in enumerate(turns, 1)]
    return _conversation(named, "conversations")


def _from_turn(turn: Any, name: str) -> Any:
    """Converts a ShareGPT turn to a message. Any other value is returned, to be checked later."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = turn["from"]
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise ValueError(f"{name}: unknown role {role!r}, expected one of {known}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message = {**rest, "role": SHAREGPT_ROLES[role]}
    if role != "function_call":
        return {**message, "content": turn.get("value")}
    calls = _json(turn.get("value"), f"{name}: function_call")
    return {**message, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _from_alpaca(row: dict[str, Any]) -> Messages:
    messages = []
    for number, pair in enumerate(_list(row.get("history") or [], "history"), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(
                f"history {number}: expected a pair (question, answer), found {pair!r}"
            )
        messages += _pair(pair[0], pair[1], f"history {number}", f"history {number}")
    question = _text(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        question += "\n\n" + _text(row["input"], "input")
    return [*messages, *_pair(question, row["output"], "instruction", "output")]


def _from_prompt_completion(row: dict[str, Any]) -> Messages:
    """Joins two texts, or two lists of messages. Assistant turns in a prompt are context."""
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _pair(prompt, completion, "prompt", "completion")
    context = _conversation(prompt, "prompt")
    for message in context:
        if message["role"] == "assistant":
            message.setdefault("weight", 0)
    return context + _conversation(completion, "completion")


def _from_question_answer(row: dict[str, Any]) -> Messages:
    return _pair(row["question"], row["answer"], "question", "answer")


def _from_seed(row: dict[str, Any]) -> Messages:
    return _pair(row["user"], row["assistant"], "user", "assistant")


def _from_text(row: dict[str, Any]) -> Messages:
    return [{"role": TEXT, "content": _text(row["text"], "text")}]


FORMATS = (
    Format("messages", ("messages",), _from_messages),
    Format("sharegpt", ("conversations",), _from_sharegpt),
    Format("alpaca", ("instruction", "output"), _from_alpaca),
    Format("prompt_completion", ("prompt", "completion"), _from_prompt_completion),
    Format("question_answer", ("question", "answer"), _from_question_answer),
    Format("seed", ("user", "assistant"), _from_seed),
    Format("text", ("text",), _from_text),
)
BY_NAME = {known.name: known for known in FORMATS}


def _check_turns(messages: Messages) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so nothing to learn")
    if roles[-1] != "assistant":
        raise ValueError(f"the last turn is the {roles[-1]}'s, expected the assistant's")
    if not any(m.get("weight", 1) for m in messages if m["role"] == "assistant"):
        raise ValueError("every assistant turn has weight 0, so nothing to learn")
    for number, (before, role) in enumerate(zip(["", *roles], roles, strict=False), 1):
        if role == "tool" and before not in ("assistant", "tool"):
            raise ValueError(f"message {number}: a tool's result needs an assistant turn before it")


def _conversation(messages: Any, name: str) -> Messages:
    found = _list(messages, name)
    return [_message(message, f"message {n}") for n, message in enumerate(found, 1)]


def _message(message: Any, name: str) -> Message:
    """Returns a message with only the keys that can be rendered; null is a missing key."""
    if not isinstance(message, dict):
        raise ValueError(f"{name}: expected an object, found {type(message).__name__}")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.pop("role", None)
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise ValueError(f"{name}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
    content = given.pop("content", None)
    if ignored := sorted(given.keys() - EXTRAS[role] - {"weight"}):
        raise ValueError(f"{name}: would not be rendered: {', '.join(ignored)}")
    result: Message = {"role": role, "content": content}
    if calls := given.pop("tool_calls", None):
        listed = _list(calls, f"{name}: tool_calls")
        result["tool_calls"] = [
            _call(call, f"{name}: call {n}") for n, call in enumerate(listed, 1)
        ]
    for key in ("tool_call_id", "name", "reasoning_content"):
        if given.get(key, "") != "":
            result[key] = _text(given[key], f"{name}: {key}")
    if "weight" in given:
        result["weight"] = _weight(given["weight"], f"{name}: weight")
    only_calls = "tool_calls" in result and content in (None, "", [])
    result["content"] = "" if only_calls else _text(_join_parts(content, name), f"{name}: content")
    return result


def _join_parts(content: Any, name: str) -> Any:
    """Joins typed parts [{"type": "text", "text": ...}]; any other value is returned."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f'{name}: content part {number}: expected {{"type": "text", "text": "..."}}, '
                f"found {kind!r}; only text can be trained on"
            )
        if ignored := sorted({k for k, v in part.items() if v is not None} - {"type", "text"}):
            raise ValueError(f"{name}: content part {number}: not rendered: {', '.join(ignored)}")
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Any, name: str) -> dict[str, Any]:
    """Returns a tool call in the form of templates: a function with an object as arguments."""
    given = _object_in(call, name)
    function = _object_in(given["function"], f"{name}: function") if "function" in given else given
    known = {"id", "type", "index", "name", "arguments"}
    ignored = given.keys() - known - {"function"} | function.keys() - known
    if ignored:
        raise ValueError(f"{name}: would not be rendered: {', '.join(sorted(ignored))}")
    if given.get("type", "function") != "function":
        raise ValueError(f"{name}: expected the type 'function', found {given['type']!r}")
    arguments = _json(function.get("arguments", {}), f"{name}: arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}: arguments: expected an object, found {type(arguments).__name__}")
    _check_strings(arguments, f"{name}: arguments")
    number = {"id": _text(given["id"], f"{name}: id")} if "id" in given else {}
    called = _text(function.get("name"), f"{name}: name")
    return {**number, "type": "function", "function": {"name": called, "arguments": arguments}}


def _tools(value: Any) -> Tools | None:
    """Returns the tools, each wrapped as OpenAI does; None, "" and an empty list mean none."""
    tools = _json(value, "tools") if value not in (None, "") else None
    result = []
    for number, tool in enumerate(_list(tools or [], "tools"), 1):
        given = _object_in(tool, f"tool {number}")
        wrapped = given if "function" in given else {"type": "function", "function": given}
        function = _object_in(wrapped["function"], f"tool {number}: function")
        _text(function.get("name"), f"tool {number}: name")
        _check_strings(wrapped, f"tool {number}")
        result.append(wrapped)
    return result or None


def _pair(ask: Any, answer: Any, ask_name: str, answer_name: str) -> Messages:
    return [
        {"role": "user", "content": _text(ask, ask_name)},
        {"role": "assistant", "content": _text(answer, answer_name)},
    ]


def _object_in(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, found {type(value).__name__}")
    return {key: item for key, item in value.items() if item is not None}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, found {type(value).__name__}")
    return value


def _json(value: Any, name: str) -> Any:
    """Parses a JSON text; any other value is returned, because it is already parsed."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error_reason(error)}") from None


def _weight(value: Any, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_WEIGHT:
        found = f"{value!r:.40}"
        raise ValueError(f"{name}: expected a number from 0 to {MAX_WEIGHT:g}, found {found}")
    return value


def _check_strings(value: Any, name: str, depth: int = 0) -> None:
    """Raises ValueError if a text in a JSON value cannot be tokenised, or if it is too deep."""
    if depth > DEEPEST:
        raise ValueError(f"{name}: nested too deeply (over {DEEPEST} levels)")
    if isinstance(value, str):
        _check_characters(value, name)
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_strings(item, name, depth + 1)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, found {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name} is {'blank' if value else 'empty'}")
    _check_characters(value, name)
    return value


def _check_characters(text: str, name: str) -> None:
    if "\0" in text:
        raise ValueError(f"{name} contains a NUL character")
    if not text.isascii() and (lone := re.search(r"[\ud800-\udfff]", text)):
        raise ValueError(f"{name} contains a lone surrogate (U+{ord(lone[0]):X})")


def scalar_text(value: Any) -> str:
    """Returns a scalar as text, or "". 7.0 gives "7": Parquet makes integers with gaps floats."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value) if isinstance(value, int | float) else ""


def content_text(message: dict[str, Any]) -> str:
    """Returns the content of a message as text, with its parts joined."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
