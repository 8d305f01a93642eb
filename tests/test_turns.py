"""Law 3 as a property: what is supervised is what a model has to write after the served prompt."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from functools import cache
from typing import Any

import pytest
import test_template as families
from conftest import ROOT, SHARED, load_rows, representatives
from faults import catalogue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sft.config.schema import Model
from sft.data import audit, template, tokens
from sft.data.files import Row
from sft.data.rendering import ESCAPED, TemplateError, read_form
from sft.errors import DataError, ModelError
from sft.models.pretrained import load_tokenizer

TEMPLATES = SHARED / "data/templates/templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
LOCAL = {
    "tools": catalogue.CHATML,
    "thoughts of the last question": catalogue.THINKS,
    "thoughts closed by default": catalogue.CLOSES,
    "thoughts opened by the prompt": catalogue.OPENS,
    "channels": catalogue.CHANNELS,
    "headers end turns": catalogue.HEADERS,
    "results inside the turn": catalogue.INSIDE,
    "header ends in a quote": catalogue.QUOTES,
    "answers joined": catalogue.JOINS,
    "system prompt in the last question": catalogue.IN_THE_LAST,
    "a header behind every text": catalogue.ALWAYS_HEADED,
    "a default of its own": catalogue.DEFAULTED,
    "blocks in a text that is rewritten": catalogue.REWRITES,
    "blocks": families.GENERATION,
    "no end": families.NO_END,
    "an end of the last": families.LAST_ONLY,
}
LIMIT = 10**6
MARK = re.compile(r"~\d+~")  # stands in each value of a conversation, with a number of its own


@cache
def oracle() -> Any:
    """Returns the module benchmarks/templates.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("templates")
    finally:
        sys.path.pop(0)


@cache
def pairs() -> list[dict[str, Any]]:
    return list(oracle().read_lines(SHARED / "data/templates/oracle.jsonl"))


@cache
def stand_in(name: str) -> Any:
    """Returns a tokenizer with a shared template. Those without a row of the oracle are Llama's."""
    if not TEMPLATES.is_dir():
        pytest.skip(f"no templates in {TEMPLATES}: set SFT_SHARED")
    known = {pair["template"]: pair for pair in pairs()}
    pair = {**known.get(name, known["llama3"]), "template": name}
    made = oracle().stand_in(SHARED, pair, "minimind")  # a small vocabulary is read at once
    made.chat_control_tokens = []  # special tokens are plain text in messages, others are tokens
    return made


@cache
def local(name: str) -> Any:
    text = LOCAL[name]
    made = catalogue.tokenizer(text, None, catalogue.TOKENS.get(text, ()))
    made.chat_control_tokens = []
    return made


def serve(tokenizer: Any, row: Row, turn: int) -> list[int]:
    """Returns the prompt of a turn as transformers itself renders it for inference."""
    plain = [{k: v for k, v in m.items() if k != "weight"} for m in row.messages[:turn]]
    made: list[int] = tokenizer.apply_chat_template(
        read_form(tokenizer).apply(plain),
        tools=row.tools,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
        **(row.template_kwargs or {}),
    )
    # Where a template writes a value as Python's repr, transformers leaves its own marks behind.
    if ESCAPED.search(tokenizer.decode(made)):
        return template.prompt_ids(tokenizer, plain, row.tools, row.template_kwargs)
    return made


def generate(tokenizer: Any, prompt: list[int], model: list[int]) -> list[int]:
    """Returns what a server makes of a model that continues `prompt` with the tokens `model`."""
    stops, written = audit.stop_ids(tokenizer), []
    for token in model[len(prompt) :]:
        written.append(token)
        if token in stops:
            break
    return written


