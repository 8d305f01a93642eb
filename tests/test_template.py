"""Messages -> (ids, labels): what is supervised, for real tokenizers and for the major families."""

import os
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from faults import catalogue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft.data import audit, rendering
from sft.data.audit_report import colour_text
from sft.data.files import Row
from sft.data.template import (
    IGNORED,
    Example,
    prepare_tokenizer,
    prompt_ids,
    render,
    render_row,
)
from sft.errors import DataError, UserError

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
    return prepare_tokenizer(AutoTokenizer.from_pretrained(folder))


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
    return prepare_tokenizer(tokenizer)


def supervised(tokenizer, example):
    """Texts of the supervised runs (as differences of decoded prefixes)."""
    runs, inside = [], False
    for index, label in enumerate([*example.labels, IGNORED]):
        if (label != IGNORED) != inside:
            runs.append(index)
            inside = not inside
    texts = [tokenizer.decode(example.ids[:at], clean_up_tokenization_spaces=False) for at in runs]
    return [b[len(a) :] for a, b in zip(texts[::2], texts[1::2], strict=True)]


def rendered(tokenizer, messages, tools=None, **options):
    """Returns the examples of a row."""
    return [e for _, e in render_row(tokenizer, Row(messages, tools, "f", 1), 9999, **options)]


def learnt(tokenizer, messages, tools=None, **options):
    """Returns the texts that are supervised in a row's examples."""
    made = rendered(tokenizer, messages, tools, **options)
    return [text for example in made for text in supervised(tokenizer, example)]


