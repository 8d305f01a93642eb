"""GGUF files of this project's tests, whole or with one planted fault, and llama.cpp's server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KINDS = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}


def write_gguf(
    folder: Path,
    file: Path,
    kind: str = "f32",
    pre: str = "superbpe",
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor,
    **metadata: Any,
) -> Path:
    """Writes the model in `folder` as a GGUF file. `metadata` replaces tokenizer.* entries."""
    model, tokenizer = (
        cls.from_pretrained(folder) for cls in (AutoModelForCausalLM, AutoTokenizer)
    )
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    _add_vocabulary(writer, folder, tokenizer, pre, metadata)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.float().state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        inner = name.removesuffix(".weight")
        if inner.startswith("model.layers."):
            _, _, number, part = inner.split(".", 3)
            short = f"blk.{number}.{NAMES[part]}"
        else:
            short = NAMES[inner]
        value = change(name, tensor)
        if (last := short.rpartition(".")[2]) in heads:  # llama.cpp rotates pairs side by side
            rows = value.reshape(heads[last], 2, -1, value.shape[1])
            value = rows.swapaxes(1, 2).reshape(value.shape)
        own = gguf.GGMLQuantizationType[KINDS[kind] if value.ndim > 1 else "F32"]
        data = gguf.quants.quantize(value.numpy(), own)
        writer.add_tensor(f"{short}.weight", data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_vocabulary(
    writer: Any, folder: Path, tokenizer: Any, pre: str, metadata: dict[str, Any]
) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    special = {each["id"] for each in stored["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_eos_token_id(metadata.get("eos", tokenizer.eos_token_id))
    if "bos" in metadata:
        writer.add_bos_token_id(metadata["bos"])
        writer.add_add_bos_token(True)
    writer.add_chat_template(metadata.get("template", tokenizer.chat_template))


@contextmanager
def llama_server(file: Path) -> Iterator[str]:
    """The address of llama.cpp's server with this file."""
    import xllamacpp

    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.port, given.hostnames = str(file), 512, 0, ["127.0.0.1"]
    given.n_parallel, given.warmup, given.verbosity, given.cpuparams.n_threads = 1, False, -1, 1
    server = xllamacpp.Server(given)
    yield server.listening_address
    del server
