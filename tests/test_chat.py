"""Messages -> (ids, labels): what is supervised, for real tokenizers and for the major families."""

import os
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft import chat
from sft.chat import IGNORED, Example
from sft.config import UserError
from sft.data import DataError, Row, load_rows

SHARED = Path(os.environ.get("SFT_SHARED", Path(__file__).parents[2] / "shared"))
FOLDERS = {
    "qwen": "data/tokenizers/qwen2.5-instruct",
    "minimind": "data/tokenizers/minimind",
    "gpt2": "data/tokenizers/gpt2",
    "stories": "models/stories260K",
}
SPECIALS = ["<s>", "</s>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>"]
SPECIALS += ["<|tail|>", "<|eot|>", "<start_of_turn>", "<end_of_turn>"]
ASK, HELLO = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello."}
AND, BYE = {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Good bye."}
SYSTEM = {"role": "system", "content": "Be kind."}
TWO_TURNS = [ASK, HELLO, AND, BYE]


@cache
def real(name):
    folder = SHARED / FOLDERS[name]
    if not folder.exists():
        pytest.skip(f"no {folder}: set SFT_SHARED to the folder of real tokenizers")
    return chat.prepare_tokenizer(AutoTokenizer.from_pretrained(folder))


@cache
def _small_bpe():
    """Byte-level BPE in which " Hello" is one token, as in real ones, but "[/INST]" is text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m["content"] for m in [SYSTEM, *TWO_TURNS]]
    bpe.train_from_iterator([f" {text} {text}" for text in texts] * 3, trainer)
    return bpe.to_str()


def small(template, bos=None, eos="</s>"):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_small_bpe()), bos_token=bos, eos_token=eos
    )
    tokenizer.chat_template = template
    return chat.prepare_tokenizer(tokenizer)


def supervised(tokenizer, example):
    """Texts of the supervised runs (as differences of decoded prefixes)."""
    runs, inside = [], False
    for index, label in enumerate([*example.labels, IGNORED]):
        if (label != IGNORED) != inside:
            runs.append(index)
            inside = not inside
    texts = [tokenizer.decode(example.ids[:at], clean_up_tokenization_spaces=False) for at in runs]
    return [b[len(a) :] for a, b in zip(texts[::2], texts[1::2], strict=True)]


# --- families ----------------------------------------------------------------------------------

LOOP = "{% for m in messages %}"
CHATML = (
    LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}" + LOOP + "{{ '<|head|>' + m['role'] + '<|tail|>\n\n' + m['content'] | trim"
    " + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + LOOP
    + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    LOOP + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + LOOP + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
GENERATION = (
    LOOP + "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3: reasoning is dropped from all turns but the last, which gets a block even without any.
REASONING = (
    LOOP + "{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{% set r = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m['content'] else '' %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    LOOP + "{{ '### ' + m['role'] + '\n' + m['content'] }}"
    "{{ '\n### end\n\n' if m['role'] == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
EOS_AFTER = CHATML.replace("'<|im_end|>\n' }}", "'<|im_end|>' }}{{ '\n' + eos_token }}")

FAMILIES = {  # template, bos, eos, supervised text of the two turns
    "chatml": (CHATML, None, "<|im_end|>", ["Hello.<|im_end|>", "Good bye.<|im_end|>"]),
    "llama2": (LLAMA2, "<s>", "</s>", [" Hello. </s>", " Good bye. </s>"]),
    "llama3": (LLAMA3, "<|begin|>", "<|eot|>", ["Hello.<|eot|>", "Good bye.<|eot|>"]),
    "gemma": (GEMMA, "<bos>", "<eos>", ["Hello.<end_of_turn>", "Good bye.<end_of_turn>"]),
    "zephyr": (ZEPHYR, None, "</s>", ["Hello.</s>", "Good bye.</s>"]),
    "mistral": (MISTRAL, "<s>", "</s>", ["Hello.</s>", "Good bye.</s>"]),
    "generation": (GENERATION, None, "<|im_end|>", ["Hello.<|im_end|>", "Good bye.<|im_end|>"]),
    "reasoning": (REASONING, None, "<|im_end|>", ["Hello.<|im_end|>", "Good bye.<|im_end|>"]),
    "plain end": (PLAIN, None, "</s>", ["Hello.\n### end", "Good bye.\n### end"]),
    "more behind": (
        CHATML + "{{ '<|begin|>' }}",
        None,
        "<|im_end|>",
        ["Hello.<|im_end|>", "Good bye.<|im_end|>"],
    ),
    "eos after": (
        EOS_AFTER,
        None,
        "</s>",
        ["Hello.<|im_end|>\n</s>", "Good bye.<|im_end|>\n</s>"],
    ),
    "default": (None, "<s>", "</s>", ["Hello.</s>", "Good bye.</s>"]),
    "default, no bos": (None, None, "</s>", ["Hello.</s>", "Good bye.</s>"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    template, bos, eos, expected = FAMILIES[family]
    tokenizer = small(template, bos, eos)
    example = chat.render(tokenizer, TWO_TURNS)
    assert supervised(tokenizer, example) == expected
    assert all(label in (i, IGNORED) for i, label in zip(example.ids, example.labels, strict=True))
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    mismatch = chat.prompt_mismatch(tokenizer, TWO_TURNS, example)
    served_otherwise = family in ("reasoning", "more behind")
    assert (mismatch is not None) == served_otherwise, mismatch
    if family != "gemma":
        with_system = chat.render(tokenizer, [SYSTEM, *TWO_TURNS])
        assert supervised(tokenizer, with_system) == expected


@pytest.mark.parametrize("family", ["llama2", "llama3", "gemma"])
def test_trimmed_content(family):
    template, bos, eos, expected = FAMILIES[family]
    tokenizer = small(template, bos, eos)
    padded = [ASK, {**HELLO, "content": " \nHello.\n "}, AND, {**BYE, "content": "Good bye. "}]
    assert supervised(tokenizer, chat.render(tokenizer, padded)) == expected


@pytest.mark.parametrize(
    ("trim", "kept"),
    [
        (".rstrip()", "\n Hello."),
        (".lstrip()", "Hello. \n"),
        (".rstrip('\\n')", "\n Hello. "),
        (".lstrip('\\n')", " Hello. \n"),
        (".strip('\\n')", " Hello. "),
    ],
)
def test_content_trimmed_at_one_side(trim, kept):
    tokenizer = small(CHATML.replace("m['content']", f"m['content']{trim}"))
    turns = [ASK, {**HELLO, "content": "\n Hello. \n"}]
    (text,) = supervised(tokenizer, chat.render(tokenizer, turns))
    assert text.removeprefix("\n") == kept.removeprefix("\n") + "<|im_end|>"


def test_trimmed_offsets():
    """Some tokenizers leave the blanks out of the offsets of " Hello" and of tokens of blanks."""
    tokenizer, other = small(CHATML), small(CHATML)
    other.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [ASK, {**HELLO, "content": "   Hello.   Good \n   bye.  "}]
    example = chat.render(other, turns)
    assert example == chat.render(tokenizer, turns)
    offsets = other(turns[1]["content"], return_offsets_mapping=True).offset_mapping
    assert any(start == end for start, end in offsets)  # they are trimmed


def test_a_blank_added_token_ends_no_turn():
    """Gemma has added tokens of newlines."""
    tokenizer = small(PLAIN)
    tokenizer.add_tokens(["\n", "\n\n"])
    texts = supervised(tokenizer, chat.render(tokenizer, TWO_TURNS))
    assert texts == ["Hello.\n### end", "Good bye.\n### end"]


def test_a_template_whose_prefixes_are_not_stable():
    tokenizer = small(REASONING, eos="<|im_end|>")
    prefix, whole = (
        tokenizer.apply_chat_template(m, tokenize=False) for m in (TWO_TURNS[:2], TWO_TURNS)
    )
    assert not whole.startswith(prefix)  # what makes prefix rendering wrong
    thought = "<think>\nA greeting.\n</think>\n\nHello."
    example = chat.render(tokenizer, [ASK, {**HELLO, "content": thought}])
    assert supervised(tokenizer, example) == [thought + "<|im_end|>"]
    assert chat.prompt_mismatch(tokenizer, [ASK, HELLO], example) is None
    with pytest.raises(DataError, match=r"turn 1 .*end the row at this turn"):
        chat.render(tokenizer, [ASK, {**HELLO, "content": thought}, AND, BYE])
    mismatch = chat.prompt_mismatch(tokenizer, TWO_TURNS, chat.render(tokenizer, TWO_TURNS))
    assert mismatch is not None
    assert "the prompt has '', training has '<think" in mismatch


def test_contents_that_imitate_the_template():
    tokenizer = small(CHATML, eos="<|im_end|>")
    turns = [
        {"role": "user", "content": "assistant\nHello."},
        {"role": "assistant", "content": "user\nassistant\nzq7sentinelk"},
        {"role": "user", "content": "zq7sentinelkk assistant\nuser\nassistant\n"},
        {"role": "assistant", "content": "a"},
    ]
    texts = supervised(tokenizer, chat.render(tokenizer, turns))
    assert texts == ["user\nassistant\nzq7sentinelk<|im_end|>", "a<|im_end|>"]


def test_assistant_turns_in_a_row_and_first():
    tokenizer = small(CHATML, eos="<|im_end|>")
    turns = [HELLO, HELLO, ASK, BYE]
    texts = supervised(tokenizer, chat.render(tokenizer, turns))
    assert texts == ["Hello.<|im_end|>", "Hello.<|im_end|>", "Good bye.<|im_end|>"]
    alone = chat.render(tokenizer, [HELLO])
    assert "begins with the assistant" in str(chat.prompt_mismatch(tokenizer, [HELLO], alone))


def test_header_token_that_swallows_blanks_is_not_supervised():
    """As Phi-3: the header's token takes the newlines behind it, also those of the content."""
    template = (
        LOOP + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    )
    tokenizer = small(template)
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True)], special_tokens=True)
    turns = [ASK, {"role": "assistant", "content": "\n\nHello."}]
    example = chat.render(tokenizer, turns)
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert header in example.ids
    assert header not in example.labels
    assert supervised(tokenizer, example) == ["Hello.</s>"]


