"""The tools around a run, with real processes: launcher, setup-accelerate, TensorBoard, reports."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, clean_environment, run

from sft.commands import setup_accelerate, tensorboard
from sft.runtime import hardware, worker, world
from sft.runtime.children import is_dead
from sft.tasks.registry import load_run

CONFIGS = ROOT / "configs" / "accelerate"
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_no_script_hides_a_package() -> None:
    """Python searches the script's folder first: scripts/tensorboard.py would hide tensorboard."""
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != ROOT / "scripts"]
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert not names & {*sys.stdlib_module_names}
    hidden = {name for name in names if PathFinder.find_spec(name, elsewhere)}
    assert hidden <= {"evaluate"}  # of lm-eval's tasks, which are read when scripts/ is left out
    code = f"""
import sys
from importlib.util import find_spec
sys.path.insert(0, {str(ROOT / "scripts")!r})
sys.argv = ["scripts/evaluate.py"]
from sft import commands
commands.run = lambda *_: print(find_spec("evaluate"), "evaluate" in sys.modules)
commands.main("evaluate")
"""
    done = run(sys.executable, "-c", code)
    assert "scripts/evaluate.py" not in done.stdout, done.stderr
    assert done.stdout.endswith("False\n"), done.stderr


# ---- configs/accelerate


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", "MULTI_GPU"),
        ("fsdp2", "FSDP"),
        ("deepspeed_z2", "DEEPSPEED"),
        ("deepspeed_z3", "DEEPSPEED"),
    ],
)
def test_launcher_files_are_valid(name: str, kind: str) -> None:
    config = world.read_launch_file(CONFIGS / f"{name}.yaml")
    assert config.distributed_type == kind
    assert config.num_processes == -1  # to be given: Accelerate refuses to guess
    assert config.mixed_precision == "no"
    assert config.main_process_port == 0
    assert not config.debug


def test_every_launcher_file_is_tested() -> None:
    names = {path.stem for path in CONFIGS.iterdir()}
    assert names == {"ddp", "fsdp2", "deepspeed_z2", "deepspeed_z3"}


def launch_commands() -> list[str]:
    """Returns the commands of the guide and of the launch files that start ranks without make."""
    texts = [(ROOT / "docs/LAUNCH.md").read_text()]
    texts += [re.sub(r"^# *", "", path.read_text(), flags=re.M) for path in CONFIGS.iterdir()]
    joined = "\n".join(texts).replace("\\\n", " ")
    return [line for line in joined.splitlines() if "scripts/train_distributed.py --config" in line]


@pytest.mark.parametrize("command", launch_commands())
def test_a_command_that_starts_ranks_is_understood_as_written(command: str) -> None:
    launcher, given = command.split("scripts/train_distributed.py --config")
    words = [word for word in shlex.split(launcher) if "=" not in word]
    words.append("scripts/train_distributed.py")
    if words[0] == "accelerate":
        parsed = launch_command_parser().parse_args(words[2:])
        assert parsed.config_file == "my.yaml" or Path(parsed.config_file).is_file()
        assert parsed.config_file == "my.yaml" or parsed.num_processes == 2
    elif words[0] == "torchrun":
        assert torch.distributed.run.parse_args(words[1:]).nproc_per_node == "2"
    else:
        assert words[0] == "python"
    config, *overrides = shlex.split(given)
    load_run(ROOT / config, overrides)


def test_every_launch_file_has_its_command() -> None:
    assert len(launch_commands()) == 5 + len(list(CONFIGS.iterdir()))


WORKER = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=not torch.cuda.is_available())
model = accelerator.prepare(torch.nn.Linear(2, 2))
total = accelerator.reduce(torch.tensor([1.0], device=accelerator.device)).item()
result = [accelerator.process_index, accelerator.num_processes, total, type(model).__name__]
Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(result))
accelerator.end_training()
"""


@pytest.mark.thorough("`make setup-accelerate` proves the same of the file that it mends")
@pytest.mark.slow
def test_ddp_file_makes_one_world(tmp_path: Path) -> None:
    """Trap 3: two processes that are not one run. Judged by what the ranks wrote."""
    num = hardware.default_num_processes(hardware.detect())
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num)]
    command += ["--config_file", str(CONFIGS / "ddp.yaml"), str(tmp_path / "worker.py")]
    subprocess.run([*command, str(tmp_path)], env=clean_environment(), timeout=120, check=False)
    found = sorted(json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert found == [[rank, num, float(num), "DistributedDataParallel"] for rank in range(num)]


# ---- setup-accelerate

TWO = {"compute_environment": "LOCAL_MACHINE", "num_processes": 2, "mixed_precision": "no"}


@pytest.mark.slow
def test_setup_catches_a_file_that_starts_one_process_then_mends_it(tmp_path: Path) -> None:
    """In Accelerate's default place, without a terminal."""
    setup = (sys.executable, "-m", "sft", "setup-accelerate")
    target = tmp_path / "accelerate" / "default_config.yaml"
    target.parent.mkdir()
    bad = yaml.safe_dump({**TWO, "distributed_type": "MULTI_CPU", "use_cpu": True})
    target.write_text(bad)

    caught = run(*setup, "--verify-only", HF_HOME=str(tmp_path))
    assert caught.returncode == 2
    assert "expected: 2 process(es) that form one world, sum 3" in caught.stderr
    assert "found:    1 process(es) did the work, in worlds of [1]" in caught.stderr
    assert "MULTI_CPU starts one process" in caught.stderr
    assert "Traceback" not in caught.stderr
    assert target.read_text() == bad

    num = hardware.default_num_processes(hardware.detect())
    mended = run(*setup, HF_HOME=str(tmp_path))
    assert mended.returncode == 0, mended.stderr
    assert f"ok: {target} starts {num} process(es) in one world" in mended.stdout
    assert "kept as default_config.yaml.bak beside it" in mended.stdout
    assert target.with_name("default_config.yaml.bak").read_text() == bad
    assert yaml.safe_load(target.read_text())["num_processes"] == num


