"""Chooses how the processes of a run share its model: copies, shards of FSDP2, or DeepSpeed."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from sft.config.schema import Train
from sft.train.parallel.ddp import Replicated
from sft.train.parallel.deepspeed import Zero
from sft.train.parallel.fsdp import Sharded


def share_model(model: nn.Module, train: Train, accelerator: Accelerator) -> Replicated:
    """Returns `model` and its optimizer, shared as `train.engine` says."""
    if train.engine == "deepspeed":
        return Zero(model, train, accelerator)
    if train.engine == "fsdp" and accelerator.num_processes > 1:
        return Sharded(model, train, accelerator)
    return Replicated(model, train, accelerator)
