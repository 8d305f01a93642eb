"""Mixtures of experts: adapters and NF4 of weights that no linear layer holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import families
import pytest
import test_parallel
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT, representatives
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, DbrxConfig, DeepseekV3Config, GptOssConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from sft.config.load import with_values
from sft.config.lora import Lora
from sft.config.schema import Config, Tuning
from sft.data import batches, template
from sft.errors import ModelError
from sft.models import adapt, checkpointing, export, load, routing
from sft.models.attention import documents_are_isolated
from sft.plan import memory
from sft.plan.counts import count_parameters
from sft.plan.dry_run import Window
from sft.serve.proof import dequantise
from sft.tasks.sft.shrink import small_model
from sft.tasks.sft.task import FineTune

CPU = torch.device("cpu")
IDS = torch.arange(2, 32)[None]
KINDS = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe"]
MORE = ["llama4_text", "jetmoe", "ernie4_5_moe"]


def mixture(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a tiny mixture whose weights are all far from zero, also those that begin at it."""
    model = families.tiny_model(kind, dtype, vocabulary=tiny.VOCAB, initializer_range=0.2)
    model.config.use_cache = False
    random = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=random, dtype=dtype)
    return model


def configured(path: Path, **tuning: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(path)},
            "tuning": {"r": 4} | tuning,
            "data": {"train_path": "none"},
            "train": {"output_dir": "none"},
        }
    )


def adapted(kind: str, folder: Path, **tuning: Any) -> Any:
    """Returns a mixture, loaded from files, whose adapters change what it computes."""
    if not folder.exists():
        mixture(kind).save_pretrained(folder)
    built = load.build(configured(folder, **tuning), "fp32", CPU)
    random = torch.Generator().manual_seed(3)
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return built


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", representatives(KINDS + MORE, 4))
def test_every_matrix_of_a_layer_has_an_adapter_that_plain_peft_loads(tmp_path, kind):
    built = adapted(kind, tmp_path / "base")
    found = gradients(built)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    with_adapter = {name.split(".lora_A")[0] for name in found if "lora_A" in name}
    for name, parameter in built.get_base_model().named_parameters():
        matrix = parameter.ndim > 1 and ("base_layer" in name or ".layers." in name)
        if "lora_" in name or not matrix or "bias" in name:
            continue
        is_router = ".gate.weight" in name or ".router." in name
        is_conv = ".conv.conv." in name
        owner = f"base_model.model.{name.split('.base_layer')[0]}"
        assert (owner in with_adapter) != (is_router or is_conv), name
    built.save_pretrained(tmp_path / "adapter")
    base = families.model_class(kind).from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(plain), logits(built), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert not config.get("rank_pattern")  # PEFT's own names would double the rank of experts


def test_names_of_transformers_4_mean_experts_and_layers_of_these_names(tmp_path):
    """PEFT alone would leave out the dense layer and the shared experts."""
    names = ["gate_proj", "up_proj", "down_proj"]
    built = adapted("deepseek_v3", tmp_path / "base", target_modules=names)
    owners = {n.split(".lora_A")[0].split("layers.")[1] for n in gradients(built) if "lora_A" in n}
    assert owners == {
        *(f"0.mlp.{name}" for name in names),
        *(f"1.mlp.shared_experts.{name}" for name in names),
        *("1.mlp.experts", "1.mlp.experts.base_layer"),
    }
    built.save_pretrained(tmp_path / "adapter")
    base = families.model_class("deepseek_v3").from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(plain), logits(built), rtol=1e-4, atol=1e-4)


def dequantised(built: Any, base: Any) -> Any:
    """Returns `base` with the weights that the quantised model `built` computes with."""
    plain = dict(base.named_parameters())
    for name, parameter in built.get_base_model().named_parameters():
        if "lora_" not in name:
            plain[name.replace("base_layer.", "")].data = dequantise(parameter)
    return base


