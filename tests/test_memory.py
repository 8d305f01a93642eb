"""Few layers tell what many take; what no trace sees is added by formula."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import forked
import memory_worker
import pytest
import shapes
from conftest import ROOT, representatives
from shapes import architectures, configured, uniform_window
from transformers import GPT2Config, LlamaConfig, MambaConfig, Qwen2MoeConfig

from sft.config.load import dump_config, load_config, with_values
from sft.evaluate import generate
from sft.models import dtypes, load
from sft.plan import counts as plan_counts
from sft.plan import dry_run, memory, sharding
from sft.plan.counts import model_key
from sft.plan.dry_run import Window
from sft.tasks.registry import task_of
from sft.train.parallel import ddp

pytestmark = pytest.mark.slow

SIZES = shapes.SIZES | {"num_hidden_layers": 12, "vocab_size": 512}
DEPTHS = {"Llama": (2, 3, 7), "Qwen2": (2, 3, 7), "Gemma2": (2, 4, 12), "GPT2": (2, 3, 7)}
DEEP = {
    name: architectures(num_hidden_layers=n, vocab_size=512)[name]
    for name, (*_, n) in DEPTHS.items()
}
WINDOWS = [uniform_window(3, 40, 20, micro_batches=2), Window((((100, 90), (60, 5)),), "padded")]


@pytest.mark.slow
@pytest.mark.parametrize(  # each way of tuning, with and without checkpointing, each architecture
    ("name", "mode", "checkpointing"),
    representatives(
        [
            ("Llama", "full", True),
            ("Llama", "lora", False),
            ("Qwen2", "lora", True),
            ("Gemma2", "full", False),
            ("GPT2", "qlora", False),
            ("Llama", "qlora", True),
        ],
        2,
    ),
)
def test_few_layers_report_what_all_take(tmp_path, name, mode, checkpointing):
    config = configured(tmp_path, DEEP[name], mode, gradient_checkpointing=checkpointing)
    for window in WINDOWS if mode == "full" else WINDOWS[:1]:
        predicted = memory.predict(config, "fp32", window, on_gpu=False)
        assert predicted.method == "traced with {} and {} of {} layers".format(*DEPTHS[name])
        whole = dry_run.trace_step(config, "fp32", window).peak()
        assert predicted.allocated == pytest.approx(whole.num_bytes, rel=0.001)
        for label, size in whole.breakdown.items():
            assert predicted.breakdown.get(label, 0) == pytest.approx(size, rel=0.01, abs=2048)


def test_layers_that_do_not_repeat_are_traced_all(tmp_path):
    sizes = SIZES | {"num_experts": 2, "moe_intermediate_size": 32, "mlp_only_layers": [6]}
    config = configured(tmp_path, Qwen2MoeConfig(**sizes), "lora", gradient_checkpointing=False)
    assert plan_counts.depths(model_key(config)) is None
    shallow = LlamaConfig(**SIZES | {"num_hidden_layers": 5})
    few = configured(tmp_path, shallow)
    assert plan_counts.depths(model_key(few)) is None


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_counts_are_those_of_the_model(mode):
    config = with_values(load_config(ROOT / "configs/nano.yaml"), {"tuning.mode": mode})
    counts = plan_counts.count_parameters(config)
    shares = dtypes.parameter_groups(load.build(config, "fp32", dry_run.CPU))
    assert counts.parameters == sum(share.num_parameters for share in shares)
    assert counts.trained == sum(share.num_parameters for share in shares if share.trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "checkpointing", "window"),
    representatives(
        [
            ("lora", False, uniform_window(2, 128, 128)),
            ("full", True, uniform_window(3, 100, 100)),
            ("qlora", False, uniform_window(3, 100, 20)),
        ]
    ),
)
def test_few_layers_report_what_the_allocator_of_a_gpu_reserves(
    tmp_path, mode, checkpointing, window
):
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 8192}
    sizes |= {"num_hidden_layers": 6}
    config = configured(tmp_path, LlamaConfig(**sizes), mode, gradient_checkpointing=checkpointing)
    window = replace(window, gradients=True)
    predicted = memory.predict(config, "bf16", window, on_gpu=True)
    assert predicted.method == "traced with 2 and 3 of 6 layers"
    added = sum(predicted.breakdown.get(k, 0) for k in ("libraries", "attention workspace"))
    whole = dry_run.trace_step(config, "bf16", window, on_gpu=True).reserved()
    pages = 22 * 2**20  # one of each pool
    assert whole - pages < predicted.reserved - added < whole + 2 * pages


def test_operations_keep_what_they_keep_on_a_gpu(tmp_path):
    """No probabilities of attention; layer norms in fp32; all probabilities where no kernel is."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 512}
    window = uniform_window(2, 400, 1)

    def taken(architecture, precision, on_gpu=True):
        config = configured(tmp_path, architecture, "lora", gradient_checkpointing=False)
        return dry_run.trace_step(config, precision, window, on_gpu=on_gpu).peak().num_bytes

    without = taken(GPT2Config(**sizes, attn_pdrop=0.0), "bf16")
    assert taken(GPT2Config(**sizes, attn_pdrop=0.1), "bf16") == without
    assert without > taken(GPT2Config(**sizes, attn_pdrop=0.0), "bf16", on_gpu=False)
    grouped = LlamaConfig(**SIZES | {"num_hidden_layers": 2, "max_position_embeddings": 512})
    probabilities = 2 * 4 * 400 * 400 * 4  # rows, heads, tokens, tokens, bytes; of each layer
    more = taken(grouped, "fp32") - taken(grouped, "fp32", on_gpu=False)
    assert 2 * probabilities < more < 8 * probabilities


