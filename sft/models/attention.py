"""Keeps packed documents apart in attention, with PyTorch's flash kernel for rows of any length.

This is `model.attn_implementation: varlen`, which transformers lacks. Without it, packing needs the
package flash-attn or a mask of tokens x tokens. The kernel needs no mask: a document begins where
position ids restart, as in transformers' use of flash-attn. What the kernel does not support (a
CPU, fp32, a cache of keys and values, left padding) is computed by SDPA with a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft.errors import ModelError

NAME = "varlen"


def register() -> None:
    """Registers the kernel with transformers under its name."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def needs_no_mask(name: str, precision: str, on_gpu: bool) -> bool:
    """Returns whether attention of this name keeps packed documents apart without a mask."""
    return name == "flash_attention_2" or (name == NAME and on_gpu and precision == "bf16")


def mask(*, q_length: int, kv_length: int, dtype: torch.dtype, **given: Any) -> torch.Tensor | None:
    """Returns the mask of SDPA, or None if the kernel will be used."""
    has_padding_or_cache = given["attention_mask"] is not None or q_length != kv_length
    if not has_padding_or_cache and _kernel_dtype(torch.device(given["device"]), dtype):
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, dtype=dtype, **given)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (rows, heads, time, size)
    key: torch.Tensor,  # (rows, groups, time, size)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Returns the attended values (rows, time, heads, size).

    Raises ModelError for dropout in the kernel, and for soft caps and sinks, which neither the
    kernel nor SDPA has.
    """
    for name, feature in {"softcap": "soft caps", "s_aux": "sinks"}.items():
        if given.get(name) is not None:
            raise _lacks(feature)
    dtype = _kernel_dtype(query.device, query.dtype)
    if attention_mask is not None or query.shape[2] != key.shape[2] or dtype is None:
        given |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    if dropout:
        raise _lacks("dropout")
    rows, _, time, _ = query.shape
    starts, longest = document_starts(given.get("position_ids"), rows, time, query.device)
    window = given.get("sliding_window")
    q, k, v = (each.to(dtype).transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    # Its import loads the compiler, which takes longer than all of `sft` does.
    from torch.nn.attention import varlen

    attended = varlen.varlen_attn(
        q,
        k,
        v,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(attended, torch.Tensor)
    return attended.unflatten(0, (rows, time)), None


def _lacks(feature: str) -> ModelError:
    return ModelError(
        f"model.attn_implementation: {NAME} has no attention with {feature}, which this model "
        "needs; set sdpa, or eager"
    )


def _kernel_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """Returns the dtype that the kernel would compute in, or None if it cannot be used."""
    if device.type != "cuda":
        return None
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


# (rows, starts, longest) by the tensor of position ids, which all layers of a pass share.
_starts = WeakTensorKeyDictionary()


def document_starts(
    positions: torch.Tensor | None, rows: int, time: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Returns the index of each document's first token, and the length of the longest document.

    Indices count through all rows, and the end of the last row is one more entry. `positions`, of
    shape (1 or rows, time), restart in each document.
    """
    if positions is None:
        return torch.arange(0, rows * time + 1, time, dtype=torch.int32, device=device), time
    if positions not in _starts or _starts[positions][0] != rows:
        is_first = positions.expand(rows, time) == 0
        is_first[:, 0] = True
        first = is_first.flatten().nonzero()[:, 0]
        starts = torch.cat([first, first.new_tensor([rows * time])])
        _starts[positions] = rows, starts.int(), int(starts.diff().max())
    _, starts, longest = _starts[positions]
    return starts, longest


@torch.no_grad()
def documents_are_isolated(model: torch.nn.Module, precision: str, device: torch.device) -> bool:
    """Returns whether a document packed behind another has the logits that it has by itself.

    transformers separates documents where position ids restart, but in several cases it silently
    does not. So this tries the model that will train, with the arguments and precision of training.
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
