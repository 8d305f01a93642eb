"""Runs tasks of lm-eval on a model, and writes their scores (`make benchmark`).

lm-eval's `simple_evaluate` builds the prompts and computes the scores. Every rank runs it up to the
last response; then the first rank goes on alone. It writes lm-eval's own results, and from the
scores of the examples those with intervals that `make compare` reads.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from lm_eval import __version__ as LM_EVAL
from lm_eval.api import metrics as known_metrics
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.utils import handle_non_serializable
from rich.table import Table

from sft.config.benchmark import Benchmark
from sft.data.formats import UNRENDERED
from sft.errors import CheckpointError, DataError, UserError
from sft.evaluate.benchmarks import (
    METRICS,
    PREDICTIONS,
    Score,
    Statistics,
    make_interval,
    scores_table,
)
from sft.evaluate.intervals import Z
from sft.evaluate.predictions import Record, key_of, to_line
from sft.runtime import plain
from sft.runtime.console import atomic_write, facts, write_json
from sft.serve.benchmark.harness import Harness
from sft.serve.benchmark.tasks import Tasks, gen_kwargs_of
from sft.serve.chat import guarded_model

RESULTS = "results.json"  # as lm-eval writes it
RESPONSES = "responses"  # folder with what the model has said, from which a stopped run continues
KINDS = {  # of lm-eval's aggregations; all others: `other`
    known_metrics.mean: "mean",
    known_metrics.nanmean: "mean",
    known_metrics.perplexity: "perplexity",
    known_metrics.weighted_perplexity: "perplexity",
    known_metrics.bits_per_byte: "bits",
}


class _Answered(Exception):
    """Ends lm-eval on a rank that has answered its share, and leaves the scores to the first."""


def asks_by_template(model: str) -> bool:
    """Returns whether `model` is a run, or a part of one, that was trained on conversations."""
    folder = Path(model)
    run = next((f for f in (folder, *folder.parents[:3]) if (f / "config.yaml").is_file()), None)
    if run is None:
        return False
    formats = plain.read_json(run / "audit.json").get("formats")
    return not formats or not {*formats} <= {*UNRENDERED}


def benchmark(
    model: Mapping[str, Any], folder: Path, tasks: str, settings: Benchmark
) -> dict[str, Score]:
    """Returns the scores of a model in tasks, and writes them into `folder`. Collective.

    `model`: arguments of AccelerateConnector. `tasks`: names and paths, as TASKS has them.
    Ranks other than the first return no scores.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    is_chat = settings.apply_chat_template
    if is_chat is None:
        is_chat = asks_by_template(str(model["model_name"]))
    as_turns = is_chat if settings.fewshot_as_multiturn is None else settings.fewshot_as_multiturn
    if as_turns and not is_chat:
        raise UserError("benchmark.fewshot_as_multiturn: needs benchmark.apply_chat_template=true")
    if settings.limit is not None and settings.samples is not None:
        raise UserError("benchmark.limit and benchmark.samples: give one of them")
    found = Tasks(tasks, settings)
    found.load(found.names)  # before the model, so that a wrong name is reported at once
    with guarded_model(folder, dict(model), folder) as (connector, _):
        harness = Harness(
            connector,
            folder / RESPONSES,
            is_chat=is_chat,
            max_length=settings.max_length,
            seed=settings.seed or 0,
        )
        results = _evaluate(harness, found, settings, is_chat=is_chat, as_turns=as_turns)
        if results is None:
            return {}
        samples = results.pop("samples")
        rows = _collect_statistics(samples)
        scores = _make_scores(results, rows, found)
        values = {
            "model": str(model["model_name"]),
            "lm_eval": LM_EVAL,
            "precision": connector.precision,
            "apply_chat_template": is_chat,
            "fewshot_as_multiturn": as_turns,
            "system_instruction": settings.system_instruction,
            "gen_kwargs": gen_kwargs_of(settings),
            "limit": settings.limit,
            "seed": settings.seed,
            "max_length": harness.max_length,
            "prompts_cut": dict(harness.num_cut),
            "num_examples": sum(map(len, rows.values())),
            "metrics": {name: score.value for name, score in scores.items()},
            "intervals": {name: each.interval for name, each in scores.items() if each.interval},
            "tasks": {name: _describe(name, results) for name in samples},
            "scores": {name: vars(score) for name, score in scores.items()},
        }
        _write(folder, results, values, _records(samples, rows, settings.log_samples))
        for shown in _show(folder, values, scores, found, harness):
            connector.log.say(shown)
    return scores


