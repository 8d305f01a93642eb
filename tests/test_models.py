"""Adapters, NF4, dtypes, checkpointing; and the traps of packed documents and of NF4 on CPUs."""

from __future__ import annotations

import shutil

import families
import pytest
import tiny
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from sft import errors
from sft.config.schema import Config, Model, Tuning
from sft.data import batches
from sft.errors import ConfigError
from sft.models import adapt, attention, classes, dtypes, layers, load, pretrained, quantise
from sft.models.attention import (
    documents_are_isolated,
    keep_documents_apart,
    reads_later_tokens,
)
from sft.models.digests import weights_sha256
from sft.models.head import SupervisedHead
from sft.plan.dry_run import CpuAccelerator
from sft.runtime import hardware
from sft.runtime.log import Log
from sft.runtime.processes import Context
from sft.tasks.registry import task_of
from sft.tasks.sft.task import FineTune

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": tiny.VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SHAPES = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=8),
    "gemma2": Gemma2Config(**SMALL, sliding_window=8, attn_implementation="eager"),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=8),
    "phi": PhiConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "phi3": Phi3Config(**SMALL),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=tiny.VOCAB, initializer_range=0.2
    ),
}


def small(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny.build(SHAPES[name]).eval()


def saved(folder, name: str = "llama") -> str:
    small(name).save_pretrained(folder)
    return str(folder)


def configured(path: str, **tuning) -> Config:
    return Config.model_validate(
        {
            "model": {"name": path},
            "tuning": {"r": 4} | tuning,
            "data": {"train_path": "none"},
            "train": {"output_dir": "none"},
        }
    )


LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
EXPECTED_TARGETS = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3": LLAMA_LIKE,
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_auto_targets_are_all_linear_layers_but_the_head(name):
    adapted = adapt.add_adapters(small(name), Tuning(r=4))
    found = {
        n.split(".lora_A")[0].rsplit(".", 1)[-1]
        for n, _ in adapted.named_parameters()
        if "lora_A" in n
    }
    assert found == EXPECTED_TARGETS[name]
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)


def test_targets_that_match_nothing_are_refused_with_the_names_that_exist():
    with pytest.raises(errors.ModelError, match=r"c_attn.*down_proj, gate_proj"):
        adapt.add_adapters(small("llama"), Tuning(target_modules=["c_attn"]))


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dtype_policy(tmp_path, mode, precision):
    built = load.build(configured(saved(tmp_path), mode=mode), precision, CPU)
    compute = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    found = {(s.part, s.dtype, s.trained) for s in dtypes.parameter_groups(built)}
    expected = {
        "full": {("embeddings", "float32", True), ("layers", "float32", True)},
        "lora": {
            ("embeddings", compute, False),
            ("layers", compute, False),
            ("adapters", "float32", True),
        },
    }
    expected["qlora"] = expected["lora"] | {("layers", "NF4", False)}
    assert found == expected[mode]
    count = sum(s.num_parameters for s in dtypes.parameter_groups(built) if s.part != "adapters")
    assert count == sum(p.numel() for p in small("llama").parameters())


def test_a_trainable_weight_in_half_precision_is_refused():
    with pytest.raises(AssertionError, match="float16"):
        dtypes.check_dtypes(small("llama").half(), "full", "fp32")


