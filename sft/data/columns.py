"""Finds the columns of a row that are not trained on, and refuses those that change its meaning.

An answer that people rejected, the image that a question is about, the choices of a question: a row
without its column says something else. Each such column is known by its name, and stops the run
with what to do. All others are counted, so that the audit can list them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from sft.data.messages import Messages, content_text, is_empty

PAIRS = ("alpaca", "prompt_completion", "question_answer", "seed")
CONVERSATIONS = (*PAIRS, "messages", "sharegpt", "human_assistant")
ALL = (*CONVERSATIONS, "text", "tokenised")


def _is_in_messages(value: Any, messages: Messages) -> bool:
    """Returns whether all texts in a value are already part of what the messages say."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return all(_is_in_messages(item, messages) for item in items)
    said = [content_text(m) + "\0" + m.get("reasoning_content", "") for m in messages]
    return value is None or any(str(value).strip() in each for each in said)


def _is_all_ones(value: Any, _: Messages) -> bool:
    return isinstance(value, list) and all(item == 1 for item in value)


def _is_one_document(value: Any, _: Messages) -> bool:
    """Returns whether a list counts its items, from 0 or 1, or has zeros only."""
    if not isinstance(value, list):
        return False
    counts = [list(range(start, start + len(value))) for start in (0, 1)]
    return value in counts or not any(value)


class Meaning(NamedTuple):
    """Columns that change what a question or an answer means, what they hold, and what to do.

    `is_harmless` decides from the value and the row's messages that nothing is lost without it.
    """

    formats: tuple[str, ...]
    pattern: str
    side: Literal["question", "answer"]
    holds: str
    remedy: str
    is_harmless: Callable[[Any, Messages], bool] = lambda *_: False


PREFERENCE = Meaning(
    ALL,
    r"(chosen|rejected|(non_|dis)?preferred)(_\w+)?|\w+_(chosen|rejected)|kto_tag|preference|"
    r"winner(_\w+)?|is_(chosen|preferred|rejected)",
    "answer",
    "says which answer people preferred, and every answer would be learnt",
    "keep the answers to learn, and remove the others",
)
MEANINGS = (
    PREFERENCE,
    Meaning(
        ALL,
        r"(image|audio|video)s?(_(path|url|file|bytes)s?)?|pixel_values",
        "question",
        "holds images, sound or video, and only text can be trained on",
        "remove the row",
    ),
    Meaning(
        ALL,
        r"replies|candidates",
        "answer",
        "holds other answers",
        "convert the row to messages",
    ),
    Meaning(
        CONVERSATIONS,
        r"labels?|scores?|ratings?|rank|rewards?",
        "answer",
        "rates the answer, and every answer would be learnt",
        "keep the rows whose answers are to be learnt",
    ),
    Meaning(
        ("text",),
        r"labels?|label_\w+|\w+_label|class|target|sentiment",
        "answer",
        "holds the class of the text, and the text alone would be learnt",
        "use `make classify`, or data.columns: {prompt: text, completion: COLUMN}",
    ),
    Meaning(
        ("text",),
        r"responses?|outputs?|completions?|answers?|summary|translation",
        "answer",
        "holds an answer to the text, and the text alone would be learnt",
        "use data.columns: {prompt: text, completion: COLUMN}",
    ),
    Meaning(
        (*PAIRS, "human_assistant"),
        r"contexts?|passages?|documents?|choices|options|inputs?|instructions?|history",
        "question",
        "holds a part of the question, which would be asked without it",
        "use data.columns: {instruction: ..., input: COLUMN, output: ...}, or write it into the "
        "question",
        _is_in_messages,
    ),
    Meaning(
        ("messages", "sharegpt"),
        r"documents?",
        "question",
        "holds documents that the answer draws on, and no template would see them",
        "write them into a message",
        _is_in_messages,
    ),
    Meaning(
        (*PAIRS, "human_assistant"),
        r"reasoning(_content)?|thinking|thoughts?|cot|chain_of_thought|rationale",
        "answer",
        "holds the thoughts before the answer, which would be learnt without them",
        "use data.columns: {..., reasoning_content: COLUMN}",
        _is_in_messages,
    ),
    Meaning(
        CONVERSATIONS,
        r"system_(prompt|message)|sys_prompt",
        "question",
        "holds a system prompt, and the row would be trained without it",
        "use data.columns: {..., system: COLUMN}",
        _is_in_messages,
    ),
    Meaning(
        ("tokenised",),
        r"(completion|assistants?|loss)_(masks?|weights?)",
        "answer",
        "says which tokens are learnt, and only labels are read for that",
        "write labels, with -100 for tokens that are not learnt",
        _is_all_ones,
    ),
    Meaning(
        ("tokenised",),
        r"position_ids|token_type_ids|segment_ids|(seq|sequence)_lengths?|cu_seqlens\w*",
        "answer",
        "says how the tokens are used, and a row is read as one document",
        "write one document a row",
        _is_one_document,
    ),
)
# The usual names of a question and its answer in public data sets, for the message to users.
USUAL = {
    "instruction": ("instruction", "question", "query", "prompt", "problem", "input", "dialogue"),
    "input": ("context", "passage"),
    "output": ("output", "response", "answer", "completion", "target", "solution", "summary"),
    "system": ("system", "system_prompt"),
}
PATTERNS = [(meaning, re.compile(meaning.pattern)) for meaning in MEANINGS]


