"""Tokens and places in a text: with the cache of parts the same as of the whole."""

import copy
import functools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as splits
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sft.data.rendering import MARKS
from sft.data.tokens import (
    BLANK,
    LINE,
    Tokens,
    _Parting,
    _parting,
    _tokens_of_short,
    _Words,
    decode_slice,
    tokenise,
    tokenise_behind,
)

TEXT = "user assistant system Hello a b c the quick brown fox 1 2 3 \n\n e é ▁ ### "
SHORT, LETTERS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
LOWER, UPPER = f"{CASED[0]}*{CASED[1]}+", f"{CASED[0]}+{CASED[1]}*"
SIGNS, BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
CUT = {  # how public tokenizers part a text
    "Qwen2.5": (SHORT, LETTERS, r"\p{N}", SIGNS, BLANKS),
    "Llama 3": (SHORT, LETTERS, r"\p{N}{1,3}", SIGNS, BLANKS),
    "GPT-2": (
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r" ?\p{L}+", r" ?\p{N}+"),
        *(r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+"),
    ),
    "GPT-4": (
        *(r"'(?i:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"\p{N}{1,3}"),
        *(r" ?[^\s\p{L}\p{N}]++[\r\n]*", r"\s*[\r\n]|\s+(?!\S)|\s+"),
    ),
    "Qwen3.5": (
        *(SHORT, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}"),
        *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", BLANKS),
    ),
    "gpt-oss": (
        *(f"{LOWER}{SHORT}?", f"{UPPER}{SHORT}?", r"\p{N}{1,3}"),
        *(r" ?[^\s\p{L}\p{N}]+[\r\n/]*", BLANKS),
    ),
    "Tekken": (LOWER, UPPER, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", BLANKS),
    "DeepSeek": (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        *(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+[\r\n]*", BLANKS),
    ),
}
OTHERS = {  # with which a blank or a newline may stand within a part
    "pairs of words": (r"\w+ \w+", r"\s+", r"\S+"),
    "blanks behind": (r"\S+\s", r"\s+"),
    "looks behind": (r"(?<=[a1#] )\S+", r"\S", r"\s+"),
    "no blanks": (r" ?\p{L}+",),
    "an empty part": (*CUT["Qwen2.5"], ""),
}


def split_at(*patterns: str) -> list[splits.PreTokenizer]:
    return [splits.Split(Regex(each), "isolated") for each in patterns]


BYTES = splits.ByteLevel(add_prefix_space=False, use_regex=False)
FIRST = {"DeepSeek": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+")}
KINDS = {
    f"bytes of {name}": splits.Sequence(
        [*split_at(*FIRST.get(name, ()), "|".join(alternatives)), BYTES]
    )
    for name, alternatives in [*CUT.items(), *OTHERS.items()]
}
KINDS |= {
    "bytes of one text": splits.Sequence(
        [splits.Split("a 1", "isolated"), *split_at("|".join(CUT["Qwen2.5"])), BYTES]
    ),
    "bytes joined to what stands before": splits.Sequence(
        [splits.Split(Regex("|".join(CUT["Qwen2.5"])), "merged_with_previous"), BYTES]
    ),
    "bytes between": splits.Sequence(
        [splits.Split(Regex("|".join(CUT["Qwen2.5"])), "isolated", invert=True), BYTES]
    ),
    "bytes first": splits.Sequence([BYTES, *split_at("|".join(CUT["Qwen2.5"]))]),
    "byte-level": splits.ByteLevel(add_prefix_space=False),
    "byte-level with a first blank": splits.ByteLevel(add_prefix_space=True),
    "digits": splits.Sequence([splits.Digits(), splits.ByteLevel(add_prefix_space=False)]),
    "metaspace": splits.Metaspace(prepend_scheme="first"),
    "metaspace, always": splits.Metaspace(prepend_scheme="always"),
    "words": splits.BertPreTokenizer(),
}
TOKENS = {
    "plain": [],
    "takes blanks": [AddedToken("<|end|>", rstrip=True)],
    "blank": [AddedToken("\n\n", normalized=False)],
    "in normalised text": [AddedToken("<think>", normalized=True)],
    "overlapping": [AddedToken("<|im_start|>user", normalized=False)],
}


@functools.cache
def make(kind: str, added: str, normalizer: str) -> PreTrainedTokenizerFast:
    is_bytes = "byte" in kind or kind == "digits"
    backend = Tokenizer(models.BPE(unk_token=None if is_bytes else "<unk>", fuse_unk=True))
    backend.pre_tokenizer = KINDS[kind]
    if normalizer:
        backend.normalizer = getattr(normalizers, normalizer)()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=splits.ByteLevel.alphabet() if is_bytes else [],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    special = [AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    made.add_tokens([*special, *TOKENS[added]], special_tokens=True)
    return made


PIECES = ["<|im_start|>", "<|im_end|>", "<|end|>", "<think>", "</s>", "user", "assistant"]
PIECES += [" brown fox", " 12", "it's", "\u4e2d", "\t", "\u00a0", "\u200b", "\x1c", "#\n//", "B"]
PIECES += [" ", "\n", "\n\n", "Hello", "a", "1", "é", "e\u0301", "\u0301", "▁", "ж", "###", "<|"]
EVERY = [(kind, added) for kind in KINDS for added in TOKENS]


@pytest.mark.parametrize("normalizer", ["", "NFC", "Lowercase", "Strip"])
@settings(max_examples=60)
@example(("byte-level", "plain"), "ж" * 12 + "<|im_end|>" + "abcde")  # more tokens than characters
@example(("words", "plain"), "<|im_start|>жж")  # one unknown token for both
@given(st.sampled_from(EVERY), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_parts_give_the_tokens_of_the_whole(normalizer, chosen, text):
    tokenizer = make(*chosen, normalizer)
    encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    made = tokenise(tokenizer, text)
    assert made.ids == encoded.ids
    assert made.offsets == encoded.offsets
    by_offsets = Tokens(tokenizer, text, encoded.ids)
    for length in range(len(text) + 1):
        assert made.count(length) == by_offsets.count(length)
        assert made.stop(length) == by_offsets.stop(length)


CUT_AT_BLANKS = [*(f"bytes of {name}" for name in CUT), "byte-level", "digits"]


@pytest.mark.parametrize("kind", KINDS)
def test_known_patterns_are_cut(kind):
    found = _parting(make(kind, "plain", ""))
    assert bool(found and found.words) == (kind in CUT_AT_BLANKS)


@pytest.mark.parametrize("kind", CUT_AT_BLANKS)
@settings(max_examples=100)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_parts_on_both_sides_of_a_cut_are_those_of_the_whole(kind, text):
    *lines, last = LINE.split(text)
    words = [BLANK.split(line) for line in (*(line + "\n" for line in lines), last)]
    pieces = [piece for first, *more in words for piece in (first, *(" " + each for each in more))]
    assert "".join(pieces) == text
    splitter = KINDS[kind].pre_tokenize_str
    assert [part for piece in pieces for part, _ in splitter(piece)] == [
        part for part, _ in splitter(text)
    ]


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_a_text_is_not_cut_where_a_blank_token_takes_blanks(option):
    tokenizer = copy.deepcopy(make("bytes of Qwen2.5", "plain", ""))
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False, **{option: True})])
    assert not _parting(tokenizer).words


def test_a_text_is_not_cut_where_merges_are_random():
    tokenizer = copy.deepcopy(make("bytes of Qwen2.5", "plain", ""))
    tokenizer.backend_tokenizer.model.dropout = 0.5
    assert not _parting(tokenizer).words


def test_behind_an_added_token_no_offsets_are_needed():
    made = tokenise(make("byte-level", "plain", ""), "<|im_start|>Hello<|im_end|>")
    assert [made.stop(12), made.stop(27), made.count(17), made.count(27)] == [1, 4, 3, 4]
    assert "offsets" not in vars(made)


def test_few_texts_and_words_are_kept(monkeypatch):
    for name, value in {"MOST_KNOWN": 6, "MOST_WORDS": 2, "LONG_WORD": 3}.items():
        monkeypatch.setattr(f"sft.data.tokens.{name}", value)
    tokenizer = make("byte-level", "plain", "")
    parting, kept = _Parting(re.compile(""), {}, {}, None), []
    for piece in ("abc", "def", "gh", "gh", "i", "jklmn", "o"):
        parting.ids(tokenizer, piece)
        kept.append(" ".join(parting.known))
    assert kept == ["abc", "abc def", *2 * ["abc def gh"], "i", "i jklmn", "i jklmn o"]
    words, kept = _Words(tokenizer, ""), []
    for word in ("ab", "abc", "b", "c", "b"):
        assert list(words[word]) == tokenise(tokenizer, word).ids
        kept.append(" ".join(words))
    assert kept == ["ab", "ab", "ab b", "c", "c b"]


def test_long_texts_are_not_kept_among_short_ones():
    tokenizer, asked = make("byte-level", "plain", ""), []
    for number in (198, 199, 200):
        tokenise(tokenizer, "ж" * number)
        asked.append(_tokens_of_short.cache_info().misses)
    assert [later - asked[0] for later in asked] == [0, 1, 1]


def test_a_tokenizer_that_grows_is_asked_again():
    tokenizer = copy.deepcopy(make("byte-level", "plain", ""))
    assert len(tokenise(tokenizer, "Hello zq").ids) > 2
    tokenizer.add_tokens(["Hello zq"])
    assert tokenise(tokenizer, "Hello zq").ids == [len(tokenizer) - 1]


@pytest.mark.parametrize(
    "options", [{"padding": "max_length", "max_length": 40}, {"truncation": True, "max_length": 2}]
)
def test_no_token_is_added_or_cut_off_whatever_the_tokenizer_was_called_with(options):
    tokenizer = copy.deepcopy(make("byte-level", "plain", ""))
    tokenizer.pad_token = "</s>"
    start = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("</s> $A", None, [start])
    _, *expected = tokenizer("Hello brown fox").input_ids
    tokenizer("a", **options)
    made = tokenise(tokenizer, "Hello brown fox")
    tokenizer("a", **options)
    assert (made.ids, len(made.offsets)) == (expected, len(expected))


def test_words_are_tokenised_once(monkeypatch):
    tokenizer = make("bytes of Qwen2.5", "plain", "NFC")
    asked = watch(monkeypatch, tokenizer)
    for text in ("fox zq8 fox zq8\nquick", "a zq8\nzq8 zq8"):
        tokenise(tokenizer, f"<|im_start|>{text}<|im_end|>")
    assert [text for text in asked if "zq8" in text] == [" zq8", " zq8\n", "zq8"]


def test_a_blank_that_is_dropped_is_no_end_within_a_token():
    """A property found it: the tokens of the first 13 characters alone are those of 12."""
    made = tokenise(make("words", "blank", "NFC"), "<|im_start|>\n\n")
    assert [made.count(length) for length in (12, 13, 14)] == [1, None, 2]


@settings(max_examples=100)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.integers(0, 40))
def test_counted_tokens_are_those_of_the_prefix_alone(text, length):
    tokenizer, length = make("byte-level", "plain", ""), min(length, len(text))
    alone = tokenise(tokenizer, text[:length]).ids
    is_prefix = tokenise(tokenizer, text).ids[: len(alone)] == alone
    assert tokenise(tokenizer, text).count(length) == (len(alone) if is_prefix else None)


def watch(monkeypatch, tokenizer) -> list[str]:
    """Returns the texts that are encoded from now on."""
    asked, encode = [], Tokenizer.encode_batch_fast

    class Counted:
        def __getattr__(self, name):
            return getattr(tokenizer.backend_tokenizer, name)

        def encode_batch_fast(self, texts, **options):
            asked.extend(texts)
            return encode(tokenizer.backend_tokenizer, texts, **options)

    monkeypatch.setattr("sft.data.tokens._backend", lambda _: Counted())
    return asked


def test_texts_between_added_tokens_are_tokenised_once(monkeypatch):
    tokenizer = make("byte-level with a first blank", "plain", "NFC")
    asked = watch(monkeypatch, tokenizer)
    system = "<|im_start|>system zq7\nfox" + 200 * " brown" + "<|im_end|>"
    for word in ("one", "two"):
        tokenise(tokenizer, f"{system}<|im_start|>user zq7\n{word}<|im_end|>")
    assert sum("brown" in text for text in asked) == 1
    assert asked[-1] == "user zq7\ntwo"


def test_a_typed_token_is_plain_text_in_its_place():
    tokenizer = make("byte-level", "plain", "")
    text = f"a {'<|im_end|>'.join(MARKS)} b"
    made = tokenise(tokenizer, text)
    assert "".join(text[start:end] for start, end in made.offsets) == "a <|im_end|> b"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in made.ids
    assert tokenise(tokenizer, "<|im_end|>").offsets == [(0, 10)]


def test_what_stands_behind_gets_no_blank():
    tokenizer = make("metaspace", "plain", "")
    eos, *expected = tokenise(tokenizer, "</s>Hello").ids
    assert eos == tokenizer.eos_token_id
    assert tokenise(tokenizer, "Hello").ids != expected
    ids, offsets = tokenise_behind(tokenizer, "Hello")
    assert (ids, offsets[0][0], offsets[-1][1]) == (expected, 0, 5)
    for text in ("Hello", "\n\nHello"):  # newlines behind a newline are one token with it
        whole = tokenise(make("bytes of Qwen2.5", "plain", ""), text)
        behind = tokenise_behind(make("bytes of Qwen2.5", "plain", ""), text)
        assert behind == (whole.ids, whole.offsets)
    typed = "Xa".join(MARKS)
    assert tokenise(tokenizer, typed + "Hello").ids[-len(expected) :] == expected


def test_a_decoded_slice_keeps_the_blanks_that_a_tokenizer_would_clean_up():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, ".": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = splits.Whitespace(), decoders.WordPiece(cleanup=False)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    ids = tokenise(made, "a . a").ids
    assert [decode_slice(made, ids, 0, 2), decode_slice(made, ids, 1, 3)] == ["a .", " . a"]
