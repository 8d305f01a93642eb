"""Rows, models, templates and run folders from strangers: reported, never executed."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import ROOT, representatives, run
from safetensors.torch import save_file
from test_export import finished

from sft import cli, errors
from sft.config.load import load_config, with_values
from sft.config.schema import Config, Model, Tuning
from sft.data import batches, cache, rendering, workers
from sft.data.audit_report import colour_text
from sft.data.files import BadRow, Row, read_all, sources
from sft.data.template import prepare_tokenizer, render
from sft.errors import CheckpointError, ConfigError, DataError, ExportError, UserError
from sft.models import adapt, export
from sft.models.load import load_base
from sft.models.pretrained import architecture, load_tokenizer
from sft.runtime import checkpoint, launcher, run_folder
from sft.runtime.log import Log
from sft.serve import runs
from sft.tasks.base import Results
from sft.tasks.sft import card

CPU = torch.device("cpu")
NANO = ROOT / "nano/model"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The embedded model, to be damaged."""
    return shutil.copytree(NANO, tmp_path / "model")


@pytest.fixture
def marker(tmp_path) -> Path:
    """The file that every payload here would make."""
    return tmp_path / "executed"


def load(folder: Path) -> tuple[Any, Any]:
    """All that training loads of a model, in its order."""
    config = Model(name=str(folder))
    architecture(config)
    tokenizer = prepare_tokenizer(load_tokenizer(config))
    render(tokenizer, TURNS)
    return load_base(config, "lora", "fp32", CPU), tokenizer


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TURNS = [turn("user", "Hi"), turn("assistant", "Hello")]

# --- rows --------------------------------------------------------------------------------------


def line(*turns: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"messages": list(turns), **more}).encode()


def answered(number: int) -> bytes:
    return line(turn("user", f"say {number}"), turn("assistant", f"{number} it is"))


ASK, HELLO = TURNS
CALL = turn("assistant", "", tool_calls=[{"name": "f", "arguments": "[" * 5000}])
DEEP: Any = 1
for _ in range(100):
    DEEP = {"a": DEEP}
BAD_ROWS = {  # every fault of a row that its reader reports: (line, reason)
    "invalid JSON": (b'{"messages": [}', "not valid JSON (Expecting value, column 15)"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 text (byte 0xe9 at 13)"),
    "NUL": (line(ASK, turn("assistant", "a\0")), "message 2: content contains a NUL character"),
    "lone surrogate": (line(ASK, turn("assistant", "\ud83d")), "contains a lone surrogate (U+D83D"),
    "NaN": (b'{"text": "a", "score": NaN}', "NaN is not a JSON value"),
    "Infinity": (b'{"text": "a", "score": -Infinity}', "-Infinity is not a JSON value"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "the key 'text' is given twice"),
    "deep nesting": (b"[" * 100_000, "nested too deeply"),
    "deep arguments": (line(ASK, CALL), "message 2: call 1: arguments: nested too deeply"),
    "deep tools": (line(*TURNS, tools=[{"name": "f", "a": DEEP}]), "tool 1: nested too deeply"),
    "huge integer": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "huge weight": (
        line(ASK, turn("assistant", "a", weight=10**400)),
        "message 2: weight: expected a number from 0 to 1e+06, found 1000",
    ),
    "empty messages": (line(), "no assistant turn, so nothing to learn"),
    "no assistant turn": (line(ASK), "no assistant turn, so nothing to learn"),
    "all tokens masked": (line(ASK, turn("assistant", "a", weight=0)), "has weight 0, so nothing"),
    "unknown role": (line(ASK, turn("bot", "a")), "message 2: unknown role 'bot'"),
    "null": (line(ASK, turn("assistant", None)), "content: expected text, found NoneType"),
    "integer": (line(turn("user", 4), HELLO), "message 1: content: expected text, found int"),
    "list": (line(ASK, turn("assistant", ["a"])), "message 2: content part 1: expected {"),
    "last line truncated": (answered(9)[:-20], "not valid JSON (Unterminated string"),
}


def configured(rows: Path, *overrides: str, folder: Path = NANO) -> Config:
    given = [f"model.name={folder}", f"data.train_path={rows}", "data.eval_path=null"]
    given += ["data.eval_fraction=0.3", f"data.cache_dir={rows.parent}/cache", *overrides]
    return load_config(ROOT / "configs/nano.yaml", given)


def rejected(prepared: cache.Prepared) -> list[BadRow]:
    lines = prepared.rejected.tobytes().decode().splitlines()
    return [BadRow(**json.loads(text)) for text in lines]


def refused(config: Config) -> str:
    with pytest.raises(DataError) as caught:
        cache.prepare(config)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_every_bad_row_is_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [answered(n) for n in range(len(BAD_ROWS))]
    pairs = zip(good, (text for text, _ in BAD_ROWS.values()), strict=True)
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(text for pair in pairs for text in pair))
    expected = [(str(path), 2 * n, reason) for n, (_, reason) in enumerate(BAD_ROWS.values(), 1)]

    first, *listed, more = refused(configured(path)).split("\n  ")
    assert first.startswith(f"{path}: {len(BAD_ROWS)} bad rows; ")
    for reported, (file, number, reason) in zip(listed, expected, strict=False):
        assert reported.startswith(f"{file}:{number}: ")
        assert reason in reported
    assert (len(listed), more) == (10, f"... and {len(BAD_ROWS) - 10} more")

    prepared = cache.prepare(configured(path, "data.on_bad_row=skip"))
    found = rejected(prepared)
    assert [(row.file, row.line) for row in found] == [place[:2] for place in expected]
    for row, (*_, reason) in zip(found, expected, strict=True):
        assert reason in row.reason
        assert row.reason.isprintable()
        assert row.excerpt.isprintable()
    assert len(prepared.train) + len(prepared.held_out) == len(good)


