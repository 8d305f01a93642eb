"""Finds the columns of a row that are not trained on, and refuses those that change its meaning.

An answer that people rejected, the image that a question is about, the choices of a question: a row
without its column says something else. Each such column is known by its name, and stops the run
with what to do. All others are counted, so that the audit can list them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

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
    items = value if isinstance(value, list) else [value]
    return all(item == 1 or item in ("1", "1.0") for item in items)  # text in a CSV


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

    formats: frozenset[str]
    side: str  # question or answer: what changes without them
    is_harmless: Callable[[Any, Messages], bool]
    holds: str
    remedy: str  # COLUMN: its name, for a value that is text
    pattern: re.Pattern[str]


GROUPS = {
    "any": ALL,
    "chat": CONVERSATIONS,
    "pair": PAIRS,
    "dialogue": ("human_assistant",),
    "turns": TURNS,
    "text": ("text",),
    "tokens": ("tokenised",),
}
HARMLESS: dict[str, Callable[[Any, Messages], bool]] = {
    "": lambda *_: False,
    "said": _is_in_messages,
    "a word, or said": lambda value, m: " " not in str(value).strip() or _is_in_messages(value, m),
    "true": lambda value, _: str(value).lower() == "true",
    "ones": _is_all_ones,
    "no role": lambda value, _: value not in (*ROLES, "prompter", "human", "gpt", "bot"),
    "in labels": lambda _, messages: -100 in messages[0]["labels"],
    "one document": _is_one_document,
}
# In each entry: formats (of GROUPS), the side, when it is HARMLESS; what it holds; what to do; and
# patterns of the names. The first entry that fits is used.
TABLE = r"""
- any answer
says which answer people preferred, and every answer would be learnt
keep the answers to learn, and remove the others
(chosen|rejected|(non_|dis)?preferred)(_\w+)? \w+_(chosen|rejected) kto_tag preferences?
winner(_\w+)? is_(chosen|preferred|rejected) (better|safer)_\w*id
- any question
holds images, sound or video, and only text can be trained on
remove the row
(image|img|picture|photo|audio|sound|video)s?(_(path|url|file|bytes|id)s?)? pixel_values
- any answer
holds other answers
convert the row to messages
replies candidates
- chat answer
rates the answer, and every answer would be learnt
keep the rows whose answers are to be learnt
labels? scores? ratings? rank rewards?
- chat answer true
rates the answer, and every answer would be learnt
keep the rows whose answers are to be learnt
(is_)?(correct|desirable|good|accepted|helpful|valid|safe) correctness helpfulness quality
((up|down)?vote|thumb)s?(_\w+)? (user_)?feedback
- chat+text answer ones
weighs the row in the loss, and every row would weigh the same
write the row as messages whose answer has this weight, or see data.mix
((loss|sample|example|row)_)?weights?
- text answer
holds the class of the text, and the text alone would be learnt
use `make classify`, or data.columns: {prompt: text, completion: COLUMN}
labels?(_\w+)? \w+_label class(es)? target sentiment emotions? intents? stance polarity stars
is_(spam|toxic|hate\w*) entities ner_tags
- text answer
holds an answer to the text, and the text alone would be learnt
use data.columns: {prompt: text, completion: COLUMN}
responses? repl(y|ies) outputs? completions? answers? summary highlights translation targets
target_text
- text question said
holds a question that the text may answer, and the text alone would be learnt
use data.columns: {prompt: COLUMN, completion: text}
prompts? questions? quer(y|ies) instructions?
- text question said
holds a part of a conversation, and the text alone would be learnt
write it into the text, or convert the row to messages
system(_\w+)? tools functions
- text answer no role
says that the text is one turn of a conversation, and it would be learnt by itself
join the turns of each conversation to a row of messages
role
- tokens answer
holds the class of the text, and the text alone would be learnt
use `make classify` with the text
label label_\w+ \w+_label class target sentiment
- pair+dialogue question said
holds a part of the question, which would be asked without it
use data.columns: {instruction: ..., input: COLUMN, output: ...}, or write it into the question
contexts? passages? documents? articles? paragraphs? story evidence facts? background knowledge
support(ing_\w+)? tables? schema hints? abstract premise search_results choices options endings
(choice|option|opt?|answer|ending|distractor)_?[a-h1-8] [A-E] inputs? instructions? history
- turns question said
holds a part of the conversation, and no template would see it
write it into a message
contexts? passages? documents? search_results choices options instructions? history prompt
question query
- chat question
sets a variable of the chat template, which would not see it
write it into chat_template_kwargs of the row
(chat_)?template_(kwargs|args|variables) enable_thinking thinking_mode reasoning_effort
- pair answer a word, or said
holds the thoughts before the answer, which would be learnt without them
use data.columns: {..., reasoning_content: COLUMN}
THOUGHTS
- turns+dialogue answer a word, or said
holds the thoughts before the answer, which would be learnt without them
write them into the message as reasoning_content
THOUGHTS
- chat answer said
holds calls of the answer, which would be learnt without them
convert the row to messages
(tool|function)_calls?
- chat question said
holds tools, and the row would be trained without them
use data.columns: {..., tools: COLUMN}
(available_)?(tools|functions) apis
(tools?|functions?|apis?)_(list|schemas?|definitions?|specs?|json|descriptions?)
- chat question said
holds a system prompt, and the row would be trained without it
use data.columns: {..., system: COLUMN}
system(_?(prompt|message|instructions?))? sys_prompt developer(_(prompt|message))?
- tokens answer ones
says which tokens are learnt, and only labels are read for that
write labels, with -100 for tokens that are not learnt
(completion|assistants?|loss|label|train|target)_(masks?|weights?) weights? advantages
- tokens answer in labels
says where the answer begins, and only labels are read for that
write labels, with -100 for the tokens of the prompt
(prompt|source|context)_(len|length)s?
- tokens answer one document
says how the tokens are used, and a row is read as one document
write one document a row
position_ids token_type_ids segment_ids (seq|sequence)_lengths? cu_seqlens\w*
"""
THOUGHTS = (
    r"(\w+_)?(reasoning|thinking|thoughts?)(_(content|traces?|steps|process|trajectory))?|"
    r"cot|chain_of_thought|rationale|scratchpad"
)


def _read_entry(entry: str) -> Meaning:
    about, holds, remedy, *patterns = entry.splitlines()
    groups, side, *harmless = about.split()
    formats = frozenset(format for name in groups.split("+") for format in GROUPS[name])
    pattern = "|".join(" ".join(patterns).split()).replace("THOUGHTS", THOUGHTS)
    return Meaning(formats, side, HARMLESS[" ".join(harmless)], holds, remedy, re.compile(pattern))


MEANINGS = [_read_entry(entry) for entry in TABLE.split("\n- ")[1:]]
PREFERENCE = MEANINGS[0]
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
    names = (name.lower(), name)
    mine = (meaning for meaning in MEANINGS if format in meaning.formats)
    return next((each for each in mine if any(map(each.pattern.fullmatch, names))), None)
