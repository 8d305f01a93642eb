"""Messages -> (ids, labels) through the tokenizer's own chat template; nothing else renders.

What is supervised is decided on *characters* of the rendered text, then carried to tokens by their
offsets. Each assistant turn is one span: its content and the end of turn that the template writes.

- A template with `{% generation %}` blocks says itself what the spans are.
- Else the conversation is rendered once more with a sentinel in place of every assistant content.
  What stands between the sentinels is what the template wrote, and the true rendering must be
  exactly these pieces with the (possibly trimmed) contents between them. No prefix of a
  conversation is ever assumed to render to a prefix of the text.
- The end of turn is read off the *last* turn, behind which no next header can stand: the text up to
  and including its first added token (`<|im_end|>`, `</s>`), further to an eos that directly
  follows; without an added token all its text. Every turn must close in the same way.
- What the model has to write itself is supervised too: a token that holds both template and content
  (" Hello" after "[/INST]"), and blanks between the inference prompt and the content. An added
  token of the header that swallows blanks is not.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sft.config import UserError
from sft.data import DataError, Messages, Row

IGNORED = -100
Span = tuple[int, int]  # characters, end excluded

# For tokenizers without a template: plain words, which any vocabulary can write. The newline behind
# a header belongs to the prompt, so that the prompt's tokens do not depend on the answer.
DEFAULT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")
THINKING = re.compile(r"(?s).*</think>\s*")  # templates move and drop it, so it is located apart


@dataclass(frozen=True, slots=True)
class Example:
    """`labels[i]` is `ids[i]` where supervised, else -100; the loss does the shift."""

    ids: list[int]
    labels: list[int]

    @property
    def num_supervised(self) -> int:
        """Position 0 has no predecessor that could predict it."""
        return sum(label != IGNORED for label in self.labels[1:])


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Gives it the default template and a pad token where it has none; raises if it has no eos.

    Padding with eos is safe here: labels come from spans, never from comparing ids with the pad id.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: expected a tokenizer with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no eos token, so a model could not learn "
            "to stop; name one as eos_token in its tokenizer_config.json"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Example:
    """A conversation with every assistant turn supervised, end of turn included.

    Raises DataError where the template alters, drops or does not close an assistant turn.
    """
    text = _text(tokenizer, messages)
    if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        spans = _marked_spans(tokenizer, messages)
    else:
        spans = _located_spans(tokenizer, messages, text)
    ids, offsets = _tokens(tokenizer, text)
    labels = [IGNORED] * len(ids)
    # Both never decrease: the tokens of one character's bytes all carry that character's offsets,
    # and where a tokenizer trims blanks off offsets, a token of blanks is empty at its own end.
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    added = _added_tokens(tokenizer, len(tokenizer))
    blank = _blank_behind_prompt(tokenizer, messages, text[: spans[-1][0]])
    for content_start, end in spans:
        start = content_start - len(blank) * text.endswith(blank, 0, content_start)
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        while first < last and starts[first] < start and ids[first] in added:
            first += 1
        if first == last:
            raise DataError(f"the tokenizer has no token for {text[start:end]!r}")
        labels[first:last] = ids[first:last]
    return Example(ids, labels)


def render_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Example]:
    """Every row rendered; one DataError for all that cannot be."""
    examples, problems = [], []
    for row in rows:
        try:
            examples.append(render(tokenizer, row.messages))
        except DataError as error:
            problems.append(f"{row.file}:{row.line}: {error}")
    if problems:
        raise DataError.of_rows(rows[0].file, problems)
    return examples


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """What a model is given at inference to continue `messages`."""
    return _tokens(tokenizer, _text(tokenizer, messages, add_generation_prompt=True))[0]


def prompt_mismatch(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, example: Example
) -> str | None:
    """How the inference prompt of the last turn differs from what stands before it in training."""
    try:
        prompt = prompt_ids(tokenizer, messages[:-1])
    except DataError as error:
        return f"no prompt can be made for the last turn: {error}"
    first = len(example.ids)
    while first and example.labels[first - 1] == IGNORED:
        first -= 1
    while first and example.labels[first - 1] != IGNORED:
        first -= 1
    trained = example.ids[:first]
    if prompt == trained:
        return None
    pairs = enumerate(zip(prompt, trained, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(trained)))
    shared = _decoded(tokenizer, prompt, max(0, same - 8), same)
    served, seen = (_decoded(tokenizer, ids, same, same + 8) for ids in (prompt, trained))
    return f"after {shared!r} the prompt has {served!r}, training has {seen!r} (token {same})"


def audit(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    examples: Sequence[Example],
    max_seq_len: int,
) -> dict[str, Any]:
    """Totals, digests, and under `problems` the rows (`file:line`) of each kind with their count.

    `no_end_of_turn`: the last supervised token is no added token, so generation cannot stop at it.
    `repeated_bos`: a doubled one at the start; some templates rightly write a bos before each turn.
    """
    added = {*_added_tokens(tokenizer, len(tokenizer)), tokenizer.eos_token_id}
    bos = tokenizer.bos_token_id
    found: dict[str, list[str]] = {
        kind: []
        for kind in (
            "unsupervised",
            "no_end_of_turn",
            "repeated_bos",
            "too_long",
            "prompt_mismatch",
        )
    }
    for row, example in zip(rows, examples, strict=True):
        last = next((label for label in reversed(example.labels) if label != IGNORED), None)
        wrong = {
            "unsupervised": not example.num_supervised,
            "no_end_of_turn": last not in added,
            "repeated_bos": bos is not None and example.ids[:2] == [bos, bos],
            "too_long": len(example.ids) > max_seq_len,
            "prompt_mismatch": prompt_mismatch(tokenizer, row.messages, example) is not None,
        }
        for kind in (kind for kind, is_wrong in wrong.items() if is_wrong):
            found[kind].append(f"{row.file}:{row.line}")
    return {
        "rows": len(rows),
        "tokens": sum(len(example.ids) for example in examples),
        "supervised_tokens": sum(example.num_supervised for example in examples),
        "longest": max((len(example.ids) for example in examples), default=0),
        "max_seq_len": max_seq_len,
        "problems": {kind: {"count": len(refs), "rows": refs} for kind, refs in found.items()},
        "template_sha256": _sha256(tokenizer.get_chat_template()),
        "tokenizer_sha256": _tokenizer_sha256(tokenizer),
    }


def coloured(tokenizer: PreTrainedTokenizerBase, example: Example) -> Text:
    """The text as a terminal shows it: supervised green, context dim, added tokens magenta."""
    added, result, done = _added_tokens(tokenizer, len(tokenizer)), Text(), 0
    for style, run in groupby(
        zip(example.ids, example.labels, strict=True),
        lambda pair: _style(pair[0] in added, pair[1] != IGNORED),
    ):
        end = done + len(list(run))
        result.append(_decoded(tokenizer, example.ids, done, end), style)
        done = end
    return result


def _style(is_added: bool, is_supervised: bool) -> str:
    if is_added:
        return "bold magenta underline" if is_supervised else "bold magenta"
    return "green" if is_supervised else "dim"


# --- text and tokens ---------------------------------------------------------------------------


def _text(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False
) -> str:
    if not messages:
        raise DataError("the conversation begins with the assistant; give it a user turn first")
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template refuses the roles {roles}: {error}; change the row to what the "
            "model's template expects"
        ) from None


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """The template has written every special token, bos too: the tokenizer must add none."""
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )  # verbose: the length is the audit's to judge
    return encoded["input_ids"], encoded["offset_mapping"]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, end: int) -> str:
    """Text of ids[start:end] in its place; decoded alone it might lose its leading blank."""
    before, until = (
        str(tokenizer.decode(ids[:at], clean_up_tokenization_spaces=False)) for at in (start, end)
    )
    return until[len(before) :]


@lru_cache(maxsize=8)
def _added_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """id -> text of the added tokens that are not blank (Gemma has added tokens of newlines)."""
    del size  # only in the key: a tokenizer that grew is looked at again
    return {i: token for token, i in tokenizer.get_added_vocab().items() if token.strip()}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of vocabulary, merges, normalisation and special tokens; not of the padding last used."""
    state = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')[2]
    return _sha256(state + json.dumps(tokenizer.special_tokens_map, sort_keys=True))


