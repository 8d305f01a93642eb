"""Finds rows with the same or nearly the same text as others: duplicates, and leaks.

Identical rows have the same digest. Others are compared by their shingles, which are runs of words:
MinHash proposes pairs (Broder 1997), and the shingles decide. The fingerprint of a row holds both.
It is made when the row is read, and kept in mapped files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np

from sft.data.examples import append_array, map_array
from sft.data.files import DIGEST, Row, content_digest
from sft.data.formats import Message, Messages, content_text
from sft.data.split import is_first

SIMILAR = 0.8  # Jaccard similarity of two sets of shingles from which rows are near-duplicates
SHINGLE = 5  # words
BANDS, DEPTH = 25, 5  # of MinHash: a pair at 0.8 is missed with probability 5e-5
MOST_WORDS = 1 << 17  # whose hashes are kept
QUERIES_PER_PASS = 1 << 18  # rows whose pairs are in memory at a time
TABLE_BITS = 20  # of a key, by which keys that no other row has are found quickly
BUCKET = 10  # maximum texts per key: limits the time for rows from few templates
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)  # of a key or row, and a row, in one number
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")

# A row, a later (or queried) row that is similar, and their similarity.
NEAR = np.dtype([("earlier", np.int64), ("later", np.int64), ("similarity", np.float64)])


@dataclass(frozen=True)
class Sketches:
    """The sketches of n texts; the arrays may be mapped files."""

    texts: np.ndarray  # (n,) uint64: a hash of the text; 0 for one without words
    keys: np.ndarray  # (n, BANDS) uint32: one for each MinHash band
    ends: np.ndarray  # (n,) int64: where the shingles of each text end
    shingles: np.ndarray  # uint32, of all texts

    @classmethod
    def open(cls, folder: Path, name: str) -> Sketches:
        """Maps the sketches `name` in `folder`."""
        return cls(
            map_array(folder / f"{name}_texts.bin", np.uint64),
            map_array(folder / f"{name}_keys.bin", np.uint32).reshape(-1, BANDS),
            map_array(folder / f"{name}_ends.bin", np.int64),
            map_array(folder / f"{name}_shingles.bin", np.uint32),
        )

    def append_to(self, folder: Path, name: str) -> None:
        """Appends the sketches to those called `name` in `folder`."""
        start = append_array(folder / f"{name}_shingles.bin", self.shingles)
        append_array(folder / f"{name}_ends.bin", self.ends + start)
        append_array(folder / f"{name}_texts.bin", self.texts)
        append_array(folder / f"{name}_keys.bin", self.keys)

    def part(self, first: int, stop: int) -> Sketches:
        """Returns the sketches of the texts from `first` to `stop`."""
        edges = [0, *self.ends.tolist()]
        shingles = self.shingles[edges[first] : edges[stop]]
        ends = self.ends[first:stop] - edges[first]
        return Sketches(self.texts[first:stop], self.keys[first:stop], ends, shingles)

    def shingle_set(self, index: int) -> frozenset[int]:
        """Returns the shingles of a text."""
        start = int(self.ends[index - 1]) if index else 0
        return frozenset(self.shingles[start : int(self.ends[index])].tolist())


@dataclass(frozen=True)
class RowFingerprint:
    """The data by which n rows are compared; the arrays may be mapped files."""

    digests: np.ndarray  # (n,) of DIGEST: messages and tools
    prompts: np.ndarray  # (n,) of DIGEST: messages before the last answer; zeros if there are none
    conversations: Sketches  # of all messages
    contexts: Sketches  # of the messages before the last answer

    @classmethod
    def open(cls, folder: Path) -> RowFingerprint:
        """Maps the fingerprints in `folder`."""
        digests, prompts = (map_array(folder / f"{n}.bin", DIGEST) for n in ("digests", "prompts"))
        sketches = (Sketches.open(folder, name) for name in ("conversations", "contexts"))
        return cls(digests, prompts, *sketches)

    def append_to(self, folder: Path) -> None:
        """Appends the fingerprints to those in `folder`."""
        append_array(folder / "digests.bin", self.digests)
        append_array(folder / "prompts.bin", self.prompts)
        self.conversations.append_to(folder, "conversations")
        self.contexts.append_to(folder, "contexts")


def fingerprint(rows: Sequence[Row]) -> RowFingerprint:
    """Makes the fingerprints of rows."""
    contexts = [[*map(_hashes.__getitem__, compared_words(row.messages[:-1]))] for row in rows]
    last = [[*map(_hashes.__getitem__, compared_words(row.messages[-1:]))] for row in rows]
    conversations = [before + answer for before, answer in zip(contexts, last, strict=True)]
    return RowFingerprint(
        np.array([content_digest(row) for row in rows], DIGEST),
        np.array([prompt_digest(row) for row in rows], DIGEST),
        *sketch(conversations, [*map(len, contexts)]),
    )


def compared_words(messages: Messages) -> list[str]:
    """Returns the words of all but system prompts, which whole data sets share; the ids of a row of
    tokens."""
    compared = [m for m in messages if m["role"] != "system"]
    return WORD.findall(" ".join(map(_text_of, compared)).lower())


def _text_of(message: Message) -> str:
    if "input_ids" in message:
        return " ".join(map(str, message["input_ids"]))
    calls = json.dumps(message["tool_calls"]) if "tool_calls" in message else ""
    return content_text(message) + calls


def prompt_digest(row: Row) -> bytes:
    """Hashes the messages before the last answer, without system prompts; zeros if none is left."""
    messages = [[m["role"], content_text(m)] for m in row.messages[:-1] if m["role"] != "system"]
    return hashlib.sha256(json.dumps(messages).encode()).digest()[:16] if messages else bytes(16)


class _Hashes(dict[str, int]):
    """{word: its hash}, of the words that were seen."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        self[word] = value = _hash(word.encode())
        return value


