"""LoRA layers without the casts and copies of PEFT: the same bits, and fewer of them."""

from __future__ import annotations

import pytest
import torch
from counting import count
from shapes import architectures, configured
from torch import nn

from sft.config.load import with_values
from sft.models import adapt
from sft.plan import dry_run
from sft.plan.dry_run import Window

WINDOW = Window((((24, 12), (17, 9)), ((30, 4),)))
TOKENS = 2 * 24  # of the larger micro-batch, padding included
PLAIN, DROPOUT = {}, {"tuning.lora_dropout": 0.1}
DORA = {"tuning.lora.use_dora": True}


def trained(folder, mode, precision, changes, name="Llama"):
    """Returns what two steps launch, and the trained weights and losses after them."""
    config = with_values(configured(folder, architectures()[name], mode), changes)
    made = dry_run.make_engine(config, precision, WINDOW, weights=False)
    losses = []
    counts, launched = count(lambda: losses.append(made.optimizer_step()["train/loss"]))
    losses.append(made.optimizer_step()["train/loss"])
    return counts, launched, [p.detach() for p in made.parallel.trained.values()], losses


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("mode", "changes"), [("lora", PLAIN), ("qlora", PLAIN), ("lora", DROPOUT), ("lora", DORA)]
)
def test_every_bit_is_that_of_peft(tmp_path, monkeypatch, mode, precision, changes):
    given = tmp_path, mode, precision, changes
    ours, _, weights, losses = trained(*given)
    monkeypatch.setattr(adapt, "forward_once", lambda _: None)
    peft, _, expected, before = trained(*given)
    assert losses == before
    assert all(map(torch.equal, weights, expected))
    fewer = changes == PLAIN and precision == "bf16"
    assert (ours.moved < peft.moved) == (ours.launches < peft.launches) == fewer


def test_an_input_is_kept_once_for_all_layers_that_share_it(tmp_path, monkeypatch):
    given = tmp_path, "lora", "bf16", PLAIN, "Qwen2"
    ours, launched, *_ = trained(*given)
    monkeypatch.setattr(adapt, "forward_once", lambda _: None)
    peft, casts, *_ = trained(*given)
    adapted = 2 * 7 * len(WINDOW.micro_batches)
    assert casts["_to_copy"] - launched["_to_copy"] >= 2 * adapted  # in the backward pass, too
    # In each layer k and v see what q sees, up what gate sees, and attention keeps what o sees.
    assert peft.saved - ours.saved == 2 * 4 * TOKENS * 64 * 2


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_without_autocast_it_is_the_pass_of_peft(tmp_path, mode):
    """As in serving: bf16 goes into an adapter in fp32."""
    config = configured(tmp_path, architectures()["Llama"], mode)
    model = dry_run.task_of(config).build_model(config, "bf16", dry_run.CPU, False, None).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        for layer in model.modules():
            for name in ("forward", "_cast_input_dtype"):
                vars(layer).pop(name, None)
        assert torch.equal(model(input_ids=ids).logits, ours)
