"""Says which line of a chat template fails, and which keys it never reads."""

from __future__ import annotations

import re
from functools import lru_cache

import jinja2.exceptions
import jinja2.nodes
from transformers.utils.chat_template_utils import _compile_jinja_template as compile_template

from sft.data.formats import Messages

UNSET = re.compile(r"'(\w+)' is undefined$")  # how Jinja says that a variable has no value


def failure(source: str, messages: Messages, error: Exception) -> str:
    """Says where a template raised an error, and what to do."""
    roles, at, frame = ", ".join(m["role"] for m in messages), "", error.__traceback__
    while frame:
        if frame.tb_frame.f_code.co_filename == "<template>":  # the last one is the innermost
            at = " at " + quote_line(source, frame.tb_lineno, str(error))
        frame = frame.tb_next
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        at = quote_line(source, error.lineno)
        return f"the chat template cannot be read at {at}: {error.message}; correct it"
    if isinstance(error, jinja2.exceptions.SecurityError):
        return (
            f"the chat template does{at} what the sandbox of transformers forbids, so serving "
            f"cannot render this conversation either: {error}; use a template that does without it "
            "(data.chat_template)"
        )
    remedy = "change the row to what the model's template expects"
    name = UNSET.match(str(error))
    if isinstance(error, jinja2.exceptions.UndefinedError) and name:
        remedy = f"give the template its variable {name[1]} (data.template_kwargs)"
    elif not isinstance(error, jinja2.exceptions.TemplateError) and "NoneType" in str(error):
        remedy = "give the row what this line reads, such as tools, or use another template"
    said = "refuses" if type(error) is jinja2.exceptions.TemplateError else "fails on"
    return f"the chat template {said} the roles {roles}{at}: {error}; {remedy}"


def quote_line(source: str, number: int, near: str = "") -> str:
    """Returns a line of a template for a message, cut to what stands around the text `near`."""
    lines = re.split(r"\r\n|\r|\n", source)  # as Jinja counts them
    line = " ".join(lines[number - 1].split())
    at = max(0, line.find(near) - 40) if near and len(line) > 90 else 0
    shown = ("... " if at else "") + line[at : at + 90] + (" ..." if line[at + 90 :] else "")
    return f"its line {number} (`{shown}`)"


@lru_cache(maxsize=64)
def never_reads(source: str, key: str) -> bool:
    """Returns whether a template nowhere has a key of a message, such as `tool_calls`."""
    parsed = compile_template(source).environment.parse(source)
    keys = {node.attr for node in parsed.find_all(jinja2.nodes.Getattr)}
    keys |= {node.value for node in parsed.find_all(jinja2.nodes.Const)}
    return key not in keys
