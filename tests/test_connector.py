"""AccelerateConnector: the same results for every caller, on one process and on three."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import connector_worker as worker
import forked
import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.errors import ConfigError, ExportError, UserError
from sft.evaluate import generate
from sft.runtime.log import Log
from sft.serve.connector import AccelerateConnector


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(the connector, what it did, its folder), on this process."""
    made, folder = worker.connector(), tmp_path_factory.mktemp("alone")
    return made, worker.scenario(made, folder), folder


@pytest.fixture(scope="module")
def fresh() -> AccelerateConnector:
    made = worker.connector()
    made.load_model_once()
    return made


def test_answers_are_in_order_and_one_at_a_time_they_are_the_same(alone, fresh):
    asked, answers = worker.conversations(), alone[1]["answers"]
    assert len(answers) == len(asked)
    bad = {i for i, answer in enumerate(answers) if answer["error"]}
    assert bad == {3, 5, len(asked) - 1}
    for i, messages in enumerate(asked):
        if i in bad:
            with pytest.raises(UserError, match="cannot answer"):
                fresh.complete(messages, **worker.SETTINGS)
            continue
        one = fresh.complete(messages, **worker.SETTINGS)
        [choice] = answers[i]["choices"]
        assert one.choices[0].message.content == choice["message"]["content"]
        assert one.finish_reason == choice["finish_reason"] in ("stop", "length")
        assert vars(one.usage) == answers[i]["usage"]
        assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens


def test_its_model_and_tokenizer_are_those_that_answer(fresh):
    assert fresh.model is fresh.load_model_once().model
    assert isinstance(fresh.model, torch.nn.Module)
    messages = worker.conversations()[0]
    ids = fresh.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    usage = fresh.complete(messages, **worker.SETTINGS).usage
    assert len(ids) == usage.prompt_tokens


def test_what_cannot_be_answered_says_why_in_its_place(alone):
    reported = [answer["error"] for answer in alone[1]["answers"] if answer["error"]]
    assert "content is empty" in reported[0]
    assert "expected a list" in reported[1]
    assert "the model takes" in reported[2]
    failed = alone[1]["answers"][3]["choices"][0]
    assert (failed["message"]["content"], failed["finish_reason"]) == (None, "error")


def test_results_kept_in_a_file_are_the_same(alone):
    _, found, folder = alone
    assert found["kept"] == found["answers"]
    rows = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(len(worker.conversations())))


def test_a_later_call_asks_only_what_is_new(fresh, tmp_path, monkeypatch):
    asked, decode, seen = worker.conversations(), generate.Decoder.decode, []

    def counted(decoder, prompts, **options):
        seen.append(len(prompts))
        return decode(decoder, prompts, **options)

    monkeypatch.setattr(generate.Decoder, "decode", counted)
    path = tmp_path / "kept.jsonl"
    first = fresh.complete_batch(asked[:6], predictions=path, **worker.SETTINGS)
    assert sum(seen) == 4
    seen.clear()
    more = fresh.complete_batch(asked[:8], predictions=path, **worker.SETTINGS)
    assert (sum(seen), more[:6]) == (2, first)
    seen.clear()
    fresh.complete_batch(asked[:8], predictions=path, max_new_tokens=3)
    assert sum(seen) == 6  # other settings, other answers


@pytest.mark.slow
def test_three_processes_give_what_one_gives(alone, tmp_path):
    reported = forked.launch(3, ["tests/support/connector_worker.py", str(tmp_path)])
    ranks = [json.loads((tmp_path / f"rank_{i}.json").read_text()) for i in range(3)]
    expected = json.loads(json.dumps(alone[1]))
    for rank in ranks:
        assert rank["world"] == 3, reported
        for name in ("answers", "drawn", "few", "none", "kept", "items", "empty"):
            assert rank[name] == expected[name], name
        assert rank["trained"] == pytest.approx(expected["trained"], rel=1e-5)
    loads = sorted(rank["own_lengths"]["items"] for rank in ranks)
    assert sum(loads) == 251
    assert loads[-1] == 90  # the longest item alone: by count it would be with another
    assert (tmp_path / "kept.jsonl").read_text() == (alone[2] / "kept.jsonl").read_text()
    saved = [
        AutoModelForCausalLM.from_pretrained(folder / "saved") for folder in (tmp_path, alone[2])
    ]
    weights = [model.get_output_embeddings().weight for model in saved]
    assert torch.allclose(*weights, atol=1e-6)


