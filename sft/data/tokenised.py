"""Reads rows that are tokens already: `input_ids` with `labels`, or with an `attention_mask`.

Nothing renders such a row. So it is proven instead: every id is one of the vocabulary, and a label
is the id in its own place, or -100 where nothing is learnt.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sft.data.messages import Message, Messages, as_list
from sft.errors import DataError

if TYPE_CHECKING:  # rows are read without it, as `sft process` does
    from transformers import PreTrainedTokenizerBase as Tokenizer

TOKENS = "tokens"  # role of the only message of such a row
IGNORED = -100  # label of a token that is not learnt


def read_tokens(row: dict[str, Any]) -> Messages:
    """Returns the one message of a row: role TOKENS, no content, `input_ids` and `labels`.

    Padding, where `attention_mask` is 0, is cut off at both ends. Without labels every token is
    learnt. Raises ValueError with the reason for a bad row.
    """
    ids = _integers(row, "input_ids")
    labels = list(ids) if row.get("labels") is None else _integers(row, "labels")
    mask = [1] * len(ids) if row.get("attention_mask") is None else _integers(row, "attention_mask")
    for name, values in (("labels", labels), ("attention_mask", mask)):
        if len(values) != len(ids):
            raise ValueError(
                f"expected as many {name} as input_ids, found {len(values)} and {len(ids)}"
            )
    if not set(mask) <= {0, 1} or 1 not in mask:
        raise ValueError("attention_mask: expected 1 for tokens and 0 for padding")
    first, stop = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[first:stop]:
        raise ValueError("attention_mask: expected padding at the ends only, found it between")
    if row.get("labels") is not None and {*labels[:first], *labels[stop:]} - {IGNORED}:
        raise ValueError(f"labels: expected {IGNORED} for padding")
    ids, labels = ids[first:stop], labels[first:stop]
    if len(ids) == 1:
        raise ValueError("a single token, so nothing to learn")
    _check_labels(ids, labels)
    return [{"role": TOKENS, "content": "", "input_ids": ids, "labels": labels}]


def _check_labels(ids: list[int], labels: list[int]) -> None:
    pairs = enumerate(zip(ids, labels, strict=True))
    wrong = next((i for i, (a, b) in pairs if b not in (a, IGNORED)), None)
    if wrong is not None:
        shifted = zip(ids[1:], labels, strict=False)
        if all(label in (token, IGNORED) for token, label in shifted):
            raise ValueError(
                "labels are shifted by one already; give each token its own id as its label"
            )
        raise ValueError(
            f"labels: expected the id in the same place, or {IGNORED}, found {labels[wrong]} for "
            f"the id {ids[wrong]} (token {wrong})"
        )
    if all(label == IGNORED for label in labels[1:]):
        raise ValueError(f"every label behind the first is {IGNORED}, so nothing to learn")


def _integers(row: dict[str, Any], name: str) -> list[int]:
    values = as_list(row.get(name), name)
    if not values:
        raise ValueError(f"{name} is empty")
    is_integer = [type(value) is int and IGNORED <= value < 2**31 for value in values]
    if not all(is_integer):
        found = f"{values[is_integer.index(False)]!r:.40}"
        raise ValueError(f"{name}: expected integers, found {found}")
    return values


def is_tokenised(messages: Messages) -> bool:
    """Returns whether a row is tokens already, so that nothing renders it."""
    return bool(messages[0]["role"] == TOKENS)


Tokens = tuple[list[int], list[int], tuple[str, ...]]  # ids, labels, flags of cutting them


def make_tokens(
    tokenizer: Tokenizer, message: Message, max_seq_len: int, on_long: str
) -> list[Tokens]:
    """Returns the example of a row, or none if `data.on_long` drops it.

    `truncate` cuts the end of a longer row. It is returned whole otherwise, and the audit refuses
    it. Raises DataError for an id that the tokenizer does not know.
    """
    _check_vocabulary(tokenizer, message)
    ids, labels = message["input_ids"], message["labels"]
    if len(ids) <= max_seq_len or on_long not in ("drop", "truncate"):
        return [(ids, labels, ())]
    is_learnt = any(label != IGNORED for label in labels[1:max_seq_len])
    cut = (ids[:max_seq_len], labels[:max_seq_len], ("answer_cut",))
    return [cut] if on_long == "truncate" and is_learnt else []


def _check_vocabulary(tokenizer: Tokenizer, message: Message) -> None:
    known = _known_ids(tokenizer, len(tokenizer))
    for at, token in enumerate(message["input_ids"]):
        if token not in known:
            raise DataError(
                f"input_ids: {token} (token {at}) is no id of the tokenizer's vocabulary (0 to "
                f"{max(known)}); tokenise the row with the tokenizer of model.name"
            )


@lru_cache(maxsize=4)
def _known_ids(tokenizer: Tokenizer, size: int) -> frozenset[int]:
    del size  # only a key of the cache, since a tokenizer may grow
    return frozenset(tokenizer.get_vocab().values())
