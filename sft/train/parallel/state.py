"""Finds what any optimizer keeps, in the form in which a checkpoint saves it.

A tensor with the shape of its parameter has a value for each element, and can be cut like the
parameter. Tensors of other shapes belong to the whole parameter. Numbers are saved as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sft.errors import ConfigError
from sft.runtime.checkpoint import Tensors

PLAIN = (type(None), bool, int, float, str)
OF_ENGINE = ("params", "lr")  # of a group: what the engine sets in every step


def split_state(
    state: Mapping[str, Any], parameter: torch.Tensor
) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Returns a parameter's state: tensors by element, other tensors, and values for JSON.

    Raises ConfigError if it has anything else.
    """
    by_element, whole, numbers = Tensors(), Tensors(), dict[str, Any]()
    for key, value in state.items():
        is_number = not isinstance(value, torch.Tensor) or (value.ndim == 0 and key == "step")
        if is_number or (value.ndim == 0 and parameter.ndim):
            numbers[key] = encode(key, value)
        else:
            (by_element if value.shape == parameter.shape else whole)[key] = value
    return by_element, whole, numbers


def take_blocks(state: dict[str, Any], per_value: Mapping[str, int]) -> dict[int, Tensors]:
    """Removes from a state what has a value for several elements, by how many these are.

    Such tensors are saved as if they were parameters of their own, of fewer elements. They can be
    cut wherever no block is (`train/packed`).
    """
    found: dict[int, Tensors] = {}
    for key, each in per_value.items():
        if key in state:
            value = state.pop(key)
            local = value.to_local() if hasattr(value, "to_local") else value
            found.setdefault(each, {})[key] = local
    return found


def encode(key: str, value: Any) -> Any:
    """Returns a value for JSON. A tensor of one number becomes its dtype and the number."""
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return [str(value.dtype).removeprefix("torch."), value.item()]
    if isinstance(value, PLAIN):
        return value
    raise ConfigError(
        f"train.optimizer: it keeps {key} as {type(value).__name__}, which no checkpoint can hold: "
        "expected tensors, numbers and text"
    )


def decode(value: Any, device: torch.device | str) -> Any:
    """Returns the value that `encode` was given; `device`: where a tensor goes."""
    if isinstance(value, list):
        return torch.tensor(value[1], dtype=getattr(torch, value[0]), device=device)
    return value


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a group of parameters has besides them, and besides its learning rate."""
    return {key: value for key, value in group.items() if key not in OF_ENGINE}


def changes_of(group: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the optimizer has changed in a group since it had `settings`, for JSON.

    The rest are settings, which a resumed run takes from its own configuration.
    """
    now = settings_of(group)
    changed = {k: v for k, v in now.items() if k not in settings or settings[k] != v}
    return {key: encode(key, value) for key, value in changed.items()}
