"""Messages -> (ids, labels) through the tokenizer's own chat template; nothing else renders.

What is supervised is decided on *characters* of the rendered text, then carried to tokens by their
offsets. Each assistant turn is one span: its content, its tool calls and the end of turn that the
template writes.

- A template with `{% generation %}` blocks says itself what the spans are.
- Else the conversation is rendered once more with a sentinel in place of every assistant content
  and of every called function's name. What stands between the sentinels is what the template
  wrote, and the true rendering must be exactly these pieces with the (possibly trimmed) values
  between them. No prefix of a conversation is ever assumed to render to a prefix of the text.
- How a turn closes is read off a conversation of one turn, behind which no next header can stand:
  the text up to and including its first added token (`<|im_end|>`, `</s>`), further to an eos that
  directly follows; without an added token all its text. Every turn must close in the same way.
- What the model has to write itself is supervised too: a token that holds both template and content
  (" Hello" after "[/INST]"), blanks and an empty block of thoughts between the inference prompt and
  the content. An added token of the header that swallows blanks is not.
- A turn whose thoughts the template drops, as many do for all turns but the last, is not
  supervised: at inference the model would think before it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

import psutil
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sft.config import UserError
from sft.data import DataError, Messages, Row
from sft.log import visible

IGNORED = -100
SECONDS = 20  # of CPU time that rendering one conversation may take; usual are 0.001
BYTES = 2**30  # of memory that rendering a conversation of two words may take
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
THOUGHTS_END = re.compile(r"(?s)(<think>((?!<think>).)*)?</think>\s*$")
THOUGHTS = re.compile(r"(?s)\s*(<think>((?!<think>).)*</think>\s*)?")
Supervise = Literal["all", "last", "everything"]
OnLong = Literal["error", "drop", "truncate_left_turns", "truncate"]
Tools = list[Any] | None


@dataclass(frozen=True, slots=True)
class Example:
    """`labels[i]` is `ids[i]` where supervised, else -100; the loss does the shift.

    `weights[i]`: what the loss of label i is multiplied with; None: 1 everywhere. `flags`: what was
    seen while rendering (sft/audit.py tells what each means).
    """

    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None
    flags: tuple[str, ...] = ()

    @property
    def num_supervised(self) -> int:
        """Position 0 has no predecessor that could predict it."""
        return sum(label != IGNORED for label in self.labels[1:])


class TemplateError(UserError):
    """The chat template is no template, or does not come to an end."""


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
    found = tokenizer.chat_template
    found = found.get("default") if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise TemplateError(
            f"{tokenizer.name_or_path}: expected one chat template, or several of which one is "
            "called default; give it a chat_template.jinja"
        )
    _try_out(tokenizer, found)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools = None,
    supervise: Supervise = "all",
) -> Example:
    """A conversation with its assistant turns supervised, ends of turn included.

    `supervise`: `all` turns, each with its message's `weight` (1 without one); the `last` turn; or
    `everything`, prompts too. Raises DataError where the template alters, drops or does not close
    an assistant turn.
    """
    if is_document(messages):
        return _render_document(tokenizer, messages[0]["content"])
    text = text_of(tokenizer, messages, tools)
    prompt = _prompt_text(tokenizer, messages, tools)
    if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        spans = _marked_spans(tokenizer, messages, tools)
    else:
        spans = _located_spans(tokenizer, messages, tools, text)
    ids, offsets = tokens_of(tokenizer, text)
    # Both never decrease: the tokens of one character's bytes all carry that character's offsets,
    # and where a tokenizer trims blanks off offsets, a token of blanks is empty at its own end.
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    added = added_tokens(tokenizer, len(tokenizer))
    written = _written_behind_prompt(text, spans[-1], prompt)
    turns = [m for m in messages if m["role"] == "assistant"]
    weights = [_weight(turn, n == len(turns), supervise) for n, turn in enumerate(turns, 1)]
    flags: list[str] = []
    labels, factors = [IGNORED] * len(ids), [0.0] * len(ids)
    for span, weight in zip(spans, weights, strict=True):
        if span is None:
            flags.append("thoughts_dropped")
            continue
        start, end = span
        start -= len(written) * text.endswith(written, 0, start)
        first, stop = bisect_right(ends, start), bisect_left(starts, end)
        while first < stop and starts[first] < start and ids[first] in added:
            first += 1
        if first == stop:
            raise DataError(f"the tokenizer has no token for {text[start:end]!r}")
        if starts[first] < start and text[starts[first] : start].strip():
            flags.append("boundary_merge")
        if weight:
            labels[first:stop] = ids[first:stop]
            factors[first:stop] = [weight] * (stop - first)
    if supervise == "everything":
        labels, factors = list(ids), [1.0] * len(ids)
    uneven = set(factors) - {0.0, 1.0}
    return Example(ids, labels, factors if uneven else None, tuple(dict.fromkeys(flags)))


def render_row(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    max_seq_len: int,
    *,
    supervise: Supervise = "all",
    on_long: OnLong = "error",
) -> list[tuple[Row, Example]]:
    """The examples of a row: one; of a raw document one per `max_seq_len` tokens; none if dropped.

    `on_long`, for a row of more than `max_seq_len` tokens: `error` leaves it to the audit, which
    refuses it; `drop`; `truncate_left_turns` removes the oldest exchanges behind the system turn
    until it fits, and leaves a last exchange that is too long by itself; `truncate` cuts the end,
    flagged `answer_cut`, and drops a row of which nothing supervised is left.
    """
    example = render(tokenizer, row.messages, row.tools, supervise)
    if len(example.ids) <= max_seq_len:
        return [(row, example)]
    if is_document(row.messages):
        starts = range(0, len(example.ids) - 1, max_seq_len)
        parts = [example.ids[at : at + max_seq_len] for at in starts]
        return [(row, Example(part, list(part))) for part in parts]
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
        for messages in _without_oldest(row.messages):
            shorter = render(tokenizer, messages, row.tools, supervise)
            if len(shorter.ids) <= max_seq_len:
                shorter = replace(shorter, flags=(*shorter.flags, "turns_dropped"))
                return [(replace(row, messages=messages), shorter)]
    return [(row, example)]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> list[int]:
    """What a model is given at inference to continue `messages`."""
    return tokens_of(tokenizer, text_of(tokenizer, messages, tools, add_generation_prompt=True))[0]


def prompt_mismatch(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, example: Example, tools: Tools = None
) -> str | None:
    """How the inference prompt of the last turn differs from what stands before it in training."""
    try:
        prompt = prompt_ids(tokenizer, messages[:-1], tools)
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
    shared = decoded(tokenizer, prompt, max(0, same - 8), same)
    served, seen = (decoded(tokenizer, ids, same, same + 8) for ids in (prompt, trained))
    return f"after {shared!r} the prompt has {served!r}, training has {seen!r} (token {same})"


def coloured(tokenizer: PreTrainedTokenizerBase, example: Example) -> Text:
    """The text as a terminal shows it: supervised green, context dim, added tokens magenta."""
    added, result, done = added_tokens(tokenizer, len(tokenizer)), Text(), 0
    for style, run in groupby(
        zip(example.ids, example.labels, strict=True),
        lambda pair: _style(pair[0] in added, pair[1] != IGNORED),
    ):
        end = done + len(list(run))
        result.append(visible(decoded(tokenizer, example.ids, done, end)), style)
        done = end
    return result


def with_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> Text:
    """Every token behind its id, in the colours of `coloured`, blanks made visible."""
    added, result = added_tokens(tokenizer, len(tokenizer)), Text()
    for at, (token, label) in enumerate(zip(example.ids, example.labels, strict=True)):
        text = decoded(tokenizer, example.ids, at, at + 1)
        result.append(f"{token}", "dim")
        result.append(f"{text!r} ", _style(token in added, label != IGNORED))
    return result


def _style(is_added: bool, is_supervised: bool) -> str:
    if is_added:
        return "bold magenta underline" if is_supervised else "bold magenta"
    return "green" if is_supervised else "dim"


# --- text and tokens ---------------------------------------------------------------------------


def text_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools = None,
    add_generation_prompt: bool = False,
) -> str:
    if not messages:
        raise DataError("the conversation begins with the assistant; give it a user turn first")
    _try_out(tokenizer, tokenizer.get_chat_template())
    return _rendered(tokenizer, messages, tools, add_generation_prompt)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, add_prompt: bool
) -> str:
    with _bounded(tokenizer, messages):
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_prompt
            )
        )


@contextmanager
def _bounded(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Iterator[None]:
    """For whatever a template does in its sandbox: its errors are told as those of the row, and
    after SECONDS it is ended.

    The time is CPU time, so a machine that is busy or asleep does not count. The signal reaches the
    main thread only, and there not the inside of one long operation (see `_try_out`).
    """

    def end(*_: object) -> None:
        raise TemplateError(_endless(tokenizer))

    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        before = signal.signal(signal.SIGPROF, end)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  # a template may divide by zero, recurse ...
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template refuses the roles {roles}: {error}; change the row to what the "
            "model's template expects"
        ) from None
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


@lru_cache(maxsize=64)
def _try_out(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Renders two words in a process of its own first, which the system ends if it takes too much:
    `9**(9**9)` is one operation, and no signal handler ends it. Raises TemplateError.
    """
    del template  # only in the key: an edited one is tried again
    child = os.fork()
    if not child:
        code = 0
        try:
            limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: SECONDS + 1}
            limits[resource.RLIMIT_AS] = psutil.Process().memory_info().vms + BYTES
            for limit, most in limits.items():
                with suppress(ValueError, OSError):  # a smaller one holds already
                    resource.setrlimit(limit, (most, most))
            words = [{"role": role, "content": "a"} for role in ("user", "assistant")]
            _rendered(tokenizer, words, None, add_prompt=False)
        except DataError:
            pass  # which rows it does not suit, is told with the rows
        except TemplateError:
            code = 1
        except BaseException:  # noqa: BLE001  # most likely for want of memory
            code = 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (1, -signal.SIGXCPU, -signal.SIGKILL):
        raise TemplateError(_endless(tokenizer))
    if code:
        raise TemplateError(
            f"{tokenizer.name_or_path}: the chat template cannot render two words in "
            f"{BYTES / 2**30:g} GiB of memory; use one that is not made to fill it"
        )