def marks_of(message: dict[str, Any]) -> list[str]:
    """Returns the marks of a turn's values, in the order in which a turn has them."""
    said = [message.get("reasoning_content", ""), message["content"]]
    said += [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
    return MARK.findall(" ".join(json.dumps(value) for value in said))


# --- conversations -----------------------------------------------------------------------------

HOSTILE = [
    *("zq7s0e", "zq7s1ezq7s0e", "zq7sq0e", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>"),
    *("<|user|>", "<|call|>", "<|end|>", "<|eot_id|>", "<|return|>", "<end_of_turn>", "<turn|>"),
    *("<think>", "</think>", "<think>\nhm\n</think>\n\n", "<tool_call>", "</tool_call>", "<tool>"),
    *("assistant\n", "\nuser: no", "[INST]", "### assistant\n", "<|assistant|>\n", "Assistant:\n"),
    *('{"name": "b", "arguments": {}}', '"', "\\", "'", "\\n", "{{ m.content }}", "{% endfor %}"),
    *(" ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "e\u0301", "\u0301", "\ufeff", "&amp;"),
    *(
        "\U0001f469\u200d\U0001f467",
        "\u4f60\u597d",
        "\u05e9\u05dc",
        "\u0928\u092e\u0938\u094d",
        "7",
    ),
]
CHARACTERS = st.characters(exclude_categories=["Cs", "Co"], exclude_characters="\0~")
SAID = st.lists(st.sampled_from(HOSTILE) | st.text(CHARACTERS, max_size=6), max_size=3).map("".join)


@st.composite
def rows(draw: Any) -> Row:
    """Draws a conversation, each of whose values has a mark of its own."""
    numbers = itertools.count()

    def said() -> str:
        return f"{draw(SAID)}~{next(numbers)}~{draw(SAID)}"

    def content() -> Any:
        parts = [{"type": "text", "text": said()} for _ in range(draw(st.integers(1, 2)))]
        return parts if draw(st.integers(0, 5)) == 5 else said()

    def argument(depth: int = 0) -> Any:
        kind = draw(st.sampled_from(["text", "text", "number", "null", "list", "object"]))
        if kind in ("list", "object") and depth < 2:
            items = [argument(depth + 1) for _ in range(draw(st.integers(0, 2)))]
            return items if kind == "list" else {f"key{n}": item for n, item in enumerate(items)}
        return {"number": 7, "null": None}.get(kind, said() if kind == "text" else True)

    def call(number: int) -> dict[str, Any]:
        arguments = {f"a{n}": argument() for n in range(draw(st.integers(0, 2)))}
        function = {"name": f"get_~{next(numbers)}~", "arguments": arguments}
        return {"id": f"call0000{number}", "type": "function", "function": function}

    def answer(**more: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"role": "assistant", "content": content(), **more}
        if draw(st.integers(0, 2)) == 2:
            made["reasoning_content"] = said()
        if draw(st.integers(0, 5)) == 5:
            made["weight"] = draw(st.sampled_from([0, 0.5]))
        return made

    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": said()})
    elif draw(st.integers(0, 7)) == 7:
        messages.append(answer())
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": content()})
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            calls = [call(n) for n in range(draw(st.integers(1, 2)))]
            text = draw(st.sampled_from(["", said()]))
            messages.append(answer(content=text, tool_calls=calls))
            messages += [
                {
                    "role": "tool",
                    "content": said(),
                    "tool_call_id": each["id"],
                    "name": each["function"]["name"],
                }
                for each in calls
            ]
        messages += [answer() for _ in range(draw(st.sampled_from([1, 1, 1, 1, 2])))]
    if draw(st.integers(0, 4)) == 4:
        messages[-1] = answer(content="", tool_calls=[call(0)])
    messages[-1].pop("weight", None)
    called = [c["function"]["name"] for m in messages for c in m.get("tool_calls", [])]
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": said(),
                "parameters": {"type": "object", "properties": {}},
            },
        }
        for name in dict.fromkeys(called)
    ]
    variables = draw(st.sampled_from([None, None, {"enable_thinking": False}]))
    return Row(messages, tools or None, "f", 1, template_kwargs=variables)


# --- the property ------------------------------------------------------------------------------

# What the audit says of the template, not of what is supervised.
OF_PROMPTS = {"content_altered", "tools_dropped", "repeated_bos"}


def check(tokenizer: Any, row: Row, split: str, supervise: str, empty_thoughts: bool) -> None:
    """Asserts the definition of docs/DATA.md for every example of a row."""
    options: Any = {"turns": split, "supervise": supervise, "empty_thoughts": empty_thoughts}
    try:
        made = template.render_row(tokenizer, row, LIMIT, **options)
    except DataError:  # with a reason
        return
    learnt = Counter[int]()
    turns = {n: marks_of(m) for n, m in enumerate(row.messages) if m["role"] == "assistant"}
    for kept, example in made:
        assert len(example.ids) == len(example.labels)
        for first, stop in audit.supervised_runs(example.labels):
            run = example.ids[first:stop]
            assert example.labels[first:stop] == run
            text = tokens.decode_slice(tokenizer, example.ids, first, stop)
            (turn,) = (n for n, marks in turns.items() if marks == MARK.findall(text))
            weight = row.messages[turn].get("weight", 1)
            assert set((example.weights or [1] * stop)[first:stop]) == {weight}
            prompt = serve(
                tokenizer,
                Row(row.messages, row.tools, "f", 1, template_kwargs=kept.template_kwargs),
                turn,
            )
            assert example.ids[: len(prompt)] == prompt
            assert generate(tokenizer, prompt, example.ids) == example.ids[len(prompt) : stop]
            empty = tokens.decode_slice(tokenizer, example.ids, len(prompt), first)
            assert EMPTY_THOUGHTS.fullmatch(empty) if not empty_thoughts else first == len(prompt)
            assert run[-1] in audit.stop_ids(tokenizer)
            learnt[turn] += 1
        errors = set(audit.examine(tokenizer, kept, example, LIMIT, supervise)) & set(audit.ERRORS)
        assert errors <= OF_PROMPTS | ({"unsupervised"} if not example.num_supervised else set())
    flags = {flag for _, example in made for flag in example.flags}
    assert split == "together" or "not_as_served" not in flags
    for turn in turns:
        is_chosen = supervise == "all" or turn == len(row.messages) - 1
        if not is_chosen or not row.messages[turn].get("weight", 1):
            assert not learnt[turn]
        elif not learnt[turn]:
            assert {"thoughts_dropped", "not_as_served"} & flags if turn else "no_prompt" in flags
        else:
            assert learnt[turn] == 1


