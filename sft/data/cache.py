"""Turns files into verified examples on disk, before any weights or process group exist.

Examples are a function of the files' contents, the tokenizer with its template, the section `data`
and this code. A hash of all these names a folder in `data.cache_dir`. One process fills it under
a lock, completely or not at all. All other processes and later runs only map its files.

Rows are read once, rendered and examined on all cores, and appended to a store (`data/examples`).
Then the fingerprints of all rows decide duplicates, split, mix and leaks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft import errors
from sft.config.schema import Config, Data, Model
from sft.data import audit, audit_report, duplicates, files, remote, split, template, workers
from sft.data.audit_report import Sample
from sft.data.examples import (
    ExampleArrays,
    Examples,
    append_array,
    examples_sha256,
    map_array,
    open_findings,
)
from sft.data.files import BadRow
from sft.data.workers import HELD_OUT, PLACE, REPLAY, TRAIN, AnyRow
from sft.models import pretrained, vocabulary
from sft.runtime import checkpoint, plain
from sft.runtime.console import bar, make_console, write_json
from sft.runtime.plain import read_json

ROWS = "rows"  # folder of the rows' fingerprints, removed at the end
KEPT = 16  # folders in the cache
KEY = re.compile("[0-9a-f]{24}")  # their names
MOST_COLUMNS = 1000  # that are counted, if the rows have that many
ORDER = np.dtype([("example", np.int64), ("length", np.int32)])  # an example of a part
MOST_REPLAYED = 0.4  # data.replay.share: auto chooses no larger one (sft/verify/share.py)
MADE_OF = ("train", "eval", "replay")  # files among the inputs
NOT_READ: dict[
    str, Any
] = {  # by the examples: only the contents of files matter, and replay says how often
    **dict.fromkeys(("train_path", "eval_path", "audit", "cache_dir"), True),
    "replay": {"path"},
}
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow", "datasets", "numpy")


@dataclass(frozen=True)
class Prepared:
    """Tokenised data, with the contents of `audit.json`."""

    tokenizer: Tokenizer
    train: Examples
    held_out: Examples
    audit: dict[str, Any]
    rejected: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))  # JSON lines
    folder: Path | None = None  # folder in the cache
    validation: Examples | None = None  # rows that are kept from training

    def samples(self) -> list[Sample]:
        """Returns the rows with the most findings, to be shown to people."""
        return audit_report.pick_samples(self.train) + audit_report.pick_samples(self.held_out, 5)


def prepare(config: Config, on_progress: Callable[[], None] = lambda: None) -> Prepared:
    """Maps the examples of `config`. If they are not in the cache, prepares them from the rows.

    `on_progress` is called whenever there is progress. Raises DataError for rows that cannot be
    trained on or that the audit refuses, and for a stale or damaged folder in the cache. With
    `data.audit: warn` such a folder is prepared again.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are already parallel
    tokenizer = load_tokenizer(config)
    for path in files.row_paths(config.data):
        files.list_files(path, config.data.cache_dir, on_progress)  # fetches remote ones
    made_of = cache_inputs(config, tokenizer)
    folder = Path(config.data.cache_dir, cache_key(made_of))
    with _as_data_error(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            fault = _find_fault(folder, made_of, config.data.audit) if folder.exists() else None
            if fault and config.data.audit == "refuse":
                raise errors.DataError(
                    f"the prepared data in {folder} are stale or damaged: {fault}; remove the "
                    "folder, or run `make audit` to prepare them again"
                )
            if fault:
                make_console().print(f"prepared data were stale or damaged ({fault}): made anew")
            if fault or not folder.exists():
                _fill(config, tokenizer, folder, made_of, on_progress)
            prepared = _open(folder, tokenizer)
    _prune(folder.parent)
    _refuse_unknown_ids(config.model, prepared)
    prepared.audit["new_tokens"] = count_new_tokens(config, prepared)
    prepared.audit["hidden_files"] = hidden = files.hidden_files(config.data)
    if hidden and os.environ.get("RANK", "0") == "0":
        make_console().print(f"not read: {files.describe_hidden(hidden)}")
    if config.data.audit == "refuse":
        audit_report.refuse(prepared.audit)
    return prepared


def _refuse_unknown_ids(config: Model, prepared: Prepared) -> None:
    """Raises DataError for a row with a token for which the model has no embedding."""
    tokenizer = prepared.tokenizer
    model = SimpleNamespace(config=pretrained.architecture(config))
    find = partial(
        vocabulary.unknown_id, model=model, tokenizer=tokenizer, new_tokens=config.new_tokens
    )
    if not find([max(tokenizer.get_vocab().values())]):  # as for nearly all models
        return
    if not find([prepared.train.arrays.ids.max()]):
        return
    for part in (prepared.train, prepared.held_out):
        for number in range(len(part)):
            if problem := find([part.tokens(number)[0].max()]):
                raise errors.DataError(f"{part.row(number).place}: {problem}")


def count_new_tokens(config: Config, prepared: Prepared) -> dict[str, int]:
    """Returns how often each of `model.new_tokens` is supervised in the training rows."""
    arrays, ids = prepared.train.arrays, prepared.tokenizer.get_vocab()
    counts = {}
    for token in config.model.new_tokens or ():
        places = np.flatnonzero(arrays.labels == ids[token])
        examples = np.searchsorted(arrays.index["start"], places, side="right") - 1
        counts[token] = int(np.isin(examples, prepared.train.order).sum())
    return counts


def with_validation(prepared: Prepared, share: float) -> Prepared:
    """Moves a share of the training rows, evenly spread and at least one, to `validation`.

    Raises DataError if there are fewer than two rows.
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


def load_tokenizer(config: Config) -> Tokenizer:
    """Loads the tokenizer with the chat template that `config` gives it."""
    data = config.data
    return template.prepare_tokenizer(
        pretrained.load_tokenizer(config.model), data.chat_template, data.template_kwargs
    )


@contextmanager
def _as_data_error(cache: Path) -> Iterator[None]:
    """Turns an error of the disk into a DataError with one message."""
    try:
        yield
    except OSError as error:
        raise errors.DataError(
            f"cannot keep prepared data in {cache}: {error.strerror or error}; make room, or set "
            "data.cache_dir to another folder"
        ) from None


def _open(folder: Path, tokenizer: Tokenizer) -> Prepared:
    arrays, audited = ExampleArrays.open(folder), (folder / "audit.json").read_text("utf-8")
    train, held_out = (_examples(folder, arrays, part) for part in ("train", "held_out"))
    rejected = map_array(folder / "rejected.jsonl", np.uint8)
    os.utime(folder)
    return Prepared(tokenizer, train, held_out, json.loads(audited), rejected, folder)


def _examples(folder: Path, arrays: ExampleArrays, part: str) -> Examples:
    order = map_array(folder / f"{part}.bin", ORDER)
    return Examples(arrays, order["example"], order["length"])


def _prune(cache: Path) -> None:
    """Removes the least recently used folders, unfinished ones of killed processes, and copies of
    remote files that no folder was made of.

    Removes only folders that are named by `cache_key` and hold what a manifest names. A process
    that has already mapped a folder can still read it. One that is about to map it holds its lock.
    """
    with suppress(OSError):  # another process may be removing the same folders
        made = [path for path in cache.iterdir() if KEY.fullmatch(path.name)]
        old = sorted(made, key=lambda path: -path.stat().st_mtime)[KEPT:]
        for folder in [*old, *checkpoint.scratch_folder(cache).glob("*")]:
            with suppress(Timeout), FileLock(cache / f"{folder.name[:24]}.lock", timeout=0):
                if folder.parent != cache:
                    checkpoint.clear_scratch(cache, folder.name)
                elif checkpoint.is_ours(folder):
                    checkpoint.remove(folder)
        remote.prune(cache, lambda: _digests_used(cache))


def _digests_used(cache: Path) -> set[str]:
    """Returns the digests of the files that the prepared data in a cache were made of."""
    inputs = [read_json(path).get("inputs", {}) for path in cache.glob("*/audit.json")]
    made_of = [file for each in inputs for part in MADE_OF for file in each.get(part, [])]
    return {str(file.get("digest")) for file in made_of}


def write_audit(prepared: Prepared, folder: Path) -> None:
    """Writes audit.json, audit.html, and rejected.jsonl if rows were skipped."""
    write_json(folder / "audit.json", prepared.audit)
    audit_report.write_html(
        folder / "audit.html", prepared.tokenizer, prepared.audit, prepared.samples()
    )
    (folder / "rejected.jsonl").unlink(missing_ok=True)
    if len(prepared.rejected):
        with plain.open_file(folder / "rejected.jsonl", "wb") as file:
            prepared.rejected.tofile(file)


def max_length(config: Config) -> int:
    """Returns the maximum length of an example: `data.max_seq_len`, or the positions if fewer."""
    positions = getattr(pretrained.architecture(config.model), "max_position_embeddings", None)
    return min(config.data.max_seq_len, positions or config.data.max_seq_len)


def cache_inputs(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns everything that the examples and their audit depend on, and nothing else."""
    section = config.data
    source = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    is_drawn = section.mix or section.replay.path or not section.eval_path
    return {
        "train": files.file_digests(section.train_path, section.cache_dir),
        "eval": files.file_digests(section.eval_path or [], section.cache_dir),
        "replay": files.file_digests(section.replay.path or [], section.cache_dir),
        "options": section.model_dump(exclude=NOT_READ),
        "max_length": max_length(config),
        "group": config.evaluation.group,
        "seed": config.train.seed if is_drawn else None,
        "tokenizer": audit.tokenizer_sha256(tokenizer),
        "template": audit.template_sha256(tokenizer),
        "code": hashlib.sha256(source).hexdigest(),
        "format": checkpoint.FORMAT,  # of the folder's manifest
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def cache_key(made_of: dict[str, Any]) -> str:
    """Returns the name of the folder for these inputs."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]


def _find_fault(folder: Path, made_of: dict[str, Any], policy: str) -> str | None:
    """Returns why the prepared data in `folder` are not what `made_of` makes, or None."""
    # Only the first process of a machine reads all bytes. If it refuses them, no process trains.
    # With `warn` the data are prepared again, so all processes must agree that they are damaged.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if reason := checkpoint.fault(folder, digests=is_first or policy == "warn"):
        return reason
    was = json.loads((folder / "audit.json").read_text("utf-8"))["inputs"]
    changed = [name for name in made_of if was.get(name) != made_of[name]]
    return f"made of another {', '.join(changed)}" if changed else None


def _fill(
    config: Config,
    tokenizer: Tokenizer,
    folder: Path,
    made_of: dict[str, Any],
    on_progress: Callable[[], None],
) -> None:
    if config.evaluation.group:  # refused before any row is rendered
        scored = config.data.eval_path or config.data.train_path
        options = {"cache_dir": config.data.cache_dir, "csv_delimiter": config.data.csv_delimiter}
        files.check_column(scored, config.evaluation.group, "evaluation.group", **options)
    files.check_columns(config.data)
    staging = checkpoint.make_staging(folder)
    try:
        counts = _write_rows(config, tokenizer, staging, on_progress)
        again = cache_inputs(config, tokenizer)
        keys = {"train": "train_path", "eval": "eval_path", "replay": "replay.path"}
        if changed := [key for name, key in keys.items() if again[name] != made_of[name]]:
            raise errors.DataError(
                f"the files of data.{changed[0]} changed while they were read; start again"
            )
        audited = _decide(config, tokenizer, staging, counts) | {"inputs": made_of}
        (staging / "audit.json").write_text(json.dumps(audited, ensure_ascii=False), "utf-8")
        shutil.rmtree(staging / ROWS)
        checkpoint.seal(staging, folder)
    finally:
        checkpoint.clear_scratch(folder.parent, staging.name)


@dataclass
class _Counts:
    rows: int = 0  # good rows, including dropped ones
    dropped: int = 0  # rows, by data.on_long
    left_out: Counter[str] = field(default_factory=Counter)  # rows without a turn to learn, by why
    split: Counter[str] = field(default_factory=Counter)  # rows, examples and further tokens
    rejected: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)  # columns that are not used


def _write_rows(
    config: Config,
    tokenizer: Tokenizer,
    folder: Path,
    on_progress: Callable[[], None],
) -> _Counts:
    """Writes the examples of all rows into `folder`, and the rows' fingerprints into `rows`."""
    data, row_folder = config.data, folder / ROWS
    given = {TRAIN: data.train_path, HELD_OUT: data.eval_path, REPLAY: data.replay.path}
    paths = {part: path for part, path in given.items() if path}
    render = partial(workers.render_rows, tokenizer, max_length(config), render_options(data))
    counts, first = _Counts(), list[BadRow]()
    row_folder.mkdir()
    with (
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
        bar(make_console(), "prepare", _num_rows(data, [*paths.values()])) as advance,
    ):
        for part, path in paths.items():
            most = data.max_rows if part == TRAIN else None
            options = files.read_options(data) | {"group": config.evaluation.group}
            if part == REPLAY:  # what the section says of columns and prompts is about other rows
                options = {key: options[key] for key in ("cache_dir", "csv_delimiter")}
            rows: Iterator[AnyRow] = islice(files.read_all(path, **options), most)
            share = data.eval_fraction if part == TRAIN and not data.eval_path else 0
            document, rows = workers.only_document(rows) if share else (None, rows)
            chunks = (
                [workers.render_split_document(tokenizer, document, max_length(config), share)]
                if document
                else workers.map_chunks(render, rows)
            )
            for chunk in chunks:
                files.write_rejected(chunk.refused, rejected)
                counts.rejected += len(chunk.refused)
                first += chunk.refused[: 10 - len(first)]
                if not document:
                    chunk.places["part"] = part
                chunk.arrays.index["row"] += counts.rows
                counts.rows += len(chunk.places)
                counts.dropped += chunk.num_dropped
                counts.left_out += chunk.left_out
                counts.split += chunk.split
                counts.formats += chunk.formats
                counts.ignored += chunk.ignored
                counts.ignored = Counter(dict(counts.ignored.most_common(MOST_COLUMNS)))
                chunk.arrays.append_to(folder)
                append_array(row_folder / "places.bin", chunk.places)
                chunk.fingerprint.append_to(row_folder)
                advance(len(chunk.places) + len(chunk.refused))
                on_progress()
    if counts.rejected and (data.on_bad_row == "error" or not counts.rows):
        raise errors.DataError.from_rows(
            first[0].file, [str(row) for row in first], counts.rejected
        )
    return counts


def render_options(data: Data) -> dict[str, Any]:
    """Returns the options of `template.render_row` that the section `data` gives."""
    return {
        "supervise": data.supervise,
        "on_long": data.on_long,
        "turns": data.turns,
        "empty_thoughts": data.empty_thoughts,
    }


def _num_rows(settings: Data, paths: list[str | list[str]]) -> int | None:
    """Returns the approximate number of rows to read, or None if it is not known."""
    numbers = [files.num_rows(path, settings.cache_dir) for path in paths]
    if not all(numbers):
        return None
    train, *others = [number or 0 for number in numbers]
    return min(train, settings.max_rows or train) + sum(others)


def _decide(config: Config, tokenizer: Tokenizer, folder: Path, counts: _Counts) -> dict[str, Any]:
    """Chooses the examples to train on (`train.bin`) and to hold out (`held_out.bin`).

    Marks the findings that depend on all rows, and returns the contents of `audit.json`.
    """
    known = duplicates.RowFingerprint.open(folder / ROWS)
    arrays = ExampleArrays.open(folder)
    numbers = np.array(arrays.index["row"])  # the row of each example
    mixed, train, held_out = _choose_rows(config, folder, known.digests, numbers)
    for part, rows in (("train", mixed), ("held_out", held_out)):
        if not len(rows):
            raise errors.DataError(
                f"nothing is left to {'train on' if part == 'train' else 'hold out'}: "
                f"{counts.rejected} rows rejected (data.on_bad_row), "
                f"{counts.dropped} dropped (data.on_long)"
                + "".join(f", {count} left out ({why})" for why, count in counts.left_out.items())
            )
        found = _examples_of(numbers, rows)
        order = np.empty(len(found), ORDER)
        order["example"], order["length"] = found, arrays.index["length"][found]
        order.tofile(folder / f"{part}.bin")
    parts = {part: _examples(folder, arrays, part) for part in ("train", "held_out")}
    for kind, examples in _find_across(known, numbers, [*parts.values()], train, held_out):
        open_findings(folder)[examples] |= audit.to_bits([kind])
    limit, about = max_length(config), audit_report.summarise_part
    return {part: about(tokenizer, each, limit) for part, each in parts.items()} | {
        "rejected": counts.rejected,
        "dropped": counts.dropped,
        "left_out": dict(counts.left_out),
        "split": dict(counts.split),
        "template_adds": template.added_by_template(tokenizer),
        "formats": dict(counts.formats.most_common()),
        "ignored_columns": {n: c / counts.rows for n, c in counts.ignored.most_common()},
        "data_sha256": examples_sha256(parts["train"]),
    }


def _choose_rows(
    config: Config, folder: Path, digests: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rows to train on as often as `data.mix` says, each of them once, and the held-out
    ones. `numbers` (examples,) is the row of each example; rows without one were dropped."""
    data, seed = config.data, config.train.seed
    places = map_array(folder / ROWS / "places.bin", PLACE)
    is_kept = np.isin(np.arange(len(places)), numbers)
    train, held_out = (
        np.flatnonzero((places["part"] == part) & is_kept) for part in (TRAIN, HELD_OUT)
    )
    if data.duplicates == "drop":
        train = train[split.is_first(digests[train])]
    if not data.eval_path and len(train) and not len(held_out):
        held = split.split(digests[train], data.eval_fraction, seed)
        train, held_out = train[~held], train[held]
    mixed = train
    if data.mix:
        mixed = train[split.mix(places["entry"][train], data.mix, seed)]
        train = np.unique(mixed)
    if data.replay.path:
        replayed = np.flatnonzero((places["part"] == REPLAY) & is_kept)
        if not len(replayed):
            raise errors.DataError("data.replay.path: no row is left to replay")
        share = MOST_REPLAYED if data.replay.share == "auto" else data.replay.share
        mixed = split.add_share(mixed, replayed, share, seed)
        train = np.unique(mixed)
    return mixed, train, held_out


def _find_across(
    known: duplicates.RowFingerprint,
    numbers: np.ndarray,
    parts: list[Examples],
    train: np.ndarray,
    held_out: np.ndarray,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (kind, examples) of the findings that depend on all rows."""
    for examples, rows in zip(parts, (train, held_out), strict=True):
        repeated, near = duplicates.find_duplicates(known, rows)
        yield "duplicate", _examples_of(numbers, repeated)
        yield "near_duplicate", _examples_of(numbers, near["later"])
        lengths = np.asarray(examples.lengths)
        yield "length_outlier", examples.order[lengths > audit.outlier_length(lengths)]
    leaked, near_leaked = duplicates.find_leaks(known, train, held_out)
    yield "leaked", _examples_of(numbers, leaked)
    yield "near_leak", _examples_of(numbers, near_leaked)


def _examples_of(numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the indices of the examples of these rows, in the order of the rows.

    `numbers` (examples,), ascending, is the row of each example.
    """
    starts, ends = np.searchsorted(numbers, rows), np.searchsorted(numbers, rows, "right")
    sizes = ends - starts
    first = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return (first + np.arange(sizes.sum())).astype(np.int64)
