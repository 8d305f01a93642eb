"""Reads weights that files hold under other names, or in other pieces, than the model does.

transformers saves the experts of a mixture, and several other architectures, as their first release
did, and converts them while it loads. A checkpoint is read in the same way, one layer at a time, so
that it never needs the memory of a whole model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from sft.runtime.checkpoint import open_tensors


def read_converted(
    model: Any, files: Iterable[Path], known: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name in `model`, weight) of what `files` hold under names that are not `known`."""
    known = {*known, *dict(model.named_buffers())}  # buffers are no weights
    with ExitStack() as stack:
        groups: dict[str, dict[str, Any]] = defaultdict(dict)
        for path in files:
            file = stack.enter_context(open_tensors(path))
            for key in set(file.keys()) - known:
                groups[layer_of(key)][key] = file.get_slice(key)
        if not groups:
            return
        with torch.device("meta"):
            skeleton = type(model)(model.config)
        for _, group in sorted(groups.items()):
            yield from _convert(skeleton, group)


def layer_of(key: str) -> str:
    """Returns the part of a name that ends with the number of its layer."""
    found = re.match(r".*?\.\d+\.", key)
    return found[0] if found else ""


def _convert(skeleton: Any, group: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of a layer, which is empty again afterwards."""
    mapping: Any = get_model_conversion_mapping(skeleton)
    settings = LoadStateDictConfig(weight_mapping=mapping)
    silent: Any = lambda items, **_: items  # noqa: E731
    shown, core_model_loading.tqdm = core_model_loading.tqdm, silent
    try:
        core_model_loading.convert_and_load_state_dict_in_model(skeleton, group, settings)
    finally:
        core_model_loading.tqdm = shown
    for name, parameter in list(skeleton.named_parameters()):
        if not parameter.is_meta:
            yield name, parameter.detach()
            owner, _, own = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"))
            skeleton.get_submodule(owner)._parameters[own] = empty
