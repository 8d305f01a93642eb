"""Steps whose memory others measured, with what their tools did where ours does otherwise.

The rows are all numbers of `../shared/reference/memory_published.md` and the runs on an L40S of
`memory_prediction.md`, with one more of their source. Nothing is fitted to them. `EXCLUDED` lists
the numbers that are no peak of a training step, each with the reason.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from bitsandbytes.autograd import _functions as bnb_functions
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import (
    ApertusConfig,
    ArceeConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
)

from sft.config.schema import Config
from sft.models import adapt, head, load, quantise
from sft.plan import dry_run, sharding
from sft.plan.counts import CastCounts
from sft.plan.dry_run import Window
from sft.tasks.sft.task import FineTune

GB, MIB, GIB = 1e9, 2**20, 2**30
FP32, BF16 = torch.float32, torch.bfloat16
Kind = Literal["full", "LoRA", "QLoRA", "sharded", "DDP"]
Allocator = Literal["growing", "fixed", "rounded"]


@dataclass(frozen=True)
class Row:
    """A published run."""

    kind: Kind
    source: str
    what: str
    architecture: PretrainedConfig
    tuning: dict[str, Any]
    window: Window
    measured_bytes: float
    unknown: str  # what the source leaves open, and what is taken
    is_bound: bool = False  # the step ran out of so much memory
    train: dict[str, Any] = field(default_factory=dict)
    precision: str = "bf16"
    reserved: bool = True  # what was measured: reserved, or allocated
    autocast: bool = True  # else everything is computed in the dtype that it is stored in
    adapters: torch.dtype = FP32
    others: torch.dtype | None = None  # of what is neither adapter nor quantised; None: ours
    own_loss: bool = False  # transformers': logits of all tokens
    masked: bool = False  # by a mask of all pairs of tokens
    allocator: Allocator = "growing"  # of segments; "rounded": also sizes (Axolotl)
    group: sharding.Group = sharding.ONE_PROCESS
    titan: bool = False  # as torchtitan: selective checkpointing, gathered in bf16 (`their_step`)
    old_nf4: bool = False  # bitsandbytes before 0.45 kept the inputs of frozen 4-bit layers
    double_quant: bool = True


# Numbers of the sources that are no peak of a training step, with the reason.
EXCLUDED = [
    *(
        (
            f"LitGPT, {model}, weights only, {how}: {gb} GB",
            "inference: with its cache of keys and values, and what quantising the weights left",
        )
        for model, sizes in {
            "phi-1.5": (2.86, 1.39, 1.33),
            "Llama-2 7B": (13.52, 4.57, 4.26),
            "Llama-2 13B": (26.21, 8.32, 7.72),
        }.items()
        for how, gb in zip(("none", "nf4", "nf4-dq"), sizes, strict=True)
    ),
    (
        "torchtune, Llama-2 7B LoRA, initialised: 13.98 GB reserved",
        "before any step; what building the model reserved, not what a step takes",
    ),
    (
        "torchtune, Llama-2 7B QLoRA, initialised: 9.13 GB reserved",
        "before any step; quantising passes through weights of full size",
    ),
]


def llama(hidden: int, inter: int, layers: int, heads: int, kv: int, vocab: int, **more: Any):
    return shape(LlamaConfig, hidden, inter, layers, heads, kv, vocab, **more)


def shape(
    kind: Callable[..., PretrainedConfig],
    hidden: int,
    inter: int,
    layers: int,
    heads: int,
    kv: int,
    vocab: int,
    **more: Any,
) -> PretrainedConfig:
    return kind(
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        max_position_embeddings=32768,
        **more,
    )


def qwen1(hidden: int, inter: int, layers: int, heads: int) -> PretrainedConfig:
    """Qwen (v1) in the shape of Qwen2: the same parts, with separate query, key and value."""
    sizes = (hidden, inter, layers, heads, heads, 151936)
    return shape(Qwen2Config, *sizes, tie_word_embeddings=False)


LLAMA_3B = llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True)
LLAMA_8B = llama(4096, 14336, 32, 32, 8, 128256)
LLAMA2_7B, LLAMA2_13B = llama(4096, 11008, 32, 32, 32, 32000), llama(5120, 13824, 40, 40, 40, 32000)
PHI_15 = PhiConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
    vocab_size=51200, max_position_embeddings=2048, hidden_act="gelu_pytorch_tanh",
)  # fmt: skip
QV, ATTENTION = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]


def uniform(rows: int, length: int, supervised: int | None = None) -> Window:
    """Returns a window of one micro-batch with rows of one length; all supervised by default."""
    number = length if supervised is None else supervised
    return Window((((length, number),) * rows,))


def rows() -> list[Row]:
    return [*peft(), *litgpt(), *qwen(), *torchtune(), *torchtitan(), *axolotl(), *fitcheck()]


def peft() -> Iterator[Row]:
    """PEFT's comparison of methods, MetaMathQA: bf16, batches of 4, AdamW, no checkpointing."""
    mlp = ["gate_proj", "up_proj", "down_proj"]
    runs: list[tuple[Kind, str, dict[str, Any], float]] = [
        ("LoRA", "LoRA r32 q,v", {"mode": "lora", "r": 32, "target_modules": QV}, 21260 * MIB),
        ("LoRA", "LoRA r64 q,v", {"mode": "lora", "r": 64, "target_modules": QV}, 21508 * MIB),
        ("LoRA", "LoRA r10 MLP", {"mode": "lora", "r": 10, "target_modules": mlp}, 23554 * MIB),
        ("full", "full", {"mode": "full"}, 37_241_225_216),
    ]
    for kind, what, tuning, measured in runs:
        yield Row(
            kind,
            "PEFT method comparison, L40S",
            f"Llama-3.2-3B {what}",
            LLAMA_3B,
            tuning,
            uniform(4, 699),
            measured,
            "longest padded batch: 699 tokens, which the reference found from the first row",
            autocast=False,
            others=BF16,
            allocator="fixed",
            own_loss=True,
            masked=True,
        )


