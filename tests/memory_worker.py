"""Run by torchrun: real steps of a configuration on real processes; writes what rank 0 allocates.

memory_worker.py CONFIG OUT: a configuration in JSON, and a file for the bytes at the peak.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from sft import rehearsal
from sft.config import Config
from sft.processes import start_processes
from sft.rehearsal import uniform
from sft.trace import Recorder

WINDOW = uniform(4, 64, 64, micro_batches=2)


def main(text: str, out: Path) -> None:
    config = Config.model_validate_json(text)
    accelerator = start_processes(config.train)
    recorder = Recorder()
    with recorder:
        made = rehearsal.make_engine(config, "fp32", WINDOW, weights=False, accelerator=accelerator)
        for _ in range(2):
            made.optimizer_step()
    if accelerator.is_main_process:
        out.write_text(str(recorder.trace.peak().num_bytes))
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort in its destructors


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
