"""Merge an adapter into its base, and prove that the result is the model that was trained.

The proof only reads: it loads the merged folder as a user does and holds it against the adapter on
its base, tensor by tensor and by what both say to pinned prompts. A merge appears under its name
when it is proven; else it stays beside it as `<name>.failed`, with the report that says why.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from sft import audit, chat, export, generate, model, storage, tensors
from sft.checkpoint import STAGING
from sft.config import Config, UserError
from sft.log import size, write_json

REPORT = "merge_report.json"
DTYPES = {**model.DTYPES, "fp16": torch.float16}
STORED = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}  # as safetensors call them
CPU = torch.device("cpu")
NUM_PROMPTS = 32  # conversations whose probabilities are compared
NUM_POSITIONS = 64  # the last ones of each, which are the answer's: a row is a whole vocabulary
NUM_ANSWERS = 16  # of those prompts, continued greedily
NUM_TOKENS = 32  # of each continuation
Say = Callable[[RenderableType], None]


@dataclass(frozen=True)
class Limits:
    """What rounding the weights to a dtype may change (docs/LOG.md has what was measured)."""

    kl: float  # nats per token, at most
    top1: float  # share of positions, at least
    tie: float  # nats between two tokens, at most, for the greedy answers to part there


LIMITS = {
    "fp32": Limits(1e-8, 0.999, 1e-3),
    "fp16": Limits(1e-4, 0.97, 0.05),
    "bf16": Limits(5e-3, 0.9, 0.5),
}
LOST = 0.1  # of what the adapter changes, at most: half its scale loses 0.25, no adapter 1
NOTHING = 1e-9  # nats per token; below, an adapter changes nothing that could be lost


class MergeError(UserError):
    """There is nothing to merge, or the merged model is not the one that was trained."""


@dataclass(frozen=True)
class Check:
    """One line of the proof: what was measured, and whether it is within `bound` and `limit`."""

    ok: bool
    what: str
    measured: float | str
    bound: str = ""
    limit: float | str | None = None  # None: told, not judged


Checks = dict[str, Check]


def _at_most(what: str, measured: float, limit: float) -> Check:
    return Check(measured <= limit, what, measured, "at most", limit)  # NaN is not


def _at_least(what: str, measured: float, limit: float) -> Check:
    return Check(measured >= limit, what, measured, "at least", limit)


def _equal(what: str, found: Any, expected: Any) -> Check:
    return Check(found == expected, what, str(found), "exactly", str(expected))


# --- the two commands --------------------------------------------------------------------------


def merge(
    run: Path,
    output: Path,
    dtype: str,
    say: Say,
    base: str = "original",
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Merges the adapter of `run` into `output`; returns the report of the proof.

    `base`: the weights to merge into; `dequantised` ones of a QLoRA run are those it was trained
    on. Raises MergeError if the proof fails; `output` then does not exist.
    """
    config = _config(run, base, overrides)
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
    final = failed if _failing(report) else output
    staging.rename(final)
    say(table(report))
    _require(report, final)
    return report


def _make_room(output: Path) -> tuple[Path, Path]:
    """(an empty folder to write to, the name of a merge that fails); what earlier ones left there
    is removed. Raises MergeError if `output` exists or cannot be made."""
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
    """The proof again, on a merged folder, which is left as it is; returns the report.

    `run`, `base`: those that its report names, if None. Raises MergeError if the proof fails.
    """
    told = _told(folder)
    if run is None and "run" not in told:
        raise MergeError(f"{folder} has no {REPORT} that names its run; give RUN=<folder>")
    run = run or Path(told["run"])
    base = base or told.get("base", "original")
    if told.get("agent") is not None:
        overrides = [f"crowd.agent={told['agent']}", *(overrides or [])]
    report = prove(folder, run, _config(run, base, overrides), base)
    say(table(report))
    _require(report, folder)
    return report