def litgpt() -> Iterator[Row]:
    lengths = {"phi-1.5": 1044, "Llama-2 7B": 1304, "Llama-2 13B": 1304}
    shapes = {"phi-1.5": PHI_15, "Llama-2 7B": LLAMA2_7B, "Llama-2 13B": LLAMA2_13B}
    measured: dict[str, dict[str, dict[int, float]]] = {  # quantisation -> micro-batch -> GB
        "phi-1.5": {"none": {1: 4.82, 2: 6.76, 4: 10.68}, "nf4": {1: 3.78}, "nf4-dq": {1: 3.72}},
        "Llama-2 7B": {
            "none": {1: 21.30, 2: 29.07, 4: 40},
            "nf4": {1: 14.14},
            "nf4-dq": {1: 13.84},
        },
        "Llama-2 13B": {"none": {1: 38.12}, "nf4": {1: 23.14}, "nf4-dq": {1: 22.55}},
    }
    for name, by_quant in measured.items():
        for quant, by_number in by_quant.items():
            for number, gb in by_number.items():
                quantised = quant != "none"
                yield Row(
                    "QLoRA" if quantised else "LoRA",
                    "LitGPT, A100-40GB",
                    f"{name} {quant}, LoRA r8 q,v, micro-batch {number}",
                    shapes[name],
                    {
                        "mode": "qlora" if quantised else "lora",
                        "r": 8,
                        "target_modules": QV,
                        "lora_dropout": 0.05,
                    },
                    uniform(number, lengths[name]),
                    gb * GB,
                    "its own model code and loss; whether the longest rows meet in one batch",
                    is_bound=gb == 40,
                    reserved=False,
                    autocast=False,
                    adapters=BF16,
                    old_nf4=quantised,
                    double_quant=quant == "nf4-dq",
                )


