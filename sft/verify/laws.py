"""Tests laws 1 and 2 on the user's own configuration, with a small version of its model.

Whole runs are trained in fresh processes and judged only by the files in their folders
(docs/RUNS.md). So the same code tests every engine, and detects a fault in any part. A run that
must die at a chosen point watches its own file operations (`die_at`).
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file

from sft import errors
from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.errors import VerificationError
from sft.plan.plan import refuse_processes
from sft.runtime import checkpoint, hardware, run_folder
from sft.runtime.console import bar, facts, table
from sft.tasks.registry import task_of
from sft.verify.runs import Run, SmallConfig, Trials, make_small, run_fresh

LOSS, WEIGHTS = 1e-5, 1e-4  # allowed relative deviation between cuts
EXAMPLES_KEY = "examples_crc32"
TENSORS = {".safetensors", ".pt", ".bin", ".distcp"}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_curves(folder: Path, key: str = "/loss", after: int = 0) -> dict[tuple[int, str], float]:
    """Returns the values whose name ends with `key`, for steps after `after`, by step and name."""
    return {
        (row["step"], name): row[name]
        for row in read_metrics(folder)
        for name in row
        if name.endswith(key) and row["step"] > after
    }


def hash_state_files(folder: Path) -> dict[str, str]:
    """Returns the files of a checkpoint that hold tensors or the optimizer, with their sha256."""
    return {
        str(path.relative_to(folder)): checkpoint.sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in TENSORS
    }


def max_deviation(found: dict[Any, Any], expected: dict[Any, Any]) -> float:
    """Returns the largest relative deviation of any number, or of any tensor in norm.

    It is infinite if the keys differ or there are none.
    """
    if found.keys() != expected.keys():
        return math.inf
    pairs = [
        [torch.as_tensor(each[key], dtype=torch.float64) for each in (found, expected)]
        for key in expected
    ]
    return max((float((a - b).norm() / (b.norm() or 1.0)) for a, b in pairs), default=math.inf)


def load_weights(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Returns tensors by file and name, since adapters in several folders have equal names."""
    return {
        (str(path.relative_to(folder)), name): tensor
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@dataclass(frozen=True)
class Verdict:
    """The judgement of a run, as a row of the table."""

    title: tuple[str, ...]
    cells: list[tuple[str, bool]]  # each a text, and whether the law holds in it
    problem: str = ""  # why the run failed or cannot be judged
    refused: bool = False  # whether the run refused its configuration

    @property
    def holds(self) -> bool:
        return not self.problem and all(holds for _, holds in self.cells)


# -- law 2: resumed equals uninterrupted


@dataclass(frozen=True)
class Kill:
    """A point where a run is killed and resumed."""

    title: str
    point: str  # argument of `die_at`
    newest_step: int  # that of the newest checkpoint at that point
    resumed_by: tuple[int, ...]  # the number of processes of each run that resumes it


def kill_points(small: SmallConfig, world: int) -> list[Kill]:
    """Returns four points: within an epoch, at its end, after it, and during a save."""
    last, same = small.steps_per_epoch, (world,)
    return [
        Kill(f"after step {last - 1}, within an epoch", f"saved:{last - 1}", last - 1, same),
        Kill(f"after step {last}, last of an epoch", f"saved:{last}", last, same),
        Kill(f"after step {last + 1}, first of the next", f"saved:{last + 1}", last + 1, same),
        Kill(f"in the save of step {last}", f"saving:{last}", last - 1, same),
    ]


def try_resuming(trials: Trials, world: int, kills: list[Kill]) -> list[Verdict]:
    """Kills and resumes runs of `world` processes, and compares them with an uninterrupted run."""
    with ThreadPoolExecutor(_num_parallel(world)) as pool:
        whole = pool.submit(trials.run, "whole", world)
        groups = [pool.submit(_kill_and_resume, trials, world, kill, whole) for kill in kills]
        return [verdict for group in groups for verdict in group.result()]


def _kill_and_resume(trials: Trials, world: int, kill: Kill, whole: Future[Run]) -> list[Verdict]:
    name = kill.point.replace(":", "_")
    killed = trials.run(name, world, kill=kill.point)
    if killed.state != "running":
        problem = f"the run was not killed, it {killed.state}: {killed.reason}"
        return [Verdict((kill.title,), [], problem)]
    folders = {other: killed.folder.with_name(f"{name}_by_{other}") for other in kill.resumed_by}
    for folder in folders.values():
        shutil.copytree(killed.folder, folder)
    uninterrupted = _require_finished(whole.result())
    return [
        judge_resumed(trials, kill, folder, other, world, uninterrupted)
        for other, folder in folders.items()
    ]


def judge_resumed(
    trials: Trials, kill: Kill, folder: Path, world: int, killed_world: int, whole: Run
) -> Verdict:
    """Resumes the killed run in `folder` with `world` processes, and judges the result.

    `killed_world`: the processes of the killed run. `whole`: the uninterrupted run.
    """
    by = "" if world == killed_world else f"; by {world} process{'es' * (world > 1)}"
    title = (kill.title + by,)
    rejected: list[str] = []
    try:
        newest = run_folder.find(folder, "auto", rejected.append)
    except errors.CheckpointError as error:
        return Verdict(title, [], str(error))
    if newest is None or rejected:
        return Verdict(title, [], "; ".join(rejected) or "no checkpoint was committed")
    exact = world == killed_world
    step = int(newest.name.rsplit("_", 1)[1])
    before = _rows_until(folder, step)
    resumed = trials.run(folder.name, world, "train.resume_from_checkpoint=auto")
    if not resumed.is_finished:
        return Verdict(title, [], resumed.reason, refused=resumed.state == "refused" and not exact)
    # A run that started from the beginning would have logged other times.
    continues = step == kill.newest_step and _rows_until(folder, step) == before
    found = _compare_runs(resumed.folder, whole.folder, step, exact)
    return Verdict(title, [(str(step), continues), *found])


def _rows_until(folder: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder) if row["step"] <= step]


