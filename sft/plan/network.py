"""Counts what ranks exchange in an optimizer step.

The collectives are those of each engine's code, and `benchmarks/counters.py` counts them for real.
A ring of n ranks sends (n - 1) / n of a tensor that is gathered or reduced into shards, and twice
that if every rank gets the sum (Patarasuk and Yuan 2009, Bandwidth Optimal All-reduce Algorithms
for Clusters of Workstations). Evaluations, checkpoints, and the few numbers on which ranks agree
are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft.config.schema import RunConfig
from sft.plan import sharding
from sft.plan.counts import count_parameters
from sft.plan.sharding import Group


@dataclass(frozen=True)
class Traffic:
    """Bytes of whole tensors in a step."""

    gathered: int = 0  # from shards
    scattered: int = 0  # summed, into shards
    reduced: int = 0  # summed, on every rank

    def sent(self, world_size: int) -> int:
        """Returns the bytes that each rank sends, and receives, in a ring."""
        through = self.gathered + self.scattered + 2 * self.reduced
        return round(through * (world_size - 1) / world_size)


def predict_traffic(
    config: RunConfig, precision: str, group: Group, model_bytes: int, micro_batches: int
) -> Traffic:
    """Returns what a step of so many micro-batches exchanges.

    `model_bytes`: of weights and adapters, before they are split.
    """
    counts = count_parameters(config)
    gradients = config.train.trained_bytes * counts.trained
    if group.world_size == 1:
        return Traffic()
    if group.engine == "ddp":
        return Traffic(reduced=gradients)
    if group.engine == "fsdp":  # the last layers' weights are gathered in both passes, too
        outside, layer = sharding.gathered_bytes(model_bytes, config, precision)
        passes = outside + 2 * layer * max(1, counts.layers)
        return Traffic(gathered=passes * micro_batches, scattered=gradients * micro_batches)
    if group.zero["stage"] < 3:  # ZeRO-1 keeps gradients until the last micro-batch
        times = 1 if group.zero["stage"] == 1 else micro_batches
        return Traffic(gathered=gradients, reduced=gradients * times)
    passes = 1 if sharding.stays_gathered(config, group) else 2 * micro_batches
    return Traffic(gathered=model_bytes * passes, scattered=gradients * micro_batches)
