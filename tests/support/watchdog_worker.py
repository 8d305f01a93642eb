"""Forks the ranks of small runs for test_watchdog.py: imported once, so that a run takes a second.

One JSON request a line: {out, world, folder, train, limit, moment, rank, fault, times, env,
hosts}. For each a launcher is forked, which forks the ranks and, unlike torchrun, lets them end by
themselves: that they do is what the tests are about. At `moment` the fault happens in `rank`. In
`out` appear pids, `codes` (exit codes), `reported` (stdout and stderr), `moment` (the fault has
happened) and weights.safetensors (the run has finished). The ranks are spread evenly over `hosts`,
network namespaces with other clocks; without any they are on this machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file

from sft import cli, run
from sft.config.load import load_config
from sft.config.schema import Generation
from sft.data import batches, cache, workers
from sft.errors import UserError
from sft.evaluate import generate
from sft.runtime import attempt, checkpoint, children, processes, watchdog
from sft.runtime.watchdog import Guard
from sft.train import engine

ROWS = tiny.examples(0, 11)
PROMPTS = [row.ids for row in ROWS[:6]]
Request = dict[str, Any]
LIBC = ctypes.CDLL(None, use_errno=True)
NEW_TIME, NEW_NETWORK = 0x80, 0x40000000  # CLONE_NEWTIME, CLONE_NEWNET


def happens(request: Request, moment: str) -> None:
    """The fault of this rank, if its moment has come."""
    if (moment, int(os.environ.get("RANK", "0"))) != (request["moment"], request["rank"]):
        return
    request["times"] -= 1
    if request["times"]:
        return
    Path(request["out"], "moment").touch()
    fault = request["fault"]
    if fault == "loop":
        while True:
            time.sleep(0.01)
    elif fault == "raise":
        raise KeyError(f"boom {os.environ.get('HF_TOKEN')}")
    elif isinstance(fault, int):
        error = UserError("a mistake")
        error.exit_code = fault
        raise error
    elif fault == "pause":
        time.sleep(5)
    elif fault == "wait":
        while not Path(request["out"], "go").exists():
            time.sleep(0.05)
    else:
        os.kill(os.getpid(), signal.Signals[fault])
    time.sleep(0.3)  # the process group's threads may still have been writing


def before(request: Request, moment: str, call: Callable) -> Callable:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        happens(request, moment)
        return call(*arguments, **named)

    return wrapped


def train(request: Request) -> None:
    """`run.train` with a random model and no files of data."""
    happens(request, "launched")
    folder = Path(request["folder"])
    settings = tiny.config(
        folder, global_batch=4, max_steps=6, max_grad_norm=1.0, **request["train"]
    )
    with Guard(folder, request["limit"]) as guard:
        found = run._open_folder(settings.train, guard) if guard.is_first else None
        happens(request, "start")
        model = tiny.llama(attention_dropout=0.3)
        built = tiny.make_engine(model, ROWS, ROWS, settings, batches.Budget(30, "padded"))
        task = built.task
        built.guard = task.guard = guard
        built.keeper.status = guard.status
        found = guard.join(built.accelerator, found)
        loss, eval_loss = task.loss, task.eval_loss

        def hooked(*arguments: Any) -> Any:
            happens(request, "step")
            return loss(*arguments)

        def hooked_held_out(*arguments: Any) -> Any:
            happens(request, f"{part(built)} evaluation")
            return eval_loss(*arguments)

        task.loss, task.eval_loss = hooked, hooked_held_out  # type: ignore[method-assign]
        task.collate = before(request, "data", task.collate)  # type: ignore[method-assign]
        engine.checkpoint.commit = before(request, "save", checkpoint.commit)
        built._write = before(request, "write", built._write)  # type: ignore[method-assign]
        decode = generate.Decoder.decode

        def decoded(*arguments: Any, **options: Any) -> list[generate.Answer]:
            happens(request, f"{part(built)} generation")
            return decode(*arguments, **options)

        generate.Decoder.decode = decoded  # type: ignore[method-assign]
        results(built)
        if found:
            built.resume(found)
        built.run()
        with built.preemptible():
            results(built)
        built.accelerator.wait_for_everyone()
    if guard.is_first:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        save_file(weights, Path(request["out"], "weights.safetensors"))
    processes.end_processes(built.accelerator)


def part(built: engine.Engine) -> str:
    return {0: "first", built.total_steps: "last"}.get(built.step, "middle")


def results(built: engine.Engine) -> None:
    built.task.evaluate(built.model)
    guard, short = built.guard, Generation(max_new_tokens=4)
    with guard.section("generation"):
        decoder = generate.Decoder(built.task.model, [1], short, 2)
        for _ in decoder.answer_batches(
            PROMPTS, built.accelerator, before_batch=guard.stop_if_asked
        ):
            pass


def prepare_data(request: Request) -> None:
    """Rows are prepared by two workers, each of which stays at its first rows."""

    def part(*_: Any) -> None:
        Path(request["out"], f"worker_{os.getpid()}").touch()
        time.sleep(600)

    workers.hardware.usable_cores = lambda: 2
    workers.render_rows = part
    config = load_config("configs/nano.yaml", [f"data.cache_dir={request['out']}/cache"])
    with Guard(Path(request["folder"]), request["limit"]) as guard:
        guard.status.begin()
        cache.prepare(config, guard.tick)


def enter_host(number: int, name: str) -> None:
    """Makes this process one of another machine: its network, its name, its time of day."""
    if LIBC.setns(os.open(f"/run/netns/{name}", os.O_RDONLY), NEW_NETWORK):
        raise OSError(ctypes.get_errno(), f"setns {name}")
    os.environ |= {"MASTER_ADDR": "10.213.77.1", "GLOO_SOCKET_IFNAME": f"sft{number}"}
    attempt.machine_id = watchdog.machine_id = lambda: name  # type: ignore[assignment]
    clock = time.time
    time.time = lambda: clock() + 3 * 86400 * number  # type: ignore[assignment]


def shift_monotonic_clock() -> None:
    """Gives the processes that this one starts from now on a clock that is a day ahead."""
    if LIBC.unshare(NEW_TIME):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/timens_offsets").write_text("monotonic 86400 0\n")


def start_rank(rank: int, request: Request) -> None:
    world = request["world"]
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
    os.environ |= request["env"]
    if hosts := request["hosts"]:
        number = rank * len(hosts) // world
        enter_host(number, hosts[number])
    code = 1
    try:
        cli.run(lambda: (prepare_data if request["moment"] == "prepare" else train)(request))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_launcher(request: Request) -> None:
    out = Path(request["out"])
    reported = os.open(out / "reported", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(reported, 1)
    os.dup2(reported, 2)
    pids = []
    gate, opened = os.pipe()
    for rank in range(request["world"]):
        if request["hosts"] and rank == request["world"] // 2:
            shift_monotonic_clock()
        pids.append(os.fork())
        if not pids[-1]:
            os.close(opened)
            os.read(gate, 1)  # until all pids are known
            start_rank(rank, request)
    (out / "pids").write_text(json.dumps({"launcher": os.getpid(), "ranks": pids}))
    os.close(opened)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (out / "codes.part").write_text(json.dumps(codes))
    (out / "codes.part").rename(out / "codes")
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers need no burial
    torch.set_num_threads(1)
    for line in sys.stdin:
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            children.die_with_parent(os.getppid())
            start_launcher(json.loads(line))


if __name__ == "__main__":
    main()