def begins_as_served(tokenizer, messages, example):
    """Whether the tokens before the last supervised run are those of the inference prompt."""
    *_, (first, _) = audit.supervised_runs(example.labels)
    return example.ids[:first] == prompt_ids(tokenizer, messages[:-1])


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
    "reasoning": (
        REASONING,
        None,
        "<|im_end|>",
        [f"<think>\n\n</think>\n\n{text}<|im_end|>" for text in ("Hello.", "Good bye.")],
    ),
    "plain end": (PLAIN, None, "</s>", ["Hello.\n### end</s>", "Good bye.\n### end</s>"]),
    "more behind": (
        CHATML + "{{ '<|begin|>' if not add_generation_prompt }}",
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


SPLIT = {"reasoning", "plain end"}  # one text cannot be what serving sees at both turns


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    template, bos, eos, expected = FAMILIES[family]
    tokenizer = small(template, bos, eos)
    made = rendered(tokenizer, TWO_TURNS)
    assert [text for example in made for text in supervised(tokenizer, example)] == expected
    assert (len(made) == 2) == (family in SPLIT)
    for turns, example in zip((TWO_TURNS[:2], TWO_TURNS)[-len(made) :], made, strict=True):
        pairs = zip(example.ids, example.labels, strict=True)
        assert all(label in (i, IGNORED) for i, label in pairs)
        assert begins_as_served(tokenizer, turns, example)
    if family not in SPLIT:
        whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
        assert tokenizer.decode(made[0].ids) == whole
    if family != "gemma":
        assert learnt(tokenizer, [SYSTEM, *TWO_TURNS]) == expected


@pytest.mark.parametrize("family", ["llama2", "llama3", "gemma"])
def test_trimmed_content(family):
    template, bos, eos, expected = FAMILIES[family]
    tokenizer = small(template, bos, eos)
    padded = [ASK, {**HELLO, "content": " \nHello.\n "}, AND, {**BYE, "content": "Good bye. "}]
    assert supervised(tokenizer, render(tokenizer, padded)) == expected


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
    (text,) = supervised(tokenizer, render(tokenizer, turns))
    assert text.removeprefix("\n") == kept.removeprefix("\n") + "<|im_end|>"


def test_trimmed_offsets():
    """Some tokenizers leave the blanks out of the offsets of " Hello" and of tokens of blanks."""
    tokenizer, other = small(CHATML), small(CHATML)
    other.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [ASK, {**HELLO, "content": "   Hello.   Good \n   bye.  "}]
    example = render(other, turns)
    assert example == render(tokenizer, turns)
    offsets = other(turns[1]["content"], return_offsets_mapping=True).offset_mapping
    assert any(start == end for start, end in offsets)  # they are trimmed


def test_a_blank_added_token_ends_no_turn():
    """Gemma has added tokens of newlines."""
    tokenizer = small(PLAIN)
    tokenizer.add_tokens(["\n", "\n\n"])
    assert learnt(tokenizer, TWO_TURNS) == ["Hello.\n### end</s>", "Good bye.\n### end</s>"]


def test_a_template_whose_prefixes_are_not_stable():
    tokenizer = small(REASONING, eos="<|im_end|>")
    prefix, whole = (
        tokenizer.apply_chat_template(m, tokenize=False) for m in (TWO_TURNS[:2], TWO_TURNS)
    )
    assert not whole.startswith(prefix)  # what makes prefix rendering wrong
    thought = "<think>\nA greeting.\n</think>\n\nHello."
    example = render(tokenizer, [ASK, {**HELLO, "content": thought}])
    assert supervised(tokenizer, example) == [thought + "<|im_end|>"]
    assert begins_as_served(tokenizer, [ASK, HELLO], example)
    thinking = [ASK, {**HELLO, "content": thought}, AND, BYE]
    answer = "<think>\n\n</think>\n\nGood bye.<|im_end|>"
    example = render(tokenizer, thinking)  # the one text has not the thoughts of the first turn
    assert supervised(tokenizer, example) == [answer]
    assert example.flags == ("not_as_served",)
    assert learnt(tokenizer, thinking) == [thought + "<|im_end|>", answer]


def test_a_call_whose_thoughts_are_dropped_is_learnt_where_they_are_written_or_not_at_all():
    """docs/DATA.md says so."""
    call = {**catalogue.CALL, "content": "<think>\nWho?\n</think>"}
    row = Row([catalogue.ASK, call, catalogue.RESULT, catalogue.BYE], [catalogue.TOOL], "f", 1)
    marked = catalogue.THINKING.replace(
        "{{ m.content if", "{% if m.role == 'assistant' %}{% generation %}{{ m.content if"
    ).replace(
        "{%- endfor %}<|im_end|>",
        "{%- endfor %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    for template in (catalogue.THINKING, marked):
        tokenizer = catalogue.tokenizer(template)
        first, last = render_row(tokenizer, row, 999)
        assert supervised(tokenizer, first[1]) == [
            '<think>\nWho?\n</think><tool>{"name": "get_time", "arguments": {"zone": "X"}}</tool>'
            "<|im_end|>"
        ]
        assert supervised(tokenizer, last[1]) == ["Good bye.<|im_end|>"]
        for kept, example in (first, last):
            assert audit.examine(tokenizer, kept, example, 999) == []
    never = catalogue.tokenizer(catalogue.CHATML)
    given = Row([catalogue.ASK, {**catalogue.CALL, "reasoning_content": "Who?"}], row.tools, "f", 1)
    ((_, example),) = render_row(never, given, 999)
    assert (example.num_supervised, example.flags) == (0, ("thoughts_dropped",))


def test_contents_that_imitate_the_template():
    tokenizer = small(CHATML, eos="<|im_end|>")
    turns = [
        {"role": "user", "content": "assistant\nHello."},
        {"role": "assistant", "content": "user\nassistant\nzq7sentinelk"},
        {"role": "user", "content": "zq7sentinelkk assistant\nuser\nassistant\n"},
        {"role": "assistant", "content": "a"},
    ]
    texts = supervised(tokenizer, render(tokenizer, turns))
    assert texts == ["user\nassistant\nzq7sentinelk<|im_end|>", "a<|im_end|>"]


def test_assistant_turns_in_a_row_and_first():
    tokenizer = small(CHATML, eos="<|im_end|>")
    turns = [HELLO, HELLO, ASK, BYE]
    texts = supervised(tokenizer, render(tokenizer, turns))
    assert texts == ["Hello.<|im_end|>", "Good bye.<|im_end|>"]  # the first has no prompt
    alone = render(tokenizer, [HELLO])
    assert (alone.num_supervised, alone.flags) == (0, ("no_prompt",))


def test_header_token_that_swallows_blanks_is_not_supervised():
    """As Phi-3: the header's token takes the newlines behind it."""
    template = (
        LOOP + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    tokenizer = small(template)
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True)], special_tokens=True)
    turns = [ASK, {"role": "assistant", "content": "\n\nHello."}]
    (example,) = rendered(tokenizer, turns)
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert header in example.ids
    assert header not in example.labels
    # In one text the token would swallow the newlines that the model has to write.
    assert supervised(tokenizer, example) == ["\n\nHello.</s>"]
    assert begins_as_served(tokenizer, turns, example)
    with pytest.raises(DataError, match=r"no turn is served as the whole .* data.turns: auto"):
        render(tokenizer, turns)


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
NOT_THE_PROMPT = "is not how the chat template begins that turn"
IMPOSSIBLE = {
    "last turn dropped": (WITHOUT_LAST, TWO_TURNS, f"before assistant turn 1 {NOT_THE_PROMPT}"),
    "later turns dropped": (FIRST_ONLY, TWO_TURNS, f"before assistant turn 2 {NOT_THE_PROMPT}"),
    "altered": (UPPER, TWO_TURNS, r"does not write content \('Hello\.'\) of assistant turn 1"),
    "cut": (CUT, LONG, "alters or drops what assistant turn 1 says"),
    "header after content": (
        "{{ 'A' if 'Hello.' in messages[-1]['content'] else 'B' }}" + CHATML,
        TWO_TURNS,
        "the prompt has 'B.*, the conversation 'A",
    ),
    "footer after content": (
        CHATML + "{{ 'A' if 'bye.' in messages[-1]['content'] }}",
        TWO_TURNS,
        "alters or drops what assistant turn 2 says",
    ),
    "prompt ignored": (
        CHATML.partition("{% if add")[0],
        TWO_TURNS,
        "ignores add_generation_prompt, .* the header '<|im_start|>assistant",
    ),
    "prompt ends in a blank": (
        CHATML.replace("assistant\n' }}", "assistant\n ' }}"),
        TWO_TURNS,
        "after .*the prompt has ' ', the conversation 'Hello.*correct the template",
    ),
    "variable": (
        CHATML.replace("assistant\n' }}", "assistant\n' + (style or '~') }}"),
        TWO_TURNS,
        r"set data.template_kwargs \(it reads style\), or correct the template",
    ),
    "block in one turn": (HALF, TWO_TURNS, "none in an assistant turn that is to be learnt"),
    "blocks of users": (
        GENERATION.replace(
            "{% else %}{{ m['content']", "{% else %}{% generation %}{{ m['content']"
        ).replace("{% endif %}{% endfor %}", "{% endgeneration %}{% endif %}{% endfor %}"),
        TWO_TURNS,
        "marks the user's turns for training",
    ),
    "altered in the block": (
        GENERATION.replace("{{ m['content']", "{{ m['content'][1:]"),
        TWO_TURNS,
        r"does not write content \('Hello\.'\) of assistant turn 1",
    ),
    "no system role": (GEMMA, [SYSTEM, *TWO_TURNS], "refuses the roles system, .* not supported"),
    "roles": (
        GEMMA,
        [ASK, AND, BYE],
        r"refuses the roles user, user at its line \d+ \(`.*`\): roles must",
    ),
}
ENDED = {  # what ends a turn where the template does not, or not in each turn
    "no end of turn": (NO_END, "</s>", ("end_of_turn_added",)),
    "end of the last only": (LAST_ONLY, "<|im_end|>", ()),
    "no end in the block": (OUTSIDE, "</s>", ("end_of_turn_added",)),
}


