"""What a run trains, freezes, quantises and adapts, as it is reported before weights are loaded."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, representatives
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import DECODERS, OTHER, other_types, tiny_config
from test_reach import NeedsValues

from sft.config.load import with_values
from sft.config.schema import Config
from sft.errors import ConfigError, ModelError
from sft.models import classes, experts, load, quantise
from sft.plan import coverage
from sft.plan.counts import count_parameters
from sft.plan.coverage import Coverage, cover
from sft.runtime.console import make_console


def configured(folder: Path, kind: str, mode: str, **tuning: Any) -> Config:
    tiny_config(kind).save_pretrained(folder)
    return settings_of(folder, mode, **tuning)


def settings_of(folder: Path, mode: str, **tuning: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(folder)},
            "tuning": {"mode": mode, **({"r": 2} | tuning)},
            "data": {"train_path": "none", "cache_dir": str(folder / "cache")},
            "train": {"output_dir": "none"},
        }
    )


def built(config: Config) -> Any:
    return load.build(config, "fp32", torch.device("cpu"), weights=False)


def totals(found: Coverage, key: str) -> int:
    return sum(group.values[key] for group in found.groups.values())


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", representatives(["qwen3_moe", "gemma3", "gemma4", "qwen3_next"]))
def test_every_parameter_is_counted_once_and_nothing_contradicts(tmp_path, kind, mode) -> None:
    config = configured(tmp_path, kind, mode)
    found = cover(config)
    assert found is not None
    assert not found.problem
    assert (found.contradictions, found.missed) == ([], [])
    model = built(configured(tmp_path, kind, mode if mode == "full" else "lora"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    assert (found.num_trained, found.num_parameters) == (trained, base)
    assert totals(found, "trained") == trained
    assert totals(found, "frozen") == base - (trained if mode == "full" else 0)


def test_a_mixture_has_kinds_by_what_they_do(tmp_path) -> None:
    found = cover(configured(tmp_path, "qwen3_moe", "lora"))
    assert found is not None
    kinds = {kind: tuple(group.products.values()) for kind, group in found.groups.items()}
    assert kinds == {  # adapted, by choice, missed
        "attention": (8, 0, 0),
        "experts": (4, 0, 0),
        "router": (0, 2, 0),
        "embeddings": (0, 0, 0),
        "head": (0, 1, 0),
        "norm": (0, 0, 0),
    }
    lines = shown(found)
    assert "experts" in lines[3].split()
    assert not [line for line in lines if "missed" in line or "no gradient" in line]  # all are 0


NUMBERS = st.integers(0, 10**13)


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(coverage.KINDS), st.lists(NUMBERS, min_size=8, max_size=8)))
def test_each_row_of_the_table_is_one_line(rows) -> None:
    """Qwen3-30B-A3B's numbers were cut into two lines."""
    groups = {}
    for kind, numbers in rows.items():
        values = dict(zip(coverage.COLUMNS, numbers, strict=True))
        own = ({key: values[key] for key in keys} for keys in (coverage.STATES, coverage.PRODUCTS))
        groups[kind] = coverage.Group(*own)
    lines = shown(Coverage("lora", 0, 0, groups, [], [], [], ""))
    named = [line for line in lines if line.startswith((*rows, "total"))]
    assert named == lines[-len(rows) - 1 :]
    kept = len(re.sub(" (?=[MBT])", "", lines[-1]).split()) - 1
    present = [
        key for key in coverage.COLUMNS if any(group.values[key] for group in groups.values())
    ]
    assert kept == len({"trained", "frozen", *present})


def shown(found: Coverage) -> list[str]:
    """Returns the lines of the table as a terminal shows it."""
    out = io.StringIO()
    make_console(out).print(coverage.coverage_table(found))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_layers_that_only_choose_tokens_are_frozen_and_get_no_adapter(tmp_path, mode) -> None:
    """DeepSeek-V3.2's indexer takes part in the forward pass, and gets no gradient."""
    found = cover(configured(tmp_path, "deepseek_v32", mode))
    assert found is not None
    assert (found.problem, found.contradictions, found.missed) == ("", [], [])
    assert found.groups["no text"].parameters["frozen"] > 0