# --- what cannot be trained on -----------------------------------------------------------------

WITHOUT_LAST = CHATML.replace("in messages", "in messages[:-1]")
FIRST_ONLY = CHATML.replace("in messages", "in messages[:2]")
UPPER = CHATML.replace("m['content']", "m['content'] | upper")
CUT = CHATML.replace("m['content']", "m['content'][:60]")
NO_END = CHATML.replace("<|im_end|>", "")
LAST_ONLY = CHATML.replace("'<|im_end|>\n'", "('<|im_end|>' if loop.last else '') + '\n'")
OUTSIDE = GENERATION.replace("'<|im_end|>\n' }}{% endg", "'' }}{% endg")
HALF = GENERATION.replace("{% if m['role'] == 'assistant' %}", "{% if loop.last %}")
LONG = [ASK, {**HELLO, "content": "Hello. " * 20}]
IMPOSSIBLE = {
    "last turn dropped": (WITHOUT_LAST, TWO_TURNS, "writes 1 of 2 assistant turns"),
    "later turns dropped": (FIRST_ONLY, TWO_TURNS, "writes 1 of 2 assistant turns"),
    "altered": (UPPER, TWO_TURNS, r"writes 0 of 2|alters or drops the content of .* turn 1"),
    "cut": (CUT, LONG, "alters or drops the content of assistant turn 1"),
    "header after content": (
        "{{ 'A' if 'Hello.' in messages[1]['content'] else 'B' }}" + CHATML,
        TWO_TURNS,
        "alters or drops the content of assistant turn 1",
    ),
    "footer after content": (
        CHATML + "{{ 'A' if 'bye.' in messages[3]['content'] }}",
        TWO_TURNS,
        "alters or drops the content of assistant turn 2",
    ),
    "no end of turn": (NO_END, TWO_TURNS, "writes no end of turn .*use a template that writes one"),
    "end of the last only": (LAST_ONLY, TWO_TURNS, "not close assistant turn 1 like the last one"),
    "end outside the block": (OUTSIDE, TWO_TURNS, r"turn 1 ends in 'Hello\.'.* move that token"),
    "block in one turn": (HALF, TWO_TURNS, "marks 1 of 2 assistant turns"),
    "altered in the block": (
        GENERATION.replace("{{ m['content']", "{{ m['content'][1:]"),
        TWO_TURNS,
        "alters or drops the content of assistant turn 1",
    ),
    "no system role": (GEMMA, [SYSTEM, *TWO_TURNS], "refuses the roles system, .* not supported"),
    "roles": (GEMMA, [ASK, AND, BYE], "refuses the roles user, user, assistant: roles must"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_template_that_makes_it_impossible_is_refused(kind):
    template, messages, reason = IMPOSSIBLE[kind]
    tokenizer = small(template, bos="<bos>", eos="</s>")
    with pytest.raises(DataError, match=reason):
        chat.render(tokenizer, messages)
    with pytest.raises(DataError, match=rf"(?s)f.jsonl: 1 bad row;.*\n  f.jsonl:2: .*({reason})"):
        chat.render_rows(tokenizer, [Row(messages, "f.jsonl", 2)])


def test_prepare_tokenizer():
    with pytest.raises(UserError, match="no eos token"):
        small(CHATML, eos=None)
    tokenizer = small(None)
    assert tokenizer.chat_template == chat.DEFAULT_TEMPLATE
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id in chat.render(tokenizer, TWO_TURNS).labels  # a true eos
    qwen = real("qwen")
    assert qwen.pad_token == "<|endoftext|>"
    assert "You are Qwen" in qwen.chat_template


# --- real tokenizers ---------------------------------------------------------------------------

REAL = {  # rendered start, supervised text of the two turns
    "qwen": ("<|im_start|>system\nYou are Qwen", ["Hello.<|im_end|>", "Good bye.<|im_end|>"]),
    "minimind": (
        "<|im_start|>user\nHi there<|im_end|>",
        ["Hello.<|im_end|>", "Good bye.<|im_end|>"],
    ),
    "gpt2": ("<|endoftext|>User:\nHi", ["Hello.<|endoftext|>", "Good bye.<|endoftext|>"]),
    "stories": ("<s> User:\nHi there\n\nAssistant:\n", ["Hello.</s>", "Good bye.</s>"]),
}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name):
    tokenizer, (start, expected) = real(name), REAL[name]
    example = chat.render(tokenizer, TWO_TURNS)
    assert tokenizer.decode(example.ids).startswith(start)
    assert supervised(tokenizer, example) == expected
    assert chat.prompt_mismatch(tokenizer, TWO_TURNS, example) is None
    assert chat.coloured(tokenizer, example).plain == tokenizer.decode(example.ids)


@pytest.mark.parametrize("family", ["llama2", "mistral", "zephyr", "default"])
def test_sentencepiece_vocabulary(family):
    """stories260K puts a blank before the text behind every special token, as Llama 2 does."""
    template, _, _, expected = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(real("stories").name_or_path)
    tokenizer.chat_template = template
    example = chat.render(chat.prepare_tokenizer(tokenizer), TWO_TURNS)
    assert [t.strip() for t in supervised(tokenizer, example)] == [t.strip() for t in expected]
    assert chat.prompt_mismatch(tokenizer, TWO_TURNS, example) is None


def test_a_blank_that_the_model_has_to_write():
    """After "[/INST]" Llama 2 writes " 7" as two tokens; at inference both are generated."""
    for tokenizer in (small(LLAMA2, "<s>"), small(LLAMA2.replace("' ' + m", "'\n ' + m"), "<s>")):
        blank = "\n " if "'\n ' + m" in tokenizer.chat_template else " "
        turns = [ASK, {**HELLO, "content": "7"}, AND, {**BYE, "content": "8"}]
        example = chat.render(tokenizer, turns)
        assert supervised(tokenizer, example) == [blank + "7 </s>", blank + "8 </s>"]
        assert chat.prompt_mismatch(tokenizer, turns, example) is None


def test_one_bos():
    tokenizer = real("stories")
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # it would add a second one
    for ids in (chat.render(tokenizer, TWO_TURNS).ids, chat.prompt_ids(tokenizer, [ASK])):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_thinking_in_a_real_template():
    thought = "<think>\nA greeting.\n</think>\n\nHello."
    turns = [ASK, {**HELLO, "content": thought}]
    example = chat.render(real("minimind"), turns)
    assert supervised(real("minimind"), example) == [thought + "<|im_end|>"]
    # the prompt at inference closes the thinking at once
    mismatch = chat.prompt_mismatch(real("minimind"), turns, example)
    assert r"assistant\n' the prompt has '<think>\n\n</think>\n\n', training has ''" in str(
        mismatch
    )


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<|"), max_size=30)
BLANKS = st.text(" \n\t\r\u00a0", max_size=3)
CONTENT = st.tuples(BLANKS, WORDS, BLANKS).map("".join).filter(str.strip)


@pytest.mark.parametrize("name", REAL)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ask=CONTENT, answers=st.lists(CONTENT, min_size=1, max_size=3))
def test_supervised_text_is_content_and_end_of_turn(name, ask, answers):
    tokenizer = real(name)
    turns = [
        {"role": role, "content": content}
        for answer in answers
        for role, content in (("user", ask), ("assistant", answer))
    ]
    example = chat.render(tokenizer, turns)
    texts = supervised(tokenizer, example)
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers, strict=True):
        content = answer.lstrip("\n") if name == "minimind" else answer
        content = unicodedata.normalize("NFC", content) if name == "qwen" else content
        assert text.endswith(content + tokenizer.eos_token)
        # a token can hold the header's newline too, never more of it
        assert set(text.removesuffix(content + tokenizer.eos_token)) <= {"\n"}
    assert example.num_supervised > len(answers)


