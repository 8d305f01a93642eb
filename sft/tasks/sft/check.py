"""Checks of fine-tuning for `make check`."""

from __future__ import annotations

from pathlib import Path

from sft.config.load import with_values
from sft.config.schema import Config
from sft.data import template
from sft.evaluate import predictions
from sft.models.load import load_tokenizer
from sft.tasks.base import Finding

ROWS = 8  # rows that a trial reads
NEW_TOKENS = 16  # maximum length of its answer


def few(config: Config) -> Config:
    """Returns the configuration for a trial on few rows with one short answer."""
    return with_values(
        config,
        {
            "data.max_rows": min(ROWS, config.data.max_rows or ROWS),
            "evaluation.num_examples": min(1, config.evaluation.num_examples),
            "evaluation.max_new_tokens": min(NEW_TOKENS, config.evaluation.max_new_tokens),
        },
    )


def tokenizer(config: Config) -> Finding:
    """Renders a conversation and compares its beginning with the prompt that inference renders."""
    loaded = load_tokenizer(config.model)
    template.prepare_tokenizer(loaded)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    example = template.render(loaded, turns)
    if mismatch := template.prompt_mismatch(loaded, turns, example):
        return Finding(False, f"chat template: {mismatch}", "training and serving would differ")
    return Finding(True, f"tokenizer and template: {len(loaded):,} tokens, prompts as when served")


def answer(path: Path, by: str) -> Finding:
    """Judges the first answer in the file `path`. `by`: who answered, if not the plain model."""
    record = next(predictions.read_records(path), None)
    if record is None:
        return Finding(True, "generation: no held-out row asks for an answer")
    if "error" in record:
        return Finding(False, f"generation: {record['row']}: {record['error']}", "correct the row")
    return Finding(
        True,
        f"{'aggregated ' * bool(by)}generation: {record['prompt_tokens']} tokens asked, "
        f"{record['completion_tokens']} answered{by}",
    )
