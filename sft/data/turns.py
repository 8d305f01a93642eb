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

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from sft.data import ends, reasons, rendering, sentinels
from sft.data.ends import ASK
from sft.data.formats import Message
from sft.data.rendering import Renderings, Span, Variables, cached_by_tokenizer
from sft.errors import DataError

GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn as it is served: `answer` is what the model writes after `prompt`.

    `flags` are kinds of `data/audit`. `empty_thoughts` are the characters of the answer that are a
    block of thoughts without a thought. `variables` are those of the template with which the turn
    is served; they differ from the row's if only others let the template write its thoughts.
    `message` is the turn with its thoughts in `reasoning_content`, if it is served only like that.
    `moved` is how many characters further on the answer stands behind its prompt than in the
    template's own text of the conversation.
    """

    prompt: str
    answer: str
    flags: tuple[str, ...] = ()
    empty_thoughts: Span | None = None
    variables: Variables | None = None
    message: Message | None = None
    moved: int = 0


Unlearnt = Literal["thoughts_dropped", "no_prompt"]  # kinds of `data/audit`


def find_turn(given: Renderings, index: int) -> Turn | Unlearnt:
    """Returns message `index`, an assistant turn, as it is served, or why no serving could bring a
    model to write it: the template drops its thoughts, or writes no prompt behind another answer.

    Raises DataError with the reason if the template does not decide what the model has to write, or
    changes what the turn says. Two changes of an answer are none: a block of thoughts at its start
    may be given as `reasoning_content`, and tags further on are text, whatever the template makes
    of them in an earlier turn.
    """
    try:
        found = _find_turn(given, index)
        return (_with_thoughts(given, index) or found) if found == "thoughts_dropped" else found
    except DataError as error:
        reason = error
    messages, tools = given.given
    thoughts, content = rendering.split_thoughts(messages[index])
    if thoughts and not messages[index].get("reasoning_content"):
        moved = {**messages[index], "reasoning_content": thoughts, "content": content}
        other = Renderings(given.tokenizer, [*messages[:index], moved], tools, given.variables)
        with suppress(DataError):
            found = _find_turn(other, index)
            return replace(found, message=moved) if isinstance(found, Turn) else found
    hidden = sentinels.hide_tags(given, messages[index])
    if hidden != messages[index]:
        other = Renderings(given.tokenizer, [*messages[:index], hidden], tools, given.variables)
        with suppress(DataError):
            found = _find_turn(other, index)
            if isinstance(found, Turn):
                said = sentinels.show_tags(given, found.answer)
                return replace(found, answer=said, flags=(*found.flags, "tags_kept"))
    raise reason


def _with_thoughts(given: Renderings, index: int) -> Turn | None:
    """Returns a turn as it is served with a variable that lets the template write thoughts."""
    for name, value in _thinking_variables(given.tokenizer):
        if name in (given.variables or {}):  # the row says how it is served
            continue
        variables = {**(given.variables or {}), name: value}
        with suppress(DataError):
            found = _find_turn(replace(given, variables=variables, _texts={}), index)
            if isinstance(found, Turn):
                flags = dict.fromkeys((*found.flags, "other_variables"))
                return replace(found, flags=tuple(flags))
    return None


@cached_by_tokenizer
def _thinking_variables(tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Returns variables, true or false, with which alone the template writes the thoughts of an
    answer, as `enable_thinking` of DeepSeek-V4."""
    turn = {"role": "assistant", "content": "b", "reasoning_content": "zq7s0e"}

    def writes(variables: Variables | None) -> bool:
        with suppress(DataError):
            return "zq7s0e" in Renderings(tokenizer, [ASK, turn], None, variables).text
        return False

    names = rendering.template_variables(tokenizer)
    return [(n, value) for n, value in product(names, (True, False)) if writes({n: value})]


