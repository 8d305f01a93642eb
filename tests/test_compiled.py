"""`train.compile`: the same result as without, a known number of graphs, and how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
import test_distill
import tiny
import torch
from conftest import representatives
from safetensors.torch import load_file
from torch._inductor import codecache
from torch._inductor.runtime.cache_dir_utils import cache_dir

from sft.config.load import with_values
from sft.data import batches
from sft.errors import ConfigError
from sft.models import checkpointing, offload
from sft.models.layers import repeated_layers
from sft.models.quantise import quantise
from sft.runtime import hardware
from sft.train.compiled import compiled, refuse_missing_compiler
from sft.train.engine import Engine

pytestmark = pytest.mark.slow
FULL: dict[str, Any] = {}
SMALL = {"tuning.target_modules": ["q_proj"]}  # a graph takes as long as it has operations
LORA = {"tuning.mode": "lora", "tuning.r": 4, "tuning.lora_dropout": 0.3}
QLORA = {"tuning.mode": "qlora", "tuning.r": 4}
CROWD = {"tuning.mode": "lora", "tuning.r": 4, "crowd.num_agents": 2, "crowd.dropconnect": 0.2}
CHECKPOINTED = {"train.gradient_checkpointing": True}
SELECTIVE = {"train.gradient_checkpointing": "selective"}
OFFLOADED = {"train.activation_offload": True}
BF16 = {"train.precision": "bf16"}


class Counted:
    """A backend that runs graphs as they are, and counts them and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        self.graphs += 1

        def run(*given: Any) -> Any:
            self.calls += 1
            return module(*given)

        return run


def make(folder: Path, changes: dict[str, Any], layout: Any = "padded", **size: Any) -> Engine:
    settings = tiny.config(folder, global_batch=12, compile=True)
    settings = with_values(settings, changes)
    model = tiny.llama(**size)
    if settings.tuning.mode == "qlora":
        quantise(model, torch.float32, "nf4")
    if settings.tuning.mode != "full":
        model = tiny.adapted(settings, base=model)
    if settings.train.gradient_checkpointing != "auto":
        checkpointing.enable(model, settings.train.gradient_checkpointing)
    if settings.train.activation_offload is True:
        offload.install(model)
    budget = batches.Budget(70, layout)
    return tiny.make_engine(model, tiny.examples(3, 24), tiny.examples(4, 4), settings, budget)


def step(engine: Engine, number: int = 1) -> list[torch.Tensor]:
    """The loss and the gradients of a step, whose cut differs from that of the first."""
    engine.step = number
    values = engine.optimizer_step()
    gradients = [p.grad.clone() for p in engine.parallel.trained.values()]
    return [torch.tensor(values["train/loss"]), *gradients]


# What a graph records depends on the case. How it is split into passes (`aot_eager`, seven times as
# slow) is tried where that matters most: dropout, and a forward pass in the backward pass.
CASES = {
    "full": (FULL, "padded", "eager"),
    "bf16": (BF16, "padded", "eager"),
    "lora": (LORA | SMALL | CHECKPOINTED, "packed", "aot_eager"),
    "qlora": (QLORA | SMALL, "padded", "eager"),
    "crowd": (CROWD | SMALL, "packed", "eager"),
    "selective": (SELECTIVE, "padded", "eager"),
    "offload": (OFFLOADED, "padded", "eager"),
}


@pytest.mark.parametrize("name", representatives(CASES, ["full", "qlora"]))
def test_compiled_layers_compute_what_layers_compute(tmp_path, name, monkeypatch):
    """By a backend that runs the operations of PyTorch: to the bit."""
    monkeypatch.setattr(offload, "MIN_BYTES", 0)
    changes, layout, backend = CASES[name]
    expected = step(make(tmp_path, changes, layout))
    engine = make(tmp_path, changes, layout)
    with compiled(engine, required=True, backend=backend) as values:
        found = step(engine)
    assert values["compiled_graphs"] in (1, 2, 3)
    assert (values["graph_breaks"], values["recompilations"]) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", representatives(["full", "lora"]))
def test_the_compilers_own_code_gives_the_same_within_rounding_and_leaves_no_process(
    tmp_path, name
):
    changes, layout, _ = CASES[name]
    expected = step(make(tmp_path, changes, layout))
    engine = make(tmp_path, changes, layout)
    before = set(psutil.Process().children(recursive=True))  # those of other tests
    with compiled(engine, required=True) as values:
        found = step(engine)
        assert set(psutil.Process().children(recursive=True)) <= before
    assert values["graph_breaks"] == values["recompilations"] == 0
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert 0 < tiny.relative_error(found[1:], expected[1:]) < 1e-4