@pytest.mark.parametrize("mode", representatives(["lora", "qlora"]))
def test_trained_rows_and_copies_are_counted_with_what_they_replace(tmp_path, mode) -> None:
    """New tokens, rows of tokens and copies of modules lie beside the base under names of PEFT."""
    plain = settings_of(ROOT / "nano/model", mode, target_modules=["q_proj"])
    plain = with_values(plain, {"data.cache_dir": str(tmp_path)})
    without = cover(plain)
    assert without is not None
    for change, kind in (
        ({"model.new_tokens": ["<plan>"]}, "embeddings"),
        ({"tuning.lora.trainable_token_indices": [5, 6]}, "embeddings"),
        ({"tuning.lora.modules_to_save": ["lm_head"]}, "head"),
        ({"tuning.lora.modules_to_save": ["embed_tokens"]}, "embeddings"),
    ):
        found = cover(with_values(plain, change))
        assert found is not None
        assert (found.problem, found.contradictions) == ("", []), change
        assert "other" not in found.groups, change
        assert found.groups[kind].parameters["trained"] > 0, change
        assert found.num_trained > without.num_trained, change


def test_experts_whose_weights_their_parent_reads_have_no_adapter_and_refuse_4_bits(tmp_path):
    """DBRX's experts hand views of their weights to the module that holds them."""
    found = cover(configured(tmp_path / "lora", "dbrx", "lora"))
    assert found is not None
    assert (found.problem, found.contradictions, found.missed) == ("", [], [])
    assert totals(found, "by_choice") == 6 + 2 + 1  # experts, routers, head
    assert totals(found, "adapted") == 4
    found = cover(configured(tmp_path / "qlora", "dbrx", "qlora"))
    assert found is not None
    assert len(found.not_quantised) == 6
    with pytest.raises(
        ConfigError, match=r"6 matrices stay as they are, such as .*set tuning\.mode"
    ):
        found.refuse_contradictions()


@pytest.mark.thorough("parts for images in test_reach.py and test_towers.py")
def test_parts_for_images_are_frozen_in_every_mode(tmp_path) -> None:
    pixtral = tiny_config("llava")
    pixtral.vision_config = tiny_config("mistral3").vision_config
    assert pixtral.vision_config.model_type == "pixtral"
    pixtral.save_pretrained(tmp_path / "pixtral")
    for mode in ("full", "lora", "qlora"):
        for config in (
            configured(tmp_path / mode, "gemma3", mode),
            settings_of(tmp_path / "pixtral", mode),
        ):
            found = cover(config)
            assert found is not None
            assert (found.problem, found.contradictions, found.missed) == ("", [], [])
            vision = found.groups["vision"].parameters
            assert vision["frozen"] == sum(vision.values()) > 0


def test_experts_that_stay_in_16_bits_are_named_and_stop_the_run(tmp_path, monkeypatch) -> None:
    """QLoRA left the experts of a mixture unquantised: exit 0, and 57 GiB in place of 17."""
    monkeypatch.setattr(quantise, "matrices_elsewhere", lambda *_: set())
    found = cover(configured(tmp_path, "qwen3_moe", "qlora"))
    assert found is not None
    assert len(found.not_quantised) == 4
    assert found.groups["experts"].parameters["not_quantised"] > 0
    with pytest.raises(
        ConfigError, match=r"4 matrices stay as they are.*experts.*set tuning\.mode"
    ):
        found.refuse_contradictions()


def test_linear_layers_of_an_own_class_are_quantised_or_named(tmp_path) -> None:
    """Falcon's were left as they were, and nothing said so."""
    try:
        found = cover(configured(tmp_path, "falcon", "qlora"))
        assert found is not None
        reason = f"not quantised: {found.not_quantised}"
    except ModelError as error:
        reason = str(error)
    assert reason == "not quantised: []" or "qlora expects" in reason