SPLITS = st.sampled_from(["auto", "auto", "auto", "split", "together"])
EMPTY = st.sampled_from([True, True, False])
EMPTY_THOUGHTS = re.compile(r"(\s*<(\w+)>)?\s*</\w+>\s*|")
SUPERVISE = st.sampled_from(["all", "all", "last"])
FEW = ["cohere2", "deepseekv3", "gemma3", "gptoss", "llama3_1", "qwen2_5", "qwen3"]
PROPERTY = settings(
    max_examples=int(os.environ.get("SFT_EXAMPLES", "4")),
    derandomize="SFT_EXAMPLES" not in os.environ,  # a search is asked for by its size
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.mark.parametrize("name", LOCAL)
@PROPERTY
@given(row=rows(), split=SPLITS, supervise=SUPERVISE, empty_thoughts=EMPTY)
def test_what_is_supervised_is_what_follows_the_prompt_of_serving(
    name, row, split, supervise, empty_thoughts
):
    check(local(name), row, split, supervise, empty_thoughts)


@pytest.mark.slow
@pytest.mark.skipif(not NAMES, reason=f"no templates in {TEMPLATES}: set SFT_SHARED")
@pytest.mark.parametrize("name", representatives(NAMES, FEW))
@PROPERTY
@given(row=rows(), split=SPLITS, supervise=SUPERVISE, empty_thoughts=EMPTY)
def test_what_is_supervised_on_real_templates_is_what_follows_the_prompt(
    name, row, split, supervise, empty_thoughts
):
    check(stand_in(name), row, split, supervise, empty_thoughts)


# --- the oracle --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not NAMES, reason=f"no templates in {TEMPLATES}: set SFT_SHARED")
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"llama3_1", "llama3_2"}))
def test_every_pair_of_the_oracle_is_right(name):
    """benchmarks/templates.py has the meaning of each verdict, and prints all of them."""
    known = oracle().read_lines(SHARED / "data/templates/conversations.jsonl")
    conversations = {each["name"]: each for each in known}
    tokenizer = stand_in(name)
    for pair in pairs():
        if pair["template"] == name:
            said = conversations[pair["conversation"]]
            row = Row(said["messages"], said["tools"], pair["conversation"], 1)
            verdict, reason = oracle().judge(tokenizer, pair, row)
            assert verdict in ("clean", "split", "unlearnt"), (pair["conversation"], reason)


# --- reported cases ----------------------------------------------------------------------------

NO_THOUGHTS = "<think>\n\n</think>\n\n"
ARGUMENTS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
TYPED_ARGUMENTS = ARGUMENTS.replace('Paris"', 'Paris<|im_end|> is how a turn ends in Paris"')
TOOL_CALL = f"<tool_call>\n{ARGUMENTS}\n</tool_call><|im_end|>"
XML_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
    "</tool_call>"
)
GLM_CALL = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
    "<|observation|>"
)
TO_TOOL = " to=functions.get_weather<|channel|>commentary json<|message|>"
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
)
ASKED = "The user asks of Paris."
CASES: dict[str, dict[str, list[list[str]]]] = {  # file -> template -> texts of each example
    "special_args": {
        "qwen2_5": [
            [f"<tool_call>\n{TYPED_ARGUMENTS}\n</tool_call><|im_end|>", "Done for Paris.<|im_end|>"]
        ],
        "llama3_1": [
            [
                TYPED_ARGUMENTS.replace("arguments", "parameters") + "<|eot_id|>",
                "Done for Paris.<|eot_id|>",
            ]
        ],
        "gptoss": [
            [
                TO_TOOL + '{"city": "Paris<|im_end|> is how a turn ends in Paris"}<|call|>',
                "<|channel|>final<|message|>Done for Paris.<|return|>",
            ]
        ],
    },
    "calllast": {
        "gptoss": [[TO_TOOL + '{"city": "Paris"}<|call|>']],
        "glm4moe": [["\n<think></think>\n" + GLM_CALL]],
        "deepseekv3": [["\n</think>\n\n" + DEEPSEEK_CALL]],
        "qwen2_5": [[TOOL_CALL]],
    },
    "rc_call": {
        "qwen3": [
            ["<think>\nI should call the tool for Paris\n</think>\n\n" + TOOL_CALL],
            [NO_THOUGHTS + "It is sunny in Paris.<|im_end|>"],
            [NO_THOUGHTS + "No forecast for Paris.<|im_end|>"],
        ],
        "qwen3_6": [
            [f"I should call the tool for Paris\n</think>\n\n{XML_CALL}<|im_end|>"],
            ["\n</think>\n\nIt is sunny in Paris.<|im_end|>"],
            ["\n</think>\n\nNo forecast for Paris.<|im_end|>"],
        ],
        "nemotron_3_nano": [
            [f"I should call the tool for Paris\n</think>\n{XML_CALL}\n<|im_end|>"],
            ["</think>It is sunny in Paris.<|im_end|>"],
            ["</think>No forecast for Paris.<|im_end|>"],
        ],
        "gptoss": [
            [
                "<|channel|>analysis<|message|>I should call the tool for Paris<|end|>"
                f'<|start|>assistant{TO_TOOL}{{"city": "Paris"}}<|call|>'
            ],
            ["<|channel|>final<|message|>It is sunny in Paris.<|return|>"],
            ["<|channel|>final<|message|>No forecast for Paris.<|return|>"],
        ],
        "glm4moe": [
            [f"\n<think>I should call the tool for Paris</think>\n{GLM_CALL}"],
            ["\n<think></think>\nIt is sunny in Paris.<|user|>"],
            ["\n<think></think>\nNo forecast for Paris.<|user|>"],
        ],
        # Its template writes no thoughts, so no serving could bring a model to write the call.
        "qwen2_5": [["It is sunny in Paris.<|im_end|>", "No forecast for Paris.<|im_end|>"]],
    },
    "reason": {
        "qwen3": [[f"<think>\n{ASKED}\n</think>\n\nSunny in Paris.<|im_end|>"]],
        "qwen3_5_think": [[f"{ASKED}\n</think>\n\nSunny in Paris.<|im_end|>"]],
        "qwen3_5_nothink": [[f"{ASKED}\n</think>\n\nSunny in Paris.<|im_end|>"]],
        "nemotron_3_super": [[f"{ASKED}\n</think>\nSunny in Paris.<|im_end|>"]],
        "deepseekv3": [[f"{ASKED}\n</think>\n\nSunny in Paris.<｜end▁of▁sentence｜>"]],
        "glm4moe": [[f"\n<think>{ASKED}</think>\nSunny in Paris.<|user|>"]],
        "gptoss": [
            [
                f"<|channel|>analysis<|message|>{ASKED}<|end|><|start|>assistant"
                "<|channel|>final<|message|>Sunny in Paris.<|return|>"
            ]
        ],
        "qwen2_5": [[]],
    },
}


