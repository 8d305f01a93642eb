"""Verbs for a model or a finished run: evaluate, benchmark, compare, classify, infer, merge ..."""

from __future__ import annotations

import os
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from sft import cli
from sft.config.load import parse_benchmark, parse_generation
from sft.config.schema import Config, Train
from sft.errors import ExitCode, UserError, require_extra
from sft.runtime import launcher
from sft.runtime.console import make_console
from sft.runtime.output import show


def evaluate_options(parser: cli.Parser) -> None:
    parser.add_argument("--run", type=Path, default=Path("outputs/nano"), help="folder of the run")
    parser.add_argument("--name", default="evaluate", help="results go to <run>/evaluation/<name>")
    add_engine_options(parser)
    parser.add_overrides("section")


def evaluate(args: Namespace) -> int | None:
    """Prints held-out loss and scores, and saves them in the run folder; returns the exit code."""
    refuse_ranks(args.engine)
    if launcher.has_ranks_to_start():
        return launcher.launch_self(args.run / "evaluation" / args.name)
    from sft import run

    run.evaluate_run(args.run, args.name, args.overrides, args.engine, args.vllm_args)
    return None


def verdict_options(parser: cli.Parser) -> None:
    parser.add_argument("--run", type=Path, default=Path("outputs/nano"), help="folder of the run")
    parser.add_overrides("section")


def verdict(args: Namespace) -> int:
    """Prints what a run learnt, lost and cost; returns 8 if its drift exceeds the limit."""
    if launcher.has_ranks_to_start():
        return launcher.launch_self(args.run / "evaluation" / args.verb)
    from sft.serve import outcome

    gate = outcome.judge_run(args.run, args.overrides)["gate"]
    return ExitCode.OVER_LIMIT if gate and not gate["open"] else ExitCode.FINISHED


def benchmark_options(parser: cli.Parser) -> None:
    add_model_options(parser)
    parser.add_argument("--tasks", default="", help="names, or paths of YAML files or folders")
    parser.add_argument("--output", type=Path, help="default: <run>/evaluation/benchmark")
    parser.add_overrides("benchmark")


def benchmark(args: Namespace) -> int | None:
    """Runs tasks of lm-eval on a model, and prints and writes their scores."""
    require_extra("benchmark", "make benchmark", ["lm_eval"])
    settings = parse_benchmark(args.overrides)
    # Before lm-eval is imported: its own bars would stand between the lines of the ranks.
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if not args.tasks.strip(", "):
        raise UserError('TASKS: required: TASKS="arc_easy my/task.yaml" (docs/BENCHMARK.md)')
    from sft.evaluate.benchmarks import output_folder

    folder = output_folder(args.model, args.output)
    if launcher.has_ranks_to_start():
        return launcher.launch_self(folder)
    from sft.serve.benchmark import results

    results.benchmark(connector_arguments(args), folder, args.tasks, settings)
    return None


def compare_options(parser: cli.Parser) -> None:
    description = "folder of a run, or its predictions.jsonl"
    parser.add_argument("--a", type=Path, required=True, help=description)
    parser.add_argument("--b", type=Path, required=True, help=description)
    parser.add_argument("--metric", help="'rouge_l,bleu' (default: evaluation.metrics of the runs)")
    parser.add_argument("--show", type=int, default=5, help="examples shown side by side")
    parser.add_argument("--json", type=Path, help="where to write everything")


def compare(args: Namespace) -> None:
    """Prints the differences of two runs, and examples that score differently.

    If both have results of benchmarks, prints their differences as well.
    """
    from sft.evaluate import benchmarks, compare

    console, written = make_console(), {}
    folders = [benchmarks.find_folder(path) for path in (args.a, args.b)]
    has_answers = None in folders or all(map(compare.has_answers, (args.a, args.b)))
    if args.metric and not has_answers:
        raise UserError("METRIC: is only read for answers to held-out rows; A and B have none")
    if None not in folders:
        try:
            written["benchmark"] = _compare_benchmarks(*(f for f in folders if f))
        except UserError as error:
            if not has_answers:
                raise
            console.print(f"benchmarks are not compared: {error}", markup=False)
    if has_answers:
        metrics, labels = compare.agreed_metrics(args.a, args.b)
        if args.metric:
            metrics = args.metric.replace(",", " ").split()
        found = compare.compare(args.a, args.b, metrics, labels)
        title = f"B against A on {found.num_examples:,} examples"
        console.print(compare.difference_table(title, found.differences, "A", "B"))
        console.print(compare.wins_table(found))
        if note := compare.describe_engines(args.a, args.b):
            console.print(note)
        if found.differing and args.show > 0:
            console.print(compare.examples_table(found, args.show))
        written |= compare.comparison_json(found)
    if args.json:
        cli.write_json(args.json, written)
        console.print(f"the whole comparison: {args.json}")