@pytest.mark.parametrize("kind", ENDED)
def test_a_turn_that_the_template_does_not_end_is_ended(kind):
    template, end, flags = ENDED[kind]
    tokenizer = small(template, bos="<bos>", eos="</s>")
    row = Row(TWO_TURNS, None, "f", 1)
    made = render_row(tokenizer, row, 512)
    texts = [supervised(tokenizer, example) for _, example in made]
    assert texts == [[f"Hello.{end}"], [f"Good bye.{end}"]]
    for kept, example in made:
        assert example.flags == flags
        assert tuple(audit.examine(tokenizer, kept, example, 512)) == flags


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_template_that_makes_it_impossible_is_refused(kind):
    template, messages, reason = IMPOSSIBLE[kind]
    tokenizer = small(template, bos="<bos>", eos="</s>")
    with pytest.raises(DataError, match=reason):
        render(tokenizer, messages)


def test_prepare_tokenizer():
    with pytest.raises(UserError, match="no eos token"):
        small(CHATML, eos=None)
    tokenizer = small(None)
    assert tokenizer.chat_template == rendering.DEFAULT_TEMPLATE
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id in render(tokenizer, TWO_TURNS).labels  # a true eos
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
    example = render(tokenizer, TWO_TURNS)
    assert tokenizer.decode(example.ids).startswith(start)
    assert supervised(tokenizer, example) == expected
    assert begins_as_served(tokenizer, TWO_TURNS, example)
    assert colour_text(tokenizer, example).plain == tokenizer.decode(example.ids)


