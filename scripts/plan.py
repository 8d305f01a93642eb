"""What a run will take, on this machine or on another, before a weight is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sft import cli
from sft.config import ConfigError, load_config


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--gpu", help="plan for these instead of this machine: 'H100-80GB x 8'")
    parser.add_argument(
        "--gib", type=float, help="memory of each such GPU, if it has no known name"
    )
    parser.add_argument(
        "--model", help="without a configuration: its config.json, folder or hub id"
    )
    parser.add_argument("--tuning", default="lora", choices=("full", "lora", "qlora"))
    parser.add_argument("--seq", type=int, default=2048, help="tokens of each row, with --model")
    parser.add_argument("--compare", action="store_true", help="all ways of tuning on several GPUs")
    parser.add_argument("--json", type=Path, default=Path("outputs/plan.json"), help="all numbers")
    args = parser.parse_intermixed_args()
    if args.model:
        name = str(Path(args.model).parent) if args.model.endswith("config.json") else args.model
        given = [f"model.name={name}", f"tuning.mode={args.tuning}", f"data.max_seq_len={args.seq}"]
        given += ["data.train_path=none", "train.output_dir=none"]
        config = load_config(None, given + args.overrides)
    else:
        config = cli.configuration(args)
    from sft import hardware, plan, prepare
    from sft.log import make_console

    machine = hardware.detect()
    world_size = config.train.num_processes or max(1, len(machine.devices))
    if args.gpu or args.gib:
        try:
            devices = hardware.named_gpus(args.gpu or "GPU", args.gib)
        except ValueError as error:
            raise ConfigError(f"GPU: {error}") from None
        machine, world_size = replace(machine, devices=devices), len(devices)
    console = make_console()
    if args.compare:
        found = plan.comparison(config)
        console.print(plan.comparison_table(found, config.data.max_seq_len))
        report: object = found
    else:
        uniform = args.model is not None
        work = plan.Work.uniform(config) if uniform else plan.Work.of(prepare.prepare(config))
        made = plan.make_plan(config, work, machine, world_size)
        console.print(plan.table(made))
        console.print(plan.memory_table(made))
        advised = plan.advice(config, work, machine, made)
        console.print(plan.advice_table(advised))
        report = plan.report(made, advised)
    try:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"JSON: cannot write {args.json}: {error.strerror}") from None
    console.print(f"all numbers: {args.json}")


if __name__ == "__main__":
    cli.run(main)