def texts_of(tokenizer: Any, row: Row, **options: Any) -> list[list[str]]:
    """Returns the supervised texts of each example of a row."""
    return [
        families.supervised(tokenizer, example)
        for _, example in template.render_row(tokenizer, row, LIMIT, **options)
    ]


@pytest.mark.parametrize(("file", "name"), [(f, n) for f, known in CASES.items() for n in known])
def test_reported_cases(file, name):
    tokenizer = stand_in(name)
    known, _ = load_rows(str(SHARED / f"data/cases/{file}.jsonl"))
    assert texts_of(tokenizer, known[0]) == CASES[file][name]
    for row in known:
        for kept, example in template.render_row(tokenizer, row, LIMIT):
            found = set(audit.examine(tokenizer, kept, example, LIMIT)) & set(audit.ERRORS)
            assert found <= ({"unsupervised"} if not example.num_supervised else set())


SECRET = {"role": "assistant", "content": "b", "reasoning_content": "Secret."}
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
SECRET_CALL = {**SECRET, "content": "", "tool_calls": CALLS}
CALLED = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
A, C = {"role": "user", "content": "a"}, {"role": "user", "content": "c"}
D, R = {"role": "assistant", "content": "d"}, {"role": "tool", "content": "r"}
SECRETS = {  # of data/cases/reasoning_dropped.py: the texts where thoughts are read, and where not
    "answer": ([A, SECRET], [["<think>\nSecret.\n</think>\n\nb<|im_end|>"]], [[]]),
    "earlier answer": (
        [A, SECRET, C, D],
        [["<think>\nSecret.\n</think>\n\nb<|im_end|>"], [NO_THOUGHTS + "d<|im_end|>"]],
        [["d<|im_end|>"]],
    ),
    "call": (
        [A, SECRET_CALL, R, D],
        [["<think>\nSecret.\n</think>\n\n" + CALLED, NO_THOUGHTS + "d<|im_end|>"]],
        [["d<|im_end|>"]],
    ),
    "last call": ([A, SECRET_CALL], [["<think>\nSecret.\n</think>\n\n" + CALLED]], [[]]),
}


@pytest.mark.parametrize("case", SECRETS)
def test_thoughts_are_learnt_where_the_template_writes_them_and_their_turn_is_not_elsewhere(case):
    messages, written, dropped = SECRETS[case]
    row = Row(messages, [{"type": "function", "function": {"name": "f"}}], "f", 1)
    assert texts_of(stand_in("qwen3"), row) == written
    assert texts_of(stand_in("qwen2_5"), row) == dropped
    flags = {f for _, e in template.render_row(stand_in("qwen2_5"), row, LIMIT) for f in e.flags}
    assert flags == {"thoughts_dropped"}


# --- keys --------------------------------------------------------------------------------------

THOUGHTS = [{"role": "user", "content": "a"}, {**SECRET, "weight": 0.5}, C, D]
SPLIT = Row(THOUGHTS, None, "f", 1)


def test_turns_together_split_and_auto():
    tokenizer = local("thoughts of the last question")
    first, second = "<think>\nSecret.\n</think>\n\nb<|im_end|>", "d<|im_end|>"
    assert texts_of(tokenizer, SPLIT, turns="auto") == [[first], [second]]
    assert texts_of(tokenizer, SPLIT, turns="split") == [[first], [second]]
    ((_, together),) = template.render_row(tokenizer, SPLIT, LIMIT, turns="together")
    assert families.supervised(tokenizer, together) == [second]
    assert together.flags == ("not_as_served",)
    plain = Row(families.TWO_TURNS, None, "f", 1)
    assert texts_of(tokenizer, plain) == [["Hello.<|im_end|>", "Good bye.<|im_end|>"]]
    split = template.render_row(tokenizer, plain, LIMIT, turns="split")
    assert [len(kept.messages) for kept, _ in split] == [2, 4]
    assert texts_of(tokenizer, plain, turns="split") == [
        ["Hello.<|im_end|>"],
        ["Good bye.<|im_end|>"],
    ]
    assert texts_of(tokenizer, plain, turns="split", supervise="last") == [["Good bye.<|im_end|>"]]


def test_weights_of_messages_go_with_their_turn_when_a_row_is_split():
    tokenizer = local("thoughts of the last question")
    (first, light), (second, whole) = template.render_row(tokenizer, SPLIT, LIMIT)
    assert light.weights is not None
    assert {w for w, label in zip(light.weights, light.labels, strict=True) if label >= 0} == {0.5}
    assert whole.weights is None
    assert [m.get("weight") for m in first.messages] == [None, 0.5]
    assert [m.get("weight") for m in second.messages] == [None, 0, None, None]
    unweighted = Row([THOUGHTS[0], {**SECRET, "weight": 0}, C, D], None, "f", 1)
    assert texts_of(tokenizer, unweighted) == [["d<|im_end|>"]]


def test_split_rows_lose_their_oldest_turns():
    tokenizer = local("thoughts of the last question")
    long = [{"role": "user", "content": "a " * 90}, *THOUGHTS[1:]]
    made = template.render_row(
        tokenizer, Row(long, None, "f", 1), 60, on_long="truncate_left_turns"
    )
    assert [len(example.ids) <= 60 for _, example in made] == [False, True]  # the audit refuses one
    kept, example = made[1]
    assert kept.messages == [C, D]
    assert example.flags == ("turns_dropped",)
    assert families.supervised(tokenizer, example) == ["d<|im_end|>"]


