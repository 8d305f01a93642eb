"""Tokenizer and model from the configuration: full, LoRA or QLoRA (NF4), and every part's dtype.

Trained weights are fp32 (their gradients and optimizer state too); compute runs under autocast when
the precision is bf16; a frozen base is stored in the compute dtype, or in NF4. The policy is
checked after the build, so a silent fp16 or a trainable base cannot happen.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from sft import attention, tensors
from sft.config import Config, Crowd, Model, Tuning, UserError
from sft.crowd.agents import Agents

SEEN = 4096  # bytes at both ends of a tensor that the digest of a model sees
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ModelError(UserError):
    """The model or tokenizer cannot be loaded or adapted as configured."""


def load_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    with explained(config.name):
        tokenizer = AutoTokenizer.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        tokenizer("a")  # some of what a tokenizer's files get wrong shows only in use
        return tokenizer


def architecture(config: Model) -> Any:
    """The transformers configuration (`config.json`) of the model; reads no weights."""
    with explained(config.name):
        return AutoConfig.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )


def shallow(architecture: Any, depth: int) -> Any:
    """A copy of a transformers configuration with its first `depth` layers."""
    result = copy.deepcopy(architecture)
    text = result.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return result


def fingerprint(config: Model) -> str:
    """A digest of the base model, wherever it lies: its config.json and its files of weights."""
    digest = hashlib.sha256(architecture(config).to_json_string().encode())
    if config.init == "pretrained":
        for part in _told_of_weights(config):
            digest.update(part)
    return digest.hexdigest()


def weights_sha256(config: Model) -> str:
    """A digest of the files of weights alone: `config.json` is read differently by each version of
    transformers, and an adapter outlives a version."""
    return hashlib.sha256(b"".join(_told_of_weights(config))).hexdigest()


def _told_of_weights(config: Model) -> Iterator[bytes]:
    """Of each file the name, the size, the header (names, dtypes, shapes), and of each tensor the
    first and the last SEEN bytes: what changes a model changes most of its tensors throughout."""
    with explained(config.name):
        found = cached_file(config.name, "config.json", revision=config.revision)
    for path in sorted(Path(str(found)).parent.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = min(size, int.from_bytes(file.read(8), "little"))
            header = file.read(length)
            yield f"{path.name} {size}".encode() + header
            for start, end in _tensors_in(header):
                for place in (start, max(start, end - SEEN)):
                    file.seek(8 + length + place)
                    yield file.read(min(SEEN, end - start))


def _tensors_in(header: bytes) -> list[tuple[int, int]]:
    """Where the tensors of a file lie, by its header; none if that is damaged: its loader tells."""
    try:
        told = json.loads(header)
        places = [each["data_offsets"] for name, each in told.items() if name != "__metadata__"]
        return sorted((int(start), int(end)) for start, end in places)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what libraries raise for a missing, foreign or damaged model into one message."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a library meets in files that anyone may have written
        told = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in told:
            raise ModelError(
                f"model.name: {name!r} brings Python code of its own, which is not run; read it, "
                "and set model.trust_remote_code: true if you trust it"
            ) from None
        if Path(name).is_dir():
            found = f"a folder with {sorted(path.name for path in Path(name).iterdir())[:12]}"
        else:
            found = "no such folder here, and the hub did not provide it"
        raise ModelError(
            f"model.name: cannot load {name!r}: expected a folder in Hugging Face format "
            f"(config.json, *.safetensors, tokenizer) or a hub id; found: {found}. ({told[:300]})"
        ) from error


def _check_files(folder: Path) -> None:
    """Raises ModelError for a weight file that is not what it says, before any is read."""
    for path in sorted(folder.glob("*.safetensors")):
        if reason := tensors.fault(path):
            raise ModelError(f"model.name: {path} cannot be loaded: {reason}; copy it again")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        # transformers would follow it to any file, and unpickle one that is not safetensors.
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"model.name: {index} names {name!r}, expected *.safetensors")


def build(config: Config, precision: str, device: torch.device, weights: bool = True) -> nn.Module:
    """The model ready to train: frozen, quantised and adapted as `tuning.mode` says.

    Weights are a function of (files, `train.seed`): the same on every process. Without `weights`
    no file of them is read; they are random, and the model is the same in all else.
    """
    torch.manual_seed(config.train.seed)
    mode = config.tuning.mode
    base: Any = load_base(config.model, mode, precision, device, weights)
    if mode != "full":
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        base = add_adapters(base, config.tuning, config.crowd)
    base.config.use_cache = (
        False  # with a cache, transformers ignores the borders of packed documents
    )
    if config.train.gradient_checkpointing is True:  # a plan has made `auto` one of the two
        # Non-reentrant: gradients reach adapters although frozen embeddings have none.
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_dtypes(base, mode, precision)
    return base


def load_base(
    config: Model, mode: str, precision: str, device: torch.device, weights: bool = True
) -> nn.Module:
    """The base model without adapters. `mode` decides its storage: fp32, compute dtype or NF4."""
    check_attention(config)
    kernel = None if config.attn_implementation == "auto" else config.attn_implementation
    compute = DTYPES[precision]
    storage = torch.float32 if mode == "full" else compute
    with explained(config.name):
        if config.init == "random" or not weights:
            model = AutoModelForCausalLM.from_config(
                architecture(config),
                dtype=storage,
                attn_implementation=kernel,
                trust_remote_code=config.trust_remote_code,
            )
            model.to(device)
            if mode == "qlora":
                quantise(model, compute)
            return model
        _check_files(Path(config.name))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.name,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=storage,
            attn_implementation=kernel,
            low_cpu_mem_usage=True,
            use_safetensors=True,
            quantization_config=nf4(compute) if mode == "qlora" else None,
            device_map={"": device},
            output_loading_info=True,
        )
    model, told = loaded
    if missing := sorted(told["missing_keys"]):  # which transformers makes up, with a warning
        raise ModelError(
            f"model.name: the weight files of {config.name!r} lack {len(missing)} tensors, such as "
            f"{missing[0]}; copy the model again, or set model.init: random for fresh weights"
        )
    if mode == "qlora":
        keep_nf4_trainable(model)
    return model


def check_attention(config: Model) -> None:
    """Makes `varlen` known where it is asked for. ModelError for an architecture that cannot have
    it: without flash attention of its own it may need a mask that ours is not given, and what the
    kernel cannot take goes to SDPA. transformers asks nothing of a name that was added to it."""
    if config.attn_implementation != attention.NAME:
        return
    attention.register()
    arch, model = architecture(config), None
    with explained(config.name), torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                arch,
                attn_implementation=attention.NAME,
                trust_remote_code=config.trust_remote_code,
            )
        except KeyError as error:  # an older model has a table of its own
            if error.args != (attention.NAME,):
                raise
    if not (model and model._supports_flash_attn and model._supports_sdpa):
        raise ModelError(
            f"model.attn_implementation: {attention.NAME} expects an architecture that has flash "
            f"attention and SDPA in transformers, found {arch.model_type}; set auto"
        )


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation, as in QLoRA (Dettmers et al. 2023, section 3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantise(model: Any, compute_dtype: torch.dtype) -> None:
    """What loading with `nf4` makes of a model's layers, for one that was not loaded."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    weights = dict(model.named_parameters())
    asked = nf4(compute_dtype)
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    with unset_fake_temporarily():  # its own class of parameters cannot be fake
        replace_with_bnb_linear(model, kept, asked)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = weights[f"{name}.weight"].detach()
            weight = weight if weight.shape[0] == module.out_features else weight.T  # Conv1D
            packed, state = quantize_4bit(
                weight, compress_statistics=asked.bnb_4bit_use_double_quant, quant_type="nf4"
            )
            module.weight = nn.Parameter(packed, requires_grad=False)
            vars(module.weight).update(
                quant_state=state, quant_type="nf4", compress_statistics=True, bnb_quantized=True
            )
            if module.bias is not None:
                module.bias = nn.Parameter(weights[f"{name}.bias"].detach(), requires_grad=False)
    model.is_loaded_in_4bit = True  # PEFT asks
    keep_nf4_trainable(model)


