"""Normalises the messages, tool calls and tools of a row to the form that chat templates render.

No message is repaired. If something that it says would be lost, guessed or not rendered, the row is
bad: that is a `ValueError` with the reason. Keys with an empty value (null, "", [], {}) do not
count.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from decimal import Decimal
from typing import Any

Message = dict[str, Any]  # role, content; maybe tool_calls, tool_call_id, name, weight, reasoning
Messages = list[Message]
Tools = list[Any]  # objects, each {"type": "function", "function": {"name": ..., ...}}

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system", "function": "tool"}
MAX_WEIGHT = 1e6  # of a message's weight in the loss
DEEPEST = 64  # levels in a tool or a call; templates and pickling handle at most 300
# Names of a turn's thoughts in public data sets; the first is what templates read.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
# Keys that a message may have besides role, content and weight; no others would be rendered.
EXTRAS = {
    "system": {"name"},
    "user": {"name"},
    "assistant": {"name", "tool_calls", "function_call", *THOUGHTS},
    "tool": {"name", "tool_call_id"},
}
# Names of a tool's parameters in other programs; templates read `parameters`.
OTHER_SCHEMAS = {"input_schema", "inputSchema", "args", "arguments", "params", "parameters_schema"}
REMEDIES = {  # for keys that would not be rendered
    **dict.fromkeys(("train", "loss", "masked"), "use a weight of 0 or 1"),
    "refusal": "if the answer is to refuse, put this text in content",
}
# Kinds of content parts -> (their order in a turn, the keys that their value may have).
PARTS = {
    "reasoning": (0, ("value", "reasoning", "text")),
    "thinking": (0, ("thinking", "value")),
    "text": (1, ("text", "value")),
    "input_text": (1, ("text",)),
    "output_text": (1, ("text",)),
    "tool_call": (2, ("value",)),
}
# Arguments of `apply_chat_template` that are not a template's own variables.
NO_VARIABLES = re.compile(
    r"messages|conversation|tools|documents|chat_template|add_generation_prompt|tokenizer?\w*|"
    r"continue_final_message|padding|truncation|max_length|return_\w+|\w+_token|raise_exception"
)


def content_text(message: Message) -> str:
    """Returns the content of a message as text, with its parts joined."""
    content = message["content"]
    return content if isinstance(content, str) else _joined(content)


def _joined(parts: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


def read_messages(messages: Any, name: str) -> Messages:
    """Returns the messages of a list, or of a list as JSON text."""
    listed = list_turns(messages, name)
    return [_message(message, f"message {n}") for n, message in enumerate(listed, 1)]


def list_turns(value: Any, name: str) -> list[Any]:
    """Returns the turns of a list, of JSON text, or of an object of columns, as Arrow has some."""
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [
            dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)
        ]
    return as_list(value, name)


def is_empty(value: Any) -> bool:
    """Returns whether a value says nothing: null, "", [], {}, or a list of such."""
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, str | dict) and not value)


def _message(message: Any, name: str) -> Message:
    """Returns a message with only the keys that can be rendered."""
    role, content, given = _open_message(message, name)
    if not given and isinstance(content, str) and role != "tool":  # nearly every message
        return {"role": role, "content": as_text(content, f"{name}: content")}
    weight = _weight_of(given, role, name)
    if ignored := sorted(given.keys() - EXTRAS[role]):
        advice = {REMEDIES.get(key, "remove or convert it") for key in ignored}
        raise ValueError(
            f"{name}: would not be rendered: {', '.join(ignored)}; {', or '.join(sorted(advice))}, "
            "or name it in data.ignore_columns"
        )
    content, thoughts, parts_of_calls = _content(content, role, name)
    thoughts += [as_text(given[key], f"{name}: {key}") for key in THOUGHTS if key in given]
    calls = [*_calls(given, name), *parts_of_calls]
    result: Message = {"role": role, "content": ""}
    if calls:
        result["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if key in given:
            result[key] = as_text(given[key], f"{name}: {key}")
    if len(set(thoughts)) > 1:
        raise ValueError(f"{name}: expected its thoughts once, found several that differ")
    if thoughts:
        result["reasoning_content"] = thoughts[0]
    if weight is not None:
        result["weight"] = weight
    is_blank = content in (None, "") or (isinstance(content, list) and not _joined(content))
    may_be_blank = calls or (role == "tool" and content is not None)
    if not (is_blank and may_be_blank):
        result["content"] = _checked_content(content, role, name)
    return result


def _open_message(message: Any, name: str) -> tuple[str, Any, dict[str, Any]]:
    """Returns role, content and the other keys that have a value; ShareGPT's `value` is content."""
    if not isinstance(message, dict):
        raise ValueError(f"{name}: expected an object, found {type(message).__name__}")
    if "role" not in message:
        keys = ", ".join(repr(key) for key in [*message][:8]) or "none"
        raise ValueError(f"{name}: expected the keys 'role' and 'content', found {keys}")
    role, content = message["role"], message.get("content")
    given = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content") and not is_empty(value)
    }
    if content is None and "value" in message:
        content, _ = message["value"], given.pop("value", None)
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{name}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
    return role, content, given


