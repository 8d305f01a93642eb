"""What works for each model type of transformers: the matrix of docs/MODELS.md.

Each cell is a run of a random model of the type, tiny (tests/support/families.py), on the embedded
tokenizer and data: real runs of `sft train` and `sft merge`, on one process or two.

    PYTHONPATH=.:tests:tests/support python benchmarks/models.py [TYPE ...]
    PYTHONPATH=.:tests:tests/support python benchmarks/models.py --document > docs/MODELS.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import families
import forked
import torch
import transformers
from safetensors import safe_open

from sft import cli
from sft.config.load import load_config, with_values
from sft.config.schema import Config
from sft.errors import UserError
from sft.models import classes, pretrained
from sft.plan import memory, plan
from sft.runtime import hardware
from sft.serve import merge
from sft.tasks.sft.task import FineTune

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/models.json"
REPORTS = ROOT / "benchmarks/results/coverage.json"
KINDS = {
    "Dense": families.TEXT,
    "Mixtures of experts": families.MIXTURES,
    "Recurrent and hybrid": families.RECURRENT,
    "Vision and audio, tuned on text": families.MULTIMODAL,
    "Not decoders": families.OTHER,
}
COLUMNS = {  # cell: (processes, overrides of the run)
    "plan": (1, {}),
    "full": (1, {"tuning.mode": "full", "train.learning_rate": 1e-3}),
    "LoRA": (1, {"tuning.mode": "lora"}),
    "QLoRA": (1, {"tuning.mode": "qlora"}),
    "packed": (1, {"tuning.mode": "lora", "train.layout": "packed"}),
    "DDP": (2, {"tuning.mode": "full", "train.engine": "ddp"}),
    "FSDP2": (2, {"tuning.mode": "lora", "train.engine": "fsdp"}),
    "merge": (1, {}),
}
SECONDS = 240  # a cell may take

# llama.cpp's names of architectures that are not those of transformers.
GGUF_NAMES = {
    **dict.fromkeys(("mistral", "mixtral", "llava", "llava_next", "voxtral"), "llama"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), "qwen2vl"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "deepseek2"),
    **{"phi": "phi2", "gpt_bigcode": "starcoder", "cohere": "command-r", "glm": "chatglm"},
    **{"granitemoehybrid": "granitehybrid", "qwen3_5": "qwen35", "qwen2_audio": "qwen2"},
    **{"hunyuan_v1_dense": "hunyuan-dense", "hunyuan_v1_moe": "hunyuan-moe"},
    **{"olmo3": "olmo2", "falcon_mamba": "mamba", "ministral3": "mistral3"},
}


def base(model_type: str, folder: Path) -> Path:
    """Returns a folder with a random model of the type and the embedded tokenizer."""
    target = folder / model_type
    ignored = shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    shutil.copytree(ROOT / "nano/model", target, ignore=ignored)
    families.tiny_model(model_type).save_pretrained(target)
    if model_type in families.MULTIMODAL:
        (target / "preprocessor_config.json").write_text('{"image_processor_type": "none"}\n')
    return target


def configured(model: Path, run: Path, changes: dict[str, Any]) -> Config:
    values = {
        "model.name": str(model),
        "tuning.r": 4,
        "data.max_rows": 12,
        "data.eval_path": None,
        "data.eval_fraction": 0.25,
        "data.cache_dir": str(model.parent / "cache"),
        "train.output_dir": str(run),
        "train.max_steps": 2,
        "train.global_batch": 4,
        "train.precision": "fp32",
        "train.layout": "padded",
        "train.tensorboard": False,
        "evaluation.num_examples": 1,
        "evaluation.max_new_tokens": 2,
    }
    return with_values(load_config(ROOT / "configs/nano.yaml"), values | changes)


# --- a cell: it returns, or raises what is wrong --------------------------------------------------


def try_cell(cell: str, model: Path) -> None:
    run = model.parent / f"{model.name}-{cell}"
    config = configured(model, run, COLUMNS[cell][1])
    if cell == "plan":
        made = plan.make_plan(config, FineTune.uniform_workload(config), hardware.detect(), 1)
        assert made.memory.method.startswith("traced"), made.memory.method
    elif cell == "merge":
        trained = model.parent / f"{model.name}-LoRA"
        merge.merge(trained, run, "fp32", lambda _: None)
        compare_towers(model, run)
    else:
        from sft import run as runs

        # Tracing the step takes longer than all else; the cell `plan` does it.
        untraced = RuntimeError("left out")
        with mock.patch.object(memory, "_trace", side_effect=untraced):
            runs.train(config)
        if config.tuning.mode == "full" and os.environ.get("RANK", "0") == "0":
            compare_towers(model, run / "final_checkpoint")


def compare_towers(model: Path, saved: Path) -> None:
    """Asserts that a saved folder is of the base's class, with its processor and its towers."""
    names = [json.loads((each / "config.json").read_text()) for each in (model, saved)]
    assert names[0]["architectures"] == names[1]["architectures"], names[1]["architectures"]
    processor = model / "preprocessor_config.json"
    if processor.exists():
        assert (saved / processor.name).read_bytes() == processor.read_bytes()
    before, after = tensors(model), tensors(saved)
    assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())[:2]
    text = classes.from_config(pretrained.architecture(configured(model, saved, {}).model))
    decoder = {id(p) for p in text.get_decoder().parameters()}
    decoder |= {id(p) for p in text.get_output_embeddings().parameters()}
    towers = [p for p in text.parameters() if id(p) not in decoder]
    equal = sum(torch.equal(before[name], after[name]) for name in before)
    assert equal >= len(towers), f"{len(towers)} tensors of towers, {equal} are as before"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def shorten(reason: str, model: Path) -> str:
    """Returns a reason without the folders of the benchmark."""
    return " ".join(reason.split()).replace(f"{model.parent}/", "")[:300] or "failed"