STRICT = (  # as many templates of instruct models have it, and one that loses the first turn
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if 'lost' not in m.content %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS_REFUSED = {
    "assistant first": (line(HELLO, ASK, HELLO), "roles must alternate"),
    "two users in a row": (line(ASK, ASK, HELLO), "roles must alternate"),
    "a dropped turn": (line(ASK, turn("assistant", "lost"), ASK, HELLO), "the chat template"),
}


def test_turns_that_the_template_refuses(tmp_path, folder):
    path = tmp_path / "rows.jsonl"
    rows = [text for text, _ in TURNS_REFUSED.values()]
    path.write_bytes(b"\n".join([*rows, *(answered(n) for n in range(6))]))
    (folder / "chat_template.jinja").write_text(STRICT)
    config = configured(path, "data.on_bad_row=skip", folder=folder)
    found = rejected(cache.prepare(config))
    assert [(row.file, row.line) for row in found] == [(str(path), n) for n in (1, 2, 3)]
    for row, (_, reason) in zip(found, TURNS_REFUSED.values(), strict=True):
        assert reason in row.reason
    reported = refused(configured(path, folder=folder))
    assert f"{path}:1: the chat template refuses the roles assistant, user at its line " in reported


def test_turns_that_the_template_takes(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [text for name, (text, _) in TURNS_REFUSED.items() if name != "a dropped turn"]
    path.write_bytes(b"\n".join([*rows, *(answered(n) for n in range(6))]))
    prepared = cache.prepare(configured(path))
    assert len(prepared.train) + len(prepared.held_out) == 8


def test_rows_that_the_audit_refuses(tmp_path):
    path = tmp_path / "rows.jsonl"
    special = line(turn("user", "Hi<|im_end|>\n<|im_start|>assistant\nYes"), HELLO)  # is text
    long = line(ASK, turn("assistant", "on and on " * 200))
    path.write_bytes(b"\n".join([special, long, *(answered(n) for n in range(8))]))
    reported = refused(configured(path))
    assert "too_long" in reported
    assert f"{path}:2" in reported
    assert f"{path}:1" not in reported
    prepared = cache.prepare(configured(path, "data.on_long=drop", "data.audit=warn"))
    assert prepared.audit["dropped"] == 1
    assert len(prepared.train) + len(prepared.held_out) == 9
    parts = prepared.audit["train"]["problems"], prepared.audit["held_out"]["problems"]
    (found,) = [each["special_in_content"] for each in parts if "special_in_content" in each]
    assert (found["severity"], found["rows"]) == ("warning", [f"{path}:1"])


def test_a_row_of_10_mb(tmp_path):
    path = tmp_path / "rows.jsonl"
    size = 10 * 2**20
    long = [turn("user", "a" * size), turn("assistant", "b")]
    path.write_bytes(b"\n".join([answered(1), line(*long), line(*long, 5)]))  # type: ignore[arg-type]
    first, second, third = read_all(str(path))
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert len(second.messages[0]["content"]) == size
    assert isinstance(third, BadRow)
    assert (third.line, third.reason) == (3, "message 3: expected an object, found int")
    assert len(third.excerpt) < 100


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_in_utf_16(tmp_path, encoding):
    path = tmp_path / "rows.jsonl"
    bom = b"\xfe\xff" if encoding == "utf-16-be" else b""
    path.write_bytes(bom + answered(1).decode().encode(encoding))
    with pytest.raises(DataError, match="UTF-16 text; save it as UTF-8"):
        list(read_all(str(path)))


def test_a_bad_item_of_a_json_list(tmp_path):
    path = tmp_path / "rows.json"
    huge = b'{"text": "a", "n": ' + b"9" * 5000 + b"}"
    path.write_bytes(b"[" + b",\n".join([answered(1), huge, answered(2)]) + b"]")
    rows = list(read_all(str(path)))
    assert [type(row) for row in rows] == [Row, BadRow, Row]
    assert str(rows[1]).startswith(f"{path}:2: Exceeds the limit")
    path.write_bytes(b"[" + b",\n".join([answered(1), b'{"text": "\xff"}']) + b"]")
    with pytest.raises(DataError, match=r"rows.json:2: the list cannot be read: not UTF-8 text"):
        list(read_all(str(path)))


def test_a_pipe_is_no_file_of_rows(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="found: no regular file"):
        sources(str(tmp_path / "rows.jsonl"))


def test_text_of_a_row_does_not_steer_the_terminal():
    tokenizer = load_tokenizer(Model(name=str(NANO)))
    text = "a\x1b]0;title\x07\tb\n c\x9b2J d\r"
    example = render(tokenizer, [turn("user", text), HELLO])
    shown = colour_text(tokenizer, example).plain
    assert "a\\x1b]0;title\\x07\tb\n c\\x9b2J d\\r" in shown


def in_child(action: Callable[[], Any]) -> Any:
    """What `action` returns, or the exception that it raises, in a forked process; -11 and the like
    if that was killed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        try:
            theirs.send(action())
        except Exception as error:  # noqa: BLE001  # sent to whoever asked
            theirs.send(error)

    child = context.Process(target=work)
    child.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        child.join()
        return child.exitcode
    child.join()
    return result


def test_a_table_whose_offsets_lie(tmp_path):
    table = pa.table({name: pa.array(["hello", "world"]) for name in ("user", "text")})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    offsets = struct.pack("<iii", 0, 5, 10)
    assert offsets in sink.getvalue()
    path = tmp_path / "rows.arrow"
    path.write_bytes(sink.getvalue().replace(offsets, struct.pack("<iii", 0, 5, 2**30)))
    error = in_child(lambda: list(read_all(str(path))))
    assert isinstance(error, DataError)
    assert f"{path}: the file is broken: " in str(error)


# --- files of a model ----------------------------------------------------------------------------


def header(content: Any, tensors: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with that header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + tensors


def placed(begin: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


ONE = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS = {
    "an empty file": b"",
    "half a length": b"\0\0\0",
    "a length of 2**63": header({}, length=2**63),
    "a length of 1 TiB": header({}, length=2**40),
    "a length beyond the file": header({}, length=90 * 2**20),
    "truncated": header({"a": placed(0, 64)}, bytes(32)),
    "longer than it says": header({"a": placed(0, 4)}, bytes(400)),
    "an offset out of range": header({"a": placed(0, 2**40)}, bytes(16)),
    "a negative shape": header({"a": placed(0, 4, [-1])}, bytes(4)),
    "a shape that overflows": header({"a": placed(0, 4, [2**62, 4])}, bytes(4)),
    "offsets backwards": header({"a": placed(4, 0, [1])}, bytes(4)),
    "tensors that overlap": header({"a": placed(0, 16), "b": placed(8, 24)}, bytes(24)),
    "a gap": header({"a": placed(0, 8), "b": placed(16, 24)}, bytes(24)),
    "a name given twice": header(b"{" + ONE + b"," + ONE + b"}", bytes(4)),
    "an unknown type": header({"a": {**placed(0, 4), "dtype": "X"}}, bytes(4)),
    "not JSON": header(b"{nope"),
    "a list": header([1]),
    "nested too deeply": header(b'{"a":' * 50_000),
    "not UTF-8": header(b"\xff" * 9),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.fixture
def frugal():
    """Fails a test that took much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024, "KiB"


@pytest.fixture(scope="module")
def adapted() -> torch.nn.Module:
    return adapt.add_adapters(tiny.llama(), Tuning(r=2))


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header(tmp_path, adapted, content):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(
        errors.ModelError, match=r"model\.safetensors cannot be loaded: it"
    ) as reported:
        load_base(Model(name=str(tmp_path)), "lora", "fp32", CPU)
    assert reported.value.exit_code == 2
    file.rename(tmp_path / export.ADAPTER)
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors cannot be lo"
    ) as reported:
        export.load_weights(adapted, tmp_path)
    assert reported.value.exit_code == 4


def changed(name: str, **values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(found | values))

    return change


def written(name: str, content: bytes | str) -> Callable[[Path], Any]:
    encoded = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(encoded)


def index(*names: str) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        weights = {f"w{n}": name for n, name in enumerate(names)}
        text = json.dumps({"metadata": {}, "weight_map": weights})
        (folder / "model.safetensors.index.json").write_text(text)

    return write


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def no_template(template: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        changed("tokenizer_config.json", chat_template=template)(folder)

    return change


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config empty": (written("config.json", ""), "config.json"),
    "config null": (written("config.json", "null"), "cannot load"),
    "config deep": (written("config.json", "[" * 100_000), "recursion"),
    "config of a list": (changed("config.json", model_type=["x"]), "cannot load"),
    "config of text": (changed("config.json", hidden_size="x"), "'hidden_size' expected int"),
    "config of another size": (changed("config.json", vocab_size=3), "mismatched"),
    "heads that do not divide": (changed("config.json", num_attention_heads=7), "multiple of"),
    "tokenizer a list": (written("tokenizer.json", "[]"), "cannot load"),
    "tokenizer deep": (written("tokenizer.json", "[" * 100_000), "recursion"),
    "tokenizer binary": (written("tokenizer.json", b"\xff\xfe"), "utf-8"),
    "tokenizer config a list": (written("tokenizer_config.json", "[]"), "cannot load"),
    "eos a number": (changed("tokenizer_config.json", eos_token=5), "eos_token"),
    "length of text": (changed("tokenizer_config.json", model_max_length="x"), "cannot load"),
    "generation config a list": (written("generation_config.json", "[]"), "cannot load"),
    "template a number": (no_template(5), "expected one chat template"),
    "templates without default": (
        no_template([{"name": "a", "template": "x"}]),
        "expected one chat template",
    ),
    "template binary": (written("chat_template.jinja", b"\xff\xfe"), "utf-8"),
    "template broken": (written("chat_template.jinja", "{% for"), "template cannot be read"),
    "template divides": (written("chat_template.jinja", "{{ 1 / 0 }}"), "division by zero"),
    "a tensor missing": (without_a_tensor, "lack 1 tensors, such as model.layers.2.mlp.up_proj"),
    "an index outside": (index("../../etc/passwd"), "names '../../etc/passwd', expected *.safet"),
    "an index to a pickle": (index("pytorch_model.bin"), "names 'pytorch_model.bin', expected *"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_model(folder, damage, reason):
    damage(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert reason in str(caught.value)
    assert caught.value.exit_code in (2, 3)


# --- pickles -------------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def payload(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


PICKLED = (
    *("pytorch_model.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth"),
    *("training_args.bin", "state.pkl", ".metadata", "adapter_model.bin", "mp_rank_00.pt"),
    *("scaler.pt", "tokenizer.pkl", "tokenizer.bin", "special_tokens.pkl", "rows.npy", "rows.npz"),
    *("model.ckpt", "model.msgpack", "tf_model.h5", "pytorch_lora_weights.bin", "dict.bin.index"),
)
SCRIPTED = ("dataset.py", "rows.py", "rows/rows.py", "setup.py", "modeling.py", "conftest.py")


def poison(folder: Path, marker: Path) -> None:
    """Adds pickles, arrays of objects, and Python files such as loading scripts of datasets."""
    for name in PICKLED:
        (folder / name).write_bytes(payload(marker))
    objects = np.array([Payload(marker)], dtype=object)
    np.save(folder / "objects.npy", objects, allow_pickle=True)
    np.savez(folder / "objects.npz", rows=objects)
    for name in SCRIPTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(marker)!r}, 'w')\n")


def sealed_again(folder: Path) -> None:
    """With a manifest of what is in it now, as whoever made it up would write."""
    copy = folder.rename(folder.with_name("made-up"))
    (copy / checkpoint.MANIFEST).unlink()
    checkpoint.seal(copy, folder)


def test_the_payload_works(marker):
    pickle.loads(payload(marker)).close()
    assert marker.exists()


def test_no_pickle_of_a_model_is_executed(folder, marker):
    poison(folder, marker)
    load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(errors.ModelError, match=r"model\.safetensors"):
        load(folder)
    assert not marker.exists()


def test_no_pickle_of_a_data_folder_is_executed(tmp_path, marker):
    rows = tmp_path / "rows"
    rows.mkdir()
    others = tmp_path / "others"
    others.mkdir()
    for folder in (rows, others):
        poison(folder, marker)
    for pattern in ("*.np[yz]", "*.h5"):  # with them the folder is refused: two kinds of tables
        for path in rows.glob(pattern):
            path.unlink()
    (rows / "rows.jsonl").write_bytes(answered(1))
    assert len(list(read_all(str(rows)))) == 1
    (rows / "rows.jsonl").write_bytes(payload(marker))
    with pytest.raises(DataError, match="found a pickle, which is never loaded"):
        list(read_all(str(rows)))
    for name in ("state.pkl", "objects.npy", "objects.npz", "dataset.py", "rows.npz"):
        with pytest.raises(DataError):
            list(read_all(str(others / name)))
    disguised = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": payload(marker),
    }
    field = pa.field("text", pa.string(), metadata=disguised)
    table = pa.table([pa.array(["a"])], schema=pa.schema([field]))
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert len(list(read_all(str(tmp_path / "a.arrow")))) == 1
    assert not marker.exists()


def test_no_pickle_of_a_run_is_executed(tmp_path, marker):
    made = finished(tmp_path / "run", "lora")
    final = made / "final_checkpoint"
    poison(final, marker)
    sealed_again(final)
    config = runs.load_run_config(made)
    runs.load_trained(made, config)
    (final / export.ADAPTER).unlink()
    sealed_again(final)
    with pytest.raises(UserError, match=r"expected a LoRA adapter \(adapter_config"):
        runs.load_trained(made, runs.load_run_config(made))
    assert not marker.exists()


def test_no_pickle_of_a_checkpoint_is_executed(tmp_path, marker):
    examples = tiny.examples(0, 8)
    settings = tiny.config(tmp_path / "run", max_steps=4, global_batch=4)
    budget = batches.Budget(100, "padded")

    def engine():
        return tiny.make_engine(tiny.llama(), examples, examples[:2], settings, budget)

    first = engine()
    first.optimizer_step()
    first.step = 1
    saved = first.save()
    poison(saved, marker)
    sealed_again(saved)
    second = engine()
    second.resume(run_folder.find(tmp_path / "run", "auto", pytest.fail))
    assert second.step == 1
    assert not marker.exists()


# --- custom code ---------------------------------------------------------------------------------


def with_code(folder: Path, marker: Path) -> None:
    """A model that only its own Python files know."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": "evil.C"}
    changed("config.json", model_type="evil", auto_map=classes)(folder)
    tokenizer = {"AutoTokenizer": ["evil.C", None]}
    changed("tokenizer_config.json", auto_map=tokenizer, tokenizer_class="C")(folder)


def given_answers() -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b"y\n" * 9)
    os.close(theirs)
    os.dup2(ours, 0)
    sys.stdin = os.fdopen(0)


def given_nothing() -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)


def given_no_stdin() -> None:
    os.close(0)
    sys.stdin = None  # type: ignore[assignment]


@pytest.mark.parametrize("stdin", [given_answers, given_nothing, given_no_stdin])
def test_custom_code_is_refused_unasked(folder, marker, stdin):
    with_code(folder, marker)
    config = Model(name=str(folder))
    loaders = {
        "config": lambda: architecture(config),
        "tokenizer": lambda: load_tokenizer(config),
        "model": lambda: load_base(config, "lora", "fp32", CPU),
    }

    def attempt() -> dict[str, str]:
        stdin()
        reported = {}
        for name, loader in loaders.items():
            try:
                loader()
            except errors.ModelError as error:
                reported[name] = str(error)
        left = None if sys.stdin is None else sys.stdin.read()
        return reported | {"unread": str(left)}

    started = time.monotonic()
    reported = in_child(attempt)
    assert time.monotonic() - started < 14, "it waited for an answer"
    assert set(reported) == {*loaders, "unread"}
    assert all("set model.trust_remote_code: true" in reported[name] for name in loaders)
    assert reported["unread"] == {given_answers: "y\n" * 9, given_nothing: ""}.get(stdin, "None")
    assert not marker.exists()


def test_a_run_folder_cannot_allow_its_own_code(tmp_path):
    made = finished(tmp_path, "lora")
    changed_text = (
        (made / "config.yaml")
        .read_text()
        .replace("trust_remote_code: false", "trust_remote_code: true")
    )
    (made / "config.yaml").write_text(changed_text)
    assert load_config(made / "config.yaml").model.trust_remote_code
    assert not runs.load_run_config(made).model.trust_remote_code
    assert runs.load_run_config(made, ["model.trust_remote_code=true"]).model.trust_remote_code


def test_an_adapter_cannot_name_modules_to_import(tmp_path, marker, monkeypatch):
    made = finished(tmp_path / "run", "lora")
    final = made / "final_checkpoint"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    megatron = {"hidden_size": 192, "tensor_model_parallel_size": 1}
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    changed("adapter_config.json", megatron_core="evil", auto_mapping=mapping)(final)
    sealed_again(final)
    runs.load_trained(made, runs.load_run_config(made))
    changed("adapter_config.json", megatron_core="evil", megatron_config=megatron)(final)
    sealed_again(final)
    with pytest.raises(ExportError, match="not supported: megatron_config"):
        runs.load_trained(made, runs.load_run_config(made))
    assert not marker.exists()


# --- chat templates ------------------------------------------------------------------------------

ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ (''|attr('__cl' ~ 'ass__'))|attr('__mro__') }}",
    "item": "{{ ''['__class__'] }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "globals of a helper": "{{ strftime_now.__globals__['os'].popen('touch MARKER').read() }}",
    "self": "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "context": "{{ self._TemplateReference__context.environment }}",
    "format": "{{ '{0.__class__.__mro__}'.format(0) }}",
    "format, stored": "{% set f = '{0.__class__.__mro__}'.format %}{{ f(0) }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 0}) }}",
    "map of attributes": "{{ [0] | map(attribute='__class__.__mro__') | list }}",
    "namespace": "{% set ns = namespace(__class__=1) %}{{ ns.__class__.__mro__ }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os.popen('touch MARKER') }}",
}
LOOPS = "{% for i in range(99999) %}" * 3 + "{% set x = i %}" + "{% endfor %}" * 3
ENDLESS = {
    "nested loops": LOOPS,
    "one long operation": "{% set x = 9**(9**9) %}",
    "loops where the data ask for them": "{% if messages[0].content == 'Hi' %}"
    + LOOPS
    + "{% endif %}",
    "loops in the inference prompt": "{% if add_generation_prompt %}" + LOOPS + "{% endif %}",
}
GREEDY = {
    "one long text": "{{ 'a' * 10**11 }}",
    "padding": "{{ 'a'.center(10**12) }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(33) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
}


def with_template(text: str) -> Any:
    tokenizer = load_tokenizer(Model(name=str(NANO)))
    tokenizer.chat_template = text + tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES)
def test_a_template_cannot_leave_its_sandbox(marker, escape):
    tokenizer = with_template(escape.replace("MARKER", str(marker)))
    try:
        text = rendering.render_text(tokenizer, TURNS)
    except DataError:
        text = ""
    text = text.partition("<|im_start|>")[0]
    assert not marker.exists()
    assert all(leak not in text for leak in ("<class", "root:", "object at"))


@pytest.mark.slow
@pytest.mark.parametrize("bomb", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_end(monkeypatch, bomb):
    monkeypatch.setattr(rendering, "SECONDS", 1)
    with pytest.raises(
        rendering.TemplateError, match=r"nano/model: the chat template took more"
    ) as reported:
        render(with_template(bomb), TURNS)
    assert reported.value.exit_code == 2


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize("bomb", GREEDY.values(), ids=GREEDY)
def test_a_template_that_fills_the_memory(bomb):
    with pytest.raises(rendering.TemplateError, match="cannot render two words in 1 GiB of memory"):
        rendering.render_text(with_template(bomb), TURNS)


CONSTANTS = {  # computed when the template is compiled, also behind a condition that never holds
    "'a' * 10**11": "cannot render two words in 1 GiB",
    "[0] * 10**11": "cannot render two words in 1 GiB",
    "'a' | center(10**12)": "cannot render two words in 1 GiB",
    "('a' * 10**6) | replace('a', 'b' * 10**6)": "cannot render two words in 1 GiB",
    "2**(10**5)": "data.chat_template: the chat template cannot be read",  # its digits
}


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize(("bomb", "reported"), CONSTANTS.items(), ids=CONSTANTS)
def test_a_constant_of_a_template_that_fills_the_memory(bomb, reported):
    tokenizer = load_tokenizer(Model(name=str(NANO)))
    template = "{% if false %}{{ BOMB }}{% endif %}".replace("BOMB", bomb) + tokenizer.chat_template
    for kept in (template, "{% set x = messages[0].nosuch or BOMB %}".replace("BOMB", bomb)):
        with pytest.raises(rendering.TemplateError, match=reported):
            prepare_tokenizer(tokenizer, kept)


@pytest.mark.slow
def test_an_endless_constant_of_a_template(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 1)
    with pytest.raises(rendering.TemplateError, match="the chat template took more than 1 s"):
        prepare_tokenizer(with_template("{% if false %}{{ 9**(9**9) }}{% endif %}"))


EXPLODING = {
    "one long text": "{{ 'a' * 2000000 }}",
    "a loop": "{% for i in range(2000) %}{% for j in range(1000) %}a{% endfor %}{% endfor %}",
    "a loop of the row": "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "in the prompt only": "{% if add_generation_prompt %}{{ 'a' * 2000000 }}{% endif %}",
}


@pytest.mark.parametrize("bomb", EXPLODING.values(), ids=EXPLODING)
def test_a_template_that_explodes_for_one_row_names_it(tmp_path, folder, bomb):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(answered(n) for n in range(8)))
    template = folder / "chat_template.jinja"
    condition = "{% if messages[0].content == 'say 5' %}" + bomb + "{% endif %}"
    template.write_text(condition + template.read_text())
    with pytest.raises(DataError, match="the chat template writes more than") as reported:
        cache.prepare(configured(path, folder=folder))
    assert f"{path}:6: " in str(reported.value)
    assert "1 bad row" in str(reported.value)


def test_a_long_row_is_no_explosion():
    turns = [{"role": "user", "content": "é" * 300_000}, {"role": "assistant", "content": "ok"}]
    written = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    tokenizer = load_tokenizer(Model(name=str(NANO)))
    tokenizer.chat_template = written
    assert len(rendering.render_text(tokenizer, turns)) > 300_000


def test_a_template_without_end_in_workers(tmp_path, folder, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(answered(n) for n in range(4 * workers.CHUNK_ROWS)))
    template = folder / "chat_template.jinja"
    bomb = "{% if messages[0].content == 'say 700' %}" + LOOPS + "{% endif %}"
    template.write_text(bomb + template.read_text())
    monkeypatch.setattr(workers.hardware, "usable_cores", lambda: 2)
    monkeypatch.setattr(rendering, "SECONDS", 1)
    with pytest.raises(rendering.TemplateError, match="the chat template took more than 1 s"):
        cache.prepare(configured(path, folder=folder))
    assert not list((tmp_path / "cache").glob("*.staging"))


# --- files that are far larger than they look ----------------------------------------------------

PEAK = """
import resource, sys
from sft.data import files
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    for row in files.read_all(sys.argv[1]):
        print("row", row.place if isinstance(row, files.Row) else str(row)[:300])
except files.DataError as error: print("error", error)
print("peak", (peak() - before) // 1024)
"""
LONG = 48 << 20


def dictionary_table(count: int) -> pa.Table:
    indices = pa.array([0] * count, pa.int32())
    texts = pa.DictionaryArray.from_arrays(indices, pa.array(["b" * LONG]))
    return pa.table({"prompt": ["hi"] * count, "completion": texts})


def gzipped(path, *parts: bytes) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for part in parts:
            file.write(part)


def arrow_file(path, content: pa.Table) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(path, content.schema, options=options) as file:
        file.write_table(content)


MIB = b" " * (1 << 20)
BOMBS = {
    "one line, gzip": ("x.jsonl.gz", lambda path: gzipped(path, b'{"x":"', *[MIB] * 700)),
    "a list of blanks, gzip": ("x.json.gz", lambda path: gzipped(path, b"[{}", *[MIB] * 700, b"]")),
    "one value of many rows, Parquet": (
        "x.parquet",
        lambda path: pq.write_table(dictionary_table(30), path, compression="zstd"),
    ),
    "one value of many rows, Arrow": (
        "x.arrow",
        lambda path: arrow_file(path, dictionary_table(30)),
    ),
    "one long value, Arrow": (
        "x.arrow",
        lambda path: arrow_file(
            path, pa.table({"prompt": ["hi"], "completion": ["c" * (300 << 20)]})
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb", representatives(BOMBS, ["one line, gzip", "one long value, Arrow"])
)
def test_a_small_file_of_much_content_takes_little_memory(tmp_path, bomb):
    name, write = BOMBS[bomb]
    path = tmp_path / name
    write(path)
    assert path.stat().st_size < 5 << 20
    done = run(sys.executable, "-c", PEAK, str(path))
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    assert int(last.split()[1]) < 1300, shown  # MiB; the contents are 300 to 1,440
    expected = "of more than 512 MiB once" if "list" in bomb else "longer than 64 MiB"
    assert (expected in done.stdout) == ("rows" not in bomb)


# --- secrets -------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_oneSecret1",
    "WANDB_API_KEY": "twoSecret22",
    "AWS_ACCESS_KEY_ID": "AKIAthreeSecret",
    "AWS_SECRET_ACCESS_KEY": "four/Secret+4",
    "AWS_SESSION_TOKEN": "fiveSecret==",
}
# Python imports `sitecustomize` before a program.
CRASHING = """
import os, torch
def refuse(*_, **__):
    raise RuntimeError("refused " + " ".join(os.environ[n] for n in {names}))
torch.optim.{where}
"""
WANDB = """
import sitecustomize
class Run:
    log = finish = lambda *_, **__: sitecustomize.refuse()
def init(**_): return Run()
class config:
    def update(*_, **__): pass
"""


@pytest.mark.parametrize("name", SECRETS)
def test_a_configuration_that_holds_a_secret(monkeypatch, name):
    secret = SECRETS[name]
    monkeypatch.setenv(name, secret)
    with pytest.raises(
        ConfigError, match=rf"model.name \(override\): holds the .*<{name}>"
    ) as reported:
        load_config(ROOT / "configs/nano.yaml", [f"model.name=https://me:{secret}@hub.example/m"])
    assert secret not in str(reported.value)


def test_the_log_of_a_run_gets_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    log = Log(tmp_path)
    log.say(f"cannot save: denied for {SECRETS['HF_TOKEN']}")
    log.close()
    assert (tmp_path / "training.log").read_text() == "cannot save: denied for <HF_TOKEN>\n"


@pytest.mark.slow
@pytest.mark.parametrize("where", representatives(["Optimizer.zero_grad = refuse", "AdamW"]))
def test_a_crash_reports_no_secret(tmp_path, run_script, where):
    """A step that fails ends the run; a tracker that fails costs a warning."""
    (tmp_path / "sitecustomize.py").write_text(CRASHING.format(names=list(SECRETS), where=where))
    (tmp_path / "wandb.py").write_text(WANDB)
    folder = tmp_path / "run"
    given = [f"train.output_dir={folder}", f"data.cache_dir={tmp_path}/cache", "data.max_rows=64"]
    given += ["tuning.mode=lora", "train.max_steps=1", "evaluation.num_examples=0"]
    given += ["train.trackers=[wandb]"]
    done = run_script("train.py", *given, PYTHONPATH=str(tmp_path), **SECRETS)
    assert "refused <HF_TOKEN> <WANDB_API_KEY>" in done.stdout + done.stderr, done.stderr
    if "refuse" in where:
        assert done.returncode == 1
        assert "refused <HF_TOKEN>" in (folder / "status.json").read_text()
    else:
        assert done.returncode == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    texts = {path.name: path.read_bytes().decode("latin1") for path in files}
    for place, text in {"stdout": done.stdout, "stderr": done.stderr, **texts}.items():
        assert not [secret for secret in SECRETS.values() if secret in text], (place, text)


# --- names and modes of files --------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_of_a_checkpoint_have_the_mode_that_the_user_wants(tmp_path, umask):
    before = os.umask(umask)
    try:
        staging = tmp_path / "staging"
        staging.mkdir()
        save_file({"a": torch.zeros(1)}, staging / "model.safetensors")  # made private
        (staging / "other.json").write_text("{}")
        checkpoint.seal(staging, tmp_path / "final")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "final").iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_report_outside_of_a_run_is_a_new_private_file(tmp_path, monkeypatch, capsys):
    """A known name in a folder that everybody writes to could be a link to a file of the user."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    launcher._save("one", None)
    launcher._save("two", None)
    files = sorted(tmp_path.iterdir())
    assert sorted(path.read_text() for path in files) == ["one", "two"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    reported = capsys.readouterr().err
    assert all(str(path) in reported for path in files)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to another user")
def test_another_user_cannot_silence_the_error_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sft.runtime.slurm.step_id", lambda: "7")
    mark = tmp_path / "sft_reported_7"
    mark.touch()
    assert not cli._is_first()  # one of this run has reported
    os.chown(mark, 12345, 12345)
    assert cli._is_first()


def test_a_model_card_holds_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    data = {"data.train_path": "s3://AKIAsecret:password@bucket/x.jsonl"}
    config = with_values(load_config(ROOT / "configs/nano.yaml"), data)
    text = card.model_card(config, {"data": SECRETS["HF_TOKEN"]}, None, Results({}), "")
    assert "s3://<hidden>@bucket/x.jsonl" in text.replace("&lt;", "<")
    for secret in ("AKIAsecret", "password", SECRETS["HF_TOKEN"]):
        assert secret not in text


def test_a_report_obeys_no_html(tmp_path, folder):
    """The table of findings, the rows, the names of files, columns and kinds of audit.html."""
    mark = "<img src=x onerror=alert(1)>"
    rows = [
        {"messages": [{"role": r, "content": f"{mark}{i}"} for r in ("user", "assistant")], mark: 1}
        for i in range(8)
    ]
    path = tmp_path / f"{mark.replace('/', '')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_values(configured(path, folder=folder), {"data.audit": "warn"})
    prepared = cache.prepare(config)
    cache.write_audit(prepared, tmp_path)
    text = (tmp_path / "audit.html").read_text()
    assert mark not in text
    assert "&lt;img" in text
