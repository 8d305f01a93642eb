"""Fine-tunes language models: right, predictable and fast (docs/API.md, docs/DESIGN.md).

Importing it imports nothing heavy: `train`, `plan` and `evaluate` are packages that can be called,
and load the rest when they are.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

FUNCTIONS = ("train", "plan", "evaluate")


class CallablePackage(ModuleType):
    """A package that can be called: `sft.train(...)` is `sft.api.train(...)`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module("sft.api"), name)(*args, **options)


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return import_module(f"{__name__}.{name}")
    if name == "AccelerateConnector":
        return import_module("sft.serve.connector").AccelerateConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
