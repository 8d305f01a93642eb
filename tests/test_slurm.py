"""train.sbatch in a real SLURM of two nodes on this machine, and what decides about a requeue."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import tiny
from conftest import PATHS, ROOT
from slurm_cluster import Cluster

from sft.config.schema import Train
from sft.runtime import slurm

# --- the decision ---------------------------------------------------------------------------------


@pytest.fixture
def requeue(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """Requeues a job whose run ended with `code` at `step`; scontrol notes its arguments."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    train = Train(output_dir=str(tmp_path / "run"))

    def call(
        step: int, code: int = 75, answer: str = "true", times: int = 0, **more: str
    ) -> list[str]:
        (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/calls\n{answer}')
        (tmp_path / "scontrol").chmod(0o755)
        for name, value in (more | {"SLURM_RESTART_COUNT": str(times)}).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "run" / f"checkpoint_step_{step}").mkdir(parents=True, exist_ok=True)
        calls = tmp_path / "calls"
        calls.write_text("")
        assert slurm.requeue(train, code) == code
        return calls.read_text().splitlines()

    return call


def test_a_preempted_job_is_requeued_as_long_as_it_gets_on(requeue, capfd):
    assert requeue(3) == ["requeue 4711"]
    assert "preempted after step 3: requeued job 4711 (1 of at most 50)" in capfd.readouterr().out
    assert requeue(5, times=1) == ["requeue 4711"]
    assert requeue(5, times=2) == []
    assert "no progress, the newest checkpoint is of step 5 again" in capfd.readouterr().err
    assert requeue(9, times=3, MAX_REQUEUES="3") == []
    assert "it was requeued 3 times, and MAX_REQUEUES is 3" in capfd.readouterr().err


def test_a_task_of_an_array_is_requeued_alone(requeue):
    assert requeue(3, SLURM_ARRAY_JOB_ID="4711", SLURM_ARRAY_TASK_ID="8") == ["requeue 4711_8"]


def test_a_job_that_slurm_itself_has_requeued_is_no_failure(requeue, capfd):
    requeue(3, answer="echo Job is pending execution for job 4711 >&2; exit 1")
    assert "requeued job 4711" in capfd.readouterr().out
    requeue(4, answer="echo Access denied >&2; exit 1")
    assert "not requeued: `scontrol requeue 4711` failed: Access denied" in capfd.readouterr().err


@pytest.mark.parametrize("code", [0, 5])
def test_a_job_that_was_not_preempted_is_not_requeued(requeue, code):
    assert requeue(3, code) == []


# --- a real SLURM ---------------------------------------------------------------------------------

PART = ["--oversubscribe", "--mem=10"]  # of a node


