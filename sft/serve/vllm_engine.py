"""Answers by vLLM: its server as a child process, asked with token ids, proven before it is used.

vLLM needs other versions of transformers, so it has an environment of its own, and shares with this
process a folder of weights and a socket that only this user can open. Prompts are rendered here, as
in training, and sent as token ids. What ends an answer, its length and how it is drawn go with each
request; the server's chat template and generation_config.json are not read. Before it answers,
its tokens and log probabilities on a few prompts must be those of the model that was opened. So
whether vLLM computes a model rightly is measured, not listed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import httpx2
import numpy as np
import psutil
import torch
from accelerate import Accelerator

from sft.config.schema import Generation
from sft.errors import EngineError, UserError, redact
from sft.evaluate import generate
from sft.evaluate.answers import AnswerModel, Question
from sft.evaluate.generate import Answer
from sft.evaluate.predictions import Record, key_of
from sft.runtime.children import bound_command
from sft.runtime.console import duration
from sft.runtime.processes import Context
from sft.serve import vllm
from sft.serve.endpoint import NUM_TOP
from sft.serve.proof import MAX_LOSS, MIN_EFFECT
from sft.serve.served import OTHER, PROBES, WHOLE, coarse_kl, full_kl

Kind = Literal["own", "vllm", "auto"]
NAME = "sft"  # of the model at the server
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# What is set here, and may not be set by VLLM_ARGS.
OWN_OPTIONS = (
    *("dtype", "generation-config", "served-model-name", "host", "port", "uds", "api-key"),
    *("logprobs-mode", "enable-lora", "lora-modules", "tokenizer", "model", "config"),
)
# Variables that are not for the server: those of our own launch, and a key that it would ask for.
WITHHELD = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "VLLM_API_KEY",
)
MAX_TEMPERATURE = 2  # that vLLM allows
NUM_TOKENS = 16  # of each answer that is compared before the server is used
NUM_LINES = 12  # of the server's output, shown when it fails
START_SECONDS = 1800  # a large model is read, compiled and warmed up
ANSWER_SECONDS = 1800  # the longest silence of the server about one answer
POLL_SECONDS = 0.5


class Reply(NamedTuple):
    """Tokens of an answer, with the one that ended it; `top`: the likeliest ids in each place."""

    ids: list[int]
    finish_reason: str
    top: list[dict[int, float]]


class Server:
    """vLLM's server as a child process, which ends with this one.

    `words`: its command, without an address. `tick` is called while it starts. Raises EngineError,
    with what it printed last, if it does not start.
    """

    def __init__(self, words: Sequence[str], tick: Callable[[], None]):
        self.folder = Path(tempfile.mkdtemp(prefix="sft-vllm-"))  # only this user can enter it
        self.output = self.folder / "output.txt"
        socket = str(self.folder / "socket")
        environment = {k: v for k, v in os.environ.items() if k not in WITHHELD}
        environment["VLLM_NO_USAGE_STATS"] = "1"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                bound_command([*words, "--uds", socket]),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which ends the server
            )
        transport = httpx2.HTTPTransport(uds=socket, limits=httpx2.Limits(max_connections=None))
        self._client = httpx2.Client(
            transport=transport, base_url="http://vllm", timeout=ANSWER_SECONDS
        )
        try:
            self._wait(tick)
            self.version = str(self._send("GET", "/version")["version"])
        except BaseException:
            self.close()
            raise

    def _wait(self, tick: Callable[[], None]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            tick()
            if not self.is_running:
                raise self._error("ended before it answered")
            with suppress(httpx2.HTTPError):
                if self._client.get("/health", timeout=10).status_code == 200:
                    return
            time.sleep(POLL_SECONDS)
        raise self._error(f"did not answer within {duration(START_SECONDS)}")

    def _error(self, what: str) -> EngineError:
        """Returns the error, with the server's last lines."""
        code = self.process.poll()
        state = "" if code is None else f" (exit code {code})"
        lines = self.output.read_text("utf-8", "replace").splitlines()[-NUM_LINES:]
        shown = "".join(f"\n  {line[:300]}" for line in lines) or " nothing"
        return EngineError(f"vLLM {what}{state}; it printed last:{redact(shown)}")

    def _send(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx2.TimeoutException:
            raise self._error(f"was silent for {duration(ANSWER_SECONDS)}") from None
        except httpx2.HTTPError as error:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            raise self._error(f"no longer answers ({type(error).__name__})") from None
        if response.status_code >= 400:
            reason = f"{response.status_code}: {response.text[:400]}"
            raise UserError(f"vLLM refuses a request: {reason}")
        return dict(response.json())

    def complete(self, prompt: list[int], settings: dict[str, Any], num_top: int = 0) -> Reply:
        """Returns what the server writes after these token ids."""
        body = {"model": NAME, "prompt": prompt, **settings, "return_token_ids": True}
        if num_top:
            body |= {"logprobs": num_top, "return_tokens_as_token_ids": True}
        found = self._send("POST", "/v1/completions", body)
        try:
            choice = found["choices"][0]
            seen, ids, reason = (
                choice[key] for key in ("prompt_token_ids", "token_ids", "finish_reason")
            )
            listed = (choice.get("logprobs") or {}).get("top_logprobs") or []
            top = [
                {int(k.removeprefix("token_id:")): v for k, v in each.items()} for each in listed
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"vLLM: an answer of another form ({error!r})") from None
        if num_top and len(top) != len(ids):
            raise EngineError(f"vLLM: {len(top)} log probabilities for {len(ids)} tokens")
        if seen != prompt:
            raise EngineError("vLLM read other token ids than it was given")
        if reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended an answer with {reason!r}, expected stop or length")
        return Reply(list(ids), reason, top)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """Ends the server and the processes that it started."""
        if self._client.is_closed:
            return
        self._client.close()
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                child.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class VllmModel(AnswerModel):
    """A model whose answers `server` writes. Only the prompts are made here."""

    server: Server = field(kw_only=True)

    def to_record(
        self, question: Question, prompt: list[int] | str, answer: Answer | None = None
    ) -> Record:
        """Returns the record of an answer, which names the engine."""
        engine = {"engine": f"vllm {self.server.version}"}
        return super().to_record(question, prompt, answer) | engine

    def answer_batches(
        self,
        prompts: Sequence[list[int]],
        accelerator: Accelerator,
        numbers: Sequence[int] | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Yields the answers as they come: (positions in `prompts`, answers).

        The server cuts its batches itself, so it is asked for many answers at once.
        """
        at_once = generate.ROWS_GPU if torch.cuda.is_available() else generate.ROWS_CPU
        pool = ThreadPoolExecutor(self.batch_size or at_once)
        try:
            waiting: dict[Future[Answer], int] = {
                pool.submit(self._answer, prompt, i if numbers is None else numbers[i]): i
                for i, prompt in enumerate(prompts)
            }
            while waiting:
                before_batch()
                done = [each for each in wait(waiting, POLL_SECONDS).done if each in waiting]
                if done:
                    found = [each.result() for each in done]
                    yield [waiting.pop(each) for each in done], found
        except UserError:
            self.server.close()  # the other requests end with it
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, prompt: list[int], number: int) -> Answer:
        reply = self.ask(prompt, number)
        if reply is None:
            return Answer([], "length")
        is_end = reply.finish_reason == "stop"
        return Answer(reply.ids[:-1] if is_end else reply.ids, reply.finish_reason)

    def ask(self, prompt: list[int], number: int, num_top: int = 0) -> Reply | None:
        """Returns what the server writes; None if the context has no room for an answer."""
        context = generate.context_length(self.model) or 2**62
        most = min(self.settings.max_new_tokens, context - len(prompt))
        if most <= 0:
            return None
        request: dict[str, Any] = {"max_tokens": most, "temperature": self.settings.temperature}
        # What ends an answer is known here; the server adds nothing to it.
        request |= {"stop_token_ids": list(self.stop), "ignore_eos": True}
        if self.settings.temperature:
            state = np.random.SeedSequence([self.settings.seed, number])
            request |= {"top_p": self.settings.top_p, "top_k": self.settings.top_k or -1}
            request |= {"seed": int(state.generate_state(1, np.uint64)[0] >> np.uint64(1))}
        reply = self.server.complete(prompt, request, num_top)
        if reply.finish_reason == "stop" and (not reply.ids or reply.ids[-1] not in self.stop):
            raise EngineError(f"vLLM ended an answer at {reply.ids[-1:]}, which ends none here")
        return reply


class Probe(NamedTuple):
    """What the opened model says to a prompt: its greedy answer, and log probabilities.

    `logs`: [tokens + 1, vocabulary]. `effect`: KL of the base from the model, for an adapter.
    """

    prompt: list[int]
    answer: Answer
    logs: torch.Tensor
    effect: list[float]


@torch.no_grad()
def make_probes(model: AnswerModel) -> list[Probe]:
    """Returns what the opened model says to those of PROBES that its template can render."""
    quick = replace(model, settings=Generation(max_new_tokens=NUM_TOKENS))
    probes = []
    with generate.eval_mode(model.model):
        for messages in PROBES:
            prompt = model.render_prompt(Question(messages, None, {}))
            if isinstance(prompt, str):  # a template without a system role, a short context
                continue
            [answer] = quick.decode([prompt])
            logs = generate.log_probs(model.model, prompt, answer.ids).cpu()
            effect: list[float] = []
            if hasattr(model.model, "disable_adapter"):
                with model.model.disable_adapter():  # type: ignore[operator]
                    base = generate.log_probs(model.model, prompt, answer.ids).cpu()
                effect = full_kl(logs, base)
            probes.append(Probe(prompt, answer, logs, effect))
    if not probes:
        raise EngineError("no conversation can be rendered to compare vLLM with this model")
    return probes


def prove(model: VllmModel, probes: Sequence[Probe], precision: str) -> str:
    """Returns what was measured. Raises EngineError if the server has not the opened model."""
    limits = WHOLE if precision == "fp32" else OTHER
    quick = replace(model, settings=Generation(max_new_tokens=NUM_TOKENS))
    kl: list[float] = []
    for number, probe in enumerate(probes):
        reply = quick.ask(probe.prompt, 0, NUM_TOP)
        if reply is not None:
            kl += _compare(f"prompt {number}", probe, reply, limits.tie, model.stop)
    effect = [value for probe in probes for value in probe.effect]
    limit = limits.server
    if effect:
        limit = min(limit, MAX_LOSS * max(sum(effect) / len(effect), MIN_EFFECT))
    measured = sum(kl) / len(kl)
    text = f"KL {measured:.2g} nats per token on {len(kl)} tokens of {len(probes)} prompts"
    if not measured <= limit:
        reason = " (a tenth of what the adapter has changed)" if limit < limits.server else ""
        raise EngineError(
            f"vLLM computes another model than the one that was opened: expected at most "
            f"{limit:.2g}{reason}, found {text}"
        )
    return f"{text}, at most {limit:.2g}"


def _compare(
    where: str, probe: Probe, reply: Reply, tie: float, stop: Sequence[int]
) -> list[float]:
    """Returns the KL of each token of `reply` up to the first that is not the probe's."""
    expected, kl = probe.answer.ids, []
    ends = probe.answer.finish_reason == "stop"
    wrong = f"vLLM computes another model than the one that was opened: {where}, token"
    for at, (token, top) in enumerate(zip(reply.ids, reply.top, strict=True)):
        row = probe.logs[at]
        kl.append(coarse_kl(row, top))
        margin = float(row.max() - row[token])
        if not margin <= tie:
            likeliest = int(row.argmax())
            found = f"found {token}, {margin:.2g} nats less likely"
            raise EngineError(f"{wrong} {at}: expected {likeliest}, {found}")
        if at == len(expected):
            if token not in stop or len(reply.ids) == at + 1:
                return kl
            break
        if token != expected[at]:
            return kl  # what follows has another beginning
    if ends or len(reply.ids) != len(expected):
        expected_end = len(expected) + ends
        raise EngineError(f"{wrong}s: expected {expected_end}, found {len(reply.ids)}")
    return kl


class AnswerEngine:
    """Chooses what writes answers: our own decoding, or vLLM, started once for all that is asked.

    `name`: what was opened, as `make serve` takes it. `unable`: why vLLM cannot, if that is known.
    With `auto` a reason against vLLM is logged and our own decoding answers; with `vllm` it is a
    UserError.
    """

    def __init__(self, kind: Kind, name: str, args: str = "", unable: str | None = None):
        if kind not in get_args(Kind):
            expected = ", ".join(get_args(Kind))
            raise UserError(f"ENGINE: expected one of {expected}, found {kind!r}")
        self.kind, self.name, self.unable = kind, name, unable
        self.args = vllm.split_args(args, OWN_OPTIONS)
        if self.args and kind == "own":
            raise UserError("VLLM_ARGS: is only read with ENGINE=vllm or ENGINE=auto")
        self._server: Server | None = None
        if kind == "vllm" and not vllm.is_installed():
            raise UserError(f"ENGINE=vllm: {vllm.MISSING}")

    def answering(
        self, own: AnswerModel, precision: str, context: Context, tick: Callable[[], None]
    ) -> AnswerModel:
        """Returns the model that answers: `own`, or the same by vLLM. Collective.

        `tick` is called while vLLM starts.
        """
        if self.kind == "own":
            return own
        temperature = own.settings.temperature
        unable = self.unable
        if temperature > MAX_TEMPERATURE:
            unable = f"vLLM allows a temperature up to {MAX_TEMPERATURE}, found {temperature}"
        if self._server is not None and not self._server.is_running:
            self._server = None
        if self._server is None and unable is None:
            try:
                self._start(own, precision, context, tick)
            except EngineError as error:
                if self.kind == "vllm":
                    raise
                unable = self.unable = str(error)
        if self._server is not None and unable is None:
            return self._as_vllm(own, self._server)
        if self.kind == "vllm":
            raise EngineError(f"ENGINE=vllm: {unable}; ENGINE=own answers")
        context.log.say(f"our own decoding answers (ENGINE=auto): {unable}")
        return own

    def _start(
        self, own: AnswerModel, precision: str, context: Context, tick: Callable[[], None]
    ) -> None:
        """Starts the server and proves it. Raises EngineError if it cannot be used."""
        if not vllm.is_installed():
            raise EngineError(vllm.MISSING)
        if context.accelerator.num_processes > 1:
            raise EngineError(
                "vLLM has processes of its own: leave NUM_PROCESSES out, and give "
                'VLLM_ARGS="--tensor-parallel-size 2" for two GPUs'
            )
        try:
            words = vllm.command(self.name, served=NAME)
        except UserError as error:
            raise EngineError(str(error)) from None
        words += ["--dtype", PRECISIONS[precision], "--generation-config", "vllm", *self.args]
        started = time.perf_counter()
        probes = make_probes(own)
        own.model.to("cpu")  # the device is vLLM's
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        context.log.say(f"starting vLLM: {shlex.join(words)}")
        server = Server(words, tick)
        try:
            measured = prove(self._as_vllm(own, server), probes, precision)
        except BaseException:
            server.close()
            raise
        self._server = server
        context.log.say(
            f"vLLM {server.version} answers, proven in {duration(time.perf_counter() - started)} "
            f"with its start to be the model that was opened: {measured}"
        )

    def _as_vllm(self, own: AnswerModel, server: Server) -> VllmModel:
        given = {each.name: getattr(own, each.name) for each in fields(AnswerModel)}
        identity = key_of(own.identity, "vllm", server.version, self.args)
        return VllmModel(**{**given, "identity": identity}, server=server)

    def close(self) -> None:
        """Ends the server, if one was started."""
        if self._server is not None:
            self._server.close()
            self._server = None
