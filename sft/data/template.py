"""Turns messages into (ids, labels) with the tokenizer's own chat template, and no other renderer.

**Definition.** For every supervised span, what is supervised is exactly what the model has to write
at serving after the prompt that serving renders, and nothing that serving puts into the prompt.

`data/turns` finds prompt and answer of every assistant turn. A conversation whose text holds all
of them is one example. Where the template rewrites earlier turns (drops their thoughts, moves an
empty block of thoughts), no single text can be what serving saw at each turn. Then each turn is an
example of its own: the tokens of its prompt, and behind them the tokens of its answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data.files import Row
from sft.data.formats import TEXT, Messages, Tools
from sft.data.rendering import (
    DEFAULT_TEMPLATE,
    Renderings,
    Span,
    TemplateError,
    Variables,
    added_tokens,
    compile_template,
    render_text,
    renderings_of,
    template_variables,
    try_template,
    variants,
)
from sft.data.tokenised import is_tokenised, make_tokens
from sft.data.tokens import Tokens, tokenise, tokenise_behind
from sft.data.turns import Turn, find_turn, marked_spans
from sft.errors import DataError, UserError

IGNORED = -100
Supervise = Literal["all", "last", "everything"]
OnLong = Literal["error", "drop", "truncate_left_turns", "truncate"]
Split = Literal["auto", "together", "split"]


@dataclass(frozen=True, slots=True)
class Example:
    """The tokens of a row. `labels[i]` is `ids[i]` if supervised, else -100; the loss shifts them.

    `weights[i]` multiplies the loss of label i; None: 1 everywhere. `flags` are findings of the
    rendering, each a kind of `data/audit`.
    """

    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None
    flags: tuple[str, ...] = ()

    @property
    def num_supervised(self) -> int:
        """Counts supervised tokens, without the first of the row, which no token can predict."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(IGNORED)


