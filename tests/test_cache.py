"""From files to proven examples: policies, all cores, and real data that the audit finds clean."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import datasets
import forked
import psutil
import pytest
from conftest import ROOT, representatives
from filelock import FileLock
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from sft.config.load import load_config, with_values
from sft.config.schema import Config, Data
from sft.data import audit_report, workers
from sft.data import cache as data_cache
from sft.data.cache import Prepared, prepare, write_audit
from sft.data.template import prepare_tokenizer
from sft.errors import DataError
from sft.models.pretrained import load_tokenizer
from sft.runtime import checkpoint, hardware


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, in its working directory."""
    monkeypatch.chdir(tmp_path)


def config(*overrides: str) -> Config:
    given = [f"model.name={ROOT}/nano/model", f"data.train_path={ROOT}/nano/train.jsonl"]
    given += [f"data.eval_path={ROOT}/nano/test.jsonl", *overrides]
    return load_config(ROOT / "configs/nano.yaml", given)


def rows(path, *answers: str):
    lines = [json.dumps({"prompt": f"say {n}", "completion": a}) for n, a in enumerate(answers)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return f"data.train_path={path}", "data.eval_path=null", "data.eval_fraction=0.3"


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hardware, "usable_cores", lambda: 2)
        return prepare(config("data.max_rows=1500", f"data.cache_dir={folder}"))


def test_one_core_and_all_cores_give_the_same(nano, monkeypatch):
    monkeypatch.setattr(hardware, "usable_cores", lambda: 1)
    alone = prepare(config("data.max_rows=1500"))
    assert list(alone.train) == list(nano.train)
    assert list(alone.train.rows()) == list(nano.train.rows())
    assert alone.audit == nano.audit


def test_the_embedded_task_has_no_error(nano):
    assert audit_report.count_errors(nano.audit) == 0
    kinds = {*nano.audit["train"]["problems"], *nano.audit["held_out"]["problems"]}
    assert kinds <= {"near_duplicate"}  # requests made from phrasings are alike


@pytest.mark.parametrize(("lines", "fraction"), [(400, 0.05), (400, 0.4), (3, 0.05), (1, 0.5)])
def test_a_single_document_is_cut_before_the_split(tmp_path, lines, fraction):
    text = "\n".join(f"line {n} of a story that goes on" for n in range(lines))
    (tmp_path / "story.txt").write_text(text)
    given = [f"data.train_path={tmp_path}/story.txt", "data.eval_path=null"]
    given += [f"data.eval_fraction={fraction}", "data.max_seq_len=64"]
    prepared = prepare(config(*given))
    parts = [prepared.train, prepared.held_out]
    train, held_out = ([i for example in part for i in example.ids] for part in parts)
    whole = prepared.tokenizer(text)["input_ids"] + [prepared.tokenizer.eos_token_id]
    assert train + held_out == whole  # one block, and no token on both sides
    assert len(held_out) == max(2, round(fraction * len(whole)))
    assert all(len(example.ids) == 64 for example in list(prepared.train)[:-1])
    assert all(example.labels == example.ids for part in parts for example in part)
    assert prepared.audit["held_out"]["problems"] == {}
    assert list(prepare(config(*given)).train) == list(prepared.train)


def test_documents_are_not_cut_where_there_are_two(tmp_path):
    (tmp_path / "a.txt").write_text("a long story <|endoftext|> another one")
    given = [f"data.train_path={tmp_path}/a.txt", "data.eval_path=null"]
    prepared = prepare(config(*given))
    assert [len(part) for part in (prepared.train, prepared.held_out)] == [1, 1]
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="found none in the file"):
        prepare(config(*given))


