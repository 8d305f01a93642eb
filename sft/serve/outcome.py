"""Measures what a finished run learnt, lost and cost, against its base (docs/VERDICT.md).

An adapter is switched off for the base, so only one model is loaded. After full fine-tuning the
base and the tuned model are loaded one after the other. What the base says is kept in
`data.cache_dir`, under a name made of all that it depends on, and serves all runs on that base.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from sft.config.schema import BASE_ANSWERS, Config
from sft.data import template
from sft.errors import CheckpointError, ExportError, Preempted, UserError
from sft.evaluate import drift, verdict
from sft.evaluate.answers import AnswerModel
from sft.evaluate.compare import compare, describe_verdicts
from sft.evaluate.general import GeneralSet, load_general
from sft.evaluate.scores import Difference
from sft.models import pretrained
from sft.runtime import plain, run_folder
from sft.runtime.console import write_json
from sft.runtime.hardware import resolve_precision
from sft.runtime.log import Log
from sft.runtime.processes import drop_launch_requirements, end_processes, start_processes
from sft.runtime.watchdog import Guard
from sft.serve.runs import load_run_config
from sft.tasks.registry import task_of
from sft.tasks.sft import replay
from sft.tasks.sft.task import FineTune

NAME = "verdict"  # of the files in the run folder, and of the folder with the status


def judge_run(run: Path, overrides: list[str], half: int | None = None) -> verdict.Verdict:
    """Returns the verdict on a finished run, and writes it into the run folder. Collective.

    `half`: the half of the prompts to measure it on; None: all that it was not trained on.
    """
    config = drop_launch_requirements(load_run_config(run, overrides))
    _refuse_others(run, config)
    run_folder.refuse_foreign(run)
    settings = config.evaluation
    general = load_general(settings.general_path, config.data.cache_dir)
    if config.data.replay.path == BASE_ANSWERS:
        half = replay.MEASURED
    if half is not None:
        general = general.half(half)
    out = run / "evaluation" / NAME
    with Guard(out, config.train.stall_timeout, trains=False) as guard:
        if guard.is_first:
            guard.status.begin()
        accelerator = start_processes(config.train)
        guard.join(accelerator, None)
        with closing(Log(out if accelerator.is_main_process else None)) as log:

            def tick() -> None:
                """Raises Preempted if a signal asks this rank to stop; the others follow."""
                guard.tick()
                if guard.flags()[0]:
                    raise Preempted("stopped before the verdict; run the command again")

            base, moved, losses = _measure(run, config, general, accelerator, tick)
            drifts = verdict.judge_drift(drift.summarise(general, moved), settings.max_drift)
            differences, note = _compare_answers(run, config)
            pairs = (base.losses, losses) if losses else None
            lines = verdict.judge_scores(differences, pairs)
            found = {
                "run": str(run),
                "base": config.model.name,
                "learnt": [line for line in lines if line["name"] != verdict.TEXTS],
                "learnt_note": note or describe_verdicts(len(lines)),
                "lost": {
                    "texts": [line for line in lines if line["name"] == verdict.TEXTS],
                    "drift": drifts,
                    "note": _describe_set(general),
                },
                "general": {"name": general.name, "sha256": general.sha256},
                "cost": _read_cost(run),
                "gate": verdict.judge_gate(drifts, settings.max_drift),
            }
            if accelerator.is_main_process:
                _write(run, found)
                for shown in verdict.show(found):
                    log.say(shown)
        accelerator.wait_for_everyone()
    end_processes(accelerator)
    return found


def _refuse_others(run: Path, config: Config) -> None:
    """Raises ExportError for a run that has no single model or no base."""
    if task_of(config) is not FineTune:
        raise ExportError(
            f"{run}: expected a run of one fine-tuned model, found one of several; a verdict "
            "compares one model with its base"
        )
    if config.model.init == "random":
        raise ExportError(
            f"{run}: its model began with random weights (model.init), so there is no base that "
            "it could have lost anything of"
        )


def _measure(
    run: Path,
    config: Config,
    general: GeneralSet,
    accelerator: Accelerator,
    tick: Callable[[], None],
) -> tuple[drift.Base, list[drift.Moved], list[float]]:
    """Returns what the base says, how far the tuned model moved, and its losses on the texts."""
    tokenizer = _load_tokenizer(run, config)
    path = replay.base_path(config, tokenizer, general, accelerator.device)
    base = drift.read_base(path)
    if not all(gather_object([base is not None])):
        base = None
    if config.tuning.mode != "full":
        tuned: Any = _load_tuned(run, config, accelerator)
        if base is None:
            with tuned.model.disable_adapter():
                base = drift.measure_base(tuned, general, accelerator, tick)
            _keep(path, base, accelerator)
        return base, *drift.measure_tuned(tuned, base, general, accelerator, tick)
    if base is None:
        with replay.open_base(config, tokenizer, accelerator.device) as untrained:
            base = drift.measure_base(untrained, general, accelerator, tick)
        _keep(path, base, accelerator)
    tuned = _load_tuned(run, config, accelerator)
    return base, *drift.measure_tuned(tuned, base, general, accelerator, tick)


def _load_tokenizer(run: Path, config: Config) -> Any:
    own = {"name": str(run / "final_checkpoint"), "revision": None, "new_tokens": None}
    return template.prepare_tokenizer(
        pretrained.load_tokenizer(config.model.model_copy(update=own))
    )


def _load_tuned(run: Path, config: Config, accelerator: Accelerator) -> AnswerModel:
    precision, _ = resolve_precision(config.train)
    folder = run / "final_checkpoint"
    model, tokenizer = FineTune.load_saved(folder, config, precision, accelerator.device)
    return replay.answer_model(model, tokenizer)


def _keep(path: Path, base: drift.Base, accelerator: Accelerator) -> None:
    """Writes what the base says for other runs; without room it is computed again next time."""
    if accelerator.is_main_process:
        with suppress(OSError):
            drift.write_base(path, base)


def _describe_set(general: GeneralSet) -> str:
    prompts = f"{len(general.prompts):,} prompts of {general.name} ({general.sha256[:12]})"
    return f"{prompts}, intervals over prompts; agreement: the same most likely token"


def _compare_answers(run: Path, config: Config) -> tuple[dict[str, Difference], str]:
    """Returns the differences in the scores of base and tuned model, or why there are none."""
    base, tuned = (run / "evaluation" / name for name in ("base.jsonl", "predictions.jsonl"))
    settings = config.evaluation
    for path in (base, tuned):
        if not path.is_file() or not path.stat().st_size:
            return {}, f"no scored answers: {path} is missing or empty (evaluation.num_examples)"
    try:
        return compare(base, tuned, settings.metrics, settings.labels or ()).differences, ""
    except UserError as error:
        return {}, f"answers are not compared: {error}"


def _read_cost(run: Path) -> list[tuple[str, str]]:
    steps = []
    with suppress(OSError):
        lines = (run / run_folder.METRICS).read_text("utf-8", "replace").splitlines()
        for line in lines:
            with suppress(ValueError):
                steps.append(json.loads(line))
    return verdict.cost_rows(plain.read_json(run / "plan.json"), steps)


def _write(run: Path, found: verdict.Verdict) -> None:
    try:
        write_json(run / f"{NAME}.json", found)
        plain.write_text(run / f"{NAME}.html", verdict.write_html(found))
        plain.write_text(run / f"{NAME}.svg", verdict.draw(found))
    except OSError as error:
        raise CheckpointError(f"cannot write {run}/{NAME}.*: {error.strerror}") from None
