"""A real SLURM on this machine: munged, slurmctld and a slurmd per node, all in one folder.

The daemons have process ids and mounts of their own: so one kill ends them with every job, and the
names of the nodes can be resolved.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from conftest import clean_environment

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "squeue",
    "scontrol",
    "sinfo",
    "unshare",
    "setpriv",
)

CONF = """
ClusterName=sft
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{gres}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=harsh Nodes=ALL PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=9
"""

ALONE = "setpriv --pdeathsig=KILL unshare --mount --pid --fork --kill-child --mount-proc bash -c"
DAEMONS = """
set -e
mount --bind {folder}/hosts /etc/hosts
munged --force --key-file={folder}/munge.key --socket={folder}/munge.socket \
    --pid-file={folder}/munge.pid --log-file={folder}/munge.log --seed-file={folder}/munge.seed
slurmctld -i
for node in {names}; do slurmd -N $node; done
exec sleep infinity
"""


def missing() -> str | None:
    """Returns why no SLURM can be started here, or None."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"needs the programs {', '.join(absent)} (Debian: slurmctld slurmd munge)"
    if os.geteuid() != 0:
        return "needs root, for names of nodes and daemons of its own"
    return None


class Cluster:
    """A context in which SLURM runs, with `cpus` and `gpus` on each node. No GPUs: no `gres`."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 2, gpus: int = 0):
        self.folder = folder
        self.names = [f"gpu{i}" for i in range(1, nodes + 1)]
        self.cpus, self.gpus = cpus, gpus
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        self.folder.mkdir(mode=0o755, exist_ok=True)
        for name in ("state", *self.names):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        hosts = "".join(f"127.0.0.1 {name}\n" for name in self.names)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        with ExitStack() as free:
            servers = [socket.create_server(("127.0.0.1", 0)) for _ in (0, *self.names)]
            controller, *ports = [free.enter_context(each).getsockname()[1] for each in servers]
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={self.cpus} RealMemory=4000{gres}"
            for name, port in zip(self.names, ports, strict=True)
        ]
        if self.gpus:  # device files that are certainly there and are no GPUs
            (self.folder / "gres.conf").write_text(f"Name=gpu File=/dev/tty[1-{self.gpus}]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        values = {"folder": self.folder, "controller": controller, "nodes": "\n".join(nodes)}
        values["gres"] = "GresTypes=gpu" if self.gpus else ""
        (self.folder / "slurm.conf").write_text(CONF.format_map(values))
        script = DAEMONS.format(folder=self.folder, names=" ".join(self.names))
        with (self.folder / "daemons.log").open("w") as log:
            self.daemons = subprocess.Popen(
                [*ALONE.split(), script],
                env=clean_environment(**self.environment),
                stdout=log,
                stderr=log,
            )
        ready = f"{len(self.names)} idle\n"
        self.wait(lambda: self.call("sinfo", "-hplow", "-o%D %t", check=False) == ready)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.daemons.kill()
        self.daemons.wait()

    def call(self, *command: str, check: bool = True, **environment: str) -> str:
        """Returns what a program of SLURM prints."""
        done = subprocess.run(
            command,
            env=clean_environment(**self.environment, **environment),
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout if check or done.returncode == 0 else done.stderr

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Waits until `condition` holds; shows what daemons and jobs say if it never does."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [*self.folder.glob("*.log"), *self.folder.parent.glob("*.log")]
                texts = [f"{path}:\n{path.read_text()}" for path in logs]
                raise AssertionError("\n".join([self.call("squeue"), *texts]))
            time.sleep(0.2)