@pytest.mark.parametrize("kind", [*KINDS, "llama4_text", "falcon"])
def test_the_gradient_of_qlora_is_that_on_dequantised_weights(tmp_path, kind):
    built = adapted(kind, tmp_path / "base", mode="qlora")
    stored = {
        name: parameter.dtype == torch.uint8
        for name, parameter in built.get_base_model().named_parameters()
        if "layers" in name and "lora_" not in name and parameter.ndim > 1 and "bias" not in name
    }
    left = {name for name, is_quantised in stored.items() if not is_quantised}
    assert all(".gate.weight" in n or ".router." in n or ".conv.conv." in n for n in left), left
    found = gradients(built)
    built.save_pretrained(tmp_path / "adapter")
    base = dequantised(built, families.model_class(kind).from_pretrained(tmp_path / "base"))
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    expected = gradients(plain)
    assert found.keys() == expected.keys()
    assert tiny.relative_error(list(found.values()), list(expected.values())) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_weights_quantised_while_they_are_read_equal_those_quantised_in_memory(tmp_path, kind):
    mixture(kind).save_pretrained(tmp_path)
    config = configured(tmp_path, mode="qlora").model
    read = load.load_base(config, "qlora", "fp32", CPU)
    made = families.model_class(kind).from_pretrained(tmp_path)
    load.quantise(made, torch.float32)
    others = dict(made.named_parameters())
    for name, parameter in read.named_parameters():
        assert torch.equal(parameter, others[name]), name


@pytest.mark.parametrize("kind", [True, "selective"])
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_gradient_checkpointing_changes_no_gradient_of_experts(tmp_path, mode, kind):
    built = adapted("qwen3_moe", tmp_path / "base", mode=mode).train()
    expected = gradients(built)
    checkpointing.enable(built, kind)
    found = gradients(built)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        built.eval()
        logits(built)
    for name, gradient in gradients(built.train()).items():
        assert torch.equal(gradient, found[name]), name


def test_an_adapter_of_experts_can_be_switched_off(tmp_path):
    built = adapted("qwen3_moe", tmp_path / "base", mode="qlora")
    with built.disable_adapter():
        alone = logits(built)
    assert not torch.equal(alone, logits(built))
    base = load.load_base(configured(tmp_path / "base").model, "qlora", "fp32", CPU)
    assert torch.equal(alone, logits(base))


@pytest.mark.slow
@pytest.mark.parametrize("kind", representatives(KINDS, 2))
def test_any_cut_of_a_mixture_gives_the_same_loss_and_gradient(tmp_path, kind):
    rows = tiny.examples(4, 8)
    settings = tiny.config(tmp_path, global_batch=len(rows))
    tuning = settings.tuning.model_copy(update={"mode": "lora", "r": 4})
    settings = settings.model_copy(update={"tuning": tuning})

    def fresh() -> nn.Module:
        base = mixture(kind, torch.float64)
        base.set_experts_implementation("eager")  # the others do not compute in fp64
        return tiny.adapted(settings, torch.float64, base)

    reference = fresh()
    loss, expected = tiny.reference(reference, rows)
    can_pack = documents_are_isolated(reference, "fp32", CPU)  # the run refuses it otherwise
    assert can_pack == (kind != "gpt_oss")
    for layout in ("padded", "packed") if can_pack else ("padded",):
        for max_tokens in (1, 60, 10_000):
            model = fresh()
            budget = batches.Budget(max_tokens, layout)  # type: ignore[arg-type]
            values = tiny.make_engine(model, rows, rows, settings, budget).optimizer_step()
            assert values["train/loss"] == pytest.approx(loss, rel=1e-7)  # some route in fp32
            found = [p.grad for p in model.parameters() if p.requires_grad]
            assert tiny.relative_error(found, expected) < 1e-7, (layout, max_tokens)


