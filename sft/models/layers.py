"""Finds layers of a model, and gathers parameters that are split over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


def embedding_layers(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Returns the input and the output embedding; None for one that the model lacks."""
    methods = (getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output"))
    first, last = (method() if method else None for method in methods)
    return first, last


def untrained_rows(model: nn.Module, ids: Sequence[int], share: float = 0.01) -> list[int]:
    """Returns those of the tokens `ids` whose output embedding was never trained.

    In many base models (Llama 3) a token that no training text contained has an embedding near
    zero. It counts as untrained if its norm is below `share` of the median norm of all tokens.
    """
    output = embedding_layers(model)[1]
    weight: Any = getattr(output, "weight", None)
    if weight is None or weight.ndim != 2:
        return []
    norms = full_tensor(weight).float().norm(dim=1)
    return [i for i in ids if i < len(norms) and norms[i] < share * norms.median()]


def is_split(model: nn.Module) -> bool:
    """Returns whether ranks hold parts of the weights (FSDP2, ZeRO-3) and forward is collective."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


def full_tensor(parameter: Any) -> torch.Tensor:
    """Returns the whole parameter. Collective if the parameter is split over ranks."""
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def weights_to_save(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that a checkpoint holds, by name: all but those of a frozen base.

    Frozen parts of an adapter, and of a model that has no base, are in no other file.
    """
    on_base = hasattr(model, "peft_config")
    named = model.named_parameters()
    return {n: p for n, p in named if not on_base or p.requires_grad or "lora_" in n}


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the buffers that belong to a checkpoint, with their names."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".removeprefix("."), buffer


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of the text model: its list of modules that holds the most parameters."""
    decoder = getattr(model, "get_decoder", lambda: model)()  # not the towers of other media
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return list(max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=()))
