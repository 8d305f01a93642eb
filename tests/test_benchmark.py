"""`make benchmark`: lm-eval's numbers from our model, on any number of processes, and compared."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import forked
import harness_tasks
import numpy as np
import pytest
from conftest import ROOT

from sft import commands
from sft.config.benchmark import REFUSED, Benchmark
from sft.config.load import parse_benchmark
from sft.data.rendering import render_text
from sft.data.template import prompt_ids
from sft.data.tokens import tokenise_behind
from sft.errors import ConfigError, DataError, UserError
from sft.evaluate import benchmarks, generate
from sft.evaluate.scores import Tally, compare_tallies
from sft.runtime.log import Log
from sft.serve.connector import AccelerateConnector

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "sft[benchmark]"')

import lm_eval.evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sft.serve.benchmark import results, tasks
from sft.serve.benchmark.harness import Harness, read_gen_kwargs

NANO = str(ROOT / "nano/model")
OLD = ROOT / "tests/fixtures/runs_before_0.1.0"
CHAT = [{"role": "user", "content": "repeat: cat"}]


@pytest.fixture(autouse=True)
def _without_a_description_of_this_machine(monkeypatch):
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # takes 4 s


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    return harness_tasks.write(tmp_path_factory.mktemp("tasks"))


def connector(name: str = NANO, **options: Any) -> AccelerateConnector:
    return AccelerateConnector(name, mixed_precision="no", log=Log(None), **options)


def harness(folder: Path, name: str = NANO, is_chat: bool = False, **options: Any) -> Harness:
    return Harness(connector(name, **options), folder, is_chat=is_chat)


def run(folder: Path, given: str, model: str = NANO, **settings: Any) -> dict[str, Any]:
    """What `make benchmark` writes about a model in fp32."""
    arguments = {"model_name": model, "mixed_precision": "no"}
    settings = {"bootstrap_iters": 20} | settings
    results.benchmark(arguments, folder, given, Benchmark(**settings))
    return json.loads((folder / "metrics.json").read_text())


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, 0) for each in arguments]


LONG = "the cat saw the dog and the sun " * 90
PAIRS = [
    ("repeat: cat", " cat"),
    ("The sun ", " is"),  # blanks at the end go to the continuation
    ("", "no context"),
    ("one of two", " a"),
    ("one of two", " b"),  # read off the same pass
    (LONG, " and the end"),  # longer than the model takes
    ("a", " much longer continuation than the others have"),
]
ASKED = [
    ("repeat: cat", {"until": ["\n", "t"], "max_gen_toks": 9}),
    ("Once upon a time", {"until": [], "max_gen_toks": 17, "do_sample": False}),
    (LONG, {"until": "dog", "max_gen_toks": 20, "temperature": 0.0}),
    ("say: sun", {"until": ["\n", "t"], "max_gen_toks": 9}),
]


@pytest.mark.parametrize("name", ["nano", "stories260K"])
def test_responses_are_those_of_lm_evals_own_model(name, tmp_path, request):
    """`stories260K` begins every text with a BOS; `nano` has none."""
    path = NANO if name == "nano" else str(request.getfixturevalue("shared") / "models" / name)
    ours = harness(tmp_path, path)
    theirs = HFLM(ours.answerer.model, tokenizer=ours.tokenizer, batch_size=3, device="cpu")
    for kind, arguments in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [("A short text.",), (LONG,)]),
    ):
        found = getattr(ours, kind)(ask(kind, *arguments))
        expected = getattr(theirs, kind)(ask(kind, *arguments))
        assert np.array(found) == pytest.approx(np.array(expected), rel=1e-5, abs=1e-4), kind
    requests = ask("generate_until", *ASKED)
    assert ours.generate_until(requests) == theirs.generate_until(requests)
    assert ours.num_cut == {"loglikelihood": 1, "loglikelihood_rolling": 0, "generate_until": 1}


def test_scores_are_those_of_lm_eval_with_its_own_model(local, tmp_path):
    found = run(tmp_path, str(local) + "/")
    model = connector().load_model_once()
    theirs = HFLM(model.model, tokenizer=model.tokenizer, batch_size=2, device="cpu")
    files = [str(local / f"{name}.yaml") for name in sorted(harness_tasks.TASKS)]
    plain = tasks.TaskManager(include_defaults=False)
    expected = lm_eval.simple_evaluate(
        model=theirs, tasks=files, bootstrap_iters=0, task_manager=plain
    )["results"]
    metrics = {
        f"{task}/{key.removesuffix(',none')}": value
        for task, own in expected.items()
        for key, value in own.items()
        if key.endswith(",none") and isinstance(value, float | int)
    }
    assert found["metrics"] == pytest.approx(metrics, rel=1e-4)
    assert found["num_examples"] == 44
    assert found["tasks"]["local_choice"]["num_fewshot"] == 1
    for name, value in metrics.items():
        low, high = found["intervals"][name]
        assert low <= value <= high, name
    predictions = (tmp_path / "predictions.jsonl").read_text().splitlines()
    choice = next(row for row in map(json.loads, predictions) if row["task"] == "local_choice")
    assert choice["answer"].strip() in harness_tasks.TASKS_ROWS["local_choice"]()[0]["choices"]
    assert json.loads((tmp_path / "results.json").read_text())["results"].keys() == expected.keys()


def test_batches_change_nothing_and_responses_are_not_computed_twice(tmp_path, monkeypatch):
    whole, single = harness(tmp_path / "a"), harness(tmp_path / "b", batch_size=1)
    requests = ask("loglikelihood", *PAIRS)
    found = whole.loglikelihood(requests)
    assert np.array(single.loglikelihood(requests)) == pytest.approx(np.array(found), abs=1e-4)
    asked = ask("generate_until", *ASKED, ("again", {"do_sample": True, "temperature": 1.0}))
    written = whole.generate_until(asked)
    assert single.generate_until(asked) == written
    for name in ("_score_batch", "answer_batches"):
        owner = Harness if name == "_score_batch" else generate.Decoder
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("computed again"))
    assert whole.loglikelihood(requests) == found
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        whole.loglikelihood(ask("loglikelihood", *PAIRS, ("another", " one")))


# --- the chat template ---------------------------------------------------------------------------


def test_prompts_of_a_chat_are_those_of_training(tmp_path):
    ours = harness(tmp_path, is_chat=True)
    prompt = ours.apply_chat_template(CHAT)
    assert prompt == render_text(ours.tokenizer, CHAT, None, True)
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == prompt + "It is"
    asked, answer = prompt_ids(ours.tokenizer, CHAT), tokenise_behind(ours.tokenizer, "cat")[0]
    likely = generate.log_probs(ours.answerer.model, asked, answer)
    expected = sum(float(row[token]) for row, token in zip(likely, answer, strict=False))
    ((found, is_greedy),) = ours.loglikelihood(ask("loglikelihood", (prompt, "cat")))
    assert found == pytest.approx(expected, abs=1e-5)
    assert is_greedy == (likely[:-1].argmax(-1).tolist() == answer)
    said = ours.connector.complete(CHAT, max_new_tokens=12).choices[0].message.content
    asks = ask("generate_until", (prompt, {"max_gen_toks": 12}))
    assert ours.generate_until(asks) == [said]


def test_a_template_without_system_turns_gets_its_text_in_the_first_turn(tmp_path):
    ours = harness(tmp_path, is_chat=True)
    system = {"role": "system", "content": "Be brief."}
    merged = [{"role": "user", "content": "Be brief.\n\nrepeat: cat"}]
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    ours.tokenizer.chat_template = refuses + str(ours.tokenizer.chat_template)
    assert ours.apply_chat_template([system, *CHAT]) == ours.apply_chat_template(merged)
    ours.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match=r"never.*benchmark\.apply_chat_template=false"):
        ours.apply_chat_template(CHAT)


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_run(local, tmp_path_factory) -> Path:
    """A QLoRA run with results of benchmarks, by the command, on one process."""
    folder = Path(shutil.copytree(OLD / "qlora", tmp_path_factory.mktemp("run") / "run"))
    done = forked.run("scripts/benchmark.py", *words(folder, local))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def words(run: Path, local: Path) -> list[str]:
    names = ("local_choice", "local_answer", "local_text")
    given = ",".join(str(local / f"{name}.yaml") for name in names)
    return ["--model", str(run), "--tasks", given, "--precision", "fp32", "--limit", "6"]


def test_a_run_is_asked_as_it_was_trained_and_its_scores_are_shown(of_run):
    folder = of_run / "evaluation/benchmark"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["apply_chat_template"] is True
    assert found["tasks"]["local_choice"] == {
        "version": 1.0,
        "num_fewshot": 1,
        "num_examples": 6,
        "num_available": 16,
    }
    printed = (of_run / "printed").read_text()
    assert "local_answer/exact_match" in printed
    assert "by the chat template" in printed
    assert max(map(len, printed.splitlines())) <= 100
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    asked = next(row for row in rows if row["task"] == "local_answer")
    ours = connector(str(of_run)).load_model_once()
    messages = [{"role": "user", "content": "repeat: cat"}]
    assert asked["prompt"] == render_text(ours.tokenizer, messages, None, True)
    said = connector(str(of_run)).complete(messages, max_new_tokens=12).choices[0].message.content
    assert asked["answer"] == said.split(".")[0]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(of_run, local, tmp_path):
    folder = Path(shutil.copytree(OLD / "qlora", tmp_path / "run"))
    printed = forked.launch(2, ["scripts/benchmark.py", *words(folder, local)])
    assert "processes  2" in printed
    for name in ("metrics.json", "predictions.jsonl"):
        alone, both = ((each / "evaluation/benchmark" / name) for each in (of_run, folder))
        assert both.read_text().replace(str(folder), str(of_run)) == alone.read_text(), printed


def test_a_crowd_its_agents_and_a_document_are_asked(tmp_path, local):
    folder = Path(shutil.copytree(OLD / "crowd", tmp_path / "run"))
    task = str(local / "local_last.yaml")
    whole = run(tmp_path / "a", task, str(folder), limit=2)
    part = run(tmp_path / "b", task, str(folder / "final_checkpoint/agent1"), limit=2)
    name = "local_last/perplexity"
    assert whole["metrics"][name] != part["metrics"][name]
    assert whole["apply_chat_template"] is part["apply_chat_template"] is True
    audit = json.loads((folder / "audit.json").read_text())
    (folder / "audit.json").write_text(json.dumps(audit | {"formats": {"text": 9}}))
    assert results.asks_by_template(str(folder)) is False
    assert results.asks_by_template(NANO) is False
    drawing = harness(tmp_path / "c", str(folder))
    drawing.answerer.model.draws_per_prompt = True
    with pytest.raises(UserError, match="a text has no likelihood of its own"):
        drawing.loglikelihood(ask("loglikelihood", ("a", " b")))


def test_compare_reads_the_results(of_run, local, tmp_path, capsys, monkeypatch):
    base = run(tmp_path / "base", str(local) + "/", limit=6)
    written = tmp_path / "all.json"
    words = ["--a", str(tmp_path / "base"), "--b", str(of_run), "--json", str(written)]
    capsys.readouterr()
    commands.run("compare", words)
    printed = capsys.readouterr().out
    assert "Benchmarks: B against A on 16 examples" in printed
    assert "apply_chat_template is False in A, True in B" in printed
    assert "only in A: local_last" in printed
    assert "mcc" not in printed
    found = json.loads(written.read_text())["benchmark"]["differences"]
    of_b = json.loads((of_run / "evaluation/benchmark/metrics.json").read_text())
    name = "local_text/bits_per_byte"
    assert (found[name]["value_a"], found[name]["value_b"]) == (
        base["metrics"][name],
        of_b["metrics"][name],
    )
    assert found[name]["low"] <= found[name]["difference"] <= found[name]["high"]
    same = benchmarks.compare_benchmarks(tmp_path / "base", tmp_path / "base")
    assert {each.verdict for each in same.differences.values()} == {"not distinguishable"}
    commands.run("compare", ["--a", str(of_run), "--b", str(of_run)])  # and its answers
    assert "alike on" in capsys.readouterr().out
    base_twice = ["--a", str(tmp_path / "base"), "--b", str(tmp_path / "base")]
    with pytest.raises(UserError, match="METRIC: is only read for answers"):
        commands.run("compare", [*base_twice, "--metric", "bleu"])
    with pytest.raises(UserError, match="expected"):
        commands.run("compare", ["--a", str(tmp_path / "base"), "--b", str(OLD / "crowd")])


def test_the_example_of_the_docs_is_a_task(tmp_path, monkeypatch):
    text = (ROOT / "docs/BENCHMARK.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    for form, name in (("yaml", "colours.yaml"), ("json", "colours.jsonl")):
        (example,) = re.findall(rf"```{form}\n(.*?)```", text, re.DOTALL)
        (tmp_path / "tasks" / name).write_text(example)
    found = run(tmp_path / "out", "tasks/colours.yaml", log_samples=False)
    assert found["num_examples"] == 2
    assert [*found["metrics"]] == ["colours/acc"]
    kept = json.loads((tmp_path / "out/predictions.jsonl").read_text().splitlines()[0])
    assert kept.keys() == {"index", "key", "row", "task", "scores"}


# --- statistics ----------------------------------------------------------------------------------


def folder_of(path: Path, scores: dict[str, list[list[float]]], **changes: Any) -> Path:
    """A folder of results with a task for each name `task/metric`; the kind is the metric's."""
    path.mkdir()
    described, rows, made = {}, [], {}
    for name, own in scores.items():
        task, metric = name.split("/")
        kind = {"acc": "mean", "ppl": "perplexity", "f1": "other"}[metric]
        ratio = sum(each[0] for each in own) / sum(each[-1] if len(each) > 1 else 1 for each in own)
        value = benchmarks.as_value(kind, ratio)
        interval = benchmarks.make_interval(kind, {task: own}, {task: 1.0})
        score = benchmarks.Score(
            value, interval, kind, metric != "ppl", len(own), metric, {task: 1}
        )
        made[name] = vars(score)
        described[task] = {"version": 1, "num_fewshot": 0}
        rows += [
            {"task": task, "row": f"{task}:{n}", "key": str(n), "scores": {metric: each}}
            for n, each in enumerate(own)
        ]
    values = {"lm_eval": "0", "tasks": described, "scores": made} | changes
    (path / "metrics.json").write_text(json.dumps(values))
    (path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_differences_are_those_of_other_scores_and_a_lower_loss_is_better(tmp_path):
    rng = np.random.default_rng(0)
    a, b = (rng.random((2, 200)) < [[0.4], [0.6]]).astype(float)
    likely = -rng.random(200) * 3 - 1
    other = likely + rng.random(200)
    of_a = {
        "x/acc": a[:, None],
        "y/ppl": np.stack([likely, np.full(200, 2.0)], 1),
        "z/f1": a[:, None],
    }
    of_b = {
        "x/acc": b[:, None],
        "y/ppl": np.stack([other, np.full(200, 2.0)], 1),
        "z/f1": b[:, None],
    }
    one, two = (
        folder_of(tmp_path / name, {key: each.tolist() for key, each in own.items()})
        for name, own in (("a", of_a), ("b", of_b))
    )
    found = benchmarks.compare_benchmarks(one, two)
    assert found.differences.keys() == {"x/acc", "y/ppl"}
    tallies = [Tally(["exact_match"]) for _ in range(2)]
    for tally, own in zip(tallies, (a, b), strict=True):
        for number, score in enumerate(own):
            tally.add(number, "yes" if score else "no", "yes")
    expected, own = compare_tallies(*tallies)["exact_match"], found.differences["x/acc"]
    assert own.difference == pytest.approx(expected.difference)
    assert own.p_value == pytest.approx(expected.p_value, abs=0.002)
    assert (own.low, own.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert own.verdict == "better"
    loss = found.differences["y/ppl"]
    assert loss.value_b == pytest.approx(float(np.exp(-other.mean() / 2)))
    assert loss.difference < 0
    assert loss.high < 0
    assert loss.verdict == "better"


def test_a_group_is_the_weighted_mean_of_its_tasks(tmp_path):
    file = harness_tasks.write_group(tmp_path / "tasks")
    found = run(tmp_path / "out", str(file))
    both = tasks.Tasks(str(file.parent), Benchmark())
    assert both.names == ["local_group"]  # its tasks are not asked twice
    score = found["scores"]["local_group/acc"]
    assert score["weights"] == {"local_choice": 0.5, "local_last": 0.5}
    assert score["value"] == pytest.approx(
        (found["metrics"]["local_choice/acc"] + found["metrics"]["local_last/acc"]) / 2
    )
    low, high = score["interval"]
    assert low < score["value"] < high
    assert score["num_examples"] == 32


def test_results_that_do_not_compare_are_refused(tmp_path):
    rows = {"x/acc": [[1.0], [0.0]]}
    one = folder_of(tmp_path / "one", rows)
    version = {"x": {"version": 2, "num_fewshot": 0}}
    for name, other, changes, problem in (
        ("version", rows, {"tasks": version}, "A has version 1 of this task, B version 2"),
        ("fewer", {"x/acc": [[1.0]]}, {}, "found 2 in A, 1 in B and 1 in common"),
        ("another", {"y/acc": [[1.0]]}, {}, "expected results of the same tasks"),
    ):
        two = folder_of(tmp_path / name, other, **changes)
        with pytest.raises(UserError, match=problem):
            benchmarks.compare_benchmarks(one, two)
    (tmp_path / "one/predictions.jsonl").unlink()
    with pytest.raises(UserError, match="expected scores of examples"):
        benchmarks.compare_benchmarks(one, one)


def test_intervals_know_what_a_value_cannot_be():
    texts = [[-1.0, 1.0], [-9.0, 1.0]]
    low, high = benchmarks.make_interval("perplexity", {"a": texts}, {"a": 1.0}) or (0, 0)
    assert low == 1.0 < high
    low, _ = benchmarks.make_interval("bits", {"a": texts}, {"a": 1.0}) or (1, 0)
    assert low == 0.0
    for kind, rows in (("perplexity", texts[:1]), ("mean", [[np.nan]]), ("other", texts)):
        assert benchmarks.make_interval(kind, {"a": rows}, {"a": 1.0}) is None


# --- what is refused -----------------------------------------------------------------------------


def test_the_options_are_those_of_lm_eval_and_all_others_are_refused_with_a_reason():
    from lm_eval.config.evaluate_config import EvaluatorConfig

    evaluate = inspect.signature(lm_eval.evaluator.simple_evaluate).parameters
    of_model = inspect.signature(HFLM.__init__).parameters
    theirs = {*evaluate, *EvaluatorConfig.__dataclass_fields__}
    assert {*Benchmark.model_fields} - theirs == {"max_length"} <= {*of_model}
    assert theirs - {*Benchmark.model_fields} == {*REFUSED}
    for name, reason in REFUSED.items():
        with pytest.raises(ConfigError) as caught:
            parse_benchmark([f"benchmark.{name}=x"])
        assert reason in str(caught.value)
    given = ["--num_fewshot", "5", "benchmark.gen_kwargs.temperature=0.7", "--seed=3"]
    read = parse_benchmark([*given, "--confirm_run_unsafe_code"])
    assert (read.num_fewshot, read.seed, read.confirm_run_unsafe_code) == (5, 3, True)
    assert tasks.gen_kwargs_of(read) == {"temperature": 0.7}
    assert tasks.gen_kwargs_of(Benchmark(gen_kwargs="temperature=0.7,top_k=4")) == {
        "temperature": 0.7,
        "top_k": 4,
    }
    with pytest.raises(ConfigError, match=r"benchmark\.num_fewshots.*did you mean num_fewshot"):
        parse_benchmark(["benchmark.num_fewshots=1"])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"num_beams": 4}, "unknown num_beams"),
        ({"do_sample": True}, "do_sample needs a temperature above 0"),
        ({"max_gen_toks": 0}, "max_new_tokens"),
    ],
)
def test_settings_of_generation_that_would_be_ignored_are_refused(given, problem):
    with pytest.raises(UserError, match=problem):
        read_gen_kwargs(given, 0)


