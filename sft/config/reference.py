"""Writes docs/CONFIG.md from the schema."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from sft.config.aliases import ALIASES, UNSET
from sft.config.rules import conditions
from sft.config.schema import NESTED, Generation, RunConfig, Section, sections_of

# --- docs/CONFIG.md ----------------------------------------------------------------------------


def type_name(field: Any) -> str:
    return _annotation_name(field.annotation) + _bounds(field.metadata)


def _bounds(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    parts = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    return f" {', '.join(parts)}" if parts else ""


def _annotation_name(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        return _annotated_name(arguments)
    if typing.get_origin(annotation) is Literal:
        return " or ".join(str(value) for value in arguments)
    if typing.get_origin(annotation) is dict:
        return " to ".join(map(_annotation_name, arguments))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation.__name__.lower()
    if typing.get_origin(annotation) is list:
        return f"list of {_annotation_name(arguments[0])}"
    if arguments:
        return " or ".join(_annotation_name(argument) for argument in arguments)
    names = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return names[annotation]


def _annotated_name(arguments: tuple[Any, ...]) -> str:
    return _annotation_name(arguments[0]) + _bounds(arguments[1].metadata)


def reference(schemas: Iterable[type[RunConfig]]) -> str:
    """Returns docs/CONFIG.md: every key of every task with its type, default and meaning."""
    sections: dict[str, type[Section]] = {}
    for schema in schemas:
        sections |= sections_of(schema)
    lines = [
        "# Configuration keys",
        "",
        "Generated from the schemas by `make docs`. A file holds these sections;",
        "`include: other.yaml` lays it over another file, and",
        "words in `ARGS` or on a command line override both. Unknown keys, wrong types and",
        "contradictions stop the run, all in one message.",
        "",
        "An override is `train.learning_rate=1e-4`, `--train.learning_rate 1e-4` or, where one",
        "section has the key, `--learning_rate 1e-4`. A flag of a key that is true or false may",
        "stand alone: `--tensorboard`. The end of this page has other names of keys.",
        "",
        "`task: distill` at the top of a file makes it one of algorithm distillation",
        "(docs/research/DISTILL.md): it has the sections `distill` and `train`,",
        "others all but `distill`.",
    ]
    for name, section in {**sections, **NESTED}.items():
        lines += ["", f"## `{name}`", ""]
        if section is Generation:
            given = f"make infer ARGS={name}.temperature=0.7"
            lines += [
                f"Of each of `classify.strategies`, and of `{given}` and `make infer-batch`.",
                "",
            ]
        if section.only_with:
            lines += [f"Other keys are only read with `{section.only_with}`.", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            default = "**required**" if field.is_required() else f"`{_yaml(field.default)}`"
            found = [each for each in conditions(section, key) if each != section.only_with]
            stated = [f"Only with `{condition}`." for condition in found]
            meaning = " ".join([*str(field.description).split(), *stated])
            lines.append(f"| `{key}` | {type_name(field)} | {default} | {meaning} |")
    return "\n".join([*lines, *_alias_lines()]) + "\n"


def _alias_lines() -> list[str]:
    """Returns the section on other names of keys."""
    lines = [
        "",
        "## Other names",
        "",
        "Names that Hugging Face's TrainingArguments and example scripts use for these keys. They",
        "work in a file (in the key's section) and as flags; other keys of the same meaning have",
        "the same name. A key and its other name with different values stop the run.",
        "",
        "| other name | key | values |",
        "|---|---|---|",
    ]
    for name, alias in ALIASES.items():
        values = ", ".join(
            f"`{_yaml(given)}`: {'as if not given' if own is UNSET else f'`{_yaml(own)}`'}"
            for given, own in alias.values.items()
        )
        lines.append(f"| `{name}` | `{alias.key}` | {values or 'the same'} |")
    return lines


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Section):
        return "{}"
    if isinstance(value, float):
        return f"{value:g}" if not math.isinf(value) else str(value)
    return "null" if value is None else str(value)
