"""`data.replay`: general rows, or the base's own answers, are a fixed share of every epoch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from sft import commands
from sft.config.load import load_config
from sft.data import split
from sft.data.tokenised import IGNORED
from sft.errors import ConfigError, DataError
from sft.evaluate.general import load_general
from sft.tasks.sft import replay
from sft.tasks.sft.task import FineTune
from sft.verify import share


@pytest.mark.parametrize(("part", "added"), [(0.05, 7), (0.5, 100), (0.75, 7), (0.001, 30)])
def test_added_rows_have_their_share_and_are_spread(part, added):
    rows, extra = np.arange(100), np.arange(1000, 1000 + added)
    found = split.add_share(rows, extra, part, seed=1)
    is_added = found >= 1000
    assert found[~is_added].tolist() == rows.tolist()
    wanted = max(1, round(part / (1 - part) * 100))
    assert abs(is_added.sum() - wanted) <= 1
    counts = np.bincount(found[is_added] - 1000, minlength=added)
    assert counts.max() - counts.min() <= 1
    gaps = np.diff(np.flatnonzero(is_added))
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    again = split.add_share(rows, extra, part, seed=1)
    assert found.tolist() == again.tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    minutes = range(60)
    rows = [{"prompt": f"set a timer for {i} min", "completion": f"timer {i}"} for i in minutes]
    general = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
    asked = [
        {"domain": "chat", "prompt": f"Hello {name}!"} for name in ("Ann", "Ben", "Cem", "Dan")
    ]
    for name, lines in (("rows", rows), ("general", general), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


def configured(files: Path, **more: str):
    values = {
        "data.train_path": f"{files}/rows.jsonl",
        "data.eval_path": "null",
        "data.eval_fraction": "0.2",
        "data.cache_dir": f"{files}/cache",
        "evaluation.general_path": f"{files}/asked.jsonl",
        "tuning.mode": "lora",
    }
    words = [f"{key}={value}" for key, value in (values | more).items()]
    return load_config(ROOT / "configs/nano.yaml", words)


def origins(prepared) -> list[str]:
    return [Path(row.file).name for row in prepared.train.rows()]


def test_rows_of_another_format_are_a_share_of_training_and_never_held_out(files, monkeypatch):
    monkeypatch.chdir(ROOT)
    more = {"data.replay.path": f"{files}/general.jsonl", "data.replay.share": "0.2"}
    prepared = FineTune.prepare(configured(files, **more))
    found = origins(prepared)
    assert found.count("rows.jsonl") == 48
    assert found.count("general.jsonl") == 12
    assert {Path(row.file).name for row in prepared.held_out.rows()} == {"rows.jsonl"}
    assert prepared.audit["formats"] == {"prompt_completion": 60, "alpaca": 3}
    columns = {"data.columns": "{prompt: prompt, completion: completion}"}  # of the training rows
    again = FineTune.prepare(configured(files, **more, **columns))
    assert origins(again) == found
    without = FineTune.prepare(configured(files))
    assert without.audit["data_sha256"] != prepared.audit["data_sha256"]


def test_the_base_answers_once_and_its_own_tokens_are_learnt(files, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = configured(files, **{"data.replay.path": "base", "data.replay.share": "0.1"})
    prepared = FineTune.prepare(config)
    replayed = [i for i, name in enumerate(origins(prepared)) if name != "rows.jsonl"]
    assert len(replayed) == 5
    path = Path(prepared.train.row(replayed[0]).file)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = prepared.tokenizer
    general = load_general(config.evaluation.general_path)
    asked = [p.messages[0]["content"] for p in general.half(replay.REPLAYED).prompts]
    assert asked == ["Hello Ben!", "Hello Dan!"]  # Ann and Cem measure what is lost
    with replay.open_base(config, tokenizer, "cpu") as base:
        for row, text in zip(rows, asked, strict=True):
            prompt = row["input_ids"][: row["labels"].count(IGNORED)]
            assert text in tokenizer.decode(prompt)
            [answer] = base.decode([prompt])
            learnt = row["input_ids"][len(prompt) :]
            assert learnt[: len(answer.ids)] == answer.ids
            assert (learnt[len(answer.ids) :] != []) == (answer.finish_reason == "stop")
    example = prepared.train[replayed[0]]
    assert example.ids in [row["input_ids"] for row in rows]
    monkeypatch.setattr(replay, "open_base", None)  # a second time it is not asked
    assert origins(FineTune.prepare(config)) == origins(prepared)
    words = [f"data.train_path={files}/rows.jsonl", f"data.cache_dir={files}/cache"]
    words += ["tuning.mode=lora", f"evaluation.general_path={files}/asked.jsonl"]
    commands.run("show-data", [*words, "data.replay.path=base", f"--row={path}:2"])
    assert "Hello Dan!" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.replay.share=0.2"], r"data.replay.share .* is only read with"),
        (["data.replay.path=base", "model.init=random", "tuning.mode=full"], "random weights"),
        (["data.replay.path=a.jsonl", "data.replay.share=1"], "data.replay.share"),
    ],
)
def test_settings_that_cannot_work_are_refused(words, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(ROOT / "configs/nano.yaml", words)


def test_an_adapter_to_begin_with_has_no_base_to_replay(files):
    config = configured(files, **{"data.replay.path": "base"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"adapter": "x"})})
    with pytest.raises(ConfigError, match="without the adapter"):
        replay.with_base_answers(config)


def test_a_file_without_rows_to_replay_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match=r"none\.jsonl: expected rows"):
        FineTune.prepare(configured(files, **{"data.replay.path": f"{tmp_path}/none.jsonl"}))


class ShortRuns:
    """Stands for `run` and `outcome`: a loss of 1 + share, and a drift of 1 - share."""

    def __init__(self) -> None:
        self.trained: list[tuple[str | None, float, int]] = []

    def train(self, config) -> dict[str, float]:
        share = config.data.replay.share if config.data.replay.path else 0.0
        self.trained.append((config.data.replay.path, share, config.train.max_steps))
        return {"loss": 1 + share}

    def judge_run(self, folder: Path, overrides: list[str], half: int) -> dict:
        assert half == replay.MEASURED  # all shares by the same prompts
        drift = 1 - self.trained[-1][1]
        over = ["all"] if drift > 0.85 else []
        line = {"name": "all", "divergence": drift}
        return {"lost": {"drift": [line]}, "gate": {"over": over}}


def automatic(files: Path, out: Path, limit: str = "0.85"):
    auto = {"data.replay.path": "base", "data.replay.share": "auto", "train.max_steps": "80"}
    return configured(
        files, **auto, **{"evaluation.max_drift": limit, "train.output_dir": str(out)}
    )


def test_the_smallest_share_under_the_limit_is_chosen_once(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    runs = ShortRuns()
    for name in ("run", "outcome"):
        monkeypatch.setattr(share, name, runs)
    (tmp_path / "r.share").mkdir()
    config = automatic(files, tmp_path / "r")
    found = share.with_share(config)
    assert found.data.replay.share == 0.2
    assert found.data.replay.path == "base"
    tried = [(None, 0.0, 50), ("base", 0.05, 50), ("base", 0.1, 50), ("base", 0.2, 50)]
    assert runs.trained == tried
    printed = capsys.readouterr().out
    assert "+0.2" in printed  # the cost to the task
    assert share.with_share(config) == found
    assert runs.trained == tried  # the choice is kept
    assert share.with_share(found) is found


@pytest.mark.slow
def test_if_no_share_is_enough_the_run_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(share, "SHARES", (0.0, 0.4))
    monkeypatch.setattr(share, "STEPS", 2)
    with pytest.raises(ConfigError, match="found none in runs of at most 2 steps"):
        share.with_share(automatic(files, tmp_path / "r", "1e-9"))
    tried = json.loads((tmp_path / "r.share/share.json").read_text())["tried"]
    assert [line["share"] for line in tried] == [0.0, 0.4]
    assert all(line["drift"] > 0 and line["over"] for line in tried)
    assert tried[0]["loss"] != tried[1]["loss"]


def test_the_table_of_the_guide_is_the_measured_one():
    guide = (ROOT / "docs/VERDICT.md").read_text("utf-8")
    found = json.loads((ROOT / "benchmarks/results/replay.json").read_text("utf-8"))["summary"]
    rows = [
        f"| {each['model']}, {each['measure']} | {each['without']:.3g} | {each['with']:.3g} | "
        f"{each['higher_with']} of {each['seeds']} seeds |"
        for each in found
    ]
    table = guide[guide.index("| | without |") :].split("\n\n")[0]
    assert table.splitlines()[2:] == rows
