"""Repeats some steps of a run from its receipt, in fresh processes, and compares every value.

In the place where the run was trained (the same devices, processes, engine, versions and code) all
bits must be the same. Elsewhere the examples must be, and losses may deviate by rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.config.load import dump_config, with_values
from sft.config.schema import EarlyStopping, RunConfig, sections_of
from sft.errors import ConfigError, VerificationError
from sft.runtime import checkpoint, run_folder
from sft.runtime.console import bar
from sft.tasks.registry import task_of
from sft.verify import laws, runs
from sft.verify.receipt import CUT, Finding, Receipt, Step, deviation, differences, make

OF_CUT = ("processes", CUT)  # of a place: on these dropout depends, too
# Allowed relative deviation of a loss in another place: law 1's in fp32, else units of rounding.
BOUNDS = {"fp32": laws.LOSS, "fp16": 2**-9, "bf16": 2**-6}


def parse_steps(text: str, receipt: Receipt) -> tuple[int, int]:
    """Returns the first and the last step of '200-210' or '200'. Raises ConfigError."""
    first, _, last = text.partition("-")
    began = receipt.attempts[0].after_step
    have = {step for step in receipt.all_steps() if step > began}
    try:
        window = int(first), int(last or first)
        if not window[0] <= window[1] or not {*window} <= have:
            raise ValueError
    except ValueError:
        steps = f"{min(have)} to {max(have)}" if have else "none"
        raise ConfigError(
            f"STEPS: expected a step or a range of the receipt's ({steps}), as in 20-30; "
            f"found {text!r}"
        ) from None
    return window


def find_start(receipt: Receipt, run: Path, first: int) -> Path | None:
    """Returns the newest checkpoint before a step whose weights are those of the receipt.

    None: the run is repeated from its beginning.
    """
    for step in sorted(map(int, receipt.checkpoints), reverse=True):
        folder = run / f"checkpoint_step_{step}"
        usable = step < first and folder.is_dir() and checkpoint.fault(folder) is None
        if usable and checkpoint.tensors_sha256(folder) == receipt.checkpoints[str(step)]:
            return folder
    if receipt.attempts[0].after_step:
        raise VerificationError(
            f"step {first} cannot be repeated: the run began with a checkpoint of another run, and "
            f"{run} has none of the receipt before that step"
        )
    return None


def repeat(
    receipt: Receipt,
    config: RunConfig,
    run: Path,
    window: tuple[int, int],
    world: int | None,
    scratch: Path,
    console: Console,
) -> list[Finding]:
    """Trains the steps of `window` again, and compares them with those of the receipt.

    `config` is that of the receipt, perhaps with other settings; `world`: the number of processes,
    by default as it was. `scratch` takes the files of the repeated run.
    """
    first, last = window
    places = [attempt.place for attempt in receipt.attempts_of(first, last)]
    start = find_start(receipt, run, first)
    world = world or int(places[0]["processes"])
    begun = run_folder.step_of(start) if start else 0
    file, folder = scratch / "config.yaml", scratch / "run"
    file.write_text(dump_config(with_values(config, _values(config, folder, start, last))), "utf-8")
    program = ["-m", "sft.verify.runs", f"saved:{last}", "train", "--config", str(file)]
    threads = int(places[0]["threads"])
    with ThreadPoolExecutor(1) as pool, bar(console, "steps", last - begun) as advance:
        done, shown = pool.submit(runs.run_fresh, world, folder, program, None, threads), begun
        while not done.done():
            time.sleep(0.5)
            if (log := folder / run_folder.METRICS).exists():
                now = run_folder.last_step(log)
                advance(max(0, now - shown), f"step {now:,}")
                shown = max(shown, now)
        printed = done.result()
    outcome = runs.read_outcome(folder, printed)
    if not (folder / run_folder.HISTORY).exists() or outcome.state in ("refused", "failed"):
        return [Finding(f"steps {first} to {last}", outcome.reason, False)]
    repeated = make(folder)
    expected = {step: each for step, each in receipt.all_steps().items() if first <= step <= last}
    found = {step: each for step, each in repeated.all_steps().items() if first <= step <= last}
    if found.keys() != expected.keys():
        reason = f"{len(found)} of {len(expected)} were repeated: {outcome.reason}"
        return [Finding(f"steps {first} to {last}", reason, False)]
    here = repeated.attempts[-1].place
    others = [*dict.fromkeys(each for place in places for each in differences(here, place))]
    is_cut = any(each.startswith(OF_CUT) for each in others)
    random = random_settings(config, scratch) if is_cut else []
    findings = _compare(found, expected, others, BOUNDS[places[0]["precision"]], random)
    for name, known in _weights(receipt, last):
        if (folder / name).exists():
            same = checkpoint.tensors_sha256(folder / name) == known
            text = "same" if same else "others, as the place is another" if others else "OTHER"
            findings.append(Finding(f"repeated {name}", text, same or (None if others else False)))
    return findings


def _weights(receipt: Receipt, last: int) -> Iterator[tuple[str, str]]:
    """Yields the folders that a repeated run may have after its last step, and their digests."""
    if known := receipt.checkpoints.get(str(last)):
        yield f"checkpoint_step_{last}", known
    if receipt.final and last == receipt.steps[-1].step:
        yield run_folder.FINAL, receipt.final


def _values(config: RunConfig, folder: Path, start: Path | None, last: int) -> dict[str, Any]:
    """Returns what the repeated run has otherwise: it saves once, and measures nothing else."""
    values: dict[str, Any] = {
        "train.output_dir": str(folder),
        "train.resume_from_checkpoint": str(start.resolve()) if start else None,
        "train.save_steps": last,
        "train.eval_steps": None,
        "train.save_best": None,
        "train.checkpoint_async": False,
        "train.tensorboard": False,
        "train.early_stopping": EarlyStopping().model_dump(),
        "train.trackers": [],
    }
    if "evaluation" in sections_of(type(config)):
        values |= {"evaluation.num_examples": 0, "evaluation.during": 0}
    return values


def random_settings(config: RunConfig, scratch: Path) -> list[str]:
    """Returns what makes results random, and so dependent on the cut: dropout and the like."""
    task = task_of(config)
    plain, exact = (task.shrink(config, scratch / str(flag), flag) for flag in (False, True))
    given = config.model_dump()
    off = [key for key, value in exact.exact.items() if _value(given, key) and not value]
    return [*off, *(text for name, text in exact.changes if (name, text) not in plain.changes)]


def _value(values: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return values[section][name]


def _compare(
    found: dict[int, Step],
    expected: dict[int, Step],
    others: list[str],
    bound: float,
    random: list[str],
) -> list[Finding]:
    """Compares steps. `others`: in what the places differ; `random`: why losses cannot be compared
    then."""
    pairs = [(found[step], expected[step]) for step in expected]
    of_steps = f"of {len(pairs)} step{'s' * (len(pairs) > 1)}"
    findings = [Finding("place", "; ".join(others) or "same", None if others else True)]
    num_same = sum(a.examples == b.examples for a, b in pairs)
    text = f"{num_same} of {len(pairs)} same"
    findings.append(Finding(f"examples {of_steps}", text, num_same == len(pairs)))
    for name in ("loss", "gradient_norm"):
        values = [(getattr(a, name), getattr(b, name)) for a, b in pairs]
        num_same, worst = sum(a == b for a, b in values), max(deviation(a, b) for a, b in values)
        text = f"{num_same} of {len(pairs)} same"
        holds: bool | None = num_same == len(pairs) or None
        if not holds:
            text += f", the others within {worst:.0e}"
            if not others:
                holds = False
            elif random:
                text += f"; depends on the cut: {', '.join(random)}"
            elif name == "loss":
                text, holds = f"{text} (allowed: {bound:.0e})", worst <= bound
        findings.append(Finding(f"{name.replace('_', ' ')} {of_steps}", text, holds))
    return findings
