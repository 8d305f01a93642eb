"""Tiny shapes of the model types of transformers, made by shrinking each type's own defaults."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

VOCABULARY = 1024  # that of the nano tokenizer
MEDIA_TOKENS = 16  # ids above the tokenizer's, which stand for images and sounds

TEXT = [
    *("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"),
    *("mistral", "ministral3", "phi", "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode"),
    *("opt", "bloom", "falcon", "mpt", "codegen", "starcoder2", "stablelm", "cohere", "cohere2"),
    *("granite", "smollm3", "olmo", "olmo2", "olmo3", "glm", "glm4", "exaone4", "helium"),
    *("nemotron", "persimmon", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "apertus", "arcee"),
]
MIXTURES = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"),
    *("glm4_moe", "granitemoe", "phimoe", "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2"),
    *("llama4_text", "dots1", "jetmoe"),
]
RECURRENT = [
    *("falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "jamba", "mamba", "mamba2", "bamba"),
    *("qwen3_next", "qwen3_5_text", "nemotron_h", "recurrent_gemma", "olmo_hybrid"),
    *("falcon_mamba", "rwkv", "kimi_linear", "minimax"),
]
MULTIMODAL = [
    *("gemma3", "gemma4", "mistral3", "llama4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("qwen3_vl_moe", "qwen3_5", "llava", "llava_next", "llava_onevision", "idefics3", "smolvlm"),
    *("internvl", "paligemma", "aya_vision", "mllama", "qwen2_audio", "voxtral"),
]
OTHER = ["t5", "bart", "bert", "roberta"]  # encoder-decoder and encoder-only
DECODERS = [*TEXT, *MIXTURES, *RECURRENT, *MULTIMODAL]

# The first pattern that matches the whole name of a field gives its value.
SIZES: list[tuple[str, int]] = [
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|eod_token_id|sep_token_id|forced_eos_token_id", 2),
    (
        r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length",
        512,
    ),
    (r".*_lora_rank|.*_dt_rank|time_step_rank|laurel_rank|adapter_rank", 8),
    (r".*(intermediate|ffn).*size.*|.*ffn_dim|n_inner|d_ff", 48),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r".*num_(key_value|kv)_heads|kv_n_heads|num_query_groups|n_groups|.*num_key_heads", 2),
    (r".*(num|n)_.*heads?|n_head|.*attention_heads|num_heads", 4),
    (r"qk_head_dim", 16),
    (r".*head_?dim|.*d_head|.*kv_channels|rotary_dim|d_kv", 8),
    (r"n_shared_experts|.*num_shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (r".*num_experts_per_tok(en)?|.*topk|.*top_k|moe_k", 2),
    (r".*num_.*experts|n_routed_experts", 4),
    (r"n_group|topk_group|num_expert_group", 1),
    (r".*d_state|.*state_size", 8),
    (r".*(attention|mamba)_chunk_size|chunk_size|sliding_window|.*window_size|block_size", 16),
    (r"(num|n)_(hidden_|decoder_)?layers?|depth|.*num_hidden_layers|(en|de)coder_layers", 2),
    (r"image_size|video_size", 16),
    (r"patch_size", 4),
    (r".*(hidden_size|d_model|embed_dim|hidden_dim).*|n_embd|dim|lru_width", 32),
    (r"projector_.*_dim|vision_output_dim|projection_dim|word_embed_proj_dim", 32),
    (r"max_source_positions", 16),
]

# What a type needs besides. Sub-configurations are types, too.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {"mrope_section": [1, 1, 2]}
SPECIAL: dict[str, dict[str, Any]] = {
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8},
    "zamba2": {"n_mamba_heads": 8, "attention_head_dim": 16},
    "gemma4_text": {"global_head_dim": 16},
    "qwen2_vl_text": {"rope_parameters": ROPE | SECTIONS},
    "qwen2_5_vl_text": {"rope_parameters": ROPE | SECTIONS},
    "gemma4_vision": {"position_embedding_size": 16},
    "qwen2_5_vl_vision": {"fullatt_block_indexes": [1]},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "qwen3_5_vision": {"num_position_embeddings": 16},
}


def tiny_config(model_type: str, vocabulary: int = VOCABULARY, **changes: Any) -> PretrainedConfig:
    """Returns a configuration of this type with sizes of 8 to 48, and one layer of each kind.

    `vocabulary` is the tokenizer's. Multimodal types have `MEDIA_TOKENS` more, for media.
    """
    media = MEDIA_TOKENS if reads_media(model_type) else 0
    return _shrink(CONFIG_MAPPING[model_type](), vocabulary, media, changes)


def reads_media(model_type: str) -> bool:
    """Returns whether a type has a class for images or sounds."""
    return model_type in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


def other_types() -> list[str]:
    """Returns the types of transformers that write text, and are in no list above."""
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    every = {*known, *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    return sorted(every - {*DECODERS, *OTHER})


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Returns a random model of this type and tiny size, of the class that generates text."""
    torch.manual_seed(0)
    return model_class(model_type)._from_config(tiny_config(model_type, **changes), dtype=dtype)


def model_class(model_type: str) -> Any:
    """Returns the class that has the vocabulary head: from images and text where there is one."""
    for mapping in (
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    ):
        if (config := CONFIG_MAPPING[model_type]) in mapping:
            return mapping[config]
    raise KeyError(model_type)


def _shrink(
    default: PretrainedConfig, vocabulary: int, media: int, changes: dict[str, Any]
) -> PretrainedConfig:
    values, layers = {}, _distinct_layers(default)
    ids = iter(range(vocabulary, vocabulary + media))
    for name, value in vars(default).items():
        if name in default.sub_configs:
            part = value if isinstance(value, PretrainedConfig) else _default_part(default, name)
            values[name] = _shrink(part, vocabulary, media, {})
        elif isinstance(value, list) and layers and len(value) == default.num_hidden_layers:
            picked = [value[i] if _size(name) is None else _size(name) for i in layers]
            values[name] = list(range(len(layers))) if picked == layers else picked
        elif isinstance(value, int | list) and not isinstance(value, bool):
            if re.fullmatch(r".*vocab_size.*", name):
                values[name] = vocabulary + media
            elif media and re.fullmatch(r"[a-z_]+_token_(id|index)", name) and not _size(name):
                values[name] = next(ids)
            elif isinstance(value, int) and (size := _size(name)) is not None:
                values[name] = size
    if "num_hidden_layers" in values and layers:
        values["num_hidden_layers"] = len(layers)
    if hasattr(default, "qk_rope_head_dim"):  # latent attention has keys for all heads
        values["num_key_value_heads"] = values.get("num_attention_heads")
    rope = getattr(default, "rope_parameters", None)
    if rope and "mrope_section" in rope:
        values["rope_parameters"] = rope | SECTIONS
    values |= SPECIAL.get(default.model_type, {}) | changes
    return type(default)(**{k: v for k, v in values.items() if not k.startswith("_")})


def _default_part(config: PretrainedConfig, name: str) -> PretrainedConfig:
    made = config.sub_configs[name]
    return getattr(made, "config_class", made)()


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _distinct_layers(config: PretrainedConfig) -> list[int]:
    """Returns the first index of each kind of layer, by all lists that have an entry per layer."""
    depth = getattr(config, "num_hidden_layers", None)
    lists = [v for v in vars(config).values() if isinstance(v, list) and len(v) == depth]
    lists = [each for each in lists if each != list(range(len(each)))]
    if not lists:
        return []
    kinds = [str(kind) for kind in zip(*lists, strict=True)]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return first if len(first) > 1 else [0, 1]
