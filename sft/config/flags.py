"""Reads overrides as people type them: `a.b=value`, `--a.b value`, `--b value`, `--b=value`."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping

from sft.config.aliases import ALIASES
from sft.config.schema import Section

PATH = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+"
OVERRIDE = re.compile(f"({PATH})=(.*)", re.DOTALL)
Sections = Mapping[str, type[Section]]


def parse_overrides(
    words: Iterable[str], sections: Sections, problems: list[str]
) -> Iterator[tuple[str, str]]:
    """Yields (dotted path, value as YAML) of each override; adds to `problems` what is none."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if match := OVERRIDE.fullmatch(word):
                yield match[1], match[2]
            else:
                problems.append(
                    f"override {word!r}: expected section.key=value, as in train.epochs=1"
                )
            continue
        flag, has_value, value = word.partition("=")
        path = _find_key(flag, sections, problems)
        if not has_value:
            is_last = not rest or rest[0].startswith("--")
            if (is_last or OVERRIDE.fullmatch(rest[0])) and (
                not path or _is_switch(path, sections)
            ):
                value = "true"
            elif is_last:
                problems.append(f"{flag}: expected a value, as in {flag}=1")
                continue
            else:
                value = rest.pop(0)
        if path:
            yield path, value


def _find_key(flag: str, sections: Sections, problems: list[str]) -> str:
    """Returns the dotted path that a flag names; "" if it names none, which goes to `problems`."""
    name = flag.removeprefix("--").replace("-", "_")
    if re.fullmatch(PATH, name):
        return name  # an unknown key is reported when all of them are validated
    if name in ALIASES and (section := ALIASES[name].key.split(".")[0]) in sections:
        return f"{section}.{name}"
    found = [path for path, key in _keys(sections) if key == name]
    if len(found) == 1:
        return found[0]
    if found:
        meant = " or ".join(f"--{path}" for path in found)
        problems.append(f"{flag}: several sections have this key: expected {meant}")
    else:
        known = ["config", *ALIASES, *(key for _, key in _keys(sections))]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean --{near[0]}?" if near else "docs/CONFIG.md lists the keys"
        problems.append(f"{flag}: unknown flag; {hint}")
    return ""


def _keys(sections: Sections) -> Iterator[tuple[str, str]]:
    """Yields (dotted path, key) of every key."""
    for name, section in sections.items():
        for key in section.model_fields:
            yield f"{name}.{key}", key


def _is_switch(path: str, sections: Sections) -> bool:
    """Returns whether the key may be true or false, so that its flag may stand alone."""
    section, key = path.split(".")[:2]
    if key in ALIASES and ALIASES[key].key.startswith(f"{section}."):
        if ALIASES[key].is_switch:
            return True
        key = ALIASES[key].key.split(".")[1]
    field = sections[section].model_fields.get(key) if section in sections else None
    return field is not None and bool in (field.annotation, *typing.get_args(field.annotation))
