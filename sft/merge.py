"""Merges an adapter into its base, proves the result, and converts it for llama.cpp.

The proof only reads. It loads the merged folder as a user does and compares it with the adapter on
its base: every tensor, the tokenizer, template and generation files, and one KL on pinned prompts.
A merge gets its name when it is proven; else it stays as `<name>.failed`, with the report.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sft import audit, chat, export, generate, model, predictions, storage, tensors
from sft.checkpoint import STAGING
from sft.config import Config, UserError
from sft.log import size, write_json


class MergeError(UserError):
    """There is nothing to merge, or the merged model is not the one that was trained."""


# --- the proof ---------------------------------------------------------------------------------

DTYPES = {**model.DTYPES, "fp16": torch.float16}
CPU = torch.device("cpu")
NUM_PROMPTS = 32  # conversations whose probabilities are compared
NUM_POSITIONS = 64  # the last ones of each, which are the answer's: a row is a whole vocabulary
# Nats per token that rounding to the dtype may cost (docs/LOG.md has what was measured).
MAX_KL = {"fp32": 1e-8, "fp16": 1e-4, "bf16": 5e-3}
LOST = 0.1  # of what the adapter changes, at most: half its scale loses 0.25, no adapter 1
NOTHING = 1e-9  # nats per token; below, an adapter changes nothing that could be lost


class Check(TypedDict):
    """One line of the proof. `limit` is the largest number, or the only text, that passes."""

    ok: bool
    what: str
    measured: float | str
    limit: float | str


Checks = dict[str, Check]


def _at_most(what: str, measured: float, limit: float) -> Check:
    shown = measured if math.isfinite(measured) else str(measured)  # JSON has no other numbers
    ok = measured <= limit  # NaN is not
    return Check(ok=ok, what=what, measured=shown, limit=limit)


def _equal(what: str, found: Any, expected: Any) -> Check:
    return Check(ok=found == expected, what=what, measured=str(found), limit=str(expected))


def prove(folder: Path, run: Path, config: Config, base: str) -> dict[str, Any]:
    """Compares the merged model in `folder` with the adapter of `run` on the weights of `base`.

    Both compute in fp32, so only the stored weights differ. Returns the report: `checks`, each with
    ok, what, measured and limit; `run`, `dtype`, `base`, `agent`, `num_prompts`.
    """
    merged, dtype, loading = _load_merged(folder, config)
    reference: Any
    reference, tokenizer = export.load_tuned(
        run, config, "fp32", CPU, quantised=base == "dequantised"
    )
    generation = add_turn_ends(reference.get_base_model().generation_config, tokenizer)
    prompts = _load_prompts(run, tokenizer)
    expected = _logits(reference, prompts)
    with reference.disable_adapter():
        effect = _kl(expected, _logits(reference, prompts))
    checks = _compare_tokenizers(folder, config, tokenizer)
    checks["generation"] = _compare_generation(folder, generation)
    checks |= _compare_tensors(reference, config, merged, loading, dtype)
    del reference  # its memory is needed for the merged model in fp32
    kl = _kl(expected, _logits(merged.float(), prompts))
    limit = min(MAX_KL[dtype], LOST * max(effect, NOTHING))
    checks["kl"] = _at_most("KL from the adapter model, nats per token", kl, limit)
    return {
        "run": str(run),
        "dtype": dtype,
        "base": base,
        "agent": config.crowd.agent,
        "num_prompts": len(prompts),
        "checks": checks,
    }


def _load_merged(folder: Path, config: Config) -> tuple[Any, str, dict[str, Any]]:
    """Returns the merged model as transformers loads it, its dtype, and which tensors were missing
    or unknown. Raises MergeError if it cannot be loaded."""
    for path in sorted(folder.glob("*.safetensors")):
        if reason := tensors.fault(path):
            raise MergeError(f"{path} cannot be loaded: {reason}; merge again")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
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
    """Returns the ids of held-out conversations that the run's evaluation stored; else of two."""
    path = run / "evaluation" / "predictions.jsonl"
    stored = islice(predictions.read(path), NUM_PROMPTS) if path.exists() else ()
    texts = [(each["prompt"], each["reference"]) for each in stored if "reference" in each]
    return [
        chat.render(
            tokenizer,
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        ).ids
        for prompt, answer in texts or [("Hello", "Hello"), ("What is this?", "A test.")]
    ]


def _compare_tokenizers(folder: Path, config: Config, expected: PreTrainedTokenizerBase) -> Checks:
    """Compares the tokenizer in `folder` with the one that the run was trained with."""
    own = {"name": str(folder), "revision": None}
    both = (model.load_tokenizer(config.model.model_copy(update=own)), expected)
    return {
        "tokenizer": _equal(
            "digest of vocabulary and special tokens",
            *(audit.tokenizer_sha256(each)[:12] for each in both),
        ),
        "template": _equal(
            "digest of the chat template", *(audit.template_sha256(each)[:12] for each in both)
        ),
    }


