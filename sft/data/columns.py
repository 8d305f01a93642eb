"""Finds the columns of a row that are not trained on, and refuses those that change its meaning.

An answer that people rejected, the image that a question is about, the choices of a question: a row
without its column says something else. Each such column is known by its name, and stops the run
with what to do. All others are counted, so that the audit can list them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from sft.data.messages import ROLES, Messages, content_text, is_empty, text_path

PAIRS = ("alpaca", "prompt_completion", "question_answer", "seed")
TURNS = ("messages", "sharegpt")
CONVERSATIONS = (*PAIRS, *TURNS, "human_assistant")
ALL = (*CONVERSATIONS, "text", "tokenised")


def _is_in_messages(value: Any, messages: Messages) -> bool:
    """Returns whether all texts in a value are already part of what the messages say."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return all(_is_in_messages(item, messages) for item in items)
    said = [content_text(m) + "\0" + m.get("reasoning_content", "") for m in messages]
    return value is None or any(str(value).strip() in each for each in said)


def _is_all_ones(value: Any, _: Messages) -> bool:
    return all(item == 1 for item in (value if isinstance(value, list) else [value]))


def _is_one_document(value: Any, messages: Messages) -> bool:
    """Returns whether a value counts the tokens, is their number, or has zeros only."""
    items = value if isinstance(value, list) else [value]
    length = len(messages[0]["input_ids"])
    counts = [list(range(start, start + len(items))) for start in (0, 1)]
    return items in (*counts, [length], [0, length]) or not any(items)


class Meaning(NamedTuple):
    """Columns that change what a question or an answer means, what they hold, and what to do.

    `is_harmless` decides from the value and the row's messages that nothing is lost without it.
    """

    formats: tuple[str, ...]
    side: Literal["question", "answer"]
    pattern: str
    holds: str
    remedy: str  # COLUMN: its name, for a value that is text
    is_harmless: Callable[[Any, Messages], bool] = lambda *_: False