def _endless(tokenizer: PreTrainedTokenizerBase) -> str:
    return (
        f"{tokenizer.name_or_path}: the chat template took more than {SECONDS} s for one "
        "conversation, so it was ended; use a template without endless loops"
    )


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools
) -> str | None:
    """The inference prompt of the last turn; None if the template refuses to make one."""
    try:
        return text_of(tokenizer, messages[:-1], tools, add_generation_prompt=True)
    except DataError:
        return None


def _render_document(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """A document: all of it is supervised, and an eos ends it."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Example(ids, list(ids))


def is_document(messages: Messages) -> bool:
    """Raw text for continued pretraining, not a conversation."""
    return bool(messages[0]["role"] == "text")


def _weight(turn: dict[str, Any], is_last: bool, supervise: Supervise) -> float:
    return 0.0 if supervise == "last" and not is_last else float(turn.get("weight", 1))


def _without_oldest(messages: Messages) -> Iterator[Messages]:
    """The conversation without its first exchange, its first two, ...; the system turn stays."""
    start = 1 if messages[0]["role"] == "system" else 0
    asked = [n for n, m in enumerate(messages) if m["role"] == "user" and n > start]
    for n in asked:
        yield [*messages[:start], *messages[n:]]


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """The template has written every special token, bos too: the tokenizer must add none."""
    ids, offsets = _encoded(tokenizer, len(tokenizer), text)
    return list(ids), list(offsets)


@lru_cache(maxsize=2)  # the audit asks for the same text again
def _encoded(
    tokenizer: PreTrainedTokenizerBase, size: int, text: str
) -> tuple[list[int], list[Span]]:
    del size  # only in the key: a tokenizer that grew is asked again
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )  # verbose: the length is the audit's to judge
    return encoded["input_ids"], encoded["offset_mapping"]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, end: int) -> str:
    """Text of ids[start:end] in its place; decoded alone it might lose its leading blank."""
    before, until = (
        str(tokenizer.decode(ids[:at], clean_up_tokenization_spaces=False)) for at in (start, end)
    )
    return until[len(before) :]


@lru_cache(maxsize=8)
def added_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """id -> text of the added tokens that are not blank (Gemma has added tokens of newlines)."""
    del size  # only in the key: a tokenizer that grew is looked at again
    return {i: token for token, i in tokenizer.get_added_vocab().items() if token.strip()}


# --- spans -------------------------------------------------------------------------------------


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools
) -> list[Span | None]:
    """The `{% generation %}` blocks, without blanks behind the end of turn; verified."""
    names: dict[str, Any] = dict(tokenizer.special_tokens_map)
    with _bounded(tokenizer, messages):
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **names,
        )
    (text,), (blocks,) = rendered
    turns = [m for m in messages if m["role"] == "assistant"]
    if len(blocks) != len(turns):
        raise DataError(
            f"the chat template marks {len(blocks)} of {len(turns)} assistant turns for "
            "training; every turn needs one {% generation %} block"
        )
    added = tuple(added_tokens(tokenizer, len(tokenizer)).values())
    spans: list[Span | None] = []
    for number, ((start, end), turn) in enumerate(zip(blocks, turns, strict=True), 1):
        block = text[start:end].rstrip()
        _, content = split_thinking(turn["content"])
        if any(value not in block for value in (content.strip(), *map(name_of, calls_of(turn)))):
            raise _altered(number, turn["content"])
        if not block.endswith(added):
            raise DataError(
                f"the {{% generation %}} block of assistant turn {number} ends in {block[-20:]!r}, "
                "not in an end-of-turn token; move that token into the block"
            )
        thoughts = _thoughts(turn)
        spans.append((start, start + len(block)) if thoughts in block else None)
    return spans


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A value that the sentinel stands for: an assistant's content, a called function, or (`turn`
    0) what follows a call, so that the end of turn is looked for before it."""

    turn: int
    value: str
    kind: Literal["content", "call", "bound"]


def _located_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, text: str
) -> list[Span | None]:
    """Every assistant turn with its end in `text`, found with sentinels; verified.

    None: the template drops the thoughts of the turn, so it would be trained unlike it is served.
    """
    anchors, pieces = _anchors(tokenizer, messages, tools)
    places = _places(text, anchors, pieces)
    turns = [(n, m) for n, m in enumerate(messages) if m["role"] == "assistant"]
    spans: list[Span | None] = []
    for number, (index, turn) in enumerate(turns, 1):
        own = [k for k, anchor in enumerate(anchors) if anchor.turn == number]
        before, after = pieces[own[0]], pieces[own[-1] + 1]
        if anchors[own[0]].kind == "content":
            start = places[own[0]][0]
            thoughts = _thoughts(turn)
            lead = THOUGHTS_END.search(before) if thoughts else None
            if thoughts and (lead is None or thoughts not in lead[0]):
                spans.append(None)
                continue
            start -= len(lead[0]) if lead else 0
        else:
            start = _call_start(tokenizer, messages[:index], tools, text, places[own[0]][0])
        end = places[own[-1]][1]
        spans.append((start, end + _closing(tokenizer, after, number, anchors[own[-1]].kind)))
    return spans


