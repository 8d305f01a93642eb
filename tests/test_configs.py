"""Any config.json gives a plan, or one sentence that says what was expected."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import ROOT, SHARED, representatives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import families
from support.families import tiny_config

from sft import check
from sft.config.schema import Config
from sft.errors import UserError
from sft.plan import coverage, memory
from sft.plan.advice import advise
from sft.plan.plan import Plan, make_plan
from sft.runtime import hardware
from sft.runtime.console import make_console
from sft.tasks.registry import task_of

# Types whose plan ended in a traceback, or whose reason was reported as another.
REPORTED = ["gemma4", "gemma4_text", "gemma3n_text", "falcon_h1", "jetmoe"]


def configured(folder: Path, mode: str) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(folder)},
            "tuning": {"mode": mode},
            "data": {"train_path": "none", "cache_dir": str(folder), "max_seq_len": 16},
            "train": {"output_dir": "none", "global_batch": 1},
        }
    )


def plan_of(folder: Path, mode: str) -> Plan:
    """Returns what `make plan` shows for the model in `folder`, advice included."""
    config = configured(folder, mode)
    workload, machine = task_of(config).uniform_workload(config), hardware.detect()
    made = make_plan(config, workload, machine, 1)
    advise(config, workload, machine, made)
    return made


@pytest.mark.parametrize("kind", representatives(REPORTED, ["jetmoe"]))
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
KINDS = ("drop", "nest", "retype", "retype", "another", "inside")
EXAMPLES = int(os.environ.get("SFT_EXAMPLES", "4"))  # more by hand


def keys_of(values: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields where each value is, also those of sections."""
    for key, value in values.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*before, key))


def changed(values: dict[str, Any], draw: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns the values with one key dropped, nested, of another type or of another key, or all
    moved into a section."""
    result = copy.deepcopy(values)
    places = sorted(keys_of(result))
    if not places:
        return result
    (*sections, key), kind = draw(st.sampled_from(places)), draw(st.sampled_from(KINDS))
    section = reduce(getitem, sections, result)
    if kind == "inside":  # as in vision-language files
        return {"model_type": result.get("model_type"), "text_config": result}
    if kind == "drop":
        del section[key]
    elif kind == "nest":
        section[key] = {key: section[key]}
    elif kind == "another":
        section[key] = copy.deepcopy(reduce(getitem, draw(st.sampled_from(places)), result))
    else:
        section[key] = draw(st.sampled_from(VALUES))
    return result


def real_configurations() -> dict[str, dict[str, Any]]:
    """Returns the shared files, with three layers, by name; nothing if they are not here."""
    found = {}
    for path in sorted((SHARED / "data/model_configs").glob("*.json")):
        values = json.loads(path.read_text("utf-8"))
        text = values.get("text_config", values)
        if "model_type" in values:
            whole = text.get("num_hidden_layers", 26)  # Gemma-3's own default
            for key, value in text.items():
                if isinstance(value, list) and len(value) == whole:
                    text[key] = value[:3]
            found[path.stem] = values | {"num_hidden_layers": 3} if text is values else values
            text["num_hidden_layers"] = 3
    return found


REAL = real_configurations()


def try_plan(folder: Path, mode: str) -> None:
    plan_of(folder, mode)


def try_closed_form(folder: Path, mode: str) -> None:
    with mock.patch.object(memory, "_trace", side_effect=RuntimeError("left out")):
        plan_of(folder, mode)


def try_coverage(folder: Path, mode: str) -> None:
    found = coverage.cover(configured(folder, mode))
    assert found is not None
    make_console(io.StringIO()).print(coverage.coverage_table(found))
    found.refuse_contradictions()


def try_check(folder: Path, mode: str) -> None:
    """Runs `make check` with random weights."""
    for path in (ROOT / "nano/model").iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(path, folder / path.name)
    changes = {
        "model.name": folder,
        "model.init": "random",
        "tuning.mode": mode,
        "data.max_rows": 8,
        "data.cache_dir": folder / "cache",
        "train.output_dir": folder / "run",
        "train.precision": "fp32",
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    check.run(str(ROOT / "configs/nano.yaml"), overrides)


TRIES = {
    "plan": try_plan,
    "closed form": try_closed_form,
    "coverage": try_coverage,
    "check": try_check,
}


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    kind=st.sampled_from([*families.DECODERS, *families.OTHER, *REAL]),
    mode=st.sampled_from(["full", "lora", "qlora"]),
    command=st.sampled_from([*TRIES]),
)
@pytest.mark.slow
def test_any_configuration_is_answered_in_one_sentence(tmp_path_factory, data, kind, mode, command):
    folder = tmp_path_factory.mktemp("model")
    values = REAL[kind] if kind in REAL else json.loads(tiny_config(kind).to_json_string(False))
    for _ in range(data.draw(st.integers(1, 2))):
        values = changed(values, data.draw)
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    is_large = kind in REAL and command == "check"  # its weights would be made
    try:
        TRIES["plan" if is_large else command](folder, mode)
    except UserError as error:
        found = str(error)
        assert any(word in found for word in ("expect", "tuning.", "give "))
        assert "\n" not in found
