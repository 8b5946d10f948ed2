"""Where parameters live: one buffer for a model, or one storage for many models that are alike. Optional, for speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from .errors import ArgumentError, DeviceError, DTypeError, LayoutError
from .guards import alone, signals_deferred
from .kernels.cpu import expect_writes
from .layout import Layout
from .memory import check_addressable, check_disjoint, span
from .overlaps import held_by, name_in, overlaps
from .scope import Params, select_parameters
from .wrappers import check_gathered

_LINE = 64  # bytes of a cache line


def flatten_(model: torch.nn.Module, params: Params = None) -> torch.Tensor:
    """Re-home the selected parameters in one contiguous buffer, in layout order, without changing a value.

    The parameters stay the same objects (optimisers and ties go on working); only their storage moves. Optional: it
    makes a whole model one run of memory. Moving the model afterwards (`.to()`) takes the parameters apart again.

    Returns:
        The buffer, [numel], of the parameters' dtype and device.

    Raises:
        DTypeError, DeviceError: the parameters differ in dtype or device.
        LayoutError: two parameters share memory without being the same parameter, one has no memory of its own (a
            DTensor, a sparse tensor, …); or as in `Layout.from_module`.

    """
    parameters = select_parameters(model, params)
    check_gathered("model", model, for_good=True)
    like = _alike({f"parameter {name!r}": p for name, p in parameters.items()}, [model])
    layout = Layout({name: p.shape for name, p in parameters.items()})
    buffer = _empty(like, layout.numel)
    _move(layout, buffer, parameters)
    return buffer


def stack_(models: Iterable[torch.nn.Module] | Mapping[str, torch.nn.Module], params: Params = None) -> torch.Tensor:
    """Re-home the selected parameters of many models that are alike in one storage, without changing a value.

    Row i is model i, its parameters one after another in layout order. Rows begin at the same place of a cache line, so
    that kernels walk several of them side by side; where P elements do not fill whole lines, a few between two rows
    belong to none. The parameters stay the same objects, views of their rows: whatever is done to the returned tensor
    is done to the models. Moving a model afterwards (`.to()`) takes it out. `torch.save` and `copy.deepcopy` of one
    model take the whole storage along, as for all views: save clones of its state.

    Args:
        models: of one layout, dtype and device; or {name: model}.
        params: which parameters, as in `Layout.from_module`.

    Returns:
        [N, P] of the parameters' dtype and device: N models, P elements each.

    Raises:
        ArgumentError: no models.
        LayoutError, DTypeError, DeviceError: a model differs from the first in names, shapes, dtype or device; two
            parameters share memory; or as `flatten_`. Nothing was moved then.

    """
    labelled = dict(models.items() if isinstance(models, Mapping) else enumerate(_listed(models)))
    selected = {f"model {label!r}": select_parameters(model, params) for label, model in labelled.items()}
    if not selected:
        raise ArgumentError("no models to stack")
    for where, model in zip(selected, labelled.values(), strict=True):
        check_gathered(where, model, for_good=True)
    (first, its), *_ = selected.items()
    layout = Layout({name: p.shape for name, p in its.items()})
    for where, parameters in selected.items():
        own = Layout({name: p.shape for name, p in parameters.items()})
        if (difference := layout.difference(own, first, where)) is not None:
            raise LayoutError(f"models that are stacked are alike: {difference}")
    every = {f"{w}, parameter {n!r}": p for w, parameters in selected.items() for n, p in parameters.items()}
    like = _alike(every, labelled.values())
    per_line = max(1, _LINE // like.element_size())
    width = -(-layout.numel // per_line) * per_line
    stacked = _empty(like, len(selected), width)[:, : layout.numel]
    for row, parameters in zip(stacked, selected.values(), strict=True):
        _move(layout, row, parameters)
    return stacked


def _listed(models: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    if isinstance(models, torch.nn.Module) or not isinstance(models, Iterable):
        raise ArgumentError(f"models is a {type(models).__name__}, expected several models")
    return list(models)


def _alike(parameters: Mapping[str, torch.Tensor], models: Iterable[torch.nn.Module]) -> torch.Tensor:
    """The first of the parameters, after a check that one buffer can hold all and that all can be moved.

    Args:
        parameters: label for messages -> parameter.
        models: what holds them; nothing that stays behind may share their memory, as it would no longer afterwards.

    """
    (first, like), *_ = parameters.items()
    for label, p in parameters.items():
        check_addressable(label, p)
        if p.dtype != like.dtype:
            raise DTypeError(f"{label} is {p.dtype}, expected {like.dtype} as {first}: one buffer, one dtype")
        if p.device != like.device:
            raise DeviceError(f"{label} is on {p.device}, expected {like.device} as {first}")
    labels, spans = list(parameters), np.array([span(p) for p in parameters.values()])
    check_disjoint(spans[:, 0], spans[:, 1], lambda i: labels[i])
    moved = {id(p) for p in parameters.values()}
    for model in models:
        others = [t for held in held_by(model) for t in held.values() if t is not None and id(t) not in moved]
        for i, j, _ in overlaps(spans[:, 0], spans[:, 1], others):
            raise LayoutError(
                f"{labels[i]} and {name_in(model, others[j])} share memory, and only the former would move"
            )
    return like


@torch.inference_mode(False)  # parameters that lay in a tensor of that mode could not be trained any more
def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return expect_writes(torch.empty(shape, dtype=like.dtype, device=like.device))


def _move(layout: Layout, buffer: torch.Tensor, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Copy the parameters into the buffer, [numel], and make them views of it."""
    with alone, signals_deferred():  # a run that another thread is in may be writing to the old memory
        for name, view in layout.views(buffer).items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view
