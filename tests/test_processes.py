"""The third trap: launches that look distributed and are one process, or independent copies."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import forked
import pytest
import tiny
import torch
from conftest import ROOT, run

from sft.data import batches
from sft.errors import ConfigError, PeerError
from sft.runtime import processes, slurm
from sft.runtime.hardware import resolve_precision

TRAIN = ["scripts/train.py", "--config", "configs/nano.yaml"]


def accelerate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "accelerate.commands.launch", *arguments, **environment)


@pytest.mark.slow
def test_a_launch_that_is_silently_one_process_is_refused(tmp_path):
    """`--cpu --num_processes 2` starts one process and says nothing."""
    done = accelerate(
        *["--cpu", "--num_processes", "2", "--num_machines", "1"],
        *TRAIN,
        "train.num_processes=2",
        f"train.output_dir={tmp_path}/run",
    )
    assert done.returncode != 0
    assert "expected 2 process(es), found 1" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_launch_of_another_size_is_refused_once(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = ["train.num_processes=3", f"train.output_dir={tmp_path}/run"]
    done = run(sys.executable, *torchrun, *TRAIN, *given)
    reported = done.stdout + done.stderr
    assert reported.count("expected 3 process(es), found 2") == 1
    assert "Traceback" not in reported.split("expected 3")[0]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for deepspeed, train.engine says ddp"),
        ("ACCELERATE_USE_FSDP", "true", "asks for fsdp, train.engine says ddp"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "asks for mixed_precision fp16"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "asks for mixed_precision bf16"),
    ],
)
def test_a_launch_file_that_contradicts_the_configuration_is_refused(
    tmp_path, monkeypatch, variable, value, message
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        processes.start_processes(tiny.config(tmp_path, precision="fp32").train)


def test_an_fsdp2_launch_file_is_agreed_with_and_not_acted_on(tmp_path, monkeypatch):
    """Accelerate's plugin would do nothing on the CPU, and shard a second time on GPUs."""
    settings = tiny.config(tmp_path, engine="fsdp", precision="fp32").train
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version in ("1", None):
        monkeypatch.setenv("FSDP_VERSION", version or "")
        with pytest.raises(ConfigError, match="only 2 is supported"):
            processes.start_processes(settings)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    processes._refuse_conflicting_launch_file(settings, "fp32")
    processes._forget_launch_file()
    assert not [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE"))]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ZERO_STAGE": "2"}, None),
        ({"ZERO_STAGE": "3"}, r"zero_stage 3 \(expected 2\).*deepspeed_z2.yaml"),
        ({"CONFIG_FILE": "configs/deepspeed_z2.json"}, None),
        ({"CONFIG_FILE": "other.json"}, "deepspeed_config_file other.json"),
        ({"FIELDS": "zero_stage,deepspeed_multinode_launcher,mixed_precision"}, None),
        (
            {"FIELDS": "gradient_clipping,zero3_init_flag"},
            "sets gradient_clipping, zero3_init_flag",
        ),
    ],
)
def test_a_deepspeed_launch_file_names_no_settings_of_its_own(
    tmp_path, monkeypatch, variables, message
):
    path = "configs/deepspeed_z2.json"
    settings = tiny.config(tmp_path, engine="deepspeed", deepspeed_config=path).train
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    names = {"FIELDS": "ACCELERATE_CONFIG_DS_FIELDS"}
    for name, value in variables.items():
        monkeypatch.setenv(names.get(name, f"ACCELERATE_DEEPSPEED_{name}"), value)
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        processes._refuse_conflicting_launch_file(settings, "fp32")
    processes._forget_launch_file()
    assert not [name for name in os.environ if name.startswith("ACCELERATE_DEEPSPEED")]


# --- under srun ----------------------------------------------------------------------------------

