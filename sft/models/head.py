"""Computes logits of supervised positions only, and shows that packed documents stay apart."""

from __future__ import annotations

import torch
from torch import nn


class SupervisedHead:
    """A hook that lets only chosen positions reach the vocabulary head: no others get logits.

    While `positions` is set, the head's input (batch, time, hidden) becomes (positions, hidden),
    and the model returns logits (positions, vocabulary). Works through DDP and checkpointing, for
    every architecture with a separate head, because it is a hook on that head.
    """

    def __init__(self, model: nn.Module):
        self.positions: torch.Tensor | None = None  # flat indices into batch * time
        model.get_output_embeddings().register_forward_pre_hook(self._select)  # type: ignore[operator]

    def _select(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        if self.positions is None:
            return None
        return (inputs[0].flatten(0, 1)[self.positions],)


@torch.no_grad()
def documents_are_isolated(model: nn.Module, precision: str, device: torch.device) -> bool:
    """Returns whether a document gets the same logits by itself and packed behind another.

    transformers separates documents by restarting position ids, and silently does not in several
    cases. So it is tried on the model that will train, with the arguments that training uses, and
    in its precision: another one may have another kernel.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    num_ids = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    first, second = (torch.randint(num_ids, (1, n), generator=generator) for n in (11, 7))
    together = torch.cat([first, second], 1).to(device)
    positions = torch.cat([torch.arange(11), torch.arange(7)])[None].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        packed = model(input_ids=together, position_ids=positions, use_cache=False).logits[0, 11:]
        single = model(input_ids=second.to(device), use_cache=False).logits[0]
    model.train(was_training)
    # A leak changes the logits by about their own size; rounding in bf16 by about 1 %.
    return bool((packed - single).float().norm() < 0.1 * single.float().norm())
