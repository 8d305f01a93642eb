"""Answers by vLLM: the protocol with a stand-in, faults, and vLLM itself where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT
from test_export import finished
from vllm_stand_in import standing_in

from sft import run as sft_run
from sft.commands import use
from sft.config.load import load_config
from sft.config.schema import Generation
from sft.errors import EngineError, UserError
from sft.evaluate import compare, generate
from sft.runtime import children
from sft.runtime.processes import Context
from sft.serve import served, vllm, vllm_engine
from sft.serve.classify import strategies
from sft.serve.connector import AccelerateConnector

NANO = ROOT / "nano/model"
WORDS = ["remind me to sew at 7 am", "book a table for two", "play jazz", "set an alarm", "hello"]
ASKED = [[{"role": "user", "content": word}] for word in WORDS]
GREEDY = {"max_new_tokens": 12}


def connect(model: Any = NANO, engine: Any = "vllm", **options: Any) -> AccelerateConnector:
    return AccelerateConnector(
        model, mixed_precision="no", engine=engine, log=tiny.Said(), **options
    )


def texts(found: list[Any]) -> list[tuple[str | None, str]]:
    return [(each.choices[0].message.content, each.finish_reason) for each in found]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def own() -> AccelerateConnector:
    return connect(engine="own")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("run"), "lora", std=0.02)


def test_the_server_gets_token_ids_and_all_that_an_answer_depends_on(own, tmp_path):
    expected = own.complete_batch(ASKED, **GREEDY)
    with standing_in(NANO) as server:
        connector = connect(vllm_args="--max-num-seqs 8")
        assert texts(connector.complete_batch(ASKED, tmp_path / "a.jsonl", **GREEDY)) == texts(
            expected
        )
        prompts = [own.render({"messages": each}) for each in ASKED]
        asked = server.asked[-len(ASKED) :]
        assert sorted(each["prompt"] for each in asked) == sorted(prompts)
        stop = generate.stop_ids(own.tokenizer, own.model.generation_config)
        greedy = {"model": "sft", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        for each in asked:
            rest = {key: value for key, value in each.items() if key != "prompt"}
            assert rest == {**greedy, "stop_token_ids": stop, "return_token_ids": True}
        assert server.words[:3] == ["vllm", "serve", str(NANO)]
        assert server.words[3:-2] == [
            *("--served-model-name", "sft", "--dtype", "float32", "--generation-config", "vllm"),
            *("--max-num-seqs", "8"),
        ]
        assert any("to be the model that was opened: KL" in each for each in connector.log.lines)

        drawn = {**GREEDY, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 3}
        server.asked.clear()
        connector.complete_batch([ASKED[0]] * 3, **drawn)
        seeds = {each["seed"] for each in server.asked}  # the server is not started again
        assert len(seeds) == len(server.asked) == 3
        assert all((each["top_p"], each["top_k"]) == (0.9, 40) for each in server.asked)
        server.asked.clear()
        connector.complete_batch([ASKED[0]] * 2, **drawn)
        assert {each["seed"] for each in server.asked} < seeds
        pid = connector._engine._server.process.pid
        connector.close()
        assert children.is_dead(pid)
    records = lines(tmp_path / "a.jsonl")
    assert {each["engine"] for each in records} == {"vllm 0.0.test"}


def test_a_file_never_mixes_engines(own, tmp_path):
    file = tmp_path / "a.jsonl"
    own.complete_batch(ASKED[:3], file, **GREEDY)
    before = lines(file)
    with standing_in(NANO) as server:
        connector = connect()
        connector.complete_batch(ASKED[:3], file, **GREEDY)
        assert not {each["key"] for each in before} & {each["key"] for each in lines(file)}
        num = len(server.asked)
        connector.complete_batch(ASKED[:3], file, **GREEDY)
        assert len(server.asked) == num
        connector.close()
        for each in (before, lines(file)):
            for row in each:
                row |= {"reference": "", "row": str(row["index"])}
        for name, rows in (("own", before), ("vllm", lines(file))):
            (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    assert compare.describe_engines(tmp_path / "own", tmp_path / "own") is None
    note = compare.describe_engines(tmp_path / "own", tmp_path / "vllm")
    assert note is not None
    assert "A by our own decoding, B by vllm 0.0.test" in note


def test_a_server_with_another_model_is_refused(run, own):
    """The base in place of an adapter on it, and a server that goes on where an answer ends."""
    with standing_in(NANO), pytest.raises(EngineError, match="another model than the one that was"):
        connect(run).complete_batch(ASKED[:1], **GREEDY)
    with standing_in(NANO):
        connector = connect(run, "auto")
        found = connector.complete_batch(ASKED[:2], **GREEDY)
        connector.complete_batch(ASKED[:2], **GREEDY)
        assert texts(found) == texts(connect(run, "own").complete_batch(ASKED[:2], **GREEDY))
        assert "our own decoding answers (ENGINE=auto): vLLM computes another" in str(
            connector.log.lines
        )
    with standing_in(run) as server:
        connector = connect(run)
        connector.complete_batch(ASKED[:1], **GREEDY)
        assert server.words[server.words.index("--lora-modules") + 1] == (
            f"sft={run}/final_checkpoint"
        )
        connector.close()


def go_on(choice: dict[str, Any]) -> None:
    choice["finish_reason"] = "length"
    choice["token_ids"].append(5)
    choice["logprobs"]["top_logprobs"].append({"token_id:5": -0.1})


SPOILT = [
    (go_on, r"tokens: expected \d+, found \d+"),
    (lambda choice: choice["prompt_token_ids"].insert(0, 1), "read other token ids"),
    (lambda choice: choice.update(finish_reason="abort"), "ended an answer with 'abort'"),
    (lambda choice: choice.pop("token_ids"), "an answer of another form"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=["end", "prompt", "reason", "form"])
def test_a_server_that_answers_otherwise_is_refused(spoil, message):
    def twice(choice: dict[str, Any]) -> None:  # a prompt is shared with the request
        choice["prompt_token_ids"] = [*choice["prompt_token_ids"]]
        spoil(choice)

    with standing_in(NANO, twice), pytest.raises(EngineError, match=message):
        connect().complete_batch(ASKED[:1], **GREEDY)


def test_a_server_that_does_not_start_says_why(own):
    with standing_in(NANO, program="echo no memory left; exit 3") as server:
        server.listen = lambda _: None
        with pytest.raises(EngineError) as raised:
            connect().complete_batch(ASKED[:1], **GREEDY)
        assert str(raised.value).split("\n") == [
            "vLLM ended before it answered (exit code 3); it printed last:",
            "  no memory left",
        ]
        connector = connect(engine="auto")
        found = connector.complete_batch(ASKED[:1], **GREEDY)
        assert texts(found) == texts(own.complete_batch(ASKED[:1], **GREEDY))
        assert "no memory left" in str(connector.log.lines)


def test_answers_are_kept_when_the_server_dies(tmp_path):
    """And the next call asks only for what is missing."""
    file, gone = tmp_path / "a.jsonl", tmp_path / "gone"
    left = [len(served.PROBES) + 3]

    def die(_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            gone.touch()
            raise ConnectionError

    program = f"echo out of memory; while [ ! -e {gone} ]; do sleep 0.02; done; exit 9"
    with standing_in(NANO, die, program):
        connector = connect(batch_size=1)
        with pytest.raises(EngineError) as raised:
            connector.complete_batch(ASKED, file, **GREEDY)
    assert not connector._engine._server.is_running
    assert "vLLM no longer answers" in str(raised.value)
    assert "(exit code 9); it printed last:\n  out of memory" in str(raised.value)
    assert [each["index"] for each in lines(file)] == [0, 1, 2]
    with standing_in(NANO) as server:
        connector.complete_batch(ASKED, file, **GREEDY)  # starts another server
        connector.close()
        assert len(server.asked) == len(served.PROBES) + 2
    assert [each["index"] for each in lines(file)] == [0, 1, 2, 3, 4]


def test_a_silent_server_is_ended(monkeypatch):
    monkeypatch.setattr(vllm_engine, "ANSWER_SECONDS", 0.3)
    with standing_in(NANO, lambda _: time.sleep(1)), pytest.raises(EngineError, match="was silent"):
        connect().complete_batch(ASKED[:1], **GREEDY)


def test_what_vllm_cannot_do_is_refused_or_done_by_our_own_decoding(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="ENGINE=vllm: there is no program `vllm`; install it"):
        connect()
    with pytest.raises(UserError, match="only read with ENGINE=vllm"):
        connect(engine="own", vllm_args="--enforce-eager")
    with pytest.raises(UserError, match="expected one of own, vllm, auto, found 'llama'"):
        connect(engine="llama")
    connector = connect(engine="auto")
    connector.complete_batch(ASKED[:1], max_new_tokens=2)
    assert "our own decoding answers (ENGINE=auto): there is no program" in str(connector.log.lines)
    monkeypatch.setattr(vllm, "is_installed", lambda: True)
    connector = connect(engine="auto")
    connector.complete_batch(ASKED[:1], max_new_tokens=2, temperature=3.0)
    assert "a temperature up to 2, found 3.0" in str(connector.log.lines)
    for args in ("--dtype=half", "--lora_modules a=b", "'"):
        with pytest.raises(UserError, match="VLLM_ARGS: "):
            connect(vllm_args=args)
    with pytest.raises(EngineError, match="quantization is only opened by our own decoding"):
        connect(quantization="nf4").complete_batch(ASKED[:1], max_new_tokens=2)
    qlora = shutil.copytree(run, tmp_path / "qlora")
    text = (qlora / "config.yaml").read_text()
    (qlora / "config.yaml").write_text(text.replace("mode: lora", "mode: qlora"))
    with pytest.raises(EngineError, match="make merge RUN="):
        connect(qlora).complete_batch(ASKED[:1], max_new_tokens=2)
    monkeypatch.setenv("NUM_PROCESSES", "2")
    with pytest.raises(UserError, match="vLLM has processes of its own"):
        use.refuse_ranks("vllm")
    use.refuse_ranks("auto")


@pytest.mark.slow
def test_evaluate_and_classify_ask_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    few = ["evaluation.num_examples=3", "evaluation.max_new_tokens=8", "train.precision=fp32"]
    few += [f"data.cache_dir={tmp_path}/cache"]
    own = sft_run.evaluate_run(run, "own", few)
    with standing_in(run) as server:
        assert sft_run.evaluate_run(run, "other", few, "vllm") == own
        assert len(server.asked) == len(served.PROBES) + 3
        assert server.words[-2] == "--uds"
    folders = [run / "evaluation" / name / "predictions.jsonl" for name in ("own", "other")]
    first, second = ([each["answer"] for each in lines(file)] for file in folders)
    assert first == second
    labels = "classify.labels=[hateful,non-hateful]"
    own_rows = [f"classify.path={tmp_path}/a.csv", "classify.use=[zero_shot]", labels]
    names = ("hateful", "non-hateful")
    rows = [f"{name},some words {i},kind,{i}" for i in range(9) for name in names]
    (tmp_path / "a.csv").write_text(
        "\n".join(["label_gold,test_case,functionality,templ_id", *rows])
    )
    shown = {}
    for engine in ("own", "vllm"):
        folder = tmp_path / engine
        values = [*own_rows, f"classify.output_dir={folder}", "train.precision=fp32"]
        config = load_config(ROOT / "configs/classify_hatecheck.yaml", values)
        with standing_in(NANO) as server:
            strategies.classify(config, engine={"engine": engine})
        assert bool(server.asked) is (engine == "vllm")
        found = lines(folder / "zero_shot/predictions.jsonl")
        shown[engine] = [(each["prompt"], each["answer"]) for each in found]
    assert shown["own"] == shown["vllm"]


def test_a_bound_command_dies_with_its_parent(tmp_path):
    code = "import os, subprocess, sys, time; from sft.runtime.children import bound_command\n"
    code += "words = bound_command(['sh', '-c', 'sleep 600 & echo $$ $!; wait'])\n"
    code += "options = {'stdout': open(sys.argv[1], 'w'), 'start_new_session': True}\n"
    code += "child = subprocess.Popen(words, **options)\n"
    code += "while len(open(sys.argv[1]).read().split()) < 2: time.sleep(0.02)\n"
    code += "os._exit(0)"
    file = tmp_path / "pids"
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, timeout=60)
    deadline = time.monotonic() + 30
    for pid in map(int, file.read_text().split()):  # what it starts dies, too
        while not children.is_dead(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    failing = children.bound_command(["sh", "-c", "exit 3"])
    assert subprocess.run(failing, start_new_session=True, check=False).returncode == 3


# --- vLLM itself -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["model", "lora"])
def real(request, run):
    """Our own decoding and vLLM's server, with the same model."""
    if not vllm.is_installed():
        pytest.skip("needs the program `vllm`, in an environment of its own, at the end of PATH")
    name = NANO if request.param == "model" else run
    connector = connect(name, vllm_args="--enforce-eager --max-model-len 512")
    yield connect(name, "own"), connector
    connector.close()


