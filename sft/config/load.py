"""Loads and validates configurations: a file with its includes, then overrides. Imports no torch.

Loading raises *all* problems (YAML syntax, unknown keys, wrong types, missing keys, contradictions)
as one `ConfigError`, each with its dotted path and the place where it was written.
"""

from __future__ import annotations

import difflib
import io
import operator
import re
import typing
from collections.abc import Collection, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML

from sft.config import foreign
from sft.config.adapters import continue_adapter
from sft.config.aliases import ALIASES
from sft.config.benchmark import Benchmark
from sft.config.read import Reader, merge
from sft.config.reference import type_name
from sft.config.rules import rules_of
from sft.config.schema import (
    NESTED,
    Classify,
    Config,
    Configured,
    Generation,
    Group,
    RunConfig,
    Strategy,
    sections_of,
)
from sft.config.section import Origins, Section
from sft.errors import (
    URL,
    ConfigError,
    hide_credentials,
    redact_environment,
    shorten,
    suggest,
)

NULL = "tag:yaml.org,2002:null"
Alone = TypeVar("Alone", bound=Section)


def load_config(file: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Reads the configuration of a fine-tuning run; see `load_any`. None: no file, only overrides.

    Overrides are arguments such as `train.epochs=1`, `--train.epochs=1`, or `--epochs` and `1`.
    """
    others = "; `make plan`, `check`, `train`, `evaluate` and `verify-*` accept the other tasks"
    config = load_any(file, overrides, {Config.task: Config}, others)
    assert isinstance(config, Config)
    return config


def load_any(
    file: str | Path | None,
    overrides: list[str] | None,
    schemas: Mapping[str, type[RunConfig]],
    remedy: str = "",
) -> RunConfig:
    """Reads `file` with its `include:`s, applies overrides and validates.

    `schemas` has the schema for each accepted value of the key `task`; `remedy` ends the message
    about any other value. Raises ConfigError with every problem found.
    """
    reader = Reader()
    tree = {} if file is None else reader.read_file(Path(file))
    if not tree and reader.problems:  # what it should have is missing for this reason
        raise ConfigError("\n  ".join(reader.problems))
    task = tree.pop("task", Config.task)
    schema = schemas.get(task) if isinstance(task, str) else None
    sections = sections_of(schema or next(iter(schemas.values())))
    keys = {name: section.model_fields for name, section in sections.items()}
    if lines := foreign.explain(tree, keys):
        raise ConfigError("\n  ".join([f"{file}: {lines[0]}", *lines[1:]]))
    if schema is None:
        hint = remedy or f"; {suggest(str(task), list(schemas))}"
        place = f"task{_where('task', reader.origins)}"
        raise ConfigError(f"{place}: expected {' or '.join(schemas)}, found {shorten(task)}{hint}")
    merge(tree, reader.read_overrides(overrides or [], sections))
    _train_on_classified(tree)
    continue_adapter(tree, reader.origins, reader.problems)
    known = {name for each in schemas.values() for name in sections_of(each)}
    config, found = _validate(tree, schema, reader.origins, known)
    problems = reader.problems + found
    if problems or config is None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = [f"{file or 'overrides'}: {count} in the configuration", *problems]
        raise ConfigError("\n  ".join(lines))
    return config


def classified_rows(output_dir: str) -> dict[str, str]:
    """Returns the files into which `make classify` writes the training rows, by key of `data`."""
    return {
        "train_path": f"{output_dir}/train.jsonl",
        "eval_path": f"{output_dir}/validation.jsonl",
    }


def _train_on_classified(tree: dict) -> None:
    """Sets the paths in `data` to the files that `make classify` writes, unless they are given."""
    classify = tree.get("classify")
    if isinstance(classify, dict) and classify.get("path") is not None:
        folder = classify.get("output_dir", Classify().output_dir)
        data = tree.setdefault("data", {})
        for key, path in classified_rows(folder).items():
            if isinstance(data, dict):
                data.setdefault(key, path)


def make_generation(values: dict[str, Any]) -> Generation:
    """Validates settings of generation. Raises ConfigError with every problem found."""
    return _make_alone("generation", Generation, values)


def parse_generation(overrides: list[str]) -> Generation:
    """Reads settings of generation from overrides. Raises ConfigError with the problems found."""
    return _parse_alone("generation", Generation, overrides)


def parse_benchmark(overrides: list[str]) -> Benchmark:
    """Reads options of benchmarks from overrides. Raises ConfigError with the problems found."""
    return _parse_alone("benchmark", Benchmark, overrides)


def _parse_alone(name: str, section: type[Alone], overrides: list[str]) -> Alone:
    """Returns a section that is given by overrides only, and is part of no file."""
    reader = Reader()
    tree = reader.read_overrides(overrides, {name: section})
    strange = [each for each in tree if each != name]
    problems = [*reader.problems, *(f"{each}: expected {name}.key=value" for each in strange)]
    if problems:
        raise ConfigError("\n  ".join(["these settings cannot be used", *problems]))
    return _make_alone(name, section, tree.get(name, {}))


def _make_alone(name: str, section: type[Alone], values: dict[str, Any]) -> Alone:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        found = [item | {"loc": (name, *item["loc"])} for item in error.errors()]
        problems = [": ".join(_explain(item, Config)) for item in found]
        raise ConfigError("\n  ".join(["these settings cannot be used", *problems])) from None


def dump_config(config: RunConfig, reasons: dict[str, str] | None = None) -> str:
    """Returns YAML with every value; `reasons` (dotted path -> why) become comments.

    Credentials in addresses are hidden.
    """
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 10_000
    tree = yaml.map()
    if config.task != Config.task:
        tree["task"] = config.task
    for section, values in public_values(config).items():
        tree[section] = yaml.map()
        for key, value in values.items():
            tree[section][key] = value
            if reason := (reasons or {}).get(f"{section}.{key}"):
                tree[section].yaml_add_eol_comment(f"auto: {' '.join(reason.split())}", key)
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar(NULL, "null"))
    yaml.dump(tree, stream)
    return stream.getvalue()


def public_values(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Returns all values by section and key, without the credentials of addresses."""
    sections = config.model_dump().items()
    return {
        name: {key: _hide_credentials(value) for key, value in values.items()}
        for name, values in sections
    }


def _hide_credentials(value: Any) -> Any:
    """Returns a value without the credentials of the addresses that it is or lists."""
    if isinstance(value, list):
        return [_hide_credentials(item) for item in value]
    is_address = isinstance(value, str) and URL.fullmatch(value)
    return hide_credentials(value) if is_address else value


def with_values(config: Configured, values: dict[str, Any]) -> Configured:
    """Returns a copy in which the values at dotted paths are replaced, validated again."""
    tree = config.model_dump()
    for path, value in values.items():
        *sections, key = path.split(".")
        reduce(operator.getitem, sections, tree)[key] = value
    changed, problems = _validate(tree, type(config))
    if changed is None:
        raise ConfigError("\n  ".join(["these values do not fit the configuration", *problems]))
    return typing.cast(Configured, changed)


def _validate(
    tree: dict[str, Any],
    schema: type[RunConfig],
    origins: Origins | None = None,
    known: Collection[str] = (),
) -> tuple[RunConfig | None, list[str]]:
    """Returns (configuration or None, problems). `known`: names of the sections of all tasks."""
    problems: dict[str, str] = {}
    config: RunConfig | None = None
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        for path, reason in (_explain(item, schema, known) for item in error.errors()):
            problems.setdefault(path, reason)
    values = dict(_add_defaults(config.model_dump() if config else tree, schema))
    for rule in rules_of(schema):
        can_judge = all(path in values and path not in problems for path in rule.paths)
        if can_judge and rule.broken(*(values[path] for path in rule.paths)):
            problems[rule.paths[0]] = rule.message
    for path, value in values.items():
        if (shown := redact_environment(str(value))) != str(value):
            problems[path] = (
                f"holds the secret {shown}, which would be written into the run folder; set "
                "it in the environment, where libraries look for it"
            )
    lines = [f"{path}{_where(path, origins or {})}: {text}" for path, text in problems.items()]
    return None if problems else config, lines


def _add_defaults(tree: Any, section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) of the keys in a section: those given in `tree`, and defaults.

    So rules can judge an invalid tree, too.
    """
    given, nested = tree if isinstance(tree, dict) else {}, section.nested()
    for key, own in nested.items():
        yield from _add_defaults(given.get(key), own, f"{prefix}{key}.")
    fields = section.model_fields.items()
    defaults = {key: field.default for key, field in fields if not field.is_required()}
    yield from ((prefix + key, value) for key, value in (defaults | given).items())


def _where(path: str, origins: Origins) -> str:
    """Returns the place where a key was written, in brackets; "" if it was not."""
    return f" ({origins[path]})" if path in origins else ""


def _locate(
    location: tuple[int | str, ...], schema: type[RunConfig]
) -> tuple[str, type[Section] | None, str]:
    """Returns (dotted path, section, key) of an error of pydantic.

    Whatever pydantic appends to a key (the member of a union, the index in a list) is dropped.
    """
    parts = [*map(str, location)]
    section, at = {**sections_of(schema), **NESTED}.get(parts[0]), 1
    if parts[0] == "classify" and parts[1:2] == ["strategies"] and len(parts) > 2:
        section, at = Strategy, 3
    while section and len(parts) > at + 1 and (inner := section.nested().get(parts[at])):
        section, at = inner, at + 1
    if parts[:2] == ["train", "groups"] and len(parts) > 3:
        section, at = Group, 3
    return ".".join(parts[: at + 1]), section, "".join(parts[at : at + 1])


def _explain(item: Any, schema: type[RunConfig], known: Collection[str] = ()) -> tuple[str, str]:
    """Returns (dotted path, what is wrong there) for an error of pydantic."""
    path, section, key = _locate(item["loc"], schema)
    fields = section.model_fields if section else {}
    kind, found = item["type"], item["input"]
    if kind == "extra_forbidden":
        word = key or str(item["loc"][0])  # may contain a dot
        if section and word in section.refused:
            return path, f"not supported: {section.refused[word]}"
        return path, f"unknown key; {_hint(word, list(fields), schema, known)}"
    if kind == "missing":
        about = f": {fields[key].description}" if key else ""
        return path, f"required, and not given{about}"
    if kind == "value_error":
        return path, str(item["ctx"]["error"])
    if not key:
        return path, f"expected a section with keys, found {found!r}"
    text = f"expected {type_name(fields[key])}, found {shorten(found)}"
    if kind == "literal_error" and isinstance(found, str):
        words = re.findall(r"'([^']+)'", item["ctx"]["expected"])
        if near := difflib.get_close_matches(found, words, n=1, cutoff=0.5):
            text += f"; did you mean {near[0]}?"
    return path, text


def _hint(word: str, keys: list[str], schema: type[RunConfig], known: Collection[str]) -> str:
    """Returns a hint on an unknown key of a section with `keys`, or on an unknown section."""
    sections = sections_of(schema)
    if "." in word:
        return "in a file, write the section, and the key below it"
    if not keys and word in known:
        return f"task: {schema.task} has no such section"
    elsewhere = [path for path, _, key in schema.paths() if "." in path and key == word]
    elsewhere += [ALIASES[word].key] if word in ALIASES else []
    return f"did you mean {elsewhere[0]}?" if elsewhere else suggest(word, keys or [*sections])
