"""Processes that share sequences compute what one does, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import forked
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import Llama4TextConfig, LlamaConfig

from sft.config.load import load_config, with_values
from sft.data.examples import collate, share
from sft.errors import ConfigError
from sft.models import attention, sequences
from sft.plan import network
from sft.plan.plan import Plan, make_plan
from sft.runtime import hardware
from sft.tasks.base import Workload
from sft.verify import laws
from sft.verify.runs import SmallConfig, Trials

CPU = torch.device("cpu")


def workers(folder: Path, world: int, *arguments: str) -> list[Any]:
    """What each rank of tests/support/sequence_worker.py wrote."""
    log = folder / f"{world}.log"
    out = folder / f"of {world}"
    out.mkdir()
    forked.start(world, ["tests/support/sequence_worker.py", str(out), *arguments], log).join()
    files = sorted(out.glob("rank*.json"))
    assert len(files) == world, log.read_text(errors="replace")
    return [json.loads(file.read_text()) for file in files]


@given(
    seed=st.integers(0, 99),
    number=st.integers(1, 5),
    parts=st.integers(1, 5),
    layout=st.sampled_from(["padded", "packed"]),
    per_example=st.booleans(),
)
def test_the_parts_of_a_batch_are_the_batch(seed, number, parts, layout, per_example):
    rows = tiny.stored(tiny.examples(seed, number, 12))
    whole = collate(rows, range(number), 0, layout, CPU, per_example)
    own = [share(whole, part, parts, 0) for part in range(parts)]
    time = whole.input_ids.shape[1]
    ids = torch.cat([each.input_ids for each in own], 1)
    assert torch.equal(ids[:, :time], whole.input_ids)
    assert {each.input_ids.shape for each in own} == {(len(ids), -(-time // parts))}
    assert not ids[:, time:].any()
    positions = torch.cat([each.position_ids for each in own], 1)
    assert all(torch.equal(each.whole_positions, positions) for each in own)
    expected = whole.position_ids if layout == "packed" else torch.arange(time)[None]
    assert torch.equal(positions[:, :time], expected)

    def predictions(batch: Any, first: int, width: int) -> list[tuple[Any, ...]]:
        """(row, time, target, weight) of each supervised position."""
        weights = torch.ones(len(batch.targets)) if batch.weights is None else batch.weights
        flat = zip(batch.positions, batch.targets, weights, strict=True)
        return [(int(p) // width, int(p) % width + first, int(t), float(w)) for p, t, w in flat]

    width = ids.shape[1] // parts
    found = [p for i, each in enumerate(own) for p in predictions(each, i * width, width)]
    assert sorted(found) == sorted(predictions(whole, 0, time))
    for name in ("counts", "lengths"):
        totals = np.sum([getattr(each, name) for each in own], axis=0)
        assert totals.tolist() == getattr(whole, name)
    assert sum(each.num_items or 0.0 for each in own) == (whole.num_items or 0.0)
    for each in own:
        real = each.input_ids.flatten()[each.token_positions()]
        assert len(real) == sum(each.lengths)
        assert bool((real != 0).all())


def test_an_empty_micro_batch_has_a_token_for_each_process():
    empty = collate(tiny.stored(tiny.examples(0, 1)), [], 0, "packed", CPU)
    own = share(empty, 1, 3, 0)
    assert own.input_ids.shape == own.position_ids.shape == (1, 1)
    assert not len(own.targets)
    assert not len(own.token_positions())


# Windows, sinks, latent attention, experts, positions in three dimensions or learnt, ready masks.
SHARED = ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "mixtral", "qwen2_vl", "gpt2", "jetmoe"]
# Convolutions, recurrent layers, attention of its own code, and tokens that see later ones.
REFUSED = ["lfm2", "jamba", "qwen3_next", "bloom", "paligemma"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_type_computes_what_one_process_does_or_is_refused(tmp_path, size):
    """Four processes outnumber the groups of queries, which are two; three do not divide the four
    heads."""
    types = SHARED + REFUSED if size == 2 else SHARED[:5]
    ranks = workers(tmp_path, size, "types", str(size), *types)
    for name, found in ranks[0].items():
        assert "failed" not in found, (name, found)
        assert [*found] == ["refused"] * (name.split()[0] in REFUSED) or "loss" in found, name
        if "loss" in found:
            assert abs(found["loss"]) < 1e-9, name
            assert found["gradient"] < 1e-7, name  # norms and rotations are computed in fp32
    assert all(rank["llama packed"]["sent"] == rank["llama packed"]["planned"] for rank in ranks)
    assert all([*rank] == [*ranks[0]] for rank in ranks)
    refused = {name.split()[0] for name, found in ranks[0].items() if "refused" in found}
    assert refused == set(types) & set(REFUSED)


ADAPTED = {"tuning.mode": "lora", "tuning.r": 4, "tuning.lora_alpha": 8.0}
CASES: list[dict[str, Any]] = [  # `size`: by how many of four processes a sequence is shared
    {"size": 4, "layout": "packed", "train": {}},
    {"size": 2, "layout": "padded", "train": {"engine": "fsdp", "mean_per": "example"}},
    {"size": 2, "layout": "packed", "train": {"gradient_checkpointing": True}, "changes": ADAPTED},
    {"size": 2, "layout": "packed", "train": {"engine": "deepspeed"}},  # the last: it stays
]


@pytest.mark.slow
def test_a_step_and_an_evaluation_are_those_of_one_process(tmp_path):
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))

    def cases(world: int) -> str:
        result = []
        for case in CASES:
            train = case["train"] | {"context_parallel": case["size"] if world > 1 else 1}
            if train.get("engine") == "deepspeed":
                train |= {"deepspeed_config": str(zero)} if world > 1 else {"engine": "ddp"}
            result.append(case | {"train": train, "max_tokens": 40})
        file = tmp_path / f"cases of {world}.json"
        file.write_text(json.dumps(result))
        return str(file)

    (alone,) = workers(tmp_path, 1, "engine", cases(1))
    first = workers(tmp_path, 4, "engine", cases(4))[0]
    for case, expected, found in zip(CASES, alone, first, strict=True):
        for name in ("loss", "norm", "held_out"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), (case, name)
        for name, weight in expected["weights"].items():
            near = pytest.approx(weight, rel=1e-4, abs=1e-6)
            assert found["weights"][name] == near, (case, name)
        passes = 3 if case["train"].get("gradient_checkpointing") else 2
        sizes = tiny.llama().config
        planned = network.exchanged_bytes(sizes, case["size"], 4, found["tokens"], passes)
        assert planned == found["sent"] > 0, case


def plan_for(folder: Path, architecture: Any, longest: int, size: int, world: int) -> Plan:
    """The plan of a run whose longest row is held out."""
    architecture.save_pretrained(folder)
    values = {"model.name": str(folder), "train.context_parallel": size}
    held_out = Workload([2, longest], np.array([1, 1]))
    work = Workload([3], np.array([1]), held_out)
    config = with_values(tiny.config(folder, global_batch=1), values)
    return make_plan(config, work, hardware.detect(), world)


@given(
    groups=st.integers(1, 4),
    queries=st.integers(1, 3),
    size=st.integers(2, 9),
    packed=st.booleans(),
    sinks=st.booleans(),
)
@settings(max_examples=15)
def test_any_number_of_heads_is_shared_by_any_number_of_processes(
    groups, queries, size, packed, sinks
):
    """One process imitates all of them, as in the proof before training. Sinks are per head."""
    heads = {"num_attention_heads": groups * queries, "num_key_value_heads": groups}
    heads |= {"head_dim": 8, "hidden_size": 8 * groups * queries}
    model = families.tiny_model("gpt_oss" if sinks else "llama", torch.float64, **heads).eval()
    model.config._experts_implementation = "batched_mm"
    if sinks:
        for name, value in model.named_parameters():
            if name.endswith("sinks"):
                value.data.uniform_(-1, 1)
    sequences.SequenceGroup(size, 0).follow(model)
    assert not packed or attention.keep_documents_apart(model, "fp32", CPU)
    assert not sequences.find_difference(model, size, "fp64", CPU, packed)


@pytest.mark.parametrize(
    ("size", "heads", "groups", "expected"),
    [
        (4, 8, 8, (8, 8)),  # each process has two
        (4, 8, 2, (8, 4)),  # two processes get the same keys
        (8, 28, 4, (32, 32)),  # four heads of zeros
        (3, 4, 2, (6, 6)),
        (8, 2, 1, (8, 8)),  # six processes have none of their own
    ],
)
def test_heads_that_processes_divide(size, heads, groups, expected):
    assert sequences.filled_heads(size, heads, groups) == expected


def test_the_plan_says_what_heads_that_do_not_divide_cost(tmp_path):
    six = LlamaConfig(num_attention_heads=6, num_key_value_heads=6, **SMALL)
    found = plan_for(tmp_path, six, 9, size=4, world=4).warnings
    assert any("6 heads of attention for 4 processes" in each for each in found), found
    assert any("2 of 8 are zeros" in each for each in found), found
    found = plan_for(tmp_path, six, 9, size=3, world=3).warnings
    assert not any("heads" in each for each in found)


def test_processes_that_cannot_be_divided_are_refused(tmp_path):
    six = LlamaConfig(num_attention_heads=6, num_key_value_heads=6, **SMALL)
    with pytest.raises(ConfigError, match="must be a multiple of 3, found 4: launch so many"):
        plan_for(tmp_path, six, 9, size=3, world=4)


SMALL = {"hidden_size": 96, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 8, "factor": 2.0}
LONG |= {"rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
TURNED = {
    "longrope": LlamaConfig(rope_parameters=LONG, num_attention_heads=3, **SMALL),
    "dynamic": LlamaConfig(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        max_position_embeddings=8,
        num_attention_heads=3,
        **SMALL,
    ),
    "counted by the model": Llama4TextConfig(floor_scale=9, num_attention_heads=3, **SMALL),
}


@pytest.mark.parametrize("name", TURNED)
def test_rows_whose_length_changes_their_tokens_are_refused(tmp_path, name):
    """The last position is in one process, and Llama 4 counts from the first token it is given."""
    with pytest.raises(ConfigError, match=r"more than 8 tokens .*has 9: set 1, or data.max_seq_l"):
        plan_for(tmp_path, TURNED[name], 9, size=3, world=3)
    assert sequences.most_tokens(TURNED[name]) == 8
    assert plan_for(tmp_path, TURNED[name], 9, size=1, world=3)


def test_a_pass_that_is_not_shared_is_as_it_was():
    """After a shared pass, and while its batch is alive."""
    model = tiny.llama().eval()
    group = sequences.SequenceGroup(2, 0)
    ids, whole = torch.arange(8)[None], torch.arange(8)[None]
    expected = model(input_ids=ids).logits
    group.follow(model)
    own = whole[:, :4].clone()
    group.share(own, whole)
    model(input_ids=ids[:, :4], position_ids=own)
    assert sequences._passes.current is not None
    assert torch.equal(model(input_ids=ids).logits, expected)
    model(input_ids=ids[:, :4], position_ids=own)
    del own
    assert sequences._passes.current is None


@pytest.mark.parametrize("is_sharp", [True, False])
def test_rounding_does_not_hide_a_layer_that_mixes_tokens(is_sharp):
    """A leak of a ten-thousandth is found in fp64."""
    model = tiny.llama(torch.float64).eval()
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    compute = mlp.forward
    leak = 1e-4 if is_sharp else 0.0
    mlp.forward = lambda states: compute(states) + leak * states.cumsum(1)
    sequences.SequenceGroup(2, 0).follow(model)
    found = sequences.find_difference(model, 2, "fp64", CPU, packed=False)
    assert bool(found) == is_sharp
    assert found.startswith("logits of a token differ") == is_sharp


@pytest.mark.parametrize(("world", "expected"), [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_what_verify_compares_with_shares_rows_if_its_processes_can(tmp_path, world, expected):
    """The run of one process, with which `make verify-*` compares, was refused."""
    run = tiny.config(tmp_path, global_batch=4, context_parallel=2)
    launched: list[str] = []

    def launch(_: int, __: Path, program: list[str]) -> str:
        launched.append(program[program.index("--config") + 1])
        return "error: not launched"

    Trials(SmallConfig(run, tmp_path, [9, 5], []), launch).run("trial", world)
    assert load_config(launched[0]).train.context_parallel == expected


@pytest.mark.parametrize("verify", [laws.verify_resume, laws.verify_invariance])
def test_verify_refuses_processes_that_cannot_share_rows(tmp_path, verify):
    """It would prove a law of another run than the configured one."""
    run = tiny.config(tmp_path, context_parallel=2)
    with pytest.raises(ConfigError, match="must be a multiple of 2, found 3"):
        verify(run, 3, Console())