def test_a_model_without_attention_is_planned(tmp_path):
    mamba = MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=512)
    config = configured(tmp_path, mamba, "full", gradient_checkpointing=False)
    predicted = memory.predict(config, "bf16", uniform_window(2, 64, 64), on_gpu=True)
    assert predicted.reserved >= predicted.allocated > 0
    assert generate.bytes_per_row(mamba, "bf16", 20, 20) > 0


@pytest.mark.slow
def test_what_a_gpu_adds(tmp_path):
    """Written out: 2 rows of 100 tokens, 4 heads of 16 numbers, 2 of them with keys and values."""
    config = configured(tmp_path, DEEP["Llama"], "lora", gradient_checkpointing=False)
    window = Window((((100, 1), (60, 1)),), "padded")
    on_cpu = memory.predict(config, "bf16", window, on_gpu=False)
    on_gpu = memory.predict(config, "bf16", window, on_gpu=True)
    added = {k: v for k, v in on_gpu.breakdown.items() if k in ("libraries", "attention workspace")}
    assert not set(added) & set(on_cpu.breakdown)
    gradients_of_queries = 2 * 100 * 4 * (32 + 2) * 4  # fp32, rounded up to 32, and two numbers
    gradients_of_keys_and_values = 2 * 100 * 4 * 16 * 2 * 2  # bf16, for each head
    assert added == {
        "libraries": 64 * 2**20,
        "attention workspace": gradients_of_queries + gradients_of_keys_and_values,
    }
    packed = memory.predict(config, "bf16", Window(window.micro_batches, "packed"), on_gpu=True)
    attention = (gradients_of_queries + gradients_of_keys_and_values) * 160 // 200
    assert packed.breakdown["attention workspace"] == attention
    eager = with_values(config, {"model.attn_implementation": "eager"})
    assert "attention workspace" not in memory.predict(eager, "bf16", window, on_gpu=True).breakdown
    assert on_gpu.reserved >= on_gpu.allocated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "engine", "stage", "changed"),
    representatives(
        [
            ("full", "fsdp", None, {"keep_whole": "all"}),
            ("lora", "ddp", None, {"context_parallel": 2}),
            ("full", "fsdp", None, {"keep_whole": False}),
            ("full", "ddp", None, {}),
            ("lora", "deepspeed", 2, {}),
        ],
        2,
    ),
)
def test_one_of_two_processes_takes_what_is_predicted(tmp_path, mode, engine, stage, changed):
    sizes = SIZES | {"hidden_size": 256, "vocab_size": 4096, "num_hidden_layers": 4}
    train = {"gradient_checkpointing": False, "engine": engine} | changed
    zero = stage and {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 500_000}
    if zero:
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        train |= {"deepspeed_config": str(file)}
    config = configured(tmp_path, LlamaConfig(**sizes), mode, **train)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    files = [str(tmp_path / name) for name in ("run.yaml", "peak")]
    forked.launch(2, ["tests/support/memory_worker.py", *files])
    (rows, _) = memory_worker.WINDOW.micro_batches
    group = sharding.Group(2, config.train.engine, accumulates=True, zero=zero or {})
    window = Window((rows,), gradients=True, shared_by=changed.get("context_parallel", 1))
    predicted = memory.predict(config, "fp32", window, on_gpu=False, group=group).allocated
    measured = int((tmp_path / "peak").read_text())
    assert 0.99 * measured < predicted < (1.02 if engine == "ddp" else 1.06) * measured


def sharded(config, train, **zero):
    """The breakdown of a step on one of 4 GPUs."""
    group = sharding.Group(4, config.train.engine, accumulates=True, zero=zero)
    window = Window((((100, 100),),), gradients=True)
    config = with_values(config, train)
    return memory.predict(config, "bf16", window, on_gpu=True, group=group).breakdown


@pytest.mark.parametrize(
    ("sizes", "each"),
    [
        ({"hidden_size": 128}, 4 * (32 + 2)),
        ({"hidden_size": 128, "head_dim": 66}, 4 * (96 + 2)),
        ({"hidden_size": 128, "num_key_value_heads": 2}, 4 * (32 + 2) + 4 * 32),
        ({"hidden_size": 128, "num_key_value_heads": 4}, 4 * (32 + 2)),
    ],
)
def test_flash_attention_keeps_gradients_by_head_and_token(sizes, each):
    shape = SimpleNamespace(num_attention_heads=4, **sizes)
    info = SimpleNamespace(sizes=shape, attention="sdpa", copies=3)
    window = Window((((10, 10), (7, 7)),))  # two rows of ten tokens, padding included
    assert memory._attention_workspace(info, "bf16", window) == 20 * 4 * 3 * each
    assert memory._attention_workspace(info, "fp32", window) == 0
    info.attention = "eager"
    assert memory._attention_workspace(info, "bf16", window) == 0


