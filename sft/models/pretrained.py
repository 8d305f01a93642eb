"""Reads the tokenizer and the architecture of a pretrained model, and explains why it cannot.

Preparing data needs no more of a model. So this imports no PEFT, which takes a second.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.config.schema import Model
from sft.errors import ModelError, UserError
from sft.models import classes, vocabulary
from sft.runtime import plain


def absolute_name(name: str) -> str:
    """Returns the name of a model as it is valid in any folder: a hub id or an absolute path."""
    return os.path.abspath(name) if Path(name).exists() else name


def looks_local(name: str) -> bool:
    """Returns whether a name is a path, and not the hub's `owner/model`.

    A folder that holds runs, such as `outputs`, is no owner.
    """
    owner, *rest = Path(name).parts or [""]
    is_path = name.startswith(("/", ".", "~")) or name.endswith("/") or len(rest) > 1
    holds_runs = owner == "outputs" or any(Path(owner).glob("*/config.yaml"))
    return is_path or bool(rest and holds_runs)


def _refuse_missing_folder(name: str) -> None:
    """Raises ModelError for a path at which there is nothing, without asking the hub for it."""
    if not looks_local(name) or Path(name).exists():
        return
    folder = Path(name).parent
    near: list[str] = []
    with suppress(OSError):
        near = sorted(path.name for path in folder.iterdir() if path.is_dir())[:12]
    found = f"{folder} has {', '.join(near)}" if near else f"{folder} has no folders"
    raise ModelError(
        f"model.name: cannot load {name!r}: expected a folder with a run or a model, or a hub id "
        f"(owner/model); found: no such folder here ({found}). Train first (`make train`), or give "
        "another name"
    )


def load_tokenizer(config: Model) -> Tokenizer:
    """Loads the tokenizer. Raises ModelError if there is none that works."""
    with explain_load_errors(config.name):
        tokenizer = AutoTokenizer.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        tokenizer("a")  # some errors in a tokenizer's files show only in use
        if config.new_tokens:
            vocabulary.add_tokens(tokenizer, config.new_tokens)
        tokenizer.init_kwargs["stop_tokens"] = _stop_tokens(tokenizer, config)
        return tokenizer


def _stop_tokens(tokenizer: Tokenizer, config: Model) -> list[str]:
    """Returns the texts of the tokens at which generation stops, eos apart: those that were saved
    with the tokenizer, those of generation_config.json, and `model.stop_tokens`."""
    vocabulary = tokenizer.get_vocab()
    if unknown := [token for token in config.stop_tokens or [] if token not in vocabulary]:
        raise ModelError(f"model.stop_tokens: the tokenizer has no token {', '.join(unknown)}")
    saved = tokenizer.init_kwargs.get("stop_tokens", [])
    with suppress(OSError):  # there is none
        options: Any = {"revision": config.revision} if config.revision else {}
        ends = GenerationConfig.from_pretrained(config.name, **options).eos_token_id
        ids = ends if isinstance(ends, list) else [ends]
        saved = [*saved, *(token for token, i in vocabulary.items() if i in ids)]
    own = {*(set(saved) & vocabulary.keys()), *(config.stop_tokens or [])}
    return sorted(own - {tokenizer.eos_token})


def architecture(config: Model) -> Any:
    """Returns the transformers configuration (`config.json`) of the model; reads no weights.

    Raises ModelError for a model that does not write text from left to right.
    """
    with explain_load_errors(config.name):
        found = AutoConfig.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        classes.refuse_other_than_decoders(found, config.name)
        return found


def sub_configs(config: Any) -> Iterator[Any]:
    """Yields a transformers configuration, as an object or as JSON, and all within it."""
    yield config
    for value in (config if isinstance(config, dict) else vars(config)).values():
        if isinstance(value, PretrainedConfig | dict):
            yield from sub_configs(value)


def keep_layers(architecture: Any, depth: int) -> Any:
    """Returns a copy of a transformers configuration with its first `depth` layers."""
    result = copy.deepcopy(architecture)
    text = result.get_text_config()
    whole = text.num_hidden_layers
    for name, value in [*vars(text).items()]:
        if isinstance(value, list) and len(value) == whole:  # one entry for each layer
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    if shared := getattr(text, "num_kv_shared_layers", None):  # the last ones
        text.num_kv_shared_layers = max(0, depth - (whole - shared))
    return result


WIDTHS = {  # sizes of narrow layers, by their names in a configuration
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
}
EXPERTS = {  # of a small mixture
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,  # layers without experts
}


def narrow(architecture: Any, *, experts: bool = False) -> Any:
    """Returns a copy of a transformers configuration with narrow layers.

    `experts`: also with few experts.
    """
    result = copy.deepcopy(architecture)
    text = result.get_text_config()
    if text.hidden_size <= WIDTHS["hidden_size"]:
        return result
    heads, groups = (getattr(text, f"num_{n}_heads", None) for n in ("attention", "key_value"))
    for name, size in (WIDTHS | (EXPERTS if experts else {})).items():
        is_derived = name == "head_dim" and hasattr(text, "qk_rope_head_dim")
        if getattr(text, name, None) is not None and not is_derived:
            setattr(text, name, size)
    if groups is not None:  # still as many as heads, fewer, or one
        text.num_key_value_heads = 4 if groups == heads else min(groups, 2)
    return result


def refuse_special(folder: str) -> None:
    """Raises ModelError if a folder holds a pipe or a device, at which a library would wait."""
    if special := plain.find_special(Path(folder)):
        raise ModelError(f"{special} is no file; remove it")


@contextmanager
def explain_load_errors(name: str) -> Iterator[None]:
    """Turns what libraries raise for a missing, foreign or damaged model into a ModelError."""
    _refuse_missing_folder(name)
    refuse_special(name)
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files from anywhere can cause any error
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            raise ModelError(
                f"model.name: {name!r} brings Python code of its own, which is not run; read it, "
                "and set model.trust_remote_code: true if you trust it"
            ) from None
        if Path(name).is_dir():
            found = f"a folder with {sorted(path.name for path in Path(name).iterdir())[:12]}"
        else:
            is_file = Path(name).exists()
            found = "a file" if is_file else "no such folder here, and the hub did not provide it"
        raise ModelError(
            f"model.name: cannot load {name!r}: expected a folder in Hugging Face format "
            f"(config.json, *.safetensors, tokenizer) or a hub id; found: {found}. ({reason[:300]})"
        ) from error
