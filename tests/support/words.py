"""Words that STYLE rules out, found by a machine: docstrings without a verb, and private language.

python tests/support/words.py [PATH ...]      prints every violation below these paths
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("sft", "scripts", "nano")
TEXT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "docs", "configs")

# Each with what to say instead.
BANNED = {
    r"(un|fore)?told|tells?|telling": "report, log, say, predict",
    r"mend(s|ed|ing)?": "fix, correct, repair",
    r"hear(s|d|ing)?": "receive",
    r"gravest": "most severe",
    r"kin": "variant",
    r"buried": "a zombie",
    r"(the )?begin of": "the beginning of",
    r"for good": "permanently",
    r"in all(?! \w)": "total",
    r"likes together": "sorted by length",
    r"lets? \w+ be": "keep",
    r"without a word": "unexpectedly",
    r"perhaps for want of": "possibly out of",
    r"survey(s|ed)?": "summarise, needs_global_batch",
    r"rows?_that_pay": "max_batch_size",
    r"speaker": "AnswerModel",
}
PATTERN = re.compile(rf"(?<![a-z])({'|'.join(BANNED)})(?![a-z])", re.IGNORECASE)
# A verb in the third person, not a plural noun ("Bytes of ...", "Rows, sorted ...").
VERB = re.compile(
    r"(?!This |Its |Whatever|Whereas|Thus |Always |Perhaps )[A-Z][a-z]+s(?! of\b)(?=[ .:])"
)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the line and the docstring of every function and method that has one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield node.body[0].lineno, text


def violations(path: Path) -> Iterator[str]:
    """Yields what is wrong in a file, with its line."""
    place, source = path.relative_to(ROOT), path.read_text("utf-8")
    for number, line in enumerate(source.splitlines(), 1):
        for found in PATTERN.finditer(line):
            yield f"{place}:{number}: {found[0]!r}"
    if path.suffix == ".py":
        for number, text in docstrings(ast.parse(source)):
            if not VERB.match(text):
                yield f"{place}:{number}: no verb: {text.splitlines()[0][:60]!r}"


def files(paths: list[str]) -> Iterator[Path]:
    """Yields the files below these paths that are read by people who use or change the package."""
    for name in paths:
        path = ROOT / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for each in found:
            is_read = each.suffix in {".py", ".md"} or each.name == "Makefile"
            if each.is_file() and (is_read or "configs" in each.parts):
                yield each


if __name__ == "__main__":
    for file in files(sys.argv[1:] or [*CODE, *TEXT]):
        for line in violations(file):
            print(line)
