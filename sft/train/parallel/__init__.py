"""Chooses how the processes of a run share its model: copies, shards of FSDP2, or DeepSpeed."""

from __future__ import annotations

from functools import partial

from accelerate import Accelerator
from torch import nn

from sft.config.schema import Train
from sft.models.cut import Rule
from sft.runtime.processes import deepspeed_settings, processes_here, shards_within
from sft.train.parallel.ddp import Replicated
from sft.train.parallel.deepspeed import Zero, elements_of
from sft.train.parallel.fsdp import Sharded, rows_of


def share_model(model: nn.Module, train: Train, accelerator: Accelerator) -> Replicated:
    """Returns `model` and its optimizer, shared as `train.engine` says."""
    kind: type[Replicated] = Replicated
    if train.engine == "deepspeed":
        kind = Zero
    elif train.engine == "fsdp" and accelerator.num_processes > 1:
        kind = Sharded
    shared = kind(model, train, accelerator)
    if train.context_parallel > 1 and accelerator.num_processes > 1:
        shared.waits_in = "forward"  # processes wait for each other in attention
    return shared


def cutting_rule(train: Train, accelerator: Accelerator) -> Rule | None:
    """Returns which elements of a weight this rank keeps; None if every rank keeps all."""
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    if place["world"] == 1:
        return None
    if train.engine == "deepspeed":
        settings = deepspeed_settings(train)["zero_optimization"]
        own_groups = any(key.startswith("zero_") for key in settings)  # such as within a node
        return partial(elements_of, **place) if settings["stage"] == 3 and not own_groups else None
    if train.engine != "fsdp":
        return None
    shards = shards_within(train, place["world"], processes_here(place["world"])) or place["world"]
    return partial(rows_of, rank=place["rank"] % shards, world=shards)
