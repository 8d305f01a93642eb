"""Loads the model as configured (full, LoRA or QLoRA).

Trained weights, their gradients and their optimizer state are fp32, or bf16 with `bf16_pure`. A
frozen base is stored in the compute dtype or in 4 bits. bf16 and fp16 run under autocast. All this
is checked after the build.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from sft.config.schema import Config, Model
from sft.errors import ModelError
from sft.models import attention, casts, checkpointing, classes, experts, fp8, offload, vocabulary
from sft.models.adapt import add_adapters, refuse_unused
from sft.models.cut import Cutting
from sft.models.dtypes import DTYPES, check_dtypes, store_trained
from sft.models.groups import freeze_groups
from sft.models.pretrained import (
    absolute_name,
    architecture,
    explain_load_errors,
    keep_layers,
    load_tokenizer,
    narrow,
    sub_configs,
)
from sft.models.quantise import four_bits, keep_nf4_trainable, quantise, quantising_all
from sft.models.reach import freeze_untrained, reach
from sft.runtime import checkpoint, plain


def _check_files(folder: Path) -> None:
    """Raises ModelError for a weight file that is damaged or unsafe. Reads only headers."""
    for path in sorted(folder.glob("*.safetensors")):
        if reason := checkpoint.tensor_fault(path):
            raise ModelError(f"model.name: {path} cannot be loaded: {reason}; copy it again")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        # transformers would read any file that it names, and unpickle one that is not safetensors.
        names = set(plain.load_json(index, follow=True)["weight_map"].values())
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"model.name: {index} names {name!r}, expected *.safetensors")


def build(
    config: Config,
    precision: str,
    device: torch.device,
    weights: bool = True,
    depth: int | None = None,
    adapt: Callable[[nn.Module, Config], nn.Module] | None = None,
    narrowed: bool = False,
    cutting: Cutting | None = None,
) -> nn.Module:
    """Returns the model ready to train: frozen, quantised and adapted as `tuning.mode` says.

    Weights are a function of (files, `train.seed`), the same on every process. Without `weights`
    they are random, and no weight file is read. `depth` sets the number of layers. `adapt` adds the
    trained parts to a frozen base; by default, LoRA adapters. `narrowed`: with narrow layers, and
    without `weights`. `cutting`: the context within which a rank keeps its own elements only.
    """
    torch.manual_seed(config.train.seed)
    mode = config.tuning.mode
    bits = config.tuning.four_bits
    if config.tuning.quantization and config.model.init == "pretrained":
        arch = architecture(config.model)
        refuse_quantised(arch, config.model.name, mode, config.tuning.quantization)
    stored = DTYPES["bf16" if config.train.is_bf16_pure else "fp32"]
    options = weights, depth, bits, narrowed, stored, cutting
    base: Any = load_base(config.model, mode, precision, device, *options)
    if config.tuning.router == "trained" and not (found := reach(base)).routers:
        why = f" (its step could not be traced: {found.problem})" if found.problem else ""
        raise ModelError(
            "tuning.router: expected a mixture of experts, found a model that chooses none"
            f"{why}; set frozen"
        )
    if mode != "full":
        base.requires_grad_(False)
        if config.tuning.lora.init_lora_weights == "loftq" and weights:
            refuse_quantised(architecture(config.model), config.model.name, "lora")
        base = adapt(base, config) if adapt else add_adapters(base, config.tuning)
        if hasattr(base, "get_base_model") and not config.model.adapter:
            refuse_unused(base, config.tuning)
    else:
        experts.follow_autocast(base)
        freeze_untrained(base, routers=config.tuning.router == "frozen")
    freeze_groups(base, config.train)
    # With a cache, transformers ignores the borders of packed documents.
    base.config.use_cache = False
    for part in sub_configs(base.config):
        if getattr(part, "use_cache", False):
            part.use_cache = False
    kind = config.train.gradient_checkpointing
    if kind and kind != "auto":  # the plan has decided about `auto`
        checkpointing.enable(base, kind)
    if config.train.activation_offload is True:
        offload.install(base)
    check_dtypes(store_trained(base, config.train), mode, precision, stored)
    if config.train.fp8 and weights:  # a plan counts products in bf16, which keep the same tensors
        fp8.compute_in_fp8(base, device)
    if mode == "full":  # a frozen base gives activations in the compute dtype
        casts.share(base)
    return base


def load_base(
    config: Model,
    mode: str,
    precision: str,
    device: torch.device,
    weights: bool = True,
    depth: int | None = None,
    quantization: str = "nf4",
    narrowed: bool = False,
    stored: torch.dtype = torch.float32,
    cutting: Cutting | None = None,
) -> nn.Module:
    """Returns the base without adapters: in the compute dtype or 4 bits, or `stored` if trained.

    `quantization`: the kind of 4 bits, as in `tuning.quantization`.
    Raises ModelError for a model that cannot be loaded, or whose files lack weights.
    """
    check_attention(config)
    compute, kernel = DTYPES[precision], config.attn_implementation
    options = {
        "dtype": stored if mode == "full" else compute,
        "attn_implementation": None if kernel == "auto" else kernel,
        "trust_remote_code": config.trust_remote_code,
    }
    with explain_load_errors(config.name):
        arch = architecture(config)
        if config.init == "pretrained":
            refuse_quantised(arch, config.name, mode)
        if config.init == "random" or not weights:
            arch = arch if depth is None else keep_layers(arch, depth)
            arch = narrow(arch) if narrowed else arch
            with cutting.drawing() if cutting else nullcontext():
                model = classes.from_config(arch, **options).to(device)
            if mode == "qlora":
                quantise(model, compute, quantization)
            return with_new_tokens(model, config)
        _check_files(Path(config.name))
        with quantising_all(), cutting.reading() if cutting else nullcontext():
            loaded: Any = classes.auto_class(arch).from_pretrained(
                config.name,
                **options,
                revision=config.revision,
                use_safetensors=True,
                quantization_config=four_bits(compute, quantization) if mode == "qlora" else None,
                device_map={"": device},
                output_loading_info=True,
            )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers only warns and makes them up
        raise ModelError(
            f"model.name: the weight files of {config.name!r} lack {len(missing)} tensors, such as "
            f"{missing[0]}; copy the model again, or set model.init: random for fresh weights"
        )
    if not _quantization_of(arch):
        _refuse_unlisted(config)
    if mode == "qlora":
        keep_nf4_trainable(model)
    model.name_or_path = absolute_name(config.name)  # PEFT writes it into an adapter's config
    model = with_new_tokens(model, config)
    if cutting:
        cutting.cut_rest(model)
    return model


def refuse_quantised(arch: Any, name: str, mode: str, kind: str | None = None) -> None:
    """Raises ModelError for a base whose files are quantised, unless training reads them as such.

    Without its settings, transformers would read some of them as if they were plain numbers.
    `kind`: the kind of 4 bits that is asked for; None: any.
    """
    found = next((own for each in sub_configs(arch) if (own := _quantization_of(each))), None)
    if not found:
        return
    settings = found if isinstance(found, dict) else found.to_dict()
    bits = bool(settings.get("load_in_4bit"))  # old files of bitsandbytes name no method
    method = str(settings.get("quant_method") or ("bitsandbytes" if bits else "an unknown way"))
    in_4_bits, own = method == "bitsandbytes" and bits, settings.get("bnb_4bit_quant_type", "fp4")
    if in_4_bits and mode == "qlora":
        if kind not in (None, own):
            raise ModelError(
                f"tuning.quantization: {name!r} comes quantised as {own}, which cannot be changed, "
                f"found {kind}; remove this key, or give the model from which it was made"
            )
        return
    remedy = "set tuning.mode: qlora, or give" if in_4_bits else "give"
    raise ModelError(
        f"model.name: {name!r} comes quantised ({method}), and tuning.mode: {mode} needs plain "
        f"weights; {remedy} the model from which it was made"
    )


def _quantization_of(config: Any) -> Any:
    """Returns the settings of quantisation in a configuration; older files have another key."""
    keys = ("quantization_config", "compression_config")
    return next((found for key in keys if (found := getattr(config, key, None))), None)


def _refuse_unlisted(config: Model) -> None:
    """Raises ModelError for weights of few bits of which config.json says nothing.

    Some tools write the settings of quantisation into a file of their own (hf_quant_config.json).
    transformers would cast such numbers without their scales.
    """
    with explain_load_errors(config.name):
        found = cached_file(config.name, "config.json", revision=config.revision)
    for path in sorted(Path(str(found)).parent.glob("*.safetensors")):
        with checkpoint.open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                kind = file.get_slice(name).get_dtype()
                if name.endswith("weight") and not kind.startswith(("F64", "F32", "F16", "BF16")):
                    raise ModelError(
                        f"model.name: {config.name!r} comes quantised: {path.name} stores {name} "
                        f"as {kind}, and config.json does not say how to read it; give the model "
                        "from which it was made"
                    )


def with_new_tokens(model: nn.Module, config: Model) -> nn.Module:
    """Returns the model with embeddings of `model.new_tokens`."""
    if config.new_tokens:
        vocabulary.add_rows(model, load_tokenizer(config), config.new_tokens)
    return model


def check_attention(config: Model) -> None:
    """Registers `varlen` if it is configured. Raises ModelError for an architecture without it.

    transformers does not check a registered name. `varlen` needs an architecture that works without
    a mask, as flash attention does, and SDPA for what its kernel does not support.
    """
    if config.attn_implementation != attention.NAME:
        return
    attention.register()
    arch, model = architecture(config), None
    with explain_load_errors(config.name), torch.device("meta"):
        try:
            model = classes.from_config(
                arch,
                attn_implementation=attention.NAME,
                trust_remote_code=config.trust_remote_code,
            )
        except KeyError as error:  # older models look names up in a table of their own
            if error.args != (attention.NAME,):
                raise
    if not (model and model._supports_flash_attn and model._supports_sdpa):
        raise ModelError(
            f"model.attn_implementation: {attention.NAME} expects an architecture that has flash "
            f"attention and SDPA in transformers, found {arch.model_type}; set auto"
        )
