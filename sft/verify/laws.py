"""Laws 1 and 2 tried on the user's own configuration, with its model made small.

The runs are whole ones: `scripts/train.py` in fresh processes, under torchrun where there are
several, judged by what they leave in their folders (docs/RUNS.md) and by nothing else. So every
engine is tried by the same code, and a fault of any part shows. To kill a run at a chosen point,
the same script is started with a hook on what the interpreter does to files (`die_at`).
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
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file

from sft import errors
from sft.config.load import with_values
from sft.config.schema import RunConfig
from sft.errors import VerificationError
from sft.runtime import checkpoint, hardware
from sft.runtime.console import bar, facts
from sft.tasks.registry import task_of
from sft.verify.runs import ROOT, Run, Trials, fresh
from sft.verify.small import Small, make_small

LOSS, WEIGHTS = 1e-5, 1e-4  # relative deviation that another cut may cause


# --- what a run left ---------------------------------------------------------------------------

EXAMPLES_KEY = "examples_crc32"
TENSORS = {".safetensors", ".pt", ".bin", ".distcp"}


def curves(folder: Path, key: str = "/loss", after: int = 0) -> dict[tuple[int, str], float]:
    """(step, name) -> value, of all values whose name ends so, later than step `after`."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return {
        (row["step"], name): row[name]
        for row in map(json.loads, lines)
        for name in row
        if name.endswith(key) and row["step"] > after
    }


def state_files(folder: Path) -> dict[str, str]:
    """Files of a checkpoint that hold tensors or the optimizer, and their sha256."""
    return {
        str(path.relative_to(folder)): checkpoint.sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in TENSORS
    }


def deviation(found: dict[Any, float], expected: dict[Any, float]) -> float:
    """The largest relative one; infinite where one of the two has what the other lacks."""
    if found.keys() != expected.keys():
        return math.inf
    pairs = [(found[key], expected[key]) for key in expected]
    return max((abs(a - b) / (abs(b) or 1.0) for a, b in pairs), default=math.inf)


