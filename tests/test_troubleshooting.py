"""docs/TROUBLESHOOTING.md quotes messages of the code, below the exit codes that they end with."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from conftest import ROOT

from sft.errors import ExitCode, UserError

PAGE = (ROOT / "docs/TROUBLESHOOTING.md").read_text("utf-8")
SECTIONS = re.findall(r"^## Exit codes? ([\d and,]+):.*\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE)


def quoted() -> list[tuple[str, set[int]]]:
    """Returns each message in the first cell of a row, with the exit codes of its section."""
    found = []
    for codes, section in SECTIONS:
        cells = re.findall(r"^\| (`.+?`(?:, `.+?`)*) \|", section, re.MULTILINE)
        found += [(m, {*map(int, re.findall(r"\d+", codes))}) for c in cells for m in texts(c)]
    return found


def texts(cell: str) -> list[str]:
    return re.findall(r"`(.+?)`", cell)


@cache
def messages() -> list[tuple[str, Any]]:
    """Returns every text of the package, values as NUL, with the error that is raised with it."""
    return [each for path in (ROOT / "sft").rglob("*.py") for each in messages_of(path)]


def messages_of(path: Path) -> Iterator[tuple[str, Any]]:
    tree = ast.parse(path.read_text("utf-8"))
    raised: dict[ast.AST, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            raised |= dict.fromkeys(ast.walk(node.exc), error_class(path, node.exc.func))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(getattr(part, "value", "")) for part in node.values]
            kinds = [isinstance(part, ast.Constant) for part in node.values]
            text = "".join(p if k else "\0" for p, k in zip(parts, kinds, strict=True))
            yield text, raised.get(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, raised.get(node)


def error_class(path: Path, name: ast.expr) -> Any:
    """Returns the class of an error that is raised, if it is one with an exit code."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found: Any = importlib.import_module(module)
    for part in ast.unparse(name).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, UserError) else None


def test_messages_of_the_page_are_those_of_the_code_with_that_exit_code():
    wrong = {}
    for message, codes in quoted():
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        found = [error for text, error in messages() if pattern.search(text)]
        ends = {error.exit_code for error in found if error}
        if not found or (ends and not codes & ends):
            wrong[message] = ends or "no text of sft/ has it"
    assert wrong == {}


def test_every_exit_code_has_a_section_with_messages():
    codes = [int(code) for numbers, _ in SECTIONS for code in re.findall(r"\d+", numbers)]
    assert codes == [*ExitCode]
    assert {code for _, codes in quoted() for code in codes} == {*ExitCode}
