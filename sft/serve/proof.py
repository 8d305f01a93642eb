"""Proves that a merged model equals the one that was trained; reads files, writes none.

The proof loads the merged folder as a user does and compares it with the adapter on its base: every
tensor, the tokenizer, template and generation files, and the KL divergence on fixed prompts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from rich.console import RenderableType
from rich.text import Text
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sft.config.schema import Config
from sft.data import audit, template
from sft.errors import MergeError
from sft.evaluate import generate, predictions
from sft.models import classes, pretrained
from sft.models.adapt import NAME
from sft.models.dtypes import DTYPES
from sft.runtime import checkpoint
from sft.runtime.console import table
from sft.serve.runs import load_trained
from sft.tasks.registry import task_of

NUM_PROMPTS = 32  # conversations whose probabilities are compared
NUM_POSITIONS = 64  # compared at the end of each, where the answer is
# Nats per token that rounding to the dtype may cost (docs/LOG.md has what was measured).
MAX_KL = {"fp32": 1e-8, "fp16": 1e-4, "bf16": 5e-3}
# Names of parameters that are not of an adapter.
IS_OF_BASE = re.compile(r"(?!.*\.(lora_\w+|modules_to_save|trainable_tokens_delta)\.).*")
WRAPPED = r"\.(base_layer|token_adapter)\b"  # what adapters add to the name of a module
MAX_LOSS = 0.1  # KL as a share of the adapter's own effect; half its scale loses 0.25, no adapter 1
MIN_EFFECT = 1e-9  # nats per token; a smaller effect counts as this one
Say = Callable[[RenderableType], None]


class Check(TypedDict):
    """A line of the proof. `limit`: the largest number that passes, or the only text."""

    ok: bool
    what: str
    measured: float | str
    limit: float | str


Checks = dict[str, Check]


def at_most(what: str, measured: float, limit: float) -> Check:
    shown = measured if math.isfinite(measured) else str(measured)  # JSON has no NaN
    return Check(ok=measured <= limit, what=what, measured=shown, limit=limit)


def equal(what: str, found: Any, expected: Any) -> Check:
    return Check(ok=found == expected, what=what, measured=str(found), limit=str(expected))


def prove(folder: Path, run: Path, config: Config, base: str) -> dict[str, Any]:
    """Compares the merged model in `folder` with the adapter of `run` on the weights of `base`.

    Both compute in fp32, so only the stored weights differ. Returns the report.
    """
    merged, dtype, loading = load_merged(folder, config)
    reference: Any
    reference, tokenizer = load_trained(run, config, quantised=base == "dequantised")
    generation = add_turn_ends(reference.get_base_model().generation_config, tokenizer)
    prompts = _load_prompts(run, tokenizer)
    expected = _logits(reference, prompts)
    with reference.disable_adapter():
        effect = _kl(expected, _logits(reference, prompts))
    checks = _compare_tokenizers(folder, config, tokenizer)
    checks["generation"] = _compare_generation(folder, generation)
    checks |= _compare_tensors(reference, merged, loading, dtype)
    del reference  # its memory is needed for the merged model in fp32
    kl = _kl(expected, _logits(merged.float(), prompts))
    limit = min(MAX_KL[dtype], MAX_LOSS * max(effect, MIN_EFFECT))
    checks["kl"] = at_most("KL from the adapter model, nats per token", kl, limit)
    return {
        "run": str(run),
        "dtype": dtype,
        "base": base,
        **task_of(config).selection(config),
        "num_prompts": len(prompts),
        "checks": checks,
    }


def load_merged(folder: Path, config: Config) -> tuple[Any, str, dict[str, Any]]:
    """Returns (merged model, its dtype, what transformers says about its tensors).

    Raises MergeError if it cannot be loaded.
    """
    for path in sorted(folder.glob("*.safetensors")):
        if reason := checkpoint.tensor_fault(path):
            raise MergeError(f"{path} cannot be loaded: {reason}; merge again")
    try:
        own = config.model.model_copy(update={"name": str(folder), "revision": None})
        loaded: Any = classes.auto_class(pretrained.architecture(own)).from_pretrained(
            str(folder),
            dtype="auto",
            trust_remote_code=config.model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise MergeError(f"{folder} cannot be loaded ({error}); merge again") from error
    merged, loading = loaded
    stored = merged.config.dtype
    dtype = next((name for name, kind in DTYPES.items() if kind == stored), None)
    if dtype is None:
        raise MergeError(
            f"{folder}: expected weights in one of {', '.join(DTYPES)}, found {stored}; merge again"
        )
    return merged.eval(), dtype, loading


def _load_prompts(run: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of conversations that the run's evaluation stored, or else of two others."""
    path = run / "evaluation" / "predictions.jsonl"
    stored = islice(predictions.read_records(path), NUM_PROMPTS) if path.is_file() else ()
    texts = [(each["prompt"], each["reference"]) for each in stored if "reference" in each]
    return [
        template.render(
            tokenizer,
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        ).ids
        for prompt, answer in texts or [("Hello", "Hello"), ("What is this?", "A test.")]
    ]