_hashes = _Hashes()


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:8])


def sketch(texts: Sequence[list[int]], prefixes: Sequence[int]) -> tuple[Sketches, Sketches]:
    """Makes the sketches of texts, and those of their first `prefixes` words, from one pass.

    A text is the hashes of its words; its sketch is a function of these alone.
    """
    words: list[int] = []
    spans: list[tuple[int, int]] = []  # the first word, and the number of words

    def add(text: list[int]) -> None:
        # A text of fewer words is one padded shingle; one without words is similar to none.
        spans.append((len(words), len(text)))
        words.extend(text)
        words.extend([0] * (SHINGLE - len(text)))

    for text in texts:
        add(text)
    for number, (text, prefix) in enumerate(zip(texts, prefixes, strict=True)):
        if prefix < SHINGLE:
            add(text[:prefix])
        else:
            spans.append((spans[number][0], prefix))
    words.append(0)  # a place behind the last shingle
    made = _sketch(np.array(words, np.uint64), np.array(spans, np.int64).reshape(-1, 2))
    return made.part(0, len(texts)), made.part(len(texts), len(spans))


def _sketch(words: np.ndarray, spans: np.ndarray) -> Sketches:
    if not len(spans):
        keys = np.zeros((0, BANDS), np.uint32)
        return Sketches(np.zeros(0, np.uint64), keys, np.zeros(0, np.int64), keys.ravel())
    factors = np.random.default_rng(0).integers(1, 2**63, (BANDS * DEPTH, 2), np.uint64)
    factors[:, 0] |= 1  # odd: a permutation of the 64-bit numbers
    starts, lengths = spans.T
    sizes = np.maximum(lengths - SHINGLE + 1, 1)  # shingles
    raw, ends = words.tobytes(), 8 * (starts + sizes + SHINGLE - 1)
    bounds = zip((8 * starts).tolist(), ends.tolist(), lengths.tolist(), strict=True)
    hashes = [_hash(raw[start:end]) if length else 0 for start, end, length in bounds]
    rolled = np.zeros(len(words) - SHINGLE + 1, np.uint64)
    for offset in range(SHINGLE):
        rolled = rolled * factors[0, 0] + words[offset : len(rolled) + offset]
    rolled ^= rolled >> np.uint64(31)
    # Minima from each start to each stop; every second one is between two of these, and unused.
    edges = np.stack([starts, starts + sizes], 1).ravel()
    keys = np.zeros((len(spans), BANDS), np.uint64)
    mixed, high = np.empty_like(rolled), np.empty_like(rolled)
    for number, (factor, shift) in enumerate(factors):
        np.multiply(rolled, factor, out=mixed)
        mixed += shift
        mixed ^= np.right_shift(mixed, np.uint64(32), out=high)
        lowest = np.minimum.reduceat(mixed, edges)[::2]
        band = number // DEPTH
        keys[:, band] = keys[:, band] * factors[1, 0] + lowest + np.uint64(band)
    # The set of shingles of each text: one sort of (text, shingle), without repeated ones.
    owners = np.repeat(np.arange(len(spans), dtype=np.uint64), sizes)
    inside = np.arange(len(owners)) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    pairs = np.sort(owners << np.uint64(32) | (rolled[inside] & np.uint64(0xFFFFFFFF)))
    pairs = pairs[np.concatenate(([True], pairs[1:] != pairs[:-1]))]
    counts = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=len(spans))
    return Sketches(
        np.array(hashes, np.uint64),
        (keys >> np.uint64(32)).astype(np.uint32),
        np.cumsum(counts),
        pairs.astype(np.uint32),
    )


