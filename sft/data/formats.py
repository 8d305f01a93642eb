"""Turns a raw row of any format into the messages and tools that the chat template renders.

No row is repaired. If something would be lost, guessed or not rendered, the row is bad: that is a
`ValueError` with the reason. A row's keys decide its format, one of FORMATS. `system`, `tools` and
`chat_template_kwargs` may be further keys of any chat format. Other columns are ignored and named,
unless they change what the row means (`data/columns`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

from sft.data.columns import PAIRS, PREFERENCE, Lost, find_ignored, guess_columns, is_preference
from sft.data.messages import (
    Message,
    Messages,
    Tools,
    as_answer,
    as_list,
    as_text,
    content_text,
    json_value,
    list_turns,
    read_messages,
    template_kwargs_of,
    tools_of,
)
from sft.data.tokenised import TOKENS, read_tokens

TEXT = "text"  # role of the only message of raw text, which is not a conversation
# Keys that a row may lack, whatever its format.
SHARED = frozenset({"system", "tools", "functions", "chat_template_kwargs"})
OPTIONAL = SHARED | {"input", "history", "reasoning_content"}
CALLS = ("function_call", "tool_call")  # roles whose value is a call, or a list of calls
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "prompter", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bot", "model", "assistant", *CALLS), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "tool"), "tool"),
    **{"function": "tool", "system": "system"},
}
# Keys of turns such as {"human": "Hi", "assistant": "Hello"}, in the order in which they are said.
TURNS = {
    "system": ("system",),
    "user": ("human", "user", "input", "prompt", "question"),
    "assistant": ("assistant", "gpt", "bot", "output", "response", "completion", "answer"),
}
LISTED = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]""")  # how a list of messages begins
SPOKEN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
DIALOGUE = re.compile(r"(?s)\n\nHuman:.*\n\nAssistant:")  # how a text of that format begins


class Format(NamedTuple):
    """A format of rows and the function that reads its messages."""

    name: str
    keys: tuple[tuple[str, ...], ...]  # a row with all keys of one of these has the format
    read: Callable[[dict[str, Any]], Messages]
    more: frozenset[str] = frozenset()  # further keys, besides those of every format
    is_detected: bool = True  # False: only if data.format names it

    def fits(self, keys: Collection[str]) -> bool:
        """Returns whether a row with these keys may have the format."""
        return any(all(key in keys for key in each) for each in self.keys)


class NormalRow(NamedTuple):
    """A row as the chat template takes it."""

    messages: Messages
    tools: Tools | None = None
    template_kwargs: dict[str, Any] | None = None  # variables of the template
    format: str = ""
    ignored: tuple[str, ...] = ()  # its columns that are not used


def recognise(row: Any) -> str:
    """Returns the name of the only format that the row's keys fit. Raises ValueError if there are
    none or several."""
    if isinstance(row, str):
        return "text"
    if not isinstance(row, dict):
        advice = '; write {"messages": [the turns]}' if isinstance(row, list) else ""
        raise ValueError(f"expected an object, found {type(row).__name__}{advice}")
    given = frozenset(key for key, value in row.items() if value is not None)
    found = list(_detect(given) or _detect(frozenset(row)))
    if len(found) == 2 and "text" in found and _is_copy(row, *found):
        found.remove("text")
    if len(found) == 1 and _is_dialogue(row, *found):
        found.append("human_assistant")
    if len(found) > 1:
        raise ValueError(f"the row fits several formats; set data.format: {' or '.join(found)}")
    if not found:
        known = ", ".join("/".join(known.keys[0]) for known in FORMATS if known.is_detected)
        more = f" and {len(row) - 10} more" * (len(row) > 10)
        raise ValueError(
            f"expected the keys of one format ({known}), found {sorted(row)[:10]}"
            f"{more}; {_suggest(row)}"
        )
    return found[0]


def _suggest(row: dict[str, Any]) -> str:
    """Returns what to do with a row of no known format."""
    spoken = [key for key, value in row.items() if isinstance(value, str) and DIALOGUE.match(value)]
    if spoken:
        others = f", data.ignore_columns: [{', '.join(spoken[1:])}]" if spoken[1:] else ""
        return f"set data.format: human_assistant, data.columns: {{text: {spoken[0]}}}{others}"
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return 'it is one turn of a conversation: write {"messages": [all its turns]} on one line'
    advice = "name the columns to use in data.columns"
    for columns in guess_columns(row):
        if (ignored := _try_columns(row, columns)) is not None:
            shown = ", ".join(
                f"{key}: {name if name == name.strip() else repr(name)}"
                for key, name in columns.items()
            )
            advice += f", such as {{{shown}}}"
            advice += f", with data.ignore_columns: [{', '.join(ignored)}]" * bool(ignored)
            break
    else:
        advice += ", or write the row as messages (docs/DATA.md)"
    for preference in [*filter(is_preference, row)][:1]:
        advice += f"; the column {preference!r} {PREFERENCE.holds}"
    return advice


