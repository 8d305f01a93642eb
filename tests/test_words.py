"""The words of the package and its documents: docstrings have a verb, private language is out."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT
from words import CODE, TEXT, VERB, docstrings, files, violations


@pytest.mark.parametrize(
    "path", files([*CODE, *TEXT]), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_file_is_in_plain_words(path):
    assert list(violations(path)) == []


def test_the_search_sees_docstrings_and_words(tmp_path):
    verbs = ["Returns it.", "Raises ConfigError.", "Checks that it is so."]
    fragments = [
        "Of a run.",
        "Bytes of a run.",
        "What is left.",
        "The same again.",
        "This does it.",
    ]
    assert [text for text in verbs if not VERB.match(text)] == []
    assert [text for text in fragments if VERB.match(text)] == []
    source = 'def f():\n    """What is told."""\n\nclass C:\n    """Any phrase."""\n'
    assert [text for _, text in docstrings(ast.parse(source))] == ["What is told."]
    file = ROOT / "tests" / "__words_probe.py"
    file.write_text(source)
    try:
        assert len(list(violations(file))) == 2
    finally:
        file.unlink()
