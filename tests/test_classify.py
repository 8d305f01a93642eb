"""Labels of texts: the parts of a data set, scores, bad input, whole runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import forked
import pytest
from conftest import ROOT
from sklearn.metrics import accuracy_score, f1_score, recall_score

from sft.config.load import load_config
from sft.config.schema import Classify
from sft.errors import ConfigError, DataError
from sft.evaluate.labels import label_of
from sft.evaluate.predictions import Predictions, key_of, read_records
from sft.serve.classify import rows as classify_rows
from sft.serve.classify import strategies
from sft.serve.classify.rows import LabelledText, most_common_label, split_parts

KNOWN = ["hateful", "non-hateful"]


# --- parts ---------------------------------------------------------------------------------------


def some_examples(seed: int, num: int = 300) -> list[LabelledText]:
    draw = random.Random(seed)
    return [
        LabelledText(
            f"text {draw.randrange(num)}",
            draw.choice("aab"),
            "",
            f"f:{i}",
            tuple(str(draw.randrange(num)) for _ in range(draw.randrange(3))) if i % 3 == 0 else (),
        )
        for i in range(num)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_parts_hold_every_row_once_and_what_is_alike_together(seed):
    settings, examples = Classify(labels=["a", "b"], seed=seed), some_examples(seed)
    parts = split_parts(examples, settings)
    assert sorted(row.place for own in parts.values() for row in own) == sorted(
        row.place for row in examples
    )
    for one in parts:
        for other in set(parts) - {one}:
            for kind in (lambda row: {row.text}, lambda row: {*row.ids}):
                shared = {k for row in parts[one] for k in kind(row)} & {
                    k for row in parts[other] for k in kind(row)
                }
                assert not shared
    again = split_parts(random.Random(7).sample(examples, len(examples)), settings)
    assert {part: set(own) for part, own in again.items()} == {
        part: set(own) for part, own in parts.items()
    }
    assert split_parts(examples, Classify(seed=seed + 1)) != parts


def test_parts_have_their_shares_of_every_label():
    examples = [LabelledText(f"text {i}", "ab"[i % 4 == 0], "", f"f:{i}") for i in range(400)]
    parts = split_parts(examples, Classify())
    for part, size in (("test", 80), ("validation", 40), ("train", 280)):
        assert len(parts[part]) == size
        assert sum(row.label == "b" for row in parts[part]) == size / 4
    assert most_common_label(parts["train"]) == "a"


def test_too_few_families_for_three_parts_are_reported():
    one = [LabelledText(f"text {i}", "a", "", f"f:{i}", ("same",)) for i in range(10)]
    with pytest.raises(DataError, match=r"none for validation: 10 rows are 1 families"):
        split_parts(one, Classify(path="f"))


def test_templates_of_the_test_part_are_unseen_in_training(shared):
    settings = load_config(
        ROOT / "configs/classify_hatecheck.yaml",
        [f"classify.path={shared}/data/classify/hatecheck_test_suite_cases.csv"],
    ).classify
    examples = classify_rows.read_examples(settings)
    assert len(examples) == 3728
    assert sum(row.label == "hateful" for row in examples) == 2563
    parts = classify_rows.split_parts(examples, settings)
    templates = {part: {i for row in own for i in row.ids} for part, own in parts.items()}
    assert not templates["test"] & (templates["train"] | templates["validation"])
    assert len(parts["test"]) == pytest.approx(0.2 * 3728, rel=0.03)


# --- scores --------------------------------------------------------------------------------------


def test_failures_count_and_groups_are_those_of_scikit_learn(tmp_path):
    draw = random.Random(1)
    said = {"hateful": "hateful", "non-hateful": "It is non-hateful.", "?": "hate", "!": None}
    rows = [(draw.choice(KNOWN), draw.choice([*said]), draw.choice("xyz")) for _ in range(60)]
    predictions = Predictions(tmp_path / "predictions.jsonl")
    for index, (truth, kind, group) in enumerate(rows):
        record = {"index": index, "key": key_of(index), "prompt": "", "reference": truth}
        predictions.append([record | {"answer": said[kind], "group": group}])
    scored = strategies.score_labels(predictions.path, KNOWN)
    report = scored.report()
    assert report["num_failed"] == sum(kind in "?!" for _, kind, _ in rows) > 0
    assert report["num_errors"] == sum(kind == "!" for _, kind, _ in rows) > 0
    assert report["share_failed"] == report["num_failed"] / 60
    for name, found in [("", report), *report["groups"].items()]:
        own = [row for row in rows if name in ("", row[2])]
        truth, given = [row[0] for row in own], [row[1] for row in own]
        assert found["num_examples"] == len(own)
        assert found["num_failed"] == sum(kind in "?!" for kind in given)
        assert found["metrics"]["accuracy"] == pytest.approx(accuracy_score(truth, given))
        options = {"labels": KNOWN, "average": "macro", "zero_division": 0}
        assert found["metrics"]["macro_f1"] == pytest.approx(f1_score(truth, given, **options))
        assert found["metrics"]["macro_recall"] == pytest.approx(
            recall_score(truth, given, **options)
        )
        low, high = found["intervals"]["accuracy"]
        assert low <= found["metrics"]["accuracy"] <= high
    assert sum(group["num_examples"] for group in report["groups"].values()) == 60


def test_the_most_common_label_is_compared_on_the_same_examples(tmp_path):
    predictions = Predictions(tmp_path / "predictions.jsonl")
    for index in range(40):
        record = {
            "index": index,
            "key": key_of(index),
            "prompt": "",
            "reference": KNOWN[index % 4 > 2],
        }
        predictions.append([record | {"answer": record["reference"]}])
    scored = strategies.score_labels(predictions.path, KNOWN)
    constant = strategies.score_labels(predictions.path, KNOWN, "hateful")
    all_against = strategies.compare_with_constant(constant, {"x": scored, "y": constant})
    found, same = all_against["x", "accuracy"], all_against["y", "accuracy"]
    assert (found.value_a, found.value_b, found.verdict) == (0.75, 1.0, "better")
    assert (same.difference, same.verdict) == (0.0, "not distinguishable")
    assert found.adjusted_p == pytest.approx(4 * found.p_value)  # two strategies, two scores


# --- bad input -----------------------------------------------------------------------------------

TEXTS = {"good": ["what a fine day", "tea is nice"], "bad": ["rain again", "this soup is cold"]}


def write(folder: Path, rows: list[dict[str, object]] | None = None) -> Path:
    """A configuration of two strategies, and its rows: four of every label and group."""
    if rows is None:
        rows = [
            {"said": f"{text}, number {i}", "kind": kind, "about": f"group {i % 2}"}
            for kind, texts in TEXTS.items()
            for text in texts
            for i in range(6)
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = folder / "c.yaml"
    config.write_text(
        f"""