def _find_turn(given: Renderings, index: int) -> Turn | Unlearnt:
    """Does what `find_turn` does, of the turn as it is given."""
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
        at = tag_start(prompt)
        blank = "" if given.until(index)[at : at + 1].isspace() else "\n\n"
        closes = (thoughts + "\n" if thoughts else "\n") + f"</{tag}>{blank}"
    elif body is None:
        at, closes = _behind_difference(given, index, prompt, bool(thoughts))
    if body is None and at:
        body = given.until(index)[at:]
        flags += ["thoughts_closed"] * bool(closes)
    if body is None:
        raise DataError(_mismatch(given, index, prompt, number))
    is_usual = at == len(prompt)

    def trace(other: Message) -> str | None:
        if is_usual:
            return _continue(given, index, given.prompt(index), other)
        return given.with_turn(index, other)[at:]

    frame = sentinels.confirm(given, index, body, number, trace, is_usual)
    if closes:
        frame = frame._replace(has_thoughts=True)
    if thoughts and not frame.has_thoughts:
        return "thoughts_dropped"
    answer, added = ends.find_end(given, index, message, body, frame.tail)
    flags += ["end_of_turn_added"] * added
    if not sentinels.is_plain(message) and (token := ends.early_stop(given.tokenizer, answer)):
        place = (len(prompt) + answer.find(token)) if is_usual else token
        line = reasons.line_that_writes(given, given.messages[: index + 1], place)
        raise DataError(
            f"generation stops at {token!r}, which the chat template writes inside assistant turn "
            f"{number} ({line}), so a model that is served could not write the turn to its end; "
            "give each call, and text beside it, a turn of its own, or correct the template "
            "(data.chat_template)"
        )
    empty = None
    head = closes + frame.head  # so that no tag of the content is taken for the template's
    if not thoughts and (match := re.match(r"\s*(<(\w+)>)?\s*</(\w+)>\s*", head)):
        empty = match.span() if match[2] in (None, match[3]) else None
    moved = len(prompt + closes) - (len(given.until(index)) - len(body))
    return Turn(prompt, closes + answer, tuple(flags), empty, given.variables, None, moved)


@cached_by_tokenizer
def _unprompted_header(tokenizer: Tokenizer) -> str | None:
    """Returns the header of an assistant turn if `add_generation_prompt` does not write it."""
    given = Renderings(tokenizer, [ASK, {"role": "assistant", "content": "zq7s0e"}])
    try:
        prompt, whole = given.prompt(1), given.text
        changes_nothing = prompt == given.until(0)
    except DataError:
        return None
    if not changes_nothing or not whole.startswith(prompt) or _always_writes_header(tokenizer):
        return None
    header = whole[len(prompt) :].partition("zq7s0e")[0]
    return header if header.strip() else None


