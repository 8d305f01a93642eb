"""The load-balancing loss of a mixture whose router is trained (Fedus et al. 2021, section 2.2).

With E experts, it is E times the sum over experts of F P: F counts how often a token of the global
batch chose the expert, and P sums the expert's probabilities, in all layers, both divided by the
number of (token, layer) pairs. transformers computes this for each micro-batch, padding included,
so its sum would depend on the cut. Here both are those of the global batch without padding. F has
no gradient, so once F is known, the loss is a sum over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sft.errors import ModelError
from sft.models.pretrained import sub_configs

# Names of keys in configurations of transformers; DBRX has them in a section of its own.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")


@dataclass(frozen=True)
class Balance:
    """How strongly experts are balanced, and how many of them a token chooses."""

    coefficient: float
    num_chosen: int

    def count(self, logits: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """Returns (examples, experts + 1): choices of each expert, and (token, layer) pairs.

        `logits`: for each layer (tokens, experts), the tokens of the examples in order.
        """
        chosen = sum(self._choices(each) for each in logits)
        assert isinstance(chosen, torch.Tensor)
        pairs = chosen.new_full((len(chosen), 1), len(logits))
        owner = torch.repeat_interleave(torch.tensor(lengths, device=chosen.device))
        table = chosen.new_zeros(len(lengths), chosen.shape[1] + 1)
        return table.index_add(0, owner, torch.cat([chosen, pairs], 1))

    def _choices(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns (tokens, experts): 1 where a token chose an expert."""
        best = logits.detach().topk(self.num_chosen).indices
        return F.one_hot(best, logits.shape[-1]).sum(1).double()

    def share(self, logits: Sequence[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
        """Returns the part of the loss that these tokens add, given the whole batch's `counts`."""
        sums = [each.softmax(-1, torch.promote_types(each.dtype, torch.float32)) for each in logits]
        probabilities = torch.stack([each.sum(0) for each in sums]).sum(0)
        pairs = counts[-1].clamp(min=1)
        chosen = (counts[:-1] / pairs).to(probabilities)
        return len(chosen) * (chosen @ probabilities) / pairs.to(probabilities)


def balance_of(architecture: Any) -> Balance | None:
    """Returns the balancing that a model's configuration asks for; None if it asks for none."""
    text = architecture.get_text_config()
    parts = [part for part in sub_configs(text) if not isinstance(part, dict)]

    def first(names: tuple[str, ...]) -> Any:
        found = (getattr(part, name, None) for part in parts for name in names)
        return next((each for each in found if each), None)

    coefficient, num_chosen = first(COEFFICIENTS), first(CHOSEN)
    return Balance(coefficient, num_chosen) if coefficient and num_chosen else None


def logits_of(output: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Returns the routers' logits (tokens, experts) of each layer, at these positions of a batch.

    Raises ModelError if the model does not return any.
    """
    if not getattr(output, "router_logits", None):
        raise ModelError(
            "tuning.router: this model does not return the scores of its routers, so its experts "
            "cannot be balanced; set frozen"
        )
    return [each.flatten(0, -2)[tokens] for each in output.router_logits]
