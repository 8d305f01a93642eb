"""Assigns the trained parameters to `train.groups`, and freezes those that a group freezes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from sft.config.schema import Group, Train
from sft.errors import ConfigError, suggest


def find_group(train: Train, name: str) -> Group | None:
    """Returns the first group that matches the name of a parameter; None if none does."""
    return next((each for each in train.groups or () if re.search(each.match, name)), None)


def freeze_groups(model: nn.Module, train: Train) -> None:
    """Freezes what `train.groups` freezes. A second call changes nothing.

    Raises ConfigError for a group that is the first match of no parameter, or if nothing is left.
    """
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad or _is_frozen(p)]
    found = {name: find_group(train, name) for name, _ in own}
    for group in train.groups or ():
        if not any(each is group for each in found.values()):
            raise ConfigError(_unused(train, group, found))
    for name, parameter in own:
        if (matched := found[name]) and matched.freeze:
            parameter.requires_grad_(False)
            parameter.frozen_by_group = True  # type: ignore[attr-defined]
    if train.groups and not any(p.requires_grad for _, p in own):
        raise ConfigError("train.groups: nothing is left to train; freeze less")


def _is_frozen(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "frozen_by_group", False)


def _unused(train: Train, group: Group, names: Iterable[str]) -> str:
    """Returns what is wrong with a group that no parameter belongs to."""
    earlier = next((each for each in names if re.search(group.match, each)), None)
    if earlier and (first := find_group(train, earlier)):
        return (
            f"train.groups: {group.match!r} matches only what {first.match!r} before it matches; "
            "put it first, or remove it"
        )
    parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
    return (
        f"train.groups: {group.match!r} matches the name of no trained parameter; "
        f"{suggest(group.match, sorted(parts))}"
    )