def find_duplicates(known: RowFingerprint, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that are identical to an earlier one of `rows`, and near ones (n,) of NEAR.

    Of identical rows only the first is compared with others.
    """
    first = is_first(known.digests[rows])
    return rows[~first], find_near(known.conversations, rows[first])


def find_leaks(
    known: RowFingerprint, train: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the held-out rows that are also in `train`: those equal to one of its rows, and
    those that are nearly one, or have the prompt of one."""
    leaked, prompted = (
        np.isin(digests[held_out], digests[train]) for digests in (known.digests, known.prompts)
    )
    same_prompt = ~leaked & prompted & (known.prompts[held_out] != np.zeros(1, DIGEST))
    rest = held_out[~leaked & ~same_prompt]
    sides = (known.conversations, known.contexts)
    near = (find_near(side, train, rest)["later"] for side in sides)
    return held_out[leaked], np.unique(np.concatenate([held_out[same_prompt], *near]))


def find_near(
    sketches: Sketches, rows: np.ndarray, queries: np.ndarray | None = None
) -> np.ndarray:
    """Returns (n,) of NEAR: the most similar of `rows` for each of `queries` that has one.

    Without `queries`, each of the rows is compared with the earlier ones.
    """
    texts = sketches.texts
    known, asked = (r[texts[r] != 0] for r in (rows, rows if queries is None else queries))
    known = known[is_first(texts[known])]  # of equal texts, only the first is used
    meets = _may_meet(sketches.keys, asked, by_themselves=queries is None)
    known, asked = known[meets[known]], asked[meets[asked]]
    parts = (asked[at : at + QUERIES_PER_PASS] for at in range(0, len(asked), QUERIES_PER_PASS))
    pairs = (_pairs(sketches.keys, known, part, earlier_only=queries is None) for part in parts)
    return np.fromiter((found for each in pairs for found in _most_similar(sketches, each)), NEAR)


def _may_meet(keys: np.ndarray, asked: np.ndarray, *, by_themselves: bool) -> np.ndarray:
    """Returns (n,) of all rows that share the key of a band with one of `asked`, or, of `asked`
    themselves, with another one; and a few more rows. Most rows of most data sets share none."""
    meets, shift = np.zeros(len(keys), bool), np.uint32(32 - TABLE_BITS)
    for band in map(np.ascontiguousarray, keys.T):
        wanted = band[asked]
        if by_themselves:
            wanted.sort()
            wanted = wanted[1:][wanted[1:] == wanted[:-1]]
        begins = np.zeros(1 << TABLE_BITS, bool)  # with these bits
        begins[wanted >> shift] = True
        meets |= begins[band >> shift]
    return meets


def _pairs(
    keys: np.ndarray, known: np.ndarray, asked: np.ndarray, *, earlier_only: bool
) -> np.ndarray:
    """Returns (asked << 32 | known), ascending, of rows that share the key of a band."""
    pairs = np.zeros(0, np.uint64)
    for band in keys.T:
        by_key = (_sort_by_key(band, rows) for rows in (known, asked))
        pairs = np.concatenate([pairs, *_propose(*by_key, earlier_only=earlier_only)])
        pairs.sort()  # np.unique would hash them, which takes three times as long
        pairs = np.append(pairs[:1], pairs[1:][pairs[1:] != pairs[:-1]])
    return pairs


def _sort_by_key(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns (key << 32 | row) of rows, ascending."""
    return np.sort(keys[rows].astype(np.uint64) << HALF | rows.astype(np.uint64))


def _propose(known: np.ndarray, asked: np.ndarray, *, earlier_only: bool) -> Iterator[np.ndarray]:
    """Yields (asked << 32 | known) of rows that share a key: the first BUCKET known ones of it."""
    at = np.searchsorted(known, asked & ~LOW)
    for _ in range(BUCKET):
        asked, at = asked[at < len(known)], at[at < len(known)]
        other = known[at]
        meets = other >> HALF == asked >> HALF
        asked, at, other = asked[meets], at[meets] + 1, other[meets]
        new = (other & LOW) < (asked & LOW) if earlier_only else slice(None)
        yield asked[new] << HALF | other[new] & LOW


def _most_similar(sketches: Sketches, pairs: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yields NEAR for each asked row that is similar to a known one, with the most similar."""
    shingle_set = lru_cache(maxsize=128)(sketches.shingle_set)  # the set of a long text is large
    for later, group in groupby(pairs.data, lambda pair: pair >> 32):
        mine, others = shingle_set(later), (pair & 0xFFFFFFFF for pair in group)
        similarity, earlier = max((_jaccard(mine, shingle_set(n)), -n) for n in others)
        if similarity >= SIMILAR:
            yield -earlier, later, similarity


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)
