"""Renders and examines rows on all cores: chunks of rows -> examples with their findings."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft import errors
from sft.data import audit, duplicates, readers, template
from sft.data.examples import ExampleArrays, Examples
from sft.data.files import BadRow, Row
from sft.data.formats import content_text, is_conversation
from sft.runtime import children, hardware
from sft.runtime.console import make_console

CHUNK_ROWS = 256  # rows that a worker takes at a time, unless they are long:
CHUNK_CHARACTERS = 2**20  # then it takes those that reach so many characters
MOST_TOKENS = 2**21  # of a chunk at a time; the rows behind them wait, so that memory is bounded
PLACE = np.dtype([("part", "u1"), ("entry", "u2")])  # which path a row came from
TRAIN, HELD_OUT, REPLAY = 0, 1, 2  # values of `part`


@dataclass
class Rendered:
    """The result of rendering some rows in a worker."""

    arrays: ExampleArrays  # rows numbered from 0
    places: np.ndarray  # of dtype PLACE, one per good row
    fingerprint: duplicates.RowFingerprint  # of the good rows
    formats: Counter[str]  # of the good rows
    ignored: Counter[str]  # columns of the good rows that are not used
    refused: list[BadRow]  # refused by the reader or by the chat template
    num_dropped: int  # rows dropped by data.on_long
    num_taken: int  # rows of the chunk that were rendered; the others are still to be
    # Rows that have nothing to learn, by reason.
    left_out: Counter[str] = field(default_factory=Counter)
    # Conversations cut into several examples: rows, examples and further_tokens.
    split: Counter[str] = field(default_factory=Counter)


AnyRow = Row | BadRow
Work = Callable[[Sequence[AnyRow]], Rendered]


def map_chunks(work: Work, rows: Iterator[AnyRow]) -> Iterator[Rendered]:
    """Yields the result of `work` on chunks of all rows, in their order.

    Forked processes do the work if there is more than one core and more than a few chunks. Only a
    few chunks are in memory at a time.
    """
    cutter = _Chunks(rows)
    chunks = iter(cutter)
    first = list(islice(chunks, 4))
    workers = hardware.usable_cores()
    if workers < 2 or len(first) < 4:
        for chunk in chain(first, chunks):
            rest = chunk
            while rest:
                yield (done := work(rest))
                rest = cutter.cut_rest(rest, done)
        return
    # Forked workers inherit the tokenizer; sending it to them would take seconds.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, _start_worker, (work, os.getpid())) as pool:
        waiting: deque[tuple[list[AnyRow], Future[Rendered]]] = deque()

        def take_next() -> Rendered:
            chunk, future = waiting[0]
            done = future.result()
            waiting.popleft()
            if rest := cutter.cut_rest(chunk, done):
                waiting.appendleft((rest, pool.submit(_run_work, rest)))
            return done

        try:
            for chunk in chain(first, chunks):
                while len(waiting) > 2 * workers:
                    yield take_next()
                waiting.append((chunk, pool.submit(_run_work, chunk)))
            while waiting:
                yield take_next()
        except BrokenProcessPool:
            broken = [chunk for chunk, result in waiting if result.exception()][:workers]
            raise _killed_worker(broken[0][0], broken[-1][-1]) from None


class _Chunks:
    """Chunks of all rows, in their order, of at most `most_rows`."""

    def __init__(self, rows: Iterator[AnyRow]):
        self._rows, self.most_rows = rows, CHUNK_ROWS

    def __iter__(self) -> Iterator[list[AnyRow]]:
        chunk, characters = list[AnyRow](), 0
        for row in self._rows:
            chunk.append(row)
            if isinstance(row, Row):
                characters += _size(row.messages) + _size(row.tools)
            if len(chunk) >= self.most_rows or characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
        if chunk:
            yield chunk

    def cut_rest(self, chunk: list[AnyRow], done: Rendered) -> list[AnyRow]:
        """Returns what is left of a chunk; if there is anything, later chunks are smaller."""
        if rest := chunk[done.num_taken :]:
            self.most_rows = min(self.most_rows, done.num_taken)
        return rest


def _size(value: Any) -> int:
    """Returns about how many characters a JSON value has."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list) and value and isinstance(value[0], int):  # of tokens
        return 4 * len(value)
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _killed_worker(first: AnyRow, last: AnyRow) -> errors.DataError:
    return errors.DataError(
        "a process that prepared data was killed, most likely because memory ran out, at the rows "
        f"{first.file}:{first.line} to {last.file}:{last.line}; free some memory, or look for "
        "very long rows there"
    )


_inherited: list[Work] = []  # the work of this process, if it is a worker


def _start_worker(work: Work, parent: int) -> None:
    children.prepare_worker(parent)
    _inherited.append(work)
    # A search for cycles every few rows takes a tenth of the time; one for each chunk is enough.
    gc.freeze()  # what was inherited
    gc.disable()