def prepare_tokenizer(
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    template_kwargs: Variables | None = None,
) -> Tokenizer:
    """Returns the tokenizer, with the default template and a pad token if it had none.

    `chat_template` (a file, or text) takes the place of its own. `template_kwargs` become defaults
    that are written into the template itself, so that they are saved, hashed and served with it.
    Padding with eos is safe here: labels come from spans, never from comparing ids with the pad id.
    Raises UserError for a tokenizer without eos, TemplateError for an unusable template.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: expected a tokenizer with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no eos token, so a model could not learn "
            "to stop; name one as eos_token in its tokenizer_config.json"
        )
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    found = tokenizer.chat_template
    if not isinstance(found.get("default") if isinstance(found, dict) else found, str):
        raise TemplateError(
            f"{tokenizer.name_or_path}: expected one chat template, or several of which one is "
            "called default; give it a chat_template.jinja"
        )
    try_template(tokenizer)
    name = tokenizer.name_or_path if chat_template is None else "data.chat_template"
    for source in found.values() if isinstance(found, dict) else [found]:
        _check_syntax(source, name)
    if template_kwargs:
        tokenizer.chat_template = _with_defaults(tokenizer, template_kwargs)
        try_template(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_syntax(source: str, name: str) -> None:
    try:
        compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"{name}: the chat template cannot be read: {error.message} (line {error.lineno})"
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:  # of a constant in it
        raise TemplateError(f"{name}: the chat template cannot be read: {error}") from None


def _read_template(given: str) -> str:
    """Returns the template that `data.chat_template` names or is, also that of a
    tokenizer_config.json. Raises TemplateError."""
    text = given
    if "{" not in given:
        try:
            text = Path(given).expanduser().read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            reason = "not UTF-8 text" if isinstance(error, ValueError) else error.strerror
            raise TemplateError(
                "data.chat_template: expected a file, or the text of a template, found "
                f"{given!r} ({reason})"
            ) from None
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            text = found.get("chat_template", "")
    if not isinstance(text, str) or not text.strip():
        raise TemplateError(
            f"data.chat_template: expected one template, found none in {given!r:.80}"
        )
    return text


def _with_defaults(tokenizer: Tokenizer, variables: Variables) -> Any:
    """Returns the template, or each of several, so that it begins by giving its variables these
    values, unless they are given.

    Raises TemplateError for a variable that no template reads.
    """
    read = {name: set(template_variables(v)) for name, v in variants(tokenizer).items()}
    known = set().union(*read.values())
    if unknown := sorted(variables.keys() - known):
        raise TemplateError(
            f"data.template_kwargs: the chat template reads no variable {', '.join(unknown)}; it "
            f"reads {', '.join(sorted(known)) or 'none'}"
        )
    try:
        json.dumps(variables, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise TemplateError(f"data.template_kwargs: expected values of JSON: {error}") from None

    def give(name: str, source: str) -> str:
        lines = (
            f"{{%- if {key} is not defined %}}{{%- set {key} = {value!r} %}}{{%- endif %}}"
            for key, value in sorted(variables.items())
            if key in read[name]
        )
        return "".join(lines) + source

    if not isinstance(tokenizer.chat_template, dict):
        return give("default", tokenizer.chat_template)
    return {name: give(name, source) for name, source in tokenizer.chat_template.items()}


@dataclass(frozen=True, slots=True)
class Learning:
    """What is learnt of a conversation, with the names of the keys in the section `data`."""

    supervise: Supervise = "all"
    turns: Split = "auto"
    empty_thoughts: bool = True


def render(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    supervise: Supervise = "all",
    variables: Variables | None = None,
) -> Example:
    """Renders and tokenises a conversation as one example, with its assistant turns supervised.

    `supervise`: `all` turns, each with the `weight` of its message (1 without one); the `last`
    turn; or `everything`, prompts too. A turn that is served otherwise than the one text has it is
    not supervised, and flagged. Raises DataError if the template does not decide what the model
    writes in a turn.
    """
    row = Row(messages, tools, "", 1, template_kwargs=variables and dict(variables))
    ((_, example),) = _examples(tokenizer, row, Learning(supervise, "together"))
    return example


def render_row(
    tokenizer: Tokenizer,
    row: Row,
    max_seq_len: int,
    *,
    supervise: Supervise = "all",
    on_long: OnLong = "error",
    turns: Split = "auto",
    empty_thoughts: bool = True,
) -> list[tuple[Row, Example]]:
    """Returns (row, example) of a row: usually one, none if the row is dropped.

    A row of tokens is not rendered. A raw document gives one for each `max_seq_len` tokens. A
    conversation gives one for each supervised turn if it is split: `turns: split`, or `auto` and no
    single text is what serving saw at each turn. The row of such an example ends with its turn, and
    earlier turns have weight 0. Raises DataError with the reason if the row cannot be trained on as
    it is. Where the template leaves nothing of it to learn, its example has no label, and flags.

    `on_long` decides about an example that is too long. `error` returns it, and the audit refuses
    it. `drop` drops it. `truncate_left_turns` removes the oldest exchanges after the system turn
    until it fits; a last exchange that is too long by itself is returned. `truncate` cuts the end
    and flags the row `answer_cut`; it drops the row if nothing supervised is left.
    """
    learning = Learning(supervise, turns, empty_thoughts)
    if is_tokenised(row.messages):
        tokens = make_tokens(tokenizer, row.messages[0], max_seq_len, on_long)
        return [(row, Example(ids, labels, None, flags)) for ids, labels, flags in tokens]
    if is_document(row.messages):
        example = _render_document(tokenizer, row.messages[0]["content"])
        if len(example.ids) <= max_seq_len:
            return [(row, example)]
        starts = range(0, len(example.ids) - 1, max_seq_len)
        parts = [example.ids[at : at + max_seq_len] for at in starts]
        return [(row, Example(part, list(part))) for part in parts]
    return [
        fitting
        for kept, example in _examples(tokenizer, row, learning)
        for fitting in _fit(tokenizer, kept, example, max_seq_len, on_long, learning)
    ]


def _fit(
    tokenizer: Tokenizer,
    row: Row,
    example: Example,
    max_seq_len: int,
    on_long: OnLong,
    learning: Learning,
) -> list[tuple[Row, Example]]:
    """Returns an example that is short enough, or what `on_long` makes of it."""
    if len(example.ids) <= max_seq_len:
        return [(row, example)]
    if on_long == "drop":
        return []
    if on_long == "truncate":
        cut = Example(
            example.ids[:max_seq_len],
            example.labels[:max_seq_len],
            example.weights and example.weights[:max_seq_len],
            (*example.flags, "answer_cut"),
        )
        return [(row, cut)] if cut.num_supervised else []
    if on_long == "truncate_left_turns":
        for messages in _drop_oldest(row.messages):
            kept = replace(row, messages=messages)
            made = _examples(tokenizer, kept, replace(learning, turns="together"))
            if made and len(made[0][1].ids) <= max_seq_len:
                ((_, shorter),) = made
                return [(kept, replace(shorter, flags=(*shorter.flags, "turns_dropped")))]
    return [(row, example)]


def _examples(tokenizer: Tokenizer, row: Row, learning: Learning) -> list[tuple[Row, Example]]:
    """Returns the examples of a conversation, of any length."""
    messages = row.messages
    given = renderings_of(tokenizer, messages, row.tools, row.template_kwargs)
    if learning.supervise == "everything":
        ids = tokenise(tokenizer, given.text).ids
        return [(row, Example(ids, list(ids)))]
    weights = _weights(messages, learning.supervise)
    found, flags = _find_turns(given, weights)
    if set(row.template_kwargs or ()) - set(template_variables(given.tokenizer)):
        flags.append("unread_variables")
    if not found:
        ids = tokenise(tokenizer, given.text).ids
        return [(row, Example(ids, [IGNORED] * len(ids), None, tuple(flags)))]
    together = _join(given, found, weights, learning)
    is_whole = together is not None and "not_as_served" not in together.flags
    wanted = learning.turns == "together" or (learning.turns == "auto" and is_whole)
    if together is not None and wanted:
        together = replace(together, flags=(*flags, *together.flags)) if flags else together
        return [(row, together)]
    if learning.turns == "together":
        raise DataError(
            "no turn is served as the whole conversation is rendered; set data.turns: auto"
        )
    made, has_blocks = [], marked_spans(given) is not None
    for index, turn in found.items():
        earlier = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:index]]
        kept = replace(
            row,
            messages=[*earlier, turn.message or messages[index]],
            template_kwargs=turn.variables and dict(turn.variables),
        )
        blocks = _blocks_of(given, index, turn) if has_blocks else None
        example = _of_turn(given, turn, weights[index], learning, blocks)
        made.append((kept, replace(example, flags=(*flags, *example.flags))))
    return made


def _weights(messages: Messages, supervise: Supervise) -> dict[int, float]:
    """Returns {index of an assistant turn that is learnt: its weight in the loss}."""
    turns = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
    chosen = turns[-1:] if supervise == "last" else turns
    weights = {index: float(messages[index].get("weight", 1)) for index in chosen}
    return {index: weight for index, weight in weights.items() if weight}


def _find_turns(
    given: Renderings, weights: Mapping[int, float]
) -> tuple[dict[int, Turn], list[str]]:
    """Returns the turns to learn that a model can be brought to write, and the others' flags."""
    found, flags = dict[int, Turn](), list[str]()
    given.prefetch(filter(None, weights))
    for index in weights:
        if not index:
            flags.append("no_prompt")
        elif isinstance(turn := find_turn(given, index), Turn):
            found[index] = turn
        else:
            flags.append(turn)
    return found, list(dict.fromkeys(flags))


