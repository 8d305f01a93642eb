"""What FSDP2 exchanges: weights that autocast rounds in 16 bits, gradients once, within groups."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from shapes import architectures, configured
from torch import nn

from sft.config.load import dump_config
from sft.errors import ConfigError
from sft.models.rounded import Casts, find_casts
from sft.plan.counts import count_casts
from sft.runtime.processes import shards_within
from sft.tasks.registry import task_of

# --- which weights ---------------------------------------------------------------------------


def casts(folder: Path, name: str, mode: str = "full", **changes: Any) -> tuple[Casts, nn.Module]:
    config = configured(folder, architectures(**changes)[name], mode)
    model = task_of(config).build_model(config, "bf16", torch.device("cpu"), weights=False)
    return find_casts(model, torch.bfloat16, "cpu"), model


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPT2"])
def test_weights_of_linear_layers_are_read_rounded_only(tmp_path, name):
    """Those of norms and embeddings are not, and the head only if it is not an embedding, too."""
    found, model = casts(tmp_path, name)
    known = dict(model.named_parameters())
    reads_fp32 = ("norm", "embed_tokens", "ln_", "wte", "wpe")
    assert found.rounded == {n for n in known if not any(each in n for each in reads_fp32)}
    assert found.others == {n for n in known if "wte" in n}  # GPT-2 ties its head
    assert all(type(p) is nn.Parameter and not p.is_meta for p in known.values())
    assert model.training


def test_a_weight_that_is_also_read_otherwise_is_not_rounded(tmp_path):
    """By its values, or by its dtype only."""
    _, model = casts(tmp_path, "Llama")
    first, second = (layer.mlp for layer in model.model.layers)
    first.register_forward_pre_hook(lambda m, x: (x[0] * m.up_proj.weight.mean(),))
    found = find_casts(model, torch.bfloat16, "cpu")
    assert "model.layers.0.mlp.up_proj.weight" in found.others
    assert "model.layers.1.mlp.up_proj.weight" in found.rounded
    second.register_forward_pre_hook(lambda m, x: (x[0].to(m.up_proj.weight.dtype) * 1.1,))
    found = find_casts(model, torch.bfloat16, "cpu")
    assert found.rounded == frozenset()
    assert found.problem == "its code depends on the dtype of weights"


def test_adapters_and_4_bits_stay_as_they_are(tmp_path):
    for mode in ("lora", "qlora"):
        assert casts(tmp_path, "Llama", mode)[0].rounded == frozenset()


def test_a_model_that_does_not_run_on_text_stays_as_it_is():
    found = find_casts(nn.Linear(2, 2), torch.bfloat16, "cpu")
    assert found == Casts(problem=found.problem)
    assert "cannot be traced (TypeError" in found.problem


def test_a_plan_counts_them_in_few_layers(tmp_path):
    found, model = casts(tmp_path, "Llama", num_hidden_layers=9)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    config = configured(tmp_path, architectures(num_hidden_layers=9)["Llama"], "full")
    counted = count_casts(config, "bf16")
    assert (counted.outside, counted.others) == (sizes["lm_head.weight"], 0)
    assert counted.inside == sum(sizes[name] for name in found.rounded) - counted.outside
    assert count_casts(config, "fp32").inside == 0


# --- which processes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "world", "here", "found"),
    [
        (None, 8, 4, None),
        ("node", 8, 4, 4),
        ("node", 8, 8, None),
        (2, 8, 4, 2),
        (8, 8, 4, None),
        (4, 1, 1, None),
    ],
)
def test_groups_of_processes_that_split_weights(tmp_path, asked, world, here, found):
    config = configured(tmp_path, architectures()["Llama"], engine="fsdp", shard_within=asked)
    assert shards_within(config.train, world, here) == found


@pytest.mark.parametrize(("asked", "here"), [(3, 4), (16, 4), ("node", 3), ("node", 1)])
def test_processes_that_make_no_such_groups_are_refused(tmp_path, asked, here):
    config = configured(tmp_path, architectures()["Llama"], engine="fsdp", shard_within=asked)
    with pytest.raises(ConfigError, match="expected a divisor above 1 of 8"):
        shards_within(config.train, 8, here)


# --- with real processes ---------------------------------------------------------------------

TIED = architectures(tie_word_embeddings=True)["Llama"]
ROUNDED = {  # name -> architecture, what is changed, rows of a chunk of logits
    "plain": (architectures()["Llama"], {"keep_whole": False}, 0),
    "fp16": (architectures()["GPT2"], {"precision": "fp16", "keep_whole": "gradients"}, 0),
    "saving": (
        architectures()["Qwen2"],
        {"gradient_checkpointing": True, "offload": True, "activation_offload": True},
        8,
    ),
    "all": (TIED, {"keep_whole": "all"}, 8),
    "early": (
        architectures()["Llama"],
        {"keep_whole": "gradients", "optimizer_in_backward": True, "max_grad_norm": 0.0},
        0,
    ),
}
LLAMA = architectures()["Llama"]
WORLDS = {  # number of processes -> what is changed
    1: {"alone": {"engine": "ddp"}},
    4: {
        f"{within} {keeps}": {"shard_within": within, "keep_whole": keeps}
        for within in (None, 2)
        for keeps in (False, "gradients", "all")
    },
}


def run(folder: Path, world: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
    (folder / "cases.json").write_text(json.dumps(cases))
    out = folder / f"found{world}.json"
    command = ["tests/support/exchange_worker.py", str(folder / "cases.json"), str(out)]
    printed = forked.launch(world, command)
    assert out.exists(), printed
    found = json.loads(out.read_text("utf-8"))
    assert {each["world_size"] for each in found.values()} == {world}
    return found


def make_case(folder: Path, name: str, architecture: Any, **train: Any) -> dict[str, Any]:
    train = {"engine": "fsdp", "gradient_checkpointing": False} | train
    config = configured(folder / name, architecture, "full", **train)
    file = folder / f"{name}.yaml"
    file.write_text(dump_config(config))
    return {"name": name, "config": str(file)}


@pytest.mark.slow
def test_rounded_weights_give_the_same_bits(tmp_path):
    cases = []
    for name, (architecture, train, rows) in ROUNDED.items():
        made = make_case(tmp_path, name, architecture, **{"precision": "bf16"} | train)
        made["chunk_rows"] = rows
        cases += [made, made | {"name": f"{name} stored", "as_stored": True}]
    found = run(tmp_path, 2, cases)
    for name, (_, _, rows) in ROUNDED.items():
        rounded, stored = found[name], found[f"{name} stored"]
        assert rounded["steps"] == stored["steps"]
        assert rounded["sums"] == stored["sums"]
        assert rounded["chunks"] == bool(rows)
        assert rounded["rounded"] > stored["rounded"] == 0
        assert rounded["exchanged"] < stored["exchanged"]
        assert rounded["collectives"] == stored["collectives"]
        assert not any("FSDP2" in line for line in rounded["said"])
    assert (
        "FSDP2 gathers all fp32 weights (489 KiB) without rounding them, since a test says so. A "
        "model whose weights are all rounded exchanges 245 KiB in each pass"
    ) in found["plain stored"]["said"]


@pytest.mark.slow
def test_groups_of_shards_and_what_stays_whole_change_no_result(tmp_path):
    """Losses, norms and weights of two steps; fewer collectives and bytes the more stays whole."""
    found: dict[str, Any] = {}
    for world, kinds in WORLDS.items():
        made = [
            make_case(tmp_path, name, LLAMA, precision="fp32", **train)
            for name, train in kinds.items()
        ]
        found |= run(tmp_path, world, made)
    expected = numbers(found.pop("alone"))
    for each in found.values():
        assert numbers(each) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    for within in (None, 2):
        for key in ("exchanged", "collectives"):
            often, gradients, once = (
                found[f"{within} {keeps}"][key] for keeps in (False, "gradients", "all")
            )
            assert often > gradients > once


def numbers(found: dict[str, Any]) -> list[float]:
    return [float.fromhex(x) for x in (*chain(*found["steps"]), *found["sums"].values())]
