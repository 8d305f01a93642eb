"""Run by several ranks: one step and one evaluation for many cuts; every rank writes what it saw.

law_worker.py OUT SEED...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch
from accelerate.state import AcceleratorState, PartialState

from sft.config.schema import Config
from sft.data import batches

BUDGETS = [1, 40, 100_000]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "crowd": torch.float64}


def configured(name: str, out: Path) -> Config:
    train = {"global_batch": 13}
    return tiny.crowd_config(out, train=train) if name == "crowd" else tiny.config(out, **train)


def built(name: str, settings: Config, dtype: torch.dtype) -> torch.nn.Module:
    return tiny.adapted(settings, dtype) if name == "crowd" else tiny.llama(dtype)


def main(out: Path, seeds: list[int]) -> None:
    results = []
    for seed in seeds:
        rows, held_out = tiny.examples(seed, 13), tiny.examples(seed + 100, 9)
        for name, dtype in DTYPES.items():
            for layout in ("padded", "packed"):
                for max_tokens in BUDGETS:
                    settings = configured(name, out)
                    model, fresh = (built(name, settings, dtype) for _ in range(2))
                    budget = batches.Budget(max_tokens, layout)
                    engine = tiny.make_engine(model, rows, held_out, settings, budget)
                    values = engine.optimizer_step()
                    trained = (p for p in model.parameters() if p.requires_grad)
                    gradients = torch.cat([p.grad.double().flatten() for p in trained])
                    seed_of_step = getattr(engine.task, "seed", None)
                    engine = tiny.make_engine(fresh, rows, held_out, settings, budget)
                    results.append(
                        {
                            "case": [seed, name, layout, max_tokens],
                            "world_size": engine.accelerator.num_processes,
                            "loss": values["train/loss"],
                            "seed": seed_of_step,
                            "held_out_loss": engine.task.evaluate(engine.model)["loss"],
                            "gradients": gradients.tolist(),
                        }
                    )
    rank = PartialState().process_index
    (out / f"rank{rank}.json").write_text(json.dumps(results), "utf-8")
    PartialState().wait_for_everyone()
    AcceleratorState._reset_state(True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