@pytest.mark.parametrize("name", REAL)
def test_gsm8k_passes_the_audit(name):
    tokenizer = real(name)
    rows = load_rows(str(SHARED / "data/instruct/gsm8k_test.jsonl"), 40)
    examples = chat.render_rows(tokenizer, rows)
    report = chat.audit(tokenizer, rows, examples, max_seq_len=2048)
    assert {kind: found["count"] for kind, found in report["problems"].items()} == {
        "unsupervised": 0,
        "no_end_of_turn": 0,
        "repeated_bos": 0,
        "too_long": 0,
        "prompt_mismatch": 0,
    }
    for row, example in zip(rows, examples, strict=True):
        content = row.messages[1]["content"]
        assert supervised(tokenizer, example) == [content + tokenizer.eos_token]


# --- audit and view ----------------------------------------------------------------------------


def test_audit_names_the_rows():
    tokenizer = small(CHATML, bos="<s>", eos="<|im_end|>")
    good = chat.render(tokenizer, [ASK, HELLO])
    end = len(good.ids) - good.labels[::-1].index(tokenizer.eos_token_id) - 1
    bos = tokenizer.bos_token_id
    kinds = {
        "unsupervised": Example(good.ids, [IGNORED] * len(good.ids)),
        "no_end_of_turn": Example(good.ids, [*good.labels[:end], IGNORED, IGNORED]),
        "repeated_bos": Example([bos, bos, *good.ids], [IGNORED, IGNORED, *good.labels]),
        "too_long": chat.render(tokenizer, [ASK, {**HELLO, "content": "Hello. " * 40}]),
        "prompt_mismatch": Example(good.ids[1:], good.labels[1:]),
    }
    examples = [good, *kinds.values()]
    rows = [Row([ASK, HELLO], "f.jsonl", line) for line in range(1, len(examples) + 1)]
    report = chat.audit(tokenizer, rows, examples, max_seq_len=60)
    found = {kind: problem["rows"] for kind, problem in report["problems"].items()}
    assert found == {
        "unsupervised": ["f.jsonl:2"],
        "no_end_of_turn": ["f.jsonl:2", "f.jsonl:3"],
        "repeated_bos": ["f.jsonl:4"],
        "too_long": ["f.jsonl:5"],
        "prompt_mismatch": ["f.jsonl:2", "f.jsonl:4", "f.jsonl:6"],
    }
    assert all(p["count"] == len(p["rows"]) for p in report["problems"].values())
    assert report["rows"] == 6
    assert report["tokens"] == sum(len(example.ids) for example in examples)
    assert report["supervised_tokens"] == sum(example.num_supervised for example in examples)
    assert report["longest"] == len(kinds["too_long"].ids)


