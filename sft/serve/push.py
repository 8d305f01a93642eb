"""Uploads a run's final checkpoint or a merged folder to a hub, with a card of what is proven.

The card is that of the folder, with the licence, the scores of the run, what `make verdict` found,
and for each artefact what `make serve-test` said. An artefact that serves something else than was
trained is not uploaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from sft.errors import ExportError, UserError, redact
from sft.models.export import BASE
from sft.models.pretrained import absolute_name
from sft.runtime import checkpoint
from sft.runtime.console import size
from sft.runtime.output import visible
from sft.runtime.plain import read_json
from sft.serve import merge
from sft.serve.proof import Say, describe_check
from sft.serve.runs import load_run_config
from sft.serve.served import REPORT, weights_sha256

# Records of this machine, with its paths, and the digests of a checkpoint whose card changes.
LEFT_OUT = {"README.md", REPORT, merge.REPORT, checkpoint.MANIFEST}
NAME_THE_BASE = ("adapter_config.json", BASE)
MARKS = {"the same": "what was trained", "not proven": "not proven"}


def push(folder: Path, repo: str, licence: str | None, say: Say) -> str:
    """Uploads a run's model or a merged folder as one commit; returns its address.

    A new repository is private. The token is the hub library's own (HF_TOKEN, or `hf auth login`).
    """
    is_merged = (folder / merge.REPORT).exists()
    run = merge.find_run(folder)[0] if is_merged else folder
    config = load_run_config(run)
    source = folder if is_merged else folder / "final_checkpoint"
    if not licence:
        raise UserError(
            "LICENSE: expected the licence of the model, such as LICENSE=apache-2.0; it depends on "
            f"those of {config.model.name} and of the data, which only you know"
        )
    files = sorted(p for p in source.rglob("*") if p.is_file() and p.name not in LEFT_OUT)
    card = make_card(folder, source, run, licence, config.model.name)
    additions = [
        CommitOperationAdd(str(p.relative_to(source)), _content(p, config.model.name))
        for p in files
    ]
    additions.append(CommitOperationAdd("README.md", card.encode("utf-8")))
    total = sum(p.stat().st_size for p in files)
    say(f"uploading {len(additions)} files, {size(total)}, to {repo}")
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        hub.create_repo(repo, private=True, exist_ok=True)
        done = hub.create_commit(repo, additions, commit_message=f"{folder.resolve().name}, by sft")
    except LocalTokenNotFoundError:
        raise UserError("the hub wants a token: set HF_TOKEN, or run `hf auth login`") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = redact(str(error)).strip().splitlines()[0]
        raise UserError(f"REPO={repo}: cannot upload: {reason}") from None
    return str(done.commit_url)


def _content(path: Path, base: str) -> str | bytes:
    """Returns the path of a file to upload, or its bytes without the path of a local base."""
    if path.name not in NAME_THE_BASE or not Path(base).exists():
        return str(path)
    text, name = path.read_text("utf-8"), Path(base).name
    for each in (absolute_name(base), base):
        text = text.replace(json.dumps(each), json.dumps(name))
    return text.encode("utf-8")


def make_card(folder: Path, source: Path, run: Path, licence: str, base: str) -> str:
    """Returns the card. Raises ExportError for an artefact that serves something else."""
    text = (source / "README.md").read_text("utf-8")
    match = re.fullmatch(r"---\n(.*?)---\n(.*)", text, re.DOTALL)
    if match is None:
        raise ExportError(f"{source}/README.md: expected a model card with a front matter; restore")
    front, body = match.groups()
    front += f"license: {json.dumps(licence)}\n"
    if "## Scores" not in body:  # the card of a merge
        own = (run / "final_checkpoint" / "README.md").read_text("utf-8")
        scores = re.search(r"## Scores\n.*?(?=\n## |\Z)", own, re.DOTALL)
        body = body.replace("## Use\n", f"{scores[0] if scores else ''}\n## Use\n", 1)
    served = "\n".join(_served_rows(folder, source))
    added = f"{_verdict(run)}{SERVED.format(rows=served)}"
    body = body.replace("## Use\n", f"{added}\n## Use\n", 1)
    text = f"---\n{front}---\n{body}"
    if Path(base).exists():
        text = text.replace(absolute_name(base), Path(base).name)
    return redact(re.sub(r"(?m)^# .*$", f"# {folder.resolve().name}", text, count=1))


VERDICT = """## Verdict

Against the base, with 95 % intervals (`make verdict`). KL and agreement: of the next tokens, on
general prompts that have nothing to do with the task.

| | base | tuned | difference | verdict |
|---|---|---|---|---|
{rows}

"""


def _verdict(run: Path) -> str:
    """Returns what `make verdict` found; nothing if it was not asked."""
    found = read_json(run / "verdict.json")
    try:
        lines = [
            f"| {row['name']} | {row['base']:.4g} | {row['tuned']:.4g} | "
            f"{_interval(row['difference'], row['interval'])} | {row['verdict']} |"
            for row in (*found["learnt"], *found["lost"]["texts"])
        ]
        lines += [
            f"| drift, {row['name']}: "
            f"KL {_interval(row['divergence'], row['divergence_interval'])}, "
            f"agreement {_interval(row['agreement'], row['agreement_interval'])} "
            f"| | | | {row['verdict']} |"
            for row in found["lost"]["drift"]
        ]
    except (KeyError, TypeError, ValueError):
        return ""
    return VERDICT.format(rows=visible("\n".join(lines)))


def _interval(value: float, bounds: Sequence[float]) -> str:
    return f"{value:.3g} [{bounds[0]:.3g}, {bounds[1]:.3g}]"


SERVED = """## Served

Pinned conversations went through the chat API of a server. Compared were the token ids of prompts,
greedy tokens, ends, and probabilities, with the trained model's.

| artefact | server | verdict | measured |
|---|---|---|---|
{rows}
"""


def _served_rows(folder: Path, source: Path) -> Iterator[str]:
    """Yields a row for the model and for each GGUF file."""
    reports = read_json(folder / REPORT)
    name = folder.resolve().name
    for artefact, path in {name: folder, **{p.name: p for p in source.glob("*.gguf")}}.items():
        report: dict[str, Any] = reports.get(artefact, {})
        if report.get("verdict") == "differs":
            raise ExportError(
                f"{artefact}: make serve-test found that it does not serve what was trained; "
                f"correct it and test it again, or remove it ({folder / REPORT})"
            )
        shown, server, verdict = "", report.get("server", ""), report.get("verdict", "not proven")
        if report and report["sha256"] != weights_sha256(path):
            verdict, server = "not proven: changed since it was tested", ""
        elif report:
            checks = [c for c in report["checks"].values() if not isinstance(c, str)]
            shown = "; ".join(f"{what}: {found}" for what, found, _ in map(describe_check, checks))
        cells = (artefact, server, MARKS.get(verdict, verdict), shown)
        yield f"| {' | '.join(visible(str(each)).replace('|', '/') for each in cells)} |"
