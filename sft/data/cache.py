"""From files to proven examples on disk, before any weight is loaded or process group exists.

What comes out is a function of the files' contents, the tokenizer with its template, the section
`data` and this code. All of them make the name of a folder in `data.cache_dir`: one process fills
it, under a lock and as a whole or not at all; every other process and every later run only maps it.

    rows   -> read once, rendered and examined on all cores, appended to a store (sft/store.py)
    then   -> duplicates, split, mix and leaks are decided on the digests and sketches of all rows
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from sft import errors
from sft.config.schema import Config, Data
from sft.data import audit_report, duplicates, readers, split, template
from sft.data import examples as data_examples
from sft.data.arrays import Files, mapped
from sft.data.audit import (
    Sample,
    examine_row,
    examine_tokens,
    outlier_length,
    pick_samples,
    refuse,
    summarise_part,
    template_sha256,
    to_bits,
    tokenizer_sha256,
)
from sft.data.examples import Arrays, Examples, open_folder
from sft.data.files import BadRow, Row, check_column, file_digests, num_rows, read_all, read_options
from sft.models import load
from sft.runtime import checkpoint, children, hardware
from sft.runtime.console import bar, make_console, write_json

ROWS = "rows"  # a folder of what tells rows apart, removed when that is decided
KEPT = 16  # folders in the cache
CHUNK_ROWS = 256  # rows that a worker takes at a time
PLACE = np.dtype([("part", "u1"), ("entry", "u2")])  # of a row
TRAIN, HELD_OUT = 0, 1  # parts
ORDER = np.dtype([("example", np.int64), ("length", np.int32)])  # of what a part uses: its number
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow", "datasets", "numpy")


@dataclass(frozen=True)
class Prepared:
    """Tokenised data. `audit` is what audit.json holds."""

    tokenizer: PreTrainedTokenizerBase
    train: Examples
    held_out: Examples
    audit: dict[str, Any]
    rejected: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))  # JSON lines
    folder: Path | None = None  # in the cache
    validation: Examples | None = None  # rows that are kept from training

    def samples(self) -> list[Sample]:
        """The rows of most findings, for people to look at."""
        return pick_samples(self.train) + pick_samples(self.held_out, 5)


def prepare(config: Config, on_progress: Callable[[], None] = lambda: None) -> Prepared:
    """Maps the examples of `config`; reads, renders and audits all rows if nobody has yet.

    `on_progress` is called at every sign of progress.
    Raises DataError naming the rows that cannot be trained on, or that the audit refuses, and for
    a stale or damaged folder in the cache. `data.audit: warn` prepares that anew.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    tokenizer = template.prepare_tokenizer(load.load_tokenizer(config.model))
    made_of = cache_inputs(config, tokenizer)
    folder = Path(config.data.cache_dir, cache_key(made_of))
    with _as_data_error(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            fault = _find_fault(folder, made_of, config.data.audit) if folder.exists() else None
            if fault and config.data.audit == "refuse":
                raise errors.DataError(
                    f"the prepared data in {folder} are stale or damaged: {fault}; remove the "
                    "folder, or let `make audit` prepare them anew"
                )
            if fault:
                make_console().print(f"prepared data were stale or damaged ({fault}): made anew")
            if fault or not folder.exists():
                _fill(config, tokenizer, folder, made_of, on_progress)
            prepared = _open(folder, tokenizer)
    _prune(folder.parent)
    if config.data.audit == "refuse":
        refuse(prepared.audit)
    return prepared


def with_validation(prepared: Prepared, share: float) -> Prepared:
    """Takes training rows out for validation, evenly spread over them, at least one on both sides.

    Raises DataError if there are fewer than two.
    """
    number = len(prepared.train)
    if number < 2:
        raise errors.DataError(
            f"expected at least 2 training rows, to keep one for validation, found {number}"
        )
    chosen = np.zeros(number, bool)
    count = min(number - 1, max(1, round(share * number)))
    chosen[np.linspace(0, number - 1, count).astype(int)] = True
    train, validation = (prepared.train.select(part) for part in (~chosen, chosen))
    return replace(prepared, train=train, validation=validation)


@contextmanager
def _as_data_error(cache: Path) -> Iterator[None]:
    """An error of the disk, in one message."""
    try:
        yield
    except OSError as error:
        raise errors.DataError(
            f"cannot keep prepared data in {cache}: {error.strerror or error}; make room, or set "
            "data.cache_dir to another folder"
        ) from None


def _open(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    arrays, audited = open_folder(folder), (folder / "audit.json").read_text("utf-8")
    train, held_out = (_examples(folder, arrays, part) for part in ("train", "held_out"))
    rejected = mapped(folder / "rejected.jsonl", np.uint8)
    os.utime(folder)
    return Prepared(tokenizer, train, held_out, json.loads(audited), rejected, folder)


def _examples(folder: Path, arrays: Arrays, part: str) -> Examples:
    order = mapped(folder / f"{part}.bin", ORDER)
    return Examples(arrays, order["example"], order["length"])


def _prune(cache: Path) -> None:
    """Removes what was used longest ago, and what a killed process left half made.

    A process that has mapped a folder is not disturbed, one that is about to holds its lock.
    """
    with suppress(OSError):  # another process may be at the same
        made = [path for path in cache.iterdir() if (path / checkpoint.MANIFEST).exists()]
        old = sorted(made, key=lambda path: -path.stat().st_mtime)[KEPT:]
        for folder in [*old, *cache.glob(f"*{checkpoint.STAGING}")]:
            with suppress(Timeout), FileLock(folder.with_suffix(".lock"), timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def write_audit(prepared: Prepared, folder: Path) -> None:
    """audit.json, audit.html, and rejected.jsonl where rows were skipped."""
    write_json(folder / "audit.json", prepared.audit)
    audit_report.write_html(
        folder / "audit.html", prepared.tokenizer, prepared.audit, prepared.samples()
    )
    (folder / "rejected.jsonl").unlink(missing_ok=True)
    if len(prepared.rejected):
        prepared.rejected.tofile(folder / "rejected.jsonl")


def max_length(config: Config) -> int:
    """Tokens that an example may have: what is asked for, or the positions that the model has."""
    positions = getattr(load.architecture(config.model), "max_position_embeddings", None)
    return min(config.data.max_seq_len, positions or config.data.max_seq_len)


# --- what prepared data are a function of ------------------------------------------------------


def cache_inputs(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that the examples and their audit depend on, and nothing else."""
    section = config.data
    source = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    is_drawn = section.mix or not section.eval_path
    return {
        "train": file_digests(section.train_path),
        "eval": file_digests(section.eval_path) if section.eval_path else [],
        "options": section.model_dump(exclude={"train_path", "eval_path", "audit", "cache_dir"}),
        "max_length": max_length(config),
        "group": config.evaluation.group,
        "seed": config.train.seed if is_drawn else None,
        "tokenizer": tokenizer_sha256(tokenizer),
        "template": template_sha256(tokenizer),
        "code": hashlib.sha256(source).hexdigest(),
        "format": checkpoint.FORMAT,  # of the folder's manifest
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def cache_key(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]


def _find_fault(folder: Path, made_of: dict[str, Any], policy: str) -> str | None:
    """Why the prepared data in `folder` are not what `made_of` makes, or None."""
    # Of the processes of a machine the first reads all bytes; what it refuses, none trains on.
    # Where it would make them anew, all must agree on it.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if reason := checkpoint.fault(folder, digests=is_first or policy == "warn"):
        return reason
    was = json.loads((folder / "audit.json").read_text("utf-8"))["inputs"]
    changed = [name for name in made_of if was.get(name) != made_of[name]]
    return f"made of another {', '.join(changed)}" if changed else None


# --- filling a folder --------------------------------------------------------------------------


def _fill(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    made_of: dict[str, Any],
    on_progress: Callable[[], None],
) -> None:
    if config.evaluation.group:  # told before any row is rendered
        scored = config.data.eval_path or config.data.train_path
        check_column(scored, config.evaluation.group, "evaluation.group")
    staging = folder.with_suffix(checkpoint.STAGING)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        counts = _write_rows(config, tokenizer, staging, on_progress)
        again = cache_inputs(config, tokenizer)
        if changed := [name for name in ("train", "eval") if again[name] != made_of[name]]:
            raise errors.DataError(
                f"the files of data.{changed[0]}_path changed while they were read; start again"
            )
        audited = _decide(config, tokenizer, staging, counts) | {"inputs": made_of}
        (staging / "audit.json").write_text(json.dumps(audited, ensure_ascii=False), "utf-8")
        shutil.rmtree(staging / ROWS)
        checkpoint.seal(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclass
class _Counts:
    rows: int = 0  # good ones, dropped ones too
    dropped: int = 0  # by data.on_long
    rejected: int = 0
    formats: Counter[str] = field(default_factory=Counter)


def _write_rows(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    on_progress: Callable[[], None],
) -> _Counts:
    """Every row of all files into the store, and what tells rows apart into `folder`/rows."""
    settings = config.data
    how = read_options(settings) | {"group": config.evaluation.group}
    paths = [settings.train_path, *([settings.eval_path] if settings.eval_path else [])]
    work = partial(
        _render_rows, tokenizer, max_length(config), settings.supervise, settings.on_long
    )
    counts, first = _Counts(), list[BadRow]()
    (folder / ROWS).mkdir()
    with (
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
        Files(folder) as files,
        Files(folder / ROWS) as own,
        bar(make_console(), "prepare", _num_rows(settings, paths)) as advance,
    ):
        for part, path in enumerate(paths):
            most = settings.max_rows if part == TRAIN else None
            for made in _map_chunks(work, islice(read_all(path, **how), most)):
                for row in made.refused:
                    rejected.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
                counts.rejected += len(made.refused)
                first += made.refused[: 10 - len(first)]
                made.places["part"] = part
                made.arrays.index["row"] += counts.rows
                counts.rows += len(made.places)
                counts.dropped += made.num_dropped
                counts.formats += made.formats
                data_examples.write(files, made.arrays)
                own.append("places.bin", made.places)
                duplicates.write(own, made.told)
                advance(len(made.places) + len(made.refused))
                on_progress()
    if counts.rejected and (settings.on_bad_row == "error" or not counts.rows):
        raise errors.DataError.from_rows(
            first[0].file, [str(row) for row in first], counts.rejected
        )
    return counts


def _num_rows(settings: Data, paths: list[str | list[str]]) -> int | None:
    """About how many rows will be read; None if that cannot be told."""
    numbers = [num_rows(path) for path in paths]
    if not all(numbers):
        return None
    train, *others = [number or 0 for number in numbers]
    return min(train, settings.max_rows or train) + sum(others)


def _decide(
    config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path, counts: _Counts
) -> dict[str, Any]:
    """Which examples are trained on and which are held out (train.bin, held_out.bin), and what only
    all rows together tell; returns what audit.json holds."""
    settings, seed = config.data, config.train.seed
    places = mapped(folder / ROWS / "places.bin", PLACE)
    told = duplicates.open_folder(folder / ROWS)
    arrays = data_examples.open_folder(folder)
    numbers = np.array(arrays.index["row"])  # of the rows of all examples
    is_kept = np.isin(np.arange(len(places)), numbers)  # not dropped
    train, held_out = (
        np.flatnonzero((places["part"] == part) & is_kept) for part in (TRAIN, HELD_OUT)
    )
    if settings.duplicates == "drop":
        train = train[split.is_first(told.digests[train])]
    if not settings.eval_path and len(train):
        held = split.split(told.digests[train], settings.eval_fraction, seed)
        train, held_out = train[~held], train[held]
    mixed = train
    if settings.mix:
        mixed = train[split.mix(places["entry"][train], settings.mix, seed)]
        train = np.unique(mixed)
    for part, rows in (("train", mixed), ("held_out", held_out)):
        if not len(rows):
            raise errors.DataError(
                f"nothing is left to {'train on' if part == 'train' else 'hold out'}: "
                f"{counts.rejected} rows rejected (data.on_bad_row), "
                f"{counts.dropped} dropped (data.on_long)"
            )
        found = _examples_of(numbers, rows)
        order = np.empty(len(found), ORDER)
        order["example"], order["length"] = found, arrays.index["length"][found]
        order.tofile(folder / f"{part}.bin")
    parts = {part: _examples(folder, arrays, part) for part in ("train", "held_out")}
    findings = data_examples.open_findings(folder)

    def mark(kind: str, rows: np.ndarray) -> None:
        findings[_examples_of(numbers, rows)] |= to_bits([kind])

    for examples, rows in zip(parts.values(), (train, held_out), strict=True):
        repeated, near = duplicates.find_duplicates(told, rows)
        mark("duplicate", repeated)
        mark("near_duplicate", near["later"])
        lengths = np.asarray(examples.lengths)
        far = examples.order[lengths > outlier_length(lengths)]
        findings[far] |= to_bits(["length_outlier"])
    leaked, near_leaked = duplicates.find_leaks(told, train, held_out)
    mark("leaked", leaked)
    mark("near_leak", near_leaked)
    audited: dict[str, Any] = {
        part: summarise_part(tokenizer, examples, max_length(config))
        for part, examples in parts.items()
    }
    return audited | {
        "rejected": counts.rejected,
        "dropped": counts.dropped,
        "formats": dict(counts.formats.most_common()),
        "data_sha256": data_examples.examples_sha256(parts["train"]),
    }


def _examples_of(numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Indices of the examples of these rows, in the order of the rows; `numbers` never falls."""
    begins, ends = np.searchsorted(numbers, rows), np.searchsorted(numbers, rows, "right")
    sizes = ends - begins
    first = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
    return (first + np.arange(sizes.sum())).astype(np.int64)


# --- rendering on all cores --------------------------------------------------------------------


@dataclass
class _Rendered:
    """What a worker makes of some rows."""

    arrays: data_examples.Arrays  # of the examples; rows numbered from 0
    places: np.ndarray  # (good rows,) of PLACE
    told: duplicates.RowFingerprint  # of the good rows
    formats: Counter[str]  # of the good rows
    refused: list[BadRow]  # by the reader or by the chat template
    num_dropped: int  # by data.on_long


AnyRow = Row | BadRow
Work = Callable[[Sequence[AnyRow]], _Rendered]
Waiting = tuple[list[AnyRow], Future[_Rendered]]  # rows, and what a worker makes of them


def _map_chunks(work: Work, rows: Iterator[AnyRow]) -> Iterator[_Rendered]:
    """`work` on all rows, some at a time, in their order; in forked processes where there is enough
    to do and more than one core to do it. Only a few parts are in memory at a time."""
    parts = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    first = list(islice(parts, 4))
    workers = hardware.usable_cores()
    if workers < 2 or len(first) < 4:
        yield from map(work, first)
        yield from map(work, parts)
        return
    fork = multiprocessing.get_context("fork")  # the tokenizer is inherited, sending takes seconds
    with ProcessPoolExecutor(workers, fork, _start_worker, (work, os.getpid())) as pool:
        waiting: deque[Waiting] = deque()
        try:
            for part in chain(first, parts):
                if len(waiting) > 2 * workers:
                    yield waiting[0][1].result()
                    waiting.popleft()
                waiting.append((part, pool.submit(_run_work, part)))
            while waiting:
                yield waiting[0][1].result()
                waiting.popleft()
        except BrokenProcessPool:
            raise _killed_worker(
                [part for part, made in waiting if made.exception()][:workers]
            ) from None


def _killed_worker(parts: list[list[AnyRow]]) -> errors.DataError:
    """Of a worker, when these were worked on."""
    first, last = parts[0][0], parts[-1][-1]
    return errors.DataError(
        "a process that prepared data was killed, most likely for want of memory, when the rows "
        f"{first.file}:{first.line} to {last.file}:{last.line} were worked on; free some memory, "
        "or look there for very long ones"
    )


_inherited: list[Work] = []  # of a worker: its work


def _start_worker(work: Work, parent: int) -> None:
    children.prepare_worker(parent)
    _inherited.append(work)


def _run_work(part: Sequence[AnyRow]) -> _Rendered:
    return _inherited[-1](part)


def _render_rows(
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    supervise: template.Supervise,
    on_long: template.OnLong,
    rows: Sequence[AnyRow],
) -> _Rendered:
    refused: list[BadRow] = []
    good: list[Row] = []
    samples: list[tuple[int, Row, template.Example]] = []
    found: list[int] = []
    num_dropped = 0
    for row in rows:
        if isinstance(row, BadRow):
            refused.append(row)
            continue
        try:
            made = template.render_row(tokenizer, row, limit, supervise=supervise, on_long=on_long)
        except errors.DataError as error:
            excerpt = readers.make_excerpt(row.messages[-1]["content"].encode())
            refused.append(BadRow(row.file, row.line, str(error), excerpt))
            continue
        num_dropped += not made
        for shown, example in made:
            samples.append((len(good), shown, example))
            found.append(examine_row(tokenizer, shown, example, supervise))
        good.append(row)
    arrays = data_examples.pack(samples)
    seen = examine_tokens(tokenizer, data_examples.Examples(arrays), limit)
    arrays.index["findings"] = np.array(found, np.uint32) | seen
    places = np.array([(TRAIN, row.entry) for row in good], PLACE)
    formats = Counter(row.format for row in good)
    return _Rendered(arrays, places, duplicates.fingerprint(good), formats, refused, num_dropped)
