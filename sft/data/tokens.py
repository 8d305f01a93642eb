"""Turns rendered text into tokens and back, and finds where a prompt ends among them."""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import lru_cache

from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data.rendering import MARKS, Span, added_tokens
from sft.errors import DataError

MARKED = re.compile(f"[{''.join(MARKS)}]")


def count_prompt_tokens(
    tokenizer: Tokenizer, text: str, ids: list[int], offsets: list[Span], length: int
) -> int | None:
    """Returns how many of the tokens of `text` are those of its first `length` characters alone.

    None if the two differ. An added token parts a text before all else, so only what stands behind
    the last one is tokenised again.
    """
    # Offsets never decrease: the tokens of one character's bytes all carry that character's.
    first = bisect_left(offsets, (length, 0))
    if first and offsets[first - 1][1] > length:
        return None
    added = added_tokens(tokenizer)
    at = next((n for n in range(first - 1, -1, -1) if ids[n] in added), 0)
    alone, _ = tokenise(tokenizer, text[offsets[at][0] if first and at else 0 : length])
    return first if alone == ids[at:first] else None


def tokenise(tokenizer: Tokenizer, text: str, behind: bool = False) -> tuple[list[int], list[Span]]:
    """Returns ids and offsets of a rendered text, without adding special tokens.

    The text of a special token between MARKS, which a user typed, becomes tokens of plain text.
    `behind`: the text stands behind another, so no blank is put before its first word.
    """
    if not MARKED.search(text):
        return (_encode_behind if behind else _encode)(tokenizer, text)
    ids, offsets, at = list[int](), list[Span](), 0
    for piece in re.split(f"({MARKS[0]}[^{MARKS[1]}]*{MARKS[1]}|[{''.join(MARKS)}])", text):
        if not MARKED.match(piece):
            found, places = (_encode_behind if at or behind else _encode)(tokenizer, piece)
        else:
            found, places = _encode_typed(tokenizer, piece.strip("".join(MARKS)))
            places = [(a + 1, b + 1) for a, b in places]
        ids += found
        offsets += [(at + a, at + b) for a, b in places]
        at += len(piece)
    return ids, offsets


def _encode_behind(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    if not text:
        return [], []
    eos = tokenizer.eos_token
    first, _ = _encode(tokenizer, eos + "\n")
    ids, offsets = _encode(tokenizer, eos + "\n" + text)
    if ids[: len(first)] == first:
        cut = len(eos) + 1
        return ids[len(first) :], [(a - cut, b - cut) for a, b in offsets[len(first) :]]
    return _encode(tokenizer, text)


def _encode_typed(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Tokenises the text of a special token as plain text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        encoded = backend.encode("\n" + text, add_special_tokens=False)
        first = backend.encode("\n", add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False
    if encoded.ids[: len(first)] == first:
        places = [(max(0, a - 1), b - 1) for a, b in encoded.offsets[len(first) :]]
        return encoded.ids[len(first) :], places
    raise DataError(f"the tokenizer cannot write {text!r} as plain text; remove it from the row")


def _encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    cached = _encode_short if len(text) < 200 else _encode_long
    return cached(tokenizer, len(tokenizer), text)


@lru_cache(maxsize=4096)  # headers of turns are asked for again and again
def _encode_short(tokenizer: Tokenizer, size: int, text: str) -> tuple[list[int], list[Span]]:
    del size  # only a key of the cache, since a tokenizer may grow
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:  # of the last call of the tokenizer
        backend.no_truncation()
        backend.no_padding()
    encoded = backend.encode(text, add_special_tokens=False)
    return encoded.ids, encoded.offsets


_encode_long = lru_cache(maxsize=4)(_encode_short.__wrapped__)  # the audit asks for it again


def decode_slice(tokenizer: Tokenizer, ids: list[int], start: int, end: int) -> str:
    """Returns the text of ids[start:end] in context; alone, it might lose its first blank."""
    before, until = (
        str(tokenizer.decode(ids[:at], clean_up_tokenization_spaces=False)) for at in (start, end)
    )
    return until[len(before) :]
