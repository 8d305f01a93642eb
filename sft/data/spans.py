"""Finds the characters of each assistant turn in a rendered conversation.

- A template with `{% generation %}` blocks marks the turns itself.
- Else the conversation is rendered once more with a sentinel in place of every assistant content
  and of every called function's name. The text between the sentinels is what the template wrote,
  and the true rendering must be exactly these pieces with the (possibly trimmed) values between
  them. No prefix of a conversation is ever assumed to render to a prefix of the text.
- The closing of a turn is read off a conversation of one turn, which no next header can follow: the
  text up to and including its first added token (`<|im_end|>`, `</s>`), and further to an eos that
  directly follows; without an added token all its text. Every turn must close in the same way.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from sft.data import rendering
from sft.data.formats import Messages, Tools
from sft.data.rendering import Span, cached_by_tokenizer
from sft.errors import DataError


def find_marked_spans(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None
) -> list[Span | None]:
    """Returns the `{% generation %}` blocks, without blanks behind the end of turn; verified.

    A span is None if the template drops the thoughts of its turn.
    """
    names: dict[str, Any] = dict(tokenizer.special_tokens_map)
    with rendering.bounded(tokenizer, messages):
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **names,
        )
    (text,), (blocks,) = rendered
    turns = [m for m in messages if m["role"] == "assistant"]
    if len(blocks) != len(turns):
        raise DataError(
            f"the chat template marks {len(blocks)} of {len(turns)} assistant turns for "
            "training; every turn needs one {% generation %} block"
        )
    added = tuple(rendering.added_tokens(tokenizer).values())
    spans: list[Span | None] = []
    for number, ((start, end), turn) in enumerate(zip(blocks, turns, strict=True), 1):
        block = text[start:end].rstrip()
        _, content = rendering.split_thinking(turn["content"])
        if any(
            value not in block
            for value in (content.strip(), *map(rendering.get_name, rendering.get_calls(turn)))
        ):
            raise _altered_content(number, turn["content"])
        if not block.endswith(added):
            raise DataError(
                f"the {{% generation %}} block of assistant turn {number} ends in {block[-20:]!r}, "
                "not in an end-of-turn token; move that token into the block"
            )
        thoughts = _get_thoughts(turn)
        spans.append((start, start + len(block)) if thoughts in block else None)
    return spans


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A value that a sentinel replaces: an assistant's content, a called function's name, or the
    content that follows a call (`turn` 0), before which the end of the turn must stand."""

    turn: int
    value: str
    kind: Literal["content", "call", "bound"]


def find_spans(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None, text: str
) -> list[Span | None]:
    """Returns the characters of every assistant turn and its end, found with sentinels; verified.

    A span is None if the template drops the thoughts of its turn: at inference the model would
    think first, so the turn would be trained unlike it is served.
    """
    anchors, pieces = _anchors(tokenizer, messages, tools)
    places = _places(text, anchors, pieces)
    turns = [(n, m) for n, m in enumerate(messages) if m["role"] == "assistant"]
    spans: list[Span | None] = []
    for number, (index, turn) in enumerate(turns, 1):
        own = [k for k, anchor in enumerate(anchors) if anchor.turn == number]
        before, after = pieces[own[0]], pieces[own[-1] + 1]
        if anchors[own[0]].kind == "content":
            start = places[own[0]][0]
            thoughts = _get_thoughts(turn)
            lead = rendering.THOUGHTS_END.search(before) if thoughts else None
            if thoughts and (lead is None or thoughts not in lead[0]):
                spans.append(None)
                continue
            start -= len(lead[0]) if lead else 0
        else:
            start = _call_start(tokenizer, messages[:index], tools, text, places[own[0]][0])
        end = places[own[-1]][1]
        spans.append((start, end + _closing(tokenizer, after, number, anchors[own[-1]].kind)))
    return spans


def _anchors(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None
) -> tuple[list[_Anchor], list[str]]:
    """Returns the values that sentinels replace, and the texts around them, which are one more."""
    sentinel = "zq7sentinelk"
    while any(sentinel in str(message) for message in messages):
        sentinel += "k"
    anchors, stand_ins, number = [], [], 0
    for before, message in zip([None, *messages], messages, strict=False):
        stand_in = dict(message)
        if message["role"] == "assistant":
            number += 1
            calls = rendering.get_calls(message)
            thoughts, content = rendering.split_thinking(message["content"])
            if content.strip() or not calls:
                stand_in["content"] = thoughts + sentinel
                anchors.append(_Anchor(number, content, "content"))
            if calls:
                stand_in["tool_calls"] = [_rename_call(call, sentinel) for call in calls]
                anchors += [_Anchor(number, rendering.get_name(call), "call") for call in calls]
        elif before and before["role"] == "assistant" and rendering.get_calls(before):
            stand_in["content"] = sentinel
            anchors.append(_Anchor(0, message["content"], "bound"))
        stand_ins.append(stand_in)
    pieces = rendering.render_text(tokenizer, stand_ins, tools).split(sentinel)
    if len(pieces) != len(anchors) + 1:
        has_calls = len(anchors) > number
        raise DataError(
            f"the chat template writes {len(pieces) - 1} of {len(anchors)} assistant turns"
            + (" and tool calls; use a model whose template knows tools" if has_calls else "")
            + ("" if has_calls else "; end the row at an earlier turn, or correct the template")
        )
    return anchors, pieces