def _compare_runs(
    found: Path, whole: Path, step: int = 0, exact: bool = True
) -> list[tuple[str, bool]]:
    """Compares examples, losses, weights and optimizer of two finished runs after `step`."""
    ours, theirs = (read_curves(folder, EXAMPLES_KEY, step) for folder in (found, whole))
    cells = [_same(ours == theirs and bool(theirs))]
    ours, theirs = (read_curves(folder, "/loss", step) for folder in (found, whole))
    models = [folder / "final_checkpoint" for folder in (found, whole)]
    if not exact:  # losses and weights may deviate by rounding
        losses, weights = max_deviation(ours, theirs), max_deviation(*map(load_weights, models))
        cells += [(f"{losses:.0e}", losses <= LOSS), (f"{weights:.0e}", weights <= WEIGHTS)]
        return [*cells, ("-", True)]
    num_same = sum(ours.get(key) == value for key, value in theirs.items())
    all_same = ours == theirs and num_same > 0
    cells.append((f"{num_same} of {len(theirs)} same", all_same))
    newest = [run_folder.newest_first(folder)[0] for folder in (found, whole)]
    for folders in (models, newest):
        files = [hash_state_files(folder) for folder in folders]
        cells.append(_same(files[0] == files[1] and bool(files[1])))
    return cells


def _same(holds: bool) -> tuple[str, bool]:
    return ("same" if holds else "OTHER"), holds


def verify_resume(config: RunConfig, world: int, console: Console) -> None:
    """Prints the verdicts on law 2; raises VerificationError if it does not hold."""
    refuse_processes(config, world)
    others = (world - 1 if world > 2 else 1,) if world > 1 else ()
    with _scratch_folder() as folder:
        small = make_small(config, folder / "as_configured")
        changes, kills = [*small.changes], kill_points(small, world)
        groups = [(small, kills)]
        if others:  # they cut differently, so randomness that depends on the cut must be off
            exact = make_small(config, folder / "exact", exact=True)
            if off := [change for change in exact.changes if change not in small.changes]:
                changes += [(name, f"{text}, for other numbers of processes") for name, text in off]
                groups.append((exact, [replace(kills[0], resumed_by=others)]))
            else:
                kills[0] = replace(kills[0], resumed_by=(world, *others))
        _print_changes(console, world, changes)
        total = sum(1 + sum(1 + len(kill.resumed_by) for kill in each) for _, each in groups)
        verdicts = []
        with bar(console, "runs", total) as advance:
            for each, its_kills in groups:
                verdicts += try_resuming(Trials(each, run_fresh, advance), world, its_kills)
        titles = ("killed", "resumed after", "examples", "losses", "weights", "optimizer")
        print_verdicts(console, "Resumed equals uninterrupted", titles, verdicts)


# -- law 1: layout changes speed and memory, never the result


@dataclass(frozen=True)
class Cut:
    """A way to cut the same global batches."""

    world: int
    engine: str
    layout: str
    max_tokens: int
    overrides: tuple[str, ...] = ()

    @property
    def title(self) -> tuple[str, ...]:
        return str(self.world), self.engine, self.layout, f"{self.max_tokens:,}"

    @property
    def name(self) -> str:
        return "_".join(self.title).replace(" ", "_").replace(",", "").lower()

    def settings(self) -> list[str]:
        return [
            f"train.layout={self.layout}",
            f"train.max_tokens={self.max_tokens}",
            *self.overrides,
        ]


