"""Renders conversations with the tokenizer's chat template, bounded in time and memory."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeVar

import jinja2.meta
import jinja2.nodes
import psutil
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import (
    _CONTROL_TOKEN_END,
    _CONTROL_TOKEN_START,
    _REASONING_FIELDS,
    _alias_reasoning_fields,
)
from transformers.utils.chat_template_utils import _compile_jinja_template as compile_template

from sft.data.formats import Message, Messages, Tools, content_text
from sft.data.lines import failure
from sft.errors import DataError, UserError

SECONDS = 20  # CPU time that rendering a conversation may take; usual: 0.001
BYTES = 2**30  # memory that rendering two words may take
FREE = 2**16  # characters that a template may write whatever the row has: instructions, a date
GROWTH = 16  # and how many for each one of the row and the template; JSON of ASCII takes 12
Span = tuple[int, int]  # characters, end excluded

# For tokenizers without a template: plain words, which any vocabulary can write. The newline after
# a header belongs to the prompt, so that the prompt's tokens do not depend on the answer.
DEFAULT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
# A block of thoughts at the start of a content. Tags further on are text of the answer.
THOUGHTS = re.compile(r"(?s)(\s*<think>)(.*?)(</think>\s*)")
# Characters of Unicode's private use, which transformers puts around control tokens in user input.
MARKS = (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)


def _escapes(mark: str) -> tuple[str, str]:
    """Returns a mark as Python's repr and JSON of ASCII write it; templates use both on values."""
    return repr(mark)[1:-1], json.dumps(mark)[1:-1]


ESCAPED = re.compile("|".join(re.escape(form) for mark in MARKS for form in _escapes(mark)))
DEFAULTS = ("default", "d")  # Jinja's two names of one filter
REASONING = frozenset(_REASONING_FIELDS)  # the keys that some data sets have for thoughts
OPEN_TAG = re.compile(r"<(\w+)>\s*$")  # a prompt that ends in it lets the model think


T = TypeVar("T")


def cached_by_tokenizer(function: Callable[[Tokenizer], T]) -> Callable[[Tokenizer], T]:
    """Caches a function of a tokenizer until its vocabulary grows or its template is edited."""

    @lru_cache(maxsize=64)
    def cached(tokenizer: Tokenizer, size: int, template: str) -> T:
        return function(tokenizer)

    def look_up(tokenizer: Tokenizer) -> T:
        size = tokenizer.backend_tokenizer.get_vocab_size()  # as len(), which takes longer
        return cached(tokenizer, size, str(tokenizer.chat_template))

    return look_up


