"""Writes a whole model as `save_pretrained` does, but gathers and writes one weight at a time.

Names, files and bytes are those of `save_pretrained(max_shard_size=...)`. Where ranks keep parts of
the weights, each writes some of the files. In each round every rank gets the weight that its files
need next, and then all write at once. So a rank needs memory for two weights besides its own part.
Weights that files hold under other names or in other pieces (`models/converted`) are gathered a
layer at a time.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.serialization._base import parse_size_to_int
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from sft.models.converted import layer_of
from sft.models.weights import Weights
from sft.runtime.processes import BetweenCollectives
from sft.runtime.tensor_file import TensorFile

MAX_SHARD_SIZE = "5GB"
MIN_SHARD_BYTES = 64 * 2**20  # of files that are smaller than the most, so that each rank has one
PATTERN, META = "model{suffix}.safetensors", {"format": "pt"}


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered at once, and the names that files have for what is in them."""

    names: list[str]
    saved: list[str]


def save_whole(model: Any, folder: Path, weights: Weights, max_shard_size: str) -> list[TensorFile]:
    """Writes model and configuration. Returns the files of tensors that this rank has written.

    Collective if ranks keep parts of the weights; else only the main process writes.
    """
    if weights.world == 1 and not weights.is_main:
        return []
    units, saved = _plan(model, weights)
    share = -(-sum(each.nbytes for each in saved.values()) // weights.world)
    limit = min(parse_size_to_int(max_shard_size), max(MIN_SHARD_BYTES, share))
    split = split_torch_state_dict_into_shards(
        saved, filename_pattern=PATTERN, max_shard_size=limit
    )
    owners = {file: i % weights.world for i, file in enumerate(split.filename_to_tensors)}
    files = {
        name: TensorFile(folder / name, {each: saved[each] for each in held}, META, weights.behind)
        for name, held in split.filename_to_tensors.items()
        if owners[name] == weights.rank
    }
    places = split.tensor_to_filename

    def write(found: dict[str, torch.Tensor]) -> None:
        for name, value in revert_weight_conversion(model, found).items():
            if places[name] in files:
                files[places[name]].write(name, value)

    queues: list[list[Unit]] = [[] for _ in range(weights.world)]
    for unit in units:
        for owner in sorted({owners[places[name]] for name in unit.saved}):
            queues[owner].append(unit)
    with BetweenCollectives() as local:
        if weights.is_main:  # first, since it removes the files of another split
            local(model.save_pretrained, str(folder), True, {})  # all but the weights
        if weights.is_main and split.is_sharded:
            about = {"total_parameters": weights.num_parameters, **split.metadata}
            local(_write_index, folder, {"metadata": about, "weight_map": places})
        for turn in zip_longest(*queues):
            mine: dict[str, torch.Tensor] = {}
            for owner, unit in enumerate(turn):
                for name in unit.names if unit else ():
                    whole = weights.whole(name)
                    if owner == weights.rank:
                        mine[name] = whole
                    del whole
            if mine:
                local(write, mine)
    return [*files.values()]


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, "utf-8")


def _plan(model: Any, weights: Weights) -> tuple[list[Unit], dict[str, torch.Tensor]]:
    """Returns what is gathered at once, and what files hold, as tensors without values."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    own = {name: each for name, each in weights.empty().items() if name not in ignored}
    own = remove_tied_weights_from_state_dict(own, model)
    saved = revert_weight_conversion(model, dict(own))
    names = {id(each): name for name, each in own.items()}
    units, converted = [], defaultdict[str, list[str]](list)
    for name, each in saved.items():
        if id(each) in names:
            units.append(Unit([names.pop(id(each))], [name]))
    for name in names.values():
        converted[layer_of(name)].append(name)
    for group in converted.values():
        found = revert_weight_conversion(model, {name: own[name] for name in group})
        units.append(Unit(group, [*found]))
    order = {name: i for i, name in enumerate(saved)}
    units.sort(key=lambda unit: order[unit.saved[0]])
    empty = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in saved.items()}
    return units, empty
