"""Columns beside a row's format: those that change what it means stop, others are counted."""

from __future__ import annotations

import json

import pytest
from conftest import load_rows
from hypothesis import given
from hypothesis import strategies as st

from sft.data import files
from sft.data.formats import BY_NAME, normalise, read_question
from sft.data.messages import THOUGHTS

ASK, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ROWS = {
    "messages": {"messages": [ASK, HELLO]},
    "sharegpt": {"conversations": [ASK, HELLO]},
    "alpaca": {"instruction": "Hi", "output": "Hello"},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "question_answer": {"question": "Hi", "answer": "Hello"},
    "seed": {"user": "Hi", "assistant": "Hello"},
    "text": {"text": "Hi"},
    "tokenised": {"input_ids": [1, 2], "labels": [-100, 2]},
}
CHAT = {*ROWS} - {"text", "tokenised"}
PAIRS = CHAT - {"messages", "sharegpt"}
KEYS = {name: BY_NAME[name].more.union(*BY_NAME[name].keys) for name in ROWS}
# column, its value, the formats of rows whose meaning it changes, and a part of the reason
KNOWN = {
    "label": (False, {*ROWS}, ""),
    "kto_tag": (True, {*ROWS}, "says which answer people preferred"),
    "chosen": ("a", {*ROWS}, "says which answer people preferred"),
    "rejected": ("a", {*ROWS}, "keep the answers to learn, and remove the others"),
    "score_rejected": (1, {*ROWS}, "preferred"),
    "score": (0.1, CHAT, "rates the answer"),
    "Rating": (4, CHAT, "rates the answer"),
    "images": (["a.jpg"], {*ROWS}, "only text can be trained on; remove the row"),
    "audio": ({"path": "a.wav"}, {*ROWS}, "only text"),
    "video_path": ("a.mp4", {*ROWS}, "only text"),
    "replies": ([{"text": "a"}], {*ROWS}, "holds other answers"),
    "sentiment": ("good", {"text", "tokenised"}, "`make classify`"),
    "emotion": (
        "joy",
        {"text"},
        "`make classify`, or data.columns: {prompt: text, completion: emo",
    ),
    "summary": ("Short.", {"text"}, "data.columns: {prompt: text, completion: summary}"),
    "context": ("It rains.", CHAT, "holds a part of the "),
    "paragraph": ("It rains.", PAIRS, "input: paragraph"),
    "choices": (["yes", "no"], CHAT, "holds a part of the "),
    "option_b": ("no", PAIRS, "holds a part of the question"),
    "C": ("no", PAIRS, "holds a part of the question"),
    "query": ("Why?", {"text", "messages", "sharegpt"}, ""),
    "is_correct": (False, CHAT, "rates the answer"),
    "desirable": (False, CHAT, "rates the answer"),
    "thumbs_up": (0, CHAT, "rates the answer"),
    "sample_weight": (0.5, CHAT | {"text"}, "every row would weigh the same"),
    "enable_thinking": (False, CHAT, "write it into chat_template_kwargs of the row"),
    "tools_json": ('[{"name": "f"}]', CHAT, "data.columns: {..., tools: tools_json}"),
    "tool_calls": ([{"name": "f"}], CHAT, "holds calls of the answer"),
    "prompt_length": (1, set(), ""),
    "history": ([["a", "b"]], CHAT - {"alpaca"}, "holds a part of the "),
    "documents": ([{"text": "It rains."}], CHAT, ""),
    "thinking": ("So ...", CHAT, "reasoning_content"),
    "deepseek_reasoning": ("So ...", CHAT, "reasoning_content"),
    "system_prompt": ("Be calm.", CHAT | {"text"}, ""),
    "developer": ("Be calm.", CHAT, "system: developer"),
    "completion_mask": ([0, 1], {"tokenised"}, "write labels, with -100"),
    "position_ids": ([0, 0], set(), ""),
    "token_type_ids": ([0, 1], set(), ""),
    "seq_lengths": ([1, 1], {"tokenised"}, "write one document a row"),
}


@pytest.mark.parametrize("column", KNOWN)
@pytest.mark.parametrize("format", ROWS)
def test_a_column_that_changes_the_meaning_stops(format, column):
    value, formats, reason = KNOWN[column]
    plain = normalise(ROWS[format])
    row = {"id": 7, **ROWS[format], column: value}
    if format in formats:
        with pytest.raises(ValueError, match="the column") as caught:
            normalise(row, format)
        assert f"the column {column!r} " in str(caught.value)
        assert f"data.ignore_columns: [{column}] trains without it" in str(caught.value)
        assert reason in str(caught.value)
    elif column not in KEYS[format]:
        assert normalise(row, format) == plain._replace(ignored=("id", column))
    ignoring = normalise(row, format, ignore=[column])
    assert ignoring == plain._replace(ignored=("id", column))


def test_a_column_without_a_value_changes_nothing():
    for value in (None, "", [], {}, [None, ""]):
        row = {"messages": [ASK, HELLO], "images": value, "label": value, "id": 3}
        assert normalise(row).ignored == ("id",)


