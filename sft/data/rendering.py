"""Renders conversations with the tokenizer's chat template, bounded in time and memory."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, TypeVar

import psutil
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data.formats import Messages, Tools
from sft.errors import DataError, UserError

SECONDS = 20  # CPU time that rendering a conversation may take; usual: 0.001
BYTES = 2**30  # memory that rendering two words may take
Span = tuple[int, int]  # characters, end excluded

# For tokenizers without a template: plain words, which any vocabulary can write. The newline after
# a header belongs to the prompt, so that the prompt's tokens do not depend on the answer.
DEFAULT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
THINKING = re.compile(r"(?s).*</think>\s*")  # templates move or drop it, so it is found apart
THOUGHTS_END = re.compile(r"(?s)(<think>((?!<think>).)*)?</think>\s*$")
THOUGHTS = re.compile(r"(?s)\s*(<think>((?!<think>).)*</think>\s*)?")


T = TypeVar("T")


def cached_by_tokenizer(function: Callable[[Tokenizer], T]) -> Callable[[Tokenizer], T]:
    """Caches a function of a tokenizer until its vocabulary grows or its template is edited."""

    @lru_cache(maxsize=64)
    def cached(tokenizer: Tokenizer, size: int, template: str) -> T:
        return function(tokenizer)

    return lambda tokenizer: cached(tokenizer, len(tokenizer), str(tokenizer.chat_template))


class TemplateError(UserError):
    """An error of the chat template itself: it is not a template, or rendering does not end."""


def render_text(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Renders a conversation, or with `add_generation_prompt` the prompt of inference.

    Raises DataError if the template refuses it, TemplateError if rendering does not end.
    """
    if not messages:
        raise DataError("the conversation begins with the assistant; give it a user turn first")
    try_template(tokenizer)
    return _apply_template(tokenizer, messages, tools, add_generation_prompt)


def _apply_template(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None, add_prompt: bool
) -> str:
    with bounded(tokenizer, messages):
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_prompt
            )
        )


@contextmanager
def bounded(tokenizer: Tokenizer, messages: Messages) -> Iterator[None]:
    """Turns errors of a template into errors of the row, and ends a template after SECONDS.

    SECONDS is CPU time, so a busy or sleeping machine does not matter. The signal reaches only the
    main thread, and does not interrupt a single long operation (see `try_template`).
    """

    def end(*_: object) -> None:
        raise TemplateError(_endless_message(tokenizer))

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


@cached_by_tokenizer
def try_template(tokenizer: Tokenizer) -> None:
    """Renders two words in a child process with limits of time and memory.

    A signal handler cannot end `9**(9**9)`, which is one operation, but the system can end the
    process. Raises TemplateError.
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
            words = [{"role": role, "content": "a"} for role in ("user", "assistant")]
            _apply_template(tokenizer, words, None, add_prompt=False)
        except DataError:
            pass  # rows that the template refuses are reported later
        except TemplateError:
            code = 1
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


def split_thinking(content: str) -> tuple[str, str]:
    """Splits a content into its thoughts with their tags, and the rest."""
    match = THINKING.match(content)
    end = match.end() if match else 0
    return content[:end], content[end:]
