"""The base of every section of a configuration, and the types of its keys. Imports no torch."""

from __future__ import annotations

import fractions
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sft.errors import shorten

Origins = dict[str, str]
"""Dotted path of a key -> the place where it was written, for messages."""


@dataclass(frozen=True)
class OnlyWith:
    """States that a key is read only if another key has one of `values`, or is above `above`."""

    path: str
    values: tuple[Any, ...] = ()
    above: float = float("inf")

    def holds(self, value: Any) -> bool:
        """Returns whether the key is read if the other one has this value."""
        if not self.values:
            return value > self.above
        return any(each in self.values for each in (value if isinstance(value, list) else [value]))

    def __str__(self) -> str:
        if not self.values:
            return f"{self.path} > {self.above:g}"
        return f"{self.path}: {' or '.join(str(value).lower() for value in self.values)}"


class Section(BaseModel):
    """A section of a configuration: its keys, each with its type, default and documentation."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )
    only_with: ClassVar[OnlyWith | None] = None
    """States when the other keys of the section are read. None: always."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Keys that other programs have in such a section -> why they are not supported."""

    @classmethod
    def nested(cls) -> dict[str, type[Section]]:
        """Returns the sections in this one, by key."""
        fields = cls.model_fields.items()
        own = {key: field.annotation for key, field in fields}
        return {k: a for k, a in own.items() if isinstance(a, type) and issubclass(a, Section)}

    @classmethod
    def paths(cls, prefix: str = "") -> Iterator[tuple[str, type[Section], str]]:
        """Yields (dotted path, section, key) of all keys, those of the sections in it, too."""
        nested = cls.nested()
        for key in cls.model_fields:
            yield prefix + key, cls, key
            if key in nested:
                yield from nested[key].paths(f"{prefix}{key}.")


def _refuse_unsafe(path: str) -> str:
    """Returns the path of a folder. Raises ValueError if it is unsafe; it may be absolute."""
    is_name = path.isprintable() and len(path) <= 200 and Path(path).name.strip()
    if not is_name or ".." in Path(path).parts or path.startswith("~"):
        expected = "printable characters, at most 200, without '..' and '~'"
        raise ValueError(f"must name a folder: {expected}")
    return path


def interval_steps(interval: int | str, steps_per_epoch: int) -> fractions.Fraction:
    """Returns the steps between two events; a part of a step for small parts of an epoch."""
    if isinstance(interval, int):
        return fractions.Fraction(interval)
    return _parse_epochs(interval) * steps_per_epoch


def _parse_epochs(text: str) -> fractions.Fraction:
    found = re.fullmatch(r"(\d+(?:\.\d+|/\d*[1-9]\d*)?)? ?epochs?", text)
    return fractions.Fraction(found[1] or 1) if found else fractions.Fraction(0)


def _refuse_no_interval(text: str) -> str:
    if _parse_epochs(text) <= 0:
        expected = "a number of steps, or of epochs as in `epoch`, `0.5 epoch`, `1/3 epoch`"
        raise ValueError(f"expected {expected}, found {shorten(text)}")
    return text


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Interval = Annotated[str, Field(min_length=1), AfterValidator(_refuse_no_interval)] | Count
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Char = Annotated[str, Field(min_length=1, max_length=1, pattern=r"^[^\x00\r\n\"]$")]
Texts = Annotated[list[Text], Field(min_length=1)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(_refuse_unsafe)]