@pytest.mark.slow
def test_vllm_gives_the_same_greedy_answers(real):
    own, connector = real
    asked = ASKED + [[{"role": "system", "content": "Be brief."}, *each] for each in ASKED]
    found = connector.complete_batch(asked, max_new_tokens=32)
    assert texts(found) == texts(own.complete_batch(asked, max_new_tokens=32))


@pytest.mark.slow
def test_vllm_draws_from_the_same_distribution(real):
    """top_p after top_k, as in transformers: of probabilities among the kept tokens."""
    own, connector = real
    settings = Generation(max_new_tokens=1, temperature=2.0, top_k=8, top_p=0.6)
    model = replace(own.load_model_once(), settings=settings)
    prompt = [1, 85, 374]  # of all probabilities, top_p would keep all 8 tokens
    logits = generate.log_probs(model.model, prompt, [])
    number = 400
    drawn = torch.arange(number, dtype=torch.float64) / number
    expected = Counter(generate.choose(logits.expand(number, -1), settings, drawn).tolist())
    writer = connector._engine.answering(
        model, "fp32", Context(connector.accelerator, connector.log), lambda: None
    )
    batches = writer.answer_batches([prompt] * number, connector.accelerator)
    found = Counter((answer.ids or ["end"])[0] for _, answers in batches for answer in answers)
    stop = {*model.stop}
    expected = Counter({("end" if t in stop else t): n for t, n in expected.items()})
    assert len(expected) == 4
    assert found.keys() == expected.keys()
    for token, count in expected.items():
        share = count / number
        assert abs(found[token] - count) < 5 * (number * share * (1 - share)) ** 0.5 + 2
