"""Makes and checks the receipt of a run: one file from which a reviewer can repeat its steps.

A receipt has the configuration, digests of data, template, tokenizer, base and code, and for each
step a checksum of its examples, the bits of its loss and of its gradient's norm. Each step's link
is the digest of the link before and of these values, so that no step can be exchanged alone. The
digest of the whole file is its last value. That finds damage; a signature (`sign`) also finds a
forger, who could compute the digest anew. `repeat` trains steps again.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from sft.config.schema import RunConfig, sections_of
from sft.errors import CheckpointError, DataError, UserError, VerificationError
from sft.runtime import checkpoint, plain, run_folder
from sft.runtime.console import write_json
from sft.tasks.registry import load_run, task_of
from sft.train.checkpoints import identity

NAME = "receipt.json"
NAMESPACE = "sft-receipt"  # of signatures: one for another purpose is not accepted
CUT = "tokens of a micro-batch"  # in a place
START = sha256(b"").hexdigest()  # the link before the first step
LIMIT = 2**30  # bytes of a receipt, and of metrics.jsonl
REPORTS = {
    "plan": "plan.json",
    "audit": "audit.json",
    "scores": "evaluation/metrics.json",
    "verdict": "verdict.json",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _is_hex(text: str) -> str:
    float.fromhex(text)
    return text


Bits = Annotated[str, AfterValidator(_is_hex)]
Digits = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]
Report = Annotated[str, Field(pattern=rf"^({'|'.join(REPORTS.values())})$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Attempt(_Strict):
    """A start or a resume of the run, or a smaller cut from a step on, since memory ran out."""

    after_step: int
    identity: dict[str, str]
    """What a resumed run must share (`train/checkpoints: identity`), among it digests of data."""
    place: dict[str, str]
    """Devices, processes, cut, precision, engine, versions and code: what bits depend on."""

    @field_validator("place")
    @classmethod
    def _is_whole(cls, place: dict[str, str]) -> dict[str, str]:
        if not all(place.get(name, "").isdecimal() for name in ("threads", "processes")):
            raise ValueError("expected the numbers of threads and processes")
        if place.get("precision") not in ("fp32", "bf16", "fp16"):
            raise ValueError("expected the precision of computing")
        return place


class Step(NamedTuple):
    """The checksums of one optimizer step."""

    step: int
    examples: int
    """CRC-32 of the ids of its examples, in their order."""
    loss: Bits
    """All bits of the loss, as `float.hex` writes them."""
    gradient_norm: Bits
    link: str


class Receipt(_Strict):
    """What receipt.json holds."""

    format: Literal[1]
    run: str
    signed_off_by: str | None
    configuration: str
    """The text of config.yaml."""
    attempts: Annotated[list[Attempt], Field(min_length=1)]
    steps: list[Step]
    checkpoints: dict[Digits, Digest]
    """The digest of the tensors (weights, optimizer) of each checkpoint that was saved, by step."""
    final: Digest | None
    """That of `final_checkpoint`, if the run has finished."""
    files: dict[Report, Digest]
    """The sha256 of each report."""
    reports: dict[str, Any]
    """The plan with what was measured, the audit, the scores and the verdict."""
    sha256: str

    def digest(self) -> str:
        """Returns the digest of all other values."""
        values = self.model_dump(mode="json", exclude={"sha256"})
        return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def attempts_of(self, first: int, last: int) -> list[Attempt]:
        """Returns the attempts that made these steps."""
        ends = [each.after_step for each in self.attempts[1:]] + [last]
        pairs = zip(self.attempts, ends, strict=True)
        return [each for each, end in pairs if each.after_step < last and first <= end]

    def all_steps(self) -> dict[int, Step]:
        return {each.step: each for each in self.steps}


class Finding(NamedTuple):
    """A line of the table: what was compared, and whether it holds (None: it could not be)."""

    what: str
    found: str
    holds: bool | None


def make(run: Path, signed_off_by: str | None = None) -> Receipt:
    """Returns the receipt of a run. Raises UserError if the folder lacks what it needs."""
    attempts, checkpoints = _history(run)
    final = run / run_folder.FINAL
    files, reports = {}, {}
    for name, file in REPORTS.items():
        if (run / file).exists():
            files[file] = checkpoint.sha256(run / file)
            reports[name] = plain.load_json(run / file)
    if fault := final.exists() and checkpoint.fault(final):
        raise CheckpointError(f"{final} cannot be part of a receipt: {fault}")
    made = Receipt(
        format=1,
        run=run.name,
        signed_off_by=signed_off_by,
        configuration=_text(run / "config.yaml"),
        attempts=attempts,
        steps=read_steps(run, checkpoints),
        checkpoints={str(step): digest for step, digest in checkpoints.items()},
        final=checkpoint.tensors_sha256(final) if final.exists() else None,
        files=files,
        reports=reports,
        sha256="",
    )
    return made.model_copy(update={"sha256": made.digest()})


def _text(file: Path) -> str:
    try:
        return plain.read_bytes(file, LIMIT).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: expected a file of a run that has trained, found {error}; give RUN=<folder>"
        ) from None


def _history(run: Path) -> tuple[list[Attempt], dict[int, str]]:
    """Returns the attempts, and the digest of each checkpoint of the lineage by its step."""
    if not (run / run_folder.HISTORY).exists():
        raise UserError(
            f"{run} has no {run_folder.HISTORY}: expected the folder of a run of this version; "
            "give RUN=<folder>, or train it again"
        )
    attempts: list[Attempt] = []
    checkpoints: dict[int, str] = {}
    for line in _text(run / run_folder.HISTORY).splitlines():
        event = json.loads(line)
        kind = event.pop("event")
        if kind == "attempt":
            after = event["after_step"]  # what came later was set aside
            checkpoints = {step: each for step, each in checkpoints.items() if step <= after}
            attempts = [each for each in attempts if each.after_step < after]
            attempts.append(Attempt(**event))
        elif kind == "cut":
            place = attempts[-1].place | {CUT: event["tokens"]}
            changed = attempts[-1].model_copy(
                update={"after_step": event["after_step"], "place": place}
            )
            attempts = [each for each in attempts if each.after_step < changed.after_step]
            attempts.append(changed)
        else:
            checkpoints[event["step"]] = event["tensors_sha256"]
    return attempts, checkpoints


def read_steps(run: Path, checkpoints: dict[int, str]) -> list[Step]:
    """Returns the steps of metrics.jsonl, linked. `checkpoints` enter the links of their steps."""
    rows = map(json.loads, _text(run / run_folder.METRICS).splitlines())
    steps, link = list[Step](), START
    for row in rows:
        if "data/examples_crc32" in row:
            loss, norm = (float(row[f"train/{name}"]).hex() for name in ("loss", "grad_norm"))
            step = Step(row["step"], int(row["data/examples_crc32"]), loss, norm, "")
            link = next_link(link, step, checkpoints.get(step.step))
            steps.append(step._replace(link=link))
    return steps


def next_link(link: str, step: Step, tensors: str | None) -> str:
    """Returns the link of a step. `tensors`: the digest of the checkpoint saved after it."""
    return sha256(json.dumps([link, *step[:-1], tensors]).encode()).hexdigest()


def read(file: Path) -> Receipt:
    """Returns the receipt in a file. Raises UserError if it is none."""
    try:
        return Receipt.model_validate_json(plain.read_bytes(file, LIMIT, follow=True))
    except FileNotFoundError:
        remedy = f"write it with make receipt RUN={file.parent}, or give RECEIPT=<file>"
        raise UserError(f"{file}: expected a receipt, found nothing; {remedy}") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        reason = f"{where}: {error.errors()[0]['msg']}".lstrip(": ")
        raise VerificationError(f"{file} is no receipt of this version: {reason}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def configuration(receipt: Receipt, scratch: Path, overrides: list[str]) -> RunConfig:
    """Returns the configuration of a receipt; `scratch` takes its file.

    A file that came from elsewhere must not grant itself the right to run code of a model.
    """
    file = scratch / "config.yaml"
    file.write_text(receipt.configuration, "utf-8")
    has_model = "model" in sections_of(type(load_run(file)))
    return load_run(file, [*(["model.trust_remote_code=false"] if has_model else []), *overrides])


def write(receipt: Receipt, file: Path) -> None:
    """Writes a receipt. Raises UserError if that is impossible."""
    try:
        write_json(file, receipt.model_dump(mode="json"))
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


# -- signatures: those of OpenSSH, which also sign commits


def sign(file: Path, key: Path) -> Path:
    """Writes the signature of a receipt beside it, by an SSH key. Raises UserError."""
    _ssh_keygen("-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(file))
    return file.with_name(f"{file.name}.sig")


def signer(file: Path, allowed: Path) -> str:
    """Returns who signed a receipt. Raises VerificationError unless `allowed` names the key.

    `allowed`: lines of a name and a public key (ALLOWED SIGNERS in ssh-keygen(1)).
    """
    signature = file.with_name(f"{file.name}.sig")
    if not signature.is_file():
        raise VerificationError(f"{signature}: expected the receipt's signature, found nothing")
    who = _ssh_keygen("-Y", "find-principals", "-s", str(signature), "-f", str(allowed))
    name = who.split("\n")[0].split(",")[0]
    options = ("-f", str(allowed), "-I", name, "-n", NAMESPACE, "-s", str(signature))
    _ssh_keygen("-Y", "verify", *options, read=file)
    return name


def _ssh_keygen(*arguments: str, read: Path | None = None) -> str:
    given = read.read_bytes() if read else b""
    try:
        done = subprocess.run(
            ["ssh-keygen", *arguments], check=False, input=given, capture_output=True
        )
    except FileNotFoundError:
        raise UserError("signatures need ssh-keygen, which is not installed (OpenSSH)") from None
    if done.returncode:
        text = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise VerificationError(f"ssh-keygen {' '.join(arguments[:2])} failed: {text}")
    return done.stdout.decode(errors="replace")


# -- what can be checked without training


def check_file(receipt: Receipt) -> Iterator[Finding]:
    """Compares a receipt with itself: its digest, and the chain of its steps."""
    whole = receipt.digest() == receipt.sha256
    yield Finding("receipt", receipt.sha256[:16] if whole else "its digest differs", whole)
    link, broken = START, None
    for step in receipt.steps:
        link = next_link(link, step, receipt.checkpoints.get(str(step.step)))
        if link != step.link:
            broken = step.step
            break
    text = f"{len(receipt.steps):,} steps" if broken is None else f"broken at step {broken:,}"
    yield Finding("chain of steps", text, broken is None and bool(receipt.steps))


def check_run(receipt: Receipt, run: Path) -> Iterator[Finding]:
    """Compares a receipt with the files of its run: reports, steps and weights."""
    if not run.is_dir():
        yield Finding("files of the run", f"{run} is not here", None)
        return
    files = receipt.files | {"config.yaml": sha256(receipt.configuration.encode()).hexdigest()}
    for name, expected in files.items():
        file = run / name
        same = file.is_file() and checkpoint.sha256(file) == expected
        yield Finding(name, "same" if same else "OTHER" if file.exists() else "missing", same)
    checkpoints = {int(step): digest for step, digest in receipt.checkpoints.items()}
    ours, theirs = read_steps(run, checkpoints), receipt.steps
    num_same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    same = ours == theirs
    yield Finding(run_folder.METRICS, f"{num_same:,} of {len(theirs):,} steps same", same)
    for step, expected in checkpoints.items():
        if (folder := run / f"checkpoint_step_{step}").exists():
            yield _weights(folder, expected)
    if receipt.final:
        yield _weights(run / run_folder.FINAL, receipt.final)


def _weights(folder: Path, expected: str) -> Finding:
    if fault := checkpoint.fault(folder):
        return Finding(folder.name, fault, False)
    same = checkpoint.tensors_sha256(folder) == expected
    return Finding(folder.name, "same" if same else "OTHER weights", same)


def check_inputs(receipt: Receipt, config: RunConfig) -> Iterator[Finding]:
    """Prepares the data anew, and compares what a run must share: data, template, base.

    `config`: the configuration of the receipt.
    """
    task = task_of(config)
    try:
        found = identity(config.train, task.identity_of(config, task.prepare(config)))
    except DataError as error:
        yield Finding("data", str(error).splitlines()[0], False)
        return
    expected = receipt.attempts[-1].identity
    for name in sorted(found.keys() | expected.keys()):
        same = found.get(name) == expected.get(name)
        yield Finding(name, "same" if same else "OTHER", same)


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Returns in what two places differ, as people read it."""
    names = sorted(found.keys() | expected.keys())
    pairs = [(name, found.get(name, "none"), expected.get(name, "none")) for name in names]
    return [f"{name}: {_short(a)} in place of {_short(b)}" for name, a, b in pairs if a != b]


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else value


def deviation(found: str, expected: str) -> float:
    """Returns the relative deviation of two numbers that `float.hex` wrote."""
    a, b = float.fromhex(found), float.fromhex(expected)
    if found == expected:
        return 0.0
    return abs(a - b) / (abs(b) or 1.0) if math.isfinite(a) and math.isfinite(b) else math.inf