TASK = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[07-09,12]",
    "SLURM_TASKS_PER_NODE": "4(x2),3",
}
JOINED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def joined(monkeypatch, **changes: str | None) -> list[str | None]:
    """What becomes of these variables in that task of srun."""
    for name in [*JOINED, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in (TASK | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    slurm.join_slurm()
    return [os.environ.get(name) for name in JOINED]


def test_a_task_of_srun_is_a_rank(monkeypatch):
    assert joined(monkeypatch) == ["9", "11", "1", "3", "gpu07", "19711"]
    assert joined(monkeypatch, MASTER_ADDR="a", MASTER_PORT="7")[4:] == ["a", "7"]


@pytest.mark.parametrize("change", [{"SLURM_PROCID": None}, {"SLURM_NTASKS": "1"}])
def test_what_srun_did_not_start_as_one_of_several_is_left_alone(monkeypatch, change):
    assert joined(monkeypatch, **change) == [None] * 6


def test_a_launcher_inside_of_a_task_comes_first(monkeypatch):
    assert joined(monkeypatch, RANK="0", WORLD_SIZE="2")[:3] == ["0", "2", None]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu07", "gpu07"), ("a,b[1-2]", "a"), ("n[001,003-4]-ib,x", "n001-ib"), ("r1[2-3]", "r12")],
)
def test_the_first_host_of_a_list(nodes, first):
    assert slurm.first_host(nodes) == first


# --- one run -------------------------------------------------------------------------------------


def test_the_ranks_that_differ_from_most_are_named(monkeypatch):
    reported = [{"data": "a" * 64, "version of torch": "2"} for _ in range(4)]
    monkeypatch.setattr(processes, "gather_object", lambda _: reported)
    processes.refuse_differences(reported[0])
    reported[0]["version of torch"] = "1"
    reported[2] |= {"data": "b" * 64}
    reported[3] |= {"data": "b" * 64}
    with pytest.raises(PeerError) as caught:
        processes.refuse_differences(reported[0])
    assert caught.value.exit_code == 7
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == [
        "  data: bbbbbbbbbbbb on rank 2, 3, aaaaaaaaaaaa on rank 0",
        "  version of torch: 1 on rank 0, 2 on rank 1",
    ]


def test_facts_name_every_key_and_no_value(tmp_path):
    settings = tiny.config(tmp_path, learning_rate=0.7)
    found = processes.collect_facts(settings, {"data": "-"})
    assert len(found["train.learning_rate"]) == 64
    assert str(tmp_path) not in str(found)
    other = processes.collect_facts(tiny.config(tmp_path, learning_rate=0.8), {"data": "-"})
    assert {name for name in found if found[name] != other[name]} == {"train.learning_rate"}
    assert {"data", "version of deepspeed", "code of sft"} < set(found)


def test_several_processes_with_an_unwrapped_model_are_refused(tmp_path, monkeypatch):
    rows = tiny.examples(0, 4)
    settings = tiny.config(tmp_path)
    started = processes.start_processes(settings.train)

    class Pretender:
        """An accelerator of a world of two that wraps nothing, as in independent copies."""

        num_processes = 2
        process_index = 0
        device = started.device
        distributed_type = started.distributed_type

        def prepare(self, *things):
            return things

    monkeypatch.setattr(processes, "start_processes", lambda _: Pretender())
    with pytest.raises(ConfigError, match="not wrapped"):
        tiny.make_engine(tiny.llama(), rows, rows, settings, batches.Budget(50, "padded"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "cannot read"),
        ('{"zero_optimization": {"stage": 0}}', "expected 1, 2 or 3, found 0"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}',
            "offload_param: only offload_optimizer to the device cpu is supported",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}',
            "only offload_optimizer to the device cpu is supported",
        ),
        ('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}', "use train.precision"),
        ('{"gradient_clipping": 1, "zero_optimization": {"stage": 2}}', "use train.max_grad_norm"),
    ],
)
def test_a_deepspeed_file_that_cannot_work_is_refused(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(content)
    settings = tiny.config(tmp_path, engine="deepspeed", deepspeed_config=str(path))
    with pytest.raises(ConfigError, match=message):
        processes.start_processes(settings.train)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_files_of_the_repository_are_what_they_say(tmp_path, stage):
    file = str(ROOT / f"configs/deepspeed_z{stage}.json")
    settings = tiny.config(tmp_path, engine="deepspeed", deepspeed_config=file).train
    assert processes.deepspeed_settings(settings)["zero_optimization"]["stage"] == stage


@pytest.mark.slow
def test_deepspeed_needs_no_launcher_for_one_process(tmp_path):
    settings = tiny.config(
        tmp_path, engine="deepspeed", deepspeed_config="configs/deepspeed_z2.json"
    )
    program = (
        "import sys\nfrom sft.config.schema import Config\nfrom sft.runtime import processes\n"
        "settings = Config.model_validate_json(sys.argv[1])\n"
        "print('world of', processes.start_processes(settings.train).num_processes)\n"
    )
    (tmp_path / "program.py").write_text(program)
    reported = forked.run(str(tmp_path / "program.py"), settings.model_dump_json())
    assert "world of 1" in reported.stdout, reported.stderr


def test_deterministic_algorithms_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    processes.start_processes(tiny.config(tmp_path).train)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        processes.start_processes(tiny.config(tmp_path, deterministic=True).train)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_precision_has_a_reason(tmp_path):
    for wanted in ("auto", "fp32", "bf16"):
        precision, reason = resolve_precision(tiny.config(tmp_path, precision=wanted).train)
        assert precision in ("fp32", "bf16")
        assert reason


PLAN = """
import sys
from dataclasses import replace
from pathlib import Path
from sft.config.load import load_config, with_values
from sft.plan import calibration
from sft.runtime import hardware
from sft.runtime.processes import end_processes, start_processes
from sft.tasks.sft.task import FineTune

config = with_values(load_config("configs/nano.yaml"), {"data.max_rows": 100})
workload = FineTune.workload(config)
accelerator = start_processes(config.train)
rank = accelerator.process_index
machine = replace(hardware.detect(), ram_available_bytes=(200 - 80 * rank) << 20)
made = calibration.make_common_plan(config, workload, machine, accelerator)
Path(sys.argv[1], f"rank{rank}").write_text(f"{made.available_bytes >> 20} {made.budget}")
end_processes(accelerator)
"""


@pytest.mark.thorough("the budget of ranks that share a machine, in test_plan.py")
@pytest.mark.slow
def test_ranks_with_unlike_memory_make_one_plan(tmp_path):
    script = tmp_path / "plan.py"
    script.write_text(PLAN)
    forked.launch(2, [str(script), str(tmp_path)])
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("60 ")  # half of what the second one has