@pytest.mark.parametrize("family", ["llama2", "mistral", "zephyr", "default"])
def test_sentencepiece_vocabulary(family):
    """stories260K puts a blank before the text behind every special token, as Llama 2 does."""
    template, _, _, expected = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(real("stories").name_or_path)
    tokenizer.chat_template = template
    example = render(prepare_tokenizer(tokenizer), TWO_TURNS)
    assert [t.strip() for t in supervised(tokenizer, example)] == [t.strip() for t in expected]
    assert begins_as_served(tokenizer, TWO_TURNS, example)


def test_a_blank_that_the_model_has_to_write():
    """After "[/INST]" Llama 2 writes " 7" as two tokens; at inference both are generated."""
    for tokenizer in (small(LLAMA2, "<s>"), small(LLAMA2.replace("' ' + m", "'\n ' + m"), "<s>")):
        blank = "\n " if "'\n ' + m" in tokenizer.chat_template else " "
        turns = [ASK, {**HELLO, "content": "7"}, AND, {**BYE, "content": "8"}]
        example = render(tokenizer, turns)
        assert supervised(tokenizer, example) == [blank + "7 </s>", blank + "8 </s>"]
        assert begins_as_served(tokenizer, turns, example)


def test_one_bos():
    tokenizer = real("stories")
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # it would add a second one
    for ids in (render(tokenizer, TWO_TURNS).ids, prompt_ids(tokenizer, [ASK])):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_thinking_in_a_real_template():
    thought = "<think>\nA greeting.\n</think>\n\nHello."
    turns = [ASK, {**HELLO, "content": thought}]
    ((kept, example),) = render_row(real("minimind"), Row(turns, None, "f", 1), 512)
    assert supervised(real("minimind"), example) == [
        thought.removeprefix("<think>\n") + "<|im_end|>"
    ]
    # The prompt closes the thoughts at once, unless it is asked to let the model think.
    assert example.flags == ("other_variables",)
    assert kept.template_kwargs == {"open_thinking": True}


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
    made = rendered(tokenizer, turns)
    texts = [text for example in made for text in supervised(tokenizer, example)]
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers, strict=True):
        content = answer.lstrip("\n") if name == "minimind" else answer
        content = unicodedata.normalize("NFC", content) if name == "qwen" else content
        assert text.endswith(content + tokenizer.eos_token)
        # a token can hold the header's newline too, never more of it
        assert set(text.removesuffix(content + tokenizer.eos_token)) <= {"\n"}
    assert sum(example.num_supervised for example in made) > len(answers)


# --- view -------------------------------------------------------------------------------------