ZERO3 = {  # of QwenLM/Qwen, finetune/ds_config_zero3.json; its numbers are elements
    **{"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
    **{"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"},
}


def qwen() -> Iterator[Row]:
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    small, large = qwen1(2048, 5504, 24, 16), qwen1(4096, 11008, 32, 32)
    saved = {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}
    lora = {"mode": "lora", "r": 64, "target_modules": "auto", "lora_dropout": 0.05}
    runs: list[tuple[Kind, str, PretrainedConfig, dict[str, Any], tuple[float, ...]]] = [
        ("LoRA", "1.8B LoRA r64", small, lora, (6.7, 7.4, 8.4, 11.0, 16.2, 21.8)),
        ("LoRA", "1.8B LoRA (emb)", small, lora | saved, (13.7, 14.0, 14.0, 15.1, 19.7, 27.7)),
        ("full", "1.8B full", small, {"mode": "full"}, (43.5, 43.5, 43.5, 43.5, 47.1, 48.3)),
        ("LoRA", "7B LoRA r64", large, lora, (20.1, 20.4, 21.5, 23.8, 29.7, 36.6)),
        ("LoRA", "7B LoRA (emb)", large, lora | saved, (33.7, 34.1, 35.2, 35.1, 39.2, 48.5)),
    ]
    for kind, what, architecture, tuning, sizes in runs:
        full = kind == "full"
        for length, gb in zip(lengths, sizes, strict=True):
            yield Row(
                kind,
                "Qwen README, A100-80GB",
                f"Qwen {what}, {length} tokens",
                architecture,
                tuning,
                replace(uniform(1, length), gradients=True),  # it accumulates 8 micro-batches
                gb * GB,
                "what was read (taken as reserved, 1e9 bytes); its own model code; dtype of "
                "adapters (taken: that of the base, as PEFT stored them in 2023)"
                if not full
                else "what was read (taken as reserved, 1e9 bytes); engine (taken: ZeRO-3 of its "
                "script), which keeps bf16 weights and gradients and fp32 copies of both",
                train={"gradient_checkpointing": True},
                adapters=BF16,
                own_loss=True,
                group=sharding.Group(1, "deepspeed", True, ZERO3) if full else sharding.ONE_PROCESS,
            )


def torchtune() -> Iterator[Row]:
    for what, r, modules, gb in (
        ("q,v r8", 8, QV, 15.57),
        ("all layers r8", 8, "auto", 15.87),
        ("q,v r64", 64, QV, 15.86),
        ("all layers r64", 64, "auto", 17.04),
    ):
        yield Row(
            "LoRA",
            "torchtune docs, one GPU",
            f"Llama-2 7B LoRA {what}, batch 2",
            LLAMA2_7B,
            {"mode": "lora", "r": r, "target_modules": modules},
            uniform(2, 1304),
            gb * GB,
            "lengths (taken: 1,304 tokens, the longest of Alpaca, in both rows); checkpointing "
            "(taken: on, its recipe's default); allocated, 1e9 bytes; its own model code",
            train={"gradient_checkpointing": True},
            reserved=False,
            autocast=False,
            adapters=BF16,
        )


def torchtitan() -> Iterator[Row]:
    for world, gib in ((8, 82.4), (128, 67.0)):
        yield Row(
            "sharded",
            f"torchtitan, {world} x H100",
            "Llama-3.1 8B full, FSDP2, 2 rows of 8,192 tokens",
            LLAMA_8B,
            {"mode": "full"},
            uniform(2, 8192),
            gib * GIB,
            "which operations its checkpointing keeps (taken: every second product)",
            train={"gradient_checkpointing": True, "engine": "fsdp"},
            titan=True,
            group=sharding.Group(world, "fsdp"),
        )


def axolotl() -> Iterator[Row]:
    head128 = {"head_dim": 128}
    qwen3 = shape(Qwen3Config, 2560, 9728, 36, 32, 8, 151936, tie_word_embeddings=True, **head128)
    afm = shape(ArceeConfig, 2560, 18432, 36, 20, 4, 128004, tie_word_embeddings=False, **head128)
    untied = {"tie_word_embeddings": False}
    models: dict[str, tuple[PretrainedConfig, float]] = {
        "Plano-4B (Qwen3-4B)": (qwen3, 5.10),
        "AFM-4.5B": (afm, 7.80),
        "Ministral-8B": (shape(MistralConfig, 4096, 12288, 36, 32, 8, 131072, **head128), 8.76),
        "Apertus-8B": (shape(ApertusConfig, 4096, 21504, 32, 32, 8, 131072, **untied), 8.70),
        "Olmo-3-7B": (shape(Olmo3Config, 4096, 11008, 32, 32, 32, 100278, **untied), 11.30),
        "MiMo-7B": (shape(Qwen2Config, 4096, 11008, 36, 32, 8, 151680, **untied), 17.20),
        "Devstral-24B": (shape(MistralConfig, 5120, 32768, 40, 32, 8, 131072, **head128), 19.56),
        "Seed-OSS-36B": (
            shape(SeedOssConfig, 5120, 27648, 64, 80, 8, 155136, **untied, **head128),
            27.70,
        ),
    }
    for name, (architecture, gib) in models.items():
        whole = name == "MiMo-7B"  # which computes all logits; the others' loss is in chunks
        adam = "adamw" if name == "Devstral-24B" else "adamw_8bit"
        yield Row(
            "QLoRA",
            "Axolotl examples",
            f"{name} LoRA r32, 2 x 2,048 packed",
            architecture,
            {"mode": "qlora", "r": 32, "target_modules": "auto", "lora_dropout": 0.05},
            uniform(2, 2048, None if whole else 1),
            gib * GIB,
            "how full the packs were (taken: full); what was read (taken as reserved)",
            train={"gradient_checkpointing": True, "optimizer": adam},
            own_loss=whole,
            allocator="rounded",
        )


def fitcheck() -> Iterator[Row]:
    tiny = llama(2048, 5632, 22, 32, 4, 32000, tie_word_embeddings=False)
    smol = llama(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True)
    qwen25 = shape(Qwen2Config, 1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True)
    for name, architecture, number, length, gib in (
        ("TinyLlama-1.1B", tiny, 2, 512, 1.80),
        ("TinyLlama-1.1B", tiny, 2, 1024, 2.47),
        ("TinyLlama-1.1B", tiny, 2, 2048, 3.81),
        ("SmolLM2-1.7B", smol, 4, 1024, 5.16),
        ("Qwen2.5-1.5B", qwen25, 2, 1024, 6.66),
    ):
        yield Row(
            "QLoRA",
            "fitcheck-llm, T4",
            f"{name} LoRA r32 q,k,v,o, {number} x {length}",
            architecture,
            {"mode": "qlora", "r": 32, "target_modules": ATTENTION},
            uniform(number, length),
            gib * GIB,
            "whether norms, embeddings and head were cast to fp32 (taken: yes, as PEFT's "
            "prepare_model_for_kbit_training does) and whether autocast was on (taken: no)",
            train={"gradient_checkpointing": True},
            precision="fp16",
            reserved=False,
            autocast=False,
            others=FP32,
            own_loss=True,
            masked=True,
        )


# --- their step ----------------------------------------------------------------------------------

CHECKPOINT = "transformers.modeling_utils.checkpoint"


def selective(function: Any, *arguments: Any, **options: Any) -> Any:
    """Checkpointing as torchtitan's option "op": attention and every second matrix product are
    kept, the rest is computed again."""
    seen = Counter[bool]()

    def policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operation is torch.ops.aten.mm.default:
            seen[context.is_recompute] += 1
            keeps = seen[context.is_recompute] % 2 == 1
        else:
            keeps = "scaled_dot_product" in str(operation)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)