def _join(
    given: Renderings, found: Mapping[int, Turn], weights: Mapping[int, float], learning: Learning
) -> Example | None:
    """Returns the example of the whole conversation, with those turns supervised that are served
    as it has them; None if there is none."""
    text, last = given.text, found.get(len(given.messages) - 1)
    is_given = not last or text.startswith(last.prompt + last.answer) or not _is_same(given, last)
    if last and not is_given:
        text = last.prompt + last.answer
    tokens, blocks = tokenise(given.tokenizer, text), marked_spans(given)
    ids, flags = tokens.ids, list[str]()
    labels, factors = [IGNORED] * len(ids), [0.0] * len(ids)
    for index, turn in found.items():
        span = None
        if _is_same(given, turn) and text.startswith(turn.prompt + turn.answer):
            span = _token_span(tokens, turn)
        if span is None or (span[0] and labels[span[0] - 1] != IGNORED):  # no header parts answers
            flags.append("not_as_served")
            continue
        own = blocks if blocks is None or is_given else _blocks_of(given, index, turn)
        for n in _learnt(tokens, span, turn, learning, own):
            labels[n], factors[n] = ids[n], weights[index]
        flags += turn.flags
    if "not_as_served" in flags and all(label == IGNORED for label in labels):
        return None
    return Example(ids, labels, _uneven(factors), tuple(dict.fromkeys(flags)))


def _is_same(given: Renderings, turn: Turn) -> bool:
    return turn.variables == given.variables and turn.message is None


def _uneven(factors: Sequence[float]) -> list[float] | None:
    return list(factors) if set(factors) - {0.0, 1.0} else None


def _within(
    blocks: Sequence[Span], learnt: Sequence[int], offsets: Sequence[Span], turn: Turn
) -> list[int]:
    """Returns the tokens of an answer that `{% generation %}` blocks mark, the blanks before them,
    which the prompt does not have either, and the end that was added.

    Raises DataError if no block marks anything of the answer.
    """
    if "tags_kept" in turn.flags:  # the blocks are those of another text
        return list(learnt)
    start, end = len(turn.prompt), len(turn.prompt) + len(turn.answer)
    own = [(a, b) for a, b in blocks if a < end and b > start]
    if not own:
        raise DataError(
            "the chat template has {% generation %} blocks, but none in an assistant turn that is "
            "to be learnt; put one around what the assistant writes, or remove all"
        )
    added = learnt[-1:] if "end_of_turn_added" in turn.flags else ()
    marked = [n for n in learnt if any(offsets[n][0] < b and offsets[n][1] > a for a, b in own)]
    said = turn.prompt + turn.answer
    blank = [n for n in learnt if n < min(marked, default=0) and said[slice(*offsets[n])].isspace()]
    return sorted({*blank, *marked, *added})


