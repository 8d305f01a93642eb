"""Any config.json gives a plan, or one sentence that says what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.families import tiny_config

from sft.config.schema import Config
from sft.errors import UserError
from sft.plan.advice import advise
from sft.plan.plan import Plan, make_plan
from sft.runtime import hardware
from sft.tasks.registry import task_of

# Types whose plan ended in a traceback, or whose reason was reported as another.
REPORTED = ["gemma4", "gemma4_text", "gemma3n_text", "falcon_h1"]


def plan_of(folder: Path, mode: str) -> Plan:
    """Returns what `make plan` shows for the model in `folder`, advice included."""
    config = Config.model_validate(
        {
            "model": {"name": str(folder)},
            "tuning": {"mode": mode},
            "data": {"train_path": "none", "cache_dir": str(folder), "max_seq_len": 16},
            "train": {"output_dir": "none", "global_batch": 1},
        }
    )
    workload, machine = task_of(config).uniform_workload(config), hardware.detect()
    made = make_plan(config, workload, machine, 1)
    advise(config, workload, machine, made)
    return made


@pytest.mark.parametrize("kind", REPORTED)
@pytest.mark.slow
def test_a_reported_type_has_a_traced_plan(tmp_path: Path, kind: str) -> None:
    tiny_config(kind).save_pretrained(tmp_path)
    assert plan_of(tmp_path, "lora").memory.method == "traced"


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_what_does_not_write_text_from_left_to_right_is_refused(tmp_path: Path, kind: str) -> None:
    tiny_config(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected a model that writes text from left to right"):
        plan_of(tmp_path, "lora")


def test_linear_layers_of_an_own_class_are_quantised_or_refused(tmp_path: Path) -> None:
    """Falcon's were left as they were, and the plan swallowed that: a closed form with a reason."""
    tiny_config("falcon").save_pretrained(tmp_path)
    try:
        found = plan_of(tmp_path, "qlora").memory.method
    except UserError as error:
        found = str(error)
    assert found == "traced" or "tuning.mode: qlora expects" in found


VALUES = [None, True, 0, -1, 3, 2.5, "32", "none", [], [4], {}, {"a": 1}, [[2]], "é" * 3]


def changed(values: dict[str, Any], kind: str, key: str, value: Any) -> dict[str, Any]:
    """Returns the values with one key dropped, retyped, nested, or moved up."""
    if kind == "drop":
        return {k: v for k, v in values.items() if k != key}
    if kind == "nest":
        return values | {key: {key: values.get(key)}}
    if kind == "inside":  # all in a section for text, as in vision-language files
        return {"model_type": values.get("model_type"), "text_config": values}
    return values | {key: value}


KINDS = ("drop", "nest", "retype", "retype", "inside")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(["llama", "gemma4_text", "qwen3_moe", "gemma3"]))
@pytest.mark.slow
def test_any_configuration_gives_a_plan_or_one_sentence(tmp_path_factory, data, kind) -> None:
    folder = tmp_path_factory.mktemp("model")
    values = tiny_config(kind).to_dict()
    for _ in range(data.draw(st.integers(1, 2))):
        keys = st.sampled_from(sorted(values))
        change = data.draw(st.sampled_from(KINDS))
        values = changed(values, change, data.draw(keys), data.draw(st.sampled_from(VALUES)))
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    try:
        plan_of(folder, data.draw(st.sampled_from(["full", "lora", "qlora"])))
        found = ""
    except UserError as error:
        found = str(error)
    assert not found or "expect" in found or "tuning." in found
    assert "\n" not in found
