"""Reads, merges and validates configuration files and overrides. Imports no torch.

Loading collects *all* problems (YAML syntax, unknown keys, wrong types, missing keys,
contradictions) and raises them as one `ConfigError`, each with its dotted path and the place where
it was written.
"""

from __future__ import annotations

import difflib
import io
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sft.config.aliases import ALIASES, replace_aliases
from sft.config.flags import Sections, parse_overrides
from sft.config.reference import _type_name
from sft.config.rules import rules_of
from sft.config.schema import (
    NESTED,
    Classify,
    Config,
    Configured,
    Generation,
    Origins,
    Refused,
    RunConfig,
    Section,
    Strategy,
    sections_of,
)
from sft.errors import ConfigError, redact, shorten, suggest


def load_config(file: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Reads `file` (with its `include:`s; None: nothing), applies overrides and validates.

    Overrides are words such as `train.epochs=1`, `--train.epochs=1`, or `--epochs` and `1`. Raises
    ConfigError with every problem found, and for another task than fine-tuning.
    """
    others = "; `make plan`, `check`, `train`, `evaluate` and `verify-*` know the other tasks"
    config = load_any(file, overrides, {Config.task: Config}, others)
    assert isinstance(config, Config)
    return config


def load_any(
    file: str | Path | None,
    overrides: list[str] | None,
    schemas: Mapping[str, type[RunConfig]],
    remedy: str = "",
) -> RunConfig:
    """Reads a configuration of any task; `schemas` has the schema for each value of the key `task`.

    Raises ConfigError with every problem found; `remedy` ends the message for another task.
    """
    problems: list[str] = []
    origins: Origins = {}
    tree = {} if file is None else _read(Path(file), origins, problems, seen=())
    task = tree.pop("task", Config.task)
    if task not in schemas:
        hint = remedy or f"; {suggest(str(task), list(schemas))}"
        expected = " or ".join(schemas)
        raise ConfigError(
            f"task{_where('task', origins)}: expected {expected}, found {shorten(task)}{hint}"
        )
    schema = schemas[task]
    _merge(tree, _read_overrides(overrides or [], sections_of(schema), origins, problems))
    _train_on_classified(tree)
    config, found = _validate(tree, origins, schema, sections_of_all(schemas.values()))
    problems += found
    if problems or config is None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(
            f"{file or 'overrides'}: {count} in the configuration\n  " + "\n  ".join(problems)
        )
    return config


def classified_rows(output_dir: str) -> dict[str, str]:
    """Where `make classify` writes the rows to train on, by the key of `data` that reads them."""
    return {
        "train_path": f"{output_dir}/train.jsonl",
        "eval_path": f"{output_dir}/validation.jsonl",
    }


def sections_of_all(schemas: Iterable[type[RunConfig]]) -> set[str]:
    """Returns the names of the sections of all tasks."""
    return {name for schema in schemas for name in sections_of(schema)}


def _train_on_classified(tree: dict) -> None:
    """A file that says what to classify need not say where the rows to train on will be."""
    classify = tree.get("classify")
    if isinstance(classify, dict) and classify.get("path") is not None:
        folder = classify.get("output_dir", Classify().output_dir)
        data = tree.setdefault("data", {})
        for key, path in classified_rows(folder).items():
            if isinstance(data, dict):
                data.setdefault(key, path)


def generation(values: dict[str, Any], where: str = "generation") -> Generation:
    """Settings of generation by name. Raises ConfigError with every problem found."""
    try:
        return Generation.model_validate(values)
    except ValidationError as error:
        found = [item | {"loc": ("generation", *item["loc"])} for item in error.errors()]
        problems = [_explain(f"{where}.{item['loc'][1]}", item, {}) for item in found]
        raise ConfigError("\n  ".join(["these settings cannot be used", *problems])) from None


def generation_of(overrides: list[str]) -> Generation:
    """Settings of generation from overrides. Raises ConfigError likewise."""
    problems: list[str] = []
    tree = _read_overrides(overrides, {"generation": Generation}, {}, problems)
    problems += [f"{name}: expected generation.key=value" for name in tree if name != "generation"]
    if problems:
        raise ConfigError("\n  ".join(["these settings cannot be used", *problems]))
    return generation(tree.get("generation", {}))


def dump_config(config: RunConfig, reasons: dict[str, str] | None = None) -> str:
    """YAML of every value; `reasons` (dotted path -> why) become comments."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 10_000
    tree = yaml.map()
    if config.task != Config.task:
        tree["task"] = config.task
    for section, values in config.model_dump().items():
        tree[section] = yaml.map()
        for key, value in values.items():
            tree[section][key] = value
            if reason := (reasons or {}).get(f"{section}.{key}"):
                tree[section].yaml_add_eol_comment(f"auto: {' '.join(reason.split())}", key)
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar(_NULL, "null"))
    yaml.dump(tree, stream)
    return stream.getvalue()


