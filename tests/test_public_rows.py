"""The shapes of rows of well-known public data sets: read, or refused with what to do."""

from __future__ import annotations

import pytest

from sft.data.formats import normalise

ASK, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TURNS = [ASK, HELLO]
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
THOUGHT = [ASK | {"thinking": None}, HELLO | {"thinking": "a"}]
WEIGHED = [SAID[0] | {"weight": 0}, SAID[1] | {"weight": 1}]
SPOKEN = "\n\nHuman: Hi\n\nAssistant: "

# a row -> its format and the columns that are not used
TAKEN = {
    "tatsu-lab/alpaca": (
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "### Response:\nHello"},
        ("alpaca", "text"),
    ),
    "ultrachat_200k": (
        {"prompt": "Hi", "prompt_id": "x", "messages": TURNS},
        ("messages", "prompt", "prompt_id"),
    ),
    "SlimOrca": ({"conversations": WEIGHED}, ("sharegpt",)),
    "OpenHermes-2.5": (
        {"system_prompt": None, "conversations": SAID, "source": "x", "category": None},
        ("sharegpt", "source"),
    ),
    "Magpie": (
        {"instruction": "Hi", "response": "Hello", "conversations": SAID, "instruct_reward": -3.1},
        ("sharegpt", "instruction", "response", "instruct_reward"),
    ),
    "tulu-3-sft-mixture": (
        {"id": "1", "messages": TURNS, "source": "x"},
        ("messages", "id", "source"),
    ),
    "OpenThoughts": ({"system": "Think.", "conversations": SAID}, ("sharegpt",)),
    "OpenR1-Math": (
        {"problem": "a", "solution": "b", "answer": "1", "generations": ["c"], "messages": TURNS},
        ("messages", "problem", "solution", "answer", "generations"),
    ),
    "Multilingual-Thinking": (
        {"developer": "a", "user": "Hi", "analysis": "a", "final": "Hello", "messages": THOUGHT},
        ("messages", "developer", "user", "analysis", "final"),
    ),
    "smoltalk2": (
        {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False, "xml_tools": []}},
        ("messages",),
    ),
    "hermes-function-calling-v1": (
        {"id": "1", "conversations": SAID, "tools": '[{"name": "f"}]', "task": "a"},
        ("sharegpt", "id", "task"),
    ),
    "gsm8k": ({"question": "a", "answer": "b"}, ("question_answer",)),
    "fineweb-edu": ({"text": "a", "id": "b", "score": 3.1}, ("text", "id", "score")),
    "guanaco": ({"text": "### Human: Hi### Assistant: Hello"}, ("text",)),
    "a tokenised set": (
        {"input_ids": [1, 2], "attention_mask": [1, 1], "token_type_ids": [0, 0]},
        ("tokenised", "token_type_ids"),
    ),
}
# a row -> a part of the reason, with what to do
REFUSED = {
    "kto": ({"prompt": "a", "completion": "b", "label": False}, "'label' rates the answer"),
    "ultrafeedback_binarized": (
        {"messages": TURNS, "chosen": TURNS, "rejected": TURNS, "score_chosen": 8.0},
        "data.ignore_columns: [chosen, rejected, score_chosen] trains without them",
    ),
    "hh-rlhf": (
        {"chosen": SPOKEN + "a", "rejected": SPOKEN + "b"},
        "human_assistant, data.columns: {text: chosen}, data.ignore_columns: [rejected]",
    ),
    "an image": ({"messages": TURNS, "images": ["a.jpg"]}, "'images' holds images"),
    "dolly": (
        {"instruction": "a", "context": "b", "response": "c", "category": "d"},
        "such as {instruction: instruction, input: context, output: response}",
    ),
    "OpenOrca": (
        {"id": "1", "system_prompt": "a", "question": "b", "response": "c"},
        "such as {instruction: question, output: response, system: system_prompt}",
    ),
    "MetaMathQA": ({"query": "a", "response": "b"}, "{instruction: query, output: response}"),
    "imdb": ({"text": "a", "label": 0}, "data.columns: {prompt: text, completion: label}"),
    "trec": ({"text": "a", "coarse_label": 1, "fine_label": 2}, "[coarse_label, fine_label]"),
    "billsum": ({"text": "a", "summary": "b"}, "{prompt: text, completion: summary}"),
    "mmlu": ({"question": "a", "choices": ["b", "c"], "answer": 1}, "'choices' holds a part of"),
    "hotpot_qa": ({"question": "a", "answer": "b", "context": {"c": ["d"]}}, "'context' holds a"),
    "boolq": ({"question": "a", "answer": True}, "answer: expected text, found bool"),
    "WildChat": (
        {"messages": [ASK | {"country": "NZ"}, HELLO]},
        "would not be rendered: country; remove or convert it, or name it in data.ignore_columns",
    ),
    "alpaca with messages": (
        {"instruction": "Hi", "output": "Hello", "messages": TURNS},
        "set data.format: messages or alpaca",
    ),
    "a packed set": (
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 1, 0]},
        "write one document a row",
    ),
}


@pytest.mark.parametrize(("row", "found"), TAKEN.values(), ids=TAKEN)
def test_a_row_is_taken_as_it_is(row, found):
    made = normalise(row)
    assert (made.format, *made.ignored) == found


@pytest.mark.parametrize(("row", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_row_is_refused_with_what_to_do(row, reason):
    with pytest.raises(ValueError, match=r".") as caught:
        normalise(row)
    assert reason in str(caught.value)
    assert len(str(caught.value)) <= 400  # what a message shows of a reason