def test_a_saved_model_is_whole_and_trained(alone):
    folder = alone[2] / "saved"
    assert {"model.safetensors", "config.json", "MANIFEST.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert AutoTokenizer.from_pretrained(folder).chat_template
    before = AutoModelForCausalLM.from_pretrained(ROOT / "nano/model")
    after = AutoModelForCausalLM.from_pretrained(folder)
    changed = [
        name
        for (name, a), (_, b) in zip(
            before.named_parameters(), after.named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    ]
    assert changed == ["model.embed_tokens.weight"]  # tied to the head


def test_text_comes_as_it_is_written_and_adds_up(fresh):
    pieces: list[str] = []
    answer = fresh.complete(worker.conversations()[1], on_text=pieces.append, max_new_tokens=12)
    assert "".join(pieces) == answer.choices[0].message.content
    assert len(pieces) > 3


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "nano/model", dtype=torch.float32)
    shape = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, shape).save_pretrained(folder)
    return folder


def said(name, **options) -> str | None:
    made = AccelerateConnector(name, mixed_precision="no", log=Log(None), **options)
    messages = [{"role": "user", "content": "what is the time in the city"}]
    return made.complete(messages, max_new_tokens=12).choices[0].message.content


def test_an_adapter_is_opened_with_its_base_or_by_itself(adapter, monkeypatch):
    monkeypatch.chdir(ROOT)
    plain = said("nano/model")
    tuned = said("nano/model", adapter=adapter)
    assert tuned != plain
    assert said(adapter) == tuned
    assert isinstance(said("nano/model", adapter=adapter, quantization="nf4"), str)


def test_an_adapter_that_is_none_or_of_another_base_is_refused(adapter, tmp_path, shared):
    with pytest.raises(ExportError, match=r"expected a LoRA adapter \(adapter_config\.json"):
        said("nano/model", adapter=tmp_path / "none")
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    other = str(shared / "models/stories260K")
    config = json.loads((adapter / "adapter_config.json").read_text())
    claimed = json.dumps(config | {"base_model_name_or_path": other})
    (tmp_path / "adapter_config.json").write_text(claimed)
    with pytest.raises(ExportError, match=r"is not an adapter of this base \(it names .*260K\)"):
        said(other, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True}))
    with pytest.raises(ExportError, match=r"not a LoRA shape: not supported: use_qalora \(it"):
        said("nano/model", adapter=tmp_path)


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"batch_size": 0}, "batch_size: expected 'auto' or a number above 0, found 0"),
        (
            {"mixed_precision": "fp8"},
            "mixed_precision: expected 'no' or 'fp32' or 'bf16' or 'fp16'",
        ),
        ({"quantization": "int8"}, "quantization: expected None or 'nf4', found 'int8'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, reported):
    with pytest.raises(UserError, match=reported):
        worker.connector(**options)


def test_settings_of_generation_are_checked_before_a_model_is_loaded():
    made = worker.connector()
    with pytest.raises(ConfigError) as caught:
        made.complete_batch([], max_new_token=5, temperature=-1.0)
    reported = str(caught.value)
    assert "generation.max_new_token: unknown key; did you mean max_new_tokens?" in reported
    assert "generation.temperature: expected number ≥ 0, found -1.0" in reported


def test_results_of_another_number_are_refused(alone):
    made = alone[0]
    made.split_dataset(["a", "b"])
    with pytest.raises(UserError, match="expected 2 results, found 1"):
        made.gather_results(["a"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_the_program_in_the_docs_runs(tmp_path, world):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/INFER.md").read_text(), re.DOTALL)
    predictions, program = tmp_path / "answers.jsonl", tmp_path / "ask.py"
    code = code.replace("outputs/nano", str(ROOT / "nano/model"))
    program.write_text(code.replace("answers.jsonl", str(predictions)))
    process = forked.start(world, [str(program)], tmp_path / "printed")
    process.join()
    printed = (tmp_path / "printed").read_text()
    results = re.search(r"^(.+) [1-9]\d*\n(\[.+\]) \[27, 49\]$", printed, re.MULTILINE)
    assert results, printed
    answers = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(answers) == 2
    assert results[2] == str([answer["finish_reason"] for answer in answers])
    assert results[1].endswith((" stop", " length"))


def test_a_folder_with_something_else_is_not_saved_over(alone, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = alone[0].load_model_once().model
    with pytest.raises(UserError, match="holds something else"):
        alone[0].save_model(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    alone[0].save_model(model, alone[2] / "saved")  # its own, again


def test_a_second_precision_in_one_program_is_refused(alone):
    with pytest.raises(UserError, match="mixed_precision: found bf16, but the first connector"):
        AccelerateConnector(ROOT / "nano/model", mixed_precision="bf16", log=Log(None))


def test_an_adapter_that_names_another_base_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": "meta/other"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(ExportError, match="is an adapter of 'meta/other', not of 'nano/model'"):
        said("nano/model", adapter=tmp_path)


def test_an_adapter_with_another_scale_is_asked_again(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    identities = []
    for alpha in (8, 200):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
        options = {"mixed_precision": "no", "log": Log(None), "adapter": tmp_path}
        made = AccelerateConnector(ROOT / "nano/model", **options)
        identities.append(made.load_model_once().identity)
    assert identities[0] != identities[1]
