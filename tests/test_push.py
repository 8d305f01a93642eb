"""`make push` against a stand-in of a hub: what is uploaded, with which card, and what is not."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_export import finished

from sft.errors import ExportError, UserError
from sft.runtime import checkpoint
from sft.serve import merge, push, served

TOKEN = "hf_stand_in_of_a_token"
CARD = """---
base_model: "{base}"
---

# somewhere/run

| data, sha256 | 728dc3 |

## Scores

| exact match | 0.95 [0.91, 0.97] |

## Use

as it is
"""


class Hub(ThreadingHTTPServer):
    """Keeps what it is sent. `status`: of its next answers, in place of success."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.status = 200
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.status != 200:
            self._write({"error": f"no, {self.headers['Authorization']}"})
        elif self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            self._write({"url": f"{self.server.url}/user/model"})
        elif "preupload" in self.path:
            asked = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._write({"files": [{"path": each["path"], **modes} for each in asked]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines[1:]:
                value = line["value"]
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/user/model/commit/1"
            self._write({"commitUrl": url, "commitOid": "1", "success": True})
        else:
            self._write({})

    def _write(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with Hub() as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with a card, as training writes it."""
    folder = finished(tmp_path_factory.mktemp("push") / "run", "lora", std=0.02)
    final = folder / "final_checkpoint"
    (final / "README.md").write_text(CARD.format(base=ROOT / "nano/model"))
    manifest = json.loads((final / checkpoint.MANIFEST).read_text())
    assert "README.md" not in manifest["files"]
    return folder


def quiet(_: Any) -> None: ...


def test_a_run_is_uploaded_with_its_card_and_without_paths(run, hub, monkeypatch):
    report = {"verdict": "the same", "server": "sft", "sha256": served.weights_sha256(run)}
    check = {"ok": True, "what": "ends of 3 answers", "measured": "the same", "limit": "the same"}
    report["checks"] = {"stop": check, "kl": "the server reveals no log probabilities"}
    (run / served.REPORT).write_text(json.dumps({"run": report}))
    shutil.copy(ROOT / "benchmarks/results/nano/verdict.json", run)
    url = push.push(run, "user/model", "apache-2.0", quiet)
    assert url == f"{hub.url}/user/model/commit/1"
    assert (hub.repositories[0]["name"], hub.tokens) == ("model", {f"Bearer {TOKEN}"})
    assert hub.repositories[0].get("private", hub.repositories[0].get("visibility")) in (
        True,
        "private",
    )
    names = {p.name for p in (run / "final_checkpoint").iterdir()} - {checkpoint.MANIFEST}
    assert hub.files.keys() == names
    weights = (run / "final_checkpoint/adapter_model.safetensors").read_bytes()
    assert hub.files["adapter_model.safetensors"] == weights
    card = hub.files["README.md"].decode()
    for part in (
        'base_model: "model"\nlicense: "apache-2.0"\n---',
        "# run\n",
        "| data, sha256 | 728dc3 |",
        "| exact match | 0.95 [0.91, 0.97] |",
        "| run | sft | what was trained | ends of 3 answers: the same |",
        "| exact_match | 0 | 0.935 | 0.935 [0.887, 0.972] | better |",
        "| drift, all: KL 2.67 [2.39, 2.98], agreement 0.711 [0.683, 0.737] | | | | no limit |",
    ):
        assert part in card
    texts = [data for name, data in hub.files.items() if name.endswith((".json", ".md"))]
    assert not any(str(ROOT).encode() in text or TOKEN.encode() in text for text in texts)
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "model"


def test_a_merge_has_the_scores_of_its_run_and_says_what_is_not_proven(run, hub, tmp_path):
    merged = tmp_path / "merged"
    merge.merge(run, merged, "bf16", quiet)
    (merged / "merged-bf16.gguf").write_bytes(b"GGUF")
    old = {"verdict": "the same", "server": "llama.cpp", "sha256": "0" * 64, "checks": {}}
    (merged / served.REPORT).write_text(json.dumps({"merged-bf16.gguf": old}))
    push.push(merged, "user/model", "mit", quiet)
    card = hub.files["README.md"].decode()
    for part in (
        "| KL from the adapter model, nats per token |",
        "| exact match | 0.95 [0.91, 0.97] |",
        "| merged |  | not proven |  |",
        "| merged-bf16.gguf |  | not proven: changed since it was tested |  |",
    ):
        assert part in card
    assert {"model.safetensors", "merged-bf16.gguf", "chat_template.jinja"} < hub.files.keys()
    assert hub.files.keys().isdisjoint({served.REPORT, merge.REPORT})
    old["verdict"] = "differs"
    (merged / served.REPORT).write_text(json.dumps({"merged-bf16.gguf": old}))
    with pytest.raises(ExportError, match=r"merged-bf16.gguf: make serve-test found"):
        push.push(merged, "user/model", "mit", quiet)


def test_what_cannot_be_uploaded_is_reported_without_the_token(run, hub):
    with pytest.raises(UserError, match="LICENSE: expected the licence"):
        push.push(run, "user/model", None, quiet)
    with pytest.raises(UserError, match="REPO=a b: cannot upload"):
        push.push(run, "a b", "mit", quiet)
    hub.status = 403
    with pytest.raises(UserError, match="REPO=user/model: cannot upload") as error:
        push.push(run, "user/model", "mit", quiet)
    assert TOKEN not in str(error.value)
    assert hub.files == {}
