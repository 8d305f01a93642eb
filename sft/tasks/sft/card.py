"""The model card of a run: README.md of its final checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sft import __version__
from sft.config.schema import Config
from sft.errors import redact
from sft.models.export import base_record
from sft.runtime.output import visible
from sft.tasks.base import Results

BY_ONE_CLASS = """\
```python
from {library} import {auto}
from transformers import AutoTokenizer

folder = "path/to/this/folder"
model = {auto}.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```
"""
ON_BASE = """\
```python
from peft import PeftConfig, PeftModel
from transformers import {auto}, AutoTokenizer

folder = "path/to/this/folder"
name = PeftConfig.from_pretrained(folder).base_model_name_or_path
base = {auto}.from_pretrained(name, dtype="auto")
model = PeftModel.from_pretrained(base, folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```
"""


def loading(auto: str, *, whole: bool) -> str:
    """Returns Markdown on how a final checkpoint is loaded; `auto`: the auto class of its base."""
    if whole:
        return BY_ONE_CLASS.format(library="transformers", auto=auto)
    if auto == "AutoModelForCausalLM":
        return BY_ONE_CLASS.format(library="peft", auto="AutoPeftModelForCausalLM")
    return ON_BASE.format(auto=auto)  # PEFT has no class for images


def model_card(
    config: Config,
    digests: Mapping[str, str],
    base: Results | None,
    tuned: Results,
    loading: str,
) -> str:
    """Returns the card. `digests`: those of the data. `loading`: Markdown on how it is loaded."""
    record, tuning = base_record(config.model), config.tuning
    is_full = tuning.mode == "full"
    adapter = tuning.describe()
    rows = {
        "base": record["name"],
        "base, sha256": record["weights_sha256"],
        "tuning": tuning.mode if is_full else f"{tuning.mode}, {adapter}",
        **_training(config),
        **{f"{name}, sha256": digest for name, digest in digests.items()},
        "written by": f"sft {__version__}",
    }
    front = {
        "base_model": record["name"],
        "library_name": "transformers" if is_full else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["sft", tuning.mode],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {_cell(config.train.output_dir)}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    lines += ["", "## Scores", "", *_scores(base, tuned), "", "## Use", "", loading.rstrip(), ""]
    return redact("\n".join(lines))


def _training(config: Config) -> dict[str, str]:
    train, data = config.train, config.data
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs"
    return {
        "training": f"{length} of {train.global_batch} examples, {train.optimizer}, learning rate "
        f"{train.learning_rate:g}, {train.schedule}, seed {train.seed}",
        "examples": f"at most {data.max_seq_len} tokens; supervised: {data.supervise}",
        "data": str(data.train_path),
    }


def _scores(base: Results | None, tuned: Results) -> list[str]:
    """Returns a table of held-out metrics before and after; those with an interval have it."""
    number = (tuned.details or {}).get("num_examples", 0)
    columns = {"base": base, "fine-tuned": tuned} if base else {"fine-tuned": tuned}
    lines = [f"Held out; {number:,} answers were scored. In brackets: 95 % interval.", ""]
    lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in tuned.metrics:
        cells = (_score(results, name) for results in columns.values())
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def _score(results: Results, name: str) -> str:
    low, high = (results.details or {}).get("intervals", {}).get(name, (None, None))
    value = f"{results.metrics[name]:.4g}" if name in results.metrics else "-"
    return value if low is None else f"{value} [{low:.4g}, {high:.4g}]"


def _cell(value: Any) -> str:
    """Returns a value as the text of one cell: without line ends, bars and marks of HTML."""
    text = visible(str(value)).replace("\n", " ").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;")