def weight_deviation(found: Path, expected: Path) -> float:
    """The largest relative one of a tensor, in norm, between the models in two folders."""
    ours, theirs = _tensors(found), _tensors(expected)
    if ours.keys() != theirs.keys():
        return math.inf
    pairs = [(ours[name], theirs[name]) for name in theirs]
    return max((float((a - b).norm() / (b.norm() or 1.0)) for a, b in pairs), default=math.inf)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """By file and name: adapters in folders of their own have the same names."""
    files = {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
    return {
        f"{place} {name}": value.double()
        for place, tensors in files.items()
        for name, value in tensors.items()
    }


@dataclass(frozen=True)
class Row:
    """A line of a verdict: its title, what was found (text, holds), and why a run failed."""

    title: tuple[str, ...]
    cells: list[tuple[str, bool]]
    problem: str = ""
    refused: bool = False

    @property
    def holds(self) -> bool:
        return not self.problem and all(holds for _, holds in self.cells)


# --- law 2: resumed equals uninterrupted -------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """Where a run is killed (see `die_at`), the step of the newest checkpoint then, and how many
    processes go on from there."""

    told: str
    point: str
    newest: int
    resumed_by: tuple[int, ...]


def kills(small: Small, world: int) -> list[Kill]:
    last, same = small.steps_per_epoch, (world,)
    return [
        Kill(f"after step {last - 1}, within an epoch", f"saved:{last - 1}", last - 1, same),
        Kill(f"after step {last}, last of an epoch", f"saved:{last}", last, same),
        Kill(f"after step {last + 1}, first of the next", f"saved:{last + 1}", last + 1, same),
        Kill(f"in the save of step {last}", f"saving:{last}", last - 1, same),
    ]


def resume_rows(trials: Trials, world: int, chosen: list[Kill]) -> list[Row]:
    """Runs of `world` processes, killed and resumed, held against the uninterrupted one."""
    with ThreadPoolExecutor(_at_once(world)) as pool:
        whole = pool.submit(trials.run, "whole", world)
        groups = [pool.submit(_killed, trials, world, kill, whole) for kill in chosen]
        return [row for group in groups for row in group.result()]


def _killed(trials: Trials, world: int, kill: Kill, whole: Future[Run]) -> list[Row]:
    name = kill.point.replace(":", "_")
    killed = trials.run(name, world, kill=kill.point)
    if killed.state != "running":
        problem = f"the run was not killed, it {killed.state}: {killed.reason}"
        return [Row((kill.told,), [], problem)]
    folders = {now: killed.folder.with_name(f"{name}_by_{now}") for now in kill.resumed_by}
    for folder in folders.values():
        shutil.copytree(killed.folder, folder)
    whole_run = _finished(whole.result())
    return [
        resumed_row(trials, kill, folder, now, world, whole_run) for now, folder in folders.items()
    ]


def resumed_row(
    trials: Trials, kill: Kill, folder: Path, world: int, killed_world: int, whole: Run
) -> Row:
    by = "" if world == killed_world else f"; by {world} process{'es' * (world > 1)}"
    title = (kill.told + by,)
    rejected: list[str] = []
    try:
        newest = checkpoint.find(folder, "auto", rejected.append)
    except errors.CheckpointError as error:
        return Row(title, [], str(error))
    if newest is None or rejected:
        return Row(title, [], "; ".join(rejected) or "no checkpoint was committed")
    exact = world == killed_world
    step = int(newest.name.rsplit("_", 1)[1])
    before = _history(folder, step)
    resumed = trials.run(folder.name, world, "train.resume_from_checkpoint=auto")
    if not resumed.finished:
        return Row(title, [], resumed.reason, refused=resumed.state == "refused" and not exact)
    # Had it started anew, its times would be others.
    goes_on = step == kill.newest and _history(folder, step) == before
    return Row(title, [(str(step), goes_on), *_compared(resumed.folder, whole.folder, step, exact)])


def _history(folder: Path, step: int) -> list[str]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [line for line in lines if json.loads(line)["step"] <= step]


def _compared(
    found: Path, whole: Path, step: int = 0, exact: bool = True
) -> list[tuple[str, bool]]:
    """Examples, losses, weights and optimizer of two finished runs, from `step` on."""
    ours, theirs = (curves(folder, EXAMPLES_KEY, step) for folder in (found, whole))
    cells = [_same(ours == theirs and bool(theirs))]
    ours, theirs = (curves(folder, "/loss", step) for folder in (found, whole))
    models = [folder / "final_checkpoint" for folder in (found, whole)]
    if not exact:
        return [*cells, *_within(ours, theirs, models), ("-", True)]
    num_same = sum(ours.get(key) == value for key, value in theirs.items())
    all_same = ours == theirs and num_same > 0
    cells.append((f"{num_same} of {len(theirs)} same", all_same))
    newest = [checkpoint.newest_first(folder)[0] for folder in (found, whole)]
    for folders in (models, newest):
        files = [state_files(folder) for folder in folders]
        cells.append(_same(files[0] == files[1] and bool(files[1])))
    return cells


def _within(
    found: dict[tuple[int, str], float], expected: dict[tuple[int, str], float], models: list[Path]
) -> list[tuple[str, bool]]:
    """Losses and weights, which may deviate by rounding."""
    of_losses, of_weights = deviation(found, expected), weight_deviation(*models)
    return [(f"{of_losses:.0e}", of_losses <= LOSS), (f"{of_weights:.0e}", of_weights <= WEIGHTS)]


def _same(holds: bool) -> tuple[str, bool]:
    return ("same" if holds else "OTHER"), holds


def verify_resume(config: RunConfig, world: int, console: Console) -> None:
    """Prints the verdict on law 2. Raises VerificationError where it does not hold."""
    others = (world - 1 if world > 2 else 1,) if world > 1 else ()
    with _folder() as folder:
        small = make_small(config, folder / "as_configured")
        introduced = [*small.changes]
        chosen = kills(small, world)
        groups = [(small, chosen)]
        if others:  # the cut is another, so what depends on it must be off
            exact = make_small(config, folder / "exact", exact=True)
            if off := [what for what in exact.changes if what not in small.changes]:
                introduced += [(name, f"{what}, where others resume") for name, what in off]
                groups.append((exact, [replace(chosen[0], resumed_by=others)]))
            else:
                chosen[0] = replace(chosen[0], resumed_by=(world, *others))
        _introduce(console, world, introduced)
        total = sum(1 + sum(1 + len(kill.resumed_by) for kill in kills) for _, kills in groups)
        rows = []
        with bar(console, "runs", total) as advance:
            for each, its_kills in groups:
                rows += resume_rows(Trials(each, fresh, advance), world, its_kills)
        titles = ("killed", "resumed after", "examples", "losses", "weights", "optimizer")
        _conclude(console, "Resumed equals uninterrupted", titles, rows)


# --- law 1: layout changes speed and memory, never the result ----------------------------------


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


def cuts(small: Small, world: int, deepspeed: list[Path]) -> list[Cut]:
    """The first is what the others are held against."""
    alone = "one process"
    found = [
        Cut(1, alone, "padded", small.whole),
        Cut(1, alone, "padded", small.quarter),
        Cut(1, alone, "padded", 1),
    ]
    if task_of(small.config).info(small.config).packs:
        found.append(Cut(1, alone, "packed", small.quarter))
    if world > 1:
        found.append(Cut(world, "DDP", "padded", small.quarter))
        found.append(Cut(world, "FSDP2", "padded", small.quarter, ("train.engine=fsdp",)))
    for file in deepspeed if world > 1 else []:
        engine = ("train.engine=deepspeed", f"train.deepspeed_config={file}")
        found.append(Cut(world, file.stem.replace("_", " "), "padded", small.quarter, engine))
    return found


def invariance_rows(trials: Trials, chosen: list[Cut]) -> list[Row]:
    """Every cut held against the first."""
    runs: dict[Cut, Run] = {}
    for world in sorted({cut.world for cut in chosen}):
        mine = [cut for cut in chosen if cut.world == world]
        with ThreadPoolExecutor(_at_once(world)) as pool:
            made = pool.map(lambda cut: trials.run(cut.name, cut.world, *cut.settings()), mine)
            runs |= dict(zip(mine, made, strict=True))
    first = _finished(runs[chosen[0]])
    return [cut_row(cut, runs[cut], first) for cut in chosen]


def cut_row(cut: Cut, made: Run, first: Run) -> Row:
    if not made.finished:
        return Row(cut.title, [], made.reason, refused=made.state == "refused")
    return Row(cut.title, _compared(made.folder, first.folder, exact=False)[:-1])


def verify_invariance(config: RunConfig, world: int, console: Console) -> None:
    """Prints the verdict on law 1. Raises VerificationError where it does not hold."""
    deepspeed = sorted(ROOT.glob("configs/deepspeed_z*.json"))
    own = Path(config.train.deepspeed_config or deepspeed[0])
    deepspeed += [own] * all(own.resolve() != file for file in deepspeed)
    any_engine = {"train.engine": "ddp", "train.deepspeed_config": None}
    with _folder() as folder:
        small = make_small(with_values(config, any_engine), folder, exact=True)
        _introduce(console, world, small.changes)
        chosen = cuts(small, world, deepspeed)
        with bar(console, "runs", len(chosen)) as advance:
            rows = invariance_rows(Trials(small, fresh, advance), chosen)
        titles = ("processes", "engine", "layout", "tokens", "examples", "losses", "weights")
        _conclude(console, "The cut changes nothing", titles, rows)
        console.print(
            "tokens: budget of a micro-batch; losses, weights: the largest relative deviation from "
            f"the first row, at most {LOSS:g} and {WEIGHTS:g}"
        )


# --- what both share ---------------------------------------------------------------------------


def _at_once(world: int) -> int:
    """Runs side by side: as many as have cores of their own."""
    machine = hardware.detect()
    return 1 if machine.devices else max(1, min(4, machine.cores // world))


def _finished(made: Run) -> Run:
    if not made.finished:
        raise VerificationError(f"the run to compare with {made.state}: {made.reason}")
    return made


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder, which stays if a law does not hold."""
    folder = Path(tempfile.mkdtemp(prefix="sft-verify-"))
    try:
        yield folder
    except VerificationError as error:
        raise VerificationError(f"{error}\nThe runs are kept in {folder}.") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _introduce(console: Console, world: int, told: list[tuple[str, str]]) -> None:
    rest = ("processes", f"{world}; all else as configured")
    console.print(facts("The configuration, made small", [*told, rest]))


def _conclude(console: Console, law: str, titles: tuple[str, ...], rows: list[Row]) -> None:
    """The table; VerificationError if a row does not hold."""
    table = Table(title=law, title_justify="left", box=None, pad_edge=False)
    for title in (*titles, "verdict"):
        table.add_column(title, overflow="fold")
    for row in rows:
        cells = [Text(text, style="" if holds else "bold red") for text, holds in row.cells]
        blank = [Text("")] * (len(titles) - len(row.title) - len(cells))
        verdict = Text("holds", "green") if row.holds else Text("BROKEN", "bold red")
        verdict = Text("refused", "dim") if row.refused else verdict
        table.add_row(*row.title, *cells, *blank, verdict)
    console.print(table)
    for row in rows:
        if row.problem:
            console.print(f"{' '.join(row.title)}: {row.problem}")
    if broken := [" ".join(row.title) for row in rows if not row.holds and not row.refused]:
        raise VerificationError(f"the law does not hold here: {'; '.join(broken)}")
    console.print(Text("The law holds.", style="green"))
