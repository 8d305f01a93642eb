"""Keeps packed documents apart in attention, with PyTorch's flash kernel for rows of any length.

This is `model.attn_implementation: varlen`, which transformers lacks. Without it, packing needs the
package flash-attn or a mask of (tokens, tokens). The kernel needs no mask: a document begins where
position ids restart, as in transformers' use of flash-attn. What the kernel does not support (a
CPU, fp32, a cache of keys and values, left padding) is computed by SDPA with a mask.

Models whose mask ignores position ids are given the borders of documents in another form
(`keep_documents_apart`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_masks_for_generate, sdpa_mask

from sft.errors import ModelError
from sft.models.dtypes import DTYPES
from sft.models.fake import set_attributes
from sft.runtime.hardware import to_device

NAME = "varlen"


def register() -> None:
    """Registers the kernel with transformers under its name."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def needs_no_mask(name: str, precision: str, on_gpu: bool) -> bool:
    """Returns whether attention of this name keeps packed documents apart without a mask."""
    return name == "flash_attention_2" or (name == NAME and on_gpu and precision == "bf16")


def mask(*, q_length: int, kv_length: int, dtype: torch.dtype, **given: Any) -> torch.Tensor | None:
    """Returns SDPA's mask (rows, 1, q_length, kv_length), or None if the kernel will be used."""
    has_padding_or_cache = given["attention_mask"] is not None or q_length != kv_length
    if not has_padding_or_cache and _kernel_dtype(torch.device(given["device"]), dtype):
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, dtype=dtype, **given)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (rows, heads, time, size)
    key: torch.Tensor,  # (rows, groups, time, size)
    value: torch.Tensor,  # as key
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Returns the attended values (rows, time, heads, size), and None for the attention weights.

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
    """Returns the dtype that the kernel would compute in, or None if it cannot be used.

    Only bf16: GPUs that lack it, which compute in fp16, lack the kernel, too.
    """
    if device.type != "cuda":
        return None
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return dtype if dtype == torch.bfloat16 else None


# (rows, starts, longest) by the tensor of position ids, which all layers of a pass share.
_starts = WeakTensorKeyDictionary()


def document_starts(
    positions: torch.Tensor | None, rows: int, time: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Returns the index of each document's first token, and the most tokens of a document.

    The indices (documents + 1, int32) count through all rows; the last is the end of the last row.
    `positions` (1 or rows, time) restart in each document.
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


def remember_starts(positions: torch.Tensor | None, lengths: Sequence[int]) -> None:
    """Gives `document_starts` its result for a row of documents of these lengths.

    To find it in `positions` during a forward pass, the host would wait for the device.
    """
    if positions is not None:
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        _starts[positions] = 1, to_device(starts, positions.device), max(lengths)


def known_documents(lengths: Sequence[int]) -> AbstractContextManager[None]:
    """Returns a context for a forward pass of a row of documents of these lengths.

    `lengths` of no or one document: each row is one. transformers would look in each pass whether
    there are several, and the host would wait for the device.
    """
    number = number_documents if len(lengths) > 1 else lambda _: None
    return set_attributes(masking_utils, find_packed_sequence_indices=number)


def number_documents(positions: torch.Tensor) -> torch.Tensor:
    """Returns the number of each token's document, (rows, time), which begins where it restarts."""
    return (positions == 0).cumsum(-1)


LENGTHS = (7, 7, 7)  # tokens before, in and after the document that a proof compares
ROUNDING = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}  # error of logits, relative to their norm


def keep_documents_apart(model: torch.nn.Module, precision: str, device: torch.device) -> bool:
    """Returns whether packed documents are isolated, if needed with another form of borders.

    transformers finds borders where position ids restart, but some models do not pass position ids
    on to the mask (Qwen2-VL, gpt-oss). So each further form is tried. If `documents_are_isolated`
    is true with one, a hook stays on the model and gives it that form in every later pass.
    """
    if documents_are_isolated(model, precision, device):
        return True
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    for form in (in_planes, in_masks) if base is not None else ():
        given = base.register_forward_pre_hook(_in_form(form), with_kwargs=True)  # type: ignore[union-attr]
        try:
            if documents_are_isolated(model, precision, device):
                return True
        except Exception:  # noqa: BLE001  # not an input of this model
            pass
        given.remove()
    return False


Form = Callable[[torch.nn.Module, dict[str, Any]], dict[str, Any]]


