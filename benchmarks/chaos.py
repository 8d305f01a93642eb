"""Kills at random instants of real runs, until each has finished; then it must be the run that was
never killed, bit for bit.

    PYTHONPATH=.:tests:tests/support python benchmarks/chaos.py [--kills 200] [--minutes 60]
        [--jobs 2]

A rank, the launcher, or all of them get SIGKILL at a drawn time or step (`Chase.wait`); the run is
resumed, and so on. After each kill every committed checkpoint is verified as a load would, and
the steps that are lost are counted. Runs are real processes that write to a real disk, forked from
a server that has imported everything (tests/support/forked.py): 200 kills would else cost an
hour. The model is that of `make verify-resume` for configs/nano.yaml. Configurations that are not
run keep their entry in the JSON file.

Between kills, some attempts are detours: the run is resumed from one of its earlier checkpoints
with another learning rate, killed or finished, and then resumed from there as it was. Some have a
console that cannot be written. Some find a link in the run folder, and must refuse to start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import forked
from rich.table import Table

from sft.cli import prepare_libraries
from sft.config.load import dump_config, load_config, with_values
from sft.runtime import checkpoint, run_folder
from sft.runtime.console import Advance, bar, make_console
from sft.runtime.plain import read_json
from sft.train.checkpoints import STATE
from sft.verify import laws
from sft.verify.runs import TRAIN, SmallConfig, make_small, read_outcome

ROOT = Path(__file__).parent.parent
SAVE_STEPS = 3
DETOURS, LINKS = 0.2, 0.05  # shares of the attempts
DETOUR = ["train.learning_rate=0.003", "train.save_total_limit=99"]  # it removes no checkpoint
STEPS = 30
SPAN = 12  # steps behind the newest checkpoint within which a run is killed
ORPHANED = 5.0  # seconds after which ranks whose launcher is dead are killed, too
ZERO2 = {"train.engine": "deepspeed", "train.deepspeed_config": "configs/deepspeed_z2.json"}
FSDP = {"train.engine": "fsdp"}
LORA = {"tuning.mode": "lora", "tuning.lora_dropout": 0.1}
FULL = {"tuning.mode": "full", "train.learning_rate": 1e-3}
BF16 = FULL | {"train.precision": "bf16_pure"}
IN_BACKWARD = {"train.optimizer_in_backward": True, "train.max_grad_norm": 0.0}
AVERAGES = FULL | {"train.optimizer": "schedule_free", "train.schedule": "constant"}
MUON, EIGHT_BITS = ({"train.optimizer": name} for name in ("muon", "torchao_adamw_8bit"))
CONFIGURATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "LoRA, one process": (1, LORA),
    "full, one process": (1, FULL),
    "QLoRA, one process": (1, LORA | {"tuning.mode": "qlora"}),
    "LoRA, DDP x 2": (2, LORA),
    "full, DDP x 2": (2, FULL),
    "QLoRA, DDP x 2": (2, LORA | {"tuning.mode": "qlora"}),
    "LoRA, ZeRO-2 x 2": (2, LORA | ZERO2),
    "full, ZeRO-2 x 2": (2, FULL | ZERO2),
    "LoRA, FSDP2 x 2": (2, LORA | FSDP),
    "full, FSDP2 x 2": (2, FULL | FSDP),
    "QLoRA, FSDP2 x 2": (2, LORA | FSDP | {"tuning.mode": "qlora"}),
    "LoRA compiled, one process": (1, LORA | {"train.compile": True}),
    "full in bf16, DDP x 2": (2, BF16),
    "full in bf16 updated in the backward pass, FSDP2 x 2": (2, BF16 | IN_BACKWARD | FSDP),
    "full in fp16, DDP x 2": (2, FULL | {"train.precision": "fp16"}),
    "full with averaged weights, DDP x 2": (2, AVERAGES),
    "full with averaged weights, FSDP2 x 2": (2, AVERAGES | FSDP),
    "full with Muon, DDP x 2": (2, FULL | MUON),
    "LoRA with Muon, FSDP2 x 2": (2, LORA | MUON | FSDP),
    "full with 8-bit moments, FSDP2 x 2": (2, FULL | EIGHT_BITS | FSDP),
    "full in bf16 with 8-bit moments, one process": (1, BF16 | EIGHT_BITS | IN_BACKWARD),
}


@dataclass
class Found:
    """What became of the runs of one configuration."""

    configuration: str
    processes: int
    runs: int = 0  # that finished
    kills: dict[str, int] = field(default_factory=dict)  # by what was killed
    in_a_save: int = 0  # kills that left something staged
    mismatches: int = 0  # finished runs that are not the uninterrupted one
    unusable: int = 0  # kills that left no checkpoint to resume from where there was one
    torn: int = 0  # committed checkpoints that did not verify
    steps_lost: int = 0  # the most by one kill
    detours: int = 0  # attempts with another learning rate, from an earlier checkpoint
    links: int = 0  # attempts that found a link in the run folder, and refused
    consoles: int = 0  # attempts whose console could not be written
    leftovers: int = 0  # finished runs with something of a killed one
    orphaned: int = 0  # kills of a launcher whose ranks ran on
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())

    @property
    def sound(self) -> bool:
        broken = self.mismatches or self.unusable or self.torn or self.problems or self.leftovers
        return not broken and self.steps_lost <= SAVE_STEPS


class Chase:
    """One configuration, run and killed over and over."""

    def __init__(self, name: str, small: SmallConfig, seed: int):
        self.world, values = CONFIGURATIONS[name]
        self.found = Found(name, self.world)
        self.random = random.Random(f"{seed} {name}")
        self.folder = small.folder / name.replace(" ", "_").replace(",", "")
        self.folder.mkdir()
        self.config = with_values(
            small.config,
            values
            | {
                "train.max_steps": STEPS,
                "train.save_steps": SAVE_STEPS,
                "train.eval_steps": 7,
                "train.num_processes": self.world,
                "train.resume_from_checkpoint": "auto",
                "evaluation.num_examples": 0,
            },
        )
        self.whole = self.folder / "whole"
        self.seconds_of_a_run = 0.0

    def path(self, run: Path) -> Path:
        """The configuration file of a run."""
        path = run.with_suffix(".yaml")
        config = with_values(self.config, {"train.output_dir": str(run)})
        path.write_text(dump_config(config), "utf-8")
        return path

    def start(self, run: Path, *overrides: str, console: str = "") -> Any:
        run.with_suffix(".pids").unlink(missing_ok=True)
        command = [*TRAIN, "--config", str(self.path(run)), *overrides]
        return forked.start(self.world, command, run.with_suffix(".log"), console)

    def uninterrupted(self) -> None:
        """The run to compare with; the times of kills are drawn within its time."""
        started = time.monotonic()
        self.start(self.whole).join()
        self.seconds_of_a_run = time.monotonic() - started
        self._must_have_finished(self.whole)

    def turn(self, kills: int, deadline: float, advance: Advance) -> bool:
        """One run, killed and resumed to its end; whether there is to be another."""
        started = time.monotonic()
        try:
            if not self.seconds_of_a_run:
                self.uninterrupted()
            run = self.folder / f"run{self.found.runs}"
            self.one_run(run, kills, deadline, advance)
            self.compare(run)
            for each in self.folder.glob(f"{run.name}*"):  # also what was moved aside
                shutil.rmtree(each) if each.is_dir() else each.unlink()
            self.found.runs += 1
        except Unsound as error:
            self.found.problems.append(str(error))
        self.found.seconds += time.monotonic() - started
        enough = self.found.num_kills >= kills or time.monotonic() > deadline
        return not enough and not self.found.problems

    def one_run(self, run: Path, kills: int, deadline: float, advance: Advance) -> None:
        """A run, killed until it has finished; not any more when enough is done."""
        newest, left_at = 0, ""  # where a detour began, and the run has to go on
        while True:
            enough = self.found.num_kills >= kills or time.monotonic() > deadline
            overrides, is_detour = [f"train.resume_from_checkpoint={left_at or 'auto'}"], False
            sound = [f for f in run_folder.newest_first(run) if checkpoint.fault(f) is None]
            if sound and not enough and self.random.random() < DETOURS:
                left_at, is_detour = left_at or str(self.random.choice(sound)), True
                again = self.random.choice([left_at, "auto"])
                overrides = [f"train.resume_from_checkpoint={again}", *DETOUR]
                self.found.detours += 1
            if sound and self.random.random() < LINKS:
                self.refuses_a_link(run)
            console = self.random.choice(["", "", *forked.CONSOLES])
            self.found.consoles += bool(console)
            process = self.start(run, *overrides, console=console)
            self.wait(process, run, None if enough else newest)
            if process.exitcode is not None:
                self._must_have_finished(run)
                if is_detour:
                    continue
                return
            self.kill(process, run)
            # Before it leaves the detour, a run can be killed; it then has to leave it once more.
            has_left = not is_detour and left_at and self.has_left(run, left_at)
            left_at = "" if has_left else left_at
            newest = self.inspect(run, 0 if left_at or has_left else newest)
            advance(1, self.found.configuration)

    def wait(self, process: Any, run: Path, newest: int | None) -> None:
        """Waits for the instant of the next kill; None: for the end.

        A third of the instants are a time, so that the start is hit, too. The others are a step and
        a moment in it or in the save after it, so that a busy machine does not change which part of
        a run is hit.
        """
        step, moment = (newest or 0) + self.random.randint(0, SPAN), self.random.random()
        if newest is None or self.random.random() < 1 / 3:
            process.join(None if newest is None else moment * self.seconds_of_a_run)
            return
        started, moment = time.time(), 2 * moment * self.seconds_of_a_run / STEPS
        while process.exitcode is None and (_written(run) < started or _last_step(run) < step):
            process.join(0.02)
        process.join(moment)

    def has_left(self, run: Path, left_at: str) -> bool:
        """Whether all checkpoints after the place of a detour are of the undisturbed run."""
        rate = self.config.train.learning_rate
        run_folder.complete_moves(run)
        after = [f for f in run_folder.newest_first(run) if f.name != Path(left_at).name]
        return all(read_json(f / STATE)["settings"]["learning_rate"] == rate for f in after)

    def refuses_a_link(self, run: Path) -> None:
        """Puts a link in the place of a file of the run, which must refuse it."""
        name = self.random.choice([n for n in run_folder.FILES if (run / n).is_file()])
        outside, kept = run.with_suffix(".outside"), run.with_suffix(".kept")
        outside.write_text("outside")
        (run / name).rename(kept)
        (run / name).symlink_to(outside)
        process = self.start(run)
        process.join()
        if process.exitcode == 0 or outside.read_text() != "outside":
            raise Unsound(f"{run} is kept: it followed a link in the place of {name}")
        kept.rename(run / name)
        self.found.links += 1

    def kill(self, process: Any, run: Path) -> None:
        """SIGKILL for one rank, the launcher, or all; returns when no process is left."""
        ranks = forked.ranks(run.with_suffix(".log"))
        targets = {"process": [process.pid]}
        if self.world > 1:
            while not ranks and process.is_alive():  # killed at once: they come in an instant
                ranks = forked.ranks(run.with_suffix(".log"))
            one = self.random.choice(ranks) if ranks else process.pid
            targets = {"rank": [one], "launcher": [process.pid], "all": [process.pid, *ranks]}
        target = self.random.choice(sorted(targets))
        for pid in targets[target]:
            _kill(pid)
        self.found.kills[target] = self.found.kills.get(target, 0) + 1
        process.join(forked.GRACE + 60)
        given_up = time.monotonic() + ORPHANED
        while (left := [pid for pid in ranks if forked.alive(pid)]) and time.monotonic() < given_up:
            time.sleep(0.01)
        self.found.orphaned += bool(left)
        for pid in left:
            _kill(pid)
        while any(map(forked.alive, left)):
            time.sleep(0.01)

    def inspect(self, run: Path, newest_before: int) -> int:
        """The step of the newest usable checkpoint, after a kill."""
        folders = run_folder.newest_first(run)
        sound = [folder for folder in folders if checkpoint.fault(folder) is None]
        self.found.torn += len(folders) - len(sound)
        newest = int(sound[0].name.rsplit("_", 1)[1]) if sound else 0
        self.found.unusable += newest < newest_before or (bool(folders) and not sound)
        self.found.in_a_save += (run / checkpoint.SCRATCH).exists()
        self.found.steps_lost = max(self.found.steps_lost, _last_step(run) - newest)
        return newest

    def compare(self, run: Path) -> None:
        for key in ("/loss", laws.EXAMPLES_KEY):
            if laws.read_curves(run, key) != laws.read_curves(self.whole, key):
                self.found.mismatches += 1
                raise Unsound(f"{run} is kept: its {key} are not those of {self.whole}")
        left = [*run.glob(f"**/*{run_folder.MOVING}"), *run.glob(f"**/{checkpoint.SCRATCH}")]
        left += [*run.glob("**/.*.json.*")]
        self.found.leftovers += bool(left)
        if left:
            raise Unsound(f"{run} is kept: {left[0]} was left")
        aside = run.glob(f"{run_folder.ABANDONED}/*/checkpoint_step_*")
        self.found.torn += sum(checkpoint.fault(folder) is not None for folder in aside)
        for name in ("final_checkpoint", f"checkpoint_step_{STEPS - SAVE_STEPS}"):
            files = [laws.hash_state_files(folder / name) for folder in (run, self.whole)]
            if files[0] != files[1] or not files[1]:
                self.found.mismatches += 1
                raise Unsound(f"{run} is kept: its {name} is not that of {self.whole}")

    def _must_have_finished(self, run: Path) -> None:
        log = run.with_suffix(".log").read_text("utf-8", errors="replace")
        ended = read_outcome(run, log)
        if not ended.is_finished:
            raise Unsound(f"{run} is kept: it {ended.state}: {ended.reason}")


class Unsound(Exception):
    """A promise is broken; the folders stay as they are."""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _written(run: Path) -> float:
    """When the metrics of a run were last written; 0 if they never were."""
    path = run / "metrics.jsonl"
    return path.stat().st_mtime if path.exists() else 0.0


def _last_step(run: Path) -> int:
    """The last step that was logged, hence applied; a line may be torn by the kill."""
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines(True) if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
    return max(steps, default=0)


def shown(found: list[Found]) -> Table:
    table = Table(title=f"{STEPS} steps, saved every {SAVE_STEPS}", title_justify="left", box=None)
    table.add_column("configuration")
    columns = (
        "runs",
        "kills",
        "detours",
        "in a save",
        "mismatches",
        "unusable",
        "lost",
        "orphaned",
    )
    for column in (*columns, "s"):
        table.add_column(column, justify="right")
    for each in found:
        cells = (each.runs, each.num_kills, each.detours, each.in_a_save, each.mismatches)
        cells += (each.unusable + each.torn, each.steps_lost, each.orphaned, round(each.seconds))
        table.add_row(each.configuration, *map(str, cells))
    return table


def write(path: Path, seed: int, found: list[dict[str, Any]]) -> None:
    """The results, and those of other configurations that the file has."""
    was = json.loads(path.read_text("utf-8"))["configurations"] if path.exists() else []
    entries = {each["configuration"]: each for each in [*was, *found]}
    rows = [entries[name] for name in CONFIGURATIONS if name in entries]
    reported = {
        "seed": seed,
        "steps": STEPS,
        "save_steps": SAVE_STEPS,
        "kills": sum(each["kills_in_all"] for each in rows),
        "mismatches": sum(each["mismatches"] for each in rows),
        "unusable": sum(each["unusable"] + each["torn"] for each in rows),
        "most_steps_lost": max(each["steps_lost"] for each in rows),
        "detours": sum(each.get("detours", 0) for each in rows),
        "links": sum(each.get("links", 0) for each in rows),
        "consoles": sum(each.get("consoles", 0) for each in rows),
        "leftovers": sum(each.get("leftovers", 0) for each in rows),
        "configurations": rows,
    }
    path.write_text(json.dumps(reported, indent=1) + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="over all configurations")
    parser.add_argument("--minutes", type=float, default=60, help="then runs are left to finish")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--jobs", type=int, default=1, help="configurations at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/chaos.json"))
    args = parser.parse_args()
    console = make_console()
    folder = Path(tempfile.mkdtemp(prefix="sft-chaos-"))
    small = make_small(load_config(ROOT / "configs/nano.yaml"), folder)
    chases = [Chase(name, small, args.seed) for name in args.only]
    quota = -(-args.kills // len(chases))
    deadline = time.monotonic() + 60 * args.minutes
    turns = deque(chases)  # so that where time is short, all configurations have had some
    forked.server_ready()

    def work(_: int) -> None:
        while True:
            try:
                chase = turns.popleft()
            except IndexError:
                return
            if chase.turn(quota, deadline, advance):
                turns.append(chase)

    with (
        bar(console, "kills", quota * len(chases)) as advance,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        list(pool.map(work, range(args.jobs)))
    found = [chase.found for chase in chases]
    console.print(shown(found))
    console.print("lost: steps, the most by one kill; orphaned: ranks that outlived their launcher")
    for each in found:
        for problem in each.problems:
            console.print(f"{each.configuration}: {problem}")
    sound = all(each.sound for each in found)
    write(args.json, args.seed, [asdict(each) | {"kills_in_all": each.num_kills} for each in found])
    if sound:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if sound else 1


if __name__ == "__main__":
    prepare_libraries()
    sys.exit(main())
