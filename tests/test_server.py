"""`make serve`: what clients of OpenAI's chat protocol get, and what they are refused."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import ROOT
from test_export import finished
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sft.data import template
from sft.errors import UserError, VerificationError
from sft.evaluate.generate import Decoder
from sft.runtime.log import Log
from sft.serve import merge, served, vllm
from sft.serve.connector import AccelerateConnector
from sft.serve.server import ChatServer

ASKED = {"messages": [{"role": "user", "content": "remind me to sew at 7 am"}], "max_tokens": 12}


@contextmanager
def serving(name: str | Path) -> Iterator[ChatServer]:
    connector = AccelerateConnector(name, mixed_precision="no", log=Log(None))
    with ChatServer(connector, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with serving(ROOT / "nano/model") as found:
        yield found


def post(server: ChatServer, body: Any, path: str = "/v1/chat/completions", **options: Any) -> Any:
    return httpx2.post(server.url + path, json=body, timeout=60, **options)


def test_an_answer_is_the_connectors(server):
    expected = server.connector.complete(ASKED["messages"], max_new_tokens=12)
    found = post(server, {**ASKED, "model": "model", "return_token_ids": True}).json()
    assert found["choices"][0]["message"]["content"] == expected.choices[0].message.content
    assert found["choices"][0]["finish_reason"] == expected.finish_reason
    assert found["usage"]["total_tokens"] == expected.usage.total_tokens
    ids = post(server, {"messages": ASKED["messages"]}, "/tokenize").json()
    assert ids["tokens"] == found["prompt_token_ids"]
    assert ids["count"] == found["usage"]["prompt_tokens"]
    models = httpx2.get(server.url + "/v1/models").json()
    assert [each["id"] for each in models["data"]] == ["model"]
    assert httpx2.get(server.url + "/health").json() == {"status": "ok"}


def test_a_stream_has_the_same_text_in_parts(server):
    whole = post(server, ASKED).json()
    body = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in post(server, body).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    parts = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(parts) == whole["choices"][0]["message"]["content"]
    assert len(parts) > 3
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]


def test_log_probabilities_are_those_of_the_model(server):
    body = {**ASKED, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    choice = post(server, body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert [each["id"] for each in content] == choice["token_ids"]
    for each in content:  # greedy: the first is the one that was written
        assert (each["top_logprobs"][0]["id"], len(each["top_logprobs"])) == (each["id"], 3)
        assert each["logprob"] == each["top_logprobs"][0]["logprob"] < 0


def complete(server: ChatServer, **body: Any) -> Any:
    response = post(server, {"max_tokens": 12, **body}, "/v1/completions")
    return response if body.get("stream") else response.json()


def test_a_completion_goes_on_from_token_ids_or_from_text(server):
    """The ids of a rendered conversation give its answer; a text is not rendered."""
    chat = post(server, {**ASKED, "return_token_ids": True, "logprobs": True, "top_logprobs": 2})
    expected, ids = chat.json()["choices"][0], chat.json()["prompt_token_ids"]
    options = {"return_token_ids": True, "logprobs": 2}
    found = complete(server, prompt=ids, **options)
    [choice] = found["choices"]
    assert choice["text"] == expected["message"]["content"]
    assert choice["finish_reason"] == expected["finish_reason"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (expected["token_ids"], ids)
    assert found["usage"] == chat.json()["usage"]
    content = expected["logprobs"]["content"]
    assert choice["logprobs"]["tokens"] == [each["token"] for each in content]
    assert choice["logprobs"]["token_logprobs"] == [each["logprob"] for each in content]
    assert [len(each) for each in choice["logprobs"]["top_logprobs"]] == [2] * len(content)
    named = complete(server, prompt=ids, logprobs=0, return_tokens_as_token_ids=True)
    logprobs = named["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{number}" for number in choice["token_ids"]]
    assert logprobs["top_logprobs"] is None

    text = "remind me to sew"
    plain = post(server, {"prompt": text}, "/tokenize").json()["tokens"]
    found = complete(server, prompt=text, **options)["choices"][0]
    assert found["prompt_token_ids"] == plain == server.connector.tokenizer(text).input_ids
    sampled = {"temperature": 1.0, "top_k": 50, "seed": 3, "prompt": text}
    assert complete(server, **sampled)["choices"] == complete(server, **sampled)["choices"]
    assert complete(server, **sampled)["choices"][0]["text"] != found["text"]

    lines = complete(server, prompt=text, stream=True).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == found["text"]
    assert events[-1]["choices"][0]["finish_reason"] == found["finish_reason"]


def test_a_text_to_continue_begins_as_a_document_of_training_does(server, shared):
    """With the BOS that the tokenizer adds, and without the eos that it may add."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    ids = template.text_ids(tokenizer, "Once")
    assert ids[0] == tokenizer.bos_token_id
    document = template._render_document(tokenizer, "Once").ids
    assert document == [*ids, tokenizer.eos_token_id]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("Once").input_ids == document
    assert template.text_ids(tokenizer, "Once") == ids
    assert template.text_ids(tokenizer, "Once</s>")[-1] == tokenizer.eos_token_id  # typed