def test_adapters_that_no_text_reaches_stop_the_run(tmp_path) -> None:
    """All linear layers of a vision-language base got adapters: 30 of 58 had no gradient."""
    config = configured(tmp_path, "gemma3", "lora", target_modules=["q_proj"])
    found = cover(config)
    assert found is not None
    assert found.unreached
    assert all("vision" in name for name in found.unreached)
    with pytest.raises(ConfigError, match="get no gradient from text"):
        found.refuse_contradictions()


def test_a_product_that_auto_leaves_out_is_missed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(experts, "is_refused", lambda _, name: name.endswith("v_proj"))
    found = cover(configured(tmp_path, "llama", "lora"))
    assert found is not None
    assert [name.split(".")[-2] for name in found.missed] == ["v_proj", "v_proj"]


def test_a_base_that_needs_values_is_reported_by_a_narrow_copy(tmp_path, monkeypatch) -> None:
    expected = cover(configured(tmp_path / "plain", "qwen3_moe", "qlora"))

    def from_config(architecture: Any, **options: Any) -> Any:
        options.pop("trust_remote_code", None)
        return NeedsValues._from_config(architecture, **options)

    monkeypatch.setattr(classes, "from_config", from_config)
    found = cover(configured(tmp_path / "own", "qwen3_moe", "qlora"))
    assert found is not None
    assert found.narrowed
    assert replace(found, narrowed="") == expected
    assert "a run of a narrow copy" in " ".join(shown(found))


@pytest.mark.thorough("other refusals in test_configs.py")
def test_a_model_without_embeddings_is_refused_in_one_sentence(tmp_path) -> None:
    """Of Qwen2.5-Omni as a whole, transformers raises NotImplementedError, also here."""
    with pytest.raises(ModelError, match="get_input_embeddings"):
        cover(configured(tmp_path, "qwen2_5_omni", "lora"))


def test_the_report_is_kept_beside_the_plans(tmp_path, monkeypatch) -> None:
    config = configured(tmp_path, "llama", "lora")
    (tmp_path / "cache").mkdir()
    found = cover(config)
    coverage._cover.cache_clear()
    monkeypatch.setattr(coverage, "_trace", lambda _: pytest.fail("traced again"))
    assert cover(config) == found
    coverage.write_coverage(found, tmp_path / "coverage.json")
    assert '"attention"' in (tmp_path / "coverage.json").read_text()


def test_the_measured_reports_name_no_surprise() -> None:
    found = json.loads((ROOT / "benchmarks/results/coverage.json").read_text("utf-8"))
    assert found["seconds"]["cpu"] < 600
    assert len(found["configurations"]) >= 33
    assert all(abs(row["difference"]) <= 0.001 for row in found["configurations"].values())
    assert {*DECODERS} <= {*found["model_types"]}
    known = {*found["model_types"], *found["other_types"]}
    assert {*DECODERS, *OTHER, *other_types()} <= known  # all that transformers has
    rows = [found["model_types"][kind] for kind in DECODERS] + [*found["configurations"].values()]
    for report in (report for row in rows for report in row["reports"]):
        assert not {"refused", "problem", "contradictions", "missed"} & {*report}


@pytest.mark.parametrize(
    ("name", "published"),
    [("phi-1_5", 1_572_864), ("Llama-2-7b-hf", 4_194_304), ("Llama-2-13b-hf", 6_553_600)],
)
def test_adapters_have_the_published_number_of_parameters(
    shared, tmp_path, name, published
) -> None:
    """LitGPT's: rank 8 on queries and values (../shared/reference/memory_published.md)."""
    source = shared / f"data/model_configs/{name}.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())
    config = settings_of(tmp_path, "lora", r=8, target_modules=["q_proj", "v_proj"])
    assert count_parameters(config).trained == published


def test_a_real_model_has_the_published_number_of_parameters(shared) -> None:
    config = settings_of(shared / "models/stories260K", "full")
    assert count_parameters(config).parameters == 260_032