def find_ignored(
    row: dict[str, Any],
    format: str,
    messages: Messages,
    used: Collection[str],
    *,
    to_answer: bool = False,
) -> tuple[str, ...]:
    """Returns the columns of a row that have a value and are not `used`.

    Raises ValueError with the remedy for one that changes the row's meaning. `to_answer`: the row
    is a question, for which an answer's ratings do not matter.
    """
    ignored = [name for name, value in row.items() if name not in used and not is_empty(value)]
    stopping = {
        name: meaning
        for name in ignored
        if (meaning := _meaning_of(name, format))
        and not meaning.is_harmless(row[name], messages)
        and not (to_answer and meaning.side == "answer")
    }
    if stopping:
        raise ValueError(_explain(stopping))
    return _intern(tuple(ignored))


@lru_cache(maxsize=256)
def _intern(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the first tuple that equals `names`; workers send a shared one quickly."""
    return names


def suggest_columns(row: dict[str, Any]) -> str:
    """Returns what to do with a row of no known format, by the names of its columns."""
    by_name = {name.lower(): name for name in row}
    columns = {
        key: by_name[next(name for name in names if name in by_name)]
        for key, names in USUAL.items()
        if not by_name.keys().isdisjoint(names)
    }
    shown = ", ".join(f"{key}: {name}" for key, name in columns.items())
    advice = "name the columns to use in data.columns"
    if {"instruction", "output"} <= columns.keys():
        advice += f", such as {{{shown}}}"
    preference = next((name for name in row if _meaning_of(name, "text") is PREFERENCE), None)
    return advice + (f"; the column {preference!r} {PREFERENCE.holds}" if preference else "")


def _explain(found: dict[str, Meaning]) -> str:
    """Returns the reason of a bad row: the first column, what to do, and how to ignore them all."""
    name, meaning = next(iter(found.items()))
    remedy = meaning.remedy.replace("COLUMN", name)
    return (
        f"the column {name!r} {meaning.holds}; {remedy}; data.ignore_columns: "
        f"[{', '.join(found)}] trains without {'them' if len(found) > 1 else 'it'}"
    )


@lru_cache(maxsize=4096)
def _meaning_of(name: str, format: str) -> Meaning | None:
    return next(
        (
            meaning
            for meaning, pattern in PATTERNS
            if format in meaning.formats and pattern.fullmatch(name.lower())
        ),
        None,
    )
