"""Run by two ranks: a checkpoint of a split model, which both of them write.

shards_worker.py ENGINE MODEL OUT; every rank writes what it saw to OUT/rank<n>.json
"""

from __future__ import annotations

import json
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from parallel_worker import make

from sft.errors import CheckpointError
from sft.models import shards
from sft.models.weights import Weights
from sft.runtime.tensor_file import TensorFile
from sft.train.engine import Engine

ENGINES = {
    "fsdp": ["train.engine=fsdp"],
    "zero3": ["train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z3.json"],
}
LIVE: list[weakref.ref[torch.Tensor]] = []  # whole weights
WRITERS: list[str] = []  # the files of this rank
MOST = [0]  # bytes of whole weights at the same time


def watch() -> None:
    """Counts whole weights that exist at the same time, and the files that this rank writes."""
    gather, write = Weights.whole, TensorFile.write

    def whole(weights: Weights, name: str) -> torch.Tensor:
        found = gather(weights, name)
        LIVE.append(weakref.ref(found))
        MOST[0] = max(MOST[0], sum(each().nbytes for each in LIVE if each() is not None))
        return found

    def write_own(file: TensorFile, *given: Any) -> None:
        WRITERS.append(file.path.name)
        write(file, *given)

    Weights.whole, TensorFile.write = whole, write_own  # type: ignore[method-assign]


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def save_again_behind(made: Engine, folder: Path) -> dict[str, Any]:
    """Saves the same step while the next ones run: first it fails on one rank, then it succeeds."""
    keeper, rank = made.keeper, made.accelerator.process_index
    keeper.train = made.train.model_copy(update={"checkpoint_async": True})
    lines: list[Any] = []
    keeper.log.say = lines.append  # type: ignore[method-assign]
    expected = read_all(folder)
    finish, found = TensorFile.finish, dict[str, Any]()
    for fails in (True, False):
        may_write = threading.Event()

        def finish_late(
            file: TensorFile, event: threading.Event = may_write, fails: bool = fails
        ) -> Any:
            event.wait()
            return fail() if fails and rank == 1 else finish(file)

        TensorFile.finish = finish_late  # type: ignore[method-assign]
        made.read(folder)
        keeper.saved = keeper.parent = None  # as before the first save of this step
        keeper.try_to_save(made.step, made._write)
        made.optimizer_step()  # its counts say that ranks are writing
        keeper.settle(wait=False)
        was_pending = keeper.saved is None
        may_write.set()
        keeper.settle()
        found["failed" if fails else "saved"] = [was_pending, keeper.num_failed, *lines]
        lines.clear()
    TensorFile.finish = finish  # type: ignore[method-assign]
    found["same"] = read_all(folder) == expected
    return found


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main(engine: str, model: str, out: Path) -> None:
    shards.MIN_SHARD_BYTES = 1
    overrides = [f"model.name={model}", "tuning.mode=full", "train.precision=fp32"]
    overrides += ["data.max_rows=24", "train.global_batch=4", "train.max_shard_size=800KB"]
    made = make({"overrides": [*overrides, *ENGINES[engine]], "max_tokens": 256}, out / "run")
    rank = made.accelerator.process_index
    made.optimizer_step()
    made.step += 1
    found: dict[str, Any] = {
        "largest": max(e.nbytes for e in made.parallel.weights().empty().values())
    }
    write = TensorFile.write
    if rank == 1:  # only this one fails, between collective operations
        TensorFile.write = fail  # type: ignore[method-assign]
    try:
        made.save()
    except CheckpointError as error:
        found["error"] = str(error)
    TensorFile.write = write  # type: ignore[method-assign]
    watch()
    folder, trained = made.save(), made.parallel.checksums()
    found |= {"most": MOST[0], "files": sorted(set(WRITERS)), "folder": str(folder)}
    found["behind"] = save_again_behind(made, folder)
    made.optimizer_step()
    found["moved"] = made.parallel.checksums() != trained
    made.read(folder)
    found["resumed"] = made.parallel.checksums() == trained
    made.save_final(0)
    whole = made.parallel.weights().all()
    if whole:
        torch.save({k: v.clone() for k, v in whole.items()}, out / "weights.pt")
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    made.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
