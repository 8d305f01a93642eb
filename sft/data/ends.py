"""Finds the token with which an assistant turn ends: the one at which serving stops."""

from __future__ import annotations

import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data import rendering
from sft.data.formats import Message
from sft.data.rendering import MARKS, Renderings, cached_by_tokenizer
from sft.errors import DataError

ASK: Message = {"role": "user", "content": "a"}


def find_end(
    given: Renderings, index: int, message: Message, body: str, tail: str
) -> tuple[str, bool]:
    """Returns the body up to the token at which generation stops, and whether it had to be added.

    `tail` is what the template wrote behind the last value, so it holds no text of a user. In it,
    the turn ends with the first token at which serving stops (`stop_tokens`); else with the token
    that ends an answer without calls; else with the header of the next message, if serving stops at
    it (GLM; Gemma 4 behind a call); else with the last added token, in which a call ends. Where the
    template ends answers with no token, the eos token is added.
    """
    tokenizer = given.tokenizer
    stops, answer_end = stop_tokens(tokenizer), _answer_end(tokenizer)
    found = [(at + len(token), token) for at, token in added_tokens_in(tokenizer, tail)]
    ends = [end for end, token in found if token in stops]
    ends = ends or [end for end, token in found if token == answer_end]
    if not ends:
        header = _next_header(given, index, message)
        if header.lstrip() in stops:
            return body + header, True
        ends = [end for end, _ in found[-1:] if answer_end]
    if ends:
        return body[: len(body) - len(tail) + ends[0]], False
    if header and _next_header_of_user(tokenizer).lstrip() in stops:
        return body + header, True
    return body.rstrip() + tokenizer.eos_token, True


def early_stop(tokenizer: Tokenizer, answer: str) -> str | None:
    """Returns a token that ends the answer, or at which serving stops, and that stands in it before
    its end; None if there is none. What someone typed is not a token."""
    written = re.split(f"{MARKS[0]}[^{MARKS[1]}]*{MARKS[1]}", answer)
    tokens = [token for part in written for _, token in added_tokens_in(tokenizer, part)]
    stops = stop_tokens(tokenizer) | {*tokens[-1:]}
    return next((token for token in tokens[:-1] if token in stops), None)


def added_tokens_in(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, str]]:
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
    return next((token for _, token in reversed([*added_tokens_in(tokenizer, tail)])), None)


@cached_by_tokenizer
def stop_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """Returns the texts of the tokens at which serving stops: eos, and what `prepare_tokenizer` was
    given (the model's generation config, `model.stop_tokens`)."""
    return frozenset({tokenizer.eos_token, *tokenizer.init_kwargs.get("stop_tokens", ())})


def _next_header(given: Renderings, index: int, message: Message) -> str:
    """Returns the added token that the template writes first behind the turn, with the blanks
    before it: before the next message if it is the user's or a tool's result, else before such a
    one. Returns "" if the template writes something else there."""
    following: Message = {**ASK, "role": "tool"} if rendering.get_calls(message) else ASK
    if [m["role"] for m in given.messages[index + 1 : index + 2]] in (["user"], ["tool"]):
        following = {**given.messages[index + 1], "content": ASK["content"]}
    without = {**message, "reasoning_content": "", "content": rendering.split_thoughts(message)[1]}
    for turn in (message, without):  # some templates drop the thoughts of earlier turns
        try:
            whole = given.with_turn(index, turn)
            longer = given.render([*given.messages[:index], turn, following])
        except DataError:
            continue
        if longer.startswith(whole):
            more = longer[len(whole) :]
            text = more.lstrip()
            tokens = [token for at, token in added_tokens_in(given.tokenizer, text) if at == 0]
            return "".join([more[: len(more) - len(text)], *tokens]) if tokens else ""
    return ""


@cached_by_tokenizer
def _next_header_of_user(tokenizer: Tokenizer) -> str:
    answer = {"role": "assistant", "content": "b"}
    return _next_header(Renderings(tokenizer, [ASK, answer]), 1, answer)