def test_a_document_too_short_to_be_cut(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    given = [f"data.train_path={tmp_path}/a.txt", "data.eval_path=null"]
    with pytest.raises(DataError, match=r"a.txt:1: nothing can be held out from the only document"):
        prepare(config(*given))
    eval_path = f"data.eval_path={tmp_path}/a.txt"
    with pytest.raises(DataError, match="leaked"):  # given as it is, it is not cut
        prepare(config(given[0], eval_path))


def test_hidden_files_are_in_the_audit(tmp_path, capsys):
    rows(tmp_path / "rows.jsonl", "one", "two", "three", "four")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    hidden = tmp_path / ".ipynb_checkpoints/rows-checkpoint.jsonl"
    hidden.write_text("{")
    given = [f"data.train_path={tmp_path}/*", "data.eval_path=null", "data.eval_fraction=0.3"]
    prepared = prepare(config(*given))
    assert (len(prepared.train), prepared.audit["hidden_files"]) == (3, [])
    given[0] = f"data.train_path={tmp_path}"
    given.append(f"train.output_dir={tmp_path}_run")
    for _ in range(2):  # the cache lies in the folder, and is not counted
        prepared = prepare(config(*given))
        assert (len(prepared.train), prepared.audit["hidden_files"]) == (3, [str(hidden)])
    assert f"not read: 1 hidden file, {hidden}" in "".join(capsys.readouterr().out.split("\n"))


def test_an_error_of_the_audit_stops_the_run_and_warn_lets_it_pass(tmp_path):
    given = rows(tmp_path / "rows.jsonl", "one", "two " * 600, "three", "four")
    with pytest.raises(DataError, match=r"(?s)too_long: 1 of .*rows.jsonl:2.*raise data.max_seq"):
        prepare(config(*given))
    assert audit_report.count_errors(prepare(config(*given, "data.audit=warn")).audit) == 1


def test_bad_rows_stop_the_run_or_are_skipped_and_listed(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = rows(path, "one", "two", "three", "four")
    path.write_text(path.read_text() + '{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"1 bad row.*\n.*rows.jsonl:5: expected the keys"):
        prepare(config(*given))
    prepared = prepare(config(*given, "data.on_bad_row=skip"))
    assert prepared.audit["rejected"] == 1
    write_audit(prepared, tmp_path)
    (rejected,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["excerpt"]) == (5, '{"prompt": "p"}')


def test_columns_that_are_not_used_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = rows(path, "one", "two", "three", "four")
    first, *others = map(json.loads, path.read_text().splitlines())
    lines = [first | {"id": 1, "label": 0}, *(row | {"id": n} for n, row in enumerate(others))]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"rows.jsonl:1: the column 'label' rates the answer"):
        prepare(config(*given))
    prepared = prepare(config(*given, "data.ignore_columns=[label]"))
    assert prepared.audit["ignored_columns"] == {"id": 1.0, "label": 0.25}


def test_an_optional_column_that_no_row_has_is_an_error(tmp_path):
    given = rows(tmp_path / "rows.jsonl", "one", "two", "three", "four")
    columns = "data.columns={prompt: prompt, completion: completion, system: sistem}"
    with pytest.raises(DataError, match=r"no column 'sistem', which data.columns.system names"):
        prepare(config(*given, columns))


def test_rows_of_tokens_become_examples_as_they_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    made = [{"input_ids": [5, n, 7], "labels": [-100, n, 7]} for n in range(8, 16)]
    path.write_text("\n".join(map(json.dumps, made)))
    given = f"data.train_path={path}", "data.eval_path=null", "data.eval_fraction=0.3"
    prepared = prepare(config(*given))
    found = [*prepared.train, *prepared.held_out]
    assert sorted(e.ids for e in found) == [row["input_ids"] for row in made]
    assert sorted(e.labels for e in found) == [row["labels"] for row in made]
    assert prepared.audit["formats"] == {"tokenised": 8}
    assert not prepared.audit["train"]["problems"]
    assert all("near" not in kind for kind in prepared.audit["held_out"]["problems"])
    write_audit(prepared, tmp_path)
    assert (tmp_path / "audit.html").exists()
    path.write_text(path.read_text() + '\n{"input_ids": [5, 99999999], "labels": [5, 99999999]}')
    with pytest.raises(DataError, match=r"rows.jsonl:9: input_ids: 99999999 \(token 1\) is no id"):
        prepare(config(*given))


def test_a_content_of_parts_is_the_same_row_where_the_template_reads_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [[("user", f"say {n}"), ("assistant", f"it is {n}")] for n in range(4)]
    made = []
    for parts in (False, True):
        lines = [
            {"messages": [turn(role, text, parts) for role, text in spoken]} for spoken in turns
        ]
        path.write_text("\n".join(map(json.dumps, lines)))
        made.append(
            prepare(
                config(f"data.train_path={path}", "data.eval_path=null", "data.eval_fraction=0.3")
            )
        )
    assert list(made[0].train) == list(made[1].train)
    assert list(made[0].held_out) == list(made[1].held_out)
    assert made[1].train.row(0).messages[0]["content"][1] == {"type": "text", "text": "ay "}


def turn(role: str, text: str, as_parts: bool):
    parts = [{"type": "text", "text": each} for each in (text[:1], text[1:4], text[4:])]
    return {"role": role, "content": parts if as_parts else text}


def test_variables_of_the_template_are_stored_with_the_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = rows(path, "one", "two", "three", "four")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["chat_template_kwargs"] = {"enable_thinking": False}
    path.write_text("\n".join(map(json.dumps, lines)))
    prepared = prepare(config(*given))
    found = {
        row.line: row.template_kwargs
        for part in (prepared.train, prepared.held_out)
        for row in part.rows()
    }
    assert found == {1: None, 2: {"enable_thinking": False}, 3: None, 4: None}


@pytest.mark.parametrize("policy", ["error", "drop", "truncate"])
def test_long_rows_are_counted(tmp_path, policy):
    given = rows(tmp_path / "rows.jsonl", "one", "two", "three " * 40, "four", "five")
    overrides = [*given, "data.max_seq_len=40", f"data.on_long={policy}", "data.eval_fraction=0.2"]
    if policy == "error":
        with pytest.raises(DataError, match="too_long: 1 of"):
            prepare(config(*overrides))
        return
    prepared = prepare(config(*overrides))
    found = prepared.audit["train"]["problems"] | prepared.audit["held_out"]["problems"]
    assert prepared.audit["dropped"] == (policy == "drop")
    assert ("answer_cut" in found) == (policy == "truncate")
    assert len(prepared.train) + len(prepared.held_out) == (4 if policy == "drop" else 5)


def test_duplicates_are_reported_or_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = rows(path, "one", "two", "three", "four")
    path.write_text(path.read_text() * 2)
    reported = prepare(config(*given)).audit["train"]["problems"]["duplicate"]
    assert reported["severity"] == "warning"
    dropped = prepare(config(*given, "data.duplicates=drop"))
    assert len(dropped.train) + len(dropped.held_out) == 4


def test_a_file_of_bad_rows_only_is_refused_in_any_case(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = rows(path, "one", "two")
    path.write_text('{"prompt": "p"}\n' * 20)
    with pytest.raises(DataError, match=r"20 bad rows.*\n.*rows.jsonl:1: expected the keys"):
        prepare(config(*given, "data.on_bad_row=skip"))


def test_bad_rows_of_reader_and_template_are_reported_in_their_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = rows(path, *map(str, range(5)))
    lines = path.read_text().splitlines()
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}  # of no such template
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    refused = {"messages": turns}
    lines[1], lines[3] = json.dumps(refused), '{"prompt": "p"}'
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as raised:
        prepare(config(*given))
    reported = str(raised.value)
    assert "2 bad rows" in reported
    assert reported.index("rows.jsonl:2:") < reported.index("rows.jsonl:4:")


def test_a_broken_table_is_one_message(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(DataError, match=r"t.parquet: the file is broken"):
        prepare(config("data.train_path=t.parquet"))


def test_a_document_is_stored_once_however_many_examples_it_makes(tmp_path):
    text = " ".join(f"word {n}" for n in range(3000))
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "other.txt").write_text("Another text altogether, of a few words.")
    given = ["data.train_path=long.txt", "data.eval_path=other.txt", "data.max_seq_len=64"]
    prepared = prepare(config(*given))
    assert len(prepared.train) > 50
    assert (prepared.folder / "rows.jsonl").stat().st_size < 2 * len(text)
    assert {row.place for row in prepared.train.rows()} == {"long.txt:1"}
    ids = [token for example in prepared.train for token in example.ids]
    assert prepared.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_what_is_trained_on_has_a_digest_of_its_tokens(tmp_path):
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "a b c"}] * 8
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    digests, lengths = set(), []
    for limit in (60, 100):
        given = ["data.train_path=rows.jsonl", "data.on_long=truncate_left_turns"]
        given += ["data.audit=warn", f"data.max_seq_len={limit}"]
        made = prepare(config(*given))
        digests.add(made.audit["data_sha256"])
        lengths.append(made.train.lengths[0])
    assert lengths[0] < lengths[1]
    assert len(digests) == 2


