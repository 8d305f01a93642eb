"""Makes *nano*: the task that fine-tuning teaches, and all of its base model but the weights.

The task turns a request in plain English into a JSON call:

    remind me to water the plants tomorrow at 7:30 pm
    {"call": "set_reminder", "task": "water the plants", "day": "tomorrow", "time": "19:30"}

Words and sentences are in nano/words/, `python -m nano.make_nano` writes these files. One seed
always gives the same bytes:

    nano/train.jsonl, valid.jsonl, test.jsonl   the task, rows of {"messages": [...]}
    nano/model/                                 config.json and the tokenizer (no weights)
    outputs/nano_primer/primer.jsonl            general skills that the base is pretrained on

Phrasings and values (names, clock times, amounts, ...) of valid and test never occur in train. The
primer holds no call, no phrasing of the task and none of the held-out values. `check_splits` and
`check_primer` assert both on the rows themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Final

from nano.writers import (
    CALL_NAME,
    ENGLISH,
    PRIMER,
    SHARED,
    SPLITS,
    TASK,
    TIMES,
    VALUES,
    Pools,
    PrimerWriter,
    Row,
    TaskWriter,
    find_spaced,
    load,
    space_words,
    to_json,
)

HELD_OUT_SHARE: Final = {"valid": 0.08, "test": 0.2}
HELD_OUT_TIMES: Final = {*TIMES["valid"], *TIMES["test"]}
STATEMENTS: Final = [text for group in PRIMER.statements for text in group["texts"]]
NUMBERS: Final[Pools] = {
    "amount": [*range(5, 200), *(x + 0.5 for x in range(5, 100)), *range(200, 1000, 10)],
    "minutes": [*range(2, 100), 120, 180, 240, 300],
}
ONE_WORD_NUMBERS: Final = {*range(21), *range(30, 100, 10)}


def list_texts(rows: Iterable[Row]) -> Iterator[str]:
    """Yields the text of every message."""
    return (message["content"] for row in rows for message in row["messages"])


def list_phrasings(*splits: str) -> set[str]:
    """Returns the phrasings that those splits may use."""
    return {text for call in TASK.calls.values() for split in splits for text in call[split]}


def split_values(rng: Random) -> dict[str, Pools]:
    """Returns the values that each split may use; splits share none, except for SHARED.

    Vocabulary goes to train, since neither training nor the base can do without it: numbers of one
    word (`ten`), and texts that also stand in a phrasing, another value or the primer (`bread`).
    """
    pools: dict[str, Pools] = {split: {**SHARED, "time": TIMES[split]} for split in SPLITS}
    english = (ENGLISH.nouns, ENGLISH.adjectives, ENGLISH.verbs, ENGLISH.links, VALUES.rooms)
    texts = [text for some in (*VALUES.copied.values(), *english) for text in some]
    texts += [*list_phrasings(*SPLITS), *STATEMENTS]
    copied = {space_words(text) for some in VALUES.copied.values() for text in some}
    count = Counter(found for text in texts for found in find_spaced(copied, text))
    for kind, values in {**VALUES.copied, **NUMBERS}.items():
        assert len(set(values)) == len(values), f"{kind}: a value is listed twice"
        order = list(values)
        rng.shuffle(order)
        order.sort(key=lambda v: v in ONE_WORD_NUMBERS or count[space_words(str(v))] > 1)
        for split, share in HELD_OUT_SHARE.items():
            cut = max(2, round(share * len(values)))
            pools[split][kind], order = order[:cut], order[cut:]
        pools["train"][kind] = order
    return pools


def list_values(rows: Iterable[Row]) -> set[tuple[str, Any]]:
    """Returns every (kind, value) in the calls of the rows, without the shared kinds."""
    found = set()
    for row in rows:
        call = json.loads(row["messages"][-1]["content"])
        found |= {(kind, call[field]) for field, kind in TASK.calls[call["call"]]["fields"].items()}
    return {(kind, value) for kind, value in found if kind not in SHARED}


def check_splits(rows: dict[str, list[Row]], held_out: Sequence[str]) -> None:
    """Asserts that splits share no phrasing or value, and that train has no held-out text."""
    for one, other in combinations(SPLITS, 2):
        phrasings = list_phrasings(one) & list_phrasings(other)
        assert not phrasings, f"{one} and {other} share phrasings: {phrasings}"
        values = list_values(rows[one]) & list_values(rows[other])
        assert not values, f"{one} and {other} share values: {values}"
    for text in list_texts(rows["train"]):
        assert not find_spaced(held_out, text), f"{find_spaced(held_out, text)} in train: {text}"


def check_primer(rows: Iterable[Row], held_out: Sequence[str]) -> None:
    """Asserts that the primer has no call, phrasing of the task, held-out text or clock time."""
    for text in list_texts(rows):
        assert not CALL_NAME.search(text), f"the primer names a call: {text}"
        assert not find_spaced(held_out, text), f"{find_spaced(held_out, text)} in primer: {text}"
    for row in rows:
        for message in row["messages"][1::2]:  # as said, 10:20 pm is another time than 10:20
            times = re.findall(r"\b\d\d:\d\d\b(?! [ap]m)", message["content"])
            assert HELD_OUT_TIMES.isdisjoint(times), f"the primer has {times}: {message}"
    texts = {*STATEMENTS, *(request for some in PRIMER.requests.values() for request in some)}
    assert texts.isdisjoint(list_phrasings(*SPLITS)), texts & list_phrasings(*SPLITS)


def write_model(folder: Path, corpus: Iterable[str], vocab_size: int) -> None:
    """Trains a byte-level BPE tokenizer on the corpus; writes it and the configuration."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the import: one order of counting
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    base = load("model")
    bpe = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(base.pieces), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=base.special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, **base.tokenizer).save_pretrained(folder)
    config = LlamaConfig(vocab_size=vocab_size, **base.token_ids, **base.architecture)
    config.save_pretrained(folder)
    GenerationConfig(**base.token_ids).save_pretrained(folder)


