"""A server gives what was trained, or the line that differs says so: llama.cpp's own server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import finished

from sft.errors import MergeError, UserError, VerificationError
from sft.serve import endpoint, merge, served

pytest.importorskip("xllamacpp", reason="llama.cpp's server for CPUs")
pytestmark = pytest.mark.slow

ROWS = [
    {"index": 0, "key": "0", "prompt": "remind me to sew at 7 am", "reference": "{}"},
    {"index": 1, "key": "0", "prompt": "book a table for two", "reference": "{}"},
]


def quiet(_: Any) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def short():
    """Few tokens show as much as many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "NUM_TOKENS", 24)
        yield


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A proven merge of an adapter that changes the embedded model, but not beyond use."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "run/evaluation").mkdir(parents=True)
    rows = "\n".join(map(json.dumps, ROWS))
    (folder / "run/evaluation/predictions.jsonl").write_text(rows)
    run = finished(folder / "run", "lora", std=0.02)
    merge.merge(run, folder / "merged", "bf16", quiet)
    return folder / "merged"


def verdict(artefact: Path, file: Path) -> tuple[dict[str, Any], str]:
    """The checks of a server with `file` where `artefact` is expected, and what was reported."""
    import gguf_files

    with gguf_files.llama_server(file) as url:
        try:
            served.serve_test(url, quiet, gguf=artefact)
            message = ""
        except VerificationError as error:
            message = str(error)
    report = json.loads((artefact.parent / served.REPORT).read_text())[artefact.name]
    assert report["verdict"] == ("differs" if message else "the same")
    return report["checks"], message


def failing(checks: dict[str, Any]) -> set[str]:
    return {name for name, check in checks.items() if not check["ok"]}


@pytest.fixture(scope="module")
def whole(merged) -> Path:
    import gguf_files

    return gguf_files.write_gguf(merged, merged / "whole.gguf", "f16")


def test_llama_cpp_serves_what_was_trained(merged, whole):
    checks, message = verdict(whole, whole)
    assert message == ""
    assert checks.keys() == {"prompt", "tokens", "stop", "kl", "artefact", "size"}
    assert failing(checks) == set()
    assert "5 prompts" in checks["prompt"]["what"]
    assert 0 < checks["kl"]["measured"] < 1e-4
    assert 0 < checks["artefact"]["measured"] < 5e-3
    report = json.loads((merged / served.REPORT).read_text())["whole.gguf"]
    assert (report["server"], len(report["sha256"])) == ("llama.cpp", 64)


def third_token(file: Path) -> int:
    """Returns a token that the model writes within an answer."""
    import gguf_files

    with gguf_files.llama_server(file) as url:
        reply = endpoint.Endpoint(url).answer([{"role": "user", "content": ROWS[0]["prompt"]}], 8)
    assert reply.ids is not None
    return reply.ids[2]


def without_system(template: str) -> str:
    return template.replace(
        "{% for message in messages %}",
        "{% for message in messages if message['role'] != 'system' %}",
    )


def transposed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """An adapter merged the wrong way round shows in square weights only by what they compute."""
    return tensor.T.contiguous() if "q_proj" in name else tensor


