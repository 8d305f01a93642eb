"""Finds the label in an answer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from sft.data.messages import scalar_text


def label_of(answer: str | None, labels: Sequence[str]) -> str | None:
    """Returns the label that an answer gives; None (a failure) if it gives no label, or several.

    An answer may be the label itself. Otherwise, if it contains JSON, the value of "label" counts.
    Otherwise labels are searched as whole words, the longest first. Upper and lower case do not
    matter, nor what joins the words ("non hateful" is `non-hateful`). A negated label is a failure,
    since its meaning is unclear: "not" and "never" negate the rest of their sentence.
    """
    text = (answer or "").strip()
    if text in labels:
        return text
    by_letters, pattern = _spellings(tuple(labels))
    if "{" in text:
        named = [
            scalar_text(each[key])
            for each in _objects(text)
            for key in each
            if key.casefold() == "label"
        ]
        given = {each if each in labels else by_letters.get(letters(each)) for each in named}
    else:
        text = text.casefold()
        given = {by_letters.get(letters(match[0])) for match in pattern.finditer(text)}
        if _is_negated(pattern.sub(LABEL, text)):
            return None
    return given.pop() if len(given) == 1 else None


LABEL = "\0"  # stands for a label, which may itself contain a "not"
SENTENCE = re.compile(r"[.!?][\"'\u2019\u201d)\]*_]*\s|\n\s*\n")  # where one ends
NEGATION = re.compile(r"\b(?:not|cannot|never|neither|nor)\b|n['\u2019]t\b")
NONE = re.compile(rf"\b(?:no|non|nothing|without)\s+(?:\w+\s+)?{LABEL}")  # "no really hateful"


def _is_negated(text: str) -> bool:
    """Returns whether a sentence of a casefolded text negates a `LABEL`."""
    parts = (sentence.rpartition(LABEL) for sentence in SENTENCE.split(text))
    found = (NEGATION.search(before) for before, label, _ in parts if label)
    return any(found) or NONE.search(text) is not None


WORD = re.compile(r"[^\W_]+")


def letters(text: str) -> str:
    """Returns a label's letters and digits, which are the same in all its spellings."""
    return "".join(WORD.findall(text.casefold()))


@cache
def _spellings(labels: tuple[str, ...]) -> tuple[dict[str, str], re.Pattern[str]]:
    """Returns (labels by their letters, if these are unique; a pattern that finds labels)."""
    shared = Counter(map(letters, labels))
    by_letters = {letters(label): label for label in labels if shared[letters(label)] == 1}
    by_letters.pop("", None)  # a label without letters, such as "+"
    longest = sorted(filter(letters, labels), key=lambda label: len(letters(label)), reverse=True)
    forms = [r"[\s_-]*".join(WORD.findall(label.casefold())) for label in longest] or ["(?!)"]
    found = rf"(?<!\w)(?<!\w-)(?<!\d\.)({'|'.join(forms)})(?!-?\w|\.\d)"
    return by_letters, re.compile(found)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects in a text, up to the first broken one."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        yield value
        at = text.find("{", end)
