"""Counts of parameters, against those of the model that is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch

from sft.config.schema import Config
from sft.models import load
from sft.plan.counts import Counts, config_of_key, count_parameters, model_key

CPU = torch.device("cpu")


def configured(path: Path, mode: str, router: str = "frozen", **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(path)},
            "tuning": {"mode": mode, "router": router} | ({} if mode == "full" else {"r": 4}),
            "data": {"train_path": "none"},
            "train": {"output_dir": "none", **train},
        }
    )


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize(
    ("kind", "experts", "chosen"),
    [("qwen3", 1, 1), ("qwen3_moe", 4, 2), ("qwen3_moe", 4, 1), ("gpt_oss", 4, 2)],
)
def test_counts_are_those_of_the_model_and_of_the_experts_that_a_token_chooses(
    tmp_path, kind, experts, chosen, mode
):
    model = families.tiny_model(kind, torch.float32, vocabulary=tiny.VOCAB)
    if experts > 1:
        model.config.num_experts_per_tok = chosen
    model.save_pretrained(tmp_path)
    config = configured(tmp_path, mode, "trained" if experts > 1 else "frozen")
    parameters = dict(load.build(config, "fp32", CPU).named_parameters())
    sizes = {name: p.numel() for name, p in parameters.items()}
    trained = [p.numel() for p in parameters.values() if p.requires_grad]
    # A product with the weights of all experts; their biases are only added.
    of_experts = [n for n in sizes if ".experts." in n and not n.endswith("_bias")]
    looked_up = sum(size for name, size in sizes.items() if "embed_tokens" in name)
    assert bool(of_experts) == (experts > 1)
    idle = sum(sizes[name] for name in of_experts) * (1 - chosen / experts)
    layers = {name.split("layers.")[1].split(".")[0] for name in sizes if "layers." in name}
    assert count_parameters(config) == Counts(
        parameters=sum(sizes.values()),
        trained=sum(trained),
        multiplied=sum(sizes.values()) - looked_up - idle,
        largest=max(trained),
        layers=len(layers),
        outside=sum(size for name, size in sizes.items() if "layers." not in name),
        sizes=tuple(sizes.values()),
    )


def test_a_key_holds_what_defines_the_model():
    frozen = [{"match": "embed", "freeze": True}]

    def make(name: str = "a", mode: str = "lora", groups: Any = frozen, **train: Any) -> Config:
        return configured(Path(name), mode, groups=groups, **train)

    config, key = make(seed=3), model_key(make())
    made = config_of_key(model_key(config, seed=5))
    assert (made.model, made.tuning) == (config.model, config.tuning)
    assert (made.train.groups, made.train.seed) == (config.train.groups, 5)
    assert model_key(make(seed=4, save_steps=7)) == key
    for other in (make(name="b"), make(mode="full"), make(groups=None)):
        assert model_key(other) != key
