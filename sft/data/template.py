"""Turns messages into (ids, labels) with the tokenizer's own chat template, and no other renderer.

Supervision is decided on *characters* of the rendered text (`data/spans`). The offsets of tokens
then give their labels. Each assistant turn is one span: its content, its tool calls and the end of
turn that the template writes.

- All that the model has to write itself is supervised, too: a token with both template and content
  (" Hello" after "[/INST]"), and blanks and an empty block of thoughts between the inference prompt
  and the content. An added token of the header that includes blanks is not supervised.
- Many templates drop the thoughts of all turns but the last. A turn that lost its thoughts is not
  supervised, because at inference the model would think first. A turn that only calls tools is
  supervised.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

from rich.text import Text
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data.files import Row
from sft.data.formats import TEXT, Messages, Tools
from sft.data.rendering import (
    DEFAULT_TEMPLATE,
    Span,
    TemplateError,
    added_tokens,
    render_text,
    try_template,
)
from sft.data.spans import find_marked_spans, find_spans, text_behind_prompt
from sft.errors import DataError, UserError
from sft.runtime.console import visible

IGNORED = -100
GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")
Supervise = Literal["all", "last", "everything"]
OnLong = Literal["error", "drop", "truncate_left_turns", "truncate"]


@dataclass(frozen=True, slots=True)
class Example:
    """The tokens of a row. `labels[i]` is `ids[i]` if supervised, else -100; the loss shifts them.

    `weights[i]` multiplies the loss of label i; None: 1 everywhere. `flags` are findings of the
    rendering, each a kind of `data/audit`.
    """

    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None
    flags: tuple[str, ...] = ()

    @property
    def num_supervised(self) -> int:
        """Counts supervised tokens, without the first of the row, which no token can predict."""
        return sum(label != IGNORED for label in self.labels[1:])


def prepare_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer, with the default template and a pad token if it had none.

    Padding with eos is safe here: labels come from spans, never from comparing ids with the pad id.
    Raises UserError for a tokenizer without eos, TemplateError for an unusable template.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: expected a tokenizer with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no eos token, so a model could not learn "
            "to stop; name one as eos_token in its tokenizer_config.json"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    found = tokenizer.chat_template
    found = found.get("default") if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise TemplateError(
            f"{tokenizer.name_or_path}: expected one chat template, or several of which one is "
            "called default; give it a chat_template.jinja"
        )
    try_template(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def render(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    supervise: Supervise = "all",
) -> Example:
    """Renders and tokenises a conversation, with its assistant turns and their ends supervised.

    `supervise`: `all` turns, each with the `weight` of its message (1 without one); the `last`
    turn; or `everything`, prompts too. Raises DataError if the template alters, drops or does not
    close an assistant turn.
    """
    if is_document(messages):
        return _render_document(tokenizer, messages[0]["content"])
    text = render_text(tokenizer, messages, tools)
    prompt = _prompt_text(tokenizer, messages, tools)
    if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        spans = find_marked_spans(tokenizer, messages, tools)
    else:
        spans = find_spans(tokenizer, messages, tools, text)
    ids, offsets = tokenise(tokenizer, text)
    # Both never decrease: the tokens of one character's bytes all carry that character's offsets,
    # and where a tokenizer trims blanks off offsets, a token of blanks is empty at its own end.
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    added = added_tokens(tokenizer)
    written = text_behind_prompt(text, spans[-1], prompt)
    turns = [m for m in messages if m["role"] == "assistant"]
    weights = [_weight(turn, n == len(turns), supervise) for n, turn in enumerate(turns, 1)]
    flags: list[str] = []
    labels, factors = [IGNORED] * len(ids), [0.0] * len(ids)
    for span, weight in zip(spans, weights, strict=True):
        if span is None:
            flags.append("thoughts_dropped")
            continue
        start, end = span
        start -= len(written) * text.endswith(written, 0, start)
        first, stop = bisect_right(ends, start), bisect_left(starts, end)
        while first < stop and starts[first] < start and ids[first] in added:
            first += 1
        if first == stop:
            raise DataError(f"the tokenizer has no token for {text[start:end]!r}")
        if starts[first] < start and text[starts[first] : start].strip():
            flags.append("boundary_merge")
        if weight:
            labels[first:stop] = ids[first:stop]
            factors[first:stop] = [weight] * (stop - first)
    if supervise == "everything":
        labels, factors = list(ids), [1.0] * len(ids)
    uneven = set(factors) - {0.0, 1.0}
    return Example(ids, labels, factors if uneven else None, tuple(dict.fromkeys(flags)))


def render_row(
    tokenizer: Tokenizer,
    row: Row,
    max_seq_len: int,
    *,
    supervise: Supervise = "all",
    on_long: OnLong = "error",
) -> list[tuple[Row, Example]]:
    """Returns (row, example) of a row: usually one, none if the row is dropped.

    A raw document gives one for each `max_seq_len` tokens. `on_long` decides about a longer row.
    `error` returns it, and the audit refuses it. `drop` drops it. `truncate_left_turns` removes the
    oldest exchanges after the system turn until it fits; a last exchange that is too long by itself
    is returned. `truncate` cuts the end and flags the row `answer_cut`; it drops the row if nothing
    supervised is left.
    """
    example = render(tokenizer, row.messages, row.tools, supervise)
    if len(example.ids) <= max_seq_len:
        return [(row, example)]
    if is_document(row.messages):
        starts = range(0, len(example.ids) - 1, max_seq_len)
        parts = [example.ids[at : at + max_seq_len] for at in starts]
        return [(row, Example(part, list(part))) for part in parts]
    if on_long == "drop":
        return []
    if on_long == "truncate":
        cut = Example(
            example.ids[:max_seq_len],
            example.labels[:max_seq_len],
            example.weights and example.weights[:max_seq_len],
            (*example.flags, "answer_cut"),
        )
        return [(row, cut)] if cut.num_supervised else []
    if on_long == "truncate_left_turns":
        for messages in _drop_oldest(row.messages):
            shorter = render(tokenizer, messages, row.tools, supervise)
            if len(shorter.ids) <= max_seq_len:
                shorter = replace(shorter, flags=(*shorter.flags, "turns_dropped"))
                return [(replace(row, messages=messages), shorter)]
    return [(row, example)]


def prompt_ids(tokenizer: Tokenizer, messages: Messages, tools: Tools | None = None) -> list[int]:
    """Returns the tokens that a model is given at inference to continue `messages`."""
    return tokenise(tokenizer, render_text(tokenizer, messages, tools, add_generation_prompt=True))[
        0
    ]


def prompt_mismatch(
    tokenizer: Tokenizer,
    messages: Messages,
    example: Example,
    tools: Tools | None = None,
) -> str | None:
    """Returns how the inference prompt of the last turn differs from the tokens before it in
    training, or None."""
    try:
        prompt = prompt_ids(tokenizer, messages[:-1], tools)
    except DataError as error:
        return f"no prompt can be made for the last turn: {error}"
    first = len(example.ids)
    while first and example.labels[first - 1] == IGNORED:
        first -= 1
    while first and example.labels[first - 1] != IGNORED:
        first -= 1
    trained = example.ids[:first]
    if prompt == trained:
        return None
    pairs = enumerate(zip(prompt, trained, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(trained)))
    shared = decode_slice(tokenizer, prompt, max(0, same - 8), same)
    served, seen = (decode_slice(tokenizer, ids, same, same + 8) for ids in (prompt, trained))
    return f"after {shared!r} the prompt has {served!r}, training has {seen!r} (token {same})"


def colour_text(tokenizer: Tokenizer, example: Example) -> Text:
    """Returns the text for a terminal: supervised green, context dim, added tokens magenta."""
    added, result, start = added_tokens(tokenizer), Text(), 0
    for style, run in groupby(
        zip(example.ids, example.labels, strict=True),
        lambda pair: _style(pair[0] in added, pair[1] != IGNORED),
    ):
        end = start + len(list(run))
        result.append(visible(decode_slice(tokenizer, example.ids, start, end)), style)
        start = end
    return result


def list_tokens(tokenizer: Tokenizer, example: Example) -> Text:
    """Returns every token with its id, in the colours of `colour_text`, with visible blanks."""
    added, result = added_tokens(tokenizer), Text()
    for at, (token, label) in enumerate(zip(example.ids, example.labels, strict=True)):
        text = decode_slice(tokenizer, example.ids, at, at + 1)
        result.append(f"{token}", "dim")
        result.append(f"{text!r} ", _style(token in added, label != IGNORED))
    return result


def _style(is_added: bool, is_supervised: bool) -> str:
    if is_added:
        return "bold magenta underline" if is_supervised else "bold magenta"
    return "green" if is_supervised else "dim"


def _prompt_text(tokenizer: Tokenizer, messages: Messages, tools: Tools | None) -> str | None:
    """Returns the inference prompt of the last turn, or None if the template refuses it."""
    try:
        return render_text(tokenizer, messages[:-1], tools, add_generation_prompt=True)
    except DataError:
        return None


def _render_document(tokenizer: Tokenizer, text: str) -> Example:
    """Tokenises a document and adds an eos; all tokens are supervised."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Example(ids, list(ids))