def _try_columns(row: dict[str, Any], columns: dict[str, str]) -> list[str] | None:
    """Returns the columns that a row must ignore to be good with these `columns`, or None."""
    ignored: list[str] = []
    while True:
        try:
            normalise(row, "auto", columns, ignored)
        except Lost as lost:
            ignored += lost.columns
        except ValueError:
            return None
        else:
            return ignored


@lru_cache(maxsize=1024)
def _detect(keys: frozenset[str]) -> tuple[str, ...]:
    """Returns the names of the formats that a row with these keys may have."""
    return tuple(known.name for known in FORMATS if known.is_detected and known.fits(keys))


def _is_copy(row: dict[str, Any], *formats: str) -> bool:
    """Returns whether the text of a row is its conversation, rendered: it has the last answer."""
    (name,) = {*formats} - {"text"}
    try:
        messages = BY_NAME[name].read(row)
    except ValueError:
        return True  # the row is bad, and reading it again gives the reason
    answer = content_text(messages[-1]).strip() if messages else ""
    return bool(answer) and isinstance(row["text"], str) and answer in row["text"]


def _is_dialogue(row: dict[str, Any], format: str) -> bool:
    """Returns whether texts of a row are a dialogue of "Human:" and "Assistant:"."""
    given = row.get({"text": "text", "prompt_completion": "prompt"}.get(format, ""))
    return isinstance(given, str) and DIALOGUE.match(given) is not None


def normalise(
    row: Any,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    ignore: Collection[str] = (),
    used: Collection[str] = (),
) -> NormalRow:
    """Returns a row as the chat template takes it. Raises ValueError with the reason if it is bad.

    `columns` names the column of each key. `ignore`: columns, and keys of messages, that are left
    out even if they change what the row means. `used`: columns that something else reads.
    """
    whole, given = row, row
    if ignore and isinstance(row, dict):
        given = {key: value for key, value in row.items() if key not in ignore}
    row = select_columns(given, columns) if columns else given
    row = _without_keys(row, ignore) if ignore else row
    known = BY_NAME[recognise(row) if format == "auto" else format]
    if known.name == "text" and isinstance(row, str):
        row = {"text": row}
    _check_keys(row, known, is_mapped=bool(columns))
    messages = known.read(row)
    ignored: tuple[str, ...] = ()
    if isinstance(whole, dict):
        columns_used = _columns_of(given, columns) if columns else KNOWN_KEYS[known.name]
        ignored = find_ignored(given, known.name, messages, {*columns_used, *used})
        ignored += tuple(name for name in whole if name in ignore)
    if known.name in UNRENDERED:
        return NormalRow(messages, format=known.name, ignored=ignored)
    messages = _with_system_of(row, messages)
    _check_turns(messages)
    return NormalRow(messages, tools_of(row), template_kwargs_of(row), known.name, ignored)