def _compare_tokenizers(folder: Path, config: Config, expected: PreTrainedTokenizerBase) -> Checks:
    """Compares the tokenizer in `folder` with the one that the run was trained with."""
    own = {"name": str(folder), "revision": None, "new_tokens": None}
    both = (pretrained.load_tokenizer(config.model.model_copy(update=own)), expected)
    tokenizers = (audit.tokenizer_sha256(each)[:12] for each in both)
    templates = (audit.template_sha256(each)[:12] for each in both)
    return {
        "tokenizer": equal("digest of vocabulary and special tokens", *tokenizers),
        "template": equal("digest of the chat template", *templates),
    }


def _compare_generation(folder: Path, expected: GenerationConfig) -> Check:
    what = "generation_config.json and its ends of a turn"
    if not (folder / "generation_config.json").exists():
        return equal(what, "missing", "present")
    both = (GenerationConfig.from_pretrained(str(folder)), expected)
    found, wanted = (json.loads(each.to_json_string(ignore_metadata=True)) for each in both)
    other = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
    return equal(
        what, *({key: own.get(key) for key in other} or "equal" for own in (found, wanted))
    )


def add_turn_ends(base: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Returns the base's configuration with the tokens that end a turn of the template.

    A base that does not know the template lacks them; its answers would never end.
    """
    result = GenerationConfig.from_dict(base.to_dict())
    ends = generate.stop_ids(tokenizer, base)
    result.eos_token_id = ends[0] if len(ends) == 1 else ends
    return result


@torch.no_grad()
def _compare_tensors(
    reference: Any, merged: nn.Module, loading: dict[str, Any], dtype: str
) -> Checks:
    """Compares each tensor, by all names of tied ones, with its expected value."""
    found = dict(merged.named_parameters(remove_duplicate=False))
    strange = set(loading["missing_keys"]) | set(loading["unexpected_keys"])
    worst, where = 0.0, ""
    for name, expected in _expected_weights(reference, merged):
        value = found.pop(name, None)
        if value is None or value.shape != expected.shape:
            strange.add(name)
        elif (error := _count_roundings(value.float(), expected, dtype)) > worst:
            worst, where = error, name
    names = sorted(strange | found.keys())
    shown = ", ".join([*names[:1], *(["..."] if names[1:] else [])]) or "none"
    weights = "error of the worst weight, in roundings" + (f" ({where})" if worst > 1 else "")
    return {
        "tensors": equal("tensors that are missing, unknown or misshapen", shown, "none"),
        "weights": at_most(weights, worst, 1.0),
    }


def _expected_weights(reference: Any, merged: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name and expected value, in fp32, of each parameter of `merged`.

    It uses the formulas of `_adapted`, and not the library that merged.
    """
    plain, modules = reference.get_base_model(), dict(merged.named_modules())
    wrappers = {re.sub(WRAPPED, "", n): m for n, m in reversed([*plain.named_modules()])}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        owner, _, kind = name.rpartition(".")
        if ".modules_to_save.default" in owner:  # takes the place of `original_module`
            yield name.replace(".modules_to_save.default", ""), parameter.float()
        if ".original_module" in owner or not IS_OF_BASE.fullmatch(name):
            continue
        wrapped = re.sub(WRAPPED, "", owner)
        wrapper = wrappers[wrapped] if wrapped != owner else None
        is_transposed = isinstance(modules.get(wrapped), Conv1D)  # GPT-2's, (in, out)
        value = dequantise(parameter)
        if is_transposed and hasattr(parameter, "quant_state"):
            value = value.T
        if wrapper is not None:
            value = _adapted(wrapper, kind, value, is_transposed)
        yield f"{wrapped}.{kind}", value


def _adapted(layer: Any, kind: str, value: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """Returns a weight or bias of the base as the adapter of `layer` changes it.

    LoRA (Hu et al. 2021): W + s B A, with s = alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023).
    DoRA (Liu et al. 2024): each row of that, scaled to the length that was learnt for it. Rows of
    trained tokens are as they were learnt.
    """
    if hasattr(layer, "token_adapter"):
        tokens = layer.token_adapter
        value = value.clone()
        value[tokens.token_indices[NAME]] = tokens.trainable_tokens_delta[NAME].float()
        return value
    while getattr(layer, "parameter_name", kind) != kind:  # PEFT nests adapters of parameters
        layer = layer.base_layer
    if not hasattr(layer, "lora_A"):  # another parameter of a module with an adapter
        return value
    rank, alpha = layer.r[NAME], layer.lora_alpha[NAME]
    scale = alpha / (math.sqrt(rank) if layer.use_rslora[NAME] else rank)
    if value.ndim == 3 and hasattr(layer, "parameter_name"):
        return value + scale * _experts_product(layer, value.shape)
    if kind == "bias":
        bias = layer.lora_B[NAME].bias if NAME in layer.lora_B else None
        return value if bias is None else value + scale * bias
    is_embedding = NAME in layer.lora_embedding_A
    if is_embedding:
        a, b = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
    else:
        a, b = (part[NAME].weight for part in (layer.lora_A, layer.lora_B))
    is_transposed |= is_embedding
    value = value + scale * ((b @ a).T if is_transposed else b @ a)
    if NAME in layer.lora_magnitude_vector:
        rows = value.norm(dim=0 if is_transposed else 1, keepdim=True)
        length = layer.lora_magnitude_vector[NAME].weight
        value = value * (length.view(rows.shape) / rows)
    return value


def _experts_product(layer: Any, shape: torch.Size) -> torch.Tensor:
    """Returns B A of each expert, in the shape of the weights: (experts, out, in), or transposed.

    PEFT stores A as (experts * r, in) and B as (out, r * experts).
    """
    a, b = (part[NAME].weight for part in (layer.lora_A, layer.lora_B))
    number = shape[0]
    each = (
        b[:, expert::number] @ rows for expert, rows in enumerate(a.chunk(number))
    )  # column r * number + expert of B
    product = torch.stack(list(each))
    return product.mT if getattr(layer.get_base_layer(), "is_transposed", False) else product


def dequantise(weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight in fp32, whether it is stored in 4 bits or not."""
    if not hasattr(weight, "quant_state"):
        return weight.float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


def _count_roundings(value: torch.Tensor, expected: torch.Tensor, dtype: str) -> float:
    """Returns the largest error of an element, divided by the error that rounding explains.

    That is half a unit in the last place of `dtype`, and fp32's own error in the sum `expected`.
    """
    kind = torch.finfo(DTYPES[dtype])
    slack = 16 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    allowed = expected.abs() * (kind.eps / 2) + kind.smallest_normal * kind.eps + slack
    return float(((value - expected).abs() / allowed).nan_to_num(math.inf).max())


@torch.no_grad()
def _logits(loaded: nn.Module, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Returns (positions, vocabulary) for each prompt."""
    batches = (torch.tensor([ids[: generate.context_length(loaded)]]) for ids in prompts)
    return [loaded(input_ids=ids).logits[0, -NUM_POSITIONS:].float().clone() for ids in batches]


def _kl(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Returns the KL divergence of `found` from `expected` in nats per token.

    It is computed in fp64, since in fp32 it would measure its own rounding.
    """
    total = 0.0
    for logits in zip(found, expected, strict=True):
        new, old = (each.double().log_softmax(-1) for each in logits)
        total += float(F.kl_div(new, old, reduction="sum", log_target=True))
    return total / sum(map(len, expected))


def failing_checks(report: dict[str, Any]) -> list[str]:
    return [name for name, check in report["checks"].items() if not check["ok"]]


def describe_check(check: Check) -> tuple[str, str, str]:
    """Returns (what is compared, what was measured, what was expected) as text."""
    measured, limit = (
        each if isinstance(each, str) else f"{each:.3g}"
        for each in (check["measured"], check["limit"])
    )
    kind = "exactly" if isinstance(check["limit"], str) else "at most"
    return check["what"], measured, f"{kind} {limit}"


def show_proof(report: dict[str, Any], folder: Path, say: Say) -> None:
    """Prints the checks of a report. Raises MergeError with all that fail, if there are any."""
    title = f"Proof: {report['dtype']}, {report['base']} weights, {report['num_prompts']} prompts"
    marks = {True: Text("ok", style="green"), False: Text("NOT OK", style="bold red")}
    described = {name: describe_check(check) for name, check in report["checks"].items()}
    rows = [
        [marks[report["checks"][name]["ok"]], *map(Text, (name, *texts))]
        for name, texts in described.items()
    ]
    say(table(title, ("", "check", "what", "measured", "expected"), rows, left=5))
    failing = failing_checks(report)
    problems = ((name, *described[name]) for name in failing)
    lines = [f"\n  {name}: {what}: expected {e}, found {m}" for name, what, m, e in problems]
    if failing == ["kl"] and report["checks"]["kl"]["limit"] < MAX_KL[report["dtype"]]:
        lines.append(f"\n{report['dtype']} rounds away what the adapter learnt: use DTYPE=fp32")
    if failing:
        raise MergeError(
            f"{folder} is not the model that was trained; do not use it:{''.join(lines)}"
        )