def is_document(messages: Messages) -> bool:
    """Returns whether a row is raw text for continued pretraining, not a conversation."""
    return bool(messages[0]["role"] == TEXT)


def _weight(turn: dict[str, Any], is_last: bool, supervise: Supervise) -> float:
    return 0.0 if supervise == "last" and not is_last else float(turn.get("weight", 1))


def _drop_oldest(messages: Messages) -> Iterator[Messages]:
    """Yields the conversation without its first exchange, without its first two, and so on.

    The system turn stays.
    """
    start = 1 if messages[0]["role"] == "system" else 0
    asked = [n for n, m in enumerate(messages) if m["role"] == "user" and n > start]
    for n in asked:
        yield [*messages[:start], *messages[n:]]


def tokenise(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Returns ids and offsets of a rendered text, without adding special tokens."""
    ids, offsets = _encode(tokenizer, len(tokenizer), text)
    return list(ids), list(offsets)


@lru_cache(maxsize=2)  # the audit asks for the same text again
def _encode(tokenizer: Tokenizer, size: int, text: str) -> tuple[list[int], list[Span]]:
    del size  # only a key of the cache, since a tokenizer may grow
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )  # verbose would warn about the length, which the audit checks
    return encoded["input_ids"], encoded["offset_mapping"]


def decode_slice(tokenizer: Tokenizer, ids: list[int], start: int, end: int) -> str:
    """Returns the text of ids[start:end] in context; alone, it might lose its first blank."""
    before, until = (
        str(tokenizer.decode(ids[:at], clean_up_tokenization_spaces=False)) for at in (start, end)
    )
    return until[len(before) :]
