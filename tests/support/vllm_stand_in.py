"""Stands in for `vllm serve` where vLLM is not installed: its completions, over a Unix socket.

A stand-in computes with a connector of this project, so its answers are right or wrong as its model
is. It refuses keys that vLLM 0.32 does not have, and records what it is asked.
"""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from sft.evaluate import generate
from sft.runtime.log import Log
from sft.serve import vllm, vllm_engine
from sft.serve.connector import AccelerateConnector

KEYS = {
    *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop_token_ids"),
    *("ignore_eos", "return_token_ids", "logprobs", "return_tokens_as_token_ids"),
}


class StandIn(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A server with the model of `connector`; `spoil` may change each answer, or raise."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, connector: AccelerateConnector, spoil: Callable[[dict[str, Any]], None]):
        self.connector, self.spoil = connector, spoil
        self.asked: list[dict[str, Any]] = []
        self.words: list[str] = []
        self.lock = threading.Lock()
        self.is_listening = False

    def listen(self, socket: str) -> None:
        self.is_listening = True
        super().__init__(socket, _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body.keys() <= KEYS, body.keys() - KEYS
        assert body["model"] == vllm_engine.NAME
        model = self.connector.load_model_once()
        settings = {"max_new_tokens": body["max_tokens"], "temperature": body["temperature"]}
        settings |= {"top_p": body.get("top_p", 1), "top_k": max(0, body.get("top_k", 0))}
        settings["seed"] = body.get("seed", 0) % 2**32
        prompt = body["prompt"]
        answer, _ = self.connector.continue_ids(prompt, **settings)
        is_end = answer.finish_reason == "stop"
        logs = generate.log_probs(model.model, prompt, answer.ids).detach()
        end = int(max(body["stop_token_ids"], key=lambda token: float(logs[-1, token])))
        ids = [*answer.ids, *([end] if is_end else [])]
        best = [row.topk(body["logprobs"]) for row in logs[: len(ids)] if "logprobs" in body]
        pairs = (zip(row.indices.tolist(), row.values.tolist(), strict=True) for row in best)
        top = [{f"token_id:{token}": value for token, value in each} for each in pairs]
        choice = {"prompt_token_ids": prompt, "token_ids": ids}
        choice |= {"finish_reason": answer.finish_reason}
        choice |= {"logprobs": {"top_logprobs": top} if top else None}
        self.spoil(choice)
        return {"choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._write({"version": "0.0.test"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            try:
                found = self.server.complete(body)
            except ConnectionError:
                self.close_connection = True
                return
        self._write(found)

    def _write(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def standing_in(
    model: str | Path,
    spoil: Callable[[dict[str, Any]], None] = lambda _: None,
    program: str = "sleep 600; true",
) -> Iterator[StandIn]:
    """Lets the engine start a stand-in with `model`, and beside it `program` as the process."""
    connector = AccelerateConnector(model, mixed_precision="no", log=Log(None))
    connector.load_model_once()
    server = StandIn(connector, spoil)

    def start(words: list[str]) -> list[str]:
        server.words = words
        server.listen(words[-1])
        return ["sh", "-c", program]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "bound_command", start)
        patch.setattr(vllm_engine, "POLL_SECONDS", 0.02)
        patch.setattr(vllm, "is_installed", lambda: True)
        yield server
    if server.is_listening:
        server.shutdown()
        server.server_close()
