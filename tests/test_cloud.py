"""The recipes for clouds have only fields that SkyPilot and Kubeflow know, and start what they say.

The models below have the fields that these recipes use, as SkyPilot's schemas and the custom
resource kubeflow.org_pytorchjobs define them; any other field is refused. Nothing is rented here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from typing import Any, Literal

import pytest
import torch.distributed.run
import yaml
from conftest import ROOT
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sft.tasks.registry import load_run

CLOUD = ROOT / "configs/cloud"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# --- SkyPilot ------------------------------------------------------------------------------------


class JobRecovery(Strict):
    strategy: str | None = None
    max_restarts_on_errors: int = Field(ge=0)
    recover_on_exit_codes: list[int]


class Resources(Strict):
    accelerators: str = Field(pattern=r"^[\w-]+:\d+$")
    use_spot: bool
    disk_size: int
    job_recovery: JobRecovery


class Storage(Strict):
    name: str
    mode: Literal["MOUNT", "COPY", "MOUNT_CACHED"]


class SkyPilot(Strict):
    name: str = Field(pattern=r"^[a-zA-Z][\w.-]*$")
    workdir: str
    num_nodes: int = Field(ge=1)
    resources: Resources
    envs: dict[str, str | None]
    file_mounts: dict[str, Storage]
    setup: str
    run: str


def test_skypilot_starts_the_run_on_every_machine(tmp_path):
    task = SkyPilot.model_validate(yaml.safe_load((CLOUD / "skypilot.yaml").read_text()))
    assert task.resources.job_recovery.recover_on_exit_codes == [7, 75]
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\necho "$NUM_MACHINES $MACHINE_RANK $MASTER_ADDR"; printf "%s\\n" "$@"\n'
    )
    python.chmod(0o755)
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    given |= {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5"}
    environment = os.environ | given | {k: v or "" for k, v in task.envs.items()}
    run = ["bash", "-euc", task.run]
    said = subprocess.check_output(run, cwd=tmp_path, env=environment, text=True)
    first, script, option, config, *overrides = said.splitlines()
    assert first == "2 1 10.0.0.4"
    assert (script, option) == ("scripts/train_distributed.py", "--config")
    train = load_run(ROOT / config, overrides).train
    assert train.output_dir == "/outputs/run"
    assert train.resume_from_checkpoint == "auto"


# --- Kubernetes ----------------------------------------------------------------------------------


class ElasticPolicy(Strict):
    rdzvBackend: Literal["c10d"]
    minReplicas: int
    maxReplicas: int
    maxRestarts: int


class RunPolicy(Strict):
    cleanPodPolicy: Literal["None", "Running", "All"]
    backoffLimit: int


class Variable(Strict):
    name: str
    value: str  # a number would be refused


class Limits(Strict):
    limits: dict[Literal["nvidia.com/gpu"], int]


class Mount(Strict):
    name: str
    mountPath: str


class Container(Strict):
    name: Literal["pytorch"]
    image: str
    command: list[str]
    args: list[str]
    env: list[Variable]
    resources: Limits
    volumeMounts: list[Mount]


class Volume(Strict):
    name: str
    persistentVolumeClaim: dict[Literal["claimName"], str] | None = None
    emptyDir: dict[Literal["medium"], Literal["Memory"]] | None = None


class Pod(Strict):
    terminationGracePeriodSeconds: int
    containers: list[Container]
    volumes: list[Volume]


class Template(Strict):
    spec: Pod


class Replicas(Strict):
    replicas: int
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: Template


class JobSpec(Strict):
    nprocPerNode: str
    elasticPolicy: ElasticPolicy
    runPolicy: RunPolicy
    pytorchReplicaSpecs: dict[Literal["Master", "Worker"], Replicas]


class PyTorchJob(Strict):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: dict[Literal["name"], str]
    spec: JobSpec


def test_the_pytorchjob_is_one_and_starts_the_run(monkeypatch):
    job = PyTorchJob.model_validate(yaml.safe_load((CLOUD / "pytorchjob.yaml").read_text()))
    elastic, workers = job.spec.elasticPolicy, job.spec.pytorchReplicaSpecs["Worker"]
    assert elastic.minReplicas <= workers.replicas <= elastic.maxReplicas
    pod = workers.template.spec
    (container,) = pod.containers
    assert {each.name for each in container.volumeMounts} == {each.name for each in pod.volumes}
    assert {each.name: each.value for each in container.env} == {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(pod.terminationGracePeriodSeconds),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    # What the operator sets, and torchrun reads in place of its options.
    nodes = f"{elastic.minReplicas}:{elastic.maxReplicas}"
    for name, value in {"NNODES": nodes, "RDZV_BACKEND": "c10d", "MAX_RESTARTS": "10"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    program, *words = [*container.command, *container.args]
    assert program == "torchrun"
    parsed = torch.distributed.run.parse_args(words)
    assert (parsed.nnodes, parsed.rdzv_backend, parsed.max_restarts) == ("1:4", "c10d", 10)
    assert parsed.training_script == "scripts/train_distributed.py"
    option, config, *overrides = parsed.training_script_args
    assert option == "--config"
    assert load_run(ROOT / config, overrides).train.output_dir == "/outputs/run"


@pytest.mark.parametrize("name", ["skypilot", "pytorchjob"])
def test_a_field_that_does_not_exist_is_noticed(name):
    model = {"skypilot": SkyPilot, "pytorchjob": PyTorchJob}[name]
    values: dict[str, Any] = yaml.safe_load((CLOUD / f"{name}.yaml").read_text())
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        model.model_validate(values | {"max_restarts": 3})


# --- the image -----------------------------------------------------------------------------------

INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}  # that the Dockerfile uses


def instructions() -> list[tuple[str, str]]:
    """Returns the instructions of the Dockerfile with their arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_dockerfile_is_well_formed_and_finds_what_it_copies():
    found = instructions()
    assert found[0][0] == "FROM"
    assert {name for name, _ in found} <= INSTRUCTIONS
    for name, text in found:
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", text], check=True)
        if name == "COPY":
            *sources, _ = shlex.split(text)
            assert all((ROOT / each).exists() for each in sources)
    assert json.loads(dict(found)["CMD"]) == ["make", "help"]
    version = re.search(r"^python:(\d+)\.(\d+)-slim$", dict(found)["FROM"])
    assert tuple(map(int, version.groups())) >= (3, 11)


def test_what_the_image_leaves_out_is_what_git_leaves_out():
    """Else a .venv or the runs of this machine would be copied over those of the image."""
    left_out = (ROOT / ".dockerignore").read_text().split()
    for line in ("/.venv", "/outputs/", "__pycache__/"):
        assert line.strip("/") in [each.removeprefix("**/") for each in left_out]