def _compare_generation(folder: Path, expected: GenerationConfig) -> Check:
    what = "generation_config.json and its ends of a turn"
    if not (folder / "generation_config.json").exists():
        return _equal(what, "missing", "present")
    both = (GenerationConfig.from_pretrained(str(folder)), expected)
    found, wanted = (json.loads(each.to_json_string(ignore_metadata=True)) for each in both)
    other = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
    return _equal(
        what, *({key: own.get(key) for key in other} or "equal" for own in (found, wanted))
    )


def add_turn_ends(base: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Returns the base's configuration with the tokens that end a turn. A base that has never seen
    the template does not name them, and its answers would never end."""
    result = GenerationConfig.from_dict(base.to_dict())
    ends = generate.stop_ids(tokenizer, base)
    result.eos_token_id = ends[0] if len(ends) == 1 else ends
    return result


@torch.no_grad()
def _compare_tensors(
    reference: Any, config: Config, merged: nn.Module, loading: dict[str, Any], dtype: str
) -> Checks:
    """Compares each tensor with what it must be; tied weights are one tensor."""
    found = dict(merged.named_parameters())
    strange = set(loading["missing_keys"]) | set(loading["unexpected_keys"])
    worst, where = 0.0, ""
    for name, expected in _expected_weights(reference, config, merged):
        value = found.pop(name, None)
        if value is None or value.shape != expected.shape:
            strange.add(name)
        elif (error := _count_roundings(value.float(), expected, dtype)) > worst:
            worst, where = error, name
    names = sorted(strange | found.keys())
    shown = ", ".join([*names[:1], *(["..."] if names[1:] else [])]) or "none"
    weights = "error of the worst weight, in roundings" + (f" ({where})" if worst > 1 else "")
    return {
        "tensors": _equal("tensors that are missing, unknown or misshapen", shown, "none"),
        "weights": _at_most(weights, worst, 1.0),
    }


def _expected_weights(
    reference: Any, config: Config, merged: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what each parameter of `merged` must be, in fp32, by the formula of LoRA and not by
    the library that merged: W + lora_alpha / r * B @ A."""
    scale = config.tuning.lora_alpha / config.tuning.r
    plain, modules = reference.get_base_model(), dict(merged.named_modules())
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            continue
        owner, _, kind = name.rpartition(".")
        adapted = owner.removesuffix(".base_layer")
        is_turned = isinstance(modules.get(adapted), Conv1D)  # GPT-2's, (in, out)
        value = dequantise(parameter)
        if is_turned and hasattr(parameter, "quant_state"):
            value = value.T
        if owner != adapted and kind == "weight":
            layer = plain.get_submodule(adapted)
            a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
            value = value + scale * ((b @ a).T if is_turned else b @ a)
        yield f"{adapted}.{kind}", value


def dequantise(weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight in fp32, whether it is stored in NF4 or not."""
    if not hasattr(weight, "quant_state"):
        return weight.float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


def _count_roundings(value: torch.Tensor, expected: torch.Tensor, dtype: str) -> float:
    """Returns the largest error of an element over what rounding to `dtype` explains: half a unit
    of its last place, and fp32's own error in the sum that `expected` is."""
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
    """Returns the KL of `found` from `expected` in nats per token, summed in fp64: in fp32 it would
    measure its own rounding."""
    total = 0.0
    for logits in zip(found, expected, strict=True):
        new, old = (each.double().log_softmax(-1) for each in logits)
        total += float(F.kl_div(new, old, reduction="sum", log_target=True))
    return total / sum(map(len, expected))


def failing_checks(report: dict[str, Any]) -> list[str]:
    return [name for name, check in report["checks"].items() if not check["ok"]]


def describe_check(check: Check) -> tuple[str, str, str]:
    """Returns what a check of a report compares, what it measured, and what was expected."""
    measured, limit = (
        each if isinstance(each, str) else f"{each:.3g}"
        for each in (check["measured"], check["limit"])
    )
    kind = "exactly" if isinstance(check["limit"], str) else "at most"
    return check["what"], measured, f"{kind} {limit}"


def proof_table(report: dict[str, Any]) -> Table:
    title = f"Proof: {report['dtype']}, {report['base']} weights, {report['num_prompts']} prompts"
    result = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("", "check", "what", "measured", "expected"):
        result.add_column(column, overflow="fold")
    for name, check in report["checks"].items():
        mark = Text("ok", style="green") if check["ok"] else Text("NOT OK", style="bold red")
        result.add_row(mark, *map(Text, (name, *describe_check(check))))
    return result


def require_proven(report: dict[str, Any], folder: Path) -> None:
    """Raises MergeError, with every check that fails, if there is one."""
    failing = failing_checks(report)
    described = ((name, *describe_check(report["checks"][name])) for name in failing)
    lines = [f"\n  {name}: {what}: expected {e}, found {m}" for name, what, m, e in described]
    if failing == ["kl"] and report["checks"]["kl"]["limit"] < MAX_KL[report["dtype"]]:
        lines.append(f"\n{report['dtype']} rounds away what the adapter learnt: use DTYPE=fp32")
    if failing:
        raise MergeError(
            f"{folder} is not the model that was trained; do not use it:{''.join(lines)}"
        )


# --- the two commands --------------------------------------------------------------------------

REPORT = "merge_report.json"
Say = Callable[[RenderableType], None]


def merge(
    run: Path,
    output: Path,
    dtype: str,
    say: Say,
    base: str = "original",
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Merges the adapter of `run` into `output`; returns the report of the proof.

    `base` names the weights to merge into: `original`, or `dequantised`, on which a QLoRA run was
    trained. Raises MergeError if the proof fails; `output` then does not exist.
    """
    config = _load_config(run, base, overrides)
    staging, failed = _make_room(output)
    try:
        _write(run, config, base, staging, dtype)
        report = prove(staging, run, config, base)
        write_json(staging / REPORT, report)
        (staging / "README.md").write_text(_card(report, config, run, output), "utf-8")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if output.exists():
        output.rmdir()
    final = failed if failing_checks(report) else output
    staging.rename(final)
    say(proof_table(report))
    require_proven(report, final)
    return report


def _make_room(output: Path) -> tuple[Path, Path]:
    """Returns an empty folder to write to, and the name of a merge that fails. Removes what earlier
    merges left there. Raises MergeError if `output` exists or cannot be made."""
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise MergeError(f"{output} exists already; remove it, or give another OUTPUT")
        staging, failed = (output.with_name(output.name + end) for end in (STAGING, ".failed"))
        for leftover in (staging, failed):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise MergeError(
            f"{output}: expected a place for a folder, cannot make it: {error.strerror}; give "
            "another OUTPUT"
        ) from None
    return staging, failed


def retest(
    folder: Path,
    say: Say,
    run: Path | None = None,
    base: str | None = None,
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Repeats the proof on a merged folder, without changing it; returns the report.

    `run` and `base` are those that its report names, if None. Raises MergeError if the proof fails.
    """
    stored = _read_report(folder)
    if run is None and "run" not in stored:
        raise MergeError(f"{folder} has no {REPORT} that names its run; give RUN=<folder>")
    run = run or Path(stored["run"])
    base = base or stored.get("base", "original")
    if stored.get("agent") is not None:
        overrides = [f"crowd.agent={stored['agent']}", *(overrides or [])]
    report = prove(folder, run, _load_config(run, base, overrides), base)
    say(proof_table(report))
    require_proven(report, folder)
    return report


def _read_report(folder: Path) -> dict[str, Any]:
    """Returns run, base and agent from the report in a merged folder; nothing if it has none."""
    if not (folder / "config.json").exists():
        raise MergeError(
            f"{folder}: expected a merged model (config.json, *.safetensors), found "
            f"{'a folder without' if folder.is_dir() else 'nothing'}; run `make merge` first"
        )
    try:
        report = json.loads((folder / REPORT).read_text("utf-8"))
        return {"run": report["run"], "base": report["base"], "agent": report.get("agent")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{folder / REPORT} cannot be read ({error!r}); remove it") from None


def _load_config(run: Path, base: str, overrides: list[str] | None) -> Config:
    """Returns the configuration of `run`. Raises MergeError if it has no single adapter, or no such
    base."""
    config = export.run_config(run, overrides)
    mode = config.tuning.mode
    if mode == "full":
        raise MergeError(f"{run}: full fine-tuning has no adapter; final_checkpoint/ is the model")
    if config.crowd.num_agents and config.crowd.agent is None:
        raise MergeError(
            f"{run}: a mixture of {config.crowd.num_agents} agents is no single model; give one of "
            f"them, AGENT=0 to {config.crowd.num_agents - 1}"
        )
    if base == "dequantised" and mode != "qlora":
        raise MergeError(f"{run}: its base was not quantised ({mode}); leave BASE out")
    return config


# --- writing -----------------------------------------------------------------------------------


def _write(run: Path, config: Config, base: str, folder: Path, dtype: str) -> None:
    adapted, tokenizer = export.load_tuned(run, config, "fp32", CPU, quantised=False)
    plain: Any = adapted.get_base_model()  # type: ignore[operator]
    _refuse_if_full(folder, plain, tokenizer, dtype)
    if base == "dequantised":
        _copy_dequantised(plain, config)
    merged = adapted.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    merged.generation_config = add_turn_ends(merged.generation_config, tokenizer)
    export.save(merged.to(DTYPES[dtype]), tokenizer, folder)


def _refuse_if_full(
    folder: Path, plain: nn.Module, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    weights = sum(p.numel() for name, p in plain.named_parameters() if "lora_" not in name)
    need = weights * DTYPES[dtype].itemsize + len(tokenizer) * storage.TOKENIZER_BYTES
    have = storage.free_bytes(folder)
    if need > have:
        raise MergeError(
            f"{folder.parent}: need {size(need)} for {weights:,} weights in {dtype}, have "
            f"{size(have)}; make room, or give OUTPUT on another disk"
        )


def _copy_dequantised(plain: nn.Module, config: Config) -> None:
    """Replaces the weights that NF4 stores by what it makes of them."""
    quantised = model.load_base(config.model, "qlora", "fp32", CPU)
    for name, layer in quantised.named_modules():
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            target: Any = plain.get_submodule(name)
            target = getattr(target, "base_layer", target)
            weight = dequantise(layer.weight)
            target.weight.data.copy_(weight.T if isinstance(target, Conv1D) else weight)


# --- the model card ----------------------------------------------------------------------------


def _card(report: dict[str, Any], config: Config, run: Path, folder: Path) -> str:
    """Returns the model card, README.md, without paths of this machine: it may be published."""
    name = config.model.name
    name = Path(name).name if Path(name).is_absolute() else name
    tuning, train = config.tuning, config.train
    alone = config.crowd.agent
    agent = "" if alone is None else f"agent {alone} of {config.crowd.num_agents}, "
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs"
    rows = "\n".join(f"| {' | '.join(describe_check(c))} |" for c in report["checks"].values())
    return CARD.format(
        base_model=json.dumps(name),  # JSON is YAML, whatever the name
        mode=tuning.mode,
        title=folder.name,
        base=name,
        run=run.name,
        weights=report["base"],
        dtype=report["dtype"],
        adapter=f"{agent}r {tuning.r}, lora_alpha {tuning.lora_alpha:g}, "
        f"modules {tuning.target_modules}",
        training=f"{length} of {train.global_batch} examples, "
        f"learning rate {train.learning_rate:g}, seed {train.seed}",
        data=_data_sha256(run),
        verdict="failed: this is not the model that was trained"
        if failing_checks(report)
        else "passed",
        rows=rows,
    )


def _data_sha256(run: Path) -> str:
    path = run / "audit.json"
    audited = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return str(audited.get("data_sha256", "not known"))


CARD = """---
base_model: {base_model}
library_name: transformers
pipeline_tag: text-generation
tags: [sft, {mode}, merged]
---

# {title}

{base}, fine-tuned with {mode}; the adapter is merged into the {weights} weights, stored in {dtype}.

| | |
|---|---|
| run | {run} |
| adapter | {adapter} |
| training | {training} |
| data, sha256 | {data} |

## Proof

The reloaded model against the adapter on its base, both computing in fp32: **{verdict}**.

| what | measured | expected |
|---|---|---|
{rows}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/{title}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/{title}")
turns = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(
    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


# --- for llama.cpp -----------------------------------------------------------------------------

CONVERTER = "convert_hf_to_gguf.py"
OUTTYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


def converter(llama_cpp: Path) -> Path:
    """Returns the script of llama.cpp that makes GGUF files. Raises MergeError if it is missing."""
    path = llama_cpp / CONVERTER
    if not path.is_file():
        raise MergeError(
            f"GGUF: expected llama.cpp's {CONVERTER} in {llama_cpp}, found "
            f"{'a folder without it' if llama_cpp.is_dir() else 'no such folder'}; `git clone "
            "https://github.com/ggml-org/llama.cpp`, and give GGUF=path/to/llama.cpp, or set "
            "LLAMA_CPP to it"
        )
    return path


def convert(folder: Path, dtype: str, llama_cpp: Path) -> Path:
    """Makes a GGUF file in the merged `folder` with llama.cpp, and returns its path. Raises
    MergeError if that fails."""
    kind = OUTTYPES[dtype]
    final = folder / f"{folder.resolve().name}-{kind}.gguf"
    staged = final.with_suffix(STAGING)
    command = [sys.executable, str(converter(llama_cpp)), str(folder)]
    command += ["--outfile", str(staged), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not staged.exists():
        staged.unlink(missing_ok=True)
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise MergeError(
            f"{CONVERTER} of {llama_cpp} ended with {done.returncode} and no GGUF file: "
            f"{lines[-1] if lines else 'it said nothing'}; the merged model in {folder} is whole"
        )
    staged.replace(final)
    return final