def _write(
    folder: Path, results: Mapping[str, Any], values: Mapping[str, Any], records: Iterator[Record]
) -> None:
    try:
        text = json.dumps(results, default=handle_non_serializable)
        write_json(folder / RESULTS, json.loads(text))
        with atomic_write(folder / PREDICTIONS, follow=False) as file:
            for index, record in enumerate(records):
                file.write(to_line({"index": index, **record}))
        write_json(folder / METRICS, values)  # last: `make compare` looks for it
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror}") from None


def _evaluate(
    harness: Harness, tasks: Tasks, settings: Benchmark, *, is_chat: bool, as_turns: bool
) -> dict[str, Any] | None:
    """Returns lm-eval's results, with samples, on the first rank; None on others. Collective."""
    seeds: dict[str, Any] = {}
    if settings.seed is not None:
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        seeds = dict.fromkeys(names, settings.seed)
    is_first = harness.connector.is_main_process
    if not is_first:
        for task in tasks.loaded.values():
            task.apply_filters = _leave  # after the last response
    try:
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of resamples: no forks beside threads
        with redirect_stdout(sys.stderr):  # what lm-eval and code of tasks print
            return simple_evaluate(
                model=harness,
                tasks=tasks.names,
                task_manager=tasks,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                samples=settings.samples,
                bootstrap_iters=settings.bootstrap_iters,
                log_samples=True,
                system_instruction=settings.system_instruction,
                apply_chat_template=is_chat,
                fewshot_as_multiturn=as_turns,
                gen_kwargs=gen_kwargs_of(settings),
                confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
                metadata=settings.metadata,
                **seeds,
            )
    except _Answered:
        return None
    except UserError:
        raise
    except (jinja2.TemplateError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"lm-eval cannot run {', '.join(tasks.loaded)}: {reason}") from error


def _leave(*_: Any) -> NoReturn:
    raise _Answered


# --- scores --------------------------------------------------------------------------------------


def _name(metric: str, filtered_by: str) -> str:
    return metric if filtered_by == "none" else f"{metric}/{filtered_by}"


def _collect_statistics(samples: Mapping[str, Any]) -> dict[str, dict[int, dict[str, Statistics]]]:
    """Returns {task: {number of the example: {metric: statistics}}}, where they are numbers."""
    found: dict[str, dict[int, dict[str, Statistics]]] = {}
    for task, lines in samples.items():
        rows: dict[int, dict[str, Statistics]] = defaultdict(dict)
        for line in lines:
            own = rows[line["doc_id"]]
            for metric in line["metrics"]:
                value = line[metric]
                parts = value if isinstance(value, tuple | list) else [value]
                try:
                    own[_name(metric, line["filter"])] = [float(part) for part in parts]
                except (TypeError, ValueError):
                    continue  # texts, for a metric of all examples together
        found[task] = dict(sorted(rows.items()))
    return found


def _make_scores(
    results: Mapping[str, Any], rows: Mapping[str, Any], tasks: Tasks
) -> dict[str, Score]:
    """Returns the scores of tasks and groups, with lm-eval's values."""
    scores: dict[str, Score] = {}
    for name, task in tasks.loaded.items():
        higher = results["higher_is_better"].get(name, {})
        for metric, shown, value, error in _values_of(results["results"][name]):
            statistics = [own[shown] for own in rows[name].values() if shown in own]
            kind = KINDS.get(_aggregation(task, metric), "other")
            most = 1 if kind == "mean" else 2
            if len(statistics) < len(rows[name]) or max(map(len, statistics)) > most:
                kind = "other"  # some examples do not have it, or in another form
            interval = make_interval(kind, {name: statistics}, {name: 1.0})
            if kind == "other" and error is not None:
                interval = value - Z * error, value + Z * error
            is_higher = higher.get(metric) is not False
            num, weights = len(rows[name]), {name: 1.0}
            scores[f"{name}/{shown}"] = Score(value, interval, kind, is_higher, num, shown, weights)
    for name, group in tasks.groups.items():
        by_size = {each.metric: each.weight_by_size for each in group.aggregate_metric_list or []}
        parts = [task.task_name for task in group.get_all_tasks()]
        for metric, shown, value, _ in _values_of(results["results"][name]):
            own = {part: scores[f"{part}/{shown}"] for part in parts if f"{part}/{shown}" in scores}
            if own:
                scores[f"{name}/{shown}"] = _join(own, value, rows, by_size.get(metric, True))
    return scores