def test_rows_that_are_not_used_are_not_reported_of(tmp_path):
    """Dropped rows take no part in the split, rows that the mix does not draw do not leak."""
    given = rows(tmp_path / "rows.jsonl", "one", "two", *["three " * 40] * 3)
    limits = ["data.max_seq_len=40", "data.on_long=drop", "data.eval_fraction=0.5"]
    prepared = prepare(config(*given, *limits))
    assert (len(prepared.train), len(prepared.held_out)) == (1, 1)
    rows(tmp_path / "a.jsonl", *map(str, range(20)))
    mixed = ["data.train_path=a.jsonl", "data.eval_path=b.jsonl", "data.mix=[0.5]"]
    (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    leaked = prepare(config(*mixed, "data.audit=warn")).audit["held_out"]["problems"]
    assert leaked["leaked"]["count"] == 10


def test_a_leaked_row_is_an_error(tmp_path):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    given = rows(train, "one", "two", "three", "four")
    held_out.write_text(train.read_text().splitlines(True)[1])
    overrides = given[0], f"data.eval_path={held_out}"
    with pytest.raises(DataError, match=r"leaked: 1 of 1 held_out rows"):
        prepare(config(*overrides))
    shown = prepare(config(*overrides, "data.audit=warn")).samples()
    assert [kinds for row, _, kinds in shown if row.file == str(held_out)] == [["leaked"]]


def test_the_page_shows_the_worst_rows_and_runs_nothing(tmp_path, nano):
    row = replace(nano.train.row(0), file="<script>alert(1)</script>")
    sample = (row, nano.train[0], ["no_end_of_turn"])
    path = tmp_path / "audit.html"
    audit_report.write_html(path, nano.tokenizer, nano.audit, [sample])
    page = path.read_text("utf-8")
    assert "<script>" not in page
    assert "no_end_of_turn" in page
    assert "<span class='special supervised'>&lt;|im_end|&gt;</span>" in page


# --- the cache ---------------------------------------------------------------------------------


def model(folder: Path) -> Path:
    """A copy of the embedded model's tokenizer and shape."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(ROOT / "nano/model" / name, folder)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def other_libraries(folder, monkeypatch):
    monkeypatch.setattr(data_cache, "version", lambda name: "0")


def other_code(folder, monkeypatch):
    package = folder / "package"
    shutil.copytree(ROOT / "sft/data", package)
    edit(package / "template.py", "IGNORED = -100", "IGNORED = -101")
    monkeypatch.setattr(data_cache, "__file__", str(package / "cache.py"))


CHANGES = {  # of everything that examples and audit depend on: an override, or an edit
    "a word of the data": lambda f, _: edit(f / "rows.jsonl", "two", "too"),
    "a held-out row": lambda f, _: edit(f / "held_out.jsonl", "six", "seven"),
    "the name of the file": lambda f, _: [
        f"data.train_path={shutil.copy(f / 'rows.jsonl', f / 'b.jsonl')}"
    ],
    "the tokenizer": lambda f, _: edit(
        f / "model/tokenizer.json", '"normalizer": null', '"normalizer": {"type": "NFC"}'
    ),
    "the end of turn": lambda f, _: edit(
        f / "model/tokenizer_config.json",
        '"eos_token": "<|im_end|>"',
        '"eos_token": "<|im_start|>"',
    ),
    "the template": lambda f, _: edit(f / "model/chat_template.jinja", "message", "m"),
    "the template for tools": lambda f, _: edit(
        f / "model/additional_chat_templates/tool_use.jinja", "message", "m"
    ),
    "how special tokens are read": lambda f, _: edit(
        f / "model/tokenizer_config.json",
        '"eos_token": "<|im_end|>"',
        '"eos_token": "<|im_end|>", "split_special_tokens": true',
    ),
    "the model's positions": lambda f, _: edit(
        f / "model/config.json", '"max_position_embeddings": 512', '"max_position_embeddings": 64'
    ),
    "the code": other_code,
    "a library": other_libraries,
    "format": lambda *_: ["data.format=prompt_completion"],
    "ignore_columns": lambda *_: ["data.ignore_columns=[id]"],
    "csv_delimiter": lambda *_: ["data.csv_delimiter=;"],
    "columns": lambda *_: ["data.columns={prompt: completion, completion: prompt}"],
    "replay": lambda f, _: [f"data.replay.path={f / 'held_out.jsonl'}"],
    "system": lambda *_: ["data.system=replace", "data.system_prompt=Be brief."],
    "on_bad_row": lambda *_: ["data.on_bad_row=skip"],
    "duplicates": lambda *_: ["data.duplicates=drop"],
    "max_rows": lambda *_: ["data.max_rows=2"],
    "max_seq_len": lambda *_: ["data.max_seq_len=100"],
    "on_long": lambda *_: ["data.on_long=drop"],
    "supervise": lambda *_: ["data.supervise=last"],
    "turns": lambda *_: ["data.turns=split"],
    "empty_thoughts": lambda *_: ["data.empty_thoughts=false"],
    "chat_template": lambda f, _: [f"data.chat_template={f}/model/chat_template.jinja"],
    "template_kwargs": lambda f, _: (
        edit(f / "model/chat_template.jinja", "{% for", "{{ mood }}{% for"),
        ["data.template_kwargs={mood: good}"],
    )[1],
    "model.stop_tokens": lambda *_: ["model.stop_tokens=[<|im_start|>]"],
    "mix": lambda *_: ["data.mix=[0.5]"],
    "eval_fraction": lambda *_: ["data.eval_path=null", "data.eval_fraction=0.3"],
}


def key_of(folder: Path, *overrides: str) -> str:
    given = config(
        f"model.name={folder}/model",
        f"data.train_path={folder}/rows.jsonl",
        f"data.eval_path={folder}/held_out.jsonl",
        *overrides,
    )
    tokenizer = data_cache.load_tokenizer(given)
    return data_cache.cache_key(data_cache.cache_inputs(given, tokenizer))


@pytest.fixture
def material(tmp_path) -> Path:
    rows(tmp_path / "rows.jsonl", "one", "two", "three", "four")
    rows(tmp_path / "held_out.jsonl", "five", "six")
    folder = model(tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "additional_chat_templates/tool_use.jinja").write_text(template)
    return tmp_path


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_examples_depend_on_changes_the_key(material, monkeypatch, change):
    before = key_of(material)
    assert key_of(material) == before
    overrides = CHANGES[change](material, monkeypatch) or []
    assert key_of(material, *overrides) != before


def test_every_option_of_the_section_is_in_the_key_or_known_not_to_matter(material):
    tested = {option for option in Data.model_fields if option in CHANGES}
    elsewhere = {"train_path", "eval_path", "system_prompt", "audit", "cache_dir"}
    assert tested | elsewhere == set(Data.model_fields)
    assert key_of(material, "data.audit=warn", "data.cache_dir=x") == key_of(material)
    assert key_of(material, "train.seed=1", "train.learning_rate=1") == key_of(material)
    drawn = ["data.mix=[0.5]", "data.eval_path=null"]
    for option in drawn:
        assert key_of(material, option, "train.seed=1") != key_of(material, option)


def test_what_is_prepared_is_only_mapped_afterwards(material, monkeypatch):
    given = config(*rows(material / "rows.jsonl", "one", "two", "three", "four"))
    first = data_cache.prepare(given)
    monkeypatch.setattr(data_cache, "_fill", None)
    second = data_cache.prepare(given)
    assert list(second.train) == list(first.train)
    assert list(second.held_out.rows()) == list(first.held_out.rows())
    assert second.audit == first.audit
    assert not second.train.arrays.ids.flags.writeable


def test_stale_data_are_refused_and_warn_prepares_them_anew(material, capsys):
    given = config(*rows(material / "rows.jsonl", "one", "two", "three", "four"))
    first = data_cache.prepare(given)
    (first.folder / "ids.bin").unlink()  # not cut: `first` has it mapped
    (first.folder / "ids.bin").touch()
    with pytest.raises(DataError, match=r"stale or damaged: ids.bin has 0 bytes.*make audit"):
        data_cache.prepare(given)
    second = data_cache.prepare(with_values(given, {"data.audit": "warn"}))
    assert "made anew" in capsys.readouterr().out
    assert list(second.train) == list(first.train)
    data_cache.prepare(given)


def test_what_fails_half_way_leaves_nothing_that_looks_prepared(material, monkeypatch):
    given = config(*rows(material / "rows.jsonl", "one", "two", "three", "four"))
    with monkeypatch.context() as patched:
        patched.setattr(data_cache, "_decide", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data_cache.prepare(given)
    cache = Path(".cache/data")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    made_of = data_cache.cache_inputs(given, prepare_tokenizer(load_tokenizer(given.model)))
    killed = cache / checkpoint.SCRATCH / data_cache.cache_key(made_of)
    killed.mkdir(parents=True)
    (killed / "ids.bin").write_bytes(b"half")
    assert len(data_cache.prepare(given).train) == 3
    assert not killed.exists()


def test_the_day_that_a_template_writes_is_that_of_preparing(material, monkeypatch):
    """Else a run could not be resumed after midnight."""
    edit(material / "model/chat_template.jinja", "{% for", "{{ strftime_now('%Y') }}{% for")
    given = config(f"model.name={material}/model", *rows(material / "a.jsonl", *map(str, range(6))))
    first = data_cache.prepare(given)
    later = SimpleNamespace(now=lambda: datetime(2099, 1, 1))
    monkeypatch.setattr(chat_template_utils, "datetime", later)
    second = data_cache.prepare(given)
    assert second.folder == first.folder
    assert list(second.train) == list(first.train)
    anew = data_cache.prepare(with_values(given, {"data.cache_dir": "other"}))
    assert list(anew.train) != list(first.train)  # the clock was really another


def test_a_file_that_changes_while_it_is_read_is_reported(material, monkeypatch):
    given = config(*rows(material / "rows.jsonl", "one", "two", "three", "four"))
    write_rows = data_cache._write_rows

    def meanwhile(*arguments):
        counts = write_rows(*arguments)
        edit(material / "rows.jsonl", "two", "too")
        return counts

    monkeypatch.setattr(data_cache, "_write_rows", meanwhile)
    with pytest.raises(DataError, match=r"data.train_path changed while they were read"):
        data_cache.prepare(given)


def test_a_dataset_of_the_hub_is_keyed_by_its_content(material, monkeypatch):
    answers = ["one", "two", "three", "four"]

    def load(name, config, split):
        turns = [{"prompt": f"say {n}", "completion": a} for n, a in enumerate(answers)]
        return datasets.Dataset.from_list(turns)

    monkeypatch.setattr(datasets, "load_dataset", load)
    given = config("data.train_path=owner/name")
    first = data_cache.prepare(given)
    assert len(first.train) == 4
    assert first.train.row(1).place == "owner/name:2"
    assert data_cache.prepare(given).folder == first.folder
    answers[1] = "too"
    assert data_cache.prepare(given).folder != first.folder


def test_a_killed_worker_is_one_message(material, monkeypatch):
    given = config(*rows(material / "rows.jsonl", *map(str, range(2000))))
    monkeypatch.setattr(hardware, "usable_cores", lambda: 2)
    monkeypatch.setattr(workers, "render_rows", lambda *_: os._exit(9))
    with pytest.raises(DataError, match="was killed, most likely because memory ran out"):
        data_cache.prepare(given)


@pytest.mark.parametrize("cores", [1, 2])
def test_memory_is_bounded_by_tokens_whatever_rows_a_template_makes_long(
    material, monkeypatch, cores
):
    """The examples are the same, and a worker never holds more than MOST_TOKENS and one row."""
    texts = [f"{number} " * (number % 7 * (1 + number % 5)) + "x" for number in range(300)]
    given = config(*rows(material / "rows.jsonl", *texts), "data.on_long=drop")
    first = data_cache.prepare(given)
    expected = {path.name: path.read_bytes() for path in first.folder.glob("*.bin")}
    shutil.rmtree(first.folder)
    monkeypatch.setattr(hardware, "usable_cores", lambda: cores)
    monkeypatch.setattr(workers, "CHUNK_CHARACTERS", 2000)
    monkeypatch.setattr(workers, "MOST_TOKENS", 500)
    real, made = workers.map_chunks, []

    def watched(*arguments):
        for done in real(*arguments):
            made.append(done)
            yield done

    monkeypatch.setattr(workers, "map_chunks", watched)
    again = data_cache.prepare(given)
    assert {path.name: path.read_bytes() for path in again.folder.glob("*.bin")} == expected
    longest = max(map(len, (example.ids for example in again.train)))
    assert max(len(done.arrays.ids) for done in made) <= 500 + longest
    assert sum(done.num_taken for done in made) == len(texts)
    assert len(made) > 10
    assert any(len(done.arrays.ids) > 500 for done in made), "no chunk was left before its end"


def test_every_rank_prepares_anew_what_one_does(material, monkeypatch):
    given = config(*rows(material / "rows.jsonl", "one", "two", "three", "four"), "data.audit=warn")
    first = data_cache.prepare(given)
    ids = (first.folder / "ids.bin").read_bytes()
    (first.folder / "ids.bin").unlink()  # of unchanged size: only its digest reports
    (first.folder / "ids.bin").write_bytes(ids[:-1] + bytes([ids[-1] ^ 1]))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(data_cache.prepare(given).train) == list(first.train)


def test_what_another_process_holds_is_not_pruned(material, monkeypatch):
    given = rows(material / "rows.jsonl", "one", "two", "three", "four")
    folder = data_cache.prepare(config(*given, "data.max_seq_len=100")).folder
    monkeypatch.setattr(data_cache, "KEPT", 0)
    with FileLock(folder.with_suffix(".lock")):
        data_cache.prepare(config(*given))
        assert folder.exists()
    data_cache.prepare(config(*given))
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_is_one_message(material):
    given = rows(material / "rows.jsonl", "one", "two", "three", "four")
    (material / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot keep prepared data in .*set data.cache_dir"):
        data_cache.prepare(config(*given, "data.cache_dir=file/cache"))


def test_only_what_was_used_last_is_kept(material, monkeypatch):
    monkeypatch.setattr(data_cache, "KEPT", 2)
    given = rows(material / "rows.jsonl", "one", "two", "three", "four")
    folders = []
    for number in (0, 1, 0, 2):
        folders.append(
            data_cache.prepare(config(*given, f"data.max_seq_len={100 + number}")).folder
        )
        os.utime(folders[-1], (number, 10 + len(folders)))
    assert [folder.exists() for folder in folders] == [True, False, True, True]


def fork(material: Path, code: str, *given: str, log: Path) -> forked.ForkServerProcess:
    """Starts a process that runs this program on a configuration with these overrides."""
    script = log.with_suffix(".py")  # its own: writing would empty one that another process reads
    script.write_text(code)
    overrides = [f"model.name={ROOT}/nano/model", *given, f"data.cache_dir={material}/cache"]
    return forked.start(1, [str(script), str(ROOT / "configs/nano.yaml"), *overrides], log)


@pytest.mark.slow
def test_of_processes_that_ask_at_once_one_prepares(material):
    given = rows(material / "rows.jsonl", *(f"answer {n}" for n in range(3000)))
    code = (
        "import sys; from sft.data import cache; from sft.config.load import load_config\n"
        "fill, calls = cache._fill, []\n"
        "cache._fill = lambda *a: (calls.append(1), fill(*a))\n"
        "made = cache.prepare(load_config(sys.argv[1], sys.argv[2:]))\n"
        "print('made', len(calls), len(made.train), sum(made.train.lengths))\n"
    )
    logs = [material / f"{number}.log" for number in range(3)]
    started = [fork(material, code, *given, log=log) for log in logs]
    for process in started:
        process.join()
    reported = [log.read_text().rpartition("made ")[2].split() for log in logs]
    assert sorted(calls for calls, _, _ in reported) == ["0", "0", "1"]
    assert len({tuple(rest) for _, *rest in reported}) == 1


def own_memory(pid: int) -> int:
    """KiB of a process or its largest child, without the files that it has mapped."""
    try:
        pids = [pid, *(child.pid for child in psutil.Process(pid).children())]
        texts = [Path(f"/proc/{each}/status").read_text() for each in pids]
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return 0
    return max(int((re.findall(r"RssAnon:\s+(\d+)", text) or ["0"])[0]) for text in texts)


@pytest.mark.slow
def test_rows_are_not_held_in_memory(material):
    """9,000 rows more; held in memory they would take over 10 MiB."""
    code = (
        "import sys; from sft.data import cache; from sft.config.load import load_config\n"
        "cache.prepare(load_config(sys.argv[1], sys.argv[2:]))\n"
    )
    peaks = []
    for number in (3_000, 12_000):
        draw = random.Random(0)
        answers = (" ".join(f"w{draw.randrange(999)}" for _ in range(40)) for _ in range(number))
        given = rows(material / "rows.jsonl", *answers)
        options = "data.max_seq_len=2000", "data.on_long=drop"
        process, peak = fork(material, code, *given, *options, log=material / "log"), 0
        while process.is_alive():
            peak = max(peak, own_memory(process.pid))
            time.sleep(0.02)
        assert process.exitcode == 0
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 5 << 10, peaks


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


def real_model(shared: Path, tmp_path: Path, tokenizer: str) -> Path:
    """A model folder with that tokenizer and room for long rows."""
    folder = shared / ("models" if tokenizer == "stories260K" else "data/tokenizers") / tokenizer
    model = tmp_path / "model"
    model.mkdir()
    for part in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / part).exists():
            (model / part).symlink_to(folder / part)
    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    settings = {
        "model_type": "llama",
        "max_position_embeddings": 100_000,
        "vocab_size": max(vocabulary.values()) + 1,
    }
    (model / "config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", representatives(["error", "drop", "truncate_left_turns", "truncate"])
)
def test_the_longest_real_row_gets_what_the_policy_says(shared, tmp_path, policy):
    """11,561 tokens with its tools; the answer stands behind the limit."""
    given = config(
        f"model.name={real_model(shared, tmp_path, 'qwen2.5-instruct')}",
        f"data.train_path={shared}/data/chat/glaive_toolcall_en_demo.json",
        "data.eval_path=null",
        "data.max_seq_len=4096",
        "data.audit=warn",
        f"data.on_long={policy}",
    )
    prepared = data_cache.prepare(given)
    reported, long = prepared.audit["train"], {"too_long": 1, "length_outlier": 1}
    is_kept = policy in ("error", "truncate_left_turns")  # its last exchange is as long by itself
    assert {kind: reported["problems"].get(kind, {"count": 0})["count"] for kind in long} == (
        long if is_kept else dict.fromkeys(long, 0)
    )
    assert reported["longest"] == (11_561 if is_kept else 1910)
    assert prepared.audit["dropped"] == (not is_kept)


# Rows of one question and one answer with one tokenizer each; those of several turns, and with
# tools, with each template that treats them in its own way.
READ_WITH = [("gsm8k", "qwen2.5-instruct"), ("rasbt", "minimind"), ("self-instruct", "stories260K")]
READ_WITH += [("hatecheck", "stories260K"), ("fastchat", "qwen2.5-instruct")]
READ_WITH += [(name, "minimind") for name in ("fastchat", "glaive")]
READ_WITH += [("glaive", "qwen2.5-instruct"), ("glaive", "stories260K")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokenizer"),
    representatives(READ_WITH, [("gsm8k", "qwen2.5-instruct")]),
)
def test_real_data_have_no_error(shared, tmp_path, name, tokenizer):
    file, overrides, expected = REAL[name]
    given = config(
        f"model.name={real_model(shared, tmp_path, tokenizer)}",
        f"data.train_path={shared}/data/{file}",
        "data.eval_path=null",
        "data.max_seq_len=100000",
        "data.audit=warn",
        *overrides,
    )
    if name == "glaive" and tokenizer == "stories260K":  # its plain template knows no tools
        with pytest.raises(DataError, match="does not write the name of a call"):
            data_cache.prepare(given)
        return
    prepared = data_cache.prepare(given)
    problems = prepared.audit["train"]["problems"] | prepared.audit["held_out"]["problems"]
    errors = {k: v["rows"][:5] for k, v in problems.items() if v["severity"] == "error"}
    assert errors == {}
    assert set(problems) <= expected | {"near_duplicate", "near_leak", "length_outlier"}