def with_values(config: Configured, values: dict[str, Any]) -> Configured:
    """A copy with values at dotted paths replaced, validated again."""
    tree = config.model_dump()
    for path, value in values.items():
        section, key = path.split(".")
        tree[section][key] = value
    changed, problems = _validate(tree, {}, type(config))
    if changed is None:
        raise ConfigError("\n  ".join(["these values do not fit the configuration", *problems]))
    return typing.cast(Configured, changed)


# --- reading -----------------------------------------------------------------------------------

_NULL = "tag:yaml.org,2002:null"


def _compose(text: str, name: str) -> Node | None:
    """YAML 1.2 nodes: `3e-5` is a number, `no` a word; aliases are refused."""
    try:
        for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
            if getattr(event, "anchor", None):
                place = f"{name}:{event.start_mark.line + 1}"
                raise ConfigError(f"{place}: YAML anchors and aliases are not read; use include:")
        return YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: nested too deeply") from None
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem}") from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None


def _construct(node: Node | None) -> Any:
    if isinstance(node, MappingNode):
        return {_key(key): _construct(value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return [_construct(item) for item in node.value]
    return _scalar(node) if isinstance(node, ScalarNode) else {}


def _key(node: Node) -> str:
    return node.value if isinstance(node, ScalarNode) else "?"


def _scalar(node: ScalarNode) -> Any:
    """The value; what only claims to be a number stays text, and is refused as such."""
    kind, text = str(node.tag).rsplit(":", 1)[-1], node.value
    try:
        if kind == "int":
            prefixed = re.fullmatch(r"[-+]?0[xo][0-9a-fA-F]{1,16}", text)
            number = int(text, 0) if prefixed else int(text)
            return number if abs(number) < 2**63 else text  # no library takes a larger one
        if kind == "float":
            return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
    except ValueError:
        return text
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return None if kind == "null" else text


def _lines(node: Node | None, name: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, file:line) of every key."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            path = f"{prefix}{_key(key)}"
            yield path, f"{name}:{key.start_mark.line + 1}"
            yield from _lines(value, name, f"{path}.")


def _read(file: Path, origins: Origins, problems: list[str], seen: tuple[Path, ...]) -> dict:
    """The mapping in `file` laid over the files that it includes (paths relative to it)."""
    if file.resolve() in seen:
        problems.append(f"{file}: includes itself ({' -> '.join(str(p.name) for p in seen)})")
        return {}
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problems.append(f"cannot read the configuration {file}: {reason}")
        return {}
    try:
        node = _compose(text, str(file))
    except ConfigError as error:
        problems.append(str(error))
        return {}
    if not isinstance(node, MappingNode):
        problems.append(f"{file}: expected sections (model:, data:, train: ...), found none")
        return {}
    problems += _duplicates(node, str(file))
    tree = _construct(node)
    lines = dict(_lines(node, str(file)))
    replace_aliases(tree, lines, problems)
    includes = tree.pop("include", [])
    names = includes if isinstance(includes, list) else [includes]
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        problems.append(f"include ({lines['include']}): expected a file or a list of files")
        names = []
    base: dict = {}
    for name in names:
        _merge(base, _read(file.parent / name, origins, problems, (*seen, file.resolve())))
    origins.update(lines)
    _merge(base, tree)
    return base


def _duplicates(node: MappingNode, name: str, prefix: str = "") -> Iterator[str]:
    seen = set()
    for key, value in node.value:
        if _key(key) in seen:
            yield f"{name}:{key.start_mark.line + 1}: {prefix}{_key(key)} is given twice"
        seen.add(_key(key))
        if isinstance(value, MappingNode):
            yield from _duplicates(value, name, f"{prefix}{_key(key)}.")


def _merge(base: dict, over: dict) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _read_overrides(
    words: list[str], sections: Sections, origins: Origins, problems: list[str]
) -> dict:
    """Returns the tree of the overrides; adds to `problems` what is wrong with their form."""
    result: dict[str, Any] = {}
    places: Origins = {}
    for path, value in parse_overrides(words, sections, problems):
        try:
            node = _compose(value, f"override {path}")
        except ConfigError as error:
            problems.append(str(error))
            continue
        tree: Any = _construct(node) if node is not None else None
        for key in reversed(path.split(".")):
            tree = {key: tree}
        section, key, *_ = path.split(".")
        origins.setdefault(section, "override")
        places[f"{section}.{key}"] = "override"
        _merge(result, tree)
    replace_aliases(result, places, problems)
    origins.update(places)
    return result


# --- validating --------------------------------------------------------------------------------


def _validate(
    tree: Any,
    origins: Origins,
    schema: type[RunConfig],
    sections: Collection[str] = (),
) -> tuple[RunConfig | None, list[str]]:
    problems: dict[str, str] = {}
    config: RunConfig | None = None
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        for item in error.errors():
            path, *_ = _place(item["loc"], schema)
            problems.setdefault(path, _explain(path, item, origins, schema, sections))
    values = _flatten(config.model_dump() if config else _with_defaults(tree, schema))
    for rule in rules_of(schema):
        sound = all(path in values and path not in problems for path in rule.paths)
        if sound and rule.broken(*(values[path] for path in rule.paths)):
            path = rule.paths[0]
            problems.setdefault(path, f"{path}{_where(path, origins)}: {rule.message}")
            config = None
    for path, value in values.items():
        if redact(str(value)) != str(value):
            problems[path] = (
                f"{path}{_where(path, origins)}: holds the secret {redact(str(value))}, which "
                "would be written into the run folder; libraries read it from the environment"
            )
            config = None
    return config, list(problems.values())


def _place(
    location: tuple[int | str, ...], schema: type[RunConfig]
) -> tuple[str, type[Section] | None, str]:
    """(dotted path, its section, its key there); what pydantic appends to a key (member of a union,
    place in a list) is cut off."""
    parts = [*map(str, location)]
    section, at = {**sections_of(schema), **NESTED}.get(parts[0]), 1
    if parts[0] == "classify" and parts[1:2] == ["strategies"] and len(parts) > 2:
        section, at = Strategy, 3
        if parts[3:4] == ["generation"] and len(parts) > 4:
            section, at = Generation, 4
    return ".".join(parts[: at + 1]), section, "".join(parts[at : at + 1])


def _where(path: str, origins: Origins) -> str:
    return f" ({origins[path]})" if path in origins else ""


def _explain(
    path: str,
    item: Any,
    origins: Origins,
    schema: type[RunConfig] = Config,
    known: Collection[str] = (),
) -> str:
    """Returns the message for an error of pydantic. `known`: sections of any task."""
    _, section, key = _place(item["loc"], schema)  # each part may contain a dot itself
    fields = section.model_fields if section else {}
    at = f"{path}{_where(path, origins)}"
    if item["type"] == "extra_forbidden":
        word = key or str(item["loc"][0])
        sections = sections_of(schema)
        hint = suggest(word, list(fields if key else sections))
        elsewhere = [f"{s}.{word}" for s, model in sections.items() if word in model.model_fields]
        elsewhere += [ALIASES[word].key] if word in ALIASES else []
        hint = f"did you mean {elsewhere[0]}?" if elsewhere else hint
        if not key and word in known:
            hint = f"task: {schema.task} has no such section"
        if "." in word:
            hint = "in a file, write the section and below it the key"
        return f"{at}: unknown key; {hint}"
    if item["type"] == "missing":
        about = f": {fields[key].description}" if key else ""
        return f"{at}: required, and not given{about}"
    if item["type"] == "value_error":
        return f"{at}: {item['ctx']['error']}"
    if not key:
        return f"{at}: expected a section with keys, found {item['input']!r}"
    told = f"{at}: expected {_type_name(fields[key])}, found {shorten(item['input'])}"
    for refused in fields[key].metadata:
        if isinstance(refused, Refused) and refused.value == item["input"]:
            return f"{told}; {refused.reason}"
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        words = re.findall(r"'([^']+)'", item["ctx"]["expected"])
        if near := difflib.get_close_matches(item["input"], words, n=1, cutoff=0.5):
            told += f"; did you mean {near[0]}?"
    return told


def _with_defaults(tree: Any, schema: type[RunConfig]) -> dict:
    """The values that the rules can still judge when the tree is not valid as a whole."""
    result = {}
    for name, section in sections_of(schema).items():
        given = tree.get(name, {}) if isinstance(tree, dict) else {}
        fields = section.model_fields.items()
        defaults = {key: field.default for key, field in fields if not field.is_required()}
        result[name] = {**defaults, **(given if isinstance(given, dict) else {})}
    return result


def _flatten(tree: dict) -> dict[str, Any]:
    return {f"{section}.{key}": v for section, keys in tree.items() for key, v in keys.items()}