def _told(folder: Path) -> dict[str, Any]:
    """The report in a merged folder; empty if there is none."""
    if not (folder / "config.json").exists():
        raise MergeError(
            f"{folder}: expected a merged model (config.json, *.safetensors), found "
            f"{'a folder without' if folder.is_dir() else 'nothing'}; run `make merge` first"
        )
    try:
        told = json.loads((folder / REPORT).read_text("utf-8"))
        return {key: told[key] for key in ("run", "base")} | {"agent": told.get("agent")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{folder / REPORT} cannot be read ({error!r}); remove it") from None


def _config(run: Path, base: str, overrides: list[str] | None) -> Config:
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


def _failing(report: dict[str, Any]) -> list[str]:
    return [name for name, check in report["checks"].items() if not check["ok"]]


def _require(report: dict[str, Any], folder: Path) -> None:
    failing = _failing(report)
    lines = [f"\n  {name}: {_told_of(report['checks'][name])}" for name in failing]
    if failing == ["kept"]:
        lines.append(f"\n{report['dtype']} rounds away what the adapter learnt: use DTYPE=fp32")
    if failing:
        raise MergeError(
            f"{folder} is not the model that was trained; do not use it:{''.join(lines)}"
        )


def _told_of(check: dict[str, Any]) -> str:
    return f"{check['what']}: expected {_limit(check)}, found {_shown(check['measured'])}"


# --- writing -----------------------------------------------------------------------------------


def _write(run: Path, config: Config, base: str, folder: Path, dtype: str) -> None:
    adapted, tokenizer = export.load_tuned(run, config, "fp32", CPU, quantised=False)
    plain: Any = adapted.get_base_model()  # type: ignore[operator]
    _refuse_if_full(folder, plain, tokenizer, dtype)
    if base == "dequantised":
        _take_dequantised(plain, config)
    merged = adapted.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    merged.generation_config = _generation(merged.generation_config, tokenizer)
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


def _take_dequantised(plain: nn.Module, config: Config) -> None:
    """Puts what NF4 makes of the base's weights in their place; same architecture, same classes."""
    quantised = model.load_base(config.model, "qlora", "fp32", CPU)
    for name, layer in quantised.named_modules():
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            target: Any = plain.get_submodule(name)
            target = getattr(target, "base_layer", target)
            weight = _dequantised(layer)
            target.weight.data.copy_(weight.T if _is_transposed(target) else weight)


def _dequantised(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def _is_transposed(layer: nn.Module | None) -> bool:
    return type(layer).__name__ == "Conv1D"  # GPT-2's, (in, out)


def _generation(base: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The base's, with the tokens that end a turn: a base that has never seen the template does not
    name them, and whoever generates with its own would get an answer that never ends."""
    result = GenerationConfig.from_dict(base.to_dict())
    ends = generate.stop_ids(tokenizer, base)
    result.eos_token_id = ends[0] if len(ends) == 1 else ends
    return result


# --- the proof ---------------------------------------------------------------------------------


def prove(folder: Path, run: Path, config: Config, base: str) -> dict[str, Any]:
    """Holds the merged model in `folder` against the adapter of `run` on the weights of `base`.

    Both compute in fp32, so that what is measured is the weights. The report: `checks`, each with
    ok, what, measured and limit; `run`, `dtype`, `base`, `num_prompts`.
    """
    dtype = _stored_dtype(folder)
    reference, tokenizer = export.load_tuned(
        run, config, "fp32", CPU, quantised=base == "dequantised"
    )
    plain: Any = reference.get_base_model()  # type: ignore[operator]
    plain.generation_config = _generation(plain.generation_config, tokenizer)
    pinned = _pinned(run, tokenizer)
    old = _behaviour(reference, pinned)
    with reference.disable_adapter():  # type: ignore[operator]
        effect = _kl(old.logits, _logits(reference, pinned))
    merged, told = _load(folder, config)
    checks = _tokenizer_checks(folder, config, tokenizer, pinned)
    checks |= _generation_checks(folder, plain.generation_config)
    checks |= _tensor_checks(reference, config, merged, told, dtype)
    del reference, plain  # its memory is needed for the other one in fp32
    new = _behaviour(merged.float(), pinned)
    checks |= _behaviour_checks(old, new, effect, LIMITS[dtype])
    if config.tuning.mode == "qlora" and base == "original":
        trained, _ = export.load_tuned(run, config, "fp32", CPU)
        kl = _kl(_logits(trained, pinned), new.logits)
        what = "KL from the model as trained, on NF4 weights"
        checks["trained"] = Check(True, what, kl)
    return {
        "run": str(run),
        "dtype": dtype,
        "base": base,
        "agent": config.crowd.agent,
        "num_prompts": len(pinned),
        "checks": {name: _finite(asdict(check)) for name, check in checks.items()},
    }


def _finite(check: dict[str, Any]) -> dict[str, Any]:
    value = check["measured"]  # JSON has no other numbers
    known = isinstance(value, str) or math.isfinite(value)
    return check if known else check | {"measured": str(value)}


@dataclass(frozen=True)
class Pinned:
    """A held-out prompt: its text, its ids, and those of the whole conversation."""

    text: str
    prompt: list[int]
    whole: list[int]


def _pinned(run: Path, tokenizer: PreTrainedTokenizerBase) -> list[Pinned]:
    """Held-out prompts with their answers, from what the run's evaluation stored."""
    path = run / "evaluation" / "predictions.jsonl"
    texts = []
    if path.exists():
        try:
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            texts = [(row["prompt"], row["reference"]) for row in rows[:NUM_PROMPTS]]
        except (ValueError, KeyError, TypeError) as error:
            raise MergeError(f"{path} cannot be read ({error!r}); remove it") from None
    result = []
    for prompt, answer in texts or [("Hello", "Hello"), ("What is this?", "A test.")]:
        asked = [{"role": "user", "content": prompt}]
        turns = [*asked, {"role": "assistant", "content": answer}]
        result.append(
            Pinned(
                chat.text_of(tokenizer, turns),
                chat.prompt_ids(tokenizer, asked),
                chat.render(tokenizer, turns).ids,
            )
        )
    return result


def _stored_dtype(folder: Path) -> str:
    """Of the weights in the files. Raises MergeError if a file is damaged or they have several."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        if reason := tensors.fault(path):
            raise MergeError(f"{path} cannot be loaded: {reason}; merge again")
        with safe_open(path, "pt") as file:
            kinds = {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
            found |= {kind for kind in kinds if kind.startswith(("F", "BF"))}
    if len(found) != 1 or not found <= STORED.keys():
        raise MergeError(
            f"{folder}: expected weights in one of {', '.join(STORED)}, found "
            f"{', '.join(sorted(found)) or 'none'}; merge again"
        )
    return STORED[found.pop()]


def _load(folder: Path, config: Config) -> tuple[Any, dict[str, Any]]:
    """The merged model as transformers loads it, and what that said about its tensors."""
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
    merged, told = loaded
    return merged.eval(), told


# --- its parts ---------------------------------------------------------------------------------


def _tokenizer_checks(
    folder: Path, config: Config, expected: PreTrainedTokenizerBase, pinned: list[Pinned]
) -> Checks:
    """`expected`: the tokenizer that the run was trained with."""
    own = {"name": str(folder), "revision": None}
    found = model.load_tokenizer(config.model.model_copy(update=own))
    same = sum(found(p.text).input_ids == expected(p.text).input_ids for p in pinned)
    number, both = len(pinned), (found, expected)
    return {
        "ids": _equal(
            "texts with the same token ids", f"{same} of {number}", f"{number} of {number}"
        ),
        "vocabulary": _equal(
            "digest of vocabulary and special tokens",
            *(audit.tokenizer_sha256(t)[:12] for t in both),
        ),
        "template": _equal(
            "digest of the chat template", *(audit.template_sha256(t)[:12] for t in both)
        ),
        "eos": _equal(
            "eos and pad of the tokenizer", *((t.eos_token_id, t.pad_token_id) for t in both)
        ),
    }


def _generation_checks(folder: Path, expected: GenerationConfig) -> Checks:
    what = "generation_config.json and its ends of a turn"
    if not (folder / "generation_config.json").exists():
        return {"generation": _equal(what, "missing", "present")}
    found = GenerationConfig.from_pretrained(str(folder))
    values = [config.to_diff_dict() for config in (found, expected)]
    keys = {key for own in values for key in own if key[0] != "_"} - {"transformers_version"}
    other = sorted(key for key in keys if values[0].get(key) != values[1].get(key))
    told = [{key: own.get(key) for key in other} or "equal" for own in values]
    return {"generation": _equal(what, *told)}


def _expected(
    reference: Any, config: Config, merged: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """What each parameter of `merged` should be, in fp32, by the formula of LoRA and not by the
    library that merged: W + lora_alpha / r * B @ A."""
    scale = config.tuning.lora_alpha / config.tuning.r
    plain, modules = reference.get_base_model(), dict(merged.named_modules())
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            continue
        owner, _, kind = name.rpartition(".")
        adapted = owner.removesuffix(".base_layer")
        turned = _is_transposed(modules.get(adapted))
        value = parameter.float()
        if hasattr(parameter, "quant_state"):
            value = _dequantised(plain.get_submodule(owner))
            value = value.T if turned else value
        if owner != adapted and kind == "weight":
            layer = plain.get_submodule(adapted)
            a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
            value = value + scale * ((b @ a).T if turned else b @ a)
        yield f"{adapted}.{kind}", value


@torch.no_grad()
def _tensor_checks(
    reference: nn.Module, config: Config, merged: nn.Module, told: dict[str, Any], dtype: str
) -> Checks:
    """`told`: what loading `merged` said. Weights that are tied are one tensor."""
    found = dict(merged.named_parameters())
    missing, unknown = set(told["missing_keys"]), set(told["unexpected_keys"]) | set(found)
    empty, worst, where, number = [], 0.0, "", 0
    for name, expected in _expected(reference, config, merged):
        number += 1
        unknown.discard(name)
        value = found.get(name)
        if value is None or value.shape != expected.shape:
            missing.add(name)
            continue
        if not value.numel() or not value.isfinite().all() or (expected.any() and not value.any()):
            empty.append(name)
        off = _roundings(value.float(), expected, dtype)
        if off > worst:
            worst, where = off, name
    weights = "error of the worst weight, in roundings" + (f" ({where})" if worst > 1 else "")
    return {
        "tensors": _equal(
            "tensors of the base, and no others",
            f"{number - len(missing)} of {number}" + _named(sorted(missing | unknown)),
            f"{number} of {number}",
        ),
        "empty": _equal(
            "tensors that are empty or not finite", f"{len(empty)}{_named(empty)}", "0"
        ),
        "weights": _at_most(weights, worst, 1.0),
    }


def _named(names: list[str]) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""


def _roundings(value: torch.Tensor, expected: torch.Tensor, dtype: str) -> float:
    """The largest error of an element over what rounding to `dtype` explains: half a unit of its
    last place, and fp32's own error in the sum that `expected` is."""
    kind = torch.finfo(DTYPES[dtype])
    slack = 16 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    allowed = expected.abs() * (kind.eps / 2) + kind.smallest_normal * kind.eps + slack
    return float(((value - expected).abs() / allowed).nan_to_num(math.inf).max())


@dataclass(frozen=True)
class Answer:
    """A greedy continuation and, for each of its tokens, the scores that it was chosen by."""

    ids: list[int]
    scores: list[torch.Tensor]  # (vocabulary) of each

    def parting(self, other: Answer) -> float:
        """How much likelier than `other`'s token the own one was where they first differ, in nats;
        infinite where only one of them goes on, 0 if they are the same."""
        pairs = zip(self.ids, other.ids, self.scores, strict=False)
        for own, its, scores in pairs:
            if own != its:
                return float(scores[own] - scores[its])
        return 0.0 if len(self.ids) == len(other.ids) else math.inf


@dataclass(frozen=True)
class Behaviour:
    """What a model says to the pinned prompts."""

    logits: list[torch.Tensor]  # (positions, vocabulary) of each
    answers: list[Answer]


def _behaviour(loaded: nn.Module, pinned: list[Pinned]) -> Behaviour:
    return Behaviour(_logits(loaded, pinned), [_answer(loaded, p) for p in pinned[:NUM_ANSWERS]])


@torch.no_grad()
def _logits(loaded: nn.Module, pinned: list[Pinned]) -> list[torch.Tensor]:
    batches = (torch.tensor([p.whole[: generate.context_length(loaded)]]) for p in pinned)
    return [loaded(input_ids=ids).logits[0, -NUM_POSITIONS:].float().clone() for ids in batches]


@torch.no_grad()
def _answer(loaded: Any, pinned: Pinned) -> Answer:
    context = generate.context_length(loaded) or sys.maxsize
    ids = torch.tensor([pinned.prompt[-max(1, context - NUM_TOKENS) :]])
    made = loaded.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    answer = made.sequences[0, ids.shape[1] :].tolist()
    return Answer(answer, [scores[0].float() for scores in made.scores])


def _kl(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Of `found` from `expected`, nats per token; in fp64, or it would measure its own rounding."""
    total, count = 0.0, 0
    for logits, others in zip(expected, found, strict=True):
        old, new = logits.double().log_softmax(-1), others.double().log_softmax(-1)
        total += float((old.exp() * (old - new)).sum())
        count += len(old)
    return total / count


def _behaviour_checks(old: Behaviour, new: Behaviour, effect: float, limits: Limits) -> Checks:
    """`effect`: the KL of the base without the adapter from the adapter model."""
    kl = _kl(old.logits, new.logits)
    pairs = zip(old.logits, new.logits, strict=True)
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).float()
    partings = [a.parting(b) for a, b in zip(old.answers, new.answers, strict=True)]
    return {
        "effect": Check(True, "KL of the base without the adapter", effect),
        "kl": _at_most("KL from the adapter model, nats per token", kl, limits.kl),
        "kept": _at_most("that KL as a share of the effect", kl / max(effect, NOTHING), LOST),
        "top1": _at_least(
            "positions with the same likeliest token", float(same.mean()), limits.top1
        ),
        "greedy": Check(
            True,
            f"prompts with the same {NUM_TOKENS} greedy tokens",
            partings.count(0.0) / len(partings),
        ),
        "ties": _at_most("nats between the tokens where others part", max(partings), limits.tie),
    }


# --- what people see ---------------------------------------------------------------------------


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _limit(check: dict[str, Any]) -> str:
    return "" if check["limit"] is None else f"{check['bound']} {_shown(check['limit'])}"


def table(report: dict[str, Any]) -> Table:
    told = f"Proof: {report['dtype']}, {report['base']} weights, {report['num_prompts']} prompts"
    result = Table(title=told, title_justify="left", box=None, pad_edge=False)
    for column in ("", "check", "what", "measured", "expected"):
        result.add_column(column, overflow="fold")
    for name, check in report["checks"].items():
        mark = Text("ok", style="green") if check["ok"] else Text("NOT OK", style="bold red")
        row = (name, check["what"], _shown(check["measured"]), _limit(check))
        result.add_row(mark, *map(Text, row))
    return result


def _card(report: dict[str, Any], config: Config, run: Path, folder: Path) -> str:
    """The model card, README.md; it may be published, so paths of this machine are left out."""
    name = config.model.name
    name = Path(name).name if Path(name).is_absolute() else name
    tuning, train = config.tuning, config.train
    alone = config.crowd.agent
    agent = "" if alone is None else f"agent {alone} of {config.crowd.num_agents}, "
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs"
    rows = "\n".join(
        f"| {check['what']} | {_shown(check['measured'])} | {_limit(check)} |"
        for check in report["checks"].values()
    )
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
        verdict="failed: this is not the model that was trained" if _failing(report) else "passed",
        rows=rows,
    )


def _data_sha256(run: Path) -> str:
    path = run / "audit.json"
    told = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return str(told.get("data_sha256", "not known"))


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
    """The script of llama.cpp that makes GGUF files; raises MergeError if it is not there."""
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
    """A GGUF file in the merged `folder`, made by llama.cpp. MergeError if that fails."""
    kind = OUTTYPES[dtype]
    final = folder / f"{folder.resolve().name}-{kind}.gguf"
    staged = final.with_suffix(STAGING)
    command = [sys.executable, str(converter(llama_cpp)), str(folder)]
    command += ["--outfile", str(staged), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not staged.exists():
        staged.unlink(missing_ok=True)
        said = (done.stderr or done.stdout).strip().splitlines()
        raise MergeError(
            f"{CONVERTER} of {llama_cpp} ended with {done.returncode} and no GGUF file: "
            f"{said[-1] if said else 'it said nothing'}; the merged model in {folder} is whole"
        )
    staged.replace(final)
    return final