def test_what_the_messages_say_already_is_not_lost():
    row = {"question": "It rains. Wet?", "answer": "yes", "context": "It rains.\n"}
    assert normalise(row | {"choices": ["yes", "Wet"]}).ignored == ("context", "choices")
    with pytest.raises(ValueError, match="'choices' holds a part"):
        normalise(row | {"choices": ["yes", "no"]})
    said = {"messages": [{"role": "system", "content": "Be calm."}, ASK, HELLO]}
    assert normalise(said | {"system_prompt": "Be calm."}).ignored == ("system_prompt",)


@pytest.mark.parametrize(
    ("column", "values"),
    {
        "correct": [True, "True"],
        "weight": [1, 1.0, "1.0"],
        "thinking": [True, "on", "Hello"],
        "role": ["writer"],
        "prompt": ["It rains."],
    }.items(),
)
def test_a_value_that_changes_nothing(column, values):
    row = {"text": "It rains. Hello"} if column in ("role", "prompt") else ROWS["messages"]
    for value in values:
        assert normalise(row | {column: value}).ignored == (column,)


def test_shared_keys_are_not_lost_beside_mapped_columns():
    row = {"query": "Hi", "response": "Hello"}
    columns = {"instruction": "query", "output": "response"}
    for key, value in {
        "tools": [{"name": "f"}],
        "functions": [{"name": "f"}],
        "system": "Be calm.",
        "history": [["a", "b"]],
        "chat_template_kwargs": {"enable_thinking": False},
    }.items():
        with pytest.raises(ValueError, match=f"the column '{key}' "):
            normalise(row | {key: value}, columns=columns)
        normalise(
            row | {key: value},
            columns=columns | {"tools" if value == [{"name": "f"}] else key: key},
        )


def test_where_tokens_are_learnt_is_not_lost():
    row = {"input_ids": [1, 2], "attention_mask": [1, 1]}
    for more in ({"prompt_length": 1}, {"weights": [0, 1]}, {"source_len": 1}):
        with pytest.raises(ValueError, match="only labels are read for that"):
            normalise(row | more)
    assert normalise(row | {"weights": [1, 1], "seq_lengths": [2]}).ignored == (
        "weights",
        "seq_lengths",
    )
    assert normalise(ROWS["tokenised"] | {"prompt_length": 1}).ignored == ("prompt_length",)


def test_preference_data_of_no_format_says_so():
    with pytest.raises(ValueError, match="expected the keys of one format") as caught:
        normalise({"prompt": "Hi", "chosen": "Hello", "rejected": "No"})
    assert "'chosen' says which answer people preferred" in str(caught.value)


def test_all_columns_that_stop_are_named_at_once():
    row = {"messages": [ASK, HELLO], "id": 1, "chosen": "a", "rejected": "b", "score_chosen": 1}
    with pytest.raises(ValueError, match="the column 'chosen' says") as caught:
        normalise(row)
    assert "ignore_columns: [chosen, rejected, score_chosen] trains without them" in str(
        caught.value
    )


def test_columns_that_are_mapped_are_used():
    row = {"text": "Buy!", "label": "spam", "id": 1, "more": {"label": 0}}
    columns = {"prompt": "text", "completion": "label"}
    assert normalise(row, columns=columns).ignored == ("id", "more")
    columns = {"prompt": "text", "completion": "more.label"}
    with pytest.raises(ValueError, match="the column 'label' rates the answer"):
        normalise(row, columns=columns)
    assert normalise(row, columns=columns, ignore=["label"]).ignored == ("id", "label")
    assert normalise(row, columns=columns, used=["label"]).ignored == ("id",)


def test_keys_of_messages_can_be_ignored():
    turn = ASK | {"timestamp": 5, "country": "NZ"}
    for row in ({"messages": [turn, HELLO]}, {"messages": json.dumps([turn, HELLO])}):
        found = normalise(row, ignore=["timestamp", "country"])
        assert (found.messages, found.ignored) == ([ASK, HELLO], ())
    columns = {"messages": "said.turns"}
    mapped = normalise(
        {"said": {"turns": [turn, HELLO]}}, columns=columns, ignore=["timestamp", "country"]
    )
    assert mapped.messages == [ASK, HELLO]
    in_columns = {
        "role": ["user", "assistant"],
        "content": ["Hi", "Hello"],
        "country": ["NZ", "NZ"],
    }
    assert normalise({"messages": in_columns}, ignore=["country"]).messages == [ASK, HELLO]
    with pytest.raises(ValueError, match=r"country; remove or convert it, or name it in data\.ign"):
        normalise({"messages": [turn, HELLO]}, ignore=["timestamp"])


def test_a_question_needs_no_ratings_but_its_images():
    row = {"question": "Hi", "label": False, "rejected": "No", "id": 1}
    assert read_question(row).ignored == ("label", "rejected", "id")
    with pytest.raises(ValueError, match="'image' holds images"):
        read_question(row | {"image": "a.jpg"})


CASES = {
    "kto.jsonl": "'label' rates the answer",
    "images.jsonl": "'images' holds images",
    "textlabel.jsonl": "'label' holds the class of the text",
}


