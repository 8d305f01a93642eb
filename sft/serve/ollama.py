"""Writes a Modelfile for Ollama, with the chat template as its templates are written (Go's).

Ollama does not run the Jinja template in a GGUF file. What stands before and behind each role's
messages is found by rendering; a template that is more than this is refused with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data import audit
from sft.data.formats import Messages
from sft.data.rendering import render_text
from sft.errors import DataError, MergeError, require_extra

MODELFILE = "Modelfile"
MAX_CONTEXT = 8192  # tokens; Ollama's own default is smaller than many models', and cuts prompts
S, A, B, C = ("qzsystem", "qzfirst", "qzanswer", "qzsecond")  # contents that no template has
ROUND: Messages = [
    {"role": "user", "content": A},
    {"role": "assistant", "content": B},
    {"role": "user", "content": C},
]


class Parts(NamedTuple):
    """What a template writes around messages. `opening`: only without a system prompt."""

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str

    def render(self, messages: Messages) -> str:
        """Returns the prompt that these parts make."""
        has_system = messages[0]["role"] == "system"
        text = "" if has_system else self.opening
        for each in messages:
            before, after = getattr(self, each["role"])
            text += f"{before}{each['content']}{after}"
        return text + self.generation


def find_parts(tokenizer: Tokenizer) -> Parts:
    """Returns the parts of a chat template. Raises MergeError if it does not only join messages."""
    one, two, three = (render_text(tokenizer, ROUND[:number]) for number in (1, 2, 3))
    prompt = render_text(tokenizer, ROUND[:1], None, True)
    try:
        user = _around(three.removeprefix(two), C)
        assistant = _around(two.removeprefix(one), B)
        left, _ = _around(one, A)
        parts = Parts(left.removesuffix(user[0]), None, user, assistant, prompt.removeprefix(one))
        with_system: Messages = [{"role": "system", "content": S}, *ROUND]
        try:
            before, rest = _around(render_text(tokenizer, with_system[:2]), S)
            after, _ = _around(rest, A)
            parts = parts._replace(system=(before, after.removesuffix(user[0])))
            tried = [ROUND[:1], ROUND, with_system[:2], with_system]
        except DataError:  # a template without a system role
            tried = [ROUND[:1], ROUND]
        fits = all(parts.render(m) == render_text(tokenizer, m, None, True) for m in tried)
    except ValueError:
        fits = False
    if not fits or any("{{" in text or '"""' in text for text in _flatten(parts)):
        raise MergeError(
            "Modelfile: the chat template does more than to join messages, so it has no equal in "
            "Ollama's templates; serve the GGUF file with llama.cpp's server, which runs it"
        )
    return parts


def _around(text: str, content: str) -> tuple[str, str]:
    """Returns what is before and behind a content. Raises ValueError if it is not there once."""
    before, after = text.split(content)
    return before, after


def _flatten(parts: Parts) -> list[str]:
    pairs = (parts.system or (), parts.user, parts.assistant)
    return [parts.opening, parts.generation, *(text for pair in pairs for text in pair)]


def go_template(parts: Parts) -> str:
    """Returns the parts as a template of Ollama."""
    opening = f"{{{{ if not .System }}}}{parts.opening}{{{{ end }}}}" if parts.opening else ""
    pairs = {"system": parts.system, "user": parts.user, "assistant": parts.assistant}
    branches = [
        f'if eq .Role "{role}" }}}}{pair[0]}{{{{ .Content }}}}{pair[1]}'
        for role, pair in pairs.items()
        if pair is not None
    ]
    chain = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    return f"{opening}{{{{ range .Messages }}}}{chain}{{{{ end }}}}{parts.generation}"


def _without_bos(parts: Parts, bos: str) -> Parts:
    """Returns the parts for a server that adds a BOS itself. Raises MergeError if none fits."""
    system = parts.system or (bos, "")
    if not (parts.opening.startswith(bos) and system[0].startswith(bos)):
        raise MergeError(
            f"Modelfile: the GGUF file makes Ollama begin with {bos}, but the chat template does "
            "not begin with it; serve the file with llama.cpp's server, and prove it"
        )
    return parts._replace(
        opening=parts.opening.removeprefix(bos),
        system=parts.system and (system[0].removeprefix(bos), system[1]),
    )


def write_modelfile(gguf: Path, tokenizer: Tokenizer, context: int | None) -> Path:
    """Writes the Modelfile of a GGUF file beside it; returns its path."""
    parts = find_parts(tokenizer)
    if adds_bos(gguf):  # Ollama would tokenise one in the text, too
        parts = _without_bos(parts, str(tokenizer.bos_token))
    stops = [str(tokenizer.decode([each])) for each in sorted(audit.stop_ids(tokenizer))]
    lines = [f"FROM ./{gguf.name}", f'TEMPLATE """{go_template(parts)}"""']
    lines += [f"PARAMETER stop {json.dumps(each, ensure_ascii=False)}" for each in stops]
    lines += [f"PARAMETER num_ctx {min(context or MAX_CONTEXT, MAX_CONTEXT)}"]
    path = gguf.with_name(MODELFILE)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def adds_bos(gguf: Path) -> bool:
    """Returns whether llama.cpp puts a BOS before a text: as the file says, or by its kind."""
    require_extra("gguf", "GGUF", ["gguf"])
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf)).fields
    if (own := fields.get("tokenizer.ggml.add_bos_token")) is not None:
        return bool(own.contents())
    return fields["tokenizer.ggml.model"].contents() == "llama"
