"""The embedded task: what is held out is really held out, and all of it can be made again."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import ROOT, clean_environment
from ruamel.yaml import YAML

KEYWORDS = {"call", "currency", "day", "people", "room"}  # few fixed words, the same in every split
NANO = ROOT / "nano"
# The text that configs/nano_base.yaml trains on: 144,000 rows that are not committed.
PRIMER_SHA256 = "347cf09fb81dddad220a480d81fcafdd3a6cb83b4d1a3f417e67a5ffa23eba33"


def calls(split: str) -> list[tuple[str, dict]]:
    """(request, call) of every row."""
    lines = (NANO / f"{split}.jsonl").read_text("utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    return [(user["content"], json.loads(answer["content"])) for user, answer in turns]


def values(split: str) -> dict[str, set]:
    found = defaultdict(set)
    for _, call in calls(split):
        for key, value in call.items():
            found[key].add(value)
    return found


@pytest.mark.parametrize("split", ["valid", "test"])
def test_no_value_of_a_held_out_row_occurs_in_training(split):
    trained, held_out = values("train"), values(split)
    assert held_out.keys() == trained.keys()
    for key in held_out.keys() - KEYWORDS:
        assert not held_out[key] & trained[key], key


@pytest.mark.parametrize("split", ["valid", "test"])
def test_no_phrasing_of_a_held_out_row_occurs_in_training(split):
    """Requests with their values cut out: what is left of a held-out one is new."""

    def skeleton(request: str, call: dict) -> str:
        for value in sorted((str(v) for v in call.values()), key=len, reverse=True):
            request = request.replace(value, "_")
        return request.lower()

    trained = {skeleton(*row) for row in calls("train")}
    held_out = [skeleton(*row) for row in calls(split)]
    assert sum(text in trained for text in held_out) == 0


def test_answers_are_calls_in_one_serialisation():
    for split in ("train", "valid", "test"):
        lines = (NANO / f"{split}.jsonl").read_text("utf-8").splitlines()
        for line in lines:
            answer = json.loads(line)["messages"][-1]["content"]
            assert json.dumps(json.loads(answer), ensure_ascii=False) == answer
            assert next(iter(json.loads(answer))) == "call"


def leaves(node) -> list:
    """Returns what stands in a YAML file, without its lists and mappings."""
    if isinstance(node, dict):
        return [leaf for pair in node.items() for part in pair for leaf in leaves(part)]
    return [leaf for part in node for leaf in leaves(part)] if isinstance(node, list) else [node]


def read_words(name: str) -> dict:
    return YAML(typ="safe", pure=True).load(NANO / f"words/{name}.yaml")


@pytest.mark.parametrize("name", [path.stem for path in sorted(NANO.glob("words/*.yaml"))])
def test_every_word_is_read_as_text(name):
    """An unquoted `true` or `12` would be drawn as another type."""
    found = leaves(read_words(name))
    assert len(found) > 100
    assert [leaf for leaf in found if not isinstance(leaf, str)] == []


def test_every_phrasing_says_every_field_of_its_call():
    said_by = {"on_day": {"day"}, "money": {"amount", "currency"}}
    for name, call in read_words("task")["calls"].items():
        for phrasing in (*call["train"], *call["valid"], *call["test"]):
            said = [said_by.get(slot, {slot}) for slot in re.findall(r"{(\w+)}", phrasing)]
            assert sorted(kind for kinds in said for kind in kinds) == sorted(
                call["fields"].values()
            ), f"{name}: {phrasing}"


def test_it_is_small_enough_to_be_committed():
    assert sum(path.stat().st_size for path in NANO.rglob("*") if path.is_file()) < 8_000_000


@pytest.mark.thorough("the committed files are read by most tests")
@pytest.mark.slow
def test_all_but_the_weights_is_made_again_byte_for_byte(tmp_path):
    target, primer = tmp_path / "nano", tmp_path / "primer.jsonl"
    subprocess.run(
        [sys.executable, "-m", "nano.make_nano", "--out", target, "--primer", primer],
        cwd=ROOT,
        env=clean_environment(),
        check=True,
        timeout=300,
    )
    made = [path for path in target.rglob("*") if path.is_file()]
    assert len(made) >= 8
    for path in made:
        committed = NANO / path.relative_to(target)
        assert path.read_bytes() == committed.read_bytes(), committed
    assert hashlib.sha256(primer.read_bytes()).hexdigest() == PRIMER_SHA256
