"""Renders docs/CONFIG.md from the schemas, and names types for messages."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from sft.config.aliases import ALIASES, UNSET
from sft.config.rules import conditions
from sft.config.schema import NESTED, RunConfig, sections_of
from sft.config.section import Section

HEAD = """\
# Configuration keys

Generated from the schemas by `make docs`. A file has the sections below. With
`include: other.yaml`, a file takes precedence over the file that it includes. Overrides, in `ARGS`
or on a command line, take precedence over both.
Unknown keys, wrong types and contradictions stop the run, all in one message.

**Overrides.** `train.learning_rate=1e-4`, `--train.learning_rate 1e-4` and `--learning_rate 1e-4`
are the same. The last form works if only one section has the key. A key that is true or false may
be given as a flag without a value, which means true: `--tensorboard`.

**Tasks.** A file with `task: distill` at its top configures algorithm distillation
(docs/research/DISTILL.md). It has the sections `distill` and `train`; all other files have all
sections except `distill`.
"""
OTHER_NAMES = """\

## Other names

Names that Hugging Face's TrainingArguments and example scripts use, or earlier versions had. They
work in a file, in the section of the key, and as overrides. A key and its other name with different
values stop the run. Names that are equal in both are not listed, unless two sections here have such
a key.

| other name | key | values |
|---|---|---|
"""
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def render_reference(schemas: Iterable[type[RunConfig]]) -> str:
    """Returns docs/CONFIG.md: every key of every task with its type, default and meaning."""
    sections: dict[str, type[Section]] = {}
    for schema in schemas:
        sections |= sections_of(schema)
    named = {**sections, **NESTED}.items()
    tables = [_render_section(name, section) for name, section in named]
    return "".join([HEAD, *tables, OTHER_NAMES, *map(_render_alias, ALIASES)])


def _render_section(name: str, section: type[Section]) -> str:
    """Returns the heading and table of a section."""
    about = " ".join((section.__doc__ or "").split())
    if section.only_with:
        about += f" Other keys are only read with `{section.only_with}`."
    lines = ["", f"## `{name}`", "", about, ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        default = "**required**" if field.is_required() else f"`{_yaml(field.default)}`"
        own = [f"`{each}`" for each in conditions(section, key) if each != section.only_with]
        meaning = " ".join(str(field.description).split())
        meaning += f" Only with {' and '.join(own)}." if own else ""
        lines.append(f"| `{key}` | {type_name(field)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _render_alias(name: str) -> str:
    """Returns the table row of an alias."""
    alias = ALIASES[name]
    pairs = [(_yaml(given), own) for given, own in alias.values.items()]
    values = [
        f"`{given}`: {'changes nothing' if own is UNSET else f'`{_yaml(own)}`'}"
        for given, own in pairs
    ]
    return f"| `{name}` | `{alias.key}` | {', '.join(values) or 'the same'} |\n"


def type_name(field: Any) -> str:
    """Returns the type of a field in words, with its bounds."""
    return _annotation_name(field.annotation) + _bounds(field.metadata)


def _bounds(metadata: list[Any]) -> str:
    """Returns ` > 0, < 1` for the limits of a number; "" without any."""
    found = ((sign, getattr(item, name, None)) for item in metadata for name, sign in SIGNS.items())
    parts = [f"{sign} {limit}" for sign, limit in found if limit is not None]
    return f" {', '.join(parts)}" if parts else ""


def _annotation_name(annotation: Any) -> str:
    """Returns a type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _annotation_name(arguments[0]) + _bounds(arguments[1].metadata)
    if origin is Literal:
        return " or ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    if origin is dict:
        return " to ".join(map(_annotation_name, arguments))
    if origin is list:
        return f"list of {_annotation_name(arguments[0])}"
    if arguments:
        return " or ".join(map(_annotation_name, arguments))
    return NAMES.get(annotation) or annotation.__name__.lower()


def _yaml(value: Any) -> str:
    """Returns a value as it is written in a file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Section):
        return "{}"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value)
