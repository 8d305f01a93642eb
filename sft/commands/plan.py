"""Predicts a run's memory, time and disk, on this machine or another, without loading weights."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sft import cli
from sft.config.load import load_config
from sft.config.schema import Config, RunConfig
from sft.errors import ConfigError

if TYPE_CHECKING:
    from sft.runtime.hardware import Hardware


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--gpu", help="plan for these GPUs, not this machine: 'H100-80GB x 8'")
    parser.add_argument("--gib", type=float, help="memory of each GPU, if it has no known name")
    parser.add_argument("--model", help="without a configuration: config.json, folder or hub id")
    parser.add_argument("--tuning", choices=("full", "lora", "qlora"), help="with --model (lora)")
    parser.add_argument("--seq", type=int, help="tokens of each row, with --model (2048)")
    parser.add_argument("--uniform", action="store_true", help="all rows of max_seq_len; no data")
    parser.add_argument("--compare", action="store_true", help="full, LoRA, QLoRA on several GPUs")
    parser.add_argument("--json", type=Path, default=Path("outputs/plan.json"), help="all numbers")


def main(args: Namespace) -> None:
    """Prints the plan and writes its numbers into a JSON file."""
    config = _configuration(args)
    from sft.plan import advice, plan, report
    from sft.runtime.console import make_console
    from sft.tasks.registry import task_of

    machine, world_size = _target(args, config)
    console = make_console()
    numbers: object
    if args.compare and isinstance(config, Config):
        numbers = found = advice.compare_gpus(config)
        console.print(report.comparison_table(found, config.data.max_seq_len))
    else:
        if isinstance(config, Config) and (args.uniform or args.model is not None):
            workload = task_of(config).uniform_workload(config)
        else:
            workload = task_of(config).workload(config)
        made = plan.make_plan(config, workload, machine, world_size)
        console.print(report.plan_table(made))
        console.print(report.memory_table(made))
        advised = advice.advise(config, workload, machine, made)
        console.print(report.advice_table(advised))
        numbers = report.plan_values(made, advised)
    cli.write_json(args.json, numbers)
    console.print(f"all numbers: {args.json}")


def _configuration(args: Namespace) -> RunConfig:
    """Returns the configuration of the file, or the defaults for `--model` alone."""
    from sft.tasks.registry import task_of

    if args.model is None:
        if args.tuning or args.seq:
            instead = 'in a configuration set ARGS="tuning.mode=... data.max_seq_len=..."'
            raise ConfigError(f"TUNING and SEQ describe a MODEL; {instead}")
        config = cli.run_configuration(args)
        task_of(config).refuse_untrainable(config)
        if not isinstance(config, Config) and (args.compare or args.uniform):
            raise ConfigError(
                "COMPARE and UNIFORM are about ways of tuning and rows of text: expected task: "
                f"sft, found task: {config.task}; leave them out"
            )
        return config
    path = Path(args.model)
    name = str(path.parent) if path.name == "config.json" else args.model
    given = [f"model.name={name}", f"tuning.mode={args.tuning or 'lora'}"]
    given += [f"data.max_seq_len={args.seq or 2048}", "data.train_path=none"]
    return load_config(None, [*given, "train.output_dir=none", *args.overrides])


def _target(args: Namespace, config: RunConfig) -> tuple[Hardware, int]:
    """Returns the machine to plan for and how many processes it runs."""
    from sft.plan import gpus
    from sft.runtime import hardware

    machine = hardware.detect()
    if args.gpu is None and args.gib is None:
        return machine, config.train.num_processes or max(1, len(machine.devices))
    if args.compare:
        raise ConfigError("COMPARE has GPUs of its own, a fixed list; leave out GPU and GIB")
    try:
        devices = gpus.named_gpus(args.gpu or "GPU", args.gib)
    except ValueError as error:
        raise ConfigError(f"GPU: {error}") from None
    return replace(machine, devices=devices), len(devices)
