"""`make compare`: the same examples or none, who won, and where."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from rich.cells import cell_len

from sft import commands
from sft.errors import UserError
from sft.evaluate import compare, scores

CONFIG = """\
model: {name: m}
data: {train_path: rows.jsonl}
train: {output_dir: outputs/x}
"""


def line(number: int, answer: str | None, reference: str = "5", **more) -> dict:
    return {
        "index": number,
        "row": f"rows.jsonl:{number + 1}",
        "prompt": f"question {number}",
        "reference": reference,
        "answer": answer,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 1,
        **more,
    }


def right(*answers: int) -> list[dict]:
    """Answers that are right (1) or wrong."""
    return [line(number, "5" if each else "6") for number, each in enumerate(answers)]


@pytest.fixture
def run(tmp_path):
    """`run("one", lines, evaluation)`: the folder of a run that predicted so."""

    def write(name: str, lines: list[dict], evaluation: str | None = None):
        folder = tmp_path / name
        (folder / "evaluation").mkdir(parents=True)
        text = "".join(json.dumps(each) + "\n" for each in lines)
        (folder / "evaluation/predictions.jsonl").write_text(text, "utf-8")
        if evaluation is not None:
            (folder / "config.yaml").write_text(f"{CONFIG}evaluation: {evaluation}\n")
        return folder

    return write


@pytest.fixture
def script(capsys):
    """Returns what `sft compare` prints for its arguments."""

    def call(*arguments: str) -> str:
        commands.run("compare", list(arguments))
        reported = capsys.readouterr().out
        assert max(map(cell_len, reported.splitlines())) <= 100
        return reported

    return call


def refused(a, b, names=("exact_match",)) -> str:
    with pytest.raises(UserError) as caught:
        compare.compare(a, b, names)
    return str(caught.value)


# --- what is found -------------------------------------------------------------------------------


def test_a_run_that_answers_more_is_better_and_the_examples_report_where(run):
    a = run("one", right(*[0] * 20, *[1] * 30))
    b = run("two", right(*[1] * 45, *[0] * 5)[::-1])  # in another order
    found = compare.compare(a, b, ["exact_match"])
    row = found.differences["exact_match"]
    assert (row.value_a, row.value_b, row.verdict) == (0.6, 0.9, "better")
    assert row.difference == pytest.approx(0.3)
    assert row.low < row.difference < row.high
    assert found.wins == {"exact_match": compare.Wins(a=5, b=20, tied=25)}
    shown = list(compare.differing_examples(found))
    assert [each["row"] for each in shown] == [
        f"rows.jsonl:{n}" for n in (*range(1, 21), *range(46, 51))
    ]
    assert shown[0]["a"] == {"answer": "6", "error": None, "exact_match": 0}
    assert shown[0]["b"] == {"answer": "5", "error": None, "exact_match": 1}
    back = compare.compare(b, a, ["exact_match"]).differences["exact_match"]
    mirrored = pytest.approx((-row.difference, -row.high, -row.low))
    assert (back.difference, back.low, back.high) == mirrored
    assert back.verdict == "worse"


def test_a_run_is_not_distinguishable_from_itself(run):
    a = run("one", right(0, 1, 1))
    found = compare.compare(a, a / "evaluation/predictions.jsonl", ["exact_match", "chrf"])
    assert {row.verdict for row in found.differences.values()} == {"not distinguishable"}
    assert set(found.wins.values()) == {compare.Wins(0, 0, 3)}
    assert not found.differing


def test_what_is_reported_fits_the_width_and_obeys_no_answer(run, script, tmp_path):
    odd = [line(0, "\x1b[31m red [bold]\u202e", "r" * 500), line(1, None, error="too long")]
    a = run("a" * 120, odd + right(*[0] * 30)[2:])
    b = run("two", [line(0, "r" * 500, "r" * 500), line(1, "5"), *right(*[1] * 30)[2:]])
    reported = script(
        "--a", str(a), "--b", str(b), "--metric", "exact_match, rouge_l", "--show", "2"
    )
    assert "B against A on 30 examples" in reported
    note = "a verdict needs p < 0.05, adjusted for 2 comparisons (Holm)"
    assert note in " ".join(reported.split())
    assert "better" in reported
    assert "\\x1b[31m red [bold]" in reported.replace("\n", "")
    assert "\x1b" not in reported.replace("\\x1b", "")
    assert "\u202e" not in reported
    assert "failed: too long" in reported
    assert "A scores more on 0 examples, B on 30, alike on 0" in reported
    assert "question 1" in reported
    assert "question 2" not in reported
    assert "side" not in script("--a", str(a), "--b", str(b), "--show", "0")


def test_json_has_every_example_that_differs(run, script, tmp_path):
    a, b = run("one", right(*[0] * 12, 1)), run("two", right(*[1] * 13))
    file = tmp_path / "new/all.json"
    script("--a", str(a), "--b", str(b), "--json", str(file))
    found = json.loads(file.read_text("utf-8"))
    assert found["differences"]["exact_match"]["verdict"] == "better"
    assert found["wins"] == {"exact_match": {"a": 0, "b": 12, "tied": 1}}
    assert len(found["examples"]) == 12
    assert set(found["examples"][0]) == {"row", "prompt", "reference", "a", "b"}


# --- by what -------------------------------------------------------------------------------------

WORDS = "{metrics: [bleu, chrf]}"
LABELS = "{metrics: [classification], labels: [5, 6]}".replace("5, 6", '"5", "6"')


@pytest.mark.parametrize(
    ("of_a", "of_b", "metrics", "labels"),
    [
        (WORDS, WORDS, ["bleu", "chrf"], []),
        (WORDS, "{}", ["exact_match"], []),
        (WORDS, None, ["exact_match"], []),
        (None, None, ["exact_match"], []),
        (LABELS, LABELS, ["classification"], ["5", "6"]),
        (LABELS, WORDS, ["exact_match"], []),
    ],
)
def test_runs_are_compared_by_what_both_are_configured_to_score(run, of_a, of_b, metrics, labels):
    a, b = run("one", right(1), of_a), run("two", right(1), of_b)
    assert compare.agreed_metrics(a, b) == (metrics, labels)
    assert compare.agreed_metrics(a / "evaluation/predictions.jsonl", b) == (metrics, labels)


def test_labels_of_the_configurations_serve_a_metric_that_is_asked_for(run, script):
    a = run("one", right(*[0] * 10, *[1] * 10), LABELS)
    b = run("two", right(*[1] * 20), LABELS)
    reported = script("--a", str(a), "--b", str(b), "--metric", "classification")
    assert "accuracy" in reported
    assert "f1/5" in reported


def test_a_metric_that_does_not_exist_or_fit_is_refused(run, script):
    a, b = run("one", right(1, 0)), run("two", right(1, 1))
    with pytest.raises(UserError, match=r"unknown metric 'rouge'; did you mean rouge_l\?"):
        script("--a", str(a), "--b", str(b), "--metric", "rouge")
    with pytest.raises(UserError, match=r"classification needs evaluation\.labels"):
        script("--a", str(a), "--b", str(b), "--metric", "classification")
    c, d = run("three", [line(0, "5", "five")]), run("four", [line(0, "5", "five")])
    reported = refused(c, d, ["numeric_match"])
    assert "needs a number in the reference, found 'five' (row rows.jsonl:1)" in reported


# --- what is refused -----------------------------------------------------------------------------


def test_other_examples_are_refused_with_counts_and_one_of_each(run):
    a = run("one", right(1, 1, 1))
    b = run("two", [*right(1, 1), line(2, "5", reference="6"), line(7, "5")])
    first, *own, last = refused(a, b).split("\n  ")
    assert first.endswith("found 2 in common")
    assert own[0].endswith("3 examples, 1 only there, as row rows.jsonl:3: 'question 2'")
    assert own[1].endswith("4 examples, 2 only there, as row rows.jsonl:3: 'question 2'")
    assert "make evaluate RUN=" in last
    assert "0 in common" in refused(run("three", []), run("four", []))


@pytest.mark.parametrize(
    ("bad", "reported"),
    [
        ('{"index": 1, "row"', "predictions.jsonl:2: .* found no JSON object"),
        ("[1]", "found no JSON object"),
        ("[" * 100_000, "found no JSON object"),
        (json.dumps(dict.fromkeys(("row", "prompt", "reference", "base", "tuned"), "")),
         "found none of index, answer but row, prompt, reference, base, tuned"),
        (json.dumps(line(1, 5)), "found answer 5"),  # type: ignore[arg-type]
        (json.dumps(line(-1, "5")), "found index -1"),
        (json.dumps(line(1, "5", reference=None)), "found reference None"),  # type: ignore[arg-type]
        (json.dumps(line(0, "7")), "2: row rows.jsonl:1 is there twice"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_prediction_is_refused_where_it_stands(run, bad, reported):
    a, b = run("one", right(1, 1)), run("two", right(1))
    with (b / "evaluation/predictions.jsonl").open("a") as file:
        file.write(bad)
    with pytest.raises(UserError, match=reported):
        compare.compare(a, b, ["exact_match"])


def test_a_run_without_predictions_is_refused(run, tmp_path):
    a = run("one", right(1))
    assert f"B={tmp_path / 'none'}: expected a run" in refused(a, tmp_path / "none")
    assert "A=" in refused(tmp_path, a)
    assert "make evaluate" in refused(tmp_path, a)


def test_texts_are_not_kept(run, monkeypatch):
    monkeypatch.setattr(scores, "AT_ONCE", 10_000)
    text = "word " * 2000
    files = [run(name, [line(n, text + name, text) for n in range(400)]) for name in ("one", "two")]
    tracemalloc.start()
    try:
        found = compare.compare(*files, ["exact_match"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.wins["exact_match"].tied == 400
    assert peak < sum(found.a.stat().st_size for _ in files) / 3
