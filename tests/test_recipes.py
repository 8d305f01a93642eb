"""docs/recipes: its plans are those of the results, its rows are learnt as it says, it runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from conftest import ROOT
from faults import catalogue
from safetensors.torch import load_file, save_file
from test_turns import stand_in
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig

from sft import commands
from sft.config.load import load_config
from sft.config.schema import Config
from sft.data import audit, cache, files, template
from sft.errors import DataError, ModelError
from sft.models import load
from sft.tasks.registry import load_run

sys.path.append(str(ROOT / "benchmarks"))

import recipes

RESULTS = json.loads(recipes.RESULTS.read_text("utf-8"))
NANO = str(ROOT / "nano/model")
# Pages with rows, and a template that is always here with what they need.
WITH_ROWS = {
    "tool_calling": catalogue.CHATML,
    "reasoning": catalogue.THINKS,
    "continued_pretraining": None,
}


def blocks(page: str, kind: str) -> list[str]:
    text = (recipes.PAGES / f"{page}.md").read_text("utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def write_rows(page: str, folder: Path) -> Path:
    path = folder / "rows.jsonl"
    rows = [json.dumps(json.loads(block)) for block in blocks(page, "json")]
    path.write_text("\n".join(rows) + "\n")
    assert len(rows) == 2
    return path


# --- plans ------------------------------------------------------------------------------


def test_the_plans_of_the_pages_are_those_of_the_results():
    assert RESULTS.keys() == recipes.SHAPES.keys()
    texts = {f"{model}.md": recipes.block(found) for model, found in RESULTS.items()}
    for name, text in {"README.md": recipes.summary(RESULTS), **texts}.items():
        page = (recipes.PAGES / name).read_text("utf-8")
        assert recipes.with_block(page, text) == page, (
            f"{name}: python benchmarks/recipes.py --pages"
        )


@pytest.mark.parametrize("model", RESULTS)
def test_the_models_that_are_planned_have_their_published_size(model):
    plans = RESULTS[model]["plans"]
    assert plans
    for gib, plan in plans.items():
        assert plan["base_parameters"] == recipes.PARAMETERS[model]
        assert plan["reserved_bytes"] <= plan["usable_bytes"]
        longest = RESULTS[model]["longest"][plan["tuning"]][gib]
        assert plan["row_tokens"] == min(recipes.TOKENS, longest)


@pytest.mark.parametrize(("model", "file"), [("qwen3", "Qwen3-8B"), ("llama31", "Llama-3.1-8B")])
def test_shapes_are_those_of_the_published_files(shared, model, file):
    published = json.loads((shared / f"data/model_configs/{file}.json").read_text("utf-8"))
    shape = recipes.SHAPES[model]
    assert {key: published.get(key) for key in shape if key in published} == {
        key: value for key, value in shape.items() if key in published
    }


@pytest.mark.slow
@pytest.mark.thorough("the plan of small shapes: test_plan")
def test_a_plan_of_the_results_is_made_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = RESULTS["qwen3"]["plans"]["16"]
    (gib,) = (gib for gib, card in recipes.CARDS.items() if card == plan["card"])
    again = recipes.plan_of(tmp_path, "qwen3", plan["tuning"], gib, plan["row_tokens"])
    assert again == plan


# --- rows -------------------------------------------------------------------------------


def render(name: str, path: Path, line: int = 1) -> tuple[str, list[str]]:
    """Returns what is learnt of a row with a family's template, each part on a new line, and what
    the audit finds."""
    tokenizer = stand_in(name)
    given = [f"model.name={NANO}", f"data.train_path={path}", "train.output_dir=none"]
    config = load_config(None, [*given, "data.max_seq_len=4096"])
    assert isinstance(config, Config)
    parts: list[str] = []
    found: list[str] = []
    for row in files.select_rows(config.data, str(line)):
        assert isinstance(row, files.Row)
        options = cache.render_options(config.data)
        for kept, example in template.render_row(tokenizer, row, 4096, **options):
            found += audit.examine(tokenizer, kept, example, 4096, "all")
            part: list[int] = []
            for token, label in zip([*example.ids, 0], [*example.labels, -100], strict=True):
                if label != -100:
                    part.append(int(token))
                elif part:
                    parts.append(tokenizer.decode(part))
                    part = []
    return "".join(f"{part}\n" for part in parts), found


SHOWN = [
    (page, name, text)
    for page in WITH_ROWS
    for name in ("qwen3", "llama3_1", "gptoss")
    for text in blocks(page, f"text {name}")
]


def test_pages_show_what_is_learnt():
    assert [each[:2] for each in SHOWN] == [
        ("tool_calling", "qwen3"),
        ("tool_calling", "llama3_1"),
        ("tool_calling", "gptoss"),
        ("reasoning", "qwen3"),
        ("reasoning", "gptoss"),
    ]


@pytest.mark.parametrize(("page", "name", "text"), SHOWN, ids=lambda value: value[:12])
def test_what_a_page_shows_is_what_is_learnt(tmp_path, page, name, text):
    assert render(name, write_rows(page, tmp_path)) == (text, [])


@pytest.mark.parametrize(
    ("name", "calls", "message"),
    [
        ("gemma3", 1, "it never reads `tool_calls`"),
        ("llama3_1", 2, "only supports single tool-calls at once"),
        ("gptoss", 2, "does not write the name of a call"),
    ],
)
def test_calls_that_a_family_cannot_write_are_refused_as_its_page_says(
    tmp_path, name, calls, message
):
    row = json.loads(blocks("tool_calling", "json")[0])
    row["messages"][1]["tool_calls"] *= calls
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        render(name, path)


@pytest.mark.parametrize(
    ("name", "page", "line", "finding"),
    [
        ("gemma3", "tool_calling", 2, "tools_dropped"),
        ("gemma3", "reasoning", 1, "thoughts_dropped"),
        ("llama3_1", "reasoning", 1, "thoughts_dropped"),
    ],
)
def test_what_a_family_drops_is_found_as_its_page_says(tmp_path, name, page, line, finding):
    assert finding in render(name, write_rows(page, tmp_path), line)[1]


def configured(page: str, folder: Path) -> Path:
    """Returns a page's configuration as a file, with the page's rows and the embedded model."""
    (text,) = blocks(page, "yaml")
    tree: dict[str, Any] = yaml.safe_load(text)
    if "include" in tree:
        tree["include"] = str(ROOT / "configs" / tree["include"])
    tree["model"] = {"name": NANO}
    tree["data"] = tree.get("data", {}) | {"cache_dir": str(folder / "cache")}
    if page in WITH_ROWS:
        tree["data"] |= {"train_path": str(write_rows(page, folder))}
        tree["data"] |= {"chat_template": WITH_ROWS[page], "max_seq_len": 512, "replay": {}}
    path = folder / "page.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("page", [*WITH_ROWS, "classification"])
def test_the_configuration_of_a_page_fits_the_schema(page, tmp_path):
    (text,) = blocks(page, "yaml")
    path = tmp_path / "page.yaml"
    path.write_text(text.replace("include: ", f"include: {ROOT}/configs/"))
    load_run(path)


@pytest.mark.parametrize("page", WITH_ROWS)
def test_every_row_of_a_page_is_learnt(tmp_path, monkeypatch, capsys, page):
    monkeypatch.chdir(tmp_path)
    path = configured(page, tmp_path)
    assert commands.run("audit", [f"--config={path}"]) == 0
    printed = capsys.readouterr().out
    assert "rejected" not in printed
    assert "left out" not in printed
    assert "dropped" not in printed


@pytest.mark.slow
@pytest.mark.thorough("the audit of these rows: the test above; a run: test_run")
@pytest.mark.parametrize("page", WITH_ROWS)
def test_a_page_trains(tmp_path, page):
    """One step, with the page's own configuration but its precision and optimizer."""
    path, out = configured(page, tmp_path), tmp_path / "out"
    small = [f"train.output_dir={out}", "train.max_steps=1", "evaluation.num_examples=0"]
    small += ["train.precision=fp32", "train.optimizer=adamw"]
    small += ["train.save_steps=null", "train.eval_steps=null", "data.eval_fraction=0.5"]
    forked.launch(1, ["scripts/train.py", "--config", str(path), *small])
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 1)


