"""Proves that a server gives what was trained: law 3 to its end.

Pinned conversations go through the chat API of a server. Compared are the token ids of each prompt,
the tokens of each greedy answer, where it ends, and the probabilities at each token. The trained
model is asked about the server's own tokens, so every token counts, also behind a first difference.
What a server does not reveal is reported as not proven.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.text import Text
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sft.config.schema import Config
from sft.data import template
from sft.data.formats import Messages
from sft.errors import DataError, MergeError, UserError, VerificationError, require_extra
from sft.evaluate import generate, predictions
from sft.runtime import checkpoint
from sft.runtime.console import table, write_json
from sft.runtime.output import visible
from sft.runtime.plain import read_json
from sft.serve import merge
from sft.serve.endpoint import Endpoint, Reply
from sft.serve.proof import (
    MAX_KL,
    MAX_LOSS,
    MIN_EFFECT,
    Check,
    Say,
    at_most,
    describe_check,
    equal,
    load_merged,
)
from sft.serve.runs import load_run_config, load_trained

REPORT = "served.json"
NUM_PROMPTS = 16  # from the evaluation of the run, besides PROBES
NUM_TOKENS = 64  # of each answer, at most

# What prompts of an evaluation may lack: a system prompt, earlier turns, texts that split oddly.
PROBES: list[Messages] = [
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is 12,345 + 6?"},
    ],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And now?"},
    ],
    [
        {
            "role": "user",
            "content": "She wrote (na\u00efve): \u6771\u4eac \U0001f642\n\n  1000000,\tok?",
        }
    ],
]


@dataclass(frozen=True)
class Limits:
    """What rounding explains, in nats (docs/LOG.md has what was measured).

    `tie`: a token rated so little below the likeliest one may win. `server`: mean KL of a server
    from the same weights computed in fp32. `artefact`: mean KL of these from the trained model.
    """

    tie: float
    server: float
    artefact: float


# Weights in full, by llama.cpp; in blocks of few bits, whose partners it rounds to 8 bits; or in
# another server, which may compute in bf16.
WHOLE, BLOCKS, OTHER = (
    Limits(0.1, 1e-4, MAX_KL["bf16"]),
    Limits(0.5, 1e-3, 0.1),
    Limits(0.1, 1e-3, MAX_KL["bf16"]),
)


@dataclass
class Artefact:
    """What is served: a run, a merged folder, or a GGUF file, and the run behind it."""

    path: Path
    run: Path
    config: Config
    on_quantised: bool  # the trained model is the adapter on the 4-bit base
    limits: Limits = OTHER
    num_bytes: int | None = None  # of the weights in a GGUF file

    @property
    def folder(self) -> Path:
        """Returns where the report goes."""
        return self.path.parent if self.path.is_file() else self.path

    @property
    def name(self) -> str:
        return self.path.name if self.path.is_file() else self.path.resolve().name


def find_artefact(
    run: Path | None, merged: Path | None, gguf: Path | None, overrides: list[str] | None
) -> Artefact:
    """Returns what is served. Raises MergeError for a file or folder that is not there."""
    if gguf and not gguf.is_file():
        raise MergeError(f"GGUF: expected a .gguf file, found {gguf}; make merge GGUF=... makes it")
    path = gguf or merged
    if path is None:
        run = run or Path("outputs/nano")
        return Artefact(run, run, load_run_config(run, overrides), on_quantised=True)
    folder = path.parent if gguf else path
    if run and not (folder / merge.REPORT).exists():  # a file elsewhere, or of a full fine-tuning
        found = Artefact(path, run, load_run_config(run, overrides), on_quantised=False)
    else:
        run, base, config = merge.find_run(folder, run, None, overrides)
        found = Artefact(path, run, config, on_quantised=base == "dequantised")
    if gguf:
        require_extra("gguf", "GGUF", ["gguf"])
        from gguf import GGUFReader

        tensors = GGUFReader(str(gguf)).tensors
        is_whole = {each.tensor_type.name for each in tensors} <= {"F32", "F16", "BF16"}
        found.limits = WHOLE if is_whole else BLOCKS
        found.num_bytes = sum(int(each.n_bytes) for each in tensors)
    return found


@dataclass
class Findings:
    """What the comparison of all replies found; counts, sums and the first difference of each."""

    prompts: list[str] = field(default_factory=list)  # each with what differs
    tokens: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    num_prompts_revealed: int = 0
    num_counts_only: int = 0
    num_tokens: int = 0
    num_ties: int = 0
    num_unknown: int = 0  # answers whose token ids are not known, or not all of them
    num_ends: int = 0
    kl: list[float] = field(default_factory=list)  # server from artefact, for each token
    cost: list[float] = field(default_factory=list)  # artefact from trained model
    effect: list[float] = field(default_factory=list)  # base from trained model


class Comparison:
    """The trained model, the artefact's weights, and what a server's replies are against them."""

    def __init__(self, artefact: Artefact):
        self.trained: Any
        self.trained, tokenizer = load_trained(
            artefact.run, artefact.config, quantised=artefact.on_quantised
        )
        self.tokenizer: PreTrainedTokenizerBase = template.prepare_tokenizer(tokenizer)
        self.limits = artefact.limits
        self.stop = set(generate.stop_ids(self.tokenizer, self.trained.generation_config))
        self.shipped = _load_shipped(artefact) or self.trained
        self.found = Findings()

    def conversations(self, run: Path) -> Iterator[tuple[Messages, list[int]]]:
        """Yields the pinned conversations with the ids of their prompts."""
        path = run / "evaluation" / "predictions.jsonl"
        stored = islice(predictions.read_records(path), NUM_PROMPTS) if path.is_file() else ()
        asked = [[{"role": "user", "content": each["prompt"]}] for each in stored if each["prompt"]]
        context = generate.context_length(self.trained) or 2**62
        for messages in [*asked, *PROBES]:
            try:
                ids = template.prompt_ids(self.tokenizer, messages)
            except DataError:  # a template without a system role
                continue
            if len(ids) + NUM_TOKENS <= context:
                yield messages, ids

    @torch.no_grad()
    def add(self, number: int, prompt: list[int], reply: Reply) -> None:
        """Compares a reply with what the model would have written."""
        self._compare_prompt(f"prompt {number}", prompt, reply)
        if reply.ids is None:
            self.found.num_unknown += 1
            return
        body, ended = _split_end(reply, self.stop)
        logs = others = generate.log_probs(self.shipped, prompt, body)
        self._compare_tokens(f"prompt {number}", body, ended, logs)
        self.found.kl += map(coarse_kl, logs, reply.top or [])  # as many as there are tokens
        if self.shipped is not self.trained:
            others = generate.log_probs(self.trained, prompt, body)
            self.found.cost += full_kl(others, logs)
        if hasattr(self.trained, "disable_adapter"):
            with self.trained.disable_adapter():
                self.found.effect += full_kl(others, generate.log_probs(self.trained, prompt, body))

    def _compare_prompt(self, where: str, expected: list[int], reply: Reply) -> None:
        found, count = self.found, reply.num_prompt
        if reply.prompt is not None:
            found.num_prompts_revealed += 1
            if reply.prompt != expected:
                found.prompts.append(f"{where}, {self._first_difference(expected, reply.prompt)}")
        elif count is not None:
            found.num_counts_only += 1
        if count is not None and count != len(expected):
            found.prompts.append(f"{where}: expected {len(expected)} tokens, found {count}")

    def _first_difference(self, expected: list[int], found: list[int]) -> str:
        both = enumerate(zip(expected, found, strict=False))
        at = next((i for i, (a, b) in both if a != b), min(len(expected), len(found)))
        return f"token {at}: expected {self._show(expected, at)}, found {self._show(found, at)}"

    def _show(self, ids: list[int], at: int) -> str:
        if at >= len(ids):
            return "the end"
        return f"{ids[at]} {visible(str(self.tokenizer.decode([ids[at]])))!r}"

    def _compare_tokens(self, where: str, body: list[int], ended: bool, logs: torch.Tensor) -> None:
        """Compares each token, and the end, with the likeliest one. `logs`: one row more."""
        found, stop = self.found, sorted(self.stop)
        found.num_tokens += len(body)
        best = logs.argmax(-1).tolist()
        for at, token in enumerate(body):
            if token in self.stop:
                found.ends.append(f"{where}, token {at}: does not end at {self._show(body, at)}")
            if token == best[at]:
                continue
            margin = float(logs[at, best[at]] - logs[at, token])
            if margin <= self.limits.tie:
                found.num_ties += 1
            elif best[at] in self.stop:
                found.ends.append(f"{where}, token {at}: goes on where the answer has to end")
            else:
                shown = f"expected {self._show(best, at)}, found {self._show(body, at)}"
                found.tokens.append(f"{where}, token {at}: {shown}, {margin:.2g} nats less likely")
        found.num_ends += ended
        last = logs[len(body)]
        if ended and last.max() - last[stop].max() > self.limits.tie:
            shown = self._show(best, len(body))
            found.ends.append(f"{where}, token {len(body)}: ends, expected {shown}")

    def checks(self, num: int) -> dict[str, Check | str]:
        """Returns the lines of the verdict; in place of one that is not proven, the reason."""
        found, ids_only = self.found, "the server reveals no token ids"
        checks: dict[str, Check | str] = {"prompt": ids_only, "tokens": ids_only, "stop": ids_only}
        if found.prompts or found.num_prompts_revealed == num:
            what = f"token ids of {num} prompts, from those of training"
            checks["prompt"] = _none_of(what, found.prompts)
        elif found.num_counts_only == num:
            checks["prompt"] = "the server reveals only the number of tokens, which is equal"
        if found.num_tokens or found.num_ends:
            notes = {"ties": found.num_ties, "answers not known": found.num_unknown}
            listed = ", ".join(f"{number} {name}" for name, number in notes.items() if number)
            shown = f" ({listed})" if listed else ""
            what = f"{found.num_tokens} tokens of answers{shown}, from the likeliest"
            checks["tokens"] = _none_of(what, found.tokens)
            checks["stop"] = f"no answer ended within {NUM_TOKENS} tokens"
        if found.num_ends or found.ends:
            checks["stop"] = _none_of(f"ends of {found.num_ends} answers", found.ends)
        share = MAX_LOSS * max(_mean(found.effect), MIN_EFFECT) if found.effect else math.inf
        checks["kl"] = "the server reveals no log probabilities"
        if found.kl:
            limit = min(self.limits.server, share)
            what = "KL of the server from what it serves, nats per token"
            checks["kl"] = at_most(what, _mean(found.kl), limit)
        if found.cost:
            limit = min(self.limits.artefact, share)
            what = "KL of what is served from the trained model, nats per token"
            checks["artefact"] = at_most(what, _mean(found.cost), limit)
        return checks


def serve_test(
    url: str,
    say: Say,
    run: Path | None = None,
    merged: Path | None = None,
    gguf: Path | None = None,
    model: str | None = None,
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Compares the server at `url` with what was trained; adds the report to served.json.

    Raises VerificationError if anything differs, or if nothing could be compared.
    """
    artefact = find_artefact(run, merged, gguf, overrides)
    endpoint = Endpoint(url, model)  # before minutes are spent on loading
    comparison = Comparison(artefact)
    pinned = list(comparison.conversations(artefact.run))
    for number, (messages, ids) in enumerate(pinned):
        comparison.add(number, ids, endpoint.answer(messages, NUM_TOKENS))
    checks = comparison.checks(len(pinned))
    if artefact.num_bytes is not None:
        what, found = "bytes of the weights, from those of the file", endpoint.num_bytes
        checks["size"] = (
            "the server reveals no size"
            if found is None
            else equal(what, f"{found:,}", f"{artefact.num_bytes:,}")
        )
    oks = {check["ok"] for check in checks.values() if not isinstance(check, str)}
    report = {
        "verdict": "differs" if False in oks else "the same" if oks else "not proven",
        "server": endpoint.software,
        "url": str(endpoint),
        "model": endpoint.model,
        "num_prompts": len(pinned),
        "checks": checks,
    }
    report["sha256"] = weights_sha256(artefact.path)
    stored = read_json(artefact.folder / REPORT)
    write_json(artefact.folder / REPORT, {**stored, artefact.name: report})
    _show(report, artefact, say)
    return report