def keep_inputs(forward: Any) -> Any:
    """Returns bitsandbytes' product of 4-bit weights as it was before 0.45."""

    def call(context: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        context.input = x
        return forward(context, x, *arguments)

    return staticmethod(call)


@contextmanager
def their_step(row: Row) -> Iterator[None]:
    """Makes the traced step that of the row's tool, where it differs from ours."""
    prepare, load_base = dry_run.CpuAccelerator.prepare, load.load_base
    four_bits, gathered = quantise.four_bits, sharding.gathered_bytes

    def plain(_: Any, built: Any, optimizer: Any) -> tuple[Any, Any]:
        return built, optimizer

    def loss(task: Any, built: Any, batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """transformers' own, of all tokens, with outputs kept."""
        number, length = batch.input_ids.shape
        mask = torch.ones(number, 1, length, length, dtype=torch.bool).tril()
        masks = {"attention_mask": mask} if row.masked else {}
        task.kept = built(input_ids=batch.input_ids, labels=batch.input_ids, **masks)
        return task.kept.loss, {}

    def base(*arguments: Any, **options: Any) -> nn.Module:
        model = load_base(*arguments, **options)
        for parameter in model.parameters() if row.others else ():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(row.others)
        return model

    def added(model: nn.Module, config: Config) -> Any:
        built = adapt.add_adapters(model, config.tuning)
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(row.adapters)
        return built

    def single(*arguments: Any, **options: Any) -> Any:
        settings = four_bits(*arguments, **options)
        settings.bnb_4bit_use_double_quant = row.double_quant
        return settings

    def none_cast(*_: Any) -> CastCounts:
        return CastCounts()

    def halves(*arguments: Any) -> tuple[int, int]:
        """Head and embedding are gathered one after the other, and all in bf16."""
        outside, layer = gathered(*arguments)
        return outside // 4, layer // 2

    old = keep_inputs(bnb_functions.MatMul4Bit.forward)
    with (
        mock.patch.object(dry_run.CpuAccelerator, "prepare", prepare if row.autocast else plain),
        mock.patch.object(load, "load_base", base),
        mock.patch.object(FineTune, "adapt", staticmethod(added)),
        mock.patch.object(load, "check_dtypes"),
        mock.patch.object(head, "most_rows", return_value=sys.maxsize),  # all logits at once
        mock.patch.object(adapt, "forward_once"),  # PEFT's own layers, with all their casts
        mock.patch.object(quantise, "four_bits", single),
        mock.patch.object(FineTune, "loss", loss) if row.own_loss else nullcontext(),
        mock.patch(CHECKPOINT, selective) if row.titan else nullcontext(),
        mock.patch.object(sharding, "gathered_bytes", halves) if row.titan else nullcontext(),
        mock.patch.object(sharding, "count_casts", none_cast) if row.titan else nullcontext(),
        mock.patch.object(bnb_functions.MatMul4Bit, "forward", old)
        if row.old_nf4
        else nullcontext(),
    ):
        yield
