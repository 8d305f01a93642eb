"""From files to examples: read, rendered and proven before any weight is loaded, on all cores.

What comes out is a function of the files, the tokenizer with its template, and the section `data`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft import audit, chat, data, model
from sft.audit import Sample
from sft.config import Config

AT_ONCE = 256  # rows that a worker takes at a time


@dataclass(frozen=True)
class Prepared:
    """Tokenised data: row i is example i. `audit` is what audit.json holds."""

    tokenizer: PreTrainedTokenizerBase
    train: list[chat.Example]
    train_rows: list[data.Row]
    held_out: list[chat.Example]
    held_out_rows: list[data.Row]
    audit: dict[str, Any]
    rejected: Sequence[data.BadRow] = ()  # skipped: what rejected.jsonl holds
    samples: Sequence[Sample] = ()  # the rows of most findings, for people to look at


def prepare(config: Config) -> Prepared:
    """Reads, renders and audits all rows.

    Raises DataError naming the rows that cannot be trained on, or that the audit refuses.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    tokenizer = chat.prepare_tokenizer(model.load_tokenizer(config.model))
    rows, held_out_rows, rejected = _rows(config)
    limit = max_length(config)
    train = _rendered(config, tokenizer, rows, limit)
    held_out = _rendered(config, tokenizer, held_out_rows, limit)
    rejected += train.refused + held_out.refused
    if rejected and config.data.on_bad_row == "error":
        raise data.DataError.of_rows(rejected[0].file, [str(row) for row in rejected])
    if not train.samples or not held_out.samples:
        raise data.DataError(
            f"nothing is left to {'hold out' if train.samples else 'train on'}: "
            f"{len(rejected)} rows rejected (data.on_bad_row), "
            f"{train.num_dropped + held_out.num_dropped} dropped (data.on_long)"
        )
    audited = {
        "train": audit.report(tokenizer, train.samples, limit),
        "held_out": audit.report(tokenizer, held_out.samples, limit, against=rows),
        "rejected": len(rejected),
        "dropped": train.num_dropped + held_out.num_dropped,
        "data_sha256": data.digest([row for row, _, _ in train.samples]),
        "options": config.data.model_dump(),
    }
    if config.data.audit == "refuse":
        audit.refuse(audited)
    return Prepared(
        tokenizer,
        [example for _, example, _ in train.samples],
        [row for row, _, _ in train.samples],
        [example for _, example, _ in held_out.samples],
        [row for row, _, _ in held_out.samples],
        audited,
        rejected,
        audit.worst([*train.samples, *held_out.samples]),
    )


def write(prepared: Prepared, folder: Path) -> None:
    """audit.json, audit.html, and rejected.jsonl where rows were skipped."""
    text = json.dumps(prepared.audit, indent=2, ensure_ascii=False) + "\n"
    (folder / "audit.json").write_text(text, "utf-8")
    audit.write_html(folder / "audit.html", prepared.tokenizer, prepared.audit, prepared.samples)
    if prepared.rejected:
        data.write_rejected(list(prepared.rejected), folder / "rejected.jsonl")


def _rows(config: Config) -> tuple[list[data.Row], list[data.Row], list[data.BadRow]]:
    """(train, held out, bad rows that were skipped). Held out before any row is repeated."""
    settings, seed = config.data, config.train.seed
    how = {**data.options(settings), "on_bad_row": settings.on_bad_row}
    rows, rejected = data.load_rows(settings.train_path, settings.max_rows, **how)
    if settings.duplicates == "drop":
        rows = data.without_duplicates(rows)
    if settings.eval_path:
        held_out, bad = data.load_rows(settings.eval_path, **how)
        rejected += bad
    else:
        rows, held_out = data.split(rows, settings.eval_fraction, seed)
    return data.mix(rows, settings.mix, seed) if settings.mix else rows, held_out, rejected


def max_length(config: Config) -> int:
    """Tokens that an example may have: what is asked for, or the positions that the model has."""
    positions = getattr(model.architecture(config.model), "max_position_embeddings", None)
    return min(config.data.max_seq_len, positions or config.data.max_seq_len)


# --- rendering on all cores --------------------------------------------------------------------


@dataclass
class _Rendered:
    samples: list[Sample]
    refused: list[data.BadRow]  # by the chat template
    num_dropped: int  # by data.on_long


def _rendered(
    config: Config, tokenizer: PreTrainedTokenizerBase, rows: Sequence[data.Row], limit: int
) -> _Rendered:
    """Every row rendered and examined, in the order of the rows."""
    work = partial(_part, tokenizer, limit, config.data.supervise, config.data.on_long)
    parts = [rows[at : at + AT_ONCE] for at in range(0, len(rows), AT_ONCE)]
    result = _Rendered([], [], 0)
    for part in _mapped(work, parts):
        result.samples += part.samples
        result.refused += part.refused
        result.num_dropped += part.num_dropped
    return result


def _mapped(
    work: Callable[[Sequence[data.Row]], _Rendered], parts: list[Sequence[data.Row]]
) -> Iterator[_Rendered]:
    """`map`, in forked processes where there is enough to do and more than one core to do it."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = min(cores, len(parts) // 2)
    if workers < 2:
        yield from map(work, parts)
        return
    fork = multiprocessing.get_context("fork")  # the tokenizer is inherited, sending takes seconds
    with ProcessPoolExecutor(workers, fork, _inherited.append, (work,)) as pool:
        yield from pool.map(_call, parts)


_inherited: list[Callable[[Sequence[data.Row]], _Rendered]] = []  # of a worker: its work


def _call(part: Sequence[data.Row]) -> _Rendered:
    return _inherited[-1](part)


def _part(
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    supervise: chat.Supervise,
    on_long: chat.OnLong,
    rows: Sequence[data.Row],
) -> _Rendered:
    result = _Rendered([], [], 0)
    for row in rows:
        try:
            made = chat.render_row(tokenizer, row, limit, supervise=supervise, on_long=on_long)
        except data.DataError as error:
            excerpt = row.messages[-1]["content"][:60]
            result.refused.append(data.BadRow(row.file, row.line, str(error), excerpt))
            continue
        result.num_dropped += not made
        for shown, example in made:
            kinds = audit.examine(tokenizer, shown, example, limit, supervise)
            result.samples.append((shown, example, kinds))
    return result