# --- spans -------------------------------------------------------------------------------------


def _marked_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[Span]:
    """The `{% generation %}` blocks, without blanks behind the end of turn; verified."""
    names: dict[str, Any] = dict(tokenizer.special_tokens_map)
    rendered: Any = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **names,
    )
    (text,), (blocks,) = rendered
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    if len(blocks) != len(contents):
        raise DataError(
            f"the chat template marks {len(blocks)} of {len(contents)} assistant turns for "
            "training; every turn needs one {% generation %} block"
        )
    added = tuple(_added_tokens(tokenizer, len(tokenizer)).values())
    spans = []
    for number, ((start, end), content) in enumerate(zip(blocks, contents, strict=True), 1):
        block = text[start:end].rstrip()
        if content.strip() not in block:
            raise _altered(number, content)
        if not block.endswith(added):
            raise DataError(
                f"the {{% generation %}} block of assistant turn {number} ends in {block[-20:]!r}, "
                "not in an end-of-turn token; move that token into the block"
            )
        spans.append((start, start + len(block)))
    return spans


def _located_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str) -> list[Span]:
    """Contents with their ends of turn in `text`, found with sentinels; verified."""
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    pieces = _pieces(tokenizer, messages, len(contents))
    closings = _closings(tokenizer, pieces[-1])
    spans, at = [], len(pieces[0])
    for number, content in enumerate(contents, 1):
        head, tail = _split_thinking(content)
        before, after = pieces[number - 1 : number + 1]
        found = next((form for form in _forms(tail) if text.startswith(form + after, at)), None)
        lead = next((form for form in _forms(head) if before.endswith(form)), None)
        if found is None or lead is None or not text.startswith(before, at - len(before)):
            raise _altered(number, content)
        closing = next((closing for closing in closings if after.startswith(closing)), None)
        if closing is None:
            raise DataError(
                f"the chat template does not close assistant turn {number} like the last one, with "
                f"{closings[0]!r}; end the row at this turn, or correct the template"
            )
        spans.append((at - len(lead), at + len(found) + len(closing)))
        at += len(found) + len(after)
    if at != len(text):
        raise _altered(len(contents), contents[-1])
    return spans