def _weight_of(given: dict[str, Any], role: str, name: str) -> float | None:
    """Removes the weight from a message's keys and returns it; None if it is the usual one."""
    names = [key for key in ("weight", "loss_weight") if key in given]
    found = {key: _weight(given.pop(key), f"{name}: {key}") for key in names}
    if len(set(found.values())) > 1:
        raise ValueError(f"{name}: expected one weight, found weight and loss_weight")
    weight = next(iter(found.values()), None)
    if role != "assistant" and found.get("loss_weight"):
        raise ValueError(
            f"{name}: loss_weight: expected 0, since only turns of the assistant are learnt; "
            "data.supervise: everything learns the others, too"
        )
    usual = "weight" not in found and (role != "assistant" or weight == 1)
    return None if usual else weight


def _calls(given: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the calls of a message, those of OpenAI's earlier `function_call` too."""
    if "function_call" in given and "tool_calls" in given:
        raise ValueError(f"{name}: expected tool_calls or function_call, found both")
    if "function_call" in given:
        value = json_value(given["function_call"], f"{name}: function_call")
        return [read_call(value, f"{name}: call")]
    at = f"{name}: tool_calls"
    listed = as_list(given.get("tool_calls", []), at)
    return [read_call(each, f"{name}: call {n}") for n, each in enumerate(listed, 1)]


def _content(content: Any, role: str, name: str) -> tuple[Any, list[str], list[dict[str, Any]]]:
    """Splits a list of typed parts into (content, thoughts, calls).

    Parts of text stay parts, since templates may render each by itself. Texts under the key
    `value` are joined, as LLaMA-Factory does. Another content is returned as it is, unchecked.
    """
    if not isinstance(content, list):
        return content, [], []
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    last, are_parts = 0, False
    for number, part in enumerate(content, 1):
        at = f"{name}: content part {number}"
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        order, keys = PARTS.get(kind, (0, ())) if isinstance(kind, str) else (0, ())
        given = {k for k, v in part.items() if v not in (None, [])} if keys else set[str]()
        key = next((key for key in keys if key in given), "")
        if not key or (order != 1 and role != "assistant"):
            raise ValueError(
                f'{at}: expected {{"type": "text", "text": "..."}}, found {kind!r}; only text can '
                "be trained on"
            )
        if ignored := sorted(given - {"type", key}):
            raise ValueError(f"{at}: not rendered: {', '.join(ignored)}")
        if order < last:
            raise ValueError(f"{at}: expected thoughts, then text, then calls, found {kind} last")
        last = order
        if kind == "tool_call":
            calls.append(read_call(json_value(part[key], at), at))
        elif not isinstance(part[key], str):
            raise ValueError(f"{at}: expected text, found {type(part[key]).__name__}")
        else:
            (texts if order else thoughts).append(part[key])
            are_parts |= order == 1 and key == "text"
    found: Any = [{"type": "text", "text": each} for each in texts] if are_parts else "".join(texts)
    thought = "".join(thoughts)
    return found, [as_text(thought, f"{name}: thoughts")] if thought else [], calls


def _checked_content(content: Any, role: str, name: str) -> Any:
    """Checks a content that is not empty. A number in an answer or a result becomes its text."""
    if isinstance(content, list):
        as_text(_joined(content), f"{name}: content")
        return content
    if role == "tool" and isinstance(content, str):  # blanks are what the tool returned
        check_characters(content, f"{name}: content")
        return content
    return (as_answer if role in ("assistant", "tool") else as_text)(content, f"{name}: content")


def read_call(value: Any, name: str) -> dict[str, Any]:
    """Returns a tool call in the form of templates: a function with an object as arguments."""
    given = as_object(value, name)
    function = as_object(given["function"], f"{name}: function") if "function" in given else given
    known = {"id", "type", "index", "name", "arguments"}
    ignored = given.keys() - known - {"function"} | function.keys() - known
    if ignored:
        raise ValueError(f"{name}: would not be rendered: {', '.join(sorted(ignored))}")
    if given.get("type", "function") != "function":
        raise ValueError(f"{name}: expected the type 'function', found {given['type']!r}")
    arguments = function.get("arguments", {})
    arguments = {} if arguments == "" else json_value(arguments, f"{name}: arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}: arguments: expected an object, found {type(arguments).__name__}")
    check_strings(arguments, f"{name}: arguments")
    number = {"id": as_text(given["id"], f"{name}: id")} if "id" in given else {}
    called = as_text(function.get("name"), f"{name}: name")
    return {**number, "type": "function", "function": {"name": called, "arguments": arguments}}


def tools_of(row: dict[str, Any]) -> Tools | None:
    """Returns the tools of a row, each wrapped as OpenAI does; None if it has none.

    They are a list, or JSON text of one, under `tools` or OpenAI's earlier `functions`.
    """
    if row.get("tools") is None and row.get("functions") is None:
        return None
    given = {key: row[key] for key in ("tools", "functions") if row.get(key) not in (None, "", [])}
    if len(given) > 1:
        raise ValueError("expected tools or functions, found both")
    name, value = next(iter(given.items()), ("tools", None))
    result = []
    for number, tool in enumerate(as_list(json_value(value, name) or [], name), 1):
        at = f"tool {number}"
        wrapped = as_object(json_value(tool, at), at)
        if "function" not in wrapped:
            wrapped = {"type": "function", "function": wrapped}
        function = as_object(json_value(wrapped["function"], at), f"{at}: function")
        other = sorted(function.keys() & OTHER_SCHEMAS)
        if other and "parameters" not in function:
            raise ValueError(
                f"{at}: expected its schema as parameters, found {other[0]}; rename it"
            )
        if isinstance(function.get("parameters"), str):
            function["parameters"] = json_value(function["parameters"], f"{at}: parameters")
        as_text(function.get("name"), f"{at}: name")
        wrapped = {**wrapped, "function": function}
        check_strings(wrapped, at)
        result.append(wrapped)
    return result or None


def template_kwargs_of(row: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the variables that a row sets for its chat template, or None."""
    name = "chat_template_kwargs"
    value = row.get(name)
    if is_empty(value):
        return None
    given = as_object(json_value(value, name), name)
    if reserved := [key for key in given if NO_VARIABLES.fullmatch(key)]:
        raise ValueError(f"{name}: {reserved[0]!r} is not a variable of a template")
    check_strings(given, name)
    return given or None


def as_object(value: Any, name: str) -> dict[str, Any]:
    """Returns the keys of an object that are not null."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, found {type(value).__name__}")
    return {key: item for key, item in value.items() if item is not None}


def as_list(value: Any, name: str) -> list[Any]:
    """Returns a list, or the list of a JSON text. Raises ValueError if it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json_value(value, name)
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, found {type(value).__name__}")
    return value


def json_value(value: Any, name: str) -> Any:
    """Parses a JSON text; any other value is returned, because it is already parsed."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error_reason(error)}") from None


