"""Which rows say the same, or nearly the same, as others: duplicates, and leaks into held-out rows.

Identical rows have one digest. Others are compared by the shingles (runs of words) of their texts:
MinHash proposes pairs, the shingles decide. What is compared is a sketch of each row, made where
the row is read and kept in files, which are mapped.
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

from sft.data.arrays import Files, mapped
from sft.data.files import DIGEST, Row, content_digest
from sft.data.formats import Messages
from sft.data.split import is_first

SIMILAR = 0.8  # Jaccard similarity of two sets of shingles from which rows count as near-duplicates
SHINGLE = 5  # words
BANDS, DEPTH = 25, 5  # of MinHash: a pair at 0.8 is missed with probability 5e-5
QUERIES_PER_PASS = 1 << 18  # rows whose pairs are in memory at a time
BUCKET = 10  # texts that a key proposes: bounds the time on rows made from few templates
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)  # of a key or row, and a row, in one number
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")

# a row, a later (or asked) row like it, how much alike
NEAR = np.dtype([("earlier", np.int64), ("later", np.int64), ("similarity", np.float64)])


@dataclass(frozen=True)
class Sketches:
    """Of n texts; the arrays may be mapped files."""

    texts: np.ndarray  # (n,) uint64: a hash of the text; 0 for one without words
    keys: np.ndarray  # (n, BANDS) uint32: one for each MinHash band
    ends: np.ndarray  # (n,) int64: where the shingles of each text end
    shingles: np.ndarray  # uint32, of all texts

    def shingle_set(self, index: int) -> frozenset[int]:
        start = int(self.ends[index - 1]) if index else 0
        return frozenset(self.shingles[start : int(self.ends[index])].tolist())


@dataclass(frozen=True)
class RowFingerprint:
    """What tells n rows apart; the arrays may be mapped files."""

    digests: np.ndarray  # (n,) of DIGEST: messages and tools
    prompts: np.ndarray  # (n,) of DIGEST: what stands before the last answer; zeros if nothing does
    whole: Sketches  # of all that the rows say
    asked: Sketches  # of what stands before the last answer


def fingerprint(rows: Sequence[Row]) -> RowFingerprint:
    return RowFingerprint(
        np.array([content_digest(row) for row in rows], DIGEST),
        np.array([prompt_digest(row) for row in rows], DIGEST),
        sketch([compared_text(row.messages) for row in rows]),
        sketch([compared_text(row.messages[:-1]) for row in rows]),
    )


def write(files: Files, told: RowFingerprint) -> None:
    """Appends rows to files, for `open_folder`."""
    files.append("digests.bin", told.digests)
    files.append("prompts.bin", told.prompts)
    for name, part in (("whole", told.whole), ("asked", told.asked)):
        ends = part.ends + files.append(f"{name}_shingles.bin", part.shingles)
        files.append(f"{name}_ends.bin", ends)
        files.append(f"{name}_texts.bin", part.texts)
        files.append(f"{name}_keys.bin", part.keys)


def open_folder(folder: Path) -> RowFingerprint:
    def sketches(name: str) -> Sketches:
        return Sketches(
            mapped(folder / f"{name}_texts.bin", np.uint64),
            mapped(folder / f"{name}_keys.bin", np.uint32).reshape(-1, BANDS),
            mapped(folder / f"{name}_ends.bin", np.int64),
            mapped(folder / f"{name}_shingles.bin", np.uint32),
        )

    digests, prompts = (mapped(folder / name, DIGEST) for name in ("digests.bin", "prompts.bin"))
    return RowFingerprint(digests, prompts, sketches("whole"), sketches("asked"))


def compared_text(messages: Messages) -> str:
    """What is compared: all but system prompts, which whole data sets share."""
    told = [m for m in messages if m["role"] != "system"]
    return " ".join(
        m["content"] + (json.dumps(m["tool_calls"]) if "tool_calls" in m else "") for m in told
    )


def prompt_digest(row: Row) -> bytes:
    """Of what stands before the last answer, except the system prompt; zeros if nothing does."""
    messages = [[m["role"], m["content"]] for m in row.messages[:-1] if m["role"] != "system"]
    return hashlib.sha256(json.dumps(messages).encode()).digest()[:16] if messages else bytes(16)


# --- sketches ----------------------------------------------------------------------------------


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


_hash_of_word = lru_cache(maxsize=1 << 17)(_hash)


def sketch(texts: Sequence[str], size: int = 2048) -> Sketches:
    """Sketches of texts, a function of the texts alone."""
    parts = [_sketch(texts[at : at + size]) for at in range(0, len(texts), size)]
    if not parts:
        keys = np.zeros((0, BANDS), np.uint32)
        return Sketches(np.zeros(0, np.uint64), keys, np.zeros(0, np.int64), keys.ravel())
    offsets = np.cumsum([0, *(len(part.shingles) for part in parts)])[:-1]
    return Sketches(
        np.concatenate([part.texts for part in parts]),
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.ends + offset for part, offset in zip(parts, offsets, strict=True)]),
        np.concatenate([part.shingles for part in parts]),
    )


def _sketch(texts: Sequence[str]) -> Sketches:
    factors = np.random.default_rng(0).integers(1, 2**63, (BANDS * DEPTH, 2), np.uint64)
    factors[:, 0] |= 1  # odd: a permutation of the 64-bit numbers
    words: list[int] = []
    ends, hashes = [], []
    for text in texts:
        found = WORD.findall(text.lower())
        # a text of fewer words is one shingle, filled up; one without words is like no other
        words += [_hash_of_word(word) for word in found] + [0] * max(0, SHINGLE - len(found))
        ends.append(len(words))
        hashes.append(_hash(" ".join(found)) if found else 0)
    array = np.array(words, np.uint64)
    rolled = np.zeros(len(array) - SHINGLE + 1, np.uint64)
    for offset in range(SHINGLE):
        rolled = rolled * factors[0, 0] + array[offset : len(rolled) + offset]
    rolled ^= rolled >> np.uint64(31)
    stops, begins = np.array(ends) - SHINGLE + 1, np.array([0, *ends[:-1]])
    # minima from each beginning to each end; what lies between two texts is cut off by the ends
    edges = np.stack([begins, stops], 1).ravel()[:-1]
    keys = np.zeros((len(ends), BANDS), np.uint64)
    for number, (factor, shift) in enumerate(factors):
        mixed = rolled * factor + shift
        lowest = np.minimum.reduceat(mixed ^ (mixed >> np.uint64(32)), edges)[::2]
        band = number // DEPTH
        keys[:, band] = keys[:, band] * factors[1, 0] + lowest + np.uint64(band)
    shingles = rolled.astype(np.uint32)
    sets = [np.unique(shingles[a:b]) for a, b in zip(begins, stops, strict=True)]
    return Sketches(
        np.array(hashes, np.uint64),
        (keys >> np.uint64(32)).astype(np.uint32),
        np.cumsum([len(each) for each in sets]),
        np.concatenate(sets),
    )


# --- alike -------------------------------------------------------------------------------------


def find_duplicates(told: RowFingerprint, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of `rows`: those that are identical to an earlier one; and of NEAR, others that are nearly
    the same as an earlier one. Of identical rows only the first is compared with others."""
    first = is_first(told.digests[rows])
    return rows[~first], find_near(told.whole, rows[first])