def test_a_tag_at_the_start_of_an_answer_is_the_answers():
    """A property found it: the closing tag was taken for an empty block of thoughts."""
    answer = {"role": "assistant", "content": "</tool_call> is a tag."}
    row = Row([{"role": "user", "content": "a"}, answer], None, "f", 1)
    ((_, example),) = template.render_row(local("tools"), row, LIMIT, empty_thoughts=False)
    ((first, stop),) = audit.supervised_runs(example.labels)
    said = tokens.decode_slice(local("tools"), example.ids, first, stop)
    assert said == "</tool_call> is a tag.<|im_end|>"


def test_empty_thoughts_are_learnt_or_context():
    tokenizer = families.small(families.REASONING, eos="<|im_end|>")
    row = Row(families.TWO_TURNS, None, "f", 1)
    assert texts_of(tokenizer, row)[1] == [NO_THOUGHTS + "Good bye.<|im_end|>"]
    made = template.render_row(tokenizer, row, LIMIT, empty_thoughts=False)
    assert [families.supervised(tokenizer, example) for _, example in made] == [
        ["Hello.<|im_end|>"],
        ["Good bye.<|im_end|>"],
    ]
    for kept, example in made:
        assert audit.examine(tokenizer, kept, example, LIMIT) == []


def nano() -> Any:
    return AutoTokenizer.from_pretrained(catalogue.NANO)


def test_a_template_is_a_file_or_text_and_is_saved_with_the_tokenizer(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(catalogue.CHATML, "utf-8")
    for given_as in (str(file), catalogue.CHATML):
        made = template.prepare_tokenizer(nano(), given_as)
        made.save_pretrained(tmp_path / "saved")
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == catalogue.CHATML
    with pytest.raises(TemplateError, match=r"data.chat_template: expected a file.* 'no.jinja'"):
        template.prepare_tokenizer(nano(), "no.jinja")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + catalogue.CHATML.encode(),
        json.dumps({"chat_template": catalogue.CHATML, "eos_token": "</s>"}).encode(),
    ],
    ids=["with a mark", "a tokenizer_config.json"],
)
def test_a_file_of_a_template(tmp_path, content):
    (tmp_path / "own").write_bytes(content)
    made = template.prepare_tokenizer(nano(), str(tmp_path / "own"))
    assert made.chat_template == catalogue.CHATML


@pytest.mark.parametrize(
    ("content", "reason"),
    {
        "other text": (b"\xe9", r"found '.*own' \(not UTF-8 text\)"),
        "nothing": (b" \n", "expected one template, found none in "),
        "another object": (b'{"name": "a"}', "expected one template, found none in "),
        "several": (b'{"chat_template": [{"name": "default"}]}', "expected one template"),
        "broken": (
            b"a\n{% for m in messages %}",
            r"data.chat_template: the chat template cannot be",
        ),
    }.values(),
)
def test_a_file_of_no_template(tmp_path, content, reason):
    (tmp_path / "own").write_bytes(content)
    for variables in (None, {"enable_thinking": False}):
        with pytest.raises(TemplateError, match=reason):
            template.prepare_tokenizer(nano(), str(tmp_path / "own"), variables)
    with pytest.raises(TemplateError, match="Is a directory"):
        template.prepare_tokenizer(nano(), str(tmp_path))


def test_variables_are_values_of_json():
    for value in (float("nan"), float("inf"), [float("nan")]):
        with pytest.raises(TemplateError, match=r"data.template_kwargs: expected values of JSON"):
            template.prepare_tokenizer(nano(), catalogue.THINKS, {"enable_thinking": value})


def test_variables_become_defaults_that_are_saved_and_that_a_row_overrides(tmp_path):
    made = template.prepare_tokenizer(nano(), catalogue.THINKS, {"enable_thinking": False})
    made.save_pretrained(tmp_path)
    read = template.prepare_tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for tokenizer in (made, read):
        assert tokenizer.decode(template.prompt_ids(tokenizer, [A])).endswith(closed)
        ids = template.prompt_ids(tokenizer, [A], None, {"enable_thinking": True})
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    row = Row([A, SECRET], None, "f", 1, template_kwargs={"enable_thinking": True})
    ((kept, example),) = template.render_row(read, row, LIMIT)
    assert (kept, example.flags) == (row, ())  # the row's own value fits
    ((kept, example),) = template.render_row(read, Row([A, SECRET], None, "f", 1), LIMIT)
    assert kept.template_kwargs == {"enable_thinking": True}
    assert example.flags == ("other_variables",)
    with pytest.raises(TemplateError, match="reads no variable thinking; it reads enable_thinking"):
        template.prepare_tokenizer(nano(), catalogue.THINKS, {"thinking": False})


def test_stop_tokens_are_saved_and_end_turns(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(catalogue.NANO, folder)
    tokenizer = nano()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(catalogue.TOKENS[catalogue.HEADERS])}
    )
    tokenizer.chat_template = catalogue.HEADERS
    tokenizer.save_pretrained(folder)
    row = Row(families.TWO_TURNS, None, "f", 1)
    bare = template.prepare_tokenizer(load_tokenizer(Model(name=str(folder))))
    assert texts_of(bare, row) == [["Hello.<|im_end|>"], ["Good bye.<|im_end|>"]]
    given_to = Model(name=str(folder), stop_tokens=["<|user|>", "<|observation|>"])
    made = template.prepare_tokenizer(load_tokenizer(given_to))
    made.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text("utf-8"))
    assert set(saved["stop_tokens"]) >= {"<|user|>", "<|observation|>"}
    (tmp_path / "saved/config.json").write_text(
        (folder / "config.json").read_text("utf-8"), "utf-8"
    )
    read = template.prepare_tokenizer(load_tokenizer(Model(name=str(tmp_path / "saved"))))
    for each in (made, read):
        assert texts_of(each, row) == [["Hello.<|user|>", "Good bye.<|user|>"]]
        ends = [each.convert_ids_to_tokens(i) for i in audit.stop_ids(each)]
        assert set(ends) == {"<|user|>", "<|observation|>", each.eos_token}
    with pytest.raises(ModelError, match=r"model.stop_tokens: the tokenizer has no token <no>"):
        load_tokenizer(Model(name=str(folder), stop_tokens=["<no>"]))


