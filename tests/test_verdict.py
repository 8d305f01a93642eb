"""`make verdict`: drift from the base, scores against it, the limit, the page."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import ROOT

import sft
from sft import commands
from sft.config.load import load_config
from sft.config.schema import Generation
from sft.data import cache, template
from sft.errors import DataError
from sft.evaluate import drift, verdict
from sft.evaluate.answers import AnswerModel
from sft.evaluate.general import domain_of, load_bundled, load_general
from sft.evaluate.intervals import sign_test, unbounded
from sft.evaluate.scores import Difference
from sft.serve import outcome
from sft.tasks.sft import replay

OLD = ROOT / "tests/fixtures/runs_before_0.1.0/qlora"
ROWS = [
    {"domain": "chat", "prompt": "Hello!"},
    {"domain": "chat", "messages": [{"role": "user", "content": "Who are you?"}]},
    {"domain": "code", "prompt": "What is an API?"},
    {"prompt": "Name a colour."},
    {"text": "The old mill stands at the bend of the river."},
    {"text": "Iron rusts."},
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("general") / "general.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


# -- prompts


def test_the_bundled_set_has_six_domains_of_fifty_prompts_and_says_its_licence():
    found = load_bundled()
    domains = [domain_of(prompt) for prompt in found.prompts]
    assert {name: domains.count(name) for name in domains} == dict.fromkeys(
        ("instruction", "code", "arithmetic", "languages", "refusal", "chat"), 50
    )
    asked = [prompt.messages[-1]["content"] for prompt in found.prompts]
    assert len({*asked}) == 300
    assert len({*found.texts}) == 30
    # Results of two sets do not compare: a change of the set is meant, and says so here.
    assert found.sha256.startswith("cdcc4cd1ab07d575")
    assert "licence: Apache-2.0" in (ROOT / "sft/evaluate/general.yaml").read_text()


def test_halves_share_no_prompt_and_have_all_together():
    whole = load_bundled()
    halves = [whole.half(0), whole.half(1)]
    asked = [[prompt.fields["row"] for prompt in half.prompts] for half in halves]
    assert sorted(asked[0] + asked[1]) == sorted(p.fields["row"] for p in whole.prompts)
    assert [len({domain_of(p) for p in half.prompts}) for half in halves] == [6, 6]
    assert len({whole.sha256, *(half.sha256 for half in halves)}) == 3


def test_a_file_of_the_user_has_prompts_of_any_format_and_texts(rows):
    found = load_general(str(rows))
    assert [domain_of(prompt) for prompt in found.prompts] == ["chat", "chat", "code", "general"]
    assert found.prompts[1].messages == [{"role": "user", "content": "Who are you?"}]
    assert found.texts == [row["text"] for row in ROWS[4:]]


def test_rows_that_are_neither_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"unknown": "x"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        load_general(str(tmp_path / "bad.jsonl"))
    (tmp_path / "one.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="expected at least 2 prompts, found 1"):
        load_general(str(tmp_path / "one.jsonl"))


# -- drift


@pytest.fixture(scope="module")
def base() -> AnswerModel:
    from transformers import AutoTokenizer

    tokenizer = template.prepare_tokenizer(AutoTokenizer.from_pretrained(ROOT / "nano/model"))
    model = tiny.llama(vocab_size=len(tokenizer)).eval()
    stop = [tokenizer.eos_token_id]
    return AnswerModel(model, stop, Generation(max_new_tokens=6), tokenizer=tokenizer, identity="")


@pytest.fixture(scope="module")
def tuned(base) -> AnswerModel:
    model = tiny.llama(vocab_size=len(base.tokenizer)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(1)), alpha=0.02)
    return replace(base, model=model)


def test_a_model_has_not_moved_from_itself(base, rows):
    general = load_general(str(rows))
    said = drift.measure_base(base, general, Accelerator(cpu=True))
    moved, losses = drift.measure_tuned(base, said, general, Accelerator(cpu=True))
    assert [(each.divergence, each.agreement) for each in moved] == [(0.0, 1.0)] * 4
    assert losses == said.losses


def test_the_divergence_is_that_of_both_distributions(base, tuned, rows, monkeypatch):
    general, alone = load_general(str(rows)), Accelerator(cpu=True)

    def measured(top: int) -> list[float]:
        monkeypatch.setattr(drift, "TOP", top)
        said = drift.measure_base(base, general, alone)
        return [m.divergence for m in drift.measure_tuned(tuned, said, general, alone)[0]]

    exact, bounds = measured(10**6), measured(64)
    for question, found, bound in zip(general.prompts, exact, bounds, strict=True):
        prompt = base.render_prompt(question)
        [answer] = base.decode([prompt])
        first, ends = len(prompt) - 1, answer.finish_reason == "stop"
        ids = torch.tensor([prompt + answer.ids])
        own, other = (
            model.model(ids).logits[0, first : first + len(answer.ids) + ends].log_softmax(-1)
            for model in (base, tuned)
        )
        expected = F.kl_div(other, own, log_target=True, reduction="batchmean")
        assert found == pytest.approx(float(expected), rel=1e-4)
        assert 0 < bound <= found * (1 + 1e-6)  # other tokens count as one
        assert bound > 0.3 * found


def test_what_the_base_says_is_kept_whole_or_not_at_all(base, tuned, rows, tmp_path):
    general, alone = load_general(str(rows)), Accelerator(cpu=True)
    said, path = drift.measure_base(base, general, alone), tmp_path / "cache/base.safetensors"
    drift.write_base(path, said)
    again = drift.read_base(path)
    assert again is not None
    assert [again.answers[i].answer for i in range(4)] == [each.answer for each in said.answers]
    assert drift.measure_tuned(tuned, again, general, alone) == drift.measure_tuned(
        tuned, said, general, alone
    )
    path.write_bytes(path.read_bytes()[:-9])
    assert drift.read_base(path) is None
    assert drift.read_base(tmp_path / "none") is None


# -- statistics


def test_the_interval_of_a_mean_without_bounds_holds_it():
    even = [float(each) for each in range(-20, 21)]
    low, high = unbounded(even)
    assert low == pytest.approx(-high)
    assert unbounded([1.0]) is None
    assert unbounded([2.0, 2.0]) == (2.0, 2.0)
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):
        low, high = unbounded(rng.exponential(1, 30))
        held += low <= 1 <= high
    assert 0.93 <= held / 500 <= 0.97  # Student's t alone: 92 %


def test_the_sign_test_is_that_of_all_signs():
    values = [0.5, 1.0, -0.2, 0.7, 0.3, 0.9, 0.1]
    signs = itertools.product((1, -1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(each, values, strict=True))) for each in signs]
    expected = sum(each >= sum(values) - 1e-9 for each in sums) / len(sums)
    assert sign_test(values) == pytest.approx(expected, abs=0.01)
    assert sign_test([0.0, 0.0]) == 1.0


# -- verdicts


def difference(change: float, p: float) -> Difference:
    return Difference(0.5, 0.5 + change, change, change - 0.1, change + 0.1, p, p, "better")


def test_scores_and_the_loss_on_texts_are_judged_together():
    rising = [0.1 + 0.01 * i for i in range(12)]
    lines = verdict.judge_scores(
        {"exact_match": difference(0.3, 0.001), "bleu": difference(-0.2, 0.03)},
        ([1.0] * 12, [1.0 + each for each in rising]),
    )
    assert {line["name"]: line["verdict"] for line in lines} == {
        "exact_match": "better",
        "bleu": "worse",
        verdict.TEXTS: "worse",  # a higher loss
    }
    many = {f"m{i}": difference(0.3, 0.02) for i in range(3)}
    verdicts = {line["verdict"] for line in verdict.judge_scores(many, None)}
    assert verdicts == {"not distinguishable"}  # 3 x 0.02 is above 5 %


def drifts(**divergences: float) -> dict[str, drift.Drift]:
    return {
        name: drift.Drift(50, value, (0.8 * value, 1.2 * value), 0.9, (0.8, 1.0))
        for name, value in divergences.items()
    }


def test_drift_is_judged_by_the_limit_and_the_gate_by_what_was_measured():
    found = verdict.judge_drift(drifts(all=0.1, code=0.95, chat=1.05, refusal=2.0), 1.0)
    assert [line["verdict"] for line in found] == [
        "below",
        "not distinguishable",
        "not distinguishable",
        "above",
    ]
    assert verdict.judge_gate(found, 1.0) == {
        "max_drift": 1.0,
        "open": False,
        "over": ["chat", "refusal"],
    }
    assert verdict.judge_gate(found, 3.0)["open"]
    assert verdict.judge_gate(found, None) is None
    assert {line["verdict"] for line in verdict.judge_drift(drifts(all=1.0), None)} == {"no limit"}


# -- the command


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def words(run: Path, rows: Path, *more: str) -> list[str]:
    options = [f"evaluation.general_path={rows}", f"data.cache_dir={run.parent}/cache"]
    return ["--run", str(run), "train.precision=fp32", *options, *more]


@pytest.mark.slow
def test_a_verdict_is_printed_written_and_closes_the_gate(run, rows, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)  # its base is nano/model
    assert commands.run("verdict", words(run, rows, "evaluation.max_drift=1e-6")) == 8
    printed = capsys.readouterr().out
    assert "gate: closed, above evaluation.max_drift 1e-06: all, chat, code, general" in printed
    assert max(map(len, printed.splitlines())) <= 100
    found = json.loads((run / "verdict.json").read_text())
    assert [line["name"] for line in found["learnt"]] == ["exact_match"]
    assert [line["num_prompts"] for line in found["lost"]["drift"]] == [4, 2, 1, 1]
    assert 0 < found["lost"]["drift"][0]["divergence"] < 1
    assert dict(found["cost"])["tokens"] == "13,302 in 6 steps, 5,578 learnt"
    page, picture = ((run / f"verdict.{kind}").read_text() for kind in ("html", "svg"))
    assert "<b class='closed'>gate: closed" in page
    assert "</svg>" in picture
    assert "url(" not in picture.replace("url(#", "")  # it loads nothing

    def refuse(*_: object) -> None:
        raise AssertionError("the base is asked again")

    monkeypatch.setattr(drift, "measure_base", refuse)
    again = outcome.judge_run(run, words(run, rows, "evaluation.max_drift=9")[2:])
    assert again["gate"]["open"]
    assert again["lost"]["texts"][0]["base"] == found["lost"]["texts"][0]["base"]
    assert [d["divergence"] for d in again["lost"]["drift"]] == [
        d["divergence"] for d in found["lost"]["drift"]
    ]
    drawn = verdict.draw(json.loads((run / "verdict.json").read_text()))
    assert drawn == (run / "verdict.svg").read_text()  # a function of the JSON alone


@pytest.mark.slow
def test_after_full_fine_tuning_the_base_is_loaded_by_itself(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = {
        "model.name": str(tiny.shallow_nano(tmp_path)),
        "tuning.mode": "full",
        "data.max_rows": 16,
        "data.cache_dir": str(tmp_path / "cache"),
        "train.output_dir": str(tmp_path / "full"),
        "train.max_steps": 1,
        "train.save_steps": None,
        "train.tensorboard": False,
        "train.precision": "fp32",
        "evaluation.num_examples": 0,
        "evaluation.general_path": str(rows),
        "data.replay.path": "base",
        "data.replay.share": 0.2,
    }
    done = sft.train("configs/nano.yaml", values)
    found = outcome.judge_run(done.folder, [])
    general = load_general(str(rows)).half(0)  # the other half was replayed
    assert found["lost"]["drift"][0]["num_prompts"] == len(general.prompts) == 3
    assert found["lost"]["drift"][0]["divergence"] > 0
    assert found["learnt"] == []
    assert "evaluation.num_examples" in found["learnt_note"]
    config = load_config(done.folder / "config.yaml")
    tokenizer = cache.load_tokenizer(config)
    with replay.open_base(config, tokenizer, torch.device("cpu")) as alone:
        said = drift.measure_base(alone, general, replay.Alone())
    assert found["lost"]["texts"][0]["base"] == sum(said.losses) / 2
    assert outcome.judge_run(done.folder, [])["lost"] == found["lost"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(run, rows):
    other = Path(shutil.copytree(run, run.with_name("other")))
    cached = f"data.cache_dir={other.parent}/cache_of_two"
    first = ["scripts/verdict.py", *words(run, rows)]
    assert (done := forked.run(*first)).returncode == 0, done.stdout + done.stderr
    reported = forked.launch(2, ["scripts/verdict.py", *words(other, rows, cached)])
    one, two = (json.loads((each / "verdict.json").read_text()) for each in (run, other))
    assert one["lost"] == two["lost"], reported
    assert one["learnt"] == two["learnt"]
