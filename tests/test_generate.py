"""Answers: no batch, order, padding or seed of another changes one; finished rows are dropped."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace as Has

import families
import pytest
import tiny
import torch
from accelerate import Accelerator
from conftest import ROOT
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen2Config,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sft.config.schema import Generation, Model, Train
from sft.data import template
from sft.errors import ModelError
from sft.evaluate import generate
from sft.models import pretrained
from sft.runtime import processes

GREEDY = Generation(max_new_tokens=24)
# Untied: a random model whose head is its embedding says the last token again and again.
SIZES = {"vocab_size": 61, "initializer_range": 0.3, "tie_word_embeddings": False}
LLAMA = SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 48}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, num_key_value_heads=2),
    # a window that is shorter than prompts and answers
    "gemma2": Gemma2Config(**LLAMA, num_key_value_heads=2, head_dim=8, sliding_window=9),
    "gpt2": GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4),
    "bloom": BloomConfig(**SIZES, hidden_size=32, n_layer=2, n_head=4),  # takes no position ids
    # nothing but a state, which padding on the left must leave alone
    "mamba": MambaConfig(**SIZES, hidden_size=32, num_hidden_layers=2, state_size=4),
}
RECURRENT = ("falcon_h1", "granitemoehybrid", "jamba", "lfm2", "mamba2", "nemotron_h", "qwen3_next")
STOP = list(range(2, 7))  # so that rows end at different times


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return processes.start_processes(Train(output_dir="-"))


@pytest.fixture(scope="module", params=CONFIGS)
def made(request) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def prompts(number: int = 13) -> list[list[int]]:
    return [row.ids for row in tiny.examples(1, number, longest=20)]


def all_answers(built, asked, settings, accelerator, rows, numbers=None):
    found = {}
    decoder = generate.Decoder(built, STOP, settings, rows)
    for batch, answers in decoder.answer_batches(asked, accelerator, numbers):
        found |= dict(zip(batch, answers, strict=True))
    return [found[i] for i in range(len(asked))]


def plainly(built, prompt: list[int], room: int) -> generate.Answer:
    """Greedy decoding without a cache, one prompt, the whole text again for each token."""
    text = list(prompt)
    for _ in range(room):
        token = int(built(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
        if token in STOP:
            return generate.Answer(text[len(prompt) :], "stop")
        text.append(token)
    return generate.Answer(text[len(prompt) :], "length")


@torch.no_grad()
def test_an_answer_is_that_of_plain_greedy_decoding_in_any_batch(made, accelerator):
    asked = prompts()
    expected = [plainly(made, prompt, GREEDY.max_new_tokens) for prompt in asked]
    assert {answer.finish_reason for answer in expected} == {"stop", "length"}
    assert len({len(answer.ids) for answer in expected}) > 2
    for rows in (1, 3, 100):
        assert all_answers(made, asked, GREEDY, accelerator, rows) == expected
    assert all_answers(made, asked[::-1], GREEDY, accelerator, 5) == expected[::-1]


def test_finished_rows_are_dropped_from_the_batch(accelerator):
    built, seen = tiny.llama().eval(), []
    built.register_forward_pre_hook(
        lambda *_, **named: seen.append(len(_[-1]["input_ids"])), with_kwargs=True
    )
    found = all_answers(built, prompts(), GREEDY, accelerator, 100)
    # An answer takes a pass for each of its tokens, and one for the token that stopped it.
    passes = [len(answer.ids) + (answer.finish_reason == "stop") for answer in found]
    rows, expected = 13, []
    for step in range(max(passes)):
        left = sum(number > step for number in passes)
        rows = left if left <= (1 - generate.DROP_SHARE) * rows else rows
        expected.append(rows)
    assert seen == expected
    assert expected[0] == 13
    assert len(set(expected)) > 3
    assert any(sum(n > step for n in passes) < rows for step, rows in enumerate(expected))


def test_the_context_of_the_model_ends_an_answer(accelerator):
    built = tiny.llama(max_position_embeddings=25).eval()
    prompt = [7] * 20
    [answer] = generate.Decoder(built, [], GREEDY).decode([prompt])
    assert (len(answer.ids), answer.finish_reason) == (5, "length")


DRAWN = Generation(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=7)


def test_what_is_drawn_depends_on_the_examples_number_alone(accelerator):
    built, asked = tiny.llama().eval(), [prompts(3)[0]] * 9
    alone = all_answers(built, asked, DRAWN, accelerator, 1)
    assert len({tuple(answer.ids) for answer in alone}) > 5
    assert all_answers(built, asked, DRAWN, accelerator, 4) == alone
    again = all_answers(built, asked[3:], DRAWN, accelerator, 4, numbers=range(3, 9))
    assert again == alone[3:]
    other = DRAWN.model_copy(update={"seed": 8})
    assert all_answers(built, asked, other, accelerator, 4) != alone


@pytest.mark.parametrize(("top_p", "top_k"), product((1.0, 0.7, 1e-6), (0, 2)))
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p, top_k):
    """Against the distribution written out: filtered, then normalised."""
    likely = torch.tensor([0.02, 0.4, 0.1, 0.3, 0.18])
    settings = Generation(temperature=2.0, top_p=top_p, top_k=top_k)
    logits = 2.0 * likely.log()  # which the temperature halves
    number = 4000
    drawn = (torch.arange(number) + 0.5) / number
    tokens = generate.choose(logits.expand(number, -1), settings, drawn)
    found = torch.bincount(tokens, minlength=5) / number
    kept = {(1.0, 0): 5, (0.7, 0): 2, (1e-6, 0): 1, (1.0, 2): 2, (0.7, 2): 2, (1e-6, 2): 1}
    order = [1, 3, 4, 2, 0][: kept[top_p, top_k]]  # most likely first
    expected = torch.zeros(5)
    expected[order] = likely[order] / likely[order].sum()
    assert (found - expected).abs().max() < 1e-3


@given(
    logits=st.lists(st.floats(-6, 6, width=16), min_size=1, max_size=12),
    temperature=st.floats(0.25, 4),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
)
@example([1.0, 1.0, 0.0], 1.0, 1, 1.0)  # the last of top_k is tied
@example([0.0, -0.1, -3.0], 1.0, 2, 0.52)  # the first reaches top_p only among the two
def test_the_distribution_of_a_token_is_that_of_transformers(logits, temperature, top_k, top_p):
    """Tied tokens are interchangeable, so probabilities are compared in order of size."""
    scores, kept = torch.tensor([logits]), TemperatureLogitsWarper(temperature)
    scores = kept(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    reached = scores.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(top_p == 1 or (reached - top_p).abs().min() > 1e-5)  # else rounding decides
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    number, settings = 2000, Generation(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = generate.choose(
        torch.tensor(logits).expand(number, -1), settings, (torch.arange(number) + 0.5) / number
    )
    found = torch.bincount(tokens, minlength=len(logits)) / number
    assert torch.allclose(found.sort().values, expected.sort().values, atol=1.1 / number)
    if len(set(logits)) == len(logits):
        assert set(tokens.tolist()) <= set(expected.nonzero()[:, 0].tolist())


def test_the_largest_uniform_number_draws_a_token_that_may_be_drawn():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    settings = Generation(temperature=1.0, top_k=2)
    drawn = torch.tensor([1 - 2**-53] * 2, dtype=torch.float64)
    assert generate.choose(logits.expand(2, -1), settings, drawn).tolist() == [1, 1]


def test_a_batch_that_does_not_fit_is_answered_in_halves(accelerator, monkeypatch):
    built, sizes, decode = tiny.llama().eval(), [], generate.Decoder.decode
    expected = all_answers(built, prompts(), GREEDY, accelerator, 100)

    def short(decoder, asked, **options):
        sizes.append(len(asked))
        if len(asked) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(decoder, asked, **options)

    monkeypatch.setattr(generate.Decoder, "decode", short)
    assert all_answers(built, prompts(), GREEDY, accelerator, 100) == expected
    assert sizes[0] == 13
    assert max(sizes[-2:]) <= 4


def test_prompts_are_shared_out_by_length_once_each():
    lengths = [5, 90, 7, 80, 6, 85, 4, 88]
    parts = generate.cut_batches(lengths, 2, 2)
    assert sorted(i for rank in parts for batch in rank for i in batch) == list(range(8))
    loads = [sum(lengths[i] for batch in rank for i in batch) for rank in parts]
    assert max(loads) - min(loads) <= 10
    assert len({len(rank) for rank in parts}) == 1
    assert all(max(lengths[i] for i in b) <= min(lengths[i] for i in b) + 10 for b in parts[0])
    assert generate.cut_batches([], 3, 4) == [[], [], []]
    assert sorted(map(len, generate.cut_batches([3, 3], 4, 8))) == [
        1,
        1,
        1,
        1,
    ]  # empty ones where few


def test_generation_leaves_the_mode_of_the_model_alone(accelerator):
    built = tiny.llama()
    built.train()
    all_answers(built, prompts(2), GREEDY, accelerator, 1)
    assert built.training


@pytest.mark.parametrize("model_type", RECURRENT)
def test_padding_on_the_left_leaves_a_recurrent_state_alone(model_type, accelerator):
    built = families.tiny_model(model_type).eval()
    torch.manual_seed(1)
    for parameter in built.parameters():  # biases too: padding must not enter through them
        parameter.data += 0.1 * torch.randn_like(parameter)
    few = prompts(4)
    short = Generation(max_new_tokens=4)
    alone = all_answers(built, few, short, accelerator, 1)
    assert all_answers(built, few, short, accelerator, 4) == alone


def test_a_model_without_a_cache_is_refused(accelerator):
    with pytest.raises(ModelError, match="RwkvForCausalLM keeps no keys and values"):
        all_answers(families.tiny_model("rwkv"), prompts(2), GREEDY, accelerator, 1)


def test_the_end_of_a_turn_stops_an_answer():
    tokenizer = template.prepare_tokenizer(
        pretrained.load_tokenizer(Model(name=str(ROOT / "nano/model")))
    )
    built = tiny.llama()
    built.generation_config.eos_token_id = [17, 18]
    found = generate.stop_ids(tokenizer, built.generation_config)
    assert set(found) == {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id} | {
        17,
        18,
    }


def test_a_tiny_temperature_is_greedy():
    settings = Generation(temperature=1e-40)
    drawn = torch.tensor([0.999], dtype=torch.float64)
    assert generate.choose(torch.tensor([[1.0, 3.0, 2.0]]), settings, drawn).item() == 1


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_halves_of_a_batch_are_answered_once_each_down_to_one_row(number):
    tried = []

    def decode(batch):
        tried.append(batch)
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    assert generate.halve_until_it_fits([*range(number)], decode) == [*range(number)]
    assert len(tried) == 2 * number - 1  # a binary tree


@pytest.mark.parametrize(
    ("config", "prompt", "answer", "numbers"),
    [  # for each token of the prompt: keys and values of 2 layers, 6 * 32, 4 * the inner size
        (LlamaConfig(**LLAMA, num_key_value_heads=2), 100, 10, 100 * (2 * 32 + 6 * 32 + 4 * 48)),
        (GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4), 7, 1, 7 * (2 * 64 + 192 + 4 * 128)),
        # for each token of prompt and answer: keys and values of 2 layers and of 1 again
        (LlamaConfig(**LLAMA, num_key_value_heads=2), 100, 900, 1000 * 3 * 32),
        (Gemma2Config(**LLAMA, num_key_value_heads=1, head_dim=16), 1, 999, 1000 * 3 * 32),
        (Qwen2Config(**LLAMA, num_key_value_heads=2), 100, 900, 1000 * 3 * 32),
    ],
)
def test_bytes_of_a_row_are_the_larger_of_reading_and_of_the_grown_cache(
    config, prompt, answer, numbers
):
    assert generate.bytes_per_row(config, "fp32", prompt, answer) == 4 * numbers
    assert generate.bytes_per_row(config, "bf16", prompt, answer) == 2 * numbers


ROW = 4 * 100 * (2 * 32 + 6 * 32 + 4 * 48)  # bytes of a prompt of 100 tokens and 10 more in fp32


@pytest.mark.parametrize(
    ("device", "free", "local_ranks", "copies", "expected"),
    [
        ("cpu", 2**40, 1, 1, 64),
        ("cpu", 2**40, 1, 3, 21),
        ("cuda", 2**40, 1, 1, 256),
        ("cuda", 2**40, 2, 5, 51),
        ("cpu", 2 * 10 * ROW, 1, 1, 10),
        ("cpu", 2 * 10 * ROW - 2, 1, 1, 9),
        ("cpu", 2 * 10 * ROW, 2, 1, 5),
        ("cuda", 2 * 10 * ROW, 2, 1, 10),
        ("cuda", 2 * 10 * ROW, 1, 5, 2),
        ("cpu", 1, 1, 1, 1),
    ],
)
def test_a_batch_fills_half_of_the_free_memory_up_to_a_limit(
    monkeypatch, device, free, local_ranks, copies, expected
):
    of_host, of_device = (free, 0) if device == "cpu" else (0, free)
    monkeypatch.setattr(generate.psutil, "virtual_memory", lambda: Has(available=of_host))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (of_device, 2**50))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    parameter = Has(device=Has(type=device), dtype=torch.float32)
    config = LlamaConfig(**LLAMA, num_key_value_heads=2)
    model = Has(parameters=lambda: iter([parameter]), config=config, rows_per_prompt=copies)
    decoder = generate.Decoder(model, [], Generation(max_new_tokens=10))
    asked = [[1] * 100, [1] * 50]
    assert decoder.max_batch_size(asked, Has(num_processes=1)) == expected
    if copies == 1:  # also if nothing is said about them, and as fp32 in another dtype
        of_doubles = Has(device=parameter.device, dtype=torch.float64)
        model = Has(parameters=lambda: iter([of_doubles]), config=config)
        plain = generate.Decoder(model, [], decoder.settings)
        assert plain.max_batch_size(asked, Has(num_processes=1)) == expected
    monkeypatch.setattr(generate, "gather_object", lambda own: [*own, 2, 7])  # of other ranks
    assert decoder.max_batch_size(asked, Has(num_processes=2)) == min(expected, 2)
    assert replace(decoder, batch_size=3).max_batch_size(asked, Has(num_processes=1)) == 3


def test_ranks_with_parts_of_the_weights_go_on_as_long_as_one_of_them_writes(monkeypatch):
    """A rank without prompts takes part in every pass, and in those behind its last token."""
    built, passes, flags = tiny.llama().eval(), [], []
    built.register_forward_pre_hook(
        lambda *given, **_: passes.append(given[2]["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(generate, "is_split", lambda _: True)

    def reduce(flag, kind):  # the other rank writes three tokens in each batch
        assert kind == "sum"
        flags.append(float(flag))
        return flag + (len(flags) % 4 != 0)

    ranks = Has(num_processes=2, process_index=0, device=torch.device("cpu"), reduce=reduce)
    decoder = generate.Decoder(built, [], Generation(max_new_tokens=2), 1)
    batches_seen = list(decoder.answer_batches([[5] * 9, [6] * 4, [7] * 3], ranks))
    assert [batch for batch, _ in batches_seen] == [[0], []]
    assert [[len(answer.ids) for answer in answers] for _, answers in batches_seen] == [[2], []]
    assert flags == [1, 1, 0, 0] + [0] * 4
    assert [tuple(shape) for shape in passes] == [(1, 9), (1, 1)] + [(1, 1)] * 4


def test_numbers_of_prompts_seed_their_draws_and_each_batch_is_announced(accelerator):
    built, asked, begun = tiny.llama().eval(), [prompts(3)[0]] * 4, []
    decoder = generate.Decoder(built, STOP, DRAWN, 2)
    found = decoder.answer_batches(asked, accelerator, None, lambda: begun.append(1))
    assert sum(len(batch) for batch, _ in found) == 4
    assert len(begun) == 2
    seen = []
    [answer] = generate.Decoder(built, [], GREEDY).decode([[5, 6]], on_tokens=seen.append)
    assert [token for (token,) in seen] == answer.ids