@cached_by_tokenizer
def variants(tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    """Returns a tokenizer for each of its chat templates, by name; most have one only."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return {"default": tokenizer}
    made = {name: copy.copy(tokenizer) for name in templates}
    for name, variant in made.items():
        variant.chat_template = templates[name]
    return made


def variant_for(tokenizer: Tokenizer, tools: Tools | None) -> Tokenizer:
    """Returns the tokenizer with the one template that serving takes for these tools."""
    if not isinstance(tokenizer.chat_template, dict):
        return tokenizer
    known = variants(tokenizer)
    return known["tool_use" if tools is not None and "tool_use" in known else "default"]


class TemplateError(UserError):
    """An error of the chat template itself: it is not a template, or rendering does not end."""


Variables = dict[str, Any]  # of a template, such as {"enable_thinking": False}


def render_text(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    add_generation_prompt: bool = False,
    variables: Variables | None = None,
) -> str:
    """Renders a conversation, or with `add_generation_prompt` the prompt of inference.

    Messages take the form that the template reads (`Form`). The text of a special token that
    someone typed stands between MARKS, so that `tokens.tokenise` makes plain text of it.
    Raises DataError if the template refuses it, TemplateError if rendering does not end.
    """
    tokenizer = variant_for(tokenizer, tools)
    messages, tools = mark_typed(tokenizer, messages, tools)
    values = all_variables(tokenizer, variables)
    return render_marked(tokenizer, messages, tools, add_generation_prompt, values)


def render_marked(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None,
    add_generation_prompt: bool,
    values: Variables,
) -> str:
    """Does what `render_text` does, of messages and tools that `mark_typed` returned, and with the
    values of special tokens too (`all_variables`)."""
    if not messages:
        raise DataError("the conversation begins with the assistant; give it a user turn first")
    try_template(tokenizer)
    messages = read_form(tokenizer).apply(messages)
    text = _apply_template(tokenizer, messages, tools, add_generation_prompt, values)
    if ESCAPED.search(text) and has_text(re.compile("|".join(MARKS)), [messages, tools]):
        text = ESCAPED.sub(lambda found: MARKS[found[0] in _escapes(MARKS[1])], text)
    return text


def _apply_template(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None,
    add_prompt: bool,
    values: Variables,
) -> str:
    # As `apply_chat_template` does it, which takes three times as long to check its arguments.
    source = tokenizer.get_chat_template(tools=tools)
    if not all(map(REASONING.isdisjoint, messages)):
        messages = _alias_reasoning_fields([dict(message) for message in messages])
    with Bounded(tokenizer, messages):
        pieces = compile_template(source).generate(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_prompt,
            **values,
        )
        return _join(pieces, [messages, tools, source])


def _join(pieces: Iterable[str], given: Any) -> str:
    """Returns what a template writes. Raises DataError once that is far more than was `given`.

    Tokenising takes hundreds of bytes for each character, so this is found before it.
    """
    joined, size, most = [], 0, FREE
    for piece in pieces:
        joined.append(piece)
        size += len(piece)
        if size > most:
            num_given = len(json.dumps(given, ensure_ascii=False, default=str))
            most = FREE + GROWTH * num_given
            if size > most:
                raise DataError(
                    f"the chat template writes more than {most:,} characters for {num_given:,} of "
                    "the row and the template itself; use a template that does not repeat so much"
                )
    return "".join(joined)


def all_variables(tokenizer: Tokenizer, variables: Variables | None) -> Variables:
    """Returns the variables that a template gets besides the messages and tools."""
    return {**tokenizer.special_tokens_map, **(variables or {})}


def mark_typed(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None
) -> tuple[Messages, Tools | None]:
    """Puts MARKS around the texts of special tokens that someone typed."""
    typed = special_pattern(tokenizer)
    if typed and has_text(typed, messages, tools):
        return _mark(typed, messages), _mark(typed, tools)
    return messages, tools


def has_text(pattern: re.Pattern[str], *values: Any) -> bool:
    """Returns whether a text in one of these JSON values, a key included, matches the pattern."""
    for value in values:
        if isinstance(value, str):
            if pattern.search(value):
                return True
        elif isinstance(value, Mapping):
            if has_text(pattern, *value.keys(), *value.values()):
                return True
        elif isinstance(value, list) and has_text(pattern, *value):
            return True
    return False


def _mark(pattern: re.Pattern[str], value: Any) -> Any:
    """Puts MARKS around every match in the texts of a JSON value. The texts lose other marks."""
    if isinstance(value, str):
        for mark in MARKS:
            value = value.replace(mark, "")
        return pattern.sub(lambda match: match[0].join(MARKS), value)
    if isinstance(value, Mapping):
        return {_mark(pattern, key): _mark(pattern, item) for key, item in value.items()}
    return [_mark(pattern, item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Form:
    """The form in which a template reads what has several forms in use."""

    content: Literal["text", "parts", "either"]  # of a content that is given as parts, or as text
    arguments: Literal["object", "text"]  # of a call
    thoughts: Literal["key", "content", "none"]  # where it reads `reasoning_content`

    def apply(self, messages: Messages) -> Messages:
        """Returns the messages in this form."""
        return [self._apply(message) for message in messages]

    def _apply(self, message: dict[str, Any]) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        content, thoughts = message["content"], message.get("reasoning_content")
        if isinstance(content, list) and self.content == "text":
            changes["content"] = content_text(message)
        elif isinstance(content, str) and self.content == "parts":
            changes["content"] = [{"type": "text", "text": content}]
        if thoughts and self.thoughts == "content":
            said = f"<think>\n{thoughts.strip()}\n</think>\n\n{content_text(message)}"
            as_parts = self.content == "parts"
            changes["content"] = [{"type": "text", "text": said}] if as_parts else said
        if self.arguments == "text" and get_calls(message):
            changes["tool_calls"] = [_with_text_arguments(call) for call in get_calls(message)]
        return {**message, **changes} if changes else message


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    text = json.dumps(function["arguments"], ensure_ascii=False)
    changed = {**function, "arguments": text}
    return {**call, "function": changed} if "function" in call else changed


@cached_by_tokenizer
def read_form(tokenizer: Tokenizer) -> Form:
    """Finds the form that the template reads, by rendering small conversations in each of them.

    A form is read if the text appears as it was given, without quotes of Python around it.
    """
    word = "zq7form"
    ask: Message = {"role": "user", "content": "a"}
    values = all_variables(tokenizer, None)

    def shows(turn: Message, text: str, before: Message = ask, quotes: str = "'") -> bool:
        try:
            rendered = _apply_template(tokenizer, [before, turn], None, False, values)
        except DataError:
            return False
        return text in rendered and not any(quote + text in rendered for quote in quotes)

    answer: Message = {"role": "assistant", "content": word}
    parts = [{"type": "text", "text": word}]
    ask_parts: Message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    reads_parts = shows({**answer, "content": parts}, word, ask_parts, quotes="'\"")
    reads_text = shows(answer, word)
    content: Any = "either" if reads_parts and reads_text else "parts" if reads_parts else "text"
    call: Message = {"role": "assistant", "content": ""}
    called = {"name": "b", "arguments": {word: "c"}}
    as_object = {"id": "call00001", "type": "function", "function": called}
    objects = shows({**call, "tool_calls": [as_object]}, word)
    texts = shows({**call, "tool_calls": [_with_text_arguments(as_object)]}, word)
    if content == "parts":
        answer = {**answer, "content": [{"type": "text", "text": "d"}]}
    thoughts: Any = "none"
    if shows({**answer, "reasoning_content": word * 2}, word * 2):
        thoughts = "key"
    elif _opens_thoughts(tokenizer, ask) and shows(
        {**answer, "content": f"<think>\n{word * 2}\n</think>\n\nd"}, word * 2
    ):
        thoughts = "content"
    return Form(content, "text" if texts and not objects else "object", thoughts)


def _opens_thoughts(tokenizer: Tokenizer, ask: dict[str, Any]) -> bool:
    """Returns whether the prompt of inference ends in an open block of thoughts."""
    try:
        return (
            OPEN_TAG.search(
                _apply_template(tokenizer, [ask], None, True, all_variables(tokenizer, None))
            )
            is not None
        )
    except DataError:
        return False


@cached_by_tokenizer
def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Compiles a pattern of the special tokens, the longest first; None if there are none."""
    longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


@cached_by_tokenizer
def template_variables(tokenizer: Tokenizer) -> list[str]:
    """Returns the variables that a user may set for the chat template, such as `enable_thinking`:
    those that it reads and that `apply_chat_template` does not set. A name that the template sets
    counts only if it asks whether the name is defined, or gives it a default."""
    source = tokenizer.get_chat_template()
    parsed = compile_template(source).environment.parse(source)
    names = [(node.name, node.ctx) for node in parsed.find_all(jinja2.nodes.Name)]
    tests = [node for node in parsed.find_all(jinja2.nodes.Test) if node.name == "defined"]
    tests += [node for node in parsed.find_all(jinja2.nodes.Filter) if node.name in DEFAULTS]
    asked = {node.node.name for node in tests if isinstance(node.node, jinja2.nodes.Name)}
    own = {name for name, kind in names if kind != "load"} - asked
    given = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
    given |= {"raise_exception", *tokenizer.special_tokens_map}
    found = jinja2.meta.find_undeclared_variables(parsed) - own - given
    return sorted(name for name in found if not name.endswith("_token"))


_bound: list[Tokenizer] = []  # whose template is rendered under a limit of time now


class Bounded:
    """Turns errors of a template into errors of the row, and ends a template after SECONDS.

    SECONDS is CPU time, so a busy or sleeping machine does not matter. The signal reaches only the
    main thread, and does not interrupt a single long operation (see `try_template`). Inside another
    one the limit of the outer one holds. (A generator of `contextlib` takes three times as long.)
    """

    def __init__(self, tokenizer: Tokenizer, messages: Messages):
        self.tokenizer, self.messages, self.is_outer = tokenizer, messages, False

    def __enter__(self) -> None:
        if not _bound and threading.current_thread() is threading.main_thread():
            self.is_outer = True
            _bound.append(self.tokenizer)
            _catch_signal(os.getpid())
            signal.setitimer(signal.ITIMER_PROF, SECONDS)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.is_outer:
            signal.setitimer(signal.ITIMER_PROF, 0)
            _bound.clear()
        # A template may divide by zero, recurse ...
        if isinstance(error, Exception) and not isinstance(error, (UserError, MemoryError)):
            source = self.tokenizer.get_chat_template()
            raise DataError(failure(source, self.messages, error)) from None


@lru_cache(maxsize=1)  # once in every process
def _catch_signal(pid: int) -> None:
    signal.signal(signal.SIGPROF, _end)


def _end(*_: object) -> None:
    if _bound:
        raise TemplateError(_endless_message(_bound[0]))


@cached_by_tokenizer
def try_template(tokenizer: Tokenizer) -> None:
    """Compiles all templates and renders two words in a child process with limits of time and
    memory.

    A signal handler cannot end `9**(9**9)`, which is one operation, but the system can end the
    process. Jinja computes such constants when it compiles, wherever they stand. Raises
    TemplateError.
    """
    child = os.fork()
    if not child:
        code = 0
        try:
            limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: SECONDS + 1}
            limits[resource.RLIMIT_AS] = psutil.Process().memory_info().vms + BYTES
            for limit, most in limits.items():
                with suppress(ValueError, OSError):  # a smaller limit is set already
                    resource.setrlimit(limit, (most, most))
            jinja2.nodes.Impossible = _NotConstant  # type: ignore[assignment,misc]  # only here
            for variant in variants(tokenizer).values():
                compile_template(variant.chat_template)
            words = [{"role": role, "content": "a"} for role in ("user", "assistant")]
            _apply_template(tokenizer, words, None, False, all_variables(tokenizer, None))
        except TemplateError:
            code = 1
        except MemoryError:
            code = 2
        except Exception:  # noqa: BLE001
            pass  # what cannot be compiled, or refuses such rows, is reported later
        except BaseException:  # noqa: BLE001  # most likely it ran out of memory
            code = 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (1, -signal.SIGXCPU, -signal.SIGKILL):
        raise TemplateError(_endless_message(tokenizer))
    if code:
        raise TemplateError(
            f"{tokenizer.name_or_path}: the chat template cannot render two words in "
            f"{BYTES / 2**30:g} GiB of memory; use one that is not made to fill it"
        )