PREFERENCE = Meaning(
    ALL,
    "answer",
    r"(chosen|rejected|(non_|dis)?preferred)(_\w+)?|\w+_(chosen|rejected)|kto_tag|preferences?|"
    r"winner(_\w+)?|is_(chosen|preferred|rejected)|(better|safer)_\w*id",
    "says which answer people preferred, and every answer would be learnt",
    "keep the answers to learn, and remove the others",
)
RATING = "rates the answer, and every answer would be learnt"
KEEP = "keep the rows whose answers are to be learnt"
MEANINGS = (
    PREFERENCE,
    Meaning(
        ALL,
        "question",
        r"(image|img|picture|photo|audio|sound|video)s?(_(path|url|file|bytes|id)s?)?|pixel_values",
        "holds images, sound or video, and only text can be trained on",
        "remove the row",
    ),
    Meaning(ALL, "answer", r"replies|candidates", "holds other answers", "convert it to messages"),
    Meaning(CONVERSATIONS, "answer", r"labels?|scores?|ratings?|rank|rewards?", RATING, KEEP),
    Meaning(
        CONVERSATIONS,
        "answer",
        r"(is_)?(correct|desirable|good|accepted|helpful|valid|safe)|correctness|helpfulness|"
        r"((up|down)?vote|thumb)s?(_\w+)?|(user_)?feedback|quality",
        RATING,
        KEEP,
        lambda value, _: value is True,
    ),
    Meaning(
        (*CONVERSATIONS, "text"),
        "answer",
        r"((loss|sample|example|row)_)?weights?",
        "weighs the row in the loss, and every row would weigh the same",
        "write the row as messages whose answer has this weight, or see data.mix",
        _is_all_ones,
    ),
    Meaning(
        ("text",),
        "answer",
        r"labels?(_\w+)?|\w+_label|class(es)?|target|sentiment|emotions?|intents?|stance|polarity|"
        r"stars|is_(spam|toxic|hate\w*)|entities|ner_tags",
        "holds the class of the text, and the text alone would be learnt",
        "use `make classify`, or data.columns: {prompt: text, completion: COLUMN}",
    ),
    Meaning(
        ("text",),
        "answer",
        r"responses?|repl(y|ies)|outputs?|completions?|answers?|summary|highlights|translation|"
        r"targets|target_text",
        "holds an answer to the text, and the text alone would be learnt",
        "use data.columns: {prompt: text, completion: COLUMN}",
    ),
    Meaning(
        ("text",),
        "question",
        r"prompts?|questions?|quer(y|ies)|instructions?",
        "holds a question that the text may answer, and the text alone would be learnt",
        "use data.columns: {prompt: COLUMN, completion: text}",
        _is_in_messages,
    ),
    Meaning(
        ("text",),
        "question",
        r"system(_\w+)?|tools|functions",
        "holds a part of a conversation, and the text alone would be learnt",
        "write it into the text, or convert the row to messages",
        _is_in_messages,
    ),
    Meaning(
        ("text",),
        "answer",
        r"role",
        "says that the text is one turn of a conversation, and it would be learnt by itself",
        "join the turns of each conversation to a row of messages",
        lambda value, _: value not in (*ROLES, "prompter", "human", "gpt", "bot"),
    ),
    Meaning(
        ("tokenised",),
        "answer",
        r"label|label_\w+|\w+_label|class|target|sentiment",
        "holds the class of the text, and the text alone would be learnt",
        "use `make classify` with the text",
    ),
    Meaning(
        (*PAIRS, "human_assistant"),
        "question",
        r"contexts?|passages?|documents?|articles?|paragraphs?|story|evidence|facts?|background|"
        r"support(ing_\w+)?|knowledge|tables?|schema|hints?|abstract|premise|search_results|"
        r"choices|options|endings|(choice|option|opt?|answer|ending|distractor)_?[a-h1-8]|[A-E]|"
        r"inputs?|instructions?|history",
        "holds a part of the question, which would be asked without it",
        "use data.columns: {instruction: ..., input: COLUMN, output: ...}, or write it into the "
        "question",
        _is_in_messages,
    ),
    Meaning(
        TURNS,
        "question",
        r"contexts?|passages?|documents?|search_results|choices|options|instructions?|history|"
        r"prompt|question|query",
        "holds a part of the conversation, and no template would see it",
        "write it into a message",
        _is_in_messages,
    ),
    Meaning(
        CONVERSATIONS,
        "question",
        r"(chat_)?template_(kwargs|args|variables)|enable_thinking|thinking_mode|reasoning_effort",
        "sets a variable of the chat template, which would not see it",
        "write it into chat_template_kwargs of the row",
    ),
    *(
        Meaning(
            formats,
            "answer",
            r"(\w+_)?(reasoning|thinking|thoughts?)(_(content|traces?|steps|process|trajectory))?"
            r"|cot|chain_of_thought|rationale|scratchpad",
            "holds the thoughts before the answer, which would be learnt without them",
            remedy,
            lambda value, messages: (
                " " not in str(value).strip() or _is_in_messages(value, messages)
            ),
        )
        for formats, remedy in (
            (PAIRS, "use data.columns: {..., reasoning_content: COLUMN}"),
            ((*TURNS, "human_assistant"), "write them into the message as reasoning_content"),
        )
    ),
    Meaning(
        CONVERSATIONS,
        "answer",
        r"(tool|function)_calls?",
        "holds calls of the answer, which would be learnt without them",
        "convert the row to messages",
        _is_in_messages,
    ),
    Meaning(
        CONVERSATIONS,
        "question",
        r"(available_)?(tools|functions)|(tools?|functions?|apis?)_(list|schemas?|definitions?|specs?|"
        r"json|descriptions?)|apis",
        "holds tools, and the row would be trained without them",
        "use data.columns: {..., tools: COLUMN}",
        _is_in_messages,
    ),
    Meaning(
        CONVERSATIONS,
        "question",
        r"system(_?(prompt|message|instructions?))?|sys_prompt|developer(_(prompt|message))?",
        "holds a system prompt, and the row would be trained without it",
        "use data.columns: {..., system: COLUMN}",
        _is_in_messages,
    ),
    Meaning(
        ("tokenised",),
        "answer",
        r"(completion|assistants?|loss|label|train|target)_(masks?|weights?)|weights?|advantages",
        "says which tokens are learnt, and only labels are read for that",
        "write labels, with -100 for tokens that are not learnt",
        _is_all_ones,
    ),
    Meaning(
        ("tokenised",),
        "answer",
        r"(prompt|source|context)_(len|length)s?",
        "says where the answer begins, and only labels are read for that",
        "write labels, with -100 for the tokens of the prompt",
        lambda _, messages: -100 in messages[0]["labels"],
    ),
    Meaning(
        ("tokenised",),
        "answer",
        r"position_ids|token_type_ids|segment_ids|(seq|sequence)_lengths?|cu_seqlens\w*",
        "says how the tokens are used, and a row is read as one document",
        "write one document a row",
        _is_one_document,
    ),
)
PATTERNS = [(meaning, re.compile(meaning.pattern)) for meaning in MEANINGS]
# The usual names of a question and its answer in public data sets, for the message to users.
USUAL = {
    "instruction": "instruction question query prompt problem input inputs dialogue document "
    "article user_prompt input_text source",
    "input": "context passage story paragraph",
    "output": "output response chosen answer completion target targets solution summary highlights "
    "answers correct_answer output_text",
    "system": "system system_prompt",
    "tools": "tools functions",
    "history": "history",
    "chat_template_kwargs": "chat_template_kwargs",
}
SHARED = ("system", "tools", "chat_template_kwargs")
ASKING = {"user", "human", "prompter", "input"}  # roles, or keys, of turns that ask