def test_settings_of_generation_mean_what_they_mean_in_lm_eval():
    settings, until = read_gen_kwargs(
        {"until": ["a", ""], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9}, 7
    )
    assert (settings.max_new_tokens, settings.temperature, settings.top_p) == (5, 0.5, 0.9)
    assert (settings.seed, until) == (7, ("a",))
    assert read_gen_kwargs({"do_sample": False, "temperature": 0.5}, 0)[0].temperature == 0
    assert read_gen_kwargs({}, 0)[0].max_new_tokens == 256


CODE = {"unsafe_code": True}
HUB = {"dataset_path": "nobody/nothing", "dataset_kwargs": None}
LOST = {"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}
BEAMS = {"generation_kwargs": {"num_beams": 2}}


@pytest.mark.parametrize(
    ("name", "changes", "kind", "problem"),
    [
        ("local_answer", CODE, UserError, r"local_answer: this task runs code that the model has"),
        ("local_answer", HUB, DataError, "a data set is on the hub, and the hub cannot be reached"),
        ("local_answer", LOST, DataError, r"lm-eval cannot load it: FileNotFoundError"),
        ("local_answer", BEAMS, UserError, "local_answer: generation_kwargs: unknown num_beams"),
        ("local_choice", {"output_type": "guess"}, DataError, "lm-eval cannot load it"),
    ],
)
def test_a_task_that_cannot_run_is_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, name, changes, kind, problem
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    harness_tasks.write(tmp_path, name, **changes)
    loader = tasks.Tasks(str(tmp_path / f"{name}.yaml"), Benchmark())
    with pytest.raises(kind, match=problem):
        loader.load(loader.names)


def test_permission_for_code_of_the_model_has_lm_evals_own_name(tmp_path):
    harness_tasks.write(tmp_path, "local_answer", **CODE)
    loader = tasks.Tasks(f"{tmp_path}/", Benchmark(confirm_run_unsafe_code=True))
    assert [*loader.load(loader.names)["tasks"]] == ["local_answer"]


def test_tasks_that_are_not_there_are_named(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("task: [")
    for given, problem in (
        ("none.yaml", "none.yaml: expected a task's YAML file, found none"),
        (f"{tmp_path}/empty", "expected a folder with YAML files of tasks"),
        (f"{tmp_path}/bad.yaml", "expected YAML"),
        (" , ", "TASKS: required"),
    ):
        with pytest.raises(UserError, match=problem):
            tasks.Tasks(given, Benchmark())
    # lm-eval's index of all its tasks takes 20 s; that of one folder has names as well.
    harness_tasks.write(tmp_path, "local_answer")
    plain = tasks.TaskManager.__init__
    monkeypatch.setattr(
        tasks.TaskManager,
        "__init__",
        lambda self, **options: plain(self, **(options | {"include_defaults": False})),
    )
    settings = Benchmark(include_path=str(tmp_path))
    assert tasks.Tasks("local_answer", settings).names == ["local_answer"]
    assert tasks.Tasks("local_*", settings).names == ["local_answer"]
    with pytest.raises(UserError, match="no task 'local_answr'; did you mean local_answer"):
        tasks.Tasks("local_answr", settings)
    with pytest.raises(UserError, match=r"benchmark\.include_path: expected a folder"):
        tasks.Tasks("x", Benchmark(include_path="nowhere"))


def test_what_cannot_be_benchmarked_is_refused(tmp_path, local, monkeypatch):
    task = str(local / "local_last.yaml")
    with pytest.raises(UserError, match="TASKS: required"):
        commands.run("benchmark", ["--model", NANO])
    with pytest.raises(UserError, match=r"OUTPUT: required, since .* is no run"):
        commands.run("benchmark", ["--model", NANO, "--tasks", task])
    with pytest.raises(ConfigError, match="task"):
        commands.run("benchmark", ["--model", str(OLD / "darkroom"), "--tasks", task])
    for settings, problem in (
        ({"fewshot_as_multiturn": True}, "needs benchmark.apply_chat_template=true"),
        ({"limit": 2, "samples": {"local_last": [1]}}, "give one of them"),
        ({"samples": {"local_lost": [1]}}, "local_lost is none of the tasks local_last"),
        ({"max_length": 4096}, "the model takes 512, found 4,096"),
        ({"max_length": 2}, "is longer than the 2 that the model takes"),
    ):
        with pytest.raises(UserError, match=problem):
            run(tmp_path / "out", task, **settings)
    with pytest.raises(UserError, match="expected fewer than the 512 tokens of prompt and answer"):
        harness(tmp_path).generate_until(ask("generate_until", ("a", {"max_gen_toks": 512})))
    monkeypatch.setattr("sft.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'make benchmark needs lm_eval.*"sft\[benchmark\]"'):
        commands.run("benchmark", ["--model", NANO, "--tasks", task])


def test_processes_that_ask_for_different_things_are_stopped(tmp_path, monkeypatch):
    ours = harness(tmp_path)
    monkeypatch.setattr("sft.serve.benchmark.harness.gather_object", lambda own: [*own, "other"])
    with pytest.raises(UserError, match="the processes made different requests"):
        ours.loglikelihood(ask("loglikelihood", *PAIRS))