FAULTS: dict[str, tuple[Callable[[str], dict[str, Any]], set[str], str]] = {
    "template without system": (
        lambda template: {"template": without_system(template)},
        {"prompt"},
        "prompt 2, token 1: expected 85 's', found",
    ),
    "doubled BOS": (
        lambda template: {"bos": 1, "template": "<|im_start|>" + template},
        {"prompt"},
        r"prompt 0, token 1: expected 608 'us', found 1 '<\|im_start\|>'",
    ),
    "wrong stop token": (lambda _: {}, {"stop"}, "ends, expected"),
    "transposed weights": (lambda _: {"change": transposed}, {"tokens", "kl"}, "less likely"),
    "other quantisation": (lambda _: {"kind": "q8_0"}, {"size"}, "bytes of the weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_line(merged, whole, tmp_path, fault):
    import gguf_files

    template = (merged / "chat_template.jinja").read_text()
    change, lines, shown = FAULTS[fault]
    given = {"kind": "f16", **change(template)}
    if fault == "wrong stop token":
        given["eos"] = third_token(whole)
    checks, message = verdict(
        whole, gguf_files.write_gguf(merged, tmp_path / "faulty.gguf", **given)
    )
    assert lines <= failing(checks)
    assert re.search(shown, message)
    if fault == "other quantisation":  # also where a server does not reveal its size
        assert "kl" in failing(checks)


@pytest.mark.parametrize(("kind", "lines"), [("q8_0", set()), ("q4_0", {"artefact"})])
def test_a_quantised_file_may_cost_a_tenth_of_what_was_learnt(merged, kind, lines):
    """The server is held to the file's own weights, and these to the trained model."""
    import gguf_files

    file = gguf_files.write_gguf(merged, merged / f"{kind}.gguf", kind)
    checks, message = verdict(file, file)
    assert (failing(checks), "found" in message) == (lines, bool(lines))


class Text(BaseHTTPRequestHandler):
    """A server of OpenAI's protocol that reveals text, and on request the number of tokens."""

    counts = False

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "a"}, {"id": "b"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "chat" not in self.path:
            self.answer({"error": "no such path"}, 404)
        elif "logprobs" in body:
            self.answer({"error": "logprobs are not supported"}, 400)
        else:
            choice = {"message": {"content": "hi"}, "finish_reason": "stop", "logprobs": None}
            found = {"choices": [choice]}
            self.answer(found | ({"usage": {"prompt_tokens": 3}} if self.counts else {}))

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def text_server(counts: bool) -> Iterator[str]:
    handler = type("Handler", (Text,), {"counts": counts})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_server_that_reveals_text_only_proves_nothing(merged):
    run = merged.parent / "run"
    with (
        text_server(counts=False) as url,
        pytest.raises(VerificationError, match="nothing is proven"),
    ):
        served.serve_test(url, quiet, run)
    report = json.loads((run / served.REPORT).read_text())["run"]
    assert report["verdict"] == "not proven"
    assert all(isinstance(check, str) for check in report["checks"].values())


def test_an_answer_that_lacks_a_token_is_not_compared(merged):
    """llama.cpp lists no token that ends within a character; those behind it would be shifted."""
    entry = {"id": 5, "logprob": -0.1, "top_logprobs": [{"id": 5, "logprob": -0.1}]}
    choice = {"message": {"content": "hi"}, "finish_reason": "length"}
    choice["logprobs"] = {"content": [entry, entry]}
    with text_server(counts=False) as url:
        asked = endpoint.Endpoint(url)
        for number, ids in ((2, [5, 5]), (3, None)):
            usage = {"prompt_tokens": 3, "completion_tokens": number}
            reply = asked._read({"choices": [choice], "usage": usage}, [])
            assert (reply.ids, bool(reply.top)) == (ids, ids is not None)


def test_another_number_of_tokens_is_a_difference(merged):
    with (
        text_server(counts=True) as url,
        pytest.raises(VerificationError, match=r"prompt 0: expected \d+ tokens, found 3"),
    ):
        served.serve_test(url, quiet, merged=merged)


def test_what_cannot_be_asked_is_reported(merged):
    with text_server(counts=True) as url:
        with pytest.raises(UserError, match="no model c; it has a, b: give MODEL="):
            endpoint.Endpoint(url, "c")
        assert endpoint.Endpoint(url, "b").model == "b"
    with pytest.raises(UserError, match="cannot be reached"):
        endpoint.Endpoint(url)
    with pytest.raises(UserError, match="expected the address of a server"):
        endpoint.Endpoint("localhost:80")
    with pytest.raises(MergeError, match=r"expected a \.gguf file"):
        served.find_artefact(None, None, merged / "none.gguf", None)
    with pytest.raises(MergeError, match="make merge"):
        served.find_artefact(None, merged.parent, None, None)
