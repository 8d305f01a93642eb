"""A small server of OpenAI's chat and completions protocols over the connector, for trying a model.

It answers one request at a time and is bound to loopback. Conversations are rendered as in
training, and answers reveal the token ids of prompt and answer, so `make serve-test` can prove all
of them. A completion goes on from a text, or from token ids, which nothing renders.
A request that cannot be answered gets a sentence; a key that is not understood is never ignored.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sft.data import template
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
OF_BOTH = ("model", "stream", "stream_options", "logprobs", "return_token_ids", "user")
OF_CHAT = (*SETTINGS, *NEUTRAL, *OF_BOTH, "messages", "tools", "top_logprobs")
# The same for a completion, which has no other name of max_tokens, no format and no tools.
NEUTRAL_TEXT: dict[str, tuple[Any, ...]] = {
    **{name: NEUTRAL[name] for name in ("n", "stop", "presence_penalty", "frequency_penalty")},
    "return_tokens_as_token_ids": NEUTRAL["return_tokens_as_token_ids"],
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None,),
    "logit_bias": (None, {}),
}
OF_TEXT = (*({*SETTINGS} - {"max_completion_tokens"}), *NEUTRAL_TEXT, *OF_BOTH, "prompt")

OnText = Callable[[str], None] | None


class Token(NamedTuple):
    """A token with its log probability."""

    id: int
    text: str
    logprob: float


class Scored(NamedTuple):
    """A token of an answer, and the likeliest ones in its place."""

    token: Token
    top: list[Token]


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
        self._respond(
            {
                "/v1/chat/completions": self._chat,
                "/v1/completions": self._complete,
                "/tokenize": self._tokenize,
            }
        )

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
        """Writes the token ids of a prompt: `messages` (and `tools`), as the chat renders them, or
        `prompt`, a text as a completion goes on from."""
        body = self._read_body(("model", "messages", "tools", "add_generation_prompt", "prompt"))
        if body.get("add_generation_prompt", True) is not True:
            raise RequestError(400, "add_generation_prompt: expected true")
        if "prompt" in body and "messages" in body:
            raise RequestError(400, "expected messages or prompt, found both")
        is_text = "prompt" in body
        ids = self._prompt_ids(body) if is_text else self.server.connector.render(_row(body))
        self._write_json({"count": len(ids), "tokens": ids})

    def _chat(self) -> None:
        body = self._read_body(OF_CHAT)
        settings = {**self.server.defaults, **_settings(body, NEUTRAL)}
        if not isinstance(body.get("logprobs", False), bool | None):
            raise RequestError(400, f"logprobs: expected true or false, found {body['logprobs']!r}")
        num_top = _num_top(body, "top_logprobs") or 0
        if num_top and not body.get("logprobs"):
            raise RequestError(400, "top_logprobs: is only read with logprobs=true")
        row = _row(body)

        def answer(send: OnText) -> tuple[list[int], Answer, Completion]:
            return self.server.connector.ask(row, send, **settings)

        def choice(done: Completion, found: list[Scored] | None) -> dict[str, Any]:
            logprobs = None if found is None else {"content": list(map(_chat_entry, found))}
            message = {"role": "assistant", "content": done.choices[0].message.content}
            return {"message": message, "logprobs": logprobs}

        def part(text: str | None) -> dict[str, Any]:
            delta = {} if self.is_streaming else {"role": "assistant"}
            return {"delta": delta if text is None else {**delta, "content": text}}

        kinds = "chatcmpl", "chat.completion", "chat.completion.chunk"
        self._write_answer(
            body, kinds, answer, choice, part, num_top if body.get("logprobs") else None
        )

    def _complete(self) -> None:
        """Goes on from `prompt`: a text, or the token ids of one."""
        body = self._read_body(OF_TEXT)
        settings = {**self.server.defaults, **_settings(body, NEUTRAL_TEXT)}
        prompt, num_top = self._prompt_ids(body), _num_top(body, "logprobs")

        def answer(send: OnText) -> tuple[list[int], Answer, Completion]:
            return prompt, *self.server.connector.continue_ids(prompt, send, **settings)

        def choice(done: Completion, found: list[Scored] | None) -> dict[str, Any]:
            by_id = bool(body.get("return_tokens_as_token_ids"))
            logprobs = None if found is None else _text_logprobs(found, by_id)
            return {"text": done.choices[0].message.content, "logprobs": logprobs}

        kinds = "cmpl", "text_completion", "text_completion"
        self._write_answer(body, kinds, answer, choice, lambda text: {"text": text or ""}, num_top)

    def _prompt_ids(self, body: dict[str, Any]) -> list[int]:
        """Returns the token ids of `prompt`."""
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            return template.text_ids(self.server.connector.tokenizer, prompt)
        is_ids = isinstance(prompt, list) and all(type(i) is int and i >= 0 for i in prompt)
        if not is_ids:
            found = json.dumps(prompt)[:80] if "prompt" in body else "nothing"
            raise RequestError(400, f"prompt: expected one text or one list of ids, found {found}")
        return list(prompt or [])

    def _write_answer(
        self,
        body: dict[str, Any],
        kinds: tuple[str, str, str],
        answer: Callable[[OnText], tuple[list[int], Answer, Completion]],
        choice: Callable[[Completion, list[Scored] | None], dict[str, Any]],
        part: Callable[[str | None], dict[str, Any]],
        num_top: int | None,
    ) -> None:
        """Writes what `answer` returns, in parts if the request wants a stream.

        `kinds`: beginning of the id, object, object of a part. `choice` and `part` return what a
        choice has besides index and reason. `num_top`: likely tokens to list; None: no log
        probabilities.
        """
        start, whole_kind, part_kind = kinds
        identity = {"id": f"{start}-{time.time_ns():x}", "created": int(time.time())}
        identity["model"] = self.server.name

        def write_part(text: str | None, reason: str | None = None) -> None:
            shown = {"index": 0, **part(text), "finish_reason": reason}
            self._write_event({**identity, "object": part_kind, "choices": [shown]})

        with self.server.lock:
            prompt, written, done = answer(write_part if body.get("stream") else None)
            found = None if num_top is None else self._score(prompt, written, num_top)
        if body.get("stream"):
            write_part(None, done.finish_reason)
            if (body.get("stream_options") or {}).get("include_usage"):
                self._write_event({**identity, "choices": [], "usage": _usage(done)})
            self._write_event(None)
            return
        shown = {"index": 0, **choice(done, found), "finish_reason": done.finish_reason}
        whole = {**identity, "object": whole_kind, "choices": [shown], "usage": _usage(done)}
        if body.get("return_token_ids"):
            shown["token_ids"] = written.ids
            at = shown if part_kind == whole_kind else whole  # where vLLM puts them
            at["prompt_token_ids"] = prompt
        self._write_json(whole)

    def _score(self, prompt: list[int], answer: Answer, num_top: int) -> list[Scored]:
        """Returns an answer's tokens with their log probabilities."""
        model = self.server.connector.load_model_once()
        with generate.eval_mode(model.model):
            logs = generate.log_probs(model.model, prompt, answer.ids)

        def token(row: int, number: int) -> Token:
            text = str(model.tokenizer.decode([number]))
            return Token(number, text, float(logs[row, number]))

        return [
            Scored(
                token(row, number),
                [token(row, each) for each in logs[row].topk(num_top).indices.tolist()],
            )
            for row, number in enumerate(answer.ids)
        ]

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