def _check_keys(row: Any, known: Format, is_mapped: bool) -> None:
    """Raises ValueError if a row lacks the format's keys, or data.columns names one it has not."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if not known.fits(row):
        keys = " or ".join("/".join(keys) for keys in known.keys)
        raise ValueError(
            f"expected the keys {keys} (data.format: {known.name}), found {sorted(row)}"
        )
    names = KNOWN_KEYS[known.name]
    if is_mapped and (unread := row.keys() - names):
        raise ValueError(
            f"data.columns: the format {known.name} has no key {min(unread)!r}, expected one of "
            f"{', '.join(sorted(names))}"
        )


def _without_keys(row: Any, ignore: Collection[str]) -> Any:
    """Returns the row without these keys in its messages."""
    if not isinstance(row, dict):
        return row
    lists = {
        name: list_turns(row[name], name) for name in {"messages", "conversations"} & row.keys()
    }
    lists |= {n: row[n] for n in ("prompt", "completion") if isinstance(row.get(n), list)}
    for name, turns in lists.items():
        lists[name] = [
            {k: v for k, v in turn.items() if k not in ignore} if isinstance(turn, dict) else turn
            for turn in turns
        ]
    return row | lists


def _columns_of(row: dict[str, Any], columns: dict[str, str]) -> set[str]:
    """Returns the columns that data.columns names, those of a path by its first part."""
    return {name if name in row else name.partition(".")[0] for name in columns.values()}


def _with_system_of(row: dict[str, Any], messages: Messages) -> Messages:
    if row.get("system") in (None, ""):
        return messages
    if messages and messages[0]["role"] == "system":
        raise ValueError("a system prompt stands both in the row and in its first message")
    return [{"role": "system", "content": as_text(row["system"], "system")}, *messages]


def read_question(row: Any) -> NormalRow:
    """Returns a row that is to be answered, not trained on.

    It may be a text, and it needs no answer. If its last turn is the assistant's, that is the
    expected answer. Raises ValueError with the reason for a bad row.
    """
    if isinstance(row, str) or (isinstance(row, dict) and row.keys() == {"text"}):
        asked = row if isinstance(row, str) else row["text"]
        return NormalRow([{"role": "user", "content": as_text(asked, "text")}])
    given = dict(row) if isinstance(row, dict) else row
    placeholder = None
    for ask, answer in (known.keys[0] for known in FORMATS if known.name in PAIRS):
        if isinstance(given, dict) and ask in given and given.get(answer) in (None, ""):
            placeholder = [{"role": "assistant", "content": "-"}]
            given[answer] = placeholder if isinstance(given[ask], list) else "-"
            given.pop("text", None)  # which may be the conversation, rendered without its answer
    known = BY_NAME[recognise(given)]
    if known.name == "tokenised":
        raise ValueError("expected a conversation to answer, found tokens (input_ids)")
    messages = known.read(given)
    messages = _with_system_of(given, messages[:-1] if placeholder else messages)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no user turn, so nothing is asked")
    ignored = find_ignored(given, known.name, messages, KNOWN_KEYS[known.name], to_answer=True)
    return NormalRow(messages, tools_of(given), template_kwargs_of(given), ignored=ignored)


def select_columns(row: Any, columns: dict[str, str]) -> dict[str, Any]:
    """Returns {field: value of its column}, without OPTIONAL fields whose column is missing.

    Raises ValueError for another column that is missing.
    """
    if not isinstance(row, dict):
        raise ValueError(f"data.columns: expected an object, found {type(row).__name__}")
    found = {}
    for field, column in columns.items():
        try:
            found[field] = get_column(row, column)
        except ValueError as error:
            if field not in OPTIONAL:
                raise ValueError(f"data.columns: {error}") from None
    return found


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


def is_conversation(messages: Messages) -> bool:
    """Returns whether the messages are turns, not raw text or tokens."""
    return messages[0]["role"] not in (TEXT, TOKENS)


def set_system_prompt(
    messages: Messages, mode: Literal["keep", "replace", "prepend"], text: str | None
) -> Messages:
    """Puts the system prompt `text` in place of the conversation's own, or before it.

    Raw text and tokens have no system prompt and do not change.
    """
    if mode == "keep" or not text or not is_conversation(messages):
        return messages
    own = [content_text(m) for m in messages if m["role"] == "system"] if mode == "prepend" else []
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join([text, *own])}, *others]


def _from_messages(row: dict[str, Any]) -> Messages:
    return read_messages(row["messages"], "messages")


def _from_sharegpt(row: dict[str, Any]) -> Messages:
    turns = list_turns(row["conversations"], "conversations")
    named = [each for n, turn in enumerate(turns, 1) for each in _from_turn(turn, f"message {n}")]
    return read_messages(named, "conversations")


def _from_turn(turn: Any, name: str) -> list[Any]:
    """Converts a ShareGPT turn to messages. Any other value is returned, to be checked later."""
    if not isinstance(turn, dict) or "role" in turn:
        return [turn]
    if "from" not in turn:
        given = {key: value for key, value in turn.items() if value is not None}
        said = [
            {"role": role, "content": given[key]}
            for role, keys in TURNS.items()
            for key in keys
            if key in given
        ]
        is_spoken = len(said) == len(given) == len({message["role"] for message in said})
        return said if is_spoken else [turn]
    role = turn["from"]
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise ValueError(f"{name}: unknown role {role!r}, expected one of {known}")
    message = {key: value for key, value in turn.items() if key != "from"}
    message["role"] = SHAREGPT_ROLES[role]
    if role not in CALLS:
        return [message]
    calls = json_value(message.pop("value", None), f"{name}: {role}")
    return [{**message, "tool_calls": calls if isinstance(calls, list) else [calls]}]


def _pair(row: dict[str, Any], ask: str, answer: str) -> Messages:
    """Returns the question and the answer under these keys, with the row's thoughts."""
    said = {"role": "assistant", "content": as_answer(row[answer], answer)}
    return [{"role": "user", "content": as_answer(row[ask], ask)}, said | _thoughts_of(row)]


