"""SLURM: joining the tasks of srun, and requeueing a preempted job."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from sft.config.schema import Train
from sft.errors import Preempted
from sft.runtime.status import written_exit_code
from sft.runtime.world import read_number

# --- SLURM ---------------------------------------------------------------------------------------


def join_slurm() -> None:
    """Gives a task that srun started the variables that torchrun would have set.

    Only where it is one of several tasks and no launcher has set them.
    """
    own = os.environ
    if "WORLD_SIZE" in own or "SLURM_PROCID" not in own or int(own.get("SLURM_NTASKS", "1")) < 2:
        return
    nodes = own.get("SLURM_STEP_NODELIST") or own.get("SLURM_JOB_NODELIST", "localhost")
    tasks = own.get("SLURM_STEP_TASKS_PER_NODE") or own.get("SLURM_TASKS_PER_NODE", "")
    here = tasks_per_node(tasks)[int(own.get("SLURM_NODEID", "0")) :] or [int(own["SLURM_NTASKS"])]
    own["RANK"], own["WORLD_SIZE"] = own["SLURM_PROCID"], own["SLURM_NTASKS"]
    own["LOCAL_RANK"], own["LOCAL_WORLD_SIZE"] = own.get("SLURM_LOCALID", "0"), str(here[0])
    own.setdefault("MASTER_ADDR", first_host(nodes))
    own.setdefault("MASTER_PORT", str(15000 + int(own.get("SLURM_JOB_ID", "0")) % 15000))


def first_host(nodes: str) -> str:
    """Of a list as SLURM writes it: 'gpu[07-09,12],login' -> 'gpu07'."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def tasks_per_node(text: str) -> list[int]:
    """'4(x2),3' -> [4, 4, 3]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


# --- SLURM ---------------------------------------------------------------------------------------


def requeue(train: Train, code: int, since: int) -> int:
    """After srun ended with `code`: requeues this job if the run was preempted and gets on.

    `since`: when srun was started, seconds; an older status.json is of an earlier attempt. Returns
    the exit code of the run.
    """
    folder = Path(train.output_dir)
    status = folder / "status.json"
    written = written_exit_code(status) if _modified(status) >= since else None
    if written is not None and not (written == 0 and code in range(1, 128)):
        code = written
    if code != Preempted.exit_code:
        return code
    job, times = os.environ["SLURM_JOB_ID"], read_number("SLURM_RESTART_COUNT", 0, least=0)
    step, most = newest_step(folder), read_number("MAX_REQUEUES", 50, least=0)
    record = folder / "requeue.json"
    if times >= most:
        return _stay(f"it was requeued {times} times, and MAX_REQUEUES is {most}")
    if step <= _step_at_requeue(record, job):
        return _stay(f"no progress, the newest checkpoint is of step {step} again")
    record.write_text(json.dumps({"job": job, "step": step}) + "\n", "utf-8")
    done = subprocess.run(["scontrol", "requeue", job], check=False)
    if done.returncode:
        return _stay(f"`scontrol requeue {job}` failed with exit code {done.returncode}")
    print(f"preempted after step {step}: requeued job {job} ({times + 1} of at most {most})")
    return code


def _stay(reason: str) -> int:
    print(f"preempted and saved, but not requeued: {reason}", file=sys.stderr)
    return Preempted.exit_code


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint; 0 without one. A folder of that name is whole: it was renamed."""
    names = (re.fullmatch(r"checkpoint_step_(\d+)", path.name) for path in folder.glob("*"))
    return max((int(name.group(1)) for name in names if name), default=0)


def _step_at_requeue(record: Path, job: str) -> int:
    try:
        last = json.loads(record.read_text("utf-8"))
    except (OSError, ValueError):
        return -1
    return last["step"] if last["job"] == job else -1


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -1.0
