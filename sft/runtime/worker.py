"""Runs as each rank of `setup-accelerate`'s proof: `python -m sft.runtime.worker FOLDER`."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from sft.runtime.console import write_json


@dataclass(frozen=True)
class Result:
    """The world as one rank sees it, and the sum of rank + 1 over all ranks."""

    rank: int
    world: int
    sum: float
    backend: str | None
    device: str


def main(folder: Path) -> None:
    """Writes the result into a file per process id, since independent copies all claim rank 0."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    value = torch.tensor([accelerator.process_index + 1.0], device=accelerator.device)
    total = accelerator.reduce(value, reduction="sum")
    result = Result(
        accelerator.process_index,
        accelerator.num_processes,
        total.item(),
        accelerator.state.backend,
        str(accelerator.device),
    )
    write_json(folder / f"{os.getpid()}.json", asdict(result))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