def _thoughts_of(row: dict[str, Any]) -> Message:
    thoughts = row.get("reasoning_content")
    return {"reasoning_content": as_text(thoughts, "reasoning_content")} if thoughts else {}


def _from_alpaca(row: dict[str, Any]) -> Messages:
    messages: Messages = []
    for number, pair in enumerate(as_list(row.get("history") or [], "history"), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(
                f"history {number}: expected a pair (question, answer), found {pair!r}"
            )
        for role, said in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": as_answer(said, f"history {number}")})
    parts = [(row[key], key) for key in ("instruction", "input") if row.get(key) not in (None, "")]
    parts = parts or [(row["instruction"], "instruction")]
    question = "\n\n".join(as_answer(value, name) for value, name in parts)
    return [*messages, *_pair(row | {"instruction": question}, "instruction", "output")]


def _from_prompt_completion(row: dict[str, Any]) -> Messages:
    """Joins two texts, or messages and what they are answered with, as messages or as a text.

    Assistant turns in a prompt are context.
    """
    prompt, completion = (
        as_list(given, key) if isinstance(given, str) and LISTED.match(given) else given
        for key, given in ((key, row[key]) for key in ("prompt", "completion"))
    )
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _pair(row, "prompt", "completion")
    if not isinstance(prompt, list):
        raise ValueError("expected a prompt of messages beside such a completion, found text")
    context = read_messages(prompt, "prompt")
    if isinstance(completion, list):
        return _as_context(context) + read_messages(completion, "completion")
    answer = {"role": "assistant", "content": as_answer(completion, "completion")}
    return [*_as_context(context), answer | _thoughts_of(row)]


def _as_context(messages: list[Message]) -> Messages:
    """Gives the assistant's turns the weight 0, unless they have a weight."""
    for message in messages:
        if message["role"] == "assistant":
            message.setdefault("weight", 0)
    return messages


def _from_text(row: dict[str, Any]) -> Messages:
    return [{"role": TEXT, "content": as_text(row["text"], "text")}]


def _from_human_assistant(row: dict[str, Any]) -> Messages:
    """Cuts a dialogue at "Human:" and "Assistant:" behind an empty line.

    The turns of a `prompt` are context; it ends in "Assistant:".
    """
    if row.get("text") is not None:
        return _spoken_turns(as_text(row["text"], "text"), "text")
    prompt = as_text(row["prompt"], "prompt")
    pieces = SPOKEN.split(prompt)
    if pieces[-2:-1] != ["Assistant"] or pieces[-1].strip():
        raise ValueError('prompt: expected "\\n\\nAssistant:" at its end')
    turns = _spoken_turns(prompt + as_answer(row["completion"], "completion"), "prompt")
    num_asked = len(pieces) // 2 - 1
    return _as_context(turns[:num_asked]) + turns[num_asked:]


def _spoken_turns(dialogue: str, name: str) -> Messages:
    before, *pieces = SPOKEN.split(dialogue)
    if before.strip() or not pieces:
        raise ValueError(
            f'{name}: expected "\\n\\nHuman: ...\\n\\nAssistant: ...", found {dialogue[:20]!r}'
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": as_text(said.removeprefix(" "), f"message {number}")}
        for number, (who, said) in enumerate(zip(pieces[::2], pieces[1::2], strict=True), 1)
    ]


def _format(
    name: str, keys: str, read: Callable[[dict[str, Any]], Messages] | None = None, more: str = ""
) -> Format:
    """Makes a Format; without `read`, that of a question and its answer under two keys."""
    each = tuple(tuple(part.split()) for part in keys.split("|"))
    if read is None:
        read = partial(_pair, ask=each[0][0], answer=each[0][1])
        more += " reasoning_content"
    return Format(name, each, read, frozenset(more.split()), name != "human_assistant")


UNRENDERED = ("text", "tokenised")  # formats that no chat template renders
FORMATS = (
    _format("messages", "messages", _from_messages),
    _format("sharegpt", "conversations", _from_sharegpt),
    _format("alpaca", "instruction output", _from_alpaca, "input history reasoning_content"),
    _format("prompt_completion", "prompt completion", _from_prompt_completion, "reasoning_content"),
    _format("question_answer", "question answer"),
    _format("seed", "user assistant"),
    _format("tokenised", "input_ids labels | input_ids attention_mask", read_tokens),
    _format("human_assistant", "text | prompt completion", _from_human_assistant),
    _format("text", "text", _from_text),
)
BY_NAME = {known.name: known for known in FORMATS}
KNOWN_KEYS = {
    known.name: known.more.union(*known.keys, () if known.name in UNRENDERED else SHARED)
    for known in FORMATS
}


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
