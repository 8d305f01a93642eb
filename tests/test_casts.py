"""Layers that get the same input share its cast: the same bits, fewer copies."""

from __future__ import annotations

import gc

import pytest
import torch
from counting import count
from shapes import architectures, configured
from torch import nn

from sft.models import casts
from sft.plan import dry_run
from sft.plan.dry_run import Window

WINDOW = Window((((24, 12), (17, 9)), ((30, 4),)))
TOKENS = 2 * 24  # of the larger micro-batch, padding included


def trained(folder, name, **train):
    """Returns what two steps launch and keep, and the trained weights and losses after them."""
    config = configured(folder, architectures()[name], "full", **train)
    made = dry_run.make_engine(config, "bf16", WINDOW, weights=False)
    losses = []
    counts, launched = count(lambda: losses.append(made.optimizer_step()["train/loss"]))
    losses.append(made.optimizer_step()["train/loss"])
    return counts, launched, [p.detach() for p in made.parallel.trained.values()], losses


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("Llama", False), ("Llama", True), ("Gemma2", "selective")]
)
def test_every_bit_is_that_of_a_cast_for_each_layer(tmp_path, monkeypatch, name, checkpointing):
    given = tmp_path, name
    ours, launched, weights, losses = trained(*given, gradient_checkpointing=checkpointing)
    monkeypatch.setattr(casts, "share", lambda _: None)
    plain, before, expected, known = trained(*given, gradient_checkpointing=checkpointing)
    assert losses == known
    assert all(map(torch.equal, weights, expected))
    passes = 2 * len(WINDOW.micro_batches) * (2 if checkpointing else 1)  # through layers
    assert before["_to_copy"] - launched["_to_copy"] == 3 * passes  # of k, v and up
    assert plain.launches - ours.launches == 3 * passes
    assert ours.moved < plain.moved
    if not checkpointing:
        assert plain.saved - ours.saved == 2 * 3 * TOKENS * 64 * 2
    assert ours.saved <= plain.saved


def linear_pair():
    model = nn.Module()
    model.one, model.two = nn.Linear(3, 3), nn.Linear(3, 3)
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    casts.share(model)
    return model.one, model.two


def test_an_input_that_was_changed_or_replaced_is_cast_again():
    one, two = linear_pair()
    x = torch.randn(2, 3, requires_grad=True) * 1
    with torch.autocast("cpu", torch.bfloat16):
        one(x)
        x.mul_(2)
        after = two(x)
        assert torch.equal(after, nn.functional.linear(x, two.weight, two.bias))
    with torch.autocast("cpu", torch.float16):
        assert two(x).dtype == torch.float16


def test_a_copy_lives_no_longer_than_its_input():
    one, _ = linear_pair()
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 3)
        one(x)
        assert casts._last.copy is not None
        del x
        gc.collect()
        assert casts._last.copy is None


def test_without_autocast_or_gradients_nothing_is_cast():
    one, _ = linear_pair()
    x = torch.randn(2, 3)
    assert "_to_copy" not in count(lambda: one(x))[1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(one(x), nn.functional.linear(x, one.weight, one.bias))
    assert casts._last.copy is None
