"""Finds what a model has to write in each assistant turn, from renderings of the template itself.

Two renderings decide. The *prompt* is what serving renders before the turn: the messages before
it, with `add_generation_prompt`. The *whole* is the conversation up to and including the turn. What
follows the prompt in the whole, up to the token at which generation stops, is the *answer*: what
the model has to write, and nothing that serving puts into the prompt. Where the whole does not
begin with the prompt, rules that are each stated below find the answer, or the row is refused.

Sentinels confirm an answer: with each value of the turn (content, thoughts, names and arguments of
calls) replaced by one, the template must write the same text around them. No text that a user wrote
is ever searched for a token or a header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from sft.data import rendering
from sft.data.formats import Message, Messages, Tools, content_text
from sft.data.rendering import MARKS, Span, Variables, cached_by_tokenizer
from sft.errors import DataError

ASK: Message = {"role": "user", "content": "a"}
GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn as it is served: `answer` is what the model writes after `prompt`.

    `flags` are kinds of `data/audit`. `empty_thoughts` are the characters of the answer that are a
    block of thoughts without a thought. `variables` are those of the template with which the turn
    is served; they differ from the row's if only others let the template write its thoughts.
    """

    prompt: str
    answer: str
    flags: tuple[str, ...] = ()
    empty_thoughts: Span | None = None
    variables: Variables | None = None


