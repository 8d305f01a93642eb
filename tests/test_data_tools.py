"""`make process`, `make audit`, `make show-data` through their scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from sft.config.schema import Data
from sft.data import files

GOOD = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(30)]


def write(path: Path, rows: list, *lines: str) -> str:
    path.write_text("\n".join([*map(json.dumps, rows), *lines]) + "\n", "utf-8")
    return f"data.train_path={path}"


@pytest.mark.slow
def test_process_normalises_any_format_into_one_file(tmp_path, run_script):
    (tmp_path / "raw").mkdir()
    mixed = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    write(tmp_path / "raw/one.jsonl", [*GOOD, GOOD[0], *mixed])
    output = tmp_path / "clean.jsonl"
    done = run_script("process.py", "--output", str(output), f"data.train_path={tmp_path}/raw")
    assert done.returncode == 0, done.stderr
    for part in ("32", "from prompt_completion", "31", "from sharegpt", "duplicates", "1 (kept)"):
        assert part in done.stdout
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert rows[-1] == {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    }
    again = run_script("process.py", "--output", str(output), f"data.train_path={tmp_path}/raw")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_what_is_processed_reads_back_as_the_same_rows(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": 7.5}]
    call = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}, "thinking": "b"}
    rows = [
        {"messages": [turns[0], call], "functions": [{"name": "f"}], "id": 1},
        {"messages": turns, "chat_template_kwargs": {"enable_thinking": False}},
        {"input_ids": [1, 2, 0], "labels": [-100, 2, -100], "attention_mask": [1, 1, 0]},
        {"text": "a\nb"},
    ]
    write(tmp_path / "rows.jsonl", rows)
    files.process(Data(train_path=str(tmp_path / "rows.jsonl")), tmp_path / "clean.jsonl")
    made = [
        [(row.messages, row.tools, row.template_kwargs) for row in files.read_all(str(path))]
        for path in (tmp_path / "rows.jsonl", tmp_path / "clean.jsonl")
    ]
    assert made[0] == made[1]
    assert len(made[0]) == 4


def test_process_leaves_nothing_behind_where_rows_are_bad(tmp_path, run_script):
    given = write(tmp_path / "rows.jsonl", GOOD, '{"prompt": "x"}')
    output = tmp_path / "made/clean.jsonl"
    done = run_script("process.py", "--output", str(output), given)
    assert done.returncode == 3
    assert "rows.jsonl:31" in done.stderr
    assert list(output.parent.iterdir()) == []
    missing = run_script("process.py", "--output", str(output), "data.train_path=missing.jsonl")
    assert missing.returncode == 3
    assert list(output.parent.iterdir()) == []
    done = run_script("process.py", "--output", str(output), given, "data.on_bad_row=skip")
    assert done.returncode == 0, done.stderr
    (rejected,) = map(json.loads, (output.parent / "rejected.jsonl").read_text().splitlines())
    assert rejected["line"] == 31


@pytest.mark.slow
def test_audit_says_what_is_wrong_where_and_exits_with_3(tmp_path, run_script):
    bad = {"prompt": "a<|im_end|>" + " and on" * 600, "completion": "b"}
    given = write(tmp_path / "rows.jsonl", [*GOOD, bad])
    name = f"train.output_dir=outputs/{tmp_path.name}"
    arguments = [given, "data.eval_path=null", name]
    done = run_script("audit.py", *arguments)
    folder = ROOT / "outputs/audits" / tmp_path.name
    try:
        assert done.returncode == 3, done.stderr
        assert "too_long" in done.stdout
        assert "special_in_content" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 100
        audited = json.loads((folder / "audit.json").read_text("utf-8"))
        parts = (audited["train"], audited["held_out"])
        found = [part["problems"].get("too_long") for part in parts]
        (problem,) = filter(None, found)
        assert problem["rows"] == [f"{tmp_path}/rows.jsonl:31"]
        assert "special_in_content" in (folder / "audit.html").read_text("utf-8")
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    refused = run_script("train.py", *arguments)
    assert refused.returncode == 3
    assert "too_long: 1 of" in refused.stderr


@pytest.mark.slow
def test_show_data_shows_the_row_that_is_asked_for(tmp_path, run_script):
    given = [write(tmp_path / "rows.jsonl", GOOD), "data.eval_path=null"]
    done = run_script("show_data.py", "--row", "17", *given)
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl:17" in done.stdout
    assert "say 16" in done.stdout
    assert "findings: none" in done.stdout
    ids = run_script(
        "show_data.py",
        "--row",
        "rows.jsonl:17".replace("rows", f"{tmp_path}/rows"),
        "--ids",
        *given,
    )
    assert "2'<|im_end|>'" in ids.stdout
    missing = run_script("show_data.py", "--row", "99", *given)
    assert missing.returncode == 2
    assert "no row '99'" in missing.stderr


@pytest.mark.slow
def test_show_data_shows_the_first_row_of_a_table(tmp_path, run_script):
    (tmp_path / "rows.csv").write_text('question;answer\n"say\none";it is 1\nsay two;it is 2\n')
    given = [f"data.train_path={tmp_path}/rows.csv", "data.eval_path=null"]
    for words in ([], ["--row", "1"], ["--row", "3"]):
        done = run_script("show_data.py", *words, *given)
        assert done.returncode == 0, done.stderr
        assert "rows.csv:2: " in "".join(done.stdout.split("\n"))
        assert "it is 1" in done.stdout
        assert "it is 2" not in done.stdout
