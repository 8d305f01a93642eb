"""Turns rendered text into tokens and back, and finds where a prompt ends among them."""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data.rendering import MARKS, Span, added_tokens, cached_by_tokenizer
from sft.errors import DataError

MARKED = re.compile("|".join(MARKS))
TYPED = re.compile(f"({MARKS[0]}[^{MARKS[1]}]*{MARKS[1]}|{MARKED.pattern})")

MOST_KNOWN = 2**18  # characters of the texts between added tokens whose ids are kept
MOST_WORDS, LONG_WORD = 2**16, 32  # words whose ids are kept, and characters of one that is not
# Where a text may be cut: behind one newline and before one blank, between other characters.
LINE, BLANK = re.compile(r"\n(?=\w)(?<=\S\n)"), re.compile(r" (?=\S)(?<=\S )")
# The alternatives of the patterns by which byte-level tokenizers (GPT-2, Llama 3, Qwen, DeepSeek,
# gpt-oss, Tekken) part a text. In all of them a blank can only be the first character, or stand
# among blanks, and no letter follows a newline. None looks at what stands before it, and only
# blanks look at what follows them. So the parts on both sides of a cut are those of each side.
_CASED = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
_BY_CASE = [
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}{upper}{_CASED[1]}{lower}{end}"
    for upper, lower in ("*+", "+*")
    for end in ("", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
]
_OF_BYTES = [r"'s", r"'t", r"'re", r"'ve", r"'m", r"'ll", r"'d", r"\s+(?!\S)", r"\s+"]
_OF_BYTES += [r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+"]
PARTED_AT_BLANKS = {
    *_OF_BYTES,
    *_BY_CASE,
    *(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"'(?i:[sdmt]|ll|ve|re)"),
    *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"),
    *(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"),
    *(r"\p{N}", r"\p{N}{1,3}", r"\s*[\r\n]+", r"\s*[\r\n]"),
    *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"),
    *(r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
    *(r" ?[\p{P}\p{S}]+[\r\n]*", r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"),
    *("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",),
}
ALTERNATIVE = re.compile(r"(?:\\.|\[(?:\\.|[^]\\])*\]|\([^()]*\)|[^|\\])+")


@dataclass
class Tokens:
    """The tokens of a text, and where its characters stand among them.

    `ends` are (character, token) behind each added token, if what stands behind it is tokenised by
    itself (`_parting`). Then these decide where a prompt ends. Else offsets do, which cost a third
    of the time of tokenising.
    """

    tokenizer: Tokenizer
    text: str
    ids: list[int]
    ends: Sequence[tuple[int, int]] = ()

    @cached_property
    def offsets(self) -> list[Span]:
        """Returns the characters of each token. They never decrease: the tokens of one character's
        bytes all carry that character's."""
        return _with_offsets(self.tokenizer, self.text)[1]

    def count(self, length: int) -> int | None:
        """Returns how many tokens are those of the first `length` characters alone, or None if the
        first tokens of the whole are others."""
        known = bisect_right(self.ends, (length, sys.maxsize)) - 1
        if known >= 0:
            end, first = self.ends[known]
            alone = tokenise(self.tokenizer, self.text[end:length]).ids
            stop = first + len(alone)
            if self.ids[first:stop] != alone:
                return None
            if _unknown(self.tokenizer) not in alone:  # it may hold characters that follow
                return stop
        return self._count_by_offsets(length)

    def _count_by_offsets(self, length: int) -> int | None:
        first = self.stop(length)
        if first is None:
            return None
        added = added_tokens(self.tokenizer)
        at = next((n for n in reversed(range(first)) if self.ids[n] in added), 0)
        start = self.offsets[at][0] if at else 0
        alone = tokenise(self.tokenizer, self.text[start:length]).ids
        return first if alone == self.ids[at:first] else None

    def stop(self, length: int) -> int | None:
        """Returns how many tokens hold the first `length` characters, or None if one of them holds
        more."""
        known = bisect_right(self.ends, (length, sys.maxsize)) - 1
        if known >= 0 and self.ends[known][0] == length:
            return self.ends[known][1]
        first = bisect_left(self.offsets, (length, 0))
        return None if first and self.offsets[first - 1][1] > length else first


def tokenise(tokenizer: Tokenizer, text: str) -> Tokens:
    """Returns the tokens of a rendered text, without adding special tokens.

    The text of a special token between MARKS, which a user typed, becomes tokens of plain text.
    """
    cached = _tokens_of_short if len(text) < 200 else _tokens_of_long
    return cached(tokenizer, len(tokenizer), text)


@lru_cache(maxsize=4096)  # headers of turns are asked for again and again
def _tokens_of_short(tokenizer: Tokenizer, size: int, text: str) -> Tokens:
    del size  # only a key of the cache, since a tokenizer may grow
    if MARKED.search(text):
        return Tokens(tokenizer, text, _with_offsets(tokenizer, text)[0])
    parting = _parting(tokenizer)
    if parting is None:
        return Tokens(tokenizer, text, _encode_ids(tokenizer, text))
    pieces = parting.pattern.split(text)
    ids, ends, at = [*parting.ids(tokenizer, pieces[0])], list[tuple[int, int]](), len(pieces[0])
    for token, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        ids.append(parting.added[token])
        ends.append((at + len(token), len(ids)))
        ids += parting.ids(tokenizer, piece)
        at += len(token) + len(piece)
    return Tokens(tokenizer, text, ids, ends)


_tokens_of_long = lru_cache(maxsize=4)(_tokens_of_short.__wrapped__)  # the audit asks for it again


@dataclass
class _Parting:
    """The added tokens that part a text, and the ids of texts between them that were seen."""

    pattern: re.Pattern[str]
    added: dict[str, int]
    known: dict[str, list[int]]
    words: tuple[_Words, _Words] | None  # at the start of a line, and behind a blank
    characters: int = 0  # in `known`

    def ids(self, tokenizer: Tokenizer, piece: str) -> list[int]:
        """Returns the ids of a piece. System prompts, tools and headers stand in many rows."""
        if piece not in self.known:
            if self.characters > MOST_KNOWN:
                self.known, self.characters = {}, 0
            self.known[piece] = self._encode(tokenizer, piece)
            self.characters += len(piece)
        return self.known[piece]

    def _encode(self, tokenizer: Tokenizer, piece: str) -> list[int]:
        if self.words is None:
            return _encode_ids(tokenizer, piece)
        ids, (first, later) = list[int](), self.words
        *lines, last = LINE.split(piece)
        for line in [*(line + "\n" for line in lines), last]:
            word, *others = BLANK.split(line)
            ids += first[word]
            ids += chain.from_iterable(map(later.get_ids, others))
        return ids


class _Words(dict[str, tuple[int, ...]]):
    """{word: its ids behind `before`}, of the words that were seen.

    Most words of a text were seen before, and the tokenizer takes ten times as long for one.
    """

    def __init__(self, tokenizer: Tokenizer, before: str):
        self.tokenizer, self.before, self.get_ids = tokenizer, before, self.__getitem__

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(_encode_ids(self.tokenizer, self.before + word))
        if len(word) < LONG_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


@cached_by_tokenizer
def _unknown(tokenizer: Tokenizer) -> int | None:
    """Returns the id that stands for what the vocabulary cannot write."""
    unknown = tokenizer.special_tokens_map.get("unk_token")
    return None if unknown is None else tokenizer.get_vocab().get(unknown)


@cached_by_tokenizer
def _parting(tokenizer: Tokenizer) -> _Parting | None:
    """Returns how added tokens part a text, or None if what stands between is not always tokenised
    by itself: added tokens that take blanks around them, or are sought in normalised text; a
    pre-tokenizer that treats the first word of a text otherwise (Metaspace); a pre-tokenizer or
    normalizer that drops characters."""
    tokens = {n: t for n, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
    is_exact = all(
        not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        and token.content == token.content.strip()
        for token in tokens.values()
    )
    backend = tokenizer.backend_tokenizer
    splits, normalizer = backend.pre_tokenizer, backend.normalizer
    treats_first = splits is None or b'"Metaspace"' in splits.__getstate__()
    keeps_all = normalizer is None or normalizer.__getstate__() == b'{"type":"NFC"}'
    if not (tokens and is_exact and keeps_all) or treats_first:
        return None
    if not all(_encode_ids(tokenizer, blank) for blank in " \n\t"):
        return None
    added = {token.content: number for number, token in tokens.items()}
    longest_first = sorted(added, key=len, reverse=True)
    words = (_Words(tokenizer, ""), _Words(tokenizer, " ")) if _parts_at_blanks(tokenizer) else None
    return _Parting(re.compile(f"({'|'.join(map(re.escape, longest_first))})"), added, {}, words)


def _parts_at_blanks(tokenizer: Tokenizer) -> bool:
    """Returns whether a text may be cut at LINE and BLANK, and each piece tokenised by itself. This
    is so if a part of the pre-tokenizer always begins there."""
    backend = tokenizer.backend_tokenizer
    added = tokenizer.added_tokens_decoder.values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    if getattr(backend.model, "dropout", None):
        return False
    state = json.loads(backend.pre_tokenizer.__getstate__())
    *steps, last = state.get("pretokenizers", [state])
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    found = set(_OF_BYTES if last["use_regex"] else ())
    for step in steps:
        if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
            alternatives = ALTERNATIVE.findall(pattern := step["pattern"].get("Regex") or "?")
            found.update(alternatives if "|".join(alternatives) == pattern else ["?"])
        elif step["type"] != "Digits":
            return False
    return r"\s+" in found and found <= PARTED_AT_BLANKS


def tokenise_behind(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Returns ids and offsets of a text that stands behind another, so that no blank is put before
    its first word."""
    return _with_offsets(tokenizer, text, behind=True)


def _with_offsets(
    tokenizer: Tokenizer, text: str, behind: bool = False
) -> tuple[list[int], list[Span]]:
    ids, offsets, at = list[int](), list[Span](), 0
    for piece in TYPED.split(text):
        if MARKED.match(piece):
            found, places = _encode_typed(tokenizer, piece.strip("".join(MARKS)))
            places = [(a + 1, b + 1) for a, b in places]
        else:
            found, places = (_encode_behind if at or behind else _encode)(tokenizer, piece)
        ids += found
        offsets += [(at + a, at + b) for a, b in places] if at else places
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
        ids, offsets = _encode(tokenizer, "\n" + text)
        first, _ = _encode(tokenizer, "\n")
    finally:
        backend.encode_special_tokens = False
    if ids[: len(first)] == first:
        return ids[len(first) :], [(max(0, a - 1), b - 1) for a, b in offsets[len(first) :]]
    raise DataError(f"the tokenizer cannot write {text!r} as plain text; remove it from the row")


def _encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    encoded = _backend(tokenizer).encode(text, add_special_tokens=False)
    return encoded.ids, encoded.offsets


def _encode_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # One text at a time: a batch of two takes longer than two batches of one.
    (encoded,) = _backend(tokenizer).encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = encoded.ids  # without offsets
    return ids


def _backend(tokenizer: Tokenizer) -> Backend:
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:  # of the last call of the tokenizer
        backend.no_truncation()
        backend.no_padding()
    return backend


def decode_slice(tokenizer: Tokenizer, ids: list[int], start: int, end: int) -> str:
    """Returns the text of ids[start:end] in context; alone, it might lose its first blank."""
    before, until = (
        str(tokenizer.decode(ids[:at], clean_up_tokenization_spaces=False)) for at in (start, end)
    )
    return until[len(before) :]
