"""Reads the settings of adapters from adapter_config.json, which may come from anywhere.

Only known keys of known types are read; nothing in the file makes code run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sft.config.lora import CHANGES_BASE, REFUSED, Lora
from sft.config.schema import Tuning
from sft.config.section import Origins
from sft.errors import shorten

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
NEW_TOKENS = "new_tokens"  # in tokenizer_config.json: each new token with the ids of its pieces
SHARED = ("r", "lora_alpha", "target_modules")  # keys of adapter_config.json and of `tuning`
# Keys of adapter_config.json that change nothing in an adapter that is loaded.
INERT = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "fan_in_fan_out", "lora_dropout", "megatron_core"),
    *("loftq_config", "eva_config", "qalora_group_size", "runtime_config"),
)
DECOMPOSED = ("loftq", "corda", "lora_ga")  # first weights that belong to a changed base


def check_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError unless a folder holds a LoRA adapter that can be read."""
    kind, base = config["peft_type"], config["base_model_name_or_path"]
    if kind != "LORA":
        raise ValueError(
            f"expected peft_type LORA, found {shorten(kind)}; if PEFT can merge it into its base, "
            "give the result as model.name"
        )
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"expected the name of its base, found {shorten(base)}: set base_model_name_or_path in "
            f"its {ADAPTER_CONFIG}"
        )
    if not (folder / ADAPTER).is_file():
        others = sorted(path.name for path in folder.glob("adapter_model*"))
        hint = "; load it with PEFT, and save it again" if others else ""
        is_pickle = any(not name.endswith((".safetensors", ".json")) for name in others)
        why = " (a pickle, which could make code run)" if is_pickle else ""
        raise ValueError(f"expected {ADAPTER}, found {', '.join(others[:3]) or 'none'}{why}{hint}")


def adapter_tuning(config: Mapping[str, Any]) -> Tuning:
    """Returns the settings of an adapter's config, of which known keys of known types are read.

    Raises ValueError or KeyError if it has none, or has features that are not supported.
    """
    given = {key: value for key, value in config.items() if value not in (None, [], {}, "")}
    read = {*SHARED, *INERT, *Lora.model_fields}
    if strange := sorted(key for key, value in given.items() if value and key not in read):
        reasons = (f"{key} ({REFUSED.get(key, 'not known to PEFT 0.21')})" for key in strange)
        raise ValueError(f"not supported: {', '.join(reasons)}")
    init = given.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init in DECOMPOSED:
        raise ValueError(f"init_lora_weights: {init}, so the adapter belongs to a changed base")
    if str(init).startswith("pissa_niter"):
        raise ValueError(
            f"init_lora_weights: {init}: its base was changed by a random approximation, which "
            "cannot be repeated; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    own = {key: given[key] for key in Lora.model_fields if key in given}
    # PEFT subtracts these from the base once more; what others begin with is overwritten.
    own["init_lora_weights"] = init if str(init).startswith(CHANGES_BASE) else True
    targets = given.get("target_modules", [] if "target_parameters" in given else None)
    if targets is None:
        raise KeyError("target_modules")
    return Tuning(
        r=config["r"], lora_alpha=config["lora_alpha"], target_modules=targets, lora=Lora(**own)
    )


def describe_fault(error: Exception) -> str:
    """Returns in one line why `adapter_tuning` refused a file."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}, found {shorten(first['input'])}"


def shape_values(tuning: Tuning) -> dict[str, Any]:
    """Returns the keys of `tuning` that decide what an adapter computes, with lists in order."""
    values = tuning.model_dump()
    lora = {f"lora.{key}": value for key, value in values["lora"].items()}
    shape = {key: values[key] for key in SHARED} | lora
    return {key: sorted(v) if isinstance(v, list) else v for key, v in shape.items()}


def continue_adapter(tree: dict[str, Any], origins: Origins, problems: list[str]) -> None:
    """Gives `tuning` the shape of the adapter that `model.adapter` names.

    Adds to `problems` what cannot be read, and keys of `tuning` that say otherwise.
    """
    model = tree.get("model")
    given = model.get("adapter") if isinstance(model, dict) else None
    if (
        not isinstance(model, dict)
        or not isinstance(given, str)
        or not isinstance(tree.setdefault("tuning", {}), dict)
    ):
        return
    tuning: dict[str, Any] = tree["tuning"]
    place = f" ({origins['model.adapter']})" if "model.adapter" in origins else ""
    path = Path(given, ADAPTER_CONFIG)
    try:
        if not path.is_file():
            raise ValueError(f"expected the folder of an adapter ({ADAPTER_CONFIG}), found none")
        found = json.loads(path.read_text("utf-8"))
        check_files(Path(given), found)
        read = adapter_tuning(found)
        tokens = _new_tokens(Path(given), read)
        if read.lora.changes_base:
            raise ValueError(
                f"{read.lora.init_lora_weights}: it belongs to a changed base; convert it with "
                "PEFT's path_initial_model_for_weight_conversion first"
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"model.adapter{place}: {given}: {describe_fault(error)}")
        return
    if (wanted := model.setdefault(NEW_TOKENS, tokens)) != tokens and wanted is not None:
        problems.append(
            f"model.{NEW_TOKENS}: the adapter in {given} has rows of {tokens or 'no new tokens'}, "
            f"found {shorten(wanted)}; merge it into its base first, and add tokens to the result"
        )
    model[NEW_TOKENS] = tokens
    own = dict(_flat(tuning))
    for key, value in shape_values(read).items():
        mine = own.get(key, value)
        mine = sorted(mine) if isinstance(mine, list) and value is not mine else mine
        if mine != value and (key, mine) != ("target_modules", "auto"):
            where = f" ({origins[f'tuning.{key}']})" if f"tuning.{key}" in origins else ""
            problems.append(
                f"tuning.{key}{where}: the adapter in {given} has {shorten(value)}, found "
                f"{shorten(mine)}; remove this key, or model.adapter"
            )
    shape = read.model_dump()
    tuning.update({key: shape[key] for key in SHARED})
    tuning["lora"] = {**shape["lora"], "init_lora_weights": True}


def _new_tokens(folder: Path, tuning: Tuning) -> list[str] | None:
    """Returns the tokens whose rows the adapter in a folder trains, of those that were added."""
    ids = tuning.lora.trained_ids
    settings, path = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not ids or not settings.is_file() or not path.is_file():
        return None
    added = json.loads(path.read_text("utf-8"))["added_tokens"]
    own = {each["content"] for each in added if each["id"] in ids}
    found = json.loads(settings.read_text("utf-8")).get(NEW_TOKENS, {})
    return [token for token in found if token in own] or None


def _flat(tuning: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the keys that are given in `tuning`, those of its section `lora` as `lora.<key>`."""
    lora = tuning.get("lora")
    for key, value in lora.items() if isinstance(lora, dict) else ():
        yield (key if key in SHARED else f"lora.{key}"), value
    yield from ((key, value) for key, value in tuning.items() if key != "lora")
