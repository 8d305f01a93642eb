"""Launching for real: signals, exit codes and words of the ranks; machines."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, clean_environment

from sft.config.schema import Train
from sft.errors import ConfigError
from sft.runtime import launcher
from sft.runtime.attempt import Status
from sft.runtime.console import write_json
from sft.runtime.launcher import SignalRelay, has_handler, rank_pids
from sft.runtime.slurm import written_code
from sft.runtime.world import PLAIN, PORT, World, launch_file, read_launch_file, world_of

WORKER = ROOT / "tests/support/launch_worker.py"
DRIVER = """
import sys
from sft import cli
from sft.config.load import load_config
from sft.runtime import launcher

mode, folder = sys.argv[1:]
train = load_config("configs/nano.yaml", [f"train.output_dir={folder}"]).train
cli.run(lambda: launcher.launch(train, ["tests/support/launch_worker.py", mode, folder]))
"""


def start(mode: str, folder: Path, *before: str, **environment: str) -> subprocess.Popen[str]:
    """A launcher of two ranks of the worker, its output piped."""
    folder.mkdir(exist_ok=True)
    environment = {"NUM_PROCESSES": "2", "HF_HOME": "/nonexistent"} | environment
    return subprocess.Popen(
        [*before, sys.executable, "-c", DRIVER, mode, str(folder)],
        cwd=ROOT,
        env=clean_environment(TMPDIR=str(folder), **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], seconds: float = 180) -> tuple[int, str]:
    """(exit code, what it said on stderr)."""
    reported = process.communicate(timeout=seconds)[1]
    return process.returncode, reported


def wait_for(*paths: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} came"
        time.sleep(0.05)


# --- what is launched ----------------------------------------------------------------------------

NAMES = ("NUM_PROCESSES", "NUM_MACHINES", "MACHINE_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def given(monkeypatch, tmp_path):
    """Sets the variables of a launch to these, and no others."""
    monkeypatch.setattr(
        "accelerate.commands.config.config_args.default_yaml_config_file", str(tmp_path / "own")
    )

    def set_to(**values: str) -> None:
        for name in (*NAMES, "ACCELERATE_CONFIG"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_to()
    return set_to


def train(**values: object) -> Train:
    return Train.model_validate({"output_dir": "none", "num_processes": 4} | values)


def world() -> World:
    return world_of(train(), read_launch_file(PLAIN))


def test_the_processes_are_those_of_each_machine(given):
    assert world() == World(4)
    given(NUM_PROCESSES="3", MASTER_ADDR="left-over")
    assert world() == World(3)
    given(NUM_PROCESSES="3", NUM_MACHINES="2", MACHINE_RANK="1", MASTER_ADDR="a", MASTER_PORT="7")
    assert world() == World(3, 2, 1, "a", 7)
    assert world().num_processes == 6
    given(NUM_MACHINES="2", MACHINE_RANK="0", MASTER_ADDR="a")
    assert world() == World(2, 2, 0, "a", PORT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES: expected a whole number from 1 on, found 'two'"),
        ({"NUM_PROCESSES": "0"}, "found '0'"),
        ({"NUM_MACHINES": "2", "MASTER_ADDR": "a"}, "expected a MACHINE_RANK of 0 to 1"),
        ({"NUM_MACHINES": "2", "MASTER_ADDR": "a", "MACHINE_RANK": "2"}, "0 to 1.* found 2"),
        ({"NUM_MACHINES": "2", "MACHINE_RANK": "0"}, "expected MASTER_ADDR"),
        ({"NUM_MACHINES": "3", "MACHINE_RANK": "0", "MASTER_ADDR": "a"}, "4 cannot be shared"),
    ],
)
def test_a_launch_that_cannot_meet_is_refused(given, values, message):
    given(**values)
    with pytest.raises(ConfigError, match=message):
        world()


def test_one_launch_file_serves_every_engine_unless_another_is_named(given, tmp_path):
    def chosen(**values: object) -> Path:
        return launch_file(train(**values))

    for kind, used in (("NO", PLAIN), ("MULTI_GPU", tmp_path / "own")):
        (tmp_path / "own").write_text(
            yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "distributed_type": kind})
        )
        assert chosen() == used  # of `make setup-accelerate`
    assert chosen(engine="fsdp") == chosen(engine="deepspeed") == PLAIN
    given(ACCELERATE_CONFIG="named.yaml")
    assert chosen() == chosen(engine="fsdp") == Path("named.yaml")


def test_the_launch_file_is_that_of_the_folder_of_configurations():
    """So that what users start with `accelerate launch` is what the launcher starts."""
    shown = yaml.safe_load((ROOT / "configs/accelerate/ddp.yaml").read_text())
    assert yaml.safe_load(PLAIN.read_text()).items() <= shown.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distributed_type": "NO"}, "found NO, which starts one process"),
        ({"distributed_type": "MULTI_CPU"}, "found MULTI_CPU, which starts one process"),
        ({"debug": True}, "debug: true Accelerate hides failures"),
    ],
)
def test_a_launch_file_that_would_fail_silently_is_refused(given, tmp_path, change, message):
    values = yaml.safe_load(PLAIN.read_text())
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(values | change))
    given(ACCELERATE_CONFIG=str(tmp_path / "file.yaml"))
    with pytest.raises(ConfigError, match=message):
        launcher.launch(train(), [])


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_reaches_every_rank_once_and_the_code_is_that_of_the_run(tmp_path):
    """torchrun alone dies of SIGUSR1, and turns 75 into 1."""
    process = start("signals", tmp_path)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(signal.SIGUSR1)
    wait_for(tmp_path / "signals0", tmp_path / "signals1")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (75, "")
    for rank in (0, 1):
        assert (tmp_path / f"signals{rank}").read_text().split() == ["SIGUSR1", "SIGTERM"]


@pytest.fixture
def idle() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that note signals by their exit codes, and stand for ranks."""
    code = "import signal, sys, time; signal.signal(15, lambda *_: None)\nprint(flush=True)\n"
    command = [sys.executable, "-c", f"{code}time.sleep(600)"]
    made = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "LOCAL_RANK": "0"})
        for _ in range(2)
    ]
    for process in made:
        process.stdout.readline()
    yield made
    for process in made:
        process.kill()
        process.communicate()