def _compare_benchmarks(a: Path, b: Path) -> dict[str, Any]:
    """Prints the differences of two results of benchmarks, and returns them as JSON."""
    from sft.evaluate import benchmarks, compare

    found, console = benchmarks.compare_benchmarks(a, b), make_console()
    title = f"Benchmarks: B against A on {found.num_examples:,} examples"
    console.print(compare.difference_table(title, found.differences, "A", "B"))
    for note in found.notes:
        console.print(note, markup=False)
    return found.as_json()


def classify_options(parser: cli.Parser) -> None:
    parser.add_argument("--model", help="in place of model.name")
    parser.add_argument("--run", type=Path, help="folder of the run that tuned the model")
    parser.add_argument("--tune", action="store_true", help="fine-tune, classify again, compare")
    add_engine_options(parser)


def classify(args: Namespace) -> int:
    """Asks a model for labels; with `--tune`, also trains it and classifies with the result."""
    args.overrides += [f"model.name={args.model}"] if args.model else []
    config = cli.configuration(args)
    refuse_ranks(args.engine)
    from sft.serve.classify import rows

    rows.check_section(config, tune=args.tune)
    if args.tune and args.run:
        raise UserError("give TUNE=1 or RUN, not both: the model of RUN is already tuned")
    if launcher.has_ranks_to_start():
        # Reads the rows before the ranks do, so that an error in them is reported once.
        rows.split_parts(rows.read_examples(config.classify), config.classify)
        return _launch_classify(config, args)
    if args.tune and "WORLD_SIZE" in os.environ:
        raise UserError("TUNE=1 starts its processes itself: give NUM_PROCESSES, no launcher")
    if args.tune and config.train.engine != "ddp":
        raise UserError(
            f"TUNE=1 with train.engine={config.train.engine}: expected NUM_PROCESSES=2 or more, or "
            "train.engine=ddp, the only engine that a process can use after it has classified"
        )
    from sft.serve.classify import strategies

    engine = {"engine": args.engine, "vllm_args": args.vllm_args}
    strategies.classify(config, args.run, engine)
    if args.tune:
        from sft import run
        from sft.verify import share

        run.train(share.with_share(config))
        strategies.classify(config, Path(config.train.output_dir), engine)
    return 0


def _launch_classify(config: Config, args: Namespace) -> int:
    """Launches classification and, with `--tune`, training and a second classification.

    Returns the exit code of the first of them that fails, or 0.
    """
    options = ["--config", args.config, *args.overrides]
    engine = ["--engine", args.engine, f"--vllm-args={args.vllm_args}"]

    def launch_for(run: Path | None) -> int:
        folder = run / "classify" if run else Path(config.classify.output_dir)
        program = ["-m", "sft", args.verb, *options, *(["--run", str(run)] if run else []), *engine]
        return launcher.launch(Train(output_dir=str(folder)), program)

    code = launch_for(args.run)
    if args.tune:
        training = ["-m", "sft", "train", *options]
        code = code or launcher.launch(config.train, training, trains=True)
        code = code or launch_for(Path(config.train.output_dir))
    return code


def add_engine_options(parser: cli.Parser) -> None:
    """Adds the options that choose what writes answers."""
    choices, text = ["own", "vllm", "auto"], "auto: vllm, where it gives the same"
    parser.add_argument("--engine", choices=choices, default="own", help=text)
    add_vllm_args(parser)


def add_vllm_args(parser: cli.Parser) -> None:
    parser.add_argument("--vllm-args", default="", help="options of `vllm serve`, in one text")


def refuse_ranks(engine: str) -> None:
    """Raises UserError if vLLM is to answer and this program is to start several processes."""
    if engine == "vllm" and launcher.has_ranks_to_start():
        raise UserError(
            "NUM_PROCESSES with ENGINE=vllm: vLLM has processes of its own; leave NUM_PROCESSES "
            'out, and give VLLM_ARGS="--tensor-parallel-size 2" for two GPUs'
        )


