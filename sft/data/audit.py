"""Proves what is trained before it is trained: each finding has a name, a meaning and a remedy.

`examine_row` does not trust the renderer. It renders each row a second time and compares: the same
ids, the supervised runs exactly the assistant turns, each with its end, and before each of them the
very prompt of inference. `examine_tokens` does not trust the collator: it reads the tensors of a
micro-batch. Findings that depend on all rows (duplicates, leaks, outliers) are marked by
`data/cache`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from sft.data import rendering, sentinels, tokens
from sft.data.batches import Layout
from sft.data.ends import stop_tokens
from sft.data.examples import Batch, ExampleArrays, Examples, collate
from sft.data.files import Row
from sft.data.formats import Message, Messages, content_text, is_conversation
from sft.data.rendering import Renderings, Span, cached_by_tokenizer, renderings_of
from sft.data.template import IGNORED, Example, Supervise
from sft.data.tokens import MARKED, Tokens
from sft.data.turns import end_tokens


class Kind(NamedTuple):
    """A kind of finding. An error stops the run; a warning is reported."""

    severity: Literal["error", "warning"]
    meaning: str
    remedy: str


# Errors and warnings: a name, what it means, and below it what to do.
FINDINGS = """\
error not_the_template: the ids are not those of the chat template's text
  prepare the data again with this tokenizer and template
error labels_differ: a label is another token than the one in its place
  labels are not shifted
error unsupervised: no token can be learnt from
  give it an answer, or remove the row
error turns_differ: the supervised parts are not the assistant turns
  supervise whole turns
error answer_differs: a supervised part is not the answer and its end of turn
  correct the chat template or the row
error no_end_of_turn: a turn does not end in a token at which generation can stop
  correct the chat template: a model would not learn to stop
error repeated_bos: begins with two bos tokens
  the template and the tokenizer both write one
error too_long: has more tokens than data.max_seq_len or the model's positions
  raise data.max_seq_len, or set data.on_long to drop, truncate_left_turns or truncate
error prompt_mismatch: what stands before a supervised turn is not the prompt of inference
  correct the chat template: add_generation_prompt must write what training has
error content_altered: the template drops or changes what a message says
  use a role and a form that the template handles
error tools_dropped: the template does not write the row's tools
  use a model whose template handles tools, or remove them from the row
error leaked: a held-out row is also a training row
  remove it from one of the two files
warning no_bos: does not begin with the bos token that this tokenizer gives plain text
  write bos_token in the chat template, if the model was trained with it
warning special_in_content: holds the text of a special token, which is trained and served as \
plain text here
  remove it, if the model will be served where it becomes the real token
warning thoughts_dropped: the template does not write the thoughts of a turn, which is therefore \
not supervised
  use a template that reads reasoning_content (data.chat_template), or remove the thoughts
warning not_as_served: a turn is served otherwise than the one text of the row has it, so it is \
not supervised
  data.turns: auto
warning no_prompt: the template writes no prompt before an assistant turn (the first message, or \
one behind another answer), so it is not supervised
  begin the row with a user turn, or join answers that follow each other
warning end_of_turn_added: the template writes no token at which generation stops, so one is added
  see data.chat_template and model.stop_tokens, if the model ends its turns otherwise
warning tags_kept: the template takes tags in an answer for its own; the answer is learnt as it is \
written
  remove them, if the model is not to write them
warning thoughts_closed: the prompt opens a block of thoughts that the template does not write; \
it is closed
  see data.template_kwargs and data.chat_template, if that is not wanted
warning other_variables: fits the prompt only with another value of a template variable, which \
the row keeps
  set data.template_kwargs, if the model is to be served like this by default
warning unread_variables: sets a variable in chat_template_kwargs that the template does not read
  correct its name, or remove it
warning answer_cut: cut at data.max_seq_len: an answer lost its end
  data.on_long: drop
warning turns_dropped: its oldest turns were removed to fit data.max_seq_len
  raise it to keep them
warning duplicate: says the same as an earlier row
  set data.duplicates: drop, if not meant
warning near_duplicate: says nearly the same as an earlier row
  look at the pair
warning near_leak: a held-out row is nearly a training row, or has the prompt of one
  look at the pair
warning length_outlier: over 8 times as long as 95 % of the rows
  look at it, or lower max_seq_len
