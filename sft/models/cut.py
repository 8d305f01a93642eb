"""Builds a model of which each rank keeps only its own elements, so that none ever holds it whole.

A weight that has a value is cut at once: its parameter moves to the meta device, and this rank's
elements of it are kept beside it. All that follows (adapters, casts, initialisation) runs as it is.
What it does to a weight on the meta device is done to the kept elements, as far as an operation
works by element. Any other operation gives, as always on that device, a tensor without values. So
nothing can be wrong unnoticed: a parameter that ends without values is refused (`CannotCut`), and
the run reads the whole model on every rank instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, core_model_loading, initialization, modeling_utils

from sft.errors import ModelError
from sft.models.fake import set_attributes
from sft.models.layers import embedding_layers, repeated_layers

aten = torch.ops.aten
META = torch.device("meta")
Rule = Callable[[torch.Size], tuple[int, int]]
"""Returns from a weight's shape the first of this rank's elements in the flat whole, and the end
of them."""

READ = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
GARBAGE_BYTES = 2**24  # of new pieces, after which those of tensors that are gone are dropped


class CannotCut(ModelError):
    """Raised if a model cannot be built from parts; its message says why."""


@dataclass
class Piece:
    """This rank's elements of a tensor on the meta device."""

    values: torch.Tensor  # flat
    start: int  # the first of them in the flat whole
    storage: StorageWeakRef  # of that tensor; while it exists, no other storage has its address


