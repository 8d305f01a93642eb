"""Modelfiles for Ollama: their template renders what the tokenizer's own does, or is refused."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from sft.data.rendering import render_text
from sft.errors import MergeError
from sft.serve import ollama

CONVERSATIONS = [
    [{"role": "user", "content": "Hi {{ there }}"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nthere"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]
WORDS = {
    "if not .System": "{% if not system %}",
    "range .Messages": "{% for m in messages %}",
    ".Content": "{{ m.content }}",
}


def as_jinja(go: str) -> str:
    """Translates the few words of Go's templates that Modelfiles have."""
    opened: list[str] = []

    def translate(match: re.Match[str]) -> str:
        word = match[1]
        if word.startswith(("if", "range")):
            opened.append("for" if word.startswith("range") else "if")
        if word == "end":
            return f"{{% end{opened.pop()} %}}"
        if role := re.fullmatch(r'(else )?if eq \.Role "(\w+)"', word):
            return f'{{% {"elif" if role[1] else "if"} m.role == "{role[2]}" %}}'
        return WORDS[word]

    return re.sub(r"\{\{ (.*?) \}\}", translate, go)


def render(modelfile: str, messages: list[dict[str, str]]) -> str:
    go = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)[1]
    template = jinja2.Environment(keep_trailing_newline=True).from_string(as_jinja(go))
    return template.render(messages=messages, system=messages[0]["role"] == "system")


@pytest.fixture
def gguf(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(ollama, "adds_bos", lambda _: False)
    return tmp_path / "a.gguf"


def same(tokenizer, gguf: Path, bos: str = "") -> str:
    text = ollama.write_modelfile(gguf, tokenizer, 512).read_text()
    for messages in CONVERSATIONS:
        expected = render_text(tokenizer, messages, None, True)
        assert bos + render(text, messages) == expected
    return text


def test_the_embedded_model(gguf):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano/model")
    text = same(tokenizer, gguf)
    assert text.startswith("FROM ./a.gguf\nTEMPLATE")
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert text.endswith("PARAMETER num_ctx 512\n")


@pytest.mark.parametrize(("name", "has_own"), [("qwen2.5-instruct", True), ("minimind", False)])
def test_real_templates_with_and_without_a_system_prompt_of_their_own(gguf, shared, name, has_own):
    tokenizer = AutoTokenizer.from_pretrained(shared / f"data/tokenizers/{name}")
    assert ("{{ if not .System }}" in same(tokenizer, gguf)) is has_own


def test_a_bos_that_llama_cpp_adds_is_left_out(gguf, monkeypatch):
    monkeypatch.setattr(ollama, "adds_bos", lambda _: True)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano/model")
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = "<|pad|>" + tokenizer.chat_template
    same(tokenizer, gguf, bos="<|pad|>")
    tokenizer.bos_token = "<|im_end|>"
    with pytest.raises(MergeError, match=r"does not begin with it"):
        ollama.write_modelfile(gguf, tokenizer, 512)


def test_a_template_that_does_more_is_refused(gguf):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano/model")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "('' if loop.last else '(before) ') + message['content']"
    )
    with pytest.raises(MergeError, match="does more than to join messages"):
        ollama.write_modelfile(gguf, tokenizer, 512)
    assert not gguf.with_name(ollama.MODELFILE).exists()


def test_whether_llama_cpp_adds_a_bos_is_read_from_the_file(tmp_path):
    import gguf_files

    folder = ROOT / "nano/model"
    assert not ollama.adds_bos(gguf_files.write_gguf(folder, tmp_path / "a.gguf"))
    assert ollama.adds_bos(gguf_files.write_gguf(folder, tmp_path / "b.gguf", bos=1))
