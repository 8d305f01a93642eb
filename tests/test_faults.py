"""Every seeded fault is found, under its name; on clean material nothing is."""

from __future__ import annotations

import pytest
from conftest import ROOT
from faults import catalogue

from sft.data import audit, template
from sft.errors import DataError

FAULTS = [(where, fault) for where, faults in catalogue.FAULTS.items() for fault in faults]


@pytest.mark.parametrize(
    ("where", "fault"), FAULTS, ids=[f"{where}: {fault.what}" for where, fault in FAULTS]
)
def test_a_fault_is_found(where, fault):
    if fault.kind in audit.KINDS:
        assert fault.kind in fault.find()
    else:
        with pytest.raises(DataError) as raised:
            fault.find()
        assert fault.kind in str(raised.value)


def test_there_are_many_faults():
    assert len(FAULTS) >= 100
    assert len(catalogue.FAULTS["mask"]) >= 15
    assert len({fault.what for _, fault in FAULTS}) == len(FAULTS)


def test_every_kind_of_finding_has_a_fault():
    assert {fault.kind for _, fault in FAULTS} >= set(audit.KINDS) - {"answer_cut", "turns_dropped"}


@pytest.mark.parametrize("row", catalogue.CLEAN, ids=["one turn", "two turns", "tools"])
def test_nothing_is_found_on_what_they_mutate(row):
    made = catalogue.tokenizer()
    example = template.render(made, row.messages, row.tools)
    assert audit.examine(made, row, example, catalogue.LIMIT) == []


@pytest.mark.parametrize(
    ("text", "row"), catalogue.UNMASKED, ids=[f"mask {n}" for n in range(len(catalogue.UNMASKED))]
)
def test_nothing_is_found_on_what_the_masks_mutate(text, row):
    made = catalogue.tokenizer(text, None, catalogue.TOKENS.get(text, ()))
    reported = {"special_in_content", "end_of_turn_added", "thoughts_dropped", "other_variables"}
    reported |= {"unread_variables"}
    for kept, example in template.render_row(made, row, catalogue.LIMIT * 2):
        assert set(audit.examine(made, kept, example, catalogue.LIMIT * 2)) <= reported


def test_the_table_in_the_docs_is_this_one():
    assert (ROOT / "docs/FAULTS.md").read_text("utf-8") == catalogue.table()


def test_the_docs_report_every_finding():
    text = (ROOT / "docs/DATA.md").read_text("utf-8")
    for kind, reported in audit.KINDS.items():
        assert f"| `{kind}` | {reported.severity} | {reported.meaning} |" in text