def test_the_table_of_labels_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (table,) = blocks("classification", "csv")
    (tmp_path / "mails.csv").write_text(table)
    path = configured("classification", tmp_path)
    given = ["classify.part=all", "tuning.mode=lora", "data.template_kwargs={}"]
    assert commands.run("classify", [f"--config={path}", *given]) in (0, None)
    found = (tmp_path / "outputs/mails/classify/plain/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["reference"] for line in found] == ["spam", "ham"] * 3


# --- gpt-oss ----------------------------------------------------------------------------


def write_mxfp4(folder: Path) -> None:
    """Writes a tiny gpt-oss whose experts are stored as the published files have them."""
    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=1024, num_local_experts=4,
        num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(folder)
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, outer = weight.shape
            shape = (experts, outer, inner // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8)
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(described))


def build(folder: Path) -> torch.nn.Module:
    config = load_config(
        None,
        [f"model.name={folder}", "data.train_path=none", "train.output_dir=none"],
    )
    return load.build(config, "fp32", torch.device("cpu"))


def test_the_released_files_of_gpt_oss_are_refused_and_those_of_the_page_are_not(tmp_path):
    """Experts keep the names and values that MXFP4 stands for; without the option they do not."""
    source, made, lost = tmp_path / "mxfp4", tmp_path / "bf16", tmp_path / "lost"
    write_mxfp4(source)
    with pytest.raises(ModelError, match=r"comes quantised \(mxfp4\)"):
        build(source)
    (code,) = blocks("gpt_oss", "python")
    code = code.replace("openai/gpt-oss-20b", str(source)).replace("gpt-oss-20b-bf16", str(made))
    names: dict[str, Any] = {}
    exec(code, names)
    read = AutoModelForCausalLM.from_pretrained(made)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, names["model"](ids).logits)
    assert any(parameter.requires_grad for parameter in build(made).parameters())
    names["model"].save_pretrained(lost)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(lost)
    with pytest.raises(ModelError, match="lack 4 tensors"):
        build(lost)
