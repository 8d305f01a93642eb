"""What only a GPU shows; skipped, and said so, where there is none."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tiny
import torch
from test_numbers import steps, weights

from sft import batching, chat

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONG = 512
WHOLE = batching.Budget(64 * LONG, "padded")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "vocab_size": 4096,
    "max_position_embeddings": LONG,
    "initializer_range": 0.05,
}


def make(folder):
    random = np.random.default_rng(0)
    ids = random.integers(2, SIZES["vocab_size"], (64, LONG)).tolist()
    rows = [
        chat.Example(ids=row, labels=[chat.IGNORED] * (LONG // 2) + row[LONG // 2 :]) for row in ids
    ]
    settings = tiny.config(folder, global_batch=64, max_steps=4, precision="fp32")
    made = tiny.make_engine(tiny.llama(**SIZES), rows, rows, settings, WHOLE)
    made.log = tiny.Said()
    return made


def test_a_gpu_whose_memory_runs_out_does_the_same_global_batch_in_smaller_pieces(tmp_path):
    torch.cuda.reset_peak_memory_stats()
    rich = make(tmp_path / "rich")
    expected = steps(rich, 3)
    peak, trained = torch.cuda.max_memory_reserved(), weights(rich).cpu()
    rich.accelerator.free_memory(rich.model, rich.optimizer)
    del rich
    gc.collect()
    torch.cuda.empty_cache()
    share = 0.5 * peak / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        poor = make(tmp_path / "poor")
        found = steps(poor, 3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert poor.budget.max_tokens < WHOLE.max_tokens
    assert any("memory ran out" in str(line) for line in poor.log.lines)
    for key in ("train/loss", "train/supervised_tokens", "train/grad_norm"):
        assert [v[key] for v in found] == pytest.approx([v[key] for v in expected], rel=1e-4)
    difference = (weights(poor).cpu() - trained).norm() / trained.norm()
    assert float(difference) < 1e-4


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_documents_do_not_see_each_other_on_a_gpu(dtype, most):
    """The logits of each are those that it has alone."""
    model = tiny.llama(dtype, **SIZES).cuda()
    random = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 4096, (n,), generator=random) for n in (300, 17, 128, 1, 66)]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None].cuda()
    with torch.no_grad():
        packed = model(input_ids=torch.cat(documents)[None].cuda(), position_ids=positions).logits
        alone = torch.cat([model(input_ids=d[None].cuda()).logits[0] for d in documents])
    assert float((packed[0] - alone).norm() / alone.norm()) < most
