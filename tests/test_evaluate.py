"""Answers: the order of the prompts, any batch size, left padding that changes nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT

from sft import chat, evaluate, model, processes
from sft.config import load_config
from sft.guard import Guard
from sft.log import Log

PROMPTS = ["hi", "what is the time in the city", "a b c d e f g h i j k l m n", "repeat: one two"]


@pytest.fixture(scope="module")
def nano():
    config = load_config(ROOT / "configs/nano.yaml")
    tokenizer = chat.prepare_tokenizer(model.load_tokenizer(config.model))
    base = model.load_base(config.model, "full", "fp32", torch.device("cpu")).eval()
    return base, tokenizer, processes.start_processes(config.train)


def answers(nano, prompts, batch_size):
    base, tokenizer, accelerator = nano
    ids = [chat.prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
    settings = {"max_new_tokens": 12, "batch_size": batch_size}
    return evaluate.generate(base, tokenizer, ids, accelerator, Log(None), Guard(), **settings)


def test_answers_do_not_depend_on_batch_or_order(nano):
    one_by_one = [answers(nano, [prompt], 1)[0] for prompt in PROMPTS]
    assert len(set(one_by_one)) > 1
    assert answers(nano, PROMPTS, 2) == one_by_one
    assert answers(nano, PROMPTS, 100) == one_by_one
    assert answers(nano, PROMPTS[::-1], 3) == one_by_one[::-1]
    assert answers(nano, [], 3) == []


def test_an_answer_is_what_plain_greedy_decoding_gives(nano):
    base, tokenizer, _ = nano
    ids = chat.prompt_ids(tokenizer, [{"role": "user", "content": PROMPTS[1]}])
    stop, text = evaluate.stop_ids(tokenizer), list(ids)
    for _ in range(12):
        token = int(base(input_ids=torch.tensor([text])).logits[0, -1].argmax())
        if token in stop:
            break
        text.append(token)
    assert answers(nano, [PROMPTS[1]], 4) == [tokenizer.decode(text[len(ids) :])]


def test_generation_leaves_the_mode_of_the_model_alone(nano):
    base = nano[0]
    base.train()
    answers(nano, PROMPTS[:1], 1)
    assert base.training
    base.eval()


def test_exact_match_is_a_share():
    assert evaluate.exact_match(["a", " b\n", "c"], ["a", "b", "d"]) == pytest.approx(2 / 3)
    assert evaluate.exact_match([], []) == 0


def test_the_end_of_a_turn_stops_an_answer(nano):
    tokenizer = nano[1]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in evaluate.stop_ids(tokenizer)
