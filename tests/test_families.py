"""The tiny shapes of model types that other tests train: each has every kind of layer, and runs."""

import pytest
import torch

from tests.support import families

SAMPLE = ["gemma3_text", "gemma3n_text", "gpt_oss", "deepseek_v3", "granitemoehybrid", "gemma4"]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_tiny_model_of_a_type_gives_logits_for_text(model_type):
    model = families.tiny_model(model_type)
    logits = model(input_ids=torch.randint(3, 1000, (2, 8)), use_cache=False).logits
    assert logits.isfinite().all()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    kinds = getattr(families.CONFIG_MAPPING[model_type]().get_text_config(), "layer_types", ())
    assert set(kinds) <= set(getattr(model.config.get_text_config(), "layer_types", ()))