@dataclass
class Renderings:
    """The renderings of one conversation, each made once."""

    tokenizer: Tokenizer
    messages: Messages
    tools: Tools | None = None
    variables: Variables | None = None
    given: tuple[Messages, Tools | None] = field(init=False)  # without marks
    template: Any = field(init=False)
    _texts: dict[tuple[int, bool], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.given, self.template = (self.messages, self.tools), self.tokenizer.chat_template
        self.messages, self.tools = rendering.mark_typed(self.tokenizer, self.messages, self.tools)

    @cached_property
    def sentinel(self) -> str:
        """Returns a word that stands nowhere in the conversation; a number and "e" follow it."""
        word, said = "zq7s", str(self.messages)
        while word in said:
            word += "q"
        return word

    def split_at_sentinels(self, text: str) -> list[str]:
        """Returns the texts between sentinels, with the number of a sentinel after each but the
        last."""
        return re.split(rf"{self.sentinel}(\d+)e", text)

    def prompt(self, turn: int) -> str:
        """Returns what serving renders before message `turn`."""
        return self._render(turn, True)

    def until(self, turn: int) -> str:
        """Returns the conversation up to and including message `turn`."""
        return self._render(turn + 1, False)

    @property
    def text(self) -> str:
        """Returns the whole conversation."""
        return self._render(len(self.messages), False)

    def with_turn(self, turn: int, message: Message) -> str:
        """Returns the conversation up to message `turn`, with `message` in its place."""
        return self.render([*self.messages[:turn], message])

    def render(self, messages: Messages) -> str:
        """Returns other messages, rendered with the same tools and variables."""
        messages, tools = rendering.mark_typed(self.tokenizer, messages, self.tools)
        return rendering.render_marked(self.tokenizer, messages, tools, variables=self.variables)

    def _render(self, stop: int, prompt: bool) -> str:
        if (stop, prompt) not in self._texts:
            self._texts[stop, prompt] = rendering.render_marked(
                self.tokenizer, self.messages[:stop], self.tools, prompt, self.variables
            )
        return self._texts[stop, prompt]

    def prefetch(self, turns: Iterable[int]) -> None:
        """Renders what `find_turn` asks about these turns, under one limit of time."""
        with suppress(DataError), rendering.bounded(self.tokenizer, self.messages):
            for turn in turns:
                self.until(turn)
                self.prompt(turn)


_latest: list[Renderings] = []


def renderings_of(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None, variables: Variables | None
) -> Renderings:
    """Returns the renderings of a conversation. The same ones if it is asked for twice in a row, as
    the audit does, so that each text is rendered once."""
    if _latest:
        (last,) = _latest
        same = last.given[0] is messages and last.given[1] is tools
        same = same and last.tokenizer is tokenizer and last.template is tokenizer.chat_template
        if same and last.variables == variables:
            return last
    _latest[:] = [Renderings(tokenizer, messages, tools, variables)]
    return _latest[0]


Unlearnt = Literal["thoughts_dropped", "no_prompt"]  # kinds of `data/audit`


def find_turn(given: Renderings, index: int) -> Turn | Unlearnt:
    """Returns message `index`, an assistant turn, as it is served, or why no serving could bring a
    model to write it: the template drops its thoughts, or writes no prompt behind another answer.

    Raises DataError with the reason if the template does not decide what the model has to write, or
    changes what the turn says.
    """
    message, flags = given.messages[index], list[str]()
    number = sum(m["role"] == "assistant" for m in given.messages[: index + 1])
    thoughts, _ = rendering.split_thoughts(message)
    prompt = given.prompt(index)
    header = _unprompted_header(given.tokenizer)
    if header and prompt == given.until(index - 1):
        raise DataError(
            "the chat template ignores add_generation_prompt, so a model that is served would have "
            f"to write the header {header!r} itself; write it in the template where "
            "add_generation_prompt is set (data.chat_template)"
        )
    if _lacks_header(given, index, prompt):
        return "no_prompt"
    body, at = _continue(given, index, prompt, message), len(prompt)
    if body is None and not thoughts:
        at = _closed_block(given, index, prompt)
        body = given.until(index)[at:] if at else None
    if body is None and (other := _other_variables(given, index)):
        given, prompt = other
        body, at = _continue(given, index, prompt, message), len(prompt)
        flags.append("other_variables")
    closes = ""
    if body is None and (tag := _unwritten_tag(given, index, prompt)):
        # The model writes its thoughts and the end of the block, then what the template has.
        closes = (thoughts + "\n" if thoughts else "\n") + f"</{tag}>\n\n"
        at = tag_start(prompt)
    elif body is None:
        at, closes = _behind_difference(given, index, prompt, bool(thoughts))
    if body is None and at:
        body = given.until(index)[at:]
        flags += ["thoughts_closed"] * bool(closes)
    if body is None:
        raise DataError(_mismatch(given, index, prompt, number))
    frame = _confirm(given, index, message, body, at if at != len(prompt) else None, number)
    if closes:
        frame = frame._replace(has_thoughts=True)
    if thoughts and not frame.has_thoughts:
        return "thoughts_dropped"
    answer, added = _end(given, index, message, body, frame.tail)
    flags += ["end_of_turn_added"] * added
    if not _is_plain(message) and (token := _early_stop(given.tokenizer, answer)):
        raise DataError(
            f"generation stops at {token!r}, which the chat template writes inside assistant turn "
            f"{number}, so a model that is served could not write the turn to its end; give each "
            "call a turn of its own, or correct the template (data.chat_template)"
        )
    empty = None
    if not thoughts and (match := re.match(r"\s*(<(\w+)>)?\s*</(\w+)>\s*", closes + answer)):
        empty = match.span() if match[2] in (None, match[3]) else None
    return Turn(prompt, closes + answer, tuple(flags), empty, given.variables)


@cached_by_tokenizer
def _unprompted_header(tokenizer: Tokenizer) -> str | None:
    """Returns the header of an assistant turn if `add_generation_prompt` does not write it."""
    given = Renderings(tokenizer, [ASK, {"role": "assistant", "content": "zq7s0e"}])
    try:
        prompt, whole = given.prompt(1), given.text
        changes_nothing = prompt == given.until(0)
    except DataError:
        return None
    if not changes_nothing or not whole.startswith(prompt):  # or the header is always written
        return None
    header = whole[len(prompt) :].partition("zq7s0e")[0]
    return header if header.strip() else None


@cached_by_tokenizer
def _header(tokenizer: Tokenizer) -> str:
    """Returns what `add_generation_prompt` writes behind a user's turn."""
    given = Renderings(tokenizer, [ASK, {"role": "assistant", "content": "b"}])
    try:
        return given.prompt(1).removeprefix(given.until(0))
    except DataError:
        return ""


def _lacks_header(given: Renderings, index: int, prompt: str) -> bool:
    """Returns whether the turn follows another assistant turn, and the template writes its header
    in the text but not in the prompt, as it does behind a user's turn."""
    if given.messages[index - 1]["role"] != "assistant" or not _header(given.tokenizer).strip():
        return False
    if prompt != given.until(index - 1):
        return False
    stand_in, _ = _stand_in(given.messages[index], given.sentinel)
    traced = given.with_turn(index, stand_in)
    before = traced.partition(given.sentinel)[0][_difference(prompt, traced, given.tokenizer) :]
    tokens = [token for _, token in _added_tokens_in(given.tokenizer, _header(given.tokenizer))]
    return any(said in before for said in (*tokens, _header(given.tokenizer).strip()))


# --- What follows the prompt -------------------------------------------------------------------


def tag_start(prompt: str) -> int:
    """Returns where the tag begins that a prompt ends in."""
    match = rendering.OPEN_TAG.search(prompt)
    return match.start() if match else len(prompt)


def _continue(given: Renderings, index: int, prompt: str, message: Message) -> str | None:
    """Returns what the template writes of `message` after the prompt of its place, or None.

    1. The conversation begins with the prompt: what follows it.
    2. They differ in blanks behind an opening tag that both write (Nemotron: the prompt ends in
       "<think>\\n", the text has "<think></think>"): what follows the tag.
    3. The template rewrites earlier messages once this turn stands behind them (gpt-oss drops the
       analysis before a final answer): what follows, in the turn, the header that the prompt ends
       in.
    """
    whole = (
        given.with_turn(index, message)
        if message is not given.messages[index]
        else (given.until(index))
    )
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    opened = prompt.rstrip()
    if rendering.OPEN_TAG.search(opened) and whole.startswith(opened):
        return whole[len(opened) :]
    try:
        history = given.until(index - 1)
    except DataError:
        return None
    header = prompt.removeprefix(history)
    if whole.startswith(history) or not header.strip() or not prompt.startswith(history):
        return None
    stand_in, _ = _stand_in(message, given.sentinel)
    traced = given.with_turn(index, stand_in)
    at = traced.rfind(header, 0, traced.find(given.sentinel))
    same = at >= 0 and whole.startswith(traced[: at + len(header)])
    return whole[at + len(header) :] if same else None


def _other_variables(given: Renderings, index: int) -> tuple[Renderings, str] | None:
    """Returns the renderings with a variable of the template, true or false, with which the prompt
    fits the turn, and that prompt.

    A template whose prompt closes the thoughts by default lets the model think with another value.
    """
    for name in rendering.template_variables(given.tokenizer):
        for value in (True, False):
            if (given.variables or {}).get(name) == value:
                continue
            variables = {**(given.variables or {}), name: value}
            other = replace(given, variables=variables, _texts={})
            try:
                prompt, whole = other.prompt(index), other.until(index)
                opens = prompt != given.prompt(index) and _unwritten_tag(other, index, prompt)
            except DataError:
                continue
            if whole.startswith(prompt) or opens:
                return other, prompt
    return None


def _unwritten_tag(given: Renderings, index: int, prompt: str) -> str | None:
    """Returns the tag that the prompt opens and the template's text of the turn does not have, as
    in DeepSeek-R1, or None."""
    match = rendering.OPEN_TAG.search(prompt)
    is_dropped = match and given.until(index).startswith(prompt[: match.start()])
    return match[1] if match and is_dropped else None


def _difference(prompt: str, text: str, tokenizer: Tokenizer) -> int:
    """Returns where a text ceases to be the prompt, at the start of a token or of a tag."""
    pairs = enumerate(zip(prompt, text, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(text)))
    for said in (prompt, text):
        starts = (
            start
            for start, token in _added_tokens_in(tokenizer, said)
            if start < at < start + len(token)
        )
        at = next(starts, at)
    tag = re.search(r"<[/|]?\w*$", prompt[:at])
    return tag.start() if tag else at


def _closed_block(given: Renderings, index: int, prompt: str) -> int:
    """Returns where the prompt closes a block of thoughts that the text of the turn does not have,
    and what the model writes begins in the text. 0: the two differ otherwise."""
    whole = given.until(index)
    at = _difference(prompt, whole, given.tokenizer)
    block = re.fullmatch(r"\s*<([^<>\s]+)>\s*<([^<>\s]+)>\s*", prompt[at:])
    names = (
        [re.sub(r"(?i)^[/|]*((start|begin|end)_?)?|[|]*$", "", n) for n in block.groups()]
        if (block)
        else []
    )
    return at if block and block[1] != block[2] and names[0] == names[1] else 0


def _behind_difference(
    given: Renderings, index: int, prompt: str, has_thoughts: bool
) -> tuple[int, str]:
    """Returns where the model's part of a turn begins in a text that does not have what the prompt
    ends in, and what the model has to write before it to close its thoughts. (0, ""): the
    template does not say.

    1. The prompt opens the thoughts, and the turn has none: what the template writes behind the
       thoughts of the same turn closes them (Cohere2MoE: "<|START_THINKING|>").
    2. The first value of the turn stands where the text and the prompt part: a header that the text
       does not have a second time (Apertus behind a tool's result), or words that open the thoughts
       (Apriel: "Here are my reasoning steps:").
    """
    message = given.messages[index]
    stand_in, slots = _stand_in(message, given.sentinel)
    traced = given.with_turn(index, stand_in)
    at = _difference(prompt, traced, given.tokenizer)
    if not has_thoughts:
        thought = f"{given.sentinel}{len(slots)}e"
        with suppress(DataError):
            thinking = given.with_turn(index, {**stand_in, "reasoning_content": thought})
            before, found, after = thinking.partition(thought)
            rest = traced[at:]
            starts = before.rstrip() in (prompt.rstrip(), prompt[:at].rstrip())
            if found and starts and rest and after.endswith(rest) and after != rest:
                return at, after.removesuffix(rest)
    begins = traced[at:].lstrip().startswith(given.sentinel) and prompt[at:].strip()
    is_header = (
        not rendering.OPEN_TAG.search(prompt[at:])
        and not re.sub(
            added.pattern if (added := added_pattern(given.tokenizer)) else "$^", "", prompt[at:]
        ).strip()
    )
    is_thought = has_thoughts and bool(slots) and slots[0].kind == "thoughts"
    return (at, "") if begins and (is_thought or is_header) else (0, "")


def _mismatch(given: Renderings, index: int, prompt: str, number: int) -> str:
    whole = given.until(index)
    pairs = enumerate(zip(prompt, whole, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
    names = rendering.template_variables(given.tokenizer)
    remedy = f"set data.template_kwargs (it reads {', '.join(names)}), or " if names else ""
    return (
        f"the prompt that serving renders before assistant turn {number} is not how the chat "
        f"template begins that turn: after {prompt[max(0, at - 12) : at]!r} the prompt has "
        f"{prompt[at : at + 24]!r}, the conversation {whole[at : at + 24]!r}; {remedy}correct the "
        "template (data.chat_template): add_generation_prompt must write how a turn begins"
    )


# --- Confirming the values ---------------------------------------------------------------------


class _Slot(NamedTuple):
    """A value of a turn, in whose place a sentinel stands."""

    kind: str
    value: str


class _Frame(NamedTuple):
    """What the template wrote around the values of a turn."""

    tail: str  # behind the last value
    has_thoughts: bool


def _stand_in(message: Message, word: str) -> tuple[Message, list[_Slot]]:
    """Returns the turn with a sentinel in place of every text that its author wrote."""
    slots: list[_Slot] = []

    def sentinel(kind: str, value: str) -> str:
        if not value.strip():
            return value
        slots.append(_Slot(kind, value))
        return f"{word}{len(slots) - 1}e"

    def leaves(value: Any) -> Any:
        if isinstance(value, str):
            return sentinel("an argument", value)
        if isinstance(value, dict):
            return {key: leaves(item) for key, item in value.items()}
        return [leaves(item) for item in value] if isinstance(value, list) else value

    made = dict(message)
    if message.get("reasoning_content"):
        made["reasoning_content"] = sentinel("thoughts", message["reasoning_content"])
    content = message["content"]
    if isinstance(content, list):
        made["content"] = [{**p, "text": sentinel("content", p["text"])} for p in content]
    elif not made.get("reasoning_content") and (block := rendering.THOUGHTS.match(content)):
        opened, thoughts, closed = block.groups()
        blanks = re.fullmatch(r"(?s)(\s*)(.*?)(\s*)", thoughts)
        inner = blanks.groups() if blanks else ("", thoughts, "")
        made["content"] = (
            f"{opened}{inner[0]}{sentinel('thoughts', inner[1])}{inner[2]}{closed}"
            f"{sentinel('content', content[block.end() :])}"
        )
    else:
        made["content"] = sentinel("content", content)
    if calls := rendering.get_calls(message):
        made["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "name": sentinel("the name of a call", call["function"]["name"]),
                    "arguments": leaves(call["function"].get("arguments", {})),
                },
            }
            for call in calls
        ]
    return made, slots


def _confirm(
    given: Renderings, index: int, message: Message, body: str, at: int | None, number: int
) -> _Frame:
    """Compares a turn with one of sentinels. Raises DataError if a value is changed or missing.

    `at`: where the body begins in the text, if that is not where the prompt ends.
    """
    is_plain = _is_plain(message) and at is None
    frames = _frames(given.tokenizer)
    for before, after in frames if is_plain else ():
        held = body[len(before) : len(body) - len(after)]
        is_frame = body.startswith(before) and body.endswith(after)
        if is_frame and held in _trimmed(message["content"]):
            return _Frame(after, False)
    stand_in, slots = _stand_in(message, given.sentinel)
    if at is not None:
        traced: str | None = given.with_turn(index, stand_in)[at:]
    else:
        traced = _continue(given, index, given.prompt(index), stand_in)
    if traced is None:
        raise _altered(number, message)
    pieces = given.split_at_sentinels(traced)
    written = {int(n) for n in pieces[1::2]}
    missing = [
        f"{slot.kind} ({slot.value[:40]!r})"
        for n, slot in enumerate(slots)
        if n not in written and slot.kind not in ("", "thoughts")
    ]
    for call in rendering.get_calls(message):
        literals = _literals(call["function"].get("arguments", {}))
        missing += [f"an argument ({leaf})" for leaf in literals if leaf not in body]
    if missing:
        raise DataError(
            f"the chat template does not write {missing[0]} of assistant turn {number}; use a "
            "model whose template writes it, or remove it from the row"
        )
    if not _fits(body, 0, pieces, slots):
        raise _altered(number, message)
    if is_plain and len(pieces) == 3 and len(frames) < 8:
        frames.append((pieces[0], pieces[2]))
    has_thoughts = any(slots[n].kind == "thoughts" for n in written)
    return _Frame(pieces[-1], has_thoughts)


def _is_plain(message: Message) -> bool:
    """Returns whether a turn is nothing but one text."""
    content = message["content"]
    is_text = isinstance(content, str) and content.strip() and "<think>" not in content
    return bool(is_text) and not (message.get("reasoning_content") or rendering.get_calls(message))


@cached_by_tokenizer
def _frames(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Returns the texts that stood around plain contents so far; later ones are compared first."""
    return []


def _literals(value: Any) -> Iterator[str]:
    """Yields the keys and numbers of an argument, as JSON writes them, without quotes."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key.isascii() and key.isprintable() and not {'"', "\\"} & set(key):
                yield key
            yield from _literals(item)
    elif isinstance(value, list):
        for item in value:
            yield from _literals(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def _fits(text: str, at: int, pieces: list[str], slots: list[_Slot]) -> bool:
    """Returns whether `text` from `at` is the pieces with a form of each value between them."""
    for k in range(0, len(pieces), 2):
        piece = pieces[k]
        if not text.startswith(piece, at):
            return False
        at += len(piece)
        if k + 1 == len(pieces):
            return at == len(text)
        after = pieces[k + 2]
        found = next(
            (f for f in forms(slots[int(pieces[k + 1])].value) if text.startswith(f + after, at)),
            None,
        )
        if found is None:
            return False
        at += len(found)
    return False


def _trimmed(value: str) -> tuple[str, ...]:
    """Returns a text and its trimmed forms, the longest first."""
    one_side = (value.rstrip("\n"), value.rstrip(), value.lstrip("\n"), value.lstrip())
    return (value, *one_side, value.strip("\n"), value.strip())


def forms(value: str) -> Iterator[str]:
    """Yields the forms in which templates write a text: as it is, trimmed, as JSON, as JSON in
    JSON, as Python."""
    yield from _trimmed(value)
    for ascii_only in (False, True):
        quoted = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        yield from (quoted, json.dumps(quoted, ensure_ascii=ascii_only)[1:-1])
    yield repr(value)[1:-1]


def _altered(number: int, message: Message) -> DataError:
    return DataError(
        f"the chat template alters or drops what assistant turn {number} says "
        f"({content_text(message)[:40]!r}), so it cannot be trained on as written; end the row "
        "before this turn, or correct the template or the row"
    )


# --- The end of a turn -------------------------------------------------------------------------


def _end(given: Renderings, index: int, message: Message, body: str, tail: str) -> tuple[str, bool]:
    """Returns the body up to the token at which generation stops, and whether it had to be added.

    `tail` is what the template wrote behind the last value, so it holds no text of a user. In it,
    the turn ends with the first token at which serving stops (`stop_tokens`); else with the token
    that ends an answer without calls; else with the header of the next message, if serving stops at
    it (GLM; Gemma 4 behind a call); else with the last added token, in which a call ends. Where the
    template ends answers with no token, the eos token is added.
    """
    tokenizer = given.tokenizer
    stops, answer_end = stop_tokens(tokenizer), _answer_end(tokenizer)
    found = [(at + len(token), token) for at, token in _added_tokens_in(tokenizer, tail)]
    ends = [end for end, token in found if token in stops]
    ends = ends or [end for end, token in found if token == answer_end]
    if not ends:
        blank, following = _next_header(given, index, message)
        if following in stops:
            return body + blank + str(following), True
        ends = [end for end, _ in found[-1:] if answer_end]
    if ends:
        return body[: len(body) - len(tail) + ends[0]], False
    if following and _next_header_of_user(tokenizer)[1] in stops:
        return body + blank + following, True
    return body.rstrip() + tokenizer.eos_token, True


def _early_stop(tokenizer: Tokenizer, answer: str) -> str | None:
    """Returns a token that ends the answer, or at which serving stops, and that stands in it before
    its end; None if there is none. What someone typed is not a token."""
    written = re.sub(f"{MARKS[0]}[^{MARKS[1]}]*{MARKS[1]}", "", answer)
    *inside, last = [*_added_tokens_in(tokenizer, written)] or [(0, "")]
    stops = stop_tokens(tokenizer) | {last[1]}
    return next((token for _, token in inside if token in stops), None)


def _added_tokens_in(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, str]]:
    pattern = added_pattern(tokenizer)
    if pattern:
        yield from ((match.start(), match[0]) for match in pattern.finditer(text))


@cached_by_tokenizer
def added_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Compiles a pattern of the added tokens, the longest first; None if there are none."""
    tokens = sorted(rendering.added_tokens(tokenizer).values(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


@cached_by_tokenizer
def _answer_end(tokenizer: Tokenizer) -> str | None:
    """Returns the added token that ends an answer of one turn, or None."""
    try:
        text = rendering.render_text(tokenizer, [ASK, {"role": "assistant", "content": "zq7s0e"}])
    except DataError:
        return None
    tail = text.rpartition("zq7s0e")[2]
    return next((token for _, token in reversed([*_added_tokens_in(tokenizer, tail)])), None)


@cached_by_tokenizer
def stop_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """Returns the texts of the tokens at which serving stops: eos, and what `prepare_tokenizer` was
    given (the model's generation config, `model.stop_tokens`)."""
    return frozenset({tokenizer.eos_token, *tokenizer.init_kwargs.get("stop_tokens", ())})


@cached_by_tokenizer
def end_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the tokens that end an answer or a call in training, so that serving must stop."""
    called = {"name": "b", "arguments": {"c": "d"}}
    call = {"id": "call00001", "type": "function", "function": called}
    turns: list[Message] = [
        {"role": "assistant", "content": "e"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    found = set()
    for turn in turns:
        with suppress(DataError):
            made = find_turn(Renderings(tokenizer, [ASK, turn]), 1)
            if isinstance(made, Turn):
                ends = _added_tokens_in(tokenizer, made.answer)
                found |= {t for at, t in ends if at + len(t) == len(made.answer)}
    return tuple(sorted(found))


def _next_header(given: Renderings, index: int, message: Message) -> tuple[str, str | None]:
    """Returns the added token that the template writes first behind the turn, and the blanks before
    it: before the next message if it is not the assistant's, else before a tool's result or the
    user's message."""
    following: Message = {"role": "user", "content": "zq7s0e"}
    if rendering.get_calls(message):
        following = {"role": "tool", "content": "zq7s0e"}
    if [m["role"] for m in given.messages[index + 1 : index + 2]] not in ([], ["assistant"]):
        following = {**given.messages[index + 1], "content": "zq7s0e"}
    without = {**message, "reasoning_content": "", "content": rendering.split_thoughts(message)[1]}
    for turn in (message, without):  # some templates drop the thoughts of earlier turns
        try:
            whole = given.with_turn(index, turn)
            longer = given.render([*given.messages[:index], turn, following])
        except DataError:
            continue
        if longer.startswith(whole):
            break
    else:
        return "", None
    more = longer[len(whole) :]
    blank = more[: len(more) - len(more.lstrip())]
    added = _added_tokens_in(given.tokenizer, more.lstrip())
    return blank, next((token for at, token in added if at == 0), None)


@cached_by_tokenizer
def _next_header_of_user(tokenizer: Tokenizer) -> tuple[str, str | None]:
    answer = {"role": "assistant", "content": "b"}
    return _next_header(Renderings(tokenizer, [ASK, answer]), 1, answer)


# --- Marks of the template ---------------------------------------------------------------------


def marked_spans(given: Renderings) -> list[Span] | None:
    """Returns the `{% generation %}` blocks of the whole text, or None if the template has none."""
    tokenizer = given.tokenizer
    if not GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        return None
    text, blocks = _render_blocks(given)
    if any("zq7s0e" in marked for marked in _marked_of_users(tokenizer)):
        raise DataError(
            "the chat template marks the user's turns for training ({% generation %}); mark what "
            "the assistant writes, or remove the blocks"
        )
    return blocks if text == given.text else None


@cached_by_tokenizer
def _marked_of_users(tokenizer: Tokenizer) -> list[str]:
    """Returns what the template marks of a conversation whose user says "zq7s0e"."""
    ask: Message = {"role": "user", "content": "zq7s0e"}
    text, blocks = _render_blocks(
        Renderings(tokenizer, [ask, {"role": "assistant", "content": "a"}])
    )
    return [text[start:end] for start, end in blocks]


def _render_blocks(given: Renderings) -> tuple[str, list[Span]]:
    """Returns the text of a conversation and its `{% generation %}` blocks."""
    tokenizer = given.tokenizer
    names: dict[str, Any] = {**tokenizer.special_tokens_map, **(given.variables or {})}
    messages = rendering.read_form(tokenizer).apply(given.messages)
    with rendering.bounded(tokenizer, messages):
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=given.tools,
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **names,
        )
    (text,), (blocks,) = rendered
    return text, [(start, end) for start, end in blocks]
