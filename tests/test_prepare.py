"""From files to proven examples: policies, all cores, and real data that the audit finds clean."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import ROOT

from sft import audit, prepare
from sft.config import Config, load_config
from sft.data import DataError


def config(*overrides: str) -> Config:
    return load_config(ROOT / "configs/nano.yaml", [f"model.name={ROOT}/nano/model", *overrides])


def rows(path, *answers: str):
    lines = [json.dumps({"prompt": f"say {n}", "completion": a}) for n, a in enumerate(answers)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return f"data.train_path={path}", "data.eval_path=null", "data.eval_fraction=0.3"


@pytest.fixture(scope="module")
def nano() -> prepare.Prepared:
    return prepare.prepare(config("data.max_rows=1500"))


def test_one_core_and_all_cores_give_the_same(nano, monkeypatch):
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda _: {0})
    alone = prepare.prepare(config("data.max_rows=1500"))
    assert alone.train == nano.train
    assert alone.train_rows == nano.train_rows
    assert alone.audit == nano.audit


def test_the_embedded_task_has_no_error(nano):
    assert audit.num_errors(nano.audit) == 0
    kinds = {*nano.audit["train"]["problems"], *nano.audit["held_out"]["problems"]}
    assert kinds <= {"near_duplicate"}  # requests made from phrasings are alike


def test_an_error_of_the_audit_stops_the_run_and_warn_lets_it_pass(tmp_path):
    given = rows(tmp_path / "rows.jsonl", "one", "two <|im_end|>", "three", "four")
    with pytest.raises(
        DataError,
        match=r"(?s)special_in_content: 1 of .*rows.jsonl:2\).*remedy|"
        r"special_in_content: 1 of .*rows.jsonl:2.*write it otherwise",
    ):
        prepare.prepare(config(*given))
    assert audit.num_errors(prepare.prepare(config(*given, "data.audit=warn")).audit) == 1


def test_bad_rows_stop_the_run_or_are_skipped_and_listed(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = rows(path, "one", "two", "three", "four")
    path.write_text(path.read_text() + '{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"1 bad row.*\n.*rows.jsonl:5: expected the keys"):
        prepare.prepare(config(*given))
    prepared = prepare.prepare(config(*given, "data.on_bad_row=skip"))
    assert prepared.audit["rejected"] == 1
    prepare.write(prepared, tmp_path)
    (rejected,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["excerpt"]) == (5, '{"prompt": "p"}')


@pytest.mark.parametrize("policy", ["error", "drop", "truncate"])
def test_long_rows_are_counted(tmp_path, policy):
    given = rows(tmp_path / "rows.jsonl", "one", "two", "three " * 40, "four", "five")
    overrides = [*given, "data.max_seq_len=40", f"data.on_long={policy}", "data.eval_fraction=0.2"]
    if policy == "error":
        with pytest.raises(DataError, match="too_long: 1 of"):
            prepare.prepare(config(*overrides))
        return
    prepared = prepare.prepare(config(*overrides))
    found = prepared.audit["train"]["problems"] | prepared.audit["held_out"]["problems"]
    assert prepared.audit["dropped"] == (policy == "drop")
    assert ("answer_cut" in found) == (policy == "truncate")
    assert len(prepared.train) + len(prepared.held_out) == (4 if policy == "drop" else 5)


def test_duplicates_are_told_or_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = rows(path, "one", "two", "three", "four")
    path.write_text(path.read_text() * 2)
    told = prepare.prepare(config(*given)).audit["train"]["problems"]["duplicate"]
    assert told["severity"] == "warning"
    dropped = prepare.prepare(config(*given, "data.duplicates=drop"))
    assert len(dropped.train) + len(dropped.held_out) == 4


def test_a_leaked_row_is_an_error(tmp_path):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    given = rows(train, "one", "two", "three", "four")
    held_out.write_text(train.read_text().splitlines(True)[1])
    with pytest.raises(DataError, match=r"leaked: 1 of 1 held_out rows"):
        prepare.prepare(config(given[0], f"data.eval_path={held_out}"))


def test_the_page_shows_the_worst_rows_and_runs_nothing(tmp_path, nano):
    row = replace(nano.train_rows[0], file="<script>alert(1)</script>")
    sample = (row, nano.train[0], ["no_end_of_turn"])
    path = tmp_path / "audit.html"
    audit.write_html(path, nano.tokenizer, nano.audit, [sample])
    page = path.read_text("utf-8")
    assert "<script>" not in page
    assert "no_end_of_turn" in page
    assert "<span class='special supervised'>&lt;|im_end|&gt;</span>" in page


# --- real data ---------------------------------------------------------------------------------

COLUMNS = {
    "self": "{instruction: instruction, input: instances.0.input, output: instances.0.output}",
    "hate": "{prompt: test_case, completion: label_gold}",
}
REAL = {  # file, more overrides, kinds that are found and right
    "gsm8k": ("instruct/gsm8k_test.jsonl", [], set()),
    "rasbt": ("instruct/rasbt_instruction_data.json", [], {"near_duplicate", "near_leak"}),
    "self-instruct": (
        "instruct/self_instruct_seed_tasks.jsonl",
        [f"data.columns={COLUMNS['self']}"],
        set(),
    ),
    "fastchat": ("chat/fastchat_dummy_conversation.json", [], {"duplicate", "near_duplicate"}),
    "glaive": (
        "chat/glaive_toolcall_en_demo.json",
        ["data.duplicates=drop"],
        {"near_duplicate", "near_leak", "length_outlier"},
    ),
    "hatecheck": (
        "classify/hatecheck_test_suite_cases.csv",
        [f"data.columns={COLUMNS['hate']}"],
        {"near_duplicate", "near_leak", "duplicate"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["qwen2.5-instruct", "minimind", "stories260K"])
@pytest.mark.parametrize("name", REAL)
def test_real_data_have_no_error(shared, tmp_path, name, tokenizer):
    file, overrides, expected = REAL[name]
    folder = shared / ("models" if tokenizer == "stories260K" else "data/tokenizers") / tokenizer
    model = tmp_path / "model"
    model.mkdir()
    for part in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / part).exists():
            (model / part).symlink_to(folder / part)
    settings = {"model_type": "llama", "max_position_embeddings": 100_000}
    (model / "config.json").write_text(json.dumps(settings))
    given = config(
        f"model.name={model}",
        f"data.train_path={shared}/data/{file}",
        "data.eval_path=null",
        "data.max_seq_len=100000",
        "data.audit=warn",
        *overrides,
    )
    if name == "glaive" and tokenizer == "stories260K":  # its plain template knows no tools
        with pytest.raises(DataError, match="use a model whose template knows tools"):
            prepare.prepare(given)
        return
    prepared = prepare.prepare(given)
    problems = prepared.audit["train"]["problems"] | prepared.audit["held_out"]["problems"]
    errors = {k: v["rows"][:5] for k, v in problems.items() if v["severity"] == "error"}
    assert errors == {}
    assert set(problems) <= expected | {"near_duplicate", "near_leak", "length_outlier"}