def worker(cell: str, model: Path) -> int:
    """Tries a cell in this process, a rank of it, and writes what is wrong."""
    cli.prepare_libraries()
    try:
        try_cell(cell, model)
        problem = ""
    except BaseException as error:  # noqa: BLE001  # a cell shows whatever is wrong
        found = error.__context__ if isinstance(error, SystemExit) else error
        kind = "" if isinstance(found, UserError) else f"{type(found).__name__}: "
        problem = shorten(f"{kind}{found}", model)
    rank = os.environ.get("RANK", "0")
    (model.parent / f"{model.name}-{cell}.rank{rank}").write_text(problem)
    return bool(problem)


# --- the matrix -----------------------------------------------------------------------------------


def measure(model_type: str, folder: Path, cells: list[str]) -> dict[str, str]:
    """Returns what is wrong by cell; an empty text for a cell that works."""
    model, found = base(model_type, folder), dict[str, str]()
    for cell in cells:
        world = COLUMNS[cell][0]
        if cell == "merge" and found["LoRA"]:
            found[cell] = "there is no adapter"
            continue
        log = folder / f"{model_type}-{cell}.log"
        command = [__file__, "--cell", cell, str(model)]
        process = forked.start(world, command, log)
        process.join(SECONDS)
        hung = process.is_alive()
        for pid in [*forked.ranks(log), *([process.pid] if hung else [])]:
            if forked.alive(pid):
                os.kill(pid, 9)
        results = [path.read_text() for path in sorted(folder.glob(f"{model_type}-{cell}.rank*"))]
        reasons = [*filter(None, results)]
        if hung:
            reasons = [f"hung for {SECONDS} s"]
        elif len(results) < world and not reasons:
            status = folder / f"{model_type}-{cell}" / "status.json"  # a run ends its ranks itself
            stored = json.loads(status.read_text()) if status.exists() else {}
            reasons = [shorten(stored.get("reason") or "a process died", model)]
        found[cell] = min(reasons, key=len, default="")
    shutil.rmtree(model)
    for path in folder.glob(f"{model_type}-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def known_to_llama_cpp(model_type: str, known: list[str]) -> str:
    """Returns the name of an architecture in the package gguf, found by name."""

    def plain(name: str) -> str:
        return re.sub(r"[-_]|_text$", "", name)

    by_name = {plain(name): name for name in known}
    asked = model_type.removesuffix("_text")
    name = GGUF_NAMES.get(asked, by_name.get(plain(asked), ""))
    return name if name in known else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--cells", nargs="+", choices=COLUMNS, default=[*COLUMNS])
    parser.add_argument("--document", action="store_true", help="print docs/MODELS.md")
    parser.add_argument("--cell", nargs=2, help="try one cell: its name, and the folder of a model")
    args = parser.parse_args()
    if args.document:
        sys.stdout.write(document(json.loads(RESULTS.read_text("utf-8"))))
        return
    if args.cell:
        raise SystemExit(worker(args.cell[0], Path(args.cell[1])))
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"types": {}}
    stored["transformers"] = transformers.__version__
    try:
        import gguf

        stored["llama.cpp"] = sorted(gguf.MODEL_ARCH_NAMES.values())
    except ImportError:
        stored.setdefault("llama.cpp", [])
    with tempfile.TemporaryDirectory() as folder:
        for model_type in args.types or [each for kind in KINDS.values() for each in kind]:
            started = time.perf_counter()
            found = stored["types"].setdefault(model_type, {})
            found |= measure(model_type, Path(folder), args.cells)
            wrong = {cell: text for cell, text in found.items() if text}
            print(
                f"{model_type:18} {time.perf_counter() - started:4.0f} s  {wrong or 'ok'}",
                flush=True,
            )
            RESULTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", "utf-8")


