"""Initialises A of each adapter from the inputs of its layer (EVA, Paischer et al. 2024).

PEFT computes the principal components. This module makes them the same for every cut and every
number of processes: each process reads the same rows in the same order, and ranks stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sft.errors import ModelError
from sft.models.adapt import NAME
from sft.models.fake import set_attributes

MAX_PASSES = 256  # forward passes in which the directions must converge


def begin_with_inputs(
    model: Any,
    batches: Sequence[Sequence[int]],
    collate: Callable[[list[int]], Any],
    run: Callable[[Any], Any],
) -> None:
    """Sets each A to the directions in which the inputs of its layer vary most; B stays 0.

    `batches`: lists of ids of examples. `collate` makes a batch of such a list; its method
    `token_positions` leaves out padding. `run` runs the model on the batch. Raises ModelError if
    the directions do not converge within `MAX_PASSES` forward passes.
    """
    from peft import EvaConfig
    from peft.tuners.lora import eva
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    config, batch, passes = model.peft_config[NAME], None, 0
    kept = {
        key: getattr(config, key) for key in ("target_modules", "rank_pattern", "alpha_pattern")
    }
    trained = {p: p.requires_grad for p in model.parameters()}

    def prepare(ids: torch.Tensor, _: Any) -> torch.Tensor:
        nonlocal batch
        batch = collate(ids.tolist())
        return batch.token_positions()

    def forward(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > MAX_PASSES:
            raise ModelError(
                f"tuning.lora.init_lora_weights: eva found no {config.r} directions that stay the "
                f"same in {MAX_PASSES} passes; use a smaller tuning.r, or true"
            )
        run(batch)

    def choose(inputs: tuple[torch.Tensor], tokens: torch.Tensor, _: str) -> torch.Tensor:
        # The vocabulary head gets supervised positions only, in two dimensions.
        return inputs[0] if inputs[0].ndim == 2 else inputs[0].flatten(0, 1)[tokens]

    others = (*eva.UNSUPPORTED_LORA_MODULES, TrainableTokensLayer)  # PEFT takes it for an adapter
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)  # of the same ranks
    with set_attributes(eva, UNSUPPORTED_LORA_MODULES=others):
        eva.initialize_lora_eva_weights(
            model,
            [torch.tensor(ids) for ids in batches],
            forward_fn=forward,
            prepare_model_inputs_fn=prepare,
            prepare_layer_inputs_fn=choose,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    config.init_lora_weights, config.eva_config = True, None
    vars(config).update(kept)
    for parameter, is_trained in trained.items():
        parameter.requires_grad_(is_trained)
