"""Varlen attention for transformers; its kernel needs a GPU: here its definition computes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from counting import count
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    GPTJConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PersimmonConfig,
    Qwen3Config,
)

from sft import errors
from sft.config.schema import Crowd, Generation, Model, Tuning
from sft.evaluate import generate
from sft.models import adapt, attention, load
from sft.tasks.crowd.agents import Agents

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
SHAPES = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
FOREIGN = [
    BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=64),  # would see the future
    CodeGenConfig(**GPT, rotary_dim=4),  # likewise
    Llama4TextConfig(**SMALL, head_dim=8, num_local_experts=2, intermediate_size_mlp=48),  # chunks
    GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),  # sinks
    Gemma2Config(**SMALL, head_dim=8),  # soft caps
    FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64),
    GPTJConfig(**GPT, rotary_dim=4),
]
CPU = torch.device("cpu")


def by_definition(
    query, key, value, starts, ends, longest, _, *, scale, window_size, enable_gqa=False
):
    """Each document alone, softmax and all, from the tokens (T, heads, size)."""
    assert starts is ends
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    sizes = starts.diff().tolist()
    assert max(sizes) == longest
    assert sum(sizes) == len(query)
    done = []
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    for q, k, v in zip(*(each.split(sizes) for each in (query, key, value)), strict=True):
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = distance >= 0
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        done.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(done)


def build(architecture, name):
    torch.manual_seed(0)
    attention.register()
    own = copy.deepcopy(architecture)  # a model keeps it, and in it which attention it has
    return AutoModelForCausalLM.from_config(own, attn_implementation=name).eval()


@pytest.fixture
def kernel(monkeypatch):
    """It is there, and reports of how many tokens it was asked each time."""
    calls = []

    def reported(query, *given, **options):
        calls.append(len(query))
        return by_definition(query, *given, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reported)
    monkeypatch.setattr(attention, "_kernel_dtype", lambda _, dtype: dtype)
    return calls


@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_have_the_logits_and_gradients_that_they_have_alone(name, kernel):
    documents = [torch.arange(2, 2 + n)[None] for n in (5, 13, 1, 9)]
    together = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    plain, built = build(SHAPES[name], "sdpa"), build(SHAPES[name], "varlen")
    alone = torch.cat([plain(input_ids=d, use_cache=False).logits for d in documents], 1)
    packed = built(input_ids=together, position_ids=positions, use_cache=False).logits
    assert torch.allclose(packed, alone, atol=1e-5)
    for logits in (alone, packed):
        F.cross_entropy(logits[0], together[0]).backward()
    for one, other in zip(plain.parameters(), built.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_padded_rows_and_a_crowd_of_packed_ones_are_as_with_sdpa(name, kernel):
    plain, built = build(SHAPES[name], "sdpa"), build(SHAPES[name], "varlen")
    ids = torch.randint(2, 64, (3, 17), generator=torch.Generator().manual_seed(0))
    restarting = torch.cat([torch.arange(6), torch.arange(11)])[None]
    for positions in (None, restarting.expand(3, -1)):
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        assert torch.allclose(built(**given).logits, plain(**given).logits, atol=1e-5)


@pytest.mark.parametrize("num_agents", [0, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_packed_rows_have_the_gradients_that_they_have_with_sdpa(
    num_agents, checkpointing, kernel
):
    """A crowd has a row for each agent, and one row of positions for all."""
    ids = torch.randint(2, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]

    def gradients(name):
        base = build(SHAPES["llama"], name).requires_grad_(False)
        built = adapt.add_adapters(base, Tuning(mode="lora", r=4))
        if num_agents:
            built = Agents(built, Crowd(num_agents=num_agents))
        for key, parameter in built.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        logits = built.train()(input_ids=ids, position_ids=positions, use_cache=False).logits
        logits.pow(2).mean().backward()
        return torch.cat([p.grad.flatten() for p in built.parameters() if p.requires_grad])

    expected = gradients("sdpa")
    assert not kernel
    assert torch.allclose(gradients("varlen"), expected, atol=1e-6)
    layers = 2 * (2 if checkpointing else 1)
    assert kernel == [20 * max(1, num_agents)] * layers


@pytest.mark.parametrize("name", SHAPES)
def test_answers_are_those_of_sdpa_which_has_all_but_the_first_pass_of_full_rows(name, kernel):
    """It has left padding, steps on a cache and rows that leave."""
    plain, built = (build(SHAPES[name], each) for each in ("sdpa", "varlen"))
    how, full, ragged = Generation(max_new_tokens=9), [[3, 4, 5], [6, 7, 8]], [[5, 6, 7, 9], [3, 4]]
    for prompts, passes in ((ragged, []), (full, [6, 6])):
        expected = generate.Decoder(plain, [1], how).decode(prompts)
        stop = [expected[0].ids[4]]  # the first row leaves early
        expected = generate.Decoder(plain, stop, how).decode(prompts)
        assert len(expected[0].ids) < 9
        assert not kernel
        assert generate.Decoder(built, stop, how).decode(prompts) == expected
        assert kernel == passes
        kernel.clear()


def test_generation_and_a_device_without_the_kernel_go_to_sdpa():
    """Left padding and a cache; nothing is patched here, so packed rows have a mask."""
    plain, built = (build(SHAPES["llama"], name) for name in ("sdpa", "varlen"))
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    given = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False}
    reported = [model.generate(ids, pad_token_id=0, **given).tolist() for model in (plain, built)]
    assert reported[0] == reported[1]
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = built(input_ids=ids[1:], position_ids=positions, use_cache=False).logits[0, 3:]
    assert torch.allclose(packed, plain(input_ids=ids[1:, 3:]).logits[0], atol=1e-5)


def test_borders():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    starts, longest = attention.document_starts(positions, 2, 6, CPU)
    assert starts.tolist() == [0, 3, 4, 6, 9, 10, 12]
    assert (starts.dtype, longest) == (torch.int32, 3)
    assert attention.document_starts(positions, 1, 6, CPU)[0].tolist() == [0, 3, 4, 6]
    starts, longest = attention.document_starts(None, 2, 3, CPU)
    assert (starts.tolist(), longest) == ([0, 3, 6], 3)
    middle = torch.tensor([[4, 5, 6]])  # of a document that began before
    assert attention.document_starts(middle, 1, 3, CPU)[0].tolist() == [0, 3]


def test_known_borders_are_those_that_are_found():
    lengths = [3, 1, 2]
    found, known = (torch.cat([torch.arange(n) for n in lengths])[None] for _ in range(2))
    attention.remember_starts(known, lengths)
    starts, longest = attention.document_starts(found, 1, 6, CPU)
    counts, launched = count(lambda: attention.document_starts(known, 1, 6, CPU))
    assert not counts.syncs
    assert not launched
    again, most = attention.document_starts(known, 1, 6, CPU)
    assert (again.tolist(), again.dtype, most) == (starts.tolist(), starts.dtype, longest)


def test_what_the_kernel_has_not_is_refused(kernel):
    ids = torch.arange(2, 9)[None]
    dropping = build(LlamaConfig(**SMALL, attention_dropout=0.1), "varlen").train()
    with pytest.raises(errors.ModelError, match="dropout"):
        dropping(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("there", [True, False])
def test_what_neither_the_kernel_nor_sdpa_has_is_refused(there, request):
    if there:
        request.getfixturevalue("kernel")
    ids = torch.arange(2, 9)[None]
    for architecture, what in ((FOREIGN[4], "soft caps"), (FOREIGN[3], "sinks")):
        reported = (
            f"attn_implementation: varlen has no attention with {what}, which this model needs"
        )
        with pytest.raises(errors.ModelError, match=reported):
            build(architecture, "varlen")(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("architecture", FOREIGN, ids=lambda each: each.model_type)
def test_an_architecture_that_cannot_have_it_is_refused_before_its_weights_are_read(
    architecture, tmp_path
):
    architecture.save_pretrained(tmp_path)  # and no weights
    asked = Model(name=str(tmp_path), attn_implementation="varlen")
    reported = (
        f"model.attn_implementation: varlen expects .*, found {architecture.model_type}; set auto"
    )
    with pytest.raises(errors.ModelError, match=reported):
        load.load_base(asked, "full", "fp32", CPU)


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_the_key_varlen_loads_a_model_that_has_it(init, tmp_path, kernel):
    build(SHAPES["llama"], "sdpa").save_pretrained(tmp_path)
    logits = {}
    for name in ("sdpa", "varlen"):
        asked = Model(name=str(tmp_path), init=init, attn_implementation=name)
        torch.manual_seed(0)
        built = load.load_base(asked, "full", "fp32", CPU).eval()
        logits[name] = built(input_ids=torch.arange(2, 9)[None], use_cache=False).logits
        assert kernel == ([7, 7] if name == "varlen" else [])
    assert torch.allclose(logits["varlen"], logits["sdpa"], atol=1e-5)


def test_isolation_is_proven_with_the_kernel_of_the_precision(kernel, monkeypatch):
    """Persimmon gives attention no positions: its mask knows documents, the kernel does not."""

    def of_autocast(_, dtype):
        return torch.bfloat16 if torch.is_autocast_enabled("cpu") else None

    monkeypatch.setattr(attention, "_kernel_dtype", of_autocast)
    leaking, sound = (build(each, "varlen") for each in (PersimmonConfig(**SMALL), SHAPES["llama"]))
    assert attention.documents_are_isolated(leaking, "fp32", CPU)
    assert not kernel
    assert not attention.documents_are_isolated(leaking, "bf16", CPU)
    assert attention.documents_are_isolated(sound, "bf16", CPU)
    assert kernel
