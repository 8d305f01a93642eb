"""Known bugs of real tools, each a small mutation of data, template, tokenizer or renderer.

`tests/test_faults.py` lets the audit find every one, and nothing on the clean material that they
are mutations of. docs/FAULTS.md is this table: `make docs`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from conftest import load_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sft.config.load import load_config
from sft.data import audit
from sft.data.cache import Prepared, cache_key, prepare
from sft.data.files import Row
from sft.data.template import IGNORED, Example, prepare_tokenizer, render, render_row

NANO = Path(__file__).parents[2] / "nano/model"
LIMIT = 256  # tokens


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASK, HELLO = turn("user", "Hi there, who is it?"), turn("assistant", "Hello, it is me.")
AND, BYE = turn("user", "And now?"), turn("assistant", "Good bye.")
SYSTEM = turn("system", "Be kind and brief.")
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
CALL = turn(
    "assistant",
    "",
    tool_calls=[{"type": "function", "function": {"name": "get_time", "arguments": {"zone": "X"}}}],
)
RESULT = turn("tool", '{"time": "10:20"}', name="get_time")
ONE, TWO = Row([ASK, HELLO], None, "f", 1), Row([SYSTEM, ASK, HELLO, AND, BYE], None, "f", 2)
DATE = {"type": "function", "function": {"name": "get_date", "parameters": {"type": "object"}}}
TOOLS = Row([ASK, CALL, RESULT, BYE], [TOOL, DATE], "f", 3)
CLEAN = [ONE, TWO, TOOLS]
THOUGHTFUL = turn("assistant", "Hello, it is me.", reasoning_content="Who asks?")
ONE_THOUGHT = Row([ASK, THOUGHTFUL], None, "f", 1)
OTHER = Row([turn("user", "Which way is north?"), turn("assistant", "That way.")], None, "f", 4)

# ChatML with tools, and of the blocks that the mutations below cut or change.
CHATML = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool>{{ call.function | tojson }}</tool>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}").replace(
    "{%- endfor %}<|im_end|>", "{%- endfor %}<|im_end|>{% endgeneration %}"
)
OUTSIDE = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}",
)

# As Qwen3: thoughts of turns before the last question are dropped, and the prompt may close them.
THINKS = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- set last = namespace(ask=0) %}
{%- for m in messages %}{% if m.role == "user" %}{% set last.ask = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.index0 > last.ask %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool>{{ call.function | tojson }}</tool>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking | default(true) %}<think>

</think>

{% endif %}{% endif %}"""
CLOSES = THINKS.replace("default(true)", "default(false)")
# As DeepSeek-R1-like models: the prompt opens the thoughts.
OPENS = THINKS.replace(
    "{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n", "<think>\n{% if false %}"
)
# As gpt-oss: special tokens stand between the parts of a call.
CHANNELS = """\
{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role != "assistant" %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- elif not m.tool_calls %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
{%- else %}<|start|>assistant
{%- for call in m.tool_calls %} to={{ call.function.name }}<|channel|>commentary<|message|>
{{- call.function.arguments | tojson }}<|call|>{% endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
# As GLM-4: a turn ends where the next role begins.
HEADERS = """\
{%- if tools %}<|system|>{{ tools | tojson }}{% endif %}
{%- for m in messages %}{{ "<|observation|>" if m.role == "tool" else "<|" + m.role + "|>" }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool>{{ call.function | tojson }}</tool>
{%- endfor %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""
# As Gemma 4: results stand inside the assistant's turn, and no header behind them.
INSIDE = """\
{%- if tools %}<|turn>system
{{ tools | tojson }}<turn|>
{% endif %}
{%- for m in messages %}
{%- if m.role == "tool" %}<|result>{{ m.content }}<result|>
{%- else %}
{%- if not loop.first and messages[loop.index0 - 1].role == "tool" %}{% else %}<|turn>{{ m.role }}
{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<|call>{{ call.function | tojson }}<call|>{% endfor %}
{%- if not m.tool_calls %}<turn|>
{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt and messages[-1].role != "tool" %}<|turn>assistant
{% endif %}"""
QUOTES = CHATML.replace("m.role }}\n{{ m.content }}", 'm.role }} "{{ m.content }}').replace(
    ">assistant\n{% endif %}", '>assistant "{% endif %}'
)
# An answer is joined to the one before it; results that no call asked for are dropped (Gemma 4).
JOINS = """\
{%- set turns = messages | rejectattr("role", "equalto", "tool") | list %}
{%- for m in turns %}
{%- if m.role == "user" or turns[loop.index0 - 1].role == "user" %}<|im_start|>{{ m.role }}
{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>
{%- for r in messages if r.role == "tool" and r.name == c.function.name %}<r>{{ r.content }}</r>
{%- endfor %}{% endfor %}
{%- if not m.tool_calls and (m.role == "user" or loop.nextitem is not defined
    or loop.nextitem.role == "user") %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt and not turns[-1].tool_calls %}<|im_start|>assistant
{% endif %}"""
# The system prompt is written into the last message of the user (Mistral).
IN_THE_LAST = """\
{%- if messages[0].role == "system" %}{% set system = messages[0].content %}
{%- set messages = messages[1:] %}{% endif %}
{%- for m in messages %}{% if m.role == "user" %}[INST]
{%- if loop.last and system is defined %}{{ system }}|{% endif %}{{ m.content }}[/INST]
{%- else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"""
ALWAYS_HEADED = (  # as Command A: add_generation_prompt is not read, the header always stands there
    "{% for m in messages %}<|im_start|>{{ m.role }}<|text|>{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant"
)
DEFAULTED = "{%- set thinks = thinks | default(false) %}" + CHATML.replace(
    "assistant\n{% endif %}", "assistant\n{{ '<think>' if thinks else '</think>' }}{% endif %}"
).replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{{ '<think>' ~ m.reasoning_content if m.reasoning_content }}"
    "</think>{% endif %}{{ m.content }}",
)
# Blocks in a text that is rewritten once the answer stands behind it (gpt-oss).
REWRITES = """\
{%- for m in messages %}{% if m.role != "assistant" %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{%- else %}{% generation %}
{%- if m.reasoning_content and loop.revindex < 3 %}<|im_start|>assistant<|think|>
{{- m.reasoning_content }}{% endif %}<|im_start|>assistant<|text|>{{ m.content }}<|im_end|>
{%- endgeneration %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{% endif %}"""
TOKENS = {
    CHANNELS: ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
    HEADERS: ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ALWAYS_HEADED: ("<|text|>",),
    REWRITES: ("<|text|>", "<|think|>"),
    INSIDE: ("<|turn>", "<turn|>", "<|call>", "<call|>", "<|result>", "<result|>"),
}
ANSWERS_END = {"<|return|>", "<|call|>", "<|user|>", "<|observation|>", "<turn|>", "<|result>"}


@cache
def tokenizer(template: str = CHATML, bos: str | None = None, special: tuple[str, ...] = ()) -> Any:
    """Returns the tokenizer of nano with a template and further special tokens. Serving stops at
    those that ANSWERS_END names, besides eos."""
    made = AutoTokenizer.from_pretrained(NANO)
    made.chat_template = template
    if bos:
        made.add_special_tokens({"bos_token": bos})
    if special:
        made.add_special_tokens({"additional_special_tokens": list(special)})
        made.init_kwargs["stop_tokens"] = [token for token in special if token in ANSWERS_END]
    return prepare_tokenizer(made)


@dataclass(frozen=True)
class Fault:
    kind: str  # of audit.KINDS, or the start of the message that refuses it
    what: str
    seen_in: str
    find: Callable[[], list[str]]  # the findings, or raises


def renderer(
    change: Callable[[Any, Row, Example], Example], row: Row = ONE
) -> Callable[[], list[str]]:
    """Renders a row, changes the example, and audits it."""

    def find() -> list[str]:
        made = tokenizer()
        example = change(made, row, render(made, row.messages, row.tools))
        return audit.examine(made, row, example, LIMIT)

    return find


def template(text: str, row: Row = ONE, bos: str | None = None) -> Callable[[], list[str]]:
    """Renders a row with another template, and audits it."""

    def find() -> list[str]:
        made = tokenizer(text, bos)
        example = render(made, row.messages, row.tools)
        return audit.examine(made, row, example, LIMIT)

    return find


Change = Callable[[Any, Row, Example], Example]
UNMASKED: list[tuple[str, Row]] = []  # the templates and rows that masks are mutations of


def mask(
    change: Change | None, text: str, row: Row, which: int | None = 0
) -> Callable[[], list[str]]:
    """Renders a row as it is trained, changes one of its examples, and audits that.

    None: the example is made as if the row were not split.
    """
    UNMASKED.append((text, row))

    def find() -> list[str]:
        made = tokenizer(text, None, TOKENS.get(text, ()))
        kept, example = render_row(made, row, 2 * LIMIT)[which or 0]
        kept = row if which is None else kept
        example = change(made, kept, example) if change else example
        return audit.examine(made, kept, example, 2 * LIMIT)

    return find


def prepared(
    folder: Path, given: Sequence[Row], held_out: Sequence[Row], limit: int, **data_section: Any
) -> Prepared:
    """Rows as a user's files, through all that comes before training."""
    values = {"on_long": "error", "max_seq_len": limit, "cache_dir": str(folder / "cache")}
    for name, part in (("train_path", given), ("eval_path", held_out)):
        path = folder / f"{name}.jsonl"
        shown = [{"messages": r.messages, **({"tools": r.tools} if r.tools else {})} for r in part]
        path.write_text("".join(json.dumps(row) + "\n" for row in shown), "utf-8")
        values[name] = str(path)
    overrides = [f"data.{name}={value}" for name, value in (values | data_section).items()]
    return prepare(load_config("configs/nano.yaml", [f"model.name={folder / 'model'}", *overrides]))


def rows(*given: Row, against: tuple[Row, ...] = (), limit: int = LIMIT) -> Callable[[], list[str]]:
    """Prepares other rows; `against`: these are trained on and `given` held out."""

    def find() -> list[str]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer().save_pretrained(folder / "model")
            shutil.copy(NANO / "config.json", folder / "model")
            parts = (against, given) if against else (given, [OTHER])
            audited = prepared(folder, *parts, limit, audit="warn").audit
        return [*audited["train"]["problems"], *audited["held_out"]["problems"]]

    return find


def cached(change: Callable[[Path, Path], None]) -> Callable[[], list[str]]:
    """Prepares rows, calls `change(model, prepared folder)`, and prepares them again."""

    def find() -> list[str]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer().save_pretrained(folder / "model")
            shutil.copy(NANO / "config.json", folder / "model")
            first = prepared(folder, [ONE, TWO], [OTHER], LIMIT)
            assert first.folder
            change(folder / "model", first.folder)
            prepared(folder, [ONE, TWO], [OTHER], LIMIT)
        return []

    return find


def source(content: bytes, name: str = "rows.jsonl") -> Callable[[], list[str]]:
    """Reads a file."""

    def find() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            load_rows(str(path))
        return []

    return find


def line(messages: Any) -> bytes:
    return json.dumps({"messages": messages}).encode() + b"\n"


# --- renderers ---------------------------------------------------------------------------------


def _supervise(example: Example, *runs: tuple[int, int]) -> Example:
    labels = [IGNORED] * len(example.ids)
    for first, stop in runs:
        labels[first:stop] = example.ids[first:stop]
    return replace(example, labels=labels)


def _runs(example: Example) -> list[tuple[int, int]]:
    return audit.supervised_runs(example.labels)


def _again(made: Any, text: str, example: Example) -> Example:
    """Returns the ids of another text, with as many supervised tokens at its end as before."""
    ids = made(text, add_special_tokens=False).input_ids
    (first, stop), *_ = _runs(example)
    return _supervise(Example(ids, []), (len(ids) - (stop - first) - 1, len(ids) - 1))


def _without_specials(made: Any, row: Row, example: Example) -> Example:
    return _again(made, made.decode(example.ids, skip_special_tokens=True), example)


def _no_end(made: Any, row: Row, example: Example) -> Example:
    stop = _runs(example)[-1][1]
    return Example(example.ids[: stop - 1], example.labels[: stop - 1])


def _end_unsupervised(made: Any, row: Row, example: Example) -> Example:
    return _supervise(example, *((first, stop - 1) for first, stop in _runs(example)))


def _double_bos(made: Any, row: Row, example: Example) -> Example:
    bos = example.ids[0]
    return Example([bos, *example.ids], [IGNORED, *example.labels])


def _shifted(by: int) -> Callable[[Any, Row, Example], Example]:
    def change(made: Any, row: Row, example: Example) -> Example:
        labels = example.labels
        moved = [*labels[by:], *[IGNORED] * by] if by > 0 else [*[IGNORED] * -by, *labels[:by]]
        return replace(example, labels=moved)

    return change


def _starts(by: int) -> Callable[[Any, Row, Example], Example]:
    return lambda made, row, example: _supervise(
        example, *((first + by, stop) for first, stop in _runs(example))
    )


def _only(which: slice) -> Callable[[Any, Row, Example], Example]:
    return lambda made, row, example: _supervise(example, *_runs(example)[which])


def _everything(made: Any, row: Row, example: Example) -> Example:
    return replace(example, labels=list(example.ids))


def _nothing(made: Any, row: Row, example: Example) -> Example:
    return _supervise(example)


def _inverted(made: Any, row: Row, example: Example) -> Example:
    pairs = zip(example.ids, example.labels, strict=True)
    return replace(example, labels=[i if label == IGNORED else IGNORED for i, label in pairs])


def _system_lost(made: Any, row: Row, example: Example) -> Example:
    return render(made, row.messages[1:], row.tools)


def _tools_lost(made: Any, row: Row, example: Example) -> Example:
    return render(made, row.messages)


def _cut_right(made: Any, row: Row, example: Example) -> Example:
    return Example(example.ids[:-6], example.labels[:-6])


def _cut_left(made: Any, row: Row, example: Example) -> Example:
    return Example(example.ids[6:], example.labels[6:])


def _pad_is_eos(made: Any, row: Row, example: Example) -> Example:
    pad = made.eos_token_id
    return replace(example, labels=[IGNORED if i == pad else i for i in example.labels])


def _padded(made: Any, row: Row, example: Example) -> Example:
    pad = made.pad_token_id
    return Example([*example.ids, pad, pad], [*example.labels, IGNORED, IGNORED])


def _pads_supervised(made: Any, row: Row, example: Example) -> Example:
    pad = made.pad_token_id
    return Example([*example.ids, pad, pad], [*example.labels, pad, pad])


def _other_row(made: Any, row: Row, example: Example) -> Example:
    return render(made, [AND, BYE])


def _other_template(made: Any, row: Row, example: Example) -> Example:
    edited = CHATML.replace("{{ m.role }}", "{{ m.role }}:").replace(
        ">assistant\n", ">assistant:\n"
    )
    return render(tokenizer(edited), row.messages)


def _joined_with_a_blank(made: Any, row: Row, example: Example) -> Example:
    (first, stop), *_ = _runs(example)
    prompt, answer = made.decode(example.ids[:first]), made.decode(example.ids[first:stop])
    return _again(made, f"{prompt} {answer}\n", example)


def _found_by_its_header(made: Any, row: Row, example: Example) -> Example:
    """Searches the header of the turn in the ids, and finds the words that the user typed."""
    header = made("assistant\n", add_special_tokens=False).input_ids
    ids = example.ids
    at = next(i for i in range(len(ids)) if ids[i : i + len(header)] == header)
    return _supervise(example, (at + len(header), len(ids) - 1))


def _tool_supervised(made: Any, row: Row, example: Example) -> Example:
    (first, _), *_, (_, stop) = _runs(example)
    return _supervise(example, (first, stop))


def _other_vocabulary(made: Any, row: Row, example: Example) -> Example:
    ids = [i if i < 10 else 10 + (i + 1 - 10) % (len(made) - 10) for i in example.ids]
    return Example(
        ids, [i if lab != IGNORED else IGNORED for i, lab in zip(ids, example.labels, strict=True)]
    )


def _two_in_one(made: Any, row: Row, example: Example) -> Example:
    return Example(example.ids * 2, example.labels * 2)


def _in_lower_case(made: Any, row: Row, example: Example) -> Example:
    return render(made, [{**m, "content": m["content"].lower()} for m in row.messages])


TYPED = Row([turn("user", "it says: assistant\nwhat is it?"), HELLO], None, "f", 1)
UNWEIGHTED = Row([ASK, {**HELLO, "weight": 0}, AND, BYE], None, "f", 1)


def _weights_ignored(made: Any, row: Row, example: Example) -> Example:
    return render(made, [{k: v for k, v in m.items() if k != "weight"} for m in row.messages])


RENDERERS = [
    Fault(
        "not_the_template",
        "text decoded without special tokens, tokenised again",
        "chat tools",
        renderer(_without_specials),
    ),
    Fault(
        "no_end_of_turn",
        "no end-of-turn token at the end",
        "early Alpaca trainers",
        renderer(_no_end),
    ),
    Fault(
        "no_end_of_turn",
        "the end of turn is there but not supervised",
        "mask by content",
        renderer(_end_unsupervised),
    ),
    Fault(
        "not_the_template",
        "a second bos before the one of the template",
        "tokenizer(text) after a template",
        renderer(_double_bos),
    ),
    Fault(
        "labels_differ",
        "labels shifted left, and shifted again by the loss",
        "own collators",
        renderer(_shifted(1)),
    ),
    Fault("labels_differ", "labels shifted right by one", "own collators", renderer(_shifted(-1))),
    Fault(
        "answer_differs",
        "mask by the length of the prompt without its header",
        "no add_generation_prompt",
        renderer(_starts(-3)),
    ),
    Fault(
        "answer_differs",
        "mask by the re-tokenised prompt's length, one token too long",
        "prefix tokenisation",
        renderer(_starts(1)),
    ),
    Fault(
        "turns_differ",
        "only the last pair of a conversation supervised",
        "prompt/response trainers",
        renderer(_only(slice(-1, None)), TWO),
    ),
    Fault(
        "turns_differ",
        "only the first pair of a conversation supervised",
        "prompt/response trainers",
        renderer(_only(slice(1)), TWO),
    ),
    Fault(
        "turns_differ", "prompts supervised as well, unasked", "no mask", renderer(_everything, TWO)
    ),
    Fault(
        "unsupervised",
        "an all-zero mask from a template without generation blocks",
        "assistant_only_loss",
        renderer(_nothing),
    ),
    Fault("turns_differ", "the mask inverted", "mask conventions", renderer(_inverted)),
    Fault(
        "not_the_template",
        "the system prompt dropped",
        "ShareGPT converters",
        renderer(_system_lost, TWO),
    ),
    Fault(
        "not_the_template",
        "the row's tools not passed to the template",
        "tool trainers",
        renderer(_tools_lost, TOOLS),
    ),
    Fault(
        "no_end_of_turn", "an answer truncated without a mark", "max_length", renderer(_cut_right)
    ),
    Fault(
        "not_the_template",
        "the beginning of the prompt truncated without a mark",
        "truncation_side=left",
        renderer(_cut_left),
    ),
    Fault(
        "no_end_of_turn",
        "pad is eos, so masking pads masks the true end",
        "LM collators",
        renderer(_pad_is_eos),
    ),
    Fault(
        "not_the_template",
        "padding stored with the example",
        "pad_to_max_length",
        renderer(_padded),
    ),
    Fault(
        "not_the_template",
        "padding supervised",
        "labels = input_ids.copy()",
        renderer(_pads_supervised),
    ),
    Fault(
        "not_the_template",
        "ids of another row (a cache out of step)",
        "stale caches",
        renderer(_other_row),
    ),
    Fault(
        "not_the_template",
        "ids of the template before it was edited",
        "stale caches",
        renderer(_other_template),
    ),
    Fault(
        "not_the_template",
        "prompt and answer joined with a blank",
        "prompt + ' ' + answer",
        renderer(_joined_with_a_blank),
    ),
    Fault(
        "answer_differs",
        "header looked for in the ids, found in the user's text",
        "completion-only collators",
        renderer(_found_by_its_header, TYPED),
    ),
    Fault(
        "turns_differ",
        "a tool's result supervised with the turns around it",
        "agent trainers",
        renderer(_tool_supervised, TOOLS),
    ),
    Fault(
        "turns_differ",
        "a turn of weight 0 supervised",
        "weight ignored",
        renderer(_weights_ignored, UNWEIGHTED),
    ),
    Fault(
        "not_the_template",
        "ids of another tokenizer's vocabulary",
        "resized vocabularies",
        renderer(_other_vocabulary),
    ),
    Fault(
        "not_the_template",
        "two conversations in one example without a boundary",
        "naive packing",
        renderer(_two_in_one),
    ),
    Fault(
        "not_the_template",
        "text normalised before it was tokenised",
        "cleaning scripts",
        renderer(_in_lower_case),
    ),
]

# --- templates ---------------------------------------------------------------------------------


def _no_bos() -> list[str]:
    made = AutoTokenizer.from_pretrained(NANO)
    made.chat_template = CHATML
    made.add_special_tokens({"bos_token": "<|bos|>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", made.bos_token_id)]
    )
    example = render(made, ONE.messages)
    return audit.examine(made, ONE, example, LIMIT)


