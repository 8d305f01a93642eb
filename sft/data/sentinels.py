"""Confirms that a template writes what an assistant turn says, and finds what stands behind it.

A sentinel replaces each value of the turn: its thoughts, its content, names and arguments of calls.
The template must write the same text around the sentinels as around the values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data import reasons, rendering
from sft.data.formats import Message
from sft.data.lines import never_reads
from sft.data.rendering import Renderings, cached_by_tokenizer
from sft.errors import DataError

TAG = re.compile(r"<(/?\w+)>")


class Slot(NamedTuple):
    """A value of a turn, in whose place a sentinel stands."""

    kind: str
    value: str


class Frame(NamedTuple):
    """What the template wrote around the values of a turn."""

    head: str  # before the first value
    tail: str  # behind the last value
    has_thoughts: bool


def stand_in(message: Message, word: str) -> tuple[Message, list[Slot]]:
    """Returns the turn with a sentinel in place of every text that its author wrote."""
    slots: list[Slot] = []

    def sentinel(kind: str, value: str) -> str:
        if not value.strip():
            return value
        slots.append(Slot(kind, value))
        return f"{word}{len(slots) - 1}e"

    def leaves(value: Any) -> Any:
        if isinstance(value, str):
            return sentinel("an argument", value)
        if isinstance(value, dict):
            return {key: leaves(item) for key, item in value.items()}
        return [leaves(item) for item in value] if isinstance(value, list) else value

    made = dict(message)
    if message.get("reasoning_content"):
        made["reasoning_content"] = sentinel("thoughts", message["reasoning_content"])
    content = message["content"]
    if isinstance(content, list):
        made["content"] = [{**p, "text": sentinel("content", p["text"])} for p in content]
    elif not made.get("reasoning_content") and (block := rendering.THOUGHTS.match(content)):
        opened, thoughts, closed = block.groups()
        inner = thoughts.strip()
        hidden = thoughts.replace(inner, sentinel("thoughts", inner))
        made["content"] = f"{opened}{hidden}{closed}{sentinel('content', content[block.end() :])}"
    else:
        made["content"] = sentinel("content", content)
    if calls := rendering.get_calls(message):
        made["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "name": sentinel("the name of a call", call["function"]["name"]),
                    "arguments": leaves(call["function"].get("arguments", {})),
                },
            }
            for call in calls
        ]
    return made, slots


def confirm(
    given: Renderings,
    index: int,
    body: str,
    number: int,
    trace: Callable[[Message], str | None],
    is_usual: bool,
) -> Frame:
    """Compares message `index`, the `number`-th turn of the assistant, with one of sentinels.

    `trace` returns what the template writes of another message in its place, or None. `is_usual`:
    the body follows the prompt, so that the text around it may be that of earlier turns. Raises
    DataError if a value is changed or missing.
    """
    message = given.messages[index]
    may_be_known = is_plain(message) and is_usual
    frames = _frames(given.tokenizer)
    for before, after in frames if may_be_known else ():
        held = body[len(before) : len(body) - len(after)]
        is_frame = body.startswith(before) and body.endswith(after)
        if is_frame and held in _trimmed(message["content"]):
            return Frame(before, after, False)
    replaced, slots = stand_in(message, given.sentinel)
    traced = trace(replaced)
    if traced is None:
        raise _altered(given, index, number, 0)
    pieces = given.split_at_sentinels(traced)
    written = {int(n) for n in pieces[1::2]}
    missing = [
        f"{slot.kind} ({slot.value[:40]!r})"
        for n, slot in enumerate(slots)
        if n not in written and slot.kind != "thoughts"
    ]
    for call in rendering.get_calls(message):
        literals = _literals(call["function"].get("arguments", {}))
        missing += [f"an argument ({leaf})" for leaf in literals if leaf not in body]
    if missing:
        raise _missing(given, index, number, missing[0])
    if (slot := _misfit(body, pieces, slots)) is not None:
        raise _altered(given, index, number, slot)
    if may_be_known and len(pieces) == 3 and len(frames) < 8:
        frames.append((pieces[0], pieces[2]))
    has_thoughts = any(slots[n].kind == "thoughts" for n in written)
    return Frame(pieces[0], pieces[-1], has_thoughts)


def is_plain(message: Message) -> bool:
    """Returns whether a turn is nothing but one text."""
    content = message["content"]
    is_text = isinstance(content, str) and content.strip() and "<think>" not in content
    return bool(is_text) and not (message.get("reasoning_content") or rendering.get_calls(message))


@cached_by_tokenizer
def _frames(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Returns the texts that stood around plain contents so far; later ones are compared first."""
    return []