def _run_work(chunk: Sequence[AnyRow]) -> Rendered:
    gc.collect(1)  # a full search would visit every word that `tokens` keeps
    return _inherited[-1](chunk)


def render_rows(
    tokenizer: Tokenizer,
    limit: int,
    options: dict[str, Any],
    rows: Sequence[AnyRow],
) -> Rendered:
    """Renders and examines rows, in this process, until they have MOST_TOKENS.

    `limit`: tokens that an example may have. `options`: those of `template.render_row`.
    """
    refused: list[BadRow] = []
    good: list[Row] = []
    samples: list[tuple[int, Row, template.Example]] = []
    row_findings: list[int] = []
    num_dropped = num_taken = num_tokens = 0
    left_out, split_rows = Counter[str](), Counter[str]()
    for row in rows:
        if num_tokens > MOST_TOKENS:
            break
        num_taken += 1
        if isinstance(row, BadRow):
            refused.append(row)
            continue
        try:
            made = template.render_row(tokenizer, row, limit, **options)
        except errors.DataError as error:
            last = row.messages[-1]
            shown = last["input_ids"] if "input_ids" in last else content_text(last).encode()
            excerpt = readers.make_excerpt(shown)
            refused.append(BadRow(row.file, row.line, str(error), excerpt))
            continue
        if made and (why := audit.nothing_to_learn([example for _, example in made])):
            left_out[why] += 1
            good.append(row)
            continue
        num_dropped += not made
        if len(made) > 1 and is_conversation(row.messages):
            lengths = [len(example.ids) for _, example in made]
            # The longest example holds nearly all of the row. The others repeat parts of it.
            further = sum(lengths) - max(lengths)
            split_rows.update(rows=1, examples=len(made), further_tokens=further)
        for kept, example in made:
            samples.append((len(good), kept, example))
            num_tokens += len(example.ids)
            row_findings.append(audit.examine_row(tokenizer, kept, example, options["supervise"]))
        good.append(row)
    arrays = ExampleArrays.pack(samples)
    token_findings = audit.examine_tokens(tokenizer, Examples(arrays), limit)
    arrays.index["findings"] = np.array(row_findings, np.uint32) | token_findings
    places = np.array([(TRAIN, row.entry) for row in good], PLACE)
    formats = Counter(row.format for row in good)
    ignored = Counter(name for row in good for name in row.ignored)
    prints = duplicates.fingerprint(good)
    counts = (formats, ignored, refused, num_dropped, num_taken, left_out, split_rows)
    return Rendered(arrays, places, prints, *counts)


def only_document(rows: Iterator[AnyRow]) -> tuple[Row | None, Iterator[AnyRow]]:
    """Returns (the only row if it is raw text, else None; an iterator over all rows)."""
    first = list(islice(rows, 2))
    row = first[0] if len(first) == 1 else None
    is_document = isinstance(row, Row) and template.is_document(row.messages)
    return (row if is_document else None), chain(first, rows)  # type: ignore[return-value]


def render_split_document(tokenizer: Tokenizer, row: Row, limit: int, share: float) -> Rendered:
    """Renders the only document in two parts: one to train on, and a held-out one.

    The held-out part is the last `share` of the tokens. The parts do not overlap. They count as two
    rows in the search for duplicates and leaks.
    """
    ((_, whole),) = template.render_row(tokenizer, row, sys.maxsize)
    ids = whole.ids
    if len(ids) < 4:
        raise errors.DataError(
            f"{row.place}: nothing can be held out from the only document, which has {len(ids)} "
            "tokens; give data.eval_path, or more text"
        )
    cut = min(max(2, len(ids) - round(share * len(ids))), len(ids) - 2)
    samples: list[tuple[int, Row, template.Example]] = []
    parts: list[Row] = []
    for number, part in enumerate((ids[:cut], ids[cut:])):
        # The bound is one less: a last piece of one token would have nothing to predict.
        pieces = [part[at : at + limit] for at in range(0, len(part) - 1, limit)]
        samples += [(number, row, template.Example(piece, list(piece))) for piece in pieces]
        content = tokenizer.decode(part, skip_special_tokens=True)
        parts.append(replace(row, messages=[{**row.messages[0], "content": content}]))
    arrays = ExampleArrays.pack(samples)
    arrays.index["findings"] = audit.examine_tokens(tokenizer, Examples(arrays), limit)
    places = np.array([(TRAIN, row.entry), (HELD_OUT, row.entry)], PLACE)
    make_console().print(
        f"{row.file}: the only document; its last {len(ids) - cut:,} of {len(ids):,} tokens are "
        "held out"
    )
    prints, ignored = duplicates.fingerprint(parts), Counter(row.ignored)
    return Rendered(arrays, places, prints, Counter({row.format: 1}), ignored, [], 0, 1)
