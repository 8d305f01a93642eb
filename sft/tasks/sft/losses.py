"""The loss of supervised tokens, as a sum over a micro-batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sft.data.examples import Batch


def widen(logits: torch.Tensor) -> torch.Tensor:
    """Returns logits in fp32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(
    logits: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the sum over the supervised tokens, each times its weight, and that of hits."""
    correct = logits.detach().argmax(-1) == batch.targets
    if batch.weights is None:
        loss = F.cross_entropy(logits, batch.targets, reduction="sum")
        return loss, {"token_accuracy": correct.sum()}
    each = F.cross_entropy(logits, batch.targets, reduction="none")
    weights = batch.weights.to(each)
    return each @ weights, {"token_accuracy": correct.to(each) @ weights}
