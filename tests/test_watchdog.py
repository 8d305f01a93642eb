"""How a run ends: real processes, real signals, ranks that raise, die, stop and loop.

The ranks are forked by watchdog_worker.py; their files and exit codes are asserted.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATHS, ROOT, clean_environment, representatives
from safetensors.torch import load_file

import sft
from sft import cli, errors
from sft.runtime import attempt, checkpoint, children, run_folder, watchdog
from sft.runtime.attempt import Lock, Status

pytestmark = pytest.mark.slow

KEYS = {"version", "state", "exit_code", "reason", "rank", "step", "attempt", "checkpoint"}
BOUNDED = 90.0  # seconds; this machine may be busy


def wait_for(happened: Callable[[], Any], seconds: float = BOUNDED) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


@dataclass
class Started:
    """A small run in processes of its own."""

    out: Path
    folder: Path

    @property
    def pids(self) -> dict[str, Any]:
        return json.loads(wait_for(lambda: (self.out / "pids").exists() and self._text("pids")))

    def _text(self, name: str) -> str:
        path = self.out / name
        return path.read_text() if path.exists() else ""

    def codes(self, seconds: float = BOUNDED) -> list[int]:
        """Exit codes of the ranks, once all have ended."""
        wait_for((self.out / "codes").exists, seconds)
        return json.loads(self._text("codes"))

    def at_moment(self, seconds: float = BOUNDED) -> Started:
        wait_for((self.out / "moment").exists, seconds)
        return self

    @property
    def reported(self) -> str:
        return self._text("reported")

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "status.json").read_text())

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "weights.safetensors")

    def checkpoints(self) -> list[str]:
        """Whole ones; that there are no others is asserted."""
        found = run_folder.newest_first(self.folder)
        assert all(checkpoint.fault(path) is None for path in found)
        return [path.name for path in found]


Start = Callable[..., Started]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator[Start]:
    """`start(world, moment, fault, rank)` a run in which that happens; see watchdog_worker.py."""
    command = [sys.executable, "tests/support/watchdog_worker.py"]
    environment = clean_environment(PYTHONPATH=PATHS, OMP_NUM_THREADS="1")
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, text=True
    ) as worker:

        def call(world: int = 1, moment: str = "", fault: Any = "", rank: int = 0, **more: Any):
            out = tmp_path_factory.mktemp("guard")
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            folder = more.pop("folder", out / "run")
            request = {"times": 1, "limit": BOUNDED, "train": {}, "env": {}} | more
            request.setdefault("hosts", [])
            request |= {"out": str(out), "folder": str(folder), "port": port, "world": world}
            request |= {"moment": moment, "fault": fault, "rank": rank}
            assert worker.stdin
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            return Started(out, folder)

        yield call
        worker.kill()


@pytest.fixture(scope="module")
def whole(start) -> dict[int, Started]:
    """Uninterrupted runs, by number of processes."""
    return {world: start(world) for world in (1, 2)}


def resumed(start: Start, world: int, stopped: Started) -> Started:
    again = start(world, folder=stopped.folder, train={"resume_from_checkpoint": "auto"})
    assert again.codes() == [0] * world, again.reported
    return again


def assert_same_weights(run: Started, whole: Started) -> None:
    expected = whole.weights
    assert all(torch.equal(value, expected[name]) for name, value in run.weights.items())


# --- preemption ----------------------------------------------------------------------------------

MOMENTS = {  # name -> (how often it has come then, step that is saved)
    "start": (1, None),
    "first evaluation": (2, None),
    "first generation": (1, None),
    "data": (1, 1),
    "step": (2, 2),  # in the accumulation of the first step
    "middle evaluation": (2, 3),
    "save": (2, 3),  # the first is that of step 0
    "last evaluation": (1, 6),
    "last generation": (1, 6),
}


def test_an_uninterrupted_run_is_finished_with_0(whole):
    for world, run in whole.items():
        assert run.codes() == [0] * world, run.reported
        assert set(run.status) == KEYS
        assert run.status | {"step": 6} == {
            "version": sft.__version__,
            "state": "finished",
            "exit_code": 0,
            "reason": None,
            "rank": 0,
            "step": 6,
            "attempt": 1,
            "checkpoint": None,
        }
        assert not (run.folder / ".lock").exists()


ALONE = ("start", "step", "last evaluation")  # of one process; two take every path
FEW = [(1, "step"), (2, "start"), (2, "step"), (2, "save")]


@pytest.mark.parametrize(
    ("world", "moment"),
    representatives(
        [*((2, moment) for moment in MOMENTS), *((1, moment) for moment in ALONE)], FEW
    ),
)
def test_sigterm_to_one_rank_at_any_moment_saves_one_common_step_and_resumes_exactly(
    start, whole, world, moment
):
    times, step = MOMENTS[moment]
    settings = {"save_steps": 2, "eval_steps": 3}
    sent = "SIGHUP" if (world, moment) == (1, "step") else "SIGTERM"  # a terminal that is closed
    run = start(world, moment, sent, world - 1, times=times, train=settings)
    assert run.codes() == [75] * world, run.reported
    names = run.checkpoints()
    assert names[:1] == ([f"checkpoint_step_{step}"] if step else [])
    assert (run.status["state"], run.status["exit_code"]) == ("preempted", 75)
    assert run.status["checkpoint"] == (names[0] if names else None)
    assert run.reported.count("error: ") == 1
    assert "train.resume_from_checkpoint=auto" in run.reported
    assert step or "nothing to save" in run.reported
    assert "Traceback" not in run.reported
    again = resumed(start, world, run)
    assert_same_weights(again, whole[world])
    assert (again.status["state"], again.status["attempt"]) == ("finished", 2)


KILLS = {"middle evaluation": 2, "save": 3, "write": 3}  # how often it has come then


@pytest.mark.parametrize(
    ("world", "moment", "times"),
    representatives(
        [(1, "step", 11), (1, "write", 3), (2, "step", 6), *((2, *kill) for kill in KILLS.items())],
        [(1, "write", 3), (2, "step", 6), (2, "save", 3)],
    ),
)
def test_sigkill_at_any_moment_costs_what_came_after_the_last_save(
    start, whole, world, moment, times
):
    """In the accumulation of a step, in an evaluation, before and in a save. A rank that is left
    ends by itself, and the next run is the uninterrupted one."""
    settings = {"save_steps": 2, "eval_steps": 3}
    run = start(world, moment, "SIGKILL", world - 1, times=times, train=settings)
    assert run.codes()[-1] == -signal.SIGKILL, run.reported
    assert run.checkpoints()[0] == "checkpoint_step_2"
    assert_same_weights(resumed(start, world, run), whole[world])


def test_sigterm_to_all_ranks_and_again_from_their_launcher_is_one_request(start):
    """As schedulers send it under torchrun: to each process, and the launcher passes its own on."""
    run = start(2, "step", "pause", 1, times=2).at_moment()
    for _ in range(2):
        for pid in run.pids["ranks"]:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)  # else the kernel makes one of both
    assert run.codes() == [75, 75], run.reported
    assert (run.status["state"], run.status["exit_code"]) == ("preempted", 75)
    assert run.checkpoints() == ["checkpoint_step_2"]
    assert run.reported.count("SIGTERM: stopping after this step") == 1


@pytest.mark.parametrize("moment", representatives(["step", "write"]))
def test_a_second_signal_ends_at_once_without_half_a_checkpoint(start, whole, moment):
    """Also the rank that waits in a collective, where no handler runs."""
    run = start(2, moment, "loop", 1, times=1, train={"save_steps": 1}).at_moment()
    first, second = run.pids["ranks"]
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(first, number)
        os.kill(second, number)
        assert not (run.out / "codes").exists()
        time.sleep(watchdog.SAME_REQUEST + 1)
    assert run.codes() == [130, 130], run.reported
    assert (run.status["state"], run.status["exit_code"]) == ("interrupted", 130)
    assert run.checkpoints() == (["checkpoint_step_0"] if moment == "step" else [])
    assert_same_weights(resumed(start, 2, run), whole[2])


def test_sigusr1_saves_and_goes_on(start, whole):
    run = start(2, "step", "SIGUSR1", 1, times=2)
    assert run.codes() == [0, 0], run.reported
    assert run.checkpoints() == ["checkpoint_step_2"]
    assert_same_weights(run, whole[2])


# --- processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "rank", "codes", "named"),
    representatives(
        [
            ("SIGKILL", 1, [7, -9], "exited unexpectedly in section"),
            ("SIGSTOP", 0, [-9, 7], "stopped or dead, section "),
            ("loop", 1, [7, 7], ", section step, step 1, "),
            ("SIGKILL", 0, [-9, 7], "exited unexpectedly in section"),
            ("loop", 0, [7], ", section step, step 1, "),
        ],
        3,
    ),
)
def test_a_rank_that_is_killed_stopped_or_loops_in_data_ends_all_and_is_named(
    start, fault, rank, codes, named
):
    run = start(len(codes), "data", fault, rank, limit=6.0)
    culprit = run.pids["ranks"][rank]
    assert run.codes() == codes, run.reported
    assert (run.status["exit_code"], run.status["rank"], run.status["step"]) == (7, rank, 1)
    assert f"rank {rank} (process {culprit} on {socket.gethostname()})" in run.status["reason"]
    assert named in run.status["reason"]
    assert fault == "SIGKILL" or "for 6 s (train.stall_timeout)" in run.status["reason"]
    stacks = [path.read_text() for path in run.folder.glob(".ranks/*.stacks")]
    assert fault != "loop" or any("in happens" in text for text in stacks)
    first = next(line for line in run.reported.splitlines() if "rror" in line)
    assert first == f"error: {run.status['reason']}"
    assert "Traceback" not in run.reported


def test_a_rank_that_is_stopped_before_its_first_line_is_named_by_the_others(start):
    run = start(2, "launched", "SIGSTOP", 1, limit=4.0)
    stopped = run.pids["ranks"][1]
    try:
        wait_for(lambda: "error: " in run.reported)
        wait_for(lambda: run.status["state"] == "failed")
    finally:
        os.kill(stopped, signal.SIGKILL)
    assert run.codes() == [7, -9], run.reported
    assert (run.status["exit_code"], run.status["rank"]) == (7, 1)
    assert "no sign of rank 1, stopped or never started, for 4 s" in run.status["reason"]


@pytest.mark.parametrize(("world", "moment"), representatives([(1, "step"), (2, "save")]))
def test_a_run_folder_that_is_moved_while_it_is_used_ends_the_run(start, world, moment):
    run = start(world, moment, "pause", train={"save_steps": 1}, times=3).at_moment()
    moved = run.folder.rename(run.folder.with_name("moved"))
    own = Lock(run.folder)  # another run starts in the same place
    assert run.codes() == [4] * world, run.reported
    status = json.loads((moved / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert f"{run.folder} was moved to {moved}" in status["reason"]
    assert f"its last checkpoint is {moved / status['checkpoint']}" in status["reason"]
    assert {path.name for path in run.folder.iterdir()} == {".lock"}, "nothing is written there"
    own.release()


def test_a_run_folder_that_is_removed_while_it_is_used_ends_the_run(start):
    run = start(1, "step", "pause", train={"save_steps": 1}, times=3).at_moment()
    shutil.rmtree(run.folder)
    assert run.codes() == [4], run.reported
    assert f"error: {run.folder} was removed while the run used it" in run.reported
    assert not run.folder.exists()


def test_a_lock_that_is_removed_is_made_again_unless_another_run_has_it(tmp_path):
    lock, status = Lock(tmp_path), Status(tmp_path)
    status.begin()
    (tmp_path / ".lock").unlink()
    assert status.find_loss(lock) is None
    with pytest.raises(errors.LockedError):
        Lock(tmp_path)
    (tmp_path / ".lock").unlink()
    other = Lock(tmp_path)
    assert "is in use by the run of process" in str(status.find_loss(lock))
    lock.release()
    assert (tmp_path / ".lock").exists(), "it is that of the other run"
    other.release()
    assert not status.end("failed", 4, None, 0, 1)


def test_a_file_system_that_fails_to_answer_ends_no_run(tmp_path, monkeypatch):
    lock, status = Lock(tmp_path), Status(tmp_path)
    status.begin()
    for code in (5, 13, 116):  # EIO, EACCES, ESTALE

        def fail(*_: Any, code: int = code, **__: Any) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(Path, "stat", fail)
            assert status.find_loss(lock) is None
    (tmp_path / ".lock").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(attempt.plain, "open_file", fail)
        assert status.find_loss(lock) is None
    assert status.find_loss(lock) is None
    lock.release()


def test_a_link_to_a_run_folder_stays_when_the_folder_is_moved_aside(tmp_path):
    real, link = tmp_path / "scratch/real", tmp_path / "run"
    link.symlink_to(real)  # to nothing yet
    lock = Lock(link)
    (link / "training.log").touch()
    assert lock.move_folder() == tmp_path / "scratch/real.1"
    assert link.is_symlink()
    assert link.resolve() == real
    assert (tmp_path / "scratch/real.1/training.log").exists()
    lock.release()


def test_only_what_a_guard_wrote_is_removed(tmp_path):
    folder = tmp_path / "answers.jsonl.run"
    status = Status(folder)
    status.begin()
    mine = folder / ".ranks/mine.txt"
    mine.write_text("mine")
    status.begin()
    attempt.remove_record(folder)
    assert [path for path in folder.rglob("*") if path.is_file()] == [mine]
    mine.unlink()
    attempt.remove_record(folder)
    assert not folder.exists()


def test_a_rank_that_raises_ends_all_with_the_original_error(start):
    token = "hf_sEcReT123"
    run = start(2, "data", "raise", 1, env={"HF_TOKEN": token})
    assert run.codes() == [1, 1], run.reported
    first = next(line for line in run.reported.splitlines() if "rror" in line)
    assert first == "error: rank 1, step 1: KeyError: 'boom <HF_TOKEN>'"
    assert run.reported.count("Traceback") == 1  # printed once, and kept
    assert "boom <HF_TOKEN>" in (run.folder / "traceback.txt").read_text()
    assert run.status["reason"] == "KeyError: 'boom <HF_TOKEN>'"
    assert (run.status["state"], run.status["exit_code"]) == ("failed", 1)
    assert (run.status["rank"], run.status["step"]) == (1, 1)
    kept = [path.read_bytes() for path in run.folder.rglob("*") if path.is_file()]
    assert not any(token.encode() in content for content in [*kept, run.reported.encode()])


@pytest.mark.parametrize("code", [2, 7])
def test_an_error_of_the_user_ends_with_its_code_and_one_message(start, code):
    run = start(1, "start", code)
    assert run.codes() == [code]
    assert run.reported == "error: a mistake\n"
    assert run.status == {
        "version": sft.__version__,
        "state": "failed",
        "exit_code": code,
        "reason": "a mistake",
        "rank": 0,
        "step": 0,
        "attempt": 1,
        "checkpoint": None,
    }


@pytest.mark.parametrize("moment", ["launched", "data"])
def test_a_launcher_that_is_killed_takes_its_ranks_along(start, moment):
    """Also ranks that import torch yet, or wait for each other to join the group."""
    run = start(2, moment, "loop", 1).at_moment()
    os.kill(run.pids["launcher"], signal.SIGKILL)
    for pid in run.pids["ranks"]:
        wait_for(lambda pid=pid: children.is_dead(pid), 2.0)
    if moment == "data":
        assert run.status["state"] == "running"  # nobody was left to tell
        assert resumed(start, 2, run).status["attempt"] == 2


def test_a_rank_whose_launcher_is_gone_already_ends_before_it_does_anything(tmp_path):
    """The launcher is then not the parent, but who that is now cannot be reported from outside."""
    for launcher, code in ((os.getpid(), 0), (os.getppid(), 1)):
        rank = os.fork()
        if not rank:
            os.environ |= {"LOCAL_RANK": "0", children.LAUNCHER: str(launcher)}
            try:
                cli.run((tmp_path / str(launcher)).touch)
            except SystemExit as ended:
                os._exit(int(ended.code or 0))
        assert os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) == code
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_a_second_run_in_a_folder_is_refused_and_a_dead_owner_replaced(start):
    run = start(1, "data", "loop").at_moment()
    (owner,) = run.pids["ranks"]
    for resume in (None, "auto"):
        other = start(1, folder=run.folder, train={"resume_from_checkpoint": resume})
        assert other.codes() == [4]
        assert f"in use by the run of process {owner} on {socket.gethostname()}" in other.reported
        assert (run.status["state"], run.status["attempt"]) == ("running", 1)
        assert not run.folder.with_name("run.1").exists()
    os.kill(owner, signal.SIGKILL)
    assert run.codes() == [-9]
    again = resumed(start, 1, run)
    assert f"process {owner} on" in again.reported
    assert "removed the stale lock of process" in again.reported
    assert again.status["attempt"] == 2


def workers(run: Started) -> list[int]:
    """Of the preparation of data."""
    found = wait_for(lambda: len(files := list(run.out.glob("worker_*"))) == 2 and files)
    return [int(path.name.split("_")[1]) for path in found]


def test_a_worker_that_is_killed_is_an_error_with_the_rows(start):
    run = start(1, "prepare")
    os.kill(workers(run)[0], signal.SIGKILL)
    assert run.codes() == [3]
    assert run.reported.endswith(
        "error: a process that prepared data was killed, most likely because memory ran out, at "
        "the rows nano/train.jsonl:1 to nano/train.jsonl:512; free some memory, or look for "
        "very long rows there\n"
    )
    assert run.status["exit_code"] == 3


def test_workers_do_not_outlive_a_run_that_is_killed(start):
    run = start(1, "prepare")
    pids = workers(run)
    os.kill(run.pids["ranks"][0], signal.SIGKILL)
    for pid in pids:
        wait_for(lambda pid=pid: children.is_dead(pid), 2.0)


# --- files ---------------------------------------------------------------------------------------


def test_of_several_ranks_the_first_to_report_wins(tmp_path):
    first, second = Status(tmp_path), Status(tmp_path)
    first.begin()
    second.follow()
    assert second.end("failed", 3, "the cause", rank=1, step=4)
    assert not first.end("failed", 7, "the connection broke", rank=0, step=4)
    assert first.verdict() == second.read()
    assert first.read()["reason"] == "the cause"
    later = Status(tmp_path)
    later.begin()
    assert later.read()["attempt"] == 2
    assert not first.end("failed", 7, "left over", rank=0, step=4)
    assert later.read()["state"] == "running"


def test_a_status_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    status = Status(tmp_path)
    status.begin()
    before = (tmp_path / "status.json").read_text()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(attempt.os, "fsync", full)
    assert status.end("failed", 1, "x" * 10_000, rank=0, step=1)
    assert (tmp_path / "status.json").read_text() == before


def test_a_file_system_without_locks_is_judged_by_what_the_owner_wrote(tmp_path, monkeypatch):
    def unsupported(*_: Any) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(attempt.fcntl, "flock", unsupported)
    owner = Lock(tmp_path)
    with pytest.raises(errors.LockedError, match=f"process {os.getpid()} .*not supported"):
        Lock(tmp_path)
    monkeypatch.setattr(attempt, "is_dead", lambda _: True)
    Lock(tmp_path).release()
    assert not (tmp_path / ".lock").exists()
    owner.release()


def test_a_lock_goes_with_the_folder_that_is_moved_aside(tmp_path):
    folder = tmp_path / "run"
    lock = Lock(folder)
    (folder / "training.log").touch()
    assert lock.move_folder() == tmp_path / "run.1"
    assert [path.name for path in (tmp_path / "run.1").iterdir()] == ["training.log"]
    with pytest.raises(errors.LockedError):
        Lock(folder)
    lock.release()
    Lock(folder).release()


@pytest.mark.parametrize("trains", [True, False])
def test_only_a_training_that_is_stopped_speaks_of_steps_and_checkpoints(tmp_path, trains):
    guard = watchdog.Guard(tmp_path, trains=trains)
    guard.stopping = True
    with pytest.raises(errors.Preempted) as stopped:
        guard.stop_if_agreed()
    assert ("first step" in str(stopped.value)) == trains
    assert ("resume_from_checkpoint" in str(stopped.value)) == trains


# --- several machines ----------------------------------------------------------------------------
# Two hosts of two processes each, in networks of their own. The second one's clocks are ahead.


LONG = 300.0  # seconds; four processes, and this machine may be busy


def cut(name: str, state: str = "down") -> None:
    interface = "sft" + name[-1]
    subprocess.run(["ip", "-n", name, "link", "set", interface, state], check=True)


def test_a_link_that_is_cut_for_a_while_costs_nothing_but_time(start, namespaces):
    expected = start(4, hosts=namespaces)
    assert expected.codes(LONG) == [0] * 4, expected.reported
    run = start(4, "step", "wait", 2, hosts=namespaces).at_moment(LONG)
    cut(namespaces[1])
    (run.out / "go").touch()
    time.sleep(2)  # all wait for each other
    assert not (run.out / "codes").exists()
    cut(namespaces[1], "up")
    assert run.codes(LONG) == [0] * 4, run.reported
    assert_same_weights(run, expected)


@pytest.mark.thorough("ranks that stop or die on one machine, and a link that comes back")
def test_a_link_that_stays_cut_or_a_host_that_vanishes_ends_the_run(start, namespaces):
    """The folder that they share stays: its file server is in another network."""
    wait = {"world": 4, "moment": "step", "fault": "wait", "rank": 2, "hosts": namespaces}
    alive = start(**wait, times=4, limit=60)
    killed = start(**wait, times=4, limit=60, train={"save_steps": 1})
    for run in (alive, killed):
        run.at_moment(LONG)
    cut(namespaces[1])  # first, so that no connection is closed
    (alive.out / "go").touch()
    for pid in killed.pids["ranks"][2:]:
        os.kill(pid, signal.SIGKILL)
    assert alive.codes(LONG) == [7] * 4, alive.reported
    assert killed.codes(LONG) == [7, 7, -9, -9], killed.reported
    assert "Traceback" not in alive.reported + killed.reported
    assert killed.status["rank"] in (2, 3), killed.status
    resumed(start, 2, killed)
