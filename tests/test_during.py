"""While it trains: scored answers, early stopping and intervals. None changes a bit."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import forked
import numpy as np
import parallel_worker
import pytest
import tiny
from pydantic import ValidationError
from scipy.stats import ttest_1samp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft.config.load import with_values
from sft.config.schema import EarlyStopping, Train
from sft.errors import ConfigError, UserError
from sft.evaluate.intervals import difference_of_ratios
from sft.evaluate.scores import Tally, compare_tallies
from sft.runtime.log import Log
from sft.tasks.distill.config import DistillConfig
from sft.tasks.registry import task_of
from sft.train.early_stopping import Stopper
from sft.train.schedule import is_due

METRICS = ["evaluation.metrics=[exact_match, chrf]", "evaluation.max_new_tokens=6"]
DURING = ["train.eval_steps=2", "evaluation.during=5", *METRICS]
ANSWERS = "evaluation/during/*.jsonl"
KINDS = {  # DeepSpeed comes last: no other engine follows it in a process
    "ddp": [],
    "crowd": ["crowd.num_agents=2", "tuning.r=2"],
    "fsdp": ["train.engine=fsdp"],
    "zero3": ["train.engine=deepspeed", "train.deepspeed_config=configs/deepspeed_z3.json"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return f"model.name={tiny.shallow_nano(tmp_path_factory.mktemp('base'))}"


def case(base: str, *overrides: str, **given: Any) -> dict[str, Any]:
    """Six steps of four rows each; eight other rows are held out, and an epoch has four steps."""
    own = [base, "tuning.mode=lora", "tuning.lora_dropout=0.1", "train.precision=fp32"]
    own += ["data.max_rows=24", "data.eval_path=null", "data.eval_fraction=0.334"]
    own += ["train.global_batch=4", "train.max_steps=6", "train.learning_rate=3e-3"]
    return {"max_tokens": 400, "overrides": [*own, *overrides]} | given


def make(base: str, folder: Path, *overrides: str) -> Any:
    return parallel_worker.make(case(base, *overrides), folder)


def train(base: str, folder: Path, *overrides: str, resume: Path | None = None) -> Any:
    """Trains in this process; the engine that returns has `logged` [(step, metrics)]."""
    made = make(base, folder, *overrides)
    made.logged = []
    evaluate = made.evaluate

    def noted() -> dict[str, float]:
        made.logged.append((made.step, evaluate()))
        return made.logged[-1][1]

    made.evaluate = noted
    if resume:
        made.resume(resume)
    made.log = made.task.log = Log(folder, tensorboard=True)
    with closing(made.log):
        made.run()
    return made


def test_answers_change_no_bit_and_a_resumed_run_scores_the_same(base, tmp_path):
    plain = train(base, tmp_path / "plain", "train.eval_steps=2")
    own = [*DURING, "train.save_best=chrf", "train.save_steps=2"]
    scored = train(base, tmp_path / "run", *own)
    assert scored.digest() == plain.digest()
    names = {"loss", "perplexity", "token_accuracy", "exact_match", "chrf"}
    assert [(step, {*found}) for step, found in scored.logged] == [(2, names), (4, names)]
    for (_, with_answers), (_, without) in zip(scored.logged, plain.logged, strict=True):
        assert with_answers | without == with_answers, "the held-out loss is the same"
    best = json.loads((tmp_path / "run/best.json").read_text())
    scores = {step: found["chrf"] for step, found in scored.logged}
    assert scores[2] != scores[4], "or this shows nothing"
    assert best["metric"] == "chrf"
    assert scores[best["step"]] == max(scores.values()) == best["value"]
    written = {path.name: path.read_text() for path in (tmp_path / "run").glob(ANSWERS)}
    assert {*written} == {"step_2.jsonl", "step_4.jsonl"}
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert "answers/text_summary" in board.Tags()["tensors"]
    again = train(base, tmp_path / "run", *own, resume=tmp_path / "run/checkpoint_step_2")
    assert again.logged == scored.logged[1:]
    assert again.digest() == scored.digest()
    assert {p.name: p.read_text() for p in (tmp_path / "run").glob(ANSWERS)} == written
    moved = [path.name for path in (tmp_path / "run/abandoned").glob(f"*/{ANSWERS}")]
    assert moved == ["step_4.jsonl"], "what came before the checkpoint stays"


def test_other_questions_make_another_best(base, tmp_path):
    """A best score of five answers is no measure for one of three."""
    digests = []
    for metric, number in (("loss", 3), ("loss", 5), ("chrf", 3), ("chrf", 5)):
        own = [*DURING, f"train.save_best={metric}", f"evaluation.during={number}"]
        digests.append(make(base, tmp_path, *own).task.held_out_sha256)
    assert digests[0] == digests[1]
    assert len({*digests}) == 3


def test_every_engine_and_number_of_processes_gives_the_same_scores(base, tmp_path):
    """With split weights all ranks take part in each answer, or they would wait for ever."""
    more = {"steps": 4, "save_at": [], "prove": False, "resume": ""}
    every = [*DURING, "tuning.lora_dropout=0", "train.early_stopping.metric=loss"]
    cases = [case(base, *every, *own, name=kind, **more) for kind, own in KINDS.items()]
    found = {}
    for world in (1, 2):
        (folder := tmp_path / str(world)).mkdir()
        chosen = cases if world == 2 else cases[:2]
        (folder / "cases.json").write_text(json.dumps(chosen))
        command = ["tests/support/parallel_worker.py", str(folder / "cases.json"), str(folder)]
        forked.start(world, command, folder / "log").join()
        for each in chosen:
            ranks = sorted(folder.glob(f"{each['name']}.rank*.json"))
            assert len(ranks) == world, (folder / "log").read_text(errors="replace")
            results = [json.loads(path.read_text()) for path in ranks]
            for key in ("metrics", "rows"):
                assert all(result[key] == results[0][key] for result in results), "of all ranks"
            found[each["name"], world] = results[0]["metrics"]
            loss, hits, tokens = map(sum, zip(*results[0]["rows"], strict=True))
            of_rows = {"loss": loss / tokens, "token_accuracy": hits / tokens}
            assert of_rows == pytest.approx({k: results[0]["metrics"][k] for k in of_rows})
    for kind in KINDS:
        alone = found["crowd" if kind == "crowd" else "ddp", 1]
        assert found[kind, 2] == pytest.approx(alone, rel=1e-5), kind
        assert alone["chrf"] > 0, "or this shows nothing"


def test_nothing_to_answer_is_refused_before_the_start(base, tmp_path):
    made = make(base, tmp_path, *DURING)
    rows = made.task.prepared.held_out
    for row in rows.rows():
        assert row.messages
    rows.rows = lambda: iter(())
    with pytest.raises(UserError, match=r"evaluation\.during: no held-out row asks"):
        task_of(made.task.config).refuse_unusable(made.task.config, made.task.prepared)


# --- intervals -----------------------------------------------------------------------------------


def test_an_interval_in_epochs_is_due_at_the_first_step_that_completes_it():
    due = {  # of epochs of seven steps
        "epoch": [7, 14, 21],
        "2 epochs": [14],
        "0.5 epoch": [4, 7, 11, 14, 18, 21],
        "1/3epoch": [3, 5, 7, 10, 12, 14, 17, 19, 21],
        "0.01 epoch": [*range(1, 22)],
        5: [5, 10, 15, 20],
    }
    for interval, expected in due.items():
        assert [step for step in range(1, 22) if is_due(interval, step, 7)] == expected
        train = {"output_dir": "outputs/x", "eval_steps": interval}
        assert Train.model_validate(train).eval_steps == interval
    for wrong in ("", "epoc", "0 epoch", "1/0 epoch", "-1 epoch", "1 epoch 2", 0, 0.5, True):
        with pytest.raises(ValidationError):
            Train.model_validate({"output_dir": "outputs/x", "eval_steps": wrong})


def test_a_run_evaluates_and_saves_by_the_epoch(base, tmp_path):
    own = ["train.eval_steps=0.5 epoch", "train.save_steps=epoch", "train.save_total_limit=9"]
    made = train(base, tmp_path, *own)
    assert [step for step, _ in made.logged] == [2, 4]
    assert sorted(path.name for path in tmp_path.glob("checkpoint_*")) == [
        "checkpoint_step_0",
        "checkpoint_step_4",
    ]


# --- early stopping ------------------------------------------------------------------------------

STOPPING = ["train.save_steps=1", "train.save_total_limit=9"]
STOPPING += ["train.early_stopping.metric=loss", "train.early_stopping.patience=2"]


def stopping(*overrides: str) -> list[str]:
    return [*DURING, "train.eval_steps=1", *STOPPING, *overrides]


def test_a_run_stops_where_nothing_is_learnt_and_a_resumed_one_at_the_same_step(base, tmp_path):
    for metric in ("loss", "chrf"):
        own = stopping(f"train.early_stopping.metric={metric}", "train.learning_rate=1e-9")
        folder = tmp_path / metric
        assert train(base, folder, *own).step == 3, "the first is the best, two more do not improve"
        for step in (2, 3):
            again = train(base, folder, *own, resume=folder / f"checkpoint_step_{step}")
            assert (again.step, len(again.logged)) == (3, 3 - step)
    said = (folder / "training.log").read_text()
    assert "stopped early after step 3 of 6: 2 evaluations in a row did not improve chrf" in said


def test_each_score_is_compared_by_its_own_statistics(base, tmp_path):
    """A run that is resumed with other metrics beside it still knows what was best."""
    names, labels = ["exact_match", "classification", "chrf"], "evaluation.labels=[yes, no]"
    task = make(base, tmp_path, *DURING, f"evaluation.metrics={names}", labels).task
    tallies = []
    for answer in ("no", "yes"):
        tallies.append(Tally(names, ["yes", "no"]))
        for number in range(30):
            tallies[-1].add(number, answer, "yes" if number % 3 else "no")
    together = compare_tallies(*tallies)
    for metric in ("exact_match", "accuracy", "chrf"):
        rows = []
        for task._tally in tallies:
            rows.append(task.rows_of(metric))
        expected = together[metric]
        assert task.improvement(metric, *rows) == (expected.low, expected.high)
        assert expected.low < expected.difference < expected.high


def test_a_run_that_learns_goes_on_unless_it_learns_too_little(base, tmp_path):
    assert train(base, tmp_path / "a", *stopping()).step == 6
    assert train(base, tmp_path / "b", *stopping("train.early_stopping.min_delta=5")).step == 3


def paired(_: str, before: np.ndarray, now: np.ndarray) -> tuple[float, float]:
    """A difference, certain to 1."""
    difference = (now - before).item()
    return difference - 1, difference + 1


def test_only_a_certain_improvement_counts(tmp_path):
    settings = EarlyStopping(metric="loss", patience=3, min_delta=0.5)
    stopper = Stopper(settings, "sha")
    counts = []
    for step, value in enumerate([math.nan, 1, 2.4, 2.4, 2.6, 2, math.nan, 5], 1):
        stopper.add(step, value, np.array([[float(value)]]), paired)
        counts.append(stopper.count)
        fresh = Stopper(settings, "sha")
        fresh.restore(tmp_path, json.loads(json.dumps(stopper.save(tmp_path))))
        assert (fresh.step, fresh.count, fresh.is_over) == (stopper.step, counts[-1], False)
        stopper = fresh
    assert counts == [1, 0, 1, 2, 0, 1, 2, 0]
    for other in (Stopper(settings, "other rows"), Stopper(EarlyStopping(metric="bleu"), "sha")):
        other.restore(tmp_path, stopper.save(tmp_path))
        assert other.rows is None


def test_the_interval_of_a_paired_loss_is_students_and_holds_with_weights():
    random = np.random.default_rng(0)
    before, now = random.normal(size=(2, 12))
    now = np.concatenate([now, 2 * before.mean() - now])  # without skewness
    before = np.full(24, before.mean())
    expected = ttest_1samp(now - before, 0).confidence_interval()
    ones = np.ones(24)
    assert difference_of_ratios(before, now, ones) == pytest.approx((expected.low, expected.high))
    assert difference_of_ratios(before[:1], now[:1], ones[:1]) == (-math.inf, math.inf)
    held = []
    for _ in range(500):
        weights = random.integers(0, 20, 40)
        gained = weights * random.normal(0.3, 1, 40)  # by 0.3 a token, more or less in an example
        low, high = difference_of_ratios(np.zeros(40), gained, weights)
        held.append(low <= 0.3 <= high)
    assert 0.92 < np.mean(held) < 0.98


def test_a_task_without_intervals_is_refused(tmp_path):
    config = DistillConfig.model_validate({"train": {"output_dir": str(tmp_path), "eval_steps": 1}})
    changed = with_values(config, {"train.early_stopping.metric": "loss"})
    with pytest.raises(ConfigError, match="no interval for the difference"):
        task_of(changed).refuse_untrainable(changed)