def weights_sha256(path: Path) -> str:
    """Returns a digest of a GGUF file, or of the weights of a merged folder or a run."""
    if path.is_file():
        return checkpoint.sha256(path)
    files = [*path.glob("*.safetensors")] or [*path.glob("final_checkpoint/**/*.safetensors")]
    each = (checkpoint.sha256(file) for file in sorted(files))
    return hashlib.sha256("".join(each).encode()).hexdigest()


def _show(report: dict[str, Any], artefact: Artefact, say: Say) -> None:
    """Prints the verdict. Raises VerificationError with everything that differs."""
    rows, problems = [], []
    for name, check in report["checks"].items():
        if isinstance(check, str):
            rows.append(
                [Text("-", style="yellow"), *map(Text, (name, f"not proven: {check}", "", ""))]
            )
            continue
        texts = describe_check(check)
        is_ok = check["ok"]
        mark = Text("ok", style="green") if is_ok else Text("DIFFERS", style="bold red")
        rows.append([mark, *map(Text, (name, *texts))])
        if not is_ok:
            problems.append(f"\n  {name}: {texts[0]}: expected {texts[2]}, found {texts[1]}")
    title = f"Served: {artefact.name} by {report['server']}, {report['num_prompts']} prompts"
    say(table(title, ("", "check", "what", "measured", "expected"), rows, left=5))
    if problems:
        raise VerificationError(
            f"{report['url']} does not serve what was trained:{''.join(problems)}"
        )
    if report["verdict"] == "not proven":
        raise VerificationError(
            f"{report['url']} reveals neither token ids nor probabilities, so nothing is proven; "
            "use a server that does (llama.cpp's, vLLM, make serve)"
        )