def _anchors(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools
) -> tuple[list[_Anchor], list[str]]:
    """What the sentinel stands for, and the texts that the template writes around it (one more)."""
    sentinel = "zq7sentinelk"
    while any(sentinel in str(message) for message in messages):
        sentinel += "k"
    anchors, stand_ins, number = [], [], 0
    for before, message in zip([None, *messages], messages, strict=False):
        stand_in = dict(message)
        if message["role"] == "assistant":
            number += 1
            calls = calls_of(message)
            thoughts, content = split_thinking(message["content"])
            if content.strip() or not calls:
                stand_in["content"] = thoughts + sentinel
                anchors.append(_Anchor(number, content, "content"))
            if calls:
                stand_in["tool_calls"] = [_renamed(call, sentinel) for call in calls]
                anchors += [_Anchor(number, name_of(call), "call") for call in calls]
        elif before and before["role"] == "assistant" and calls_of(before):
            stand_in["content"] = sentinel
            anchors.append(_Anchor(0, message["content"], "bound"))
        stand_ins.append(stand_in)
    pieces = text_of(tokenizer, stand_ins, tools).split(sentinel)
    if len(pieces) != len(anchors) + 1:
        has_calls = len(anchors) > number
        raise DataError(
            f"the chat template writes {len(pieces) - 1} of {len(anchors)} assistant turns"
            + (" and tool calls; use a model whose template knows tools" if has_calls else "")
            + ("" if has_calls else "; end the row at an earlier turn, or correct the template")
        )
    return anchors, pieces