def test_random_weights_are_a_function_of_the_seed(tmp_path):
    config = configured(saved(tmp_path), mode="full")
    config = config.model_copy(update={"model": config.model.model_copy(update={"init": "random"})})
    first, second = (load.build(config, "fp32", CPU) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tokens_that_a_base_model_never_saw():
    """Llama 3's base: the embeddings of its reserved tokens are near zero."""
    model = tiny.llama()
    assert layers.untrained_rows(model, [1, 5, 9]) == []
    with torch.no_grad():
        model.get_output_embeddings().weight[5] *= 1e-4
    assert layers.untrained_rows(model, [1, 5, 9, 10**6]) == [5]


def test_a_missing_model_is_one_sentence(tmp_path):
    with pytest.raises(errors.ModelError, match=r"expected a folder.*no such folder here"):
        pretrained.load_tokenizer(configured(str(tmp_path / "nothing")).model)


def gradients(built: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    built.zero_grad()
    built(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in built.named_parameters() if p.requires_grad}


IDS = torch.arange(2, 32)[None]


def wake(built: torch.nn.Module, std: float = 0.1) -> None:
    """Adapters start at zero output; give them some, so that every gradient is non-zero."""
    torch.manual_seed(1)
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, mode):
    config = configured(saved(tmp_path), mode=mode)
    found = []
    for checkpointing in (False, "selective", True):
        train = config.train.model_copy(update={"gradient_checkpointing": checkpointing})
        built = load.build(config.model_copy(update={"train": train}), "fp32", CPU).train()
        wake(built)
        assert getattr(built, "is_gradient_checkpointing", False) == bool(checkpointing)
        found.append(gradients(built, IDS))
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        assert torch.equal(found[1][name], gradient)
        torch.testing.assert_close(found[2][name], gradient, rtol=1e-6, atol=1e-7)


# --- trap: NF4 weights repacked by the first evaluation ------------------------------------------


def nf4_gradient_error(built: torch.nn.Module) -> float:
    """Relative change of the adapters' gradients by an evaluation in between."""
    wake(built)
    before = gradients(built.train(), IDS)
    with torch.no_grad():
        built.eval()(input_ids=IDS)
    after = gradients(built.train(), IDS)
    return tiny.relative_error(list(after.values()), list(before.values()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_evaluation_leaves_the_gradients_of_qlora_alone(tmp_path, precision):
    config = configured(saved(tmp_path), mode="qlora")
    assert nf4_gradient_error(load.build(config, precision, CPU)) == 0


@pytest.mark.skipif(not hardware.detect().cpu_bf16, reason="needs a CPU with AVX512-BF16")
def test_the_trap_is_real_without_the_guard(tmp_path, monkeypatch):
    """The control of the test above: where bitsandbytes repacks, training is silently wrong."""
    monkeypatch.setattr(load, "keep_nf4_trainable", lambda _: None)
    built = load.build(configured(saved(tmp_path), mode="qlora"), "bf16", CPU)
    assert nf4_gradient_error(built) > 0.1


# --- trap: packed documents that see each other --------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_give_the_logits_of_separate_ones_or_are_refused(name):
    built = small(name)
    documents = [torch.arange(2, 2 + n)[None] for n in (5, 13, 9)]
    together = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packed = built(input_ids=together, position_ids=positions, use_cache=False).logits
    alone = torch.cat([built(input_ids=d, use_cache=False).logits for d in documents], 1)
    equal = float((packed - alone).norm() / alone.norm()) < 1e-5
    assert documents_are_isolated(built, "fp32", CPU) == equal
    assert equal or name not in ("llama", "qwen2", "qwen3", "mistral")


def test_a_model_that_leaks_is_found_out():
    class Leaking(torch.nn.Module):
        """What transformers does with a mask of ones: documents attend to each other."""

        def __init__(self):
            super().__init__()
            self.inner = small("llama")
            self.get_input_embeddings = self.inner.get_input_embeddings

        def forward(self, input_ids, position_ids=None, use_cache=None):
            ones = torch.ones_like(input_ids)
            return self.inner(input_ids=input_ids, position_ids=position_ids, attention_mask=ones)

    assert not documents_are_isolated(Leaking(), "fp32", CPU)


def test_a_packed_layout_that_leaks_falls_back_or_is_refused(monkeypatch, tmp_path):
    packed = batches.Budget(100, "packed")
    context = Context(CpuAccelerator("fp32"), Log(tmp_path))
    settings = tiny.config(tmp_path / "run")
    made = FineTune(settings, None, small("llama"), packed, context)
    made.check_model("fp32", "auto")
    assert made.budget is packed
    monkeypatch.setattr(attention, "keep_documents_apart", lambda *_: False)
    made.check_model("fp32", "auto")
    assert made.budget == batches.Budget(100, "padded")
    assert "layout: padded, since packed documents" in (tmp_path / "training.log").read_text()
    made.budget = packed
    with pytest.raises(ConfigError, match=r"train.layout: packed documents .* padded"):
        made.check_model("fp32", "packed")


def test_only_chosen_positions_reach_the_head():
    built = small("llama")
    head = SupervisedHead(built)
    ids = torch.stack([torch.arange(2, 12), torch.arange(12, 22)])
    everything = built(input_ids=ids).logits.flatten(0, 1)
    head.positions = torch.tensor([3, 0, 17])
    chosen = built(input_ids=ids).logits
    torch.testing.assert_close(chosen, everything[[3, 0, 17]])


def test_the_digest_of_a_model_sees_every_tensor(tmp_path):
    shutil.copytree(ROOT / "nano/model", tmp_path / "copy")
    named = Model(name=str(tmp_path / "copy"))
    digest, path = weights_sha256(named), tmp_path / "copy/model.safetensors"
    assert digest == weights_sha256(Model(name=str(ROOT / "nano/model")))
    weights = load_file(path)
    for name in sorted(weights)[::7]:
        save_file(weights | {name: -weights[name]}, path, {"format": "pt"})
        assert weights_sha256(named) != digest, name


# --- trap: states that carry one document into the next, and tokens that see the next ones ---


@pytest.mark.parametrize("name", ["falcon_h1", "jamba", "lfm2", "qwen3_next", "mamba2", "bloom"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packing_is_refused_however_little_a_document_leaks(name, precision):
    """The leak of these random models is a thousandth of the logits: less than rounding in bf16."""
    built = families.tiny_model(name)
    assert not keep_documents_apart(built, precision, CPU)
    assert not reads_later_tokens(built, precision, CPU)  # so padding on the right is safe


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3", "llama4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packing_is_proven_where_documents_are_kept_apart(name, precision):
    built = families.tiny_model(name)
    assert documents_are_isolated(built, precision, CPU)
    assert not reads_later_tokens(built, precision, CPU)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "gpt_oss"])
def test_borders_are_told_in_the_form_that_a_model_takes(name):
    """These do not pass position ids on to the mask, so packed documents saw each other."""
    built = families.tiny_model(name).train()
    assert not documents_are_isolated(built, "fp32", CPU)
    assert keep_documents_apart(built, "fp32", CPU)
    documents = [torch.arange(3, 3 + n)[None] for n in (5, 13, 9)]
    joint = torch.cat(documents, 1).expand(2, -1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packed = built(input_ids=joint, position_ids=positions, use_cache=False).logits
    alone = torch.cat([built(input_ids=d, use_cache=False).logits for d in documents], 1)
    torch.testing.assert_close(packed, alone.expand(2, -1, -1), rtol=1e-4, atol=1e-5)
    assert built.generate(documents[0], max_new_tokens=2, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("name", ["bert", "paligemma"])
def test_a_model_whose_tokens_see_those_that_follow_is_found_out(name):
    assert reads_later_tokens(families.tiny_model(name), "fp32", CPU)


# --- bases of other kinds ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jamba", "falcon_h1", "gemma3n_text", "qwen2_5_vl", "llama4"])
@pytest.mark.parametrize("depth", [2, 5])
def test_a_model_keeps_its_first_layers_and_the_towers_are_no_layers(name, depth):
    whole = CONFIG_MAPPING[name]()
    with torch.device("meta"):
        built = classes.from_config(pretrained.keep_layers(whole, depth))
    found = layers.repeated_layers(built)
    assert len(found) == depth
    assert {id(layer) for layer in found} <= {id(each) for each in built.get_decoder().modules()}


@pytest.mark.parametrize(
    ("name", "named", "expected"),
    [
        ("llama4", None, "Llama4ForConditionalGeneration"),
        ("llama4", "Llama4ForCausalLM", "Llama4ForCausalLM"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", "Qwen3_5ForConditionalGeneration"),
        ("qwen2_5_vl", None, "Qwen2_5_VLForConditionalGeneration"),
        ("llama", "LlamaForSequenceClassification", "LlamaForCausalLM"),
    ],
)
def test_a_base_is_loaded_as_the_class_that_its_files_name(name, named, expected):
    config = families.tiny_config(name)
    config.architectures = named and [named]
    assert type(classes.from_config(config)).__name__ == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5", "is an encoder-decoder"),
        ("bart", "is an encoder-decoder"),
        ("whisper", "is an encoder-decoder"),
        ("bert", "is an encoder"),
        ("deberta-v2", "is an encoder"),
        ("vit", "has no class in transformers that writes text"),
    ],
)
def test_what_writes_no_text_is_refused_in_one_sentence_before_weights_are_read(
    name, reason, tmp_path
):
    CONFIG_MAPPING[name]().save_pretrained(tmp_path)
    config = configured(str(tmp_path))
    task = task_of(config)
    starts = (
        lambda: task.info(config),  # the plan
        lambda: task.skeleton(config),
        lambda: load.load_base(config.model, "full", "fp32", CPU),
        lambda: load.build(config, "fp32", CPU),
    )
    for start in starts:
        with pytest.raises(errors.ModelError, match=reason) as found:
            start()
        assert len(str(found.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 1), (37, 101), (8, 3, 160), (65_537,)])
def test_slices_of_a_matrix_are_quantised_to_the_bits_of_the_whole(monkeypatch, shape, dtype, kind):
    from bitsandbytes.functional import quantize_4bit

    quantise.quantise_in_slices()
    torch.manual_seed(0)
    weight, found = torch.randn(shape, dtype=dtype), []
    for blocks in (2**30, 1, 7):  # the first is one slice: bitsandbytes' own code
        monkeypatch.setattr(quantise, "_BLOCKS", blocks)
        found.append(quantize_4bit(weight, compress_statistics=True, quant_type=kind))
    (packed, state), *others = found
    for other, its_state in others:
        assert torch.equal(other, packed)
        assert other.shape == packed.shape
        assert torch.equal(its_state.absmax, state.absmax)
