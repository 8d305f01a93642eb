"""The worlds in which histories are made: a line for each, and its file. Imports no torch itself.

What a world has to say is in `grid.World`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from sft.tasks.distill.grid import World

WORLDS = {  # name -> (module:class, steps of an episode)
    "darkroom": ("darkroom:Darkroom", 20),
    "key_to_door": ("key_to_door:KeyToDoor", 50),
}

if TYPE_CHECKING:
    WorldName: TypeAlias = str
else:
    WorldName = Literal[tuple(WORLDS)]


@cache
def world_of(name: str) -> World:
    """Returns the world with this name."""
    place, steps = WORLDS[name]
    module, kind = place.split(":")
    world: World = getattr(import_module(f"sft.tasks.distill.{module}"), kind)(steps)
    return world