def add_model_options(parser: cli.Parser) -> None:
    """Adds the options that name a model and set how it answers."""
    parser.add_argument("--model", default="outputs/nano", help="run, checkpoint, model or hub id")
    parser.add_argument("--adapter", help="folder of a LoRA adapter for the model")
    parser.add_argument("--quantization", choices=["nf4"], help="of the frozen weights")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    parser.add_argument("--batch-size", default="auto", help="prompts at once")
    parser.add_argument("--cache-dir", help="where a hub id is downloaded to")
    parser.add_overrides("generation")


def connector_arguments(args: Namespace) -> dict[str, Any]:
    """Returns the options of `add_model_options` as arguments of AccelerateConnector."""
    size = args.batch_size
    return {
        "model_name": args.model,
        "adapter": args.adapter,
        "quantization": args.quantization,
        "mixed_precision": args.precision,
        "batch_size": int(size) if size.isdecimal() else size,
        "cache_dir": args.cache_dir,
    }


def infer_options(parser: cli.Parser) -> None:
    add_model_options(parser)
    parser.add_argument("--prompt", help="answer this and stop")
    parser.add_argument("--system", help="system prompt")


def infer(args: Namespace) -> None:
    """Answers `--prompt`, or whatever is typed until /quit or Ctrl-D."""
    settings = parse_generation(args.overrides).model_dump()
    from sft.runtime import processes
    from sft.serve import chat
    from sft.serve.connector import AccelerateConnector

    if not processes.keep_first_process():  # only one process can read what is typed
        return
    if args.prompt == "":
        raise UserError('PROMPT is empty; ask something, as in PROMPT="set a timer"')
    connector = AccelerateConnector(**connector_arguments(args))
    connector.load_model_once()
    write = partial(show, end="")
    conversation = chat.Conversation(connector, write, args.system, **settings)
    if args.prompt is not None:
        conversation.ask(args.prompt)
        return
    show(f"{connector.model_name}: say something; /help lists commands, /quit or Ctrl-D ends")
    chat.converse(conversation)


def infer_batch_options(parser: cli.Parser) -> None:
    add_model_options(parser)
    parser.add_argument("--input", required=True, help="file, folder, glob or hub id of prompts")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to be written")
    add_engine_options(parser)


def infer_batch(args: Namespace) -> int:
    """Writes the answers to `--output`; continues what an earlier attempt began."""
    settings = parse_generation(args.overrides).model_dump()
    for name, value in (("INPUT", args.input), ("OUTPUT", args.output.name)):
        if not value:
            raise UserError(f"{name}: required: INPUT=rows.jsonl OUTPUT=answers.jsonl")
    refuse_ranks(args.engine)
    folder = args.output.with_name(f"{args.output.name}.run")  # has the status while this runs
    code = 0
    if launcher.has_ranks_to_start():
        code = launcher.launch_self(folder)
    else:
        from sft.serve import chat

        model = {**connector_arguments(args), "engine": args.engine, "vllm_args": args.vllm_args}
        chat.answer_file(args.input, args.output, folder, model, settings)
    if code == 0 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        from sft.runtime.attempt import remove_record

        remove_record(folder)
    return code


def merge_options(parser: cli.Parser) -> None:
    parser.add_argument("--run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="default: <run>/merged")
    parser.add_argument("--test", type=Path, metavar="FOLDER", help="only prove this merged model")
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="bf16")
    parser.add_argument("--base", choices=["original", "dequantised"], help="weights to merge into")
    parser.add_argument("--gguf", type=Path, help="folder of llama.cpp: make a GGUF file as well")
    parser.add_argument("--gguf-pre", help="llama.cpp's name of the rules that split text")
    parser.add_overrides("section")


def merge(args: Namespace) -> None:
    """Merges a run, or with `--test` only proves a merged model; with `--gguf` converts it too."""
    if args.verb == "merge-test" and args.test is None:
        raise UserError("MERGED: required: MERGED=folder (with the command `sft`: --test FOLDER)")
    from sft.serve import merge

    say = make_console().print
    if args.gguf_pre and not args.gguf:
        raise UserError("GGUF_PRE: is only read with GGUF=llama.cpp")
    if args.gguf:
        merge.find_converter(args.gguf)
    if args.test:
        folder = args.test
        report = merge.retest(folder, say, args.run, args.base, args.overrides)
    else:
        run = args.run or Path("outputs/nano")
        folder = args.output or run / "merged"
        base = args.base or "original"
        report = merge.merge(run, folder, args.dtype, say, base, args.overrides)
    say(f"merged model, proven to be the one that was trained: {folder}")
    if args.gguf:
        made = merge.convert_to_gguf(folder, report["dtype"], args.gguf, args.gguf_pre)
        say(f"GGUF: {made}")
        say(merge.describe_for_ollama(made))