"""
KINDS = {
    name: Kind(severity, meaning, remedy)
    for severity, name, meaning, remedy in re.findall(r"(\w+) (\w+): (.+)\n  (.+)", FINDINGS)
}
ERRORS = {name for name, kind in KINDS.items() if kind.severity == "error"}
OUTLIER = 8
BIT = {kind: k for k, kind in enumerate(KINDS)}
TOGETHER, LARGE = 256, 1 << 20  # examples that are collated at a time; tokens, padding included
CPU = torch.device("cpu")


def examine(
    tokenizer: Tokenizer,
    row: Row,
    example: Example,
    max_seq_len: int,
    supervise: Supervise = "all",
) -> list[str]:
    """Returns the kinds of findings of an example, given the row that it was made of."""
    if len(example.ids) != len(example.labels):
        return ["labels_differ"]
    single = Examples(ExampleArrays.pack([(0, row, example)]))
    found = int(examine_tokens(tokenizer, single, max_seq_len)[0])
    return to_kinds(found | examine_row(tokenizer, row, example, supervise))


def nothing_to_learn(examples: Sequence[Example]) -> str | None:
    """Returns the finding of a row that the chat template leaves nothing to learn, with what to do.

    None if something can be learnt, or if the examples are at fault.
    """
    flags = {flag for example in examples for flag in example.flags}
    why = next((kind for kind in ("thoughts_dropped", "no_prompt") if kind in flags), None)
    if why is None or any(example.num_supervised for example in examples):
        return None
    return f"{why}: {KINDS[why].meaning}; {KINDS[why].remedy}"


def to_bits(kinds: Iterable[str]) -> int:
    """Returns a set of kinds as a number: bit k is the k-th of KINDS."""
    return sum(1 << BIT[kind] for kind in set(kinds))


def to_kinds(found: int) -> list[str]:
    """Returns the kinds whose bits are set."""
    return [kind for kind, k in BIT.items() if found >> k & 1]


def examine_row(
    tokenizer: Tokenizer, row: Row, example: Example, supervise: Supervise = "all"
) -> int:
    """Compares an example with a second rendering of its row, and returns the kinds as bits."""
    if not is_conversation(row.messages):
        return to_bits(example.flags)
    return to_bits([*example.flags, *_compare_row(tokenizer, row, example, supervise)])


def examine_tokens(tokenizer: Tokenizer, examples: Examples, max_seq_len: int) -> np.ndarray:
    """Compares stored examples with the tensors that a model would get: (examples,) uint32 of bits.

    The examples go through the collator of training, in both layouts.
    """
    found = np.zeros(len(examples), np.uint32)
    for chosen in _collation_groups(examples.lengths):
        parts = [examples.tokens(i) for i in chosen]
        ids = np.concatenate([ids for ids, _, _ in parts])
        labels = np.concatenate([labels for _, labels, _ in parts])
        lengths = np.array([len(ids) for ids, _, _ in parts])
        for layout in get_args(Layout):
            batch = collate(examples, chosen, tokenizer.pad_token_id, layout, CPU)
            _examine_batch(
                tokenizer, batch, ids, labels, lengths, found[chosen.start : chosen.stop]
            )
    found[np.asarray(examples.lengths) > max_seq_len] |= to_bits(["too_long"])
    return found


def _collation_groups(lengths: Sequence[int]) -> Iterator[range]:
    """Yields examples to collate together: few, and not large when padded."""
    start, longest = 0, 0
    for at, length in enumerate(lengths):
        longest = max(longest, length)
        if at > start and (at - start == TOGETHER or (at - start + 1) * longest > LARGE):
            yield range(start, at)
            start, longest = at, length
    if len(lengths):
        yield range(start, len(lengths))


def _examine_batch(
    tokenizer: Tokenizer,
    batch: Batch,
    ids: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    found: np.ndarray,
) -> None:
    """Adds to `found` (examples,) the findings in one micro-batch, given what was stored."""
    tokens, seen = batch.input_ids.numpy().ravel(), batch.positions.numpy() + 1
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(ids))
    if batch.position_ids is None:  # padded
        rows = np.arange(len(lengths)) * batch.input_ids.shape[1]
        places += np.repeat(rows - starts, lengths)
        starts = rows
    supervised = labels != IGNORED
    is_first = np.zeros(len(ids), bool)  # no token stands before it that could predict it
    is_first[np.cumsum(lengths) - lengths] = True
    expected = places[supervised & ~is_first]
    wrong = [
        places[supervised & (labels != ids)],
        places[tokens[places] != ids],
        np.setxor1d(seen, expected) if not np.array_equal(seen, expected) else seen[:0],
        seen[batch.targets.numpy() != tokens[seen]],
    ]
    found[np.searchsorted(starts, np.concatenate(wrong), "right") - 1] |= to_bits(["labels_differ"])
    learnt = np.bincount(np.searchsorted(starts, seen, "right") - 1, minlength=len(lengths))
    found[learnt == 0] |= to_bits(["unsupervised"])
    if (bos := tokenizer.bos_token_id) is not None:
        second = np.minimum(starts + 1, len(tokens) - 1)
        twice = (lengths > 1) & (tokens[starts] == bos) & (tokens[second] == bos)
        found[twice] |= to_bits(["repeated_bos"])


def _compare_row(
    tokenizer: Tokenizer, row: Row, example: Example, supervise: Supervise
) -> Iterator[str]:
    """Yields the kinds of differences between an example and its row, rendered again."""
    given = renderings_of(tokenizer, row.messages, row.tools, row.template_kwargs)
    whole = tokens.tokenise(tokenizer, given.text)
    ids = whole.ids
    is_whole = example.ids == ids or "answer_cut" in example.flags
    yield from _examine_text(
        given, row, given.text if is_whole else given.prompt(len(row.messages) - 1)
    )
    if "answer_cut" in example.flags:
        if example.ids != ids[: len(example.ids)]:
            yield "not_the_template"
        return
    runs = supervised_runs(example.labels)
    if not is_whole and (
        supervise == "everything" or not _is_prompt_and_answer(given, example, ids, runs)
    ):
        yield "not_the_template"
        return
    if _adds_bos(tokenizer) and example.ids[0] != tokenizer.bos_token_id:
        yield "no_bos"
    if supervise != "everything":
        yield from _compare_turns(given, example, runs, supervise, whole if is_whole else None)


def _is_prompt_and_answer(
    given: Renderings, example: Example, ids: list[int], runs: list[Span]
) -> bool:
    """Returns whether an example that is not `ids`, the tokens of the whole conversation, is those
    of the last turn's prompt, and behind them what the template writes of that turn and its end."""
    last = len(given.messages) - 1
    if not runs or runs[-1][1] != len(example.ids) or not last:
        return False
    prompt = tokens.tokenise(given.tokenizer, given.prompt(last)).ids
    if runs[-1][0] < len(prompt) or example.ids[: len(prompt)] != prompt:
        return False
    end = len(example.ids) - 1
    answer = _normalise(tokens.decode_slice(given.tokenizer, example.ids, len(prompt), end))
    if "thoughts_closed" in example.flags:
        thoughts, _ = rendering.split_thoughts(given.given[0][last])
        answer = answer.removeprefix(_normalise(thoughts)).partition(">\n\n")[2]
    if _says_more(answer, given.given[0]):
        return False
    whole = str(given.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if "tags_kept" in example.flags:  # what the template would write, were the tags no tags
        hidden = sentinels.hide_tags(given, given.given[0][last])
        shown = sentinels.show_tags(given, given.with_turn(last, hidden))
        whole = MARKED.sub("", shown)
    return answer.rstrip() in _normalise(whole)  # blanks may stand before an end that is added


def _says_more(answer: str, messages: Messages) -> bool:
    """Returns whether the answer of the last message has the content of another one, which must be
    long enough not to stand there by chance."""
    *others, own = messages
    own_text = _normalise("\n".join(_texts_in(own)))
    said = (_normalise(content_text(other)).strip() for other in others)
    return any(len(text) > 15 and text in answer and text not in own_text for text in said)


def _compare_turns(
    given: Renderings,
    example: Example,
    runs: list[Span],
    supervise: Supervise,
    whole: Tokens | None,
) -> Iterator[str]:
    """Yields the kinds of differences between the supervised runs and the turns to learn.

    `whole` are the tokens of the whole conversation's text, if they are the example's.
    """
    tokenizer, (messages, _) = given.tokenizer, given.given
    backend = tokenizer.backend_tokenizer
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
    turns = turns[-1:] if supervise == "last" else turns
    left_out = {"thoughts_dropped", "no_prompt", "not_as_served"} & set(example.flags)
    if len(runs) > len(turns) or (len(runs) < len(turns) and not left_out):
        yield "turns_differ"
        return
    ends = stop_ids(tokenizer)
    for first, stop in runs:
        if example.ids[stop - 1] not in ends:
            yield "no_end_of_turn"
        text = backend.decode(example.ids[first:stop], skip_special_tokens=False)
        own = [n for n in turns if n and _says(text, messages[n])]
        if not own and whole and not MARKED.search(given.text):  # decoding may change a text
            text = given.text[whole.offsets[first][0] : whole.offsets[stop - 1][1]]
            own = [n for n in turns if n and _says(text, messages[n])]
        if not own or not ends.isdisjoint(example.ids[first : stop - 1]):
            yield "answer_differs"
            continue
        numbers = [_count_prompt(given, example, n, whole) for n in own]
        if not any(_starts_turn(tokenizer, example.ids, first, number) for number in numbers):
            yield "answer_differs" if any(numbers) else "prompt_mismatch"


def _count_prompt(
    given: Renderings, example: Example, turn: int, whole: Tokens | None
) -> int | None:
    """Returns how many tokens of the example are those of the turn's prompt, or None if its first
    tokens are others."""
    prompt = given.prompt(turn)
    if whole and given.text.startswith(prompt):
        return whole.count(len(prompt))
    ids = tokens.tokenise(given.tokenizer, prompt).ids
    return len(ids) if example.ids[: len(ids)] == ids else None


def _starts_turn(tokenizer: Tokenizer, ids: list[int], first: int, number: int | None) -> bool:
    """Returns whether a run begins behind the `number` tokens of its prompt. An empty block of
    thoughts that is not learnt may stand between (`data.empty_thoughts`)."""
    if number is None or first < number:
        return False
    if first == number:
        return True
    between = tokens.decode_slice(tokenizer, ids, number, first)
    return not re.sub(r"</?\w+>", "", between).strip()


def _says(text: str, turn: Message) -> bool:
    """Returns whether a supervised text has what a turn says: its thoughts, content and calls."""
    text = _normalise(text)
    thoughts, content = rendering.split_thoughts(turn)
    parts = [p["text"] for p in turn["content"]] if isinstance(turn["content"], list) else [content]
    values = [thoughts, *parts]
    for call in rendering.get_calls(turn):
        values += [rendering.get_name(call), *_texts_in(call["function"].get("arguments"))]
    known = sentinels.forms
    return all(
        value in text or any(_normalise(form) in text for form in known(value)) for value in values
    )


def _texts_in(value: Any) -> Iterator[str]:
    """Yields the texts in a JSON value, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


def _normalise(text: str) -> str:
    """Returns a text in one of the forms that Unicode has for it; some tokenizers change it."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


@cached_by_tokenizer
def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the tokens at which generation stops: eos, the model's, and the template's ends."""
    texts = [*stop_tokens(tokenizer), *end_tokens(tokenizer)]
    find = tokenizer.backend_tokenizer.token_to_id  # `get_vocab` would copy the whole vocabulary
    return frozenset(token for text in texts if (token := find(text)) is not None)


@cached_by_tokenizer
def _adds_bos(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer itself begins a text with bos."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]


def supervised_runs(labels: Sequence[int]) -> list[Span]:
    """Returns the supervised runs as (first, stop) token indices."""
    learnt, runs, stop = bytes(map(IGNORED.__ne__, labels)), list[Span](), 0
    while (first := learnt.find(1, stop)) >= 0:
        stop = learnt.find(0, first) if 0 in learnt[first:] else len(learnt)
        runs.append((first, stop))
    return runs


def _examine_text(given: Renderings, row: Row, text: str) -> Iterator[str]:
    """Yields the kinds of what the template did to the prompts and the tools in `text`. The system
    prompt may stand anywhere: Mistral's templates write it into the last message of the user."""
    if given.messages is not row.messages:  # they hold the text of a special token
        yield "special_in_content"
        text = MARKED.sub("", text)
    at = 0
    for message in row.messages:
        if message["role"] == "assistant":  # supervised ones are compared by themselves
            continue
        content = message["content"]
        for value in [p["text"] for p in content] if isinstance(content, list) else [content]:
            said = value.strip()
            quoted = json.dumps(said, ensure_ascii=False)[1:-1]  # some templates write JSON
            start = 0 if message["role"] == "system" else at
            places = [place for form in (said, quoted) if (place := text.find(form, start)) >= 0]
            if not places:
                yield "content_altered"
                return
            at = at if message["role"] == "system" else min(places)
    if any(rendering.get_name(tool) not in given.text for tool in row.tools or []):
        yield "tools_dropped"


def outlier_length(lengths: np.ndarray) -> float:
    """Returns the number of tokens above which an example is far longer than nearly all."""
    return float(OUTLIER * np.quantile(lengths, 0.95))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hashes vocabulary, merges, normalisation and special tokens; not the padding last used."""
    backend = tokenizer.backend_tokenizer
    state = backend.to_str().partition('"added_tokens":')[2]
    special = [tokenizer.special_tokens_map, backend.encode_special_tokens]
    special += [sorted(tokenizer.init_kwargs.get("stop_tokens", []))]
    return _sha256(state + json.dumps(special, sort_keys=True))


def template_sha256(tokenizer: Tokenizer) -> str:
    """Hashes the chat template, or all if there are several.

    The day that some templates write does not count, so that a run which is resumed after midnight
    goes on with the rows as they were prepared.
    """
    return _sha256(json.dumps(tokenizer.chat_template, sort_keys=True))
