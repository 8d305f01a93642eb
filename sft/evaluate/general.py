"""Reads the general prompts and texts on which a tuned model is compared with its base.

The bundled set (general.yaml) has 50 short prompts in each of six domains, and 30 texts. A set of
the user's is a file of rows (`evaluation.general_path`): prompts in any format of conversations,
with their `domain` in a column of that name, and texts under the key `text`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sft.data import files, formats, readers
from sft.data.files import BadRow, Paths, Row
from sft.data.messages import error_reason
from sft.errors import DataError
from sft.evaluate.answers import Question, make_question

BUNDLED = Path(__file__).with_name("general.yaml")
DOMAIN = "domain"  # column of a file of the user's
NO_DOMAIN = "general"
FEWEST = 2  # prompts of a set, and texts if it has any: fewer have no interval


@dataclass(frozen=True)
class GeneralSet:
    """Prompts, each with its domain as the field `group`, and texts. `sha256` names both."""

    name: str
    sha256: str
    prompts: list[Question]
    texts: list[str]

    def half(self, number: int) -> GeneralSet:
        """Returns every second prompt of each domain, from the first (0) or the second (1) on.

        `data.replay` trains on the second half, so only the first can show what that run lost.
        """
        seen: dict[str, int] = {}
        kept = []
        for prompt in self.prompts:
            place = seen[domain_of(prompt)] = seen.get(domain_of(prompt), -1) + 1
            if place % 2 == number:
                kept.append(prompt)
        return replace(self, prompts=kept, sha256=f"{self.sha256}:{number}")


def domain_of(prompt: Question) -> str:
    return str(prompt.fields["group"])


def load_general(path: Paths | None, cache_dir: str = files.CACHE_DIR) -> GeneralSet:
    """Returns the set in the user's files; without a path the bundled one.

    Raises DataError for rows that are neither prompts nor texts.
    """
    if path is None:
        return load_bundled()
    digest = hashlib.sha256("".join(_digests(path, cache_dir)).encode()).hexdigest()
    prompts, texts, bad = list[Question](), list[str](), list[str]()
    for place, value in files.read_raw(path, cache_dir):
        found = _read(place, value)
        if isinstance(found, BadRow):
            bad.append(str(found))
        elif isinstance(found, str):
            texts.append(found)
        else:
            prompts.append(found)
    name = path if isinstance(path, str) else ", ".join(path)
    if bad:
        raise DataError.from_rows(name, bad)
    for kind, number, fewest in (
        ("prompts", len(prompts), FEWEST),
        ("texts", len(texts), FEWEST if texts else 0),
    ):
        if number < fewest:
            raise DataError(
                f"evaluation.general_path: {name}: expected at least {fewest} {kind}, found "
                f"{number}; add rows, or leave the key out for the bundled set"
            )
    return GeneralSet(name, digest, prompts, texts)


def load_bundled() -> GeneralSet:
    data = BUNDLED.read_bytes()
    found = YAML(typ="safe", pure=True).load(data)
    prompts = [
        _make_prompt(f"{domain}:{number}", domain, [{"role": "user", "content": text}])
        for domain, texts in found["prompts"].items()
        for number, text in enumerate(texts, 1)
    ]
    return GeneralSet("bundled", hashlib.sha256(data).hexdigest(), prompts, found["texts"])


def _digests(path: Paths, cache_dir: str) -> Iterator[str]:
    return (str(each["digest"]) for each in files.file_digests(path, cache_dir))


def _make_prompt(place: str, domain: str, messages: Any, tools: Any = None) -> Question:
    file, _, line = place.rpartition(":")
    return make_question(Row(messages, tools, file, int(line), group=domain))


def _read(place: str, value: Any) -> Question | str | BadRow:
    """Returns the prompt or the text of a row, or why it is neither."""
    file, _, line = place.rpartition(":")
    try:
        if isinstance(value, Exception):
            raise value
        row = dict(value) if isinstance(value, dict) else value
        domain = NO_DOMAIN
        if isinstance(row, dict):
            domain = str(row.pop(DOMAIN, NO_DOMAIN))
            if row.keys() == {"text"} and isinstance(row["text"], str) and row["text"].strip():
                return row["text"]
        found = formats.read_question(row)
    except (ValueError, RecursionError) as error:
        shown = "" if isinstance(value, Exception) else readers.make_excerpt(value)
        return BadRow(file, int(line), error_reason(error), shown)
    return _make_prompt(place, domain, found.messages, found.tools)