THINKING = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\\n') }}",
)
THOUGHT = Row([ASK, turn("assistant", "<think>\nWho?\n</think>\n\nHello."), AND, BYE], None, "f", 1)
TEMPLATES = [
    Fault(
        "end_of_turn_added",
        "no end of turn in the template",
        "base-model templates",
        template(CHATML.replace("<|im_end|>", "")),
    ),
    Fault(
        "not_as_served",
        "an end only behind the last turn",
        "concatenating templates",
        template(
            CHATML.replace(
                "{%- endfor %}<|im_end|>", "{%- endfor %}{% if loop.last %}<|im_end|>{% endif %}"
            ),
            TWO,
        ),
    ),
    Fault(
        "the chat template ignores add_generation_prompt",
        "add_generation_prompt ignored",
        "Llama 2 style edits",
        template(
            CHATML.replace("{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
        ),
    ),
    Fault(
        "the prompt that serving renders before assistant turn 1 is not how",
        "a blank behind the generation prompt",
        "hand-written prompts",
        template(CHATML.replace("assistant\n{% endif %}", "assistant\n{{ ' ' }}{% endif %}")),
    ),
    Fault(
        "thoughts_closed",
        "the generation prompt opens thoughts that training has not",
        "reasoning models",
        template(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")),
    ),
    Fault(
        "tags_kept",
        "tags in an answer that the template takes for its own",
        "Qwen3, GLM-4, DeepSeek-R1",
        template(
            CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
            Row([ASK, turn("assistant", "Write <think>Who?</think> first.")], None, "f", 1),
        ),
    ),
    Fault(
        "other_variables",
        "the generation prompt closes the thoughts that training has",
        "reasoning models",
        mask(None, CLOSES, ONE_THOUGHT),
    ),
    Fault(
        "the prompt that serving renders before assistant turn 1 is not how",
        "a default system prompt in training only",
        "template defaults",
        template(
            "{% if not add_generation_prompt %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
            + CHATML
        ),
    ),
    Fault(
        "content_altered",
        "the system prompt dropped by the template",
        "no system role",
        template(
            CHATML.replace(
                "{%- for m in messages %}", "{%- for m in messages if m.role != 'system' %}"
            ),
            TWO,
        ),
    ),
    Fault(
        "content_altered",
        "the user's text changed by the template",
        "normalising templates",
        template(
            CHATML.replace(
                "{{ m.content }}", "{{ m.content | lower if m.role == 'user' else m.content }}"
            )
        ),
    ),
    Fault(
        "content_altered",
        "a tool's result dropped by the template",
        "templates without tools",
        template(
            CHATML.replace(
                "{%- for m in messages %}", "{%- for m in messages if m.role != 'tool' %}"
            ),
            TOOLS,
        ),
    ),
    Fault(
        "tools_dropped",
        "the tools not written by the template",
        "templates without tools",
        template(CHATML.replace("{{ tools | tojson }}", ""), TOOLS),
    ),
    Fault(
        "does not write the name of a call ('get_time') of assistant turn 1",
        "tool calls not written by the template",
        "templates without tools",
        template(CHATML.replace("m.tool_calls or []", "[]"), TOOLS),
    ),
    Fault(
        "does not write an argument ('X') of assistant turn 1",
        "the arguments of calls not written by the template",
        "templates without tools",
        template(CHATML.replace("call.function |", "call.function.name |"), TOOLS),
    ),
    Fault(
        "alters or drops what assistant turn 1 says",
        "long contents cut by the template",
        "prompt limits",
        template(CHATML.replace("{{ m.content }}", "{{ m.content[:12] }}")),
    ),
    Fault(
        "the prompt that serving renders before assistant turn 1 is not how",
        "the last turn dropped by the template",
        "inference templates",
        template(CHATML.replace("{%- for m in messages %}", "{%- for m in messages[:-1] %}")),
    ),
    Fault(
        "no_end_of_turn",
        "the end of turn outside the generation block",
        "template patches",
        template(OUTSIDE),
    ),
    Fault(
        "the chat template marks the user's turns for training",
        "generation blocks around every role",
        "template patches",
        template(MARKED, Row([ASK, HELLO, AND, BYE], None, "f", 1)),
    ),
    Fault(
        "repeated_bos",
        "two bos in the template",
        "template + tokenizer",
        template("{{ bos_token }}{{ bos_token }}" + CHATML, bos="<|bos|>"),
    ),
    Fault(
        "no_bos",
        "no bos in the template, add_special_tokens off",
        "template + tokenizer",
        _no_bos,
    ),
    Fault(
        "end_of_turn_added",
        "an end of turn that is no token of its own",
        "'###' as a stop string",
        template(CHATML.replace("<|im_end|>", "###")),
    ),
    Fault(
        "not_as_served",
        "thoughts of an earlier turn dropped by the template",
        "Qwen3, DeepSeek-R1",
        template(THINKING, THOUGHT),
    ),
    Fault(
        "unread_variables",
        "a variable of a row that the template does not read",
        "enable_thinking",
        mask(None, CHATML, replace(ONE, template_kwargs={"enable_thinking": False})),
    ),
    Fault(
        "no_prompt",
        "a conversation that begins with the assistant",
        "role play sets",
        template(CHATML, Row([HELLO, AND, BYE], None, "f", 1)),
    ),
    Fault(
        "thoughts_dropped",
        "thoughts of every turn dropped by the template",
        "templates without thoughts",
        template(CHATML, Row([ASK, THOUGHTFUL, AND, BYE], None, "f", 1)),
    ),
    Fault(
        "the chat template refuses the roles",
        "a role that the template refuses",
        "Gemma's system role",
        template(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
            TWO,
        ),
    ),
]

# --- masks -------------------------------------------------------------------------------------


def calls(*given: tuple[str, Any], content: str = "", **more: Any) -> dict[str, Any]:
    """Returns a turn of the assistant with calls, given their names and arguments."""
    made = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in given]
    return turn("assistant", content, tool_calls=made, **more)


def conversation(*messages: dict[str, Any], tools: Sequence[Any] = (TOOL, DATE)) -> Row:
    return Row(list(messages), list(tools), "f", 1)


END = "<|im_end|>"
TIMES = calls(("get_time", {"zone": "X"}), ("get_date", {"zone": "Y"}))
TWO_CALLS = conversation(
    ASK, CALL, RESULT, calls(("get_date", {"zone": "Z"})), turn("tool", "May 5"), BYE
)
PARALLEL = conversation(ASK, TIMES, RESULT, turn("tool", "May 5"), BYE)
CALL_LAST = conversation(ASK, CALL)
CALL_THOUGHTS = conversation(ASK, {**CALL, "reasoning_content": "A tool knows."}, RESULT, BYE)
THOUGHTS = Row([ASK, THOUGHTFUL, AND, {**BYE, "reasoning_content": "They leave."}], None, "f", 1)
TWO_ANSWERS = Row(
    [ASK, turn("assistant", "It is late in the day."), turn("assistant", "So we end it.")],
    None,
    "f",
    1,
)
UNLEARNT = {**CALL, "reasoning_content": "A tool knows.", "weight": 0}
BEHIND_THOUGHTS = conversation(ASK, THOUGHTFUL, AND, TIMES)
TYPED_IN = {
    "the arguments of a call": conversation(
        ASK, calls(("get_time", {"zone": f"X{END} is an end"})), RESULT, BYE
    ),
    "a key of the arguments": conversation(ASK, calls(("get_time", {END: "X"})), RESULT, BYE),
    "the name of a call": conversation(ASK, calls((f"get{END}", {"zone": "X"})), RESULT, BYE),
    "the description of a tool": conversation(
        ASK,
        CALL,
        RESULT,
        BYE,
        tools=[{"type": "function", "function": {**TOOL["function"], "description": END}}],
    ),
    "the schema of a tool": conversation(
        ASK,
        CALL,
        RESULT,
        BYE,
        tools=[
            {
                "type": "function",
                "function": {"name": "get_time", "parameters": {"properties": {END: {}}}},
            }
        ],
    ),
    "the thoughts of a turn": Row(
        [ASK, {**HELLO, "reasoning_content": f"Is {END} an end?"}], None, "f", 1
    ),
    "the result of a tool": conversation(ASK, CALL, turn("tool", f"10:20{END}"), BYE),
}


def _find(made: Any, ids: list[int], text: str, start: int = 0) -> tuple[int, int]:
    """Returns where the tokens of a text stand, at or behind `start`."""
    for first in range(start, len(ids)):
        for stop in range(first + 1, min(first + 40, len(ids)) + 1):
            if text in made.decode(ids[first:stop]):
                inside = [n for n in range(first, stop) if text in made.decode(ids[n:stop])]
                return inside[-1], stop
    raise LookupError(text)


def _becomes_special(made: Any, row: Row, example: Example) -> Example:
    """Tokenises the whole text at once, so that what someone typed becomes the special token."""
    ids = made(made.decode(example.ids), add_special_tokens=False).input_ids
    assert ids != example.ids
    ends = [n for n, i in enumerate(ids) if i == made.eos_token_id]
    (first, _), *_ = _runs(example)
    first = min(first, ends[-1] - 1)
    return _supervise(Example(ids, []), (first, next(n for n in ends if n >= first) + 1))


def _run_until(text: str, run: int = 0) -> Change:
    """Ends the supervision of a turn behind a text."""

    def change(made: Any, row: Row, example: Example) -> Example:
        runs = _runs(example)
        _, stop = _find(made, example.ids, text, runs[run][0])
        runs[run] = (runs[run][0], stop)
        return _supervise(example, *runs)

    return change


def _run_behind(text: str, run: int = 0) -> Change:
    """Begins the supervision of a turn behind a text."""

    def change(made: Any, row: Row, example: Example) -> Example:
        runs = _runs(example)
        _, first = _find(made, example.ids, text, runs[run][0])
        runs[run] = (first, runs[run][1])
        return _supervise(example, *runs)

    return change


def _run_from(text: str, run: int = 0) -> Change:
    """Begins the supervision of a turn at the last place of a text before it."""

    def change(made: Any, row: Row, example: Example) -> Example:
        runs = _runs(example)
        starts = [n for n in range(runs[run][0]) if made.decode(example.ids[n:]).startswith(text)]
        runs[run] = (starts[-1], runs[run][1])
        return _supervise(example, *runs)

    return change


def _whole_text(made: Any, row: Row, example: Example) -> Example:
    """Renders the whole conversation, and supervises what its turns have in it, as found."""
    text = made.apply_chat_template(row.messages, tools=row.tools, tokenize=False)
    ids = made(text, add_special_tokens=False).input_ids
    runs: list[tuple[int, int]] = []
    for message in row.messages:
        if message["role"] == "assistant" and message.get("weight", 1):
            said = message["content"] or "<tool>"
            first, _ = _find(made, ids, said, runs[-1][1] if runs else 0)
            runs.append((first, ids.index(made.eos_token_id, first) + 1))
    return _supervise(Example(ids, []), *runs)


def _answer_of(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    """Puts the answer of a changed last turn behind the prompt of the row."""

    def alter(made: Any, row: Row, example: Example) -> Example:
        messages = [*row.messages[:-1], change(row.messages[-1])]
        _, other = render_row(made, replace(row, messages=messages), 2 * LIMIT)[-1]
        assert other.ids != example.ids
        stop = _runs(other)[-1][1]
        return Example(other.ids[:stop], other.labels[:stop])

    return alter


def _behind(prompt: Callable[[Any, Row], list[int]]) -> Change:
    """Puts the answer behind another prompt."""

    def change(made: Any, row: Row, example: Example) -> Example:
        ids, ((first, stop), *_) = prompt(made, row), _runs(example)[::-1]
        assert ids != example.ids[:first]
        end = len(ids) + stop - first
        return _supervise(Example([*ids, *example.ids[first:stop]], []), (len(ids), end))

    return change


def _served(made: Any, messages: Sequence[Any], **variables: Any) -> list[int]:
    ids: list[int] = made.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=False, **variables
    )
    return ids


def _thoughts_kept(made: Any, row: Row) -> list[int]:
    """Returns the prompt behind the history as it was written, with thoughts that serving drops."""
    history = [
        {**m, "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
        if m.get("reasoning_content")
        else m
        for m in row.messages[:-1]
    ]
    return _served(made, history)


def _tokenised_together(made: Any, row: Row, example: Example) -> Example:
    """Tokenises prompt and answer as one text: a token stands over their border."""
    ids = made(made.decode(example.ids), add_special_tokens=False).input_ids
    assert ids != example.ids
    first, stop = _runs(example)[-1]
    return _supervise(Example(ids, []), (len(ids) - stop + first, len(ids)))


def _first_run(by: int) -> Change:
    """Ends the supervision of the first turn later, or earlier."""

    def change(made: Any, row: Row, example: Example) -> Example:
        (first, stop), *others = _runs(example)
        return _supervise(example, (first, stop + by), *others)

    return change


def _ended_twice(made: Any, row: Row, example: Example) -> Example:
    ids = [*example.ids, made.eos_token_id]
    return Example(ids, [*example.labels, made.eos_token_id])


def _joined(made: Any, row: Row, example: Example) -> Example:
    """Supervises all from the first of two turns to the end of the second."""
    runs = _runs(example)
    return _supervise(example, (runs[0][0], runs[1][1]), *runs[2:])


def _with_the_answer_before(made: Any, row: Row, example: Example) -> Example:
    """Begins an answer with the one before it, as the whole text has them without a header."""
    first, stop = _runs(example)[-1]
    said = made(row.messages[-2]["content"], add_special_tokens=False).input_ids
    ids = [*example.ids[:first], *said, *example.ids[first:stop]]
    return _supervise(Example(ids, []), (first, len(ids)))


def _results_too(made: Any, row: Row, example: Example) -> Example:
    """Supervises a turn from the end of the turn before it, since no header is in between."""
    runs = _runs(example)
    return _supervise(example, runs[0], (runs[0][1], runs[1][1]), *runs[2:])


def _other_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    return calls(("get_time", {"zone": "another"}), ("get_date", {"zone": "Y"}))


def _swapped(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "tool_calls": turn["tool_calls"][::-1]}


MASKS = [
    *(
        Fault(
            "not_the_template",
            f"an end of turn that stands as text in {where} becomes the real token",
            "injected roles",
            mask(_becomes_special, THINKS, row),
        )
        for where, row in TYPED_IN.items()
    ),
    Fault(
        "no_end_of_turn",
        "supervision ends at the end of turn that stands as text in the arguments",
        "search for the nearest special token",
        mask(_run_until(END), THINKS, TYPED_IN["the arguments of a call"]),
    ),
    Fault(
        "no_end_of_turn",
        "supervision ends at the end of turn that stands as text in the thoughts",
        "search for the nearest special token",
        mask(_run_until(END), THINKS, TYPED_IN["the thoughts of a turn"]),
    ),
    Fault(
        "no_end_of_turn",
        "the arguments of a call, between special tokens, not supervised",
        "search for the nearest special token",
        mask(_run_until("<|channel|>"), CHANNELS, CALL_LAST),
    ),
    Fault(
        "answer_differs",
        "only the arguments of a call supervised, and not who is called",
        "mask by the last special token",
        mask(_run_behind("<|message|>"), CHANNELS, CALL_LAST),
    ),
    Fault(
        "no_end_of_turn",
        "the second of two calls in a turn not supervised",
        "mask by the first end",
        mask(_run_until("<call|>"), INSIDE, PARALLEL),
    ),
    Fault(
        "answer_differs",
        "a call supervised although its thoughts are dropped",
        "agent trainers",
        mask(_whole_text, THINKING, CALL_THOUGHTS, None),
    ),
    Fault(
        "turns_differ",
        "a tool's result between two calls supervised, where no header stands",
        "search for the last header",
        mask(_joined, INSIDE, TWO_CALLS),
    ),
    Fault(
        "turns_differ",
        "a tool's result supervised with the call that follows it, where no header stands",
        "search for the last header",
        mask(_results_too, INSIDE, TWO_CALLS),
    ),
    Fault(
        "answer_differs",
        "a tool's result supervised with the answer behind it, where no header stands",
        "search for the last header",
        mask(_run_from("<|result>"), INSIDE, conversation(ASK, {**CALL, "weight": 0}, RESULT, BYE)),
    ),
    Fault(
        "answer_differs",
        "an earlier turn supervised without its thoughts, as the whole text has it",
        "one text for all turns",
        mask(_whole_text, THINKS, THOUGHTS, None),
    ),
    Fault(
        "prompt_mismatch",
        "a turn supervised behind a history without the thoughts that serving has",
        "one text for all turns",
        mask(
            _whole_text,
            THINKS,
            conversation(ASK, UNLEARNT, RESULT, BYE, AND, {**HELLO, "weight": 0}),
            None,
        ),
    ),
    Fault(
        "not_the_template",
        "a turn behind a history whose thoughts serving drops",
        "concatenated turns",
        mask(_behind(_thoughts_kept), THINKS, THOUGHTS, 1),
    ),
    Fault(
        "not_the_template",
        "a turn behind the prompt of another turn",
        "prompt/response trainers",
        mask(_behind(lambda made, row: _served(made, row.messages[:1])), THINKS, THOUGHTS, 1),
    ),
    Fault(
        "answer_differs",
        "the header of a turn supervised",
        "mask by role",
        mask(_run_from("<|im_start|>assistant"), THINKS, ONE_THOUGHT),
    ),
    Fault(
        "answer_differs",
        "the opening tag of thoughts supervised, which the prompt holds",
        "reasoning models",
        mask(_run_from("<think>"), OPENS, ONE_THOUGHT),
    ),
    Fault(
        "answer_differs",
        "the thoughts of a turn not supervised",
        "mask by content",
        mask(_run_behind("</think>"), THINKS, ONE_THOUGHT),
    ),
    Fault(
        "no_end_of_turn",
        "the next header, which ends a turn, not supervised",
        "GLM-4 trainers",
        mask(_first_run(-1), HEADERS, TWO),
    ),
    Fault(
        "no_end_of_turn",
        "what follows the next header, which ends a turn, supervised",
        "GLM-4 trainers",
        mask(_first_run(1), HEADERS, TWO),
    ),
    Fault(
        "not_the_template",
        "an eos supervised behind the token that ends the turn",
        "appended eos",
        mask(_ended_twice, HEADERS, ONE),
    ),
    Fault(
        "not_the_template",
        "a turn rendered with another value of a template variable",
        "enable_thinking",
        mask(
            _behind(lambda made, row: _served(made, row.messages[:1], enable_thinking=False)),
            THINKS,
            ONE_THOUGHT,
        ),
    ),
    Fault(
        "not_the_template",
        "prompt and answer tokenised together, so that one token is over their border",
        "headers that end in punctuation",
        mask(_tokenised_together, QUOTES, Row([ASK, turn("assistant", ': "Hello"')], None, "f", 1)),
    ),
    Fault(
        "not_the_template",
        "an answer that begins with the answer before it",
        "templates that join answers",
        mask(_with_the_answer_before, JOINS, TWO_ANSWERS, -1),
    ),
    Fault(
        "not_the_template",
        "a call supervised with the arguments of another row",
        "caches of split rows",
        mask(_answer_of(_other_arguments), THINKS, BEHIND_THOUGHTS, -1),
    ),
    Fault(
        "not_the_template",
        "two calls of a turn supervised in another order",
        "unordered calls",
        mask(_answer_of(_swapped), THINKS, BEHIND_THOUGHTS, -1),
    ),
]

# --- data --------------------------------------------------------------------------------------

LONG = Row([ASK, turn("assistant", "Hello. " * 120)], None, "f", 9)
MANY = [
    Row([turn("user", f"say {n} and {n * n}"), turn("assistant", f"{n}")], None, "f", n)
    for n in range(60)
]
STORY = " ".join(f"word{n} of a story that goes on" for n in range(12))
DATA = [
    Fault(
        "special_in_content",
        "the user typed an end-of-turn token",
        "injected roles",
        rows(Row([turn("user", "Hi<|im_end|>\n<|im_start|>assistant"), HELLO], None, "f", 1)),
    ),
    Fault(
        "special_in_content",
        "an answer holds a special token as text",
        "scraped logs",
        rows(Row([ASK, turn("assistant", "Use <|im_end|>.")], None, "f", 1)),
    ),
    Fault("duplicate", "the same row twice", "merged files", rows(ONE, replace(ONE, line=5))),
    Fault(
        "near_duplicate",
        "nearly the same row twice",
        "paraphrase-free augmentation",
        rows(
            Row([turn("user", STORY), HELLO], None, "f", 1),
            Row([turn("user", STORY + " and"), HELLO], None, "f", 2),
        ),
    ),
    Fault(
        "leaked",
        "a held-out row in the training file",
        "random re-splits",
        rows(ONE, against=(ONE, TWO)),
    ),
    Fault(
        "near_leak",
        "a held-out row nearly in the training file",
        "random re-splits",
        rows(
            Row([turn("user", STORY), HELLO], None, "f", 1),
            against=(Row([turn("user", STORY + " and"), HELLO], None, "g", 2),),
        ),
    ),
    Fault("too_long", "an answer beyond the limit", "max_length", rows(LONG)),
    Fault(
        "length_outlier",
        "one row far longer than all others",
        "a whole log in a cell",
        rows(*MANY, LONG, limit=2000),
    ),
    Fault(
        "1 bad row",
        "an empty answer",
        "failed generations",
        source(line([ASK, turn("assistant", "")])),
    ),
    Fault("1 bad row", "no assistant turn", "filtered conversations", source(line([ASK]))),
    Fault(
        "1 bad row",
        "the last turn is the user's",
        "cut conversations",
        source(line([ASK, HELLO, AND])),
    ),
    Fault(
        "1 bad row",
        "an unknown role",
        "role names of another format",
        source(line([ASK, turn("bot", "Hello.")])),
    ),
    Fault(
        "1 bad row",
        "an answer that is null",
        "database exports",
        source(line([ASK, {"role": "assistant", "content": None}])),
    ),
    Fault("1 bad row", "broken JSON", "interrupted writers", source(b'{"messages": [\n')),
    Fault(
        "1 bad row",
        "text that is not UTF-8",
        "other encodings",
        source(line([ASK, HELLO]).replace(b"Hello", b"H\xe9llo")),
    ),
    Fault(
        "1 bad row",
        "a lone surrogate",
        "cut emoji",
        source(line([ASK, turn("assistant", "\ud83d")])),
    ),
    Fault(
        "1 bad row",
        "a NUL character",
        "database exports",
        source(line([ASK, turn("assistant", "a\0b")])),
    ),
    Fault(
        "1 bad row",
        "a key given twice",
        "string concatenation",
        source(b'{"prompt": "a", "prompt": "b", "completion": "c"}\n'),
    ),
    Fault(
        "1 bad row",
        "an image in a text row",
        "vision exports",
        source(line([turn("user", [{"type": "image_url", "image_url": "x"}]), HELLO])),
    ),
]

# --- caches ------------------------------------------------------------------------------------


def _of_another_template(model: Path, folder: Path) -> None:
    """Renames the old folder to the new key, as a cache that ignores the template would."""
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# edited #}")
    inputs = json.loads((folder / "audit.json").read_text())["inputs"]
    inputs["template"] = audit.template_sha256(AutoTokenizer.from_pretrained(model))
    folder.rename(folder.with_name(cache_key(inputs)))


def _with_a_flipped_bit(model: Path, folder: Path) -> None:
    content = bytearray((folder / "ids.bin").read_bytes())
    content[40] ^= 1
    (folder / "ids.bin").write_bytes(content)


def _cut_off(model: Path, folder: Path) -> None:
    with (folder / "labels.bin").open("r+b") as file:
        file.truncate(100)


CACHES = [
    Fault(
        "made of another template",
        "prepared before the template was edited",
        "stale caches",
        cached(_of_another_template),
    ),
    Fault("ids.bin is damaged", "a flipped bit", "disks", cached(_with_a_flipped_bit)),
    Fault("labels.bin has 100 bytes", "a file cut off", "full disks", cached(_cut_off)),
]
FAULTS = {
    "renderer": RENDERERS,
    "template": TEMPLATES,
    "mask": MASKS,
    "data": DATA,
    "cache": CACHES,
}


def table() -> str:
    """Returns the text of docs/FAULTS.md."""
    count = sum(map(len, FAULTS.values()))
    lines = [
        "# Seeded faults",
        "",
        f"{count} known bugs of real tools, as mutations (`tests/faults/catalogue.py`). The audit,",
        "the renderer or the reader finds every one; on the clean material they find nothing.",
        "Generated by `make docs`.",
        "",
        "| where | fault | known from | found as |",
        "|---|---|---|---|",
    ]
    for where, faults in FAULTS.items():
        for fault in faults:
            found = f"`{fault.kind}`" if fault.kind in audit.KINDS else f"refused: {fault.kind} ..."
            lines.append(f"| {where} | {fault.what} | {fault.seen_in} | {found} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
