"""Tasks of lm-eval with data on this machine: choices, answers, texts, and a group of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

WORDS = ["cat", "dog", "sun", "tree", "red ball", "big house", "little girl", "park"]
TEXT = "Once upon a time there was a little girl. She loved to play in the park with her dog. "


def _choices() -> list[dict[str, Any]]:
    return [
        {
            "question": f"Lily saw a {word} and a {WORDS[(n - 1) % 8]}. What did Lily see first?",
            "choices": [word, WORDS[(n - 3) % 8], f"{WORDS[(n - 5) % 8]} and more"],
            "answer": n % 3,
        }
        for n, word in enumerate(WORDS * 2)
    ]


def _answers() -> list[dict[str, Any]]:
    return [{"question": f"repeat: {word}", "answer": word} for word in WORDS]


def _texts() -> list[dict[str, Any]]:
    return [{"text": TEXT * count} for count in (1, 2, 3, 9)]  # the last is longer than a window


COMMON: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "num_fewshot": 1,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": "acc", **MEAN},
            {"metric": "acc_norm", **MEAN},
            {"metric": "mcc"},
        ],
    },
    "local_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_last": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
}
TASKS_ROWS = {"local_choice": _choices, "local_answer": _answers, "local_text": _texts}


def write(folder: Path, *names: str, **changes: Any) -> Path:
    """Writes tasks (default: all) with their data into a folder, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or TASKS:
        rows = folder / f"{name}.jsonl"
        made = TASKS_ROWS.get(name, _choices)()
        rows.write_text("".join(json.dumps(row) + "\n" for row in made))
        data = {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")}
        values = {"task": name, **COMMON, "dataset_kwargs": data, **TASKS[name]}
        values |= {"metadata": {"version": 1.0}} | changes
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


def write_group(folder: Path) -> Path:
    """Writes a group of two tasks, weighted by their sizes, with them; returns its file."""
    write(folder, "local_choice", "local_last")
    values = {
        "group": "local_group",
        "task": ["local_choice", "local_last"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    file = folder / "local_group.yaml"
    file.write_text(yaml.safe_dump(values))
    return file