@pytest.mark.parametrize(("file", "reason"), CASES.items(), ids=CASES)
def test_files_whose_meaning_a_column_changes(shared, file, reason):
    path = shared / "data/cases" / file
    if not path.exists():
        pytest.skip(f"needs {path}")
    rows, bad = load_rows(str(path), on_bad_row="skip")
    assert not rows
    assert all(reason in row.reason for row in bad)
    (column,) = {row.reason.split("'")[1] for row in bad}
    rows, bad = load_rows(str(path), ignore_columns=[column])
    assert not bad
    assert {row.ignored for row in rows} == {(column,)}


@pytest.mark.parametrize(
    "file", ["chat_tools_one.jsonl", "reason.jsonl", "rc_call.jsonl", "faq.csv"]
)
def test_files_that_are_taken_as_they_are(shared, file):
    path = shared / "data/cases" / file
    if not path.exists():
        pytest.skip(f"needs {path}")
    rows, bad = load_rows(str(path))
    assert rows
    assert bad == []


def test_a_group_is_used(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Hi", "completion": "Hello", "label": "greeting"}))
    (row,) = files.read_all(str(file), group="label")
    assert (row.group, row.ignored) == ("greeting", ())


# --- properties --------------------------------------------------------------------------------

words = st.text("ab .\n<>{}\"'é", min_size=1).filter(str.strip)
names = st.text("abcdefgh_", min_size=1, max_size=8)


@st.composite
def conversations(draw):
    """Messages that every format can say: an alternation, which may begin with a system prompt."""
    turns = draw(st.lists(st.tuples(words, words), min_size=1, max_size=3))
    spoken = [
        {"role": role, "content": content}
        for pair in turns
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    system = draw(st.none() | words)
    return [{"role": "system", "content": system}] * (system is not None) + spoken


def forms(conversation):
    """Yields the rows of every format that say a conversation, and the format to name if any."""
    system = [m["content"] for m in conversation if m["role"] == "system"]
    spoken = [m["content"] for m in conversation if m["role"] != "system"]
    further = {"system": system[0]} if system else {}
    pairs = list(zip(spoken[::2], spoken[1::2], strict=True))
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    noise = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    turns = [{"from": speakers[m["role"]], "value": m["content"]} for m in conversation]
    parts = [
        {
            "role": m["role"],
            "content": [{"type": "text", "value": m["content"]}],
            "loss_weight": float(m["role"] == "assistant"),
        }
        for m in conversation
    ]
    yield {"messages": conversation}, "auto"
    yield {"messages": json.dumps(conversation)}, "auto"
    yield {"messages": [m | noise for m in conversation], "parallel_tool_calls": True}, "auto"
    yield {"messages": parts}, "auto"
    yield {"conversations": turns}, "auto"
    yield {"conversations": json.dumps(turns)}, "auto"
    yield {"conversations": [{"human": a, "assistant": b} for a, b in pairs], **further}, "auto"
    yield {"conversations": [{speakers[m["role"]]: m["content"]} for m in conversation]}, "auto"
    history, (ask, answer) = pairs[:-1], pairs[-1]
    yield {"instruction": ask, "output": answer, "history": history, **further}, "auto"
    yield {"instruction": "", "input": ask, "output": answer, "history": history} | further, "auto"
    if len(pairs) == 1:
        yield {"prompt": ask, "completion": answer, **further}, "auto"
        yield {"question": ask, "answer": answer, **further}, "auto"
        yield {"user": ask, "assistant": answer, **further}, "auto"
    yield {"prompt": conversation[:-1], "completion": conversation[-1:]}, "auto"
    said = "".join(f"\n\nHuman: {a}\n\nAssistant: {b}" for a, b in pairs)
    yield {"text": said, **further}, "human_assistant"


@given(conversations())
def test_a_conversation_is_the_same_in_every_format(conversation):
    for row, format in forms(conversation):
        found = normalise(row, format)
        unweighted = [{k: v for k, v in m.items() if k != "weight"} for m in found.messages]
        assert unweighted == conversation, row
        assert found.messages == conversation or "prompt" in row


@given(conversations(), names | st.sampled_from([*THOUGHTS, "name"]), words)
def test_a_key_of_a_message_is_rendered_or_refused(conversation, name, value):
    row = {"messages": [*conversation[:-1], conversation[-1] | {name: value}]}
    if name in {*THOUGHTS, "name"}:
        assert value in normalise(row).messages[-1].values()
    else:
        with pytest.raises(ValueError, match=f"would not be rendered: {name}"):
            normalise(row)


@given(st.sampled_from([*ROWS]), st.dictionaries(names | st.sampled_from([*KNOWN]), words))
def test_every_column_is_used_refused_or_listed(format, more):
    row = more | ROWS[format]
    ignoring = normalise(row, format, ignore=[*more])
    assert ignoring == normalise(ROWS[format])._replace(ignored=tuple(more))
    known = [name for name in more if name in KNOWN and format in KNOWN[name][1]]
    if {"history", "documents", *known} & {*more} or format == "tokenised":
        return
    assert normalise(row, format) == ignoring
