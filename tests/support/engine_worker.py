"""Run by two ranks: a small network trained by each engine, operation by operation.

engine_worker.py OUT ENGINE...; every rank writes what it saw to OUT/ENGINE.rank<n>.pt
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from sft.runtime import checkpoint, processes
from sft.train.parallel import share_model

ROWS, FEATURES, STEPS = 8, 5, 3
NORM = 0.05  # smaller than the norm of the gradient


class Net(nn.Module):
    """Two layers of odd sizes, a parameter that is frozen, one that is not used, and buffers."""

    def __init__(self, has_unused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(2))
        self.head = nn.Linear(FEATURES, 3)
        self.head.weight.quant_state = "kept"  # type: ignore[union-attr]
        self.frozen = nn.Parameter(torch.rand(FEATURES), requires_grad=False)
        if has_unused:  # which DDP refuses
            self.unused = nn.Parameter(torch.ones(1))
        self.register_buffer("root", torch.arange(2.0))
        self.layers[1].register_buffer("inner", torch.arange(3.0))
        self.layers[1].register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs * self.frozen
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.head(hidden)


def rows(step: int) -> torch.Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(step))


def make(engine: str, out: Path, **train: Any) -> tuple[Any, Accelerator]:
    AcceleratorState._reset_state(False)  # Accelerate takes one DeepSpeed configuration a process
    settings = {"precision": "fp32", "max_grad_norm": NORM, "weight_decay": 0.1}
    if engine.startswith("zero"):
        settings |= {"engine": "deepspeed", "deepspeed_config": str(out / f"{engine}.json")}
    elif engine.startswith("fsdp"):
        settings |= {"engine": "fsdp", "keep_whole": "all" if engine == "fsdp_all" else False}
    settings |= train
    configured = tiny.config(out, **settings).train
    accelerator = processes.start_processes(configured)
    return share_model(Net(engine != "ddp"), configured, accelerator), accelerator


def accumulate(parallel: Any, own: torch.Tensor, number: int = 2, scale: float = 1.0) -> None:
    """Runs the first `number` of the two micro-batches of a step. `scale` is that of the loss."""
    for index, part in enumerate(own.chunk(2)[:number]):
        with parallel.no_sync():
            loss = scale * parallel.model(part).square().sum() / ROWS
        parallel.prepare_backward(index == 1)
        parallel.backward(loss * parallel.loss_factor)


def take_step(parallel: Any, own: torch.Tensor, scale: float | None = None) -> float:
    """`scale`: the loss scale of fp16."""
    parallel.begin_step()
    if scale:
        parallel.set_loss_scale(scale)
    accumulate(parallel, own)
    norm = parallel.clip()
    parallel.update()
    return norm


def offload(engine: str, out: Path) -> dict[str, Any]:
    """Returns settings that keep the optimizer in host memory."""
    if engine.startswith("fsdp"):
        return {"offload": True}
    settings = json.loads((out / f"{engine}.json").read_text())
    settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    file = out / f"{engine}_offload.json"
    file.write_text(json.dumps(settings))
    return {"deepspeed_config": str(file)}


def describe(parallel: Any) -> dict[str, Any]:
    modules = dict(parallel.module.named_modules())
    groups = [
        m._get_fsdp_state()._fsdp_param_group for m in modules.values() if hasattr(m, "unshard")
    ]
    return {
        "engine": type(parallel).__name__,
        "waits_in": parallel.waits_in,
        "is_split": parallel.is_split,
        "loss_factor": parallel.loss_factor,
        "quant_state": getattr(parallel.module.head, "quant_state", None),
        "sharded": sorted(name for name, m in modules.items() if hasattr(m, "unshard")),
        "policies": {type(group.offload_policy).__name__ for group in groups},
    }


def train(engine: str, out: Path, own: list[torch.Tensor]) -> dict[str, Any]:
    """Returns what this rank sees of three steps, with steps between them that are abandoned."""
    parallel, accelerator = make(engine, out)
    seen = {"about": describe(parallel), "updates": [parallel.num_updates]}
    seen["checksums"] = [parallel.checksums()]
    seen["before"] = [dict(shard.state) for shard in parallel.optimizer_shards()]
    seen["norms"] = [take_step(parallel, own[0])]
    for number in (1, 2):
        parallel.begin_step()
        accumulate(parallel, own[2], number)
        parallel.zero_grad()
    seen["norms"] += [take_step(parallel, own[1])]
    seen["saved"] = {k: v.clone() for k, v in parallel.weights().all().items()}
    seen["checksums"] += [parallel.checksums()]
    seen["updates"] += [parallel.num_updates]
    shards = list(parallel.optimizer_shards())
    seen["shards"] = [(s.name, s.start, {k: v.clone() for k, v in s.state.items()}) for s in shards]
    folder = out / engine
    folder.mkdir(exist_ok=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    checkpoint.save_optimizer(shards, folder, rank, world)
    if accelerator.is_main_process:
        torch.save(seen["saved"], folder / "weights.pt")
    accelerator.wait_for_everyone()
    seen["norms"] += [take_step(parallel, own[2])]
    seen["checksums"] += [parallel.checksums()]
    return seen | {"weights": parallel.weights().all()}


def resume(engine: str, out: Path, own: list[torch.Tensor]) -> dict[str, Any]:
    """Returns what this rank sees of the last step, by a run that had another state before."""
    parallel, _ = make(engine, out)
    take_step(parallel, own[2])
    with torch.no_grad():  # an evaluation, after which some layers may stay whole
        parallel.model(own[2])
    for name, value in torch.load(out / engine / "weights.pt").items():
        if name in parallel.trained:
            parallel.set_weight(name, value)
    with checkpoint.OptimizerState(out / engine) as state:
        parallel.load_optimizer(2, state.read)
    seen: dict[str, Any] = {"updates": [parallel.num_updates], "checksums": [parallel.checksums()]}
    with torch.no_grad():
        seen["outputs"] = parallel.model(own[2]).clone()
    seen["norm"] = take_step(parallel, own[2])
    seen["checksums"] += [parallel.checksums()]
    parallel.load_optimizer(0, lambda *_: {})
    seen["updates"] += [parallel.num_updates]
    seen["moments"] = [v for s in parallel.optimizer_shards() for v in s.state.values()]
    return seen


def vary(engine: str, out: Path, own: list[torch.Tensor]) -> dict[str, Any]:
    """Returns what this rank sees of other settings, and of a gradient that is not finite."""
    parallel, accelerator = make(engine, out, max_grad_norm=0.0)
    seen: dict[str, Any] = {"norm": take_step(parallel, own[0])}
    seen["weights"] = {k: v.clone() for k, v in parallel.weights().all().items()}
    parallel.begin_step()
    accumulate(parallel, own[1] * (math.inf if accelerator.is_main_process else 1.0))
    seen["not_finite"] = parallel.clip()
    seen["small"] = []
    for scale in (0.1, 0.0):
        parallel.begin_step()
        accumulate(parallel, own[0], scale=scale)
        seen["small"] += [parallel.clip()]
        parallel.update()
    for precision in ("bf16", "fp16"):
        parallel, _ = make(engine, out, precision=precision)
        with parallel.no_sync():
            seen[precision] = parallel.model(own[0]).detach().clone()
    seen["scaled"] = [take_step(parallel, each, scale=2.0**10) for each in own]
    parallel.begin_step()
    parallel.set_loss_scale(2.0**40)
    accumulate(parallel, own[0])
    seen["overflowed"] = parallel.clip()
    if engine not in ("ddp", "zero1"):  # which cannot offload
        parallel, _ = make(engine, out, **offload(engine, out))
        seen["about"] = describe(parallel)
        seen["offloaded"] = [take_step(parallel, each) for each in own]
    return seen


def main(out: Path, engines: list[str]) -> None:
    for engine in engines:
        own = [rows(step).chunk(2)[int(os.environ["RANK"])] for step in range(STEPS)]
        seen = {name: f(engine, out, own) for name, f in PARTS.items()}
        torch.save(seen, out / f"{engine}.rank{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()


PARTS = {"train": train, "resume": resume, "vary": vary}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
