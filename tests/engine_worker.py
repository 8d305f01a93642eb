"""Run by torchrun: a DeepSpeed run, whole and in two parts, and a poisoned step; ranks write files.

engine_worker.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch
from accelerate.state import AcceleratorState, PartialState

from sft import batching, engine

BUDGET = batching.Budget(60, "padded")


def make(folder: Path) -> engine.Engine:
    AcceleratorState._reset_state(False)  # Accelerate takes one DeepSpeed configuration a process
    rows = tiny.examples(0, 11)
    settings = tiny.config(
        folder,
        global_batch=4,
        max_steps=6,
        max_grad_norm=1.0,
        engine="deepspeed",
        deepspeed_config="configs/deepspeed_z2.json",
    )
    return tiny.make_engine(tiny.llama(attention_dropout=0.3), rows, rows, settings, BUDGET)


def steps(built: engine.Engine, number: int) -> list[float]:
    losses = []
    for _ in range(number):
        losses.append(built.optimizer_step()["train/loss"])
        built.step += 1
    return losses


def weights(built: engine.Engine) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in built.task.model.parameters()])


def main(out: Path) -> None:
    whole = make(out / "whole")
    losses = steps(whole, 6)
    first = make(out / "parts")
    start = steps(first, 3)
    folder = first.save()
    second = make(out / "parts")
    second.resume(folder)
    parts = start + steps(second, 3)
    poisoned = make(out / "poisoned")
    before = weights(poisoned)
    next(poisoned.task.model.parameters()).register_hook(lambda g: torch.full_like(g, float("inf")))
    message = ""
    try:
        poisoned.optimizer_step()
    except engine.NonFiniteError as error:
        message = str(error)
    result = {
        "world_size": whole.accelerator.num_processes,
        "engine": type(whole.model).__name__,
        "losses": losses,
        "parts": parts,
        "equal": torch.equal(weights(whole), weights(second)),
        "refused": message,
        "untouched": torch.equal(weights(poisoned), before),
    }
    rank = PartialState().process_index
    (out / f"rank{rank}.json").write_text(json.dumps(result), "utf-8")
    PartialState().wait_for_everyone()
    AcceleratorState._reset_state(True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
