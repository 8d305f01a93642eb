"""Verbs before a run: `plan` predicts it, `check` tries it, `verify-*` prove a law on it."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft import api, cli
from sft.config.load import load_config, with_values
from sft.config.schema import Config, RunConfig
from sft.errors import ConfigError
from sft.runtime import hardware
from sft.runtime.console import make_console
from sft.tasks.registry import task_of


def plan_options(parser: cli.Parser) -> None:
    parser.add_argument("--gpu", help="plan for these GPUs, not this machine: 'H100-80GB x 8'")
    parser.add_argument("--gib", type=float, help="memory of each GPU, if it has no known name")
    parser.add_argument("--model", help="without a configuration: config.json, folder or hub id")
    parser.add_argument("--tuning", choices=("full", "lora", "qlora"), help="with --model (lora)")
    parser.add_argument("--seq", type=int, help="tokens of each row, with --model (2048)")
    parser.add_argument("--uniform", action="store_true", help="all rows of max_seq_len; no data")
    parser.add_argument("--compare", action="store_true", help="full, LoRA, QLoRA on several GPUs")
    parser.add_argument("--cost-per-hour", type=float, help="price of one GPU: prints the cost")
    parser.add_argument("--link", type=float, help="GB/s that a GPU sends: prints network time")
    parser.add_argument("--json", type=Path, default=Path("outputs/plan.json"), help="all numbers")


def plan(args: Namespace) -> None:
    """Prints the plan of a run, for which no weights are loaded, and writes its numbers as JSON."""
    config = _configuration(args)
    from sft.plan import advice, coverage, layouts, plan, report

    console = make_console()
    numbers: Any
    if args.compare and isinstance(config, Config):
        numbers = found = advice.compare_gpus(config)
        console.print(report.comparison_table(found, config.data.max_seq_len))
    else:
        machine, world_size = api.planned_machine(config, args.gpu, args.gib)
        if isinstance(config, Config) and (args.uniform or args.model is not None):
            workload = task_of(config).uniform_workload(config)
        else:
            workload = task_of(config).workload(config)
        asked, stated = args.model is not None, config.train.model_fields_set
        tried: list[plan.Plan] = []
        if asked and world_size > 1 and "engine" not in stated:
            open_keys = (config, workload, machine, world_size, frozenset(stated), args.link)
            made, tried = layouts.choose_layout(layouts.Question(*open_keys), console)
            console.print(report.layouts_table(tried))
            config = with_values(config, made.layout)
        else:
            made = plan.make_plan(config, workload, machine, world_size, asked)
        made = replace(made, cost_per_hour=args.cost_per_hour, link=args.link)
        console.print(report.plan_table(made))
        console.print(report.memory_table(made))
        advised = advice.advise(config, workload, machine, made, console)
        console.print(report.advice_table(advised))
        numbers = report.plan_values(made, advised) | {"layouts": layouts.layout_values(tried)}
        if covered := coverage.cover(config):
            console.print(coverage.coverage_table(covered))
            numbers |= {"coverage": coverage.coverage_values(covered)}
            covered.refuse_contradictions()
    cli.write_json(args.json, numbers)
    console.print(f"all numbers: {args.json}")


def _configuration(args: Namespace) -> RunConfig:
    """Returns the configuration of the file, or the defaults for `--model` alone."""
    if args.compare and not (args.gpu is None and args.gib is None):
        raise ConfigError("COMPARE has GPUs of its own, a fixed list; leave out GPU and GIB")
    if args.cost_per_hour is not None and (args.compare or not 0 <= args.cost_per_hour < math.inf):
        raise ConfigError(
            "COST_PER_HOUR is the price of one GPU in a plan: expected a number of at least 0, and "
            f"no COMPARE, found {args.cost_per_hour:g}"
        )
    if args.link is not None and (args.compare or not 0 < args.link < math.inf):
        raise ConfigError(
            "LINK is what a GPU sends to others, in GB/s: expected a number above 0 (LINK=50 for "
            f"400 Gbit/s), and no COMPARE, found {args.link:g}"
        )
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


def check(args: Namespace) -> int:
    """Tries everything that a configuration needs. Returns 2 if something is not ok."""
    from sft import check

    return 0 if check.run(cli.config_file(args), args.overrides) else 2


def verify_options(parser: cli.Parser) -> None:
    parser.add_argument("--law", choices=("resume", "invariance"), required=True)
    parser.add_argument("--num-processes", type=int, help="default: as configured, or by devices")


def verify(args: Namespace) -> None:
    """Proves a law on a configuration whose model is made small, and prints a table.

    Raises VerificationError if the law does not hold.
    """
    config = cli.run_configuration(args)
    from sft.verify import laws

    if args.law == "resume":
        world = args.num_processes or config.train.num_processes or 1
        laws.verify_resume(config, world, make_console())
    else:
        world = args.num_processes or hardware.default_num_processes(hardware.detect())
        laws.verify_invariance(config, world, make_console())