def _places(text: str, anchors: list[_Anchor], pieces: list[str]) -> list[Span]:
    """Where each value stands in `text`, which must be the pieces with the values between them."""
    at = len(pieces[0])
    places = []
    for anchor, before, after in zip(anchors, pieces, pieces[1:], strict=False):
        quoted = json.dumps(anchor.value, ensure_ascii=False)[1:-1]  # what a tool returned, as JSON
        forms = (*_forms(anchor.value), quoted) if anchor.kind == "bound" else _forms(anchor.value)
        found = next((form for form in forms if text.startswith(form + after, at)), None)
        if found is None or not text.startswith(before, at - len(before)):
            raise _altered(anchor.turn or anchors[anchors.index(anchor) - 1].turn, anchor.value)
        places.append((at, at + len(found)))
        at += len(found) + len(after)
    if at != len(text):
        raise _altered(max(anchor.turn for anchor in anchors), anchors[-1].value)
    return places


def _call_start(
    tokenizer: PreTrainedTokenizerBase, before: Messages, tools: Tools, text: str, name_at: int
) -> int:
    """Where a turn of calls alone begins: behind its inference prompt, or its header."""
    prompt = text_of(tokenizer, before, tools, add_generation_prompt=True)
    if text.startswith(prompt) and len(prompt) <= name_at:
        return len(prompt)
    header = frame(tokenizer, tokenizer.get_chat_template()).header
    at = text.rfind(header, 0, name_at) if header else -1
    if at < 0:
        raise DataError("cannot tell where the turn of a tool call begins in the chat template")
    return at + len(header)


