"""Faults of single ranks in the middle of steps; every rank writes what it saw.

fault_worker.py OUT ENGINE; ENGINE is ddp or deepspeed, and OUT/small, if it is there, a small disk
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate.state import AcceleratorState, PartialState

from sft.data import batches
from sft.errors import UserError
from sft.runtime.log import Log
from sft.train import engine

BUDGET = batches.Budget(60, "padded")
STEPS = 6


def make(folder: Path, name: str, **train: Any) -> engine.Engine:
    AcceleratorState._reset_state(False)  # Accelerate takes one DeepSpeed configuration a process
    rows = tiny.examples(0, 11)
    settings = {"global_batch": 6, "max_steps": STEPS, "max_grad_norm": 1.0} | train
    if name == "deepspeed":
        settings |= {"engine": "deepspeed", "deepspeed_config": "configs/deepspeed_z2.json"}
    configured = tiny.config(folder, **settings)
    return tiny.make_engine(tiny.llama(), rows, rows, configured, BUDGET)


def steps(built: engine.Engine, number: int) -> list[str]:
    losses = []
    for _ in range(number):
        losses.append(built.optimizer_step()["train/loss"].hex())
        built.step += 1
    return losses


def weights(built: engine.Engine) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in built.task.model.parameters()])


def spoil(built: engine.Engine, rank: int, step: int) -> None:
    """The loss of that step is NaN on that rank."""
    real = built.task.loss

    def loss(model: Any, batch: Any) -> Any:
        value, extras = real(model, batch)
        bad = built.step == step and built.accelerator.process_index == rank
        return (value * float("nan") if bad else value), extras

    built.task.loss = loss


def starve(built: engine.Engine, rank: int, where: str) -> list[int]:
    """Micro-batches of several examples do not fit the memory of that rank; the sizes it tried.

    They fail before, behind or after the forward pass: in a backward pass that is the last of its
    step or is not. `later`: before a forward pass that is not the first. `always`: single ones too.
    """
    real, tried = built.task.loss, []

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    def loss(model: Any, batch: Any) -> Any:
        number = len(built.window(built.step)[1])
        first, last = len(tried) % number == 0, (len(tried) + 1) % number == 0
        tried.append(batch.input_ids.numel())
        bad = len(batch.input_ids) > 1 or where in ("always", "last backward")
        bad = bad and built.accelerator.process_index == rank
        if bad and (where in ("before", "always") or (where == "later" and not first)):
            fail()
        value, extras = real(model, batch)
        if bad and where == "behind":
            fail()
        if bad and where == ("last backward" if last else "backward"):
            value.register_hook(fail)
        return value, extras

    built.task.loss = loss
    return tried


def refused(action: Callable[[], Any]) -> dict[str, Any]:
    try:
        action()
    except UserError as error:
        return {"code": error.exit_code, "reported": str(error)}
    return {"code": 0, "reported": ""}


def stopped(out: Path, name: str) -> dict[str, Any]:
    """A loss that is NaN, and a gradient that is infinite, on rank 1 only."""
    built = make(out / "stopped", name)
    steps(built, 1)
    spoil(built, 1, 1)
    before = weights(built)
    loss = refused(built.optimizer_step)
    alike = torch.equal(weights(built), before)
    built = make(out / "stopped", name)
    before = weights(built)
    if built.accelerator.process_index == 1:
        parameter = next(built.task.model.parameters())
        parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    gradient = refused(built.optimizer_step)
    alike = alike and torch.equal(weights(built), before)
    return {"loss": loss, "gradient": gradient, "untouched": alike}


def skipped(out: Path, name: str) -> dict[str, Any]:
    """A step that is skipped, against one that is left out; whole and in two parts."""
    whole = make(out / "whole", name, skip_nonfinite=1)
    spoil(whole, 1, 2)
    losses = steps(whole, STEPS)
    left_out = make(out / "left_out", name)
    expected = steps(left_out, 2)
    left_out.step += 1
    expected += steps(left_out, STEPS - 3)
    first = make(out / "parts", name, skip_nonfinite=1)
    spoil(first, 1, 2)
    parts = steps(first, 4)
    folder = first.save()
    second = make(out / "parts", name, skip_nonfinite=1)
    second.resume(folder)
    parts += steps(second, 2)
    counted = second.num_skipped
    spoil(second, 0, STEPS - 1)
    second.step = STEPS - 1
    return {
        "losses": losses,
        "expected": expected,
        "parts": parts,
        "equal": torch.equal(weights(whole), weights(left_out)),
        "resumed": torch.equal(weights(whole), weights(second)),
        "counted": counted,
        "one_more": refused(second.optimizer_step),
    }


def starved(out: Path, name: str) -> dict[str, Any]:
    """Memory runs out on rank 1 behind the first step; then for everything."""
    rich = make(out / "rich", name)
    result: dict[str, Any] = {"expected": steps(rich, STEPS)}
    places = ["before", "behind", "later"] + (["backward"] if name == "ddp" else [])
    for where in places:
        built = make(out / where, name)
        losses = steps(built, 1)
        if where in ("later", "backward"):  # several micro-batches a step
            built.task.budget = batches.Budget(40, "padded")
        tried = starve(built, 1, where)
        result[where] = {
            "losses": losses + steps(built, STEPS - 1),
            "budget": built.task.budget.max_tokens,
            "tried": tried,
            "difference": float((weights(built) - weights(rich)).abs().max()),
        }
    built = make(out / "poor", name)
    before = weights(built)
    starve(built, 1, "always")
    result["poor"] = refused(built.optimizer_step)
    result["untouched"] = torch.equal(weights(built), before)
    return result


def full(out: Path, name: str) -> dict[str, Any]:
    """The small disk is full while step 3 is saved, and then no longer."""
    small, reported = out / "small", []
    built = make(small / "run", name, save_steps=1)
    built.keeper.log = Log(None)
    built.keeper.log.say = reported.append  # type: ignore[method-assign, assignment]
    real, ballast = built.task.loss, small / "ballast"

    def loss(model: Any, batch: Any) -> Any:
        if built.accelerator.is_main_process and built.step == 2 and not ballast.exists():
            ballast.write_bytes(b"x" * (shutil.disk_usage(small).free - 100_000))
        if built.accelerator.is_main_process and built.step == 3:
            ballast.unlink(missing_ok=True)
        return real(model, batch)

    built.task.loss = loss
    built.run()
    left = sorted(path.name for path in (small / "run").glob("checkpoint_step_*"))
    return {"step": built.step, "reported": reported, "left": left}


def main(out: Path, name: str) -> None:
    result = {
        "stopped": stopped(out, name),
        "skipped": skipped(out, name),
        "starved": starved(out, name),
    }
    if (out / "small").exists():
        result["full"] = full(out, name)
    rank = PartialState().process_index
    result["world"] = PartialState().num_processes
    path = out / f"rank{rank}.json"
    path.write_text(json.dumps(result), "utf-8")
    built = make(out / "stuck", name)
    starve(built, 1, "last backward")  # in the pass in which rank 0 waits
    try:
        built.optimizer_step()
    except UserError as error:
        result["stuck"] = {"code": error.exit_code, "reported": str(error)}
    except RuntimeError as error:  # of the connection to the rank that ended
        result["stuck"] = {"code": 1, "reported": str(error)}
    path.write_text(json.dumps(result), "utf-8")
    os._exit(result["stuck"]["code"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
