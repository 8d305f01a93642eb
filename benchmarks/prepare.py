"""Preparing data at 10 thousand, 100 thousand and 1 million rows: rows per second and peak memory.

    python benchmarks/prepare.py [--shared ../shared] [--rows 10000 100000 1000000]

Rows of random words of GSM8K with the Qwen2.5 tokenizer. Against `datasets.map` with the same
tokenizer and template on as many processes, which tokenises and no more: no labels, no audit, no
search for duplicates. Peak memory is that of the largest process: its own, and its resident set,
which counts what it has mapped of files and libraries too.
`ratio` is the speed as a share of that of `datasets.map` on the same rows, in the same run.
The last lines are `audit.examine_tokens` alone on one core: what is checked of cached tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from sft.config.load import load_config
from sft.data import audit, cache
from sft.data.examples import ExampleArrays, Examples
from sft.runtime.console import make_console, table

CORES = len(os.sched_getaffinity(0))


def write_rows(path: Path, number: int, words: list[str]) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            ask = " ".join(draw.choices(words, k=draw.randint(10, 40)))
            answer = " ".join(draw.choices(words, k=draw.randint(3, 12)))
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def ours(rows: Path, model: Path, work: Path) -> None:
    overrides = [f"model.name={model}", f"data.train_path={rows}", "data.eval_path=null"]
    overrides += ["data.eval_fraction=0.001", f"data.cache_dir={work}/cache"]
    cache.prepare(load_config("configs/nano.yaml", overrides))


def peer(rows: Path, model: Path, work: Path) -> None:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = datasets.load_dataset(
        "json", data_files=str(rows), split="train", cache_dir=str(work / "peer")
    )

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        return dict(tokenizer.apply_chat_template(row["messages"], return_dict=True))

    loaded.map(tokenise, num_proc=CORES)


def measure(name: str, rows: Path, model: Path) -> dict[str, float]:
    """Runs one preparation, and returns its seconds and the peaks (GiB) of its largest process."""
    with tempfile.TemporaryDirectory(dir=rows.parent) as work:
        command = [sys.executable, __file__, "--one", name, str(rows), str(model), work]
        environment = {**os.environ, "PYTHONPATH": ".", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        started, peaks = time.perf_counter(), {"RssAnon": 0, "VmRSS": 0}
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None:
            for pid in tree(process.pid):
                for field, peak in peaks.items():
                    peaks[field] = max(peak, memory(pid, field))
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(f"{name} failed")
        own, resident = (peak / 2**20 for peak in peaks.values())
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "peak_own_gib": own, "peak_resident_gib": resident}


def tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


def memory(pid: int, field: str) -> int:
    """Returns a field of a process's memory in KiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def measure_audit(rows: Path, model: Path) -> float:
    """Returns the rows per second of the audit of cached tokens, on one core."""
    with tempfile.TemporaryDirectory(dir=rows.parent) as work:
        ours(rows, model, Path(work))
        (folder,) = [path for path in Path(work, "cache").iterdir() if path.is_dir()]
        examples = Examples(ExampleArrays.open(folder))
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        started = time.perf_counter()
        audit.examine_tokens(tokenizer, examples, 2048)
        return len(examples) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/prepare.json"))
    parser.add_argument("--one", nargs=4, metavar=("NAME", "ROWS", "MODEL", "WORK"))
    args = parser.parse_args()
    if args.one:
        name, *paths = args.one
        {"ours": ours, "datasets.map": peer}[name](*map(Path, paths))
        return
    gsm8k = (args.shared / "data/instruct/gsm8k_train.jsonl").read_text("utf-8")
    words = sorted({w for line in gsm8k.splitlines() for w in json.loads(line)["question"].split()})
    results, shown = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        for file in (args.shared / "data/tokenizers/qwen2.5-instruct").iterdir():
            (model / file.name).symlink_to(file.resolve())
        shape = {"model_type": "qwen2", "max_position_embeddings": 32768}
        (model / "config.json").write_text(json.dumps(shape))
        for number in args.rows:
            rows = Path(folder, f"{number}.jsonl")
            write_rows(rows, number, words)
            other = measure("datasets.map", rows, model)
            for name, result in (("ours", measure("ours", rows, model)), ("datasets.map", other)):
                ratio = other["seconds"] / result["seconds"]
                results.append({"rows": number, "what": name, **result, "ratio": ratio})
                seconds, own, resident = result.values()
                measured = (f"{seconds:.1f}", f"{number / seconds:,.0f}", f"{ratio:.2f}")
                shown.append((name, f"{number:,}", *measured, f"{own:.2f}", f"{resident:.2f}"))
        speed = measure_audit(Path(folder, f"{min(args.rows)}.jsonl"), model)
    console = make_console()
    columns = ("what", "rows", "seconds", "rows/s", "ratio", "peak own, GiB", "peak resident, GiB")
    console.print(table("", columns, shown))
    console.print(f"audit of cached tokens through the collator: {speed:,.0f} rows/s on one core")
    values = {"cores": CORES, "results": results, "audit_rows_per_second_per_core": speed}
    args.json.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
