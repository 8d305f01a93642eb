"""Recomputes activations in the backward pass: all of a layer's, or all but matrix products.

`selective` keeps the results of matrix products and of attention, through PyTorch's policy for
selective checkpointing. They take most of the time to compute; the rest is recomputed from them.
Names and formulas of operations show which are products; there is no list of models.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    _RECOMPUTE,
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

from sft.errors import ModelError

Kind = Literal["selective"] | bool
# A product that is larger than this, as a multiple of what it multiplies, is cheap for its size:
# scores of attention, and the update of an adapter of low rank.
MOST_EXPANSION = 8
PRODUCT = re.compile(r"(^|_)(add|b|badd|ge)?mm(_|$)|attention|attn")
FROM_WEIGHTS = "_computed_from_weights_only"  # an attribute of tensors


def enable(model: Any, kind: Kind) -> None:
    """Makes the layers of a model recompute activations: all (True), or as a `Policy` says.

    Raises ModelError if the model cannot.
    """
    # Non-reentrant: gradients reach adapters although frozen embeddings have none.
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = selective_contexts
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise ModelError(
            f"train.gradient_checkpointing: expected a model that supports it, found: {error}; set "
            "it to false"
        ) from None
    if kind == "selective" and not _is_selective(model):
        raise ModelError(
            "train.gradient_checkpointing: the code of this model has checkpointing of its own, "
            "which recomputes whole layers; set it to true"
        )


def _is_selective(model: nn.Module) -> bool:
    """Returns whether every layer that recomputes does so with our policy."""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    functions = (getattr(layer, "_gradient_checkpointing_func", None) for layer in layers)
    given = [getattr(function, "keywords", {}) for function in functions]
    return bool(given) and all(each.get("context_fn") is selective_contexts for each in given)


def selective_contexts() -> tuple[Any, Any]:
    """Returns the contexts of one layer's forward pass and of its recomputation."""
    policy = Policy()
    contexts: Any = create_selective_checkpoint_contexts(policy)
    # Not the contexts, which hold the policy: in a cycle, results would outlive the backward pass.
    policy.results = contexts[0].storage
    return contexts


class Policy:
    """Decides for each operation of a layer whether its result is kept.

    Products of activations are kept. Not kept are
    - products of weights alone, such as merged adapters: they have the size of weights;
    - results much larger than what was multiplied (MOST_EXPANSION);
    - results that another operation changes in place: they are recomputed from the beginning;
    - results that depend on random numbers: if such an operation were not repeated, later ones
      would draw other numbers than in the forward pass.
    """

    results: dict[Any, dict[int, Any]]  # kept ones, by operation and how often it had run

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        results = [r for r in tree_leaves(context.op_output) if isinstance(r, torch.Tensor)]
        from_weights = all(map(_is_from_weights, given))
        for result in results:
            if from_weights or hasattr(result, FROM_WEIGHTS):
                setattr(result, FROM_WEIGHTS, from_weights)
        if changed := _changed(operation, args, kwargs):
            self._forget({each.untyped_storage()._cdata for each in changed})
        elif not from_weights and is_product(operation) and not _is_random(operation, args, kwargs):
            factors = given[1:] if _adds(operation) else given
            sizes = [each.numel() for each in factors if not _is_from_weights(each)]
            if sizes and results[0].numel() <= MOST_EXPANSION * max(sizes):
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def _forget(self, changed: set[int]) -> None:
        """Drops kept results that lie in storages which an operation has changed."""
        for entries in self.results.values():
            for number, entry in entries.items():
                tensors = (getattr(each, "val", None) for each in tree_leaves(entry))
                if any(
                    isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in changed
                    for tensor in tensors
                ):
                    entries[number] = _RECOMPUTE


def _is_from_weights(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or getattr(tensor, FROM_WEIGHTS, False)


@lru_cache(maxsize=4096)
def is_product(operation: Any) -> bool:
    """Returns whether an operation is a matrix product, an attention or a convolution."""
    name = _name_of(operation)
    has_formula = getattr(operation, "overloadpacket", operation) in flop_registry
    return "backward" not in name and (has_formula or PRODUCT.search(name) is not None)


def count_flops(operation: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Returns the floating-point operations of a product; 0 of anything else."""
    if not is_product(operation):
        return 0
    formula = flop_registry.get(getattr(operation, "overloadpacket", operation))
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=result))
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    out = next(each for each in tree_leaves(result) if isinstance(each, torch.Tensor))
    if "att" not in _name_of(operation):  # a product with experts, or with weights of 4 bits
        return 2 * out.numel() * given[0].shape[-1]
    query, key = given[:2]  # scores, then a sum of values for each query
    return 4 * query.numel() * (key.shape[-2] if query.ndim == 4 else len(key))


@lru_cache(maxsize=4096)
def _name_of(operation: Any) -> str:
    """Returns the name of an operation without its namespace and overload."""
    return str(getattr(operation, "_opname", None) or getattr(operation, "__name__", operation))


def _adds(operation: Any) -> bool:
    """Returns whether the first argument is added to the product of the others."""
    return "add" in _name_of(operation).split("mm")[0]


def _changed(operation: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Returns the arguments that an operation changes in place."""
    written = [
        args[place] if place < len(args) else kwargs.get(name)
        for place, name in _written_arguments(operation)
    ]
    return [each for each in tree_leaves(written) if isinstance(each, torch.Tensor)]


@lru_cache(maxsize=4096)
def _written_arguments(operation: Any) -> list[tuple[int, str]]:
    """Returns place and name of each argument that an operation changes in place."""
    schema = getattr(operation, "_schema", None)
    arguments = enumerate(schema.arguments if schema is not None and schema.is_mutable else ())
    return [
        (place, argument.name)
        for place, argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _is_random(operation: Any, args: Any, kwargs: Any) -> bool:
    """Returns whether the result depends on random numbers. Attention does if it drops scores."""
    schema = getattr(operation, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if "dropout_p" in names:
        place = names.index("dropout_p")
        return (args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)) != 0.0
    return torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ())
