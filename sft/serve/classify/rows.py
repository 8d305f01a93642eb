"""Reads texts and their labels, splits them into parts, and makes conversations of them.

All errors are reported before a model is loaded: a wrong column, a label that is not listed, an
unknown strategy. The parts depend on the rows and a seed, not on the rows' order. Rows that share
an id stay in one part: a test text that almost repeats a training text would measure memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sft.config.load import classified_rows
from sft.config.schema import Classify, Config, Model, Strategy
from sft.data.files import missing_column, read_raw
from sft.data.messages import Messages, error_reason, scalar_text
from sft.errors import ConfigError, DataError, redact, suggest
from sft.evaluate.labels import label_of, letters
from sft.runtime.console import atomic_write

Parts = dict[str, list["LabelledText"]]  # test, validation, train
NAME = re.compile(r"\w[\w.-]*")  # of a strategy, and of the folder with its answers


class LabelledText(NamedTuple):
    """A text with its label."""

    text: str
    label: str
    group: str
    place: str  # file:line
    ids: tuple[str, ...] = ()  # rows that share one stay together


def check_section(config: Config, *, tune: bool = False) -> None:
    """Raises ConfigError with all that is wrong in the section `classify`. Reads no data."""
    settings = config.classify
    if settings.path is None:
        raise ConfigError(
            "classify.path: required, and not given: the file of texts and labels; "
            "CONFIG=configs/classify_hatecheck.yaml shows a section classify"
        )
    problems = [*_label_problems(settings), *_strategy_problems(settings), *_other_problems(config)]
    if tune and settings.tune is None:
        problems.append("classify.tune: TUNE=1 needs the name of a strategy, found none")
    if tune and settings.part == "all":
        problems.append(
            "classify.part: all has the rows in it that TUNE=1 trains on; set test or validation"
        )
    if problems:
        raise ConfigError("classify cannot be run\n  " + "\n  ".join(problems))


def _label_problems(settings: Classify) -> Iterator[str]:
    shown = ", ".join(settings.labels) or "none"
    if len({letters(label) for label in settings.labels} - {""}) < max(2, len(settings.labels)):
        yield f"classify.labels: expected two or more that differ in their letters, found {shown}"
    if settings.test_fraction + settings.validation_fraction >= 1:
        yield "classify.test_fraction: with validation_fraction it leaves no rows to train on"


def _strategy_problems(settings: Classify) -> Iterator[str]:
    known = settings.strategies
    if not known:
        yield "classify.strategies: expected at least one, found none"
    for key, names in (("use", settings.use or []), ("tune", [settings.tune])):
        for name in names:
            if known and name is not None and name not in known:
                yield f"classify.{key}: no strategy {name!r}; {suggest(name, [*known])}"
    for name, strategy in known.items():
        at = f"classify.strategies.{name}"
        if not NAME.fullmatch(name):
            yield f"{at}: expected a name of letters, digits, '_', '.' and '-'"
        if "{text}" not in strategy.user:
            yield f"{at}.user: expected {{text}} where the text stands, found {strategy.user!r}"
        answers = {label: strategy.answer.replace("{label}", label) for label in settings.labels}
        if any(label_of(answer, settings.labels) != label for label, answer in answers.items()):
            yield (
                f"{at}.answer: expected an answer in which each label is found again, found "
                f"{strategy.answer!r}; plain is '{{label}}', JSON is '{{\"label\": \"{{label}}\"}}'"
            )


def _other_problems(config: Config) -> Iterator[str]:
    """Yields a problem for each key that would be ignored."""
    for key, value in config.model.model_dump().items():
        if key != "name" and value != Model.model_fields[key].default:
            yield f"model.{key}: make classify loads a model by its name alone; remove this key"
    for key, path in classified_rows(config.classify.output_dir).items():
        found = config.data.model_dump()[key]
        if found != path:
            yield f"data.{key}: make classify writes {path}; remove this key, found {found!r}"


def read_examples(settings: Classify) -> list[LabelledText]:
    """Returns all rows of `settings.path`, in their order. Raises DataError with every bad one."""
    path, rows, bad = redact(str(settings.path)), [], []
    for place, row in read_raw(settings.path or ""):
        if isinstance(row, dict):
            rows.append((place, row))
        else:
            is_error = isinstance(row, ValueError | RecursionError)
            bad.append(f"{place}: {error_reason(row) if is_error else 'expected columns'}")
    known = {column for _, row in rows for column in row}
    columns = [(key, getattr(settings, key)) for key in ("text", "label", "group")]
    columns += [("split_by", column) for column in settings.split_by]
    for key, column in columns:
        if column is not None and column not in known:
            raise missing_column(path, column, f"classify.{key}", known)
    examples = []
    for place, row in rows:
        text, label = scalar_text(row.get(settings.text)), scalar_text(row.get(settings.label))
        if not text.strip() or not label:
            empty = settings.label if text.strip() else settings.text
            bad.append(f"{place}: the column {empty!r} is empty")
        group = scalar_text(row.get(settings.group)) if settings.group else ""
        ids = [scalar_text(row.get(column)) for column in settings.split_by]
        examples.append(LabelledText(text, label, group, place, tuple(filter(None, ids))))
    if not {example.label for example in examples} & {*settings.labels}:
        raise DataError(
            f"{path}: no label in it is one of classify.labels: the column {settings.label!r} has "
            f"{_list_labels({example.label for example in examples})}, classify.labels are "
            f"{_list_labels(settings.labels)}"
        )
    bad += [
        f"{each.place}: the label {each.label!r} is not in classify.labels; "
        + suggest(each.label, settings.labels)
        for each in examples
        if each.label and each.label not in settings.labels
    ]
    if bad:
        raise DataError.from_rows(path, bad)
    return examples


def _list_labels(labels: Iterable[str]) -> str:
    """Returns ten of the labels as text, and the number of the others."""
    found = sorted(labels)
    return ", ".join(map(repr, found[:10])) + (f" and {len(found) - 10} more" * (len(found) > 10))


def split_parts(examples: Sequence[LabelledText], settings: Classify) -> Parts:
    """Returns test, validation and training part, each with about its share of every label.

    Families (rows that share a text or an id, directly or through others) stay whole; their order
    depends on the seed and their texts only. Raises DataError if there are too few.
    """
    by_label = defaultdict(list)  # families, by their most common label
    for family in sorted(_find_families(examples), key=partial(_smallest_digest, settings.seed)):
        by_label[most_common_label(family)].append(family)
    shares = {"test": settings.test_fraction, "validation": settings.validation_fraction}
    part_of: dict[str, str] = {}
    for families in by_label.values():
        total, sizes = sum(map(len, families)), Counter[str]()
        for family in families:
            unfilled = (part for part, share in shares.items() if sizes[part] < share * total)
            part = next(unfilled, "train")
            sizes[part] += len(family)
            part_of |= {example.text: part for example in family}
    parts: Parts = {"test": [], "validation": [], "train": []}
    for example in examples:
        parts[part_of[example.text]].append(example)
    if empty := [part for part, own in parts.items() if not own]:
        num_families = sum(map(len, by_label.values()))
        raise DataError(
            f"{redact(str(settings.path))}: expected rows for three parts, found none for "
            f"{empty[0]}: {len(examples):,} rows are {num_families:,} families that stay together "
            "(classify.split_by); give more rows, or other fractions"
        )
    return parts


def _find_families(examples: Sequence[LabelledText]) -> list[list[LabelledText]]:
    """Returns groups of rows that are connected by equal texts or ids."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[tuple[str, str], int] = {}  # the first row with a text or an id
    rows, same = [], []  # a row, and the first row with its text or one of its ids
    for number, example in enumerate(examples):
        for key in [("text", example.text), *(("id", name) for name in example.ids)]:
            rows.append(number)
            same.append(first.setdefault(key, number))
    graph = coo_array(([True] * len(rows), (rows, same)), shape=(len(examples),) * 2)
    families = defaultdict(list)
    for example, family in zip(examples, connected_components(graph, False)[1], strict=True):
        families[family].append(example)
    return list(families.values())


