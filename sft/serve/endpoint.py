"""Asks a server that speaks OpenAI's chat protocol, and reads which tokens it saw and wrote.

llama.cpp's server, vLLM and `make serve` reveal token ids, each in its own way. Others reveal text
and counts only; a field is then None.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from sft.data.formats import Messages
from sft.errors import UserError, hide_credentials

NUM_TOP = 20  # probabilities asked for at each token; vLLM's default allows no more
TIMEOUT = httpx2.Timeout(600, connect=10)  # seconds
KEY = "SFT_SERVE_API_KEY"  # variable with the server's key, if it wants one
# What a request asks beyond the protocol; a server that refuses one of them is asked without all.
REVEALING: dict[str, Any] = {
    "return_token_ids": True,  # vLLM, `make serve`: ids of the prompt
    "return_tokens_as_token_ids": True,  # vLLM: "token_id:17" in place of text
}
LOGPROBS: dict[str, Any] = {"logprobs": True, "top_logprobs": NUM_TOP}


@dataclass(frozen=True)
class Reply:
    """A greedy answer. `top`: for each token, the log probabilities of the likeliest ids."""

    text: str
    finish_reason: str
    num_prompt: int | None
    prompt: list[int] | None
    ids: list[int] | None
    top: list[dict[int, float]] | None


class Endpoint:
    """A server at `url`, with or without /v1 at its end. `model`: its name there; None: its first.

    Raises UserError for a server that cannot be reached or does not speak the protocol.
    """

    def __init__(self, url: str, model: str | None = None):
        try:
            is_web = urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname
        except ValueError:
            is_web = None
        if not is_web:
            raise UserError(
                f"URL: expected the address of a server, such as http://127.0.0.1:8000, found "
                f"{hide_credentials(url)!r}"
            )
        self.root = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(timeout=TIMEOUT, headers=headers)
        listed = self._send("GET", "/v1/models")
        self.software = listed.headers.get("server", "not named")
        try:
            models = {str(each["id"]): each for each in listed.json()["data"]}
        except (ValueError, KeyError, TypeError):
            raise self._error("/v1/models", "no list of models") from None
        if not models or (model and model not in models):
            raise UserError(
                f"{self}: it has no model {model or ''}; it has {', '.join(models) or 'none'}: "
                "give MODEL=<one of them>"
            )
        self.model = model or next(iter(models))
        # llama.cpp says how many bytes its weights take.
        self.num_bytes: int | None = (models[self.model].get("meta") or {}).get("size")
        self._extras = [{**LOGPROBS, **REVEALING}, LOGPROBS, {}]

    def __str__(self) -> str:
        return hide_credentials(self.root)

    def _error(self, path: str, found: str) -> UserError:
        return UserError(
            f"{self}{path}: expected a server of OpenAI's chat protocol, found {found}; is URL the "
            f"address of the model's server (and {KEY} its key)?"
        )

    def _send(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        """Returns the response, which is one that succeeded."""
        response = self._try(method, path, body)
        if response.status_code >= 400:
            raise self._error(path, f"{response.status_code}: {response.text[:200]}")
        return response

    def _try(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        try:
            return self._client.request(method, self.root + path, json=body)
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{self}: the server cannot be reached ({reason}); start it, or correct URL"
            ) from None

    def answer(self, messages: Messages, max_tokens: int) -> Reply:
        """Returns the greedy answer to a conversation, by the chat API."""
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens}
        body |= {"temperature": 0, "seed": 0}
        path = "/v1/chat/completions"
        while True:
            response = self._try("POST", path, {**body, **self._extras[0]})
            if response.status_code not in (400, 422) or len(self._extras) == 1:
                break
            del self._extras[0]
        if response.status_code >= 400:
            raise self._error(path, f"{response.status_code}: {response.text[:200]}")
        try:
            return self._read(response.json(), messages)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self._error(path, f"an answer of another form ({error!r})") from None

    def _read(self, found: dict[str, Any], messages: Messages) -> Reply:
        choice = found["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        ids: list[int] | None = _ids_of(tokens) or choice.get("token_ids")
        top: list[dict[int, float]] = []
        for token in tokens:
            likeliest = token.get("top_logprobs") or []
            values = [float(each["logprob"]) for each in likeliest]
            top.append(dict(zip(_ids_of(likeliest) or [], values, strict=False)))
        usage = found.get("usage") or {}
        count = usage.get("prompt_tokens")
        # llama.cpp leaves out a token that ends within a character: no other has its place then.
        if tokens and usage.get("completion_tokens", len(tokens)) != len(tokens):
            ids, top = None, []
        prompt = found.get("prompt_token_ids") or choice.get("prompt_token_ids")
        return Reply(
            text=choice["message"].get("content") or "",
            finish_reason=choice["finish_reason"],
            num_prompt=count,
            prompt=prompt or self._prompt_of_llama_cpp(messages, count),
            ids=ids,
            top=top if top and all(top) else None,
        )

    def _prompt_of_llama_cpp(self, messages: Messages, count: int | None) -> list[int] | None:
        """Returns the ids of the rendered prompt, if they are as many as the answer was based on.

        The server adds a BOS unless the template has written one; which of the two it did is known
        by their number only.
        """
        rendered = self._try("POST", "/apply-template", {"messages": messages})
        if rendered.status_code >= 400:
            return None
        try:
            text = rendered.json()["prompt"]
            for adds_special in (True, False):
                body = {"content": text, "add_special": adds_special, "parse_special": True}
                ids = self._send("POST", "/tokenize", body).json()["tokens"]
                if len(ids) == count:
                    return list(ids)
        except (ValueError, KeyError, TypeError):
            pass
        return None


def _ids_of(entries: list[dict[str, Any]]) -> list[int] | None:
    """Returns the token ids in entries of log probabilities; None if they have only text."""
    ids = []
    for entry in entries:
        _, is_marked, number = str(entry.get("token")).rpartition("token_id:")
        if "id" not in entry and not is_marked:
            return None
        ids.append(int(entry.get("id", number)))
    return ids or None
