"""The third trap: launches that look distributed and are one process, or independent copies."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny
from conftest import ROOT, launch, run

from sft import batching, processes
from sft.config import ConfigError

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
    told = launch(2, *TRAIN, "train.num_processes=3", f"train.output_dir={tmp_path}/run")
    assert told.count("expected 3 process(es), found 2") == 1
    assert "Traceback" not in told.split("expected 3")[0]


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
        tiny.make_engine(tiny.llama(), rows, rows, settings, batching.Budget(50, "padded"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "cannot read"),
        ('{"zero_optimization": {"stage": 0}}', "expected 1, 2 or 3, found 0"),
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


def test_precision_has_a_reason(tmp_path):
    for wanted in ("auto", "fp32", "bf16"):
        precision, reason = processes.resolve_precision(
            tiny.config(tmp_path, precision=wanted).train
        )
        assert precision in ("fp32", "bf16")
        assert reason


PLAN = """
import sys
from dataclasses import replace
from pathlib import Path
from sft import hardware, prepare, run
from sft.config import load_config, with_values
from sft.processes import end_processes, start_processes

config = with_values(load_config("configs/nano.yaml"), {"data.max_rows": 100})
prepared = prepare.prepare(config)
accelerator = start_processes(config.train)
rank = accelerator.process_index
machine = replace(hardware.detect(), ram_available_bytes=(200 - 80 * rank) << 20)
made = run.plan_together(config, prepared, machine, accelerator)
Path(sys.argv[1], f"rank{rank}").write_text(f"{made.available_bytes >> 20} {made.budget}")
end_processes(accelerator)
"""


@pytest.mark.slow
def test_ranks_with_unlike_memory_make_one_plan(tmp_path):
    script = tmp_path / "plan.py"
    script.write_text(PLAN)
    launch(2, script, str(tmp_path))
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("60 ")  # half of what the second one has
