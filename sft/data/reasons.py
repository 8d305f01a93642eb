"""Finds the line of a chat template that writes a part of a conversation, for messages."""

from __future__ import annotations

from transformers.utils.chat_template_utils import _alias_reasoning_fields

from sft.data import rendering
from sft.data.formats import Message, Messages
from sft.data.lines import quote_line
from sft.data.rendering import Renderings, compile_template
from sft.errors import DataError


def line_that_writes(
    given: Renderings, messages: Messages, place: int | str, add_prompt: bool = False
) -> str:
    """Returns the line of the template that writes a character of a conversation, or a word.

    "" if the template writes neither.
    """
    tokenizer = given.tokenizer
    messages, tools = rendering.mark_typed(tokenizer, messages, given.tools)
    messages = rendering.read_form(tokenizer).apply(messages)
    source = tokenizer.get_chat_template(tools=tools)
    template = compile_template(source)
    values = {
        "messages": _alias_reasoning_fields([dict(message) for message in messages]),
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_prompt,
        **tokenizer.special_tokens_map,
        **(given.variables or {}),
    }
    text = ""
    try:
        with rendering.Bounded(tokenizer, messages):
            pieces = template.root_render_func(template.new_context(values))
            for piece in pieces:
                text += piece
                if place in text if isinstance(place, str) else len(text) > place:
                    frame = pieces.gi_frame  # where the template stands that wrote this piece
                    return quote_line(source, template.get_corresponding_lineno(frame.f_lineno))
    except DataError:
        pass
    return ""


def line_of_turn(given: Renderings, index: int, message: Message) -> str:
    """Returns the line that begins to write what a turn says, or else its header."""
    before, whole = given.prompt(index), given.with_turn(index, message)
    same = next(
        (n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before)
    )
    return line_that_writes(given, [*given.messages[:index], message], min(same, len(whole) - 1))
