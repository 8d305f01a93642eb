"""What only a GPU shows: `make test-gpu`; skipped, and said so, elsewhere.

With SFT_TEST_GPU=rehearse they run on a CPU, so that they are not stale when there is a GPU.
"""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from test_numbers import steps, weights

from sft.data import batches, template
from sft.data.examples import ExampleArrays, Examples, collate
from sft.data.files import Row
from sft.models import attention
from sft.tasks.sft.task import FineTune

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
REHEARSED = os.environ.get("SFT_TEST_GPU") == "rehearse"
NEEDED = "needs a GPU: make test-gpu"
pytestmark = pytest.mark.skipif(not ON_GPU and not REHEARSED, reason=NEEDED)
LONG, ROWS = (512, 64) if ON_GPU else (32, 16)
WHOLE = batches.Budget(ROWS * LONG, "padded")
SIZES = {
    "hidden_size": 256 if ON_GPU else 64,
    "intermediate_size": 704 if ON_GPU else 176,
    "num_hidden_layers": 4 if ON_GPU else 2,
    "vocab_size": 4096,
    "max_position_embeddings": LONG,
    "initializer_range": 0.05,
}


def make(folder):
    random = np.random.default_rng(0)
    ids = random.integers(2, SIZES["vocab_size"], (ROWS, LONG)).tolist()
    rows = [
        template.Example(ids=row, labels=[template.IGNORED] * (LONG // 2) + row[LONG // 2 :])
        for row in ids
    ]
    settings = tiny.config(folder, global_batch=ROWS, max_steps=4, precision="fp32")
    made = tiny.make_engine(tiny.llama(**SIZES), rows, rows, settings, WHOLE)
    made.log = tiny.Said()
    return made


def end(made) -> None:
    made.accelerator.free_memory(made.model, made.optimizer)
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


@contextmanager
def half_the_memory(peak: int):
    """Leaves half of the bytes that a step needs; a CPU pretends that larger batches do not fit."""
    if ON_GPU:
        share = 0.5 * peak / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    loss = FineTune.loss

    def limited(task, model, batch):
        if batch.input_ids.numel() > WHOLE.max_tokens / 2:
            raise torch.OutOfMemoryError("CUDA out of memory: rehearsed")
        return loss(task, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTune, "loss", limited)
        yield


def test_a_gpu_whose_memory_runs_out_does_the_same_global_batch_in_smaller_pieces(tmp_path):
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    rich = make(tmp_path / "rich")
    expected = steps(rich, 3)
    peak, trained = torch.cuda.max_memory_reserved() if ON_GPU else 0, weights(rich).cpu()
    end(rich)
    del rich
    with half_the_memory(peak):
        poor = make(tmp_path / "poor")
        found = steps(poor, 3)
    assert poor.task.budget.max_tokens < WHOLE.max_tokens
    assert any("memory ran out" in str(line) for line in poor.log.lines)
    for key in ("train/loss", "train/supervised_tokens", "train/grad_norm"):
        assert [v[key] for v in found] == pytest.approx([v[key] for v in expected], rel=1e-4)
    difference = (weights(poor).cpu() - trained).norm() / trained.norm()
    assert float(difference) < 1e-4


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_documents_do_not_see_each_other_on_a_gpu(dtype, most):
    """The logits of each are those that it has alone."""
    model = tiny.llama(dtype, **SIZES).to(DEVICE)
    random = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 4096, (n,), generator=random) for n in (300, 17, 128, 1, 66)]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None].to(DEVICE)
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat(documents)[None].to(DEVICE), position_ids=positions
        ).logits
        alone = torch.cat([model(input_ids=d[None].to(DEVICE)).logits[0] for d in documents])
    assert float((packed[0] - alone).norm() / alone.norm()) < most


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_collation_does_not_wait_for_a_gpu(layout):
    ids = list(range(2, 40))
    rows = [template.Example(ids, ids, [0.5] * len(ids))] * 3
    made = Examples(ExampleArrays.pack((i, Row([], None, "f", i), r) for i, r in enumerate(rows)))
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        batch = collate(made, [0, 1, 2], 0, layout, torch.device(DEVICE))
        attention.remember_starts(batch.position_ids, batch.lengths)
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert batch.input_ids.flatten().tolist() == ids * 3


@pytest.mark.skipif(not ON_GPU, reason=NEEDED)
@pytest.mark.parametrize("window", [None, 64])
def test_the_varlen_kernel_is_attention_within_documents(window):
    """Against SDPA on each document alone, in fp32: output and gradients."""
    random = torch.Generator("cuda").manual_seed(0)
    lengths = [300, 17, 128, 1, 66]
    shapes = [(1, heads, sum(lengths), 64) for heads in (8, 2, 2)]
    plain = [torch.randn(s, generator=random, device="cuda", requires_grad=True) for s in shapes]
    packed = [each.detach().bfloat16().requires_grad_() for each in plain]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)
    given = {"position_ids": positions, "sliding_window": window}
    found, _ = attention.attend(torch.nn.Module(), *packed, None, scaling=0.125, **given)
    expected = []
    for q, k, v in zip(*(each.split(lengths, 2) for each in plain), strict=True):
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        seen = ((distance >= 0) & (distance < (window or LONG))).to(DEVICE)
        options = {"attn_mask": seen, "scale": 0.125, "enable_gqa": True}
        expected.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, **options))
    whole = torch.cat(expected, 2).transpose(1, 2)
    weights = torch.randn(whole.shape, generator=random, device="cuda")
    (whole * weights).sum().backward()
    (found * weights).sum().backward()
    pairs = [(found, whole), *((a.grad, b.grad) for a, b in zip(packed, plain, strict=True))]
    for one, other in pairs:
        assert float((one - other).detach().norm() / other.detach().norm()) < 1e-2


def test_a_step_packed_by_the_varlen_kernel_is_the_padded_one():
    """Loss and gradients in bf16, the difference no larger than rounding."""
    attention.register()
    documents = [torch.randint(2, 4096, (n,)) for n in (300, 17, 128, 2, 66)]
    packed = torch.cat(documents)[None].to(DEVICE)
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None].to(DEVICE)
    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True).to(DEVICE)
    inside = torch.nn.utils.rnn.pad_sequence([torch.ones(len(d)) for d in documents], True).bool()
    gradients = []
    for name in ("varlen", "sdpa"):
        model = tiny.llama(torch.bfloat16, **SIZES).to(DEVICE)
        model.set_attn_implementation(name)
        if name == "varlen":
            logits = model(input_ids=packed, position_ids=positions).logits[0]
        else:
            logits = model(input_ids=padded).logits[inside.to(DEVICE)]
        torch.nn.functional.cross_entropy(logits.float(), packed[0]).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert tiny.relative_error(*gradients) < 2e-2