class _NotConstant(jinja2.nodes.Impossible):
    """In place of jinja's error, with which it gives up computing a constant for any reason."""

    def __init__(self) -> None:
        if isinstance(sys.exception(), MemoryError):
            os._exit(2)


def _endless_message(tokenizer: Tokenizer) -> str:
    return (
        f"{tokenizer.name_or_path}: the chat template took more than {SECONDS} s for one "
        "conversation, so it was ended; use a template without endless loops"
    )


@cached_by_tokenizer
def added_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns {id: text} of the added tokens, without blank ones (Gemma has some)."""
    return {i: token for token, i in tokenizer.get_added_vocab().items() if token.strip()}


@cached_by_tokenizer
def special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the texts of the special tokens, which control the model and are not content."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return tuple(sorted(filter(str.strip, special | set(tokenizer.all_special_tokens))))


def get_calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the tool calls of a message."""
    return message.get("tool_calls") or []


def get_name(tool: dict[str, Any]) -> str:
    """Returns the name of a tool or of a call, also from OpenAI's nested form."""
    return str(tool.get("function", tool).get("name", ""))


def split_thoughts(message: dict[str, Any]) -> tuple[str, str]:
    """Returns the thoughts of a turn, without tags, and its content without them.

    Thoughts are the `reasoning_content`, or else a `<think>` block at the start of the content.
    """
    content = content_text(message)
    if given := message.get("reasoning_content"):
        return str(given).strip(), content
    match = THOUGHTS.match(content)
    return (match[2].strip(), content[match.end() :]) if match else ("", content)


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
        self.messages, self.tools = mark_typed(self.tokenizer, self.messages, self.tools)

    @cached_property
    def values(self) -> Variables:
        """Returns all variables of the template besides the messages and tools."""
        return all_variables(self.tokenizer, self.variables)

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
        messages, tools = mark_typed(self.tokenizer, messages, self.tools)
        return render_marked(self.tokenizer, messages, tools, False, self.values)

    def _render(self, stop: int, prompt: bool) -> str:
        if (stop, prompt) not in self._texts:
            self._texts[stop, prompt] = render_marked(
                self.tokenizer, self.messages[:stop], self.tools, prompt, self.values
            )
        return self._texts[stop, prompt]

    def prefetch(self, turns: Iterable[int]) -> None:
        """Renders what `find_turn` asks about these turns, under one limit of time."""
        with suppress(DataError), Bounded(self.tokenizer, self.messages):
            for turn in turns:
                self.until(turn)
                self.prompt(turn)


_latest: list[Renderings] = []


def renderings_of(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None, variables: Variables | None
) -> Renderings:
    """Returns the renderings of a conversation. The same ones if it is asked for twice in a row, as
    the audit does, so that each text is rendered once."""
    tokenizer = variant_for(tokenizer, tools)
    if _latest:
        (last,) = _latest
        same = last.given[0] is messages and last.given[1] is tools
        same = same and last.tokenizer is tokenizer and last.template is tokenizer.chat_template
        if same and last.variables == variables:
            return last
    _latest[:] = [Renderings(tokenizer, messages, tools, variables)]
    return _latest[0]