def _settings(body: dict[str, Any], neutral: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Returns the settings of a request. Raises RequestError for what nobody would carry out."""
    for name, values in neutral.items():
        if name in body and body[name] not in values:
            found = json.dumps(body[name])
            raise RequestError(400, f"{name}: this server leaves it out, found {found}; drop it")
    given = {SETTINGS[name]: body[name] for name in SETTINGS if body.get(name) is not None}
    for name in ("stream", "return_token_ids"):
        if not isinstance(body.get(name, False), bool | None):
            raise RequestError(400, f"{name}: expected true or false, found {body[name]!r}")
    if not isinstance(body.get("stream_options", {}), dict | None):
        raise RequestError(400, "stream_options: expected an object")
    logprobs = body.get("logprobs")  # 0 asks for them, too, where it is a number
    has_logprobs = logprobs is not None and logprobs is not False
    if body.get("stream") and (has_logprobs or body.get("return_token_ids")):
        raise RequestError(400, "logprobs and return_token_ids come without stream only")
    return given


def _num_top(body: dict[str, Any], key: str) -> int | None:
    """Returns how many likely tokens `key` asks for; None if it is not given."""
    number = body.get(key)
    if number is not None and (type(number) is not int or not 0 <= number <= NUM_TOP):
        raise RequestError(400, f"{key}: expected 0 to {NUM_TOP}, found {number!r}")
    return number


def _chat_entry(scored: Scored) -> dict[str, Any]:
    """Returns a token's log probabilities in the form of the chat protocol."""

    def entry(token: Token) -> dict[str, Any]:
        found = {"id": token.id, "token": token.text, "logprob": token.logprob}
        return found | {"bytes": list(token.text.encode())}

    return {**entry(scored.token), "top_logprobs": list(map(entry, scored.top))}


def _text_logprobs(found: list[Scored], by_id: bool) -> dict[str, Any]:
    """Returns log probabilities in the form of the completions protocol.

    It names a token by its text; with `by_id` by its id, since two tokens may have one text.
    """

    def name(token: Token) -> str:
        return f"token_id:{token.id}" if by_id else token.text

    likeliest = [{name(each): each.logprob for each in reversed(row.top)} for row in found]
    return {
        "tokens": [name(row.token) for row in found],
        "token_logprobs": [row.token.logprob for row in found],
        "top_logprobs": likeliest if any(likeliest) else None,
    }


def _usage(done: Completion) -> dict[str, int]:
    return {**vars(done.usage), "total_tokens": done.usage.total_tokens}