def test_setup_never_loses_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = setup_accelerate
    hw, target = hardware.detect(), tmp_path / "new" / "file.yaml"
    setup.write_recommended(target, hw)
    first = target.read_text()
    setup.write_recommended(target, hw)  # the same: nothing to keep
    assert "already is the recommended file" in capsys.readouterr().out
    for text in ("mine: 1\n", "mine: 2\n"):
        target.write_text(text)
        setup.write_recommended(target, hw)
    kept = {path.name: path.read_text() for path in target.parent.iterdir()}
    assert kept == {"file.yaml": first, "file.yaml.bak": "mine: 1\n", "file.yaml.bak1": "mine: 2\n"}


@pytest.mark.parametrize(
    "text", ["num_processes: 2\n", "distributed_type: NO\nbogus: 1\n", "a: [\n"]
)
def test_setup_refuses_what_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ValueError, match="is not a configuration of Accelerate"):
        world.read_launch_file(tmp_path / "file.yaml")


def test_setup_judges_what_the_processes_saw() -> None:
    setup = setup_accelerate

    def seen(*rows: tuple[int, int, float]) -> list[Any]:
        return [worker.Result(*row, backend="gloo", device="cpu") for row in rows]

    assert setup.judge(seen((0, 2, 3.0), (1, 2, 3.0)), 2) is None
    assert setup.judge(seen((0, 1, 1.0)), 1) is None
    assert "1 process(es) did the work" in setup.judge(seen((0, 1, 1.0)), 2)
    assert "0 process(es) did the work" in setup.judge([], 2)
    assert "independent copies" in setup.judge(seen((0, 1, 1.0), (0, 1, 1.0)), 2)
    assert "ranks [0, 0]" in setup.judge(seen((0, 2, 3.0), (0, 2, 3.0)), 2)
    assert "sums [2.0, 3.0]" in setup.judge(seen((0, 2, 3.0), (1, 2, 2.0)), 2)


@pytest.mark.slow
def test_the_wizard_asks_what_the_table_answers(tmp_path: Path) -> None:
    """Accelerate's own wizard on a terminal, answered from our table: the recommended file."""
    setup, hw, target = setup_accelerate, hardware.detect(), tmp_path / "wizard.yaml"
    target.write_text("old: 1\n")
    answer_wizard(target, setup.wizard_answers(hw))
    made, wanted = world.read_launch_file(target), setup.recommended(hw)
    for key in ("distributed_type", "num_processes", "num_machines", "gpu_ids", "mixed_precision"):
        assert getattr(made, key) == getattr(wanted, key), key
    assert target.with_name("wizard.yaml.bak").read_text() == "old: 1\n"


KEYS = {"This machine": "0", "No distributed training": "0", "multi-GPU": "4"}  # rows of menus


WIZARD = """
import sys; from pathlib import Path
from sft.commands import setup_accelerate; setup_accelerate.run_wizard(Path(sys.argv[1]))
"""


def answer_wizard(target: Path, answers: list[tuple[str, str]], seconds: float = 90) -> None:
    """Types each answer once its question is the last thing on the terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", WIZARD, str(target)],
        cwd=ROOT,
        env=clean_environment(TERM="xterm"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    shown, asked, waiting, deadline = "", 0, list(answers), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                shown += os.read(master, 65536).decode(errors="replace")
            except OSError:  # the other end was closed: it has ended
                break
        elif waiting and "selecting with enter" in shown:
            question, answer = waiting[0]
            asked = shown.find(question.rstrip("?"), asked)
            assert asked >= 0, f"expected the question {question!r} in:\n{shown}"
            key = "0" if "mixed precision" in question else KEYS.get(answer, answer)
            os.write(master, f"{key}\r".encode())
            waiting.pop(0)
    process.kill()
    process.wait()
    os.close(master)
    assert not waiting, f"never asked: {waiting}\n{shown}"


# ---- TensorBoard


@pytest.fixture
def logdir(tmp_path: Path) -> Iterator[Path]:
    """A folder with one event file; whatever server was started for it ends with the test."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "outputs" / "run" / "tensorboard")) as writer:
        for step in range(3):
            writer.add_scalar("train/loss", 2.0 / (step + 1), step)
    yield tmp_path / "outputs"
    tensorboard.stop(tmp_path / "outputs")


