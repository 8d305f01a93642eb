"""A model as EleutherAI's lm-eval asks it: log likelihoods, and answers up to stop texts.

lm-eval says what is asked. This module tokenises, computes and stores.

Plain text is tokenised as by lm-eval's own model `hf`: the tokenizer adds its special tokens, and a
prompt that is too long loses its beginning. With the chat template, prompts are those of training
and serving (law 3): rendered and tokenised by `data/template`, without moving white space from
the prompt to the answer.

lm-eval runs on every rank and gives each of them all requests, as if it were alone. The ranks share
them out here. Every response goes to a file, from which all ranks read all responses. So a run that
was killed asks nothing twice. Batches of log likelihoods do not depend on the number of ranks.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.config.load import make_generation
from sft.config.schema import Generation
from sft.data.rendering import render_text
from sft.data.tokens import tokenise, tokenise_behind
from sft.errors import DataError, UserError, suggest
from sft.evaluate import generate
from sft.evaluate.predictions import Predictions, key_of, read_records
from sft.models.dtypes import DTYPES
from sft.models.sizes import read_sizes
from sft.serve.connector import AccelerateConnector

DEFAULT_LENGTH = 2048  # of a model without a limit, as in lm-eval's `hf`
DEFAULT_NEW = 256  # tokens of an answer if a task does not say, as there
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")
Pair = tuple[list[int], list[int]]  # tokens of a context, of its continuation
Scored = tuple[float, bool]  # log likelihood; whether greedy decoding writes the continuation


@dataclass(frozen=True)
class Ending:
    """Says whether the text of some tokens holds one of the stop texts, just completed."""

    tokenizer: Tokenizer
    texts: tuple[str, ...]

    def __call__(self, ids: list[int]) -> bool:
        longest = max((len(text.encode()) for text in self.texts), default=0)
        if not longest:
            return False
        tail = str(self.tokenizer.decode(ids[-longest - 1 :]))  # a token has a byte at least
        return any(text in tail for text in self.texts)


def read_gen_kwargs(given: dict[str, Any], seed: int) -> tuple[Generation, tuple[str, ...]]:
    """Returns the settings that lm-eval's `gen_kwargs` mean, and the stop texts.

    Raises UserError for one that is unknown here, since it would be ignored.
    """
    known: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_NEW))
    if unknown := [name for name in known if name not in KNOWN]:
        raise UserError(f"generation_kwargs: unknown {unknown[0]}; {suggest(unknown[0], KNOWN)}")
    sampled = bool(known["do_sample"])
    temperature = float(known.get("temperature", 0.0)) if sampled else 0.0
    if sampled and not temperature:
        raise UserError("generation_kwargs: do_sample needs a temperature above 0, found none")
    values = {"max_new_tokens": known["max_gen_toks"], "temperature": temperature, "seed": seed}
    if sampled:
        values |= {name: known[name] for name in ("top_p", "top_k") if name in known}
    until = tuple(str(text) for text in known["until"] if text)
    return make_generation(values), until


class Harness(TemplateLM):
    """The model of a connector, for lm-eval. All methods that take requests are collective.

    `folder`: for the files of responses. `is_chat`: prompts come from the chat template. `seed`: of
    sampled answers. `num_cut`: how many prompts lost their beginning, by kind of request.
    """

    def __init__(
        self,
        connector: AccelerateConnector,
        folder: Path,
        *,
        is_chat: bool,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.connector, self.folder, self.is_chat, self.seed = connector, folder, is_chat, seed
        self.answerer = connector.load_model_once()
        self.tokenizer: Tokenizer = self.answerer.tokenizer
        own = generate.context_length(self.answerer.model)
        if max_length and own and max_length > own:
            raise UserError(f"benchmark.max_length: the model takes {own:,}, found {max_length:,}")
        self.max_length = max_length or own or DEFAULT_LENGTH
        self.num_cut: Counter[str] = Counter()
        self._device = connector.accelerator.device

    # --- tokens ----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Returns the token that stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the tokens of a plain text, as lm-eval's `hf` makes them."""
        if add_special_tokens is None:
            bos = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not has_bos_prefix(string, bos)
        encode: Any = self.tokenizer
        ids = encode(string, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return list(ids)

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        if not self.is_chat:
            return super()._encode_pair(context, continuation)
        whole = tokenise(self.tokenizer, context + continuation)
        start = whole.count(len(context))
        if start is None:  # a token would hold the end of the prompt and the start of the answer
            ids = tokenise(self.tokenizer, context).ids
            return ids, tokenise_behind(self.tokenizer, continuation)[0]
        return whole.ids[:start], whole.ids[start:]

    def _encode_prompt(self, text: str) -> list[int]:
        return tokenise(self.tokenizer, text).ids if self.is_chat else self.tok_encode(text)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.get_chat_template() if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the prompt for the next turn, or with the beginning of that turn as it is given.

        If the template has no system turn, its text stands before the first user turn.
        """
        asked, begun = chat_history, ""
        if not add_generation_prompt:
            *asked, last = chat_history
            begun = last["content"]
        try:
            return render_text(self.tokenizer, asked, None, True) + begun
        except DataError as error:
            reason = str(error)
        system, *rest = asked
        if system["role"] == "system" and rest:
            first = rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}
            try:
                return render_text(self.tokenizer, [first, *rest[1:]], None, True) + begun
            except DataError:
                pass  # the first reason is that of the prompt as it is
        raise UserError(
            f"the chat template refuses a prompt: {reason}; give ARGS="
            '"benchmark.apply_chat_template=false" or another benchmark.fewshot_as_multiturn'
        )

    # --- responses -------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Scored]:
        return super().loglikelihood(list(requests), disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Scored]:
        return self._score("loglikelihood", [(context, own) for _, context, own in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Returns the log likelihood of each text, in windows of the longest length."""
        windows: list[Pair] = []
        ends = []
        for request in requests:
            (text,) = request.args
            windows += map(
                make_disjoint_window,
                get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
                ),
            )
            ends.append(len(windows))
        scored = self._score("loglikelihood_rolling", windows)
        starts = [0, *ends[:-1]]
        return [
            sum(score for score, _ in scored[start:end])
            for start, end in zip(starts, ends, strict=True)
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Returns the text of each answer up to the first stop text."""
        kind = "generate_until"
        prompts, keys, by_settings = [], [], defaultdict[str, list[int]](list)
        for number, request in enumerate(requests):
            context, given = request.args
            settings, until = read_gen_kwargs(given, self.seed)
            by_settings[json.dumps(given, sort_keys=True, default=str)].append(number)
            prompts.append(self._fit(kind, context, settings))
            place = number if settings.temperature else None
            keys.append(self._key(kind, settings.model_dump(), until, place, prompts[-1]))
        with self._responses(kind, keys) as (missing, add):
            for numbers in by_settings.values():
                settings, until = read_gen_kwargs(requests[numbers[0]].args[1], self.seed)
                ends = Ending(self.tokenizer, until)
                answerer = replace(self.answerer, settings=settings, ends=ends)
                own = [number for number in numbers if number in missing]
                for batch, answers in answerer.answer_batches(
                    [prompts[number] for number in own],
                    self.connector.accelerator,
                    own,
                    self.connector.before_batch,
                ):
                    add([own[i] for i in batch], [self._text(a.ids, until) for a in answers])
        return self._read(kind)

    def _fit(self, kind: str, context: str, settings: Generation) -> list[int]:
        """Returns the tokens of a prompt, without its beginning if the answer needs the room."""
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks: expected fewer than the {self.max_length:,} tokens of prompt and "
                f"answer, found {settings.max_new_tokens:,}; give ARGS="
                '"benchmark.gen_kwargs.max_gen_toks=64"'
            )
        ids = self._encode_prompt(context)
        self.num_cut[kind] += len(ids) > room
        return ids[-room:] or [self.prefix_token_id]

    def _text(self, ids: list[int], until: tuple[str, ...]) -> str:
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return postprocess_generated_text(text, [*until], None)

    def _score(self, kind: str, pairs: Sequence[Pair]) -> list[Scored]:
        """Returns each continuation's log likelihood after its context. Collective."""
        if getattr(self.answerer.model, "draws_per_prompt", False):
            raise UserError(
                f"{kind}: the weights of the mixture {self.connector.model_name} are drawn for "
                "each prompt, so a text has no likelihood of its own; benchmark one of its parts"
            )
        keys = []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation):,} tokens is longer than the "
                    f"{self.max_length:,} that the model takes; leave its example out "
                    "(benchmark.samples), or use a model that takes more"
                )
            self.num_cut[kind] += len(context) + len(continuation) > self.max_length + 1
            keys.append(self._key(kind, self.max_length, context, continuation))
        with self._responses(kind, keys) as (missing, add), generate.eval_mode(self.answerer.model):
            # Continuations of one token after the same context are read off one forward pass.
            by_input: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for number, (context, continuation) in enumerate(pairs):
                if number in missing:
                    ids = [*context, *continuation][-self.max_length - 1 : -1]
                    by_input[tuple(ids)].append(number)
            inputs = list(by_input)
            longest_answers = [max(len(pairs[n][1]) for n in by_input[ids]) for ids in inputs]

            def score(batch: list[int]) -> list[list[Scored]]:
                rows = [inputs[i] for i in batch]
                asked = [[pairs[n][1] for n in by_input[ids]] for ids in rows]
                return self._score_batch(rows, asked)

            accelerator = self.connector.accelerator
            rows = self.answerer.max_rows(self._row_bytes(inputs, longest_answers), accelerator)
            # Whole batches are shared out, so that their sizes do not depend on the ranks.
            batches = generate.cut_batches([len(ids) for ids in inputs], 1, rows)[0]
            for batch in batches[accelerator.process_index :: accelerator.num_processes]:
                self.connector.before_batch()
                found = generate.halve_until_it_fits(batch, score)
                numbers = [n for i in batch for n in by_input[inputs[i]]]
                add(numbers, [scored for row in found for scored in row])
        return [(score, is_greedy) for score, is_greedy in self._read(kind)]

    def _score_batch(
        self, rows: Sequence[Sequence[int]], asked: Sequence[Sequence[list[int]]]
    ) -> list[list[Scored]]:
        """Returns the scores of the continuations that end each row, which lacks their last token.

        Rows are padded on the right, where causal attention cannot look, as in training.
        """
        model = self.answerer.model
        width = max(map(len, rows))
        kept = max(  # positions from the end of the batch
            width - len(row) + max(map(len, own)) for row, own in zip(rows, asked, strict=True)
        )
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        few = {"logits_to_keep": kept} if "logits_to_keep" in generate.accepted_by(model) else {}
        logits = model(input_ids=ids, use_cache=False, **few).logits[:, -kept:]
        found = []
        for row, own, of_row in zip(rows, asked, logits, strict=True):
            end = len(row) - width + kept
            needed = max(map(len, own))
            likely = of_row[end - needed : end].float().log_softmax(-1)
            best = likely.argmax(-1).tolist()
            scored = []
            for continuation in own:
                num = len(continuation)
                tokens = torch.tensor(continuation, device=self.device, dtype=torch.long)
                own_rows = likely[needed - num :].gather(-1, tokens[:, None])
                greedy = best[needed - num :] == continuation
                scored.append((float(own_rows.double().sum()), greedy))
            found.append(scored)
        return found

    def _row_bytes(self, inputs: Sequence[Sequence[int]], answers: Sequence[int]) -> int:
        """Returns the bytes of the largest row: activations, and its logits in two precisions."""
        model = self.answerer.model
        precision = generate.weight_precision(model)
        longest = max(map(len, inputs), default=1)
        vocabulary = read_sizes(model.config).vocab_size
        logits = max(answers, default=1) * vocabulary * (DTYPES[precision].itemsize + 8)
        return generate.bytes_per_row(model.config, precision, longest, 0) + logits

    # --- the files of responses ------------------------------------------------------------------

    def _key(self, *parts: Any) -> str:
        return key_of(self.answerer.identity, *parts)

    def _path(self, kind: str) -> Path:
        return self.folder / f"{kind}.jsonl"

    @contextmanager
    def _responses(
        self, kind: str, keys: Sequence[str]
    ) -> Iterator[tuple[set[int], Callable[[list[int], Sequence[Any]], None]]]:
        """Yields the numbers of the requests without a response, and what adds responses.

        Afterwards the file has a response for each of `keys`. Collective.
        """
        accelerator = self.connector.accelerator
        if len(set(gather_object([key_of(keys)]))) > 1:
            raise UserError(
                f"{kind}: the processes made different requests; code of a task must give the same "
                "on each of them (random numbers only from a fixed seed)"
            )
        file = Predictions(self._path(kind))
        missing = {number for number, key in enumerate(keys) if file.expect(key)}
        accelerator.wait_for_everyone()  # all ranks read the file before any adds to it
        with self.connector.log.progress(kind, len(keys), len(keys) - len(missing)) as advance:

            def add(numbers: list[int], responses: Sequence[Any]) -> None:
                pairs = zip(numbers, responses, strict=True)
                file.append([{"index": n, "key": keys[n], "response": r} for n, r in pairs])
                advance(len(numbers) * accelerator.num_processes)

            yield missing, add
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            file.finish()
        accelerator.wait_for_everyone()

    def _read(self, kind: str) -> list[Any]:
        return [record["response"] for record in read_records(self._path(kind))]