def test_position_0_is_never_predicted():
    assert Example([5, 6, 7], [5, IGNORED, 7]).num_supervised == 1
    assert Example([5], [5]).num_supervised == 0


def test_digests_see_the_tokenizer_and_the_template_but_not_padding():
    def digests(tokenizer):
        report = chat.audit(tokenizer, [], [], 8)
        return report["tokenizer_sha256"], report["template_sha256"]

    first, template = digests(small(CHATML))
    padded = small(CHATML)
    padded(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert digests(padded) == (first, template)
    other = small(ZEPHYR)
    assert digests(other)[0] == first
    assert digests(other)[1] != template
    other.add_tokens(["<new>"])
    assert digests(other)[0] != first
    assert digests(small(CHATML, eos="<eos>"))[0] != first


def test_coloured_view():
    tokenizer = small(CHATML, eos="<|im_end|>")
    view = chat.coloured(tokenizer, chat.render(tokenizer, [ASK, HELLO]))
    spans = [(view.plain[span.start : span.end], str(span.style)) for span in view.spans]
    assert spans == [
        ("<|im_start|>", "bold magenta"),
        ("user\nHi there", "dim"),
        ("<|im_end|>", "bold magenta"),
        ("\n", "dim"),
        ("<|im_start|>", "bold magenta"),
        ("assistant\n", "dim"),
        ("Hello.", "green"),
        ("<|im_end|>", "bold magenta underline"),
        ("\n", "dim"),
    ]