class Jobs:
    """Submits train.sbatch; every job has a folder of its own for its run and its output."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        python = folder / "python"
        task = shlex.quote(str(ROOT / "tests/support/slurm_task.py"))
        python.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} {task} "$@"\n')
        python.chmod(0o755)
        self.environment = {"PYTHON": str(python), "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1"}
        self.environment |= {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
        self.environment |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
        }  # as from a notebook; sbatch passes all
        self.numbers: dict[str, str] = {}

    def submit(self, name: str, *options: str, task: str = "ends", more: list[str]) -> None:
        """`more`: overrides; without an output_dir, it is a folder with the name of the job."""
        if not any("output_dir" in each for each in more):
            more = [*more, f"train.output_dir={self.folder / name}"]
        command = ["sbatch", "--parsable", f"--output={self.folder / name}_%a.log", *options]
        command += ["configs/slurm/train.sbatch", "--config", "configs/nano.yaml", *more]
        environment = self.environment | {"TASK": task}
        self.numbers[name] = self.cluster.call(*command, **environment).strip()

    def state(self, name: str) -> dict[str, str]:
        """Returns what SLURM says about a job."""
        line = self.cluster.call("scontrol", "show", "job", "-o", self.numbers[name])
        return dict(each.split("=", 1) for each in line.splitlines()[0].split() if "=" in each)

    def end(self, *names: str) -> None:
        """Waits for the end of jobs."""
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
        for name in names:
            self.cluster.wait(lambda name=name: self.state(name)["JobState"] in ended, 240)

    def wait_for_idle_nodes(self) -> None:
        """Waits until SLURM has cleaned up after all jobs; one ends before its nodes are free."""
        states = ["sinfo", "--noheader", "--Node", "--format=%T"]
        self.cluster.wait(lambda: set(self.cluster.call(*states).split()) == {"idle"}, 120)

    def tasks(self, folder: str) -> list[dict[str, Any]]:
        path = self.folder / folder / "tasks.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return sorted(map(json.loads, lines), key=lambda each: (each["attempt"], each["PROCID"]))

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}_*.log")))


def jobs_of(**shape: int) -> Iterator[Jobs]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    folder = tempfile.TemporaryDirectory()  # its path is short, as those of sockets must be
    with folder as name, Cluster(Path(name, "cluster"), **shape) as cluster:
        yield Jobs(cluster, Path(name))


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    yield from jobs_of(nodes=2, cpus=6, gpus=3)


@pytest.mark.slow
def test_one_command_takes_all_gpus_of_whole_nodes(jobs):
    jobs.submit("whole", "--nodes=2", more=[])
    jobs.end("whole")
    assert jobs.state("whole")["ExitCode"] == "0:0", jobs.log("whole")
    tasks = jobs.tasks("whole")
    assert [each["PROCID"] for each in tasks] == list("012345")
    assert [each["NODEID"] for each in tasks] == list("000111")
    for each in tasks:
        assert each["gpus"] == "0,1,2"
        assert each["CPUS_PER_TASK"] == "2"
        assert each["train.num_processes"] == each["NTASKS"] == "6"
        assert each["train.resume_from_checkpoint"] == "auto"


@pytest.mark.slow
def test_a_part_of_a_node_leaves_the_rest_to_others(jobs):
    part = [*PART, "--nodelist=gpu1", "--gpus-per-node=2"]
    jobs.submit("part", *part, "--cpus-per-gpu=1", more=[])
    jobs.submit("tasks", *part[:-1], "--ntasks-per-node=3", more=[])
    jobs.submit("few", *part, more=[])
    jobs.end("part", "tasks", "few")
    assert [each["gpus"] for each in jobs.tasks("part")] == ["0,1"] * 2
    assert [each["gpus"] for each in jobs.tasks("tasks")] == [None] * 3
    assert jobs.state("few")["ExitCode"] == "2:0"
    assert "2 tasks on 1 CPUs: expected a CPU for each" in jobs.log("few")


@pytest.mark.slow
def test_nodes_without_a_generic_resource_serve_as_well():
    """What `sbatch --gpus-per-node` is refused for there: Invalid generic resource."""
    for jobs in jobs_of(nodes=1, cpus=2):
        jobs.submit("none", more=[])
        jobs.end("none")
        assert [each["NTASKS"] for each in jobs.tasks("none")] == ["2", "2"], jobs.log("none")


@pytest.mark.slow
def test_an_array_needs_a_folder_for_each_task(jobs):
    jobs.submit("array", *PART, "--array=1-2", "--ntasks-per-node=1", more=[])
    jobs.end("array")
    assert jobs.state("array")["ExitCode"] == "2:0"
    assert "an array: expected a folder for each task" in jobs.log("array")


@pytest.fixture(scope="module")
def stopped(jobs) -> Jobs:
    """Jobs that reach their time limit or are preempted, at the same time, all requeued and ended.

    limit: an array; graced: preempted by signal; harsh: preempted without grace, when SLURM
    requeues the job itself; real: a training of two processes on two nodes.
    """
    one = [*PART, "--ntasks-per-node=1"]
    limit = ["--partition=high", "--time=1", "--signal=B:USR1@60", "--nodelist=gpu1"]
    folder = f"train.output_dir={jobs.folder}/limit%a"
    jobs.submit("real", *one, "--nodes=2", task="trains", more=training(jobs.folder))
    jobs.cluster.wait(lambda: "\nstep     1/" in jobs.log("real"), 240)
    jobs.submit("limit", *one, *limit, "--array=1-2", task="waits", more=[folder])
    jobs.submit("graced", *one, "--nodelist=gpu1", task="waits", more=[])
    jobs.submit("harsh", *one, "--partition=harsh", "--nodes=2", task="waits", more=[])
    noted = [jobs.folder / name / "tasks.jsonl" for name in ("limit1", "limit2", "graced", "harsh")]
    jobs.cluster.wait(lambda: all(path.exists() for path in noted))
    preempting = ["--partition=high", "--nodes=2", "--ntasks-per-node=4", "--output=/dev/null"]
    jobs.cluster.call("sbatch", *PART, *preempting, "--wrap=true")
    jobs.end("limit", "graced", "harsh", "real")
    return jobs


def training(folder: Path) -> list[str]:
    rows = (ROOT / "nano/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(rows[:24]))
    overrides = [f"model.name={tiny.shallow_nano(folder)}", "tuning.mode=lora", "data.audit=warn"]
    overrides += [f"data.train_path={folder}/rows.jsonl", "data.eval_path=null"]
    overrides += ["data.eval_fraction=0.2", "evaluation.num_examples=0", "train.global_batch=4"]
    return [*overrides, "train.max_steps=30", "train.log_steps=1", "train.precision=fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["graced", "harsh", "limit1", "limit2"])
def test_a_job_that_is_stopped_saves_and_is_requeued_once(stopped, name):
    """A task of an array is requeued alone: its number may be that of the whole array."""
    tasks, job, is_array = stopped.tasks(name), name.rstrip("12"), name.startswith("limit")
    ranks = 2 if name == "harsh" else 1
    assert [each["attempt"] for each in tasks] == [0] * 2 * ranks + [1] * ranks
    waits = [each["between signals"] for each in tasks if "between signals" in each]
    assert len(waits) == ranks
    assert max(waits) < 2, "the ranks of a run take a signal that comes later for a second one"
    number = stopped.numbers[job] + (f"_{name[-1]}" if is_array else "")
    message = f"preempted after step 1: requeued job {number} (1 of at most 50)"
    assert stopped.log(job).count(message) == 1, stopped.log(job)
    assert "not requeued" not in stopped.log(job)


@pytest.mark.slow
def test_a_training_that_is_preempted_goes_on_where_it_was(stopped):
    log, folder = stopped.log("real"), stopped.folder / "real"
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["attempt"], status["step"]) == ("finished", 2, 30), log
    assert "2 (ddp) on 2 machines, 1 on each, gloo" in log
    saved = json.loads((folder / "requeue.json").read_text())["step"]
    assert 0 < saved < 30
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [each["step"] for each in lines if "train/loss" in each]
    assert steps == list(range(1, 31))


@pytest.mark.slow
def test_a_job_whose_node_dies_goes_on_with_the_nodes_that_are_left(jobs):
    jobs.wait_for_idle_nodes()  # else the job starts on one node
    jobs.submit("node", "--nodes=1-2", task="waits", more=[])
    jobs.cluster.wait(lambda: len(jobs.tasks("node")) == 6)
    down = ["scontrol", "update", "nodename=gpu2", "state=down", "reason=test"]
    try:
        jobs.cluster.call(*down)
        jobs.end("node")
    finally:
        jobs.cluster.call("scontrol", "update", "nodename=gpu2", "state=resume")
    assert [each["NTASKS"] for each in jobs.tasks("node") if each["attempt"] == 1] == ["3"] * 3