def _places(text: str, anchors: list[_Anchor], pieces: list[str]) -> list[Span]:
    """Returns where each value is in `text`, which must be the pieces with the values between."""
    at = len(pieces[0])
    places = []
    for anchor, before, after in zip(anchors, pieces, pieces[1:], strict=False):
        quoted = json.dumps(anchor.value, ensure_ascii=False)[1:-1]  # what a tool returned, as JSON
        forms = (
            (*_trimmed_forms(anchor.value), quoted)
            if anchor.kind == "bound"
            else _trimmed_forms(anchor.value)
        )
        found = next((form for form in forms if text.startswith(form + after, at)), None)
        if found is None or not text.startswith(before, at - len(before)):
            raise _altered_content(
                anchor.turn or anchors[anchors.index(anchor) - 1].turn, anchor.value
            )
        places.append((at, at + len(found)))
        at += len(found) + len(after)
    if at != len(text):
        raise _altered_content(max(anchor.turn for anchor in anchors), anchors[-1].value)
    return places


def _call_start(
    tokenizer: Tokenizer,
    before: Messages,
    tools: Tools | None,
    text: str,
    name_at: int,
) -> int:
    """Returns where a turn of only calls begins: behind its inference prompt, or its header."""
    prompt = rendering.render_text(tokenizer, before, tools, add_generation_prompt=True)
    if text.startswith(prompt) and len(prompt) <= name_at:
        return len(prompt)
    header = turn_frame(tokenizer).header
    at = text.rfind(header, 0, name_at) if header else -1
    if at < 0:
        raise DataError("cannot find where the turn of a tool call begins in the chat template")
    return at + len(header)


def _closing(tokenizer: Tokenizer, after: str, number: int, kind: str) -> int:
    """Returns how many characters of `after` close the turn.

    A closing follows a content directly. Behind the name of a call it stands further on, and may be
    another special token (`<|eom_id|>` of Llama 3.1).
    """
    closings = turn_frame(tokenizer).closings
    if kind == "content":
        closing = next((closing for closing in closings if after.startswith(closing)), None)
        if closing is None:
            raise DataError(
                f"the chat template does not close assistant turn {number} like the last one, with "
                f"{closings[0]!r}; end the row at this turn, or correct the template"
            )
        return len(closing)
    special = [t for t in rendering.special_tokens(tokenizer) if t in after]
    found = [after.find(c) + len(c) for c in closings if c in after]
    found = found[:1] or [min(after.find(t) + len(t) for t in special)] if special else found[:1]
    if not found:
        raise DataError(f"the chat template does not close the tool calls of turn {number}")
    return found[0]


@dataclass(frozen=True, slots=True)
class Frame:
    """The text that a template writes around an assistant's content."""

    header: str  # what opens an assistant turn
    closings: list[str]  # what may end one, longest first


@cached_by_tokenizer
def turn_frame(tokenizer: Tokenizer) -> Frame:
    """Reads the header and the end of a turn off a conversation of one turn."""
    sentinel, ask = "zq7sentinelk", {"role": "user", "content": "a"}
    text = rendering.render_text(tokenizer, [ask, {"role": "assistant", "content": sentinel}])
    before, _, tail = text.partition(sentinel)
    opening = before.removeprefix(rendering.render_text(tokenizer, [ask]))
    header = (
        opening[: len(opening) - len(lead[0])]
        if (lead := rendering.THOUGHTS_END.search(opening))
        else opening
    )
    added = rendering.added_tokens(tokenizer).values()
    ends = [tail.index(token) + len(token) for token in added if token in tail]
    closing = tail[: min(ends)] if ends else tail.rstrip()
    if not closing.strip():
        raise DataError(
            "the chat template writes no end of turn behind the assistant's content, so a model "
            "would not learn to stop; use a template that writes one, such as eos_token"
        )
    eos = re.match(r"\s*" + re.escape(tokenizer.eos_token), tail[len(closing) :])
    return Frame(header, [closing + eos[0], closing] if eos else [closing])


def text_behind_prompt(text: str, last: Span | None, prompt: str | None) -> str:
    """Returns the text between the inference prompt and the last turn, if a model has to write it:
    blanks, and an empty block of thoughts.

    Llama 2: the prompt ends in "[/INST]", the content follows a space, which is a token of its own
    before a digit. Qwen3 writes "<think>\n\n</think>" before an answer without thoughts.
    """
    if last is None or prompt is None or not text.startswith(prompt) or last[0] < len(prompt):
        return ""
    between = text[len(prompt) : last[0]]
    return between if rendering.THOUGHTS.fullmatch(between) else ""


def _rename_call(call: dict[str, Any], name: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def _get_thoughts(turn: dict[str, Any]) -> str:
    """Returns the thoughts of an assistant turn without tags, or ""."""
    given = turn.get("reasoning_content") or rendering.split_thinking(turn["content"])[0]
    return str(given).strip().removeprefix("<think>").removesuffix("</think>").strip()


def _trimmed_forms(content: str) -> tuple[str, ...]:
    """Returns a content and its trimmed forms, the longest first."""
    one_side = (content.rstrip("\n"), content.rstrip(), content.lstrip("\n"), content.lstrip())
    return (content, *one_side, content.strip("\n"), content.strip())


def _altered_content(number: int, content: str) -> DataError:
    return DataError(
        f"the chat template alters or drops the content of assistant turn {number} "
        f"({content[:40]!r}), so it cannot be trained on as written; end the row at this turn if "
        "the template drops reasoning from earlier turns, or correct the template or the row"
    )
