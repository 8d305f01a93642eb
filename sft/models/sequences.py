"""Context parallelism: processes share each sequence (`train.context_parallel`).

Each of them computes a part of the tokens. Around attention, an all-to-all gives it all tokens of a
part of the heads, and a second one takes the result back to its own tokens (DeepSpeed-Ulysses,
Jacobs et al. 2023). So attention itself runs as it is, with any kernel, window, mask and documents.
If the heads cannot be divided, heads of zeros fill them up: a ring (Liu et al. 2023) would leave
none idle, but needs attention of our own for each kernel, window, sink and soft cap.
All other layers must compute tokens one by one: a proof compares the logits of a shared sequence
with those of the whole one, on the model that will train. It needs no other process (`_Rows`).

transformers finds attention by name, and makes masks in a few functions. Both are replaced, for
passes of shared batches only. Such a pass is known by its position ids, from the model's forward
pass until the batch is gone: checkpointing computes attention again in the backward pass.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, masking_utils

from sft.errors import ConfigError, oom_message
from sft.models import attention
from sft.models.dtypes import DTYPES

PROOF_TOKENS = 12  # of each process
# Error of a token's logits, relative to their norm; in other precisions 0.1. Models in fp64 compute
# norms and rotations in fp32.
ROUNDING = {"fp64": 1e-6, "fp32": 1e-4}


Attention = Callable[..., torch.Tensor]


class SequenceGroup:
    """The processes that share sequences, and this one's place among them.

    `group`: None imitates the exchange, with tensors of the same shapes, for a plan.
    """

    def __init__(self, size: int, rank: int, group: Any = None):
        self.size, self.rank, self.group = size, rank, group
        _install()

    @classmethod
    def of(cls, accelerator: Accelerator, size: int) -> SequenceGroup:
        """Returns the group of this process: `size` successive ranks. Collective.

        A plan has one process. It imitates the last one of a group, where answers are.
        """
        world = accelerator.num_processes
        if world == 1:
            return cls(size, size - 1)
        index, rank = divmod(accelerator.process_index, size)
        groups = [
            distributed.new_group([*range(first, first + size)]) for first in range(0, world, size)
        ]
        return cls(size, rank, groups[index])

    def follow(self, model: nn.Module) -> None:
        """Makes passes of `model` exchange tokens around attention if their batch is shared."""
        model.register_forward_pre_hook(_passes.begin, with_kwargs=True)

    def share(self, own: torch.Tensor, whole: torch.Tensor) -> None:
        """Names a batch as shared: by position ids (1, time), of this process and of all."""
        _passes.shared[own] = _Pass(self, whole)

    # -- exchange

    def attend(self, compute: Attention, *own: torch.Tensor) -> torch.Tensor:
        """Returns attention (rows, heads, time, features) of this process's tokens.

        `own`: queries, keys and values of its tokens, as (rows, heads, time, features). `compute`
        gets those of all tokens for a part of the heads, after the number of that part.
        """
        attended = compute(self.rank, *(_Exchange.apply(each, self, True) for each in own))
        return _Exchange.apply(attended, self, False)

    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        """Returns a part of each process: the one that it has for this process, (size, ...)."""
        if self.group is None:
            return parts.clone()
        received = torch.empty_like(parts)
        sent, got = (each.view(-1).view(torch.uint8) for each in (parts, received))
        distributed.all_to_all_single(got, sent, group=self.group)
        return received


class _Rows(SequenceGroup):
    """Imitates all processes of a group in this one: the part of each is a row of the batch."""

    def attend(self, compute: Attention, *own: torch.Tensor) -> torch.Tensor:
        whole = [each.movedim(0, 1).flatten(1, 2)[None] for each in own]
        parts = zip(*(each.chunk(self.size, 1) for each in whole), strict=True)
        attended = torch.cat([compute(number, *part) for number, part in enumerate(parts)], 1)
        return attended[0].unflatten(1, (self.size, -1)).movedim(1, 0)


class _Exchange(torch.autograd.Function):
    """Moves tokens between processes; the gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: SequenceGroup, to_heads: bool) -> Any:
        ctx.group, ctx.to_heads = group, to_heads
        size = group.size
        if to_heads:
            parts = tensor.unflatten(1, (size, -1)).movedim(1, 0).contiguous()
            return group.all_to_all(parts).permute(1, 2, 0, 3, 4).flatten(2, 3)
        parts = tensor.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4).contiguous()
        return group.all_to_all(parts).movedim(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _Exchange.apply(gradient, ctx.group, not ctx.to_heads), None, None


# --- passes of shared batches ---------------------------------------------------------------------


class _Pass:
    """A batch whose sequences are shared."""

    def __init__(self, group: SequenceGroup, positions: torch.Tensor):
        self.group = group
        self.positions = positions  # (1, time) of the whole sequences
        self.of_one_row = positions[:1]  # the same tensor in all layers (`attention._starts`)


class _Passes:
    """The batches that are shared, and which of them the model computed last."""

    def __init__(self) -> None:
        self.shared = WeakTensorKeyDictionary()  # by the position ids of this process
        self._last: weakref.ref[_Pass] | None = None

    @property
    def current(self) -> _Pass | None:
        """Returns the last pass of a model; None if its batch was not shared, or is gone."""
        return self._last() if self._last else None

    def begin(self, _: nn.Module, __: Any, given: dict[str, Any]) -> None:
        """Runs before a forward pass of a model that `follow` was given."""
        positions = given.get("position_ids")
        found = self.shared.get(positions) if isinstance(positions, torch.Tensor) else None
        self._last = weakref.ref(found) if found else None


_passes = _Passes()


class _Heads(NamedTuple):
    """A part of the heads of attention, which `missing` heads of zeros fill up."""

    number: int
    part: slice
    missing: int

    def of(self, value: Any) -> Any:
        """Returns what this part has of a value for each head, and any other value as it is."""
        if not isinstance(value, torch.Tensor) or value.shape != (self.number,):
            return value
        return nn.functional.pad(value, (0, self.missing))[self.part]


class _View:
    """A module whose attention has a part of its heads: of values for each, it has its own."""

    def __init__(self, module: nn.Module, heads: _Heads, num_key_value_groups: int | None):
        self._module = module
        if num_key_value_groups is not None:
            self.num_key_value_groups = num_key_value_groups
        for name, value in module._parameters.items():
            if (own := heads.of(value)) is not value:  # such as sinks
                setattr(self, name, own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attend(
    compute: Callable[..., Any],
    module: Any,
    query: torch.Tensor,  # (rows, heads, time, features)
    key: torch.Tensor,  # (rows, groups, time, features)
    value: torch.Tensor,  # as key
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Returns what attention `compute` gives the tokens of this process: (rows, time, heads,
    features), and None for the attention weights."""
    shared = _passes.current
    assert shared is not None
    group, heads, groups = shared.group, query.shape[1], key.shape[1]
    filled, key_heads = filled_heads(group.size, heads, groups)
    # Where processes outnumber groups of queries, several of them get the same one.
    repeats = heads // groups if filled > heads else key_heads // groups
    if repeats > 1:
        key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    query, key, value = (_fill(each, filled - heads) for each in (query, key, value))
    if given.get("position_ids") is not None:
        given["position_ids"] = shared.of_one_row

    def of_some_heads(part: int, *tensors: torch.Tensor) -> torch.Tensor:
        per = filled // group.size
        own = _Heads(heads, slice(part * per, (part + 1) * per), filled - heads)
        view = _View(module, own, filled // key_heads if repeats > 1 else None)
        mask = None if attention_mask is None else attention_mask[: len(tensors[0])]
        each = {name: own.of(value) for name, value in given.items()}
        return compute(view, *tensors, mask, **each)[0].transpose(1, 2)

    attended = group.attend(of_some_heads, query, key, value)[:, :heads]
    return attended.transpose(1, 2).contiguous(), None


def filled_heads(size: int, heads: int, groups: int) -> tuple[int, int]:
    """Returns the heads of queries, and of keys and values, that `size` processes divide.

    `groups`: of queries that have the same keys. Each process has a whole number of both.
    """
    if heads % size:
        filled = size * math.ceil(heads / size)
        return filled, filled
    return heads, math.lcm(groups, size)


def _fill(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    """Returns (rows, heads, time, features) with `missing` heads of zeros."""
    return nn.functional.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor


def most_tokens(architecture: Any) -> float:
    """Returns the tokens of a row up to which a token's position is all that its place depends on.

    In longer rows the last position changes rotations (`dynamic`, `longrope`), or the code counts
    positions from the first token that a process has (Llama 4). A proof with few tokens cannot see
    this.
    """
    text = architecture.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    limits: list[float] = []
    for each in (rope, *rope.values()):  # layers of different kinds may have their own
        kind = each.get("rope_type") if isinstance(each, dict) else None
        if kind == "longrope":
            limits.append(each["original_max_position_embeddings"])
        elif kind == "dynamic":
            limits.append(text.max_position_embeddings)
    if getattr(text, "attn_temperature_tuning", False):
        limits.append(text.floor_scale - 1)
    return min(limits, default=math.inf)


@cache
def _install() -> None:
    """Replaces how transformers finds attention and makes masks, for passes of shared batches."""
    find = AttentionInterface.get_interface
    prepare = masking_utils._preprocess_mask_arguments
    number = masking_utils.packed_sequence_compatibility_function

    def get_interface(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Any:
        found = find(self, name, default)
        return found if _passes.current is None else partial(_attend, found)

    def prepare_whole(*arguments: Any, **named: Any) -> Any:
        found = prepare(*arguments, **named)
        shared = _passes.current
        if shared is None or found[0]:  # a mask that is ready
            return found
        length = shared.positions.shape[1]
        documents = masking_utils.find_packed_sequence_indices(shared.positions)
        return *found[:2], documents, length, length, *found[5:]

    def number_whole(mask: Any, positions: torch.Tensor, numbers: torch.Tensor) -> Any:
        if (shared := _passes.current) is not None:
            positions = shared.positions.expand(len(positions), -1)
        return number(mask, positions, numbers)

    new: dict[str, Any] = {"_preprocess_mask_arguments": prepare_whole}
    new["packed_sequence_compatibility_function"] = number_whole
    for name, function in new.items():
        setattr(masking_utils, name, function)
    setattr(AttentionInterface, "get_interface", get_interface)  # noqa: B010


# --- the proof ------------------------------------------------------------------------------------


@torch.no_grad()
def find_difference(
    model: nn.Module, size: int, precision: str, device: torch.device, packed: bool
) -> str:
    """Returns how logits of a sequence that `size` processes share differ from those of the whole
    one; "" if they do not.

    `precision`: fp64 if the weights are. `packed`: the sequence holds two documents.
    """
    time = PROOF_TOKENS * size
    lengths = (time // 3, time - time // 3) if packed else (time,)
    whole = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    num_ids = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = (7 * torch.arange(time, device=device)[None] + 5) % max(2, num_ids // 2)
    rows = whole.view(size, -1).clone()
    cast = torch.autocast(device.type, DTYPES.get(precision), enabled=precision in ("bf16", "fp16"))
    asked = {"use_cache": False}
    was_training = model.training
    model.eval()
    try:
        with cast, attention.known_documents(lengths if packed else ()):
            # Rows of padded batches have no position ids if no other process shares them.
            expected = model(input_ids=ids, position_ids=whole if packed else None, **asked).logits
            _Rows(size, 0).share(rows, whole.expand(size, -1))
            found = model(input_ids=ids.view(size, -1), position_ids=rows, **asked).logits
    except Exception as error:
        if isinstance(error, ConfigError) or oom_message(error):
            raise
        return f"a trial failed: {' '.join(str(error).split())[:200]}"
    finally:
        model.train(was_training)
    expected = expected[0].float()
    errors = (found.flatten(0, 1).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst = float(errors.max())
    if worst <= ROUNDING.get(precision, 0.1):
        return ""
    return f"logits of a token differ by {worst:.1g} of their norm from those of the whole sequence"