def in_planes(_: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Returns position ids (4, rows, time): of the text, then of time, height and width."""
    rows = given["input_ids"].shape[0]
    return {"position_ids": given["position_ids"].expand(rows, -1).expand(4, rows, -1)}


def in_masks(base: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the masks of packed documents for each kind of layer, as `generate` makes them."""
    rows, time = given["input_ids"].shape
    like = base.get_input_embeddings().weight.new_empty(rows, time, 0)
    masks = create_masks_for_generate(base.config, like, None, None, given["position_ids"])
    return {"attention_mask": masks}


def _in_form(form: Form) -> Callable[..., tuple[Any, dict[str, Any]] | None]:
    """Returns a hook that gives a model the borders in this form in passes without a cache."""

    def hook(base: torch.nn.Module, args: Any, given: dict[str, Any]) -> Any:
        positions = given.get("position_ids")
        if given.get("use_cache") is not False or positions is None or positions.ndim != 2:
            return None
        return args, given | form(base, given)

    return hook


@torch.no_grad()
def documents_are_isolated(model: torch.nn.Module, precision: str, device: torch.device) -> bool:
    """Returns whether a document packed after another has the logits that it has by itself.

    transformers separates documents where position ids restart, but for some models it silently
    does not. So this tries the model that will train, with the arguments and precision of training.
    A recurrent state can leak so little that it looks like rounding in a comparison with the single
    document. So rounding is measured: it is all that changes the logits if a *later* document
    changes.
    """
    proof = _Proof(model, precision, device, packed=True)
    together, single = proof.logits(), proof.logits(alone=True)
    # A leak of attention changes the logits by about their own size; rounding in bf16 by about 1 %.
    if not (together - single).norm() < 0.1 * single.norm():
        return False
    rounding = max(proof.change(behind=i) for i in (1, 2))
    leak = min(proof.change(before=i) for i in (1, 2))
    return bool(leak <= max(4 * rounding, 1e-6 * single.norm()))


@torch.no_grad()
def reads_later_tokens(model: torch.nn.Module, precision: str, device: torch.device) -> bool:
    """Returns whether a token's logits depend on later tokens about as much as on earlier ones.

    Such a model cannot be trained to predict tokens, and padding on the right changes its logits.
    """
    proof = _Proof(model, precision, device, packed=False)
    later = min(proof.change(behind=i) for i in (1, 2))
    earlier = min(proof.change(before=i) for i in (1, 2))
    return bool(later > max(0.3 * earlier, ROUNDING[precision] * proof.logits().norm()))


class _Proof:
    """Logits of a document between two others, each of which has three versions of its text."""

    def __init__(self, model: torch.nn.Module, precision: str, device: torch.device, packed: bool):
        self.model, self.device, self.packed = model, device, packed
        self.autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
        generator = torch.Generator().manual_seed(0)
        num_ids = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        num_ids = max(2, num_ids - num_ids // 16)  # the last ones may stand for images
        shape = (3, sum(LENGTHS))
        self.versions = torch.randint(num_ids, shape, generator=generator).to(device)

    def change(self, before: int = 0, behind: int = 0) -> torch.Tensor:
        """Returns the norm by which another version of the text around it changes its logits."""
        return (self.logits(before, behind) - self.logits()).norm()

    def logits(self, before: int = 0, behind: int = 0, alone: bool = False) -> torch.Tensor:
        """Returns the document's logits (1, time, vocabulary), in fp32.

        `before`, `behind`: versions of the text around it. `alone`: without any text around it.
        """
        parts = [
            self.versions[version].split(LENGTHS)[part]
            for part, version in enumerate((before, 0, behind))
        ]
        positions = [torch.arange(len(part), device=self.device) for part in parts]
        start, length = LENGTHS[:2]
        if alone:
            start, parts, positions = 0, parts[1:2], positions[1:2]
        elif not self.packed:
            positions = [torch.arange(sum(LENGTHS), device=self.device)]
        was_training = self.model.training
        self.model.eval()
        try:
            with self.autocast, known_documents(LENGTHS if len(parts) > 1 and self.packed else ()):
                found = self.model(
                    input_ids=torch.cat(parts)[None],
                    position_ids=torch.cat(positions)[None],
                    use_cache=False,
                ).logits[:, start : start + length]
        finally:
            self.model.train(was_training)
        return found.float()
