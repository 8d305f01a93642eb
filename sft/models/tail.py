"""Records what a model's code does to the output of its vocabulary head, and repeats it.

Some models cap or scale logits behind the head (Gemma, Cohere, Granite). Which ones, and how, is
not listed: operations on the head's output are recorded while the model runs on a few tokens. They
can be repeated on other positions if they use nothing but logits and constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map


class NotRepeatable(Exception):
    """The reason why operations cannot be repeated on other positions."""


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor of the recorded pass."""

    number: int


@dataclass(frozen=True)
class _Step:
    """One operation."""

    function: Any
    args: Any
    kwargs: Any
    results: tuple[int | None, ...]  # slots of the results, flat
    dead: tuple[int, ...]  # slots that no later operation uses


class Tail:
    """The recorded operations. Slot 0 is the head's output."""

    def __init__(self, steps: list[_Step], result: int):
        self.steps, self.result = steps, result

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns what the model makes of these logits (positions, vocabulary)."""
        values: dict[int, Any] = {0: logits}
        del logits

        def fill(each: Any) -> Any:
            return values[each.number] if isinstance(each, _Slot) else each

        for step in self.steps:
            args, kwargs = tree_map(fill, (step.args, step.kwargs))
            found = tree_leaves(step.function(*args, **kwargs))
            del args, kwargs
            for slot, value in zip(step.results, found, strict=True):
                if slot is not None:
                    values[slot] = value
            del found
            for slot in step.dead:
                values.pop(slot, None)
        return values[self.result]


READS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"}


class TailRecorder(TorchFunctionMode):
    """Records the operations on the tensor that `begin` gets, and on what they return."""

    def __init__(self) -> None:
        super().__init__()
        self._slots: dict[int, int] = {}  # id of a tensor -> its slot
        self._alive: list[Any] = []  # so that no id is used again
        self._detached: list[Any] = []  # the same
        self._steps: list[tuple[Any, Any, Any, tuple[int | None, ...]]] = []
        self._problem, self._calls = "", 0

    def begin(self, logits: torch.Tensor) -> None:
        """Marks the head's output."""
        self._calls += 1
        self._slot_of(logits)

    def _slot_of(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._slots:
            self._slots[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
        return self._slots[id(tensor)]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        is_known = [id(t) in self._slots for t in tensors]
        result = func(*args, **kwargs)
        if any(is_known):
            self._record(func, args, kwargs, result, all(is_known))
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any, closed: bool) -> None:
        name = getattr(func, "__name__", "")
        if name == "detach":  # by hooks of an engine, whose own backward passes it on
            self._slots[id(result)] = self._slots[id(args[0])]
            self._detached.append(result)
            return
        found = tree_leaves(result)
        is_tensor = [isinstance(each, torch.Tensor) for each in found]
        if name in READS:
            self._problem = f"its code reads values of logits ({name})"
        if not any(is_tensor) and name != "__setitem__":
            return  # a shape, a dtype ...
        if not closed:
            self._problem = f"its code combines logits with another tensor ({resolve_name(func)})"

        def mark(each: Any) -> Any:
            return _Slot(self._slots[id(each)]) if id(each) in self._slots else each

        given = tree_map(mark, (args, kwargs))
        pairs = zip(found, is_tensor, strict=True)
        results = tuple(self._slot_of(each) if is_one else None for each, is_one in pairs)
        self._steps.append((func, *given, results))

    def finish(self, logits: torch.Tensor) -> Tail:
        """Returns the operations that lead to `logits`. Raises NotRepeatable."""
        if self._calls != 1:
            raise NotRepeatable(f"the model calls its head {self._calls} times")
        if self._problem:
            raise NotRepeatable(self._problem)
        if id(logits) not in self._slots:
            raise NotRepeatable("its logits are not computed from the output of its head alone")
        result = self._slots[id(logits)]
        return Tail([*self._with_deaths(result)], result)

    def _with_deaths(self, result: int) -> Any:
        last: dict[int, int] = {0: -1}
        for number, (_, args, kwargs, results) in enumerate(self._steps):
            used = [each.number for each in tree_leaves((args, kwargs)) if isinstance(each, _Slot)]
            last |= dict.fromkeys([*used, *(each for each in results if each is not None)], number)
        last.pop(result, None)
        for number, (function, args, kwargs, results) in enumerate(self._steps):
            dead = tuple(slot for slot, when in last.items() if when == number)
            yield _Step(function, args, kwargs, results, dead)