class Lost(ValueError):
    """A row has `columns` that change its meaning and are not used."""

    def __init__(self, reason: str, columns: list[str]):
        super().__init__(reason)
        self.columns = columns


def find_ignored(
    row: dict[str, Any],
    format: str,
    messages: Messages,
    used: Collection[str],
    *,
    to_answer: bool = False,
) -> tuple[str, ...]:
    """Returns the columns of a row that have a value and are not `used`.

    Raises Lost with the remedy for those that change the row's meaning. `to_answer`: the row is a
    question, for which an answer's ratings do not matter.
    """
    ignored = [name for name, value in row.items() if name not in used and not is_empty(value)]
    stopping = {
        name: meaning
        for name in ignored
        if (meaning := _meaning_of(name, format))
        and not meaning.is_harmless(row[name], messages)
        and not (to_answer and meaning.side == "answer")
    }
    for name, meaning in stopping.items():  # the first is explained, all are named
        remedy = meaning.remedy.replace("COLUMN", name)
        if "COLUMN" in meaning.remedy and not isinstance(row[name], str | int | float):
            remedy = f"write it as text into the {meaning.side}"
        raise Lost(
            f"the column {name!r} {meaning.holds}; {remedy}; data.ignore_columns: "
            f"[{', '.join(stopping)}] trains without {'them' if len(stopping) > 1 else 'it'}",
            [*stopping],
        )
    return _intern(tuple(ignored))


@lru_cache(maxsize=256)
def _intern(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the first tuple that equals `names`; workers send a shared one quickly."""
    return names


def guess_columns(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yields what data.columns may be for a row of no known format, the best guess first.

    Turns are found by their shape, at most two levels deep; a question and its answer by USUAL
    names.
    """
    by_name = {name.strip().lower(): name for name in reversed(row)}
    names = {
        key: by_name[next(name for name in usual if name in by_name)]
        for key, usual in ((key, usual.split()) for key, usual in USUAL.items())
        if not by_name.keys().isdisjoint(usual)
    }
    shared = {key: names.pop(key) for key in SHARED if key in names}
    for path, value in _values_in(row):
        turns = (
            [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
        )
        if any(turn.get("role") in ASKING for turn in turns):
            yield {"messages": path} | shared
        elif any(turn.get("from") in ASKING or turn.keys() & ASKING for turn in turns):
            yield {"conversations": path} | shared
    if {"instruction", "output"} <= names.keys():
        yield names | shared
        yield {key: text_path(row[name], name) for key, name in names.items()} | shared
        yield {"prompt": names["instruction"], "completion": names["output"]} | shared
    for name, value in row.items():
        if isinstance(value, dict) and len(value) == 2:  # a translation
            yield dict(
                zip(("prompt", "completion"), (f"{name}.{key}" for key in value), strict=True)
            )


def _values_in(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from row.items()
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())


def is_preference(name: str) -> bool:
    """Returns whether a column says which answer people preferred."""
    return _meaning_of(name, "text") is PREFERENCE


@lru_cache(maxsize=4096)
def _meaning_of(name: str, format: str) -> Meaning | None:
    return next(
        (
            meaning
            for meaning, pattern in PATTERNS
            if format in meaning.formats
            and (pattern.fullmatch(name.lower()) or pattern.fullmatch(name))
        ),
        None,
    )