def find_leaks(
    told: RowFingerprint, train: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out rows that stand in train: (identically; nearly, or with an answer of their own)."""
    leaked, prompted = (
        np.isin(digests[held_out], digests[train]) for digests in (told.digests, told.prompts)
    )
    nearly = ~leaked & prompted & (told.prompts[held_out] != np.zeros(1, DIGEST))
    rest = held_out[~leaked & ~nearly]
    found = (find_near(side, train, rest)["later"] for side in (told.whole, told.asked))
    return held_out[leaked], np.unique(np.concatenate([held_out[nearly], *found]))


def find_near(sketches: Sketches, rows: np.ndarray, asked: np.ndarray | None = None) -> np.ndarray:
    """(n,) of NEAR: each of the rows `asked` that is like one of `rows`, with the one it is most
    like. Without `asked`, the rows among each other: a later one, and an earlier one like it."""
    texts = sketches.texts
    known, queried = (r[texts[r] != 0] for r in (rows, rows if asked is None else asked))
    known = known[is_first(texts[known])]  # of the same words, the first proposes
    parts = (queried[at : at + QUERIES_PER_PASS] for at in range(0, len(queried), QUERIES_PER_PASS))
    pairs = (_pairs(sketches.keys, known, part, earlier_only=asked is None) for part in parts)
    return np.fromiter((found for each in pairs for found in _most_similar(sketches, each)), NEAR)


def _pairs(
    keys: np.ndarray, known: np.ndarray, asked: np.ndarray, *, earlier_only: bool
) -> np.ndarray:
    """Returns (asked << 32 | known), ascending, of rows that share the key of a band."""
    pairs = np.zeros(0, np.uint64)
    for band in keys.T:
        proposed = _propose(
            _sort_by_key(band, known), _sort_by_key(band, asked), earlier_only=earlier_only
        )
        pairs = np.concatenate([pairs, *proposed])
        pairs.sort()  # np.unique would hash them, which takes three times as long
        pairs = np.append(pairs[:1], pairs[1:][pairs[1:] != pairs[:-1]])
    return pairs


def _sort_by_key(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(key << 32 | row) of rows, ascending."""
    return np.sort(keys[rows].astype(np.uint64) << HALF | rows.astype(np.uint64))


def _propose(known: np.ndarray, asked: np.ndarray, *, earlier_only: bool) -> Iterator[np.ndarray]:
    """(asked << 32 | known) of rows that share a key: the first BUCKET known ones of each key."""
    at = np.searchsorted(known, asked & ~LOW)
    for _ in range(BUCKET):
        asked, at = asked[at < len(known)], at[at < len(known)]
        other = known[at]
        meets = other >> HALF == asked >> HALF
        asked, at, other = asked[meets], at[meets] + 1, other[meets]
        new = (other & LOW) < (asked & LOW) if earlier_only else slice(None)
        yield asked[new] << HALF | other[new] & LOW


def _most_similar(sketches: Sketches, pairs: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Of each asked row the known one it is most like, if it is like any."""
    shingle_set = lru_cache(maxsize=128)(sketches.shingle_set)  # of a long text it is large
    for later, group in groupby(pairs.data, lambda pair: pair >> 32):
        mine, others = shingle_set(later), (pair & 0xFFFFFFFF for pair in group)
        similarity, earlier = max((_jaccard(mine, shingle_set(n)), -n) for n in others)
        if similarity >= SIMILAR:
            yield -earlier, later, similarity


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)