def test_ranks_are_found_and_the_third_stop_kills_them(idle, tmp_path):
    assert set(rank_pids()) >= {process.pid for process in idle}
    (tmp_path / "attempt").mkdir()  # ranks were started
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    with SignalRelay(tmp_path) as signals:
        reported = (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM)  # a terminal was closed
        for count, number in enumerate(reported, 1):
            assert [process.poll() for process in idle] == [None, None]
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 30
            while len(signals.stops) < count and time.monotonic() < deadline:
                time.sleep(0.1)  # two that wait at once would be one
        assert [process.wait(30) for process in idle] == [-signal.SIGKILL] * 2
    signal.signal(signal.SIGHUP, before)
    assert signals.stops == [signal.SIGTERM] * 3
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_rank_that_does_not_expect_sigusr1_survives_it(idle, tmp_path, capfd):
    assert has_handler(idle[0].pid, signal.SIGTERM)
    assert not has_handler(idle[0].pid, signal.SIGUSR1)
    with SignalRelay(tmp_path):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
    assert "no rank is training" in capfd.readouterr().err
    assert [process.poll() for process in idle] == [None, None]


@pytest.mark.slow
def test_a_launcher_that_waits_for_other_machines_can_be_stopped(tmp_path):
    """There torch waits in C++ for 15 minutes, and Python runs no handlers."""
    port = free_port()
    process = start(
        *("world", tmp_path),
        **{"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MASTER_ADDR": "127.0.0.1"},
        MASTER_PORT=str(port),
    )
    with socket.create_server(("127.0.0.1", port)) as silent:
        silent.accept()  # it has come as far as to call the first machine
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143
    assert list(tmp_path.iterdir()) == []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# --- words and codes -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_word_is_the_cause_and_an_old_status_is_not_believed(tmp_path):
    (tmp_path / "status.json").write_text('{"exit_code": 75}')
    code, reported = ended(start("bug", tmp_path))
    assert code == 1
    assert reported.splitlines()[0] == "error: rank 1: ZeroDivisionError: the cause"
    assert "Traceback" in reported
    assert "Root Cause" not in reported  # torchrun's wall of text
    assert "closed by peer" not in reported
    (log,) = tmp_path.glob("sft_*_launcher.log")  # the run folder is another attempt's
    assert str(log) in reported
    assert "the cause" in log.read_text()


