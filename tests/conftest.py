"""Shared material: the real files of ../shared (or SFT_SHARED), tiny models, launched processes."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

if "SFT_TEST_GPU" not in os.environ:  # `make test-gpu`; all else is the same on every machine
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import settings

from sft import errors
from sft.data import files

torch.set_num_threads(1)  # models here are too small to gain from more

settings.register_profile("sft", deadline=None)  # no test asserts a time
settings.load_profile("sft")

ROOT = Path(__file__).parent.parent
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "tests", "tests/support"))
SHARED = Path(os.environ.get("SFT_SHARED", ROOT.parent / "shared"))

# Tests save thousands of files that wait for the disk; where memory has room, theirs are in memory.
IN_MEMORY = Path("/dev/shm")
if os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > 8 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


LONG = (  # by what `make test` runs of them, in seconds
    *("test_run.py", "test_watchdog.py", "test_compiled.py", "test_crowd.py"),
    *("test_parallel.py", "test_plan.py", "test_slurm.py", "test_branches.py"),
    *("test_optimizers.py", "test_api.py", "test_cache.py", "test_updates.py"),
    *("test_memory.py", "test_configs.py", "test_output.py", "test_verify.py"),
    *("test_distill.py", "test_remote.py", "test_engine.py", "test_disk.py"),
    *("test_merge.py", "test_first_hour.py", "test_check.py", "test_trace.py"),
    *("test_hostile.py", "test_numbers.py", "test_launcher.py", "test_launch_tools.py"),
    *("test_plan_tool.py", "test_config.py", "test_losses.py", "test_old_runs.py"),
    *("test_lora.py", "test_generate.py", "test_towers.py", "test_laws.py"),
    *("test_template.py", "test_experts.py", "test_coverage.py", "test_turns.py"),
    *("test_calibration.py", "test_counters.py", "test_faults.py", "test_head.py"),
    *("test_infer.py", "test_classify.py", "test_offload.py", "test_processes.py"),
    *("test_checkpointing.py", "test_engines.py", "test_served.py"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than there are cores: slow tests often wait for signals and processes."""
    return len(os.sched_getaffinity(0)) + ("not slow" not in config.option.markexpr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long files first, so that no worker is left with one in the end."""
    items.sort(key=lambda item: LONG.index(name) if (name := item.path.name) in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """Hides libraries and tests from the garbage collector, which takes seconds to look at them
    whenever the package asks for a collection."""
    gc.collect()
    gc.freeze()


def representatives(cases: Iterable[Any], kept: int | Collection[Any] = 1) -> list[Any]:
    """Returns the cases of a parametrised test. `make test` runs those that are kept: the first
    ones, or some by value or id; `make test-all` runs all."""
    marked = []
    for number, case in enumerate(cases):
        is_set = isinstance(case, ParameterSet)
        name = case.id if is_set else case
        if number < kept if isinstance(kept, int) else name in kept:
            marked.append(case)
            continue
        mark = pytest.mark.thorough("other cases of this test")
        values = case.values if is_set else case if isinstance(case, tuple) else (case,)
        more = {"id": case.id, "marks": [*case.marks, mark]} if is_set else {"marks": mark}
        marked.append(pytest.param(*values, **more))
    return marked


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether tests with the mark `thorough` run: what prepares all cases in one launch prepares
    no other cases than those that run."""
    return any(item.get_closest_marker("thorough") for item in request.session.items)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared models and data in {SHARED} (or SFT_SHARED)")
    return SHARED


def load_rows(
    path: str | list[str],
    max_rows: int | None = None,
    on_bad_row: str = "error",
    **options: Any,
) -> tuple[list[files.Row], list[files.BadRow]]:
    """(rows, bad rows); a DataError of all bad ones unless they are skipped."""
    found = list(islice(files.read_all(path, **options), max_rows))
    bad = [row for row in found if isinstance(row, files.BadRow)]
    if bad and on_bad_row == "error":
        raise errors.DataError.from_rows(str(path), list(map(str, bad)))
    return [row for row in found if isinstance(row, files.Row)], bad


def run(*command: str, timeout: int = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command at the root of the repository; what its exit code means is the test's to say."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def clean_environment(**extra: str) -> dict[str, str]:
    """This environment without what an outer launcher may have left in it."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "MAKE"))
    }
    own = {"PYTHONPATH": PATHS, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # Tests run beside each other: no second thread, and where a run asks for one, none that spins.
    own |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return kept | own | extra


@pytest.fixture
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_script("train.py", "--config", ...)` in a process of its own, which has the libraries
    already: what they read from the environment when they are imported (HF_HOME) is for `run`."""
    import forked  # needs this module

    def call(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return forked.run(f"scripts/{name}", *arguments, **environment)

    return call


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable: 10.213.77.1 and .2, at sft0 and sft1."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and the program `ip`")
    names = [f"sft-test-{os.getpid()}-{i}" for i in (0, 1)]

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"`ip {' '.join(arguments)}` is not allowed here: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        peer = ["type", "veth", "peer", "sft1", "netns", names[1]]
        ip("link", "add", "sft0", "netns", names[0], *peer)
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.213.77.{i + 1}/24", "dev", f"sft{i}")
            ip("-n", name, "link", "set", f"sft{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