def test_a_typed_special_token_in_a_value_that_a_template_writes_as_python_stays_text():
    items = "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"
    tokenizer = families.small(
        families.DEEPSEEK.replace("{{ c.function.arguments | tojson }}", items), "<s>"
    )
    said = {"a": ["x</s>y"]}
    call = {"type": "function", "function": {"name": "add", "arguments": said}}
    row = Row([A, {**families.CALLS, "tool_calls": [call]}], families.TOOLS, "f", 1)
    ((text,),) = texts_of(tokenizer, row)
    assert text == f"<|im_start|>function<|im_start|>add\na={said['a']}<|eot|></s>"
    ((kept, example),) = template.render_row(tokenizer, row, LIMIT)
    assert example.labels.count(tokenizer.eos_token_id) == 1
    assert audit.examine(tokenizer, kept, example, LIMIT) == ["special_in_content"]


def test_a_turn_in_which_serving_would_stop_early_is_refused():
    with pytest.raises(DataError, match=r"generation stops at '<\|call\|>', .* assistant turn 1"):
        template.render_row(local("channels"), catalogue.PARALLEL, LIMIT)


HEADED = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
OPENED_BY_A_TOKEN = (
    HEADED + "{% if m.reasoning_content %}<|think|>{{ m.reasoning_content }}<|/think|>{% endif %}"
    "<|text|>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<|think|>{% endif %}"
)
OPENED_BY_WORDS = (
    HEADED + "{% if m.reasoning_content %}{{ m.reasoning_content }}\n[FINAL]\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nI think:\n{% endif %}"
)
ALWAYS_PROMPTS = (
    HEADED + "<|text|>{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<|think|><|/think|>"
)
ENDS_BEFORE_THE_NEXT = (
    HEADED + "{{ m.content }}{% if not loop.last %}{{ '\n<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
)
PROMPTS_BEHIND_USERS = (
    HEADED + "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
    "<|im_start|>assistant\n{% endif %}"
)
MARKED_THOUGHTS = ("<|think|>", "<|/think|>", "<|text|>")


@pytest.mark.parametrize(
    ("source", "thoughts", "expected"),
    [
        (OPENED_BY_A_TOKEN, None, "<|/think|><|text|>Hello.<|im_end|>"),
        (OPENED_BY_A_TOKEN, "so", "so<|/think|><|text|>Hello.<|im_end|>"),
        (OPENED_BY_WORDS, None, "\n[FINAL]\nHello.<|im_end|>"),
        (OPENED_BY_WORDS, "so", "so\n[FINAL]\nHello.<|im_end|>"),
        (ALWAYS_PROMPTS, None, "<|text|>Hello.<|im_end|>"),
    ],
)
def test_a_prompt_that_says_more_than_the_text_is_continued(source, thoughts, expected):
    tokenizer = catalogue.tokenizer(source, None, MARKED_THOUGHTS)
    turn = {"role": "assistant", "content": "Hello."}
    row = Row([A, {**turn, "reasoning_content": thoughts} if thoughts else turn], None, "f", 1)
    assert texts_of(tokenizer, row) == [[expected]]
    ((kept, example),) = template.render_row(tokenizer, row, LIMIT)
    ((first, _),) = audit.supervised_runs(example.labels)
    assert example.ids[:first] == serve(tokenizer, row, 1)
    assert not set(audit.examine(tokenizer, kept, example, LIMIT)) & set(audit.ERRORS)


def test_a_text_that_thoughts_change_behind_the_answer_does_not_say_how_they_close():
    changed = OPENED_BY_WORDS.replace(
        "{{ m.content }}", "{{ m.content }}{{ '~' if m.reasoning_content }}"
    )
    row = Row([A, {"role": "assistant", "content": "Hello."}], None, "f", 1)
    with pytest.raises(DataError, match="is not how the chat template begins that turn"):
        template.render_row(catalogue.tokenizer(changed), row, LIMIT)


def test_the_blanks_before_an_end_that_only_the_next_message_writes_are_learnt():
    tokenizer = catalogue.tokenizer(ENDS_BEFORE_THE_NEXT, None, ())
    row = Row(families.TWO_TURNS, None, "f", 1)
    assert texts_of(tokenizer, row) == [["Hello.\n<|im_end|>", "Good bye.\n<|im_end|>"]]


def test_a_header_that_no_prompt_has_behind_an_answer_is_not_learnt():
    tokenizer = catalogue.tokenizer(PROMPTS_BEHIND_USERS, None, ())
    answers = [{"role": "assistant", "content": text} for text in ("One.", "Two.")]
    row = Row([A, *answers], None, "f", 1)
    assert texts_of(tokenizer, row) == [["One.<|im_end|>"]]
    ((kept, example),) = template.render_row(tokenizer, row, LIMIT)
    assert audit.examine(tokenizer, kept, example, LIMIT) == ["no_prompt"]


# --- traits of public templates -----------------------------------------------------------------

