"""Varlen attention for transformers; its kernel needs a GPU: here its definition computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from sft import attention

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
    return AutoModelForCausalLM.from_config(architecture, attn_implementation=name).eval()


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", by_definition)
    monkeypatch.setattr(attention, "_kernel_dtype", lambda _, dtype: dtype)


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


def test_generation_and_a_device_without_the_kernel_go_to_sdpa():
    """Left padding and a cache; nothing is patched here, so packed rows have a mask."""
    plain, built = (build(SHAPES["llama"], name) for name in ("sdpa", "varlen"))
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    given = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False}
    told = [model.generate(ids, pad_token_id=0, **given).tolist() for model in (plain, built)]
    assert told[0] == told[1]
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = built(input_ids=ids[1:], position_ids=positions, use_cache=False).logits[0, 3:]
    assert torch.allclose(packed, plain(input_ids=ids[1:, 3:]).logits[0], atol=1e-5)


def test_borders():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    starts, longest = attention.borders(positions, 2, 6, CPU)
    assert starts.tolist() == [0, 3, 4, 6, 9, 10, 12]
    assert (starts.dtype, longest) == (torch.int32, 3)
    assert attention.borders(positions, 1, 6, CPU)[0].tolist() == [0, 3, 4, 6]
    starts, longest = attention.borders(None, 2, 3, CPU)
    assert (starts.tolist(), longest) == ([0, 3, 6], 3)
    middle = torch.tensor([[4, 5, 6]])  # of a document that began before
    assert attention.borders(middle, 1, 3, CPU)[0].tolist() == [0, 3]


def test_what_the_kernel_has_not_is_refused(kernel):
    capped = build(Gemma2Config(**SMALL, head_dim=8, sliding_window=8), "varlen")
    ids = torch.arange(2, 9)[None]
    with pytest.raises(attention.AttentionError, match="soft caps, which this model needs; set"):
        capped(input_ids=ids, use_cache=False)
    dropping = build(LlamaConfig(**SMALL, attention_dropout=0.1), "varlen").train()
    with pytest.raises(attention.AttentionError, match="dropout"):
        dropping(input_ids=ids, use_cache=False)