def _literals(value: Any) -> Iterator[str]:
    """Yields the keys and numbers of an argument, as JSON writes them, without quotes."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key.isascii() and key.isprintable() and not {'"', "\\"} & set(key):
                yield key
            yield from _literals(item)
    elif isinstance(value, list):
        for item in value:
            yield from _literals(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def _misfit(text: str, pieces: list[str], slots: list[Slot]) -> int | None:
    """Returns None if a text is the pieces with a form of each value between them, else the number
    of the value at which it is not."""
    if not text.startswith(pieces[0]):
        return 0
    at, number = len(pieces[0]), 0
    for n in range(1, len(pieces), 2):
        number, after = int(pieces[n]), pieces[n + 1]
        possible = forms(slots[number].value)
        found = next((f for f in possible if text.startswith(f + after, at)), None)
        if found is None:
            return number
        at += len(found + after)
    return None if at == len(text) else number


def hide_tags(given: Renderings, message: Message) -> Message:
    """Returns a turn in which words take the place of the tags in its text and in its thoughts, but
    not of those of a block of thoughts at the start."""

    def hide(text: str) -> str:
        return TAG.sub(rf"{given.sentinel}l\1{given.sentinel}r", text)

    made, content, block = dict(message), message["content"], ""
    if message.get("reasoning_content"):
        made["reasoning_content"] = hide(message["reasoning_content"])
    elif isinstance(content, str) and (match := rendering.THOUGHTS.match(content)):
        block = match[0]
    if isinstance(content, list):
        made["content"] = [{**part, "text": hide(part["text"])} for part in content]
    else:
        made["content"] = block + hide(content.removeprefix(block))
    return made


def show_tags(given: Renderings, text: str) -> str:
    """Returns a text with the tags that `hide_tags` took out of it. Those that are special tokens
    stand between MARKS, since someone typed them."""
    special = rendering.special_tokens(given.tokenizer)

    def show(found: re.Match[str]) -> str:
        tag = f"<{found[1]}>"
        return tag.join(rendering.MARKS) if tag in special else tag

    return re.sub(rf"{given.sentinel}l(/?\w+?){given.sentinel}r", show, text)


def _trimmed(value: str) -> tuple[str, ...]:
    """Returns a text and its trimmed forms, the longest first."""
    one_side = (value.rstrip("\n"), value.rstrip(), value.lstrip("\n"), value.lstrip())
    return (value, *one_side, value.strip("\n"), value.strip())


def forms(value: str) -> Iterator[str]:
    """Yields the forms in which templates write a text: as it is, trimmed, as JSON, as JSON in
    JSON, as Python."""
    yield from _trimmed(value)
    for ascii_only in (False, True):
        quoted = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        yield from (quoted, json.dumps(quoted, ensure_ascii=ascii_only)[1:-1])
    yield repr(value)[1:-1]


def _missing(given: Renderings, index: int, number: int, value: str) -> DataError:
    source = given.tokenizer.get_chat_template(tools=given.tools)
    if rendering.get_calls(given.messages[index]) and never_reads(source, "tool_calls"):
        why = "it never reads `tool_calls`"
    else:
        line = reasons.line_of_turn(given, index, given.messages[index])
        why = f"{line or 'no line'} writes the turn"
    return DataError(
        f"the chat template does not write {value} of assistant turn {number} ({why}); use a "
        "model whose template writes it, or remove it from the row"
    )


def _altered(given: Renderings, index: int, number: int, slot: int) -> DataError:
    message = given.messages[index]
    replaced, _ = stand_in(message, given.sentinel)
    _, slots = stand_in(given.given[0][index], given.sentinel)
    said = slots[slot].value if slots else ""
    messages = [*given.messages[:index], replaced]
    line = reasons.line_that_writes(given, messages, f"{given.sentinel}{slot}e")
    line = line or reasons.line_of_turn(given, index, message)
    return DataError(
        f"the chat template alters or drops what assistant turn {number} says ({said[:40]!r}) at "
        f"{line or 'no line of its own'}, so it cannot be trained on as written; end the row "
        "before this turn, or correct the template or the row"
    )