def _join(own: Mapping[str, Score], value: float, rows: Mapping[str, Any], by_size: bool) -> Score:
    """Returns the score of a group from those of its tasks, with lm-eval's value."""
    sizes = {task: score.num_examples if by_size else 1 for task, score in own.items()}
    weights = {task: size / sum(sizes.values()) for task, size in sizes.items()}
    expected = sum(weights[task] * score.value for task, score in own.items())
    is_mean = all(score.kind == "mean" for score in own.values())
    kind = "mean" if is_mean and math.isclose(expected, value) else "other"
    (shown,) = {score.metric for score in own.values()}
    statistics = {task: [each[shown] for each in rows[task].values()] for task in own}
    return Score(
        value,
        make_interval(kind, statistics, weights),
        kind,
        all(score.higher_is_better for score in own.values()),
        sum(score.num_examples for score in own.values()),
        shown,
        weights,
    )


def _values_of(found: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """Yields (metric, its name with the filter, value, standard error) of a task or group."""
    for key, value in found.items():
        metric, comma, filtered_by = key.partition(",")
        if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
            error = found.get(f"{metric}_stderr,{filtered_by}")
            if not isinstance(error, int | float) or not math.isfinite(error):
                error = None  # lm-eval has N/A
            yield metric, _name(metric, filtered_by), float(value), error


def _aggregation(task: Task, metric: str) -> Any:
    """Returns what lm-eval computes a metric with; the mean, if the task does not say."""
    return task.aggregation().get(metric, known_metrics.mean)


def _describe(task: str, results: Mapping[str, Any]) -> dict[str, Any]:
    counted = results["n-samples"][task]
    return {
        "version": results["versions"].get(task),
        "num_fewshot": results["n-shot"].get(task),
        "num_examples": counted["effective"],
        "num_available": counted["original"],
    }


def _records(
    samples: Mapping[str, Any], rows: Mapping[str, Any], has_texts: bool
) -> Iterator[Record]:
    """Yields the records of predictions.jsonl: one for each example of each task."""
    for task, lines in samples.items():
        by_example = {line["doc_id"]: line for line in reversed(lines)}  # the first filter
        for number, line in sorted(by_example.items()):
            record: Record = {
                "key": key_of(task, number, line["doc_hash"], line["target_hash"]),
                "row": f"{task}:{number}",
                "task": task,
                "scores": rows[task][number],
            }
            if has_texts:
                record |= {
                    "prompt": str(line["arguments"][0][0]),
                    "reference": str(line["target"]),
                    "answer": _answer(line),
                }
            yield record


def _answer(line: Mapping[str, Any]) -> str:
    """Returns what the model answered: its text, its most likely choice, or a log likelihood."""
    responses = line["filtered_resps"]
    if len(responses) == 1:
        first = responses[0]
        return str(first[0] if isinstance(first, tuple | list) and first else first)
    likelihoods = [float(each[0]) for each in responses]
    return str(line["arguments"][likelihoods.index(max(likelihoods))][1])


def _show(
    folder: Path,
    values: Mapping[str, Any],
    scores: Mapping[str, Score],
    tasks: Tasks,
    harness: Harness,
) -> Iterator[Table | str]:
    """Yields the table of scores, and what to know about them."""
    settings, described = tasks.settings, values["tasks"]
    shots = sorted({each["num_fewshot"] for each in described.values()})
    used = sum(each["num_examples"] for each in described.values())
    available = sum(each["num_available"] for each in described.values())
    rows = [
        ("model", f"{values['model']} in {values['precision']}"),
        (
            "asked",
            ("by the chat template" if values["apply_chat_template"] else "as plain text")
            + f", {' or '.join(map(str, shots))} solved examples",
        ),
        ("examples", f"{used:,} of {available:,}"),
        ("processes", str(harness.connector.num_processes)),
        ("results", f"{folder}/ ({METRICS}, {PREDICTIONS}, {RESULTS})"),
    ]
    if num_cut := harness.num_cut.total():
        limit = f"{harness.max_length:,} tokens"
        rows.insert(3, ("cut", f"{num_cut:,} prompts lost their beginning: longer than {limit}"))
    if settings.num_fewshot is not None and (
        kept := [n for n, each in described.items() if each["num_fewshot"] != settings.num_fewshot]
    ):
        rows.insert(3, ("kept", f"{', '.join(kept)}: the task says num_fewshot: 0, which stays"))
    yield facts("Benchmark", rows)
    note = f"lm-eval {LM_EVAL}; intervals over examples"
    yield scores_table("Scores", scores, note)