def test_all_lengths_share_the_graphs_of_the_first_step(tmp_path):
    """Also lengths and numbers of rows that equal each other, or a size of the model, in it."""
    engine, backend = make(tmp_path, FULL, hidden_size=16, head_dim=4), Counted()
    engine.task.prepared.train.arrays.index["length"][:] = 8  # = intermediate / 6, rows, 2 x head
    engine.task.budget = batches.Budget(64, "padded")
    with compiled(engine, required=True, backend=backend) as values:
        used = backend.calls
        for rows, length in ((8, 8), (4, 8), (16, 16), (3, 5), (5, 48), (32, 32)):
            batch = torch.ones(rows, length, dtype=torch.long)
            engine.model(input_ids=batch, use_cache=False).logits.sum().backward()
            used += 2  # layers
            assert backend.calls == used, (rows, length)
    assert backend.graphs == values["compiled_graphs"] == 1


def test_what_no_graph_fits_runs_eagerly(tmp_path):
    engine, backend = make(tmp_path, FULL), Counted()
    layers = repeated_layers(engine.task.model)
    with compiled(engine, required=True, backend=backend) as values:
        seen = backend.calls, backend.graphs
        engine.model(input_ids=torch.ones(1, 9, dtype=torch.long), use_cache=False)  # one row
        engine.evaluate()
        engine.model.train()
        assert (backend.calls, backend.graphs) == seen
        step(engine)
        assert backend.calls > seen[0]
        names = [name for name, _ in engine.task.model.named_parameters()]
    assert values["recompilations"] == 0
    assert backend.graphs == seen[1]
    assert names == [name for name, _ in tiny.llama().named_parameters()]
    assert not any("forward" in vars(layer) for layer in layers)


def fails(*_: Any) -> Any:
    raise RuntimeError("no compiler\nhere")


def breaks(layer: Any) -> Iterator[None]:
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(x) * float(x.detach().sum() > -1e30)


@pytest.mark.parametrize(
    "why", representatives(["no compiler here", "breaks into", "no list of repeated layers"])
)
def test_auto_runs_eagerly_where_layers_cannot_be_compiled(tmp_path, why, monkeypatch):
    expected = step(make(tmp_path, FULL))
    engine, backend = make(tmp_path, FULL), Counted()
    engine.log = tiny.Said()
    if why == "breaks into":
        for layer in repeated_layers(engine.task.model):
            breaks(layer)
    if why == "no list of repeated layers":
        monkeypatch.setattr("sft.train.compiled.repeated_layers", lambda _: [])
    given = fails if why == "no compiler here" else backend
    with compiled(engine, required=False, backend=given) as values:
        used = backend.calls
        found = step(engine)
    assert why in values["compile_problem"]
    assert why in engine.log.lines[-1]
    assert not engine.train.compile
    assert backend.calls == used
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_true_ends_where_layers_cannot_be_compiled(tmp_path):
    engine = make(tmp_path, FULL)
    with pytest.raises(ConfigError, match=r"train\.compile: .*no compiler here; set"):  # noqa: SIM117
        with compiled(engine, required=True, backend=fails):
            pass
    assert not any("forward" in vars(layer) for layer in repeated_layers(engine.task.model))


@pytest.mark.parametrize(
    "problem", representatives([OSError("file too short"), PermissionError("read-only")])
)
def test_a_cache_that_cannot_be_used_is_left_alone(tmp_path, problem, monkeypatch):
    """A compiler that was killed leaves half a file there, which nothing would replace."""
    engine, backend, used = make(tmp_path, FULL), Counted(), []

    def fails_in_the_shared_cache(*given: Any) -> Any:
        used.append((cache_dir(), codecache._HEADER_DIR))
        if len(used) == 1:
            raise problem
        return backend(*given)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "shared"))
    with compiled(engine, required=True, backend=fails_in_the_shared_cache) as values:
        step(engine)
    assert values["compiled_graphs"] == backend.graphs == 1
    assert used[0] == (str(tmp_path / "shared"), codecache._HEADER_DIR)
    own = Path(used[1][0]).parent
    assert own.name.startswith("sft-compile-")
    assert used[1][1] == str(own / "headers")
    assert not own.exists()
    assert cache_dir() == str(tmp_path / "shared")


def test_a_missing_compiler_is_reported_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    asked = tiny.config(tmp_path, compile=True).train
    with pytest.raises(ConfigError, match=r"train.compile: true, but there is no C\+\+ compiler"):
        refuse_missing_compiler(asked)
    refuse_missing_compiler(tiny.config(tmp_path, optimizer="torchao_adamw_4bit").train)  # on a CPU
    gpu = hardware.Device(0, "a GPU", 1, 1, True, (9, 0))
    monkeypatch.setattr(hardware, "_devices", lambda: [gpu])
    for name in ("torchao_adamw_8bit", "torchao_adamw_4bit"):
        with pytest.raises(ConfigError, match=f"{name} .* no C compiler .looked for gcc and clang"):
            refuse_missing_compiler(tiny.config(tmp_path, optimizer=name).train)
    refuse_missing_compiler(tiny.config(tmp_path).train)
    monkeypatch.setenv("CC", sys.executable)  # a program that exists
    refuse_missing_compiler(asked)