def _always_writes_header(tokenizer: Tokenizer) -> bool:
    """Returns whether a conversation always ends in the header of a turn, as in Command A's
    templates: what follows a user's turn then depends on whether there is another message."""
    given = Renderings(tokenizer, [ASK, ASK])
    with suppress(DataError):
        return not given.until(1).startswith(given.until(0))
    return False


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
    stand_in, _ = sentinels.stand_in(given.messages[index], given.sentinel)
    traced = given.with_turn(index, stand_in)
    before = traced.partition(given.sentinel)[0][_difference(prompt, traced, given.tokenizer) :]
    tokens = [token for _, token in ends.added_tokens_in(given.tokenizer, _header(given.tokenizer))]
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
       analysis before a final answer; Mistral's the system prompt): what follows, behind the
       message before, the text that follows it in the prompt.
    """
    is_own = message is given.messages[index]
    whole = given.until(index) if is_own else given.with_turn(index, message)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    opened = prompt.rstrip()
    if rendering.OPEN_TAG.search(opened) and whole.startswith(opened):
        return whole[len(opened) :]
    return _behind_rewritten(given, index, prompt, message)


def _behind_rewritten(given: Renderings, index: int, prompt: str, message: Message) -> str | None:
    """Returns rule 3 of `_continue`. Words take the place of what the message before says. Between
    the last of them and the first value of the turn, the text must have the header in which the
    prompt ends, or, without a header, what the prompt has behind the word."""
    last, slots = sentinels.stand_in(given.messages[index - 1], f"{given.sentinel}p")
    last = last if slots else {**last, "content": f"{given.sentinel}p0e"}  # an empty result
    earlier = [*given.messages[: index - 1], last]
    stand_in, _ = sentinels.stand_in(message, given.sentinel)
    try:
        history = given.until(index - 1)
        texts = [given.render([*earlier, *more]) for more in ([], [message], [stand_in])]
    except DataError:
        return None
    whole = given.with_turn(index, message)
    if whole.startswith(history) or not prompt.startswith(history):
        return None
    word = (re.findall(rf"{given.sentinel}p\d+e", texts[0]) or [""])[-1]
    if not word or any(text.count(word) != 1 for text in texts):
        return None
    (_, tail), (start, rest), (same, traced) = (text.split(word) for text in texts)
    between, header = traced.partition(given.sentinel)[0], prompt.removeprefix(history)
    known = between.partition(header)[0] + header if header.strip() else tail
    if start != same or not between.startswith(known) or not rest.startswith(known):
        return None
    body = rest.removeprefix(known)
    return body if whole.endswith(body) else None


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
            for start, token in ends.added_tokens_in(tokenizer, said)
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
    3. The prompt ends in the header of a turn behind the user's. What the text then has before the
       first value is the same as behind the user, and all before that is in the prompt (Gemma 4
       joins an answer and the one before it).
    """
    message = given.messages[index]
    stand_in, slots = sentinels.stand_in(message, given.sentinel)
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
            added.pattern if (added := ends.added_pattern(given.tokenizer)) else "$^",
            "",
            prompt[at:],
        ).strip()
    )
    is_thought = has_thoughts and bool(slots) and slots[0].kind == "thoughts"
    if begins and (is_thought or is_header):
        return at, ""
    fresh = Renderings(given.tokenizer, [ASK, stand_in], given.tools, given.variables)
    with suppress(DataError):
        header, whole = fresh.prompt(1).removeprefix(fresh.until(0)), fresh.until(1)
        before, found, _ = traced.partition(given.sentinel)
        head = whole.removeprefix(fresh.prompt(1)).partition(given.sentinel)[0]
        is_fresh = found and header.strip() and whole.startswith(fresh.prompt(1))
        if is_fresh and prompt.endswith(header) and before.endswith(head):
            at = len(before) - len(head)
            is_same = given.until(index).startswith(before[:at])  # whatever the turn says
            if is_same and prompt.startswith(before[:at].removesuffix(header)):
                return at, ""
    return 0, ""


def _mismatch(given: Renderings, index: int, prompt: str, number: int) -> str:
    whole = given.until(index)
    pairs = enumerate(zip(prompt, whole, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
    names = rendering.template_variables(given.tokenizer)
    remedy = f"set data.template_kwargs (it reads {', '.join(names)}), or " if names else ""
    lines = (
        reasons.line_that_writes(given, given.messages[:index], at, add_prompt=True),
        reasons.line_that_writes(given, given.messages[: index + 1], at),
    )
    written = " and ".join(dict.fromkeys(filter(None, lines)))
    return (
        f"the prompt that serving renders before assistant turn {number} is not how the chat "
        f"template begins that turn: after {prompt[max(0, at - 12) : at]!r} the prompt has "
        f"{prompt[at : at + 24]!r}, the conversation {whole[at : at + 24]!r}; the template writes "
        f"them at {written or 'no line'}; {remedy}correct the "
        "template (data.chat_template): add_generation_prompt must write how a turn begins"
    )


# --- The end of a turn -------------------------------------------------------------------------


@cached_by_tokenizer
def end_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the tokens that end an answer or a call in training, so that serving must stop."""
    called = {"name": "b", "arguments": {"c": "d"}}
    call = {"id": "call00001", "type": "function", "function": called}
    turns: list[Message] = [
        {"role": "assistant", "content": "e"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    found, variants = set(), rendering.variants(tokenizer).values()
    for variant, turn in product(variants, turns):
        with suppress(DataError):
            made = find_turn(Renderings(variant, [ASK, turn]), 1)
            if isinstance(made, Turn):
                added = ends.added_tokens_in(tokenizer, made.answer)
                found |= {t for at, t in added if at + len(t) == len(made.answer)}
    return tuple(sorted(found))


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
    with rendering.Bounded(tokenizer, messages):
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=given.tools,
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **names,
        )
    (text,), (blocks,) = rendered
    return text, [(start, end) for start, end in blocks]