@pytest.mark.parametrize(
    ("written", "failures", "stops", "code"),
    [
        (None, {}, [], 0),
        (5, {1: 7, 0: 5}, [], 5),
        (75, {0: -15}, [15], 75),
        (0, {1: -6}, [], 0),  # gloo aborted when all was done and said
        (0, {0: 4, 1: 4}, [], 4),  # the folder was another run's, which has finished since
        (None, {1: 1, 0: 7}, [], 7),
        (None, {1: 1, 0: -15}, [], 1),
        (None, {1: -9, 0: -15}, [], 7),
        (None, {0: -2, 1: -2}, [2], 130),
        (None, {0: -15, 1: -15}, [15], 143),
    ],
)
def test_the_code_is_what_the_run_wrote_else_what_its_ranks_say(written, failures, stops, code):
    assert launcher._outcome(written, failures, stops) == code


def test_a_status_is_believed_only_if_this_attempt_of_the_job_wrote_it(tmp_path, monkeypatch):
    """Whatever the clocks say: a file that is newer by its time may be that of an old attempt."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert written_code(tmp_path) is None
    status = Status(tmp_path)
    status.begin()
    assert written_code(tmp_path) is None, "it runs"
    status.end("preempted", 75, "SIGTERM", 0, 3)
    for seconds in (1, 2**33):
        os.utime(tmp_path / "status.json", (seconds, seconds))
        assert written_code(tmp_path) == 75
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert written_code(tmp_path) is None, "an attempt that ended before it began"


def test_a_status_that_is_written_after_the_clock_has_jumped_back_is_new(tmp_path):
    path = tmp_path / "status.json"
    assert launcher._stamp(path) is None
    write_json(path, {})
    before = launcher._stamp(path)
    assert launcher._stamp(path) == before
    write_json(path, {})
    os.utime(path, (0, 0))  # the clock was three days ahead
    assert launcher._stamp(path) != before


@pytest.mark.slow
def test_ranks_that_are_not_one_run_end_with_7_and_say_what_differs(tmp_path):
    """Through run.train: another value, another data file and another library on rank 1."""
    code, reported = ended(start("run", tmp_path / "run"))
    assert code == 7, reported
    assert reported.count("the ranks are not one run") == 1
    assert "Traceback" not in reported
    digests = "[0-9a-f]{12} on rank 1, [0-9a-f]{12} on rank 0"
    for name in ("train.learning_rate", "data.train_path", "data.eval_path", "data"):
        assert re.search(rf"^  {name}: {digests}$", reported, re.M)
    assert "  version of peft: 0.0.1 on rank 1, " in reported
    assert reported.count("on rank 1, ") == 5
    assert "0.7" not in reported  # a value may be a secret
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.thorough("the launcher's code, without make")
@pytest.mark.slow
def test_make_ends_with_the_code_of_the_run(tmp_path):
    """`Error 75`, as a scheduler's script sees it."""
    rows = (ROOT / "nano/valid.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:20]))
    settings = [f"data.{part}_path={tmp_path}/rows.jsonl" for part in ("train", "eval")]
    settings += ["evaluation.num_examples=0", "train.log_steps=1", "train.max_steps=500"]
    settings += [f"train.output_dir={tmp_path}/run", "data.audit=warn"]
    with subprocess.Popen(
        ["make", "train-distributed", f"ARGS={' '.join(settings)}"],
        cwd=ROOT,
        env=clean_environment(HF_HOME="/nonexistent", NUM_PROCESSES="2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stdout or []:
            if line.startswith("step     1/"):
                (pid,) = launchers(process.pid)
                os.kill(pid, signal.SIGTERM)
                break
        reported = process.communicate(timeout=180)[1]
    assert "Error 75" in reported
    assert "Traceback" not in reported
    assert json.loads((tmp_path / "run/status.json").read_text())["exit_code"] == 75
    assert len(list((tmp_path / "run").glob("checkpoint_step_*"))) == 2  # that of step 0, and one


def launchers(pid: int) -> list[int]:
    """Returns the descendants that train on several processes and are no rank themselves."""
    found = psutil.Process(pid).children(recursive=True)
    training = [each for each in found if "train-distributed" in each.cmdline()]
    return [each.pid for each in training if "LOCAL_RANK" not in each.environ()]
