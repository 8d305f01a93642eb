"""Counts what ranks exchange in an optimizer step.

The collectives are those of each engine's code, and `benchmarks/counters.py` counts them for real.
A ring of n ranks sends (n - 1) / n of a tensor that is gathered or reduced into shards, and twice
that if every rank gets the sum (Patarasuk and Yuan 2009, Bandwidth Optimal All-reduce Algorithms
for Clusters of Workstations). Evaluations, checkpoints, and the few numbers on which ranks agree
are not counted. Processes that share rows exchange tokens for heads in each pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.config.schema import RunConfig
from sft.models.sequences import filled_heads
from sft.plan import sharding
from sft.plan.counts import count_parameters
from sft.plan.sharding import Group


@dataclass(frozen=True)
class Traffic:
    """Bytes of whole tensors in a step."""

    gathered: int = 0  # from shards
    scattered: int = 0  # summed, into shards
    reduced: int = 0  # summed, on every rank, or on those that have copies of a shard
    within: int | None = None  # processes that weights are split over; None: all
    exchanged: int = 0  # of tokens for heads, by the processes that share a row

    def sent(self, world_size: int) -> int:
        """Returns the bytes that each rank sends, and receives, in a ring."""
        shards = self.within or world_size
        copies = world_size // shards if self.within else world_size
        split = (self.gathered + self.scattered) * (shards - 1) / shards
        return round(split + 2 * self.reduced * (copies - 1) / copies) + self.exchanged


def exchanged_bytes(sizes: Any, size: int, itemsize: int, tokens: int, passes: int) -> int:
    """Returns what a process sends around attention, if `size` processes share each row.

    It has `tokens`. In each pass, queries, keys, values and results are exchanged, of as many heads
    as so many processes can divide. `sizes`: as in transformers' configurations.
    """
    heads = getattr(sizes, "num_attention_heads", None)
    if size == 1 or not heads:
        return 0
    features = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
    groups = getattr(sizes, "num_key_value_heads", None) or heads
    each = (
        2 * sum(filled_heads(size, heads, groups)) * features * itemsize * sizes.num_hidden_layers
    )
    return each * tokens * passes * (size - 1) // size


def predict_traffic(
    config: RunConfig, precision: str, group: Group, model_bytes: int, micro_batches: int
) -> Traffic:
    """Returns what a step of so many micro-batches exchanges.

    `model_bytes`: of weights and adapters, before they are split.
    """
    train, counts = config.train, count_parameters(config)
    gradients = train.trained_bytes * counts.trained
    if group.world_size == 1:
        return Traffic()
    if group.engine != "deepspeed" and train.reduce_dtype == "bf16":
        gradients = 2 * counts.trained
    if group.engine == "ddp":
        return Traffic(reduced=gradients)
    if group.engine == "fsdp":
        outside, layer = sharding.gathered_bytes(model_bytes, config, precision)
        layers, keeps = max(1, counts.layers), train.keep_whole
        # The last layer stays whole between the forward and the backward pass.
        gathered = (outside + (2 * layers - 1) * layer) * micro_batches
        if keeps == "all":
            gathered = outside + layers * layer
        scattered = gradients * (1 if keeps in ("gradients", "all") else micro_batches)
        reduced = gradients // group.num_shards if group.within else 0
        return Traffic(gathered, scattered, reduced, group.within)
    if group.zero["stage"] < 3:  # ZeRO-1 keeps gradients until the last micro-batch
        times = 1 if group.zero["stage"] == 1 else micro_batches
        return Traffic(gathered=gradients, reduced=gradients * times)
    passes = 1 if sharding.stays_gathered(config, group) else 2 * micro_batches
    return Traffic(gathered=model_bytes * passes, scattered=gradients * micro_batches)