def _load_shipped(artefact: Artefact) -> Any:
    """Returns the model whose weights the artefact has, in fp32; None if it is the run itself."""
    if artefact.path == artefact.run:
        return None
    if not artefact.path.is_file():
        return load_merged(artefact.path, artefact.config)[0].float()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(artefact.path.parent), gguf_file=artefact.path.name, dtype=torch.float32
        )
    except (OSError, ValueError, NotImplementedError, KeyError) as error:
        raise UserError(
            f"{artefact.path}: transformers cannot read this GGUF file ({error}); test the "
            "merged folder behind it with MERGED=, whose KL then includes the quantisation"
        ) from error
    return model.eval()


def _split_end(reply: Reply, stop: set[int]) -> tuple[list[int], bool]:
    """Returns the answer's ids without the token that ended it, and whether it has ended."""
    assert reply.ids is not None
    if reply.ids and reply.ids[-1] in stop and reply.finish_reason == "stop":
        return reply.ids[:-1], True
    return reply.ids, reply.finish_reason == "stop"


def full_kl(expected: torch.Tensor, found: torch.Tensor) -> list[float]:
    """Returns the KL divergence of `found` from `expected` for each row, in nats."""
    width = min(expected.shape[-1], found.shape[-1])  # a padded vocabulary
    new, old = found[:, :width], expected[:, :width]
    return F.kl_div(new, old, reduction="none", log_target=True).sum(-1).tolist()


def coarse_kl(expected: torch.Tensor, found: dict[int, float]) -> float:
    """Returns the KL divergence over the tokens in `found`, with all others as one.

    It is a lower bound of the divergence over all tokens.
    """
    p = expected[list(found)].exp()
    q = torch.tensor(list(found.values()), dtype=torch.float64).exp()
    p, q = (torch.cat([each, (1 - each.sum(0, keepdim=True))]).clamp(min=1e-9) for each in (p, q))
    return float((p * (p / q).log()).sum())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _none_of(what: str, differences: Iterable[str]) -> Check:
    """Returns a check that passes without differences, and else shows the first."""
    all_of_them = list(differences)
    if not all_of_them:
        return equal(what, "the same", "the same")
    more = f" (and {len(all_of_them) - 1} more)" if len(all_of_them) > 1 else ""
    return equal(what, f"{all_of_them[0]}{more}", "the same")
