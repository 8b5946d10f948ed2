"""A model left as it was found: what an estimate, or the forward of a model, may change is taken down and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensors import reshard_, sharding_modules
from ..errors import EstimationError, LayoutError
from ..memory import flaw_of, flaw_of_storage, is_lazy, place_of
from .attributes import Attributes
from .claims import random_state
from .totals import check_no_inference

Scope = tuple[nn.Module, Iterable[nn.Parameter]]  # a model, and the parameters that a Fisher is wanted of
On = Callable[[int], AbstractContextManager[None]]
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def preserved(scopes: Sequence[Scope]) -> Iterator[On]:
    """Eval mode, gradients only for each model's scope, no gradients from before; all is put back at the end.

    Put back, also after an error: modes; which parameters, buffers, submodules, hooks and other attributes every
    module has (the same objects; of lists, dicts and sets what is in them, of configs their attributes); requires_grad
    and .grad of every parameter; memory, shape and bits of every buffer and of
    embeddings with a max_norm; and torch's random state on the CPU and on
    the devices of the models. Inside, gradients are computed whatever mode the caller is in.

    Yields:
        i -> a context in which model i is used. Where models share a part, each finds there what it left, as if it were
        alone.

    Raises:
        EstimationError: a tensor was made under inference_mode; at the end, something could not be put back.
        LayoutError: a buffer has no shape yet.

    """
    models = [model for model, _ in scopes]
    sharding = sharding_modules(models)  # of FSDP2: a snapshot of gathered parameters would not fit what it knows
    reshard_(sharding)
    for model in models:
        check_no_inference((*model.named_parameters(), *model.named_buffers()))
    before = [Snapshot(model) for model in models]
    devices = {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}
    with random_state(sorted(devices, key=str)):
        try:
            turns = _Turns()
            for model, scope in scopes:
                _prepare(model, scope)
                if sharing := _share(models):
                    turns.add(model)
                    _restore(before)
            with torch.inference_mode(False), torch.enable_grad():
                yield turns if sharing else _together
        except BaseException:
            reshard_(sharding)
            _restore(before)  # the error that is under way counts, whatever this meets
            raise
        reshard_(sharding)
        if failure := _restore(before):
            raise EstimationError(f"not all of the model could be put back as it was: {failure}") from failure


def _prepare(model: nn.Module, scope: Iterable[nn.Parameter]) -> None:
    chosen = {id(p) for p in scope}
    try:
        model.eval()
    except NotImplementedError as error:  # what torch.export gives
        raise EstimationError(f"the model has no eval mode ({error}); pass the one that it was made from") from error
    for p in model.parameters():
        p.grad = None
        p.requires_grad_(id(p) in chosen)


def _share(models: Sequence[nn.Module]) -> bool:
    """Whether any two have a module, parameter or buffer in common."""
    seen: set[int] = set()
    for model in models:
        own = {id(part) for parts in (model.modules(), model.parameters(), model.buffers()) for part in parts}
        if not seen.isdisjoint(own):
            return True
        seen |= own
    return False


def _together(_: int) -> AbstractContextManager[None]:
    return nullcontext()


class _Turns:
    """Models that share a part: each finds the state that it left when its turn comes."""

    def __init__(self) -> None:
        self._models: list[nn.Module] = []
        self._states: list[Snapshot] = []

    def add(self, model: nn.Module) -> None:
        self._models.append(model)
        self._states.append(Snapshot(model))

    @contextmanager
    def __call__(self, i: int) -> Iterator[None]:
        _restore([self._states[i]])
        yield
        reshard_(sharding_modules([self._models[i]]))
        self._states[i] = Snapshot(self._models[i])


def _restore(snapshots: Iterable[Snapshot]) -> Exception | None:
    """Put all of them back; again where a signal came between. The first thing that could not be, or None."""
    try:
        failures = [snapshot.restore() for snapshot in snapshots]
    except BaseException:
        for snapshot in snapshots:
            snapshot.restore()
        raise
    return next((failure for failure in failures if failure is not None), None)


class Snapshot:
    """The state of a model.

    Raises:
        LayoutError: a buffer has no shape yet.

    """

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._held: list[tuple[Any, dict[str, Any]]] = [
            (held, dict(held))
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)  # keeps them elsewhere, and no forward can change them
            for held in (module._parameters, module._buffers, module._modules)
        ]
        self._attributes = Attributes(model)
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._buffers = [_Buffer(name, buffer) for name, buffer in (*model.named_buffers(), *_renormed(model))]

    @torch.no_grad()
    def restore(self) -> Exception | None:
        """Put everything back; what cannot be does not keep the rest from it. Returns the first such error."""
        failed: list[Exception] = []

        def attempt(step: Callable[..., Any], *args: Any) -> None:
            try:
                step(*args)
            except Exception as error:
                failed.append(error)

        for module, training in self._modes:
            module.training = training
        for held, before in self._held:
            if len(held) != len(before) or any(
                a != b or x is not y for (a, x), (b, y) in zip(held.items(), before.items(), strict=True)
            ):
                held.clear()
                held.update(before)
        self._attributes.put_back()
        for p, requires_grad, grad in self._parameters:
            attempt(p.requires_grad_, requires_grad)
            attempt(setattr, p, "grad", grad)
        for buffer in self._buffers:
            attempt(buffer.restore)
        return failed[0] if failed else None


class _Buffer:
    """A buffer's memory, shape and bits. Of one that is offloaded or freed there is nothing to keep."""

    def __init__(self, name: str, buffer: Tensor) -> None:
        if is_lazy(buffer):
            raise LayoutError(f"buffer {name!r} has no shape yet: run the lazy module once on a batch")
        self._buffer, self._memory, self._before = buffer, None, None
        self._plain = flaw_of(buffer) is None
        if self._plain:
            self._memory = buffer.detach()  # keeps what the buffer lies in, also after `buffer.data = …`
            self._nbytes = self._memory.untyped_storage().nbytes()
        if self._plain or not (buffer.is_meta or (buffer.layout == torch.strided and flaw_of_storage(buffer))):
            self._before = buffer.detach().clone()

    def restore(self) -> None:
        if self._memory is not None and self._before is not None:
            if self._memory.untyped_storage().nbytes() != self._nbytes:
                self._memory.untyped_storage().resize_(self._nbytes)
            if place_of(self._buffer) != place_of(self._memory):
                self._buffer.data = self._memory
            if not _same_bits(self._memory, self._before):
                self._memory.copy_(self._before)
        elif self._before is not None and not _same_parts(self._buffer, self._before):
            if self._buffer.layout in _COMPRESSED and self._buffer.values().shape != self._before.values().shape:
                self._buffer.resize_as_sparse_(self._before)
            self._buffer.copy_(self._before)  # sparse and its like have no memory of one piece


def _renormed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tables of embeddings with a max_norm: their forward shrinks the rows that it looks up, for good."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            table = module._parameters.get("weight")
            if table is not None:
                yield f"{name}.weight", table


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.itemsize not in _BITS:  # complex128
        return torch.equal(a, b)
    return torch.equal(a.view(_BITS[a.itemsize]), b.view(_BITS[b.itemsize]))


def _same_parts(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that are not plain are alike, where that can be told."""
    if a.shape != b.shape or a.layout != b.layout or a.dtype != b.dtype:
        return False
    if a.layout == torch.sparse_coo:
        return torch.equal(a._indices(), b._indices()) and torch.equal(a._values(), b._values())
    if a.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [(t.crow_indices(), t.col_indices(), t.values()) for t in (a, b)]
        return all(map(torch.equal, *parts))
    if a.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [(t.ccol_indices(), t.row_indices(), t.values()) for t in (a, b)]
        return all(map(torch.equal, *parts))
    try:
        return torch.equal(a, b)
    except (RuntimeError, NotImplementedError):
        return False