REFUSED_COMPLETIONS = [
    ({}, 400, "prompt: expected one text or one list of ids, found nothing"),
    ({"prompt": ["a", "b"]}, 400, 'found ["a", "b"]'),
    ({"prompt": [1, -1]}, 400, "one list of ids, found [1, -1]"),
    ({"prompt": [1, True]}, 400, "one list of ids"),
    ({"prompt": []}, 400, "cannot answer: the prompt is empty"),
    ({"prompt": [9_999_999]}, 400, "expected token ids below"),
    ({"prompt": [5] * 9000}, 400, "shorten the prompt"),
    ({"prompt": "a", "echo": True}, 400, "echo: this server leaves it out"),
    ({"prompt": "a", "logprobs": True}, 400, "logprobs: expected 0 to 20, found True"),
    ({"prompt": "a", "logprobs": 0, "stream": True}, 400, "without stream"),
    ({"prompt": "a", "max_completion_tokens": 3}, 400, "does not read this key"),
    ({"prompt": "a", "messages": []}, 400, "does not read this key"),
]


@pytest.mark.parametrize(("body", "status", "message"), REFUSED_COMPLETIONS)
def test_a_bad_completion_is_refused_in_a_sentence(server, body, status, message):
    response = post(server, body, "/v1/completions")
    assert (response.status_code, message in response.json()["error"]["message"]) == (status, True)


REFUSED = [
    ({}, 400, "messages: expected a list, found nothing"),
    ({"messages": []}, 400, "cannot answer"),
    ({**ASKED, "max_token": 3}, 400, "did you mean max_tokens?"),
    ({**ASKED, "max_tokens": 0}, 400, "generation.max_new_tokens"),
    ({**ASKED, "n": 2}, 400, "n: this server leaves it out, found 2"),
    ({**ASKED, "stop": ["a"]}, 400, "stop: "),
    ({**ASKED, "stream": 1}, 400, "stream: expected true or false"),
    ({**ASKED, "stream": True, "logprobs": True}, 400, "without stream"),
    ({**ASKED, "logprobs": 3}, 400, "logprobs: expected true or false"),
    ({**ASKED, "top_logprobs": 3}, 400, "only read with logprobs"),
    ({**ASKED, "logprobs": True, "top_logprobs": 99}, 400, "expected 0 to 20"),
    ({**ASKED, "model": "gpt"}, 404, "expected model, found 'gpt'"),
    ([], 400, "expected a JSON object, found list"),
]


@pytest.mark.parametrize(("body", "status", "message"), REFUSED)
def test_a_bad_request_is_refused_in_a_sentence(server, body, status, message):
    response = post(server, body)
    assert (response.status_code, message in response.json()["error"]["message"]) == (status, True)