def _blank_behind_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, before: str
) -> str:
    """Blanks between the inference prompt and the last content, which a model has to write itself.

    Llama 2: the prompt ends in "[/INST]", the content follows a space, which is a token of its own
    before a digit.
    """
    try:
        prompt = _text(tokenizer, messages[:-1], add_generation_prompt=True)
    except DataError:  # no prompt can be made; the audit tells it
        return ""
    blank = before.removeprefix(prompt)
    return blank if blank.isspace() else ""


def _pieces(tokenizer: PreTrainedTokenizerBase, messages: Messages, num_turns: int) -> list[str]:
    """What the template writes around the assistant contents: num_turns + 1 texts."""
    sentinel = "zq7sentinelk"
    while any(sentinel in message["content"] for message in messages):
        sentinel += "k"
    stand_ins = [
        {**m, "content": _split_thinking(m["content"])[0] + sentinel}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]
    pieces = _text(tokenizer, stand_ins).split(sentinel)
    if len(pieces) != num_turns + 1:
        raise DataError(
            f"the chat template writes {len(pieces) - 1} of {num_turns} assistant turns; end the "
            "row at an earlier turn, or correct the template"
        )
    return pieces


def _closings(tokenizer: PreTrainedTokenizerBase, tail: str) -> list[str]:
    """What may end a turn, longest first, given what stands behind the last content."""
    added = _added_tokens(tokenizer, len(tokenizer)).values()
    ends = [tail.index(token) + len(token) for token in added if token in tail]
    closing = tail[: min(ends)] if ends else tail.rstrip()
    if not closing.strip():
        raise DataError(
            "the chat template writes no end of turn behind the assistant's content, so a model "
            "would not learn to stop; use a template that writes one, such as eos_token"
        )
    eos = re.match(r"\s*" + re.escape(tokenizer.eos_token), tail[len(closing) :])
    return [closing + eos[0], closing] if eos else [closing]


def _split_thinking(content: str) -> tuple[str, str]:
    match = THINKING.match(content)
    end = match.end() if match else 0
    return content[:end], content[end:]


def _forms(content: str) -> tuple[str, ...]:
    """A content and its trimmed forms, the longest first."""
    one_side = (content.rstrip("\n"), content.rstrip(), content.lstrip("\n"), content.lstrip())
    return (content, *one_side, content.strip("\n"), content.strip())


def _altered(number: int, content: str) -> DataError:
    return DataError(
        f"the chat template alters or drops the content of assistant turn {number} "
        f"({content[:40]!r}), so it cannot be trained on as written; end the row at this turn if "
        "the template drops reasoning from earlier turns, or correct the template or the row"
    )
