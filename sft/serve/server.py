"""A small server of OpenAI's chat protocol over the connector, for trying a model.

It answers one request at a time and is bound to loopback. Prompts are rendered as in training, and
answers reveal the token ids of prompt and answer, so `make serve-test` can prove all of them.
A request that cannot be answered gets a sentence; a key that is not understood is never ignored.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sft.errors import UserError, redact, suggest
from sft.evaluate import generate
from sft.evaluate.generate import Answer
from sft.serve.connector import AccelerateConnector, Completion
from sft.serve.endpoint import NUM_TOP

MAX_BODY_BYTES = 16 * 2**20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Keys of a request, and those of the section `generation` that they set.
SETTINGS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "top_k", "seed")},
}
# Keys that change nothing here if they have one of these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "stop": (None, []),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto"),
    "return_tokens_as_token_ids": (None, False, True),  # every token has its id
}
OWN = ("model", "messages", "tools", "stream", "stream_options", "logprobs", "top_logprobs")
READ = (*SETTINGS, *NEUTRAL, *OWN, "return_token_ids", "user")


class RequestError(UserError):
    """A request that cannot be answered, with the status of the response."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class ChatServer(ThreadingHTTPServer):
    """Serves the model of `connector` at `host` and `port` (0: any free one).

    `defaults`: settings of `generation` for what a request leaves out.
    """

    daemon_threads = True

    def __init__(
        self,
        connector: AccelerateConnector,
        host: str = LOOPBACK[0],
        port: int = 8000,
        defaults: dict[str, Any] | None = None,
    ):
        self.connector, self.lock, self.defaults = connector, threading.Lock(), defaults or {}
        self.name = Path(connector.model_name).name
        connector.load_model_once()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"{host}:{port}: cannot listen there ({error}); give another PORT"
            ) from None

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    server_version = "sft"
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte of a request

    def do_GET(self) -> None:
        self._respond({"/health": self._health, "/v1/models": self._models})

    def do_POST(self) -> None:
        self._respond({"/v1/chat/completions": self._chat, "/tokenize": self._tokenize})

    def _respond(self, routes: dict[str, Any]) -> None:
        """Answers a request, or reports in one sentence why not."""
        self.is_streaming = False
        try:
            self._refuse_other_host()
            path = urlsplit(self.path).path
            if path not in routes:
                raise RequestError(404, f"{path}: expected one of {', '.join(routes)}")
            routes[path]()
        except (ConnectionError, TimeoutError):  # nobody listens any more
            self.close_connection = True
        except UserError as error:
            self._fail(getattr(error, "status", 400), str(error))
        except Exception as error:  # noqa: BLE001  # the server goes on
            self._fail(500, f"the model failed: {type(error).__name__}: {error}")

    def _refuse_other_host(self) -> None:
        """Refuses a page of the web whose name was made to lead to this machine."""
        asked = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if self.server.server_address[0] in LOOPBACK and asked not in LOOPBACK:
            raise RequestError(403, f"Host: expected {LOOPBACK[0]}, found {asked}")

    def _fail(self, status: int, message: str) -> None:
        error = {"error": {"message": redact(message), "type": "invalid_request_error"}}
        self.close_connection = True  # the body may be unread
        try:
            if self.is_streaming:
                self._write_event(error)
            else:
                self._write_json(error, status)
        except ConnectionError:
            pass

    def _health(self) -> None:
        self._write_json({"status": "ok"})

    def _models(self) -> None:
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "sft"}
        self._write_json({"object": "list", "data": [model]})

    def _tokenize(self) -> None:
        """Writes the token ids of a prompt: `messages` (and `tools`), as the chat renders them."""
        body = self._read_body(("model", "messages", "tools", "add_generation_prompt"))
        if body.get("add_generation_prompt", True) is not True:
            raise RequestError(400, "add_generation_prompt: expected true")
        ids = self.server.connector.render(_row(body))
        self._write_json({"count": len(ids), "tokens": ids})

    def _chat(self) -> None:
        body = self._read_body(READ)
        settings = {**self.server.defaults, **_settings(body)}
        row, num_top = _row(body), _num_top(body)
        identity = {"id": f"chatcmpl-{time.time_ns():x}", "created": int(time.time())}
        identity["model"] = self.server.name
        send = None
        if body.get("stream"):
            send = lambda text: self._write_part(identity, {"content": text})  # noqa: E731
        with self.server.lock:
            prompt, answer, done = self.server.connector.ask(row, send, **settings)
            logprobs = self._logprobs(prompt, answer, num_top) if num_top is not None else None
        if send:
            self._write_part(identity, {}, done.finish_reason)
            if (body.get("stream_options") or {}).get("include_usage"):
                self._write_event({**identity, "choices": [], "usage": _usage(done)})
            self._write_event(None)
            return
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": done.choices[0].message.content},
            "finish_reason": done.finish_reason,
            "logprobs": logprobs,
        }
        ids: dict[str, Any] = {}
        if body.get("return_token_ids"):
            choice["token_ids"], ids["prompt_token_ids"] = answer.ids, prompt
        whole = {**identity, "object": "chat.completion", "choices": [choice], **ids}
        self._write_json({**whole, "usage": _usage(done)})

    def _logprobs(self, prompt: list[int], answer: Answer, num_top: int) -> dict[str, Any]:
        """Returns the log probabilities of an answer's tokens, in the protocol's form."""
        model = self.server.connector.load_model_once()
        with generate.eval_mode(model.model):
            logs = generate.log_probs(model.model, prompt, answer.ids)

        def entry(row: int, token: int) -> dict[str, Any]:
            text = str(model.tokenizer.decode([token]))
            found = {"id": token, "token": text, "logprob": float(logs[row, token])}
            return found | {"bytes": list(text.encode())}

        content = []
        for row, token in enumerate(answer.ids):
            likeliest = logs[row].topk(num_top).indices.tolist()
            top = [entry(row, each) for each in likeliest]
            content.append({**entry(row, token), "top_logprobs": top})
        return {"content": content}

    def _read_body(self, known: tuple[str, ...]) -> dict[str, Any]:
        """Returns the JSON object of a request. Raises RequestError for keys that are not known."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError(411, "expected a body with a Content-Length")
        if int(length) > MAX_BODY_BYTES:
            raise RequestError(413, f"expected at most {MAX_BODY_BYTES:,} bytes, found {length}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"expected JSON, found something else: {error}") from None
        if not isinstance(body, dict):
            raise RequestError(400, f"expected a JSON object, found {type(body).__name__}")
        for name in body:
            if name not in known:
                hint = suggest(name, known)
                raise RequestError(400, f"{name}: this server does not read this key; {hint}")
        if body.get("model") not in (None, self.server.name):
            raise RequestError(404, f"model: expected {self.server.name}, found {body['model']!r}")
        return body

    def _write_part(
        self, identity: dict[str, Any], delta: dict[str, Any], reason: str | None = None
    ) -> None:
        if not self.is_streaming:
            delta = {"role": "assistant", **delta}
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        self._write_event({**identity, "object": "chat.completion.chunk", "choices": [choice]})

    def _write_event(self, value: Any) -> None:
        """Writes one server-sent event; None is the last."""
        if not self.is_streaming:
            self.close_connection = True  # the end of the connection ends the stream
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Connection", "close")
            self.end_headers()
            self.is_streaming = True
        text = "[DONE]" if value is None else json.dumps(value)
        self.wfile.write(f"data: {text}\n\n".encode())

    def _write_json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: prompts and addresses are the user's."""


