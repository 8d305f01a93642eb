"""The peer of benchmarks/throughput.py: one epoch of TRL's SFTTrainer, in its own environment.

python benchmarks/trl_worker.py job.json     # its last line is the result, as JSON
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in Path(job["train"]).read_text("utf-8").splitlines()]
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
            **job["arguments"],
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.0, **job["lora"]
        ),
    )
    examples = list(trainer.train_dataset)
    ids = torch.tensor([examples[0]["input_ids"]], device=trainer.model.device)
    trainer.model(input_ids=ids, labels=ids).loss.backward()  # warm, as ours is after its probe
    trainer.model.zero_grad()
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(job["adapter"])
    result = {
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "tokens": sum(len(example["input_ids"]) for example in examples),
        "supervised": sum(label != -100 for e in examples for label in e["labels"][1:]),
        "versions": {name: version(name) for name in ("trl", "transformers", "peft", "torch")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