def _smallest_digest(seed: int, family: list[LabelledText]) -> str:
    digests = (hashlib.sha256(f"{seed} {example.text}".encode()) for example in family)
    return min(digest.hexdigest() for digest in digests)


def most_common_label(examples: Sequence[LabelledText]) -> str:
    """Returns the most common label; of equally common ones the first by name."""
    count = Counter(example.label for example in examples)
    return max(sorted(count), key=count.__getitem__)


def make_messages(strategy: Strategy, text: str) -> Messages:
    """Returns the conversation that asks for the label of a text."""
    user = {"role": "user", "content": strategy.user.replace("{text}", text)}
    return [*([{"role": "system", "content": strategy.system}] if strategy.system else []), user]


def write_conversations(parts: Parts, config: Config) -> None:
    """Writes training and validation part as conversations of the strategy `classify.tune`."""
    settings = config.classify
    strategy = settings.strategies[str(settings.tune)]
    paths = classified_rows(settings.output_dir)
    for part, key in (("train", "train_path"), ("validation", "eval_path")):
        file = Path(paths[key])
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as rows:
            for example in parts[part]:
                answer = strategy.answer.replace("{label}", example.label)
                turns = make_messages(strategy, example.text)
                turns.append({"role": "assistant", "content": answer})
                rows.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