def keep_nf4_trainable(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking NF4 weights for inference on CPUs with AVX512-BF16.

    The first forward in eval mode without gradients would repack every weight in place, and the
    backward passes that follow would read them in the old layout: wrong gradients, no error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def add_adapters(base: nn.Module, tuning: Tuning, crowd: Crowd | None = None) -> nn.Module:
    """`base` with one adapter, as PEFT makes it; or with those of the agents of a crowd."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets = "all-linear" if tuning.target_modules == "auto" else list(tuning.target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=tuning.r,
        lora_alpha=tuning.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=tuning.lora_dropout,
        target_modules=targets,
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if _is_linear(m)})
        raise ModelError(
            f"tuning.target_modules: {targets} names no layer of this model; "
            f"its linear layers are: {', '.join(linear)}"
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Agents(model, crowd) if crowd and crowd.num_agents else model


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


# --- dtype policy ------------------------------------------------------------------------------


def check_dtypes(model: nn.Module, mode: str, precision: str) -> None:
    """Asserts the policy: trained weights fp32; frozen ones in the compute dtype, or NF4."""
    frozen = {torch.float32, DTYPES[precision]} | ({torch.uint8} if mode == "qlora" else set())
    for name, parameter in model.named_parameters():
        allowed = {torch.float32} if parameter.requires_grad else frozen
        assert parameter.dtype in allowed, f"{name} is {parameter.dtype}, expected one of {allowed}"
    if mode == "qlora":
        quantised = sum(p.dtype == torch.uint8 for p in model.parameters())
        assert quantised, "tuning.mode is qlora, but no weight was quantised"


@dataclass(frozen=True)
class Share:
    """Parameters of one kind: (what, dtype, trained or frozen)."""

    what: str
    dtype: str
    trained: bool
    num_parameters: int
    num_bytes: int


def shares(model: nn.Module) -> list[Share]:
    """Parameters by part, dtype and whether they are trained; NF4 counts two weights a byte."""
    counts: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        quantised = parameter.dtype == torch.uint8
        what = "adapters" if "lora_" in name else "embeddings" if "embed" in name else "layers"
        dtype = "NF4" if quantised else str(parameter.dtype).removeprefix("torch.")
        count = counts[what, dtype, parameter.requires_grad]
        count[0] += parameter.numel() * (2 if quantised else 1)
        count[1] += parameter.numel() * parameter.element_size()
    return [Share(*key, *count) for key, count in counts.items()]


def dtype_table(model: nn.Module) -> Table:
    table = Table(title="Model", title_justify="left", box=None, pad_edge=False)
    for column in ("part", "dtype", "trained"):
        table.add_column(column)
    for column in ("parameters", "MiB"):
        table.add_column(column, justify="right")
    for share in shares(model):
        table.add_row(
            share.what,
            share.dtype,
            "yes" if share.trained else "frozen",
            f"{share.num_parameters:,}",
            f"{share.num_bytes / 2**20:,.1f}",
        )
    return table


# --- what attention and the vocabulary head see ------------------------------------------------


class SupervisedHead:
    """Lets only chosen positions reach the vocabulary head, so other logits are never computed.

    While `positions` is set, the head's input (batch, time, hidden) becomes (positions, hidden),
    and the model returns logits (positions, vocabulary). Works through DDP and checkpointing, for
    every architecture with a separate head, because it is a hook on that head.
    """

    def __init__(self, model: nn.Module):
        self.positions: torch.Tensor | None = None  # flat indices into batch * time
        model.get_output_embeddings().register_forward_pre_hook(self._select)  # type: ignore[operator]

    def _select(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        if self.positions is None:
            return None
        return (inputs[0].flatten(0, 1)[self.positions],)


@torch.no_grad()
def documents_are_isolated(model: nn.Module, precision: str, device: torch.device) -> bool:
    """Whether packed documents cannot see each other: alone and packed, the logits are the same.

    transformers tells documents apart by restarting position ids, and silently does not in several
    cases; so it is tried on the model that will train, with the arguments that training uses, and
    in its precision: another one may have another kernel.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    num_ids = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    first, second = (torch.randint(num_ids, (1, n), generator=generator) for n in (11, 7))
    together = torch.cat([first, second], 1).to(device)
    positions = torch.cat([torch.arange(11), torch.arange(7)])[None].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        packed = model(input_ids=together, position_ids=positions, use_cache=False).logits[0, 11:]
        alone = model(input_ids=second.to(device), use_cache=False).logits[0]
    model.train(was_training)
    # A leak changes the logits by about their own size; rounding in bf16 by about 1 %.
    return bool((packed - alone).float().norm() < 0.1 * alone.float().norm())
