"""Adds `model.new_tokens` to a tokenizer, and rows for them to the embeddings of a model.

A new row begins as the mean of the rows of the pieces that its text had before. A tokenizer may
know more ids than its model has rows (Gemma 3 1B has one more). So no tokenizer is refused, but
each id that would be looked up is (`unknown_id`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AddedToken
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.config.adapters import NEW_TOKENS as KEY
from sft.config.schema import Tuning
from sft.errors import ModelError
from sft.models.fake import is_fake
from sft.models.layers import embedding_layers


def add_tokens(tokenizer: Tokenizer, tokens: Iterable[str]) -> None:
    """Adds tokens, unless they were saved with the tokenizer as such.

    Raises ModelError for a text that is a token already, or that has no pieces.
    """
    known: dict[str, list[int]] = dict(tokenizer.init_kwargs.get(KEY, {}))
    vocabulary, fresh = tokenizer.get_vocab(), []
    for token in tokens:
        if token in known:
            continue
        pieces = tokenizer.encode(token, add_special_tokens=False)
        # " the" is stored as "Ġthe", and "é" is the name of a byte.
        if len(pieces) == 1 and token in (tokenizer.decode(pieces), *vocabulary):
            raise ModelError(
                f"model.new_tokens: {token!r} is a token of this tokenizer already (id "
                f"{pieces[0]}); to train its embedding, set tuning.lora.trainable_token_indices: "
                f"{pieces}"
            )
        if token in vocabulary:
            raise ModelError(
                f"model.new_tokens: {token!r} is the name of another token in this tokenizer (id "
                f"{vocabulary[token]}), which stands for other text: choose another text"
            )
        if not pieces or tokenizer.unk_token_id in pieces:
            raise ModelError(f"model.new_tokens: the tokenizer has no pieces of {token!r}")
        known[token] = pieces
        fresh.append(token)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in fresh])
    tokenizer.init_kwargs[KEY] = known
    tokenizer.fresh_tokens = fresh  # `add_rows` reads it


def add_rows(model: Any, tokenizer: Any, tokens: Iterable[str]) -> None:
    """Adds rows for `tokens` to the embeddings of `model`, unless its files have them."""
    known: dict[str, list[int]] = tokenizer.init_kwargs[KEY]
    ids: dict[str, int] = {token: tokenizer.get_vocab()[token] for token in tokens}
    fit_vocabulary(model, max(ids.values()) + 1)
    model.new_token_ids = sorted({*ids.values()})  # `trained_tokens` reads it
    if is_fake(model):
        return
    for layer in embedding_layers(model):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter):
            with torch.no_grad():
                for token in tokenizer.fresh_tokens:
                    weight[ids[token]] = weight[known[token]].float().mean(0).to(weight.dtype)


def unknown_id(
    ids: Iterable[int], model: Any, tokenizer: Any = None, new_tokens: Iterable[str] | None = None
) -> str | None:
    """Returns the problem of the first of `ids` for which a model has no embedding.

    On a CPU such an id is an IndexError, and on a GPU a failed assertion that ends the process.
    `model`: anything with a transformers configuration as its `config`; None is returned for one
    without a size of its vocabulary. With a `tokenizer` the message names the token.
    `new_tokens`: those that `add_rows` has still to add to the model.
    """
    number = _num_embeddings(model)
    if number is None:
        return None
    if new_tokens:
        number = max(number, *(i + 1 for i in tokenizer.convert_tokens_to_ids([*new_tokens])))
    found = next((int(i) for i in ids if i >= number), None)
    if found is None:
        return None
    token = tokenizer.convert_ids_to_tokens(found) if tokenizer else None
    return (
        f"expected token ids below {number:,}, for which the model has embeddings, found {found:,}"
        f"{f' ({token!r})' if token else ''}; use the tokenizer that the model was trained with. A "
        "token of your own belongs into model.new_tokens, which adds its embedding, and not into "
        "the tokenizer"
    )


def _num_embeddings(model: Any) -> int | None:
    first, _ = embedding_layers(model)
    weight = getattr(first, "weight", None)
    if weight is not None:
        return len(weight)
    return getattr(
        model.config.get_text_config(), "vocab_size", None
    )  # code of its own may lack it


def fit_vocabulary(model: Any, number: int) -> None:
    """Makes the embeddings of `model` at least `number` rows long."""
    first, _ = embedding_layers(model)
    weight: Any = getattr(first, "weight", None)
    if weight is None:
        raise ModelError(
            "model.new_tokens: this model has no embeddings to which rows can be added"
        )
    if number > len(weight):
        model.resize_token_embeddings(number, mean_resizing=False)


def trained_tokens(base: Any, tuning: Tuning) -> Tuning:
    """Returns `tuning` with the new tokens of `base` among those whose rows are trained."""
    ids = getattr(base, "new_token_ids", [])
    if not ids:
        return tuning
    given = tuning.lora.trainable_token_indices or []
    first, last = embedding_layers(base)
    layers = [first] if last is None or last.weight is first.weight else [first, last]  # type: ignore[union-attr]
    names = {module: name for name, module in base.named_modules()}
    own = dict(given) if isinstance(given, dict) else {}
    for layer in filter(None, layers):
        name = next((n for n in own if f".{names[layer]}".endswith(f".{n}")), names[layer])
        listed = own.get(name, []) if isinstance(given, dict) else given
        own[name] = sorted({*listed, *ids})
    lora = tuning.lora.model_copy(update={"trainable_token_indices": own})
    return tuning.model_copy(update={"lora": lora})