def _blocks_of(given: Renderings, index: int, turn: Turn) -> list[Span]:
    """Returns the `{% generation %}` blocks of the conversation up to a turn, where they stand when
    the turn stands behind its prompt."""
    messages, tools = given.given
    messages = [*messages[:index], turn.message or messages[index]]
    own = Renderings(given.tokenizer, messages, tools, turn.variables)
    return [(a + turn.moved, b + turn.moved) for a, b in marked_spans(own) or []]


def _of_turn(
    given: Renderings, turn: Turn, weight: float, learning: Learning, blocks: list[Span] | None
) -> Example:
    """Returns an example of one turn: the tokens of its prompt, then those of its answer."""
    tokens = tokenise(given.tokenizer, turn.prompt + turn.answer)
    span = _token_span(tokens, turn)
    if span is None:  # a token would hold the end of the prompt and the start of the answer
        before, at = tokenise(given.tokenizer, turn.prompt).ids, len(turn.prompt)
        behind, places = tokenise_behind(given.tokenizer, turn.answer)
        tokens = Tokens(given.tokenizer, tokens.text, [*before, *behind])
        tokens.offsets = [(0, 0)] * len(before) + [(a + at, b + at) for a, b in places]
        span = (len(before), len(tokens.ids))
    learnt = set(_learnt(tokens, span, turn, learning, blocks))
    labels = [token if n in learnt else IGNORED for n, token in enumerate(tokens.ids)]
    factors = [weight if n in learnt else 0.0 for n in range(len(tokens.ids))]
    return Example(tokens.ids, labels, _uneven(factors), turn.flags)


def _token_span(tokens: Tokens, turn: Turn) -> Span | None:
    """Returns the tokens of a turn's answer, in those of a text that begins with its prompt and
    answer. None if the tokens before them are not those of the prompt alone."""
    start = len(turn.prompt)
    first, stop = tokens.count(start), tokens.stop(start + len(turn.answer))
    return None if first is None or stop is None else (first, stop)


def _learnt(
    tokens: Tokens, span: Span, turn: Turn, learning: Learning, blocks: list[Span] | None
) -> Sequence[int]:
    """Returns those of an answer's tokens that are learnt."""
    learnt: Sequence[int] = range(*span)
    if turn.empty_thoughts and not learning.empty_thoughts:
        end = len(turn.prompt) + turn.empty_thoughts[1]
        learnt = [n for n in learnt if tokens.offsets[n][0] >= end]
    return learnt if blocks is None else _within(blocks, learnt, tokens.offsets, turn)


def added_by_template(tokenizer: Tokenizer) -> str | None:
    """Returns the text that the template adds to a conversation by itself, such as a default system
    prompt or a date, or None. What stands before each user turn is not counted."""
    word, other = "zq7a", "zq7b"
    asks = [{"role": "user", "content": word}, {"role": "user", "content": other}]
    answer = {"role": "assistant", "content": "zq7c"}
    try:
        text = render_text(tokenizer, [asks[0], answer, asks[1], answer])
    except DataError:
        return None
    before, between = text.partition(word)[0], text.rpartition(other)[0].rpartition("zq7c")[2]
    for token in added_tokens(tokenizer).values():
        before, between = before.replace(token, "\0"), between.replace(token, "\0")
    while before and between and before[-1] == between[-1]:  # the header of a user turn
        before, between = before[:-1], between[:-1]
    return " ".join(before.replace("\0", " ").split()) or None


def prompt_ids(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    variables: Variables | None = None,
) -> list[int]:
    """Returns the tokens that a model is given at inference to continue `messages`."""
    return tokenise(tokenizer, render_text(tokenizer, messages, tools, True, variables)).ids


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the tokens of raw text that a model is to continue, as a document begins in training:
    behind the BOS that the tokenizer adds, and without an eos that it would add."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id]:
        typed = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if typed[-1:] == ids[-1:] else ids[:-1]
    return ids


def _render_document(tokenizer: Tokenizer, text: str) -> Example:
    """Tokenises a document and adds an eos; all tokens are supervised."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Example(ids, list(ids))


def is_document(messages: Messages) -> bool:
    """Returns whether a row is raw text for continued pretraining, not a conversation."""
    return bool(messages[0]["role"] == TEXT)


def _drop_oldest(messages: Messages) -> Iterator[Messages]:
    """Yields the conversation without its first exchange, without its first two, and so on.

    The system turn stays.
    """
    start = 1 if messages[0]["role"] == "system" else 0
    asked = [n for n, m in enumerate(messages) if m["role"] == "user" and n > start]
    for n in asked:
        yield [*messages[:start], *messages[n:]]