def test_other_addresses_and_bodies_are_refused(server):
    assert post(server, ASKED, "/v1/embeddings").status_code == 404
    both = post(server, {"messages": ASKED["messages"], "prompt": "a"}, "/tokenize")
    assert both.status_code == 400
    assert post(server, ASKED, headers={"Host": "attacker.example"}).status_code == 403
    url = server.url + "/v1/chat/completions"
    assert httpx2.post(url, content=b"{nonsense").status_code == 400
    assert httpx2.post(url, content=b" " * (2**24 + 1)).status_code == 413
    assert post(server, ASKED).status_code == 200  # it goes on
    taken = server.server_address[1]
    with pytest.raises(UserError, match="cannot listen there"):
        ChatServer(server.connector, port=taken)


def test_a_model_that_fails_or_a_client_that_leaves_does_not_end_it(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "decode", lambda *_, **__: 1 / 0)
        response = post(server, ASKED)
    assert response.status_code == 500
    assert "ZeroDivisionError" in response.json()["error"]["message"]
    body = json.dumps({**ASKED, "max_tokens": 200, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with socket.create_connection(server.server_address[:2]) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        client.recv(10)
    assert post(server, ASKED).status_code == 200


ARTEFACTS = ("full", "lora", "qlora", "lora merge")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARTEFACTS)
def test_it_serves_what_was_trained(tmp_path, monkeypatch, kind):
    """And a server that does not know the end of a turn is found."""
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    row = {"index": 0, "key": "0", "prompt": "book a table for two", "reference": "{}"}
    (run / "evaluation/predictions.jsonl").write_text(json.dumps(row))
    finished(run, kind.split()[0], std=0.02)
    merged = tmp_path / "merged" if kind.endswith("merge") else None
    if merged:
        merge.merge(run, merged, "fp32", print)
    monkeypatch.setattr(served, "NUM_TOKENS", 24)
    with serving(merged or run) as server:
        report = served.serve_test(server.url, print, None if merged else run, merged)
        assert report["verdict"] == "the same"
        proven = {name for name, check in report["checks"].items() if not isinstance(check, str)}
        assert {"prompt", "tokens", "kl"} <= proven
        assert report["checks"]["kl"]["measured"] < 1e-9
        if kind != "lora":
            return
        model = server.connector.load_model_once()
        monkeypatch.setattr(server.connector, "_model", replace(model, stop=[]))
        with pytest.raises(VerificationError, match=r"stop: .* does not end at"):
            served.serve_test(server.url, print, run)


def test_the_table_of_what_is_proven_names_tests_that_exist():
    text = (ROOT / "docs/SERVE.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)(?:\[(.+?)\])?`", text)
    assert len(named) >= 6
    for file, name, case in named:
        source = (ROOT / f"tests/{file}.py").read_text()
        assert f"def {name}(" in source, name
        assert f'"{case}"' in source, case
    proven = {case for _, name, case in named if name == "test_it_serves_what_was_trained"}
    assert proven == {*ARTEFACTS}


def test_vllm_gets_what_was_trained_or_is_refused(tmp_path, monkeypatch):
    """Its program needs an environment of its own; here only its command is looked at."""
    monkeypatch.setattr(vllm.shutil, "which", lambda name: f"/bin/{name}")
    assert vllm.is_installed()
    (tmp_path / "run").mkdir()
    run = finished(tmp_path / "run", "lora")
    words = vllm.command(str(run))
    assert words[:3] == ["vllm", "serve", str(ROOT / "nano/model")]
    assert words[words.index("--lora-modules") + 1] == f"run={run}/final_checkpoint"
    assert words[words.index("--max-lora-rank") + 1] == "16"
    words = vllm.command(str(ROOT / "nano/model"))
    assert words[2:] == [str(ROOT / "nano/model"), "--served-model-name", "model"]
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("mode: lora", "mode: qlora"))
    with pytest.raises(UserError, match=r"make merge RUN=.* or give ENGINE=own"):
        vllm.command(str(run))
