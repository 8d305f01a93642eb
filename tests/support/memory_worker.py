"""Real steps of a configuration on several ranks; writes what rank 0 allocates.

memory_worker.py CONFIG OUT: files of a configuration, and for the bytes at the peak.

DDP is watched by the recorder, the others through the events of the allocator: the recorder takes
two tensors of DeepSpeed's optimizer, which are replaced in the first step, for living ones.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from allocations import true_peak
from shapes import uniform_window

from sft.plan import dry_run
from sft.plan.trace import Recorder
from sft.runtime.processes import start_processes
from sft.tasks.registry import load_run

WINDOW = uniform_window(4, 64, 64, micro_batches=2)


def paused(wait: Callable[..., Any]) -> Callable[..., Any]:
    """Until gloo's thread has dropped its references, too: frees in other threads are not seen."""

    def call(*arguments: Any) -> Any:
        result = wait(*arguments)
        time.sleep(0.01)
        return result

    return call


def main(file: str, out: Path) -> None:
    config = load_run(file)
    accelerator = start_processes(config.train)
    window = replace(WINDOW, shared_by=config.train.context_parallel)

    def steps() -> None:
        made = dry_run.make_engine(config, "fp32", window, weights=False, accelerator=accelerator)
        for _ in range(2):
            made.optimizer_step()

    if config.train.engine == "ddp":
        with (recorder := Recorder()):
            steps()
        peak = recorder.trace.peak().num_bytes
    else:
        work: Any = torch.distributed.Work
        work.wait = paused(work.wait)
        peak, _ = true_peak(steps)
    if accelerator.is_main_process:
        out.write_text(str(peak))
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort in its destructors


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