def test_position_0_is_never_predicted():
    assert Example([5, 6, 7], [5, IGNORED, 7]).num_supervised == 1
    assert Example([5], [5]).num_supervised == 0


def test_coloured_view():
    tokenizer = small(CHATML, eos="<|im_end|>")
    view = colour_text(tokenizer, render(tokenizer, [ASK, HELLO]))
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


# --- tools -------------------------------------------------------------------------------------

ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": ADD}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"sum": "3"}', "name": "add"}
AGENT = [ASK, CALLS, RESULT, BYE]

# As Llama 3.1: a call is JSON, what a tool returns is written as JSON under another role.
LLAMA31 = (
    "{{ bos_token }}{% if tools %}{{ '<|head|>system<|tail|>\n\n' }}{{ tools | tojson }}"
    "{{ '<|eot|>' }}{% endif %}" + LOOP + "{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}"
    '{{ \'<|head|>assistant<|tail|>\n\n{"name": "\' + m.tool_calls[0].function.name }}'
    "{{ '\", \"parameters\": ' }}{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|head|>ipython<|tail|>\n\n' }}{{ m.content | tojson }}"
    "{{ '<|eot|>' }}{% else %}{{ '<|head|>' + m.role + '<|tail|>\n\n' + m.content | trim }}"
    "{{ '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
# The same with another token behind a call than behind an answer.
EOM = LLAMA31.replace("{{ '}<|eot|>' }}", "{{ '}<|im_end|>' }}")
# As Mistral v3: no header at all; tools stand before the last question.
MISTRAL3 = (
    "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == 0 %}{{ '[TOOLS] ' }}{{ tools | tojson }}{{ ' [/TOOLS]' }}"
    "{% endif %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.tool_calls %}"
    "{{ '[CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{{ ']' + eos_token }}{% elif m.role == 'tool' %}"
    "{{ '[RESULT] {\"content\": ' + m.content + '} [/RESULT]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# As DeepSeek-R1: no newline between roles, special tokens inside the call.
DEEPSEEK = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}" + LOOP + "{% if m.role == 'user'"
    " %}{{ '<|head|>' + m.content }}{% elif m.role == 'tool' %}{{ '<|begin|>' + m.content }}"
    "{% elif m.tool_calls %}{{ '<|tail|>' + m.content }}{% for c in m.tool_calls %}"
    "{{ '<|im_start|>function<|im_start|>' + c.function.name + '\n' }}"
    "{{ c.function.arguments | tojson }}{{ '<|eot|>' }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ '<|tail|>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|tail|>' }}{% endif %}"
)
TOOL_FAMILIES = {  # template, bos, eos, what is supervised of the call
    "llama 3.1": (
        LLAMA31,
        "<|begin|>",
        "<|eot|>",
        '{"name": "add", "parameters": {"a": 1, "b": "two"}}<|eot|>',
    ),
    "eom": (
        EOM,
        "<|begin|>",
        "<|eot|>",
        '{"name": "add", "parameters": {"a": 1, "b": "two"}}<|im_end|>',
    ),
    "mistral 3": (
        MISTRAL3,
        "<s>",
        "</s>",
        '[CALLS] [{"name": "add", "arguments": {"a": 1, "b": "two"}}]</s>',
    ),
    "deepseek": (
        DEEPSEEK,
        "<s>",
        "</s>",
        '<|im_start|>function<|im_start|>add\n{"a": 1, "b": "two"}<|eot|></s>',
    ),
}


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_tool_calls_are_supervised_and_results_are_not(family):
    template, bos, eos, call = TOOL_FAMILIES[family]
    tokenizer = small(template, bos, eos)
    example = render(tokenizer, AGENT, TOOLS)
    assert supervised(tokenizer, example) == [call, f"Good bye.{eos}"]
    row = Row(AGENT, TOOLS, "f", 1)
    assert audit.examine(tokenizer, row, example, 512) == []


def test_tool_calls_of_real_templates():
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "two"}}\n</tool_call><|im_end|>'
    tokenizer = real("qwen")
    example = render(tokenizer, AGENT, TOOLS)
    assert supervised(tokenizer, example) == [call, "Good bye.<|im_end|>"]
    said = [ASK, {**CALLS, "content": "Let me see."}, RESULT, BYE]
    example = render(tokenizer, said, TOOLS)
    assert supervised(tokenizer, example) == [f"Let me see.\n{call}", "Good bye.<|im_end|>"]
    tokenizer = real("minimind")
    assert supervised(tokenizer, render(tokenizer, AGENT, TOOLS))[-1] == "Good bye.<|im_end|>"