def balanced_reference(model: Any, rows: list[Any]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the whole batch at once, with the balancing of transformers itself."""
    outputs = [model(input_ids=torch.tensor([r.ids]), output_router_logits=True) for r in rows]
    routes = tuple(
        torch.cat(each) for each in zip(*(o.router_logits for o in outputs), strict=True)
    )
    config = model.config
    balance: Any = load_balancing_loss_func(
        routes, routes[0].shape[-1], config.num_experts_per_tok, None
    )
    number = sum(row.num_supervised for row in rows)
    losses = [
        F.cross_entropy(
            output.logits[0, :-1],
            torch.tensor(row.labels[1:]),
            ignore_index=template.IGNORED,
            reduction="sum",
        )
        for output, row in zip(outputs, rows, strict=True)
    ]
    loss = sum(losses) / number + config.router_aux_loss_coef * balance  # type: ignore[operator]
    loss.backward()
    return float(loss), [p.grad for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe"])
def test_any_cut_gives_the_balancing_loss_of_the_global_batch(tmp_path, kind):
    saved = mixture(kind, torch.float64)
    saved.config.router_aux_loss_coef = 0.5
    saved.save_pretrained(tmp_path / "base")
    rows = tiny.examples(4, 8)
    changes = {"model.name": str(tmp_path / "base"), "tuning.router": "trained"}
    settings = with_values(tiny.config(tmp_path / "run", global_batch=len(rows)), changes)

    def fresh() -> Any:
        model = mixture(kind, torch.float64)
        model.config.router_aux_loss_coef = 0.5
        model.set_experts_implementation("eager")
        return model

    loss, expected = balanced_reference(fresh(), rows)
    layouts: Any = ("padded",) if kind == "gpt_oss" else ("padded", "packed")
    for layout in layouts:
        for max_tokens in (1, 60, 10_000):
            model = fresh()
            budget = batches.Budget(max_tokens, layout)
            engine = tiny.make_engine(model, rows, rows, settings, budget)
            values = engine.optimizer_step()
            assert values["train/loss"] == pytest.approx(loss, rel=1e-7)
            assert values["train/balance"] > 1
            found = [p.grad for p in model.parameters()]
            assert tiny.relative_error(found, expected) < 1e-7, (layout, max_tokens)
    plain = engine.task.evaluate(engine.model)["loss"]
    assert plain < loss - 0.4  # what is held out is measured without it


def test_a_coefficient_in_a_section_of_the_configuration_is_found():
    experts = {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    config = DbrxConfig(
        **{"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": tiny.VOCAB, "max_seq_len": 64},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config=experts | {"moe_loss_weight": 0.05},
    )
    found = routing.balance_of(config)
    assert found == routing.Balance(0.05, 2)
    output = tiny.build(config)(input_ids=IDS, output_router_logits=True)
    logits = routing.logits_of(output, torch.arange(IDS.numel()))
    share = found.share(logits, found.count(logits, [IDS.numel()]).sum(0))
    assert float(share) == pytest.approx(float(output.aux_loss), rel=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3", "granitemoe"])
def test_a_checkpoint_of_all_weights_is_read_as_transformers_wrote_it(tmp_path, kind):
    """Files hold one tensor for each expert; the model has one parameter for all."""
    model = mixture(kind)
    model.save_pretrained(tmp_path)
    own = dict(model.named_parameters())
    in_files = load_file(tmp_path / "model.safetensors").keys()
    assert not own.keys() <= in_files
    found = dict(export.read_weights(model, tmp_path))
    assert found.keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in found.items())


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_an_adapter_without_its_run_is_put_on_its_base(tmp_path, kind):
    built = adapted(kind, tmp_path / "base")
    built.save_pretrained(tmp_path / "adapter")
    base = load.load_base(configured(tmp_path / "base").model, "lora", "fp32", CPU)
    found = FineTune.with_adapter(base, str(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(found), logits(built))


@pytest.mark.slow
def test_the_plan_counts_all_experts_for_memory_and_chosen_ones_for_time(tmp_path):
    """Three layers of Qwen3-30B-A3B. Its 48 take 15.5 GiB in NF4, and 57 if experts are left."""
    config = Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        num_hidden_layers=3,
    )
    config.save_pretrained(tmp_path)
    expert, attention, router, table = 3 * 2048 * 768, 18_874_368, 128 * 2048, 151936 * 2048
    norms = 3 * (2 * 2048 + 2 * 128) + 2048
    counts = count_parameters(configured(tmp_path, mode="full"))
    assert counts.parameters == 3 * (128 * expert + attention + router) + 2 * table + norms
    assert counts.multiplied == 3 * (8 * expert + attention + router) + table + norms
    settings = configured(tmp_path, mode="qlora")
    found = memory.predict(settings, "bf16", Window((((64, 8),),)), on_gpu=True)
    assert found.method == "traced"
    weights = found.breakdown["weights"] + found.breakdown["quantisation state"]
    quantised = 3 * (128 * expert + attention) * memory.NF4_BYTES
    assert weights == pytest.approx(quantised + 2 * (2 * table + 3 * router), rel=0.005)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text", "jetmoe"])
def test_a_router_is_trained_if_it_is_asked_for(tmp_path, kind):
    """Routers are parameters, linear layers, or linear layers with a result of their own."""

    def routers(model: Any) -> dict[str, bool]:
        named = model.named_parameters()
        return {n: p.requires_grad for n, p in named if ".gate." in n or ".router." in n}

    frozen = adapted(kind, tmp_path / "base")
    assert routers(frozen)
    assert not any(routers(frozen).values())
    built = adapted(kind, tmp_path / "base", router="trained")
    found = gradients(built)
    own = {name for name, is_trained in routers(built).items() if is_trained}
    assert own
    assert all("lora_" in name and found[name].abs().max() > 0 for name in own)
    built.save_pretrained(tmp_path / "adapter")
    base = families.model_class(kind).from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(plain), logits(built), rtol=1e-4, atol=1e-4)
    for router, expected in (("frozen", False), ("trained", True)):
        whole = load.build(configured(tmp_path / "base", mode="full", router=router), "fp32", CPU)
        assert set(routers(whole).values()) == {expected}
        assert all(p.requires_grad for n, p in whole.named_parameters() if n not in routers(whole))


FEW_RUNS = {  # (kind, mode): the engine of the run on two processes
    ("qwen3_moe", "lora"): "fsdp",
    ("deepseek_v3", "full"): "ddp",
}
MORE_RUNS = {
    ("qwen3_moe", "qlora"): "ddp",
    ("deepseek_v3", "qlora"): "fsdp",
    ("gpt_oss", "qlora"): "zero3",  # behind the others: a process keeps DeepSpeed's settings
    ("qwen3_moe", "full"): "zero2",
}


@pytest.mark.slow
@pytest.mark.parametrize("these", representatives([FEW_RUNS, MORE_RUNS]), ids=["few", "more"])
def test_two_processes_and_resumed_runs_end_as_one_process_does(tmp_path, these):
    """Laws 1 and 2, for routers that are trained in mode full, too."""
    for kind in {kind for kind, _ in these}:
        base = families.tiny_model(kind, initializer_range=0.1)
        base.save_pretrained(tmp_path / kind)
        AutoTokenizer.from_pretrained(ROOT / "nano/model").save_pretrained(tmp_path / kind)

    def named(kind: str, mode: str, engine: str, world: int, resume: str = "") -> dict[str, Any]:
        short = {"steps": 3, "save_at": [] if resume else [2], "max_tokens": 300}
        made = test_parallel.case(mode, engine, world, resume, prove=True, **short)
        made["name"] = f"{kind}-{made['name']}"
        made["overrides"] += [f"model.name={tmp_path / kind}", "train.gradient_checkpointing=true"]
        made["overrides"] += ["tuning.router=trained"] if mode == "full" else []
        return made

    one, two = [], []
    for (kind, mode), engine in these.items():
        first = named(kind, mode, "ddp", 1)
        saved = str(tmp_path / first["name"] / "checkpoint_step_2")
        one += [first, named(kind, mode, "ddp", 1, saved)]
        two += [named(kind, mode, engine, 2), named(kind, mode, engine, 2, saved)]
    test_parallel.run(tmp_path, 1, one)
    test_parallel.run(tmp_path, 2, two)
    for (kind, mode), engine in these.items():
        reference = f"{kind}-{mode}-ddp-1"
        [expected] = test_parallel.found(tmp_path, reference)
        test_parallel.assert_bit_equal(tmp_path, f"{reference}-resumed", reference)
        for name in (f"{kind}-{mode}-{engine}-2", f"{kind}-{mode}-{engine}-2-resumed"):
            assert test_parallel.difference(tmp_path, name, reference) < 1e-5, name
            for rank in test_parallel.found(tmp_path, name):
                assert rank["world_size"] == 2
                assert rank["held_out"] == pytest.approx(expected["held_out"], rel=1e-5), name
                losses = [float.fromhex(loss) for _, _, loss in rank["steps"]]
                wanted = [float.fromhex(loss) for _, _, loss in expected["steps"]]
                assert losses == pytest.approx(wanted[-len(losses) :], rel=1e-5), name


def test_all_weights_of_experts_compute_in_the_dtype_of_autocast(tmp_path, monkeypatch):
    """No product of experts casts by itself, so they would compute in fp32."""
    mixture("qwen3_moe").save_pretrained(tmp_path)
    built = load.build(configured(tmp_path, mode="full"), "bf16", CPU)
    seen, product = [], F.grouped_mm

    def grouped(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((x.dtype, weight.dtype))
        return product(x, weight, **options)

    monkeypatch.setattr(F, "grouped_mm", grouped)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(built)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_dropout_of_experts_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"tuning.lora_dropout: .* found 0.1: set 0"):
        adapted("qwen3_moe", tmp_path / "base", lora_dropout=0.1)


def names_of_adapters(kind: str, **tuning: Any) -> dict[str, int]:
    """Returns the ranks of the adapters of a mixture, by the name of a matrix."""
    with torch.device("meta"):
        base: Any = mixture(kind).requires_grad_(False)
        own = Tuning(r=4, **tuning)
        built = adapt.add_adapters(base, own)
        adapt.refuse_unused(built, own)
    found = adapt.adapted_layers(built.get_base_model())
    return {name.removeprefix("model.layers."): layer.r["default"] for name, layer in found}


def test_what_is_chosen_of_layers_also_holds_for_experts():
    """PEFT itself looks for parameters neither at layers nor at what is excluded."""
    every = names_of_adapters("qwen3_moe")
    assert "0.mlp.experts.gate_up_proj" in every
    found = names_of_adapters("qwen3_moe", lora=Lora(layers_to_transform=[1]))
    assert found == {name: rank for name, rank in every.items() if name.startswith("1.")}
    for excluded in (["experts"], r".*experts.*"):
        found = names_of_adapters("qwen3_moe", lora=Lora(exclude_modules=excluded))
        assert found == {name: rank for name, rank in every.items() if "experts" not in name}
    found = names_of_adapters("qwen3_moe", lora=Lora(exclude_modules=["down_proj"]))
    assert found.keys() == {name for name in every if "down_proj" not in name}


@pytest.mark.parametrize(
    ("kind", "pattern", "name"),
    [
        ("qwen3_moe", "gate_up_proj", "1.mlp.experts.gate_up_proj"),
        ("qwen3_moe", r"1\.mlp\.experts\.down_proj", "1.mlp.experts.down_proj"),
        ("deepseek_v3", r".*(q_b|up)_proj", "1.mlp.shared_experts.up_proj"),
    ],
)
def test_a_pattern_of_ranks_matches_parameters_by_the_names_of_their_layers(kind, pattern, name):
    ranks = names_of_adapters(kind, lora=Lora(rank_pattern={pattern: 2}))
    own = re.compile(rf"(.*\.)?({pattern})")
    assert ranks[name] == 2
    assert ranks == {each: 2 if own.fullmatch(each) else 4 for each in ranks}


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}]
)
def test_what_peft_cannot_do_with_experts_is_refused(lora):
    with pytest.raises(ModelError, match="is a parameter of experts: name the linear layers"):
        names_of_adapters("qwen3_moe", lora=Lora(**lora))
    assert names_of_adapters("qwen3_moe", lora=Lora(**lora), target_modules=["q_proj"])


def test_names_that_peft_cannot_convert_are_one_sentence():
    with pytest.raises(ModelError, match="PEFT cannot add these adapters: Cannot convert"):
        names_of_adapters("deepseek_v3", target_modules=["up_proj"])


def test_a_weight_that_another_module_reads_is_left_as_it_is(tmp_path):
    """Mamba reads the weight of `dt_proj` alone: in 4 bits it would be bytes, an adapter idle."""
    built = adapted("jamba", tmp_path / "base", mode="qlora")
    found = gradients(built)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    named = dict(built.named_parameters())
    assert not [name for name in found if "dt_proj" in name]
    assert {p.dtype for n, p in named.items() if "dt_proj" in n} == {torch.float32}


def test_a_router_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"tuning.router: .* found a model that chooses none; set"):
        adapted("llama", tmp_path / "base", router="trained")


@pytest.mark.parametrize("kind", [Qwen3MoeConfig, DeepseekV3Config, GptOssConfig])
def test_the_small_model_of_a_mixture_has_few_narrow_experts(tmp_path, kind):
    kind(vocab_size=1024).save_pretrained(tmp_path)
    built, changes = small_model(configured(tmp_path))
    assert sum(p.numel() for p in built.parameters()) < 5_000_000, changes
    named = built.named_parameters()
    assert {len(p) for name, p in named if name.endswith("experts.down_proj")} == {4}