@pytest.mark.thorough("other reasons to refuse layers here")
def test_layers_that_need_ever_more_graphs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.train.compiled.MOST_GRAPHS", 2)
    engine = make(tmp_path, FULL, num_hidden_layers=4)
    for number, layer in enumerate(repeated_layers(engine.task.model)):
        layer.number = number
        layer.mlp.forward = _numbered(layer.mlp)
        layer.mlp.number = number
    with (
        pytest.raises(ConfigError, match="RecompileLimit"),
        compiled(engine, required=True, backend=Counted()),
    ):
        pass


def _numbered(mlp: Any) -> Any:
    forward = type(mlp).forward
    return lambda x: forward(mlp, x) * (1 + mlp.number)


@pytest.mark.thorough("parts: one step of the compiler's code here, resuming in test_parallel.py")
def test_a_resumed_run_makes_the_same_graphs_and_ends_with_the_same_bits(tmp_path, run_script):
    model = tiny.shallow_nano(tmp_path)
    common = [f"model.name={model}", "tuning.mode=full", "data.max_rows=40", "train.compile=true"]
    common += ["train.global_batch=8", "train.max_steps=4", "train.save_steps=2"]
    common += [
        "evaluation.num_examples=2",
        "evaluation.max_new_tokens=4",
        "train.tensorboard=false",
    ]

    def run(name: str, *more: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        folder = tmp_path / name
        done = run_script("train.py", *common, f"train.output_dir={folder}", *more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "kind(s) of layer" in done.stdout
        measured = json.loads((folder / "plan.json").read_text())["measured"]
        return measured, load_file(folder / "final_checkpoint/model.safetensors")

    whole, weights = run("whole")
    saved = tmp_path / "whole/checkpoint_step_2"
    resumed, again = run("resumed", f"train.resume_from_checkpoint={saved}")
    for measured in (whole, resumed):
        assert measured["compiled_graphs"] in (1, 2)
        assert measured["graph_breaks"] == measured["recompilations"] == 0
    assert weights.keys() == again.keys() == load_file(model / "model.safetensors").keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    lines = (tmp_path / "resumed/training.log").read_text()
    assert "changed since" not in lines


# An engine, the backend, and why it refuses. FSDP2 frees the weights that a pass in the backward
# graph reads (`aot_eager` makes one); the others leave them where they are.
ENGINES = {
    "ddp": ("eager", None),
    "fsdp": ("aot_eager", None),
    "zero2": ("eager", None),
    "zero3": ("eager", "ZeRO-3 gathers weights within a layer"),
}


@pytest.mark.parametrize("name", representatives(ENGINES, ["ddp"]))
def test_two_processes_compute_the_same_compiled_or_refuse(tmp_path, name):
    model, (backend, why) = tiny.shallow_nano(tmp_path), ENGINES[name]
    engine = {"zero2": "deepspeed_z2", "zero3": "deepspeed_z3"}.get(name)
    own = [f"train.engine={'deepspeed' if engine else name}"]
    own += [f"train.deepspeed_config=configs/{engine}.json"] if engine else []
    common = [f"model.name={model}", "tuning.mode=lora", "data.max_rows=24", "train.precision=fp32"]
    common += ["train.global_batch=8", "train.max_steps=2", "train.learning_rate=1e-3"]
    common += ["tuning.target_modules=[q_proj]"]
    sizes = {"max_tokens": 200, "steps": 2, "save_at": [], "prove": False, "resume": ""}
    sizes |= {"evaluate": False, "backend": backend}
    cases = [
        {"name": f"{each}", "overrides": [*common, *own, f"train.compile={each}"]} | sizes
        for each in ("false", "true")
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    log = tmp_path / "log.txt"
    command = ["tests/support/parallel_worker.py", str(tmp_path / "cases.json"), str(tmp_path)]
    started = forked.start(2, command, log)
    started.join()
    if why:
        assert why in log.read_text()
        return
    eager, compiled_ = (load_file(tmp_path / f"{each}.weights") for each in ("false", "true"))
    assert all(torch.equal(eager[key], compiled_[key]) for key in eager)
    for rank in range(2):
        found = json.loads((tmp_path / f"true.rank{rank}.json").read_text())
        assert found["compiler"]["compiled_graphs"] in (2, 3, 4)
        assert found["compiler"]["graph_breaks"] == found["compiler"]["recompilations"] == 0


def test_the_model_of_histories_compiles_too(tmp_path):
    engines = []
    for compiles in (False, True):
        asked = test_distill.config(tmp_path, compile=compiles)
        engines.append(test_distill.make_engine(asked, 100, torch.float64))
    backend = Counted()
    with compiled(engines[1], required=True, backend=backend) as values:
        made = backend.calls
        eager, found = (step(engine) for engine in engines)
    assert backend.calls > made
    assert (values["graph_breaks"], values["recompilations"]) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))
