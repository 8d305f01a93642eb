"""The vocabulary head: only supervised positions reach it, and long batches of them in chunks.

Logits of all positions would take the most memory of a step with a large vocabulary. So the head
gets a chunk of positions at a time, and each chunk computes its part of the loss and, at once, the
gradients of the head's input and weights: only one chunk of logits exists. The backward pass
multiplies these gradients by the gradient of the loss, as in torch's `linear_cross_entropy` and in
Liger. Those take the weight of a plain linear layer; here the head's own code runs, so it may be
adapted, tied, in 4 bits or split over ranks.

All of this happens while the model calls its head, so FSDP2 and ZeRO-3 have gathered its weights.
What the model's code does to logits afterwards (`models/tail`) is recorded once and repeated for
each chunk. The model then goes on with the logits of one position. Its output gets the loss in the
place of logits, connected through this position: so the hooks of every engine on modules and
outputs run in their order, whether a rank uses chunks or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sft.errors import ModelError
from sft.models.dtypes import DTYPES
from sft.models.fake import is_fake
from sft.models.layers import embedding_layers, is_split
from sft.models.tail import NotRepeatable, Tail, TailRecorder

CHUNK_BYTES = 2**28  # of a chunk's logits in fp32
COPIES = 3  # of logits at the peak of whole ones: themselves, the softmax and the gradient
GATHERED = "ZeRO-3 gathers parts of this head one by one"
PROBE, PROBE_ROWS = 8, 3  # positions of the proof, and of each of its chunks
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative errors; of other dtypes 3e-2

# Returns sums over positions, the loss first. It gets logits (copies * positions, vocabulary) in
# fp32 or wider, and which positions of the micro-batch they belong to.
Measure = Callable[[torch.Tensor, slice], dict[str, torch.Tensor]]
WHOLE = slice(None)


def widen(logits: torch.Tensor) -> torch.Tensor:
    """Returns logits in fp32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def most_rows(vocabulary: int, trained_bytes: int = 0) -> int:
    """Returns how many rows of logits are computed at once before chunks are used.

    Chunks need the gradient of a trained head, of `trained_bytes`, a second time. They are used
    where that is less than what whole logits take in addition to those of a chunk.
    """
    return (_chunk_bytes(trained_bytes) + trained_bytes // COPIES) // (4 * vocabulary) or 1


def _chunk_bytes(trained_bytes: int) -> int:
    """Returns the bytes of a chunk's logits. Each chunk adds to the gradient of a trained head, so
    they are larger with one."""
    return max(CHUNK_BYTES, trained_bytes // 4)


def take(values: torch.Tensor, part: slice) -> torch.Tensor:
    """Returns those of a micro-batch's `values` that belong to a part of its positions."""
    return values if part == WHOLE else values[part]


class SupervisedHead:
    """Hooks that let only chosen positions reach the vocabulary head: no others get logits.

    While `positions` is set, the head's input (batch, time, hidden) becomes (positions, hidden),
    and the model returns logits (positions, vocabulary). As hooks on the head they work for every
    architecture that has one, and through DDP and checkpointing.

    `copies`: how often each position is in the head's input, (copies * positions, hidden): models
    that share a pass get rows of their own. `say` gets the reason if chunks cannot be used.
    """

    def __init__(
        self, model: nn.Module, copies: int = 1, say: Callable[[str], None] = lambda _: None
    ):
        head = embedding_layers(model)[1]
        if head is None:
            raise ModelError(
                "model.name: the model does not say which layer gives logits of its vocabulary "
                "(get_output_embeddings), so it cannot be trained on text"
            )
        self.model: Any = model
        self.layer, self.copies, self.say = head, copies, say
        self.positions: torch.Tensor | None = None  # flat indices into batch * time
        self.factor = 1.0  # that the loss will be multiplied by before its backward pass
        self.tail: Tail | None = None  # None: not known yet
        self.why_whole = ""  # the reason why chunks cannot be used
        self._pass: _ChunkedPass | None = None
        self._compute: Callable[..., torch.Tensor] = head.forward
        head.register_forward_pre_hook(self._select)
        head.forward = self._run_chunks
        model.register_forward_hook(self._return_loss)

    # -- a pass

    def sums(
        self, run: Callable[[], Any], positions: torch.Tensor, measure: Measure
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """Returns the sums that `measure` finds at `positions`, and the output of the pass `run`.

        With chunks, the output has the loss in the place of logits.
        """
        rows = self._rows_per_chunk(len(positions))
        chunked = _ChunkedPass(measure, self.tail, rows, self.copies, self.factor) if rows else None
        with self._selecting(positions, chunked):
            output = run()
        if chunked is None:
            return measure(widen(output.logits), WHOLE), output
        assert chunked.found, "the model did not call its head"
        first = next(iter(chunked.found))
        return {**chunked.found, first: output.logits}, output

    @contextmanager
    def _selecting(self, positions: torch.Tensor, chunked: _ChunkedPass | None) -> Iterator[None]:
        self.positions, self._pass = positions, chunked
        try:
            yield
        finally:
            self.positions = self._pass = None

    def _select(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        if self.positions is None:
            return None
        return (inputs[0].flatten(0, 1)[self.positions],)

    def _run_chunks(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Replaces the head's `forward`."""
        if self._pass is None:
            return self._compute(states, *args, **kwargs)
        return self._pass.run(self._compute, states)

    def _return_loss(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._pass is not None:
            output.logits = self._pass.leave(output.logits)

    # -- whether chunks are used

    def limit(self) -> int:
        """Returns how many positions get their logits at once; more are cut into chunks."""
        return most_rows(self._vocabulary(), self._trained_bytes()) // self.copies or 1

    def _rows_per_chunk(self, number: int) -> int:
        """Returns the positions of a chunk, if so many of them are cut; 0: they are not."""
        if self.why_whole or number <= self.limit() * self.copies:
            return 0
        if self._gathers_parts():
            self._refuse(GATHERED)
        elif self.tail is None and is_split(self.model):
            self._refuse("its code was not tried when the run began")
        elif self.tail is None:
            self.prove()
        if self.why_whole:
            return 0
        chunk = _chunk_bytes(self._trained_bytes())
        return max(1, chunk // (4 * self._vocabulary() * self.copies))

    def _refuse(self, reason: str) -> None:
        self.why_whole = reason
        self.say(reason)

    def _trained_bytes(self) -> int:
        trained = (p for p in self.layer.parameters() if p.requires_grad)
        return sum(4 * getattr(p, "ds_numel", p.numel()) for p in trained)

    def _vocabulary(self) -> int:
        weight: Any = getattr(self.layer, "weight", None)
        found = getattr(self.layer, "out_features", None)
        if found is None and weight is not None:
            found = getattr(weight, "ds_shape", weight.shape)[0]
        return found or self.model.config.get_text_config().vocab_size

    def _gathers_parts(self) -> bool:
        """Returns whether ZeRO-3 gathers weights inside the head, once for each of its calls.

        Ranks would have to agree on the number of chunks.
        """
        inner = (m for m in self.layer.modules() if m is not self.layer)
        return any(hasattr(p, "ds_id") for m in inner for p in m.parameters(recurse=False))

    # -- the proof

    def prove(self, precision: str | None = None) -> None:
        """Sets `tail`, or `why_whole` if chunks do not give the loss and gradients of the whole.

        `precision`: that of the run, unless the model's own forward pass has it already.
        """
        if self._gathers_parts():
            self._refuse(GATHERED)
            return
        device = next(self.model.parameters()).device
        cast: Any = nullcontext()
        if precision not in (None, "fp32"):
            cast = torch.autocast(device.type, DTYPES[precision])
        ids = (7 * torch.arange(PROBE, device=device) + 5) % max(2, self._vocabulary() // 2)
        was_training = self.model.training
        self.model.eval()
        try:
            with cast, torch.no_grad():
                tail = self._record(ids)
                if not is_fake(self.model):
                    self._try_chunks(tail, ids)
            self.tail = tail
        except NotRepeatable as error:
            self._refuse(str(error))
        except Exception as error:  # noqa: BLE001  # a model may fail in any way
            self._refuse(f"a proof with a few tokens failed ({' '.join(str(error).split())})")
        finally:
            self.model.train(was_training)

    def _record(self, ids: torch.Tensor) -> Tail:
        """Returns what the model's code does to logits. Raises NotRepeatable."""
        with TailRecorder() as recorder:
            output = self._probe(ids, self.layer.register_forward_hook(_begin(recorder)))
        return recorder.finish(output.logits)

    def _try_chunks(self, tail: Tail, ids: torch.Tensor) -> None:
        """Raises NotRepeatable unless chunks give the loss and gradients of the whole.

        Both are computed while the model calls its head, whose weights are then gathered.
        """
        found: list[torch.Tensor | Exception] = []

        def compare(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            try:
                with torch.enable_grad():
                    found.append(self._compare(tail, inputs[0].detach().requires_grad_(), ids))
            except Exception as error:  # noqa: BLE001  # engines expect that the pass goes on
                found.append(error)

        output = self._probe(ids, self.layer.register_forward_pre_hook(compare))
        (logits,) = found
        if isinstance(logits, Exception):
            raise logits
        if not _is_close(output.logits, logits, logits.dtype):
            raise NotRepeatable("what its code does to logits gives others when repeated")

    def _probe(self, ids: torch.Tensor, hook: Any) -> Any:
        """Returns the output of a pass over a few tokens, with a hook on the head."""
        positions = torch.arange(PROBE * self.copies, device=ids.device)
        try:
            with self._selecting(positions, None):
                return self.model(input_ids=ids[None], use_cache=False)
        finally:
            hook.remove()

    def _compare(self, tail: Tail, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the model's logits from the head's input.

        Raises NotRepeatable unless chunks give their loss and gradients.
        """
        logits = tail(self._compute(states))
        weights = torch.linspace(0.5, 1.5, PROBE, device=logits.device)

        def measure(found: torch.Tensor, part: slice) -> dict[str, torch.Tensor]:
            own = targets[part].repeat(self.copies)
            each = F.cross_entropy(found, own, reduction="none")
            return {"loss": each @ weights[part].repeat(self.copies).to(each)}

        with torch.autocast(logits.device.type, enabled=False):
            whole = measure(widen(logits), WHOLE)["loss"]
        leaves = leaves_of(whole, states)
        expected = torch.autograd.grad(whole, [states, *leaves])
        chunked = _ChunkedPass(measure, tail, PROBE_ROWS, self.copies, 2.0)
        row = chunked.run(self._compute, states)
        loss = chunked.leave(tail(row))
        if len(chunked.leaves) != len(leaves):
            raise NotRepeatable("a chunk reaches other weights than the whole batch")
        found = torch.autograd.grad(loss, [states, *leaves])
        pairs = zip([whole.detach(), *expected], [loss.detach(), *found], strict=True)
        if not all(_is_close(a, b, row.dtype) for a, b in pairs):
            raise NotRepeatable("chunks of this model do not give the loss and gradients of all")
        return logits.detach()


def _begin(recorder: TailRecorder) -> Callable[..., None]:
    return lambda _, __, logits: recorder.begin(logits)


def _is_close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((a - b).norm() <= ROUNDING.get(dtype, 3e-2) * a.norm())


class _ChunkedPass:
    """The loss of one pass, computed in chunks; `leave` connects it to the model's output."""

    def __init__(
        self, measure: Measure, tail: Tail | None, rows: int, copies: int, factor: float
    ) -> None:
        assert tail is not None
        self.measure, self.tail, self.rows, self.copies = measure, tail, rows, copies
        self.factor = factor
        self.found: dict[str, torch.Tensor] = {}  # sums, the loss first
        self.leaves: list[torch.Tensor] = []  # weights that the loss depends on
        self.gradients: list[torch.Tensor | None] = []  # of states and leaves, times `factor`
        self.incoming: torch.Tensor | None = None  # gradient of the loss

    def run(self, compute: Callable[..., torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """Computes sums and gradients from the head's input (copies * positions, hidden).

        Returns logits of the first position (copies, vocabulary), connected to `states`.
        """
        parts = states.detach().view(self.copies, -1, states.shape[-1])
        differentiates = torch.is_grad_enabled()
        wanted = differentiates and states.requires_grad
        of_states = torch.zeros_like(parts) if wanted else None
        first = None
        for start in range(0, parts.shape[1], self.rows):
            part = slice(start, start + self.rows)
            chunk = parts[:, part].reshape(-1, states.shape[-1]).requires_grad_(wanted)
            # Its backward pass follows at once: no hooks of the caller move what it saves.
            with saved_tensors_hooks(_keep, _keep):
                row = self._run_chunk(compute, chunk, part, of_states, differentiates)
            first = row if first is None else first
        assert first is not None
        if of_states is not None:
            of_states = of_states.view_as(states)
        self.gradients.insert(0, of_states)
        return _Enter.apply(self, first, states, *self.leaves) if differentiates else first

    def _run_chunk(
        self,
        compute: Callable[..., torch.Tensor],
        chunk: torch.Tensor,
        part: slice,
        of_states: torch.Tensor | None,
        differentiates: bool,
    ) -> torch.Tensor:
        """Adds the sums and gradients of a chunk; returns its logits of the first position."""
        logits = compute(chunk)
        row = logits.detach().view(self.copies, -1, logits.shape[-1])[:, 0].clone()
        logits = widen(self.tail(logits))
        with torch.autocast(logits.device.type, enabled=False):  # as the loss of whole logits
            sums = self.measure(logits, part)
        loss = next(iter(sums.values()))
        if differentiates and loss.requires_grad:
            if not self.found:
                self.leaves = leaves_of(loss, chunk)
            inputs = [chunk] * (of_states is not None) + self.leaves
            found = torch.autograd.grad(loss * self.factor, inputs, allow_unused=True)
            if of_states is not None:
                own = found[0]
                if own is not None:
                    of_states[:, part] = own.view(self.copies, -1, own.shape[-1])
                found = found[1:]
            self._add(found)
        for name, value in sums.items():
            self.found[name] = self.found.get(name, 0) + value.detach()
        return row

    def _add(self, found: tuple[torch.Tensor | None, ...]) -> None:
        """Adds gradients of leaves, in fp32 or wider."""
        self.gradients = self.gradients or [None] * len(found)
        for i, gradient in enumerate(found):
            total = self.gradients[i]
            if gradient is None:
                continue
            if total is None:
                wide = widen(gradient)
                alone = wide is not gradient or _is_alone(gradient, found)
                self.gradients[i] = wide if alone else wide.clone()
            else:
                total.add_(gradient)

    def leave(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the loss in the place of the model's `logits` of the first position."""
        loss = next(iter(self.found.values()))
        if not torch.is_grad_enabled():
            return loss
        assert logits.requires_grad or all(g is None for g in self.gradients)
        result: torch.Tensor = _Leave.apply(self, logits, loss)
        return result

    def take_gradients(self) -> list[torch.Tensor | None]:
        """Returns the gradients of states and leaves times the gradient of the loss; only once."""
        assert self.incoming is not None
        ratio = self.incoming / self.factor
        taken, self.gradients = self.gradients, []
        assert taken, "a second backward pass: the gradients of the first one are gone"
        return [None if each is None else each.mul_(ratio) for each in taken]


class _Enter(torch.autograd.Function):
    """Returns the logits of the first position. Its backward pass returns what chunks computed."""

    @staticmethod
    def forward(ctx: Any, done: _ChunkedPass, row: torch.Tensor, *inputs: torch.Tensor) -> Any:
        ctx.done, ctx.dtypes = done, [_gradient_dtype(each) for each in inputs]
        return row.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        taken = ctx.done.take_gradients()
        taken += [None] * (len(ctx.dtypes) - len(taken))
        cast = [g if g is None else g.to(d) for g, d in zip(taken, ctx.dtypes, strict=True)]
        return None, None, *cast


def _gradient_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns the dtype of its gradient: of a weight that FSDP2 has gathered in bf16, fp32."""
    return (tensor.grad_dtype if tensor.is_leaf else None) or tensor.dtype


class _Leave(torch.autograd.Function):
    """Returns the loss. Its backward pass keeps the loss's gradient for `_Enter`."""

    @staticmethod
    def forward(ctx: Any, done: _ChunkedPass, logits: torch.Tensor, loss: torch.Tensor) -> Any:
        ctx.done, ctx.shape = done, (logits.shape, logits.dtype, logits.device)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.done.incoming = gradient
        shape, dtype, device = ctx.shape
        return None, torch.zeros(shape, dtype=dtype, device=device), None


def leaves_of(tensor: torch.Tensor, *but: torch.Tensor) -> list[torch.Tensor]:
    """Returns the leaves of autograd's graph that `tensor` depends on, without those in `but`."""
    found: dict[int, torch.Tensor] = {}
    seen, stack = set[Any](), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor) and all(leaf is not each for each in but):
            found[id(leaf)] = leaf
        stack += [following for following, _ in node.next_functions]
    return list(found.values())


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _is_alone(gradient: torch.Tensor, among: tuple[torch.Tensor | None, ...]) -> bool:
    """Returns whether a gradient may be changed in place: nothing else has its elements."""
    storage = gradient.untyped_storage()._cdata
    users = sum(g is not None and g.untyped_storage()._cdata == storage for g in among)
    return users == 1 and gradient.is_contiguous()