FAKE = """
import time; from pathlib import Path
Path("started").touch(); time.sleep(600)
"""


@pytest.fixture
def fake(logdir: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process whose command line is that of a TensorBoard of this folder."""
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/__init__.py").touch()  # else it would not hide the real one
    (tmp_path / "tensorboard/main.py").write_text(FAKE)
    started = []

    def start(**environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
        process = subprocess.Popen(
            [*command, "--port", "6006"], cwd=tmp_path, env=clean_environment(**environment)
        )
        started.append(process)
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def scalars(url: str, run: str, tag: str) -> list[list[float]]:
    """[wall time, step, value] of every point, once TensorBoard has read the event file."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(150):
        try:
            address = f"{url}/data/plugin/scalars/scalars?run={run}&tag={tag}"
            return json.load(direct.open(address, timeout=10))
        except urllib.error.HTTPError:  # 404 until it is read
            time.sleep(0.1)
    raise AssertionError(f"TensorBoard never showed {run} {tag}")


@pytest.mark.slow
def test_tensorboard_serves_this_folder_and_stops_alone(
    logdir: Path, fake: Callable[..., subprocess.Popen[bytes]], run_script: Run
) -> None:
    foreign = fake()

    def call(*arguments: str, folder: Path = logdir) -> subprocess.CompletedProcess[str]:
        return run_script("tensorboard_server.py", "--logdir", str(folder), *arguments)

    started = call("--port", "auto")
    assert started.returncode == 0, started.stderr
    (server,) = tensorboard.servers(logdir)
    url = started.stdout.split()[-1]
    port = int(url.rsplit(":")[-1])
    points = scalars(url, "run/tensorboard", "train/loss")
    assert [point[1:] for point in points] == [
        [step, pytest.approx(2 / (step + 1))] for step in range(3)
    ]

    again = call()
    assert "already runs" in again.stdout
    assert url in again.stdout
    assert list(tensorboard.servers(logdir)) == [server]

    taken = call("--port", str(port), folder=Path(f"{logdir}2"))
    assert taken.returncode == 2
    assert f"port {port} cannot be used: Address already in use" in taken.stderr

    family = [server, *server.children(recursive=True)]
    assert f"stopped TensorBoard (pid {server.pid})" in call("--stop").stdout
    assert all(is_dead(process.pid) for process in family)
    assert foreign.poll() is None
    nothing = call("--stop")
    assert nothing.returncode == 0
    assert "nothing to stop" in nothing.stdout


def test_stop_leaves_a_server_that_was_started_otherwise(
    logdir: Path,
    fake: Callable[..., subprocess.Popen[bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for environment in ({}, {tensorboard.MARK: f"{logdir}2"}):
        foreign = fake(**environment)
        tensorboard.stop(logdir)
        assert "nothing to stop" in capsys.readouterr().out
        assert foreign.poll() is None


def test_stop_ends_the_server_that_was_started_here(
    logdir: Path, fake: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """The same process with the mark, or the test above would pass without any stop."""
    own = fake(**{tensorboard.MARK: str(logdir)})
    with pytest.raises(ValueError, match="does not answer"):
        tensorboard.start(logdir, None)
    tensorboard.stop(logdir)
    assert own.wait(5) != 0


def test_a_port_in_use_differs_from_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} cannot be used"):
            tensorboard.choose_port(port)
    assert tensorboard.choose_port(port) == port


# ---- reports


@pytest.mark.slow
def test_gpu_info_is_honest_without_a_gpu(run_script: Run) -> None:
    done = run_script("gpu_info.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "none that torch can use" in done.stdout
    assert "Why no GPU" in done.stdout
    assert re.search(r"torch +\d+\.\d+", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_memory_check_names_the_process_and_the_run_that_hold_most(
    tmp_path: Path, run_script: Run
) -> None:
    (tmp_path / "outputs" / "big_run").mkdir(parents=True)
    (tmp_path / "outputs" / "big_run" / "weights").write_bytes(b"x" * 64 * 1024**2)
    code = "import sys; held = b'x' * (3 << 28); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, "hoarder"], **pipes) as holder:
        holder.stdout.readline()
        done = run_script("memory_check.py", "--outputs", str(tmp_path / "outputs"))
        holder.stdin.close()
    assert done.returncode == 0, done.stderr
    assert re.search(rf"0\.8 GiB +{holder.pid} ", done.stdout)
    assert "outputs/big_run" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