class Cutting(TorchDispatchMode):
    """Cuts weights while a model is built within this context.

    `keep_ends`: leave embeddings and head whole, since single rows of them will be read.
    """

    keeps_values = True
    """Weights on the meta device have values (`models/fake`)."""

    def __init__(self, rule: Rule, device: torch.device, keep_ends: bool = False):
        super().__init__()
        self.rule, self.device, self.keep_ends = rule, device, keep_ends
        self._pieces: dict[int, Piece] = {}  # by the address of the storage
        self._new_bytes = 0
        self._stack = ExitStack()

    def __enter__(self) -> Cutting:
        known: Any = initialization.TORCH_INIT_FUNCTIONS  # those that transformers calls
        known = {name: self._refuse(draw) for name, draw in known.items()}
        drawn = {
            name: self._refuse(draw)
            for name, draw in vars(nn.init).items()
            if name.endswith("_") and not name.endswith("__")
        }
        self._stack.enter_context(set_attributes(initialization, TORCH_INIT_FUNCTIONS=known))
        self._stack.enter_context(set_attributes(nn.init, **drawn))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _refuse(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function of `nn.init`, some of which would leave a cut weight as it is."""

        def draw_whole(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if self._piece(tensor):
                raise CannotCut("a weight is drawn after it was cut")
            return draw(tensor, *arguments, **options)

        return draw_whole

    # -- what is cut

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Cuts each weight that transformers reads from files, before it reads the next one.

        Tied weights stay whole until transformers has compared them.
        """
        put = core_model_loading.set_param_for_module

        def put_and_cut(model: Any, name: str, *arguments: Any) -> None:
            put(model, name, *arguments)
            tied = model.all_tied_weights_keys
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            if name not in {*tied, *tied.values()} and module not in self._kept(model):
                self._cut_parameters(module, {own}, {})

        before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads would read ahead without a limit
        unreserved = {"caching_allocator_warmup": lambda *_, **__: None}  # of room for all weights
        try:
            with (
                set_attributes(core_model_loading, set_param_for_module=put_and_cut),
                set_attributes(modeling_utils, **unreserved),
            ):
                yield
        finally:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
            if before is not None:
                os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Cuts each module that a constructor makes, once it is complete.

        While transformers initialises a module, its weights are whole. Elements of other ranks are
        then NaN, so that no value can be computed from them unnoticed.
        """
        initialise = PreTrainedModel._initialize_weights

        def initialise_whole(model: Any, module: nn.Module, *arguments: Any) -> None:
            with self._whole(model, module):
                initialise(model, module, *arguments)

        others = {"_initialize_weights": initialise_whole}
        hook = register_module_module_registration_hook(lambda _, __, module: self.cut_rest(module))
        try:
            with set_attributes(PreTrainedModel, **others):
                yield
        finally:
            hook.remove()

    @contextmanager
    def _whole(self, model: nn.Module, module: nn.Module) -> Iterator[None]:
        """Makes the weights of a module whole, and cuts them again.

        Those of all modules within it only if they are not larger than a layer.
        """
        most = max((_size(layer) for layer in repeated_layers(model)), default=0)
        modules = [*module.modules()] if _size(module) <= most else [module]
        cut: dict[nn.Parameter, nn.Parameter] = {}
        places = [(m, name, p) for m in modules for name, p in m._parameters.items()]
        for owner, name, parameter in places:
            if parameter is not None and (piece := self._piece(parameter)):
                if parameter not in cut:
                    cut[parameter] = _fill(parameter, piece)
                owner._parameters[name] = cut[parameter]
        yield
        for parameter, whole in cut.items():
            vars(parameter).update(vars(whole))  # such as that it is initialised
            self._cut(parameter, whole)
            if not self._pieces[_key(parameter)].values.isfinite().all():
                raise CannotCut("a weight is drawn from the values of others")
        for owner, name, parameter in places:
            if parameter in cut:
                owner._parameters[name] = parameter

    def cut_rest(self, model: nn.Module) -> None:
        """Cuts the weights that are still whole."""
        done: dict[nn.Parameter, nn.Parameter] = {}  # tied ones have several places
        kept = {p for module in self._kept(model) for p in module.parameters()}
        for module in model.modules():
            own = {name for name, p in module._parameters.items() if p not in kept}
            self._cut_parameters(module, own, done)

    def _kept(self, model: nn.Module) -> list[nn.Module]:
        return [each for each in embedding_layers(model) if each] if self.keep_ends else []

    def _cut_parameters(
        self, module: nn.Module, names: set[str], done: dict[nn.Parameter, nn.Parameter]
    ) -> None:
        for name in names:
            parameter = module._parameters.get(name)
            if parameter is not None and not parameter.is_meta:
                if parameter not in done:
                    cut = nn.Parameter(parameter.detach().to(META), parameter.requires_grad)
                    vars(cut).update(vars(parameter))  # such as how it is quantised
                    done[parameter] = cut
                module._parameters[name] = done[parameter]

    def finish(self, model: nn.Module) -> nn.Module:
        """Returns the model, whose parameters have their pieces. Raises CannotCut without one."""
        for name, buffer in model.named_buffers():
            if buffer.is_meta:
                raise CannotCut(f"{name} is computed from whole weights")
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                piece = self._pieces.get(_key(parameter))
                if not (piece and self._is_piece_of(piece, parameter)):
                    raise CannotCut(f"{name} is computed from whole weights")
                parameter.piece = piece.values  # type: ignore[attr-defined]
        return model

    def _is_piece_of(self, piece: Piece, parameter: nn.Parameter) -> bool:
        """Returns whether these are this rank's elements, also if it is a view of another shape."""
        own = piece.start, piece.start + len(piece.values)
        is_own = own == self.rule(parameter.shape) and piece.values.dtype == parameter.dtype
        return is_own and _is_whole(parameter)

    # -- what happens to cut weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if any(isinstance(each, FakeTensor) for each in tensors):
            return func(*args, **kwargs)  # of a trace, which knows no pieces
        if func is aten._to_copy.default:
            return self._move(tensors[0], func, args, kwargs)
        if (func in READ or func.namespace != "aten") and any(map(self._piece, tensors)):
            raise CannotCut(f"{func} reads a whole weight")
        for target in _written(func, args, kwargs):
            if target.is_meta:
                self._pieces.pop(_key(target), None)
        if func is aten.copy_.default and args[0].is_meta and args[0].shape == args[1].shape:
            self._copy(args[1], args[0])
        result = func(*args, **kwargs)
        return self._copy(args[0], result) if func is aten.clone.default else result

    def _move(self, source: torch.Tensor, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """Returns a tensor in another dtype, or on another device. A cut one stays where it is."""
        target = kwargs.get("device")
        moves = target is not None and target.type != "meta"
        if self._piece(source):
            return self._copy(source, func(*args, **kwargs | {"device": META}))
        if source.is_meta and moves:
            raise CannotCut("a weight is computed from whole ones")
        return self._copy(source, func(*args, **kwargs))

    def _piece(self, tensor: torch.Tensor) -> Piece | None:
        return self._pieces.get(_key(tensor)) if tensor.is_meta else None

    def _copy(self, source: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        """Returns the copy. If it is on the meta device, it gets a piece if the source has one."""
        if not copy.is_meta or not _is_whole(copy):
            return copy
        if not source.is_meta:
            self._cut(copy, source)
        elif (piece := self._piece(source)) and _is_whole(source):
            self._keep(copy, piece.values.to(copy.dtype, copy=True), piece.start)
        return copy

    def _cut(self, tensor: torch.Tensor, whole: torch.Tensor) -> None:
        """Makes this rank's elements of `whole` the piece of `tensor`."""
        start, stop = self.rule(whole.shape)
        values = whole.detach().contiguous().flatten()[start:stop]
        self._keep(tensor, values.to(self.device, tensor.dtype, copy=True), start)

    def _keep(self, tensor: torch.Tensor, values: torch.Tensor, start: int) -> None:
        storage = tensor.untyped_storage()
        self._pieces[storage._cdata] = Piece(values, start, StorageWeakRef(storage))
        self._new_bytes += values.nbytes
        if self._new_bytes > GARBAGE_BYTES:
            self._new_bytes = 0
            for key in [k for k, piece in self._pieces.items() if piece.storage.expired()]:
                del self._pieces[key]


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Returns the tensors that an operation changes in place."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    changed = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    leaves = tree_leaves([given.get(name) for name in changed])
    return [each for each in leaves if isinstance(each, torch.Tensor)]


def _fill(parameter: nn.Parameter, piece: Piece) -> nn.Parameter:
    """Returns a whole parameter that has the elements of a piece; others are NaN."""
    values = torch.full(parameter.shape, torch.nan, dtype=parameter.dtype)
    values.view(-1)[piece.start : piece.start + len(piece.values)] = piece.values
    whole = nn.Parameter(values, parameter.requires_grad)
    vars(whole).update(vars(parameter))
    return whole


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _is_whole(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor has all elements of its storage, in their order."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