def test_several_calls_in_one_turn():
    other = {"type": "function", "function": {"name": "mul", "arguments": {}}}
    turns = [ASK, {**CALLS, "tool_calls": [CALL, other]}, RESULT, RESULT, BYE]
    tokenizer = small(MISTRAL3, "<s>", "</s>")
    (calls, _) = supervised(tokenizer, render(tokenizer, turns, TOOLS))
    assert calls.startswith("[CALLS] [")
    assert '"mul", "arguments": {}}]</s>' in calls


def test_a_template_that_knows_no_tools_refuses_calls():
    with pytest.raises(DataError, match=r"does not write the name of a call \('add'\)"):
        render(small(CHATML, eos="<|im_end|>"), AGENT, TOOLS)


# --- what is learnt ----------------------------------------------------------------------------


def test_weights_of_messages():
    tokenizer = small(CHATML, eos="<|im_end|>")
    turns = [ASK, {**HELLO, "weight": 0}, AND, {**BYE, "weight": 0.5}]
    example = render(tokenizer, turns)
    assert supervised(tokenizer, example) == ["Good bye.<|im_end|>"]
    assert example.weights is not None
    pairs = zip(example.labels, example.weights, strict=True)
    assert {weight for label, weight in pairs if label != IGNORED} == {0.5}
    assert render(tokenizer, TWO_TURNS).weights is None


def test_supervise():
    tokenizer = small(CHATML, eos="<|im_end|>")
    last = render(tokenizer, TWO_TURNS, supervise="last")
    assert supervised(tokenizer, last) == ["Good bye.<|im_end|>"]
    everything = render(tokenizer, TWO_TURNS, supervise="everything")
    assert everything.labels == everything.ids


def test_a_document_is_learnt_whole_and_cut_into_pieces():
    tokenizer = real("stories")
    text = "Once upon a time there was a little girl. " * 20
    row = Row([{"role": "text", "content": text}], None, "f", 1)
    made = render_row(tokenizer, row, 64)
    ids = [i for _, example in made for i in example.ids]
    assert ids == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert all(example.labels == example.ids for _, example in made)
    assert max(len(example.ids) for _, example in made) == 64


def test_long_rows():
    tokenizer = small(CHATML, eos="<|im_end|>")
    long = [SYSTEM, *TWO_TURNS, ASK, {**HELLO, "content": "Hello. Good bye."}]
    row = Row(long, None, "f", 1)
    whole = render(tokenizer, long)
    limit = len(whole.ids) - 1
    (error,) = render_row(tokenizer, row, limit)
    assert error == (row, whole)
    assert render_row(tokenizer, row, limit, on_long="drop") == []
    ((_, cut),) = render_row(tokenizer, row, limit, on_long="truncate")
    assert (cut.ids, cut.flags) == (whole.ids[:limit], ("answer_cut",))
    ((shown, short),) = render_row(tokenizer, row, limit, on_long="truncate_left_turns")
    assert shown.messages == [SYSTEM, *long[3:]]
    assert short.ids == render(tokenizer, shown.messages).ids
    assert short.flags == ("turns_dropped",)
    ((kept, still),) = render_row(tokenizer, row, 8, on_long="truncate_left_turns")
    assert (kept, still) == (row, whole)  # the last exchange alone does not fit: the audit refuses
    assert render_row(tokenizer, row, 5, on_long="truncate") == []  # nothing left to learn
