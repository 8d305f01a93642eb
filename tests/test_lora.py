"""Every setting of `tuning.lora`: trained, resumed, saved, loaded by PEFT, merged, planned."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import representatives
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from sft.config.adapters import adapter_tuning
from sft.config.load import load_config, with_values
from sft.config.lora import REFUSED, Lora
from sft.config.schema import Config, Model, Tuning
from sft.data import batches, cache
from sft.errors import ConfigError, MergeError, ModelError
from sft.models import adapt, dtypes, eva, export, layers, load
from sft.models.fake import set_attributes
from sft.models.quantise import keep_nf4_trainable
from sft.plan import dry_run
from sft.runtime import processes
from sft.runtime.processes import Context
from sft.serve import merge, proof
from sft.tasks.sft.task import FineTune

CPU = torch.device("cpu")
IDS = torch.arange(2, 20)[None]
# Each is trained on a tiny Llama with biases.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa of ranks": {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"q_proj": 2}},
    "olora": {"init_lora_weights": "olora", "use_rslora": True, "use_dora": True},
    "exclude_modules": {"exclude_modules": ["down_proj"]},
    "exclude by regex": {"exclude_modules": r".*\.0\..*"},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"1\.mlp\.\w+": 2.5}},
    "ranks of rslora": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings, head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "tokens by module": {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
    "all biases": {"bias": "all"},
    "biases": {"bias": "lora_only", "use_dora": True},
    "bias of B": {"lora_bias": True},
    "pissa of embeddings": {
        "init_lora_weights": "pissa",
        "target_modules": ["embed_tokens", "q_proj"],
    },
}
TIED = {
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embeddings alone": {"modules_to_save": ["embed_tokens"]},
    "adapter of the head": {"target_modules": ["lm_head", "q_proj"]},
    "tokens": {"trainable_token_indices": [1, 5], "ensure_weight_tying": True},
}
CASES = [pytest.param(False, lora, id=name) for name, lora in FEATURES.items()]
CASES += [pytest.param(True, lora, id=f"tied: {name}") for name, lora in TIED.items()]
FEW = ["plain", "dora", "ranks", "tokens", "biases", "tied: embeddings"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[bool, Path]:
    folders = {tied: tmp_path_factory.mktemp("base") for tied in (False, True)}
    for tied, folder in folders.items():
        built = tiny.llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
        built.save_pretrained(folder)  # type: ignore[operator]
    return folders


def configured(base: Path, folder: Path, lora: dict[str, Any], **values: Any) -> Config:
    changes = {"model.name": str(base), "tuning.mode": "lora", "tuning.r": 4}
    targets = {f"tuning.{key}": value for key, value in lora.items() if key == "target_modules"}
    own = {f"tuning.lora.{key}": value for key, value in lora.items() if key != "target_modules"}
    config = tiny.config(folder, learning_rate=0.02, max_steps=3, epochs=9.0)
    return with_values(config, {**changes, **targets, **own, **values})


def engine_of(config: Config) -> Any:
    built = FineTune.build_model(config, "fp32", CPU)
    rows = tiny.examples(0, 16)
    return tiny.make_engine(built, rows, rows[:2], config, batches.Budget(4096, "padded"))


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def saved_state(engine: Any) -> dict[str, torch.Tensor]:
    """Returns the trained weights and what the optimizer knows of them."""
    found = {name: p.detach().clone() for name, p in engine.parallel.trained.items()}
    for shard in engine.parallel.optimizer_shards():
        found |= {f"{shard.name} {key}": value.clone() for key, value in shard.state.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "lora"), representatives(CASES, FEW))
def test_each_setting_trains_resumes_saves_loads_and_merges(bases, tmp_path, tied, lora):
    base = bases[tied]
    engine = engine_of(config := configured(base, tmp_path / "run", lora))
    before = logits(engine.model)
    engine.model.train()
    engine.optimizer_step()
    engine.step = 1
    checkpoint = engine.save()
    engine.optimizer_step()
    expected = saved_state(engine)
    assert all(p.dtype == torch.float32 for p in engine.parallel.trained.values())
    assert all(p.grad is not None for p in engine.parallel.trained.values())

    resumed = engine_of(config)
    resumed.read(checkpoint)
    resumed.optimizer_step()
    found = saved_state(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    folder = tmp_path / "adapter"
    export.save(engine.model, tiny.Tokenizer(), folder, engine.parallel.weights())  # type: ignore[arg-type]
    trained = logits(engine.model)
    assert (trained - before).abs().max() > 1e-3
    by_peft = PeftModel.from_pretrained(load_base(base), str(folder))
    torch.testing.assert_close(logits(by_peft), trained, atol=1e-4, rtol=1e-4)
    logits(FineTune.with_adapter(load_base(base, torch.bfloat16), str(base), folder))
    own = FineTune.with_adapter(load_base(base), str(base), folder)
    torch.testing.assert_close(logits(own), trained, atol=1e-4, rtol=1e-4)
    other = FineTune.with_adapter(load_base(base), str(base), folder)
    check_merge(own, other, tmp_path / "merged")
    check_plan(config, engine)


def check_merge(adapted: Any, other: Any, folder: Path) -> None:
    """Checks that the proof accepts what PEFT merges, and nothing else."""
    merge.merge_weights(other).save_pretrained(folder)
    merged, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)
    checks = proof._compare_tensors(adapted, merged, loading, "fp32")
    assert proof.failing_checks({"checks": checks}) == []
    changed = next(p for name, p in merged.named_parameters() if "layers.1.self_attn" in name)
    changed.data[0] *= 1.01
    checks = proof._compare_tensors(adapted, merged, loading, "fp32")
    assert proof.failing_checks({"checks": checks}) == ["weights"]


def refuse_copy(parameter: torch.Tensor, _: Any) -> None:
    """A copy of a fake weight damages memory: a run with modules_to_save died of it, anywhere."""
    raise AssertionError(f"copied {parameter}")


def check_plan(config: Config, engine: Any) -> None:
    """Checks that the plan counts the trained weights of the run."""
    skeleton = FineTune.skeleton(config)
    planned = {name: p.shape for name, p in layers.weights_to_save(skeleton).items()}
    assert planned == {name: p.shape for name, p in engine.parallel.saved.items()}
    others = {"use_dora", "modules_to_save", "trainable_token_indices", "bias"}
    given = config.tuning.lora.model_dump(exclude_defaults=True).keys()
    if config.tuning.mode == "qlora" or others & given:  # the others compute as plain adapters
        with set_attributes(torch.nn.Parameter, __deepcopy__=refuse_copy):
            assert dry_run.trace_step(config, "bf16", dry_run.Window((((20, 9),),))).phases


def test_an_adapter_that_peft_cannot_merge_is_one_sentence():
    adapted = adapt.add_adapters(tiny.llama(), Tuning(lora=Lora(lora_bias=True)))
    with pytest.raises(MergeError, match="use it as it is: Impossible to merge LoRA with `lora_b"):
        merge.merge_weights(adapted)


ON_4_BITS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "loftq": {"init_lora_weights": "loftq"},
    "rslora": {"init_lora_weights": "gaussian", "use_rslora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "head and biases": {"modules_to_save": ["lm_head"], "bias": "lora_only"},
    "tokens": {"trainable_token_indices": [1, 5]},
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", representatives(ON_4_BITS.values(), 2), ids=ON_4_BITS)
def test_settings_train_and_load_on_a_base_in_4_bits(bases, tmp_path, lora):
    base = bases[False]
    mode = {"tuning.mode": "qlora", "tuning.lora_alpha": 4.0}
    engine = engine_of(config := configured(base, tmp_path / "run", lora, **mode))
    engine.optimizer_step()
    folder = tmp_path / "adapter"
    export.save(engine.model, tiny.Tokenizer(), folder, engine.parallel.weights())  # type: ignore[arg-type]
    for load_adapter in (
        FineTune.with_adapter,
        lambda model, _, at: PeftModel.from_pretrained(model, at),
    ):
        quantised = load.load_base(Model(name=str(base)), "qlora", "fp32", CPU)
        own = load_adapter(quantised, str(base), folder)
        torch.testing.assert_close(logits(own), logits(engine.model), atol=1e-4, rtol=1e-4)
    check_plan(config, engine)


def test_loftq_begins_nearer_to_the_whole_base(bases, tmp_path):
    base, mode = bases[False], {"tuning.mode": "qlora", "tuning.r": 16, "tuning.lora_alpha": 16.0}
    whole = logits(load_base(base))
    errors = []
    for init in (True, "loftq"):
        config = configured(base, tmp_path, {"init_lora_weights": init}, **mode)
        errors.append((logits(FineTune.build_model(config, "fp32", CPU)) - whole).norm())
    assert errors[1] < 0.8 * errors[0]


def built_by_eva(base: Path, folder: Path, tokens: int, **values: Any) -> Any:
    config = configured(base, folder, {"init_lora_weights": "eva"}, **values)
    rows = tiny.stored(tiny.examples(0, 16))
    prepared = cache.Prepared(tiny.Tokenizer(), rows, rows, tiny.AUDIT)  # type: ignore[arg-type]
    context = Context(processes.start_processes(config.train))
    return FineTune.build(config, prepared, "fp32", batches.Budget(tokens, "padded"), context)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_eva_begins_with_the_directions_of_the_inputs_for_every_cut(bases, tmp_path, mode):
    values = {"tuning.mode": mode, "tuning.target_modules": ["q_proj", "up_proj"], "tuning.r": 2}
    task = built_by_eva(bases[False], tmp_path, 4096, **values)
    found = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
    other = built_by_eva(bases[False], tmp_path, 60, **values).model
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in found.items())
    assert task.model.peft_config["default"].rank_pattern == {}
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in task.model.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            keep = inputs.setdefault(f"{name}.lora_A.default.weight", [])
            module.register_forward_hook(lambda _, given, __, keep=keep: keep.append(given[0][0]))
    with torch.no_grad():
        for row in task.prepared.train:
            task.model.get_base_model()(input_ids=torch.tensor([row.ids]))
    for name, given in inputs.items():
        rows = torch.cat(given)
        centred = rows - rows.mean(0)
        most = torch.linalg.svdvals(centred)[:2].square().sum()
        explained = (centred @ found[name].detach().T).square().sum()
        assert explained > 0.99 * most, name
    assert not any(p.any() for name, p in found.items() if "lora_B" in name)
    assert len(found) == 8


@pytest.mark.parametrize(
    "lora", [{"trainable_token_indices": [1]}, {"use_dora": True, "modules_to_save": ["norm"]}]
)
def test_eva_leaves_what_is_no_adapter_of_a_linear_layer(bases, tmp_path, lora):
    targets = {"tuning.target_modules": ["q_proj", "lm_head"]}
    targets = targets if "use_dora" in lora else {"tuning.target_modules": ["q_proj"]}
    own = {f"tuning.lora.{key}": value for key, value in lora.items()}
    by_eva = built_by_eva(bases[False], tmp_path, 4096, **targets, **own).model
    plain = FineTune.build_model(configured(bases[False], tmp_path, lora, **targets), "fp32", CPU)
    begun = dict(by_eva.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, begun[name]) == ("lora_A" not in name), name
        assert parameter.requires_grad == begun[name].requires_grad


def test_eva_that_does_not_settle_is_refused(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(eva, "MAX_PASSES", 1)
    with pytest.raises(ModelError, match="eva found no 4 directions that stay the same in 1"):
        built_by_eva(bases[False], tmp_path, 4096)


# -- the section


def problem(tmp_path: Path, *overrides: str) -> str:
    """Returns the message about a configuration with these overrides; "" if it is accepted."""
    given = ["model.name=m", "data.train_path=d", f"train.output_dir={tmp_path}", *overrides]
    try:
        load_config(None, given)
    except ConfigError as error:
        return str(error)
    return ""


def test_every_key_of_peft_is_supported_or_refused_with_a_reason():
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    shared = {"r", "lora_alpha", "lora_dropout", "target_modules"}
    assert known == {*Lora.model_fields, *REFUSED, *shared}
    assert not Lora.model_fields.keys() & REFUSED.keys()


def test_defaults_are_those_of_peft():
    own = Lora().model_dump()
    assert own == {key: getattr(LoraConfig(), key) for key in own}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_is_not_supported_is_refused_with_the_reason(tmp_path, key):
    expected = f"tuning.lora.{key} (override): not supported: {REFUSED[key]}"
    assert expected in problem(tmp_path, f"tuning.lora.{key}=1")


REFUSALS = [
    (["tuning.lora.use_rs_lora=true"], "did you mean use_rslora?"),
    (["tuning.use_dora=true"], "did you mean tuning.lora.use_dora?"),
    (["train.use_dora=true"], "did you mean tuning.lora.use_dora?"),
    (["tuning.r=8", "tuning.lora.r=4"], "r is 8 here and 4 in tuning.lora; remove one"),
    (["tuning.lora.init_lora_weights=pisa"], "expected true, false, gaussian"),
    (["tuning.lora.init_lora_weights=corda"], "corda: it needs"),
    (["tuning.lora.init_lora_weights=pissa", "tuning.mode=qlora"], "would be quantised once more"),
    (["tuning.lora.init_lora_weights=loftq"], "set tuning.mode: qlora"),
    (["tuning.lora.init_lora_weights=loftq", "tuning.mode=qlora"], "lora_alpha equal to r"),
    (["tuning.lora.init_lora_weights=orthogonal", "tuning.r=3"], "needs an even tuning.r"),
    (
        ["tuning.lora.init_lora_weights=eva", "tuning.lora.rank_pattern={q_proj: 2}"],
        "patterns of its own",
    ),
    (
        [f"tuning.lora.{each}" for each in ("init_lora_weights=olora", "use_rslora=true")]
        + ["tuning.lora.rank_pattern={q_proj: 2}"],
        "PEFT cannot express what is learnt",
    ),
    (
        ["tuning.lora.use_dora=true", "tuning.mode=full"],
        "only read with tuning.mode: lora or",
    ),
    (["tuning.lora.lora_bias=true", "tuning.lora.use_dora=true"], "DoRA has no bias"),
    (["tuning.lora.layers_pattern=h"], "read with layers_to_transform only"),
    (
        ["tuning.lora.layers_to_transform=1", "tuning.target_modules='.*q'"],
        "the layers itself",
    ),
    (["tuning.lora.target_parameters=[w]", "tuning.lora_dropout=0.1"], "leave them out"),
    (["tuning.target_modules=q_proj"], "did you mean [q_proj]?"),
    (["tuning.target_modules='(q'"], "expected a regular expression"),
    (["tuning.lora.rank_pattern={'(q': 2}"], "expected a regular expression"),
    (["tuning.lora.bias=some"], "expected none or all or lora_only"),
    (["tuning.lora.use_dora=true", "crowd.num_agents=2"], "agents are plain LoRA adapters"),
]


@pytest.mark.parametrize(("overrides", "reported"), REFUSALS)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(tmp_path, overrides, reported):
    assert reported in problem(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tuning.lora.r=4", "tuning.lora.target_modules=[q]"], {"r": 4, "target_modules": ["q"]}),
        (["tuning.r=4", "tuning.lora.r=4"], {"r": 4}),
        (["tuning.target_modules=all-linear"], {"target_modules": "auto"}),
        (["--use_dora"], {"lora": Lora(use_dora=True)}),
        (["--tuning.lora.use_dora", "true"], {"lora": Lora(use_dora=True)}),
    ],
)
def test_keys_of_peft_may_stand_in_either_place(tmp_path, overrides, expected):
    given = ["model.name=m", "data.train_path=d", f"train.output_dir={tmp_path}", *overrides]
    found = load_config(None, given).tuning
    assert {key: getattr(found, key) for key in expected} == expected


def test_runs_without_the_section_have_the_identity_that_they_had():
    before = '{"mode":"lora","r":16,"lora_alpha":32.0,"lora_dropout":0.0,"target_modules":"auto"}'
    assert Tuning().identity() == before
    assert json.loads(Tuning(lora=Lora(use_dora=True)).identity())["lora"] == {"use_dora": True}


@pytest.mark.parametrize(
    ("lora", "reported"),
    [
        ({"rank_pattern": {"q_prj": 2}}, "q_prj names nothing in this model; did you mean q_proj?"),
        ({"alpha_pattern": {"lm_head": 2.0}}, "alpha_pattern: lm_head names nothing"),
        ({"modules_to_save": ["lm_haed"]}, "did you mean lm_head?"),
        ({"exclude_modules": ["mlp.up"]}, "exclude_modules: mlp.up names nothing"),
        ({"layers_to_transform": [0, 2]}, "no layer 2 got an adapter; layers with one: 0"),
        ({"trainable_token_indices": {"wte": [1]}}, "Target modules {'wte'} not found"),
        ({"trainable_token_indices": [99]}, "expected token ids below 61"),
        ({"init_lora_weights": "pissa"}, "a rank of 16 at most, found 20"),
        (
            {"init_lora_weights": "olora", "rank_pattern": {"[kv]_proj": 4, "up_proj": 33}},
            "gives model.layers.0.mlp.up_proj a rank of 32 at most, found 33",
        ),
        ({"exclude_modules": ".*up"}, "exclude_modules: .*up matches the whole name of no"),
        ({"target_parameters": ["mlp.upproj.weight"]}, "did you mean mlp.up_proj.weight?"),
    ],
)
def test_a_name_that_is_nothing_in_the_model_is_refused(lora, reported):
    tuning = Tuning(r=20, lora=Lora(**lora))
    with pytest.raises(ModelError, match=re.escape(reported)):
        adapt.refuse_unused(adapt.add_adapters(tiny.llama(), tuning), tuning)


GPT2 = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=tiny.VOCAB, initializer_range=0.2)


@pytest.mark.parametrize(
    ("tuning", "reported"),
    [
        (Tuning(lora=Lora(init_lora_weights="olora")), "takes transformer.h.0.attn.c_attn, whose"),
        (Tuning(r=3, lora=Lora(init_lora_weights="orthogonal")), "even"),
        (
            Tuning(target_modules=["wte", "c_fc"], lora=Lora(ensure_weight_tying=True)),
            "not lm_head here: remove this key",
        ),
    ],
)
def test_what_peft_makes_wrong_is_refused_by_run_and_plan(tuning, reported):
    with pytest.raises(ModelError, match=re.escape(reported)):
        adapt.add_adapters(tiny.build(GPT2), tuning)
    with torch.device("meta"), pytest.raises(ModelError, match=re.escape(reported)):
        adapt.add_adapters(tiny.build(GPT2), tuning)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_adapters_that_share_memory_are_refused(device):
    tuning = Tuning(target_modules=["embed_tokens"], lora=Lora(ensure_weight_tying=True))
    with torch.device(device), pytest.raises(ModelError, match="would update twice"):
        adapt.add_adapters(tiny.llama(tie_word_embeddings=True), tuning)


def test_loftq_fits_weights_that_are_stored_as_in_out(tmp_path):
    base = tiny.build(GPT2)
    base.save_pretrained(tmp_path)  # type: ignore[operator]
    mode = {"tuning.mode": "qlora", "tuning.r": 16, "tuning.lora_alpha": 16.0}
    errors = []
    for init in (True, "loftq"):
        config = configured(tmp_path, tmp_path, {"init_lora_weights": init}, **mode)
        errors.append((logits(FineTune.build_model(config, "fp32", CPU)) - logits(base)).norm())
    assert errors[1] < 0.8 * errors[0]


def test_a_module_in_4_bits_cannot_be_copied_and_trained(bases, tmp_path):
    mode = {"tuning.mode": "qlora", "tuning.target_modules": ["q_proj"]}
    config = configured(bases[False], tmp_path, {"modules_to_save": ["v_proj"]}, **mode)
    with pytest.raises(ModelError, match=r"layers.0.self_attn.v_proj is stored in 4 bits"):
        FineTune.build_model(config, "fp32", CPU)
    with pytest.raises(ModelError, match=r"layers.0.self_attn.v_proj is stored in 4 bits"):
        dry_run.trace_step(config, "fp32", dry_run.Window((((20, 9),),)))


# -- files from elsewhere


VALUES = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"kasa_config": {"beta": 1.0}},
        {"layer_replication": [[0, 2]]},
        {"a_key_of_tomorrow": 3},
        {"init_lora_weights": "loftq"},
        {"target_modules": None},
        *({key: value} for key in (*VALUES, *Lora.model_fields) for value in ({"a": {}}, [[1]])),
    ],
)
def test_only_known_keys_of_known_types_are_read(changes):
    with pytest.raises((ValueError, KeyError)):
        adapter_tuning(VALUES | changes)


def test_what_changes_nothing_in_a_loaded_adapter_is_not_read():
    inert = {"auto_mapping": {"parent_library": "os"}, "lora_dropout": 0.1, "qalora_group_size": 16}
    found = adapter_tuning(VALUES | inert | {"init_lora_weights": "eva", "use_dora": False})
    assert found == Tuning(r=4, lora_alpha=8.0, target_modules=["q_proj"])


# -- bases that come quantised


def quantised(base: Path, folder: Path, **settings: Any) -> Path:
    """Writes `base` as transformers and bitsandbytes quantise it."""
    given = BitsAndBytesConfig(**settings)
    built = AutoModelForCausalLM.from_pretrained(base, quantization_config=given, device_map="cpu")
    built.save_pretrained(folder)
    return folder


def test_a_base_in_4_bits_is_read_as_it_is(bases, tmp_path):
    folder = quantised(bases[False], tmp_path / "base", load_in_4bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    keep_nf4_trainable(theirs)
    own = load.load_base(Model(name=str(folder)), "qlora", "fp32", CPU)
    torch.testing.assert_close(logits(own), logits(theirs).float())
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\), and tuning.mode: lora"):
        load.load_base(Model(name=str(folder)), "lora", "fp32", CPU)
    kind = configured(folder, tmp_path, {}, **{"tuning.quantization": "nf4"})
    with pytest.raises(ModelError, match="comes quantised as fp4, which cannot be changed"):
        FineTune.build_model(kind, "fp32", CPU)
    mode = {"tuning.mode": "qlora", "tuning.lora_alpha": 4.0}
    config = configured(folder, tmp_path, {"init_lora_weights": "loftq"}, **mode)
    with pytest.raises(ModelError, match="give the model from which it was made"):
        FineTune.build_model(config, "fp32", CPU)


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
def test_every_way_to_quantise_that_transformers_knows_is_refused_in_one_sentence(mode):
    methods = {*AUTO_QUANTIZATION_CONFIG_MAPPING, "one of tomorrow"} - {"bitsandbytes_4bit"}
    for method in methods:
        bits = {"load_in_8bit": True} if method == "bitsandbytes_8bit" else {}
        settings = {"quant_method": method.removesuffix("_8bit"), "bits": 8} | bits
        plain, nested = LlamaConfig(), Gemma3Config()
        plain.quantization_config = settings
        nested.text_config.quantization_config = settings
        old = LlamaConfig(compression_config=settings)
        for arch in (plain, nested, old):
            with pytest.raises(ModelError, match=rf"comes quantised \({method[:12]}.*mode: {mode}"):
                load.refuse_quantised(arch, "base", mode)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_base_that_comes_quantised_is_refused_by_run_and_plan(bases, tmp_path, method):
    """transformers would read numbers of 8 bits as weights, without an error."""
    config = json.loads((bases[False] / "config.json").read_text())
    settings = {"quant_method": method, "bits": 8, "load_in_8bit": True}
    shutil.copytree(bases[False], tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for weights in (True, False):
        with pytest.raises(ModelError, match=rf"comes quantised \({method}\), and tuning.mode"):
            load.load_base(Model(name=str(tmp_path)), "lora", "fp32", CPU, weights)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights_of_which_the_config_says_nothing_are_refused(bases, tmp_path, dtype):
    shutil.copytree(bases[False], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        weights | {name: weights[name].to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=f"stores {name} as [FIU]8"):
        load.load_base(Model(name=str(tmp_path)), "lora", "fp32", CPU)


@pytest.mark.parametrize("kind", representatives(["nf4", "fp4"]))
def test_a_base_is_stored_in_the_kind_of_4_bits_that_is_asked_for(bases, tmp_path, kind):
    folder = quantised(
        bases[False],
        tmp_path / "base",
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    keep_nf4_trainable(theirs)
    config = configured(bases[False], tmp_path, {}, **{"tuning.quantization": kind})
    assert config.tuning.mode == "qlora"  # lora with 4 bits
    built = FineTune.build_model(config, "fp32", CPU)
    torch.testing.assert_close(logits(built), logits(theirs))
    parts = {(group.part, group.dtype) for group in dtypes.parameter_groups(built)}
    assert ("layers", kind.upper()) in parts
    assert dry_run.trace_step(config, "bf16", dry_run.Window((((20, 9),),))).phases


@pytest.mark.parametrize(
    ("overrides", "reported"),
    [
        (["tuning.quantization=int8"], "the cut of a batch would change the result"),
        (["tuning.quantization=none", "tuning.mode=qlora"], "set tuning.mode: lora, or remove"),
        (["tuning.quantization=fp4", "tuning.mode=full"], "in 4 bits cannot be trained"),
        (["tuning.quantization=nf3"], "did you mean nf4?"),
    ],
)
def test_kinds_of_quantisation_that_cannot_work_are_refused(tmp_path, overrides, reported):
    assert reported in problem(tmp_path, *overrides)
    assert not problem(tmp_path, "tuning.quantization=none")
    assert not problem(tmp_path, "tuning.quantization=nf4", "tuning.mode=qlora")
