"""The loss of supervised tokens, as a sum over a micro-batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sft.config.schema import Train
from sft.data.examples import Batch
from sft.models.head import Measure, take


def is_plain(settings: Train) -> bool:
    """Returns whether the loss of a token is its cross-entropy."""
    return settings.loss == "cross_entropy" and not settings.label_smoothing and not settings.z_loss


def token_losses(
    logits: torch.Tensor, targets: torch.Tensor, settings: Train
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of each token that `settings` ask for, and its plain cross-entropy.

    `dft` multiplies the cross-entropy by the probability of the target, as a constant (Wu et al.
    2025, arXiv 2508.05629). `z_loss` is that of PaLM (Chowdhery et al. 2022).
    """
    smoothing = settings.label_smoothing
    each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    plain = each.detach()
    if smoothing:
        plain = F.cross_entropy(logits.detach(), targets, reduction="none")
    if settings.loss == "dft":
        each = each * (-plain).exp()
    if settings.z_loss:
        each = each + settings.z_loss * logits.logsumexp(-1).square()
    return each, plain


class ExampleSums:
    """Sums of loss, hits and weights over the supervised tokens of each held-out example."""

    def __init__(self, num_examples: int):
        self.sums = torch.zeros(num_examples, 3, dtype=torch.float64)  # on the CPU

    def add(self, batch: Batch, part: slice, loss: torch.Tensor, hits: torch.Tensor) -> None:
        """Adds the tokens `part` of a micro-batch: loss (tokens,) and hits (tokens,)."""
        counts = torch.tensor(batch.counts, dtype=torch.long)
        owners = torch.tensor(batch.examples, dtype=torch.long).repeat_interleave(counts)[part]
        weights = torch.ones_like(loss) if batch.weights is None else take(batch.weights, part)
        each = torch.stack([loss, hits.to(loss), torch.ones_like(loss)], 1).double()
        self.sums.index_add_(0, owners, (each * weights.double()[:, None]).cpu())


def measure(
    batch: Batch, settings: Train | None = None, rows: ExampleSums | None = None
) -> Measure:
    """Returns a function that sums losses and hits over supervised tokens, times their weights.

    Without `settings` the loss is plain cross-entropy, as that of held-out rows always is. `rows`
    get the sums of each example as well.
    """

    def sums(logits: torch.Tensor, part: slice) -> dict[str, torch.Tensor]:
        targets = take(batch.targets, part)
        weights = None if batch.weights is None else take(batch.weights, part)
        correct = logits.detach().argmax(-1) == targets
        if rows is not None:
            rows.add(batch, part, F.cross_entropy(logits, targets, reduction="none"), correct)
        if settings is not None and not is_plain(settings):
            each, plain = token_losses(logits, targets, settings)
            weights = torch.ones_like(plain) if weights is None else weights.to(plain)
            found = {"loss": each @ weights, "cross_entropy": plain @ weights}
        elif weights is None:
            loss = F.cross_entropy(logits, targets, reduction="sum")
            return {"loss": loss, "token_accuracy": correct.sum()}
        else:
            each = F.cross_entropy(logits, targets, reduction="none")
            weights = weights.to(each)
            found = {"loss": each @ weights}
        return {**found, "token_accuracy": correct.to(weights) @ weights}

    return sums