def _weight(value: Any, name: str) -> float:
    if not is_number(value) or not 0 <= value <= MAX_WEIGHT:
        found = f"{value!r:.40}"
        raise ValueError(f"{name}: expected a number from 0 to {MAX_WEIGHT:g}, found {found}")
    return float(value) if isinstance(value, JsonFloat) else value


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_strings(value: Any, name: str, depth: int = 0) -> None:
    """Raises ValueError if a text in a JSON value cannot be tokenised, or if it is too deep."""
    if depth > DEEPEST:
        raise ValueError(f"{name}: nested too deeply (over {DEEPEST} levels)")
    if isinstance(value, str):
        check_characters(value, name)
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            check_strings(item, name, depth + 1)


def as_text(value: Any, name: str) -> str:
    """Returns a text that says something and can be tokenised."""
    if not isinstance(value, str):
        path = "" if ":" in name else text_path(value, name)  # which a column has, and no message
        advice = f"; data.columns can name a part of it: {path}" * (path not in ("", name))
        advice = advice or "; write it as text" * isinstance(value, bool | dict | list)
        raise ValueError(f"{name}: expected text, found {type(value).__name__}{advice}")
    if not value.strip():
        raise ValueError(f"{name} is {'blank' if value else 'empty'}")
    check_characters(value, name)
    return value


def text_path(value: Any, name: str) -> str:
    """Returns the path of the first text in a value, such as `answers.text.0`; `name` if it is
    one."""
    if not isinstance(value, dict | list):
        return name
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        path = text_path(item, f"{name}.{key}")
        if isinstance(item, str) or path != f"{name}.{key}":
            return path
    return name


def as_answer(value: Any, name: str) -> str:
    """Returns a text, or a number as its file writes it."""
    if isinstance(value, Decimal):
        return format(value, "f")
    if is_number(value) and math.isfinite(value):
        return value.text if isinstance(value, JsonFloat) else json.dumps(value)
    return as_text(value, name)


def check_characters(text: str, name: str) -> None:
    """Raises ValueError for characters that cannot be tokenised."""
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


class JsonFloat(float):
    """A number with the text that it has in its file: the answer 7.50 stays 7.50."""

    text: str

    def __new__(cls, text: str) -> JsonFloat:
        """Returns the number of a text."""
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes the number anew from its text."""
        return JsonFloat, (self.text,)


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


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=JsonFloat
)


def error_reason(error: ValueError | RecursionError) -> str:
    """Returns the reason of a bad row, from the error that reading it raised."""
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        is_python = re.match(r"\s*\[?\s*\{\s*'", error.doc)
        advice = "; it is written as Python prints it: write it with json.dumps" * bool(is_python)
        return f"not valid JSON ({error.msg}, {line}column {error.colno}){advice}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
