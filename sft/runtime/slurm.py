"""Joins the tasks of srun, and requeues a preempted job: all that the package knows of SLURM."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from sft.config.schema import Train
from sft.errors import Preempted
from sft.runtime.console import write_json
from sft.runtime.output import show
from sft.runtime.plain import read_json
from sft.runtime.world import read_number

ANNOUNCED = Path(".ranks", "attempt.json")  # in a run folder: the attempt that began, and its job
ATTEMPT = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")  # they differ between attempts of a job


def join_slurm() -> None:
    """Gives a task that srun started the variables that torchrun would have set.

    Does nothing if it is the only task, or if a launcher has set them.
    """
    own = os.environ
    if "WORLD_SIZE" in own or "SLURM_PROCID" not in own or not _has_several_tasks():
        return
    nodes = own.get("SLURM_STEP_NODELIST") or own.get("SLURM_JOB_NODELIST", "localhost")
    tasks = own.get("SLURM_STEP_TASKS_PER_NODE") or own.get("SLURM_TASKS_PER_NODE", "")
    here = tasks_per_node(tasks)[int(own.get("SLURM_NODEID", "0")) :] or [int(own["SLURM_NTASKS"])]
    own["RANK"], own["WORLD_SIZE"] = own["SLURM_PROCID"], own["SLURM_NTASKS"]
    own["LOCAL_RANK"], own["LOCAL_WORLD_SIZE"] = own.get("SLURM_LOCALID", "0"), str(here[0])
    own.setdefault("MASTER_ADDR", first_host(nodes))
    own.setdefault("MASTER_PORT", str(15000 + int(own.get("SLURM_JOB_ID", "0")) % 15000))


def _has_several_tasks() -> bool:
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1


def step_id() -> str | None:
    """Returns a name that the tasks of one srun share, or None if there are not several tasks."""
    if not _has_several_tasks() or "SLURM_STEP_ID" not in os.environ:
        return None
    return "_".join(os.environ.get(name, "0") for name in (*ATTEMPT, "SLURM_STEP_ID"))


def first_host(nodes: str) -> str:
    """Returns the first host of a list as SLURM writes it: 'gpu[07-09,12],login' -> 'gpu07'."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def tasks_per_node(text: str) -> list[int]:
    """Returns the number of tasks on each node: '4(x2),3' -> [4, 4, 3]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


def requeue(train: Train, code: int) -> int:
    """Requeues this job if its run was preempted and progresses; returns the run's exit code.

    `code` is srun's exit code.
    """
    folder = Path(train.output_dir)
    written = written_code(folder)
    if written is not None and not (written == 0 and code in range(1, 128)):
        code = written
    if code != Preempted.exit_code:
        return code
    job, times = os.environ["SLURM_JOB_ID"], read_number("SLURM_RESTART_COUNT", 0, least=0)
    step, most = newest_step(folder), read_number("MAX_REQUEUES", 50, least=0)
    last = read_json(folder / "requeue.json")
    if times >= most:
        return _refuse(f"it was requeued {times} times, and MAX_REQUEUES is {most}")
    if last.get("job") == job and step <= last["step"]:
        return _refuse(f"no progress, the newest checkpoint is of step {step} again")
    write_json(folder / "requeue.json", {"job": job, "step": step})
    name = _job_name()
    command = ["scontrol", "requeue", name]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode and "pending" not in done.stderr:  # else SLURM has requeued it itself
        return _refuse(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    show(f"preempted after step {step}: requeued job {name} ({times + 1} of at most {most})")
    return code


def _job_name() -> str:
    """Returns the name of this job; the number of one task of an array may be that of all tasks."""
    own = os.environ
    task = f"{own.get('SLURM_ARRAY_JOB_ID')}_{own.get('SLURM_ARRAY_TASK_ID')}"
    return task if "SLURM_ARRAY_TASK_ID" in own else own["SLURM_JOB_ID"]


def _refuse(reason: str) -> int:
    show(f"preempted and saved, but not requeued: {reason}", error=True)
    return Preempted.exit_code


def newest_step(folder: Path) -> int:
    """Returns the step of the newest checkpoint, or 0. A folder with its name is always whole."""
    names = (re.fullmatch(r"checkpoint_step_(\d+)", path.name) for path in folder.glob("*"))
    return max((int(name.group(1)) for name in names if name), default=0)


def attempt_of_job() -> str:
    """Returns a text that differs between attempts of a job; '- -' outside of SLURM."""
    return " ".join(os.environ.get(name, "-") for name in ATTEMPT)


def written_code(folder: Path) -> int | None:
    """Returns the exit code in status.json if this attempt of the job wrote it, else None.

    No clock decides that: those of a node and of a file server differ, and may jump. While a run
    goes on, its file has no exit code.
    """
    begun, status = read_json(folder / ANNOUNCED), read_json(folder / "status.json")
    is_own = begun.get("job") == attempt_of_job() and begun.get("attempt") == status.get("attempt")
    return status.get("exit_code") if is_own else None