def store_weights(trained: Path, target: Path) -> None:
    """Puts the weights of a trained base beside its configuration, in bf16 (half the size)."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(trained / "model.safetensors")
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(halved, target, metadata={"format": "pt"})
    target.chmod(0o644)
    print(f"{target}: {sum(tensor.numel() for tensor in halved.values()):,} parameters")


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{to_json(row)}\n" for row in rows), "utf-8", newline="\n")


def main() -> None:
    """Makes and checks the files, then writes them; with --weights, only stores the weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("nano"))
    parser.add_argument("--primer", type=Path, default=Path("outputs/nano_primer/primer.jsonl"))
    parser.add_argument("--weights", type=Path, help="only store the base trained in this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=12_000, help="rows")
    parser.add_argument(
        "--calls", nargs="+", default=TASK.taught, choices=TASK.calls, metavar="CALL"
    )
    parser.add_argument("--valid", type=int, default=200, help="rows")
    parser.add_argument("--test", type=int, default=400, help="rows")
    parser.add_argument("--primer-rows", type=int, default=144_000)
    parser.add_argument("--vocab", type=int, default=1024)
    args = parser.parse_args()
    if args.weights:
        return store_weights(args.weights, args.out / "model/model.safetensors")

    pools = split_values(Random(args.seed))
    copied = [pools[split][kind] for split in HELD_OUT_SHARE for kind in VALUES.copied]
    held_out = [space_words(text) for texts in copied for text in texts]
    rows = {}
    for split in SPLITS:
        writer, count = TaskWriter(f"{args.seed} {split}"), getattr(args, split)
        rows[split] = writer.write_task(split, pools[split], count, args.calls, held_out)
    primer = [*PrimerWriter(f"{args.seed} primer").write_primer(args.primer_rows, held_out)]
    check_splits(rows, held_out)
    check_primer(primer, held_out)

    for split in SPLITS:
        save_rows(args.out / f"{split}.jsonl", rows[split])
    save_rows(args.primer, primer)
    mixed = primer[-20_000:]  # the first rows only repeat
    write_model(args.out / "model", list_texts(mixed), args.vocab)
    counts = ", ".join(f"{len(rows[split])} {split}" for split in SPLITS)
    print(f"{args.out}: {counts}; {args.primer}: {len(primer)} rows")


if __name__ == "__main__":
    main()
