"""Reads YAML files with their includes, and overrides, into trees of plain values.

Overrides have the forms that people type: `a.b=value`, `--a.b value`, `--b value`, `--b=value`.
"""

from __future__ import annotations

import difflib
import io
import json
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sft.config.aliases import ALIASES, replace_aliases
from sft.config.section import Origins, Section
from sft.errors import ConfigError

PATH = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+"
OVERRIDE = re.compile(f"({PATH})=(.*)", re.DOTALL)
# Names of data files, but .json and .txt, which a configuration may have, too.
ROWS = re.compile(
    r"(?i)\.(jsonl|ndjson|jsonlines|jl|ldjson|csv|tsv|tab|parquet|pq|arrow|feather)"
    r"(\.(gz|zst|xz|bz2|zip|7z|lz4|br|lzma|z))?$"
)
MOST = 2**20  # bytes of a configuration
Sections = Mapping[str, type[Section]]


class Reader:
    """Reads files and overrides; keeps where each key was written, and every problem."""

    def __init__(self) -> None:
        self.origins: Origins = {}
        self.problems: list[str] = []

    def read_file(self, file: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
        """Returns the mapping in `file`, merged over the files that it includes.

        Paths of included files are relative to `file`. `including`: the files that led to it.
        """
        if file.resolve() in including:
            chain = " -> ".join(path.name for path in including)
            self.problems.append(f"{file}: includes itself ({chain})")
            return {}
        try:
            node = _read_node(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            self.problems.append(f"cannot read the configuration {file}: {reason}{_near(file)}")
            return {}
        except ConfigError as error:
            self.problems.append(str(error))
            return {}
        tree, lines = _construct(node), self._number_lines(node, file)
        replace_aliases(tree, lines, self.problems)
        result: dict[str, Any] = {}
        for name in self._take_includes(tree, lines):
            merge(result, self.read_file(file.parent / name, (*including, file.resolve())))
        self.origins.update(lines)
        merge(result, tree)
        return result

    def read_overrides(self, words: list[str], sections: Sections) -> dict[str, Any]:
        """Returns the tree of the overrides."""
        result: dict[str, Any] = {}
        origins: Origins = {}
        for path, text in _parse_overrides(words, sections, self.problems):
            if re.search("[\ud800-\udfff]", text):
                encoding = sys.getfilesystemencoding()
                remedy = "; set PYTHONUTF8=1" if encoding != "utf-8" else ""
                self.problems.append(
                    f"override {path}: expected text in {encoding}, as which this Python reads "
                    f"arguments, found {text!a}{remedy}"
                )
                continue
            try:
                node = _parse(text, f"override {path}")
            except ConfigError as error:
                self.problems.append(str(error))
                continue
            tree: Any = _construct(node) if node is not None else None
            if isinstance(tree, str) and "\n" in text and getattr(node, "style", "") is None:
                tree = text  # without quotes YAML would turn the newlines of a name into blanks
            for key in reversed(path.split(".")):
                tree = {key: tree}
            section, key, *_ = path.split(".")
            self.origins.setdefault(section, "override")
            origins |= dict.fromkeys((f"{section}.{key}", path), "override")
            merge(result, tree)
        replace_aliases(result, origins, self.problems)
        self.origins.update(origins)
        return result

    def _number_lines(self, node: Node, file: Path) -> Origins:
        """Returns file:line of every key by its dotted path; reports keys that are given twice."""
        lines: Origins = {}
        for path, number in _number_keys(node):
            if path in lines:
                self.problems.append(f"{file}:{number}: {path} is given twice")
            lines[path] = f"{file}:{number}"
        return lines

    def _take_includes(self, tree: dict[str, Any], lines: Origins) -> list[str]:
        """Removes the names of included files from the tree, and returns them."""
        names = tree.pop("include", [])
        names = names if isinstance(names, list) else [names]
        if all(isinstance(name, str) and name.isprintable() for name in names):
            return names
        self.problems.append(f"include ({lines['include']}): expected a file or a list of files")
        return []


def _read_node(file: Path) -> MappingNode:
    """Returns the sections in a file. Raises OSError, UnicodeDecodeError or ConfigError."""
    is_json = file.suffix.lower() == ".json"
    holds_rows = file.is_file() and bool(ROWS.search(file.name))
    node = None
    if not holds_rows:
        with file.open("rb") as stream:
            data = stream.read(MOST + 1)
        is_long = len(data) > MOST
        holds_rows = is_json and (is_long or _looks_like_rows(data))
        node = None if is_long or holds_rows else _parse(data.decode("utf-8"), str(file))
    if isinstance(node, MappingNode):
        return node
    found = "none"
    if holds_rows:
        found = (
            "a file of rows; give it as data.train_path of a configuration: make train "
            f'CONFIG=my.yaml ARGS="data.train_path={file}"'
        )
    raise ConfigError(f"{file}: expected sections (model:, data:, train: ...), found {found}")


def _looks_like_rows(data: bytes) -> bool:
    """Returns whether JSON is a list, or has an object in its first of several lines."""
    first, _, rest = data.strip().partition(b"\n")
    with suppress(ValueError):
        return isinstance(json.loads(first), list) or bool(rest)
    return data.lstrip().startswith(b"[")


def _near(file: Path) -> str:
    """Returns the end of a message: configurations like a file that cannot be read, or in it."""
    folder, names = (file if file.is_dir() else file.parent), list[str]()
    with suppress(OSError):
        names = sorted(path.name for path in folder.glob("*") if path.suffix in (".yaml", ".yml"))
    near = names[:6] if file.is_dir() else difflib.get_close_matches(file.name, names, 1, 0.8)
    return f"; did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""


def merge(base: dict, over: dict) -> None:
    """Puts the values of `over` into `base`; sections that both have are merged key by key."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def _parse(text: str, name: str) -> Node | None:
    """Returns nodes of YAML 1.2, where `3e-5` is a number and `no` a text.

    Raises ConfigError, whose message begins with `name`, if the text is not valid or has anchors.
    """
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


def _construct(node: Node) -> Any:
    """Returns the value of a node."""
    if isinstance(node, MappingNode):
        return {_key(key): _construct(value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return [_construct(item) for item in node.value]
    return _construct_scalar(node) if isinstance(node, ScalarNode) else {}


def _key(node: Node) -> str:
    """Returns the text of a key."""
    return node.value if isinstance(node, ScalarNode) else "?"


def _construct_scalar(node: ScalarNode) -> Any:
    """Returns the value of a scalar; an invalid number stays text, which is refused later."""
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


def _number_keys(node: Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields (dotted path, line) of every key."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            path = f"{prefix}{_key(key)}"
            yield path, key.start_mark.line + 1
            yield from _number_keys(value, f"{path}.")


def _parse_overrides(
    words: Iterable[str], sections: Sections, problems: list[str]
) -> Iterator[tuple[str, str]]:
    """Yields (dotted path, value as YAML) of each override; adds other words to `problems`."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if match := OVERRIDE.fullmatch(word):
                yield match[1], match[2]
            else:
                expected = "expected section.key=value, as in train.epochs=1"
                problems.append(f"override {word!r}: {expected}")
            continue
        flag, has_value, value = word.partition("=")
        path = _find_key(flag, sections, problems)
        if not has_value:
            is_last = not rest or rest[0].startswith("--")
            if (is_last or OVERRIDE.fullmatch(rest[0])) and (
                not path or _is_switch(path, sections)
            ):
                value = "true"
            elif is_last:
                problems.append(f"{flag}: expected a value, as in {flag}=1")
                continue
            else:
                value = rest.pop(0)
        if path:
            yield path, value


def _find_key(flag: str, sections: Sections, problems: list[str]) -> str:
    """Returns the dotted path that a flag names; "" if it names none, with a line in `problems`."""
    name = flag.removeprefix("--").replace("-", "_")
    if re.fullmatch(PATH, name):
        return name  # an unknown key is reported when all of them are validated
    if name in ALIASES and (section := ALIASES[name].key.split(".")[0]) in sections:
        return f"{section}.{name}"
    keys = [each for own, schema in sections.items() for each in schema.paths(f"{own}.")]
    found = [path for path, _, key in keys if key == name]
    if len(found) == 1:
        return found[0]
    if found:
        meant = " or ".join(f"--{path}" for path in found)
        problems.append(f"{flag}: several sections have this key: expected {meant}")
    else:
        known = ["config", *ALIASES, *(key for _, _, key in keys)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean --{near[0]}?" if near else "docs/CONFIG.md lists the keys"
        problems.append(f"{flag}: unknown flag; {hint}")
    return ""


def _is_switch(path: str, sections: Sections) -> bool:
    """Returns whether the key may be true or false, so that its flag needs no value."""
    section, key = path.split(".")[:2]
    if key in ALIASES and ALIASES[key].key.startswith(f"{section}."):
        if ALIASES[key].is_switch:
            return True
        key = ALIASES[key].key.split(".")[1]
    keys = sections[section].paths(f"{section}.") if section in sections else ()
    owner = next((own for found, own, _ in keys if found == path), None)
    kind: Any = owner.model_fields[path.rpartition(".")[2]].annotation if owner else None
    return bool in (kind, *typing.get_args(kind))