# --- the document ---------------------------------------------------------------------------------

SHORT = {  # a pattern in the verdict of a report -> what the document says
    "missed": "with LoRA, where some matrices get no adapter, since no linear layer holds them",
    "is an encoder-decoder": "refused, as encoder-decoders",
    "is an encoder,": "refused, as encoders",
    "timm library": "not tried, since it needs the package timm",
    "^ok$": "with LoRA",
}
HEAD = """\
# Model types

Generated from `benchmarks/results/models.json` by `make docs`. Each cell is a run of a random, tiny
model of the type on this project's own tokenizer and data (`benchmarks/models.py`, transformers
{transformers}): `ok`, or the number of the reason below.

- **plan**: the step is traced. **full**, **LoRA**, **QLoRA**: two steps, with evaluation
  before and after, and a saved model. After full fine-tuning, the saved model has the base's class
  and processor; the encoders of a vision or audio model are unchanged.
- **packed**: the run with `train.layout: packed`. A model that cannot keep documents apart refuses
  it. With `auto`, the default, it trains on padded rows.
- **DDP**: full fine-tuning by two processes. **FSDP2**: LoRA by two processes.
- **merge**: the merged LoRA run is proven equal to the adapter on its base.
- **GGUF**: the name of the architecture in llama.cpp's package gguf, if it has one. Only
  `make merge GGUF=...` shows whether llama.cpp's converter accepts a model.
"""


def document(stored: dict[str, Any]) -> str:
    """Returns docs/MODELS.md."""
    reasons: dict[str, int] = {}

    def show(text: str) -> str:
        return f"({reasons.setdefault(text, len(reasons) + 1)})" if text else "ok"

    lines = [HEAD.format(**stored)]
    for kind, types in KINDS.items():
        lines += [f"\n## {kind}\n\n", f"| type | {' | '.join(COLUMNS)} | GGUF |\n"]
        lines.append("|---" * (len(COLUMNS) + 2) + "|\n")
        for model_type in types:
            cells = stored["types"].get(model_type)
            if cells is None:
                continue
            shown = [show(without_type(cells[name], model_type)) for name in COLUMNS]
            gguf = known_to_llama_cpp(model_type, stored["llama.cpp"]) or "-"
            lines.append(f"| {model_type} | {' | '.join(shown)} | {gguf} |\n")
    lines.append("\n## Reasons\n\n")
    lines += [f"{number}. {text}\n" for text, number in reasons.items()]
    return "".join([*lines, *_reported({*stored["types"]})])


def _reported(run: set[str]) -> Iterator[str]:
    """Yields the lines about types that were not run: what the coverage report says about them."""
    found = json.loads(REPORTS.read_text("utf-8"))
    yield "\n## Types that were not run\n\nFor these, `benchmarks/coverage.py` made the report of "
    yield "`make plan` on what is trained, quantised\nand adapted. Nothing else was tried.\n\n"
    yield _item("with full weights, LoRA and QLoRA", {*families.DECODERS} - run)
    groups: dict[str, set[str]] = {}
    for kind, verdict in found["other_types"].items():
        group = next((short for each, short in SHORT.items() if re.search(each, verdict)), "")
        groups.setdefault(group or verdict, set()).add(kind)
    yield from (_item(short, groups.pop(short)) for short in SHORT.values() if short in groups)
    yield "\nFor these, no report could be made. Their tiny shapes are defaults of transformers, "
    yield "shrunk by rules;\nsizes may not fit each other, so this says nothing about real models."
    yield "\n\n| type | why |\n|---|---|\n"
    for verdict, kinds in sorted(groups.items(), key=lambda item: min(item[1])):
        why = re.sub(
            r"^.*(hub id; found: .*?\]\. \(|validate_architecture': ValueError: )", "", verdict
        )
        yield f"| {_names(kinds)} | {without_type(why, min(kinds))} |\n"


def _item(label: str, kinds: set[str]) -> str:
    """Returns an item of a list in lines of at most 120 characters."""
    text = f"- {label}: {_names(kinds)}"
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 120, subsequent_indent="  ", **options) + "\n"


def _names(kinds: set[str]) -> str:
    return ", ".join(sorted(kinds))


def without_type(text: str, model_type: str) -> str:
    """Returns a reason without the name of the model, so that types share it."""
    text = text.replace(f"'{model_type}'", "the model").replace(f" {model_type}:", " the model:")
    return text.replace("|", "/").replace("<", "&lt;")


if __name__ == "__main__":
    main()