def list_cuts(small: SmallConfig, world: int, deepspeed: list[Path]) -> list[Cut]:
    """Returns the cuts to try; the first is the reference for the others."""
    single, quarter = "one process", small.quarter_batch_tokens
    budgets = (small.whole_batch_tokens, quarter, 1)
    cuts = [Cut(1, single, "padded", max_tokens) for max_tokens in budgets]
    if task_of(small.config).info(small.config).packs:
        cuts.append(Cut(1, single, "packed", quarter))
    if world > 1:
        cuts.append(Cut(world, "DDP", "padded", quarter))
        cuts.append(Cut(world, "FSDP2", "padded", quarter, ("train.engine=fsdp",)))
        for file in deepspeed:
            engine = ("train.engine=deepspeed", f"train.deepspeed_config={file}")
            cuts.append(Cut(world, file.stem.replace("_", " "), "padded", quarter, engine))
    return cuts


def try_cuts(trials: Trials, cuts: list[Cut]) -> list[Verdict]:
    """Trains every cut and compares it with the first."""
    runs: dict[Cut, Run] = {}
    for world in sorted({cut.world for cut in cuts}):
        mine = [cut for cut in cuts if cut.world == world]
        with ThreadPoolExecutor(_num_parallel(world)) as pool:
            found = pool.map(lambda cut: trials.run(cut.name, cut.world, *cut.settings()), mine)
            runs |= dict(zip(mine, found, strict=True))
    first = _require_finished(runs[cuts[0]])
    return [judge_cut(cut, runs[cut], first) for cut in cuts]


def judge_cut(cut: Cut, run: Run, first: Run) -> Verdict:
    """Compares the run of a cut with the run of the first cut."""
    if not run.is_finished:
        return Verdict(cut.title, [], run.reason, refused=run.state == "refused")
    return Verdict(cut.title, _compare_runs(run.folder, first.folder, exact=False)[:-1])


def verify_invariance(config: RunConfig, world: int, console: Console) -> None:
    """Prints the verdicts on law 1; raises VerificationError if it does not hold."""
    refuse_processes(config, world)
    deepspeed = sorted(Path.cwd().glob("configs/deepspeed_z*.json"))
    own = config.train.deepspeed_config
    if own and all(Path(own).resolve() != file for file in deepspeed):
        deepspeed.append(Path(own))
    any_engine = {"train.engine": "ddp", "train.deepspeed_config": None}
    with _scratch_folder() as folder:
        small = make_small(with_values(config, any_engine), folder, exact=True)
        _print_changes(console, world, small.changes)
        cuts = list_cuts(small, world, deepspeed)
        with bar(console, "runs", len(cuts)) as advance:
            verdicts = try_cuts(Trials(small, run_fresh, advance), cuts)
        titles = ("processes", "engine", "layout", "tokens", "examples", "losses", "weights")
        print_verdicts(console, "The cut changes nothing", titles, verdicts)
        console.print(
            "tokens: budget of a micro-batch; losses, weights: the largest relative deviation from "
            f"the first row; allowed are {LOSS:g} and {WEIGHTS:g}"
        )


# -- both laws


def _num_parallel(world: int) -> int:
    """Returns how many runs to train at the same time: one on GPUs, up to four on CPUs."""
    machine = hardware.detect()
    return 1 if machine.devices else max(1, min(4, machine.cores // world))


def _require_finished(run: Run) -> Run:
    if not run.is_finished:
        raise VerificationError(f"the run to compare the others with {run.state}: {run.reason}")
    return run


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Yields a temporary folder. Keeps it if a law does not hold."""
    folder, keep = Path(tempfile.mkdtemp(prefix="sft-verify-")), False
    try:
        yield folder
    except VerificationError as error:
        keep = True
        raise VerificationError(f"{error}\nThe runs are kept in {folder}.") from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _print_changes(console: Console, world: int, changes: list[tuple[str, str]]) -> None:
    rest = ("processes", f"{world}; everything else as configured")
    console.print(facts("The configuration, made small", [*changes, rest]))


def print_verdicts(
    console: Console, law: str, titles: tuple[str, ...], verdicts: list[Verdict]
) -> None:
    """Prints the table; raises VerificationError if the law does not hold in one of its rows."""
    rows: list[list[str | Text]] = []
    for each in verdicts:
        cells = [Text(text, "" if holds else "bold red") for text, holds in each.cells]
        cells += [Text("")] * (len(titles) - len(each.title) - len(cells))
        result = Text("holds", "green") if each.holds else Text("BROKEN", "bold red")
        result = Text("refused", "dim") if each.refused else result
        rows.append([*each.title, *cells, result])
    console.print(table(law, (*titles, "verdict"), rows, left=len(titles) + 1))
    for each in verdicts:
        if each.problem:
            console.print(f"{' '.join(each.title)}: {each.problem}")
    broken = [" ".join(each.title) for each in verdicts if not each.holds and not each.refused]
    if broken:
        raise VerificationError(f"the law does not hold here: {'; '.join(broken)}")
    console.print(Text("The law holds.", "green"))