model: {{name: nano/model}}
tuning: {{mode: full}}
train: {{output_dir: {folder}/tuned, max_steps: 2, global_batch: 4, tensorboard: false}}
evaluation: {{num_examples: 2, max_new_tokens: 6}}
classify:
  path: {folder}/rows.jsonl
  output_dir: {folder}/classify
  text: said
  label: kind
  group: about
  labels: [good, bad]
  tune: json
  strategies:
    plain: {{user: "good or bad? {{text}}", generation: {{max_new_tokens: 4}}}}
    json:
      system: Answer with JSON.
      user: "good or bad? {{text}}"
      answer: '{{"label": "{{label}}"}}'
      generation: {{max_new_tokens: 6}}
""",
        "utf-8",
    )
    return config


@pytest.mark.parametrize(
    ("override", "reported"),
    [
        ("classify.tune=jsn", "classify.tune: no strategy 'jsn'; did you mean json?"),
        ("classify.use=[plain, x]", "classify.use: no strategy 'x'; known: plain, json"),
        ("classify.strategies.plain.user=say", "plain.user: expected {text} where the text stands"),
        ("classify.strategies.plain.answer=it", "plain.answer: expected an answer in which each"),
        (
            "classify.strategies.plain.usr=x",
            "plain.usr (override): unknown key; did you mean user?",
        ),
        ("classify.strategies.plain=x", "expected a section with keys, found 'x'"),
        (
            "classify.strategies.plain.generation.max_new_token=3",
            "max_new_token (override): unknown key; did you mean max_new_tokens?",
        ),
        (
            "classify.strategies.plain.generation.top_p=3",
            "top_p (override): expected number > 0, ≤ 1, found 3",
        ),
        ("classify.strategie=x", "classify.strategie (override): unknown key; did you mean strate"),
        ("classify.labels=[good]", "classify.labels: expected two or more that differ"),
        ("classify.labels=[good, GOOD]", "classify.labels: expected two or more that differ"),
        ("classify.test_fraction=0.95", "classify.test_fraction: with validation_fraction it leav"),
        ("data.train_path=mine.jsonl", "data.train_path: make classify writes"),
        ("model.revision=main", "model.revision: make classify loads a model by its name alone"),
    ],
)
def test_a_section_that_cannot_work_is_reported_before_data_are_read(tmp_path, override, reported):
    file = write(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    classify_rows.check_section(load_config(file), tune=True)
    with pytest.raises(ConfigError) as error:
        classify_rows.check_section(load_config(file, [override]))
    assert reported in str(error.value)


def test_a_file_without_the_section_is_reported(tmp_path):
    with pytest.raises(
        ConfigError, match=r"classify\.path: required, and not given: the file of t"
    ):
        classify_rows.check_section(load_config(ROOT / "configs/nano.yaml"))


ROW = {"said": "tea", "kind": "good", "about": "x"}


@pytest.mark.parametrize(
    ("rows", "override", "reported"),
    [
        (
            [ROW],
            "classify.text=sad",
            "no column 'sad', which classify.text names; did you mean said?",
        ),
        (
            [ROW],
            "classify.group=abut",
            "no column 'abut', which classify.group names; did you mean",
        ),
        ([ROW], "classify.split_by=[zz]", "no column 'zz', which classify.split_by names; known:"),
        (
            [ROW | {"kind": "0"}, ROW | {"kind": 1}],
            "",
            "the column 'kind' has '0', '1', classify.labels are 'bad', 'good'",
        ),
        (
            [ROW, ROW | {"kind": "god"}],
            "",
            "rows.jsonl:2: the label 'god' is not in classify.labels; ",
        ),
        ([ROW, ROW | {"said": " "}], "", "rows.jsonl:2: the column 'said' is empty"),
        ([ROW, ROW | {"kind": None}], "", "rows.jsonl:2: the column 'kind' is empty"),
        ([ROW, [1]], "", "rows.jsonl:2: expected columns"),
        ([ROW], "classify.path=nowhere.csv", "nowhere.csv: expected rows"),
    ],
)
def test_rows_that_cannot_be_used_are_reported_with_their_place(tmp_path, rows, override, reported):
    file = write(tmp_path, rows)
    with pytest.raises(DataError) as error:
        classify_rows.read_examples(load_config(file, [override] if override else []).classify)
    assert reported in str(error.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_read_as_lines_are(tmp_path, suffix):
    import pyarrow as pa
    from pyarrow import csv, parquet

    file = write(tmp_path)
    plain = classify_rows.read_examples(load_config(file).classify)
    table = pa.Table.from_pylist(
        [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    )
    (csv.write_csv if suffix == "csv" else parquet.write_table)(table, tmp_path / f"rows.{suffix}")
    found = classify_rows.read_examples(
        load_config(file, [f"classify.path={tmp_path}/rows.{suffix}"]).classify
    )
    assert [row[:3] for row in found] == [row[:3] for row in plain]


# --- whole runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_baseline_and_the_tuned_model_are_compared_on_any_number_of_processes(tmp_path):
    file, again = write(tmp_path), tmp_path / "two"
    printed = forked.launch(1, ["scripts/classify.py", "--config", str(file), "--tune"])
    parts = classify_rows.split_parts(
        classify_rows.read_examples(settings := load_config(file).classify), settings
    )
    results = tmp_path / "classify"
    for name in ("plain", "json"):
        found = [*read_records(results / name / "predictions.jsonl")]
        assert [row["prompt"] for row in found] == [each.text for each in parts["test"]], printed
        reported = json.loads((results / name / "metrics.json").read_text())
        assert reported["num_examples"] == len(parts["test"])
        assert reported["majority"]["metrics"]["accuracy"] == sum(
            each.label == reported["majority"]["label"] for each in parts["test"]
        ) / len(parts["test"])
    for part, name in (("train", "train.jsonl"), ("validation", "validation.jsonl")):
        turns = [json.loads(line)["messages"] for line in (results / name).open()]
        assert [turn["content"] for _, turn, _ in turns] == [
            f"good or bad? {each.text}" for each in parts[part]
        ]
        assert [label_of(turn["content"], ["good", "bad"]) for *_, turn in turns] == [
            each.label for each in parts[part]
        ]
    tuned = tmp_path / "tuned/classify/json"
    assert not (tmp_path / "tuned/classify/plain").exists()
    before = (tuned / "predictions.jsonl").read_bytes()
    found = json.loads((tuned / "comparison.json").read_text())["accuracy"]
    for value, folder in (("value_a", results / "json"), ("value_b", tuned)):
        metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
        assert found[value] == metrics["accuracy"]
    assert max(map(len, printed.splitlines())) <= 100

    two = ["scripts/classify.py", "--config", str(file), f"classify.output_dir={again}"]
    printed = forked.launch(2, two)
    for name in ("plain", "json"):
        one = (results / name / "predictions.jsonl").read_bytes()
        assert (again / name / "predictions.jsonl").read_bytes() == one, printed
    pair = tmp_path / "pair"
    printed = forked.launch(2, ["scripts/train.py", *two[1:3], f"train.output_dir={pair}"])
    assert json.loads((pair / "status.json").read_text())["state"] == "finished", printed
    reported = forked.launch(1, [*two[:3], "--run", f"{tmp_path}/tuned"])
    assert (tuned / "predictions.jsonl").read_bytes() == before, reported
    assert "answers:" not in reported
