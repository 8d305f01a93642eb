"""What a program does with AccelerateConnector; each of several ranks writes what it got.

connector_worker.py OUT
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT

from sft.runtime.log import Log
from sft.serve.connector import AccelerateConnector

TEXTS = ["hi", "what is the time in the city", "a b c d e f g h i j k l m n", "repeat: one two"]
TEXTS += [f"{text} {text}" for text in TEXTS] + ["again", "once more, please"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 12}


def conversations() -> list[Any]:
    asked: list[Any] = [[{"role": "user", "content": text}] for text in TEXTS]
    asked.insert(3, [{"role": "user", "content": ""}])
    asked.insert(5, "no conversation")
    asked.append([{"role": "user", "content": "long " * 600}])
    return asked


def connector(**options: Any) -> AccelerateConnector:
    options = {"mixed_precision": "no", "batch_size": 3, "log": Log(None)} | options
    return AccelerateConnector(ROOT / "nano/model", **options)


def scenario(made: AccelerateConnector, out: Path) -> dict[str, Any]:
    """All of what is public, in one order on every rank."""
    asked = conversations()
    found: dict[str, Any] = {"world": made.num_processes}
    found["answers"] = [asdict(each) for each in made.complete_batch(asked, **SETTINGS)]
    drawn = made.complete_batch(asked[:4], temperature=1.0, seed=3, **SETTINGS)
    found["drawn"] = [asdict(each) for each in drawn]
    found["few"] = [asdict(each) for each in made.complete_batch(asked[:2], **SETTINGS)]
    found["none"] = made.complete_batch([], **SETTINGS)
    kept = made.complete_batch(asked, predictions=out / "kept.jsonl", **SETTINGS)
    found["kept"] = [asdict(each) for each in kept]
    lengths = {}
    for name, items in (("items", ["x" * n for n in (1, 90, 5, 70, 3, 80, 2)]), ("empty", [])):
        mine = made.split_dataset(items)
        lengths[name] = sum(map(len, mine))
        found[name] = made.gather_results([f"{item}!" for item in mine])
    found["own_lengths"] = lengths
    found["trained"] = trained(made, out)
    return found


def trained(made: AccelerateConnector, out: Path) -> list[float]:
    """Two steps of the head on data that every rank sees whole: the same for any world."""
    model = made.load_model_once().model
    model.requires_grad_(False)
    weight = model.get_output_embeddings().weight.requires_grad_()  # type: ignore[operator]
    optimizer = torch.optim.SGD([weight], lr=0.1)
    ids = torch.arange(2, 34).reshape(4, 8)
    data = torch.utils.data.DataLoader(ids.repeat(3, 1), batch_size=4)  # type: ignore[arg-type]
    wrapped, optimizer, batches = made.prepare_for_training(model, optimizer, data)
    wrapped.train()
    losses = []
    for _ in range(2):
        batch = next(iter(batches))
        loss = wrapped(input_ids=batch, labels=batch).loss
        made.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    made.save_model(wrapped, out / "saved")
    return losses


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    made = connector()
    reported = scenario(made, folder)
    (folder / f"rank_{made.process_index}.json").write_text(json.dumps(reported))
