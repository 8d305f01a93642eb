"""Reads the sizes of a text model from its configuration, whatever its architecture calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.errors import ModelError


@dataclass(frozen=True)
class Sizes:
    """The sizes of a text model; None for one that the architecture does not have."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int | None
    num_key_value_heads: int | None
    head_dim: int | None
    intermediate_size: int | None
    max_position_embeddings: int | None
    layer_types: tuple[str, ...] | None
    source: str  # the whole configuration: two with equal sizes may differ in other keys


NEEDED = ["hidden_size", "num_hidden_layers", "vocab_size"]
OTHER = ["num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"]
OTHER += ["max_position_embeddings"]


def read_sizes(architecture: Any) -> Sizes:
    """Returns the sizes of a model. Raises ModelError if it lacks one that is needed."""
    text = architecture.get_text_config()
    values: Any = {key: _largest(text, key) for key in (*NEEDED, *OTHER)}
    if lacking := [key for key in NEEDED if not values[key]]:
        found = {key: _read(text, key) for key in lacking}
        raise ModelError(
            f"model.name: {architecture.name_or_path}: expected a configuration of a text model "
            f"with {', '.join(lacking)} as a positive number; found "
            f"{', '.join(f'{key}: {str(value)[:80]}' for key, value in found.items())}"
        )
    kinds = _read(text, "layer_types")
    is_list = isinstance(kinds, list | tuple) and all(isinstance(kind, str) for kind in kinds)
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    own: Any = {"layer_types": tuple(kinds) if is_list and kinds else None, "source": repr(text)}
    return Sizes(**values, **own)


def _largest(text: Any, key: str) -> int | None:
    """Returns a size; the largest where layers differ in it."""
    value = _read(text, key)
    numbers = value if isinstance(value, list | tuple) else [value]
    sizes = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return max(sizes, default=None)


def _read(text: Any, key: str) -> Any:
    try:
        return getattr(text, key, None)
    except Exception:  # noqa: BLE001  # some types raise where layers differ in a size
        layers = getattr(text, "per_layer_config", None) or []
        return [getattr(layer, key, None) for layer in layers]