def _closing(tokenizer: PreTrainedTokenizerBase, after: str, number: int, kind: str) -> int:
    """How many characters of `after` close the turn: behind a content at once, behind a call's name
    further on, where another special token may close it (Llama 3.1's <|eom_id|>)."""
    closings = frame(tokenizer, tokenizer.get_chat_template()).closings
    if kind == "content":
        closing = next((closing for closing in closings if after.startswith(closing)), None)
        if closing is None:
            raise DataError(
                f"the chat template does not close assistant turn {number} like the last one, with "
                f"{closings[0]!r}; end the row at this turn, or correct the template"
            )
        return len(closing)
    special = [t for t in special_tokens(tokenizer, len(tokenizer)) if t in after]
    found = [after.find(c) + len(c) for c in closings if c in after]
    found = found[:1] or [min(after.find(t) + len(t) for t in special)] if special else found[:1]
    if not found:
        raise DataError(f"the chat template does not close the tool calls of turn {number}")
    return found[0]


@dataclass(frozen=True, slots=True)
class Frame:
    header: str  # what opens an assistant turn
    closings: list[str]  # what may end one, longest first


@lru_cache(maxsize=64)
def frame(tokenizer: PreTrainedTokenizerBase, template: str) -> Frame:
    """Header and end of a turn, from a conversation of one turn."""
    del template  # only in the key: an edited one is looked at again
    sentinel, ask = "zq7sentinelk", {"role": "user", "content": "a"}
    text = text_of(tokenizer, [ask, {"role": "assistant", "content": sentinel}])
    before, _, tail = text.partition(sentinel)
    opening = before.removeprefix(text_of(tokenizer, [ask]))
    header = (
        opening[: len(opening) - len(lead[0])]
        if (lead := THOUGHTS_END.search(opening))
        else opening
    )
    added = added_tokens(tokenizer, len(tokenizer)).values()
    ends = [tail.index(token) + len(token) for token in added if token in tail]
    closing = tail[: min(ends)] if ends else tail.rstrip()
    if not closing.strip():
        raise DataError(
            "the chat template writes no end of turn behind the assistant's content, so a model "
            "would not learn to stop; use a template that writes one, such as eos_token"
        )
    eos = re.match(r"\s*" + re.escape(tokenizer.eos_token), tail[len(closing) :])
    return Frame(header, [closing + eos[0], closing] if eos else [closing])


def _written_behind_prompt(text: str, last: Span | None, prompt: str | None) -> str:
    """What stands between the inference prompt and the last turn's text, if a model has to write
    it: blanks, and an empty block of thoughts.

    Llama 2: the prompt ends in "[/INST]", the content follows a space, which is a token of its own
    before a digit. Qwen3 writes "<think>\n\n</think>" before an answer without thoughts.
    """
    if last is None or prompt is None or not text.startswith(prompt) or last[0] < len(prompt):
        return ""
    between = text[len(prompt) : last[0]]
    return between if THOUGHTS.fullmatch(between) else ""


@lru_cache(maxsize=8)
def special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[str, ...]:
    """Texts of the tokens that are control, not content."""
    del size  # only in the key: a tokenizer that grew is looked at again
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return tuple(sorted(filter(str.strip, special | set(tokenizer.all_special_tokens))))


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def name_of(tool: dict[str, Any]) -> str:
    """The name of a tool or of a call of one; OpenAI's form nests it."""
    return str(tool.get("function", tool).get("name", ""))


def _renamed(call: dict[str, Any], name: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def _thoughts(turn: dict[str, Any]) -> str:
    """What an assistant turn says it thought, without tags; "" for none."""
    given = turn.get("reasoning_content") or split_thinking(turn["content"])[0]
    return str(given).strip().removeprefix("<think>").removesuffix("</think>").strip()


def split_thinking(content: str) -> tuple[str, str]:
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
