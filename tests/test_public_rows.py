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
    "ToolBench": (
        {"conversations": [*SAID, {"from": "function", "value": "2"}, SAID[1]], "id": "x"},
        ("sharegpt", "id"),
    ),
    "Magpie-Pro": (
        {"conversations": SAID, "knowledge": "It needs b.", "intent": "c", "input_quality": "good"},
        ("sharegpt", "knowledge", "intent", "input_quality"),
    ),
    "Nemotron-Post-Training": (
        {"messages": TURNS, "reasoning": "on", "category": "chat"},
        ("messages", "reasoning", "category"),
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
    "squad": (
        {
            "id": "1",
            "context": "a",
            "question": "b",
            "answers": {"text": ["c"], "answer_start": [0]},
        },
        "such as {instruction: question, input: context, output: answers.text.0}",
    ),
    "flan": ({"inputs": "a", "targets": "b"}, "such as {instruction: inputs, output: targets}"),
    "opus-100": (
        {"translation": {"de": "a", "en": "b"}},
        "such as {prompt: translation.de, completion: translation.en}",
    ),
    "xlam": (
        {"query": "a", "answers": '[{"name": "f"}]', "tools": '[{"name": "f"}]'},
        "such as {instruction: query, output: answers, tools: tools}",
    ),
    "orpo-dpo-mix": (
        {"prompt": "Hi", "chosen": TURNS, "rejected": TURNS},
        "such as {messages: chosen}, with data.ignore_columns: [rejected]",
    ),
    "ms-swift": (
        {"query": "a", "response": "b", "history": [["c", "d"]]},
        "such as {instruction: query, output: response, history: history}",
    ),
    "Capybara": (
        {"conversation": [{"input": "a", "output": "b"}]},
        "such as {conversations: conversation}",
    ),
    "a batch of OpenAI": (
        {"custom_id": "1", "body": {"messages": TURNS}},
        "such as {messages: body.messages}",
    ),
    "oasst1": (
        {"message_id": "1", "parent_id": "2", "text": "a", "role": "prompter"},
        "'role' says that the text is one turn of a conversation",
    ),
    "kto of labels": (
        {"prompt": TURNS[:1], "completion": TURNS[1:], "desirable": False},
        "'desirable' rates the answer",
    ),
    "commonsense_qa, flat": (
        {"question": "a", "A": "b", "B": "c", "answer": "A"},
        "data.ignore_columns: [A, B] trains without them",
    ),
    "s1K": (
        {"question": "a", "answer": "b", "deepseek_thinking_trajectory": "So it is b."},
        "data.columns: {..., reasoning_content: deepseek_thinking_trajectory}",
    ),
    "cosmopedia": ({"prompt": "Write b.", "text": "a"}, "{prompt: prompt, completion: text}"),
    "imdb": ({"text": "a", "label": 0}, "data.columns: {prompt: text, completion: label}"),
    "trec": ({"text": "a", "coarse_label": 1, "fine_label": 2}, "[coarse_label, fine_label]"),
    "billsum": ({"text": "a", "summary": "b"}, "{prompt: text, completion: summary}"),
    "mmlu": (
        {"question": "a", "choices": ["b", "c"], "answer": 1},
        "'choices' holds a part of the question, which would be asked without it; write it as text",
    ),
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
