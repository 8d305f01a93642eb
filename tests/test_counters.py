"""What a step launches, keeps, moves, computes, waits for and exchanges, as exact integers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from counting import count
from hypothesis import given
from hypothesis import strategies as st
from shapes import architectures, configured
from torch import nn

from sft.plan import dry_run
from sft.train.parallel.ddp import Replicated


class OneProcess(Replicated):
    """Clips the gradients of a model without an optimizer."""

    def __init__(self, model: nn.Module, max_grad_norm: float):
        self.trained, self.max_grad_norm = dict(model.named_parameters()), max_grad_norm


def check_clipping(scale: float, most: float) -> float:
    """Compares with torch, to the bit, and returns the norm."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for number, parameter in enumerate(model.parameters()):
        random = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=random) * scale
    other = copy.deepcopy(model)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        two.grad = one.grad.clone()
    found = OneProcess(model, most).clip()
    expected = float(nn.utils.clip_grad_norm_(other.parameters(), most))
    assert found == expected or (math.isnan(found) and math.isnan(expected))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad) or not math.isfinite(expected)
    return found


@given(
    scale=st.sampled_from([0.0, 1e-20, 1e-6, 1e-3, 1.0, 1e6, math.inf, math.nan]),
    most=st.sampled_from([1e-8, 1e-6, 1e-3, 0.5, 1.0, 1e3, math.inf]) | st.floats(1e-7, 1e7),
)
def test_gradients_are_clipped_to_the_bits_of_torch(scale, most):
    """A pass over gradients is left out only where it would multiply all of them by 1."""
    check_clipping(scale, most)


@pytest.mark.parametrize("share", [0.99, 0.9989, 0.9991, 0.9999, 1.0, 1.0001, 1.001, 1.01])
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_a_norm_near_the_limit_is_clipped_to_the_bits_of_torch(scale, share):
    check_clipping(scale, share * check_clipping(scale, math.inf))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_host_waits_for_the_loss_and_the_norm_only(tmp_path, layout):
    config = configured(tmp_path, architectures()["Llama"], "lora")
    window = dry_run.Window((((24, 12), (17, 9)),) * 3, layout)
    made = dry_run.make_engine(config, "bf16", window, weights=False)
    counts, _ = count(made.optimizer_step)
    masks = 3 if layout == "packed" else 0  # transformers looks for borders in each pass
    assert counts.syncs == 2 + masks