B = {"role": "assistant", "content": "b"}
CALL_F = {**B, "content": "", "tool_calls": CALLS}
BE_KIND = {"role": "system", "content": "Be kind."}
SPLITS_AT_TAGS = catalogue.CHATML.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"
)
REWRITES_RESULTS = catalogue.CHATML.replace(  # Hermes, Command R+
    "{{ m.content }}", "{{ '|' if m.role == 'tool' and not loop.last }}{{ m.content }}"
)
CLOSES_BEHIND_A_TOKEN = catalogue.CHATML.replace(
    "{{ m.role }}\n", "{{ m.role }}{% if m.role == 'assistant' %}<|text|>{% endif %}"
).replace("assistant\n{% endif %}", "assistant<|text|><think></think>{% endif %}")
HEADED_BEHIND_RESULTS = catalogue.INSIDE.replace(
    "{%- if add_generation_prompt and",
    "{%- if add_generation_prompt and messages[-1].role == 'tool' %}<|text|>{% endif %}"
    "{%- if add_generation_prompt and",
)
# As GLM-4.5: only the last answer shows its thoughts, and the next header ends a turn.
HEADED_AFTER_THOUGHTS = catalogue.HEADERS.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}<|think|>{{ m.reasoning_content if loop.last }}<|/think|>"
    "{% endif %}{{ m.content }}",
)
THINKS_BY_KEY = OPENED_BY_A_TOKEN
RESULT_F = {**R, "name": "f", "content": "It rains in Northport."}
STRAY = {"role": "tool", "content": "It is a quarter past nine."}
KEPT = "<|think|>Secret.<|im_start|>assistant<|text|>b<|im_end|>"
OF_F = '<call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>'
TRAITS: dict[str, tuple[str, list[dict[str, Any]], list[list[str]]]] = {
    "answers joined": (catalogue.JOINS, [A, B, D], [["b<|im_end|>", "d<|im_end|>"]]),
    "results dropped": (
        catalogue.JOINS,
        [A, CALL_F, RESULT_F, B, STRAY, D],
        [[OF_F], ["b<|im_end|>"], ["d<|im_end|>"]],
    ),
    "system prompt in the last question": (
        catalogue.IN_THE_LAST,
        [BE_KIND, A, B, C, D],
        [["b<|im_end|>"], ["d<|im_end|>"]],
    ),
    "a header behind every text": (
        catalogue.ALWAYS_HEADED,
        [A, B, C, D],
        [["<|text|>b<|im_end|>", "<|text|>d<|im_end|>"]],
    ),
    "a default of its own": (
        catalogue.DEFAULTED,
        [A, SECRET, C, D],
        [["Secret.</think>b<|im_end|>"], ["d<|im_end|>"]],
    ),
    "blocks in a text that is rewritten": (
        catalogue.REWRITES,
        [A, SECRET, C, SECRET],
        [[KEPT, KEPT]],
    ),
    "an empty result in a text that is rewritten": (
        REWRITES_RESULTS,
        [A, CALL_F, {**R, "content": ""}, D],
        [[OF_F.replace("call>", "tool>"), "d<|im_end|>"]],
    ),
    "thoughts with a variable": (
        catalogue.CHATML.replace(
            "{{ m.content }}",
            "{% if thinks and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
            "{% endif %}{{ m.content }}",
        ),
        [A, SECRET, C, D],
        [["<think>Secret.</think>b<|im_end|>"], ["d<|im_end|>"]],
    ),
    "blanks before a block": (
        families.GENERATION.replace("assistant\n' }}", "assistant' }}"),
        [A, B],
        [["\nb<|im_end|>"]],
    ),
    "thoughts in the content": (
        THINKS_BY_KEY,
        [A, {**B, "content": "<think>\nSecret.\n</think>\n\nb"}, C, D],
        [["Secret.<|/think|><|text|>b<|im_end|>"], ["<|/think|><|text|>d<|im_end|>"]],
    ),
    "tags in an answer": (
        SPLITS_AT_TAGS,
        [A, {**B, "content": "Write <think>a</think> first.</s>"}, C, D],
        [["Write <think>a</think> first.</s><|im_end|>"], ["d<|im_end|>"]],
    ),
    "blanks behind thoughts": (
        SPLITS_AT_TAGS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        [A, {**B, "content": "<think>\nSecret.\n</think>\n\nb"}],
        [["Secret.\n</think>\n\nb<|im_end|>"]],
    ),
    "a block that the prompt closes behind a token": (
        CLOSES_BEHIND_A_TOKEN,
        [A, B],
        [["b<|im_end|>"]],
    ),
    "a header of its own behind a result": (
        HEADED_BEHIND_RESULTS,
        [A, CALL_F, RESULT_F, B],
        [['<|call>{"name": "f", "arguments": {"x": 1}}<call|><|result>', "b<turn|>"]],
    ),
    "thoughts that are dropped before a header that ends the turn": (
        HEADED_AFTER_THOUGHTS,
        [A, SECRET, C, {**SECRET, "content": "d"}],
        [["<|think|>Secret.<|/think|>" + end] for end in ("b<|user|>", "d<|user|>")],
    ),
    "a system prompt behind an answer": (
        catalogue.HEADERS,
        [A, B, BE_KIND, C, D],
        [["b<|user|>"], ["d<|user|>"]],
    ),
}


SEVERAL = {HEADED_BEHIND_RESULTS: catalogue.INSIDE, HEADED_AFTER_THOUGHTS: catalogue.HEADERS}


