"""What replay keeps, and what it costs the task: three seeds, with and without.

    PYTHONPATH=. python benchmarks/replay.py [--models nano stories260K] [--seeds 0 1 2]
        [--share 0.2] [--steps 40] [--json benchmarks/results/replay.json]

Both models learn the first rows of nano's task with LoRA. Runs with `data.replay` mix in the base's
own answers to 30 general prompts; drift of all runs is measured on 30 others. stories260K is a real
model of ../shared (or SFT_SHARED), and is left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import sft
from sft.evaluate.general import GeneralSet, domain_of, load_bundled
from sft.runtime.console import make_console, table, write_json
from sft.serve import outcome
from sft.tasks.sft import replay

EACH = 10  # prompts of a domain, of which half are replayed
TEXTS = 10
MODELS = {
    "nano": ("nano/model", 5e-3),
    "stories260K": (os.environ.get("SFT_SHARED", "../shared") + "/models/stories260K", 5e-3),
}
MEASURES = ("held-out loss", "drift", "agreement", "loss on texts")


def write_general(path: Path, general: GeneralSet) -> str:
    """Writes the first prompts of each domain, and texts; returns the path."""
    seen: dict[str, int] = {}
    lines = []
    for prompt in general.prompts:
        domain = domain_of(prompt)
        seen[domain] = seen.get(domain, 0) + 1
        if seen[domain] <= EACH:
            lines.append({"domain": domain, "messages": prompt.messages})
    lines += [{"text": text} for text in general.texts[:TEXTS]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def run(folder: Path, model: str, seed: int, share: float, steps: int) -> dict[str, Any]:
    """Trains one run and returns what it learnt and lost; `share` 0: without replay."""
    name, rate = MODELS[model]
    asked = write_general(folder / "general.jsonl", load_bundled())
    values: dict[str, Any] = {
        "model.name": name,
        "tuning.mode": "lora",
        "data.cache_dir": str(folder / "cache"),
        "data.max_rows": 8 * steps,
        "data.max_seq_len": 512,
        "train.output_dir": str(folder / f"{model}_{seed}_{share}"),
        "train.seed": seed,
        "train.max_steps": steps,
        "train.global_batch": 8,
        "train.learning_rate": rate,
        "train.save_steps": None,
        "train.tensorboard": False,
        "train.precision": "fp32",
        "evaluation.num_examples": 0,  # too few steps for an exact match
        "evaluation.general_path": asked,
    }
    if share:
        values |= {"data.replay.path": "base", "data.replay.share": share}
    started = time.process_time()
    done = sft.train("configs/nano.yaml", values)
    seconds = time.process_time() - started
    found = outcome.judge_run(done.folder, [], replay.MEASURED)  # without replay, too
    drift, (texts,) = found["lost"]["drift"], found["lost"]["texts"]
    measured = {
        "held-out loss": done.metrics["loss"],
        "drift": drift[0]["divergence"],
        "agreement": drift[0]["agreement"],
        "loss on texts": texts["tuned"],
    }
    return {
        "model": model,
        "seed": seed,
        "share": share,
        "cpu_seconds": round(seconds, 1),
        **{name: float(f"{value:.5g}") for name, value in measured.items()},
        "domains": {line["name"]: float(f"{line['divergence']:.4g}") for line in drift[1:]},
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for each model and measure the means over seeds, without and with replay, and in how
    many seeds the run with replay had the higher value."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for name in MEASURES:
            by_seed: dict[int, dict[bool, float]] = {}
            for row in rows:
                if row["model"] == model:
                    by_seed.setdefault(row["seed"], {})[row["share"] > 0] = row[name]
            pairs = [each for each in by_seed.values() if len(each) == 2]
            if not pairs:
                continue
            found.append(
                {
                    "model": model,
                    "measure": name,
                    "without": statistics.mean(each[False] for each in pairs),
                    "with": statistics.mean(each[True] for each in pairs),
                    "higher_with": sum(each[True] > each[False] for each in pairs),
                    "seeds": len(pairs),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for model in args.models:
                if not Path(MODELS[model][0]).is_dir():
                    continue
                for share in (0.0, args.share):
                    rows.append(run(Path(folder), model, seed, share, args.steps))
                    values = {"steps": args.steps, "runs": rows, "summary": summarise(rows)}
                    if args.json:
                        write_json(args.json, values)
    shown = [
        (
            f"{each['model']}, {each['measure']}",
            f"{each['without']:.4g}",
            f"{each['with']:.4g}",
            f"{each['higher_with']} of {each['seeds']}",
        )
        for each in summarise(rows)
    ]
    columns = ("mean over seeds", "without", f"replay of {args.share:g}", "higher with replay")
    make_console().print(table("", columns, shown))


if __name__ == "__main__":
    main()
