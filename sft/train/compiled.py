"""Compiles the repeated layers of a model for its training passes (`train.compile`).

Only the `forward` of a layer is compiled, so that hooks (FSDP2's) and the names of weights stay as
they are, and layers of one kind share their graphs. All graphs are made from the micro-batches of
the run's first step, with dynamic lengths and before a checkpoint is read: a resumed run makes the
same ones. Nothing is compiled later. What no graph fits runs eagerly: answers, evaluations, and
micro-batches of one row if the first step had only others (a graph is either for one row or for
several).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from sft.config.schema import Train
from sft.errors import ConfigError, UserError
from sft.models.fake import set_attributes
from sft.models.layers import repeated_layers
from sft.runtime import hardware
from sft.train.engine import Engine
from sft.train.optimizer import compiles_on_gpus

MOST_GRAPHS = 8  # of one function: one row or several, the first layer or others, two kinds of them


def refuse_missing_compiler(train: Train) -> None:
    """Raises ConfigError if a key of `train` compiles code, and this machine has no compiler."""
    layers, update = train.compile is True, compiles_on_gpus(train)
    if not (layers or update):
        return
    devices = hardware.detect().devices
    if not (missing := hardware.missing_compiler(devices)):
        return
    if layers:
        raise ConfigError(f"train.compile: true, but {missing}; or set train.compile: false")
    if devices:
        raise ConfigError(
            f"train.optimizer: {train.optimizer} compiles its update, but {missing}; or use "
            "adamw_8bit"
        )


@contextmanager
def compiled(engine: Engine, required: bool, backend: Any = "inductor") -> Iterator[dict[str, Any]]:
    """Trains with compiled layers within this context, if `train.compile` says so. Collective.

    Yields the values to record of it. If compiling fails, layers run eagerly, or if it is
    `required` (not `auto`), raises ConfigError.
    """
    if engine.train.compile is not True:  # `auto` that no plan has decided is off, too
        yield {}
        return
    import torch._dynamo  # takes seconds

    layers, events = repeated_layers(engine.task.model), list[Any]()

    def record(event: Any) -> None:
        events.append(event)
        engine.guard.tick()

    torch._dynamo.reset()  # graphs of another run in this process
    torch._dynamo.callback.callback_handler.register_start_callback(record)
    try:
        with engine.guard.section("compile"):
            values = _make_graphs(engine, layers, required, backend)
        before = len(events)
        for layer in layers:
            if "forward" in vars(layer):  # from now on only graphs that exist
                layer.forward = torch._dynamo.run(layer.forward)
        yield values
        values["recompilations"] = len(events) - before
    finally:
        _restore(layers)


def _make_graphs(
    engine: Engine, layers: list[nn.Module], required: bool, backend: Any
) -> dict[str, Any]:
    """Compiles the layers and reports it; returns the values to record. Collective."""
    engine.log.say("train.compile: compiling the layers, which takes about a minute")
    started, counters = time.perf_counter(), torch._dynamo.utils.counters
    counters.clear()
    reason = _compile(engine, layers, backend)
    engine.guard.stop_if_asked()  # Ctrl-C ends the compiler, too
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    if breaks and not required and not reason:
        reason = f"their code breaks into {graphs} graphs, for which no gain has been measured"
    if reason := next(filter(None, gather_object([reason])), None):
        if required:
            raise ConfigError(
                f"train.compile: the layers of this model cannot be compiled here: {reason}; set "
                "train.compile: false"
            )
        _restore(layers)
        engine.log.say(f"train.compile: the layers run eagerly: {reason}")
        engine.train = engine.train.model_copy(update={"compile": False})
        return {"compile_problem": reason}
    seconds, kinds = time.perf_counter() - started, len({type(layer) for layer in layers})
    engine.log.say(
        f"compiled {graphs} graph(s) of {kinds} kind(s) of layer in {seconds:.0f} s, with {breaks} "
        "graph breaks; what they do not fit runs eagerly"
    )
    return {"compiled_graphs": graphs, "graph_breaks": breaks, "compile_seconds": seconds}


def _compile(engine: Engine, layers: list[nn.Module], backend: Any) -> str | None:
    """Compiles layers, if need be into a cache of their own; returns why it failed, or None."""
    if not layers:
        return "the model has no list of repeated layers"
    if engine.train.engine == "deepspeed" and engine.parallel.is_split:
        return "ZeRO-3 gathers weights within a layer, one by one; use ZeRO-2, or fsdp"
    try:
        try:
            _run_compiler(engine, layers, backend)
        except Exception as error:
            if not _is_of_files(error):
                raise
            engine.guard.stop_if_asked()  # Ctrl-C ends the compiler, too
            _restore(layers)
            with _own_cache():
                _run_compiler(engine, layers, backend)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # of the compiler, whatever it is
        text = " ".join(str(error).split()).split(" Set TORCHDYNAMO_VERBOSE")[0]
        return f"{type(error).__name__}: {text[:300]}"
    return None


def _run_compiler(engine: Engine, layers: list[nn.Module], backend: Any) -> None:
    """Compiles layers in the micro-batches of the first step."""
    with _settings():
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)
        engine.try_out(engine.window(0)[1])


def _is_of_files(error: Exception) -> bool:
    """Returns whether the compiler failed at its files or at its C++, not at the code of a layer.

    The folder of its cache may not be writable. Or a compiler that was killed has left half a file
    there, which nothing would ever replace.
    """
    from torch._inductor.exc import CppCompileError

    return isinstance(getattr(error, "inner_exception", error), OSError | CppCompileError)


@contextmanager
def _own_cache() -> Iterator[None]:
    """Compiles into a temporary folder in place of the cache that all programs of a user share."""
    from torch._inductor import codecache
    from torch._inductor.utils import fresh_cache

    with (
        tempfile.TemporaryDirectory(prefix="sft-compile-") as folder,
        fresh_cache(dir=folder),
        set_attributes(
            codecache, _HEADER_DIR=f"{folder}/headers", _HEADER_LOCK_DIR=f"{folder}/locks"
        ),
    ):
        codecache._precompile_header.cache_clear()
        try:
            yield
        finally:
            codecache._precompile_header.cache_clear()


def _restore(layers: list[nn.Module]) -> None:
    """Makes layers run eagerly, and frees their graphs."""
    for layer in layers:
        vars(layer).pop("forward", None)
    torch._dynamo.reset()


@contextmanager
def _settings() -> Iterator[None]:
    """Sets up the compiler so that its code is a function of layers and shapes."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config
    import torch.fx.experimental._config

    of_shapes: Any = torch.fx.experimental._config
    patches = (
        torch._dynamo.config.patch(
            recompile_limit=MOST_GRAPHS,
            fail_on_recompile_limit_hit=True,
            optimize_ddp=False,  # it would cut layers at the borders of DDP's buckets
        ),
        torch._functorch.config.patch(
            enable_autograd_cache=False,
            force_non_lazy_backward_lowering=True,  # in this thread, which has these settings
        ),
        torch._inductor.config.patch(
            compile_threads=1,  # no further processes, which could outlive this one
            deterministic=True,  # nothing is chosen by its speed
            fallback_random=True,  # dropout draws the same numbers as without compiling
            fx_graph_cache=False,  # it holds code that was made for other lengths
        ),
        # A length that happens to equal another, or a size of the model, stays a length.
        of_shapes.patch(use_duck_shape=False),
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