@pytest.mark.parametrize("trait", TRAITS)
def test_traits_of_public_templates(trait):
    source, messages, expected = TRAITS[trait]
    extra = catalogue.TOKENS.get(source, MARKED_THOUGHTS)
    if source in SEVERAL:
        extra = (*MARKED_THOUGHTS, *catalogue.TOKENS[SEVERAL[source]])
    tokenizer = catalogue.tokenizer(source, None, extra)
    row = Row(messages, None, "f", 1)
    assert texts_of(tokenizer, row) == expected
    for kept, example in template.render_row(tokenizer, row, LIMIT):
        first, _ = audit.supervised_runs(example.labels)[-1]
        turn = max(n for n, m in enumerate(kept.messages) if m["role"] == "assistant")
        assert example.ids[:first] == serve(tokenizer, kept, turn)
        found = set(audit.examine(tokenizer, kept, example, LIMIT)) & set(audit.ERRORS)
        assert found == ({"content_altered"} if STRAY in kept.messages else set())


CHATML = catalogue.CHATML
IN_A_LOOP = "{% for call in m.tool_calls or [] %}"
REASONS = {  # what a template does -> the template, what the refusal says
    "raises": (
        "{% if tools %}\n{{ raise_exception('no tools') }}{% endif %}" + CHATML,
        r"refuses the roles user at its line 2 \(`{{ raise_exception\('no tools'\) .*\): no tools;",
    ),
    "needs a sandbox": (
        CHATML.replace(IN_A_LOOP, "{% set seen = [] %}\n" + IN_A_LOOP + "{{ seen.append(1) }}"),
        r"does at its line \d+ \(`.*seen.append\(1\).*`\) what the sandbox of transformers forbids",
    ),
    "needs a variable": (
        "{{ style + 'x' }}" + CHATML,
        r"at its line 1 \(`{{ style .*give the template its variable style \(data.template_kw",
    ),
    "needs a key": (
        CHATML.replace(
            IN_A_LOOP, IN_A_LOOP + "{% for k in call.no %}{% endfor %}{{ call.no + 1 }}"
        ),
        r"fails on the roles user, assistant at its line \d+ \(`.*call.no",
    ),
    "is one line": (
        "{% if false %}{% endif %}" * 9 + "{% if tools %}{{ raise_exception('no') }}{% endif %}",
        r"at its line 1 \(`\.\.\. .*raise_exception\('no'\)",
    ),
    "does not read calls": (
        CHATML.replace("m.tool_calls or []", "[]"),
        r"name of a call \('f'\) of assistant turn 1 \(it never reads `tool_calls`\)",
    ),
    "leaves calls out": (
        CHATML.replace("m.tool_calls or []", "(m.tool_calls or [])[1:]"),
        r"name of a call \('f'\) of assistant turn 1 \(its line \d+ \(`.*`\) writes the turn\)",
    ),
    "alters arguments": (
        CHATML.replace(
            "call.function |",
            "{'name': call.function.name, 'x': 1, 'y': "
            "call.function.arguments.y | replace('is', 'was')} |",
        ),
        r"alters or drops what assistant turn 1 says \('It is long'\) at its line 5",
    ),
    "begins otherwise": (
        CHATML.replace("assistant\n{% endif %}", "assistant\n~{% endif %}"),
        r"the conversation .*; the template writes them at its line 8 \(`.*`\) and its line 5",
    ),
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_refusal_names_the_line_or_the_key(kind):
    source, reason = REASONS[kind]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": "It is long"}}}
    row = Row([A, {**CALL_F, "tool_calls": [call]}], CALLS, "f", 1)
    with pytest.raises(DataError, match=reason):
        template.render_row(catalogue.tokenizer(source, None, ()), row, LIMIT)


MARKED_BEHIND_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + families.GENERATION.replace(
    "{% generation %}{{ m['content'] +", "{{ m['content'] }}{% generation %}{{"
)


@pytest.mark.parametrize(
    ("source", "answer"),
    [(SPLITS_AT_TAGS, "Write <think>a</think> first."), (MARKED_BEHIND_TOOLS, "b")],
)
def test_tools_are_part_of_every_rendering_of_a_turn(source, answer):
    tokenizer = catalogue.tokenizer(source)
    row = Row([A, {**B, "content": answer}], CALLS, "f", 1)
    learnt = "" if source == MARKED_BEHIND_TOOLS else answer  # what the block has
    assert texts_of(tokenizer, row) == [[learnt + "<|im_end|>"]]
    ((kept, example),) = template.render_row(tokenizer, row, LIMIT)
    ((first, _),) = audit.supervised_runs(example.labels)
    prompt = serve(tokenizer, kept, 1)
    assert example.ids[: len(prompt)] == prompt
    assert first == len(example.ids) - 2 if not learnt else first == len(prompt)


def test_a_row_with_tools_takes_the_template_for_tools():
    plain = CHATML.replace("m.tool_calls or []", "[]").replace("{{ tools | tojson }}", "")
    tokenizer = nano()
    tokenizer.chat_template = {
        "default": "{{ place }}" + plain,
        "tool_use": "{{ tone }}" + CHATML.replace("<|im_end|>", "<|end|>"),
    }
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    made = template.prepare_tokenizer(tokenizer, None, {"place": "P", "tone": "T"})
    tools = Row([A, CALL_F], CALLS, "f", 1)
    assert texts_of(made, Row([A, B], None, "f", 1)) == [["b<|im_end|>"]]
    assert texts_of(made, tools) == [['<tool>{"name": "f", "arguments": {"x": 1}}</tool><|end|>']]
    for row in (tools, Row([A, B], None, "f", 1)):
        ((kept, example),) = template.render_row(made, row, LIMIT)
        assert not set(audit.examine(made, kept, example, LIMIT)) & set(audit.ERRORS)
        assert made.decode(example.ids).startswith("T" if row is tools else "P")