def _row(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the conversation of a request as a row of data."""
    if not isinstance(body.get("messages"), list):
        found = type(body["messages"]).__name__ if "messages" in body else "nothing"
        raise RequestError(400, f"messages: expected a list, found {found}")
    tools = body.get("tools")
    return {"messages": body["messages"], **({"tools": tools} if tools else {})}


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a request. Raises RequestError for what nobody would carry out."""
    for name, values in NEUTRAL.items():
        if name in body and body[name] not in values:
            found = json.dumps(body[name])
            raise RequestError(400, f"{name}: this server leaves it out, found {found}; drop it")
    given = {SETTINGS[name]: body[name] for name in SETTINGS if body.get(name) is not None}
    for name in ("stream", "logprobs", "return_token_ids"):
        if not isinstance(body.get(name, False), bool | None):
            raise RequestError(400, f"{name}: expected true or false, found {body[name]!r}")
    if not isinstance(body.get("stream_options", {}), dict | None):
        raise RequestError(400, "stream_options: expected an object")
    if body.get("stream") and (body.get("logprobs") or body.get("return_token_ids")):
        raise RequestError(400, "logprobs and return_token_ids come without stream only")
    return given


def _num_top(body: dict[str, Any]) -> int | None:
    """Returns how many likely tokens are asked for; None without log probabilities."""
    number = body.get("top_logprobs") or 0
    if type(number) is not int or not 0 <= number <= NUM_TOP:
        raise RequestError(400, f"top_logprobs: expected 0 to {NUM_TOP}, found {number!r}")
    if number and not body.get("logprobs"):
        raise RequestError(400, "top_logprobs: is only read with logprobs=true")
    return number if body.get("logprobs") else None


def _usage(done: Completion) -> dict[str, int]:
    return {**vars(done.usage), "total_tokens": done.usage.total_tokens}