@pytest.mark.parametrize(("mode", "bytes_each"), [("full", 4), ("lora", 2)])
def test_the_closed_form_of_checkpointed_layers_keeps_their_inputs(tmp_path, mode, bytes_each):
    config = configured(tmp_path, DEEP["Llama"], mode, gradient_checkpointing=True)
    sizes = task_of(config).info(config).sizes
    parts = memory._closed_form(config, "bf16", Window((((10, 4), (7, 7)),)), False)
    units = 20 * sizes.hidden_size
    assert parts["activations"] == sizes.num_hidden_layers * bytes_each * units
    assert parts["backward"] == memory.ACTIVATION_BYTES["bf16"] * units
    assert parts["logits and loss"] == (4 + 7) * sizes.vocab_size * 12


@pytest.mark.parametrize(
    ("train", "zero", "offload", "hosted"),
    representatives(
        [
            (
                {"engine": "fsdp"},
                {},
                {"train.offload": True},
                {"weights", "optimizer", "gradients"},
            ),
            ({}, {"stage": 2, "reduce_bucket_size": 1000}, {}, {"optimizer", "gradients"}),
            ({}, {"stage": 3, "reduce_bucket_size": "auto"}, {}, {"optimizer", "gradients"}),
        ]
    ),
)
def test_what_lies_in_host_memory_is_not_the_gpus(
    tmp_path, monkeypatch, train, zero, offload, hosted
):
    def refuse(*_):
        raise NotImplementedError

    if zero:
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        train = {"engine": "deepspeed", "deepspeed_config": str(file)}
    config = configured(tmp_path, DEEP["Llama"], "full", gradient_checkpointing=True, **train)
    here = sharded(config, {}, **zero)
    more = {"offload_optimizer": {"device": "cpu"}} if zero else {}
    there = sharded(config, offload, **zero, **more)
    assert hosted - {"gradients"} < set(here)
    assert not hosted & set(there)
    monkeypatch.setattr(memory, "_trace", refuse)
    assert not hosted & set(sharded(config, offload, **zero, **more))
    assert sum(there.values()) < sum(here.values())


def test_buckets_that_accelerate_sizes(tmp_path):
    """Written out: the hidden size is 64."""
    config = configured(tmp_path, DEEP["Llama"], "full")
    sizes = dict.fromkeys(sharding.ZERO_SIZES, "auto") | {"stage3_max_live_parameters": 7}
    group = sharding.Group(2, "deepspeed", zero=sizes)
    assert [sharding._zero_size(config, group, key) for key in sizes] == [4096, 3686, 640, 7, 10**9]
    assert sharding._zero_size(config, sharding.Group(2), "reduce_bucket_size") == 500_000_000


@pytest.mark.thorough("copies by name in test_trace.py")
def test_bf16_copies_of_weights_live_only_where_autocast_keeps_them(tmp_path, monkeypatch):
    config = configured(tmp_path, DEEP["Llama"], "full", gradient_checkpointing=True)

    def forward(engine, caches=False):
        monkeypatch.setattr(dry_run, "keeps_weight_copies", lambda _: caches)
        other = with_values(config, {"train.engine": engine})
        trace = dry_run.trace_step(other, "bf16", uniform_window(1, 16, 16))
        return trace.peaks()["forward 1"].num_bytes

    layer = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)  # bytes in bf16; norms have no copy
    assert not ddp.keeps_weight_copies(config.train)
    assert forward("ddp") == forward("fsdp")
    more = forward("ddp", caches=True) - forward("fsdp", caches=True)
    assert 6 * layer < more <= 7 * layer  # those of the layer at work are there either way


@pytest.mark.thorough("what else a GPU keeps here")
@pytest.mark.slow
def test_dropout_on_a_gpu_keeps_booleans(tmp_path):
    plain = LlamaConfig(**SIZES | {"num_hidden_layers": 7, "num_key_value_heads": 4})
    config = configured(tmp_path, plain, "lora", gradient_checkpointing=False)
    with_dropout = with_values(config, {"tuning.lora_dropout": 0.1})
    window = uniform_window(2, 100, 1)

    def kept(on_gpu: bool) -> float:
        """Bytes that dropout adds, per token, layer and hidden unit."""
        traces = (
            dry_run.trace_step(each, "fp32", window, on_gpu=on_gpu).peaks()["loss 1"].num_bytes
            for each in (with_dropout, config)
        )
        return (next(traces) - next(traces)) / (200 * 64 * 7)

    inputs = 6 + 176 / 64  # of the hidden size: query, key, value, output, gate, up; and down
    masks = inputs - 3 / 7  # the first layer's query, key and value give no gradient back
    assert kept(False) - kept(True) == pytest.approx((4 - 1) * masks, rel=1e-6)
